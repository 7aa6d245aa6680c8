"""What many tests share: a node of its own in a directory, with fast simulated GPUs, and checks of what it shows."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import standin
import throwaway
from hypothesis import HealthCheck, settings

import controller as local
from rms import config, fence, grant, hardware, planner
from rms.device import Nvml
from rms.geometry import Placement
from rms.inventory import Run, State
from rms.nvml import NvmlDevice
from rms.simulated import SimulatedDevice
from rms.store import Store

ROOT = Path(__file__).resolve().parents[1]

# The same examples on every run: a red test stays red until the code is mended.
settings.register_profile(
    "rms", derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
settings.load_profile("rms")

# Whoever runs the tests in the background has them ignore Ctrl-C, and what they start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


needs_root = pytest.mark.skipif(os.geteuid() != 0 and "CI" not in os.environ, reason="needs root")
"""For tests with other users and device nodes. Under CI they fail without root, as they do without Slurm."""


class Node:
    """A node: its rms.toml, its GPUs, and the controller in this process or as one of its own.

    Its GPUs are simulated, or with `backend` nvml those of a machine behind the stand-in for libnvidia-ml.so.1.
    """

    def __init__(self, root: Path, backend: str = "simulated", **settings: Any) -> None:
        self.root = root
        self.backend = backend
        self.settings: dict[str, Any] = {
            "gpus": [0, 1],
            "state_dir": str(root / "state"),
            "run_dir": str(root / "run"),
            "audit_log": str(root / "audit.jsonl"),
            "boot_id_file": str(root / "boot_id"),
            "deadline_seconds": 20,
            "holder_seconds": 0,
            "fence": os.geteuid() == 0,
        }
        self.simulated: dict[str, Any] = {
            "file": str(root / "gpus.json"), "model": "A100-80GB", "gpus": 2, "nodes": str(root / "nodes"),
        }  # fmt: skip
        self.toml = root / "rms.toml"
        self.log: list[str] = []
        self.booted = 0
        self.read: tuple[bytes, Any] = (b"", None)
        self.spare = 900_000
        (root / "state").mkdir(parents=True)
        self.configure(**settings)
        self.boot("first boot")

    def boot(self, boot_id: str) -> None:
        """Start again: another boot id, and nothing in /run."""
        (self.root / "boot_id").write_text(f"{boot_id}\n")
        shutil.rmtree(self.root / "run", ignore_errors=True)
        self.booted = len(self.journal(since_boot=False))

    def configure(self, **settings: Any) -> None:
        """Write rms.toml, with some settings changed; those named `sim_...` belong to the GPUs."""
        for key, value in settings.items():
            if key.startswith("sim_"):
                self.simulated[key.removeprefix("sim_")] = value
            else:
                self.settings[key] = value
        section: dict[str, Any] = self.simulated
        if self.backend == "nvml":
            sim, section = self.simulated, {}
            seconds = (sim.get("create_seconds", 0.0), sim.get("destroy_seconds", 0.0))
            boot_id_file = self.settings["boot_id_file"]
            self.machine = standin.Machine(Path(sim["file"]), [sim["model"]] * sim["gpus"], boot_id_file, *seconds)
            self.machine.use()
            self.settings["driver_root"] = str(self.machine.root)
        lines = [f"{key} = {json.dumps(value)}" for key, value in self.settings.items()]
        if section:
            lines += ["[simulated]", *(f"{key} = {json.dumps(value)}" for key, value in section.items())]
        self.toml.write_text("".join(f"{line}\n" for line in lines))

    @property
    def config(self) -> config.Config:
        """The configuration as the controller reads it; read again where the file has changed."""
        text = self.toml.read_bytes()
        if text != self.read[0]:
            self.read = text, config.load(str(self.toml), "n1")
        return self.read[1]

    def controller(self, choose: planner.Choose = planner.built_in) -> local.Controller:
        """A controller in this process: its warnings go to `log`. One for each call, as in the hooks."""
        return local.Controller(self.config, choose, self.log.append)

    def acquire(self, job: int, spec: str, restart: int = 0, limit: int | None = None) -> list[local.Granted]:
        """One acquire in this process."""
        return self.controller().acquire(run(job, restart), 1000, spec, 1, limit)

    def release(self, job: int, restart: int = 0) -> None:
        """One release in this process."""
        self.controller().release(run(job, restart))

    def reconcile(self, *over: int) -> None:
        """`rms reconcile` in this process; Slurm says that these jobs are over."""
        self.controller().reconcile(lambda standing: [run for run in standing if run.job in over])

    def lose(self, number: int, lost: bool = True) -> None:
        """Let a GPU fall off the bus, or come back with what it had."""
        if self.backend == "simulated":
            device = self.device()
            device.lose(device.gpus()[number], lost)
        elif lost:
            self.machine.fail("*", Nvml.GPU_IS_LOST, gpu=number, times=-1)
        else:
            self.machine.mend()

    def vanish(self, number: int) -> None:
        """Take all instances of a GPU away, as a reset does."""
        if self.backend == "nvml":
            self.machine.vanish(number)
            return
        device = self.device()
        gpu = device.gpus()[number]
        for there in device.instances(gpu):
            if there.ci is not None:
                device.destroy_compute_instance(gpu, there.gi, there.ci)
            device.destroy_gpu_instance(gpu, there.gi)

    def command(self, *arguments: str) -> list[str]:
        """The command line of the controller."""
        return [sys.executable, str(ROOT / "controller.py"), *arguments]

    def environment(self, **more: str) -> dict[str, str]:
        """The environment of the controller as a process."""
        nvml = {} if self.backend == "simulated" else self.machine.environment
        return {"RMS_CONFIG": str(self.toml), "PATH": "/usr/bin:/bin", **nvml, **more}

    def cli(self, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        """`controller.py ARGUMENTS`, with these variables added to its environment."""
        return subprocess.run(
            self.command(*arguments),
            env=self.environment(**more),
            cwd="/",
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`controller.py ARGUMENTS` in the background."""
        return subprocess.Popen(
            self.command(*arguments),
            env=self.environment(),
            cwd="/",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def state(self) -> State:
        """The inventory as the file has it."""
        with Store(self.config.state_dir, time.monotonic() + 20).open("test") as state:
            return state

    @property
    def device_class(self) -> type[SimulatedDevice] | type[NvmlDevice]:
        """What the controller opens."""
        return SimulatedDevice if self.backend == "simulated" else NvmlDevice

    def device(self) -> Any:
        """A session with all GPUs of the node, those that RMS does not manage included."""
        if self.backend == "nvml":
            return standin.Hands(self.machine)
        sim = self.simulated
        boot_id = config.boot_id(self.config)
        return SimulatedDevice(sim["file"], sim["model"], sim["gpus"], range(sim["gpus"]), boot_id, nodes=sim["nodes"])

    def journal(self, since_boot: bool = True) -> list[dict[str, Any]]:
        """What the device was made to do."""
        path = Path(f"{self.simulated['file']}.journal")
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines[self.booted if since_boot else 0 :]]

    def audit(self) -> list[dict[str, Any]]:
        """The audit log."""
        return [json.loads(line) for line in (self.root / "audit.jsonl").read_text().splitlines()]

    def marker(self, job: int) -> Path:
        """The file that tells the job's own side what its Prolog decided."""
        return self.root / "run" / "jobs" / str(job)

    def statuses(self) -> dict[str, str]:
        """Status by placement, over all GPUs (`gpu number:placement`)."""
        state = self.state()
        return {f"{n}:{i.placement}": i.status for n, gpu in enumerate(state.gpus) for i in gpu.instances}

    def check(self, unanswered: int | None = None) -> None:
        """All that must hold whenever no call is under way. Job `unanswered` may have no grant yet: its Prolog died."""
        state = self.state()
        managed = [str(g) for g in open_gpus(self)]
        device = self.device()
        assert state.intents == []
        assert all(a.granted for a in state.allocations), state.allocations
        users = {generation: a.uid for a in state.allocations for generation in a.instances}
        held = [g for a in state.allocations for g in a.instances]
        assert len(held) == len(set(held)), "an instance belongs to two runs"
        busy = [i.generation for gpu in state.gpus for i in gpu.instances if i.status == "busy"]
        assert sorted(busy) == sorted(held), "busy without an allocation, or the other way round"
        generations = [i.generation for gpu in state.gpus for i in gpu.instances]
        assert len(generations) == len(set(generations))
        for gpu in state.gpus:
            assert gpu.uuid in managed or gpu.fault
            records = {(i.gi, i.ci, i.uuid, i.placement) for i in gpu.instances}
            actual = {(i.gi, i.ci, i.uuid, i.placement) for i in device.instances(gpu.uuid)}
            assert records == actual, f"{gpu.uuid}: the inventory and the GPU differ"
            assert all(i.status in ("idle", "busy", "quarantined") and i.intent is None for i in gpu.instances)
            for instance in gpu.instances if self.settings["fence"] and gpu.uuid in managed else ():
                wanted = {users[instance.generation]} - {0} if instance.generation in users else set()
                for capability in device.capabilities(gpu.uuid, instance.gi, instance.ci):
                    assert fence.readers(capability) == wanted, f"{instance} may be opened by others"
        grants = grant.granted(self.config.run_dir)
        jobs = {a.run.job for a in state.allocations}
        assert jobs - {unanswered} <= set(grants) <= jobs, "grants and allocations differ"
        for allocation in state.allocations:
            if allocation.run.job == unanswered:
                continue
            found = grants[allocation.run.job]
            assert (found.restart, found.cluster) == (allocation.run.restart, allocation.run.cluster)
            assert found.request == allocation.request
            assert found.uuids == tuple(i.uuid for _, i in state.held(allocation)), "the grant is not what is held"
        assert overlaps(self.journal()) == []

    def check_empties(self) -> None:
        """After every run is released, every GPU must be free for the whole of it again: nothing has leaked."""
        for allocation in self.state().allocations:
            self.release(allocation.run.job, allocation.run.restart)
        self.check()
        whole = self.device().geometry(open_gpus(self)[0]).profiles[-1].name
        count = len(open_gpus(self))
        jobs = range(self.spare, self.spare + count)
        self.spare += count
        for job in jobs:
            self.acquire(job, whole)
        self.check()
        for job in jobs:
            self.release(job)
        self.check()


