"""The learned policy as a rule of the simulator: with the demand given, or estimated from what a node has seen."""

from __future__ import annotations

import numpy as np

from policy import model
from policy.model import PRIOR, Model
from policy.simulator import Node, Rule, Tables, World, advance, by_value, finish, simulate, tables, world
from policy.transitions import Transitions
from policy.workload import Floats, Jobs, stream

REMEMBERED = 64
"""How many requests a node remembers: `rms.inventory.RECENT`, which may not be imported here; a test compares them."""
TURN = 16
"""Arrivals between two estimates in a simulation. The runtime makes one for every decision."""


def learned(moves: Transitions, shares: Floats, of: Model | None = None, mean: float = 0.0) -> Rule:
    """The rule of a model (the shipped one) for a demand. `mean` is the mean time limit: 0 leaves all times out."""
    of = of or model.load(moves.geometry)
    value = np.array(model.values(of, shares.tolist()))[np.array(moves.classes)]
    return by_value(tables(moves.geometry.model), value, of.foresight / mean if mean else 0.0, of.reuse)


def estimated(of: Model, seen: Floats) -> Floats:
    """The shares that the runtime sees in these counts of requests by profile."""
    counts = PRIOR * np.array(of.prior) + seen
    return np.asarray(counts / counts.sum())


def simulate_estimating(moves: Transitions, t: Tables, node: Node, of: Model, jobs: Jobs, pending: bool) -> World:
    """As `simulate`, the demand estimated from the last starts, and from who waits where that is known."""
    known = np.isfinite(jobs.limit)
    mean = float(jobs.limit[known].mean()) if known.any() else 0.0
    w = world(t, node, len(jobs.submit))
    profiles = len(t.profile_memory)
    for first in range(0, len(jobs.submit), TURN):
        # Who started lately arrived lately: nobody looks further back than the longest queue.
        past = slice(max(0, first - 4096), first)
        order = np.argsort(w.start[past])[: int(np.isfinite(w.start[past]).sum())][-REMEMBERED:]
        seen = np.bincount(jobs.profile[past][order], minlength=profiles).astype(np.float64)
        if pending:
            seen += np.bincount(jobs.profile[past][np.isnan(w.start[past])], minlength=profiles)
        advance(t, node, learned(moves, estimated(of, seen), of, mean), jobs, w, first + TURN)
    finish(t, node, learned(moves, estimated(of, seen), of, mean), jobs, w)
    return w


def converged(moves: Transitions, t: Tables, gpus: int, of: Model, shares: Floats, load: float, seed: int) -> Floats:
    """The estimate that a node in loss mode ends at. It has seen the requests that it took and no others."""
    jobs = stream(moves, seed, 100_000, shares, load, gpus)
    found = shares
    for _ in range(4):
        w = simulate(t, Node(gpus), learned(moves, found, of), jobs)
        taken = np.bincount(jobs.profile[w.gpu >= 0], minlength=len(shares))
        found = estimated(of, REMEMBERED * taken / taken.sum())
    return found
