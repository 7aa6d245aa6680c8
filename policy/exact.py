"""Small nodes solved exactly, in loss mode with exponential service: the optimum, and any rule's own acceptance.

No seeds: acceptance, weighted by memory slices, is computed from the Markov chain itself, by value iteration in place
until a last look at every state bounds the answer. The optimum is work-conserving as every policy is: what fits is
placed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import comb
from typing import NamedTuple

import numpy as np

from policy.jit import compiled, inlined
from policy.rules import Array, Rule, tabulate
from policy.simulator import Node, choose_all, world
from policy.transitions import Transitions
from policy.workload import Floats, rate, sizes

CLOSE = 1e-5
"""Value iteration ends when acceptance is bounded this closely."""
BLOWN_UP = 1e3
SWEEPS = 8
"""How often all states are visited between two looks at the bounds."""
LOOKS = 500
"""After so many it will never converge; 3 GPUs take 25."""


class Optimum(NamedTuple):
    """The best acceptance, and the value of every state of the node: `value[rank(classes)]`, where `classes` are those
    of its GPUs in `Transitions.classes`. The empty node's is 0; 1 is all that is offered in one mean service time."""

    acceptance: float
    value: Floats


class Demand(NamedTuple):
    """The arrivals of each profile per mean service time, what one is worth (its share of all slices offered), and the
    most events that any state sees in a mean service time."""

    arrivals: Floats
    worth: Floats
    most: float


def demand(moves: Transitions, gpus: int, shares: Floats, load: float) -> Demand:
    """What the chain of a node needs to know of a mix at a load."""
    arrivals = rate(moves, shares, load, gpus) * shares
    most = arrivals.sum() + gpus * max(len(state) for state in moves.states)
    return Demand(arrivals, sizes(moves) / (arrivals @ sizes(moves)), float(most))


def optimum(moves: Transitions, gpus: int, shares: Floats, load: float) -> Optimum:
    """The best that any work-conserving policy can do.

    GPUs are interchangeable for it, and so are the states of a class: 1, 2, 3 and 4 A100s have 100, 5,050, 171,700 and
    4,421,275 states.
    """
    asked = demand(moves, gpus, shares, load)
    after, before = merged(moves)
    count = comb(len(after) + gpus - 1, gpus)
    binomials = pascal(len(after), gpus)
    return iterate(count, asked, lambda value, gain, step: improve(after, before, binomials, asked, value, gain, step))


def evaluate(moves: Transitions, gpus: int, shares: Floats, load: float, r: Rule) -> Optimum:
    """The same for a rule, its times left out. The order of GPUs counts, since ties go by it."""
    asked = demand(moves, gpus, shares, load)
    members, lumps = lumped(moves, r)
    after = np.array([[lumps.get(t, -1) for t in moves.after[s]] for s in members], dtype=np.int32)
    before = padded([[lumps[t] for t in moves.before[s] if t >= 0] for s in members])
    count = len(members) ** gpus
    t = tabulate(moves)
    if r.random:
        return iterate(
            count, asked, lambda value, gain, step: wander(after, before, t.first, gpus, asked, value, gain, step)
        )
    node = Node(gpus)
    where = np.empty((count, len(shares)), dtype=np.int32)
    choose_all(t, node, r._replace(rate=0.0), world(t, node, 0), np.array(members), where)
    reach(after, gpus, where)
    return iterate(count, asked, lambda value, gain, step: follow(before, where, gpus, asked, value, gain, step))


def iterate(count: int, asked: Demand, sweep: Callable[[Floats, float, float], tuple[float, float]]) -> Optimum:
    """Value iteration. `sweep(value, gain, step)` returns the least and the greatest gain that a state sees from
    `value`, and takes every value that far towards seeing `gain`; with step 0 the two bound the truth."""
    # Steps beyond 1 halve the number of sweeps. Where states are visited in a bad order they blow up, and once in some
    # hundred mixes they go round in circles; 1 never does.
    for relaxation in (1.6, 1.0):
        value, gain = np.zeros(count), 0.0
        for _ in range(LOOKS):
            for _ in range(SWEEPS):
                low, high = sweep(value, gain, relaxation / asked.most)
                gain = (low + high) / 2
            value -= value[0]
            low, high = sweep(value, gain, 0.0)
            apart = high - low
            if 0.0 <= apart < CLOSE:  # once values are no numbers the bounds are the wrong way round
                return Optimum((low + high) / 2, value)
            if not 0.0 <= apart < BLOWN_UP:
                break
    raise ArithmeticError("value iteration does not converge")


