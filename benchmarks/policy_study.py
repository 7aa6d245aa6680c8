"""The figures of the first study of the policy (loss, exact optima, queue, admission, reuse), measured again.

    python benchmarks/policy_study.py [loss] [exact] [exact3] [queue] [admission] [reuse] [speed] [cells]

Without arguments all but `exact3` and `cells`, which take ten minutes each; the others take two. Intervals are 95 %,
over paired seeds.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable

import numpy as np

from policy import baselines, evaluate, exact, model, rules, seeds, simulator, transitions, workload
from policy.rules import Rule
from policy.simulator import Node, World, simulate
from policy.workload import Jobs

A100 = transitions.load("A100-80GB")
TABLES = rules.tables("A100-80GB")
SEEDS = seeds.TUNING[:6]
GAMES = 120
"""Games of each of the `cells`."""


def paired(numbers: Iterable[tuple[float, float]]) -> str:
    """The mean of the differences with its interval."""
    differences = np.array([a - b for a, b in numbers])
    half = 2.57 * differences.std(ddof=1) / np.sqrt(len(differences))  # Student's t for six seeds
    return f"{differences.mean():+7.2f} ± {half:.2f}"


def wait(jobs: Jobs, w: World) -> float:
    """The mean wait."""
    return float(evaluate.waits(jobs, w).mean())


def loss() -> None:
    """Points of acceptance against MFI."""
    for gpus, name, load in (
        (4, "uniform", 0.7),
        (8, "uniform", 0.9),
        (8, "skew-small", 0.9),
        (8, "skew-big", 0.9),
        (8, "bimodal", 0.9),
        (100, "uniform", 0.95),
        (100, "skew-small", 0.95),
    ):
        shares = workload.mix(name, A100)
        streams = [workload.stream(A100, seed, 150_000, shares, load, gpus) for seed in SEEDS]
        results = {
            rule: [
                evaluate.accepted(TABLES, jobs, simulate(TABLES, Node(gpus), make(A100, shares), jobs))
                for jobs in streams
            ]
            for rule, make in baselines.ALL.items()
        }
        print(f"\nLoss mode, {gpus} GPUs, {name}, load {load}: MFI {np.mean(results['MFI']):.2f} %; points against it")
        for rule, found in results.items():
            print(f"  {rule:30} {paired(zip(found, results['MFI'], strict=True))}")


def optima(gpus: int) -> None:
    """MFI, the optimum, and how much of the gap some rules close."""
    names = ["best-fit, MFI slot", "FGD, best-fit ties", "capability look-ahead"][: 3 if gpus < 3 else 1]
    print(f"\nExact, {gpus} GPUs: MFI, optimum, gap in points; share of the gap closed by {', '.join(names)}; seconds")
    for name in workload.MIXES:
        for load in (0.6, 0.9):
            shares = workload.mix(name, A100)
            began = time.perf_counter()
            best = 100 * exact.optimum(A100, gpus, shares, load).acceptance

            def of(rule: str, shares: workload.Floats = shares, load: float = load) -> float:
                return 100 * exact.evaluate(A100, gpus, shares, load, baselines.ALL[rule](A100, shares)).acceptance

            mfi = of("MFI")
            closed = "  ".join(f"{100 * (of(rule) - mfi) / (best - mfi):+5.0f} %" for rule in names)
            seconds = time.perf_counter() - began
            print(f"  {name:10} {load}  {mfi:.3f}  {best:.3f}  {best - mfi:.3f}  {closed}  {seconds:.0f}", flush=True)


def queue() -> None:
    """Mean wait against MFI, greedy backfill, 8 GPUs, load 0.8."""
    for name in workload.MIXES:
        for reserve in (False, True):
            shares = workload.mix(name, A100)
            node = Node(8, depth=evaluate.DEPTH, reserve=reserve)
            streams = [workload.stream(A100, seed, 60_000, shares, 0.8, 8, limit="1to3") for seed in SEEDS]
            waits = {
                rule: np.array([wait(jobs, simulate(TABLES, node, make(A100, shares), jobs)) for jobs in streams])
                for rule, make in baselines.ALL.items()
                if rule not in ("random", "worst-fit")
            }
            kept = "with" if reserve else "without"
            print(
                f"\nQueue, 8 GPUs, {name}, load 0.8, {kept} reservation: MFI waits {waits['MFI'].mean():.3f}; percent"
            )
            for rule, found in waits.items():
                relative = 100 * found / waits["MFI"]
                print(f"  {rule:30} {paired(zip(relative, np.full(len(found), 100.0), strict=True))}")


def admission() -> None:
    """Misplaced jobs and mean wait under what Slurm knows."""
    shares = workload.mix("uniform", A100)
    told = Node(8, depth=evaluate.DEPTH)
    nodes = {
        "true fit": told,
        "true fit, token, latency 0.001": told._replace(latency=0.001),
        "per-GPU sums": told._replace(admission=simulator.GPU_SUMS),
        "node sums": told._replace(admission=simulator.NODE_SUMS),
    }
    print("\nAdmission, 8 GPUs, uniform, load 0.8, MFI: misplaced jobs in percent, mean wait")
    streams = [workload.stream(A100, seed, 100_000, shares, 0.8, 8) for seed in SEEDS]
    for name, node in nodes.items():
        runs = [(jobs, simulate(TABLES, node, baselines.mfi(A100, shares), jobs)) for jobs in streams]
        misplaced = 100 * np.mean([(w.misplaced > 0).mean() for _, w in runs])
        print(f"  {name:30} {misplaced:5.1f} {np.mean([wait(jobs, w) for jobs, w in runs]):.4f}")


def reuse() -> None:
    """Creates per job and mean wait with lazy destroy."""
    for name in ("uniform", "skew-small"):
        shares = workload.mix(name, A100)
        rules: dict[str, tuple[bool, Rule]] = {
            "eager destroy": (False, baselines.mfi(A100, shares)),
            "lazy, reuse breaks ties": (True, baselines.mfi(A100, shares)),
            "lazy, reuse worth 10": (True, baselines.mfi(A100, shares)._replace(bonus=20_000_000)),
            "lazy, reuse always": (True, baselines.mfi(A100, shares)._replace(bonus=2 * 10**12)),
        }
        print(f"\nReuse, 8 GPUs, {name}, load 0.7, MFI: creates per job, mean wait in percent of the first")
        streams = [workload.stream(A100, seed, 60_000, shares, 0.7, 8) for seed in SEEDS]
        first = None
        for rule, (lazy, r) in rules.items():
            runs = [(jobs, simulate(TABLES, Node(8, depth=evaluate.DEPTH, lazy=lazy), r, jobs)) for jobs in streams]
            waited = np.array([wait(jobs, w) for jobs, w in runs])
            first = waited if first is None else first
            created = np.mean([w.created.mean() for _, w in runs])
            print(
                f"  {rule:30} {created:.2f} {paired(zip(100 * waited / first, np.full(len(first), 100), strict=True))}"
            )


def cells() -> None:
    """The shipped model's values, learned on for one cell alone: nothing is left there that they could depend on, so
    that load and the number of GPUs as inputs can't gain more. By games, as `policy.train.play`."""
    from policy import train

    of = model.load(A100.geometry)
    config = of.manifest["made"]["config"]
    for name, limit in (("uniform", "exact"), ("uniform", "none"), ("skew-small", "none"), ("bimodal", "none")):
        shares = workload.mix(name, A100)
        game = train.Game(8, shares, 0.8, limit)
        start = np.array(model.values(of, shares.tolist(), game.gpus, limit != "none"))
        reach, value, mean = config["playing"]["noise"] * start.std(), start, start
        fast, slow = np.zeros(len(start)), np.zeros(len(start))
        rng = np.random.default_rng(seeds.TUNING[0])
        for step in range(GAMES):
            slope = train.slope(config, A100, game, value, reach, rng)
            fast, slow = 0.9 * fast + 0.1 * slope, 0.99 * slow + 0.01 * slope**2
            pace = 0.02 * start.std() * (1 - step / GAMES)
            value = value - pace * fast / (1 - 0.9 ** (step + 1)) / np.sqrt(slow / (1 - 0.99 ** (step + 1)))
            mean = mean + (value - mean) / min(step + 1, GAMES // 2)
        found = []
        for seed in seeds.TUNING[:24]:
            jobs = workload.stream(A100, seed, 60_000, shares, 0.8, 8, limit=limit)
            before, after = (train.waits(config, A100, game, jobs, v) for v in (start, mean))
            found.append(100 * (after / before - 1))
        half = 2.07 * float(np.std(found, ddof=1)) / len(found) ** 0.5
        print(f"{name:10} limits {limit:5} learned for it alone: {np.mean(found):+.1f} ± {half:.1f} % wait", flush=True)


def speed() -> None:
    """Decisions a second on one core."""
    print("\nSpeed, 8 GPUs, uniform, load 0.9: million decisions a second")
    jobs = workload.stream(A100, SEEDS[0], 1_000_000, workload.mix("uniform", A100), 0.9, 8, limit="1to3")
    value = -TABLES.memory.astype(float)
    for name, node, rate in (
        ("table, loss", Node(8), 0.0),
        ("table over time, loss", Node(8), 0.5),
        ("table, lazy destroy", Node(8, lazy=True), 0.0),
        ("table, queue", Node(8, depth=evaluate.DEPTH), 0.0),
    ):
        r = rules.by_value(TABLES, value, rate)
        best = np.inf
        for _ in range(3):
            began = time.perf_counter()
            simulate(TABLES, node, r, jobs)
            best = min(best, time.perf_counter() - began)
        print(f"  {name:30} {len(jobs.submit) / best / 1e6:.1f}")


PARTS: dict[str, Callable[[], None]] = {
    "loss": loss,
    "exact": lambda: optima(2),
    "exact3": lambda: optima(3),
    "queue": queue,
    "admission": admission,
    "reuse": reuse,
    "speed": speed,
    "cells": cells,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or [part for part in PARTS if part not in ("exact3", "cells")]:
        PARTS[part]()
