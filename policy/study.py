"""Policies side by side on the same jobs: what `rms simulate` runs and counts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from policy import baselines, bounds, evaluate, model, rules, seeds, simulator, traces, transitions, workload
from policy.evaluate import DEPTH
from policy.rules import Rule
from policy.simulator import Node
from policy.transitions import Transitions
from policy.workload import Floats, Jobs
from rms import geometry
from rms.errors import RequestError

MODES = {
    "queue": Node(1, depth=DEPTH, lazy=True),
    "loss": Node(1, lazy=True),
    "elastic": Node(1, depth=DEPTH, lazy=True, elastic=True),
}
BLOCKS = 20
"""Into how many the jobs are cut for an interval: neighbours in time are no independent observations."""
STUDENT = 2.093
"""Of 19 degrees of freedom, 95 %."""
POINTS = 240
"""Of the curve of busy slices."""
STEPS = 100
"""How often a run says how far it is."""

Bound = Callable[[Transitions, Node, Jobs, Callable[[float], None]], Floats]
BOUNDS: dict[str, tuple[Bound, tuple[str, ...]]] = {
    "free-migration": (bounds.free_migration, ("queue", "loss")),
    "clairvoyant": (bounds.clairvoyant, ("loss",)),
}
"""What --policy takes besides the policies, with the modes that it is for."""

Progress = Callable[[str, float], None]


def slug(name: str) -> str:
    """A baseline's name as a word of the command line."""
    return re.sub("[^a-z0-9]+", "-", name.lower().replace("'s", "")).strip("-")


LEARNED = "learned"
"""The shipped model, which estimates demand and times from the jobs that it has seen, as on a node."""
POLICIES: dict[str, Callable[[Transitions, Floats], Rule]] = {
    "built-in": baselines.best_fit_least_blocking,
    **{slug(name): make for name, make in baselines.ALL.items()},
}
"""What --policy takes, besides the bounds and the learned one."""


class Scenario(NamedTuple):
    """What all policies are put to. Times of `jobs` are in units of `unit` seconds, the mean duration (which policies
    that look ahead in time count in); a made-up mix has no seconds. The first `warm` jobs are not counted."""

    title: str
    moves: Transitions
    node: Node
    mode: str
    jobs: Jobs
    shares: Floats
    load: float
    unit: float | None
    warm: int
    left_out: dict[str, int]


class Result(NamedTuple):
    """What became of the jobs under one policy. `waits` in seconds or mean durations, by job that was counted; `slices`
    are the busy memory slices, mean of each of `POINTS` stretches, `gpus` the GPUs in use. What a mode does not have is
    None."""

    policy: str
    waits: Floats
    accepted: Floats
    creates: float | None
    gpus_mean: float | None
    gpus_most: int | None
    slices: Floats
    gpus: Floats | None


class Wanted(NamedTuple):
    """What `rms simulate` is asked for: either a `trace` or a `mix`."""

    model: str
    gpus: int
    mode: str = "queue"
    reserve: bool = False
    policy: str = "built-in,mfi,learned"
    trace: str | None = None
    skip: bool = False
    mix: str | None = None
    load: float = 0.8
    jobs: int = 50_000
    seed: int = 0


def simulate(wanted: Wanted, progress: Progress = lambda what, done: None) -> dict[str, Any]:
    """All the policies on the same jobs, and all the numbers (`numbers`). Raises RequestError where that can't be."""
    if not 1 <= wanted.gpus <= 128:
        raise RequestError(f"--gpus {wanted.gpus}: from 1 to 128 can be simulated")
    board = geometry.load(wanted.model)
    policies = chosen(wanted.policy, wanted.mode)
    moves = transitions.load(board.model)
    pool = MODES[wanted.mode]._replace(gpus=wanted.gpus, reserve=wanted.reserve)
    scenario = recorded(moves, wanted, pool, progress) if wanted.trace else synthetic(moves, wanted, pool)
    return numbers(scenario, [run(scenario, policy, progress) for policy in policies])


