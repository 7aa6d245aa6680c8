"""Jobs that are in their Prolog for ever: slurmd was killed while it ran, and so was the Prolog.

The next slurmd neither runs the Prolog again nor starts the job nor ends it, and slurmctld shows it as running with the
reason Prolog (seen on 22.05.8). A Prolog that outlives its slurmd sees to its job itself; here is for the others.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from rms import fence, grant
from slurm.slurmctld import HOOKS_SECONDS, Job, Slurmctld

LOOK_AGAIN_SECONDS = 5.0
"""A Prolog that has just ended has told slurmctld by then, and one that is about to begin has begun."""


def stuck(slurmctld: Slurmctld, node: str, run_dir: str) -> list[Job]:
    """The jobs with MIG that are in a Prolog of which there is no process. Raises SlurmError."""
    found = _candidates(slurmctld, node, run_dir)
    if found:
        time.sleep(LOOK_AGAIN_SECONDS)
        again = _candidates(slurmctld, node, run_dir)
        found = [job for job in found if job in again]
    return found


def _candidates(slurmctld: Slurmctld, node: str, run_dir: str) -> list[Job]:
    here = []
    for job in slurmctld.in_prolog(node):
        told = grant.read(run_dir, job.id)
        if told and told.status in ("granted", "refused") and not _at_work(job.id):
            here.append(job)
    return here


def _at_work(job: int) -> bool:
    """Whether root has any process for a job: the site may have more Prologs than ours. A user's own says nothing."""
    wanted = f"SLURM_JOB_ID={job}".encode()
    for pid in map(int, filter(str.isdecimal, os.listdir("/proc"))):
        with suppress(OSError), open(f"/proc/{pid}/environ", "rb") as file:
            if wanted in file.read().split(b"\0") and fence.roots(pid):
                return True
    return False


def back(slurmctld: Slurmctld, job: Job, node: str) -> str:
    """Put a job back in the queue, or cancel one that can't be. Returns what was done. Raises SlurmError."""
    if not job.batch:
        slurmctld.cancel(job, f"rms: slurmd of {node} was killed while the job began; try again")
        return "cancelled"
    slurmctld.requeue(job, (slurmctld.credential_seconds() or 0) + HOOKS_SECONDS)
    return "requeued"
