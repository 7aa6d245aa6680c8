"""SIGKILL at every step of a call: each write (also half of it), rename, link, sync, lock and device operation.

A forked child makes the call and counts what it does to the world; at the n-th step it kills itself. Then another run
calls, and everything must be right: the file, the GPUs, their journal and the grants agree, nobody lost an instance,
nothing is held twice, nothing has leaked. n goes up until the call gets to its end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, open_gpus, run

from rms import grant
from rms.errors import ClosedRunError, RmsError
from rms.geometry import Placement
from rms.simulated import SimulatedDevice
from rms.store import Store

WORLD: list[tuple[Any, str]] = [
    *((os, name) for name in ("open", "write", "pwrite", "fsync", "rename", "replace", "link", "unlink")),
    *((os, name) for name in ("fchmod", "chmod", "chown", "setxattr", "mknod", "ftruncate", "makedirs", "mkdir")),
    (fcntl, "flock"),
    (SimulatedDevice, "_log"),
    *((SimulatedDevice, f"{verb}_{what}_instance") for verb in ("create", "destroy") for what in ("gpu", "compute")),
]
COMPLETED = 0


def die_at(step: int, act: Callable[[], object], may_fail: bool = False) -> tuple[bool, str]:
    """Do `act` in a child that dies before its `step`-th change of the world. Whether it died, and before what."""
    return fate(*doomed(step, act, may_fail))


def doomed(step: int, act: Callable[[], object], may_fail: bool = False) -> tuple[int, int]:
    """Such a child, for `fate`: its process id, and where it tells."""
    pipe, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _count_down(step, end)
            act()
            os._exit(COMPLETED)
        except RmsError as error:
            if not may_fail:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(COMPLETED if may_fail else error.code)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(99)
    os.close(end)
    return pid, pipe


def fate(pid: int, pipe: int) -> tuple[bool, str]:
    """Whether a child has died, and before what; it has ended then."""
    with open(pipe) as reader:
        where = reader.read()
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (COMPLETED, -signal.SIGKILL), f"the call ended with {status}"
    return status == -signal.SIGKILL, where


def changes(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a call changes anything: a death before one that does not is the death before the next that does."""
    if name == "open":
        return bool(arguments[1] & (os.O_CREAT | os.O_TRUNC))
    return name not in ("mkdir", "makedirs") or not os.path.exists(arguments[0])


