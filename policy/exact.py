"""Small nodes solved exactly, in loss mode with exponential service: the optimum, and any rule's own acceptance.

No seeds: acceptance, weighted by memory slices, is computed from the Markov chain itself. Both use value iteration on
the uniformised chain, whose smallest and largest step bound the answer. The optimum is work-conserving as every policy
is: what fits is placed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import comb
from typing import NamedTuple

import numpy as np

from policy.jit import compiled, inlined
from policy.simulator import Array, Node, Rule, choose_all, tabulate, world
from policy.transitions import Transitions
from policy.workload import Floats, rate, sizes

CLOSE = 1e-6
"""Value iteration ends when acceptance is bounded this closely."""


class Optimum(NamedTuple):
    """The best acceptance, and the value of every state of the node: `value[rank(classes)]`, where `classes` are those
    of its GPUs in `Transitions.classes`. The empty node's is 0; 1 is all that is offered in one mean service time."""

    acceptance: float
    value: Floats


class Demand(NamedTuple):
    """The arrivals of each profile, what one is worth (its share of all slices offered), and all events' rate."""

    arrivals: Floats
    worth: Floats
    events: float


def demand(moves: Transitions, gpus: int, shares: Floats, load: float) -> Demand:
    """What the chain of a node needs to know of a mix at a load."""
    arrivals = rate(moves, shares, load, gpus) * shares
    most = max(len(state) for state in moves.states) * gpus
    return Demand(arrivals, sizes(moves) / (arrivals @ sizes(moves)), float(arrivals.sum()) + most)


def optimum(moves: Transitions, gpus: int, shares: Floats, load: float) -> Optimum:
    """The best that any work-conserving policy can do.

    GPUs are interchangeable for it, and so are the states of a class: 1, 2, 3 and 4 A100s have 100, 5,050, 171,700 and
    4,421,275 states.
    """
    asked = demand(moves, gpus, shares, load)
    after, before = merged(moves)
    count = comb(len(after) + gpus - 1, gpus)
    return iterate(count, asked, lambda old, new: improve(after, before, pascal(len(after), gpus), asked, old, new))


def evaluate(moves: Transitions, gpus: int, shares: Floats, load: float, r: Rule) -> Optimum:
    """The same for a rule, its times left out. The order of GPUs counts, since ties go by it."""
    asked = demand(moves, gpus, shares, load)
    members, lumps = lumped(moves, r._replace(rate=0.0))
    after = np.array([[lumps.get(t, -1) for t in moves.after[s]] for s in members], dtype=np.int32)
    before = padded([[lumps[t] for t in moves.before[s] if t >= 0] for s in members])
    count = len(members) ** gpus
    if r.random:
        first = tabulate(moves).first
        return iterate(count, asked, lambda old, new: wander(after, before, first, gpus, asked, old, new))
    where = np.empty((count, len(shares)), dtype=np.int32)
    node = Node(gpus)
    t = tabulate(moves)
    choose_all(t, node, r._replace(rate=0.0), world(t, node, 0), np.array(members), where)
    return iterate(count, asked, lambda old, new: follow(after, before, where, gpus, asked, old, new))


def iterate(count: int, asked: Demand, sweep: Callable[[Floats, Floats], None]) -> Optimum:
    """Value iteration: `sweep` writes the next value of each state into its second array."""
    old, new = np.zeros(count), np.empty(count)
    while True:
        sweep(old, new)
        np.subtract(new, old, out=old)
        low, high = float(old.min()) * asked.events, float(old.max()) * asked.events
        np.subtract(new, new[0], out=old)
        if high - low < CLOSE:
            return Optimum((high + low) / 2, old)


def rank(classes: Iterable[int]) -> int:
    """The number of a node state: of the classes of its GPUs, whatever their order."""
    return sum(comb(c + i, i + 1) for i, c in enumerate(sorted(classes)))


def merged(moves: Transitions) -> tuple[Array, Array]:
    """One GPU on its classes: those that a profile can lead to, [class, profile, ...], and those that a departure
    leads to, [class, ...]; padded with -1."""
    sample = {c: s for s, c in enumerate(moves.classes)}
    leads = [
        [sorted({moves.classes[moves.after[sample[c]][k]] for k in places if moves.after[sample[c]][k] >= 0})
         for places in moves.of_profile]
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
def improve(after: Array, before: Array, binomials: Array, asked: Demand, old: Floats, new: Floats) -> None:
    """One sweep of the optimum over all node states, in the order of their ranks."""
    gpus = binomials.shape[1] - 1
    classes = np.zeros(gpus, dtype=np.int64)
    for x in range(len(old)):
        total = 0.0
        quiet = asked.events
        for p in range(len(asked.arrivals)):
            best = -np.inf
            for i in range(gpus):
                if i > 0 and classes[i] == classes[i - 1]:
                    continue
                for c in after[classes[i], p]:
                    if c < 0:
                        break
                    best = max(best, old[replaced(binomials, classes, i, c)])
            if best > -np.inf:
                total += asked.arrivals[p] * (asked.worth[p] + best)
                quiet -= asked.arrivals[p]
        for i in range(gpus):
            for c in before[classes[i]]:
                if c < 0:
                    break
                total += old[replaced(binomials, classes, i, c)]
                quiet -= 1.0
        new[x] = (total + quiet * old[x]) / asked.events
        i = 0
        while i < gpus - 1 and classes[i] == classes[i + 1]:
            classes[i] = 0
            i += 1
        classes[i] += 1


@compiled()
def follow(after: Array, before: Array, where: Array, gpus: int, asked: Demand, old: Floats, new: Floats) -> None:
    """One sweep of a rule's chain: `where[x, p]` is what it does in node state x, a digit of x the group of a GPU."""
    base = len(after)
    for x in range(len(old)):
        total, quiet = 0.0, asked.events
        for p in range(len(asked.arrivals)):
            if where[x, p] >= 0:
                g, k = where[x, p] // after.shape[1], where[x, p] % after.shape[1]
                unit = base**g
                group = (x // unit) % base
                total += asked.arrivals[p] * (asked.worth[p] + old[x + (after[group, k] - group) * unit])
                quiet -= asked.arrivals[p]
        unit = 1
        for _ in range(gpus):
            group = (x // unit) % base
            for c in before[group]:
                if c < 0:
                    break
                total += old[x + (c - group) * unit]
                quiet -= 1.0
            unit *= base
        new[x] = (total + quiet * old[x]) / asked.events


@compiled()
def wander(after: Array, before: Array, first: Array, gpus: int, asked: Demand, old: Floats, new: Floats) -> None:
    """One sweep of the chain in which every place is as likely."""
    base = len(after)
    for x in range(len(old)):
        total, quiet = 0.0, asked.events
        for p in range(len(asked.arrivals)):
            ways, reached, unit = 0, 0.0, 1
            for _ in range(gpus):
                group = (x // unit) % base
                for k in range(first[p], first[p + 1]):
                    if after[group, k] >= 0:
                        ways += 1
                        reached += old[x + (after[group, k] - group) * unit]
                unit *= base
            if ways:
                total += asked.arrivals[p] * (asked.worth[p] + reached / ways)
                quiet -= asked.arrivals[p]
        unit = 1
        for _ in range(gpus):
            group = (x // unit) % base
            for c in before[group]:
                if c < 0:
                    break
                total += old[x + (c - group) * unit]
                quiet -= 1.0
            unit *= base
        new[x] = (total + quiet * old[x]) / asked.events
