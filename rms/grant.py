"""The grant: one small root-owned file per job that tells the job's own side what its Prolog decided.

    granted 0 65534 tin 3g.40gb:1   status, restart count, uid, cluster, request; then one MIG UUID a line, in order
    refused 1                       no instance for this run; the job must not run
    none 0                          no MIG request
    ended 0                         was granted, but its Epilog has begun: the next call releases it if that one died

The shell part of the Prolog writes refused or none before anything else, so that a Prolog that is killed has refused;
that of the Epilog writes ended.

`slurm/task_prolog` reads it with nothing but the shell. A missing file means that no Prolog ran: Slurm 22.05 can start
a requeued job without one (docs/slurm.md), which is why a refusal outlives its run's Epilog.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from rms import files
from rms.errors import NodeError
from rms.inventory import Run

STALE_SECONDS = 30 * 86400
"""A refusal whose job never came back here is swept after this long."""


class Grant(NamedTuple):
    """What the file of a job says. From `uid` on only when granted."""

    status: str
    restart: int
    uid: int = -1
    cluster: str = ""
    request: str = ""
    uuids: tuple[str, ...] = ()


def directory(run_dir: str, make: bool = True) -> str:
    """The directory of the files, made if missing. Raises NodeError if a user could have put something in its place."""
    path = os.path.join(run_dir, "jobs")
    try:
        for place in (run_dir, path):
            if not os.path.lexists(place):
                if not make:
                    break
                os.makedirs(place, exist_ok=True)
                # Whatever our umask: each user's TaskProlog reads here, only root writes.
                os.chmod(place, 0o755)  # noqa: S103
            # A site may have made run_dir a link.
            if not files.private(place if place == path else os.path.realpath(place)):
                raise NodeError(
                    f"{place} must be a directory of root's own that only root can write, and is not: "
                    "make it so, or remove it"
                )
    except OSError as error:
        raise NodeError(f"cannot use {path}: {error.strerror}") from error
    return path


def write(run_dir: str, run: Run, grant: Grant) -> None:
    """Leave the file for a job, unless a newer run of it has left one. Raises NodeError."""
    path = os.path.join(directory(run_dir), str(run.job))
    present = read(run_dir, run.job)
    if present and present.restart > run.restart:
        return
    first = f"{grant.status} {grant.restart}" + (
        f" {grant.uid} {grant.cluster} {grant.request}" if grant.request else ""
    )
    try:
        files.replace(path, "".join(f"{line}\n" for line in (first, *grant.uuids)).encode(), 0o644, durable=False)
    except OSError as error:
        raise NodeError(f"cannot write {path}: {error.strerror}") from error


def read(run_dir: str, job: int) -> Grant | None:
    """What the file of a job says; None if there is none, or none that makes sense."""
    try:
        with open(os.path.join(run_dir, "jobs", str(job)), encoding="ascii", opener=_opened) as file:
            lines = file.read().splitlines()
        status, restart, *rest = lines[0].split()
        uid, cluster, request = rest or ("-1", "", "")
        return Grant(status, int(restart), int(uid), cluster, request, tuple(lines[1:]))
    except (OSError, ValueError, IndexError):
        return None


def _opened(path: str, flags: int) -> int:
    # Not through a link, and not waiting for what is no file.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def end(run_dir: str, run: Run) -> None:
    """Let the grant of a run no longer count: it is being released. Raises NodeError."""
    present = read(run_dir, run.job)
    if present and present.status == "granted":
        write(run_dir, run, Grant("ended", present.restart))


def ended(run_dir: str, run: Run) -> bool:
    """Whether the Epilog of a run has begun."""
    present = read(run_dir, run.job)
    return present is not None and present.status == "ended" and present.restart >= run.restart


def remove(run_dir: str, run: Run) -> None:
    """Take away the file of a run that is over. A refusal stays: the job may come back without a Prolog.

    Raises NodeError.
    """
    path = os.path.join(directory(run_dir), str(run.job))
    present = read(run_dir, run.job)
    if present and present.restart <= run.restart and present.status != "refused":
        try:
            with suppress(FileNotFoundError):
                os.unlink(path)
        except OSError as error:
            raise NodeError(f"cannot remove {path}: {error.strerror}") from error


def granted(run_dir: str) -> dict[int, Grant]:
    """Every grant that stands, by job id: what a recovery has to respect."""
    found = {}
    for name in os.listdir(directory(run_dir)):
        if name.isdecimal() and (grant := read(run_dir, int(name))) and grant.status == "granted":
            found[int(name)] = grant
    return found


def sweep(run_dir: str) -> None:
    """Drop refusals so old that their jobs will not come back. What a job still runs with may be older than that."""
    limit = time.time() - STALE_SECONDS
    for entry in os.scandir(directory(run_dir)):
        with suppress(OSError):  # the hooks' shell parts write and remove without a lock
            if entry.stat(follow_symlinks=False).st_mtime < limit:
                kept = read(run_dir, int(entry.name)) if entry.name.isdecimal() else None
                if kept is None or kept.status in ("refused", "ended"):
                    os.unlink(entry.path)


def refuse(run_dir: str, run: Run) -> None:
    """Leave word that this run gets nothing."""
    sweep(run_dir)
    write(run_dir, run, Grant("refused", run.restart))


def give(run_dir: str, run: Run, uid: int, request: str, uuids: Sequence[str]) -> None:
    """Leave word which instances this run has."""
    write(run_dir, run, Grant("granted", run.restart, uid, run.cluster, request, tuple(uuids)))
