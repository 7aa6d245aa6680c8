"""A real Slurm in trouble: processes killed in the worst moments, a slurmctld that goes away, users who interfere.

Never a job without its instance, a lost or stuck job, an instance that nobody gives back, or a node that does not
come back.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import records
from rms_cluster import rms_cluster, waiting_prologs
from throwaway import Cluster

pytestmark = pytest.mark.slurm

SHOW = 'echo "ran ${CUDA_VISIBLE_DEVICES-unset}"'
CREATE = 2.0  # seconds that an instance takes: long enough to be hit by a signal
LONG = 45.0  # where what is to be hit must still be at work on a machine that stands still for a while
WAIT = 2  # seconds that a Prolog waits for room where it can't requeue


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[Cluster]:
    """One node with two GPUs. Credentials live 5 s, the least that Slurm takes: so soon is a requeued job back."""
    with rms_cluster(slurm_root, nodes=1, create=CREATE, destroy=0.02, settings=f"interactive_wait_seconds = {WAIT}",
                     cred_expire=5) as cluster:  # fmt: skip
        yield cluster


@pytest.fixture(autouse=True)
def healthy(slurm: Cluster) -> Iterator[None]:
    """After each test the node is idle, and whatever ran has given everything back."""
    yield
    slurm.run("scancel", *(f"--user={user.name}" for user in slurm.users), check=False)
    for user in slurm.users:
        slurm.run("scancel", f"--user={user.name}", check=False)
    slurm.wait(lambda: not slurm.queue(), 60, "every job is over")
    node = slurm.node_states()["n1"]
    if node.reason:  # or all tests after this one would fail with it
        slurm.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    assert node.state in ("idle", "planned") and node.reason == ""
    assert busy(slurm) == []


def busy(slurm: Cluster) -> list[str]:
    """The runs that hold something."""
    path = slurm.root / "n1" / "state" / "state.json"
    allocations = json.loads(path.read_text())["state"]["allocations"] if path.exists() else []
    return [f"{a['run'][1]}.{a['run'][2]}" for a in allocations]


def log(slurm: Cluster) -> str:
    path = slurm.root / "n1" / "hooks.log"
    return path.read_text() if path.exists() else ""


def output(slurm: Cluster, job: int | str) -> str:
    return (slurm.users[0].work / f"slurm-{job}.out").read_text()


def processes(slurm: Cluster, *words: str) -> list[int]:
    """Processes of the cluster with these words in their command line and environment."""
    found = []
    for pid in slurm.processes():
        with contextlib.suppress(OSError):
            told = b"\0".join(Path(f"/proc/{pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
            if all(word in f"{told.replace(bytes(1), b' ').decode(errors='replace')} " for word in words):
                found.append(pid)
    return found


def kill(slurm: Cluster, *words: str, jobs: Iterable[int] = ()) -> None:
    """SIGKILL to what has these words, for each job, as soon as it is there."""
    found = []
    for job in jobs or [0]:
        more = (*words, f"SLURM_JOB_ID={job} ") if job else words
        slurm.wait(lambda more=more: bool(processes(slurm, *more)), 60, f"to kill: {more}")  # type: ignore[misc]
        found += processes(slurm, *more)
    for pid in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def drained(slurm: Cluster) -> str:
    """The reason, once the node is drained and its hooks have ended; the node is resumed."""
    slurm.wait(lambda: slurm.node_states()["n1"].state.startswith("drain"), 60, "drained")
    slurm.wait(lambda: not any("COMPLETING" in line for line in slurm.queue()), 60, "its Epilogs are over")
    reason = slurm.node_states()["n1"].reason
    slurm.run("scontrol", "update", "NodeName=n1", "State=RESUME")
    return reason


def starting(slurm: Cluster, *requests: str, create: float = CREATE) -> list[int]:
    """Jobs whose Prologs are at work, all at once. What follows a request is another option."""
    jobs = []
    config = slurm.etc / "rms.toml"
    text = config.read_text()
    with waiting_prologs(slurm):
        for request in requests:
            gres, *options = request.split()
            jobs.append(slurm.sbatch(SHOW, f"--gres=mig:{gres}", *options, user=slurm.users[0]))
        for job in jobs:
            slurm.wait(lambda job=job: slurm.job(job)["JobState"] == "RUNNING", 60, "its Prolog has begun")  # type: ignore[misc]
        config.write_text(text.replace(f"create_seconds = {CREATE}", f"create_seconds = {create}"))
    try:
        slurm.wait(lambda: {f"{job}.0" for job in jobs} <= set(busy(slurm)), 60, "their Prologs are at work")
    finally:
        config.write_text(text)  # what is at work has read it
    return jobs


def fill(slurm: Cluster, seconds: float) -> None:
    """A job of the second user that leaves no place for two 3g, but slices that add up to them."""
    job = slurm.sbatch(f"sleep {seconds}", "--gres=mig:2g:4", user=slurm.users[1])
    slurm.wait(lambda: f"job {job}.0: granted" in log(slurm), 60, "it runs")


def ran_once(slurm: Cluster, job: int | str) -> bool:
    """Whether the job is over, and its script ran exactly once, with an instance."""
    assert slurm.job(job)["JobState"] == "COMPLETED"
    text = output(slurm, job)
    return text.count("ran ") == text.count("ran MIG-") == 1


def test_prologs_are_killed(slurm: Cluster) -> None:
    """Where the Python dies, the shell drains the node and requeues. Where both do, Slurm drains, and holds the job."""
    one, two, three = starting(slurm, "4g:1", "1g:2 --no-requeue", "2g:1", create=LONG)
    kill(slurm, "slurm.hook prolog", jobs=[one, two])
    kill(slurm, "prolog", jobs=[three])
    slurm.wait(lambda: len([line for line in slurm.queue() if " PENDING " in line]) == 3, 60, "back, each drained it")
    drained(slurm)
    slurm.run("scontrol", "release", str(three), user=slurm.users[0])
    slurm.wait_all(120)
    assert all(ran_once(slurm, job) for job in (one, two, three))
    assert [slurm.job(job)["Requeue"] for job in (one, two)] == ["1", "0"]


def test_the_epilog_s_python_is_killed(slurm: Cluster) -> None:
    """Nobody will ever run that Epilog again: the next job's Prolog does its work."""
    epilog = slurm.etc / "epilog"
    text = epilog.read_text()
    (job,) = starting(slurm, "1g.20gb")
    try:
        # It dies before it has done anything.
        epilog.write_text(text.replace(" -I -m slurm.hook", " -I -c 'import os; os.kill(os.getpid(), 9)'"))
        assert drained(slurm).startswith("rms: epilog: ")
    finally:
        epilog.write_text(text)
    assert busy(slurm) == [f"{job}.0"]
    job = slurm.sbatch(SHOW, "--gres=mig:7g:2", user=slurm.users[0])
    slurm.wait_all(120)
    assert ran_once(slurm, job) and "no room" not in log(slurm).rpartition(f"job {job}.0")[2]


