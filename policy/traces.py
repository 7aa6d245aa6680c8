"""Recorded jobs from a file: a CSV, or what `sacct -P` prints.

Read as a stream: of each job about 40 bytes stay in memory. A line that can't be read stops the reading and is named,
or is left out and counted; jobs that have nothing to do with MIG, or have not ended yet, are always left out and
counted.
"""

from __future__ import annotations

import csv
import io
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from math import inf, isfinite
from typing import BinaryIO, NamedTuple, TextIO

import numpy as np

from policy.transitions import Transitions
from policy.workload import Jobs
from rms.errors import RequestError
from rms.geometry import Counts

Items = tuple[tuple[str, int], ...]
Names = Mapping[str, int]
"""The number of the plain profile that each accepted name stands for."""

# One typed gres of a TRES string; what stands before the profile (`a100_3g.20gb`) is the board.
GRES = re.compile(r"gres/\w+:(?:[^=,]*_)?(\d+g(?:\.[^=,_]*)?)=(\d+)(?:,|$)", re.IGNORECASE)
NOT_KNOWN = {"", "unknown", "none", "n/a"}
NO_LIMIT = {"", "unlimited", "partition_limit", "invalid", "none", "n/a", "unknown"}
COLUMNS = {
    "submit": ("submit",),
    "start": ("start",),
    "end": ("end",),
    "duration": ("duration", "elapsedraw", "elapsed"),
    "limit": ("timelimitraw", "timelimit", "limit"),
    "profile": ("profile",),
    "count": ("count",),
    "id": ("jobid",),
    "allocated": ("alloctres",),
    "requested": ("reqtres",),
}
"""What a column may be called, in lower case, with blanks and underscores left out."""


class Row(NamedTuple):
    """One job of the file; times in seconds."""

    submit: float
    duration: float
    limit: float
    items: Items


class Trace(NamedTuple):
    """The jobs in order of submission, in seconds since the first, and how many lines were left out, by reason."""

    jobs: Jobs
    left_out: Mapping[str, int]


class BadLineError(Exception):
    """What is wrong with a line."""


class NoTimeError(BadLineError):
    """A job that ends when it starts."""


class LeftOutError(Exception):
    """Why a line, though nothing is wrong with it, is not a job to replay."""


def read(
    path: str,
    moves: Transitions,
    fits: Callable[[Counts], bool],
    skip: bool = False,
    progress: Callable[[float], None] = lambda done: None,
) -> Trace:
    """The jobs of a file, for a GPU model. `fits` tells whether the simulated GPUs can hold that many of each profile.

    Raises RequestError that names the first bad line, unless `skip` leaves those out.
    """
    names, profiles = accepted(moves), range(len(moves.profiles))
    submits, durations, limits, numbers, rests = array("d"), array("d"), array("d"), array("b"), array("i")
    left_out = Counter[str]()
    last = -inf
    with open(path, "rb") as file:
        size = max(file.seek(0, 2), 1)
        file.seek(0)
        text = decoded(file)
        first = text.readline(65536)
        separator = max(",|;\t", key=first.count)
        sacct = separator == "|"
        parse = sacct_row if sacct else csv_row
        columns = next(csv.reader([first], delimiter=separator), [])
        where = header(columns, sacct, path)
        known: dict[Items, list[int]] = {}
        for number, line in rows(text, separator):
            if number % 10_000 == 0:
                progress(file.tell() / size)
            try:
                row = parse(checked(line, len(columns)), where)
                if row.items not in known:
                    known[row.items] = instances(row.items, names, moves, fits, len(profiles))
                if row.submit < last and not sacct:
                    raise BadLineError("submitted before the line above it")
            except LeftOutError as reason:
                left_out[str(reason)] += 1
                continue
            except BadLineError as fault:
                if not skip:
                    raise RequestError(f"{path}: line {number}: {fault} (--skip-bad-lines leaves such out)") from None
                left_out[f"bad: {str(fault).partition(':')[0]}"] += 1
                continue
            last = row.submit
            asked = known[row.items]
            for i, profile in enumerate(asked):
                submits.append(row.submit)
                durations.append(row.duration)
                limits.append(row.limit)
                numbers.append(profile)
                rests.append(len(asked) - 1 - i)
    if not submits:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.most_common())
        raise RequestError(f"{path}: no job to replay ({why or 'the file ends after its first line'})")
    submit = np.array(submits)
    order = np.argsort(submit, kind="stable")  # sacct sorts by job id: a requeued job comes too early
    jobs = Jobs(
        (submit - submit.min())[order],
        np.array(numbers, np.int64)[order],
        np.array(durations)[order],
        np.array(limits)[order],
        np.array(rests, np.int64)[order],
    )
    return Trace(jobs, dict(left_out))


