"""A cluster whose nodes have different GPUs: each job goes where its profiles are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import records
from rms_cluster import RmsCluster, rms_cluster

pytestmark = pytest.mark.slurm


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[RmsCluster]:
    models = ["A100-80GB", "A100-40GB", "A30"]
    with rms_cluster(slurm_root, admission="features", nodes=3, gpus=1, model=models, create=0.02, destroy=0.02,
                     cred_expire=5) as cluster:  # fmt: skip
        yield cluster


def test_each_job_runs_where_its_profiles_are(slurm: RmsCluster) -> None:
    wanted = {
        "3g.40gb:2": "n1",
        "1g.10gb:1": "n1",  # on an A100-40GB that is a quarter, and can't be asked for beside an A100-80GB
        "7g.40gb:1": "n2",
        "1g.5gb:2,mig:2g.10gb:1": "n2",
        "4g.24gb:1": "n3",
        "2g.12gb:2": "n3",
    }
    jobs = {
        slurm.sbatch(records.script("sleep 1"), f"--gres=mig:{request}", "--time=1", "--output=%j.out",
                     user=slurm.users[number % 2]): request
        for number, request in enumerate(wanted)
    }  # fmt: skip
    slurm.wait_all(120)
    found = {job: records.read(slurm.users[number % 2].work / f"{job}.out") for number, job in enumerate(jobs)}
    assert {jobs[job]: [one.node for one in ran] for job, ran in found.items()} == {r: [n] for r, n in wanted.items()}
    journals = {n: records.journal(slurm.root / n / "gpus.json.journal") for n in slurm.nodes}
    slots, faults = records.slots([one for ran in found.values() for one in ran], journals)
    assert not faults
    assert not records.overlaps(slots)
    assert {state.state for state in slurm.node_states().values()} == {"idle"}
    said = slurm.run("sbatch", "--gres=mig:3g:1", "--wrap=true", user=slurm.users[0], check=False).stderr
    assert "rms: 3g may be 3g.40gb or 3g.20gb here; say which" in said
