"""What no policy that never moves a running job can be expected to beat: two references, not policies.

`free_migration`: running jobs may be repacked at any moment, at no cost. `clairvoyant`: nothing is ever moved, but all
arrivals and ends are known beforehand; what fits is placed all the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np

from policy.simulator import Node
from policy.transitions import Transitions
from policy.workload import Floats, Jobs, first_rows, sizes
from rms.errors import RequestError
from rms.geometry import Counts, undominated

MOST_STATES = 200_000
"""Where the clairvoyant search gives up: about a gigabyte."""


class Packing:
    """Whether instances fit on empty GPUs together, wherever they are put. Exact; answers are remembered."""

    def __init__(self, moves: Transitions) -> None:
        profiles = range(len(moves.profiles))
        held = {tuple(sum(p.profile == moves.profiles[i] for p in s) for i in profiles) for s in moves.states}
        full = undominated(held)
        self.slots = moves.geometry.slots
        self.memory = tuple(int(size) for size in sizes(moves))
        # Any packing can be put in an order in which each GPU holds one of the largest instances that are left.
        self.holding = [[counts for counts in full if counts[i]] for i in profiles]
        self.known: dict[tuple[Counts, int], bool] = {}

    def fits(self, counts: Counts, gpus: int) -> bool:
        """Whether these counts of each profile go on that many GPUs."""
        largest = max((i for i, count in enumerate(counts) if count), default=-1)
        if largest < 0:
            return True
        if sum(c * m for c, m in zip(counts, self.memory, strict=True)) > gpus * self.slots:
            return False
        key = counts, gpus
        if key not in self.known:
            left = {tuple(max(0, c - h) for c, h in zip(counts, held, strict=True)) for held in self.holding[largest]}
            self.known[key] = any(self.fits(rest, gpus - 1) for rest in sorted(left, key=sum))
        return self.known[key]


def fewest_gpus(moves: Transitions, jobs: Jobs) -> float:
    """The time-average of the fewest GPUs that hold what runs, were it repacked at every moment and nobody waited."""
    packing = Packing(moves)
    heads, asked = requests(jobs, len(moves.profiles))
    submit, end = jobs.submit[heads], (jobs.submit + jobs.duration)[heads]
    events = sorted([(float(t), 1, i) for i, t in enumerate(submit)] + [(float(t), -1, i) for i, t in enumerate(end)])
    busy: Counts = (0,) * len(moves.profiles)
    gpus, since, total = 0, 0.0, 0.0
    for now, sign, job in events:
        total += gpus * (now - since)
        since = now
        busy = tuple(b + sign * a for b, a in zip(busy, asked[job], strict=True))
        while not packing.fits(busy, gpus):
            gpus += 1
        while gpus and packing.fits(busy, gpus - 1):
            gpus -= 1
    return total / since


def requests(jobs: Jobs, profiles: int) -> tuple[list[int], list[Counts]]:
    """The first row of each job, and how many instances of each profile it asks for."""
    heads = np.flatnonzero(first_rows(jobs)).tolist()
    units = [tuple(int(i == p) for i in range(profiles)) for p in range(profiles)]
    asked = []
    for head in heads:
        rows = jobs.profile[head : head + jobs.rest[head] + 1].tolist()
        asked.append(units[rows[0]] if len(rows) == 1 else tuple(rows.count(p) for p in range(profiles)))
    return heads, asked


def free_migration(
    moves: Transitions, node: Node, jobs: Jobs, progress: Callable[[float], None] = lambda done: None
) -> Floats:
    """When each row starts (nan: lost) on a fixed pool where what runs is repacked whenever that makes room.

    Loss mode or greedy backfill as the policies have it, without a reservation. Not a bound in the strict sense, since
    a request that repacking let in can cost others: in practice nothing came near it.
    """
    packing = Packing(moves)
    heads, asked = requests(jobs, len(moves.profiles))
    starts = np.full(len(jobs.submit), np.nan)
    submit, duration = jobs.submit.tolist(), jobs.duration.tolist()
    busy: Counts = (0,) * len(moves.profiles)
    running: list[tuple[float, int]] = []
    waiting: list[int] = []
    arrived = 0
    while arrived < len(heads) or running:
        arrival = submit[heads[arrived]] if arrived < len(heads) else np.inf
        now = min(arrival, running[0][0]) if running else arrival
        if running and running[0][0] <= arrival:
            while running and running[0][0] == now:
                _, job = heapq.heappop(running)
                busy = tuple(b - a for b, a in zip(busy, asked[job], strict=True))
        else:
            waiting.append(arrived)
            arrived += 1
            if arrived % 1000 == 0:
                progress(arrived / len(heads))
        refused, started = set[Counts](), set[int]()
        for job in waiting[: max(node.depth, 1)]:
            if asked[job] in refused:
                continue
            grown = tuple(b + a for b, a in zip(busy, asked[job], strict=True))
            if packing.fits(grown, node.gpus):
                busy = grown
                started.add(job)
                head = heads[job]
                starts[head : head + jobs.rest[head] + 1] = now
                heapq.heappush(running, (now + duration[head], job))
            else:
                refused.add(asked[job])
        if not node.depth:
            waiting = []
        elif started:
            waiting = [job for job in waiting if job not in started]
    return starts


State = tuple[tuple[tuple[int, float], ...], ...]
"""For each GPU the placements that are busy, each with when it ends; GPUs sorted, since they are interchangeable."""


def clairvoyant(
    moves: Transitions, node: Node, jobs: Jobs, progress: Callable[[float], None] = lambda done: None
) -> Floats:
    """When each row starts (nan: lost) where the most memory slices are accepted in loss mode, by a policy that knows
    what will come and when all ends, places what fits and moves nothing. All that can be reached is looked at.

    Raises RequestError where that is too much: 200 jobs on 2 GPUs at load 0.7 take a second, 60 on 4 can't be done.
    """
    memory = sizes(moves).astype(int).tolist()
    heads, asked = requests(jobs, len(moves.profiles))
    worth = [sum(c * m for c, m in zip(counts, memory, strict=True)) for counts in asked]
    to_come = sum(worth)
    # What was accepted at most on the way to each state, and which jobs, as bits.
    reached: dict[State, tuple[int, int]] = {((),) * node.gpus: (0, 0)}
    for number, (head, gain) in enumerate(zip(heads, worth, strict=True)):
        progress(number / len(heads))
        now, end = float(jobs.submit[head]), float(jobs.submit[head] + jobs.duration[head])
        rows = jobs.profile[head : head + jobs.rest[head] + 1].tolist()
        following: dict[State, tuple[int, int]] = {}
        for state, (accepted, which) in reached.items():
            here = tuple(sorted(tuple(one for one in gpu if one[1] > now) for gpu in state))
            ways = {here}
            for profile in rows:
                ways = {way for before in ways for way in placed(moves, before, profile, end)}
            then = (accepted + gain, which | 1 << number) if ways else (accepted, which)
            for way in ways or {here}:
                following[way] = max(following.get(way, then), then)
        # Whoever could not catch up with the best by accepting all that is to come is out.
        to_come -= gain
        best, _ = max(following.values())
        reached = {state: one for state, one in following.items() if one[0] + to_come >= best}
        if len(reached) > MOST_STATES:
            raise RequestError(
                f"too long for the clairvoyant bound: more than {MOST_STATES} states at job {number + 1}"
            )
    _, which = max(reached.values())
    starts = np.full(len(jobs.submit), np.nan)
    for number, head in enumerate(heads):
        if which >> number & 1:
            starts[head : head + jobs.rest[head] + 1] = jobs.submit[head]
    return starts


def placed(moves: Transitions, state: State, profile: int, end: float) -> set[State]:
    """Every state that one more instance can lead to."""
    found = set()
    for g, gpu in enumerate(state):
        if gpu in state[:g]:
            continue
        number = 0
        for k, _ in gpu:
            number = moves.after[number][k]
        for k in moves.of_profile[profile]:
            if moves.after[number][k] >= 0:
                grown = tuple(sorted([*gpu, (k, end)]))
                found.add(tuple(sorted([*state[:g], grown, *state[g + 1 :]])))
    return found
