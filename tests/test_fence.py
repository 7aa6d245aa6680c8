"""Who may open an instance: real device nodes, real users, and a driver's /proc made of files.

Behind the nodes is no driver, so that an open that the permissions let through ends in ENXIO; the node of GI 2 on GPU 0
of the stand-in is a /dev/full, and can be held open.
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import pytest
from conftest import Node, needs_root, run

from rms import cli, fence
from rms.device import Capability, DeviceError
from rms.errors import NodeError, NoRoomError
from rms.fence import FenceError

BACKENDS = ["simulated", "nvml"]
ALICE, BOB, CAROL = 61001, 61002, 61003
EXIT = {"x86_64": 60, "aarch64": 93}
"""The number of the system call that ends one thread."""

pytestmark = needs_root


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    """A directory that every user can reach, where device nodes are devices (not so where a mount is `nodev`)."""
    for parent in ("/dev/shm", tempfile.gettempdir(), "/var/tmp", "/dev"):
        path = Path(tempfile.mkdtemp(prefix="rms-fence-", dir=parent))
        path.chmod(0o755)
        try:
            os.mknod(path / "full", 0o600 | stat.S_IFCHR, os.stat("/dev/full").st_rdev)
            with suppress(OSError):
                os.close(os.open(path / "full", os.O_RDONLY))
                yield path
                return
        finally:
            shutil.rmtree(path)
    pytest.fail("no directory here takes device nodes")


@pytest.fixture
def real(fast_dir: Path) -> Node:
    """A node behind the stand-in for NVML."""
    return Node(fast_dir / "node", "nvml")


def give(node: Node, job: int, uid: int, spec: str) -> list[Path]:
    """Let a job of a user have instances; their nodes."""
    granted = node.controller().acquire(run(job), uid, spec, 1, None)
    node.check()
    there = [(gpu, i) for gpu in node.device().gpus() for i in node.device().instances(gpu)]
    uuids = {g.uuid for g in granted}
    found = [node.device().capabilities(gpu, i.gi, i.ci) for gpu, i in there if i.uuid in uuids]
    assert [len(each) for each in found] == [2] * len(granted)
    return [Path(capability.node) for each in found for capability in each]


def become(uid: int) -> None:
    os.setgroups([])
    os.setgid(uid)
    os.setuid(uid)


def child(work: Callable[[], object]) -> int:
    """A process that does `work`, and ends with what it returns."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        code = int(str(work() or 0))
    finally:
        os._exit(code)


def may_open(path: Path, uid: int) -> bool:
    def attempt() -> int:
        become(uid)
        try:
            os.open(path, os.O_RDONLY)
        except OSError as error:
            return error.errno or 0
        return 0

    code = os.waitstatus_to_exitcode(os.waitpid(child(attempt), 0)[1])
    assert code in (0, errno.ENXIO, errno.EACCES), os.strerror(code)
    return code != errno.EACCES


def openers(*paths: Path) -> list[int]:
    """Who of the users may open these nodes; it must be the same of all."""
    found = {tuple(uid for uid in (ALICE, BOB, CAROL) if may_open(path, uid)) for path in paths}
    assert len(found) == 1, found
    return list(found.pop())


@contextmanager
def process(prepare: Callable[[], object]) -> Iterator[int]:
    """A process that does `prepare` and then lives until the end of the block."""
    reader, writer = os.pipe()

    def work() -> NoReturn:
        prepare()
        os.write(writer, b".")
        while True:
            time.sleep(60)

    pid = child(work)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b".", "the process did not get there"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def holding(path: Path | str, uid: int, flags: int = os.O_RDONLY) -> Callable[[], object]:
    def work() -> None:
        become(uid)
        os.open(path, flags)

    return work


# Who may open what.


