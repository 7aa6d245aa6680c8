"""`rms watch`: whose room is kept where (pure), and the service on a real Slurm."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rms_cluster import rms_cluster
from throwaway import Cluster

from rms import cli, demand, geometry
from rms.demand import Told
from rms.request import Ticket
from slurm import site, watch
from slurm.ask import Commands, Node, Queued
from slurm.slurmctld import SilentError
from slurm.watch import Keep, Watch, decide, lines

NOW = 1_800_000_000.0
A100 = geometry.load("A100-80GB")


def node(
    name: str, gpus: int = 2, comment: str = "", state: str = "mixed", model: str = "A100-80GB", **more: object
) -> Node:
    gres = {}
    for item in site.gres(site.kinds([(model, gpus, name)])[0], "features").split(","):
        key, _, count = item.rpartition(":")
        gres[key] = int(count)
    return Node(name, state, ("main",), gres, (), comment)._replace(**more)


def test_room_is_kept_only_where_the_profile_can_be_asked_for() -> None:
    """1g.10gb is a quarter of an A100-40GB; it is not in the gres of one where an A100-80GB has it, too."""
    old = node("old", gpus=1, model="A100-40GB")
    wanted = job(1, "1g.10gb:1")
    assert watch.may_run(wanted, old)
    both = site.kinds([("A100-80GB", 1, "new"), ("A100-40GB", 1, "old")])
    counts = {
        item.rpartition(":")[0]: int(item.rpartition(":")[2]) for item in site.gres(both[1], "features").split(",")
    }
    assert not watch.may_run(wanted, old._replace(gres=counts))
    large = job(2, "7g.40gb:1")
    assert watch.room(large, old._replace(gres=counts), [], NOW) == Keep(2, "7g.40gb:1", 1, NOW)


def job(number: int, request: str = "7g.80gb:1", **more: object) -> Queued:
    """A job that waits for room; with `node` one that runs, and ends so many minutes from now as its limit says."""
    made = Queued(
        number, "PENDING", "Resources", 100_000 - number, ("main",), Ticket(request, 1, None), 60,
        int(NOW) - 100 + number, None, "", (), (), (), "", 1,
    )._replace(**more)  # fmt: skip
    return made._replace(state="RUNNING", reason="None", start=int(NOW)) if made.node else made


def told(keep: str, number: int, left: float = 100) -> str:
    return f"{Told(int(NOW + left), number, keep)}rack 7"


def test_the_first_large_job_has_room_kept_where_it_will_be_first() -> None:
    running = [job(1, "1g.10gb:2", node="n1", limit=50), job(2, "3g.40gb:4", node="n2", limit=30)]
    running += [job(3, "7g.80gb:1", node="n1", limit=40)]
    found = decide([*running, job(8, "1g.10gb:1"), job(9), job(10)], [node("n1"), node("n2")], NOW, 1)
    assert found == {"n2": Keep(9, "7g.80gb:1", 1, NOW + 1800)}
    both = decide([*running, job(8, "1g.10gb:1"), job(9), job(10)], [node("n1"), node("n2")], NOW, 2)
    assert both == {**found, "n1": Keep(10, "7g.80gb:1", 1, NOW + 2400)}


@pytest.mark.parametrize(
    "more",
    [
        {"reason": "JobHeldUser", "priority": 0},
        {"reason": "Dependency"},
        {"reason": "BeginTime"},
        {"reason": "QOSMaxJobsPerUserLimit"},
        {"reason": "AssocGrpGRES"},
        {"reason": "PartitionDown"},
        {"reason": "None"},
        {"reason": "JobArrayTaskLimit"},
        {"partitions": ("night",)},
        {"wants": ("n7",)},
        {"avoids": ("n1",)},
        {"features": ("h100",)},
        {"features": None},
        {"reservation": "weekend"},
        {"state": "SUSPENDED"},
        {"ticket": Ticket("9g.99gb:1", 1, None)},
        {"ticket": Ticket("7g.80gb:3", 1, None)},
        {"ticket": Ticket("1g.10gb:1", 1, None)},
    ],
)
def test_whoever_waits_for_something_else_has_none(more: dict[str, object]) -> None:
    full = [job(1, "1g.10gb:14", node="n1")]
    assert decide([*full, job(9)], [node("n1")], NOW, 4) != {}
    assert decide([*full, job(9, **more)], [node("n1")], NOW, 4) == {}


@pytest.mark.parametrize("state", ["drained", "mixed+drain", "down*", "idle*", "maint", "reserved", "powering_down"])
def test_a_node_that_starts_nothing_keeps_nothing(state: str) -> None:
    assert decide([job(9)], [node("n1", state=state)], NOW, 4) == {}


@pytest.mark.parametrize("reason", ["ReqNodeNotAvail, May be reserved for other job", "Priority", "Constraints"])
def test_a_gate_is_a_lack_of_room(reason: str) -> None:
    waiting = job(9, reason=reason, features=("rms_7g",))
    assert decide([waiting], [node("n1")], NOW, 4) == {"n1": Keep(9, "7g.80gb:1", 1, NOW)}


def test_a_job_larger_than_the_rest_of_the_gpus_is_passed_over() -> None:
    jobs = [job(1, "7g.80gb:2"), job(2, "3g.40gb:1")]
    assert set(decide(jobs, [node("n1"), node("n2")], NOW, 1)) == {"n1"}
    assert decide(jobs, [node("n1"), node("n2")], NOW, 1)["n1"].job == 2
    assert {k.job for k in decide(jobs, [node("n1"), node("n2")], NOW, 3).values()} == {1, 2}


def test_what_stands_stays_until_it_does_not_pay() -> None:
    # n2 would be free sooner, but n1 has already been kept for the job.
    running = [job(1, "7g.80gb:2", node="n1", limit=50), job(2, "7g.80gb:2", node="n2", limit=30)]
    nodes = [node("n1", comment=told("7g.80gb:1", 9)), node("n2")]
    assert set(decide([*running, job(9)], nodes, NOW, 4)) == {"n1"}
    assert set(decide([*running, job(9)], nodes, NOW, 4, [(9, "n1")])) == {"n2"}
    assert decide([*running, job(9)], nodes, NOW, 4, [(9, "n1"), (9, "n2")]) == {}
    assert set(decide([*running, job(9)], nodes, NOW + 200, 4)) == {"n2"}, "the line has expired"


def test_comments_are_set_where_something_changes() -> None:
    keep = {"n1": Keep(9, "7g.80gb:1", 1, NOW)}
    nodes = [node("n1", comment="rack 7"), node("n2", comment="rack 7"), node("n3", comment="rack 7")]
    found = lines([job(9)], nodes, keep, NOW)
    assert sorted(found.values()) == [("n1",), ("n2", "n3")], "alike ones in one go"
    for comment, names in found.items():
        one = demand.read(comment, NOW)
        assert one and demand.own_text(comment) == "rack 7"
        assert (one.keep, one.job) == (("7g.80gb:1", 9) if names == ("n1",) else ("", 0))
        assert [w.request for w in one.waiting] == ["7g.80gb:1"]
    fresh = [n._replace(comment=next(c for c, names in found.items() if n.name in names)) for n in nodes]
    assert lines([job(9), job(10, "1g.10gb:1")], fresh, keep, NOW + 10) == {}, "the queue alone is not told at once"
    assert set(lines([job(9)], fresh, {}, NOW + 10).values()) == {("n1",)}
    assert len(lines([job(9)], fresh, keep, NOW + watch.LIFE / 2)) == 2, "they are renewed"
    assert lines([], fresh, {}, NOW + 10) == {"rack 7": ("n1",)}
    assert lines([], fresh, {}, NOW + watch.LIFE) == {"rack 7": ("n1", "n2", "n3")}, "and taken away in the end"


requests = st.sampled_from(["7g.80gb:1", "7g.80gb:2", "3g.40gb:1", "2g.20gb:3,1g.10gb:1", "1g.10gb:1", "1g.10gb:5"])
names = st.sampled_from(["n1", "n2", "n3"])
queues = st.lists(
    st.builds(
        lambda request, node, limit, reason, more: (request, {"node": node, "limit": limit, "reason": reason, **more}),
        requests,
        st.just("") | names,
        st.none() | st.integers(1, 100),
        st.sampled_from(["Resources", "Priority", "Dependency", "ReqNodeNotAvail, May be reserved for other job"]),
        st.sampled_from([{}, {}, {}, {"avoids": ("n1",)}, {"wants": ("n2",)}, {"partitions": ("night",)}]),
    ),
    max_size=14,
).map(lambda made: [job(i, request, **more) for i, (request, more) in enumerate(made, 1)])  # fmt: skip
comments = st.sampled_from(["", "rack 7", told("7g.80gb:1", 3), told("3g.40gb:1", 5, -1), "rms1:nonsense"])


@given(queues, st.tuples(comments, comments, comments), st.integers(0, 5))
def test_never_more_than_was_allowed_and_only_for_who_needs_it(
    jobs: list[Queued], texts: tuple[str, str, str], most: int
) -> None:
    nodes = [node(name, gpus, text) for name, gpus, text in zip(["n1", "n2", "n3"], [1, 2, 2], texts, strict=True)]
    kept = decide(jobs, nodes, NOW, most)
    by_id = {one.id: one for one in jobs}
    assert sum(keep.gpus for keep in kept.values()) <= most
    assert len({keep.job for keep in kept.values()}) == len(kept), "each job once"
    for name, keep in kept.items():
        asked = by_id[keep.job]
        assert watch.waits_for_room(asked) and name not in asked.avoids and asked.partitions == ("main",)
        assert keep.request == asked.ticket.request and keep.free >= NOW
    # Whoever is left out although some are allowed has nowhere to go, or needs more than is left.
    left = most - sum(keep.gpus for keep in kept.values())
    done = {keep.job for keep in kept.values()}
    running = {n.name: [r for r in jobs if r.node == n.name] for n in nodes}
    for one in jobs:
        if left and watch.waits_for_room(one) and one.id not in done:
            free = [n for n in nodes if n.name not in kept and watch.may_run(one, n)]
            assert all((r := watch.room(one, n, running[n.name], NOW)) is None or r.gpus > left for n in free)
    # What is told can be read, stands where it was meant, and does not change when it is looked at again.
    found = lines(jobs, nodes, kept, NOW)
    after = {n.name: n for n in nodes}
    for comment, where in found.items():
        for name in where:
            assert demand.own_text(comment) == demand.own_text(after[name].comment)
            after[name] = after[name]._replace(comment=comment)
    for name, keep in kept.items():
        one = demand.read(after[name].comment, NOW)
        assert one and (one.job, one.keep) == (keep.job, keep.request)
    for name in after.keys() - kept.keys():
        one = demand.read(after[name].comment, NOW)
        assert one is None or not one.keep
    again = [after[n.name] for n in nodes]
    assert {name: keep.job for name, keep in decide(jobs, again, NOW, most).items()} == {
        n: k.job for n, k in kept.items()
    }
    assert lines(jobs, again, kept, NOW) == {}


class Slurm:
    """What `Watch` asks and tells."""

    def __init__(self, jobs: Sequence[Queued], nodes: Sequence[Node]) -> None:
        self.jobs, self.there, self.said = list(jobs), {n.name: n for n in nodes}, 0

    def queue(self) -> list[Queued]:
        return self.jobs

    def nodes(self) -> list[Node]:
        return list(self.there.values())

    def comment(self, names: Sequence[str], text: str) -> None:
        self.said += 1
        for name in names:
            self.there[name] = self.there[name]._replace(comment=text)


def test_a_job_that_does_not_come_loses_its_room() -> None:
    slurm = Slurm([job(1, "7g.80gb:2", node="n1", limit=10), job(9)], [node("n1"), node("n2", state="down*")])
    log: list[str] = []
    watching = Watch(slurm, slurm, 4, log.append)  # type: ignore[arg-type]

    def kept(now: float) -> bool:
        watching.look(now)
        found = demand.read(slurm.there["n1"].comment, now)
        return found is not None and found.keep == "7g.80gb:1"

    assert kept(NOW)
    slurm.jobs = [job(9)]
    assert kept(NOW + 600) and kept(NOW + 600 + watch.GRACE)
    assert not kept(NOW + 601 + watch.GRACE), "there has been room for long; something else holds it"
    slurm.jobs = []
    watching.look(NOW + 1000)
    slurm.jobs = [job(9)]
    assert kept(NOW + 1001), "another run of it"
    assert not kept(NOW + 1002 + watch.GRACE) and not kept(NOW + 1001 + watch.GRACE + watch.AGAIN)
    assert kept(NOW + 1002 + watch.GRACE + watch.AGAIN), "what held it may be over; there is no other node"
    assert [line.partition(", to be")[0] for line in log] == [
        "n1: keep room for 7g.80gb:1 of job 9",
        "n1: no room to keep any more for job 9",
        "n1: keep room for 7g.80gb:1 of job 9",
        "n1: no room to keep any more for job 9",
        "n1: keep room for 7g.80gb:1 of job 9",
    ]


def giving_up(runs: Callable[[float], Sequence[Queued]], seconds: int) -> float | None:
    """When (s from the beginning) a large job's room on the only node is given up; `runs` is what runs at a moment."""
    slurm = Slurm([], [node("n1")])
    watching = Watch(slurm, slurm, 4, lambda text: None)  # type: ignore[arg-type]
    for after in range(0, seconds, 10):
        slurm.jobs = [*runs(after), job(9)]
        watching.look(NOW + after)
        found = demand.read(slurm.there["n1"].comment, NOW + after)
        if found is None or not found.keep:
            return after
    return None


