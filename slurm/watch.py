"""`rms watch`: sees to it that large jobs do not starve behind small ones. One per cluster, beside slurmctld.

A job that needs a whole GPU starts only where one is empty, and with small jobs in the queue none ever is: slurmctld
does not keep room for a job that the gate holds back. So this service reads the queue and tells a node to keep room for
the first large job that only a lack of room keeps from starting: it puts a line with an expiry in front of the node's
comment (rms/demand.py), which the node reads when it publishes what fits. The node decides which GPU. In the same line
every node is told what waits, for its policy.

`decide` and `lines` are pure; `Watch` asks and tells. When the service is down the lines expire, and nothing else
happens. It keeps no state that matters: what it decided stands in the comments.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from heapq import nsmallest
from itertools import islice
from typing import NamedTuple, NoReturn

from rms import demand, geometry, planner
from rms.demand import Told, Waiting
from rms.errors import RequestError
from rms.geometry import Geometry
from rms.planner import GpuView, View
from rms.request import Request, parse
from slurm.ask import Ask, Commands, Node, Queued, best
from slurm.publish import PREFIX
from slurm.slurmctld import SilentError, SlurmError

LIFE = 180
"""How long a line counts (s). It is renewed when half of that is over; nodes publish at least once a minute."""
GRACE = 120
"""How long a job may go on waiting (s) after the moment when there should have been room: something else holds it."""
AGAIN = 600
"""How long a node is then left out for this job (s): what held it may be over, and no other node may be left."""
UNKNOWN = 3600
"""When there will be room (s from now) if that hangs on jobs without a time limit."""
OVERTIME = 60
"""How long a job is taken to go on (s) that has passed its time limit: slurmctld looks once a minute."""
LATER = 600
"""By how much room may come later (s) than the earliest moment that was ever foreseen, before another node is tried.
Time limits are raised, and what runs without one, or past it, ends a little later each time one looks."""
FIRST = 64
"""So many large jobs are looked at, in their order."""
TRIED = 8
"""For so many nodes it is worked out when the job would have room, beginning with those that look best."""
SHARE = 10
"""Between two looks at the queue so many times the time passes that one took."""
SLOWEST = 60.0
"""The longest pause (s), where slurmctld does not answer or is slow: a line has to be renewed before it expires."""

ROOM = {"Resources", "Priority", "ReqNodeNotAvail", "Constraints"}
"""Why a job waits that waits for room. The gate shows as ReqNodeNotAvail (features) or Constraints (extra)."""
USELESS = ("down", "drain", "fail", "maint", "reserv", "reboot", "power", "unknown", "not_responding", "*", "future")
"""In the state of a node that starts no jobs now."""


class Keep(NamedTuple):
    """Room for a job's request on a node: on how many GPUs, and when it should be there (epoch)."""

    job: int
    request: str
    gpus: int
    free: float


class Promise(NamedTuple):
    """When there should be room (epoch): as the time limits say now, and the earliest moment that was ever foreseen."""

    free: float
    earliest: float

    def follow(self, free: float, now: float) -> Promise:
        """The promise after another look, which says that there is room at `free`. If it says that there is room now,
        the first look that said so counts."""
        earliest = min(self.earliest, free)
        return Promise(min(self.free, now) if free <= now else min(free, earliest + LATER), earliest)


def decide(
    jobs: Sequence[Queued], nodes: Sequence[Node], now: float, most: int, avoid: Iterable[tuple[int, str]] = ()
) -> dict[str, Keep]:
    """Which node keeps room for which job: at most one job a node, on at most `most` GPUs in all.

    `jobs` come by priority; `avoid` are jobs and nodes that go together no more. A node that keeps room for a job goes
    on with it.
    """
    running: dict[str, list[Queued]] = {}
    for job in jobs:
        if job.node:
            running.setdefault(job.node, []).append(job)
    standing = {node.name: told.job for node in nodes if (told := demand.read(node.comment, now)) and told.keep}
    avoided = set(avoid)
    boards = {board for node in nodes if (board := _board(node)[0])}

    def considered(job: Queued) -> bool:
        sizes = (large(asked, board) for board in boards if (asked := _request(job, board)))
        return waits_for_room(job) and job.features is not None and not job.reservation and any(sizes)

    kept: dict[str, Keep] = {}
    for job in islice(filter(considered, jobs), FIRST):
        if most <= 0:
            break
        there = [n for n in nodes if n.name not in kept and (job.id, n.name) not in avoided and may_run(job, n)]
        stays = [n for n in there if standing.get(n.name) == job.id]
        if found := _soonest(job, stays, running, now, most) or _soonest(job, there, running, now, most):
            kept[found[0]] = found[1]
            most -= found[1].gpus
    return kept


