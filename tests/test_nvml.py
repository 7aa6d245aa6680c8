"""Real GPUs through the real nvidia-ml-py, against the stand-in for libnvidia-ml.so.1: the backend does with NVML what
SimulatedDevice does without it, whatever NVML answers."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pynvml
import pytest
import test_crash
from conftest import Node, needs_root, open_gpus, overlaps
from standin import CREATE_CI, CREATE_GI, DESTROY_CI, DESTROY_GI, Machine
from test_crash import CRASHED, SCENARIOS, Snapshot, die_at

# The same tests as for simulated GPUs, with the `device` of this module.
from test_simulated import (  # noqa: F401
    test_instances_with_and_without_ci,
    test_the_driver_s_ids_of_an_a100,
    test_the_errors_of_nvml,
    test_uuids_come_back_for_the_same_place_and_differ_for_others,
)

from rms import geometry, grant, hardware, nvml
from rms.config import Config
from rms.device import Device, DeviceError, Nvml
from rms.errors import NodeError, NoRoomError
from rms.nvml import NvmlDevice
from rms.simulated import SimulatedDevice

BACKENDS = ["nvml"]
SMALL, LARGE, WHOLE = "1g.10gb", "3g.40gb", "7g.80gb"
WALK = "nvmlDeviceGetMigDeviceHandleByIndex"


@pytest.fixture
def machine(fast_dir: Path) -> Machine:
    """Two A100-80GB."""
    return Machine(fast_dir / "machine")


@pytest.fixture
def device(machine: Machine) -> Iterator[NvmlDevice]:
    """A session with both."""
    with machine.device() as session:
        yield session


def made(device: Device, profile: str, start: int, number: int = 0) -> tuple[str, int, int]:
    gpu = device.gpus()[number]
    gi = device.create_gpu_instance(gpu, profile, start)
    return gpu, gi, device.create_compute_instance(gpu, gi)


def refused(code: Nvml, call: Callable[[], object], text: str | None = None) -> None:
    with pytest.raises(DeviceError, match=text) as caught:
        call()
    assert caught.value.code == code


# Geometry.


@pytest.mark.parametrize("model", geometry.models())
def test_the_geometry_is_read_and_comes_out_as_the_data(fast_dir: Path, model: str) -> None:
    known = geometry.load(model)
    with Machine(fast_dir / "machine", [model]).device() as device:
        read = device.geometry(device.gpus()[0])
    assert read.slots == known.slots
    assert set(read.by_name) == set(known.by_name)
    for profile in known.profiles:
        found = read.by_name[profile.name]
        assert found._replace(memory_mb=None) == profile._replace(memory_mb=None)
        assert profile.memory_mb in (None, found.memory_mb)
    assert read.base() == known.base()
    assert read.names() == known.names()
    assert [p.compute for p in read.profiles] == [p.compute for p in known.profiles], "small to large"
    assert read.configs == known.configs


def test_other_names_when_the_driver_rounds_down() -> None:
    assert geometry.aliases("7g.79gb", "7_SLICE", 80896) == ("7g", "7g.80gb")
    assert geometry.aliases("1g.9gb+me", "1_SLICE_REV1", 9728) == ("1g+me", "1g.10gb+me")
    assert geometry.aliases("1g.19gb", "1_SLICE_REV2", 19968) == ("1g.20gb",)
    assert geometry.aliases("4g.24gb", "4_SLICE", 22000) == ("4g",)


def test_an_unknown_board_is_believed(fast_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What NVML says counts, also where it is not what geometry.json says of that PCI device."""
    machine = Machine(fast_dir / "machine", ["A100-80GB"])
    text = machine.path.read_text()
    machine.path.write_text(text.replace(" 5 1 4 4 40192 4g.40gb 0\n", " 5 1 4 4 40192 4g.40gb 4\n"))
    with machine.device() as device:
        gpu = device.gpus()[0]
        read = device.geometry(gpu)
        assert read.by_name["4g.40gb"].starts == (4,)
        assert read.configs == (), "its layouts have no numbers"
        assert device.create_gpu_instance(gpu, "4g.40gb", 4) == 2


