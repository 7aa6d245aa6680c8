"""A decision is made again from its line in the audit log; what is late, damaged or beyond the training is told."""

from __future__ import annotations

import copy
import json
import random
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, run
from hypothesis import given
from hypothesis import strategies as st
from test_policy_shelf import changed

import controller
from policy import explain, model, seeds, train, transitions
from rms import audit, cli, geometry, inventory
from rms.errors import NoRoomError
from rms.store import Store

BOARDS = {name: geometry.load(name) for name in geometry.models()}
SHIPPED = {name: model.load(BOARDS[name]) for name in ("A100-80GB", "A30")}


@pytest.fixture
def rms(node: Node, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`rms ARGUMENTS`, for that node: exit code and what it said."""

    def call(*arguments: str) -> tuple[int, str]:
        code = cli.main([*arguments, "--config", str(node.toml), "--node", "n1"])
        said = capsys.readouterr()
        return code, said.out + said.err

    return call


def decide(node: Node, job: int, spec: str, limit: int | None = None) -> dict[str, Any]:
    """An acquire with the learned policy, and its decision as the log has it."""
    controller.Controller(node.config, controller.chooser(node.config), node.log.append).acquire(
        run(job), 1000, spec, 1, limit
    )
    return next(line for line in reversed(node.audit()) if line["event"] == "decision")


def made_again(line: dict[str, Any], of: model.Model) -> Any:
    """What follows from a line and a model."""
    view = explain.seen(line, BOARDS)
    return json.loads(json.dumps(audit.explain(explain.again(line, view, of) or [], view)))


# Made again.


@pytest.mark.parametrize("board", ["A100-80GB", "A30"])
def test_every_decision_follows_from_its_line(
    make_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch, board: str
) -> None:
    """Jobs come and go on pools of all sizes, with and without limits; some ask for several, some run over."""
    chance = random.Random(seeds.CHECKS[3])
    clock = [1_790_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    counted = several = timed = 0
    for gpus in (1, 2, 8):
        node = make_node(gpus=list(range(gpus)), sim_gpus=gpus, sim_model=board, fence=False)
        jobs: list[int] = []
        for job in range(1, 46):
            clock[0] += chance.expovariate(1 / 200)
            while jobs and chance.random() < 0.45:
                node.release(jobs.pop(chance.randrange(len(jobs))))
            spec = chance.choice(["1g", "1g", "2g", "1g:2,2g", "4g", "1g:3", "2g:2"])
            try:
                line = decide(node, job, spec, chance.choice([None, 5, 20, 60, 240]))
            except NoRoomError:
                continue
            jobs.append(job)
            assert {one["source"] for one in line["instances"]} == {"learned"}
            assert made_again(line, SHIPPED[board]) == line["instances"]
            counted += 1
            several += len(line["instances"]) > 1
            timed += line["basis"]["rate"] > 0 and len(line["basis"]["ratios"]) > 1
    assert counted > 60 and several > 15 and timed > 30


def test_what_a_line_says_matters(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in it is for show: with another demand, other times or other GPUs something else follows."""
    clock = [1_790_000_000.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    for job in range(1, 12):
        node.acquire(job, "1g", limit=10 * job)
    for job in range(1, 10):
        clock[0] += 100
        node.release(job)
    state = node.state()
    assert len(state.ended) >= model.TELLING
    line = decide(node, 20, "2g", 30)
    of = SHIPPED["A100-80GB"]
    assert made_again(line, of) == line["instances"]
    for change in (
        lambda one: one["basis"]["demand"].update({"1g.10gb": 0.0}),
        lambda one: one["basis"].update(rate=one["basis"]["rate"] / 9),
        lambda one: one["gpus"].popitem(),
        lambda one: next(gpu for gpu in one["gpus"].values() if gpu["idle"])["idle"].clear(),
        lambda one: one.update(end=one["end"] + 1e6),
    ):
        other = copy.deepcopy(line)
        change(other)
        assert made_again(other, of) != line["instances"]
    assert made_again(line, model.unpack(changed(0.5), BOARDS["A100-80GB"])) != line["instances"]


def test_the_administrator_asks_why(node: Node, rms: Any, tmp_path: Path) -> None:
    decide(node, 1, "3g", 10)
    decide(node, 2, "2g,1g")
    code, text = rms("policy", "explain", "2")
    assert code == 0 and "job 2.0: 2g.20gb:1,1g.10gb:1" in text and "made again from this line: the same" in text
    assert text.count("\n* ") == 2 and text.count("the built-in rule's choice") == 2 and "busy 3g.40gb@" in text
    told = json.loads(rms("policy", "explain", "2.0", "--json")[1])
    assert told["same"] is True and told["line"]["run"] == ["cluster", 2, 0]
    for wrong in ("3", "2.1", "1; ls", "-1", "2.", "9" * 5000, "2." + "9" * 5000):
        assert rms("policy", "explain", wrong)[0] in (2, 3)
    line = next(one for one in node.audit() if one["event"] == "decision")
    log = Path(node.config.audit_log)
    log.write_text(log.read_text().replace(SHIPPED["A100-80GB"].name, "00000000"))
    assert "model 00000000 is not here, so it was not made again" in rms("policy", "explain", "2")[1]

    for key in ("gpus", "instances", "basis", "now", "request"):
        for value in (None, 7, {"x": 1}, ["x"]):
            (tmp_path / "log").write_text(json.dumps({**line, key: value}) + "\n")
            code, text = rms("policy", "explain", "1", str(tmp_path / "log"))
            assert code == 3 or (code == 0 and key in ("now", "basis")), (key, value, text)


# In time.


@pytest.mark.timed
def test_a_slow_policy_is_replaced_in_time(node: Node, rms: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several instances share one budget: none waits for a policy that was too slow for the one before."""
    assert decide(node, 1, "1g")["instances"][0]["fault"] == ""
    real = model.over_time

    def slow(*arguments: Any) -> float:
        time.sleep(0.15)
        return real(*arguments)

    monkeypatch.setattr(model, "over_time", slow)
    began = time.monotonic()
    line = decide(node, 2, "1g:6")
    assert time.monotonic() - began < 8, "six times fourteen candidates would be 12 s"
    assert [one["source"] for one in line["instances"]] == ["built-in"] * 6
    assert {one["fault"] for one in line["instances"]} == {"the policy took too long; the built-in rule stands in"}
    assert node.log.count("the policy took too long; the built-in rule stands in") == 1
    assert made_again(line, SHIPPED["A100-80GB"]) == line["instances"]
    assert "6 of them by the built-in rule" in rms("policy", "show")[1]
    node.check()


# What the model was trained on.


def test_the_shipped_models_say_what_they_were_trained_on() -> None:
    import tomllib

    for name in ("slots8", "slots4"):
        config = tomllib.loads((Path(train.__file__).parent / f"configs/{name}.toml").read_text())
        of = SHIPPED[config["model"]]
        moves = transitions.load(config["model"])
        assert [list(pair) for pair in of.trained] == train.trained(config, moves, of.manifest["made"]["seed"])


@given(st.lists(st.floats(0.0, 1.0), min_size=6, max_size=6).filter(lambda x: sum(x) > 0))
def test_a_demand_beyond_the_training_is_brought_back(counts: list[float]) -> None:
    of = SHIPPED["A100-80GB"]
    shares = [count / sum(counts) for count in counts]
    taken = model.clamped(of, shares)
    assert sum(taken) == pytest.approx(1)
    assert all(least - 1e-9 <= x <= most + 1e-9 for x, (least, most) in zip(taken, of.trained, strict=True))
    inside = all(least <= x <= most for x, (least, most) in zip(shares, of.trained, strict=True))
    assert (taken is shares) == inside
    assert model.values(of, shares, 8) == model.values(of, taken, 8) or not inside
    usual = [a - b for a, b in zip(of.prior, shares, strict=True)]
    moved = [a - b for a, b in zip(taken, shares, strict=True)]
    back = max((m / u for m, u in zip(moved, usual, strict=True) if abs(u) > 1e-3), default=0)
    assert all(m == pytest.approx(back * u, abs=1e-6) for m, u in zip(moved, usual, strict=True)), "towards the prior"


def test_such_a_demand_is_logged_and_shown(node: Node, rms: Any) -> None:
    line = decide(node, 1, "1g")
    assert line["basis"]["clamped"] is None and "outside of what it was trained on" not in rms("policy", "show")[1]
    store = Store(node.config.state_dir, time.monotonic() + 20)
    with store.open("test") as state:
        state.recent = [(1.0, "3g.40gb:1", 10)] * inventory.RECENT
        store.save(state)
    line = decide(node, 2, "1g")
    most = SHIPPED["A100-80GB"].trained[3][1]
    assert line["basis"]["demand"]["3g.40gb"] > 0.9 and line["basis"]["clamped"]["3g.40gb"] == pytest.approx(most)
    assert made_again(line, SHIPPED["A100-80GB"]) == line["instances"]
    shown = rms("policy", "show")[1]
    assert re.search(f"outside of what it was trained on: taken for .*3g.40gb {most:.2f}", shown)
    assert "1 for a demand outside of what was trained on" in shown
    assert "taken for 1g.10gb" in rms("policy", "explain", "2")[1]
