"""Nodes that tell a real slurmctld what fits: nothing is misplaced, and nothing else of the node is touched."""

from __future__ import annotations

import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import records
from rms_cluster import RmsCluster, rms_cluster
from throwaway import Cluster

from rms.demand import Told

pytestmark = pytest.mark.slurm

PROFILES = ["1g", "2g", "3g", "4g", "7g"]
GPU = "NodeName=n[1-2],rmsfit Name=gpu Type=a100 File=/dev/null,/dev/zero\n"


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[RmsCluster]:
    """Two nodes with two GPUs each; one has a feature of its own, both have whole GPUs that are none of RMS's."""
    with rms_cluster(slurm_root, admission="features", create=0.02, destroy=0.02, cred_expire=5,
                     files={"gres.conf": GPU}, others="gpu:a100:2", features="ib,old") as cluster:  # fmt: skip
        yield cluster


@pytest.fixture(autouse=True)
def healthy(slurm: RmsCluster) -> Iterator[None]:
    """After each test both nodes are idle, not drained, and say that everything fits."""
    yield
    slurm.cancel_all()
    slurm.wait_all(60)
    slurm.wait(lambda: {tuple(s) for s in slurm.node_states().values()} == {("idle", "")}, 30, "both are idle")
    slurm.wait(lambda: all("rms_7g.80gb_2" in features(slurm, node) for node in slurm.nodes), 60, "all fits again")


def record(slurm: RmsCluster, node: str) -> dict[str, str]:
    lines = slurm.run("scontrol", "show", "node", node).stdout.splitlines()
    return dict(line.strip().split("=", 1) for line in lines if "=" in line)


def features(slurm: RmsCluster, node: str) -> list[str]:
    return record(slurm, node)["ActiveFeatures"].split(",")


def hooks(slurm: RmsCluster) -> str:
    logs = [slurm.root / node / "hooks.log" for node in slurm.nodes]
    return "".join(log.read_text() for log in logs if log.exists())


def audit(slurm: RmsCluster, event: str) -> list[dict[str, object]]:
    lines = [line for node in slurm.nodes for line in (slurm.root / node / "audit.jsonl").read_text().splitlines()]
    return [entry for entry in map(json.loads, lines) if entry["event"] == event]


def running(slurm: RmsCluster, job: int) -> None:
    slurm.wait(lambda: slurm.job(job)["JobState"] == "RUNNING", 60, f"job {job} runs")


def test_nothing_is_misplaced_under_overload(slurm: RmsCluster) -> None:
    chance = random.Random(7)
    began = len(audit(slurm, "granted")) if (slurm.root / "n1" / "audit.jsonl").exists() else 0
    jobs = {}
    for number in range(36):
        gres = chance.choice([*PROFILES, "1g:2", "3g,mig:1g"])
        script = records.script(f"sleep {chance.uniform(1, 3):.1f}")
        job = slurm.sbatch(script, f"--gres=mig:{gres}", "--output=%j.out", user=slurm.users[number % 2])
        jobs[job] = slurm.users[number % 2].work / f"{job}.out"
    slurm.wait_all(240)
    assert Counter(slurm.states()[str(job)] for job in jobs) == {"COMPLETED": 36}
    assert audit(slurm, "refused") == []
    assert len(audit(slurm, "granted")) - began == 36
    found = [one for path in jobs.values() for one in records.read(path)]
    assert len(found) == 36
    journals = {node: records.journal(slurm.root / node / "gpus.json.journal") for node in slurm.nodes}
    slots, faults = records.slots(found, journals)
    assert faults == records.overlaps(slots) == []


def test_doctor_finds_slurm_as_it_must_be(slurm: RmsCluster) -> None:
    config = slurm.etc / "rms.toml"
    doctor = [sys.executable, "-m", "rms.cli", "doctor", "--json", "--node", "n1", "--config", str(config)]
    assert json.loads(slurm.run(*doctor).stdout)["slurm"] == []
    kept = config.read_text()
    try:
        config.write_text(kept.replace('admission = "features"', 'admission = "extra"'))
        done = slurm.run(*doctor, check=False)
    finally:
        config.write_text(kept)
    assert done.returncode == 6
    said = json.loads(done.stdout)["slurm"]
    assert any("extra_constraints" in text for text in said)
    assert any('rms_table.lua is made for admission = "features", rms.toml says "extra"' in text for text in said)
    for state, reason in (("DRAIN", ["Reason=maintenance"]), ("RESUME", [])):  # the node that is never there, too
        slurm.run("scontrol", "update", "NodeName=ALL", f"State={state}", *reason)
    (said,) = json.loads(slurm.run(*doctor, check=False).stdout)["slurm"]
    slurm.run(*said.partition("): ")[2].split())
    assert json.loads(slurm.run(*doctor).stdout)["slurm"] == []
    hook = slurm.etc / "task_prolog"
    hook.chmod(0o644)
    try:
        done = slurm.run(*doctor, check=False)
    finally:
        hook.chmod(0o755)
    assert done.returncode == 6
    (said,) = json.loads(done.stdout)["slurm"]
    assert f"TaskProlog is {hook}, which is not there or can't be run" in said


