"""How good the shipped policy is: the tables of docs/policy.md.

    python benchmarks/policy_targets.py [exact] [queue] [hyper] [reuse] [--quick] [--write]

Seeds of the test range, paired; intervals are 95 %. The policy sees what a node sees: the shares of its last requests
beside the shipped prior, and time limits; a column with the true mix shows what the estimate costs.
`--quick` takes 2 GPUs and short streams; `--write` puts the tables into docs/policy.md.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from policy import baselines, evaluate, exact, model, seeds, simulator, transitions, workload
from policy.simulator import Node, simulate

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/policy.md"
MARK = "<!-- What follows is written by benchmarks/policy_targets.py --write. -->\n"
A100 = transitions.load("A100-80GB")
TABLES = simulator.tables("A100-80GB")
SHIPPED = model.load(A100.geometry)
LOADS = (0.6, 0.9)
STUDENT = {2: 4.30, 5: 2.57}
"""Student's t, 95 %, by degrees of freedom."""


def interval(differences: list[float]) -> str:
    """Mean and half-width."""
    count = len(differences)
    half = STUDENT[count - 1] * float(np.std(differences, ddof=1)) / count**0.5
    return f"{np.mean(differences):+.1f} ± {half:.1f}"


def exactly(quick: bool) -> Iterator[str]:
    """Small nodes in loss mode, solved exactly."""
    yield "### Loss mode, exact: share of the gap from MFI to the optimum that is closed, in percent\n"
    yield "| GPUs | mix | load | MFI | optimum | gap, points | closed | with the true mix |"
    yield "|---|---|---|---|---|---|---|---|"
    for gpus in (2,) if quick else (2, 3):
        for name in workload.MIXES:
            shares = workload.mix(name, A100)
            for load in LOADS:
                best = exact.optimum(A100, gpus, shares, load).acceptance
                mfi = exact.evaluate(A100, gpus, shares, load, baselines.mfi(A100, shares)).acceptance
                seen = evaluate.converged(A100, TABLES, gpus, SHIPPED, shares, load, seeds.TEST[0])
                closed = []
                for mix in (seen, shares):
                    reached = exact.evaluate(A100, gpus, shares, load, evaluate.learned(A100, mix)).acceptance
                    closed.append(f"{100 * (reached - mfi) / (best - mfi):.0f}")
                gap = f"{100 * mfi:.2f} | {100 * best:.2f} | {100 * (best - mfi):.2f}"
                yield f"| {gpus} | {name} | {load} | {gap} | {closed[0]} | {closed[1]} |"


def queue(quick: bool, service: str) -> Iterator[str]:
    """Waits at 8 GPUs."""
    count, jobs_each = (3, 20_000) if quick else (6, 60_000)
    yield f"### 8 GPUs, load 0.8, {service}, greedy backfill without reservation: waits against MFI, in percent\n"
    yield "| mix | limits | mean wait | with the true mix | 7g p95 | worst profile's mean | worst p95 |"
    yield "|---|---|---|---|---|---|---|"
    node = Node(8, depth=300)
    for name in workload.MIXES:
        shares = workload.mix(name, A100)
        for limit in ("exact", "1to3", "none"):
            mean, true, whole, means, tails = [], [], [], [], []
            for seed in seeds.TEST[:count]:
                jobs = workload.stream(A100, seed, jobs_each, shares, 0.8, 8, service, limit)
                worlds = (
                    simulate(TABLES, node, baselines.mfi(A100, shares), jobs),
                    simulate(TABLES, node, evaluate.learned(A100, shares, known=evaluate.told(SHIPPED, jobs)), jobs),
                    evaluate.simulate_estimating(A100, TABLES, node, SHIPPED, jobs, pending=False),
                )
                cut = slice(jobs_each // 20, None)
                base, given, own = ((w.start - jobs.submit)[cut] for w in worlds)
                kinds = [jobs.profile[cut] == p for p in range(len(shares))]
                mean.append(100 * (own.mean() / base.mean() - 1))
                true.append(100 * (given.mean() / base.mean() - 1))
                means.append([100 * (own[kind].mean() / base[kind].mean() - 1) for kind in kinds])
                tails.append(
                    [100 * (np.quantile(own[k], 0.95) / max(np.quantile(base[k], 0.95), 0.05) - 1) for k in kinds]
                )
                whole.append(tails[-1][-1])
            worst = [
                f"{np.mean(found, axis=0).max():+.0f} ({A100.profiles[int(np.mean(found, axis=0).argmax())][:2]})"
                for found in (means, tails)
            ]
            figures = " | ".join([interval(mean), interval(true), interval(whole), *worst])
            yield f"| {name} | {limit} | {figures} |"


def reuse(quick: bool) -> Iterator[str]:
    """Creates per job."""
    count, jobs_each = (3, 20_000) if quick else (6, 60_000)
    yield "### Lazy destroy, 8 GPUs, load 0.7, uniform, limits 1 to 3 times too long\n"
    yield "| creates per job | MFI's | mean wait against the same without reuse, percent |"
    yield "|---|---|---|"
    shares = workload.mix("uniform", A100)
    made, mfis, waits = [], [], []
    for seed in seeds.TEST[:count]:
        jobs = workload.stream(A100, seed, jobs_each, shares, 0.7, 8, limit="1to3")
        rule = evaluate.learned(A100, shares, known=evaluate.told(SHIPPED, jobs))
        lazy, eager = (simulate(TABLES, Node(8, depth=300, lazy=on), rule, jobs) for on in (True, False))
        mfi = simulate(TABLES, Node(8, depth=300, lazy=True), baselines.mfi(A100, shares), jobs)
        made.append(float(lazy.created.mean()))
        mfis.append(float(mfi.created.mean()))
        waits.append(100 * float((lazy.start - jobs.submit).mean() / (eager.start - jobs.submit).mean() - 1))
    yield f"| {np.mean(made):.2f} | {np.mean(mfis):.2f} | {interval(waits)} |"


PARTS: dict[str, Callable[[bool], Iterator[str]]] = {
    "exact": exactly,
    "queue": lambda quick: queue(quick, "exponential"),
    "hyper": lambda quick: queue(quick, "hyperexponential"),
    "reuse": reuse,
}


def main(arguments: list[str]) -> None:
    """Print the tables as they come."""
    quick, write = "--quick" in arguments, "--write" in arguments
    chosen = [a for a in arguments if a in PARTS] or list(PARTS)
    text = f"Model {SHIPPED.name}, `python benchmarks/policy_targets.py {' '.join(arguments)}`.\n"
    print(text)
    for part in chosen:
        for line in PARTS[part](quick):
            print(line, flush=True)
            text += ("\n" if line.startswith("#") else "") + line + "\n"
    if write:
        head, _, _ = DOCUMENT.read_text().partition(MARK)
        DOCUMENT.write_text(head + MARK + "\n" + text)


if __name__ == "__main__":
    main(sys.argv[1:])
