"""A real Slurm whose daemons are away for long, whose node reboots, and whose clock jumps.

Never a job without its instance, nor an instance that nobody gives back; the node comes back by itself, and says what
fits. "Long" is longer than each time after which Slurm gives something up, and those are short here: a credential's
life and SlurmdTimeout are 5 s instead of 120 and 300.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import records
from rms_cluster import RmsCluster, rms_cluster, waiting_prologs

pytestmark = pytest.mark.slurm

LONG = 6
WORK = records.script("while [ ! -e go-on ]; do sleep 0.1; done; echo now $CUDA_VISIBLE_DEVICES")
"""A job that ends when its user says so."""


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[RmsCluster]:
    """One node with two GPUs, whose boot id is ours to change."""
    more = f"SlurmdTimeout=5\nRebootProgram={slurm_root}/etc/reboot\nSuspendProgram={slurm_root}/etc/suspend\n"
    more += f"ResumeProgram={slurm_root}/etc/resume\nSuspendTime=3600\nSuspendTimeout=1\nResumeTimeout=60\n"
    cluster = rms_cluster(slurm_root, nodes=1, admission="features", create=0.02, destroy=0.02, cred_expire=5,
                          settings=f'boot_id_file = "{slurm_root}/%n/boot_id"', extra_conf=more)  # fmt: skip
    (slurm_root / "n1" / "boot_id").write_text("first\n")
    for what, done in {"reboot": "rebooted", "suspend": "suspended", "resume": "resumed"}.items():
        (slurm_root / "etc" / what).write_text(f"#!/bin/sh\n: >{slurm_root}/{done}\n")
        (slurm_root / "etc" / what).chmod(0o755)
    with cluster:
        yield cluster


@pytest.fixture(autouse=True)
def healthy(slurm: RmsCluster) -> Iterator[None]:
    """After each test the node is idle, nobody has an instance, and everything fits."""
    for user in slurm.users:
        (user.work / "go-on").unlink(missing_ok=True)
    yield
    slurm.cancel_all()
    slurm.wait_all(60)
    slurm.wait(lambda: tuple(slurm.node_states()["n1"]) == ("idle", ""), 60, "the node is idle")
    assert holding(slurm) == []
    slurm.wait(lambda: "rms_7g.80gb_2" in slurm.run("scontrol", "show", "node", "n1").stdout, 60, "all fits")


def go_on(slurm: RmsCluster, *users: int) -> None:
    for user in users or (0, 1):
        (slurm.users[user].work / "go-on").touch()


def holding(slurm: RmsCluster) -> list[int]:
    """The jobs that have an instance."""
    state = json.loads((slurm.root / "n1" / "state" / "state.json").read_text())["state"]
    return sorted(a["run"][1] for a in state["allocations"])


def running(slurm: RmsCluster, gres: str, user: int = 0) -> int:
    """A job that has written its first line."""
    job = slurm.sbatch(WORK, f"--gres=mig:{gres}", user=slurm.users[user])
    output = slurm.users[user].work / f"slurm-{job}.out"
    slurm.wait(lambda: output.exists() and output.read_text().startswith("start"), 60, f"{job} runs")
    return job


@contextmanager
def in_prolog(slurm: RmsCluster, gres: str) -> Iterator[tuple[int, Callable[[], None]]]:
    """A job whose Prolog has begun and waits until it is let go on."""
    with waiting_prologs(slurm) as let_go:
        job = slurm.sbatch(WORK, f"--gres=mig:{gres}", user=slurm.users[0])
        slurm.wait(lambda: slurm.job(job)["JobState"] == "RUNNING", 60, "its Prolog has begun")
        yield job, let_go


def reconcile(slurm: RmsCluster) -> str:
    """What the health check and the unit at boot run."""
    words = ["-m", "rms.cli", "reconcile", "--config", f"{slurm.etc}/rms.toml", "--node", "n1"]
    return slurm.run(sys.executable, *words, "--slurm-conf", str(slurm.conf), timeout=60).stdout


def ran_once(slurm: RmsCluster, *jobs: int) -> None:
    """Each has run once, with the same instance from its first line to its last, and never had it with another one."""
    slurm.wait_all(120)
    assert {job: slurm.job(job)["JobState"] for job in jobs} == dict.fromkeys(jobs, "COMPLETED")
    outputs = [user.work / f"slurm-{job}.out" for user in slurm.users for job in jobs]
    found = [one for output in outputs if output.exists() for one in records.read(output)]
    assert sorted(one.job for one in found) == sorted(jobs) and all(one.uuids for one in found)
    slots, faults = records.slots(found, {"n1": records.journal(slurm.root / "n1" / "gpus.json.journal")})
    assert faults == records.overlaps(slots) == []


def test_slurmctld_is_down_for_long(slurm: RmsCluster) -> None:
    """One job ends meanwhile, one goes on, one was in its Prolog."""
    ends, goes_on = running(slurm, "3g", 0), running(slurm, "2g", 1)
    with in_prolog(slurm, "7g") as (begins, let):
        slurm.stop_daemon("slurmctld")
        let()
        go_on(slurm, 0)
        slurm.wait(lambda: begins in holding(slurm), 60, "the Prolog did its work")
        time.sleep(LONG)
        slurm.start_daemon("slurmctld")
    slurm.wait(lambda: holding(slurm) == [goes_on], 120, "the others have ended")
    go_on(slurm)
    ran_once(slurm, ends, goes_on, begins)


def test_munge_is_away(slurm: RmsCluster) -> None:
    """One job goes on, one was in its Prolog, which can't tell slurmctld what fits now."""
    goes_on = running(slurm, "2g", 1)
    with in_prolog(slurm, "7g") as (begins, let):
        slurm.stop_daemon("munged")
        try:
            let()
            slurm.wait(lambda: begins in holding(slurm), 60, "the Prolog did its work")
            time.sleep(3)  # one second more than Slurm's own attempts
        finally:
            slurm.start_daemon("munged")
    go_on(slurm)
    ran_once(slurm, goes_on, begins)


