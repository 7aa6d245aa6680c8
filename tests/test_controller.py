"""The controller of a node, without Slurm: what runs get, keep and give back, whatever happens around them."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Node, open_gpus, overlaps, run
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planner import BROKEN, room

import controller as local
from rms import geometry, grant, hardware, inventory
from rms.device import Device, DeviceError, Nvml
from rms.errors import ClosedRunError, NodeError, NoRoomError, RequestError
from rms.geometry import Placement
from rms.inventory import Intent, Owner, Run, State
from rms.request import parse
from rms.store import Store

BACKENDS = ["simulated", "nvml"]
"""On what GPUs every test that has a node is run."""


@contextmanager
def holder(node: Node, uuid: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds an instance until it is killed."""
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            node.device().hold(uuid, process.pid)
            yield process
        finally:
            process.kill()


def operations(node: Node) -> list[str]:
    """What changed on the GPUs: `create 3g.40gb@4`, `destroy ...`; failed operations are left out."""
    found = []
    for entry in node.journal():
        verb, _, rest = entry["op"].partition("_")
        if rest == "gpu_instance" and not entry["code"]:
            found.append(f"{verb} {entry['profile']}@{entry['start']}")
    return found


# Runs.


def test_a_run_gets_the_same_again(node: Node) -> None:
    first = node.acquire(1, "3g,1g:2")
    done = node.journal()
    assert node.acquire(1, "3g,1g:2") == first
    assert node.acquire(1, "7g") == first, "a run has one request"
    shown = node.cli("acquire", "--job=1", "--restart=0", "--uid=1000", "--request=3g,1g:2", "--json")
    assert [i["uuid"] for i in json.loads(shown.stdout)["instances"]] == [g.uuid for g in first]
    assert node.journal() == done
    node.check()


def test_a_newer_run_closes_the_older_one(node: Node) -> None:
    (old,) = node.acquire(1, "7g")
    node.acquire(2, "7g")
    (new,) = node.acquire(1, "7g", restart=1)  # fits only where the older run was
    assert new == old
    node.check()
    with pytest.raises(ClosedRunError):
        node.acquire(1, "7g", restart=0)
    node.release(1, restart=0)
    assert node.marker(1).read_text().startswith("granted 1 ")
    node.check()
    assert node.state().of_run(run(1, 1)) is not None


def test_restarts_may_be_skipped_and_jobs_are_not_mixed_up(node: Node) -> None:
    node.acquire(1, "1g")
    node.acquire(11, "1g")
    node.acquire(1, "1g", restart=7)
    state = node.state()
    assert sorted(str(a.run) for a in state.allocations) == ["1.7", "11.0"]
    node.check()


def test_release_of_what_was_never_allocated_leaves_a_tombstone(node: Node) -> None:
    node.release(1, restart=2)
    node.release(1, restart=2)
    for restart in (0, 1, 2):
        with pytest.raises(ClosedRunError, match="released"):
            node.acquire(1, "3g", restart)
    assert not node.marker(1).exists()
    node.acquire(1, "3g", restart=3)
    node.check()


def test_a_late_acquire_after_the_release_gets_nothing(node: Node) -> None:
    node.acquire(1, "3g")
    node.release(1)
    with pytest.raises(ClosedRunError):
        node.acquire(1, "3g")
    assert set(node.statuses().values()) == {"idle"}
    node.release(1, restart=0)
    node.check()


def test_release_of_a_run_never_touches_the_next(node: Node) -> None:
    node.acquire(1, "3g", restart=1)
    before = node.state().allocations
    for restart in (0, 0):
        node.release(1, restart)
    assert node.state().allocations == before
    node.check()
    assert node.acquire(1, "3g", restart=1)


def test_release_of_a_run_takes_back_what_an_older_one_left(node: Node) -> None:
    """The Epilog of run 0 never came; the Prolog of run 1 died before it asked."""
    node.acquire(1, "3g", restart=0)
    node.release(1, restart=1)
    assert set(node.statuses().values()) == {"idle"}
    node.check()


def test_a_late_acquire_of_a_run_whose_successor_was_refused_gets_nothing(node: Node) -> None:
    node.acquire(2, "7g")
    node.acquire(3, "7g")
    with pytest.raises(NoRoomError):
        node.acquire(1, "3g", restart=1)
    node.release(2)
    with pytest.raises(ClosedRunError):
        node.acquire(1, "3g", restart=0)
    node.acquire(1, "3g", restart=1)
    node.check()


def test_a_late_acquire_of_an_older_run_gets_nothing_whatever_its_prolog_has_written(node: Node) -> None:
    node.acquire(1, "3g", restart=1)
    before = node.state().allocations
    node.marker(1).write_text("refused 0\n")
    with pytest.raises(ClosedRunError, match=r"1\.1 runs here"):
        node.acquire(1, "3g", restart=0)
    assert node.state().allocations == before