def _soonest(
    job: Queued, nodes: Sequence[Node], running: Mapping[str, Sequence[Queued]], now: float, most: int
) -> tuple[str, Keep] | None:
    """The node where a job has room first, on at most `most` GPUs."""
    promising = nsmallest(TRIED, nodes, key=lambda node: _sums(job, node, running.get(node.name, ()), now))
    found = [(node.name, room(job, node, running.get(node.name, ()), now)) for node in promising]
    fitting = [(keep.free, name, keep) for name, keep in found if keep and keep.gpus <= most]
    return min(fitting)[1:] if fitting else None


def waits_for_room(job: Queued) -> bool:
    """Whether only a lack of room keeps a job from starting: it is not held, over a limit, or for later."""
    return job.state == "PENDING" and job.priority > 0 and job.reason.partition(",")[0] in ROOM


def may_run(job: Queued, node: Node) -> bool:
    """Whether a job may run on a node at all, as far as partitions, names, profiles and features go: those of the site,
    since what nodes publish says what fits now, and nothing about later."""
    features = {name for name in job.features or () if not name.startswith(PREFIX)}
    return (
        not any(word in node.state for word in USELESS)
        and not {*job.partitions}.isdisjoint(node.partitions)
        and (not job.wants or node.name in job.wants)
        and node.name not in job.avoids
        and all(f"mig:{item.rpartition(':')[0]}" in node.gres for item in job.ticket.request.split(","))
        and features <= {*node.features}
    )


def room(job: Queued, node: Node, running: Iterable[Queued], now: float) -> Keep | None:
    """When a job will have room on a node; None for a small one, and where it never has.

    Which job is on which GPU only the node knows: here they are put where the built-in rule would have put them.
    """
    board, gpus = _board(node)
    asked = _request(job, board)
    if board is None or asked is None or not large(asked, board):
        return None
    view = View(tuple(GpuView(str(number), board) for number in range(gpus)), (), None, now)
    for other in sorted(running, key=lambda other: other.start or 0):
        if (theirs := _request(other, board)) is not None:
            end = _end(other, now)
            for decision in planner.plan(view, theirs, end) or ():
                view = planner.after(view, decision.choice.candidate, end)
    if (found := planner.first_room(view, asked)) is None:
        return None
    places = {gpu for gpu, _ in found.places}
    return Keep(job.id, str(asked), len(places), now + UNKNOWN if found.free is None else found.free)


def large(request: Request, board: Geometry) -> bool:
    """Whether smaller jobs can take its room bit by bit: everything but one instance of the least memory."""
    least = min(profile.memory for profile in board.profiles)
    return sum(board.by_name[name].memory for name in request.profiles) > least


def _sums(job: Queued, node: Node, running: Iterable[Queued], now: float) -> float:
    """When slices add up to what a job needs: a lower bound of when it has room, and quick."""
    board, gpus = _board(node)
    if board is None or (asked := _request(job, board)) is None:
        return float("inf")

    def memory(request: Request | None) -> int:
        return sum(board.by_name[name].memory for name in request.profiles) if request else 0

    theirs = sorted((_end(other, now) or now + UNKNOWN, memory(_request(other, board))) for other in running)
    free = gpus * board.slots - sum(slices for _, slices in theirs) - memory(asked)
    moment = now
    for end, slices in theirs:
        if free >= 0:
            break
        free += slices
        moment = end
    return moment if free >= 0 else float("inf")


def _end(job: Queued, now: float) -> float | None:
    if not (job.start and job.limit):
        return None
    end = job.start + job.limit * 60.0
    return end if end > now else now + OVERTIME


def _board(node: Node) -> tuple[Geometry | None, int]:
    """What the GPUs of a node are, going by its gres, and how many."""
    profiles = frozenset(name.removeprefix("mig:") for name in node.gres if name.startswith("mig:"))
    board = _geometry(profiles)
    if board is None:
        return None, 0
    name = next(profile.name for profile in reversed(board.profiles) if profile.name in profiles)
    return board, node.gres[f"mig:{name}"] // board.by_name[name].limit


@lru_cache
def _geometry(profiles: frozenset[str]) -> Geometry | None:
    # Boards whose profiles have the same names have the same placements. One may lack a name that means something else
    # on another board of this cluster (slurm/site.py).
    known = [geometry.load(model) for model in geometry.models()]
    having = [board for board in known if profiles and profiles <= {*board.by_name}]
    return min(having, key=lambda board: len(board.profiles), default=None)


