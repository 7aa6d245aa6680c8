"""Asking slurmctld for the whole queue: for what asks often, `rms watch` and the administrator's tools. No hook does.

One interface, two ways. `Commands` works with every Slurm. `Pyslurm` starts no process for a question, but it has to be
built for the very Slurm of the site, and may end or block its process: so it lives in one of its own. Both give the
same answers (tests/test_ask.py), and with a long queue they take equally long.

squeue is asked for a format, not for JSON: of that there are two shapes, and it takes long (1,500 jobs: 0.19 s and 5 MB
with Slurm 22.05, 0.62 s and 13 MB with 26.05; the format 0.03 s with either).
"""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from rms.errors import RequestError
from rms.request import Ticket, parse_comment
from slurm.publish import PREFIX
from slurm.slurmctld import PATH, SilentError, Slurmctld, SlurmError, present

STATES = ("PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING")
"""Jobs in other states are over."""
SECONDS = 10.0
"""How long an answer may take, either way."""
WIDE, WIDEST = 1500, 24000
"""Bytes of the columns for a node's gres, features and comment, which have no limit. sinfo cuts off what is longer.
Such a node is asked for once more, and left alone where that does not do either."""
OURS = f",{PREFIX}".encode()


class Queued(NamedTuple):
    """A job that asks for MIG and is not over. `limit` is in minutes (None for none), `submit` and `start` are epochs
    (`start` is None while it waits), `node` is where it runs. `wants` and `avoids` are nodes that the user named.
    `features` is None where they are more than names that must all be there. `tasks`: how many of an array wait."""

    id: int
    state: str
    reason: str
    priority: int
    partitions: tuple[str, ...]
    ticket: Ticket
    limit: int | None
    submit: int
    start: int | None
    node: str
    wants: tuple[str, ...]
    avoids: tuple[str, ...]
    features: tuple[str, ...] | None
    reservation: str
    tasks: int


class Node(NamedTuple):
    """A node with MIG. `partitions` are those that start jobs; `gres` is what it has, say `mig:7g.80gb` -> 2."""

    name: str
    state: str
    partitions: tuple[str, ...]
    gres: dict[str, int]
    features: tuple[str, ...]
    comment: str


class Ask(Protocol):
    """Either way. Raises SilentError where slurmctld does not answer in time, SlurmError for what else goes wrong."""

    def queue(self) -> list[Queued]:
        """Every job with MIG that waits, runs or ends, by priority, highest first, then by age."""

    def nodes(self) -> list[Node]:
        """Every node with MIG, by name."""


class Commands(Slurmctld):
    """By Slurm's own commands."""

    def __init__(self, slurm_conf: str, seconds: float = SECONDS) -> None:
        super().__init__(slurm_conf, seconds)
        self._environment |= {"SLURM_BITSTR_LEN": "200"}

    def queue(self) -> list[Queued]:
        # Nobody can know it, so no comment with a line feed in it becomes a job of its own.
        separator = f"|{secrets.token_hex(8)}|"
        form = separator.join(
            ["%A", "%T", "%r", "%Q", "%P", "%l", "%V", "%S", "%N", "%n", "%x", "%f", "%v", "%K", "%k"]
        )
        shown = self.run("squeue", "--noheader", "--all", f"--states={','.join(STATES)}", f"--format={form}")
        rows = (line.split(separator, 14) for line in shown.split("\n"))
        return _sorted(_queued(row, self.hosts) for row in rows if len(row) == 15)

    def nodes(self) -> list[Node]:
        whole, cut = self._rows(WIDE)
        if cut:
            whole += self._rows(WIDEST, f"--nodes={','.join(sorted(cut))}")[0]
        return _nodes(whole)

    def _rows(self, wide: int, *which: str) -> tuple[list[list[str]], set[str]]:
        """The rows of the nodes that are shown whole, and the names of those that are not."""
        fields = {"NodeList": 100, "PartitionName": 100, "StateComplete": 100, "Available": 20}
        fields |= dict.fromkeys(("Gres", "Features", "Comment"), wide)
        form = ",".join(f"{name}:{width}" for name, width in fields.items())
        ends = [*accumulate(fields.values())]  # in bytes
        whole, cut = [], set()
        shown = self.run("sinfo", "--noheader", "--all", "--Node", *which, f"--Format={form}")
        for line in map(os.fsencode, shown.split("\n")):
            if len(line) < ends[-1]:
                continue  # the end, or a comment with a line feed in it: the rest of it would be lost
            row = [line[end - width : end].strip(b" ") for end, width in zip(ends, fields.values(), strict=True)]
            gres, features, comment = row[4:]
            # Of features the site's own come first; which of ours are there makes no difference here.
            if max(len(gres), len(comment)) == wide or (len(features) == wide and OURS not in b"," + features):
                cut.add(os.fsdecode(row[0]))
            else:
                whole.append([os.fsdecode(text) for text in row])
        return whole, cut

    def hosts(self, names: str) -> tuple[str, ...]:
        """A list of hosts, `n[1-2],m`, as single names."""
        return _hosts(self.run, names)

    def comment(self, nodes: Iterable[str], text: str) -> None:
        """Set the comment of nodes."""
        self.run("scontrol", "update", f"NodeName={','.join(nodes)}", f"Comment={text}")

    def version(self) -> str:
        """The site's Slurm, as 26.05.5."""
        return self.run("scontrol", "--version").split()[-1]


