"""What jobs wrote of themselves, joined with the simulated GPUs' own journal: the judge of every run.

Nothing of RMS's state or logs is asked, so a mistake there can't hide itself.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


def script(work: str) -> str:
    """The body of a job that leaves a record in its output; `work` is what it does meanwhile."""
    begin = 'echo "start $(date +%s.%N) $SLURMD_NODENAME $SLURM_JOB_ID ${CUDA_VISIBLE_DEVICES:-none}"'
    return f'{begin}; {work}; echo "end $(date +%s.%N)"'


class Record(NamedTuple):
    """One job's own words: the times (epoch) of its first and last line, its node, and the MIG devices it was shown."""

    job: int
    node: str
    start: float
    end: float
    uuids: tuple[str, ...]


class Slot(NamedTuple):
    """Memory slices of a GPU that a job had, and when."""

    record: Record
    gpu: str
    profile: str
    start: int
    size: int


def read(path: Path) -> list[Record]:
    """The records in a job's output: one per time that its script ran to the end."""
    found = []
    begin: list[str] | None = None
    for line in path.read_text(errors="replace").splitlines():
        words = line.split()
        if words[:1] == ["start"] and len(words) == 5:
            begin = words
        elif words[:1] == ["end"] and begin:
            uuids = tuple(begin[4].split(",")) if begin[4] != "none" else ()
            found.append(Record(int(begin[3]), begin[2], float(begin[1]), float(words[1]), uuids))
            begin = None
    return found


def journal(path: Path) -> list[dict[str, Any]]:
    """Every operation that was tried on a node's simulated GPUs, in order."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def slots(records: Iterable[Record], journals: Mapping[str, Sequence[dict[str, Any]]]) -> tuple[list[Slot], list[str]]:
    """Where each job's instances were, and what is wrong with them: unknown, or changed while the job ran.

    `journals` has each node's journal.
    """
    found, faults = [], []
    for record in records:
        operations = [entry for entry in journals[record.node] if entry["code"] == 0]
        for uuid in record.uuids:
            own = [e for e in operations if e.get("uuid") == uuid]
            made = [e for e in own if e["op"] == "create_compute_instance" and e["t"] <= record.start]
            if not made:
                faults.append(f"job {record.job}: {uuid} did not exist when it started")
                continue
            last = made[-1]
            found.append(Slot(record, last["gpu"], last["profile"], last["start"], last["size"]))
            for e in own:
                if e["t"] > last["t"] and e["t"] < record.end:
                    faults.append(f"job {record.job}: {e['op']} of {uuid} while it ran")
    return found, faults


def overlaps(taken: Iterable[Slot]) -> list[str]:
    """Pairs of jobs that had the same memory slice of a GPU at the same time; also a job that had one twice."""
    faults = []
    for a, b in itertools.combinations(taken, 2):
        if a.gpu != b.gpu or a.record.start >= b.record.end or b.record.start >= a.record.end:
            continue
        if a.start < b.start + b.size and b.start < a.start + a.size:
            faults.append(
                f"jobs {a.record.job} and {b.record.job} both had {a.profile}@{a.start}:{a.size} and "
                f"{b.profile}@{b.start}:{b.size} of {a.gpu}"
            )
    return faults
