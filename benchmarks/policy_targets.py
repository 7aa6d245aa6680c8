"""How good the shipped policy is: the tables of docs/policy.md.

    python benchmarks/policy_targets.py [PART ...] [--tuning | --quick] [--write]

Without a part all of them are measured, one process for each core. Paired seeds; intervals are 95 %. The policy sees
what a node sees: demand and times as estimated from its own past, started from the shipped prior; a column with the
true mix shows what the estimate costs. Seeds are those of the test range; of the tuning range with `--tuning`, for
whoever decides by what he sees; and those for checks with `--quick`, which takes few GPUs and short streams. `--write`
puts the tables into docs/policy.md, each part in its place.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np

from policy import baselines, bounds, evaluate, exact, model, rules, seeds, simulator, transitions, workload
from policy.evaluate import DEPTH, accepted, waits
from policy.model import Model
from policy.rules import Tables
from policy.simulator import Node, World, simulate
from policy.transitions import Transitions
from policy.workload import Floats, Jobs

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/policy.md"
SCRATCH = ROOT / "benchmarks/scratch.model"
"""Made by `rms train --config policy/configs/slots8.scratch.toml`."""
AGAIN = ROOT / "benchmarks/again.model"
"""Made as the shipped model is, with `--seed 1`."""
LOADS = (0.6, 0.9)
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 5: 2.57, 23: 2.07}
"""Student's t, 95 %, by degrees of freedom."""
MANY = 24
"""Streams for what the targets are about; six leave intervals of one to three points."""
TOLD = ("uniform", "skew-small", "skew-big", "bimodal")


class How(NamedTuple):
    """With which random numbers, and whether with little."""

    seeds: range
    quick: bool


class Board(NamedTuple):
    """A GPU model with what simulating it needs."""

    moves: Transitions
    t: Tables
    of: Model


def board(name: str) -> Board:
    """By the model's name."""
    moves = transitions.load(name)
    return Board(moves, rules.tables(name), model.load(moves.geometry))


A100 = board("A100-80GB")


def streams(
    b: Board,
    how: How,
    shares: Floats,
    load: float,
    gpus: int,
    service: str = "exponential",
    limit: str = "1to3",
    count: int = 6,
) -> list[Jobs]:
    """`count` streams of 60,000 jobs."""
    count, each = (2, 4_000) if how.quick else (count, 60_000)
    return [workload.stream(b.moves, s, each, shares, load, gpus, service, limit) for s in how.seeds[:count]]


def own(b: Board, node: Node, jobs: Jobs, pending: bool = False, of: Model | None = None) -> World:
    """The shipped policy, as on a node. Estimates are made seldom: they cost ten times what simulating does, and the
    demand does not change."""
    return evaluate.simulate_estimating(b.moves, b.t, node, of or b.of, jobs, pending, evaluate.REMEMBERED)


def percent(found: Sequence[float], base: Sequence[float]) -> str:
    """How much more in percent, with its interval."""
    return interval([100 * (x / y - 1) for x, y in zip(found, base, strict=True)])


def interval(differences: Sequence[float], digits: int = 1) -> str:
    """Mean and half-width."""
    count = len(differences)
    half = STUDENT[count - 1] * float(np.std(differences, ddof=1)) / count**0.5
    return f"{np.mean(differences):+.{digits}f} ± {half:.{digits}f}"


def exactly(how: How) -> Iterator[str]:
    """Small nodes in loss mode, solved exactly."""
    yield "### Loss mode, exact: share of the gap from MFI to the optimum that is closed, in percent\n"
    yield "| GPUs | mix | load | MFI | optimum | gap, points | closed | with the true mix |"
    yield "|---|---|---|---|---|---|---|---|"
    moves, t, of = A100
    for gpus in (2,) if how.quick else (2, 3):
        for name in TOLD[: 1 if how.quick else None]:
            shares = workload.mix(name, moves)
            for load in LOADS:
                best = exact.optimum(moves, gpus, shares, load).acceptance
                mfi = exact.evaluate(moves, gpus, shares, load, baselines.mfi(moves, shares)).acceptance
                seen = evaluate.converged(moves, t, gpus, of, shares, load, how.seeds[0])
                closed = []
                for mix in (seen, shares):
                    reached = exact.evaluate(moves, gpus, shares, load, evaluate.learned(moves, mix, gpus)).acceptance
                    closed.append(f"{100 * (reached - mfi) / (best - mfi):.0f}")
                gap = f"{100 * mfi:.2f} | {100 * best:.2f} | {100 * (best - mfi):.2f}"
                yield f"| {gpus} | {name} | {load} | {gap} | {closed[0]} | {closed[1]} |"


