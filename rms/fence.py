"""The fence around an instance: who may open its capability nodes.

`CUDA_VISIBLE_DEVICES` tells a job which instance is its own, and stops nobody. What stops others is that the driver
wants to see two character devices opened by whoever uses an instance, those of its GI and of its CI, which by default
everybody may read. Here they are root's, and one user at most may read them besides: through a POSIX ACL, or as their
owner where the file system has none. docs/security.md says what that fences, and what it does not.

NVIDIA's setuid nvidia-modprobe gives a node its default mode again for any user who asks, unless the capability's entry
in /proc says `DeviceFileModify: 0`; the entry is a new one after every create. It then does not make nodes either, so
they are made here.
"""

from __future__ import annotations

import errno
import os
import signal
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from rms.device import Capability, DeviceError, Nvml

_ACL = "system.posix_acl_access"
_USER_OBJ, _USER, _GROUP_OBJ, _MASK, _OTHER = 0x01, 0x02, 0x04, 0x10, 0x20  # linux/posix_acl_xattr.h
_READ = 4
_NOBODY = 0xFFFFFFFF  # the id of an ACL's entries that name nobody
_NO_SYNC = 0x4000  # AT_STATX_DONT_SYNC
_KCMP = {"x86_64": 312, "aarch64": 272}
"""The number of the system call kcmp(2), which tells whether two tasks share something. It saves most of the time on a
node with many threads; elsewhere all of them are looked at."""
_FILES = 2  # KCMP_FILES
_MODIFY = "DeviceFileModify"
_SETTLE_SECONDS = 2.0
SCAN_SECONDS = 2.0
"""How long one look for open nodes may take: as many files as users have open, at about 5 microseconds each where there
is a processor free for it."""
_UNSEEN = -1


class FenceError(DeviceError):
    """An instance can't be fenced. The text says what to do."""

    def __init__(self, text: str) -> None:
        Exception.__init__(self, text)
        self.code = Nvml.UNKNOWN


class Driver:
    """Where the driver shows its capabilities: in /proc and /dev below `root`, which is another one than / in tests."""

    def __init__(self, root: str) -> None:
        self._proc = os.path.join(root, "proc")
        self._dev = os.path.join(root, "dev/nvidia-caps")
        self._minors: dict[str, int] = {}
        self._major = 0

    def capabilities(self, gpu: int, gi: int, ci: int | None) -> list[Capability]:
        """Of the instance on the GPU with that minor number: of its GI, and of its CI if there is one.

        Raises FenceError where the driver has none.
        """
        entries = f"{self._proc}/driver/nvidia/capabilities/gpu{gpu}/mig"
        names = [f"gi{gi}/access", *([] if ci is None else [f"gi{gi}/ci{ci}/access"])]
        return [self._capability(f"gpu{gpu}/{name}", f"{entries}/{name}") for name in names]

    def config(self) -> Capability:
        """The capability to create and destroy instances."""
        return self._capability("config", f"{self._proc}/driver/nvidia/capabilities/mig/config")

    def _capability(self, name: str, entry: str) -> Capability:
        if not self._minors:
            self._read()
        if (minor := self._minors.get(name)) is None:
            raise FenceError(f"the driver knows no capability {name}")
        return Capability(f"{self._dev}/nvidia-cap{minor}", os.makedev(self._major, minor), entry)

    def _read(self) -> None:
        path = f"{self._proc}/driver/nvidia-caps/mig-minors"
        try:
            with open(path, encoding="ascii") as file:
                minors = {name: int(minor) for name, minor in map(str.split, file)}
            path = f"{self._proc}/devices"
            with open(path, encoding="ascii") as file:
                devices = file.read().partition("Block devices")[0].splitlines()
            self._major = next(int(line.split()[0]) for line in devices if line.split()[1:] == ["nvidia-caps"])
        except (OSError, ValueError, StopIteration) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not as the driver writes it"
            raise FenceError(
                f"instances can't be fenced, {path}: {why}; where every user of this node may use every instance, "
                "`fence = false` in rms.toml goes without"
            ) from error
        self._minors = minors