def run(job: int, restart: int = 0) -> Run:
    """The run of a job."""
    return Run("cluster", job, restart)


def open_gpus(node: Node) -> list[str]:
    """UUIDs of the GPUs that the node's configuration names."""
    device = hardware.open_device(node.config, config.boot_id(node.config))
    try:
        return list(device.gpus())
    finally:
        device.close()


def overlaps(journal: list[dict[str, Any]]) -> list[str]:
    """What the device's own journal shows of overlapping instances, and of holes in the journal."""
    found = []
    there: dict[tuple[str, int], Placement] = {}
    for entry in journal:
        if entry["code"]:
            continue
        key = (entry["gpu"], entry["gi"])
        if entry["op"] == "create_gpu_instance":
            new = Placement(entry["profile"], entry["start"], entry["size"])
            found += [
                f"{new} over {old} on {gpu}"
                for (gpu, _), old in there.items()
                if gpu == entry["gpu"] and old.mask & new.mask
            ]
            there[key] = new
        elif entry["op"] == "destroy_gpu_instance" and there.pop(key, None) is None:
            found.append(f"{key} destroyed, but the journal does not have its making")
    return found


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    """A directory in memory where there is one: what is tested is the order of writes, not the disk."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="rms-", dir=parent))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that says `BACKENDS = ["simulated", "nvml"]` has its nodes' tests run on both."""
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", getattr(metafunc.module, "BACKENDS", ["simulated"]))


@pytest.fixture
def node(fast_dir: Path, backend: str) -> Node:
    """A node with two A100-80GB without latency."""
    return Node(fast_dir / "node", backend)


@pytest.fixture
def make_node(fast_dir: Path, backend: str) -> Callable[..., Node]:
    """Makes nodes with settings of their own."""
    counter = iter(range(1000))
    return lambda **settings: Node(fast_dir / f"node{next(counter)}", backend, **settings)


@pytest.fixture(scope="module")
def slurm_root() -> Iterator[Path]:
    """A directory that every user can reach, for a throw-away Slurm. Where Slurm is missing the test fails under CI."""
    if lacking := throwaway.missing():
        message = f"Slurm is not installed: apt-get install {' '.join(lacking)}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    root = Path(tempfile.mkdtemp(prefix="rms-test-"))
    root.chmod(0o755)
    yield root / "cluster"
    shutil.rmtree(root, ignore_errors=True)
