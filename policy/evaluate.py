"""What a run of the simulator has come to; and the learned policy as one of its rules, with demand and times given, or
estimated from what a node has seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from policy import model
from policy.model import PRIOR, Model, Times
from policy.rules import Rule, Tables, by_value, tables
from policy.simulator import NONEMPTY, NOW, Node, World, advance, finish, simulate, world
from policy.transitions import Transitions
from policy.workload import UNKNOWN, Floats, Jobs, stream
from rms.planner import Demand, Ended, View
from rms.request import Request

REMEMBERED = 256
"""How many requests and ended jobs a node remembers: `rms.inventory.RECENT`, which may not be imported here; a test
compares them."""
TURN = 64
"""Arrivals between two estimates in a simulation. The runtime makes one for every decision."""
DEPTH = 300
"""How many waiting jobs backfill looks at, in training, in tables and in `rms simulate`."""
SECONDS = 3600.0
"""A mean duration: two limits are the same one to the second."""
NOTHING = Request(())
BLIND = Times()
"""Nothing is known of times."""


def waits(jobs: Jobs, w: World) -> Floats:
    """The wait of each row, less the first twentieth: they came to an empty node."""
    return np.asarray((w.start - jobs.submit)[len(w.start) // 20 :])


def accepted(t: Tables, jobs: Jobs, w: World) -> float:
    """In loss mode the memory slices that were accepted, in percent of the offered; less the first twentieth."""
    cut = slice(len(w.gpu) // 20, None)
    slices = t.profile_memory[jobs.profile][cut]
    return float(100 * (slices * (w.gpu >= 0)[cut]).sum() / slices.sum())


def learned(moves: Transitions, shares: Floats, gpus: int, of: Model | None = None, known: Times = BLIND) -> Rule:
    """The rule of a model (the shipped one) for a demand, on so many GPUs, and for what is known of times."""
    of = of or model.load(moves.geometry)
    of_held = model.worth(of, shares.tolist(), gpus, known.rate > 0)
    value = np.array([of_held[held] for held in moves.held])
    t = tables(moves.geometry.model)
    ratios = np.array(known.ratios, dtype=np.float64)
    return by_value(t, value, known.rate, of.reuse, ratios, known.guesses, shares)


def told(of: Model, jobs: Jobs) -> Times:
    """What a node would know of times that had seen all these jobs."""
    chosen = np.linspace(0, len(jobs.limit) - 1, 4 * REMEMBERED).astype(int)
    return seen_times(of, jobs.limit[chosen], jobs.duration[chosen])


def seen_times(of: Model, limits: Floats, durations: Floats) -> Times:
    """What the runtime makes of jobs that have ended."""
    pairs = list(zip((durations * SECONDS).tolist(), (limits * SECONDS).tolist(), strict=True))
    recent = tuple(Demand(0.0, NOTHING, limit if limit < UNKNOWN else None) for _, limit in pairs)
    ended = tuple(Ended(ran, limit) for ran, limit in pairs if limit < UNKNOWN)
    times = model.times(of, View((), recent, None, 0.0, ended))
    return times._replace(rate=times.rate * SECONDS)


def estimated(prior: Sequence[float] | Floats, seen: Floats) -> Floats:
    """The shares that the runtime sees in these counts of requests by profile, beside the prior."""
    counts = PRIOR * np.array(prior) + seen
    return np.asarray(counts / counts.sum())


def simulate_estimating(
    moves: Transitions,
    t: Tables,
    node: Node,
    of: Model,
    jobs: Jobs,
    pending: bool = False,
    turn: int = TURN,
    progress: Callable[[float], None] = lambda done: None,
) -> World:
    """As `simulate`, demand and times estimated from the last starts and ends, every `turn` arrivals; demand from who
    waits too where that is known (`pending`)."""
    w = world(t, node, len(jobs.submit))
    profiles = len(t.profile_memory)

    def rule(first: int) -> Rule:
        # Who started or ended lately arrived lately: nobody looks further back than the longest queue.
        past = slice(max(0, first - 4096), first)
        start = w.start[past]
        seen = np.bincount(jobs.profile[past][latest(start)], minlength=profiles).astype(np.float64)
        if pending:
            seen += np.bincount(jobs.profile[past][np.isnan(start)], minlength=profiles)
        end = start + jobs.duration[past]
        over = latest(np.where(end <= w.clock[NOW], end, np.nan))
        known = seen_times(of, jobs.limit[past][over], jobs.duration[past][over])
        gpus = max(1, int(w.tally[NONEMPTY])) if node.elastic else node.gpus // node.nodes
        return learned(moves, estimated(of.prior, seen), gpus, of, known)

    for first in range(0, len(jobs.submit), turn):
        progress(first / len(jobs.submit))
        advance(t, node, rule(first), jobs, w, first + turn)
    finish(t, node, rule(len(jobs.submit)), jobs, w)
    return w


def latest(times: Floats) -> Floats:
    """The places of the last `REMEMBERED` moments that are known."""
    order = np.argsort(times)
    return np.asarray(order[: int(np.isfinite(times).sum())][-REMEMBERED:])


def converged(moves: Transitions, t: Tables, gpus: int, of: Model, shares: Floats, load: float, seed: int) -> Floats:
    """The estimate that a node in loss mode ends at. It has seen the requests that it took and no others."""
    jobs = stream(moves, seed, 400_000, shares, load, gpus)
    found = shares
    for _ in range(4):
        w = simulate(t, Node(gpus), learned(moves, found, gpus, of), jobs)
        taken = np.bincount(jobs.profile[w.gpu >= 0], minlength=len(shares))
        found = estimated(of.prior, REMEMBERED * taken / taken.sum())
    return found