class Pyslurm:
    """By pyslurm, in a process of its own. Where that does not answer it is ended; the next question starts another."""

    def __init__(self, slurm_conf: str, seconds: float = SECONDS) -> None:
        self._environment = {"PATH": PATH, "SLURM_CONF": present(slurm_conf), "LC_ALL": "C.UTF-8"}
        self._seconds = seconds
        self._commands = Commands(slurm_conf, seconds)
        self._helper: subprocess.Popen[bytes] | None = None

    def queue(self) -> list[Queued]:
        return _sorted(_queued(row, self._commands.hosts) for row in self._ask("queue"))

    def nodes(self) -> list[Node]:
        return _nodes(self._ask("nodes"))

    def version(self) -> str:
        """Of the Slurm that this pyslurm was made for, as 26.5.0."""
        found: str = self._ask("version")[0][0]
        return found

    def close(self) -> None:
        """End the helper."""
        if self._helper:
            self._helper.kill()
            self._helper.communicate()
        self._helper = None

    def _ask(self, what: str) -> list[list[str]]:
        """One question, one line of JSON back."""
        if self._helper is None or self._helper.poll() is not None:
            self.close()
            self._helper = subprocess.Popen(
                [sys.executable, "-I", "-m", "slurm.ask"],
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
            )
        pipe, answers = self._helper.stdin, self._helper.stdout
        assert pipe and answers  # noqa: S101 (for mypy: both are pipes)
        until = time.monotonic() + self._seconds
        answer = b""
        try:
            pipe.write(f"{what}\n".encode())
            pipe.flush()
            while not answer.endswith(b"\n"):
                ready, _, _ = select.select([answers], [], [], max(until - time.monotonic(), 0))
                more = os.read(answers.fileno(), 1 << 20) if ready else b""
                if not more:
                    text = "pyslurm's process ended" if ready else f"pyslurm: no answer in {self._seconds:g} s"
                    self.close()
                    raise SilentError(text)
                answer += more
        except OSError as error:
            self.close()
            raise SilentError(f"pyslurm's process ended: {error}") from None
        found = json.loads(answer)
        if "fault" in found:
            raise SilentError(f"pyslurm: {found['fault']}")
        rows: list[list[str]] = found["rows"]
        return rows


def best(slurm_conf: str, log: Callable[[str], None]) -> Ask:
    """The way to ask here: pyslurm where it answers and was made for this very Slurm, the commands everywhere else."""
    commands = Commands(slurm_conf)
    helper = Pyslurm(slurm_conf)
    try:
        made_for, site = (re.findall(r"\d+", one.version()) for one in (helper, commands))
        if [int(n) for n in made_for[:2]] == [int(n) for n in site[:2]]:
            log("asking slurmctld through pyslurm")
            return helper
        why = f"pyslurm is for Slurm {'.'.join(made_for[:2])}, this is {'.'.join(site[:2])}"
    except SlurmError as error:
        why = str(error)
    helper.close()
    log(f"asking slurmctld through its commands ({why})")
    return commands


# What both have in common: a row of texts, as squeue and sinfo print them, becomes a job or a node.


def _queued(row: list[str], hosts: Callable[[str], tuple[str, ...]]) -> Queued | None:
    job, state, reason, priority, partition, limit, submit, start, node, wants, avoids, features, reservation = row[:13]
    with suppress(RequestError, ValueError):  # one odd row must not hide all others
        if ticket := parse_comment(row[14]):
            return Queued(
                int(job),
                state,
                reason,
                int(priority),
                tuple(partition.split(",")),
                ticket,
                minutes(limit),
                int(submit),
                int(start) if start.isdecimal() and state != "PENDING" else None,
                _given(node) if state != "PENDING" else "",
                hosts(_given(wants)),
                hosts(_given(avoids)),
                _names(_given(features)),
                _given(reservation),
                tasks(row[13]) if state == "PENDING" else 1,
            )
    return None


