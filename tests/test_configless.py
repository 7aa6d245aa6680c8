"""A node without a slurm.conf of its own: slurmd fetches it from slurmctld, and the hooks go by what it has fetched."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from rms_cluster import RmsCluster, rms_cluster

from slurm import site

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[RmsCluster]:
    """One node, whose hooks name a slurm.conf that is not there."""
    options = {"create": 0.02, "destroy": 0.02, "extra_conf": "SlurmctldParameters=enable_configless"}
    cluster = rms_cluster(slurm_root, nodes=1, gpus=1, admission="features", **options)
    kind = site.kinds([("A100-80GB", 1, "n1")])
    made = site.files(kind, str(slurm_root / "etc" / "rms.toml"), "/nowhere/slurm.conf", "features")
    site.write({name: made[name] for name in site.HOOKS.values()}, str(slurm_root / "etc"))
    with cluster:
        cluster.go_configless("n1")
        yield cluster


def rms(slurm: RmsCluster, *arguments: str) -> str:
    """`rms` as on the node: in slurmd's /run."""
    here = ["nsenter", f"--target={slurm.pid('n1')}", "--mount", "--root", sys.executable, "-m", "rms.cli"]
    node = ["--config", slurm.config("n1"), "--node", "n1"]
    done = slurm.run(*here, *arguments, *node, env={"SLURM_CONF": "/nowhere/slurm.conf"}, check=False)
    return done.stdout + done.stderr


def output(slurm: RmsCluster, job: int) -> str:
    return (slurm.users[0].work / f"slurm-{job}.out").read_text()


def end_all(slurm: RmsCluster) -> None:
    """A job that is just being requeued outlives an scancel."""

    def over() -> bool:
        slurm.cancel_all()
        return not slurm.queue()

    slurm.wait(over, 60, "every job is over")


def test_jobs_have_their_instances_and_what_fits_is_published(slurm: RmsCluster) -> None:
    assert rms(slurm, "publish") == ""
    jobs = [slurm.sbatch("echo $CUDA_VISIBLE_DEVICES", "--gres=mig:4g", user=slurm.users[0]) for _ in range(3)]
    slurm.wait_all(60)
    assert all(output(slurm, job).startswith("MIG-") for job in jobs)
    assert "slurm.conf" not in rms(slurm, "doctor")


def test_no_room_and_no_prolog(slurm: RmsCluster) -> None:
    # With -w a job has no name, so that it is let in where it does not fit.
    slurm.sbatch("sleep 300", "--gres=mig:2g:2", user=slurm.users[0])
    slurm.wait(lambda: "RUNNING" in slurm.states().values(), 60, "it runs")
    back = slurm.sbatch("true", "--gres=mig:3g", "-w", "n1", user=slurm.users[0])
    slurm.wait(lambda: slurm.job(back)["Restarts"] == "1", 60, "sent back")
    end_all(slurm)
    # The TaskProlog asks slurmctld where it finds no file.
    job = slurm.sbatch("echo begun; sleep 300", "--gres=mig:1g", user=slurm.users[0])
    slurm.wait((slurm.users[0].work / f"slurm-{job}.out").exists, 60, "its script's TaskProlog is over")
    slurm.wait(lambda: "begun" in output(slurm, job), 60, "it runs")
    (slurm.root / "n1" / "run" / "jobs" / str(job)).unlink()
    step = slurm.run("srun", f"--jobid={job}", "--overlap", "true", user=slurm.users[0], check=False)
    assert "no Prolog ran for this run of the job, so it has no MIG instance" in step.stdout
    end_all(slurm)
    assert json.loads(rms(slurm, "show", "--json"))["allocations"] == []


@pytest.mark.parametrize("hook", ["prolog", "epilog"])
def test_a_broken_python_drains_the_node_with_the_reason(slurm: RmsCluster, hook: str) -> None:
    path = slurm.etc / hook
    text = path.read_text()
    try:
        path.write_text(text.replace(sys.executable, "/bin/false"))
        slurm.sbatch("true", "--gres=mig:1g", user=slurm.users[0])
        slurm.wait(lambda: "false failed with status 1" in slurm.node_states()["n1"].reason, 60, "drained")
    finally:
        path.write_text(text)
        end_all(slurm)
    rms(slurm, "reconcile")
    slurm.run("scontrol", "update", "NodeName=n1", "State=RESUME")