def rank(classes: Iterable[int]) -> int:
    """The number of a node state: of the classes of its GPUs, whatever their order."""
    return sum(comb(c + i, i + 1) for i, c in enumerate(sorted(classes)))


def merged(moves: Transitions) -> tuple[Array, Array]:
    """One GPU on its classes: those that a profile can lead to, [class, profile, ...], and those that a departure
    leads to, [class, ...]; padded with -1."""
    sample = {c: s for s, c in enumerate(moves.classes)}
    leads = [
        [
            sorted({moves.classes[moves.after[sample[c]][k]] for k in places if moves.after[sample[c]][k] >= 0})
            for places in moves.of_profile
        ]
        for c in range(len(sample))
    ]
    widest = max(len(row) for rows in leads for row in rows)
    after = np.array([[row + [-1] * (widest - len(row)) for row in rows] for rows in leads], dtype=np.int32)
    before = [[moves.classes[t] for t in moves.before[sample[c]] if t >= 0] for c in range(len(sample))]
    return after, padded(before)


def lumped(moves: Transitions, r: Rule) -> tuple[list[int], Mapping[int, int]]:
    """The fewest groups of states between which a rule's own chain can't tell: one member of each, the empty state's
    group first, and the group of every state that the rule can reach."""
    pooled = r.random or bool(r.capability.any())  # the choice on a GPU depends on the others, or on chance

    def options(s: int) -> list[list[tuple[int, int]]]:
        found = []
        for p, places in enumerate(moves.of_profile):
            legal = [k for k in places if moves.after[s][k] >= 0]
            if not pooled:
                legal = [int(r.best[s, p])] if legal else []
            found.append([(0 if r.random or r.lowest else int(r.score[s, k]), moves.after[s][k]) for k in legal])
        return found

    reached = {0: options(0)}
    queue = [0]
    for s in queue:
        for t in [t for row in reached[s] for _, t in row] + [t for t in moves.before[s] if t >= 0]:
            if t not in reached:
                reached[t] = options(t)
                queue.append(t)
    reached = dict(sorted(reached.items()))
    groups, count = dict.fromkeys(reached, 0), 1
    while True:
        keys: dict[object, int] = {}
        finer = {}
        for s, rows in reached.items():
            moved = tuple(tuple((score, groups[t]) for score, t in row) for row in rows)
            if r.random:
                moved = tuple(tuple(sorted(row)) for row in moved)
            left = tuple(sorted(groups[t] for t in moves.before[s] if t >= 0))
            finer[s] = keys.setdefault((groups[s], moved, left), len(keys))
        if len(keys) == count:
            sample = {group: s for s, group in reversed(finer.items())}  # the first of each: groups are in that order
            return [sample[group] for group in range(count)], finer
        groups, count = finer, len(keys)


def padded(rows: list[list[int]]) -> Array:
    """Rows of different lengths as an array, filled up with -1."""
    widest = max(len(row) for row in rows)
    return np.array([row + [-1] * (widest - len(row)) for row in rows], dtype=np.int32)


def pascal(classes: int, gpus: int) -> Array:
    """Binomial coefficients [n, k] as `rank` needs them."""
    return np.array([[comb(n, k) for k in range(gpus + 1)] for n in range(classes + gpus)], dtype=np.int64)


@inlined()
def replaced(binomials: Array, classes: Array, one: int, new: int) -> int:
    """The rank of a node state (`classes` rising) with one GPU's class replaced."""
    number, place, pending = 0, 0, True
    for i in range(len(classes)):
        if i == one:
            continue
        if pending and new <= classes[i]:
            number += binomials[new + place, place + 1]
            place += 1
            pending = False
        number += binomials[classes[i] + place, place + 1]
        place += 1
    if pending:
        number += binomials[new + place, place + 1]
    return number


