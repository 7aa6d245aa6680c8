"""Simulated GPUs behave as NVML does: the same errors for the same mistakes, the same ids, the same after a crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, overlaps
from hypothesis import given, settings
from hypothesis import strategies as st

from rms import files, geometry
from rms.device import Device, DeviceError, Nvml
from rms.simulated import SimulatedDevice, gi_id

SMALL, LARGE = "1g.10gb", "3g.40gb"


@pytest.fixture
def device(fast_dir: Path) -> SimulatedDevice:
    """Two A100-80GB."""
    return opened(fast_dir)


def opened(directory: Path, boot_id: str = "boot 1", **options: Any) -> SimulatedDevice:
    options = {"model": "A100-80GB", "count": 2, "managed": [0, 1], **options}
    return SimulatedDevice(str(directory / "gpus.json"), boot_id=boot_id, **options)


def made(device: Device, profile: str, start: int, number: int = 0) -> tuple[str, int, int, str]:
    gpu = device.gpus()[number]
    gi = device.create_gpu_instance(gpu, profile, start)
    ci = device.create_compute_instance(gpu, gi)
    return gpu, gi, ci, device.uuid(gpu, gi, ci)


def refused(code: Nvml, call: Callable[[], object]) -> None:
    with pytest.raises(DeviceError) as caught:
        call()
    assert caught.value.code == code


def journal(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "gpus.json.journal").read_text().splitlines()]


def test_the_errors_of_nvml(device: SimulatedDevice) -> None:
    gpu, gi, ci, uuid = made(device, LARGE, 4)
    create = device.create_gpu_instance
    # The exact place is taken, another profile's overlaps, the profile's count is used up, one set of media engines.
    refused(Nvml.INSUFFICIENT_RESOURCES, lambda: create(gpu, LARGE, 4))
    refused(Nvml.INSUFFICIENT_RESOURCES, lambda: create(gpu, SMALL, 5))
    refused(Nvml.INSUFFICIENT_RESOURCES, lambda: create(gpu, "7g.80gb", 0))
    create(gpu, "1g.10gb+me", 0)
    refused(Nvml.INSUFFICIENT_RESOURCES, lambda: create(gpu, "1g.10gb+me", 1))
    # Illegal placements and profiles, whatever is free.
    for profile, start in ((LARGE, 1), (LARGE, 8), ("2g.20gb", 6), (SMALL, 7), (SMALL, -1), ("9g.99gb", 0), ("", 0)):
        refused(Nvml.INVALID_ARGUMENT, lambda p=profile, s=start: create(gpu, p, s))
    # Unknown GPU, GI, CI.
    for name in ("GPU-0000", "", "0", device.gpus()[0][:-1]):
        refused(Nvml.NOT_FOUND, lambda n=name: create(n, SMALL, 1))
        refused(Nvml.NOT_FOUND, lambda n=name: device.instances(n))
    refused(Nvml.NOT_FOUND, lambda: device.create_compute_instance(gpu, 99))
    refused(Nvml.NOT_FOUND, lambda: device.destroy_compute_instance(gpu, gi, 5))
    refused(Nvml.NOT_FOUND, lambda: device.destroy_compute_instance(gpu, 99, 0))
    refused(Nvml.NOT_FOUND, lambda: device.destroy_gpu_instance(gpu, 99))
    refused(Nvml.NOT_FOUND, lambda: device.uuid(gpu, gi, 5))
    refused(Nvml.NOT_FOUND, lambda: device.holders(gpu, 99, 0))
    # One CI spans the GI; a GI with a CI is in use.
    refused(Nvml.INSUFFICIENT_RESOURCES, lambda: device.create_compute_instance(gpu, gi))
    refused(Nvml.IN_USE, lambda: device.destroy_gpu_instance(gpu, gi))
    device.destroy_compute_instance(gpu, gi, ci)
    refused(Nvml.NOT_FOUND, lambda: device.destroy_compute_instance(gpu, gi, ci))
    refused(Nvml.NOT_FOUND, lambda: device.uuid(gpu, gi, ci))
    device.destroy_gpu_instance(gpu, gi)
    refused(Nvml.NOT_FOUND, lambda: device.destroy_gpu_instance(gpu, gi))
    assert uuid.startswith("MIG-")


def test_an_error_names_call_and_code() -> None:
    assert str(DeviceError(23, "create")) == "create: NVML error 23 (insufficient resources)"
    assert DeviceError(4711, "x").code == Nvml.UNKNOWN
    assert "4711" in str(DeviceError(4711, "x"))
    assert {int(n) for n in Nvml} >= {2, 6, 19, 23}


def test_instances_with_and_without_ci(device: SimulatedDevice) -> None:
    gpu = device.gpus()[0]
    gi = device.create_gpu_instance(gpu, LARGE, 0)
    (half,) = device.instances(gpu)
    assert (half.gi, half.ci, half.uuid, str(half.placement)) == (gi, None, None, "3g.40gb@0:4")
    ci = device.create_compute_instance(gpu, gi)
    (whole,) = device.instances(gpu)
    assert (whole.ci, whole.uuid) == (ci, device.uuid(gpu, gi, ci))
    assert device.instances(device.gpus()[1]) == []


def test_uuids_come_back_for_the_same_place_and_differ_for_others(device: SimulatedDevice) -> None:
    seen = set()
    for number in (0, 1):
        for profile, start in ((LARGE, 0), (LARGE, 4), (SMALL, 0), (SMALL, 6), ("7g.80gb", 0)):
            gpu, gi, ci, first = made(device, profile, start, number)
            device.destroy_compute_instance(gpu, gi, ci)
            device.destroy_gpu_instance(gpu, gi)
            gpu, gi, ci, second = made(device, profile, start, number)
            assert first == second
            device.destroy_compute_instance(gpu, gi, ci)
            device.destroy_gpu_instance(gpu, gi)
            seen.add(first)
    assert len(seen) == 10
    assert len(set(device.gpus())) == 2


@pytest.mark.parametrize("model", geometry.models())
def test_instances_that_go_together_have_ids_of_their_own(model: str) -> None:
    known = geometry.load(model)
    places = [p for profile in known.profiles for p in known.placements(profile.name)]
    for one in places:
        for two in places:
            if not one.mask & two.mask:
                assert gi_id(known.slots, one.start, one.size) != gi_id(known.slots, two.start, two.size), (one, two)


def test_the_driver_s_ids_of_an_a100(device: SimulatedDevice) -> None:
    assert [gi_id(8, 0, 8), gi_id(8, 0, 4), gi_id(8, 4, 4)] == [0, 1, 2]
    assert [gi_id(8, start, 2) for start in (0, 2, 4, 6)] == [3, 4, 5, 6]
    assert [gi_id(8, start, 1) for start in range(8)] == list(range(7, 15))


def test_holders(device: SimulatedDevice, fast_dir: Path) -> None:
    gpu, gi, ci, uuid = made(device, LARGE, 4)
    with subprocess.Popen(["sleep", "60"]) as process:
        device.hold(uuid, process.pid)
        assert opened(fast_dir).holders(gpu, gi, ci) == [process.pid]
        refused(Nvml.IN_USE, lambda: device.destroy_compute_instance(gpu, gi, ci))
        assert device.uuid(gpu, gi, ci) == uuid
        process.kill()
        process.wait()
    assert device.holders(gpu, gi, ci) == []
    device.destroy_compute_instance(gpu, gi, ci)
    refused(Nvml.NOT_FOUND, lambda: device.hold(uuid, 1))


def test_the_nth_operation_fails(device: SimulatedDevice, fast_dir: Path) -> None:
    gpu = device.gpus()[0]
    device.fail("create_gpu_instance", 999, after=1, times=2)
    device.create_gpu_instance(gpu, SMALL, 0)
    for _ in range(2):
        refused(Nvml.UNKNOWN, lambda: opened(fast_dir).create_gpu_instance(gpu, SMALL, 1))
    device.create_gpu_instance(gpu, SMALL, 1)
    device.fail("*", 15)
    refused(Nvml.GPU_IS_LOST, lambda: device.destroy_gpu_instance(gpu, 7))
    device.destroy_gpu_instance(gpu, 7)
    assert [e["code"] for e in journal(fast_dir)] == [0, 999, 999, 0, 15, 0]


def test_the_journal_tells_everything(device: SimulatedDevice, fast_dir: Path) -> None:
    before = time.time()
    gpu, gi, ci, uuid = made(device, LARGE, 4)
    refused(Nvml.INSUFFICIENT_RESOURCES, lambda: device.create_gpu_instance(gpu, SMALL, 4))
    device.destroy_compute_instance(gpu, gi, ci)
    device.destroy_gpu_instance(gpu, gi)
    entries = journal(fast_dir)
    assert [(e["op"], e["code"]) for e in entries] == [
        ("create_gpu_instance", 0),
        ("create_compute_instance", 0),
        ("create_gpu_instance", 23),
        ("destroy_compute_instance", 0),
        ("destroy_gpu_instance", 0),
    ]
    for entry in entries:
        assert entry["gpu"] == gpu
        assert entry["pid"] == os.getpid()
        assert before <= entry["t"] <= time.time()
        if not entry["code"]:
            assert (entry["gi"], entry["profile"], entry["start"], entry["size"]) == (gi, LARGE, 4, 4)
    assert entries[1]["uuid"] == entries[3]["uuid"] == uuid
    assert [e["t"] for e in entries] == sorted(e["t"] for e in entries)


@pytest.mark.parametrize("moment", ["_save", "_log", "half of the line"])
def test_a_kill_between_state_and_journal(fast_dir: Path, moment: str) -> None:
    device = opened(fast_dir)
    gpu = made(device, LARGE, 4)[0]

    def die(entry: object) -> None:
        if moment == "half of the line":
            with (fast_dir / "gpus.json.journal").open("a") as file:
                file.write(json.dumps(entry)[:40])
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            child = opened(fast_dir)
            setattr(child, moment if moment.startswith("_") else "_log", die)
            child.create_gpu_instance(gpu, SMALL, 0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    again = opened(fast_dir)
    there = [str(i.placement) for i in again.instances(gpu)]
    if moment == "_save":
        assert there == ["3g.40gb@4:4"], "an operation whose state was not saved has not happened"
        assert len(journal(fast_dir)) == 2
    else:
        assert there == ["3g.40gb@4:4", "1g.10gb@0:1"]
        assert [e["op"] for e in journal(fast_dir)][-1] == "create_gpu_instance"
        assert len(journal(fast_dir)) == 3, "the line must be written once"
    again.create_gpu_instance(gpu, SMALL, 1)
    again.instances(gpu)
    assert len({e["t"] for e in journal(fast_dir)}) == len(journal(fast_dir))
    assert overlaps(journal(fast_dir)) == []
    made_there = [e for e in journal(fast_dir) if e["op"] == "create_gpu_instance"]
    assert len(made_there) == len(again.instances(gpu))


def test_they_survive_processes_but_no_reboot(fast_dir: Path) -> None:
    gpu, _, _, uuid = made(opened(fast_dir), LARGE, 4)
    program = (
        "import sys; from rms.simulated import SimulatedDevice;"
        "d = SimulatedDevice(sys.argv[1], 'A100-80GB', 2, [0, 1], 'boot 1');"
        "print(d.instances(d.gpus()[0])[0].uuid)"
    )
    root = str(Path(__file__).parents[1])
    shown = subprocess.run(
        [sys.executable, "-c", program, str(fast_dir / "gpus.json")],
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == uuid
    opened(fast_dir).fail("*", 999)
    rebooted = opened(fast_dir, "boot 2")
    assert list(rebooted.gpus()) == list(opened(fast_dir, "boot 2").gpus())
    assert rebooted.instances(gpu) == []
    assert made(rebooted, LARGE, 4)[3] == uuid


def test_manages_what_it_is_told_by_number_or_uuid(fast_dir: Path) -> None:
    first, second = opened(fast_dir).gpus()
    assert list(opened(fast_dir, managed=[1]).gpus()) == [second]
    assert list(opened(fast_dir, managed=[second, 0]).gpus()) == [second, first]
    for wrong in (2, -1, "GPU-0", "", 10**20):
        refused(Nvml.NOT_FOUND, lambda w=wrong: opened(fast_dir, managed=[w]))


@pytest.mark.timed
def test_operations_on_different_gpus_overlap_in_time(fast_dir: Path) -> None:
    device = opened(fast_dir, create=0.4, destroy=0.2)
    began = time.monotonic()
    gpu, gi, ci, _ = made(device, LARGE, 4)
    assert 0.4 <= time.monotonic() - began < 0.6
    began = time.monotonic()
    device.destroy_compute_instance(gpu, gi, ci)
    device.destroy_gpu_instance(gpu, gi)
    assert 0.2 <= time.monotonic() - began < 0.35
    threads = [threading.Thread(target=made, args=(opened(fast_dir, create=0.4), LARGE, 4, n)) for n in (0, 1)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert time.monotonic() - began < 0.7
    assert all(len(device.instances(gpu)) == 1 for gpu in device.gpus())


def test_the_state_file_is_replaced_whole(
    device: SimulatedDevice, fast_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(device, LARGE, 4)
    before = (fast_dir / "gpus.json").read_bytes()

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "replace", full)
    with pytest.raises(DeviceError, match="No space"):
        made(device, SMALL, 0)
    assert (fast_dir / "gpus.json").read_bytes() == before


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["gi", "ci", "-ci", "-gi"]),
        st.integers(0, 1),
        st.sampled_from(["1g.10gb", "1g.10gb+me", "1g.20gb", "2g.20gb", "3g.40gb", "4g.40gb", "7g.80gb"]),
        st.integers(0, 14),
    ),
    max_size=40,
)


@settings(max_examples=60)
@given(OPERATIONS)
def test_any_sequence_leaves_legal_gpus_and_a_true_journal(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int, str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("gpus")
    device = opened(directory)
    known = geometry.load("A100-80GB")
    for op, number, profile, value in operations:
        gpu = device.gpus()[number]
        try:
            if op == "gi":
                device.create_gpu_instance(gpu, profile, value)
            elif op == "ci":
                device.create_compute_instance(gpu, value)
            elif op == "-ci":
                device.destroy_compute_instance(gpu, value, 0)
            else:
                device.destroy_gpu_instance(gpu, value)
        except DeviceError as error:
            assert error.code in (Nvml.INVALID_ARGUMENT, Nvml.NOT_FOUND, Nvml.IN_USE, Nvml.INSUFFICIENT_RESOURCES)
    if operations:
        assert len(journal(directory)) == len(operations)
        assert overlaps(journal(directory)) == []
    for gpu in device.gpus():
        held: list[geometry.Placement] = []
        for instance in device.instances(gpu):
            assert instance.placement in known.legal(instance.placement.profile, held)
            held.append(instance.placement)
        ids = [i.gi for i in device.instances(gpu)]
        assert len(ids) == len(set(ids))


@pytest.mark.timed
def test_the_node_of_the_other_tests_has_no_latency(node: Node) -> None:
    began = time.monotonic()
    node.acquire(1, "1g:7")
    assert time.monotonic() - began < 1