def queue(how: How, service: str, b: Board = A100) -> Iterator[str]:
    """Waits at 8 GPUs."""
    yield (
        f"### {b.moves.geometry.model}: 8 GPUs, load 0.8, {service}, greedy backfill without reservation: "
        "waits against MFI, in percent\n"
    )
    yield "| mix | limits | mean wait | with the true mix | largest p95 | worst profile's mean | worst p95 |"
    yield "|---|---|---|---|---|---|---|"
    node = Node(8, depth=DEPTH)
    for name in TOLD[: 1 if how.quick else None]:
        shares = workload.mix(name, b.moves)
        for limit in ("exact", "1to3", "none"):
            mean, true, whole, means, tails = [], [], [], [], []
            for jobs in streams(b, how, shares, 0.8, 8, service, limit, MANY):
                known = evaluate.told(b.of, jobs)
                base, given, ours = (
                    waits(jobs, w)
                    for w in (
                        simulate(b.t, node, baselines.mfi(b.moves, shares), jobs),
                        simulate(b.t, node, evaluate.learned(b.moves, shares, node.gpus, b.of, known), jobs),
                        own(b, node, jobs),
                    )
                )
                kinds = [jobs.profile[-len(base) :] == p for p in range(len(shares))]
                mean.append(100 * (ours.mean() / base.mean() - 1))
                true.append(100 * (given.mean() / base.mean() - 1))
                means.append([100 * (ours[kind].mean() / base[kind].mean() - 1) for kind in kinds])
                tails.append(
                    [100 * (np.quantile(ours[k], 0.95) / max(np.quantile(base[k], 0.95), 0.05) - 1) for k in kinds]
                )
                whole.append(tails[-1][-1])
            worst = [
                f"{np.mean(found, axis=0).max():+.1f} ({b.moves.profiles[int(np.mean(found, axis=0).argmax())][:2]})"
                for found in (means, tails)
            ]
            figures = " | ".join([interval(mean), interval(true), interval(whole), *worst])
            yield f"| {name} | {limit} | {figures} |"


def admissions(how: How) -> Iterator[str]:
    """Under a reservation, with the queue known, with jobs of several instances."""
    yield "### Variants: 8 GPUs, load 0.8, exponential, limits 1 to 3 times too long; wait against MFI, percent\n"
    yield "| mix | with a reservation for the 7g | the queue known | one in ten asks for two instances |"
    yield "|---|---|---|---|"
    for name in TOLD[: 1 if how.quick else None]:
        shares = workload.mix(name, A100.moves)
        mfi = baselines.mfi(A100.moves, shares)
        cells = []
        for reserve, pending, pairs in ((True, False, 0.0), (False, True, 0.0), (False, False, 0.1)):
            node = Node(8, depth=DEPTH, reserve=reserve)
            found, base = [], []
            for i, single in enumerate(streams(A100, how, shares, 0.8, 8)):
                rng = np.random.default_rng(how.seeds[1000 + i])
                jobs = workload.paired(rng, single, A100.moves, shares, pairs) if pairs else single
                found.append(float(waits(jobs, own(A100, node, jobs, pending)).mean()))
                base.append(float(waits(jobs, simulate(A100.t, node, mfi, jobs)).mean()))
            cells.append(percent(found, base))
        yield f"| {name} | {' | '.join(cells)} |"


