"""What became of the jobs of a run on Slurm, and how long they would have waited in `policy.simulator`.

There what happens is known a little later, as it is here; the latencies are taken from the run itself, but not from its
waits.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from throwaway import SCHEDULER

MODEL = "A100-80GB"
CREDENTIAL = 5
"""cred_expire of these clusters, in seconds: as short as Slurm takes it."""
REPLICAS = 20
"""How many runs of the simulator a wait is compared with: in a queue this long a small difference early on is a large
one later, and a single run is known to some 7 %."""


class Ran(NamedTuple):
    """A job of the overload: when (epoch) it was submitted, could start, was let in by slurmctld (the last time; None
    where its log does not say so: 26.05 says it of the main scheduler only), and wrote its first and its last line.

    It `could` once its slices were free: after its submission, and the last end of a job that had them. None where that
    is not known, or where it was sent back and had to wait for something else.
    """

    request: str
    node: str
    submit: float
    could: float | None
    let_in: float | None
    start: float
    end: float


class Refusal(NamedTuple):
    """A job that was sent back: its node, when (epoch) slurmctld let it in, and when its Epilog came."""

    node: str
    let_in: float
    over: float


class Run(NamedTuple):
    """One mode and seed. Times are seconds, but for `rpc_ms` and `passes_ms`: slurmctld's own, per job. None where a
    mode has no such thing. `idle` has for each job of that load the time from when it could start to its first line,
    `refusals` for each dispatch that was sent back its node, when slurmctld let it in, and when its Epilog came."""

    slurm: str
    mode: str
    seed: int
    dispatches: int
    misplaced: int
    without: int | None
    drained: int
    total: float
    idle: list[float] | None
    rate: float | None
    rpcs: float | None
    rpc_ms: float | None
    passes_ms: float
    load: float
    refusals: list[Refusal]
    ran: list[Ran]


def read(run: Mapping[str, Any]) -> Run:
    """A run from JSON."""
    refusals, ran = [Refusal(*one) for one in run["refusals"]], [Ran(*job) for job in run["ran"]]
    return Run(**{**run, "refusals": refusals, "ran": ran})


class Latency(NamedTuple):
    """Of one run, in seconds: from when each job could start to its first line; of these the ones in which nothing else
    started, ended or was sent back on its node; and where another one had started since, from that start to its own.
    `ending`: of `alone`, where a job had ended before, the part until slurmctld let the next one in."""

    all: list[float]
    alone: list[float]
    behind: list[float]
    ending: list[float]


def latency(run: Run) -> Latency:
    """Taken apart, job by job."""
    found = Latency([], [], [], [])
    for job in run.ran:
        if job.could is None:
            continue
        found.all.append(job.start - job.could)
        others = [one for one in run.ran if one.node == job.node and one is not job]
        if last := max((one.start for one in others if job.could < one.start < job.start), default=0.0):
            found.behind.append(job.start - last)
            continue
        there = [one for one in run.refusals if one.node == job.node]
        if any(job.could < one.end < job.start for one in others) or any(
            one.let_in < job.start and job.could < one.over for one in there
        ):
            continue
        found.alone.append(job.start - job.could)
        if job.let_in is not None and job.could > job.submit:
            found.ending.append(job.let_in - job.could)
    return found


def simulated(run: Run, options: argparse.Namespace, late: Latency | None) -> list[float]:
    """The mean wait of the same jobs in `policy.simulator`, of REPLICAS runs with latencies drawn anew from those that
    were measured; of one without any where they are None.

    The jobs are submitted when they were and run for as long as they did; nodes decide by the shipped policy, and
    Slurm's passes over the queue are what they are with the bf_interval of these clusters. What happens is known to
    slurmctld an *alone* later, each end an own one. No job starts on a node while another is ending, for the median of
    *ending*; after a start for the mean of *behind*, but in `sums`, where there is no token; and there after a job that
    did not fit for as long as those were on their nodes.
    """
    import numpy as np  # not in the chroot

    from policy import evaluate, model, rules, simulator, traces, transitions
    from policy.workload import Jobs

    moves = transitions.load(MODEL)
    numbers = traces.accepted(moves)
    board, of = rules.tables(MODEL), model.load(moves.geometry)
    jobs = sorted(run.ran, key=lambda job: job.submit)
    submit = np.array([job.submit - jobs[0].submit for job in jobs])
    duration = np.array([job.end - job.start for job in jobs])
    pool = simulator.Node(options.nodes * options.gpus, depth=len(jobs), lazy=True, nodes=options.nodes)
    pool = pool._replace(backfill=float(re.findall(r"bf_interval=(\d+)", SCHEDULER)[0]))
    if run.mode == "sums":
        pool = pool._replace(admission=simulator.NODE_SUMS, hold=CREDENTIAL + 10.0)
        pool = pool._replace(refusal=mean([one.over - one.let_in for one in run.refusals]) if late else 0.0)
    chance = np.random.default_rng(run.seed)

    def drawn(measured: Sequence[float]) -> Any:
        """As many as were measured, or zero where none was."""
        return chance.choice(measured, len(measured)) if measured else np.zeros(1)

    waits = []
    for _ in range(1 if late is None else REPLICAS):
        start, token, ending, end = 0.0, 0.0, 0.0, np.zeros(len(jobs))
        if late is not None:
            start, end = float(drawn(late.alone).mean()), chance.choice(drawn(late.alone), len(jobs))
            token = 0.0 if run.mode == "sums" else float(drawn(late.behind).mean())
            ending = float(np.median(drawn(late.ending)))
        stream = Jobs(
            submit + start,
            np.array([numbers[job.request] for job in jobs]),
            duration + end,
            np.full(len(jobs), 60.0 * math.ceil(options.between[1] / 60)),
            np.zeros(len(jobs), dtype=np.int64),
        )
        w = evaluate.simulate_estimating(moves, board, pool._replace(latency=token, ending=ending), of, stream)
        waits.append(float((w.start - submit).mean()))
    return waits


def mean(values: Sequence[float]) -> float:
    """0 where there is nothing."""
    return statistics.mean(values) if values else 0.0