def test_users_interfere_with_the_prolog(slurm: Cluster) -> None:
    cancelled, requeued, held = starting(slurm, "1g.20gb:2", "1g.20gb:3", "1g:2")
    slurm.run("scancel", str(cancelled), user=slurm.users[0])
    slurm.run("scontrol", "requeue", str(requeued), user=slurm.users[0])
    slurm.run("scontrol", "requeuehold", str(held), user=slurm.users[0])
    slurm.wait(lambda: slurm.job(held)["JobState"] == "PENDING", 60, "held")
    slurm.run("scontrol", "release", str(held), user=slurm.users[0])
    slurm.wait_all(120)
    assert slurm.job(cancelled)["JobState"] == "CANCELLED"
    assert not (slurm.users[0].work / f"slurm-{cancelled}.out").exists()
    assert ran_once(slurm, requeued) and ran_once(slurm, held)


def test_slurmd_is_killed(slurm: Cluster) -> None:
    """What runs goes on. A Prolog is forgotten by the next slurmd: without ours its job would be in it for ever."""
    script = f"{SHOW}; sleep 3"
    jobs = [slurm.sbatch(script, "--gres=mig:1g", user=slurm.users[0]) for _ in range(2)]
    slurm.wait(lambda: all(f"job {job}.0: granted" in log(slurm) for job in jobs), 60, "both run")
    jobs += starting(slurm, "7g")
    slurm.restart_slurmd("n1", signal.SIGKILL)
    slurm.wait_all(120)
    assert all(ran_once(slurm, job) for job in jobs)