def uninformative(how: How) -> Iterator[str]:
    """Limits that say little or nothing."""
    kinds = ("1to10", "rounded", "some", "default")
    yield "### 8 GPUs, load 0.8, exponential: mean wait against the same model without times, percent\n"
    yield "| mix | 1 to 10 times too long | rounded up to 0.5, 1, 2, 5, ... | a third has none | partition's default |"
    yield "|---|---|---|---|---|"
    node = Node(8, depth=DEPTH)
    for name in TOLD[: 1 if how.quick else None]:
        shares = workload.mix(name, A100.moves)
        cells = []
        for kind in kinds:
            found, base = [], []
            for jobs in streams(A100, how, shares, 0.8, 8, limit=kind)[:4]:
                blind = jobs._replace(limit=np.full(len(jobs.limit), workload.UNKNOWN))
                found.append(float(waits(jobs, own(A100, node, jobs)).mean()))
                base.append(float(waits(jobs, own(A100, node, blind)).mean()))
            cells.append(percent(found, base))
        yield f"| {name} | {' | '.join(cells)} |"


def ablation(how: How) -> Iterator[str]:
    """What each part adds."""
    yield "### What each part adds: 8 GPUs, load 0.8, limits 1 to 3 times too long; wait against MFI, percent\n"
    yield "| | " + " | ".join(TOLD) + " |"
    yield "|---|" + "---|" * len(TOLD)
    moves, t, of = A100
    node = Node(8, depth=DEPTH)
    anchor = anchor_alone(of)
    prior = np.array(of.prior)

    def wordly(jobs: Jobs) -> model.Times:
        return evaluate.told(anchor, jobs)._replace(ratios=(1.0,))

    parts: dict[str, Callable[[Jobs], World]] = {
        "one table of values, no demand, no times": lambda j: simulate(
            t, node, evaluate.learned(moves, prior, 8, of), j
        ),
        "+ times, limits at their word": lambda j: simulate(
            t, node, evaluate.learned(moves, prior, 8, anchor, wordly(j)), j
        ),
        "+ what part of their limits jobs use": lambda j: simulate(
            t, node, evaluate.learned(moves, prior, 8, anchor, evaluate.told(anchor, j)), j
        ),
        "+ demand, estimated": lambda j: own(A100, node, j, of=anchor),
        "+ values learned by playing (what ships)": lambda j: own(A100, node, j),
        "+ the queue known": lambda j: own(A100, node, j, pending=True),
    }
    cells: dict[str, list[str]] = {name: [] for name in parts}
    for name in TOLD:
        shares = workload.mix(name, moves)
        jobs = streams(A100, how, shares, 0.8, 8)
        base = [float(waits(j, simulate(t, node, baselines.mfi(moves, shares), j)).mean()) for j in jobs]
        for part, play in parts.items():
            cells[part].append(percent([float(waits(j, play(j)).mean()) for j in jobs], base))
    for part, found in cells.items():
        yield f"| {part} | {' | '.join(found)} |"


def anchor_alone(of: Model) -> Model:
    """The value that was learned against exact solutions also in the place of the one that was learned by playing."""
    rows, biases = of.layers[-1]
    half = len(biases) // 2
    return of._replace(layers=[*of.layers[:-1], ([*rows[:half], *rows[:half]], [*biases[:half], *biases[:half]])])


def learning(how: How) -> Iterator[str]:
    """What learning adds to the exact solutions, and what it reaches without them."""
    yield "### Anchor and learning: 8 GPUs, load 0.8, exact limits; mean wait against MFI, percent\n"
    yield "| | " + " | ".join(TOLD) + " |"
    yield "|---|" + "---|" * len(TOLD)
    scratch = model.unpack(SCRATCH.read_bytes(), A100.moves.geometry)
    models = {"anchor alone": anchor_alone(A100.of), "from the anchor (what ships)": A100.of, "from scratch": scratch}
    cells: dict[str, list[str]] = {name: [] for name in (*models, "from the anchor against the anchor alone")}
    node = Node(8, depth=DEPTH)
    for name in TOLD:
        shares = workload.mix(name, A100.moves)
        jobs = streams(A100, how, shares, 0.8, 8, limit="exact")
        base = [float(waits(j, simulate(A100.t, node, baselines.mfi(A100.moves, shares), j)).mean()) for j in jobs]
        found = [[float(waits(j, own(A100, node, j, of=of)).mean()) for j in jobs] for of in models.values()]
        for row, ours, against in zip(cells.values(), [*found, found[1]], [base, base, base, found[0]], strict=True):
            row.append(percent(ours, against))
    for row, filled in cells.items():
        yield f"| {row} | {' | '.join(filled)} |"


