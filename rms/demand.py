"""What the cluster's queue wants of this node: told by `rms watch`, with an expiry, in front of the node's own comment.

    rms1:u=<until, epoch>;j=<job>;k=<request to keep room for>;q=<waiting jobs>;<the site's own text>

`j` and `k` are empty where nothing is to be kept. `q` has the first jobs of the queue, alike ones as one entry:
`<request>*<how many>@<time limit, minutes; 0 for none>@<oldest submit, epoch>`, with | between entries. Whoever
publishes reads the comment anyway, and leaves it in a file for the hooks, which never ask slurmctld.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

from rms import files, sent_back
from rms.errors import RequestError
from rms.geometry import Geometry
from rms.planner import Demand
from rms.request import parse

MOST = 64
"""How many waiting jobs a node is told of: their line must be short, and the first ones count most."""
QUEUE_BYTES = 600
"""The longest list of them, so that the site's own text has room beside it."""
FILE = "demand"

_PREFIX = re.compile(r"rms1:u=([0-9]{1,12});j=([0-9]{0,12});k=([^;]{0,200});q=([^;]{0,700});", re.ASCII)
_ENTRY = re.compile(r"([^*|@]{1,200})\*([0-9]{1,6})@([0-9]{1,9})@([0-9]{1,12})", re.ASCII)


class Waiting(NamedTuple):
    """Jobs in the queue that are alike: their request, how many they are, their time limit (minutes, 0 for none), the
    oldest submit (epoch)."""

    request: str
    jobs: int
    limit: int
    submit: int


class Told(NamedTuple):
    """One such message. It counts until `until` (epoch). Room is to be kept for `keep`, the request of job `job`;
    nothing is where `keep` is empty."""

    until: int
    job: int = 0
    keep: str = ""
    waiting: tuple[Waiting, ...] = ()

    def __str__(self) -> str:
        queue = "|".join(f"{w.request}*{w.jobs}@{w.limit}@{w.submit}" for w in self.waiting)
        return f"rms1:u={self.until};j={self.job or ''};k={self.keep};q={queue};"

    def pending(self, geometry: Geometry) -> tuple[Demand, ...]:
        """The waiting jobs, one by one, as a policy sees them; what no GPU here could hold is left out."""
        found: list[Demand] = []
        for waiting in self.waiting:
            with suppress(RequestError):
                one = Demand(float(waiting.submit), parse(waiting.request, geometry), waiting.limit * 60.0 or None)
                found += [one] * min(waiting.jobs, MOST - len(found))
        return tuple(found)


def read(comment: str, now: float) -> Told | None:
    """What a node's comment tells; None where it tells nothing, nothing that can be read, or where it has expired."""
    match = _PREFIX.match(comment)
    if match is None or int(match[1]) <= now:
        return None
    entries = [_ENTRY.fullmatch(entry) for entry in match[4].split("|")]
    waiting = tuple(Waiting(e[1], int(e[2]), int(e[3]), int(e[4])) for e in entries if e)
    return Told(int(match[1]), int(match[2] or 0) if match[3] else 0, match[3] if match[2] else "", waiting)


def own_text(comment: str) -> str:
    """The site's part of a node's comment."""
    while match := _PREFIX.match(comment):
        comment = comment[match.end() :]
    return comment


def queue(jobs: Iterable[Waiting]) -> tuple[Waiting, ...]:
    """The first jobs of the queue, alike ones taken together, as many as fit into a message."""
    found: dict[tuple[str, int], Waiting] = {}
    count = 0
    for job in jobs:
        key = (job.request, job.limit)
        known = found.get(key, job._replace(jobs=0))
        more = min(job.jobs, MOST - count)
        tried = {**found, key: known._replace(jobs=known.jobs + more, submit=min(known.submit, job.submit))}
        if more <= 0 or len(str(Told(0, waiting=tuple(tried.values())))) > QUEUE_BYTES:
            break
        found = tried
        count += more
    return tuple(found.values())


def save(state_dir: str, comment: str) -> None:
    """Leave what a node's comment tells for the hooks. Raises OSError."""
    match = _PREFIX.match(comment)
    path = os.path.join(state_dir, FILE)
    if match:
        files.replace(path, match[0].encode(), 0o600, durable=False)
    else:
        with suppress(FileNotFoundError):
            os.remove(path)


def load(state_dir: str, now: float) -> Told | None:
    """What `save` has left; None where there is nothing, or it has expired.

    Where the queue wants no room kept, the first of the jobs that this node has sent back has it.
    """
    try:
        with open(os.path.join(state_dir, FILE), encoding="ascii") as file:
            told = read(file.read(2000), now)
    except (OSError, UnicodeError):
        told = None
    if (told is None or not told.keep) and (waiting := sent_back.load(state_dir, now)):
        first = waiting[0]
        queue = tuple(Waiting(one.request, 1, 0, one.submit) for one in waiting)
        return (told or Told(int(first.until), waiting=queue))._replace(job=first.job, keep=first.request)
    return told