# Both backends, step by step.

OPERATIONS = ["create", "create", "ci", "ci", "ci", "-ci", "-ci", "-gi", "-gi", "holders", "uuid", "hold", "end"]


class Pair:
    """The same operations on both backends: they must answer alike, but for the UUIDs, which are renamed."""

    def __init__(self, root: Path, model: str, nvml: NvmlDevice, machine: Machine) -> None:
        self.simulated = SimulatedDevice(str(root / "gpus.json"), model, 2, [0, 1], "boot")
        self.nvml = nvml
        self.machine = machine
        self.names: dict[str, str] = dict(zip(self.simulated.gpus(), nvml.gpus(), strict=True))

    def both(self, number: int, operation: Callable[[Device, str], Any]) -> Any:
        """The answer of an operation on a GPU, or its error code."""
        answers = []
        for device in (self.simulated, self.nvml):
            try:
                answers.append(operation(device, device.gpus()[number]))
            except DeviceError as error:
                answers.append(error.code)
        assert self.renamed(answers[0]) == answers[1]
        return answers[1]

    def renamed(self, answer: Any) -> Any:
        if isinstance(answer, str):
            return self.names.get(answer, answer)
        if isinstance(answer, list):
            return sorted(i._replace(uuid=self.renamed(i.uuid)) if hasattr(i, "uuid") else i for i in answer)
        return answer

    def instances(self, number: int) -> list[Any]:
        """The instances of a GPU; UUIDs that were not seen before are paired by their place, one to one."""
        theirs = {i.gi: i for i in self.nvml.instances(self.nvml.gpus()[number])}
        for mine in self.simulated.instances(self.simulated.gpus()[number]):
            if mine.uuid and mine.uuid not in self.names:
                assert theirs[mine.gi].uuid not in self.names.values()
                self.names[mine.uuid] = theirs[mine.gi].uuid
        found: list[Any] = self.both(number, lambda device, gpu: list(device.instances(gpu)))
        return found

    def hold(self, number: int, instance: Any, pid: int) -> None:
        back = {new: old for old, new in self.names.items()}
        self.simulated.hold(back[instance.uuid], pid)
        self.machine.hold(pid, number, instance.gi, instance.ci)


