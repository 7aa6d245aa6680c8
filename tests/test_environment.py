"""The Gymnasium environment: Gymnasium's own check, and the simulator job by job."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from policy import baselines, simulator
from policy.environment import PlacingEnv
from policy.simulator import Node


@pytest.mark.parametrize("model", ["A100-80GB", "A30"])
def test_gymnasium_finds_nothing_wrong(model: str) -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        check_env(PlacingEnv(model, gpus=2, jobs=100), skip_render_check=True)
    assert [str(one.message) for one in found] == []


@pytest.mark.parametrize(("model", "limit"), [("A100-80GB", "1to3"), ("A30", "none")])
def test_it_is_the_simulator(model: str, limit: str) -> None:
    """A rule that acts through the environment does what it does in the simulator, and what is lost is what was."""
    env = PlacingEnv(model, gpus=3, load=1.0, jobs=1500, limit=limit)
    seen, info = env.reset(seed=7)
    rule = baselines.best_fit_least_blocking(env.moves, env.demand[1])
    rewards, done = 0.0, False
    while not done:
        assert env.observation_space.contains(seen)
        mask = info["action_mask"].reshape(3, -1)
        states = [
            env.moves.number(tuple(p for p, b in zip(env.moves.placements, row, strict=True) if b))
            for row in seen["busy"]
        ]
        assert np.array_equal(states, env.world.state)
        best = [(-rule.score[states[g], k], g, k) for g, k in zip(*np.nonzero(mask), strict=True)]
        _, g, k = min(best)
        seen, reward, terminated, done, info = env.step(np.int64(g * mask.shape[1] + k))
        assert info["legal"] and not terminated
        rewards += reward
    w = simulator.simulate(env.tables, Node(3), rule, env.jobs)
    assert np.array_equal(env.world.gpu, w.gpu) and np.array_equal(env.world.placement, w.placement)
    lost = env.tables.profile_memory[env.jobs.profile][w.gpu < 0].sum()
    assert 0 < lost == pytest.approx(-rewards * env.tables.slots)


def test_what_is_not_possible_is_replaced() -> None:
    env = PlacingEnv(gpus=1, jobs=50)
    _, info = env.reset(seed=1)
    wrong = int(np.argmin(info["action_mask"]))
    first = int(np.argmax(info["action_mask"]))
    _, _, _, _, info = env.step(np.int64(wrong))
    assert not info["legal"]
    assert env.world.placement[0] == first


def test_time_left_is_what_is_expected() -> None:
    env = PlacingEnv(gpus=2, jobs=200, limit="exact")
    seen, info = env.reset(seed=3)
    for _ in range(30):
        before = env.world.clock[simulator.NOW]
        running = {
            (int(g), int(k)): e
            for g, k, e in zip(env.world.gpu, env.world.placement, env.world.start + env.jobs.duration, strict=True)
            if g >= 0 and e > before
        }
        assert {(int(g), int(k)) for g, k in zip(*np.nonzero(seen["busy"]), strict=True)} == set(running)
        for (g, k), end in running.items():
            assert seen["left"][g, k] == pytest.approx(np.exp(before - end), rel=1e-5)
        assert not seen["left"][seen["busy"] == 0].any()
        seen, _, _, _, info = env.step(np.int64(info["action_mask"].argmax()))