def synthetic(moves: Transitions, wanted: Wanted, pool: Node) -> Scenario:
    """A made-up stream. Time limits are 1 to 3 times too long, as users give them."""
    if wanted.mix not in workload.MIXES:
        raise RequestError(f"unknown mix {wanted.mix!a}; known: {' '.join(workload.MIXES)}")
    if not (0 < wanted.load <= 10 and BLOCKS <= wanted.jobs <= 100_000_000 and 0 <= wanted.seed < len(seeds.USERS)):
        raise RequestError(
            f"--load is above 0 and at most 10, --jobs from {BLOCKS} to 100000000, --seed below {len(seeds.USERS)}"
        )
    shares = workload.mix(wanted.mix, moves)
    seed = seeds.USERS[wanted.seed]
    jobs = workload.stream(moves, seed, wanted.jobs, shares, wanted.load, wanted.gpus, limit="1to3")
    title = f"mix {wanted.mix}, load {wanted.load:g}, {wanted.jobs:,} jobs"
    return Scenario(title, moves, pool, wanted.mode, jobs, shares, wanted.load, None, wanted.jobs // 20, {})


def recorded(moves: Transitions, wanted: Wanted, pool: Node, progress: Progress) -> Scenario:
    """The jobs of a file."""
    packing = bounds.Packing(moves)
    trace = traces.read(
        wanted.trace or "",
        moves,
        lambda counts: packing.fits(counts, pool.gpus),
        wanted.skip,
        lambda done: progress("reading", done),
    )
    jobs = trace.jobs
    unit = float(jobs.duration.mean())
    offered = float((workload.sizes(moves)[jobs.profile] * jobs.duration).sum())
    load = offered / (moves.geometry.slots * pool.gpus * max(float(jobs.submit[-1]), unit))
    shares = np.bincount(jobs.profile, minlength=len(moves.profiles)) / len(jobs.profile)
    scaled = jobs._replace(submit=jobs.submit / unit, duration=jobs.duration / unit, limit=jobs.limit / unit)
    title = f"{os.path.basename(wanted.trace or '')}, load {load:.2f}, {int(workload.first_rows(jobs).sum()):,} jobs"
    return Scenario(title, moves, pool, wanted.mode, scaled, shares, load, unit, 0, dict(trace.left_out))


def chosen(names: str, mode: str) -> list[str]:
    """The policies of a list. Raises RequestError where one is not known."""
    wanted = list(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in wanted:
        if name not in (LEARNED, *POLICIES, *BOUNDS):
            raise RequestError(f"unknown policy {name!a}; known: {' '.join([LEARNED, *POLICIES, *BOUNDS])}")
        if name in BOUNDS and mode not in BOUNDS[name][1]:
            raise RequestError(f"{name} is not for --mode {mode}")
    return wanted


def run(scenario: Scenario, policy: str, progress: Progress) -> Result:
    """All jobs under one policy."""
    moves, jobs, pool = scenario.moves, scenario.jobs, scenario.node
    if policy in BOUNDS:
        starts = BOUNDS[policy][0](moves, pool, jobs, lambda done: progress(policy, done))
        return measured(scenario, policy, starts, None, None)
    t = rules.tabulate(moves)
    if policy == LEARNED:
        try:
            of = model.load(moves.geometry)
        except model.ModelError as error:
            raise RequestError(str(error)) from error
        turn = min(max(len(jobs.submit) // 4000, evaluate.TURN), evaluate.REMEMBERED)
        w = evaluate.simulate_estimating(
            moves, t, pool, of, jobs, turn=turn, progress=lambda done: progress(policy, done)
        )
        return measured(scenario, policy, w.start, w.created, w)
    rule = POLICIES[policy](moves, scenario.shares)
    w = simulator.world(t, pool, len(jobs.submit))
    for step in range(STEPS):
        progress(policy, step / STEPS)
        simulator.advance(t, pool, rule, jobs, w, len(jobs.submit) * (step + 1) // STEPS)
    simulator.finish(t, pool, rule, jobs, w)
    return measured(scenario, policy, w.start, w.created, w)


def measured(s: Scenario, policy: str, starts: Floats, created: Any, w: simulator.World | None) -> Result:
    """The numbers of a run."""
    jobs = s.jobs
    counted = np.flatnonzero(workload.first_rows(jobs))[s.warm :]
    began = ~np.isnan(starts)
    memory = workload.sizes(s.moves)[jobs.profile]
    ends = starts[began] + jobs.duration[began]
    until = float(jobs.submit[-1])
    elastic = w is not None and s.mode == "elastic"
    return Result(
        policy,
        (starts - jobs.submit)[counted] * (s.unit or 1.0),
        began[counted],
        None if created is None else float(created[began].sum() / began[workload.first_rows(jobs)].sum()),
        float(w.clock[simulator.GPU_TIME] / ends.max()) if elastic and w else None,
        int(w.tally[simulator.PEAK]) if elastic and w else None,
        busy(starts[began], ends, memory[began], until),
        busy(*in_use(starts[began], ends, w.gpu[began]), until) if elastic and w else None,
    )


def busy(starts: Floats, ends: Floats, memory: Floats, until: float) -> Floats:
    """Mean busy memory slices in each stretch of the time until then."""
    edges = np.linspace(0.0, until or 1.0, POINTS + 1)

    def before(times: Floats) -> Floats:
        """The slices that came in before each edge, times how long before."""
        order = np.argsort(times)
        at = np.searchsorted(times[order], edges)
        slices = np.concatenate([[0.0], np.cumsum(memory[order])])[at]
        moments = np.concatenate([[0.0], np.cumsum((memory * times)[order])])[at]
        return np.asarray(slices * edges - moments)

    return np.asarray(np.diff(before(starts) - before(ends)) / np.diff(edges))


def in_use(starts: Floats, ends: Floats, gpu: Any) -> tuple[Floats, Floats, Floats]:
    """From when to when each GPU has something on it, and 1 for each such time."""
    order = np.lexsort((starts, gpu))
    starts, ends, gpu = starts[order], ends[order], gpu[order]
    # Shifted apart by GPU, one running maximum does for all: what begins after all before has ended begins anew.
    apart = gpu * (float(ends.max()) + 1.0)
    latest = np.maximum.accumulate(ends + apart)
    first = np.concatenate([[True], (starts + apart)[1:] > latest[:-1]])
    last = np.concatenate([first[1:], [True]])
    return starts[first], (latest - apart)[last], np.ones(int(first.sum()))


def against(s: Scenario, result: Result, first: Result) -> tuple[float, float]:
    """How much longer the mean wait is than the first policy's, in percent; in loss mode how many more percent of the
    offered memory slices are accepted. With half the 95 % interval, over blocks of successive jobs. In elastic mode
    how many more GPUs are needed, in percent; that has no interval."""
    if s.mode == "elastic":
        return 100 * ((result.gpus_mean or 0.0) / (first.gpus_mean or 1.0) - 1), np.nan
    memory = weights(s)
    if s.mode == "loss":
        gain = 100 * memory * (result.accepted.astype(float) - first.accepted) / memory.mean()
    else:
        gain = 100 * (result.waits - first.waits) / max(float(first.waits.mean()), 1e-12)
    blocks = np.array([block.mean() for block in np.array_split(gain, BLOCKS) if len(block)])
    half = float(STUDENT * blocks.std(ddof=1) / np.sqrt(BLOCKS)) if len(blocks) == BLOCKS else np.nan
    return float(gain.mean()), half


def weights(s: Scenario) -> Floats:
    """The memory slices of each counted job, all its instances together."""
    heads = np.flatnonzero(workload.first_rows(s.jobs))
    return np.asarray(np.add.reduceat(workload.sizes(s.moves)[s.jobs.profile], heads)[s.warm :])


def numbers(s: Scenario, results: list[Result]) -> dict[str, Any]:
    """All of it as one JSON object; waits in seconds, or in mean durations where the jobs are made up."""
    profiles = s.jobs.profile[np.flatnonzero(workload.first_rows(s.jobs))[s.warm :]]
    memory = weights(s)
    rows = []
    for result in results:
        difference, half = against(s, result, results[0])
        by_profile = {}
        for p, name in enumerate(s.moves.profiles):
            here = profiles == p
            if here.any():
                by_profile[name] = outcome(s.mode, result.waits[here], result.accepted[here], memory[here])
        rows.append(
            {
                "policy": result.policy,
                **outcome(s.mode, result.waits, result.accepted, memory),
                "against_first": difference,
                "interval": None if np.isnan(half) else half,
                "creates_per_job": result.creates,
                "gpus_needed": result.gpus_mean,
                "gpus_most": result.gpus_most,
                "profiles": by_profile,
                "busy_slices": [round(float(x), 3) for x in result.slices],
                "busy_gpus": None if result.gpus is None else [round(float(x), 3) for x in result.gpus],
            }
        )
    return {
        "schema": 1,
        "jobs": s.title,
        "mode": s.mode,
        "model": s.moves.geometry.model,
        "gpus": s.node.gpus,
        "reservation": s.node.reserve,
        "load": s.load,
        "time": "mean durations" if s.unit is None else "seconds",
        "span": (float(s.jobs.submit[-1]) or 1.0) * (s.unit or 1.0),
        "slices": s.moves.geometry.slots * s.node.gpus,
        "left_out": s.left_out,
        "policies": rows,
    }


def outcome(mode: str, waits: Floats, accepted: Floats, memory: Floats) -> dict[str, float | int]:
    """Waits, or in loss mode the accepted percent of the memory slices."""
    if mode == "loss":
        return {"jobs": len(waits), "accepted": float(100 * (memory * accepted).sum() / memory.sum())}
    return {"jobs": len(waits), "wait_mean": float(waits.mean()), "wait_p95": float(np.quantile(waits, 0.95))}