def test_the_promise_follows_the_time_limits_but_not_for_ever() -> None:
    def full(limit: int | None) -> Queued:
        return job(1, "7g.80gb:2", node="n1", limit=limit)

    grace = watch.GRACE + 10
    assert giving_up(lambda after: [full(60)] if after < 600 else [], 4000) == 600 + grace, "it ended early"
    assert giving_up(lambda after: [full(10)], 4000) == 600 + watch.LATER + grace, "it goes on beyond its limit"
    assert giving_up(lambda after: [full(10)] if after < 900 else [], 4000) == 900 + grace, "for a while"
    assert giving_up(lambda after: [full(10 if after < 300 else 15)] if after < 900 else [], 4000) == 900 + grace
    assert giving_up(lambda after: [full(10 if after < 300 else 900)], 4000) == 600 + watch.LATER + grace
    assert giving_up(lambda after: [full(None)], 9000) == watch.UNKNOWN + watch.LATER + grace
    # A small job comes and goes: there is room, there is none for an hour, there is room.
    some = [job(1, "7g.80gb:1", node="n1"), job(2, "1g.10gb:1", node="n1")]
    assert giving_up(lambda after: some[: 1 + after // 10 % 2], 9000) in (watch.LATER + grace, watch.LATER + grace - 10)


def test_a_job_beyond_its_time_limit_is_taken_to_go_on_for_a_moment() -> None:
    late = job(1, "7g.80gb:1", node="n1", limit=10)
    there = NOW + 900 + watch.OVERTIME
    assert watch.room(job(9), node("n1", gpus=1), [late], NOW + 900) == Keep(9, "7g.80gb:1", 1, there)


def test_how_many_gpus_is_the_site_s_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, most = tmp_path / "rms.toml", []
    monkeypatch.setattr(watch, "run", lambda conf, gpus, seconds, log: most.append(gpus))
    for text in ("gpus = [0]\n", "gpus = [0]\nkeep_gpus = 1\n"):
        config.write_text(text)
        cli.main(["watch", "--config", str(config)])
    assert most == [4, 1]
    config.unlink()
    assert cli.main(["watch", "--config", str(config)]) == 6
    assert capsys.readouterr().err == f"rms: cannot read the configuration {config}: No such file or directory\n"


def test_a_quiet_cluster_is_asked_for_its_queue_only() -> None:
    slurm = Slurm([job(9, reason="Dependency")], [node("n1", comment=told("7g.80gb:1", 9))])
    watching = Watch(slurm, slurm, 4, print)  # type: ignore[arg-type]
    watching.look(NOW)
    assert (slurm.there["n1"].comment, slurm.said) == ("rack 7", 1)
    slurm.jobs = []
    watching.look(NOW + 1)

    def no_nodes() -> list[Node]:
        raise SilentError("asked for nodes")

    slurm.nodes = no_nodes  # type: ignore[method-assign]
    watching.look(NOW + 2)
    slurm.jobs = [job(9)]
    with pytest.raises(SilentError):
        watching.look(NOW + 3)


def test_a_long_queue_and_many_nodes_are_no_burden() -> None:
    running = [job(10_000 + i, "1g.10gb:1", node=f"n{i % 500}", limit=i % 90 + 1) for i in range(4000)]
    small = [job(i, "1g.10gb:1") for i in range(1, 5000)]
    nodes = [node(f"n{i}", 8) for i in range(500)]
    began = time.monotonic()
    kept = decide([*small, *running, job(9000), job(9001, "7g.80gb:8")], nodes, NOW, 4)
    assert [keep.job for keep in kept.values()] == [9000]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(("took", "pause"), [(0.01, 2.0), (1.0, 10.0), (30.0, 60.0)])
def test_however_long_a_look_takes_the_next_one_comes_before_its_lines_expire(
    monkeypatch: pytest.MonkeyPatch, took: float, pause: float
) -> None:
    moments, pauses = iter([0.0, took]), []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        raise KeyboardInterrupt

    clock = SimpleNamespace(monotonic=lambda: next(moments), time=lambda: NOW, sleep=sleep)
    monkeypatch.setattr(watch, "time", clock)
    monkeypatch.setattr(watch, "best", lambda conf, log: Slurm([], []))
    with pytest.raises(KeyboardInterrupt):
        watch.run("/nowhere", 4, 2.0, print)
    assert pauses == [pause] and pause + took < watch.LIFE


# The service


@pytest.fixture
def slurm(slurm_root: Path) -> Iterator[Cluster]:
    with rms_cluster(slurm_root, nodes=2, create=0.02, destroy=0.02, cred_expire=5) as cluster:
        cluster.run("scontrol", "update", "NodeName=n1,n2", "Comment=rack 7")
        yield cluster


@pytest.mark.slurm
def test_the_service(slurm: Cluster) -> None:
    commands = Commands(str(slurm.conf))
    user = slurm.users[0]

    def keeps() -> dict[str, str]:
        found = {n.name: demand.read(n.comment, time.time()) for n in commands.nodes()}
        assert all(demand.own_text(n.comment) == "rack 7" for n in commands.nodes())
        return {name: one.keep for name, one in found.items() if one and one.keep}

    rms = str(Path(sys.executable).with_name("rms"))
    config = f"{slurm.etc}/rms.toml"
    service = slurm.popen(rms, "watch", "--slurm-conf", str(slurm.conf), "--config", config, "--seconds", "0.3")
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(service.stderr or ()))
    reader.start()
    first = slurm.sbatch("sleep 300", "--gres=mig:7g:2", "--time=10", user=user)
    second = slurm.sbatch("sleep 300", "--gres=mig:7g:2", "--time=5", user=user)
    slurm.wait(lambda: all(slurm.job(j)["JobState"] == "RUNNING" for j in (first, second)), 60, "the nodes are full")
    where = slurm.job(second)["NodeList"]
    slurm.sbatch("sleep 300", "--gres=mig:3g:1", "--hold", user=user)
    large = slurm.sbatch("sleep 300", "--gres=mig:7g:1", user=user)
    slurm.wait(lambda: keeps() == {where: "7g.80gb:1"}, 60, "room is kept where it is free first")
    slurm.stop_daemon("slurmctld")
    slurm.wait(lambda: any("waiting for slurmctld" in line for line in lines), 60, "it waits")
    slurm.start_daemon("slurmctld")
    slurm.wait(lambda: any("answers again" in line for line in lines), 90, "it goes on")
    slurm.run("scontrol", "hold", str(large))
    slurm.wait(lambda: keeps() == {}, 90, "a job that is held needs no room")
    service.terminate()
    service.wait(20)
    reader.join(20)
    assert [line for line in lines if "keep room" in line or "no room" in line] != [] and len(lines) < 12, lines


@pytest.mark.slurm
def test_without_a_slurmctld_it_waits(slurm_root: Path, tmp_path: Path) -> None:
    config = tmp_path / "rms.toml"
    config.write_text("gpus = [0]\nkeep_gpus = 2\n")
    rms = str(Path(sys.executable).with_name("rms"))
    words = ["watch", "--config", str(config), "--slurm-conf", "/nonexistent/slurm.conf", "--seconds", "0.1"]
    service = subprocess.Popen([rms, *words], stderr=subprocess.PIPE, text=True)
    assert service.stderr
    first = service.stderr.readline()
    time.sleep(2)
    assert service.poll() is None
    service.terminate()
    _, more = service.communicate(timeout=20)
    why = "pyslurm: not installed" if find_spec("pyslurm") is None else ""
    assert f"asking slurmctld through its commands ({why}" in first
    assert len(more.splitlines()) <= 1 and "Traceback" not in more