def test_scontrol_reboot(slurm: RmsCluster) -> None:
    before = running(slurm, "3g")
    slurm.run("scontrol", "reboot", "ASAP", "nextstate=RESUME", "n1")
    after = slurm.sbatch(WORK, "--gres=mig:7g:2", user=slurm.users[1])
    assert not (slurm.root / "rebooted").exists()
    go_on(slurm)
    slurm.wait((slurm.root / "rebooted").exists, 60, "slurmd is to reboot the node")
    slurm.stop_daemon("n1", signal.SIGKILL)
    boot(slurm, "second")
    ran_once(slurm, before, after)


def boot(slurm: RmsCluster, boot_id: str) -> None:
    """What happens on the node when it comes up again."""
    (slurm.root / "n1" / "boot_id").write_text(f"{boot_id}\n")
    shutil.rmtree(slurm.root / "n1" / "run")
    reconcile(slurm)  # rms-reconcile.service
    slurm.start_daemon("n1", options=["-b"])
    slurm.publish()  # rms-publish.timer


def test_a_node_that_sleeps_is_woken_by_a_job_that_fits_there(slurm: RmsCluster) -> None:
    """Power saving: what the node has told stays with slurmctld, and only an idle node is sent to sleep."""
    before = running(slurm, "3g")
    go_on(slurm)
    ran_once(slurm, before)
    slurm.run("scontrol", "update", "NodeName=n1", "State=POWER_DOWN")
    slurm.wait((slurm.root / "suspended").exists, 60, "slurmctld is to send the node to sleep")
    slurm.stop_daemon("n1")
    slurm.wait(lambda: "POWERED_DOWN" in slurm.run("scontrol", "show", "node", "n1").stdout, 60, "it sleeps")
    after = slurm.sbatch(WORK, "--gres=mig:7g:2", user=slurm.users[1])
    slurm.wait((slurm.root / "resumed").exists, 60, "slurmctld is to wake it")
    boot(slurm, "third")
    ran_once(slurm, before, after)


@pytest.mark.parametrize("seconds", [86400, -86400])
def test_the_clock_of_the_node_jumps(slurm: RmsCluster, seconds: int) -> None:
    """For the hooks: a job that began before ends, others begin and end meanwhile, and once it is set right."""
    jump = "import runpy, time, types, rms.simulated; "
    jump += "rms.simulated.time = types.SimpleNamespace(**vars(time)); "  # the journal is the judge's
    jump += f"now = time.time; time.time = lambda: now() + {seconds}; "
    jump += "runpy.run_module('slurm.hook', run_name='__main__', alter_sys=True)"
    hooks = {slurm.etc / name: (slurm.etc / name).read_text() for name in ("prolog", "epilog")}
    jobs = [running(slurm, "3g", 0)]
    try:
        for hook, text in hooks.items():
            changed = text.replace(" -I -m slurm.hook", f" -I -c {shlex.quote(jump)}")
            assert changed != text
            hook.write_text(changed)
        jobs.append(running(slurm, "2g", 1))
        go_on(slurm, 0)
        slurm.wait(lambda: holding(slurm) == jobs[1:], 60, "one has ended")
        jobs.append(slurm.sbatch(WORK, "--gres=mig:7g", user=slurm.users[0]))
        slurm.wait(lambda: slurm.job(jobs[-1])["JobState"] == "COMPLETED", 60, "another one ran")
    finally:
        for hook, text in hooks.items():
            hook.write_text(text)
    jobs.append(slurm.sbatch(WORK, "--gres=mig:4g:2", user=slurm.users[0]))
    go_on(slurm)
    ran_once(slurm, *jobs)
