"""The free-migration ceiling and the clairvoyant bound, against brute force on small cases."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from policy import baselines, bounds, rules, seeds, transitions, workload
from policy.simulator import Node, simulate
from policy.transitions import Transitions
from policy.workload import Jobs
from rms.errors import RequestError
from rms.geometry import Layout

MODELS = ["A100-80GB", "A30"]
SEED = seeds.CHECKS.start


def tiny(moves: Transitions, seed: int, count: int, gpus: int, load: float = 1.2, pairs: float = 0.0) -> Jobs:
    return workload.stream(moves, seed, count, workload.mix("uniform", moves), load, gpus, pairs=pairs)


def packable(moves: Transitions, wanted: list[int], held: tuple[Layout, ...]) -> bool:
    """Whether these fit, by trying every place of each."""
    if not wanted:
        return True
    name = moves.profiles[wanted[0]]
    return any(
        packable(moves, wanted[1:], (*held[:g], (*gpu, place), *held[g + 1 :]))
        for g, gpu in enumerate(held)
        for place in moves.geometry.legal(name, gpu)
    )


@pytest.mark.parametrize("model", MODELS)
def test_packing_is_exact(model: str) -> None:
    moves = transitions.load(model)
    packing = bounds.Packing(moves)
    rng = np.random.default_rng(SEED)
    answers = []
    for _ in range(60):
        gpus = int(rng.integers(1, 3))
        wanted = sorted(rng.integers(len(moves.profiles), size=rng.integers(1, 5)).tolist(), reverse=True)
        counts = tuple(wanted.count(p) for p in range(len(moves.profiles)))
        answers.append(packing.fits(counts, gpus))
        assert answers[-1] == packable(moves, wanted, ((),) * gpus)
    assert 10 < sum(answers) < 50


@pytest.mark.parametrize("model", MODELS)
def test_packing_knows_one_gpu(model: str) -> None:
    """Every vector of counts up to one more than fits, against the layouts themselves."""
    moves = transitions.load(model)
    packing = bounds.Packing(moves)
    held = {tuple(sum(p.profile == name for p in s) for name in moves.profiles) for s in moves.states}
    most = [max(counts[i] for counts in held) + 1 for i in range(len(moves.profiles))]
    for counts in itertools.product(*(range(m + 1) for m in most)):
        assert packing.fits(counts, 1) == (counts in held)


def repacked(moves: Transitions, node: Node, jobs: Jobs) -> list[float]:
    """Greedy backfill with repacking, written down plainly; for single instances."""
    starts = [np.nan] * len(jobs.submit)
    waiting: list[int] = []
    moments = list(jobs.submit)
    while moments:
        now = min(moments)
        moments = [moment for moment in moments if moment > now]
        arriving = [j for j, submit in enumerate(jobs.submit) if submit == now]
        waiting += arriving
        for j in list(waiting[: node.depth]) if node.depth else arriving:
            running = [
                int(jobs.profile[i]) for i, start in enumerate(starts) if start <= now < start + jobs.duration[i]
            ]
            if packable(moves, sorted([*running, int(jobs.profile[j])], reverse=True), ((),) * node.gpus):
                starts[j] = now
                waiting.remove(j)
                moments.append(now + jobs.duration[j])
        if not node.depth:
            waiting = []
    return starts


@pytest.mark.parametrize("depth", [0, 1, 2, 300])
@pytest.mark.parametrize("model", MODELS)
def test_free_migration_is_what_it_says(model: str, depth: int) -> None:
    moves = transitions.load(model)
    node = Node(1, depth=depth)
    for seed in range(SEED, SEED + 4):
        jobs = tiny(moves, seed, 25, 1)
        assert np.allclose(bounds.free_migration(moves, node, jobs), repacked(moves, node, jobs), equal_nan=True)


def test_free_migration_is_above_every_policy() -> None:
    moves = transitions.load("A100-80GB")
    t = rules.tables("A100-80GB")
    shares = workload.mix("skew-small", moves)
    jobs = workload.stream(moves, SEED, 20_000, shares, 0.8, 4, pairs=0.1)
    memory = t.profile_memory[jobs.profile]
    lost, queue = Node(4), Node(4, depth=300)
    accepted = memory[~np.isnan(bounds.free_migration(moves, lost, jobs))].sum()
    starts = bounds.free_migration(moves, queue, jobs)
    assert (starts >= jobs.submit).all()
    for make in baselines.ALL.values():
        r = make(moves, shares)
        assert accepted > memory[simulate(t, lost, r, jobs).gpu >= 0].sum()
        assert starts.mean() < simulate(t, queue, r, jobs).start.mean()


def clairvoyant(moves: Transitions, gpus: int, jobs: Jobs) -> int:
    """The slices that the bound accepts."""
    accepted = ~np.isnan(bounds.clairvoyant(moves, Node(gpus), jobs))
    return int(workload.sizes(moves)[jobs.profile][accepted].sum())


def best(moves: Transitions, jobs: Jobs, held: tuple[tuple[tuple[int, float], ...], ...], j: int) -> int:
    """The clairvoyant bound, every place of every job tried."""
    if j == len(jobs.submit):
        return 0
    now = float(jobs.submit[j])
    held = tuple(tuple(one for one in gpu if one[1] > now) for gpu in held)
    size = int(workload.sizes(moves)[jobs.profile[j]])
    end = now + float(jobs.duration[j])
    ways = [
        size + best(moves, jobs, (*held[:g], (*gpu, (k, end)), *held[g + 1 :]), j + 1)
        for g, gpu in enumerate(held)
        for k in moves.of_profile[jobs.profile[j]]
        if moves.after[moves.number(tuple(moves.placements[i] for i, _ in gpu))][k] >= 0
    ]
    return max(ways) if ways else best(moves, jobs, held, j + 1)


@pytest.mark.parametrize(("model", "gpus", "count"), [("A100-80GB", 1, 12), ("A100-80GB", 2, 6), ("A30", 2, 9)])
def test_clairvoyant_is_the_best_of_all_ways(model: str, gpus: int, count: int) -> None:
    moves = transitions.load(model)
    for seed in range(SEED, SEED + 6):
        jobs = tiny(moves, seed, count, gpus, load=2.0)
        assert clairvoyant(moves, gpus, jobs) == best(moves, jobs, ((),) * gpus, 0)


@pytest.mark.parametrize("pairs", [0.0, 0.3])
def test_clairvoyant_is_not_below_any_policy(pairs: float) -> None:
    moves = transitions.load("A100-80GB")
    t = rules.tables("A100-80GB")
    shares = workload.mix("uniform", moves)
    better = 0
    for seed in range(SEED, SEED + 5):
        jobs = tiny(moves, seed, 30, 2, load=0.9, pairs=pairs)
        bound = clairvoyant(moves, 2, jobs)
        for make in baselines.ALL.values():
            accepted = t.profile_memory[jobs.profile][simulate(t, Node(2), make(moves, shares), jobs).gpu >= 0].sum()
            assert accepted <= bound
            better += accepted < bound
    assert better > 10


def test_a_trace_that_is_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    moves = transitions.load("A100-80GB")
    monkeypatch.setattr(bounds, "MOST_STATES", 100)
    with pytest.raises(RequestError, match="too long for the clairvoyant bound"):
        bounds.clairvoyant(moves, Node(4), tiny(moves, SEED, 60, 4))


def test_nothing_comes_to_nothing() -> None:
    moves = transitions.load("A30")
    jobs = tiny(moves, SEED, 0, 1)
    assert len(bounds.clairvoyant(moves, Node(1), jobs)) == 0
    assert len(bounds.free_migration(moves, Node(1), jobs)) == 0
