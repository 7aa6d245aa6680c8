"""`rms policy`: the models of a site, through the command line, and what the controller then decides with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, run

import controller
from policy import audits, model, shelf, transitions
from rms import cli, geometry

A100 = transitions.load("A100-80GB")
SHIPPED = Path(model.WEIGHTS) / "slots8.model"


def changed(by: float = 1.0, **rule: float) -> bytes:
    """The shipped model with all weights of its last layer multiplied, and other settings."""
    of = model.load(A100.geometry)
    *layers, (rows, biases) = of.layers
    scaled = ([[by * w for w in row] for row in rows], [by * b for b in biases])
    known = {"foresight": of.foresight, "reuse": of.reuse, "stranding": of.stranding}
    return model.pack(A100, [*layers, scaled], of.prior, {**known, **rule}, {}, of.trained)


@pytest.fixture(autouse=True)
def forget() -> None:
    """Each hook is a process of its own, which has read no model yet."""
    model.load.cache_clear()


@pytest.fixture
def rms(node: Node, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """`rms ARGUMENTS`, for that node: exit code and what it said."""

    def call(*arguments: str) -> tuple[int, str]:
        model.load.cache_clear()
        code = cli.main([*arguments, "--config", str(node.toml), "--node", "n1"])
        said = capsys.readouterr()
        assert len(said.err.splitlines()) == (code != 0), said.err
        return code, said.out + said.err

    return call


def decided(node: Node, job: int) -> dict[str, Any]:
    """The decision of an acquire, as the audit log has it. Whatever the files are, the job gets its instance."""
    model.load.cache_clear()
    controller.Controller(node.config, controller.chooser(node.config), node.log.append).acquire(
        run(job), 1000, "1g.10gb:1"
    )
    lines = [json.loads(line) for line in Path(node.config.audit_log).read_text().splitlines()]
    found: dict[str, Any] = next(one for one in reversed(lines) if one["event"] == "decision")["instances"][0]
    return found


def test_use_and_rollback(node: Node, rms: Any, tmp_path: Path) -> None:
    shipped = model.load(A100.geometry).name
    assert decided(node, 1)["model"] == shipped
    (tmp_path / "mine.model").write_bytes(changed(-1.0))
    assert rms("policy", "use", str(tmp_path / "mine.model")) == (
        0,
        "mine decides from now on; rms policy rollback leads back to shipped\n",
    )
    mine = decided(node, 2)
    assert mine["model"] not in (shipped, None) and mine["source"] == "learned"
    (tmp_path / "other.model").write_bytes(changed(1.0, foresight=0.25))
    rms("policy", "use", str(tmp_path / "other.model"))
    other = decided(node, 3)["model"]
    text = rms("policy", "list", "--json")[1]
    assert [(m["name"], m["in_use"], m["fault"]) for m in json.loads(text)["models"]] == [
        ("shipped", False, ""),
        ("mine", False, ""),
        ("other", True, ""),
    ]
    shown = json.loads(rms("policy", "show", "--json")[1])
    assert (shown["name"], shown["model"], shown["rollback"]) == ("other", other, "mine")
    assert shown["manifest"]["foresight"] == 0.25 and shown["requests_seen"] == 3
    assert sum(shown["demand"].values()) == pytest.approx(1) and shown["demand"]["1g.10gb"] > 1 / 6
    assert rms("policy", "rollback") == (0, "mine decides from now on, and no longer other\n")
    assert decided(node, 4)["model"] == mine["model"]
    assert rms("policy", "rollback")[0] == 0
    assert decided(node, 5)["model"] == shipped
    assert rms("policy", "rollback")[0] == 3, "nothing was before the shipped one"
    assert rms("policy", "use", "other")[0] == 0
    assert rms("policy", "use", "other") == (0, "other decides already\n")
    assert decided(node, 6)["model"] == other
    swaps = [
        json.loads(line) for line in Path(node.config.audit_log).read_text().splitlines() if '"event": "policy"' in line
    ]
    assert [(s["by"], s["name"], s["before"]) for s in swaps] == [
        ("use", "mine", "shipped"),
        ("use", "other", "mine"),
        ("rollback", "mine", "other"),
        ("rollback", "shipped", "mine"),
        ("use", "other", "shipped"),
    ]
    assert "by the built-in rule" in rms("policy", "show")[1]


def test_what_can_t_decide_is_refused(node: Node, rms: Any, tmp_path: Path) -> None:
    whole = SHIPPED.read_bytes()
    bad = {
        "cut": (whole[:-1], "is damaged"),
        "empty": (b"", "is no model of this version"),
        "big": (whole + bytes(2 << 20), "is damaged"),
        "pickle": (b"\x80\x04\x95cos\nsystem\n", "is no model of this version"),
        "shipped": (whole, "can't be a model's name"),
        "a name": (whole, "can't be a model's name"),
        "nan": (changed(float("nan")), "has weights that are no numbers"),
    }
    for name, (data, complaint) in bad.items():
        (tmp_path / f"{name}.model").write_bytes(data)
        code, text = rms("policy", "use", str(tmp_path / f"{name}.model"))
        assert (code, complaint in text) == (3, True), text
    assert rms("policy", "use", "nowhere") == (
        3,
        "rms: nowhere is no model of rms policy list, and no file: No such file or directory\n",
    )
    assert rms("policy", "show", "nowhere")[0] == 3
    assert json.loads(rms("policy", "show", "--json")[1])["name"] == "shipped"
    assert not os.path.lexists(Path(node.config.policy_dir) / "slots8.model")
    (tmp_path / "one").mkdir()
    for folder, data in ((tmp_path, changed(2.0)), (tmp_path / "one", changed(3.0))):
        (folder / "mine.model").write_bytes(data)
    assert rms("policy", "use", str(tmp_path / "mine.model"))[0] == 0
    assert "another model of the name mine" in rms("policy", "use", str(tmp_path / "one/mine.model"))[1]


def test_a_model_of_other_states_or_another_board_is_refused() -> None:
    of = model.load(A100.geometry)
    with pytest.raises(model.ModelError, match="not for the placements of A30"):
        shelf.check(SHIPPED.read_bytes(), geometry.load("A30"))
    fewer = transitions.Transitions(A100.geometry)
    fewer.held, fewer.classes = fewer.held[:-1], fewer.classes[:-1]
    rule = {"foresight": 0.5, "reuse": 0.0, "stranding": 0.0}
    data = model.pack(fewer, of.layers, of.prior, rule, {}, of.trained)
    with pytest.raises(model.ModelError, match="has not the states"):
        shelf.check(data, A100.geometry)


@pytest.mark.parametrize("damage", ["cut", "gone", "directory"])
def test_a_damaged_model_costs_nobody_a_job(node: Node, rms: Any, tmp_path: Path, damage: str) -> None:
    (tmp_path / "mine.model").write_bytes(changed(2.0))
    rms("policy", "use", str(tmp_path / "mine.model"))
    path = Path(node.config.policy_dir) / "models/mine.model"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.unlink()
    if damage == "directory":
        path.mkdir()
    found = decided(node, 1)
    assert found["source"] == "learned" and found["model"] == model.load(A100.geometry).name
    assert found["fault"].endswith("; the shipped model stands in") and "slots8.model" in found["fault"]
    assert found["fault"] in node.log, "syslog has it too"
    assert "the shipped model stands in" in " ".join(rms("show")[1].split())
    listed = json.loads(rms("policy", "list", "--json")[1])["models"]
    assert [bool(m["fault"]) for m in listed if m["in_use"]] == [True]
    assert rms("policy", "show")[0] == 3
    assert rms("policy", "rollback")[0] == 0
    assert decided(node, 2)["fault"] == ""


def test_without_any_model_the_built_in_rule_is_counted(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decided(node, 1)["source"] == "learned"
    monkeypatch.setattr(model, "MAGIC", b"of another version")
    assert decided(node, 2)["source"] == "built-in"
    assert audits.stand_ins(node.config.audit_log) == (
        *(2, 1, 0),
        {f"{SHIPPED} is no model of this version; the built-in rule stands in": 1},
    )
    assert audits.stand_ins(node.config.audit_log + "x") == (0, 0, 0, {})


def test_a_hook_reads_one_file_and_lists_no_directory(
    node: Node, rms: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.model").write_bytes(changed(2.0))
    rms("policy", "use", str(tmp_path / "mine.model"))
    opened: list[str] = []

    def noted(path: str, *rest: Any, **more: Any) -> Any:
        opened.append(path)
        return open(path, *rest, **more)

    monkeypatch.setattr(model, "open", noted, raising=False)
    policy_dir = node.config.policy_dir
    before = os.stat(policy_dir).st_atime_ns, os.listdir(policy_dir)
    assert decided(node, 1)["source"] == "learned"
    assert opened == [os.path.join(policy_dir, "slots8.model")]
    assert sorted(before[1]) == ["history.json", "lock", "models", "slots8.model"]


@pytest.mark.parametrize("at", ["history", "link"])
def test_a_swap_that_was_cut_off_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    here = shelf.Shelf(str(tmp_path / "policy"), A100.geometry)
    for number, name in enumerate(["one", "two"]):
        here.add(changed(2.0 + number), name)
    here.use("one")

    def killed(source: str, target: str) -> None:
        if target.endswith(".json" if at == "history" else "slots8.model"):
            raise KeyboardInterrupt
        rename(source, target)

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            here.use("two")
    assert (here.in_use(), here.before()) == ("one", "shipped")
    assert here.last() is not None and here.last().name == "one"  # type: ignore[union-attr]
    here.use("two")
    assert (here.in_use(), here.before()) == ("two", "one")
    assert here.rollback() == "one" and here.rollback() == "shipped"


def test_a_damaged_history_costs_only_the_way_back(tmp_path: Path) -> None:
    here = shelf.Shelf(str(tmp_path / "policy"), A100.geometry)
    here.add(changed(2.0), "one")
    here.use("one")
    here.tried(1.0)
    assert here.history().attempts == (1.0,)
    for text in ("", "{}", '{"boards": {"slots8.model": {"used": 7}}}', "[1"):
        (tmp_path / "policy/history.json").write_text(text)
        assert here.in_use() == "one" and here.history() == shelf.History()
        here.use("one")
        assert here.last() is not None


def test_a_read_only_place_is_one_clear_line(node: Node, rms: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.model").write_bytes(changed(2.0))
    Path(node.config.policy_dir).write_text("a file")
    code, text = rms("policy", "use", str(tmp_path / "mine.model"))
    assert code == 6 and "cannot use" in text