def test_a_grant_never_takes_the_place_of_a_newer_run_s_refusal(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newer run's Prolog begins while the older one's is at work, and is killed: nothing of that run may start."""
    real = hardware.change

    def slow(*more: Any) -> Any:
        node.marker(1).write_text("refused 1\n")
        return real(*more)

    monkeypatch.setattr(hardware, "change", slow)
    node.acquire(1, "3g", restart=0)
    node.release(1, restart=0)
    assert node.marker(1).read_text() == "refused 1\n"


def test_a_run_is_not_waited_for_without_an_end(node: Node) -> None:
    """Another process is at work on it, and stuck."""
    node.acquire(2, "1g")
    node.configure(deadline_seconds=0.3)
    with subprocess.Popen(["sleep", "60"]) as process:
        owner = Owner(process.pid, inventory.process_started(process.pid) or 0)
        with Store(node.config.state_dir, time.monotonic() + 5).open("test") as state:
            state.intents.append(Intent(state.number(), "acquire", run(1), owner))
            Store(node.config.state_dir, 0.0).save(state)
        for call in (lambda: node.acquire(1, "1g"), lambda: node.release(1)):
            with pytest.raises(NodeError, match=f"is being worked on by process {process.pid}, for longer than 0.3 s"):
                call()
        process.kill()
    node.configure(deadline_seconds=20)
    node.acquire(3, "1g")
    node.check_empties()


def test_a_job_id_that_comes_again_is_another_job(node: Node) -> None:
    """slurmctld has lost its state and counts from 1 again: who was submitted after the release is no late Prolog."""
    node.acquire(1, "3g")
    node.release(1)
    now = int(time.time())
    for submit in (None, 1, now, now + local.SKEW_SECONDS - 5):
        with pytest.raises(ClosedRunError):
            node.controller().acquire(run(1), 0, "3g", submit)
    assert node.controller().acquire(run(1), 0, "3g", now + local.SKEW_SECONDS + 5)
    node.check()
    node.release(1)
    with pytest.raises(ClosedRunError):
        node.acquire(1, "3g")


@pytest.mark.parametrize("saves", [0, 1])
def test_a_release_that_failed_is_done_by_whoever_comes_next(
    node: Node, monkeypatch: pytest.MonkeyPatch, saves: int
) -> None:
    """A disk that was full for a moment: nobody calls the Epilog again."""
    node.configure(gpus=[0])
    node.acquire(1, "3g")
    node.acquire(2, "3g")
    left = [saves]
    real = Store.save

    def full(self: Store, state: State) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise NodeError("cannot write: No space left on device")
        real(self, state)

    monkeypatch.setattr(Store, "save", full)
    with pytest.raises(NodeError, match="No space"):
        node.release(1)
    monkeypatch.undo()
    node.acquire(3, "3g")
    assert sorted(a.run.job for a in node.state().allocations) == [2, 3]
    node.release(2)
    node.release(3)
    node.check_empties()


def test_tombstones_are_limited(node: Node) -> None:
    state = State()
    for job in range(inventory.CLOSED + 50):
        state.close(run(job), 1.0)
    state.close(run(60, 5), 2.0)
    state.close(run(60, 1), 3.0)
    assert len(state.closed) == inventory.CLOSED
    assert next(iter(state.closed)) == 50
    assert state.closed[60] == (5, 3.0)


# Instances.


def test_an_idle_instance_that_fits_is_reused(node: Node) -> None:
    (first,) = node.acquire(1, "3g")
    node.release(1)
    done = operations(node)
    (second,) = node.acquire(2, "3g.40gb")
    assert second == first
    assert operations(node) == done
    node.check()


def test_idle_instances_in_the_way_are_destroyed_and_busy_ones_never(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "1g:3")  # 6, 4, 5
    node.acquire(2, "1g")
    node.release(1)
    busy = node.state().held(node.state().allocations[0])[0][1].placement
    node.acquire(3, "3g")
    after = operations(node)
    assert f"destroy {busy.profile}@{busy.start}" not in after
    node.check()
    with pytest.raises(NoRoomError):
        node.acquire(4, "7g")
    assert operations(node) == after, "a refusal must not touch the GPU"
    node.release(2)
    node.release(3)
    node.acquire(5, "7g")
    assert list(node.statuses()) == ["0:7g.80gb@0:8"]
    node.check()


def test_all_instances_of_a_request_or_none(node: Node) -> None:
    node.acquire(1, "3g:3")
    before = node.statuses()
    done = node.journal()
    with pytest.raises(NoRoomError, match=r"no room for 3g\.40gb:2 now"):
        node.acquire(2, "3g:2")
    assert (node.statuses(), node.journal()) == (before, done)
    assert not node.marker(2).read_text().startswith("granted")
    assert len(node.acquire(3, "3g")) == 1


def test_grant_order_is_request_order(node: Node) -> None:
    granted = node.acquire(1, "1g:2,3g,2g")
    assert [g.placement.profile for g in granted] == ["1g.10gb", "1g.10gb", "3g.40gb", "2g.20gb"]
    lines = node.marker(1).read_text().splitlines()
    assert lines[0] == "granted 0 1000 cluster 1g.10gb:2,3g.40gb:1,2g.20gb:1"
    assert lines[1:] == [g.uuid for g in granted]
    assert len(set(lines)) == 5
    state = node.state()
    assert [i.uuid for _, i in state.held(state.allocations[0])] == lines[1:]


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_markers_are_for_all_to_read_and_for_root_to_write(node: Node, umask: int) -> None:
    before = os.umask(umask)
    try:
        node.acquire(1, "3g:4")
        with pytest.raises(NoRoomError):
            node.acquire(2, "3g")
    finally:
        os.umask(before)
    for path in (node.marker(1), node.marker(2)):
        assert stat.S_IMODE(path.stat().st_mode) == 0o644
        assert path.stat().st_uid == os.geteuid()
    for directory in (node.root / "run", node.root / "run" / "jobs"):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755, directory
    assert node.marker(2).read_text() == "refused 0\n"


def test_a_refusal_outlives_the_release_and_is_replaced_by_a_grant(node: Node) -> None:
    node.acquire(1, "7g:2")
    with pytest.raises(NoRoomError):
        node.acquire(2, "3g")
    node.release(2)
    assert node.marker(2).read_text() == "refused 0\n"
    node.release(1)
    assert not node.marker(1).exists()
    node.acquire(2, "3g", restart=1)
    assert node.marker(2).read_text().startswith("granted 1 1000 cluster 3g.40gb:1\nMIG-")
    node.release(2, restart=1)
    assert not node.marker(2).exists()


def test_old_refusals_are_swept_and_nothing_else(node: Node) -> None:
    node.acquire(1, "7g:2")
    with pytest.raises(NoRoomError):
        node.acquire(2, "3g")
    (node.marker(3)).write_text("none 0\n")
    (node.marker(4)).write_text("refused 0\n")
    long_ago = time.time() - grant.STALE_SECONDS - 10
    for job in (1, 2, 3):
        os.utime(node.marker(job), (long_ago, long_ago))
    with pytest.raises(NoRoomError):
        node.acquire(5, "3g")
    assert node.marker(1).exists(), "a job may run for longer than that"
    assert node.marker(3).exists()
    assert node.marker(4).exists()
    assert not node.marker(2).exists()


def test_what_the_allocation_remembers(node: Node) -> None:
    before = time.time()
    node.controller().acquire(Run("alpha", 5, 2), 4321, "mig:3g:1,mig:1g", submit=77, limit=15)
    (a,) = node.state().allocations
    assert (a.run, a.uid, a.request, a.submit, a.limit) == (Run("alpha", 5, 2), 4321, "3g.40gb:1,1g.10gb:1", 77, 15)
    assert a.boot_id == "first boot"
    assert before <= a.started <= time.time()
    assert node.state().recent == [(77.0, "3g.40gb:1,1g.10gb:1", 15)]
    view = inventory.view(node.state(), 0.0)
    assert [b.end - b.start for gpu in view.gpus for b in gpu.busy if b.end] == [900, 900]
    assert view.recent[0].limit == 900


def test_ended_jobs_tell_how_much_of_their_limits_they_used(node: Node) -> None:
    for job, limit in ((1, 15), (2, None)):
        node.controller().acquire(run(job), 0, "3g", limit=limit)
    for job in (1, 2, 3):  # the third never had anything
        node.release(job)
    ((ran, limit),) = node.state().ended
    assert 0 <= ran < 60 and limit == 15
    (ended,) = inventory.view(node.state(), 0.0).ended
    assert ended == (ran, 900.0)


def test_recent_requests_are_limited(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inventory, "RECENT", 8)
    for job in range(inventory.RECENT + 5):
        node.controller().acquire(run(job), 0, "1g", submit=job)
        node.release(job)
    recent = node.state().recent
    assert [submit for submit, _, _ in recent] == list(range(5, inventory.RECENT + 5))


# Processes that hold an instance.


def test_an_instance_that_is_still_held_is_quarantined_until_it_is_free(node: Node) -> None:
    node.configure(gpus=[0])
    (one,) = node.acquire(1, "3g")
    with holder(node, one.uuid) as process:
        node.release(1)
        assert list(node.statuses().values()) == ["quarantined"]
        assert any(one.uuid in line and str(process.pid) in line for line in node.log)
        node.check()
        (two,) = node.acquire(2, "3g")
        assert two.uuid != one.uuid
        with pytest.raises(NoRoomError):
            node.acquire(3, "3g")
        with pytest.raises(NoRoomError):
            node.acquire(4, "1g.20gb:3")
    (three,) = node.acquire(3, "3g", restart=1)
    assert three.uuid == one.uuid
    node.check_empties()


@pytest.mark.timed
def test_a_release_waits_for_the_last_processes(node: Node) -> None:
    node.configure(holder_seconds=10)
    (one,) = node.acquire(1, "3g")
    with holder(node, one.uuid) as process:
        timer = threading.Timer(0.5, lambda: (process.kill(), process.wait()))
        timer.start()
        began = time.monotonic()
        node.release(1)
        assert 0.4 < time.monotonic() - began < 3
        timer.join()
    assert list(node.statuses().values()) == ["idle"]
    node.check()


@pytest.mark.timed
def test_others_are_served_while_a_release_waits(node: Node) -> None:
    node.configure(holder_seconds=3, gpus=[0])
    (one,) = node.acquire(1, "3g")
    with holder(node, one.uuid):
        waiting = node.start("release", "--job=1", "--restart=0")
        time.sleep(0.5)
        began = time.monotonic()
        (two,) = node.acquire(2, "3g")
        assert time.monotonic() - began < 1
        assert two.uuid != one.uuid, "what is being taken back is nobody's yet"
        with pytest.raises(NoRoomError):
            node.acquire(3, "1g")
        assert waiting.wait(20) == 0
    node.check_empties()


@pytest.mark.parametrize("spec", ["3g", "7g"])
def test_an_idle_instance_that_somebody_took_is_not_handed_on(node: Node, spec: str) -> None:
    """A process that a job left behind takes the instance back after the Epilog looked: found at reuse or destroy."""
    (one,) = node.acquire(1, "3g")
    node.release(1)
    with holder(node, one.uuid):
        (two,) = node.acquire(2, spec)
        assert two.uuid != one.uuid
        assert node.statuses()["0:3g.40gb@4:4"] == "quarantined"
        node.check()
    node.check_empties()


@pytest.mark.parametrize("spec", ["3g:2", "7g"])
def test_a_start_waits_for_a_holder_if_there_is_no_other_place(node: Node, spec: str) -> None:
    """As long as a process that is about to end holds what is to be given, or to be destroyed."""
    node.configure(gpus=[0], holder_seconds=20)
    (one,) = node.acquire(1, "3g")
    node.release(1)
    with holder(node, one.uuid) as process:
        waiting = node.start("acquire", "--job=2", "--restart=0", "--uid=1000", f"--request={spec}")
        while "quarantined" not in node.statuses().values():
            assert waiting.poll() is None
            time.sleep(0.02)
        node.acquire(3, "1g")  # no lock is held
        node.release(3)
        assert waiting.poll() is None
        process.kill()
        process.wait()
        out, err = waiting.communicate(timeout=60)
        assert waiting.returncode == 0, err
        assert len(out.splitlines()) == int(spec.partition(":")[2] or 1)
    node.check()
    node.check_empties()


@pytest.mark.timed
def test_a_start_waits_no_longer_than_holder_seconds(node: Node) -> None:
    node.configure(gpus=[0], holder_seconds=1)
    (one,) = node.acquire(1, "3g")
    node.release(1)
    with holder(node, one.uuid):
        began = time.monotonic()
        with pytest.raises(NoRoomError):
            node.acquire(2, "7g")
        assert 0.9 < time.monotonic() - began < 15
        began = time.monotonic()
        with pytest.raises(NoRoomError):
            node.acquire(3, "7g")
        assert time.monotonic() - began < 0.9, "it was waited for already"
        assert [entry["event"] for entry in node.audit()].count("refused") == 2
        assert node.marker(2).read_text() == "refused 0\n"
        node.configure(holder_seconds=1000, deadline_seconds=2)
        node.acquire(4, "1g")
        with holder(node, node.acquire(4, "1g")[0].uuid):
            began = time.monotonic()
            node.release(4)
            assert 0.9 < time.monotonic() - began < 2, "half of the time is for what follows"
    node.configure(deadline_seconds=20, holder_seconds=0)
    node.check_empties()


def test_nothing_but_what_is_held_is_lost_to_a_request(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "1g:7")
    grants = node.acquire(1, "1g:7")
    node.release(1)
    with holder(node, grants[3].uuid):
        with pytest.raises(NoRoomError):
            node.acquire(2, "7g")
        assert list(node.statuses().values()).count("quarantined") == 1
        node.check()
        assert len(node.acquire(3, "1g:6")) == 6
        node.check()
    node.check_empties()


# GPUs and instances that are not RMS's own.


def test_gpus_that_the_config_does_not_name_are_never_touched(node: Node) -> None:
    others = node.device().gpus()[0]
    foreign = node.device().create_gpu_instance(others, "3g.40gb", 0)
    node.configure(gpus=[1])
    for job, spec in ((1, "3g"), (2, "2g,1g"), (3, "1g")):
        node.acquire(job, spec)
    with pytest.raises(NoRoomError):
        node.acquire(4, "3g")
    with pytest.raises(RequestError):
        node.acquire(4, "7g:2")
    node.check_empties()
    shutil.rmtree(node.root / "state")
    (node.root / "state").mkdir()
    node.acquire(5, "7g")
    assert {e["gpu"] for e in node.journal()[1:]} == set(open_gpus(node))
    assert [i.gi for i in node.device().instances(others)] == [foreign]


def test_what_was_there_before_is_adopted_or_quarantined(node: Node) -> None:
    device = node.device()
    gpu = device.gpus()[0]
    uuids = {}
    for profile, start in (("3g.40gb", 4), ("1g.10gb", 0)):
        gi = device.create_gpu_instance(gpu, profile, start)
        uuids[start] = device.uuid(gpu, gi, device.create_compute_instance(gpu, gi))
    device.create_gpu_instance(gpu, "1g.10gb", 1)  # no CI: half-made by somebody else
    with holder(node, uuids[4]):
        assert node.acquire(1, "1g")[0].uuid == uuids[0] or node.statuses()["0:1g.10gb@0:1"] == "idle"
        assert node.statuses()["0:3g.40gb@4:4"] == "quarantined"
        assert node.statuses()["0:1g.10gb@1:1"] == "quarantined"
        node.acquire(2, "7g")
        node.check()
        assert "destroy 1g.10gb@1" not in operations(node)
    node.release(1)
    node.release(2)
    node.acquire(3, "3g")
    assert "quarantined" in node.statuses().values(), "what is not RMS's is never destroyed blindly"
    device.destroy_gpu_instance(gpu, next(i.gi for i in device.instances(gpu) if i.ci is None))
    node.reconcile()
    node.check_empties()


def test_an_instance_that_appeared_behind_our_back(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "1g")  # 1g@6
    device = node.device()
    gpu = device.gpus()[0]
    device.create_compute_instance(gpu, device.create_gpu_instance(gpu, "2g.20gb", 4))
    (two,) = node.acquire(2, "1g:3")[:1]  # meets the 2g, learns of it, and finds another way
    assert two
    node.check()
    node.check_empties()


@pytest.mark.parametrize("whole", [True, False])
def test_an_idle_instance_that_vanished(node: Node, whole: bool) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "3g")
    node.release(1)
    device = node.device()
    gpu = device.gpus()[0]
    (there,) = device.instances(gpu)
    device.destroy_compute_instance(gpu, there.gi, 0)
    if whole:
        device.destroy_gpu_instance(gpu, there.gi)
    assert node.acquire(2, "3g")
    node.check()
    node.check_empties()


def test_an_instance_that_vanished_under_its_job(node: Node) -> None:
    node.acquire(1, "3g")
    node.acquire(2, "2g")
    device = node.device()
    gpu = device.gpus()[0]
    for there in device.instances(gpu):
        device.destroy_compute_instance(gpu, there.gi, 0)
        device.destroy_gpu_instance(gpu, there.gi)
    node.acquire(3, "1g")
    node.release(1)
    node.release(2)
    node.check()
    node.check_empties()


# Reboots and changes of the configuration.


def test_a_reboot_ends_everything(node: Node) -> None:
    node.acquire(1, "3g")
    node.acquire(2, "1g:7")
    node.boot("second boot")
    with pytest.raises(ClosedRunError):
        node.acquire(1, "3g")
    assert any("booted" in line for line in node.log)
    assert node.state().allocations == []
    node.check()
    node.acquire(1, "3g", restart=1)
    node.release(2)
    node.check()
    node.check_empties()


def test_a_reboot_while_a_call_was_at_work(node: Node) -> None:
    node.acquire(1, "3g")
    controller = node.controller()
    controller._store.hardware = lambda *_: 1 // 0  # type: ignore[method-assign,assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        controller.acquire(run(2), 0, "3g")
    assert node.state().intents
    node.boot("second boot")
    node.acquire(3, "7g")
    node.check()
    node.check_empties()


def test_a_gpu_is_added(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "7g")
    with pytest.raises(NoRoomError):
        node.acquire(2, "7g")
    node.configure(gpus=[0, 1])
    assert node.acquire(2, "7g", restart=1)[0].number == 1
    node.check()
    node.configure(gpus=[1, 0])
    assert node.acquire(2, "7g", restart=1)[0].number == 0
    node.check_empties()


def test_a_gpu_is_taken_away(node: Node) -> None:
    node.acquire(1, "7g")
    node.acquire(2, "7g")
    node.release(2)
    first, second = open_gpus(node)
    node.configure(gpus=[0])
    with pytest.raises(NoRoomError):
        node.acquire(3, "1g")
    assert [gpu.uuid for gpu in node.state().gpus] == [first]
    before = node.journal()
    node.release(1)
    node.check_empties()
    assert second not in {e["gpu"] for e in node.journal()[len(before) :]}


def test_a_gpu_is_taken_away_while_a_job_runs_on_it(node: Node) -> None:
    node.acquire(1, "1g")
    node.acquire(2, "7g")
    first, second = open_gpus(node)
    node.configure(gpus=[1])
    node.log.clear()
    for job in (3, 4):
        with pytest.raises(NoRoomError):
            node.acquire(job, "1g")
    with pytest.raises(RequestError):  # the user's fault, not the node's: the GPU is no longer here
        node.acquire(5, "7g:2")
    node.release(2)
    assert node.acquire(6, "3g")[0].gpu == second
    assert node.acquire(1, "1g")[0].gpu == first, "the job that runs there keeps what it has"
    node.check()
    node.release(1)
    node.acquire(7, "1g")
    assert [gpu.uuid for gpu in node.state().gpus] == [second]
    node.check()
    assert [i.placement.profile for i in node.device().instances(first)] == ["1g.10gb"]
    node.configure(gpus=[0, 1])
    node.check_empties()


def test_a_gpu_comes_back_before_its_job_has_ended(node: Node) -> None:
    node.acquire(1, "1g")
    node.configure(gpus=[1])
    node.acquire(2, "1g")
    node.configure(gpus=[0, 1])
    with pytest.raises(NoRoomError):
        node.acquire(3, "7g:2")
    node.check()
    node.check_empties()


def test_a_gpu_is_taken_away_while_it_is_mended(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    (one,) = node.acquire(1, "7g")
    (two,) = node.acquire(2, "7g")
    real = Store.hardware
    done = []

    @contextmanager
    def late(self: Store, gpus: Sequence[str], what: str, *more: Any) -> Iterator[None]:
        if what == "mend" and not done:
            done.append(what)
            node.configure(gpus=[0])
            node.acquire(3, "1g")
        with real(self, gpus, what, *more):
            yield

    with holder(node, two.uuid):
        node.release(2)
        node.release(1)
        monkeypatch.setattr(Store, "hardware", late)
        slow = node.controller()
        assert slow.acquire(run(4), 0, "1g")[0].gpu == one.gpu
    assert done
    monkeypatch.undo()
    node.acquire(5, "1g")  # that one had read the old configuration; the next has the new one
    node.check()


def test_other_gpus_after_a_reboot(node: Node) -> None:
    node.acquire(1, "3g")
    node.configure(sim_model="A30", sim_file=str(node.root / "new-gpus.json"))
    node.booted = 0
    node.boot("second boot")
    (granted,) = node.acquire(2, "2g")
    assert granted.placement.profile == "2g.12gb"
    with pytest.raises(RequestError, match="unknown profile"):
        node.acquire(3, "3g")
    assert [name.removeprefix("NVIDIA ") for name in node.state().geometries] == ["A30"]
    node.check()


def test_a_config_that_names_what_is_not_there(node: Node) -> None:
    node.acquire(1, "3g")
    for wrong in ([0, 7], ["GPU-0"], [-1]):
        node.configure(gpus=wrong)
        with pytest.raises(NodeError, match=r"GPU .*not found"):
            node.acquire(2, "1g")
    node.configure(gpus=[0, 1])
    node.check()


# GPUs that fail.


def test_an_operation_that_fails_once(node: Node) -> None:
    for job, op in enumerate(
        ("create_gpu_instance", "create_compute_instance", "destroy_gpu_instance", "destroy_compute_instance")
    ):
        node.acquire(10 + job, "1g:7")
        node.acquire(20 + job, "1g")
        node.release(10 + job)
        node.device().fail(op, Nvml.UNKNOWN)
        assert node.acquire(30 + job, "4g" if "create" in op else "7g"), op
        assert any("999" in line for line in node.log), op
        node.check()
        node.check_empties()
        node.log.clear()


def test_a_gpu_that_fails_is_left_out(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = open_gpus(node)
    real = node.device_class.create_gpu_instance

    def broken(self: Device, gpu: str, profile: str, start: int) -> int:
        if gpu == first:
            raise DeviceError(Nvml.UNKNOWN, "create")
        return real(self, gpu, profile, start)

    monkeypatch.setattr(node.device_class, "create_gpu_instance", broken)
    assert node.acquire(1, "7g")[0].gpu == second
    with pytest.raises(NoRoomError):
        node.acquire(2, "7g")
    node.release(1)
    with pytest.raises(NoRoomError, match=rf"{first}.*999"):  # another node may have room: this one goes on
        node.acquire(3, "7g:2")
    node.check()
    monkeypatch.undo()
    node.check_empties()


def test_a_gpu_that_does_not_answer_is_not_offered(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.acquire(1, "1g")
    first, second = open_gpus(node)
    real = node.device_class.instances

    def lost(self: Device, gpu: str) -> object:
        if gpu == first:
            raise DeviceError(Nvml.GPU_IS_LOST, "instances")
        return real(self, gpu)

    monkeypatch.setattr(node.device_class, "instances", lost)
    node.device().fail("create_gpu_instance", Nvml.GPU_IS_LOST)
    assert node.acquire(2, "2g")[0].gpu == second
    assert any(first in line and "lost" in line for line in node.log)
    node.release(1)
    with pytest.raises(NoRoomError, match=rf"{first}.*lost"):
        node.acquire(3, "7g:2")
    monkeypatch.undo()
    node.reconcile()
    assert any(f"{first} is offered again" in line for line in node.log)
    node.check_empties()


def test_no_gpu_works(node: Node) -> None:
    node.device().fail("create_compute_instance", Nvml.UNKNOWN, times=1000)
    with pytest.raises(NodeError, match=r"create.*: NVML error 999"):
        node.acquire(1, "3g")
    node.check()
    assert node.statuses() == {}
    node.boot("second boot")
    node.check_empties()


def test_what_could_not_be_taken_back_is_taken_back_later(node: Node) -> None:
    """The CI fails, and then its GI can't be destroyed: it is ours, and must not be lost."""
    node.configure(gpus=[0])
    node.device().fail("create_compute_instance", Nvml.UNKNOWN)
    node.device().fail("destroy_gpu_instance", Nvml.UNKNOWN)
    assert node.acquire(1, "7g")
    node.check()
    node.check_empties()


def test_a_gpu_that_fails_for_ever_in_the_worst_way_ends_the_call(node: Node) -> None:
    node.configure(gpus=[0], deadline_seconds=5)
    node.acquire(1, "1g")
    node.device().fail("create_compute_instance", Nvml.UNKNOWN, times=1000)
    node.device().fail("destroy_gpu_instance", Nvml.UNKNOWN, times=2)
    began = time.monotonic()
    with pytest.raises(NoRoomError):
        node.acquire(2, "3g")
    assert node.statuses()["0:3g.40gb@0:4"] == "quarantined", "half-made, and the GPU won't have it removed"
    node.reconcile()
    assert "0:3g.40gb@0:4" not in node.statuses()
    with pytest.raises(NodeError, match="999"):
        node.acquire(2, "3g", restart=1)
    assert time.monotonic() - began < 10
    assert node.acquire(1, "1g")


def test_several_instances_and_the_last_fails(node: Node) -> None:
    node.configure(gpus=[0])
    node.device().fail("create_compute_instance", Nvml.UNKNOWN, after=2, times=1000)
    with pytest.raises(NodeError):
        node.acquire(1, "3g,2g,1g")
    assert node.state().allocations == []
    assert set(node.statuses().values()) <= {"idle"}
    assert not node.marker(1).exists() or not node.marker(1).read_text().startswith("granted")
    node.check()


# Deciding.


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_policy_costs_no_job_its_instance(node: Node, name: str) -> None:
    granted = node.controller(BROKEN[name]).acquire(run(1), 0, "3g,1g")
    assert [g.placement.profile for g in granted] == ["3g.40gb", "1g.10gb"]
    (decision,) = [e for e in node.audit() if e["event"] == "decision"]
    assert {i["source"] for i in decision["instances"]} == {"built-in"}
    assert all(i["fault"] in node.log for i in decision["instances"]), "syslog has what went wrong"
    node.check()


def test_the_audit_log_tells_the_whole_story(node: Node) -> None:
    node.acquire(1, "1g")
    node.release(1)
    node.acquire(2, "7g:2")
    with pytest.raises(NoRoomError):
        node.acquire(3, "3g")
    with pytest.raises(RequestError):
        node.acquire(4, "7g:3")
    node.release(2)
    events = [e["event"] for e in node.audit()]
    assert events == [
        *("acquire", "warning", "decision", "create", "granted"),
        *("release", "released"),
        *("acquire", "decision", "destroy", "create", "create", "granted"),
        *("acquire", "refused"),
        *("acquire", "failed"),
        *("release", "released"),
    ]
    (failed,) = [e for e in node.audit() if e["event"] == "failed"]
    assert (failed["run"], failed["code"]) == (["cluster", 4, 0], RequestError.code) and "7g.80gb:3" in failed["error"]
    decision = node.audit()[2]
    (instance,) = decision["instances"]
    assert instance["placement"] == "1g.10gb@6:1"
    assert len(instance["candidates"]) == 14
    assert decision["run"] == ["cluster", 1, 0]
    assert set(decision["gpus"]) == set(open_gpus(node))
    assert all(e["pid"] == os.getpid() and e["t"] <= time.time() for e in node.audit())
    assert all("seconds" in e and e["result"] == "done" for e in node.audit() if e["event"] in ("create", "destroy"))


def test_an_audit_log_that_cannot_be_written_costs_nothing(node: Node) -> None:
    node.configure(audit_log=str(node.root / "missing" / "audit.jsonl"))
    assert node.acquire(1, "3g")
    assert any("audit" in line for line in node.log)
    node.check()


CALLS = st.lists(
    st.one_of(
        st.integers(0, 9),
        st.lists(st.sampled_from(["1g", "1g+me", "1g.20gb", "2g", "3g", "4g", "7g"]), min_size=1, max_size=3),
    ),
    min_size=4,
    max_size=16,
)
"""What happens on a node: a job asks for some profiles, or one of those that run ends."""


@settings(max_examples=60)
@given(calls=CALLS, gpus=st.integers(1, 2))
def test_acquire_succeeds_exactly_when_the_free_and_idle_slices_suffice(
    fast_dir: Path, calls: list[int | list[str]], gpus: int
) -> None:
    node = Node(Path(tempfile.mkdtemp(dir=fast_dir)) / "node", gpus=list(range(gpus)))
    known = geometry.load("A100-80GB")
    running: dict[int, list[local.Granted]] = {}
    for job, call in enumerate(calls):
        if isinstance(call, int):
            if running:
                ending = list(running)[call % len(running)]
                node.release(ending)
                del running[ending]
            continue
        held = [[g.placement for found in running.values() for g in found if g.number == n] for n in range(gpus)]
        wanted = parse(",".join(call), known).profiles
        possible = room("A100-80GB", held, wanted)
        try:
            running[job] = node.acquire(job, ",".join(call))
        except (NoRoomError, RequestError) as error:
            assert not possible, f"{error}, but it fits"
            assert isinstance(error, RequestError) == (not room("A100-80GB", [[]] * gpus, wanted))
        else:
            assert possible
    node.check_empties()


# Many at once.


def children(work: list[Callable[[], object]]) -> list[int]:
    """Run each in a process of its own, all at once; their exit codes."""
    pids = []
    for call in work:
        pid = os.fork()
        if pid == 0:
            try:
                call()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def life(node: Node, number: int, rounds: int) -> None:
    """Jobs that come and go; what happened to them goes into a file, one line a job."""
    chance = random.Random(number)
    with (node.root / f"records{number}").open("w") as records:
        for job in range(number * 1000, number * 1000 + rounds):
            spec = chance.choice(["1g", "1g:2", "2g", "3g", "3g,1g", "4g", "1g.20gb:2", "7g"])
            record = {"spec": spec, "from": time.time(), "held": []}
            try:
                granted = node.acquire(job, spec)
            except NoRoomError:
                record["until"] = time.time()
            else:
                assert node.marker(job).read_text().splitlines()[1:] == [g.uuid for g in granted]
                time.sleep(chance.random() * 0.05)
                record["held"] = [[g.number, *g.placement] for g in granted]
                node.release(job)
                record["until"] = time.time()
            records.write(json.dumps(record) + "\n")


@pytest.mark.parametrize("gpus", [2, 4])
def test_eight_at_once(node: Node, gpus: int) -> None:
    node.configure(gpus=list(range(gpus)), sim_gpus=gpus, sim_create_seconds=0.04, sim_destroy_seconds=0.02)
    node.configure(deadline_seconds=60)
    assert children([lambda n=n: life(node, n, 14) for n in range(1, 9)]) == [0] * 8  # type: ignore[misc]
    records = [json.loads(line) for path in node.root.glob("records*") for line in path.read_text().splitlines()]
    assert len(records) == 8 * 14
    assert sum(bool(r["held"]) for r in records) > 8 * 14 / 3
    known = geometry.load("A100-80GB")
    for record in records:
        if record["held"]:
            continue
        # All that anybody had or was getting while this one was refused: with all of it, it must not have fitted.
        held: list[list[Placement]] = [[] for _ in range(gpus)]
        for other in records:
            if other["from"] < record["until"] and record["from"] < other["until"]:
                for number, *placement in other["held"]:
                    held[number].append(Placement(*placement))
        assert not room("A100-80GB", held, parse(record["spec"], known).profiles), f"refused, but it fits: {record}"
    assert overlaps(node.journal()) == []
    node.check_empties()


def test_two_at_once_that_fit_are_both_served(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "1g:7")
    node.release(1)
    node.configure(sim_create_seconds=0.1, sim_destroy_seconds=0.1)
    assert children([lambda job=job: node.acquire(job, "3g") for job in (2, 3)]) == [0, 0]  # type: ignore[misc]
    node.check()


def test_the_same_run_twice_at_once(node: Node) -> None:
    node.configure(sim_create_seconds=0.3)

    def call() -> None:
        (node.root / f"answer{os.getpid()}").write_text(node.acquire(1, "3g")[0].uuid)

    assert children([call] * 3) == [0] * 3
    assert len({path.read_text() for path in node.root.glob("answer*")}) == 1
    assert operations(node) == ["create 3g.40gb@4"]
    node.check()


def test_an_epilog_while_the_prolog_is_still_at_work(node: Node) -> None:
    """slurmd was killed in a Prolog, which goes on as an orphan; the new slurmd runs the job's Epilog."""
    node.acquire(9, "1g")
    node.configure(sim_create_seconds=1.0)
    prolog = node.start("acquire", "--job=1", "--restart=0", "--uid=0", "--request=3g")
    while not node.state().intents:
        time.sleep(0.01)
    node.configure(sim_create_seconds=0)
    node.release(1)
    assert prolog.wait(20) in (0, 5)
    assert node.state().of_run(run(1)) is None
    assert set(grant.granted(node.config.run_dir)) == {9}
    with pytest.raises(ClosedRunError):
        node.acquire(1, "3g")
    node.check_empties()


def test_a_newer_run_while_the_older_one_s_prolog_is_still_at_work(node: Node) -> None:
    node.acquire(9, "1g")
    node.configure(sim_create_seconds=1.0)
    prolog = node.start("acquire", "--job=1", "--restart=0", "--uid=0", "--request=7g")
    while not node.state().intents:
        time.sleep(0.01)
    node.configure(sim_create_seconds=0)
    node.acquire(8, "1g:6")
    (granted,) = node.acquire(1, "7g", restart=1)
    assert granted.placement.profile == "7g.80gb"
    assert prolog.wait(20) in (0, 5)
    assert node.marker(1).read_text().startswith("granted 1 ")
    node.check_empties()


def test_a_reboot_and_a_change_of_config_seen_by_many_at_once(node: Node) -> None:
    node.acquire(1, "3g")
    node.boot("second boot")
    node.configure(gpus=[1, 0])
    assert children([lambda job=job: node.acquire(job, "1g") for job in range(10, 16)]) == [0] * 6  # type: ignore[misc]
    assert len(node.state().allocations) == 6
    node.check_empties()


# The command line.


def test_the_command_line(node: Node) -> None:
    node.acquire(9, "1g")
    shown = node.cli("acquire", "--job=1", "--restart=0", "--uid=7", "--request=mig:3g:1,1g", "--submit=5", "--limit=9")
    assert (shown.returncode, shown.stderr) == (0, "")
    state = node.state()
    allocation = state.of_run(run(1))
    assert allocation is not None
    assert (allocation.uid, allocation.submit, allocation.limit) == (7, 5, 9)
    expected = [f"{i.uuid} 0 {i.placement}" for _, i in state.held(allocation)]
    assert shown.stdout.splitlines() == expected
    answer = json.loads(node.cli("acquire", "--job=1", "--restart=0", "--uid=7", "--request=3g", "--json").stdout)
    assert (answer["schema"], answer["run"]) == (1, "1.0")
    assert answer["instances"][0]["placement"] == {"profile": "3g.40gb", "start": 0, "size": 4}
    assert set(answer["instances"][0]) == {"gpu", "number", "placement", "uuid"}
    for _ in range(2):
        shown = node.cli("release", "--job=1", "--restart=0")
        assert (shown.returncode, shown.stdout, shown.stderr) == (0, "", "")
    answer = json.loads(node.cli("release", "--job=1", "--restart=0", "--json").stdout)
    assert answer == {"schema": 1, "run": "1.0", "instances": []}
    node.check()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("acquire", "--job=2", "--restart=0", "--uid=0", "--request=9g"), 3),
        (("acquire", "--job=2", "--restart=0", "--uid=0", "--request=7g:2"), 4),
        (("acquire", "--job=1", "--restart=0", "--uid=0", "--request=1g"), 5),
    ],
)
def test_exit_codes_say_whose_fault_it_is(node: Node, arguments: tuple[str, ...], code: int) -> None:
    node.release(1)
    node.acquire(9, "1g")
    shown = node.cli(*arguments)
    assert shown.returncode == code
    assert shown.stdout == ""
    assert shown.stderr.count("\n") == 1
    answered = node.cli(*arguments, "--json")
    assert answered.returncode == code
    assert answered.stderr == ""
    assert json.loads(answered.stdout) == {"schema": 1, "error": shown.stderr.strip()[5:], "code": code}


