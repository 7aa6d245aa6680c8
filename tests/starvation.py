"""A job that needs a whole GPU behind a stream of small ones, on one node with two GPUs: how long does it wait?"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import records
from rms_cluster import rms_cluster


class Waits(NamedTuple):
    """Seconds from submission to the first line of the job: the large job's, the small jobs' mean; the share of the
    GPUs' compute slices that jobs had from the first start to the last end; jobs; refusals; what `rms watch` said."""

    large: float
    small: float
    used: float
    jobs: int
    refused: int
    said: list[str]


def run(root: Path, admission: str, watched: bool, seconds: float, before: int, seed: int = 7) -> Waits:
    """1g jobs of 5 to 8 s, one each 0.6 s, for so many seconds; the 7g comes after `before` of them. All have a time
    limit of a minute. It goes on until all have run."""
    chance = random.Random(seed)
    with rms_cluster(root, nodes=1, create=0.05, destroy=0.05, cred_expire=5, admission=admission) as slurm:
        said: list[str] = []
        if watched:
            rms = str(Path(sys.executable).with_name("rms"))
            service = slurm.popen(
                rms, "watch", "--slurm-conf", str(slurm.conf), "--config", f"{slurm.etc}/rms.toml", "--seconds", "1"
            )
        submitted: dict[int, tuple[float, int]] = {}
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            time.sleep(max(0.0, began + 0.6 * len(submitted) - time.monotonic()))
            slices = 7 if len(submitted) == before else 1
            work = records.script(f"sleep {chance.uniform(5, 8):.2f}")
            job = slurm.sbatch(work, f"--gres=mig:{slices}g", "--time=1", "--output=%j.out", user=slurm.users[0])
            submitted[job] = (time.time(), slices)
        slurm.wait_all(180)
        found = {job: records.read(slurm.users[0].work / f"{job}.out")[0] for job in submitted}
        if watched:
            service.terminate()
            said = service.communicate(timeout=20)[1].splitlines()
        refused = (root / "n1" / "audit.jsonl").read_text().count('"event": "refused"')
    waits = {job: found[job].start - when for job, (when, _) in submitted.items()}
    large = next(job for job, (_, slices) in submitted.items() if slices == 7)
    busy = sum((r.end - r.start) * submitted[job][1] for job, r in found.items())
    span = max(r.end for r in found.values()) - min(r.start for r in found.values())
    small = statistics.mean(wait for job, wait in waits.items() if job != large)
    return Waits(waits[large], small, busy / span / 14, len(found), refused, said)
