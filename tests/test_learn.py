"""`rms learn`: what it reads in audit logs and what it does not believe, who gets in, and the way back."""

from __future__ import annotations

import gzip
import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audit_log
import numpy as np
import pytest
from conftest import Node, run
from test_policy_shelf import changed

import controller
from policy import audits, learn, model, shelf, transitions
from rms import cli

A100 = transitions.load("A100-80GB")
SHIPPED = model.load(A100.geometry)
Lines = list[dict[str, Any]]


@pytest.fixture
def rms(node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`rms learn ARGUMENTS --json` in short, for that node: what it told; or its exit code and complaint."""
    monkeypatch.setattr(learn, "STREAMS", 2)
    monkeypatch.setattr(learn, "CANDIDATES", 8)
    monkeypatch.setattr(learn, "REPLAYS", 1)
    monkeypatch.setattr(learn, "LENGTH", 2000)
    monkeypatch.setattr(learn, "SUITE_JOBS", 10_000)

    def call(*arguments: object) -> Any:
        model.load.cache_clear()
        words = ["learn", "--config", str(node.toml), "--node", "n1", "--rounds", "1", "--json", *map(str, arguments)]
        code = cli.main(words)
        said = capsys.readouterr()
        if code:
            assert said.out == "" and len(said.err.splitlines()) == 1
            return code, said.err
        return json.loads(said.out)

    return call


def in_use(node: Node) -> str:
    return shelf.Shelf(node.config.policy_dir, A100.geometry).in_use()


@pytest.fixture(scope="module")
def plain() -> Lines:
    """A log of 4,800 jobs on 4 GPUs, a user with each tenth of them."""
    return list(audit_log.lines(audit_log.jobs(count=4800), 4, of=SHIPPED, users=10))


def write(path: Path, lines: Lines) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read(path: Path) -> audits.Logs:
    return audits.read([str(path)], A100.geometry, time.time())


# What it reads.


def test_the_log_of_a_real_controller(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller on simulated GPUs, with a clock of its own: every job comes back as it was."""
    now = time.time() - 1e6
    monkeypatch.setattr(time, "time", lambda: now)
    chance = random.Random(3)
    requests = ["1g.10gb:1", "1g.10gb:2,3g.40gb:1", "2g.20gb:1", "4g.40gb:1", "7g.80gb:1"]
    running: list[tuple[float, int]] = []
    expected = []
    for job in range(60):
        submit = int(now)
        now += chance.expovariate(1 / 300)
        spec = chance.choice(requests)
        while True:
            try:
                controller.Controller(node.config, log=node.log.append).acquire(
                    run(job), 1000 + job % 3, spec, submit, 600
                )
                break
            except controller.NoRoomError:
                running.sort()
                now, ended = max(now, running[0][0]), running.pop(0)[1]
                node.release(ended)
        duration = 600 + chance.expovariate(1 / 2000)
        running.append((now + duration, job))
        expected.append((submit, 1000 + job % 3, now, spec))
    ends = {}
    for end, job in sorted(running):
        now = max(now, end)
        node.release(job)
        ends[job] = now
    now += 10
    found = audits.read([node.config.audit_log], A100.geometry, now)
    assert (len(found.jobs), found.gpus, found.false, found.left_out) == (60, 2, {}, {})
    for job, (submit, uid, start, spec) in zip(found.jobs, sorted(expected), strict=True):
        asked = [item.split(":")[0] for item in spec.split(",") for _ in range(int(item[-1]))]
        assert (job.submit, job.uid, list(job.profiles), job.limit) == (submit, uid, sorted(asked), 36000)
        assert job.duration > 0 and start + job.duration <= now
    by_submit = {submit: start for submit, _, start, _ in expected}
    last = {expected[job][0]: end for job, end in ends.items()}
    for job in found.jobs:
        if job.submit in last:
            assert job.duration == pytest.approx(last[int(job.submit)] - by_submit[int(job.submit)], abs=1e-3)


def test_logs_of_many_nodes_rotated_and_packed(plain: Lines, tmp_path: Path) -> None:
    whole = read(write(tmp_path / "whole", plain))
    assert len(whole.jobs) == 4800 and whole.gpus == 4
    owner = {str(e["run"]): e["instances"][0][0] for e in plain if e["event"] == "granted"}
    one = [e for e in plain if owner[str(e["run"])] < "GPU-2"]
    two = [e for e in plain if owner[str(e["run"])] >= "GPU-2"]
    paths = [write(tmp_path / "a.2", one[:3000]), write(tmp_path / "a.1", one[3000:]), write(tmp_path / "b", two)]
    paths[0].write_bytes(gzip.compress(paths[0].read_bytes()))
    split = audits.read([str(p) for p in reversed(paths)], A100.geometry, time.time())
    assert split == whole
    assert [job.submit for job in whole.jobs] == sorted(job.submit for job in whole.jobs)


@pytest.mark.parametrize("where", [0.5, -6])  # within what is packed; in the checksum of all of it
def test_a_packed_log_that_is_damaged_counts_up_to_there(plain: Lines, tmp_path: Path, where: float) -> None:
    path = write(tmp_path / "a.gz", plain)
    packed = bytearray(gzip.compress(path.read_bytes()))
    at = int(where * len(packed)) if where > 0 else int(where)
    packed[at : at + 4] = b"\0\xff\0\xff"
    path.write_bytes(packed)
    found = audits.read([str(path)], A100.geometry, time.time())
    assert found.false["lines that are no JSON object with a time"] >= 1
    assert found.jobs
    audits.stand_ins(str(path))


def test_a_requeued_job_counts_once(plain: Lines, tmp_path: Path) -> None:
    again = []
    for entry in plain[:3000]:
        again.append(entry)
        if entry["event"] == "release" and entry["run"][1] % 2:  # ends, and comes back elsewhere
            cluster, job, _ = entry["run"]
            first = next(e for e in plain if e["event"] == "acquire" and e["run"][1] == job)
            second = {**first, "run": [cluster, job, 1], "t": entry["t"]}
            granted = next(e for e in plain if e["event"] == "granted" and e["run"][1] == job)
            there = [[f"GPU-x{job}", 0, granted["instances"][0][2], "MIG-"]]
            again += [second, {**granted, "run": [cluster, job, 1], "t": entry["t"], "instances": there}]
            again += [{"t": entry["t"] + 7, "event": "release", "run": [cluster, job, 1], "pid": 1}]
    once, twice = read(write(tmp_path / "once", plain[:3000])), read(write(tmp_path / "twice", again))
    assert len(once.jobs) == len(twice.jobs) and twice.false == {}
    assert twice.left_out["runs of requeued jobs before the last"] > 300
    assert sum(job.duration == pytest.approx(7, abs=1e-3) for job in twice.jobs) > 300


# What it does not believe.


def forged(lines: Lines, kind: str) -> Lines:
    """A log that somebody has had a hand in."""
    job = 1_000_000
    there = plainly(lines)
    made: Lines = []
    for i, entry in enumerate(lines):
        made.append(entry)
        t, place = entry["t"], [["GPU-0", 0, ["1g.10gb", i % 7, 1], "MIG-"]]
        ask = {"t": t, "event": "acquire", "run": ["cluster", job + i, 0], "uid": 7, "pid": 1, "limit": 60}
        ask |= {"request": "1g.10gb:1", "submit": int(t)}
        grant = {"t": t, "event": "granted", "run": ask["run"], "pid": 1, "instances": place}
        release = {"t": t + 60, "event": "release", "run": ask["run"], "pid": 1}
        if kind == "absurd durations" and entry["event"] == "release":
            made[-1] = {**entry, "t": t + 1e7 * (i % 3 == 0)}
        elif kind == "outlived limits" and entry["event"] == "acquire":
            made[-1] = {**entry, "limit": 1}
        elif kind == "flood":
            far = [[f"GPU-f{i}", 0, ["7g.80gb", 0, 8], "MIG-"]]
            made += [{**ask, "request": "7g.80gb:1"}, {**grant, "instances": far}, {**release, "t": t}]
            made[-1]["t"] = t + 0.001
        elif kind == "taken slices":
            made += [ask, grant, {**release, "t": t + 0.001}]
        elif kind == "out of nowhere":
            made += [grant, release]
        elif kind == "not what was asked" and entry["event"] == "acquire":
            made[-1] = {**entry, "request": "7g.80gb:2"}
        elif kind == "no such place" and entry["event"] == "granted":
            made[-1] = {**entry, "instances": [["GPU-0", 0, ["1g.10gb", 9, 1], "MIG-"]]}
        elif kind == "types" and i % 5 == 0:
            made.append(there[i % len(there)])
        elif kind == "no submit times" and entry["event"] == "acquire":
            made[-1] = {**entry, "submit": None}
        elif kind == "submitted later" and entry["event"] == "acquire":
            made[-1] = {**entry, "submit": int(t) + 100_000}
        elif kind == "from the future":
            made[-1] = {**entry, "t": t + 1e9}
    return made


def plainly(lines: Lines) -> Lines:
    """Lines of which something is of the wrong kind."""
    ask = next(e for e in lines if e["event"] == "acquire")
    grant = next(e for e in lines if e["event"] == "granted")
    wrong: Lines = [{**ask, "uid": "root"}, {**ask, "submit": -5}, {**ask, "limit": True}, {**ask, "run": 5}]
    wrong += [{**ask, "run": ["c", "1", 0]}, {**ask, "t": "now"}, {**ask, "t": float("nan")}, {"event": "granted"}]
    wrong += [{**grant, "instances": x} for x in (None, [], [[]], [["GPU", 0, [1, 2, 3], ""]], {"a": 1})]
    return wrong


POISONED = {
    "absurd durations": "from the future",
    "outlived limits": "outlived their time limit",
    "flood": "one user's",
    "taken slices": "that another one had",
    "out of nowhere": "nobody asked for",
    "not what was asked": "something else than was asked for",
    "no such place": "what no GPU has",
    "types": "damaged or forged",
    "no submit times": "no submit time",
    "submitted later": "before they were submitted",
    "from the future": "from the future",
}


@pytest.mark.parametrize("kind", POISONED)
def test_a_poisoned_log_is_no_basis(kind: str, plain: Lines, rms: Any, node: Node, tmp_path: Path) -> None:
    code, text = rms(write(tmp_path / "log", forged(plain, kind)))
    assert code == 3 and POISONED[kind] in text, text
    assert in_use(node) == "shipped" and not Path(node.config.policy_dir).exists()


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\0" * 5000, b"[" * 100_000, b'{"t": 1}\n', b"\x1f\x8b\x08cut off"])
def test_a_log_of_nothing(content: bytes, rms: Any, node: Node, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(content)
    assert rms(tmp_path / "log")[0] in (1, 3)
    assert in_use(node) == "shipped"


def test_three_lines_and_a_missing_file(plain: Lines, rms: Any, node: Node, tmp_path: Path) -> None:
    job = plain[0]["run"]
    told = rms(write(tmp_path / "log", [e for e in plain if e["run"] == job]))
    assert told[0] == 3 and "one user's" in told[1]
    short = write(tmp_path / "short", plain[:6000])
    assert rms(short)["outcome"] == "kept" and "2000 are needed" in rms(short)["reasons"][0]
    assert rms(tmp_path / "nowhere")[0] == 1
    assert in_use(node) == "shipped"


def test_a_user_of_many_jobs_counts_little() -> None:
    users = np.array([1] * 900 + [2] * 50 + [3] * 50)
    odds = learn.trusted(users)
    assert odds[:900].sum() < 0.75 and odds.sum() == pytest.approx(1)
    assert odds[900:].sum() > 0.25
    assert learn.others(users).sum() == 100


# Who gets in.


def equals(seed: int, jobs: int = 4000, spread: float = 0.5) -> learn.Paired:
    """Waits of two that are equally good: what differs is chance, for hours on end and job by job."""
    rng = np.random.default_rng(seed)
    submit = np.cumsum(rng.exponential(600, jobs))
    hours = (submit // 30000).astype(int)
    calm = rng.gamma(2, 500, hours.max() + 1)[hours]
    used, other = (
        calm * rng.lognormal(0, spread, hours.max() + 1)[hours] * rng.exponential(size=jobs) for _ in range(2)
    )
    return learn.Paired(submit, rng.integers(6, size=jobs), used, other, rng.random(jobs) < 0.9, 30000.0, 3000.0)


def test_of_200_equal_challengers_hardly_any_gets_in() -> None:
    alone = [learn.compare(equals(seed), learn.TAIL).high < 0 for seed in range(200)]
    assert sum(alone) <= 14, "the interval alone: 2.5 %, up to twice that where noise lasts as long as a block"
    let_in = [not learn.gate(equals(seed), A100.profiles, {}, 1)[1] for seed in range(200)]
    assert sum(let_in) <= 4
    clearly = [
        learn.compare(p._replace(other=0.7 * p.other), learn.TAIL / 4).high < -learn.LEAST_BETTER
        for p in map(equals, range(20))
    ]
    assert sum(clearly) >= 15, "the interval is no wall"


def test_every_bound_of_the_gate() -> None:
    rng = np.random.default_rng(0)
    count = 6000
    waits = rng.exponential(3000, count)
    good = learn.Paired(
        np.arange(count) * 600.0, rng.integers(6, size=count), waits, 0.8 * waits, np.ones(count, bool), 3e4, 3000.0
    )
    names, fine = A100.profiles, {"uniform": 1.9}
    assert learn.gate(good, names, fine, 1)[1] == []
    assert learn.gate(good, names, fine, 60)[1] == [], "so clear that even the 60th attempt may"

    def refused(pairs: learn.Paired, made_up: dict[str, float] = fine) -> str:
        found = learn.gate(pairs, names, made_up, 1)[1]
        assert len(found) == 1, found
        return found[0]

    first = good.profile == 0
    small = np.flatnonzero(first)
    assert "mean wait is -0.9" in refused(good._replace(other=0.991 * waits))
    assert "-20.0" not in refused(good, {"uniform": 2.1}) and "uniform" in refused(good, {"uniform": 2.1})
    assert "uniform" in refused(good, {"uniform": float("nan")})
    assert "1g.10gb" in learn.gate(good._replace(other=np.where(first, 1.2 * waits, 0.5 * waits)), names, fine, 1)[1][0]
    tail = good.other.copy()
    tail[small[waits[small] > np.quantile(waits[small], 0.9)]] *= 1.6
    assert "95th percentile of 1g.10gb" in refused(good._replace(other=tail))
    assert "times as long as its longest job" in refused(good._replace(longest=count * 600 / 19))
    assert "2000 are needed" in refused(good._replace(counted=np.arange(count) % 4 == 0))
    assert learn.gate(good._replace(other=np.full(count, np.nan)), names, fine, 1)[1]
    assert learn.gate(good._replace(used=0 * waits, other=0 * waits), names, fine, 1)[1]
    assert learn.gate(good._replace(other=good.used), names, fine, 1)[1]


def test_each_further_attempt_needs_more() -> None:
    pairs = equals(0, spread=0.2)
    highs = [learn.compare(pairs, learn.TAIL / (2 * k * (k + 1))).high for k in (1, 3, 10, 50)]
    assert highs == sorted(highs) and highs[-1] > highs[0]
    assert sum(1 / (k * (k + 1)) for k in range(1, 10_000)) < 1


# The whole of it.


@pytest.fixture(scope="module")
def bad() -> bytes:
    """A model that puts instances where they are most in the way, none of whose profiles waits less for it in `plain`:
    with -1 one does by chance, and the gate is right to keep it."""
    return changed(-0.25)


def test_a_better_one_gets_in_and_a_worse_one_goes(
    rms: Any, node: Node, tmp_path: Path, plain: Lines, bad: bytes
) -> None:
    here = shelf.Shelf(node.config.policy_dir, A100.geometry)
    log = write(tmp_path / "log", plain)
    # The shipped model is in use: there is nothing to be found in so short a time, and each trial is counted.
    told = rms(log)
    assert (told["outcome"], told["attempts"], in_use(node)) == ("kept", 1, "shipped")
    assert told["change"]["low"] <= told["change"]["percent"] <= told["change"]["high"]
    assert told["load"] == pytest.approx(0.8, abs=0.1) and told["limits_too_long"] == pytest.approx(2, abs=0.1)
    # Somebody has put a bad one in: what is learned from the shipped one is better.
    here.add(bad, "bad")
    here.use("bad")
    told = rms(log, "--dry-run")
    assert (told["outcome"], told["attempts"], in_use(node)) == ("swapped", 2, "bad"), told
    told = rms(log)
    assert told["attempts"] == 2, "a dry run changes nothing"
    assert (told["outcome"], told["champion"]) == ("swapped", "bad"), told["reasons"]
    assert told["change"]["high"] < -1 and in_use(node) == told["name"]
    assert here.before() == "bad"
    swap = json.loads(Path(node.config.audit_log).read_text().splitlines()[-1])
    assert (swap["event"], swap["by"], swap["name"], swap["before"]) == ("policy", "learn", told["name"], "bad")
    found = controller.chooser(node.config)
    model.load.cache_clear()
    node_controller = controller.Controller(node.config, found, node.log.append)
    node_controller.acquire(run(1), 1000, "1g.10gb:1")
    assert told["challenger"] in Path(node.config.audit_log).read_text()
    # A worse week: it was learning that swapped the bad one in, a month ago, and the log shows what came of it.
    here.use("shipped")
    swapped_a_month_ago(here, "bad")
    told = rms(log, "--dry-run")
    assert (told["outcome"], in_use(node)) == ("rolled back", "bad")
    told = rms(log)
    assert (told["outcome"], in_use(node)) == ("rolled back", "shipped")
    assert told["since_swap"]["low"] > 0 and "-3.0 % expected" in told["reasons"][0]
    # And a better one stays.
    here.use("bad")
    swapped_a_month_ago(here, "shipped")
    told = rms(log)
    assert told["since_swap"]["high"] < 0 and not told["since_swap"]["worse"] and in_use(node) == "shipped"


def swapped_a_month_ago(here: shelf.Shelf, name: str) -> None:
    """A model in use as if learning had put it there then."""
    here.use(name, "learn", -3.0)
    path = Path(here.folder) / "history.json"
    history = json.loads(path.read_text())
    history["boards"]["slots8.model"]["used"][-1][0] -= 30 * 86400
    path.write_text(json.dumps(history))


def test_it_is_for_people_too(node: Node, tmp_path: Path, plain: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    log = write(tmp_path / "log", plain[:3000])
    model.load.cache_clear()
    assert cli.main(["learn", "--config", str(node.toml), "--node", "n1", str(log)]) == 0
    said = capsys.readouterr().out
    assert "jobs in 5." in said and "kept: shipped\n  " in said
    assert cli.main(["learn", "--config", str(node.toml), "--rounds", "-1"]) == 2