def again(how: How) -> Iterator[str]:
    """What ships beside the same training with another seed."""
    moves, t, ships = A100
    other = model.unpack(AGAIN.read_bytes(), moves.geometry)
    names = TOLD[: 1 if how.quick else None]
    yield "### Trained again with another seed: 8 GPUs, load 0.8, exponential; mean wait, percent\n"
    yield "| mix | limits | what ships, against MFI | again, against MFI | again, against what ships |"
    yield "|---|---|---|---|---|"
    node = Node(8, depth=DEPTH)
    for name in names:
        shares = workload.mix(name, moves)
        mfi = baselines.mfi(moves, shares)
        for limit in ("exact", "1to3", "none"):
            jobs = streams(A100, how, shares, 0.8, 8, limit=limit)
            base = [float(waits(j, simulate(t, node, mfi, j)).mean()) for j in jobs]
            ours, theirs = ([float(waits(j, own(A100, node, j, of=of)).mean()) for j in jobs] for of in (ships, other))
            yield f"| {name} | {limit} | {percent(ours, base)} | {percent(theirs, base)} | {percent(theirs, ours)} |"
    yield "### The same: 2 GPUs, load 0.9, loss mode, exact; share of the gap that is closed, percent\n"
    yield "| mix | what ships | again |"
    yield "|---|---|---|"
    for name in names:
        shares = workload.mix(name, moves)
        best = exact.optimum(moves, 2, shares, 0.9).acceptance
        least = exact.evaluate(moves, 2, shares, 0.9, baselines.mfi(moves, shares)).acceptance
        closed = []
        for of in (ships, other):
            seen = evaluate.converged(moves, t, 2, of, shares, 0.9, how.seeds[0])
            reached = exact.evaluate(moves, 2, shares, 0.9, evaluate.learned(moves, seen, 2, of)).acceptance
            closed.append(f"{100 * (reached - least) / (best - least):.0f}")
        yield f"| {name} | {' | '.join(closed)} |"


def held_out(how: How) -> Iterator[str]:
    """Mixes, loads, sizes and services that nobody trained for."""
    yield "### Held out: 40 mixes none of which is within 0.15 (L1) of a training mix, loads 0.4 to 1.1, 1 to 32 GPUs\n"
    yield "| service | GPUs | cases | median gain | worst | below MFI | by more than 0.2 points |"
    yield "|---|---|---|---|---|---|---|"
    rng = np.random.default_rng(how.seeds[5000])
    trained = training_mixes()
    mixes: list[Floats] = []
    while len(mixes) < (3 if how.quick else 40):
        drawn = rng.dirichlet(np.ones(6))
        if np.abs(trained - drawn).sum(axis=1).min() > 0.15:
            mixes.append(drawn)
    gains: dict[tuple[str, str], list[float]] = {}
    for i, shares in enumerate(mixes):
        for service in ("exponential", "hyperexponential", "lognormal"):
            gpus, load = int(rng.choice([1, 2, 4, 8, 16, 32])), float(rng.uniform(0.4, 1.1))
            limit = str(rng.choice(["exact", "1to3", "none"]))
            differences = []
            many, each = (1, 4_000) if how.quick else (4, 40_000)
            for seed in how.seeds[6000 + 10 * i :][:many]:
                jobs = workload.stream(A100.moves, seed, each, shares, load, gpus, service, limit)
                mfi = simulate(A100.t, Node(gpus), baselines.mfi(A100.moves, shares), jobs)
                differences.append(accepted(A100.t, jobs, own(A100, Node(gpus), jobs)) - accepted(A100.t, jobs, mfi))
            size = "1" if gpus == 1 else "2 and 4" if gpus < 8 else "8 to 32"
            gains.setdefault((service, size), []).append(float(np.mean(differences)))
    everything = [gain for found in gains.values() for gain in found]
    rows = [(*key, gains[key]) for key in sorted(gains)] + [("all", "all", everything)]
    for service, size, found in rows:
        below, far = np.mean(np.array(found) < 0), int((np.array(found) < -0.2).sum())
        figures = f"{np.median(found):+.2f} | {min(found):+.2f} | {100 * below:.0f} % | {far}"
        yield f"| {service} | {size} | {len(found)} | {figures} |"


