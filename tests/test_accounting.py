"""What slurmdbd counts of MIG jobs: instances and slices, for limits, prices and `rms simulate`. On a real database.

Not part of `make newest`: slurmdbd 26.05 does not start with the MariaDB that Debian testing has beside it (11.8.9).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rms_cluster import RmsCluster, rms_cluster
from throwaway import PATH, free_ports

from policy import traces, transitions
from slurm import site

pytestmark = pytest.mark.slurm

PACKAGES = {"slurmdbd": "slurmdbd", "mariadbd": "mariadb-server-core", "my_print_defaults": "mariadb-client-core"}
TRES = ",".join(f"gres/mig:{p.name}" for p in site.kinds([("A100-80GB", 1, "n1")])[0].profiles)


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[RmsCluster]:
    """One node with one GPU. Accounting is switched on as on a site that has run without; both users have the QOS
    `small`, of half a GPU each."""
    if lacking := sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)}):
        message = f"no database here: apt-get install {' '.join(lacking)}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with rms_cluster(slurm_root, nodes=1, gpus=1, admission="features", create=0.02, destroy=0.02) as cluster:
        account(cluster)
        yield cluster


def account(slurm: RmsCluster) -> None:
    """Start a database and slurmdbd, and slurmctld anew with them. They end with the cluster."""
    data, mysql, munge = slurm.root / "database", f"{slurm.root}/mysql.sock", f"{slurm.root}/munge/s"
    subprocess.run(
        ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--user=root", "--skip-test-db",
         "--auth-root-authentication-method=normal"],
        env={"PATH": PATH}, check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    slurm.popen("mariadbd", "--no-defaults", f"--datadir={data}", "--user=root", f"--socket={mysql}",
                "--skip-networking", f"--log-error={slurm.log}/mariadbd.log")  # fmt: skip
    slurm.wait(lambda: Path(mysql).exists(), 60, "the database is there")
    port = next(free_ports())
    conf = slurm.etc / "slurmdbd.conf"
    conf.touch(mode=0o600)
    conf.write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={munge}\nDbdHost=localhost\nDbdAddr=127.0.0.1\nDbdPort={port}\n"
        f"SlurmUser=root\nStorageType=accounting_storage/mysql\nStorageHost=localhost\nStorageUser=root\n"
        f"StorageLoc=accounting\nLogFile={slurm.log}/slurmdbd.log\nPidFile={slurm.root}/run/slurmdbd.pid\n"
    )
    slurm.popen("slurmdbd", "-D", env={"MYSQL_UNIX_PORT": mysql})
    slurm.stop_daemon("slurmctld")
    with slurm.conf.open("a") as file:
        file.write(
            "AccountingStorageType=accounting_storage/slurmdbd\nAccountingStorageHost=127.0.0.1\n"
            f"AccountingStoragePort={port}\nAccountingStoragePass={munge}\nAccountingStorageEnforce=limits,qos\n"
            f"AccountingStorageTRES=gres/mig,{TRES},gres/migc,gres/migm\n"
        )
    text = slurm.conf.read_text()
    text = text.replace("AccountingStorageType=accounting_storage/none\n", "")
    slurm.conf.write_text(text.replace("PartitionName=main ", "PartitionName=main TRESBillingWeights=GRES/migm=10 "))
    slurm.wait(lambda: manage(slurm, "add", "cluster", "throwaway", check=False), 60, "slurmdbd answers")
    slurm.start_daemon("slurmctld")
    manage(slurm, "add", "qos", "small")
    manage(slurm, "modify", "qos", "small", "set", "MaxTRESPerUser=gres/migm=4")
    manage(slurm, "add", "account", "science")
    for user in slurm.users:
        manage(slurm, "add", "user", user.name, "account=science", "qos=normal,small")
    slurm.wait(lambda: slurm.node_states()["n1"].state == "idle", 60, "the node is idle")
    slurm.publish()  # slurmctld has forgotten what fits


def manage(slurm: RmsCluster, *words: str, check: bool = True) -> bool:
    """One change in the database."""
    return slurm.run("sacctmgr", "--immediate", *words, check=check).returncode == 0


def counted(slurm: RmsCluster, job: int) -> dict[str, str]:
    """What the database has of a job that is over."""
    ask = ["sacct", "--allusers", "--allocations", "--noheader", "--parsable2", f"--jobs={job}", "--format=AllocTRES"]
    slurm.wait(lambda: "migm" in slurm.run(*ask).stdout, 60, "slurmdbd has heard of the job")
    return dict(item.split("=") for item in slurm.run(*ask).stdout.strip().split(","))


def events(slurm: RmsCluster) -> list[str]:
    """What has happened to the node and to the cluster's sums, to slurmdbd's mind."""
    shown = slurm.run("sacctmgr", "--noheader", "--parsable2", "show", "event", "where", "all_clusters", "format=all")
    return shown.stdout.splitlines()


def test_instances_and_slices_are_counted_and_priced(slurm: RmsCluster) -> None:
    before = events(slurm)
    half = slurm.sbatch("sleep 1", "--gres=mig:3g", "--time=5", user=slurm.users[0])
    three = slurm.sbatch("sleep 1", "--gres=mig:1g:2,mig:1g+me:1", "--time=5", user=slurm.users[1])
    slurm.wait_all(60)
    found = counted(slurm, half)
    assert {key: found[key] for key in found if "gres" in key} == {
        "gres/mig": "1", "gres/mig:3g.40gb": "1", "gres/migc": "3", "gres/migm": "4",
    }  # fmt: skip
    assert found["billing"] == "40"
    found = counted(slurm, three)
    assert {key: found[key] for key in found if "gres" in key} == {
        "gres/mig": "3", "gres/mig:1g.10gb": "2", "gres/mig:1g.10gb+me": "1", "gres/migc": "3", "gres/migm": "3",
    }  # fmt: skip
    # That the node tells what fits is no event in a database that has each change of a node's gres.
    assert events(slurm) == before


def test_who_is_over_a_limit_waits_for_that_and_holds_nobody_up(slurm: RmsCluster) -> None:
    first, second = (slurm.sbatch("sleep 8", "--gres=mig:3g", "--qos=small", user=slurm.users[0]) for _ in range(2))
    slurm.wait(lambda: slurm.job(first)["JobState"] == "RUNNING", 60, "it runs")
    slurm.wait(lambda: slurm.job(second)["Reason"] == "QOSMaxGRESPerUser", 60, "it has the reason")
    other = slurm.sbatch("true", "--gres=mig:3g", user=slurm.users[1])
    slurm.wait(lambda: slurm.job(other)["JobState"] == "COMPLETED", 60, "another user's is done")
    assert [slurm.job(job)["JobState"] for job in (first, second)] == ["RUNNING", "PENDING"]
    slurm.run("scancel", str(first))
    slurm.wait(lambda: slurm.job(second)["JobState"] == "RUNNING", 60, "now it may")
    slurm.run("scancel", str(second))
    slurm.wait_all(60)


def test_rms_simulate_reads_what_sacct_prints(slurm: RmsCluster, tmp_path: Path) -> None:
    job = slurm.sbatch("sleep 1", "--gres=mig:4g", "--time=5", user=slurm.users[0])
    slurm.wait_all(60)
    ask = ["sacct", "-P", "-X", "-a", "-S", "2020-01-01", "-o"]
    ask += ["JobID,Submit,Start,End,ElapsedRaw,TimelimitRaw,State,AllocTRES,ReqTRES"]
    there = re.compile(rf"^{job}\|.*\|COMPLETED\|", re.MULTILINE)
    slurm.wait(lambda: there.search(slurm.run(*ask).stdout) is not None, 60, "slurmdbd has heard of the job's end")
    recorded = tmp_path / "jobs.txt"
    recorded.write_text(slurm.run(*ask).stdout)
    moves = transitions.load("A100-80GB")
    jobs, _ = traces.read(str(recorded), moves, lambda counts: True, False)
    assert moves.profiles[jobs.profile[-1]] == "4g.40gb"
    assert jobs.limit[-1] == 300
