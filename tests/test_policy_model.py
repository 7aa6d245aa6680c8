"""The shipped model: the runtime against torch and the simulator, bad files and odd nodes; training."""

from __future__ import annotations

import random
import time
import tomllib
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from test_policy_simulator import history, loaded

import controller
from policy import evaluate, model, rules, seeds, simulator, train, transitions
from policy.model import Model
from policy.simulator import Node, simulate
from rms import cli, geometry, inventory, planner
from rms.geometry import Geometry, Placement
from rms.planner import Asked, Busy, Choice, Demand, Ended, GpuView, View
from rms.request import Request

A100 = transitions.load("A100-80GB")
BOARD = A100.geometry
TABLES = rules.tables("A100-80GB")
SHIPPED = model.load(BOARD)
NOW = 1_700_000_000.0
SEED = seeds.CHECKS[77]


def net(of: Model) -> train.Net:
    """The torch model of a file's weights, in double precision as Python's numbers are."""
    shape = of.manifest["shape"]
    made = train.Net(shape[0] - 1, shape[1], shape[2], shape[3] // 2).double()
    *first, (rows, biases) = of.layers
    half = shape[3] // 2
    halves = ((rows[:half], biases[:half]), (rows[half:], biases[half:]))
    for layer, (rows, biases) in zip((*made.layers, made.timed), (*first, *halves), strict=True):
        layer.weight.data = torch.tensor([list(row) for row in rows], dtype=torch.float64)
        layer.bias.data = torch.tensor(list(biases), dtype=torch.float64)
    return made


def torch_value(shares: np.ndarray, gpus: int, timed: bool = False) -> np.ndarray:
    """The value of each state, by torch."""
    with torch.no_grad():
        value = net(SHIPPED)(torch.tensor(train.inputs(shares, gpus), dtype=torch.float64), timed).numpy()
    return np.asarray(value[np.array(A100.classes)])


def seen_as(shares: np.ndarray) -> tuple[tuple[Demand, ...], np.ndarray]:
    """Requests about as these shares, without limits, and the estimate that follows."""
    counts = np.round(60 * shares).astype(int)
    recent = [Demand(NOW, Request(((name, int(n)),)), None) for name, n in zip(A100.profiles, counts, strict=True) if n]
    return tuple(recent), evaluate.estimated(SHIPPED.prior, counts)


def demands(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(SEED)
    return [rng.dirichlet(np.ones(6)) for _ in range(count)]


def view(
    states: list[int],
    ends: dict[tuple[int, int], float | None],
    recent: tuple[Demand, ...],
    ended: tuple[Ended, ...] = (),
    began: dict[tuple[int, int], float] | None = None,
) -> View:
    """A node whose GPUs hold these states; a placement without an entry in `ends` has no known end."""
    gpus = []
    for g, s in enumerate(states):
        places = [(p, (g, A100.placements.index(p))) for p in A100.states[s]]
        busy = tuple(Busy(p, (began or {}).get(k, NOW - 60), ends.get(k)) for p, k in places)
        gpus.append(GpuView(str(g), BOARD, busy))
    return View(tuple(gpus), recent, None, NOW, ended)


def decided(view: View, profile: str, end: float | None) -> Choice | None:
    offered = planner.candidates(view, profile)
    return model.choose(view, Asked(profile, end), offered) if offered else None


# The same as torch and the simulator.


def test_every_state_and_profile_of_one_gpu() -> None:
    for shares in demands(50):
        recent, estimate = seen_as(shares)
        value = torch_value(estimate, 1)
        best = rules.by_value(TABLES, value).best
        of_held = model.worth(SHIPPED, estimate.tolist(), 1)
        assert np.allclose([of_held[held] for held in A100.held], value, atol=1e-12)
        for s in range(len(A100.states)):
            seen = view([s], {}, recent)
            for p, name in enumerate(A100.profiles):
                offered = planner.candidates(seen, name)
                if offered:
                    scores = model.score(SHIPPED, of_held, seen, Asked(name, None), offered, evaluate.BLIND)
                    first = offered[max(range(len(offered)), key=lambda i: scores[i])]  # the first of the highest
                    assert A100.placements.index(first.placement) == best[s, p]


def test_random_pools_with_random_remaining_times() -> None:
    """Half of them on nodes whose jobs have ended before their limits."""
    chance = random.Random(SEED)
    valued = [
        (recent, [torch_value(estimate, gpus, timed=gpus > 1) for gpus in range(1, 9)])
        for recent, estimate in map(seen_as, demands(50))
    ]
    early = tuple(Ended(2000.0, 2000.0 / part) for part in sorted(chance.uniform(0.2, 1.0) for _ in range(100)))
    no_jobs = np.zeros(0, dtype=np.int64)
    for _ in range(10_000):
        recent, by_gpus = chance.choice(valued)
        recent = tuple(demand._replace(limit=2000.0) for demand in recent)
        states = [chance.randrange(len(A100.states)) for _ in range(chance.randint(1, 8))]
        node = Node(len(states))
        w = simulator.world(TABLES, node, 0)
        w.state[:] = states
        w.room[:] = TABLES.fits[states].sum(axis=0)
        ends: dict[tuple[int, int], float | None] = {}
        began: dict[tuple[int, int], float] = {}
        for g, s in enumerate(states):
            for k, before in enumerate(A100.before[s]):
                if before >= 0 and chance.random() < 0.8:
                    left = chance.choice([chance.uniform(-500, 9000), chance.expovariate(1 / 2000)])
                    began[g, k] = w.began[g, k] = NOW - chance.uniform(0, 4000)
                    ends[g, k] = w.ends[g, k] = NOW + left
        end = NOW + chance.expovariate(1 / 2000) if chance.random() < 0.8 else None
        profile = chance.randrange(6)
        ended = chance.choice([(), early])
        known = model.times(SHIPPED, View((), recent, None, NOW, ended))
        assert known.rate == pytest.approx(SHIPPED.foresight / 2000.0) and known.guesses == (3 if ended else 1)
        ratios = np.array(known.ratios)
        rule = rules.by_value(TABLES, by_gpus[len(states) - 1], known.rate, SHIPPED.reuse, ratios, known.guesses)
        where = simulator.decide(TABLES, node, rule, w, profile, np.inf if end is None else end, NOW, no_jobs, 0)
        choice = decided(view(states, ends, recent, ended, began), A100.profiles[profile], end)
        found = -1
        if choice is not None:
            found = choice.candidate.gpu * len(A100.placements) + A100.placements.index(choice.candidate.placement)
        assert found == where


def test_many_gpus_have_a_price_for_stranded_slices() -> None:
    """On random pools of 40 GPUs; some of the choices are not those without the price."""
    chance, no_jobs, priced = random.Random(SEED), np.zeros(0, dtype=np.int64), 0
    recent, estimate = seen_as(demands(1)[0])
    free = SHIPPED._replace(stranding=0.0)
    with_it, without = (evaluate.learned(A100, estimate, 40, of) for of in (SHIPPED, free))
    node = Node(40)
    for _ in range(60):
        states = [chance.randrange(1, len(A100.states)) for _ in range(40)]
        w = simulator.world(TABLES, node, 0)
        w.state[:] = states
        w.room[:] = TABLES.fits[states].sum(axis=0)
        profile = chance.randrange(5)
        where, other = (
            simulator.decide(TABLES, node, rule, w, profile, np.inf, NOW, no_jobs, 0) for rule in (with_it, without)
        )
        choice = decided(view(states, {}, recent), A100.profiles[profile], None)
        found = -1
        if choice is not None:
            found = choice.candidate.gpu * len(A100.placements) + A100.placements.index(choice.candidate.placement)
        assert found == where
        priced += where != other
    assert priced


def test_the_controller_decides_as_the_simulator(fast_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """1,500 jobs through both with the shipped model, its demand estimate held at the prior."""
    node = Node(4, lazy=True)
    jobs = loaded(node, 1500, 0.9)
    rule = evaluate.learned(A100, np.array(SHIPPED.prior), node.gpus)
    w = simulate(TABLES, node, rule, jobs)
    monkeypatch.setattr(inventory, "CLOSED", 10)
    monkeypatch.setattr(controller, "BUDGET_SECONDS", 60.0)  # on a busy machine the built-in rule would stand in
    monkeypatch.setattr(model, "estimate", lambda of, view, geometry: list(of.prior))
    local = conftest.Node(fast_dir / "node", gpus=list(range(4)), sim_gpus=4).controller(controller.choose)
    monkeypatch.setattr(local.audit, "write", lambda event, **fields: None)
    for _, what, j in sorted(history(w, jobs)):
        local._deadline = time.monotonic() + 20
        if what == 0:
            local.release(conftest.run(j + 1))
        else:
            granted = local.acquire(conftest.run(j + 1), 1000, A100.profiles[jobs.profile[j]], 1, None)
            assert [(g.number, g.placement) for g in granted] == [(w.gpu[j], A100.placements[w.placement[j]])], j


# What it sees.


def test_a_node_remembers_as_much_as_was_trained_for() -> None:
    assert inventory.RECENT == evaluate.REMEMBERED


def test_the_estimate_begins_at_the_prior_and_goes_by_what_was_seen() -> None:
    empty = view([0], {}, ())
    assert model.estimate(SHIPPED, empty, BOARD) == pytest.approx(SHIPPED.prior)
    whole = Demand(NOW, Request((("7g.80gb", 1),)), None)
    media = Demand(NOW, Request((("1g.10gb+me", 2),)), None)
    seen = empty._replace(recent=(whole,) * 30, pending=(media,))
    shares = model.estimate(SHIPPED, seen, BOARD)
    assert shares[5] == pytest.approx((30 + model.PRIOR / 6) / (32 + model.PRIOR))
    assert shares[0] == pytest.approx((2 + model.PRIOR / 6) / (32 + model.PRIOR))
    assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize("limits", [[None] * 40, [86400.0] * 40, [86400.0] * 30 + [600.0] * 10])
def test_limits_that_say_nothing_change_nothing(limits: list[float | None]) -> None:
    """None, or the partition's default for most: as without times, though running jobs show ends."""
    chance = random.Random(SEED)
    recent = tuple(Demand(NOW, Request((("2g.20gb", 1),)), limit) for limit in limits)
    blind = tuple(d._replace(limit=None) for d in recent)
    for _ in range(200):
        states = [chance.randrange(len(A100.states)) for _ in range(4)]
        seen = view(states, {}, recent)
        gpus = []
        for gpu in seen.gpus:
            ages = [chance.uniform(0, 80000) for _ in gpu.busy]
            # Where nobody gives a limit a running job has none either.
            busy = [
                Busy(b.placement, NOW - a, NOW - a + 86400.0 if limits[0] else None)
                for b, a in zip(gpu.busy, ages, strict=True)
            ]
            gpus.append(gpu._replace(busy=tuple(busy)))
        seen = seen._replace(gpus=tuple(gpus))
        without = view(states, {}, blind)
        for profile in A100.profiles:
            with_times = decided(seen, profile, NOW + 86400.0 if limits[0] else None)
            assert (with_times and with_times.candidate) == ((c := decided(without, profile, None)) and c.candidate)


def test_a_profile_with_an_attribute_is_placed_as_the_plain_one() -> None:
    states = [5, 40, 100]
    plain, media = (decided(view(states, {}, ()), name, None) for name in ("1g.10gb", "1g.10gb+me"))
    assert plain and media and plain.scores == media.scores
    assert plain.candidate.placement[1:] == media.candidate.placement[1:]
    held = GpuView("x", BOARD, (Busy(Placement("1g.10gb+me", 3, 1), NOW, None),), blocked=(Placement("2g.20gb", 4, 2),))
    assert decided(View((held,), (), None, NOW), "2g.20gb", None) is not None


def test_what_it_has_in_mind_is_a_layout_with_the_new_instance() -> None:
    for s in range(0, len(A100.states), 7):
        for name in A100.profiles:
            choice = decided(view([s], {}, ()), name, None)
            if choice:
                assert set(A100.states[s]) | {choice.candidate.placement} <= set(choice.wanted)
                assert choice.source == "learned" and choice.model == SHIPPED.name
                assert not any(BOARD.legal(p, choice.wanted) for p in A100.profiles)
    first = decided(view([0], {}, ()), "3g.40gb", None)
    assert first and BOARD.config_id(first.wanted) == 5, "the first project's example"


# When there is nothing to decide with.


def stands_in(folder: Path, board: Geometry = BOARD) -> str:
    """The reason that is given for the built-in rule."""
    seen = View((GpuView("0", board), GpuView("1", board)), (), None, NOW)
    asked = Asked(board.profiles[0].name, None)
    offered = planner.candidates(seen, asked.profile)
    model.load.cache_clear()
    try:
        choice = model.choose(seen, asked, offered, shipped=str(folder))
    finally:
        model.load.cache_clear()
    assert choice._replace(fault="") == planner.built_in(seen, asked, offered)
    assert choice.fault.endswith("; the built-in rule stands in")
    return choice.fault


def test_without_a_file_the_built_in_rule_stands_in(tmp_path: Path) -> None:
    assert "no model for A100-80GB" in stands_in(tmp_path)


def test_a_damaged_file_is_never_used(tmp_path: Path) -> None:
    whole = (Path(model.WEIGHTS) / "slots8.model").read_bytes()
    chance = random.Random(SEED)
    path = tmp_path / "slots8.model"
    cut = [whole[: chance.randrange(len(whole))] for _ in range(20)]
    turned = []
    for _ in range(60):
        at = chance.randrange(len(whole))
        turned.append(whole[:at] + bytes([whole[at] ^ 1 << chance.randrange(8)]) + whole[at + 1 :])
    for data in (b"", b"\0" * 100, whole + b"x", *cut, *turned):
        path.write_bytes(data)
        assert str(path) in stands_in(tmp_path)


def test_a_model_for_other_placements_is_not_used(tmp_path: Path) -> None:
    whole = (Path(model.WEIGHTS) / "slots8.model").read_bytes()
    (tmp_path / "slots4.model").write_bytes(whole)
    assert "is not for the placements of A30" in stands_in(tmp_path, geometry.load("A30"))
    for name in ("A100-40GB", "H100-80GB", "H200"):
        assert model.load(geometry.load(name)).name == SHIPPED.name
    # Three memory slices of the one are what one is of the other.
    small, large = (model.load(geometry.load(name)) for name in ("A30", "RTX-PRO-6000"))
    assert small.name == large.name != SHIPPED.name and small.classes == large.classes


def test_it_is_light() -> None:
    """Under 2 ms to read, under 1 ms a decision at 8 GPUs, all remaining times different. Seen: 0.3 and 0.4."""
    chance = random.Random(SEED)
    states = [chance.randrange(400) for _ in range(8)]
    ends = {(g, k): NOW + chance.uniform(1, 9999) for g in range(8) for k in range(18)}
    recent = tuple(Demand(NOW - i, Request((("2g.20gb", 1),)), 3000.0 + i) for i in range(inventory.RECENT))
    ended = tuple(Ended(chance.uniform(100, 3000), 3000.0 + i) for i in range(inventory.RECENT))
    seen = view(states, dict(ends), recent, ended)

    def least(call: object) -> float:
        times = []
        for _ in range(30):
            began = time.perf_counter()
            call()  # type: ignore[operator]
            times.append(time.perf_counter() - began)
        return sorted(times)[5]

    def read() -> None:
        model.load.cache_clear()
        model.load(BOARD)

    assert least(read) < 2e-3
    assert least(lambda: decided(seen, "1g.10gb", NOW + 500)) < 1e-3


# Training.


TRAINING = """
model = "A30"
[anchors]
mixes = { 2 = 6, 1 = 2 }
loads = [0.6, 1.0]
[net]
hidden = 8
rank = 4
[training]
steps = 150
chains = 64
batch = 6
temperature = [0.05, 0.02]
rate = 0.01
[playing]
steps = 20
pairs = 2
jobs = 1000
gpus = [4]
loads = [0.7, 0.8]
limits = ["exact", "1to3"]
noise = 0.2
rate = 0.01
averaged = 5
kept = 0.6
[rule]
foresight = 0.5
reuse = 0.0
stranding = 0.0
"""


def test_training_learns_and_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    config = tomllib.loads(TRAINING)
    moves = transitions.load("A30")
    train.imitate({**config, "training": {**config["training"], "steps": 2}}, 0, tmp_path)
    made = train.train(config, 0, tmp_path)
    curve = (tmp_path / "curve.json").read_text()
    assert '"step": 2,' in curve and '"step": 150,' in curve
    assert '"step": 20,' in (tmp_path / "playing.json").read_text()
    assert all("<polyline" in (tmp_path / f"{name}.svg").read_text() for name in ("curve", "playing"))
    (tmp_path / "config.toml").write_text(TRAINING)
    file = tmp_path / "made.model"
    told = ["train", "--config", str(tmp_path / "config.toml"), "--out", str(file), "--folder", str(tmp_path)]
    assert cli.main(told) == 0  # nothing is left to train
    read = model.unpack(file.read_bytes(), moves.geometry)
    assert read.manifest["made"]["config"] == config and read.manifest["made"]["seed"] == 0
    for timed in (False, True):
        with torch.no_grad():
            values = made(torch.tensor(train.inputs(np.array(read.prior), 4)), timed).tolist()
        assert model.values(read, read.prior, 4, timed) == pytest.approx(values, abs=1e-5)


def test_training_from_scratch_only_plays(tmp_path: Path) -> None:
    config = tomllib.loads(TRAINING.replace("{ 2 = 6, 1 = 2 }", "{}").replace("steps = 20", "steps = 2"))
    del config["training"]
    net = train.train(config, 0, tmp_path)
    assert not (tmp_path / "curve.json").exists() and (tmp_path / "playing.json").exists()
    assert any((a != b).any() for a, b in zip(net.timed.parameters(), net.layers[-1].parameters(), strict=True))


def test_what_training_can_t_do_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.toml"
    bad.write_text("model =")
    where = ["--out", str(tmp_path / "m"), "--folder", str(tmp_path)]
    assert cli.main(["train", "--config", str(bad), *where]) == 3
    assert str(bad) in capsys.readouterr().err
    bad.write_text('model = "A30"\n[playing]\n[net]\n')
    assert cli.main(["train", "--config", str(bad), *where]) == 3
    assert "lacks anchors rule" in capsys.readouterr().err
    bad.write_text(TRAINING)
    nowhere = ["--out", str(tmp_path / "none" / "m"), "--folder", str(tmp_path)]
    assert cli.main(["train", "--config", str(bad), *nowhere]) == 3
    assert "no such directory" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["train", "--config", str(bad), "--device", "cuda", *where]) == 3
        assert "torch finds no such device" in capsys.readouterr().err