def training_mixes() -> Floats:
    """Every mix that the shipped model has seen in training."""
    from policy import train

    made = A100.of.manifest["made"]
    return train.mixes(made["config"], A100.moves, made["seed"])


class Compared(NamedTuple):
    """What MFI, the best baseline and the shipped policy reach (more is better); and how much more than the best."""

    mfi: float
    best: float
    name: str
    ours: float
    more: list[float]


def compared(
    b: Board, node: Node, shares: Floats, jobs: list[Jobs], names: list[str], reached: Callable[[Jobs, World], float]
) -> Compared:
    """The shipped policy beside these baselines, one of which is MFI."""
    found = {
        name: [reached(j, simulate(b.t, node, baselines.ALL[name](b.moves, shares), j)) for j in jobs] for name in names
    }
    ours = [reached(j, own(b, node, j)) for j in jobs]
    best = max(found, key=lambda name: float(np.mean(found[name])))
    more = [x - y for x, y in zip(ours, found[best], strict=True)]
    return Compared(float(np.mean(found["MFI"])), float(np.mean(found[best])), best, float(np.mean(ours)), more)


def elastic(how: How) -> Iterator[str]:
    """An elastic pool: an empty GPU is taken only when nothing else fits."""
    yield "### Elastic pool, load of 8 GPUs, limits 1 to 3 times too long: time-average of non-empty GPUs\n"
    yield "| mix | MFI | best baseline | learned | learned less best baseline | repacking bound |"
    yield "|---|---|---|---|---|---|"
    b, node = A100, Node(60, depth=DEPTH, elastic=True)
    without = np.array([0.2, 0.2, 0.2, 0.2, 0.2, 0.0])

    def spared(jobs: Jobs, w: World) -> float:
        return -float(w.clock[simulator.GPU_TIME] / w.clock[simulator.NOW])

    for name, shares in [*((n, workload.mix(n, b.moves)) for n in ("uniform", "skew-small")), ("without 7g", without)]:
        jobs = streams(b, how, shares, 0.8, 8)[:3]
        found = compared(b, node, shares, jobs, list(baselines.ALL), spared)
        bound = np.mean([bounds.fewest_gpus(b.moves, j) for j in jobs])
        less = interval([-more for more in found.more], 2)
        figures = f"{-found.mfi:.2f} | {-found.best:.2f} ({found.name}) | {-found.ours:.2f}"
        yield f"| {name} | {figures} | {less} | {bound:.2f} |"


def large(how: How) -> Iterator[str]:
    """A hundred GPUs."""
    yield "### 100 GPUs, loss mode, without limits: accepted memory slices, points above MFI\n"
    yield "| mix | load | MFI | best baseline | learned | learned less best baseline |"
    yield "|---|---|---|---|---|---|"
    b, node = A100, Node(10 if how.quick else 100)
    strong = [n for n in baselines.ALL if n not in ("random", "worst-fit", "first-fit low", "NVIDIA's order")]
    for name in TOLD[: 1 if how.quick else None]:
        shares = workload.mix(name, b.moves)
        for load in (0.85, 0.95):
            jobs = streams(b, how, shares, load, node.gpus, limit="none")
            found = compared(b, node, shares, jobs, strong, lambda j, w: accepted(b.t, j, w))
            figures = f"{found.mfi:.2f} | {found.best - found.mfi:+.2f} ({found.name}) | {found.ours - found.mfi:+.2f}"
            yield f"| {name} | {load} | {figures} | {interval(found.more, 2)} |"


def reuse(how: How) -> Iterator[str]:
    """Creates per job."""
    yield "### Lazy destroy, 8 GPUs, load 0.7, uniform, limits 1 to 3 times too long\n"
    yield "| creates per job | MFI's | mean wait against the same without reuse, percent |"
    yield "|---|---|---|"
    shares = workload.mix("uniform", A100.moves)
    made, mfis, lazily, eagerly = [], [], [], []
    for jobs in streams(A100, how, shares, 0.7, 8, count=MANY):
        lazy, eager = (own(A100, Node(8, depth=DEPTH, lazy=on), jobs) for on in (True, False))
        mfi = simulate(A100.t, Node(8, depth=DEPTH, lazy=True), baselines.mfi(A100.moves, shares), jobs)
        made.append(float(lazy.created.mean()))
        mfis.append(float(mfi.created.mean()))
        lazily.append(float(waits(jobs, lazy).mean()))
        eagerly.append(float(waits(jobs, eager).mean()))
    yield f"| {np.mean(made):.3f} | {np.mean(mfis):.3f} | {percent(lazily, eagerly)} |"


