"""The audit logs of nodes, read back: what became of each job, and how often the built-in rule stood in.

A log is believed only where it can be true: times go on, who is granted something has asked for just that, places exist
on the GPU, and no two jobs have the same slices at once. What can't be true is counted, by what is wrong with it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf, isfinite
from typing import Any, BinaryIO, NamedTuple, cast

from rms import planner
from rms.errors import RequestError
from rms.geometry import Geometry, Placement
from rms.request import parse

SKEW = 300.0
"""Seconds that clocks may be apart, and that lines may be late."""
OVERTIME = 3600.0
"""How long Slurm may leave a job after its time limit, beside a tenth of it."""
NO_LIMIT = 366 * 86400.0
"""A time limit beyond this (seconds) is none."""

Run = tuple[str, int, int]
Place = tuple[str, Placement]


class Job(NamedTuple):
    """One job that ran and ended. Times in seconds: `submit` an epoch, `limit` inf where there is none; `profiles` by
    instance."""

    submit: float
    uid: int
    profiles: tuple[str, ...]
    duration: float
    limit: float


class Logs(NamedTuple):
    """The jobs by submit time, the number of GPUs, what was left out though nothing is wrong with it, and what can't be
    true; both counted by reason."""

    jobs: Sequence[Job]
    gpus: int
    left_out: Mapping[str, int]
    false: Mapping[str, int]


class Asked(NamedTuple):
    """What a run asked for; times in seconds."""

    uid: int
    request: str
    submit: float | None
    limit: float


class Stood(NamedTuple):
    """How many instances were placed, how many by the built-in rule, and why (the most frequent reasons); how many for
    a demand outside of what the model was trained on."""

    instances: int
    built_in: int
    clamped: int
    reasons: Mapping[str, int]


class FalseError(Exception):
    """What is wrong with a line."""


class Reader:
    """The jobs of logs whose lines are given one by one, those of one node in order of time."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        self.gpus: set[str] = set()
        self.false: Counter[str] = Counter()
        self.asked: dict[Run, Asked] = {}
        self.granted: dict[Run, tuple[float, tuple[str, ...]]] = {}
        self.ended: dict[Run, float] = {}
        self._held: dict[str, dict[Placement, Run]] = {}
        self._places: dict[Run, list[Place]] = {}
        self._robbed: dict[Run, Run] = {}
        self._dropped: set[Run] = set()

    def line(self, t: float, entry: Mapping[str, Any]) -> None:
        """One line. Raises FalseError where it can't be true."""
        event = entry.get("event")
        if event == "decision" and isinstance(entry.get("gpus"), dict):
            self.gpus |= set(entry["gpus"])
        elif event == "acquire":
            limit = _number(entry, "limit") or inf
            self.asked[_run(entry)] = Asked(
                int(_number(entry, "uid") or 0),
                str(entry.get("request")),
                _number(entry, "submit"),
                limit * 60 if limit * 60 < NO_LIMIT else inf,
            )
        elif event == "granted":
            self._grant(t, _run(entry), entry.get("instances"))
        elif event == "release":
            run = _run(entry)
            if run in self.granted and run not in self.ended:
                self.ended[run] = t
                for gpu, place in self._places.pop(run):
                    if self._held[gpu].get(place) == run:
                        del self._held[gpu][place]
                if thief := self._robbed.pop(run, None):  # it was there until now, so the other one can't have been
                    self._dropped |= {run, thief}
                    raise FalseError("jobs on slices that another one had")

    def _grant(self, t: float, run: Run, instances: Any) -> None:
        try:
            places = [(str(gpu), Placement(str(p), int(a), int(n))) for gpu, _, (p, a, n), _ in instances]
            known = all(place in self.geometry.placements(place.profile) for _, place in places)
        except (TypeError, ValueError, KeyError, RequestError):
            known = False
        if not known or not places:
            raise FalseError("grants of what no GPU has")
        if run not in self.asked:
            raise FalseError("grants that nobody asked for")
        profiles = tuple(sorted(place.profile for _, place in places))
        try:
            fitting = profiles == tuple(sorted(parse(self.asked[run].request, self.geometry).profiles))
        except RequestError:
            fitting = False
        if not fitting:
            raise FalseError("grants of something else than was asked for")
        for gpu, place in places:
            held = self._held.setdefault(gpu, {})
            for other in [p for p in held if p.mask & place.mask and held[p] != run]:
                # Cut off by a reboot or a kill, if no release of it comes any more.
                self._robbed[held.pop(other)] = run
            held[place] = run
            self.gpus.add(gpu)
        self._places[run] = places
        self.granted[run] = (t, profiles)

    def result(self) -> Logs:
        """The jobs so far. A requeued one counts once, by its last run."""
        last: dict[tuple[str, int, float | None], Run] = {}
        left_out, false = Counter[str](), Counter(self.false)
        for run in self.granted:
            if run in self._dropped:
                continue
            if run not in self.ended:
                left_out["runs without an end"] += 1
                continue
            key = (run[0], run[1], self.asked[run].submit)
            if key in last:
                left_out["runs of requeued jobs before the last"] += 1
            last[key] = max(run, last.get(key, run))
        jobs = []
        for run in last.values():
            start, profiles = self.granted[run]
            asked, duration = self.asked[run], self.ended[run] - start
            if asked.submit is None:
                left_out["jobs without a submit time"] += 1
            elif duration <= 0:
                left_out["jobs that lasted no time"] += 1
            elif not 0 < asked.submit <= start + SKEW:
                false["jobs that started before they were submitted"] += 1
            elif duration > 1.1 * asked.limit + OVERTIME:
                false["jobs that outlived their time limit"] += 1
            else:
                jobs.append(Job(asked.submit, asked.uid, profiles, duration, asked.limit))
        jobs.sort()
        return Logs(jobs, len(self.gpus), dict(left_out), dict(false))


