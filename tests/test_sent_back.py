"""Jobs that were sent back: remembered in their order, their room kept, woken when there is room for them."""

from __future__ import annotations

import re
import subprocess
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
from conftest import Node
from rms_cluster import RmsCluster, rms_cluster
from throwaway import PATH

from rms import demand, grant, sent_back
from rms.demand import Told
from rms.errors import NoRoomError
from rms.inventory import Run
from rms.sent_back import MOST, SentBack
from slurm import hook


def one(job: int, submit: int = 0, until: float = 100.0) -> SentBack:
    return SentBack(job, str(job), "3g.40gb:1", submit, 50, until)


def test_they_are_remembered_in_the_order_of_submission_and_not_for_ever(tmp_path: Path) -> None:
    assert sent_back.load(str(tmp_path), 0.0) == []
    sent_back.save(str(tmp_path), [one(3, 9), one(2, 5, until=10.0), one(1, 5)])
    assert [r.job for r in sent_back.load(str(tmp_path), 0.0)] == [1, 2, 3]
    assert [r.job for r in sent_back.load(str(tmp_path), 20.0)] == [1, 3]
    sent_back.save(str(tmp_path), [one(job) for job in range(MOST + 5)])
    assert len(sent_back.load(str(tmp_path), 0.0)) == MOST
    sent_back.save(str(tmp_path), [])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / sent_back.FILE).write_text("rubbish")
    assert sent_back.load(str(tmp_path), 0.0) == []


def test_room_is_kept_for_the_first_unless_the_queue_wants_other_room(tmp_path: Path) -> None:
    sent_back.save(str(tmp_path), [one(8, 9), one(7, 5)])
    told = demand.load(str(tmp_path), 0.0)
    assert told and (told.job, told.keep, len(told.waiting)) == (7, "3g.40gb:1", 2)
    demand.save(str(tmp_path), str(Told(100, 1, "7g.80gb:1")))
    told = demand.load(str(tmp_path), 0.0)
    assert told and (told.job, told.keep) == (1, "7g.80gb:1")
    assert demand.load(str(tmp_path), 200.0) is None


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_kept_for_one_that_was_sent_back_is_not_given_to_others(node: Node, kept: bool) -> None:
    node.acquire(1, "4g.40gb:1")
    node.acquire(2, "3g.40gb:1")  # beside it: the first GPU is full
    places = {node.acquire(job, "1g.10gb:1")[0].placement.start: job for job in range(3, 10)}
    for start, job in places.items():
        if start not in (2, 5):  # on the second GPU there is more room, but not for a 3g
            node.release(job)
    node.release(2)
    if kept:
        sent_back.save(node.config.state_dir, [SentBack(99, "99", "3g.40gb:1", 5, 50, time.time() + 60)])
    node.acquire(10, "1g.10gb:1")
    with nullcontext() if kept else pytest.raises(NoRoomError):
        node.acquire(99, "3g.40gb:1")


def test_who_has_come_waits_no_more(node: Node) -> None:
    sent_back.save(node.config.state_dir, [one(9, 5, time.time() + 60), one(8, 6, time.time() + 60)])
    come = hook.Hook("n1", Run("c", 9, 1), 1000, "rms1:3g.40gb:1;s=5;l=5;")
    grant.refuse(node.config.run_dir, come.run)  # as the shell part of the Prolog does first
    assert hook.prolog(come, node.config, "/nowhere", hook.Log("prolog")) == 0
    assert [r.job for r in sent_back.load(node.config.state_dir, time.time())] == [8]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Slurm's commands were called with: squeue has forgotten job 8, job 7 is held, 9 waits for its start time."""
    calls = tmp_path / "calls"
    log = f'echo "${{0##*/}} $*" >>{calls}\n'
    said = (
        'case "$*" in *=8*) echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1 ;;\n'
        "*=9*) echo PENDING 10 50 ;; *) sleep 0.1; echo PENDING 0 50 ;; esac\n"
    )
    for name, does in (("squeue", log + said), ("scontrol", log)):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr("slurm.slurmctld.PATH", f"{tmp_path}:/usr/bin:/bin")
    return calls


def epilog(node: Node) -> list[int]:
    """The Epilog of a job that had an instance. Who is remembered after it."""
    node.acquire(1, "1g.10gb:1")
    ended = hook.Hook("n1", Run("cluster", 1, 0), 1000, "rms1:1g.10gb:1;s=5;l=5;")
    assert hook.epilog(ended, node.config, "/nowhere", hook.Log("epilog")) == 0
    return [one.job for one in sent_back.load(node.config.state_dir, time.time())]


def test_one_that_slurmctld_has_forgotten_keeps_nobody_from_being_woken(node: Node, asked: Path) -> None:
    sent_back.save(node.config.state_dir, [one(job, job, time.time() + 60) for job in (7, 8, 9)])
    assert epilog(node) == [9]
    assert asked.read_text().splitlines()[-1] == "scontrol update JobId=9 StartTime=now"


def test_an_epilog_does_not_ask_about_them_for_long(node: Node, asked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hook, "WAKE_SECONDS", 1.0)
    sent_back.save(node.config.state_dir, [one(job, job, time.time() + 60) for job in range(100, 100 + MOST)])
    left = epilog(node)
    assert 0 < len(left) < MOST and len(asked.read_text().splitlines()) == MOST - len(left)


def version() -> tuple[int, ...]:
    command = ["slurmctld", "-V"]
    shown = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in re.findall(r"\d+", shown)[:3])


@pytest.mark.slurm
def test_the_epilog_that_makes_room_wakes_who_was_sent_back(slurm_root: Path) -> None:
    if version() < (23, 2, 7):
        pytest.skip("before Slurm 23.02.7 a job may not come back before its credential has expired")
    with rms_cluster(slurm_root, nodes=1, create=0.02, destroy=0.02, cred_expire=5) as slurm:
        long = slurm.sbatch("sleep 600", "--gres=mig:2g:4", user=slurm.users[1])
        slurm.wait(lambda: f"job {long}.0: granted" in log(slurm), 60, "it runs")
        jobs = [slurm.sbatch("true", "--gres=mig:3g:2", user=slurm.users[0]) for _ in range(3)]
        for job in jobs:
            slurm.wait(lambda job=job: f"job {job}.0: no room" in log(slurm), 60, "sent back")
            slurm.wait(lambda job=job: f'"{job}"' in remembered(slurm), 60, "remembered")
        slurm.run("scontrol", "update", f"jobid={jobs[0]}", "StartTime=now+3600", user=slurm.users[0])
        slurm.run("scontrol", "hold", str(jobs[1]), user=slurm.users[0])
        began = time.monotonic()
        slurm.run("scancel", str(long))
        slurm.wait(lambda: slurm.job(jobs[2])["JobState"] == "COMPLETED", 25, "woken, and not after 30 s")
        assert time.monotonic() - began < 25 and f"woke job {jobs[2]}" in log(slurm)
        assert slurm.job(jobs[0])["JobState"] == slurm.job(jobs[1])["JobState"] == "PENDING", "as their user has set it"
        slurm.wait(lambda: remembered(slurm) == "", 30, "nobody is remembered any more")


def log(slurm: RmsCluster) -> str:
    path = slurm.root / "n1" / "hooks.log"
    return path.read_text() if path.exists() else ""


def remembered(slurm: RmsCluster) -> str:
    path = slurm.root / "n1" / "state" / sent_back.FILE
    return path.read_text() if path.exists() else ""