def test_the_node_that_is_never_there_must_be_at_a_switch(slurm_root: Path) -> None:
    tree = {"topology.conf": "SwitchName=one Nodes=n1\n"}
    with rms_cluster(slurm_root.with_name("tree"), nodes=1, admission="features", files=tree, create=0.02,
                     extra_conf="TopologyPlugin=topology/tree") as slurm:  # fmt: skip
        doctor = [sys.executable, "-m", "rms.cli", "doctor", "--json", "--node", "n1", "--config", slurm.config("n1")]
        assert json.loads(slurm.run(*doctor, check=False).stdout)["slurm"] == [
            "topology.conf: node rmsfit is at no switch: jobs that do not fit now may be refused"
        ]
        full = slurm.sbatch("sleep 600", "--gres=mig:7g:2", user=slurm.users[0])
        running(slurm, full)
        slurm.wait(lambda: "rms_" not in record(slurm, "n1")["ActiveFeatures"], 60, "it is full, and says so")
        one = ("sbatch", "--parsable", "--gres=mig:1g", "--wrap=true")
        if slurm.run("scontrol", "--version").stdout.startswith("slurm-wlm 22."):  # 26.05 takes it
            assert "configuration is not available" in slurm.run(*one, user=slurm.users[0], check=False).stderr
        (slurm.etc / "topology.conf").write_text("SwitchName=one Nodes=n1,rmsfit\n")
        slurm.stop_daemon("slurmctld")
        slurm.start_daemon("slurmctld")
        assert slurm.job(int(slurm.run(*one, user=slurm.users[0]).stdout))["JobState"] == "PENDING"


def test_small_jobs_start_together_where_all_of_them_fit(slurm: RmsCluster) -> None:
    array = slurm.sbatch("sleep 20", "--gres=mig:1g", "--array=1-14", user=slurm.users[0])
    slurm.wait(lambda: count(slurm) == 14, 60, "all run")
    starts = sorted(slurm.run("squeue", "-h", "-r", "-j", str(array), "-o", "%S").stdout.split())
    assert max(Counter(starts).values()) >= 4, f"in one pass of the scheduler: {starts}"


def test_what_is_kept_is_open_to_small_jobs_that_are_over_before_it_is_needed(slurm: RmsCluster) -> None:
    user = slurm.users[0]
    full = slurm.sbatch("sleep 300", "--gres=mig:7g:2", "--time=60", user=user)
    slurm.wait(lambda: count(slurm) == 1, 60, "a node is full")
    for spec in ("7g", "3g"):  # on the other one
        slurm.sbatch("sleep 300", f"--gres=mig:{spec}", "--time=30", user=user)
    slurm.wait(lambda: count(slurm) == 3, 60, "and a half of a GPU is left on the other")
    (node,) = {*slurm.nodes} - {slurm.job(full)["NodeList"]}
    slurm.run("scontrol", "update", f"NodeName={node}", f"Comment={Told(int(time.time()) + 170, 999, '7g.80gb:2')}")
    slurm.publish(node)
    late, soon = (slurm.sbatch("sleep 300", "--gres=mig:1g", f"--time={minutes}", user=user) for minutes in (11, 10))
    slurm.wait(lambda: slurm.job(soon)["JobState"] == "RUNNING", 60, "the one that is over soon starts")
    assert slurm.job(soon)["NodeList"] == node and slurm.job(late)["JobState"] == "PENDING"
    raised = slurm.sbatch("sleep 300", "--hold", "--gres=mig:1g", "--time=10", user=user)
    slurm.run("scontrol", "update", f"JobId={raised}", "TimeLimit=3-0", user=user)
    assert slurm.job(raised)["Features"] == slurm.job(late)["Features"], "it is not over soon any more"
    slurm.run("scontrol", "update", f"NodeName={node}", "Comment=")
    slurm.publish(node)
    slurm.wait(lambda: slurm.job(late)["JobState"] == "RUNNING", 60, "nothing is kept any more")


def count(slurm: RmsCluster) -> int:
    return sum(line.split()[1] == "RUNNING" for line in slurm.queue())