def _sorted(jobs: Iterable[Queued | None]) -> list[Queued]:
    return sorted((job for job in jobs if job), key=lambda job: (-job.priority, job.submit, job.id))


def _nodes(rows: Iterable[list[str]]) -> list[Node]:
    """From rows of node and partition: name, partition, state, partition's state, gres, features, comment."""
    found: dict[str, Node] = {}
    for row in rows:
        if len(row) == 7 and (gres := _counts(row[4])):
            name, partition, state, available, _, features, comment = row
            has = tuple(filter(None, _given(features).split(",")))
            known = found.get(name, Node(name, state.lower(), (), gres, has, _given(comment)))
            more = (partition,) if partition and available.lower() == "up" else ()
            found[name] = known._replace(partitions=tuple(sorted({*known.partitions, *more})))
    return [found[name] for name in sorted(found)]


def _counts(gres: str) -> dict[str, int]:
    """`mig:7g.80gb:2,migc:14,gpu:a:1(S:0)` -> the counts of what is ours."""
    found = {}
    for item in gres.split(","):
        name, _, count = item.partition("(")[0].rpartition(":")
        if name.startswith("mig") and count.isdecimal():
            found[name] = int(count)
    return found if any(name.startswith("mig:") for name in found) else {}


def _given(text: str) -> str:
    return "" if text in ("(null)", "N/A", "None") else text


def _names(features: str) -> tuple[str, ...] | None:
    """`a100&ib`, or `a100,ib`, as names; None for anything with a choice or a count in it."""
    if re.search(r"[^\w&,.:=/+-]", features):
        return None
    return tuple(name for name in re.split("[&,]", features) if name)


def minutes(limit: str) -> int | None:
    """`1-02:03:04`, `3:00`, `90` as squeue prints a time limit, in minutes; None where there is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return None
    days, hours, mins, seconds = (int(part or 0) for part in match.groups())
    return days * 1440 + hours * 60 + mins + (seconds > 0)


def tasks(array: str) -> int:
    """How many tasks `0-9%3` or `1,4-8:2` are; 1 for a job without an array. squeue may cut it off (`...`)."""
    count = 0
    for part in array.partition("%")[0].split(","):
        if match := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            count += (int(match[2] or match[1]) - int(match[1])) // int(match[3] or 1) + 1
    return max(count, 1)


@lru_cache(maxsize=4096)  # each is a process; the same are asked for at every look
def _hosts(run: Callable[..., str], names: str) -> tuple[str, ...]:
    if "[" not in names:
        return tuple(name for name in names.split(",") if name)
    return tuple(run("scontrol", "show", "hostnames", names).split())


# The helper process.


def _rows(what: str) -> list[list[str]]:
    import pyslurm

    def text(value: Any) -> str:
        return "" if value is None else str(value)

    if what == "queue":
        return [
            [
                str(job.id),
                job.state,
                text(job.state_reason),
                str(job.priority or 0),
                text(job.partition),
                f"{job.time_limit}:00" if isinstance(job.time_limit, int) else "",
                str(job.submit_time or 0),
                text(job.start_time),
                text(job.allocated_nodes),
                text(job.required_nodes),
                text(job.excluded_nodes),
                ",".join(job.constraints or ()),
                text(job.reservation),
                text(job.array_tasks_waiting),
                text(job.comment),
            ]
            for job in pyslurm.Jobs.load().values()
            if job.state in STATES and (job.comment or "").startswith("rms1:")
        ]
    if what == "nodes":
        partitions = pyslurm.Partitions.load().values()
        rows = []
        for node in pyslurm.Nodes.load().values():
            gres = ",".join(f"{name.removeprefix('gres/')}:{count}" for name, count in node.configured_gres.items())
            here = [p for p in partitions if p.name in (node.partitions or ())]
            for name, state in [(p.name, p.state) for p in here] or [("", "")]:
                features = ",".join(node.available_features)
                rows.append([node.name, name, node.state, state, gres, features, text(node.comment)])
        return rows
    return [[pyslurm.__version__]]


def _help() -> None:
    """Answers questions until the pipe is closed. Whatever the library prints goes elsewhere."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        try:
            answer: dict[str, Any] = {"rows": _rows(line.strip())}
        except ModuleNotFoundError:
            answer = {"fault": "not installed"}
        except Exception as error:  # of any kind: slurmctld away, an attribute that this pyslurm does not have
            answer = {"fault": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _help()
