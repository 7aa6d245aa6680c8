"""Instances that are made ahead of time: off the job's path, in nobody's way, and crash-safe like all others."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import numpy as np
import pytest
from conftest import Node
from hypothesis import given, settings
from test_controller import holder, operations
from test_publish import nodes
from test_publish import state as published_state

import controller
from policy import evaluate, model, rules, seeds, simulator, transitions
from rms import inventory, planner
from rms.device import Nvml
from rms.geometry import Geometry, Placement
from rms.inventory import Allocation, Gpu, Instance, Owner, Run, State
from rms.planner import View
from slurm.publish import offer

BACKENDS = ["simulated", "nvml"]


def wants(*places: str) -> inventory.Wish:
    """A wish for these on each GPU, where they are possible."""

    def wish(view: View, number: int) -> Sequence[Placement]:
        gpu, found = view.gpus[number], []
        for place in places:
            profile, _, start = gpu.geometry.find(place.partition("@")[0]).name, "", int(place.partition("@")[2])
            found += [p for p in gpu.geometry.legal(profile, (*gpu.taken, *found)) if p.start == start]
        return found

    return wish


def warm(node: Node, *places: str) -> int:
    """What the process that an Epilog leaves behind does."""
    return node.controller().prewarm(wants(*places) if places else controller.wish)


# What is made.


def test_what_the_policy_has_in_mind_is_made_and_used(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "3g")
    node.release(1)
    assert warm(node) > 0
    node.check()
    assert set(node.statuses().values()) == {"idle"}
    made, used = node.state().prewarmed
    assert made >= 1 and used == 0 and warm(node) == 0, "it is all there"
    lines = [line for line in node.audit() if line["event"] == "prewarm"]
    assert [line["did"] for line in lines] == ["create"] * made and {line["result"] for line in lines} == {"done"}
    assert [i.placement.profile for gpu in node.state().gpus for i in gpu.instances] == ["3g.40gb"] * 2
    done = operations(node)
    node.acquire(2, "3g:2")
    assert operations(node) == done, "nothing is made while the job waits"
    assert node.state().prewarmed == (made, 1)
    assert [line["prewarmed"] for line in node.audit() if line["event"] == "granted"] == [0, 1]
    node.release(2)
    node.acquire(3, "3g:2")
    assert warm(node) == 0 and node.state().prewarmed == (made, 1), "it counts once"
    node.check_empties()


def test_what_was_used_lately_is_never_destroyed_for_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1_790_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    node.configure(gpus=[0])
    node.acquire(1, "3g")
    node.acquire(2, "1g")
    node.release(1)
    clock[0] += inventory.SPARED_SECONDS - 1
    assert warm(node, "4g@0", "3g@4") == 0 and warm(node, "2g@4") == 0
    clock[0] += 2
    before = operations(node)
    assert warm(node, "2g@4") == 1
    assert operations(node)[len(before) :] == ["destroy 3g.40gb@4", "create 2g.20gb@4"]
    assert warm(node, "1g@4", "1g@5") == 0, "what was just made is spared, too"
    node.check()


def test_nothing_is_made_where_something_is_out_of_order(node: Node) -> None:
    (one,) = node.acquire(1, "3g")
    with holder(node, one.uuid):
        node.release(1)
        assert set(node.statuses().values()) == {"quarantined"}
        assert warm(node, "1g@0") == 1, "on the other GPU"
        assert [key for key in node.statuses() if "1g" in key] == [f"{1 - one.number}:1g.10gb@0:1"]
    node.lose(1 - one.number)
    node.reconcile()
    assert warm(node, "2g@0") == 1, "the quarantine is over; the lost GPU is left alone"
    node.lose(1 - one.number, lost=False)
    node.reconcile()
    node.device().fail("create_compute_instance", Nvml.UNKNOWN, times=1)
    before = len(operations(node))
    assert warm(node, "1g@6", "1g@5", "1g@4") == 0 and len(operations(node)) > before, "a GPU that fails is left alone"
    assert any("unknown" in text for text in node.log)
    node.reconcile()
    node.check()


def test_without_a_model_nothing_is_made(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.acquire(1, "1g")
    model.load.cache_clear()
    monkeypatch.setattr(model, "MAGIC", b"of another version")
    assert warm(node) == 0
    model.load.cache_clear()


# In nobody's way.


@given(nodes())
@settings(max_examples=60)
def test_it_changes_nothing_about_what_is_published(node: tuple[Geometry, list[list[Placement]]]) -> None:
    """Neither while it is at work nor by what it has made."""
    known, layouts = node
    state = published_state(known, layouts)
    for gpu in state.gpus:  # an old idle instance here and there
        for place in known.legal(known.profiles[0].name, [i.placement for i in gpu.instances])[:1]:
            gpu.instances.append(Instance(state.number(), place, "idle", 9, 0, "MIG-idle"))
    before = offer(state, "boot", 1e9)
    for _ in range(20):
        view = inventory.view(state, 1e9)
        intent = inventory.begin_prewarm(state, view, controller.wish, Owner.me())
        assert offer(state, "boot", 1e9) == before, "at work"
        if intent is None:
            return
        outcomes = [
            inventory.Outcome(s.generation, 7, 0, "MIG-new")
            if s.status == "making"
            else inventory.Outcome(s.generation, None, None, None)
            for s in inventory.steps(state, intent)
        ]
        inventory.conclude(state, intent, outcomes, {}, 1e9, granted=False)
        assert offer(state, "boot", 1e9) == before, "done"
    raise AssertionError("it never comes to an end")


def test_one_process_at_a_time(node: Node) -> None:
    node.acquire(1, "1g")
    with controller.Store(node.config.state_dir, time.monotonic() + 5).prewarming():
        assert warm(node) == 0
    assert warm(node) > 0


def test_planning_beside_it(node: Node) -> None:
    """A GPU where something is being made ahead of time has room for all that it had before."""
    node.acquire(1, "3g")
    with controller.Store(node.config.state_dir, time.monotonic() + 5).open("test") as state:
        view = inventory.view(state, time.time())
        intent = inventory.begin_prewarm(state, view, controller.wish, Owner.me())
        assert intent is not None
        assert inventory.view(state, view.now).gpus == view.gpus
        whole = planner.plan(view, planner.Request((("7g.80gb", 1),)), None)
        mine = {gpu.uuid for gpu in state.gpus if gpu.uuid in state.touched(intent)}
        assert whole and (inventory.prewarming(state, whole) is intent) == (
            state.gpus[whole[0].choice.candidate.gpu].uuid in mine
        )


# The simulator makes the same.


def test_the_simulator_makes_the_same_ahead() -> None:
    """On random GPUs, with what was used lately and long ago, the next instance is the same one."""
    moves, chance = transitions.load("A100-80GB"), random.Random(seeds.CHECKS[9])
    t, of = rules.tables("A100-80GB"), model.load(moves.geometry)
    node = simulator.Node(1, prewarm=True, lazy=True, spared=inventory.SPARED_SECONDS)
    shares = model.estimate(of, View((), (), None, 0.0), moves.geometry)
    rule = evaluate.learned(moves, np.array(shares), 1, of)
    made = 0
    for _ in range(1500):
        w = simulator.world(t, node, 0)
        w.clock[simulator.NOW] = 1e6
        gpu = Gpu("GPU-0", "A100-80GB")
        state = State(gpus=[gpu], geometries={"A100-80GB": moves.geometry})
        held = moves.states[chance.randrange(len(moves.states))]
        for place in held:
            status = chance.choice(["busy", "idle", "idle"])
            used = 1e6 - chance.choice([10.0, 1e4])
            gpu.instances.append(Instance(state.number(), place, status, 1, 0, "MIG", used=used))
            k = moves.placements.index(place)
            if status == "idle":
                w.idle[0] |= 1 << k
                w.used[0, k] = used
            else:
                w.state[0] = t.after[w.state[0], k]
                run = Run("c", state.counter, 0)
                state.allocations.append(Allocation(run, 1, "1g", None, None, 0.0, "", [state.counter], granted=True))
        found = simulator.lacking(t, node, rule, w, 0)
        intent = inventory.begin_prewarm(state, inventory.view(state, 1e6), controller.wish, Owner.me())
        new = [i.placement for i in gpu.instances if i.status == "making"]
        assert new == ([moves.placements[found]] if found >= 0 else []), (held, intent)
        made += len(new)
    assert made > 500
