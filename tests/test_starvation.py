"""A large job behind a stream of small ones starts while the stream goes on, and nobody is refused for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from rms_cluster import rms_cluster
from starvation import refusals, stream, watching


@pytest.mark.slurm
def test_a_large_job_does_not_starve(slurm_root: Path) -> None:
    """More small jobs come than one GPU can run: without `rms watch` it would start after the last of them."""
    large = None
    with rms_cluster(slurm_root, nodes=1, gpus=1, create=0.05, destroy=0.05, cred_expire=5,
                     admission="features") as slurm:  # fmt: skip
        with watching(slurm) as said:
            for job, _, slices in stream(slurm, seconds=60, before=8, seed=7):
                large = job if slices == 7 else large
                if large and (slurm.users[0].work / f"{large}.out").exists():
                    break
            else:
                pytest.fail("the stream has ended, and it has not started")
            slurm.cancel_all()
            slurm.wait_all(60)
        assert refusals(slurm) == 0
    assert any("keep room for 7g.80gb:1" in line for line in said)