def test_only_the_user_of_a_job_opens_its_instances(node: Node) -> None:
    first = give(node, 1, ALICE, "3g,1g")
    second = give(node, 2, BOB, "1g")
    assert openers(*first) == [ALICE]
    assert openers(*second) == [BOB]
    for path in first + second:
        found = path.stat()
        assert (found.st_uid, found.st_gid, found.st_mode & 0o337) == (0, 0, 0), "root's, and no group's or others'"
    node.release(1)
    assert openers(*first) == []
    assert openers(*second) == [BOB]
    third = give(node, 3, CAROL, "3g")
    assert set(third) <= set(first), "the idle one again"
    assert openers(*third) == [CAROL]
    node.release(2)
    node.release(3)
    root = give(node, 5, 0, "2g")
    assert openers(*root) == []
    node.release(5)
    fourth = give(node, 4, BOB, "7g:2")
    assert openers(*fourth) == [BOB]
    assert openers(*(set(first + second) - set(fourth))) == [], "of instances that are gone"


def test_a_failure_lets_nobody_in(node: Node) -> None:
    """Two instances are asked for; the second can't be fenced, and so nobody gets the first."""
    real, calls = fence.fence, []

    def failing(capabilities: list[Capability], uid: int | None) -> None:
        calls.append(uid)
        if uid == ALICE and calls.count(ALICE) == 2:
            raise fence.FenceError("scripted")
        real(capabilities, uid)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fence, "fence", failing)
        assert len(give(node, 1, ALICE, "3g:2")) == 4, "the second try goes well"
    assert calls.count(ALICE) == 4
    assert any("scripted" in line for line in node.log)
    node.release(1)
    node.check_empties()