def fence(capabilities: Sequence[Capability], uid: int | None) -> None:
    """Let one user open the nodes besides root, or (None) nobody. Nodes that are missing are made.

    Raises FenceError; then the nodes may be anybody's.
    """
    try:
        entries = [capability.entry for capability in capabilities if capability.entry]
        written = [entry for entry in entries if _leave_alone(entry, uid is None)]
        if written:
            _settle()
        for capability in capabilities:
            _restrict(capability, uid or None)
    except OSError as error:
        raise FenceError(f"cannot fence {error.filename}: {error.strerror}") from error


def _leave_alone(entry: str, may_be_gone: bool) -> bool:
    """See to it that nvidia-modprobe does not change the node. Returns whether it might have until now."""
    try:
        if _modified(entry) == "0":
            return False  # as it is from the start with NVreg_ModifyDeviceFiles=0
        descriptor = os.open(entry, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        if may_be_gone:
            return False  # with the instance; then nvidia-modprobe knows no node for it
        raise
    try:
        os.write(descriptor, f"{_MODIFY}: 0\n".encode())
    finally:
        os.close(descriptor)
    if _modified(entry) != "0":
        raise FenceError(f"the driver does not take {_MODIFY}: 0 in {entry}; load it with NVreg_ModifyDeviceFiles=0")
    return True


def _settle() -> None:
    """Wait for what may have read an entry before it was written: a nvidia-modprobe that runs. One that a user has
    started is ended, since the user may have stopped it to let it go on later."""
    running = [*map(int, filter(str.isdecimal, os.listdir("/proc")))]
    ended = set()
    until = time.monotonic() + _SETTLE_SECONDS
    while running := [pid for pid in running if _modprobe(pid)]:
        for pid in running:
            with suppress(OSError):
                if not roots(pid):
                    os.kill(pid, signal.SIGKILL)
                    ended.add(pid)
        if time.monotonic() > until:
            if left := {*running} - ended:
                raise FenceError(f"nvidia-modprobe (process {min(left)}) does not end, and might open what is fenced")
            return  # the kernel has it wait for something of its user's (FUSE), and ends it as soon as that is over
        time.sleep(0.001)


def _modprobe(pid: int) -> bool:
    """Whether that is a nvidia-modprobe with rights of root's. A user's own program may have that name, too."""
    try:
        return os.readlink(f"/proc/{pid}/exe").rpartition("/")[2].partition(" ")[0] == "nvidia-modprobe" and (
            b"0" in _uids(pid)
        )
    except OSError:  # it has ended, or is the kernel's
        return False


def _modified(entry: str) -> str:
    with open(entry, encoding="ascii", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name == _MODIFY:
                return value.strip()
    return ""


def _restrict(capability: Capability, uid: int | None) -> None:
    descriptor = _opened(capability)
    try:
        here = f"/proc/self/fd/{descriptor}"  # what we have looked at, whatever the path leads to by now
        os.chown(here, 0, 0)
        try:
            os.setxattr(here, _ACL, _acl(uid))
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            os.chmod(here, 0o400)
            if uid is not None:
                os.chown(here, uid, 0)
    finally:
        os.close(descriptor)


def _opened(capability: Capability) -> int:
    """The node, not its device: a descriptor that can't be read from. A link is not followed."""
    flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(capability.node, flags)
    except FileNotFoundError:
        os.makedirs(os.path.dirname(capability.node), 0o755, exist_ok=True)
        with suppress(FileExistsError):
            os.mknod(capability.node, stat.S_IFCHR | 0o400, capability.device)
        descriptor = os.open(capability.node, flags)
    found = os.fstat(descriptor)
    if not (stat.S_ISCHR(found.st_mode) and found.st_rdev == capability.device):
        os.close(descriptor)
        device = f"{os.major(capability.device)}:{os.minor(capability.device)}"
        raise FenceError(f"{capability.node} is not the device {device}: remove it")
    return descriptor


def _acl(uid: int | None) -> bytes:
    """Root reads, and the user if there is one. Without one it is a plain mode 0400, and the kernel keeps no ACL."""
    entries = [(_USER_OBJ, _READ, _NOBODY), (_GROUP_OBJ, 0, _NOBODY), (_OTHER, 0, _NOBODY)]
    if uid is not None:
        entries[1:1] = [(_USER, _READ, uid)]
        entries[3:3] = [(_MASK, _READ, _NOBODY)]
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def readers(capability: Capability) -> set[int] | None:
    """The users who may open a node besides root; None: others too. Raises OSError."""
    found = os.lstat(capability.node)
    users = {found.st_uid} - {0}
    try:
        acl = os.getxattr(capability.node, _ACL, follow_symlinks=False)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
            raise
        return None if found.st_mode & 0o077 else users
    entries = list(struct.iter_unpack("<HHI", acl[4:]))
    mask = next((rights for tag, rights, _ in entries if tag == _MASK), 0o7)
    users |= {user for tag, rights, user in entries if tag == _USER and rights & mask}
    wide = any(tag == _OTHER or mask for tag, rights, _ in entries if rights and tag not in (_USER_OBJ, _USER, _MASK))
    return None if wide else users


def problems(capability: Capability, users: set[int]) -> Iterator[str]:
    """Why others than root and these users may open a node, or might soon; and whether these can't."""
    try:
        found = readers(capability)
        if found is None:
            yield f"{capability.node} may be opened by every user"
        elif found != users - {0}:
            yield f"{capability.node} may be opened by {_names(found)}; it should be {_names(users)}"
        if capability.entry and _modified(capability.entry) != "0":
            yield f"nvidia-modprobe may open {capability.node} to every user, {capability.entry} does not forbid it"
    except OSError as error:
        yield f"cannot look at {error.filename}: {error.strerror}"


def _names(users: set[int]) -> str:
    return f"user {', '.join(map(str, sorted(users)))}" if users else "nobody"


class Look:
    """One look at who has device nodes open, taken when it is first asked: right for all that was fenced before.

    Processes that are root's alone are left out, unless `everybody` is asked for: they may open any node at any time,
    and monitoring may keep one open for good. A user who has so many files open that they can't be looked at in time
    is taken for a holder: that keeps instances from being granted, but holds no hook up.
    """

    def __init__(self, everybody: bool = False) -> None:
        self._everybody = everybody
        self._devices: dict[int, set[int]] = {}
        self._taken = False

    def holders(self, capabilities: Sequence[Capability]) -> list[int]:
        """The processes that have one of the nodes open."""
        if not capabilities:
            return []
        if not self._taken:
            self._taken = True
            until = time.monotonic() + SCAN_SECONDS
            for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
                with suppress(OSError):  # it ends meanwhile
                    if self._everybody or not roots(pid):
                        self._devices[pid] = set(_open(pid, until))
        sought = {_UNSEEN, *(capability.device for capability in capabilities)}
        return [pid for pid, devices in self._devices.items() if not sought.isdisjoint(devices)]


def _open(pid: int, until: float) -> Iterator[int]:
    """The character devices that a process has open for reading; _UNSEEN where there is no time left to look."""
    import ctypes

    libc = ctypes.CDLL(None)
    found = ctypes.create_string_buffer(256)
    compare = _KCMP.get(os.uname().machine)
    # Nearly always all threads share the first one's files. Each may have its own, and the first may have ended.
    for task in os.listdir(f"/proc/{pid}/task"):
        if time.monotonic() > until:
            yield _UNSEEN
            return
        if compare and int(task) != pid and libc.syscall(compare, pid, int(task), _FILES, 0, 0) == 0:
            continue
        with suppress(OSError), _directory(f"/proc/{pid}/task/{task}/fd") as table, os.scandir(table) as files:
            for file in files:
                if time.monotonic() > until:
                    yield _UNSEEN
                    return
                # Not os.stat: it asks the file system, and one of a user's own (FUSE) may never answer.
                if libc.statx(table, file.name.encode(), _NO_SYNC, 1, found):
                    continue
                # Anybody may have a node open with O_PATH, which gives no right to it, and no bit on the link.
                (mode,) = struct.unpack_from("H", found, 28)
                if stat.S_ISCHR(mode) and os.lstat(file.name, dir_fd=table).st_mode & 0o400:
                    yield os.makedev(*struct.unpack_from("II", found, 128))


@contextmanager
def _directory(path: str) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def roots(pid: int) -> bool:
    """Whether all user ids of a process are root's: real, effective, saved and of the file system. Raises OSError."""
    return _uids(pid) == {b"0"}


def _uids(pid: int) -> set[bytes]:
    with open(f"/proc/{pid}/status", "rb") as file:
        return next((set(line.split()[1:]) for line in file if line.startswith(b"Uid:")), set())