@compiled(_nrt=True)
def improve(
    after: Array, before: Array, binomials: Array, asked: Demand, value: Floats, gain: float, step: float
) -> tuple[float, float]:
    """One sweep of the optimum over all node states, in the order of their ranks."""
    gpus = binomials.shape[1] - 1
    classes = np.zeros(gpus, dtype=np.int64)
    low, high = np.inf, -np.inf
    for x in range(len(value)):
        seen, events = 0.0, 0.0
        for p in range(len(asked.arrivals)):
            best = -np.inf
            for i in range(gpus):
                if i > 0 and classes[i] == classes[i - 1]:
                    continue
                for c in after[classes[i], p]:
                    if c < 0:
                        break
                    best = max(best, value[replaced(binomials, classes, i, c)])
            if best > -np.inf:
                seen += asked.arrivals[p] * (asked.worth[p] + best - value[x])
                events += asked.arrivals[p]
        for i in range(gpus):
            for c in before[classes[i]]:
                if c < 0:
                    break
                seen += value[replaced(binomials, classes, i, c)] - value[x]
                events += 1.0
        low, high = min(low, seen), max(high, seen)
        value[x] += step * (seen - gain)
        i = 0
        while i < gpus - 1 and classes[i] == classes[i + 1]:
            classes[i] = 0
            i += 1
        classes[i] += 1
    return low, high


@compiled()
def reach(after: Array, gpus: int, where: Array) -> None:
    """Turn GPU and placement, chosen in each node state, into the node state that follows (-1 where it is lost)."""
    base = len(after)
    for x in range(len(where)):
        for p in range(where.shape[1]):
            if where[x, p] >= 0:
                unit = base ** (where[x, p] // after.shape[1])
                group = (x // unit) % base
                where[x, p] = x + (after[group, where[x, p] % after.shape[1]] - group) * unit


@inlined()
def departures(before: Array, gpus: int, value: Floats, x: int) -> tuple[float, float]:
    """What the departures from a node state change in value, and their rate; a digit of x is the group of a GPU."""
    seen, events, rest, unit = 0.0, 0.0, x, 1
    for _ in range(gpus):
        group = rest % len(before)
        rest //= len(before)
        for c in before[group]:
            if c < 0:
                break
            seen += value[x + (c - group) * unit] - value[x]
            events += 1.0
        unit *= len(before)
    return seen, events


@compiled()
def follow(
    before: Array, where: Array, gpus: int, asked: Demand, value: Floats, gain: float, step: float
) -> tuple[float, float]:
    """One sweep of a rule's chain: `where[x, p]` is the node state that it goes to from x with profile p."""
    low, high = np.inf, -np.inf
    for x in range(len(value)):
        seen, events = departures(before, gpus, value, x)
        for p in range(len(asked.arrivals)):
            if where[x, p] >= 0:
                seen += asked.arrivals[p] * (asked.worth[p] + value[where[x, p]] - value[x])
                events += asked.arrivals[p]
        low, high = min(low, seen), max(high, seen)
        value[x] += step * (seen - gain)
    return low, high


@compiled()
def wander(
    after: Array, before: Array, first: Array, gpus: int, asked: Demand, value: Floats, gain: float, step: float
) -> tuple[float, float]:
    """One sweep of the chain in which every place is as likely."""
    low, high = np.inf, -np.inf
    for x in range(len(value)):
        seen, events = departures(before, gpus, value, x)
        for p in range(len(asked.arrivals)):
            ways, reached, unit = 0, 0.0, 1
            for _ in range(gpus):
                group = (x // unit) % len(after)
                for k in range(first[p], first[p + 1]):
                    if after[group, k] >= 0:
                        ways += 1
                        reached += value[x + (after[group, k] - group) * unit]
                unit *= len(after)
            if ways:
                seen += asked.arrivals[p] * (asked.worth[p] + reached / ways - value[x])
                events += asked.arrivals[p]
        low, high = min(low, seen), max(high, seen)
        value[x] += step * (seen - gain)
    return low, high
