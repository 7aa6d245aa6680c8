"""Every kind of job on a real Slurm that knows what fits: suspended, exclusive, reserved, preempting, with wishes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import records
from rms_cluster import RmsCluster, rms_cluster

pytestmark = pytest.mark.slurm

WORK = records.script("while [ ! -e go-on ]; do sleep 0.1; done; echo now $CUDA_VISIBLE_DEVICES")
"""A job that ends when its user says so."""
SHOW = 'echo "$SLURM_PROCID $CUDA_VISIBLE_DEVICES"'
CONF = """\
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 State=UP
PartitionName=polite Nodes=ALL PriorityTier=10 State=UP
PartitionName=scrap Nodes=ALL PriorityTier=1 PreemptMode=CANCEL State=UP
"""
GANG = """\
PreemptType=preempt/partition_prio
PreemptMode=SUSPEND,GANG
PartitionName=main Nodes=ALL Default=YES PriorityTier=1 OverSubscribe=FORCE:1 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 OverSubscribe=FORCE:1 State=UP
"""


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[RmsCluster]:
    """Two nodes with two GPUs each; jobs in the partition high may preempt, and the lua was told so."""
    with rms_cluster(slurm_root, admission="features", preempting=["high"], create=0.02, destroy=0.02, cred_expire=5,
                     features="ib,old", extra_conf=CONF) as cluster:  # fmt: skip
        yield cluster


@pytest.fixture(autouse=True)
def healthy(slurm: RmsCluster) -> Iterator[None]:
    """After each test everything is over, no node is drained, and nothing is held."""
    go_on(slurm, False)
    yield
    slurm.cancel_all()
    slurm.wait(lambda: not slurm.queue(), 60, "every job is over")
    slurm.wait(lambda: {tuple(s) for s in slurm.node_states().values()} == {("idle", "")}, 60, "the nodes are idle")


def go_on(slurm: RmsCluster, now: bool = True) -> None:
    for user in slurm.users:
        (user.work / "go-on").touch() if now else (user.work / "go-on").unlink(missing_ok=True)


def state(slurm: RmsCluster, job: int, *wanted: str, timeout: float = 60) -> dict[str, str]:
    slurm.wait(lambda: slurm.job(job)["JobState"] in wanted, timeout, f"job {job} is {' or '.join(wanted)}")
    return slurm.job(job)


def running(slurm: RmsCluster, *jobs: int) -> None:
    """Each has written its first line."""
    for job in jobs:
        outputs = [user.work / f"slurm-{job}.out" for user in slurm.users]
        slurm.wait(lambda: any(o.exists() and o.read_text().startswith("start") for o in outputs), 60, f"{job} runs")  # noqa: B023


def faults(slurm: RmsCluster, *jobs: int) -> list[str]:
    """What the jobs' own words and the GPUs' journals show: instances that changed under a job, or that two had."""
    found = [r for job in jobs for user in slurm.users for path in [user.work / f"slurm-{job}.out"] if path.exists()
             for r in records.read(path)]  # fmt: skip
    assert {r.job for r in found} == set(jobs), "all have run"
    journals = {node: records.journal(slurm.root / node / "gpus.json.journal") for node in slurm.nodes}
    slots, wrong = records.slots(found, journals)
    return wrong + records.overlaps(slots)


def test_a_suspended_job_keeps_its_instances(slurm: RmsCluster) -> None:
    first, other = slurm.users
    job = slurm.sbatch(WORK, "--gres=mig:3g:2", "-wn1", user=first)
    running(slurm, job)
    slurm.run("scontrol", "suspend", str(job))
    state(slurm, job, "SUSPENDED")
    small = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:1g", "-wn1", user=other)
    state(slurm, small, "COMPLETED")  # beside it
    large = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:7g:2", "-xn2", user=other)
    slurm.wait(lambda: slurm.job(large)["Reason"] not in ("None", "Priority"), 60, "it waits")
    assert slurm.job(large)["JobState"] == "PENDING" and slurm.job(job)["JobState"] == "SUSPENDED"
    slurm.run("scontrol", "resume", str(job))
    go_on(slurm)
    state(slurm, large, "COMPLETED")
    text = (first.work / f"slurm-{job}.out").read_text().split()
    assert text[text.index("now") + 1] == text[4], "the same after as before"
    assert faults(slurm, job, small, large) == []


def test_each_task_has_an_instance(slurm: RmsCluster) -> None:
    user = slurm.users[0]
    short = slurm.run("srun", "-n4", "--gres=mig:1g:4", "true", user=user, check=False)  # srun's step would find no 1g
    assert short.returncode and "srun needs the full form, --gres=mig:1g.10gb:4" in short.stderr
    done = slurm.run("srun", "-n4", "--gres=mig:1g.10gb:4", "sh", "-c", SHOW, user=user, timeout=90)
    seen = dict(line.split() for line in done.stdout.splitlines())
    assert len(seen) == 4 and len(set(seen.values())) == 4 and all("," not in uuid for uuid in seen.values())


@pytest.mark.parametrize("command", [("sbatch", "--wrap=true"), ("salloc", "true"), ("srun", "true")])
def test_a_job_on_several_nodes_is_refused_at_submit(slurm: RmsCluster, command: tuple[str, str]) -> None:
    program, more = command
    done = slurm.run(program, "-N2", "--gres=mig:1g.10gb:1", more, user=slurm.users[0], check=False)
    assert done.returncode and "a job with mig runs on one node" in done.stderr
    assert not slurm.queue()


def test_an_exclusive_job_has_what_it_asked_for_and_nobody_else_is_there(slurm: RmsCluster) -> None:
    job = slurm.sbatch(WORK, "--gres=mig:2g", "--exclusive", "-xn2", user=slurm.users[0])
    running(slurm, job)
    other = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:1g", "-xn2", user=slurm.users[1])
    slurm.wait(lambda: slurm.job(other)["Reason"] not in ("None", "Priority"), 60, "it waits")
    go_on(slurm)
    state(slurm, other, "COMPLETED")
    assert faults(slurm, job, other) == []
    (record,) = records.read(slurm.users[0].work / f"slurm-{job}.out")
    assert len(record.uuids) == 1


def test_a_reservation(slurm: RmsCluster) -> None:
    mine, others = slurm.users
    slurm.run("scontrol", "create", "reservation", "ReservationName=ours", f"Users={mine.name}", "StartTime=now",
              "Duration=60", "Nodes=n1")  # fmt: skip
    try:
        inside = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:7g:2", "--reservation=ours", user=mine)
        outside = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:1g", "-xn2", user=others)
        assert state(slurm, inside, "COMPLETED")["NodeList"] == "n1"
        assert slurm.job(outside)["JobState"] == "PENDING"
    finally:
        slurm.wait(lambda: all("COMPLETING" not in line for line in slurm.queue()), 60, "its Epilog is over")
        slurm.run("scontrol", "delete", "ReservationName=ours")
    state(slurm, outside, "COMPLETED")
    assert faults(slurm, inside, outside) == []


@pytest.mark.parametrize(
    "options", [["--constraint=ib"], ["--constraint=ib|old"], ["-wn2"], ["-xn1"], ["--comment=a b;c"]]
)
def test_what_users_wish_for_besides(slurm: RmsCluster, options: list[str]) -> None:
    job = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:2g", *options, user=slurm.users[0])
    done = state(slurm, job, "COMPLETED")
    if options[0] in ("-wn2", "-xn1"):
        assert done["NodeList"] == "n2"
    if "--comment" in options[0]:
        assert done["Comment"].endswith(";a b;c")
    assert faults(slurm, job) == []


def test_a_job_that_may_preempt_does(slurm: RmsCluster) -> None:
    victims = [slurm.sbatch(WORK, "--gres=mig:7g:2", user=slurm.users[1]) for _ in slurm.nodes]
    running(slurm, *victims)
    polite = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:1g", "--partition=polite", user=slurm.users[0])
    above = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:7g", "--partition=high", user=slurm.users[0])
    state(slurm, above, "COMPLETED")
    slurm.wait(lambda: sorted(slurm.job(v)["Restarts"] for v in victims) == ["0", "1"], 60, "one had to go")
    go_on(slurm)
    for job in (polite, *victims):  # those who have no place in the gate wait for it
        state(slurm, job, "COMPLETED", timeout=120)
    assert faults(slurm, above, polite, *victims) == []


def test_a_job_that_may_preempt_by_cancelling_does(slurm: RmsCluster) -> None:
    """The Epilog of the one that is cancelled makes the room, and what is misplaced meanwhile is counted apart."""
    victims = [slurm.sbatch(WORK, "--gres=mig:7g:2", "--partition=scrap", user=slurm.users[1]) for _ in slurm.nodes]
    running(slurm, *victims)
    above = slurm.sbatch(records.script("sleep 0.1"), "--gres=mig:7g", "--partition=high", user=slurm.users[0])
    state(slurm, above, "COMPLETED")
    assert sorted(slurm.job(v)["JobState"] for v in victims) == ["PREEMPTED", "RUNNING"]
    go_on(slurm)
    (left,) = [v for v in victims if slurm.job(v)["JobState"] != "PREEMPTED"]
    state(slurm, left, "COMPLETED")
    assert faults(slurm, above, left) == []
    lines = [line for node in slurm.nodes for line in (slurm.root / node / "audit.jsonl").read_text().splitlines()]
    misplaced = [entry for entry in map(json.loads, lines) if entry["event"] == "misplaced"]
    assert not any(entry["named"] for entry in misplaced)
    assert {entry["run"][1] for entry in misplaced} <= {above}, "only one that goes without a name"


def test_nobody_is_preempted_by_being_suspended(slurm_root: Path) -> None:
    root = slurm_root.with_name("gang")
    with rms_cluster(root, nodes=1, admission="features", preempting=["high"], create=0.02, destroy=0.02,
                     cred_expire=5, extra_conf=GANG) as gang:  # fmt: skip
        victim = gang.sbatch(WORK, "--gres=mig:7g:2", user=gang.users[1])
        running(gang, victim)
        above = gang.sbatch(records.script("sleep 0.1"), "--gres=mig:7g", "--partition=high", user=gang.users[0])
        gang.wait(lambda: gang.job(above)["Reason"] == "Resources", 60, "it waits")
        assert gang.job(victim)["JobState"] == "RUNNING"
        go_on(gang)
        state(gang, above, "COMPLETED")
        assert gang.job(victim)["SuspendTime"] == "None" and faults(gang, victim, above) == []