def read(
    paths: Sequence[str], geometry: Geometry, now: float, progress: Callable[[float], None] = lambda done: None
) -> Logs:
    """The jobs of the audit logs of one node or many; rotated and gzipped ones too, in any order. Raises OSError."""
    reader = Reader(geometry)
    ordered = sorted(dict.fromkeys(paths), key=lambda path: next((t for t, _ in _entries(path)), inf))
    for number, path in enumerate(ordered):
        latest = -inf
        for lines, (t, entry) in enumerate(_entries(path)):
            if lines % 10_000 == 0:
                progress(number / len(ordered))
            try:
                if entry is None:
                    raise FalseError("lines that are no JSON object with a time")
                if t > now + SKEW:
                    raise FalseError("lines from the future")
                if t < latest - SKEW:
                    raise FalseError("lines that go back in time")
                latest = max(latest, t)
                reader.line(t, entry)
            except FalseError as fault:
                reader.false[str(fault)] += 1
    return reader.result()


def stand_ins(path: str) -> Stood:
    """How often the built-in rule decided, by the log at `path`; nothing where there is none."""
    instances, clamped, reasons = 0, 0, Counter[str]()
    try:
        for _, entry in _entries(path, b'"decision"'):
            decided = entry.get("instances") if entry and entry.get("event") == "decision" else None
            for one in decided if isinstance(decided, list) else []:
                instances += 1
                clamped += bool(entry and isinstance(basis := entry.get("basis"), dict) and basis.get("clamped"))
                if isinstance(one, dict) and one.get("source") == planner.BUILT_IN:
                    reasons[str(one.get("fault") or "no model was asked")] += 1
    except OSError:
        pass
    return Stood(instances, reasons.total(), clamped, dict(reasons.most_common(3)))


def decision(paths: Sequence[str], job: int, restart: int | None) -> dict[str, Any] | None:
    """The last decision about a job, or about one run of it; None if there is none. Raises OSError."""
    found, latest = None, -inf
    for path in paths:
        for t, entry in _entries(path, b'"decision"'):
            run = entry.get("run") if entry and entry.get("event") == "decision" else None
            mine = isinstance(run, list) and len(run) == 3 and run[1] == job and restart in (None, run[2])
            if mine and t >= latest:
                found, latest = entry, t
    return found


def _entries(path: str, needle: bytes = b"") -> Iterator[tuple[float, dict[str, Any] | None]]:
    """The lines of a log that have `needle` in them, with their times; None for what is no object with a time."""
    with open(path, "rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = cast(BinaryIO, gzip.GzipFile(fileobj=raw)) if packed else raw
        try:
            for line in file:
                if needle not in line or not line.strip():
                    continue
                try:
                    entry = json.loads(line)
                    t = entry["t"]
                except (ValueError, TypeError, KeyError, RecursionError):
                    t = entry = None
                good = isinstance(entry, dict) and type(t) in (int, float) and isfinite(t)
                yield (float(t), entry) if good else (inf, None)
        except (EOFError, zlib.error, gzip.BadGzipFile):  # a gzip file that was cut off, or is damaged
            yield inf, None


def _run(entry: Mapping[str, Any]) -> Run:
    match entry.get("run"):
        case [str(cluster), int(job), int(restart)]:
            return cluster, job, restart
    raise FalseError("lines without a run")


def _number(entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not isfinite(value) or value < 0:
        raise FalseError(f"lines whose {key} is no number")
    return float(value)