@pytest.mark.parametrize("model", ["A100-80GB", "A30", "H200", "RTX-PRO-6000"])
@pytest.mark.parametrize("option", ["plain", "high"])
def test_both_backends_agree_step_by_step(fast_dir: Path, model: str, option: str) -> None:
    """1000 random operations each; legal ones are more often tried than chance would have it."""
    chance = random.Random(f"{model} {option}")
    known = geometry.load(model)
    machine = Machine(fast_dir / "machine", [model] * 2, options=[option])
    outcomes: dict[str, set[str]] = {}
    processes: list[subprocess.Popen[bytes]] = []
    with machine.device() as session:
        pair = Pair(fast_dir, model, session, machine)
        try:
            for _ in range(1000):
                number = chance.randrange(2)
                there = pair.instances(number)
                profile = chance.choice(known.profiles)
                start = chance.choice([*profile.starts * 3, chance.randrange(-1, known.slots + 1)])
                gi = chance.choice([*(i.gi for i in there), chance.randrange(16)])
                ci = chance.choice([0, 0, 0, 1])
                op = chance.choice(OPERATIONS)
                answer: Any = None
                if op == "create":
                    name, at = profile.name, start
                    answer = pair.both(number, lambda d, gpu, n=name, s=at: d.create_gpu_instance(gpu, n, s))
                elif op == "ci":
                    answer = pair.both(number, lambda d, gpu, g=gi: d.create_compute_instance(gpu, g))
                elif op == "-ci":
                    answer = pair.both(number, lambda d, gpu, g=gi, c=ci: d.destroy_compute_instance(gpu, g, c))
                elif op == "-gi":
                    answer = pair.both(number, lambda d, gpu, g=gi: d.destroy_gpu_instance(gpu, g))
                elif op == "holders":
                    answer = pair.both(number, lambda d, gpu, g=gi, c=ci: list(d.holders(gpu, g, c)))
                elif op == "uuid":
                    answer = pair.both(number, lambda d, gpu, g=gi, c=ci: d.uuid(gpu, g, c))
                elif op == "hold" and len(processes) < 4 and (whole := [i for i in there if i.uuid]):
                    processes.append(subprocess.Popen(["sleep", "100"]))
                    pair.hold(number, chance.choice(whole), processes[-1].pid)
                elif op == "end" and processes:
                    process = processes.pop(chance.randrange(len(processes)))
                    process.kill()
                    process.wait()
                outcomes.setdefault(op, set()).add(answer.name if isinstance(answer, Nvml) else "done")
        finally:
            for process in processes:
                process.kill()
                process.wait()
    assert outcomes["create"] == {"done", "INVALID_ARGUMENT", "INSUFFICIENT_RESOURCES"}
    assert outcomes["ci"] == {"done", "NOT_FOUND", "INSUFFICIENT_RESOURCES"}
    assert outcomes["-ci"] == outcomes["-gi"] == {"done", "NOT_FOUND", "IN_USE"}
    assert outcomes["uuid"] == outcomes["holders"] == {"done", "NOT_FOUND"}
    assert overlaps(machine.journal()) == []


# What NVML may do to the caller.


def test_mig_indices_with_holes(fast_dir: Path) -> None:
    with Machine(fast_dir / "machine", options=["high"]).device() as device:
        gpu = device.gpus()[0]
        there = [made(device, SMALL, start)[1:] for start in range(7)]
        uuids = [device.uuid(gpu, *ids) for ids in there]
        for ids in (there[0], there[3], there[4]):
            device.destroy_compute_instance(gpu, *ids)
        assert len(set(uuids)) == 7
        left = {(i.gi, i.ci): i.uuid for i in device.instances(gpu) if i.ci is not None}
        assert left == {there[n]: uuids[n] for n in (1, 2, 5, 6)}
        device.create_compute_instance(gpu, there[3][0])
        assert device.uuid(gpu, *there[3]) == uuids[3]


def test_gi_ids_that_nobody_expects(fast_dir: Path) -> None:
    with Machine(fast_dir / "machine", options=["odd-ids"]).device() as device:
        gpu, first, ci = made(device, LARGE, 4)
        _, second, _ = made(device, LARGE, 0)
        assert (first, second) == (14, 13)
        assert [(i.gi, i.placement.start) for i in device.instances(gpu)] == [(13, 0), (14, 4)]
        device.destroy_compute_instance(gpu, first, ci)
        device.destroy_gpu_instance(gpu, first)
        assert [i.gi for i in device.instances(gpu)] == [13]


@pytest.mark.parametrize("slices", [[1], [2], [1, 1], [1, 1, 1], [2, 1]])
def test_a_gpu_instance_that_somebody_cut_up_is_not_whole(node: Node, slices: list[int]) -> None:
    gpu = node.machine.uuids[0]
    with node.machine.device() as device:
        gi = device.create_gpu_instance(gpu, LARGE, 4)
        instance = pynvml.nvmlDeviceGetGpuInstanceById(pynvml.nvmlDeviceGetHandleByIndex(0), gi)
        for number in slices:
            pynvml.nvmlGpuInstanceCreateComputeInstance(instance, number - 1)
        assert [tuple(i) for i in device.instances(gpu)] == [(gi, (LARGE, 4, 4), None, None)]
        # A process on any of its compute instances holds all of it.
        node.machine.hold(os.getpid(), 0, gi, len(slices) - 1)
        assert device.holders(gpu, gi, 0) == [os.getpid()]
    node.configure(gpus=[0])
    node.acquire(1, "3g")
    assert node.statuses() == {"0:3g.40gb@4:4": "quarantined", "0:3g.40gb@0:4": "busy"}
    with pytest.raises(NoRoomError):
        node.acquire(2, "3g")
    assert "destroy_gpu_instance" not in {e["op"] for e in node.journal()}


