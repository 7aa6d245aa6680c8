"""Inventory, GPUs and Slurm made to agree: GPUs that are lost, instances that vanish or can't be destroyed, what others
have made, runs that are over; and `rms reconcile`."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from conftest import Node, needs_root, open_gpus, run
from test_crash import killed_in

from controller import Controller
from rms import cli, grant, hardware, inventory
from rms.device import Nvml
from rms.errors import ClosedRunError, NodeError, NoRoomError
from rms.inventory import Run
from slurm import stuck
from slurm.slurmctld import Job, Slurmctld

BACKENDS = ["simulated", "nvml"]


@contextmanager
def holder(node: Node, uuid: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds an instance."""
    with subprocess.Popen(["sleep", "60"]) as process:
        node.device().hold(uuid, process.pid)
        try:
            yield process
        finally:
            process.kill()


def later(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the clock go on by that much."""
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + seconds)


def rms(node: Node, capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """What an rms verb prints."""
    assert cli.main([*arguments, "--config", str(node.toml), "--node", "n1"]) == code
    out, err = capsys.readouterr()
    return out + err


# A GPU that is lost.


def test_a_lost_gpu_costs_its_own_jobs_and_no_others(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    (one,) = node.acquire(1, "7g")
    (two,) = node.acquire(2, "3g")
    node.lose(one.number)
    node.log.clear()
    node.reconcile()
    (line,) = [line for line in node.log if "is not offered" in line]
    assert one.gpu in line and "lost" in line and line.endswith("lost with it: run 1.0")
    assert any(entry["event"] == "warning" and entry["text"] == line for entry in node.audit())
    (entry,) = [entry for entry in node.audit() if entry["event"] == "lost"]
    assert (entry["run"], entry["gpu"], entry["placement"]) == (["cluster", 1, 0], one.gpu, str(one.placement))
    shown = rms(node, capsys, "show")
    assert "! not offered: " in shown
    known = {a["job"]: a["status"] for a in json.loads(rms(node, capsys, "show", "--json"))["allocations"]}
    assert known == {1: "lost", 2: "running"}
    assert node.acquire(3, "3g")[0].gpu == two.gpu
    with pytest.raises(NoRoomError, match="lost"):  # perhaps on another node
        node.acquire(4, "7g:2")
    node.release(1)
    assert [a.run.job for a in node.state().allocations] == [2, 3]
    before = len(node.log)
    node.release(3)
    assert not [line for line in node.log[before:] if "not offered" in line], "it is told once"
    node.lose(one.number, lost=False)
    node.reconcile()
    assert any(f"GPU {one.gpu} is offered again" in line for line in node.log)
    node.check()
    node.check_empties()


def test_the_node_is_at_fault_only_if_no_gpu_is_left(node: Node) -> None:
    for number in (0, 1):
        node.lose(number)
        if number == 0:
            (one,) = node.acquire(1, "3g")
            assert one.number == 1
    with pytest.raises(NodeError, match="lost"):
        node.reconcile()
    with pytest.raises(NodeError, match="lost"):
        node.acquire(2, "1g")
    node.release(1)
    for number in (0, 1):
        node.lose(number, lost=False)
    node.reconcile()
    node.check_empties()


def test_a_gpu_that_is_lost_from_the_first(node: Node) -> None:
    first, second = open_gpus(node)
    node.lose(0)
    assert node.acquire(1, "3g")[0].gpu == second
    lost, other = node.state().gpus
    assert "lost" in lost.fault and not other.fault
    assert lost.model == other.model, "as long as nobody knows better"
    with pytest.raises(NoRoomError):
        node.acquire(2, "7g:2")
    node.lose(0, lost=False)
    node.reconcile()
    assert {gpu.uuid for gpu in node.state().gpus} >= {second}
    node.acquire(3, "7g")
    node.check_empties()
    assert [gpu.uuid for gpu in node.state().gpus] == [first, second]


@pytest.mark.parametrize("both", [False, True])
def test_the_state_is_rebuilt_while_a_gpu_is_lost(node: Node, both: bool) -> None:
    """What its jobs have stays theirs, whether the older state knows of it or the grants alone do."""
    node.acquire(1, "7g")
    node.acquire(2, "3g")
    held = {job: found.uuids for job, found in grant.granted(node.config.run_dir).items()}
    (number,) = {gpu: n for n, gpu in enumerate(open_gpus(node)) if gpu == node.acquire(1, "7g")[0].gpu}.values()
    node.lose(number)
    for name in ["state.json", "state.json.previous"][: 1 + both]:
        (node.root / "state" / name).write_text("damaged")
    node.acquire(3, "1g")
    assert {a.run.job for a in node.state().allocations} == {1, 2, 3}
    with suppress(NodeError):
        node.acquire(1, "7g")  # the same Prolog once more
    assert grant.granted(node.config.run_dir)[1].uuids == held[1]
    node.lose(number, lost=False)
    node.reconcile()
    assert {
        a.run.job: tuple(i.uuid for _, i in node.state().held(a)) for a in node.state().allocations if a.run.job < 3
    } == held
    node.check()
    with pytest.raises(NoRoomError):
        node.acquire(4, "7g")
    node.check_empties()


def test_a_lost_gpu_is_not_asked_by_every_hook(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.acquire(1, "7g")
    node.acquire(2, "7g")
    (lost,) = [job for job in (1, 2) if node.acquire(job, "7g")[0].number == 1]
    node.release(3 - lost)
    node.lose(1)
    node.reconcile()
    node.release(lost)
    node.acquire(9, "1g")
    asked: list[str] = []
    real = hardware.survey
    monkeypatch.setattr(hardware, "survey", lambda device, gpu, *more: asked.append(gpu) or real(device, gpu, *more))
    for job in (10, 11):
        node.acquire(job, "1g")
    assert asked == []
    node.lose(1, lost=False)
    with monkeypatch.context() as patch:
        later(patch, inventory.LAST_RETRY)
        node.acquire(12, "7g")
    assert asked
    node.check_empties()


def test_a_clock_that_is_set_back_keeps_no_gpu_away(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        later(patch, 10 * inventory.LAST_RETRY)
        node.lose(1)
        node.acquire(1, "1g")
        node.lose(1, lost=False)
    assert node.acquire(2, "7g")
    node.check_empties()


def test_a_lost_gpu_that_the_config_names_by_index(fast_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node(fast_dir / "node", "nvml")
    uuids = node.machine.uuids
    node.lose(0)
    assert node.acquire(1, "3g")[0].gpu == uuids[1]
    assert [gpu.uuid for gpu in node.state().gpus] == ["0", uuids[1]]
    node.lose(0, lost=False)
    with monkeypatch.context() as patch:
        later(patch, inventory.FIRST_RETRY + 1)
        node.acquire(2, "7g")
    assert [gpu.uuid for gpu in node.state().gpus] == uuids
    # Now that its UUID is known, it is the same GPU also where only its index answers.
    node.lose(0)
    (node.root / "state" / "state.json").write_text("damaged")
    node.acquire(3, "1g")
    assert [gpu.uuid for gpu in node.state().gpus] == uuids
    assert {a.run.job for a in node.state().allocations} == {1, 2, 3}
    node.lose(0, lost=False)
    node.reconcile()
    node.check_empties()


# Instances that vanish.


def test_an_instance_that_vanished_is_lost_and_never_given_to_another_run(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    node.configure(gpus=[0])
    (one,) = node.acquire(1, "3g")
    node.vanish(0)
    node.reconcile()
    assert any(f"{one.placement}: the instance of run 1.0 is lost" in line for line in node.log)
    assert f"! {one.placement} lost: it vanished" in rms(node, capsys, "show")
    node.reconcile()
    assert [entry["placement"] for entry in node.audit() if entry["event"] == "lost"] == [str(one.placement)]
    (two,) = node.acquire(2, "3g")
    assert two.uuid != one.uuid
    for spec in ("1g.20gb:4", "3g", "7g"):
        with pytest.raises(NoRoomError):
            node.acquire(3, spec)
    node.release(1)
    assert node.acquire(3, "3g", restart=1)[0].placement == one.placement
    node.check_empties()


def test_an_instance_that_somebody_made_where_a_run_has_lost_its_own(node: Node) -> None:
    """It has the same ids and UUID on another day; as long as the run is there it is nobody's."""
    node.configure(gpus=[0])
    (one,) = node.acquire(1, "3g")  # @4:4
    node.vanish(0)
    device = node.device()
    half = device.create_gpu_instance(one.gpu, "3g.40gb", 4)  # on the very place, but not the same
    node.reconcile()
    state = node.state()
    assert [i.trouble for _, i in state.held(state.allocations[0])] == ["lost"]
    device.destroy_gpu_instance(one.gpu, half)
    for start in (4, 5):
        device.create_compute_instance(one.gpu, device.create_gpu_instance(one.gpu, "1g.10gb", start))
    node.reconcile()
    assert node.statuses() == {"0:3g.40gb@4:4": "busy", "0:1g.10gb@4:1": "quarantined", "0:1g.10gb@5:1": "quarantined"}
    assert len(node.acquire(2, "1g:4")) == 4
    with pytest.raises(NoRoomError):
        node.acquire(3, "1g")
    node.release(1)
    node.reconcile()
    assert node.statuses()["0:1g.10gb@4:1"] == "idle"
    node.check()
    node.check_empties()


# What the hardware refuses.


def test_a_refused_destroy_stays_quarantined_and_is_tried_again_later(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.configure(gpus=[0])
    monkeypatch.setattr(hardware, "DESTROY_SECONDS", 0.0)
    node.acquire(1, "3g")
    node.release(1)
    node.device().fail("destroy_compute_instance", Nvml.IN_USE, times=1000)
    with pytest.raises(NoRoomError):
        node.acquire(2, "7g")
    assert node.statuses() == {"0:3g.40gb@4:4": "quarantined"}
    tried = len(node.journal())
    with pytest.raises(NoRoomError):
        node.acquire(2, "7g", restart=1)
    with pytest.raises(NoRoomError):
        node.acquire(3, "3g:2")
    assert len(node.journal()) == tried, "not again at once"
    assert len(node.acquire(4, "1g:3")) == 3, "its slices alone are not offered"
    waits = []
    for _ in range(8):
        (gpu,) = node.state().gpus
        waits.append(round(gpu.retry - time.time()))
        with monkeypatch.context() as patch:
            later(patch, gpu.retry - time.time() + 1)
            node.acquire(5, "1g", restart=len(waits))
            node.release(5, restart=len(waits))
    assert waits[0] <= inventory.FIRST_RETRY and sorted(waits) == waits and waits[-1] >= inventory.LAST_RETRY - 10
    if node.backend == "nvml":
        node.machine.mend()
    else:
        node.device().fail("*", 0, times=0)
        state = json.loads((node.root / "gpus.json").read_text()) | {"faults": []}
        (node.root / "gpus.json").write_text(json.dumps(state))
    node.reconcile()
    assert any("3g.40gb@4:4: refused, now removed" in line for line in node.log)
    node.release(4)
    node.check_empties()


# What RMS does not know.


def test_what_is_whole_and_unused_is_adopted_and_nothing_else(node: Node) -> None:
    device = node.device()
    gpu = device.gpus()[0]
    node.acquire(1, "1g")
    for profile, start in (("1g.10gb", 0), ("2g.20gb", 2)):
        device.create_compute_instance(gpu, device.create_gpu_instance(gpu, profile, start))
    device.create_gpu_instance(gpu, "1g.10gb", 1)
    (held,) = [i.uuid for i in device.instances(gpu) if i.placement.start == 2]
    with holder(node, held):
        node.reconcile()
        statuses = {place: status for place, status in node.statuses().items() if place != "0:1g.10gb@6:1"}
        assert statuses == {
            "0:1g.10gb@0:1": "idle",
            "0:1g.10gb@1:1": "quarantined",
            "0:2g.20gb@2:2": "quarantined",
        }
        node.check()
    node.reconcile()
    assert node.statuses()["0:2g.20gb@2:2"] == "idle", "now that nobody holds it"
    assert node.statuses()["0:1g.10gb@1:1"] == "quarantined"
    assert not [e for e in node.journal() if e["op"].startswith("destroy")], "what is not RMS's is never destroyed"
    device.destroy_gpu_instance(gpu, next(i.gi for i in device.instances(gpu) if i.ci is None))
    node.reconcile()
    node.check_empties()


def test_what_a_dead_process_left_half_made_is_removed(fast_dir: Path) -> None:
    node = Node(fast_dir / "node")
    killed_in(node, lambda: node.acquire(1, "4g"), "create_compute_instance")
    assert [i.ci for gpu in open_gpus(node) for i in node.device().instances(gpu)] == [None]
    node.reconcile()
    assert [i for gpu in open_gpus(node) for i in node.device().instances(gpu)] == []
    assert any("unfinished" in line for line in node.log)
    node.check_empties()


@pytest.mark.parametrize(("act", "where"), [("acquire", "create_compute_instance"), ("release", "setxattr")])
def test_a_gpu_is_lost_together_with_a_process_at_work_on_it(fast_dir: Path, act: str, where: str) -> None:
    """What that one has left is cleaned up once the GPU is back."""
    node = Node(fast_dir / "node", gpus=[0])
    if act == "release":
        node.acquire(1, "4g")
    killed_in(node, lambda: node.acquire(1, "4g") if act == "acquire" else node.release(1), where)
    node.lose(0)
    with pytest.raises(NodeError, match="lost"):
        node.acquire(2, "1g")
    assert node.state().intents == [] and node.state().allocations == []
    assert {*node.statuses().values()} == {"quarantined" if act == "acquire" else "idle"}
    node.lose(0, lost=False)
    node.reconcile()
    node.check()
    assert len(node.acquire(3, "3g:2")) == 2, "nothing is in the way"
    node.check_empties()


# Runs that are over.


def test_runs_that_are_over_are_released(node: Node) -> None:
    node.acquire(1, "3g")
    node.acquire(2, "1g")
    (node.marker(2)).write_text("ended 0\n")  # its Epilog began, and was killed
    node.acquire(3, "2g", restart=1)
    node.reconcile(1)
    assert [a.run for a in node.state().allocations] == [run(3, 1)]
    assert any("run 1.0 is over" in line for line in node.log)
    with pytest.raises(ClosedRunError):
        node.acquire(1, "3g")
    node.check_empties()


def test_a_run_that_began_after_slurm_was_asked_is_left_alone(node: Node) -> None:
    node.acquire(1, "3g")
    asked = []

    def over(standing: Sequence[Run]) -> Sequence[Run]:
        asked.extend(standing)
        node.acquire(2, "3g")  # no lock is held meanwhile
        return [known for known in standing if known.job != 99]

    node.controller().reconcile(over)
    assert asked == [run(1)]
    assert [a.run.job for a in node.state().allocations] == [2]
    node.check_empties()


def test_a_run_that_a_hook_is_at_work_on_is_left_alone(node: Node) -> None:
    node.configure(holder_seconds=2)
    (one,) = node.acquire(1, "3g")
    with holder(node, one.uuid):
        epilog = node.start("release", "--job=1", "--restart=0")
        while not any(i.run.job == 1 for i in node.state().intents):
            time.sleep(0.02)
        asked: list[Run] = []
        node.controller().reconcile(lambda standing: asked.extend(standing) or standing)
        assert asked == []
        assert epilog.wait(30) == 0
    node.check_empties()


def test_which_runs_are_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job that was requeued is completing, under its next restart count, until its Epilog has ended."""
    shown = "1 0 RUNNING\n2 1 COMPLETING\n3 0 PENDING\n4 1 RUNNING\n5 0 SUSPENDED\n"
    monkeypatch.setattr(Slurmctld, "run", lambda *words: shown)
    assert Slurmctld("").over([run(job) for job in range(1, 7)], "n1") == [run(3), run(4), run(6)]


def test_a_reboot_closes_what_was_before(node: Node) -> None:
    node.acquire(1, "3g")
    node.boot("second boot")
    node.log.clear()
    node.reconcile()
    assert any("this node has booted" in line for line in node.log)
    assert node.state().allocations == [] and node.statuses() == {}
    with pytest.raises(ClosedRunError):
        node.acquire(1, "3g")
    node.check_empties()


# The verb.


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no slurmctld here to be waited for."""
    monkeypatch.setattr(cli, "SLURM_SECONDS", 0.5)


def world(node: Node) -> dict[Path, object]:
    """Every file of a node but the locks, which say who held them last, and the list of GPUs that were opened; and who
    may open its devices."""
    files = [path for path in node.root.rglob("*") if path.is_file() and path.suffix not in (".lock", ".opened")]
    nodes = [path for path in node.root.rglob("*") if path.is_char_device()]
    return {path: path.read_bytes() for path in files} | {
        path: {name: os.getxattr(path, name) for name in os.listxattr(path)} for path in nodes
    }


def test_the_verb_says_what_it_finds_and_a_dry_run_changes_nothing(
    node: Node, capsys: pytest.CaptureFixture[str]
) -> None:
    conf = node.root / "slurm.conf"
    nowhere = ["--slurm-conf", str(conf)]
    assert "first start here" in rms(node, capsys, "reconcile", *nowhere)
    unasked = f"Slurm is not asked, nor told anything: there is no {conf}\n"
    assert rms(node, capsys, "reconcile", *nowhere) == unasked
    conf.write_text("Nonsense=1\n")  # squeue ends at once
    (one,) = node.acquire(1, "3g")
    node.acquire(2, "1g")
    (node.marker(2)).write_text("ended 0\n")
    device = node.device()
    other = next(gpu for gpu in device.gpus() if gpu != one.gpu)
    device.create_compute_instance(other, device.create_gpu_instance(other, "2g.20gb", 0))
    gi = next(i.gi for i in device.instances(one.gpu) if i.uuid == one.uuid)
    device.destroy_compute_instance(one.gpu, gi, 0)
    device.destroy_gpu_instance(one.gpu, gi)
    before = world(node)
    dry = rms(node, capsys, "reconcile", "--dry-run", *nowhere)
    assert world(node) == before
    lines = dry.splitlines()
    assert lines[-1] == "dry run: nothing was changed"
    for wanted in (
        f"GPU {one.gpu} {one.placement}: the instance of run 1.0 is lost",
        f"GPU {other} 2g.20gb@0:2: not known to RMS; idle",
        "run 2.0 is over",
        "Slurm does not say what runs here, so no run is taken for over: squeue",
    ):
        assert len([line for line in lines if line.startswith(wanted)]) == 1, (wanted, dry)
    assert rms(node, capsys, "reconcile", *nowhere).splitlines() == lines[:-1]
    assert [a.run.job for a in node.state().allocations] == [1]
    node.release(1)
    node.reconcile()
    node.check_empties()


def test_a_dry_run_after_a_reboot_and_of_a_damaged_state(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = ["--slurm-conf", str(node.root / "no-slurm.conf")]
    node.acquire(1, "3g")
    (node.root / "state" / "state.json").write_text("damaged")
    before = world(node)
    assert "state.json is damaged" in rms(node, capsys, "reconcile", "--dry-run", *nowhere)
    assert world(node) == before
    node.reconcile()
    node.boot("second boot")
    open_gpus(node)
    node.device().instances(open_gpus(node)[0])  # simulated GPUs notice the boot when they are asked
    node.marker(1).parent.mkdir(parents=True)
    node.marker(1).write_text("granted 0 1000 cluster 3g.40gb:1\nMIG-of-before\n")  # where /run outlives a boot
    before = world(node)
    assert "this node has booted" in rms(node, capsys, "reconcile", "--dry-run", *nowhere)
    assert world(node) == before
    assert "this node has booted" in rms(node, capsys, "reconcile", *nowhere)
    node.check_empties()


def test_the_verb_s_exit_codes(node: Node, capsys: pytest.CaptureFixture[str]) -> None:
    node.acquire(1, "3g")
    for number in (0, 1):
        node.lose(number)
    assert "gpu is lost" in rms(node, capsys, "reconcile", code=NodeError.code)
    for number in (0, 1):
        node.lose(number, lost=False)
    node.configure(deadline_seconds=0)
    with open(node.root / "state" / "state.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "state.lock is held by" in rms(node, capsys, "reconcile", code=7)


# States of an older RMS: what its own code has written, with two jobs that run and a Prolog that was killed at work.

STATES = Path(__file__).with_name("states")


def left_by(node: Node, schema: str) -> None:
    """Let the node be one on which that RMS was at work: its state, its GPUs and its jobs' files."""
    uuids = open_gpus(node)
    text = (STATES / f"{schema}.json").read_text()
    for number, uuid in enumerate(uuids):
        text = text.replace(f'"GPU-{number}"', f'"{uuid}"')
    old = json.loads(text)
    body = json.dumps(old["state"])
    (node.root / "state" / "state.json").write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')
    node.device().instances(uuids[0])  # the file of the simulated GPUs is there from now on
    machine = Path(node.simulated["file"])
    machine.write_text(json.dumps({**json.loads(machine.read_text()), "gpus": old["gpus"]}))
    made = [{**one, "gpu": gpu["uuid"]} for gpu in old["gpus"] for one in gpu["instances"]]
    lines = [json.dumps({"op": "create_gpu_instance", "code": 0, **one}) for one in made]
    Path(f"{machine}.journal").write_text("".join(f"{line}\n" for line in lines))
    directory = Path(grant.directory(node.config.run_dir))
    for job, words in old["jobs"].items():
        (directory / job).write_text("".join(f"{line}\n" for line in words))


@pytest.mark.parametrize("schema", sorted(path.stem for path in STATES.iterdir()))
def test_jobs_run_on_while_rms_is_upgraded(fast_dir: Path, schema: str) -> None:
    node = Node(fast_dir / "node")
    left_by(node, schema)
    before = {job: node.marker(job).read_text() for job in (1, 2)}
    with pytest.raises(NoRoomError):
        node.acquire(5, "7g:2")
    assert not any("damaged" in line for line in node.log)
    state = node.state()
    assert [(a.run.job, a.limit) for a in state.allocations] == [(1, 60), (2, None)] and state.intents == []
    assert state.closed.keys() == {3}
    for job in (1, 2):
        assert [i.uuid for i in node.acquire(job, "whatever it was")] == before[job].splitlines()[1:]
        assert node.marker(job).read_text() == before[job]
    node.reconcile()
    node.check()
    node.release(1)
    with pytest.raises(ClosedRunError):
        node.acquire(3, "1g")
    node.check_empties()


def test_what_is_written_differently_has_another_schema(fast_dir: Path) -> None:
    """Where this fails: count SCHEMA up, and keep a state that this code writes as states/<schema>.json."""
    node = Node(fast_dir / "node")
    known = json.loads((STATES / f"{inventory.SCHEMA}.json").read_text())["state"]
    node.acquire(1, "3g", limit=60)
    killed_in(node, lambda: node.acquire(4, "4g", limit=10), "create_compute_instance")
    written = json.loads((node.root / "state" / "state.json").read_text())["state"]
    for what in ("gpus", "allocations", "intents"):
        assert known[what][0].keys() == written[what][0].keys(), what
    assert known["gpus"][0]["instances"][0].keys() == written["gpus"][0]["instances"][0].keys()
    assert known.keys() == written.keys()


def test_a_state_of_schema_1_is_understood(node: Node) -> None:
    (one,) = node.acquire(1, "3g")
    node.acquire(2, "1g")
    node.release(2)
    path = node.root / "state" / "state.json"
    old = json.loads(path.read_text())["state"]
    old["schema"] = 1
    device = node.device()
    gpu = device.gpus()[1]
    foreign = device.create_gpu_instance(gpu, "1g.10gb", 0)
    ours = device.create_gpu_instance(gpu, "1g.10gb", 1)
    for number, known in enumerate(old["gpus"]):
        for field in ("left", "tries", "retry"):
            del known[field]
        for instance in known["instances"]:
            del instance["trouble"]
        if number == 1:
            for gi, start, note in ((foreign, 0, "half-made, and not by RMS"), (ours, 1, "half-made")):
                place = {"placement": ["1g.10gb", start, 1], "gi": gi, "ci": None, "uuid": None, "note": note}
                place |= {"generation": 900 + gi, "status": "quarantined", "intent": None, "used": 1.0}
                known["instances"].append(place)
    body = json.dumps(old)
    path.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')
    troubles = {str(i.placement): i.trouble for i in node.state().gpus[1].instances if i.trouble}
    assert troubles == {"1g.10gb@0:1": "foreign", "1g.10gb@1:1": "half-made"}
    node.acquire(3, "1g")
    assert json.loads(path.read_text())["state"]["schema"] == inventory.SCHEMA
    assert [i.gi for i in device.instances(gpu) if i.ci is None] == [foreign], "ours is removed, theirs is not"
    assert node.acquire(1, "3g") == [one]
    device.destroy_gpu_instance(gpu, foreign)
    node.reconcile()
    node.check_empties()


def test_a_gpu_of_schema_1_that_left_the_configuration(node: Node) -> None:
    text = {
        "uuid": "GPU-1",
        "model": "A100-80GB",
        "instances": [],
        "doubt": "",
        "fault": "no longer in the configuration",
    }
    data = {"schema": 1, "boot_id": "b", "managed": [], "counter": 1, "gpus": [text], "geometries": {}, "closed": {}}
    state = inventory.from_json(data | {"allocations": [], "intents": [], "recent": []})
    assert state.gpus[0].left
    assert json.loads(inventory.to_json(state))["schema"] == inventory.SCHEMA


# What chaos.py has found.


def test_a_stranger_s_half_of_an_instance_is_not_removed_because_ours_could_not_be_made_there(node: Node) -> None:
    """The create fails since the place is taken: what lies there without a compute instance is not ours."""
    node.configure(gpus=[0])
    node.acquire(1, "1g")
    (gpu,) = open_gpus(node)
    gi = node.device().create_gpu_instance(gpu, "1g.10gb", 5)
    with pytest.raises(NoRoomError):
        node.acquire(2, "1g:6")
    assert gi in [i.gi for i in node.device().instances(gpu)]
    assert node.statuses()["0:1g.10gb@5:1"] == "quarantined"
    node.device().destroy_gpu_instance(gpu, gi)
    node.reconcile()
    node.check_empties()


def test_a_run_ends_while_no_gpu_answers_and_one_has_never_told_its_uuid(fast_dir: Path) -> None:
    node = Node(fast_dir / "node", "nvml")
    node.lose(0)
    node.acquire(1, "1g")
    node.lose(1)
    node.release(1)
    assert node.state().allocations == []
    node.machine.mend()
    node.reconcile()
    node.check_empties()


def test_a_run_that_has_lost_half_of_what_it_had_robs_nobody_when_the_state_is_lost_twice(node: Node) -> None:
    """The UUID of the lost instance comes back for the run that gets its place."""
    node.configure(gpus=[0])
    one, two = node.acquire(1, "3g,2g")
    device = node.device()
    gi = next(i.gi for i in device.instances(one.gpu) if i.uuid == one.uuid)
    device.destroy_compute_instance(one.gpu, gi, 0)
    device.destroy_gpu_instance(one.gpu, gi)

    def lose_state() -> None:
        for name in ("state.json", "state.json.previous"):
            (node.root / "state" / name).write_text("damaged")
        before = world(node)
        Controller(node.config, log=node.log.append, rehearsal=True).reconcile(lambda standing: [])
        assert world(node) == before
        node.reconcile()

    lose_state()
    (three,) = node.acquire(2, "3g")
    assert three.uuid == one.uuid
    aside = node.marker(1).with_name("aside")  # whichever is read first: a file that is new is, in memory
    node.marker(1).rename(aside)
    aside.rename(node.marker(1))
    lose_state()
    state = node.state()
    held = {a.run.job: [i.uuid for _, i in state.held(a)] for a in state.allocations}
    assert held == {1: [two.uuid], 2: [three.uuid]}
    node.check_empties()


def test_a_run_keeps_its_place_if_its_instance_and_the_last_state_are_lost_at_once(node: Node) -> None:
    """The state before that one has only the intent to make the instance; the grant says that it was made."""
    node.configure(gpus=[0])
    node.acquire(1, "3g,2g")
    (node.root / "state" / "state.json").unlink()
    node.vanish(0)
    with pytest.raises(NoRoomError):
        node.acquire(2, "7g")
    node.acquire(3, "2g")
    state = node.state()
    (one,) = (a for a in state.allocations if a.run.job == 1)
    assert [(i.placement.profile, i.trouble) for _, i in state.held(one)] == [("3g.40gb", "lost"), ("2g.20gb", "lost")]
    node.release(1)
    node.check_empties()


def test_a_run_keeps_its_instance_if_the_last_state_is_lost_while_its_gpu_is(node: Node) -> None:
    """As above, but the GPU comes back as it was: its ids are known from then on only, its UUID from the grant."""
    (one,) = node.acquire(1, "3g")
    (node.root / "state" / "state.json").unlink()
    node.lose(one.number)
    (other,) = node.acquire(2, "1g")
    assert other.gpu != one.gpu
    node.lose(one.number, lost=False)
    node.reconcile()
    node.check()
    assert {a.run.job for a in node.state().allocations} == {1, 2}
    node.check_empties()


@needs_root
def test_a_user_can_not_keep_a_stuck_job_from_going_back(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody may give a process of their own the job's number; a Prolog is root's."""
    node.acquire(1, "1g")
    monkeypatch.setattr(stuck, "LOOK_AGAIN_SECONDS", 0.0)
    monkeypatch.setattr(Slurmctld, "in_prolog", lambda self, name: [Job(1, "1", True, True)])
    found = []
    for user in (0, 65534):
        with subprocess.Popen(
            ["sleep", "60"], env={"PATH": "/usr/bin:/bin", "SLURM_JOB_ID": "1"}, user=user
        ) as process:
            found.append([job.id for job in stuck.stuck(Slurmctld(""), "n1", node.config.run_dir)])
            process.kill()
    assert found == [[], [1]]