@pytest.mark.parametrize("interval", [600, 1])
def test_who_lacks_only_the_token_holds_up_those_behind_until_backfill(interval: int) -> None:
    """Slurm's own rule, with names and a token set by hand: the order of starts under load follows from it."""
    away = "NodeName=away NodeAddr=127.0.0.1 State=FUTURE CPUs=64 Gres=token:1 Features=a,b,c\n"
    scheduler = f"sched_interval=1,bf_interval={interval},batch_sched_delay=1"
    with Cluster(gres="token:1", extra_conf=away, scheduler=scheduler) as slurm:

        def publish(*names: str) -> None:
            for node, name in zip(slurm.nodes, names, strict=True):
                slurm.run(
                    "scontrol", "update", f"NodeName={node}", f"AvailableFeatures={name}", f"ActiveFeatures={name}"
                )

        def submit(name: str, work: str) -> int:
            return slurm.sbatch(work, f"--constraint={name}", "--gres=token:1", user=slurm.users[0])

        def started_by(job: int) -> str:
            slurm.wait(lambda: slurm.job(job)["JobState"] in ("RUNNING", "COMPLETED"), 60, f"job {job} starts")
            return slurm.job(job)["Scheduler"]

        publish("a", "b")
        started_by(submit("a", "sleep 600"))
        submit("c", "true")  # a name that is nowhere stops nobody
        if interval == 600:
            assert started_by(submit("b", "true")) == "Main"
        late, behind = submit("a", "true"), submit("b", "true")
        if interval == 1:
            assert started_by(behind) == "Backfill"
            assert slurm.job(late)["JobState"] == "PENDING"
            return
        time.sleep(3)
        assert [slurm.job(job)["Reason"] for job in (late, behind)] == ["Resources", "Priority"]
        publish("x", "b")
        assert started_by(behind) == "Main"


def test_while_an_epilog_runs_nothing_else_starts_on_the_node(tmp_path: Path) -> None:
    """Slurm's own rule, whatever the job asks for: so an Epilog has to be short."""
    tmp_path.chmod(0o755)
    epilog = tmp_path / "epilog"
    epilog.write_text(f"#!/bin/sh\nwhile [ -e {tmp_path}/slow ]; do sleep 0.1; done\n")
    epilog.chmod(0o755)
    with Cluster(nodes=1, hooks={"Epilog": epilog}) as slurm:
        running(slurm, slurm.sbatch("sleep 600", user=slurm.users[0]))
        (tmp_path / "slow").touch()
        ends = slurm.sbatch("true", user=slurm.users[0])
        slurm.wait(lambda: slurm.job(ends)["JobState"] == "COMPLETING", 60, "its Epilog runs")
        waits = slurm.sbatch("true", user=slurm.users[0])
        time.sleep(3)
        assert (slurm.job(waits)["JobState"], slurm.job(waits)["Reason"]) == ("PENDING", "Resources")
        (tmp_path / "slow").unlink()
        slurm.wait(lambda: slurm.job(waits)["JobState"] == "COMPLETED", 60, "it runs")


def test_what_is_not_ours_stays_as_slurm_conf_has_it(slurm: RmsCluster) -> None:
    before = record(slurm, "n1")
    whole = slurm.sbatch("sleep 600", "--gres=gpu:a100:1", "-wn1", user=slurm.users[1])
    running(slurm, whole)
    job = slurm.sbatch("sleep 600", "--gres=mig:7g", "-C", "ib|old", "-x", "n2", user=slurm.users[0])
    running(slurm, job)
    slurm.wait(lambda: "rms_7g.80gb_2" not in features(slurm, "n1"), 60, "published")
    after = record(slurm, "n1")
    assert [f for f in after["AvailableFeatures"].split(",") if not f.startswith("rms_")] == ["ib", "old"]
    assert [g for g in after["Gres"].split(",") if "migt" not in g] == [
        g for g in before["Gres"].split(",") if "migt" not in g
    ]
    assert "gpu:a100:2" in after["Gres"] and after["Gres"] != before["Gres"]
    # slurmd's own count is another one than what is published, with jobs that use it: no reason to drain the node.
    slurm.restart_slurmd("n1")
    slurm.wait(lambda: slurm.node_states()["n1"].state in ("mixed", "drained"), 30, "registered")
    time.sleep(1)
    assert tuple(slurm.node_states()["n1"]) == ("mixed", "")
    assert record(slurm, "n1")["Gres"] == after["Gres"]


def test_what_is_told_at_boot_before_slurmd_is_there_stays(slurm: RmsCluster) -> None:
    before, began = record(slurm, "n1"), started(slurm)
    slurm.stop_daemon("n1")
    try:
        stale = ("AvailableFeatures=ib,old,rms_1g.10gb_1", "ActiveFeatures=ib,old,rms_1g.10gb_1")
        slurm.run("scontrol", "update", "NodeName=n1", *stale)
        config = ("--config", f"{slurm.etc}/rms.toml")
        slurm.run(sys.executable, "-m", "rms.cli", "reconcile", "--node", "n1", *config, timeout=60)
    finally:
        slurm.start_daemon("n1")
    slurm.wait(lambda: started(slurm) != began, 60, "it has registered")
    for field in ("Gres", "ActiveFeatures", "AvailableFeatures"):
        assert record(slurm, "n1")[field] == before[field]