def test_slurmd_and_the_prolog_are_killed(slurm: Cluster) -> None:
    """Nobody would ever start or end that job: `rms reconcile`, which the health check runs, puts it back."""
    (job,) = starting(slurm, "1g.10gb+me", create=LONG)  # there is no idle one of these: its Prolog has to make it
    os.kill(int((slurm.root / "run" / "n1.pid").read_text()), signal.SIGSTOP)  # it must not see the Prolog end
    kill(slurm, "prolog", jobs=[job])  # the shell and its Python
    slurm.restart_slurmd("n1", signal.SIGKILL)
    reconcile = ["env", f"RMS_CONFIG={slurm.etc}/rms.toml", "SLURMD_NODENAME=n1", sys.executable, "-m", "rms.cli"]
    reconcile += ["reconcile", "--slurm-conf", f"{slurm.etc}/slurm.conf"]
    assert slurm.job(job)["JobState"] == "RUNNING" and slurm.job(job)["Reason"] == "Prolog"
    slurm.wait(lambda: f"job {job} is in a Prolog" in slurm.run(*reconcile).stdout, 60, "it is found")
    slurm.wait_all(120)
    assert ran_once(slurm, job)


def test_slurmctld_is_away_during_a_refusal(slurm: Cluster) -> None:
    """The Prolog waits until slurmctld can be told, longer than it would wait for room."""
    fill(slurm, 100)
    saved = slurm.root / "state" / "job_state"
    try:
        with waiting_prologs(slurm) as let_go:
            job = slurm.sbatch(SHOW, "--gres=mig:3g:2", user=slurm.users[0])
            slurm.wait(lambda: slurm.job(job)["JobState"] == "RUNNING", 60, "its Prolog has begun")
            # A slurmctld that has forgotten the job is another story: it saves its state some seconds after a change.
            began = time.time()
            slurm.sbatch("true", "--hold", user=slurm.users[0])
            slurm.wait(lambda: saved.exists() and saved.stat().st_mtime > began, 60, "saved")
            slurm.stop_daemon("slurmctld", signal.SIGKILL)
            let_go()
            slurm.wait(lambda: "waiting for slurmctld" in log(slurm), 60, "the Prolog has noticed")
            time.sleep(2 * WAIT)
    finally:
        if not slurm._alive("slurmctld"):
            slurm.start_daemon("slurmctld")
    slurm.wait(lambda: f"job {job}.0: no room for 3g.40gb:2 now; requeued" in log(slurm), 60, "requeued")
    slurm.wait(lambda: slurm.job(job)["JobState"] == "PENDING", 60, "back in the queue")
    assert slurm.job(job)["Reason"] == "BeginTime" and slurm.node_states()["n1"].reason == ""