def ahead(how: How) -> Iterator[str]:
    """Instances made ahead of time."""
    yield "### Ahead of time: 8 GPUs, jobs of 10 minutes, limits 1 to 3 times too long, create 0.3 s, destroy 0.15 s\n"
    yield "| mix | load | prewarm | creates per job | made ahead per job | of these used | start delay | its p99 |"
    yield "|---|---|---|---|---|---|---|---|"
    mean = 600.0  # seconds
    for name in TOLD[: 1 if how.quick else 2]:
        shares = workload.mix(name, A100.moves)
        for load in (0.4, 0.8):
            for prewarm in (False, True):
                node = Node(
                    8, depth=DEPTH, lazy=True, create=0.3 / mean, destroy=0.15 / mean, prewarm=prewarm, spared=1.0
                )
                runs = [own(A100, node, jobs) for jobs in streams(A100, how, shares, load, 8)]
                created = np.mean([w.created.mean() for w in runs])
                made, used = (sum(int(w.tally[place]) for w in runs) for place in (simulator.AHEAD, simulator.USED))
                each = made / sum(len(w.start) for w in runs)
                delay = mean * 1000 * np.concatenate([w.delay for w in runs])
                counts = (
                    f"{created:.2f} | {each:.2f} | {100 * used / made:.0f} %" if prewarm else f"{created:.2f} | - | -"
                )
                shown = "yes" if prewarm else "no"
                delays = f"{delay.mean():.0f} ms | {np.quantile(delay, 0.99):.0f} ms"
                yield f"| {name} | {load} | {shown} | {counts} | {delays} |"


PARTS: dict[str, Callable[[How], Iterator[str]]] = {
    "exact": exactly,
    "queue": lambda how: queue(how, "exponential"),
    "hyper": lambda how: queue(how, "hyperexponential"),
    "ablation": ablation,
    "learning": learning,
    "again": again,
    "admissions": admissions,
    "limits": uninformative,
    "reuse": reuse,
    "ahead": ahead,
    "held-out": held_out,
    "elastic": elastic,
    "large": large,
    "a30": lambda how: queue(how, "exponential", board("A30")),
}


def measure(part: str, how: How) -> tuple[str, float]:
    """A part's tables, and the processor time that they took, in seconds."""
    began = time.process_time()
    lines = [("\n" if line.startswith("#") else "") + line + "\n" for line in PARTS[part](how)]
    return "".join(lines), time.process_time() - began


def main(arguments: list[str]) -> None:
    """Print the tables as they come."""
    if unknown := set(arguments) - {*PARTS, "--quick", "--tuning", "--write"}:
        raise SystemExit(f"no part and no option: {' '.join(sorted(unknown))}; the parts are {' '.join(PARTS)}")
    options = [a for a in ("--quick", "--tuning") if a in arguments]
    how = How(seeds.CHECKS, True) if "--quick" in options else How(seeds.TUNING if options else seeds.TEST, False)
    chosen = [a for a in arguments if a in PARTS] or list(PARTS)
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(chosen))) as pool:
        found = {pool.submit(measure, part, how): part for part in chosen}
        for result in as_completed(found):
            part, (tables, seconds) = found[result], result.result()
            command = " ".join(["python benchmarks/policy_targets.py", part, *options])
            text = f"Model {A100.of.name}, `{command}`.\n{tables}"
            print(f"{text}\n{part}: {seconds:.0f} s of processor time\n", flush=True)
            if "--write" in arguments:
                put(part, text)


def put(part: str, text: str) -> None:
    """Put a part's tables into the document, between its marks."""
    first, last = f"<!-- benchmarks/policy_targets.py {part} -->", f"<!-- end of {part} -->"
    document = DOCUMENT.read_text()
    made, count = re.subn(f"{first}.*?{last}", lambda _: f"{first}\n{text}\n{last}", document, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{DOCUMENT} has not the marks of {part} once")
    DOCUMENT.write_text(made)


if __name__ == "__main__":
    main(sys.argv[1:])