def started(slurm: RmsCluster) -> str:
    """When slurmd of n1 has started, as slurmctld knows it."""
    return slurm.run("scontrol", "show", "node", "n1").stdout.partition("SlurmdStartTime=")[2].split()[0]


def test_after_a_reconfigure_nothing_starts_until_the_node_has_spoken(slurm: RmsCluster) -> None:
    running(slurm, slurm.sbatch("sleep 600", "--gres=mig:2g", user=slurm.users[1]))
    slurm.wait(lambda: not all("rms_7g.80gb_2" in features(slurm, n) for n in slurm.nodes), 60, "published")
    slurm.run("scontrol", "reconfigure")
    slurm.wait(lambda: not any("rms_" in f for n in slurm.nodes for f in features(slurm, n)), 30, "forgotten")
    [busy] = [line.split()[-1] for line in slurm.run("squeue", "-h", "-o", "%N").stdout.splitlines()]
    jobs = [slurm.sbatch("true", "--gres=mig:1g", *where, user=slurm.users[0]) for where in ([], ["-w", busy])]
    time.sleep(4)
    for job in jobs:  # the second one without a name: the token alone stops it
        assert slurm.job(job)["JobState"] == "PENDING" and slurm.job(job)["Priority"] != "0"

    def ran() -> bool:
        slurm.publish()  # again and again, as the timer does: a slurmd that reports later has it forgotten anew
        return all(slurm.job(job)["JobState"] == "COMPLETED" for job in jobs)

    slurm.wait(ran, 60, "they ran")


def test_what_ends_while_slurmctld_is_away_is_published_later(slurm: RmsCluster) -> None:
    job = slurm.sbatch("sleep 600", "--gres=mig:7g:2", user=slurm.users[0])
    running(slurm, job)
    node = slurm.job(job)["NodeList"]
    slurm.wait(lambda: not any("rms_" in f for f in features(slurm, node)), 60, "nothing fits")
    comment = slurm.job(job)["Comment"]
    slurm.stop_daemon("slurmctld")
    try:
        told = {"SLURM_JOB_ID": str(job), "SLURM_JOB_UID": str(slurm.users[0].uid), "SLURM_JOB_COMMENT": comment,
                "SLURMD_NODENAME": node, "SLURM_CLUSTER_NAME": "throwaway"}  # fmt: skip
        began = time.monotonic()
        slurm.run(str(slurm.etc / "epilog"), env=told)  # with slurmctld away slurmd starts none: one that was under way
        assert time.monotonic() - began < 15
        assert "not published yet" in hooks(slurm)
    finally:
        slurm.start_daemon("slurmctld")
    # No timer runs here: it is the process that the Epilog has left.
    slurm.wait(lambda: "rms_7g.80gb_2" in features(slurm, node), 90, "published after all")
    slurm.publish()  # slurmctld has forgotten what the other node said


def test_a_job_for_a_certain_node_is_taken_while_that_has_no_room(slurm: RmsCluster) -> None:
    full = slurm.sbatch("sleep 6", "--gres=mig:7g:2", "-wn1", user=slurm.users[1])
    running(slurm, full)
    job = slurm.sbatch("true", "--gres=mig:3g", "-wn1", user=slurm.users[0])
    slurm.wait_all(90)
    assert slurm.job(job)["JobState"] == "COMPLETED"


def test_users_cannot_get_past_it(slurm: RmsCluster) -> None:
    user = slurm.users[0]
    full = [slurm.sbatch("sleep 600", "--gres=mig:7g:2", user=slurm.users[1]) for _ in slurm.nodes]
    for job in full:
        running(slurm, job)
    job = slurm.sbatch("true", "--gres=mig:3g", user=user)
    for change in ("features=ib", "features=", "gres=mig:3g.40gb:1", "comment=mine"):
        assert slurm.run("scontrol", "update", f"jobid={job}", change, user=user, check=False).returncode, change
    for options in (
        ("--gres=migt:job:1",),
        ("--gres=mig:1g,migt:job:1",),
        ("-C", "rms_1g.10gb_1"),
        ("--gres=mig:1g", "-w", "rmsfit"),
        ("--gres=mig:1g", "--prefer=ib"),
    ):
        done = slurm.run("sbatch", *options, "--wrap=true", user=user, check=False)
        assert done.returncode and "rms: " in done.stderr, options
    assert slurm.job(job)["JobState"] == "PENDING"
