"""The benchmarks on a real Slurm, in short: they run through, and what must be zero is zero on a busy machine, too."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rms import geometry

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import slurm_load  # noqa: E402
import slurm_modes  # noqa: E402
import slurm_waits  # noqa: E402


def bench(name: str, *options: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *options]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shards_count_both_kinds_of_slices() -> None:
    board = geometry.load(slurm_modes.MODEL)
    names = board.names()
    profiles = [(board.by_name[names[p]], count) for p, count in slurm_modes.SHARDS.items()]
    for numbers in itertools.product(*(range(limit) for limit in (9, 5, 4, 3, 2))):
        compute, memory, shards = (
            sum(n * amount for n, amount in zip(numbers, amounts, strict=True))
            for amounts in zip(*((p.compute, p.memory, count) for p, count in profiles), strict=True)
        )
        assert (shards <= 100) == (compute <= 7 and memory <= 8), numbers


@pytest.mark.slurm
def test_the_modes_in_short() -> None:
    """Every target but the rates, which a busy machine has no part in."""
    short = ("--nodes=1", "--jobs=12", "--between=1,2", "--short=4", "--modes=features", "--json")
    [run] = [slurm_waits.read(run) for run in json.loads(bench("slurm_modes.py", *short))]
    assert (run.dispatches, run.misplaced, run.without, run.drained, len(run.ran)) == (12, 0, 0, 0, 12)
    late = slurm_waits.latency(run)
    assert len(late.all) == 12 >= len(late.alone) + len(late.behind) > 0 and min(late.all) > 0
    known = [job for job in run.ran if job.let_in is not None and job.could is not None]
    assert known and all(job.could < job.let_in + 0.1 and job.let_in < job.start < job.end for job in known)
    assert run.idle is not None and len(run.idle) == 4
    assert run.rpcs is not None and 2 <= run.rpcs <= 8
    assert run.passes_ms > 0


@pytest.mark.slurm
def test_the_load_in_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_load, "ROUNDS", 1)
    rows = slurm_load.here(argparse.Namespace(nodes=8, pending=20, rate=3.0, seconds=1.0))
    assert [row.pending for row in rows] == [0, 20]
    for row in rows:
        assert row.silent.jobs and row.silent.messages == {} and row.silent.passes
        assert {*row.told.messages} >= {"UPDATE_NODE", "NODE_INFO_SINGLE"} and row.told.passes
