"""What users may try on the path of a job, one test for each kind of attempt, as users, on a real Slurm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from rms_cluster import RmsCluster, rms_cluster

from rms import demand
from slurm.ask import Commands

pytestmark = pytest.mark.slurm

FORGED = "rms1:7g.80gb:2;s=1;l=1;"


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[RmsCluster]:
    """A node that tells slurmctld what fits, and is full."""
    limit = "PartitionName=main Nodes=ALL Default=YES State=UP MaxTime=60"
    with rms_cluster(slurm_root, nodes=1, admission="features", create=0.02, destroy=0.02, cred_expire=5,
                     features="ib", extra_conf=limit) as cluster:  # fmt: skip
        full = cluster.sbatch("sleep 600", "--gres=mig:7g:2", "--time=50", user=cluster.users[1])
        cluster.wait(lambda: cluster.job(full)["JobState"] == "RUNNING", 60, "the node is full")
        cluster.wait(lambda: "rms_" not in node(cluster)["ActiveFeatures"], 60, "it has said so")
        yield cluster


@pytest.fixture
def mine(slurm: RmsCluster) -> Iterator[int]:
    """A job of the first user that waits."""
    job = slurm.sbatch("echo ran", "--gres=mig:1g", "--time=5", "--comment=mine", user=slurm.users[0])
    yield job
    slurm.run("scancel", str(job))


def node(slurm: RmsCluster) -> dict[str, str]:
    lines = slurm.run("scontrol", "show", "node", "n1").stdout.splitlines()
    return dict(line.strip().split("=", 1) for line in lines if "=" in line)


def asked(slurm: RmsCluster, job: int) -> tuple[str | None, ...]:
    """All of a job that the gate and the Prolog go by."""
    found = slurm.job(job)
    return tuple(found.get(key) for key in ("Comment", "TresPerNode", "Features", "Extra", "NumNodes", "JobState"))


@pytest.mark.parametrize(
    "change",
    [
        "gres=mig:7g.80gb:1",
        "gres=",
        "gres=migt:job:1",
        "TresPerNode=gres:migc:1",
        "TresPerJob=gres:mig:1g.10gb:1",
        "features=ib",
        "features=",
        "features=ib|rms_7g.80gb_1",
        "comment=",
        f"comment={FORGED}",
        "NumNodes=2",
        "ReqNodeList=rmsfit",
        "NodeList=n1",
        "ReservationName=none",
        "AdminComment=rms1:7g.80gb:1;s=1;l=1;",
        "Priority=4294967290",
    ],
)
def test_a_job_that_waits_can_not_be_changed(slurm: RmsCluster, mine: int, change: str) -> None:
    before = asked(slurm, mine)
    done = slurm.run("scontrol", "update", f"jobid={mine}", change, user=slurm.users[0], check=False)
    assert done.returncode != 0, "it says so"
    assert asked(slurm, mine) == before


REFUSED = [
    ["--gres=migt:job:0,mig:1g:1"],
    ["--gres=migt:size:1"],
    ["--gres=migc:1"],
    ["--gres=mig:1g:1,migm:0"],
    ["--gres=gres:mig:9g:1"],
    ["--gres=mig"],
    ["--gres=mig:1"],
    ["--gres=mig:7g:3"],
    ["--gres=mig:1g:99999999999999999999"],
    ["--constraint=rms_7g.80gb_1"],
    ["--gres=mig:1g:1", "--constraint=rms_1g.10gb_1"],
    ["--gres=mig:1g:1", "--prefer=ib"],
    ["--gres=mig:1g:1", "--nodelist=rmsfit"],
    ["--nodelist=rmsfit"],
    ["--gres=mig:1g:1", "--nodes=2"],
    ["--gres=mig:1g:1", "--comment=" + "x" * 2000],
]
VARIABLES = {"--gres": "SBATCH_GRES", "--constraint": "SBATCH_CONSTRAINT"}
"""The other way to say it. (There is no variable for the rest.)"""


@pytest.mark.parametrize("options", REFUSED)
def test_what_is_refused_at_submission(slurm: RmsCluster, options: list[str]) -> None:
    before = set(slurm.states())

    def refused(*argv: str, lines: str = "", env: dict[str, str] | None = None) -> bool:
        text = f"#!/bin/sh\n{lines}echo ran\n"
        done = slurm.run("sbatch", *argv, user=slurm.users[0], input=text, env=env, check=False)
        return done.returncode != 0 and set(slurm.states()) == before

    assert refused(*options)
    assert refused(lines="".join(f"#SBATCH {option}\n" for option in options))
    pairs = [option.partition("=")[::2] for option in options]
    if all(name in VARIABLES for name, _ in pairs):
        assert refused(env={VARIABLES[name]: value for name, value in pairs})


def test_a_comment_alone_gives_nothing(slurm: RmsCluster) -> None:
    """The Prolog goes by the comment: one that was typed as ours must never reach it."""
    job = slurm.sbatch("echo got ${CUDA_VISIBLE_DEVICES-nothing}", f"--comment={FORGED}", user=slurm.users[0])
    slurm.wait(lambda: slurm.job(job)["JobState"] == "COMPLETED", 60, "it ran")
    assert (slurm.users[0].work / f"slurm-{job}.out").read_text() == "got nothing\n"
    assert "rms1" not in slurm.job(job).get("Comment", "")


def test_a_longer_time_limit_is_known_to_the_node(slurm: RmsCluster, mine: int) -> None:
    """Who is short may use room that is kept for others: the comment says how long the job may take."""
    user = slurm.users[0]
    before = slurm.job(mine)["Comment"]
    slurm.run("scontrol", "update", f"jobid={mine}", "TimeLimit=59", user=user)
    assert slurm.job(mine)["Comment"] == before.replace(";l=5;", ";l=59;")
    slurm.run(
        "scontrol", "update", f"jobid={mine}", "TimeLimit=7", f"comment={slurm.job(mine)['Comment']} too", user=user
    )
    assert slurm.job(mine)["Comment"] == before.replace(";l=5;", ";l=7;") + " too"


def test_the_node_is_not_the_users(slurm: RmsCluster, mine: int) -> None:
    before = node(slurm)
    told = "Comment=rms1:u=9999999999;j=1;k=7g.80gb:1;q=;"
    names = ("ActiveFeatures=rms_1g.10gb_1", "AvailableFeatures=rms_1g.10gb_1")
    for change in (told, "Gres=mig:7g.80gb:9", *names, "State=RESUME"):
        done = slurm.run("scontrol", "update", "NodeName=n1", change, user=slurm.users[0], check=False)
        assert done.returncode != 0, change
    for command in (["scontrol", "reconfigure"], ["scontrol", "create", "reservation", "Nodes=n1", "StartTime=now",
                    "Duration=9", "Users=games"], ["scontrol", "update", "NodeName=rmsfit", "State=IDLE"]):  # fmt: skip
        assert slurm.run(*command, user=slurm.users[0], check=False).returncode != 0, command
    same = ("Comment", "Gres", "ActiveFeatures", "AvailableFeatures", "State")
    assert {key: node(slurm).get(key) for key in same} == {key: before.get(key) for key in same}


def test_another_users_job_is_not_touched(slurm: RmsCluster, mine: int) -> None:
    other = slurm.users[1]
    before = asked(slurm, mine)
    (full,) = [job for job, state in slurm.states().items() if state == "RUNNING"]
    for job, thief in ((str(mine), other), (full, slurm.users[0])):
        verbs = [["scontrol", verb, job] for verb in ("requeue", "suspend", "hold")]
        change = ["scontrol", "update", f"jobid={job}", "comment=x"]
        for command in (*verbs, change, ["scancel", job], ["srun", f"--jobid={job}", "--overlap", "true"]):
            assert slurm.run(*command, user=thief, check=False, timeout=30).returncode != 0, command
    assert asked(slurm, mine) == before and slurm.states()[full] == "RUNNING"


def test_rms_has_no_file_that_a_user_can_write(slurm: RmsCluster) -> None:
    for directory in ("state", "run", "run/jobs"):
        place = slurm.root / "n1" / directory
        for command in (
            ["touch", f"{place}/planted"],
            ["ln", "-s", "/etc/shadow", f"{place}/999"],
            ["rm", "-rf", f"{place}/jobs"],
        ):
            slurm.run(*command, user=slurm.users[0], check=False)
        assert not (place / "planted").exists() and not (place / "999").is_symlink() and place.is_dir()
    assert slurm.run("cat", f"{slurm.root}/n1/state/state.json", user=slurm.users[0], check=False).returncode != 0


def test_a_comment_is_only_text_to_rms_watch(slurm: RmsCluster) -> None:
    """Whoever reads the queue reads what users typed: another job, or another field, must not come of it."""
    for text in ("a\nb", "\x1f" * 30, "|" * 30, "rms1:u=9999999999;j=1;k=7g.80gb:2;q=;", "\x1b[2J"):
        job = slurm.sbatch("echo ran", "--gres=mig:1g", "--hold", f"--comment={text}", user=slurm.users[0])
        queue = Commands(str(slurm.conf)).queue()
        assert {str(one.id) for one in queue} == set(slurm.states()) - {
            j for j, state in slurm.states().items() if state not in ("PENDING", "RUNNING")
        }
        (found,) = [one for one in queue if one.id == job]
        assert (found.ticket.request, found.state, found.priority) == ("1g.10gb:1", "PENDING", 0)
        slurm.run("scancel", str(job))
    assert demand.read(node(slurm).get("Comment", ""), 0) is None