def _request(job: Queued, board: Geometry | None) -> Request | None:
    return _parsed(job.ticket.request, board) if board else None


@lru_cache(maxsize=4096)
def _parsed(request: str, board: Geometry) -> Request | None:
    try:
        return parse(request, board)
    except RequestError:  # of another board
        return None


def waiting(jobs: Iterable[Queued], node: Node) -> tuple[Waiting, ...]:
    """The first jobs that wait for room and may run in the node's partitions."""
    here = (job for job in jobs if waits_for_room(job) and not {*job.partitions}.isdisjoint(node.partitions))
    return demand.queue(Waiting(job.ticket.request, job.tasks, job.limit or 0, job.submit) for job in here)


def lines(
    jobs: Sequence[Queued], nodes: Sequence[Node], kept: Mapping[str, Keep], now: float
) -> dict[str, tuple[str, ...]]:
    """The comments to set, each with its nodes: where the room to keep changes, or a line has lived half of its life.

    A node is not told at once that the queue has changed, or that nothing waits any more: it learns in time.
    """
    queues: dict[tuple[str, ...], tuple[Waiting, ...]] = {}
    found: dict[str, tuple[str, ...]] = {}
    for node in nodes:
        queue = queues.setdefault(node.partitions, waiting(jobs, node))
        keep = kept.get(node.name)
        wanted = Told(int(now) + LIFE, keep.job if keep else 0, keep.request if keep else "", queue)
        own = demand.own_text(node.comment)
        stands = demand.read(node.comment, now)
        if keep or queue:
            young = stands is not None and stands.until - now > LIFE / 2
            if young and stands and (stands.job, stands.keep) == (wanted.job, wanted.keep):
                continue
            comment = f"{wanted}{own}"
        elif own != node.comment and (stands is None or stands.keep):
            comment = own
        else:
            continue
        found[comment] = (*found.get(comment, ()), node.name)
    return found


class Watch:
    """Asks, decides, tells. `most`: on how many GPUs room is kept at most, in all. Raises SlurmError."""

    def __init__(self, ask: Ask, commands: Commands, most: int, log: Callable[[str], None]) -> None:
        self._ask = ask
        self._commands = commands
        self._most = most
        self._log = log
        self._kept: dict[str, Keep] = {}
        self._promised: dict[tuple[int, str], Promise] = {}
        self._quiet = False

    def look(self, now: float) -> None:
        """One look at the queue, and what follows from it."""
        jobs = self._ask.queue()
        alive = {job.id for job in jobs if job.state == "PENDING"}
        if not alive and self._quiet:
            return
        nodes = self._ask.nodes()
        overdue = {
            key: promise
            for key, promise in self._promised.items()
            if key[0] in alive and promise.free + GRACE < now <= promise.free + GRACE + AGAIN
        }
        kept = decide(jobs, nodes, now, self._most, overdue)
        for comment, names in lines(jobs, nodes, kept, now).items():
            self._commands.comment(names, comment)
        self._tell_of(kept)
        made = {(keep.job, name): keep.free for name, keep in kept.items()}
        known = {key: self._promised.get(key, Promise(free, free)) for key, free in made.items()}
        self._promised = overdue | {key: promise.follow(made[key], now) for key, promise in known.items()}
        self._kept = kept
        self._quiet = all(demand.own_text(node.comment) == node.comment for node in nodes)

    def _tell_of(self, kept: Mapping[str, Keep]) -> None:
        for name, keep in kept.items():
            if (before := self._kept.get(name)) is None or before.job != keep.job:
                when = time.strftime("%H:%M:%S", time.localtime(keep.free))
                self._log(f"{name}: keep room for {keep.request} of job {keep.job}, to be there at about {when}")
        for name, keep in self._kept.items():
            if name not in kept:
                self._log(f"{name}: no room to keep any more for job {keep.job}")


def run(slurm_conf: str, most: int, seconds: float, log: Callable[[str], None]) -> NoReturn:
    """The service: looks every `seconds`, more rarely where that takes long or slurmctld does not answer. No end."""
    commands = Commands(slurm_conf)
    watch = Watch(best(slurm_conf, log), commands, most, log)
    pause, silent = seconds, False
    while True:
        began = time.monotonic()
        try:
            watch.look(time.time())
            if silent:
                log("slurmctld answers again")
            pause, silent = max(seconds, min(SHARE * (time.monotonic() - began), SLOWEST)), False
        except SlurmError as error:
            if not silent:
                log(f"{'waiting for slurmctld' if isinstance(error, SilentError) else 'trying again'}: {error}")
            pause, silent = min(2 * pause, SLOWEST), True
        time.sleep(pause)