def test_variables_do_not_fool_the_task_prolog(slurm: Cluster) -> None:
    """A job that an array's task submitted has that task's variables: to go by them would kill the running task."""
    work = slurm.users[0].work
    inner = f"sbatch --parsable --hold --gres=mig:1g --output=slurm-%j.out --wrap '{SHOW}' >inner"
    inner += f"; while [ ! -e go ]; do sleep 0.2; done; {SHOW}"
    array = slurm.sbatch(inner, "--array=3", "--gres=mig:1g", user=slurm.users[0])
    slurm.wait(lambda: (work / "inner").exists() and (work / "inner").read_text().endswith("\n"), 60, "submitted")
    job = int((work / "inner").read_text())
    prolog = slurm.etc / "prolog"
    text = prolog.read_text()
    try:  # what the TaskProlog meets where Slurm leaves the Prolog out
        prolog.write_text(text.replace('[ "$word" = none ] && exit 0', "exit 0"))
        slurm.run("scontrol", "release", str(job), user=slurm.users[0])
        slurm.wait(lambda: slurm.job(job)["Restarts"] == "1", 60, "sent back")
    finally:
        prolog.write_text(text)
    # Nor does what users set to shape their own squeue.
    task = slurm.job(f"{array}_3")["JobId"]
    marker = slurm.root / "n1" / "run" / "jobs" / task
    granted = marker.read_text()
    marker.unlink()
    for name in ("SQUEUE_PARTITION", "SQUEUE_NAMES", "SLURM_CLUSTERS"):
        step = ("srun", f"--jobid={task}", "--overlap", f"--export=ALL,{name}=other", "echo", "step ran")
        done = slurm.run(*step, user=slurm.users[0], check=False)
        assert done.returncode != 0 and "no MIG instance" in done.stdout and "step ran" not in done.stdout
    marker.write_text(granted)
    (work / "go").touch()
    slurm.wait_all(120)
    assert slurm.job(f"{array}_3")["Restarts"] == "0" and slurm.job(f"{array}_3")["JobState"] == "COMPLETED"
    assert output(slurm, job).count("ran MIG-") == 1


def test_a_storm(slurm: Cluster) -> None:
    """Every now and then a hook's Python is killed; the administrators resume the node, and that is all they do."""
    chance = random.Random(2)
    requests = ["1g", "1g:2", "2g", "3g", "3g:2", "4g", "7g", "2g:1,mig:1g:1", ""]
    mig = {}
    for i in range(14):
        request = chance.choice(requests)
        options = [f"--gres=mig:{request}"] if request else []
        options += ["--no-requeue"] if chance.random() < 0.3 else []
        script = records.script(f"sleep {chance.uniform(0.1, 0.8):.2f}")
        mig[slurm.sbatch(script, *options, "--open-mode=append", user=slurm.users[i % 2])] = bool(request)
    end = time.monotonic() + 6
    killed: Counter[str] = Counter()
    while time.monotonic() < end:
        for verb in ("prolog", "epilog"):
            for pid in processes(slurm, f"slurm.hook {verb}"):
                if chance.random() < 0.3:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                    killed[verb] += 1
        resume(slurm)
        time.sleep(0.1)
    until = time.monotonic() + 80
    while slurm.queue() and time.monotonic() < until:
        resume(slurm)
        time.sleep(0.2)
    assert killed
    states = slurm.states()
    assert {job: states[str(job)] for job in mig if states[str(job)] != "COMPLETED"} == {}, slurm.queue()
    slurm.sbatch("true", "--gres=mig:1g", user=slurm.users[0])  # gives back what a killed Epilog has left
    slurm.wait_all(120)
    found = [r for job in mig for user in slurm.users for r in read(user.work / f"slurm-{job}.out")]
    assert Counter(r.job for r in found) == dict.fromkeys(mig, 1), "each script ran once"
    assert all(bool(r.uuids) == mig[r.job] for r in found)
    slots, faults = records.slots(found, {"n1": records.journal(slurm.root / "n1" / "gpus.json.journal")})
    assert faults == [] and records.overlaps(slots) == []


def resume(slurm: Cluster) -> None:
    """What an administrator does who has read the reason, once the hooks are over."""
    if slurm.node_states()["n1"].state.startswith("drained"):  # a star behind it: it does not respond just now
        slurm.run("scontrol", "update", "NodeName=n1", "State=RESUME", check=False)


def read(path: Path) -> list[records.Record]:
    return records.read(path) if path.exists() else []