def test_an_old_picture_of_the_mig_devices(fast_dir: Path) -> None:
    with Machine(fast_dir / "machine", options=["stale"]).device() as device:
        gpu, gi, ci = made(device, LARGE, 4)
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                made(device, SMALL, 0)
            os._exit(0)
        os.waitpid(pid, 0)
        assert len(nvml._mig_devices(device._gpu(gpu))) == 1, "the session does not see what the other process made"
        assert len({i.uuid for i in device.instances(gpu)} - {None}) == 2
        assert device.holders(gpu, gi, ci) == []


def test_a_compute_instance_without_mig_device(machine: Machine, device: NvmlDevice) -> None:
    """It must not look as if it had vanished: then its slices would be given away."""
    gpu, gi, ci = made(device, LARGE, 4)
    machine.fail(WALK, Nvml.NOT_FOUND, times=-1)
    refused(Nvml.UNKNOWN, lambda: device.uuid(gpu, gi, ci), "no MIG device")
    refused(Nvml.UNKNOWN, lambda: device.holders(gpu, gi, ci))
    refused(Nvml.UNKNOWN, lambda: device.instances(gpu))
    machine.mend()
    assert device.holders(gpu, gi, ci) == []


def test_a_walk_that_fails_is_no_hole(machine: Machine, device: NvmlDevice) -> None:
    gpu, gi, ci = made(device, LARGE, 4)
    machine.fail(WALK, Nvml.UNKNOWN)
    refused(Nvml.UNKNOWN, lambda: device.holders(gpu, gi, ci), "MIG device of GI 2 CI 0: NVML error 999")


def test_a_process_that_has_the_whole_gpu(machine: Machine, device: NvmlDevice) -> None:
    """It makes everything IN_USE, and is nobody's holder."""
    gpu, gi, ci = made(device, LARGE, 4)
    machine.hold(os.getpid(), 0)
    assert device.holders(gpu, gi, ci) == []
    refused(Nvml.IN_USE, lambda: device.create_gpu_instance(gpu, LARGE, 0), "create 3g.40gb at 0: .*in use")
    device.destroy_compute_instance(gpu, gi, ci)
    refused(Nvml.IN_USE, lambda: device.destroy_gpu_instance(gpu, gi))