def test_the_command_line_is_executable_and_isolated(node: Node) -> None:
    shown = subprocess.run(
        [sys.executable, "-I", str(ROOT / "controller.py"), "release", "--job=1", "--restart=0"],
        env=node.environment(PYTHONPATH="/nonexistent", PYTHONSTARTUP="/nonexistent"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert os.access(ROOT / "controller.py", os.X_OK)


def test_nothing_heavy_is_imported(node: Node) -> None:
    program = (
        "import sys; sys.argv[1:] = ['acquire', '--job=1', '--restart=0', '--uid=0', '--request=3g'];"
        f"sys.path.insert(0, {str(ROOT)!r}); import controller; controller.main(sys.argv[1:]);"
        "print(*sorted({m.partition('.')[0] for m in sys.modules}))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", program], env=node.environment(), capture_output=True, text=True, check=True
    )
    assert not {"torch", "numpy", "numba", "pyslurm", "slurm"} & set(shown.stdout.split())


def test_the_loop_knows_nothing_of_the_node(node: Node) -> None:
    node.toml.write_text("this is no configuration")
    shown = subprocess.run(
        node.command(),
        input="acquire ann 3g\nrelease ann\n",
        env=node.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert len(shown.stdout.split()) == 2
    assert not (node.root / "run").exists()
    assert list((node.root / "state").iterdir()) == []
