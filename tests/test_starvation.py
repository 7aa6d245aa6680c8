"""A large job behind a stream of small ones starts while the stream goes on, and nobody is refused for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import starvation


@pytest.mark.slurm
def test_a_large_job_does_not_starve(slurm_root: Path) -> None:
    found = starvation.run(slurm_root, "features", True, seconds=30, before=10)
    # Without `rms watch` it waits until the last small job of the stream has ended: 24 s and more.
    assert found.large < 24 and found.refused == 0
    assert any("keep room for 7g.80gb:1" in line for line in found.said)