def test_placements_are_passed_by_reference(device: NvmlDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-ml-py passes the struct on as it is, and the driver would take it for an address."""
    passed: list[Any] = []
    real = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement
    monkeypatch.setattr(pynvml, CREATE_GI, lambda *arguments: (passed.append(arguments), real(*arguments))[1])
    device.create_gpu_instance(device.gpus()[0], LARGE, 4)
    assert type(passed[0][2]) is type(ctypes.byref(ctypes.c_int()))


@pytest.mark.parametrize("code", [2, 3, 6, 10, 15, 16, 19, 23, 27, 999])
def test_every_error_comes_through(machine: Machine, device: NvmlDevice, code: int) -> None:
    gpu, gi, ci = made(device, LARGE, 4)
    calls: dict[str, Callable[[], object]] = {
        CREATE_GI: lambda: device.create_gpu_instance(gpu, LARGE, 0),
        CREATE_CI: lambda: device.create_compute_instance(gpu, gi),
        DESTROY_CI: lambda: device.destroy_compute_instance(gpu, gi, ci),
        DESTROY_GI: lambda: device.destroy_gpu_instance(gpu, gi),
        "nvmlDeviceGetUUID": lambda: device.uuid(gpu, gi, ci),
        "nvmlDeviceGetGpuInstances": lambda: device.instances(gpu),
        "nvmlDeviceGetComputeRunningProcesses_v3": lambda: device.holders(gpu, gi, ci),
    }
    for name, call in calls.items():
        machine.fail(name, code)
        refused(Nvml(code) if code in Nvml.__members__.values() else Nvml.UNKNOWN, call, f"NVML error {code} ")
    assert [i.ci for i in device.instances(gpu)] == [ci], "nothing of it has happened"


# Opening.


def test_no_other_gpu_is_opened(fast_dir: Path) -> None:
    machine = Machine(fast_dir / "machine", ["A100-80GB"] * 4)
    with machine.device([2]) as device:
        device.instances(device.gpus()[0])
    assert machine.opened() == {2}
    machine.kernel([1, 2])
    with machine.device([machine.uuids[1]]) as device:
        assert device.gpus() == [machine.uuids[1]]
        assert machine.opened() == {2}, "not before it is asked for"
        made(device, LARGE, 4)
    assert machine.opened() == {1, 2}
    # The kernel module does not know it yet: NVML looks for it, as far as it must.
    with machine.device([machine.uuids[0]]) as device:
        made(device, LARGE, 4)
    assert machine.opened() == {0, 1, 2}


def test_a_lost_gpu_does_not_stop_the_others(fast_dir: Path) -> None:
    machine = Machine(fast_dir / "machine", ["A100-80GB"] * 3)
    machine.fail("*", Nvml.GPU_IS_LOST, gpu=0, times=-1)
    machine.kernel([0, 1])
    with machine.device(machine.uuids) as device:
        assert device.gpus() == machine.uuids
        made(device, LARGE, 4, number=1)
        refused(Nvml.GPU_IS_LOST, lambda: made(device, LARGE, 4), "look for Xid")
        # NVML's own search for a UUID stops at the lost one.
        refused(Nvml.GPU_IS_LOST, lambda: made(device, LARGE, 4, number=2))
    with machine.device([0, 1]) as device:
        assert device.gpus() == ["0", machine.uuids[1]]
        refused(Nvml.GPU_IS_LOST, lambda: device.instances("0"), "open")
    with machine.device([1, 2]) as device:
        made(device, LARGE, 4, number=1)


@pytest.mark.parametrize("wrong", [2, -1, 2**32, 10**20])
def test_an_index_that_is_not_there(machine: Machine, wrong: int) -> None:
    with pytest.raises(DeviceError, match="not found") as caught, machine.device([wrong]):
        pass
    assert caught.value.code == Nvml.NOT_FOUND
    machine.use()
    with pytest.raises(pynvml.NVMLError_Uninitialized):
        pynvml.nvmlDeviceGetCount()  # the session that failed is closed


@pytest.mark.parametrize(
    ("current", "pending", "code", "text"),
    [
        (False, False, Nvml.NOT_SUPPORTED, "MIG mode is off, `rms mig enable GPU-.*` turns it on"),
        (False, True, Nvml.RESET_REQUIRED, "MIG mode is not on yet.*; reset the GPU while nothing uses it, or reboot"),
    ],
)
def test_mig_mode_is_read_and_never_changed(
    machine: Machine, current: bool, pending: bool, code: Nvml, text: str
) -> None:
    machine.mig_mode(1, current, pending)
    with machine.device() as device:
        first, second = device.gpus()
        for call in (device.geometry, device.instances):
            refused(code, lambda c=call: c(second), text)
        made(device, LARGE, 4)
        assert device.geometry(first)
    with machine.state() as lines:
        assert f"mig 1 {current:d} {pending:d}" in lines


def test_a_gpu_without_mig(fast_dir: Path) -> None:
    with Machine(fast_dir / "machine", ["L4"]).device() as device:
        refused(Nvml.NOT_SUPPORTED, lambda: device.geometry(device.gpus()[0]), "this GPU has no MIG mode")


def test_mig_mode_that_a_reboot_has_ended(make_node: Callable[..., Node]) -> None:
    """Hopper forgets it, Ampere does not (the tests of the controller reboot an A100)."""
    node = make_node(sim_model="H100-80GB")
    node.acquire(1, "3g")
    node.boot("second boot")
    with pytest.raises(NodeError, match=f"GPU {node.machine.uuids[0]}: MIG mode is off, `rms mig"):
        node.acquire(2, "3g")
    for number in (0, 1):
        node.machine.mig_mode(number, True, True)
    assert node.acquire(2, "3g", restart=1)
    node.check_empties()


@pytest.mark.parametrize(
    ("broken", "text"),
    [
        (9, "driver not loaded.*; load the nvidia kernel module"),
        (18, "mismatch.*updated"),
        (4, "root"),
        (17, "unknown"),
    ],
)
def test_a_driver_that_is_not_there(fast_dir: Path, broken: int, text: str) -> None:
    Machine(fast_dir / "machine", broken=broken).use()
    with pytest.raises(NodeError, match=f"cannot open the GPUs: open NVML: NVML error {broken} .*{text}"):
        hardware.open_device(Config((0,)), "boot")


def test_no_library_and_no_python_module(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
    with pytest.raises(NodeError, match=r"no libnvidia-ml\.so\.1: install the driver"):
        hardware.open_device(Config((0,)), "boot")
    monkeypatch.setitem(sys.modules, "rms.nvml", None)
    with pytest.raises(NodeError, match=r"pip install nvidia-ml-py"):
        hardware.open_device(Config((0,)), "boot")


def test_a_driver_that_is_too_old(machine: Machine, device: NvmlDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.fail("nvmlDeviceGetGpuInstanceProfileInfoV", Nvml.FUNCTION_NOT_FOUND)
    refused(Nvml.FUNCTION_NOT_FOUND, lambda: device.geometry(device.gpus()[0]), "install a newer driver")


def test_a_gpu_that_is_named_twice(node: Node) -> None:
    node.configure(gpus=[0, node.machine.uuids[0]])
    with pytest.raises(NodeError, match="twice"):
        node.acquire(1, "3g")


def test_without_the_right_to(fast_dir: Path) -> None:
    machine = Machine(fast_dir / "machine", privileged=os.geteuid() + 1)
    with machine.device() as device:
        gpu = device.gpus()[0]
        refused(Nvml.NO_PERMISSION, lambda: device.geometry(gpu), "RMS must run as root")
        refused(Nvml.NO_PERMISSION, lambda: device.destroy_gpu_instance(gpu, 1))
        refused(Nvml.NO_PERMISSION, lambda: device.holders(gpu, 1, 0))


@needs_root
def test_another_user(fast_dir: Path) -> None:
    machine = Machine(fast_dir / "machine")
    machine.use()
    fast_dir.chmod(0o777)
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.setuid(65534)
            device = NvmlDevice([0])
            assert device.gpus() == machine.uuids[:1], "looking is free"
            refused(Nvml.NO_PERMISSION, lambda: device.instances(device.gpus()[0]))
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# The controller on it, beyond its own tests.


def test_one_session_for_each_transaction_that_needs_one(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("nvmlInit", "nvmlShutdown"):
        real = getattr(pynvml, name)
        monkeypatch.setattr(pynvml, name, lambda n=name, r=real: (calls.append(n), r())[1])
    once = ["nvmlInit", "nvmlShutdown"]
    node.acquire(1, "7g")
    assert calls == once
    node.acquire(2, "3g,2g,1g:2")
    assert calls == once * 2
    with pytest.raises(NoRoomError):
        node.acquire(3, "7g")
    node.acquire(1, "7g")
    assert calls == once * 2, "nothing to be done on the hardware"
    node.release(2)
    assert calls == once * 3
    node.acquire(4, "7g")  # destroys four and creates one
    assert calls == once * 4


def test_a_destroy_that_is_busy_for_a_moment(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "3g")
    node.release(1)
    node.machine.fail(DESTROY_CI, Nvml.IN_USE, times=3)
    node.machine.fail(DESTROY_GI, Nvml.IN_USE, times=2)
    assert node.acquire(2, "7g")
    assert [e["code"] for e in node.journal() if e["op"].startswith("destroy")] == [19, 19, 19, 0, 19, 19, 0]
    node.check_empties()


def test_a_destroy_that_stays_busy_with_nobody_to_be_seen(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process with the whole GPU makes it: another GPU is taken, or the node is at fault; no endless trying."""
    monkeypatch.setattr(hardware, "DESTROY_SECONDS", 0.2)
    node.acquire(1, "3g")
    node.release(1)
    node.machine.fail(DESTROY_CI, Nvml.IN_USE, gpu=0, times=-1)
    pauses: list[float] = []
    sleep = time.sleep
    with monkeypatch.context() as patch:
        patch.setattr(hardware.time, "sleep", lambda seconds: (pauses.append(seconds), sleep(seconds)))
        assert node.acquire(2, "7g")[0].gpu == node.machine.uuids[1]
    assert len(pauses) >= 3 and pauses[:-1] == sorted(pauses[:-1]), "more and more rarely"
    assert 0.15 < sum(pauses) < 0.25
    node.check()
    with pytest.raises(NoRoomError):
        node.acquire(3, "7g")
    node.release(2)
    before = len(node.journal())
    with pytest.raises(NoRoomError):
        node.acquire(4, "7g:2")
    assert node.statuses()["0:3g.40gb@4:4"] == "quarantined"
    assert len(node.journal()) == before, "it is not tried again at once"
    node.machine.mend()
    node.reconcile()
    assert "0:3g.40gb@4:4" not in node.statuses()
    node.check_empties()


@pytest.mark.parametrize("code", [Nvml.INSUFFICIENT_RESOURCES, Nvml.UNKNOWN, Nvml.IN_USE])
def test_a_compute_instance_that_cannot_be_made(node: Node, code: Nvml) -> None:
    node.machine.fail(CREATE_CI, code, gpu=0, times=-1)
    assert node.acquire(1, "3g")[0].gpu == node.machine.uuids[1]
    assert [e["op"] for e in node.journal() if not e["code"]][:2] == ["create_gpu_instance", "destroy_gpu_instance"]
    node.check()
    node.machine.mend()
    node.check_empties()


@pytest.mark.parametrize("after", range(0, 60, 3))
def test_a_gpu_that_is_lost_in_the_middle(node: Node, after: int) -> None:
    """After any number of calls: the job gets its instance, from the other GPU if need be, or the node is at fault."""
    node.configure(gpus=node.machine.uuids)
    node.acquire(1, "1g")  # on GPU 0
    node.acquire(2, "2g:2")
    node.release(2)
    node.machine.fail("*", Nvml.GPU_IS_LOST, gpu=0, after=after, times=-1)
    granted = []
    with suppress(NodeError):
        granted = node.acquire(3, "4g")
    state = node.state()
    assert state.intents == []
    assert [a.run.job for a in state.allocations] == ([1, 3] if granted else [1])
    assert sorted(grant.granted(node.config.run_dir)) == ([1, 3] if granted else [1])
    node.machine.mend()
    node.reconcile()
    node.acquire(4, "1g")
    node.check()
    node.check_empties()


def test_instances_that_vanish_under_their_jobs(node: Node) -> None:
    node.acquire(1, "3g,1g")
    node.acquire(2, "7g")
    node.machine.vanish(0)
    node.release(1)
    node.release(2)
    (granted,) = node.acquire(3, "4g")
    assert granted
    node.check()
    node.check_empties()


def test_the_controller_with_other_ids_and_holes(fast_dir: Path) -> None:
    node = Node(fast_dir / "node", "nvml")
    with node.machine.path.open("a") as file:
        file.write("option high\noption odd-ids\n")
    chance = random.Random(7)
    running: list[int] = []
    for job in range(60):
        with suppress(NoRoomError):
            node.acquire(job, chance.choice(["1g", "1g:2", "2g", "3g", "4g,1g", "1g.20gb", "7g"]))
            running.append(job)
        if len(running) > 3:
            node.release(running.pop(chance.randrange(len(running))))
        if job % 10 == 0:
            node.check()
    node.check_empties()


def test_foreign_gpus_stay_closed_whatever_the_controller_does(node: Node) -> None:
    node.configure(gpus=[1])
    assert list(open_gpus(node)) == [node.machine.uuids[1]]
    node.acquire(1, "3g")
    node.release(1)
    node.acquire(2, "7g")
    with pytest.raises(NoRoomError):
        node.acquire(3, "1g")
    (node.root / "state" / "state.json").write_text("damaged")
    node.acquire(2, "7g")
    node.release(2)
    assert node.machine.opened() == {1}


# Kills.

STEPS = [CREATE_GI, CREATE_CI, DESTROY_GI, DESTROY_CI, "nvmlGpuInstanceGetInfo", "nvmlComputeInstanceGetInfo"]
STEPS += ["nvmlDeviceGetUUID", "nvmlInit", "nvmlShutdown"]


@pytest.mark.parametrize("name", ["several instances", "destroy, then create", "after a reboot", "recovery", "release"])
def test_a_call_may_die_between_any_two_calls_of_nvml(node: Node, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in test_crash.py, where the steps are those of the files; here they are within the device's operations."""
    monkeypatch.setattr(test_crash, "WORLD", [(pynvml, step) for step in STEPS])
    prepare, act = SCENARIOS[name]
    prepare(node)
    before = Snapshot(node.root)
    safe = {job: g.uuids for job, g in grant.granted(node.config.run_dir).items() if job != CRASHED}
    for step in range(1, 200):
        died, where = die_at(step, lambda: act(node))
        try:
            test_crash.aftermath(node, name, step, safe)
        except Exception as error:
            raise AssertionError(f"killed before step {step}, {where or 'none'}: {error}; {node.log}") from error
        if not died:
            assert step > 2
            return
        before.restore()


def test_the_stand_in_itself_survives_kills(machine: Machine) -> None:
    """Its journal tells of every change, and of none twice, whoever is killed in the middle of one."""
    machine.use()
    children = []
    for number in range(4):
        pid = os.fork()
        if pid == 0:
            with suppress(BaseException):
                hammer(number)
            os._exit(1)
        children.append(pid)
    chance = random.Random(3)
    for pid in children:
        time.sleep(0.2 + 0.2 * chance.random())
        os.kill(pid, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    with machine.device() as device:
        there = sum(len(device.instances(gpu)) for gpu in device.gpus())
    done = [e for e in machine.journal() if not e["code"]]
    assert overlaps(machine.journal()) == []
    assert len(done) > 100
    verbs = [e["op"] for e in done]
    assert verbs.count("create_gpu_instance") - verbs.count("destroy_gpu_instance") == there


def hammer(seed: int) -> None:
    """Make and destroy instances until killed."""
    chance = random.Random(seed)
    device = NvmlDevice([0, 1])
    while True:
        gpu = chance.choice(device.gpus())
        with suppress(DeviceError):
            gi = device.create_gpu_instance(gpu, SMALL, chance.randrange(7))
            ci = device.create_compute_instance(gpu, gi)
            device.destroy_compute_instance(gpu, gi, ci)
            device.destroy_gpu_instance(gpu, gi)