def decoded(file: BinaryIO) -> TextIO:
    """The file as text. Bytes that are no UTF-8 stay recognisable (`checked`), so that their line can be named."""
    mark = file.read(2)
    file.seek(0)
    wide = mark in (b"\xff\xfe", b"\xfe\xff")
    return io.TextIOWrapper(
        file, "utf-16" if wide else "utf-8-sig", errors="replace" if wide else "surrogateescape", newline=""
    )


def rows(text: TextIO, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The lines after the first, with their numbers; empty ones are passed over."""
    # sacct quotes nothing: a job's name may well have a lone quote in it.
    plain = separator == "|"
    reader = csv.reader(text, delimiter=separator, quoting=csv.QUOTE_NONE if plain else csv.QUOTE_MINIMAL)
    while True:
        try:
            for line in reader:
                if line:
                    yield reader.line_num + 1, line
            return
        except csv.Error:  # a field of more than 128 KiB, mostly a quote that never ends; the reader goes on after it
            yield reader.line_num + 1, []


def checked(line: list[str], columns: int) -> list[str]:
    """The line if it is text, and complete."""
    joined = "".join(line)
    if not joined.isascii() and any("\udc80" <= letter <= "\udcff" for letter in joined):
        raise BadLineError("not UTF-8")
    if len(line) < columns:
        raise BadLineError(f"too few fields: {len(line)} of {columns}")
    return line


def header(columns: Sequence[str], sacct: bool, path: str) -> dict[str, int]:
    """Where the columns are that we know. Raises RequestError where one is missing."""
    given = {re.sub(r"[\s_]", "", name).lower(): i for i, name in enumerate(columns)}
    where = {
        what: next(given[name] for name in names if name in given)
        for what, names in COLUMNS.items()
        if any(name in given for name in names)
    }
    if "limit" in where and "timelimitraw" in given:
        where["minutes"] = where["limit"]
    missing = [what for what in ("submit",) if what not in where]
    if "duration" not in where and not {"start", "end"} <= set(where):
        missing.append("Elapsed, or Start and End" if sacct else "duration, or start and end")
    if sacct and not {"allocated", "requested"} & set(where):
        missing.append("AllocTRES or ReqTRES")
    if not sacct and "profile" not in where:
        missing.append("profile")
    if missing:
        raise RequestError(f"{path}: line 1: no column for {'; '.join(missing)}; it has: {' '.join(columns)!a}")
    return where


def csv_row(line: Sequence[str], where: Mapping[str, int]) -> Row:
    """A line of a CSV."""
    count = line[where["count"]].strip() if "count" in where else "1"
    return times(line, where, ((line[where["profile"]].strip().lower(), counted(count)),))


def sacct_row(line: Sequence[str], where: Mapping[str, int]) -> Row:
    """A line of `sacct -P`. What was allocated counts, else what was asked for."""
    if "id" in where and "." in line[where["id"]]:
        raise LeftOutError("steps of jobs")
    tres = [line[where[what]] for what in ("allocated", "requested") if what in where]
    found = next((items for items in map(GRES.findall, tres) if items), None)
    if found is None:
        raise LeftOutError("jobs without MIG instances")
    never = "allocated" in where and not line[where["allocated"]].strip()  # some releases give such jobs a start
    if never or any(line[where[what]].strip().lower() in NOT_KNOWN for what in ("start", "end") if what in where):
        raise LeftOutError("jobs that have not started or not ended")
    try:
        return times(line, where, tuple((profile.lower(), counted(count)) for profile, count in found))
    except NoTimeError:
        raise LeftOutError("jobs of less than a second") from None  # Slurm counts whole seconds


def counted(text: str) -> int:
    """How many instances."""
    if not (re.fullmatch("[0-9]{1,9}", text) and 0 < int(text) < 1000):
        raise BadLineError(f"not a count: {text[:20]!a}")
    return int(text)


def times(line: Sequence[str], where: Mapping[str, int], items: Items) -> Row:
    """The job of a line whose instances are known."""
    submit = moment(line[where["submit"]])
    start = moment(line[where["start"]]) if "start" in where else submit
    if start < submit:
        raise BadLineError("starts before it is submitted")
    duration = span(line[where["duration"]]) if "duration" in where else moment(line[where["end"]]) - start
    if duration == 0:
        raise NoTimeError("lasts no time")
    if not 0 < duration < inf:
        raise BadLineError("ends before it starts, or never")
    limit = inf
    if "limit" in where and line[where["limit"]].strip().lower() not in NO_LIMIT:
        limit = span(line[where["limit"]]) * (60 if "minutes" in where else 1)
        if limit <= 0:
            raise BadLineError("a time limit of nothing")
    return Row(submit, duration, limit, items)


def moment(text: str) -> float:
    """A point in time: seconds, or a date and time as ISO 8601 and Slurm write it. Without a zone it is UTC: only
    differences count."""
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = datetime.fromisoformat(text.strip())
        except ValueError:
            raise BadLineError(f"not a time: {text[:40]!a}") from None
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
    if not isfinite(seconds):
        raise BadLineError(f"not a time: {text[:40]!a}")
    return seconds


def span(text: str) -> float:
    """A length of time: seconds, or as Slurm writes it: [days-]hours:minutes:seconds, minutes:seconds."""
    try:
        return float(text)
    except ValueError:
        match = re.fullmatch(r"\s*(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+(?:\.\d+)?))?\s*", text)
    if match is None:
        raise BadLineError(f"not a length of time: {text[:40]!a}")
    days, *clock = match.groups()
    parts = [float(part) for part in clock if part is not None]
    parts = parts + [0.0] * (3 - len(parts)) if days else [0.0] * (3 - len(parts)) + parts
    return float(days or 0) * 86400 + parts[0] * 3600 + parts[1] * 60 + parts[2]


def accepted(moves: Transitions) -> dict[str, int]:
    """Every name of a profile. One with an attribute takes the room of the plain one: only room counts here."""
    board = moves.geometry
    plain = {(board.by_name[name].compute, board.by_name[name].memory): i for i, name in enumerate(moves.profiles)}
    return {
        alias: plain[board.by_name[name].compute, board.by_name[name].memory]
        for alias, name in board.names().items()
        if (board.by_name[name].compute, board.by_name[name].memory) in plain
    }


def instances(
    items: Items, names: Names, moves: Transitions, fits: Callable[[Counts], bool], profiles: int
) -> list[int]:
    """The profiles that a job asks for, largest first."""
    for name, _ in items:
        if name not in names:
            known = " ".join(moves.profiles)
            raise BadLineError(f"unknown profile: {name[:40]!a}; {moves.geometry.model} has {known}")
    asked = sorted((names[name] for name, count in items for _ in range(count)), reverse=True)
    if not fits(tuple(asked.count(p) for p in range(profiles))):
        raise BadLineError("more than the GPUs can hold: " + ",".join(f"{name}:{count}" for name, count in items))
    return asked