def _count_down(step: int, end: int) -> None:
    left = [step]
    inside: list[str] = []  # the device calls under way: what they do inside is the driver's business
    kill, write, me = os.kill, os.write, os.getpid()

    def tick(name: str) -> bool:
        left[0] -= 1
        if left[0] == 0:
            write(end, name.encode())
        return left[0] == 0

    def counted(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if (inside and name != "_log") or not changes(name, arguments):
                return real(*arguments, **options)
            if tick(name):
                kill(me, signal.SIGKILL)
            if arguments and isinstance(arguments[0], SimulatedDevice):
                inside.append(name)
                try:
                    return real(*arguments, **options)
                finally:
                    inside.pop()
            if name in ("write", "pwrite") and len(arguments[1]) > 1 and tick(f"half of {name}"):
                real(arguments[0], arguments[1][: len(arguments[1]) // 2], *arguments[2:])
                kill(me, signal.SIGKILL)
            return real(*arguments, **options)

        return call

    for owner, name in WORLD:
        setattr(owner, name, counted(name, getattr(owner, name)))


class Snapshot:
    """The files of a directory, to be put back."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folders = [path for path in root.rglob("*") if path.is_dir()]
        self.files = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
        self.devices = {
            path: (
                path.stat().st_mode,
                path.stat().st_rdev,
                {name: os.getxattr(path, name) for name in os.listxattr(path)},
            )
            for path in root.rglob("*")
            if path.is_char_device()
        }

    def restore(self) -> None:
        """Put everything back as it was."""
        shutil.rmtree(self.root)
        for folder in [self.root, *self.folders]:
            folder.mkdir(parents=True, exist_ok=True)
        for path, data in self.files.items():
            path.write_bytes(data)
        for path, (mode, device, attributes) in self.devices.items():
            os.mknod(path, mode, device)
            path.chmod(mode)
            for name, value in attributes.items():
                os.setxattr(path, name, value)


def killed_in(node: Node, act: Callable[[], object], where: str, times: int = 1) -> None:
    """Let a call die before its `times`-th step of that name."""
    before = Snapshot(node.root)
    for step in range(1, 1000):
        died, at = die_at(step, act)
        assert died, f"the call has no such step: {where}"
        times -= at == where
        if not times:
            return
        before.restore()


HOLDER = 1
"""The job that holds an instance all the time, whatever else dies."""
CRASHED = 10
NEXT = 20


def holding(node: Node) -> None:
    node.acquire(HOLDER, "1g")


def acquired(spec: str) -> Callable[[Node], object]:
    return lambda node: node.acquire(CRASHED, spec)


def released(node: Node) -> None:
    node.release(CRASHED)


def nothing(node: Node) -> None:
    """No state at all yet."""


def idle_alike(node: Node) -> None:
    """An idle instance that fits exactly."""
    holding(node)
    node.acquire(2, "3g")
    node.release(2)


def idle_in_the_way(node: Node) -> None:
    """A GPU full of small idle instances, with a busy one on the other."""
    node.acquire(2, "1g:7")
    node.acquire(HOLDER, "1g")
    node.release(2)


def idle_of_all_kinds(node: Node) -> None:
    """Both GPUs have idle instances: some fit, some are in the way."""
    node.acquire(2, "2g:3")
    node.acquire(HOLDER, "1g")
    node.acquire(3, "3g")
    node.acquire(4, "1g.20gb:2")
    for job in (2, 3, 4):
        node.release(job)


def running(node: Node) -> None:
    """The run that is to be released, with three instances."""
    holding(node)
    node.acquire(CRASHED, "2g,1g:2")


def others_run(node: Node) -> None:
    holding(node)
    node.acquire(2, "2g,1g:2")


def older_run(node: Node) -> None:
    running(node)


def refused(node: Node) -> None:
    """No room for the run, and its marker says so."""
    holding(node)
    node.acquire(2, "7g")
    with pytest.raises(RmsError):
        node.acquire(CRASHED, "7g")
    node.release(2)


def rebooted(node: Node) -> None:
    node.acquire(CRASHED, "3g")
    kept = [path for path in (node.root / "run").rglob("*") if path.is_file()]
    texts = [path.read_bytes() for path in kept]
    node.boot("second boot")
    for path, text in zip(kept, texts, strict=True):  # a run_dir that is on a disk
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text)


def reconfigured(node: Node) -> None:
    """A third GPU has been added to the config."""
    holding(node)
    node.configure(gpus=[1, 0])


def damaged(node: Node) -> None:
    """The newest state is cut short; its previous generation knows less than the grants."""
    others_run(node)
    cut(node, "state.json")


def all_damaged(node: Node) -> None:
    """Nothing but the GPUs and the grants is left."""
    others_run(node)
    cut(node, "state.json")
    cut(node, "state.json.previous")


def cut(node: Node, name: str) -> None:
    path = node.root / "state" / name
    path.write_bytes(path.read_bytes()[:200])


def half_made(node: Node) -> None:
    """A process died between a GI and its CI, with idle instances partly destroyed."""
    idle_of_all_kinds(node)
    killed_in(node, lambda: node.acquire(2, "4g,1g:3", restart=1), "create_compute_instance", 2)


def half_gone(node: Node) -> None:
    """A process died between the destruction of a CI and its GI."""
    idle_in_the_way(node)
    killed_in(node, lambda: node.acquire(2, "7g", restart=1), "destroy_gpu_instance")


def half_released(node: Node) -> None:
    """A release died while it asked the GPU."""
    running(node)
    node.acquire(3, "3g")
    killed_in(node, lambda: node.release(3), "flock", 3)
    assert node.marker(3).read_text() == "ended 0\n"


def gpu_of_old_idle(node: Node) -> None:
    """Idle instances that no job has had for long, beside a busy one."""
    node.acquire(2, "1g:3")
    holding(node)
    node.release(2)
    path = node.root / "state" / "state.json"
    with Store(str(path.parent), time.monotonic() + 20).open("test") as state:
        for gpu in state.gpus:
            for instance in gpu.instances:
                instance.used = 0.0
        Store(str(path.parent), time.monotonic() + 20).save(state)


def prewarmed(node: Node) -> None:
    """One instance, with two in its way."""
    node.controller().prewarm(lambda view, number: [Placement("2g.20gb", 4, 2)] if view.gpus[number].idle else [])


SCENARIOS: dict[str, tuple[Callable[[Node], object], Callable[[Node], object]]] = {
    "first call ever": (nothing, acquired("3g")),
    "create": (holding, acquired("3g")),
    "reuse": (idle_alike, acquired("3g")),
    "destroy, then create": (idle_in_the_way, acquired("7g")),
    "several instances": (idle_of_all_kinds, acquired("4g,1g:2,2g")),
    "after a refusal": (refused, acquired("7g")),
    "newer run": (older_run, lambda node: node.acquire(CRASHED, "3g", restart=1)),
    "release": (running, released),
    "release of nothing": (holding, released),
    "after a reboot": (rebooted, lambda node: node.acquire(CRASHED, "3g", restart=1)),
    "after a change of config": (reconfigured, acquired("3g")),
    "recovery": (damaged, lambda node: node.acquire(CRASHED, "3g")),
    "recovery from nothing": (all_damaged, lambda node: node.acquire(CRASHED, "3g")),
    "mending a half-made instance": (half_made, acquired("4g")),
    "mending a half-destroyed one": (half_gone, acquired("7g")),
    "mending a release": (half_released, acquired("3g")),
    "prewarming": (gpu_of_old_idle, prewarmed),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_call_may_die_anywhere(node: Node, name: str) -> None:
    prepare, act = SCENARIOS[name]
    prepare(node)
    before = Snapshot(node.root)
    safe = {job: g.uuids for job, g in grant.granted(node.config.run_dir).items() if job != CRASHED}
    for step in range(1, 1000):
        died, where = die_at(step, lambda: act(node))
        story = f"{name}: killed before step {step}, {where}" if died else f"{name}: not killed"
        try:
            aftermath(node, name, step, safe)
        except Exception as error:
            raise AssertionError(f"{story}: {error}; {node.log}") from error
        if not died:
            assert step > 15, "nearly nothing was counted"
            return
        before.restore()
    raise AssertionError("never came to its end")


@pytest.mark.parametrize("name", ["several instances", "release", "newer run"])
def test_a_call_may_die_and_take_the_state_with_it(node: Node, name: str) -> None:
    """Two faults at once: the newest state is torn too, and the GPUs, the grants and what was before must do."""
    prepare, act = SCENARIOS[name]
    prepare(node)
    before = Snapshot(node.root)
    safe = {job: g.uuids for job, g in grant.granted(node.config.run_dir).items() if job != CRASHED}
    for step in range(1, 1000, 2):
        died, where = die_at(step, lambda: act(node))
        cut(node, "state.json")
        try:
            # Somebody else's half-made instance looks like one that we forgot: it is left for the administrator.
            half_made = [(gpu, i.gi) for gpu in open_gpus(node) for i in node.device().instances(gpu) if i.ci is None]
            node.release(NEXT + 1)
            for gpu, gi in half_made:
                if gi in {i.gi for i in node.device().instances(gpu)}:
                    node.device().destroy_gpu_instance(gpu, gi)
            node.reconcile()
            aftermath(node, name, step, safe)
        except Exception as error:
            raise AssertionError(f"{name}: killed before step {step}, {where}: {error}; {node.log}") from error
        if not died:
            return
        before.restore()
    raise AssertionError("never came to its end")


def aftermath(node: Node, name: str, step: int, safe: dict[int, tuple[str, ...]]) -> None:
    """What must be so once another run has called."""
    if "7g" in name:
        node.release(NEXT)
    else:
        node.acquire(NEXT, "1g")
    node.check(CRASHED)
    state = node.state()
    for job, uuids in safe.items():
        allocation = state.of_run(run(job))
        assert allocation is not None, "the allocation of a running job is lost"
        assert tuple(i.uuid for _, i in state.held(allocation)) == uuids
    assert all(i.status != "quarantined" for gpu in state.gpus for i in gpu.instances)
    # slurmd's next move: the same Prolog again, or the Epilog of the run whose Prolog died.
    restart = 1 if "newer" in name or "reboot" in name else 0
    if step % 2 and "release" not in name:
        again = node.acquire(CRASHED, "1g", restart)
        assert again == node.acquire(CRASHED, "1g", restart)
    else:
        node.release(CRASHED, restart)
        with pytest.raises(ClosedRunError):
            node.acquire(CRASHED, "1g", restart)
    node.check()
    if step % 5 == 0:
        node.check_empties()
