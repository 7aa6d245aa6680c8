"""A job that needs a whole GPU behind a stream of small ones, on one node with two GPUs: how long does it wait?"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import records
from rms_cluster import RmsCluster, rms_cluster


class Waits(NamedTuple):
    """Seconds from submission to the first line of the job: the large job's, the small jobs' mean; the share of the
    GPUs' compute slices that jobs had from the first start to the last end; jobs; refusals."""

    large: float
    small: float
    used: float
    jobs: int
    refused: int


@contextmanager
def watching(slurm: RmsCluster) -> Iterator[list[str]]:
    """`rms watch` at work; what it said is there afterwards."""
    rms = str(Path(sys.executable).with_name("rms"))
    config = f"{slurm.etc}/rms.toml"
    service = slurm.popen(rms, "watch", "--slurm-conf", str(slurm.conf), "--config", config, "--seconds", "1")
    said: list[str] = []
    yield said
    service.terminate()
    said += service.communicate(timeout=20)[1].splitlines()


def stream(slurm: RmsCluster, seconds: float, before: int, seed: int) -> Iterator[tuple[int, float, int]]:
    """1g jobs of 5 to 8 s, one each 0.6 s, for so many seconds; the 7g comes after `before` of them. All have a time
    limit of a minute. Gives each job as it is submitted: its id, when (epoch), and its slices."""
    chance = random.Random(seed)
    began = time.monotonic()
    count = 0
    while time.monotonic() - began < seconds:
        time.sleep(max(0.0, began + 0.6 * count - time.monotonic()))
        slices = 7 if count == before else 1
        work = records.script(f"sleep {chance.uniform(5, 8):.2f}")
        job = slurm.sbatch(work, f"--gres=mig:{slices}g", "--time=1", "--output=%j.out", user=slurm.users[0])
        yield job, time.time(), slices
        count += 1


def refusals(slurm: RmsCluster) -> int:
    """So many jobs were sent back."""
    return (slurm.root / "n1" / "audit.jsonl").read_text().count('"event": "refused"')


def run(root: Path, admission: str, watched: bool, seconds: float, before: int, seed: int) -> Waits:
    """The stream, until all have run."""
    with rms_cluster(root, nodes=1, create=0.05, destroy=0.05, cred_expire=5, admission=admission) as slurm:
        with watching(slurm) if watched else nullcontext():
            submitted = {job: (when, slices) for job, when, slices in stream(slurm, seconds, before, seed)}
            slurm.wait_all(180)
        found = {job: records.read(slurm.users[0].work / f"{job}.out")[0] for job in submitted}
        refused = refusals(slurm)
    waits = {job: found[job].start - when for job, (when, _) in submitted.items()}
    large = next(job for job, (_, slices) in submitted.items() if slices == 7)
    busy = sum((r.end - r.start) * submitted[job][1] for job, r in found.items())
    span = max(r.end for r in found.values()) - min(r.start for r in found.values())
    small = statistics.mean(wait for job, wait in waits.items() if job != large)
    return Waits(waits[large], small, busy / span / 14, len(found), refused)