def test_what_can_not_be_shut_is_not_idle(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = give(node, 1, ALICE, "3g")
    real = fence.fence

    def failing(capabilities: list[Capability], uid: int | None) -> None:
        if uid is None:
            raise fence.FenceError("scripted")
        real(capabilities, uid)

    with monkeypatch.context() as patch:
        patch.setattr(fence, "fence", failing)
        node.release(1)
    assert list(node.statuses().values()) == ["quarantined"]
    assert openers(*paths) == [ALICE]
    give(node, 2, BOB, "1g")
    assert ALICE not in {uid for path in paths for uid in openers(path)}, "mended by the next call"
    assert "quarantined" not in node.statuses().values()


def test_a_recovery_fences_what_it_finds(node: Node) -> None:
    first, second = give(node, 1, ALICE, "3g"), give(node, 2, BOB, "3g")
    node.release(2)
    for path in first + second:
        path.chmod(0o444)
    assert openers(*first, *second) == [ALICE, BOB, CAROL]
    for name in ("state.json", "state.json.previous"):
        (node.root / "state" / name).unlink()
    third = give(node, 3, CAROL, "1g")
    assert openers(*first) == [ALICE]
    assert openers(*second) == []
    assert openers(*third) == [CAROL]


def test_reconcile_puts_back_what_somebody_has_opened(node: Node) -> None:
    first, second = give(node, 1, ALICE, "3g"), give(node, 2, BOB, "1g:2")
    node.release(2)
    for path in first + second:
        path.chmod(0o444)
    node.controller().reconcile(lambda runs: [])
    assert openers(*first) == [ALICE]
    assert openers(*second) == []
    node.check()


def test_without_acl_the_node_is_the_users_own(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "setxattr", refuse)
    paths = give(node, 1, ALICE, "3g")
    assert {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in paths} == {(ALICE, 0o400)}
    assert openers(*paths) == [ALICE]
    node.release(1)
    assert {(path.stat().st_uid, path.stat().st_mode & 0o777) for path in paths} == {(0, 0o400)}
    assert openers(*paths) == []


@pytest.mark.parametrize("what", ["link", "file", "other device"])
def test_no_link_and_no_other_file_is_touched(node: Node, what: str, fast_dir: Path) -> None:
    (path, *_) = give(node, 1, ALICE, "3g")
    node.release(1)
    path.unlink()
    target = fast_dir / "target"
    target.write_text("the site's")
    target.chmod(0o644)
    if what == "link":
        path.symlink_to(target)
    elif what == "file":
        target.rename(path)
        target = path
    else:
        os.mknod(path, 0o644 | stat.S_IFCHR, os.makedev(1, 3))
        target = path
    before = target.stat()
    with pytest.raises(NoRoomError, match=f"{path} is not the device 1:.*: remove it"):
        node.controller().acquire(run(2), BOB, "3g:4", 1, None)
    assert target.stat() == before
    path.unlink()
    give(node, 3, BOB, "3g:4")


# The driver.


def test_instances_made_without_rms_are_everybodys_until_it_comes(real: Node) -> None:
    (gpu, _) = real.device().gpus()
    gi = real.device().create_gpu_instance(gpu, "3g.40gb", 4)
    ci = real.device().create_compute_instance(gpu, gi)
    paths = [Path(capability.node) for capability in real.device().capabilities(gpu, gi, ci)]
    assert openers(*paths) == [ALICE, BOB, CAROL], "as the driver has it"
    give(real, 1, BOB, "1g")
    assert openers(*paths) == []


def test_nvidia_modprobe_does_not_open_the_fence(real: Node) -> None:
    first, second = give(real, 1, ALICE, "3g,1g"), give(real, 2, BOB, "2g")
    real.release(2)
    real.machine.modprobe()
    assert openers(*first) == [ALICE]
    assert openers(*second) == []
    entries = list(real.machine.root.glob("proc/driver/nvidia/capabilities/**/access"))
    assert len(entries) == 6
    assert all("DeviceFileModify: 0" in entry.read_text().splitlines() for entry in entries)
    real.release(1)
    third = give(real, 3, CAROL, "7g:2")  # all destroyed, and the entries new
    real.machine.modprobe()
    assert openers(*third) == [CAROL]


@pytest.mark.parametrize("who", [ALICE, 0])
def test_an_nvidia_modprobe_that_was_stopped(real: Node, fast_dir: Path, who: int) -> None:
    """A user starts one while an instance is made, stops it after it has read the entry, and lets it go on later. One
    of root's own just takes its time."""
    program, nodes = fast_dir / "nvidia-modprobe", real.machine.root / "dev/nvidia-caps"
    shutil.copy("/bin/sh", program)
    program.chmod(0o755)
    wait = "kill -STOP $$" if who else "sleep 0.5"

    def start() -> None:
        os.setresuid(who, 0, 0)
        os.execv(program, [str(program), "-p", "-c", f"{wait}; chmod 444 {nodes}/*; exit 0"])

    pid = child(start)
    while not fence._modprobe(pid) or (who and Path(f"/proc/{pid}/stat").read_text().split()[2] != "T"):
        time.sleep(0.01)
    paths = give(real, 2, BOB, "3g")
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert ended == (-signal.SIGKILL if who else 0)
    assert openers(*paths) == [BOB]


@pytest.mark.parametrize(("uids", "stops"), [((ALICE, ALICE, ALICE), ""), ((ALICE, 0, 0), ""), ((0, 0, 0), "not end")])
def test_a_process_that_does_not_end_stops_nothing_unless_it_is_roots(
    uids: tuple[int, int, int], stops: str, fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that writes to a file system of its user's own (FUSE), where no signal reaches it."""
    program = fast_dir / "nvidia-modprobe"
    shutil.copy("/bin/sleep", program)
    program.chmod(0o755)

    def start() -> None:
        os.setresuid(*uids)
        os.execv(program, [str(program), "600"])

    pid = child(start)
    while os.readlink(f"/proc/{pid}/exe") != str(program):
        time.sleep(0.01)
    killed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(fence, "_SETTLE_SECONDS", 0.1)
        patch.setattr(os, "kill", lambda pid, number: killed.append(pid))
        with pytest.raises(FenceError, match=stops) if stops else nullcontext():
            fence._settle()
    assert {*killed} == ({pid} if uids[0] != uids[1] else set())  # a user's own program has no rights to fear
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_modprobe_of_the_tests_would(real: Node) -> None:
    """The judge of the test above: what it does where nothing forbids it."""
    real.configure(fence=False)
    paths = list((real.machine.root / "dev/nvidia-caps").iterdir())
    assert paths == []
    real.acquire(1, "3g")
    for path in (real.machine.root / "dev/nvidia-caps").iterdir():
        path.chmod(0o400)
        paths.append(path)
    real.machine.modprobe()
    assert openers(*paths) == [ALICE, BOB, CAROL]


def test_a_driver_that_makes_no_nodes(real: Node) -> None:
    """NVreg_ModifyDeviceFiles=0: nobody writes to its entries, and RMS makes the nodes."""
    text = real.machine.path.read_text()
    real.machine.path.write_text(text.replace("modify 1", "modify 0"))
    paths = give(real, 1, ALICE, "3g")
    assert openers(*paths) == [ALICE]
    entries = list(real.machine.root.glob("proc/driver/nvidia/capabilities/**/access"))
    assert [entry.read_text().splitlines()[0] for entry in entries] == ["DeviceFileModify: 0"] * 2
    assert len(list((real.machine.root / "dev/nvidia-caps").iterdir())) == 2, "of this instance alone"


@pytest.mark.parametrize("missing", ["proc/driver/nvidia-caps/mig-minors", "proc/devices", "the entry", "the write"])
def test_a_node_that_can_not_be_fenced(real: Node, missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if missing == "the write":
        monkeypatch.setattr(fence, "_modified", lambda entry: "1")
        says = "load it with NVreg_ModifyDeviceFiles=0"
    elif missing == "the entry":
        monkeypatch.setattr(fence.Driver, "_capability", lambda self, name, entry: Capability("/x", 0, f"{entry}.gone"))
        monkeypatch.setattr(fence, "_restrict", lambda capability, uid: None)
        says = "access.gone: No such file or directory"
    else:
        (real.machine.root / missing).unlink()
        says = f"{missing}: No such file or directory; .*`fence = false` in rms.toml"
    with pytest.raises(NodeError, match=says):
        real.acquire(1, "3g")
    assert not real.marker(1).exists()
    assert all(status != "busy" for status in real.statuses().values())
    if missing.endswith("minors"):
        real.configure(fence=False)
        assert real.acquire(2, "3g")


def test_a_lost_instance_whose_ids_are_anothers_now(real: Node) -> None:
    real.configure(gpus=[0], sim_gpus=1)
    real.machine.path.write_text(real.machine.path.read_text() + "option odd-ids\n")
    first = give(real, 1, ALICE, "3g")
    real.machine.vanish(0)
    real.controller().reconcile(lambda runs: [])
    (granted,) = real.controller().acquire(run(2), BOB, "3g", 1, None)
    (instance,) = real.device().instances(granted.gpu)
    second = [Path(c.node) for c in real.device().capabilities(granted.gpu, instance.gi, instance.ci)]
    assert second == first, "this driver has given the ids again, for another place"
    with process(lambda: become(BOB)) as bob:
        real.machine.hold(bob, 0, instance.gi, instance.ci)
        real.release(1)
        assert openers(*second) == [BOB]
        assert real.statuses() == {f"0:{granted.placement}": "busy"}
        real.check()


# Who holds what.


def test_a_process_that_escaped_its_job(real: Node, capsys: pytest.CaptureFixture[str]) -> None:
    real.configure(holder_seconds=0.3)
    (gi, _) = give(real, 1, ALICE, "3g")
    with process(holding(gi, ALICE)) as pid:
        real.release(1)
        assert real.statuses() == {"0:3g.40gb@4:4": "quarantined"}
        assert f"held by process {pid}" in real.log[-1]
        assert openers(gi) == []
        give(real, 2, BOB, "3g:3")
        with pytest.raises(NoRoomError):
            real.acquire(3, "1g")
        assert cli.main(["doctor", "--config", str(real.toml)]) == 6
        name = Path("/proc/self/comm").read_text().strip()
        assert f"3g.40gb@4:4 is quarantined: held by process {pid} ({name}, uid {ALICE})" in capsys.readouterr().out
    give(real, 4, BOB, "3g")
    assert openers(gi) == [BOB]


@pytest.mark.timed
def test_a_process_that_ends_in_time(real: Node) -> None:
    real.configure(holder_seconds=20)
    (gi, _) = give(real, 1, ALICE, "3g")
    with process(holding(gi, ALICE)) as pid:
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        began = time.monotonic()
        real.release(1)
        assert 0.4 < time.monotonic() - began < 15
    assert list(real.statuses().values()) == ["idle"]


def test_a_process_that_ends_before_a_start_gives_up(real: Node) -> None:
    real.configure(holder_seconds=20)
    give(real, 1, ALICE, "3g")
    real.release(1)
    with process(holding("/dev/full", ALICE)) as pid:
        threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
        paths = give(real, 2, BOB, "7g:2")
    assert openers(*paths) == [BOB]
    assert any(f"held by process {pid}" in line for line in real.log)


def test_a_process_that_was_quicker_than_the_fence(real: Node) -> None:
    with process(holding("/dev/full", ALICE)) as pid:
        paths = give(real, 1, BOB, "3g")
        assert real.statuses()["0:3g.40gb@4:4"] == "quarantined"
        assert any(f"held by process {pid}" in line for line in real.log)
        assert openers(*paths) == [BOB]


def test_a_user_on_the_whole_gpu_drains_nothing(real: Node) -> None:
    """Nothing can be made on it meanwhile: the node's fault if the process is root's, and nobody's otherwise."""
    real.acquire(1, "1g")
    with process(lambda: become(ALICE)) as alice:
        for gpu in range(2):
            real.machine.hold(alice, gpu)
        with pytest.raises(NoRoomError):
            real.acquire(2, "3g")
        assert any(f"(in use); process {alice} has the whole GPU" in line for line in real.log), real.log
    for gpu in range(2):
        real.machine.hold(os.getpid(), gpu)
    with pytest.raises(NodeError, match="in use"):
        real.acquire(3, "3g")


def own_table() -> None:
    """A thread that has the device open, in a table of its own."""
    become(ALICE)
    opened = threading.Event()

    def work() -> None:
        assert ctypes.CDLL(None, use_errno=True).unshare(0x400) == 0, "CLONE_FILES"
        os.open("/dev/full", os.O_RDONLY)
        opened.set()
        time.sleep(600)

    threading.Thread(target=work, daemon=True).start()
    assert opened.wait(30)


def set_user_id() -> None:
    """As a program that is setuid root and was started by a user."""
    os.open("/dev/full", os.O_RDONLY)
    os.setresuid(ALICE, 0, 0)


@pytest.mark.parametrize(
    ("prepare", "counts"),
    [
        (holding("/dev/full", ALICE), True),
        (own_table, True),
        (set_user_id, True),
        (holding("/dev/full", ALICE, os.O_PATH), False),  # anybody may, and it gives no right
        (holding("/dev/full", 0), False),
        (holding("/dev/null", ALICE), False),
    ],
)
def test_who_is_a_holder(prepare: Callable[[], object], counts: bool) -> None:
    capability = Capability("/dev/full", os.stat("/dev/full").st_rdev)
    with process(prepare) as pid:
        assert (pid in fence.Look().holders([capability])) == counts


def test_who_has_too_much_open_to_be_looked_at_counts_as_a_holder(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = Capability("/dev/full", os.stat("/dev/full").st_rdev)
    with process(holding("/dev/null", ALICE)) as theirs, process(holding("/dev/null", 0)) as roots:
        assert not {theirs, roots} & {*fence.Look().holders([capability])}
        monkeypatch.setattr(fence, "SCAN_SECONDS", -1.0)
        found = fence.Look().holders([capability])
        assert theirs in found and roots not in found


def test_many_instances_are_looked_at_once(real: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for all that a run gives back, and once for all of a GPU."""
    give(real, 1, ALICE, "1g:5,2g:3")
    looked, look = [], fence._open
    monkeypatch.setattr(fence, "_open", lambda pid, until: looked.append(pid) or look(pid, until))
    with process(lambda: become(BOB)) as pid:
        real.release(1)
        assert looked.count(pid) == 1
        real.controller().reconcile(lambda runs: [])
        assert looked.count(pid) == 1 + 2
    real.check()


def test_a_process_whose_first_thread_has_ended() -> None:
    script = f"""\
import ctypes, os, threading, time
def work():
    os.open("/dev/full", os.O_RDONLY)
    print(flush=True)
    time.sleep(600)
os.setuid({ALICE})
threading.Thread(target=work).start()
ctypes.CDLL(None).syscall({EXIT[os.uname().machine]}, 0)  # exit(2) ends one thread
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as there:
        assert there.stdout and there.stdout.readline()
        while Path(f"/proc/{there.pid}/stat").read_text().split()[2] != "Z":
            time.sleep(0.01)
        assert there.pid in fence.Look().holders([Capability("/dev/full", os.stat("/dev/full").st_rdev)])
        there.kill()


@pytest.mark.timed
def test_many_threads_cost_little() -> None:
    number = fence._KCMP.get(os.uname().machine, -1)
    if ctypes.CDLL(None).syscall(number, os.getpid(), os.getpid(), 2, 0, 0):
        message = "kcmp is not to be had here: every thread is looked at"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)

    def prepare() -> None:
        become(ALICE)
        for _ in range(100):
            os.open("/dev/null", os.O_RDONLY)
        for _ in range(100):
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()

    def seconds() -> float:
        began = time.process_time()
        fence.Look().holders([Capability("/dev/full", os.stat("/dev/full").st_rdev)])
        return time.process_time() - began

    with process(prepare):
        took = min(seconds() for _ in range(5))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fence, "_KCMP", {})
            slow = min(seconds() for _ in range(5))
    assert took < slow / 2


def test_a_file_system_that_does_not_answer(fast_dir: Path) -> None:
    """A user may have such a one, with FUSE; who asked for the state of a file there would wait for ever."""

    def mount() -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.unshare(0x20000) == 0, "CLONE_NEWNS"
        assert libc.mount(b"none", b"/", None, 0x44000, None) == 0, "MS_REC | MS_PRIVATE"
        fuse = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={fuse},rootmode=40000,user_id={ALICE},group_id={ALICE},allow_other".encode()
        assert libc.mount(b"silent", str(fast_dir).encode(), b"fuse", 0, options) == 0, os.strerror(ctypes.get_errno())
        os.open(fast_dir, os.O_PATH)
        holding("/dev/full", ALICE)()

    if "\tfuse\n" not in Path("/proc/filesystems").read_text():
        message = "this kernel has no FUSE"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with process(mount) as pid:
        asked = subprocess.Popen(
            [sys.executable, "-c", f"import os; [os.stat(e) for e in os.scandir('/proc/{pid}/fd')]"]
        )
        with pytest.raises(subprocess.TimeoutExpired):
            asked.wait(1)
        began = time.monotonic()
        assert pid in fence.Look().holders([Capability("/dev/full", os.stat("/dev/full").st_rdev)])
        assert time.monotonic() - began < 20
        asked.kill()
    asked.wait()


def test_readers_are_read_as_the_kernel_does(fast_dir: Path) -> None:
    path = fast_dir / "node"
    capability = Capability(str(path), os.makedev(1, 7))
    for uid in (None, ALICE):
        fence.fence([capability], uid)
        for mode in (0o000, 0o400, 0o440, 0o444, 0o004, 0o040):
            path.chmod(mode)
            users = openers(path)
            found = fence.readers(capability)
            assert found is None if len(users) > 1 else found is None or found == set(users), (uid, oct(mode))
    with pytest.raises(DeviceError, match="cannot fence"):
        fence.fence([Capability("/proc/driver/none", 0)], None)
