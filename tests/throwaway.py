"""A throw-away Slurm on localhost: real munged, slurmctld and slurmds, gone without a trace afterwards.

    with Cluster(nodes=2, gres="mig:1g.10gb:14,migc:14,migm:16", hooks={"Prolog": path}) as slurm:
        job = slurm.sbatch("echo hello", "--gres=mig:1g.10gb:1", user=slurm.users[0])
        slurm.wait_all(30)
        print(slurm.job(job)["JobState"])

Everything lives below one directory: `etc` (slurm.conf; what the caller put there before the start, such as
job_submit.lua or generated hooks, stays), `log`, `work/<user>`. It has its own munge key and socket, and free
TCP ports on the loopback only; nothing of /etc/slurm is read or written. Needs root, and Debian's packages
(see `missing`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, NamedTuple

PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-client",
    "munged": "munge",
    "setpriv": "util-linux",
}  # program -> Debian package
SCHEDULER = "sched_interval=2,bf_interval=2,batch_sched_delay=1"


class ClusterError(RuntimeError):
    """What went wrong with the cluster or with a command of it, in one line."""


class User(NamedTuple):
    """An unprivileged user of the cluster; `work` is a directory of theirs, and where their commands run."""

    name: str
    uid: int
    gid: int
    work: Path


class NodeState(NamedTuple):
    """As sinfo says it: `idle`, `mixed`, `drained`, ...; the reason is empty where there is none."""

    state: str
    reason: str


def missing() -> list[str]:
    """The Debian packages of which a program lacks here; empty where a Cluster can start."""
    return sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)})


class Cluster:
    """One Slurm cluster with the nodes n1, n2, ...; a context manager.

    `gres` and `features` are those of every node; `gres` may be a list, with one for each. `hooks` are slurm.conf keys
    with a path (Prolog, Epilog, ...). `files` are written beside slurm.conf; a job_submit.lua there is switched on.
    `extra_conf` has lines of slurm.conf that replace ours of the same key; nodes come on top. `cred_expire` is in
    seconds (Slurm's own default is 120). Without a `root` a temporary directory is made, and removed at the end.
    """

    def __init__(
        self,
        root: Path | None = None,
        *,
        nodes: int = 2,
        cpus: int = 16,
        gres: str | Sequence[str] = "",
        features: str = "",
        hooks: Mapping[str, Path] | None = None,
        files: Mapping[str, str] | None = None,
        extra_conf: str = "",
        cred_expire: int = 10,
        scheduler: str = SCHEDULER,
    ) -> None:
        self._temporary = root is None
        self.root = Path(tempfile.mkdtemp(prefix="rms-slurm-")) if root is None else root.resolve()
        self.etc = self.root / "etc"
        self.conf = self.etc / "slurm.conf"
        self.log = self.root / "log"
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        work = self.root / "work"
        self.users = [User(p.pw_name, p.pw_uid, p.pw_gid, work / p.pw_name) for p in _two_users()]
        self.ports: dict[str, int] = {}  # of slurmctld and of each node, once started
        self._gres = dict(zip(self.nodes, [gres] * nodes if isinstance(gres, str) else gres, strict=True))
        self._cpus, self._features, self._hooks = cpus, features, dict(hooks or {})
        self._files, self._extra_conf = dict(files or {}), extra_conf
        self._cred_expire, self._scheduler = cred_expire, scheduler
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._clients: list[subprocess.Popen[str]] = []
        self._before = {os.getpid()}  # processes that look like ours but were there before us

    # -- life

    def __enter__(self) -> Cluster:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, timeout: float = 30) -> None:
        """Starts everything and returns when all nodes are idle; else a ClusterError, and nothing is left."""
        if os.geteuid() != 0:
            raise ClusterError("a throw-away Slurm needs root")
        if lacking := missing():
            raise ClusterError(f"Slurm is not installed: apt-get install {' '.join(lacking)}")
        self._guard()
        try:
            self._before |= set(self.processes())
            self._prepare()
            for name in ("munged", "slurmctld", *self.nodes):
                self.start_daemon(name, timeout)
            self._until(
                lambda: self._idle() >= set(self.nodes),
                timeout,
                lambda: (
                    f"not idle: {sorted(set(self.nodes) - self._idle())}; "
                    + self._tail(self.nodes[0] if self._alive("slurmctld") else "slurmctld")
                ),
                give_up=lambda: not self._alive("slurmctld"),  # 26.05 listens before it has read all of slurm.conf
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Cancels every job, waits for their end, ends the daemons and what is left; may be called again.

        An interrupt while it waits for the jobs goes straight to ending the daemons.
        """
        try:
            if self._alive("slurmctld"):
                self._cancel_all(timeout=15)
        finally:
            self._end_all()
            atexit.unregister(self.stop)
            if signal.getsignal(signal.SIGTERM) is _exit_on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            if self._temporary:
                shutil.rmtree(self.root, ignore_errors=True)

    def start_daemon(
        self, name: str, timeout: float = 20, options: Sequence[str] = (), within: Sequence[str] = ()
    ) -> None:
        """Starts `munged`, `slurmctld` or the slurmd of a node as our child, and waits until it answers. `within` is a
        command that becomes the daemon."""
        argv = {
            "munged": ["munged", "--foreground", "--force", *self._munge_options()],
            "slurmctld": ["slurmctld", "-D"],
        }.get(name, ["slurmd", "-D", "-N", name])
        # pdeathsig: when this process is killed outright, its daemons end too.
        with (self.log / f"{name}.err").open("ab") as err:
            daemon = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", "--", *within, *argv, *options],
                stdin=subprocess.DEVNULL, stdout=err, stderr=err,
                env=self.environment(), cwd=self.root / "state", umask=0o022, start_new_session=True,
            )  # fmt: skip
        self._daemons[name] = daemon
        self._until(
            lambda: self._answers(name),
            timeout,
            lambda: f"{name} does not answer after {timeout} s: {self._tail(name)}",
            give_up=lambda: daemon.poll() is not None,
        )

    def go_configless(self, node: str) -> None:
        """Starts the slurmd of a node anew, as on one without a slurm.conf: it fetches it from slurmctld, which must
        have `enable_configless`. It has a /run of its own, where Slurm's commands find that."""
        self.stop_daemon(node)
        private = f"mount -t tmpfs none /run && mkdir /run/munge && ln -s {self.root}/munge/s /run/munge/munge.socket.2"
        server = f"127.0.0.1:{self.ports['slurmctld']}"
        self.start_daemon(
            node,
            options=["--conf-server", server],
            within=["unshare", "--mount", "sh", "-c", f'{private} && unset SLURM_CONF && exec "$@"', "sh"],
        )

    def stop_daemon(self, name: str, sig: signal.Signals = signal.SIGTERM, timeout: float = 60) -> None:
        """Ends one daemon. A slurmd first waits for its Prologs on SIGTERM; SIGKILL orphans them."""
        daemon = self._daemons.pop(name)
        daemon.send_signal(sig)
        daemon.wait(timeout)

    def restart_slurmd(self, node: str, sig: signal.Signals = signal.SIGTERM) -> None:
        """Ends the slurmd of one node with that signal and starts it again; its jobs run on."""
        self.stop_daemon(node, sig)
        self.start_daemon(node)

    def pid(self, name: str) -> int:
        """The process of a daemon."""
        return self._daemons[name].pid

    # -- what one does with it

    def environment(self, user: User | None = None, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """A clean environment for a command: none of the caller's own SLURM_* or SBATCH_* gets in."""
        name, home = (user.name, user.work) if user else ("root", self.root)
        return {
            "PATH": PATH, "LANG": "C.UTF-8", "SHELL": "/bin/sh", "SLURM_CONF": str(self.conf),
            "USER": name, "HOME": str(home), **(more or {}),
        }  # fmt: skip

    def run(
        self,
        *argv: str,
        user: User | None = None,
        timeout: float = 20,
        check: bool = True,
        input: str | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as root or as that user; with `check`, failing is a ClusterError with its stderr."""
        try:
            done = subprocess.run(
                _as_user(argv, user), input=input or "", text=True, capture_output=True, check=False, timeout=timeout,
                env=self.environment(user, env), cwd=user.work if user else self.root,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ClusterError(f"no end after {timeout} s: {' '.join(argv)}") from None
        if check and done.returncode:
            raise ClusterError(f"{' '.join(argv)}: rc {done.returncode}: {_one_line(done.stderr)}")
        return done

    def popen(
        self, *argv: str, user: User | None = None, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Starts a command that goes on, such as srun or salloc, with pipes; `stop` ends it."""
        client = subprocess.Popen(
            _as_user(argv, user), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=self.environment(user, env), cwd=user.work if user else self.root,
            start_new_session=True,
        )  # fmt: skip
        self._clients.append(client)
        return client

    def sbatch(
        self,
        script: str | Path,
        *options: str,
        user: User | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Submits a file, a text that starts with #!, or a command line; gives the job id."""
        argv, text = ["sbatch", "--parsable", *options], None
        if isinstance(script, Path):
            argv.append(str(script))
        elif script.startswith("#!"):
            text = script
        else:
            argv.append(f"--wrap={script}")
        return int(self.run(*argv, user=user, input=text, env=env).stdout.split(";")[0])

    def job(self, job: int | str) -> dict[str, str]:
        """The fields of `scontrol show job`; the id is a number or, for one task of an array, 45_3.

        A number is the job of exactly this id; scontrol prints every task where it is an array's own id, too.
        """
        shown = self.run("scontrol", "show", "job", "-o", str(job)).stdout
        for fields in map(_fields, shown.splitlines()):
            if str(job) in (fields.get("JobId"), f"{fields.get('ArrayJobId')}_{fields.get('ArrayTaskId')}"):
                return fields
        raise ClusterError(f"scontrol shows no job {job}: {_one_line(shown)}")

    def states(self) -> dict[str, str]:
        """Job id (45 or 45_3) -> state (PENDING, RUNNING, ...) of every job that slurmctld still knows."""
        shown = self.run("squeue", "--noheader", "--array", "--states=all", "--format=%i %T").stdout
        return dict(line.split() for line in shown.splitlines())

    def node_states(self) -> dict[str, NodeState]:
        shown = self.run("sinfo", "--noheader", "--Node", "--format=%N|%T|%E").stdout
        parts = (line.strip().split("|", 2) for line in shown.splitlines())
        return {node: NodeState(state, "" if reason == "none" else reason) for node, state, reason in parts}

    def wait_all(self, timeout: float) -> None:
        """Returns when no job is pending, running or completing; a ClusterError names those that are."""
        self._until(lambda: not self.queue(), timeout, lambda: f"not over in {timeout} s: {'; '.join(self.queue())}")

    def wait(self, condition: Callable[[], bool], timeout: float = 20, what: str = "a condition") -> None:
        """Returns when the condition holds; a ClusterError names `what` did not come true."""
        self._until(condition, timeout, lambda: f"{what}: not so after {timeout} s")

    def cancel_all(self) -> None:
        """Cancels every job, by its number: scancel of Slurm 26.05 knows no user called nobody."""
        if jobs := [line.split()[0] for line in self.queue()]:
            self.run("scancel", "--quiet", *jobs, check=False)

    def processes(self) -> list[int]:
        """Every process of this cluster, from the daemons to what a job left behind.

        Known by SLURM_CONF in its environment (Slurm hands it on to hooks and tasks), or by its parent. Whoever
        called us may have that variable too, so what ran before the start does not count.
        """
        mark = f"SLURM_CONF={self.conf}".encode()
        parents: dict[int, int] = {}
        ours: set[int] = set()
        for pid in (int(entry) for entry in os.listdir("/proc") if entry.isdigit()):
            with contextlib.suppress(OSError):  # it ended meanwhile
                stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
                state, parent = stat.rpartition(")")[2].split()[:2]
                if state == "Z":
                    continue  # where pid 1 does not reap, an ended slurmstepd stays one
                parents[pid] = int(parent)
                if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    ours.add(pid)
        ours -= self._before
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        return sorted(ours)

    # -- inside

    def _guard(self) -> None:
        """Lets the cluster end with us: at exit, and on SIGTERM where nobody else handles it."""
        atexit.register(self.stop)
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _exit_on_sigterm)

    def _prepare(self) -> None:
        """Directories, the munge key, ports and slurm.conf."""
        for name in ("", "etc", "log", "munge", "run", "state", "spool", "work"):
            path = self.root / name
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o755)
        if closed := [str(p) for p in self.root.parents if not p.stat().st_mode & 0o001]:
            raise ClusterError(f"users cannot reach {self.root}: no x for others on {', '.join(closed)}")
        if len(str(self.root)) > 90:
            raise ClusterError(f"too long for the path of munge's socket: {self.root}")
        for user in self.users:
            user.work.mkdir(exist_ok=True)
            os.chown(user.work, user.uid, user.gid)
        for key, hook in self._hooks.items():
            if not os.access(hook, os.X_OK):
                raise ClusterError(f"{key}={hook} is not an executable file")
        key_file = self.root / "munge" / "key"
        key_file.touch(mode=0o600)
        key_file.write_bytes(os.urandom(128))
        self.ports = dict(zip(["slurmctld", *self.nodes], free_ports(), strict=False))
        for name, text in self._files.items():
            (self.etc / name).write_text(text)
        self.conf.write_text(self._slurm_conf())

    def _slurm_conf(self) -> str:
        root = self.root
        settings = {
            "ClusterName": "throwaway",
            "SlurmctldHost": "localhost(127.0.0.1)",
            "SlurmctldPort": self.ports["slurmctld"],
            "CommunicationParameters": "NoCtldInAddrAny,NoInAddrAny",  # the loopback only
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={root}/munge/s,cred_expire={self._cred_expire}",
            "CredType": "cred/munge",
            "StateSaveLocation": f"{root}/state",
            "SlurmdSpoolDir": f"{root}/spool/%n",
            "SlurmctldPidFile": f"{root}/run/slurmctld.pid",
            "SlurmdPidFile": f"{root}/run/%n.pid",
            "SlurmctldLogFile": f"{self.log}/slurmctld.log",
            "SlurmdLogFile": f"{self.log}/%n.log",
            "SlurmctldDebug": "debug",
            "SlurmdDebug": "debug",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SwitchType": "switch/none",
            "MpiDefault": "none",
            "JobAcctGatherType": "jobacct_gather/none",
            "AccountingStorageType": "accounting_storage/none",
            "SchedulerType": "sched/backfill",
            "SchedulerParameters": self._scheduler,
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_Core",
            "SlurmdParameters": "config_overrides",
            "ReturnToService": 2,
            "KillWait": 2,
            "PrologFlags": "Alloc,Contain",
            **self._hooks,
        }
        if names := sorted({item.split(":")[0] for gres in self._gres.values() for item in gres.split(",")} - {""}):
            settings["GresTypes"] = ",".join(names)
        if (self.etc / "job_submit.lua").exists():
            settings["JobSubmitPlugins"] = "lua"
        settings["PartitionName"] = "main Nodes=ALL Default=YES MaxTime=INFINITE State=UP"
        given = {line.split("=")[0].strip().lower() for line in self._extra_conf.splitlines()}
        at = "NodeHostname=localhost NodeAddr=127.0.0.1"
        has = {n: (f" Gres={gres}" if gres else "") for n, gres in self._gres.items()}
        features = f" Features={self._features}" if self._features else ""
        lines = [f"NodeName={n} {at} Port={self.ports[n]} CPUs={self._cpus}{has[n]}{features}" for n in self.nodes]
        lines += [f"{key}={value}" for key, value in settings.items() if key.lower() not in given]
        return "\n".join([*lines, self._extra_conf, ""])

    def _munge_options(self) -> list[str]:
        names = {"key-file": "key", "socket": "s", "pid-file": "pid", "seed-file": "seed"}
        return [f"--{option}={self.root}/munge/{name}" for option, name in names.items()]

    def _answers(self, name: str) -> bool:
        with socket.socket(socket.AF_UNIX if name == "munged" else socket.AF_INET) as client:
            address = str(self.root / "munge" / "s") if name == "munged" else ("127.0.0.1", self.ports[name])
            return client.connect_ex(address) == 0

    def _alive(self, name: str) -> bool:
        return name in self._daemons and self._daemons[name].poll() is None

    def queue(self) -> list[str]:
        """A line for every job that is pending, running or completing."""
        return self.run("squeue", "--noheader", "--format=%i %T %r %N").stdout.splitlines()

    def _idle(self) -> set[str]:
        try:
            return {node for node, now in self.node_states().items() if now.state == "idle"}
        except ClusterError:  # slurmctld has ended
            return set()

    def _cancel_all(self, timeout: float) -> None:
        """Every job's end, its Epilog included; what does not end in time is killed later."""
        with contextlib.suppress(ClusterError):  # slurmctld is stuck, or a Prolog holds a job: killed later
            self.cancel_all()
            self.wait_all(timeout)

    def _end_all(self) -> None:
        children: list[subprocess.Popen[Any]] = [*self._clients, *reversed(self._daemons.values())]
        for child in children:  # munged last
            child.terminate()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:  # a slurmd waits for its Prologs
                child.kill()
                child.wait(5)
        self._clients, self._daemons = [], {}
        deadline = time.monotonic() + 5
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _until(
        self,
        condition: Callable[[], bool],
        timeout: float,
        message: Callable[[], str],
        give_up: Callable[[], bool] = lambda: False,
    ) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline or give_up():
                raise ClusterError(message())
            time.sleep(0.05)

    def _tail(self, name: str) -> str:
        """The last lines of a daemon's output that complain, else its last line; in one line."""
        lines = (self.log / f"{name}.err").read_text(errors="replace").splitlines() or ["(nothing logged)"]
        bad = [line for line in lines if re.search(r"error|fatal", line, re.IGNORECASE)]
        return f"{' | '.join(bad[-3:] or lines[-1:])} ({self.log}/{name}.err)"


def _two_users() -> list[pwd.struct_passwd]:
    """Two unprivileged users of this machine with different uids: nobody and games where they exist."""
    others = [p for p in pwd.getpwall() if p.pw_uid != 0 and p.pw_gid != 0]
    others.sort(key=lambda p: (p.pw_name not in ("nobody", "games"), p.pw_uid))
    by_uid = {p.pw_uid: p for p in reversed(others)}
    return [p for p in others if by_uid[p.pw_uid] is p][:2]


def free_ports() -> Iterator[int]:
    """TCP ports of the loopback on which nobody listens, below the range that clients get theirs from."""
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            yield port


def _as_user(argv: tuple[str, ...], user: User | None) -> list[str]:
    if user is None:
        return list(argv)
    return ["setpriv", f"--reuid={user.uid}", f"--regid={user.gid}", "--clear-groups", "--", *argv]


def _exit_on_sigterm(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def _fields(line: str) -> dict[str, str]:
    """`JobId=7 JobName=two words ...` as a dict; the first of equal keys wins, for the comment comes late."""
    parts = re.split(r"(?:^|\s)([A-Z][\w/:]*)=", line)[1:]
    fields: dict[str, str] = {}
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        fields.setdefault(key, value.strip())
    return fields


def _one_line(text: str) -> str:
    return " | ".join(line.strip() for line in text.splitlines() if line.strip())
