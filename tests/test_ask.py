"""Asking slurmctld: the same contract for both ways, the commands and pyslurm, on a real Slurm."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rms_cluster import rms_cluster
from throwaway import Cluster

from rms import geometry
from rms.request import Request, Ticket
from slurm import ask, publish, watch
from slurm.ask import Queued
from slurm.slurmctld import SilentError, Slurmctld

BUILT = subprocess.run(  # importing it can end a process, so another one does
    [sys.executable, "-c", "import importlib.util as i; raise SystemExit(i.find_spec('pyslurm') is None)"], check=False
).returncode == 0  # fmt: skip
WAYS = [
    "commands",
    pytest.param("pyslurm", marks=pytest.mark.skipif(not BUILT, reason="pyslurm is not built for this Slurm")),
]
TOLD = "rms1:u=1;j=;k=;q=7g.80gb:1*3@4@5|x;site's ünï own = text  State=DOWN"


@pytest.fixture(scope="module")
def slurm(slurm_root: Path) -> Iterator[Cluster]:
    extra = "PartitionName=night Nodes=n1 State=DOWN MaxTime=60\nPartitionName=main Nodes=ALL Default=YES State=UP"
    with rms_cluster(slurm_root, nodes=2, create=0.02, destroy=0.02, cred_expire=5, extra_conf=extra) as cluster:
        cluster.run("scontrol", "update", "NodeName=n1", f"Comment={TOLD}")
        yield cluster


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, slurm: Cluster) -> Iterator[ask.Commands | ask.Pyslurm]:
    found = {"commands": ask.Commands, "pyslurm": ask.Pyslurm}[request.param](str(slurm.conf), 30)
    yield found
    if isinstance(found, ask.Pyslurm):
        found.close()


@pytest.fixture(scope="module")
def jobs(slurm: Cluster) -> Iterator[dict[str, int]]:
    """One job of each kind. Two fill the nodes."""
    user = slurm.users[0]

    def submit(*options: str, gres: str = "--gres=mig:1g") -> int:
        return slurm.sbatch("sleep 300", gres, *options, user=user)

    whole = "--gres=mig:7g:2"
    found = {
        "runs": submit("--time=5", "--comment=hällo | wörld", gres=whole),
        "limit": submit("--time=1-2:3:4", gres=whole),
    }
    slurm.wait(lambda: all(slurm.job(job)["JobState"] == "RUNNING" for job in found.values()), 60, "both run")
    found["waits"] = submit("--time=90", "--nice=-5" if user.uid == 0 else "--nice=0", gres=whole)
    found["array"] = submit("--array=1-9:2%3", gres=whole)
    found["held"] = submit("--hold")
    found["after"] = submit(f"--dependency=afterok:{found['runs']}", "-w", "n1", "-x", "n2")
    found["future"] = submit("--begin=now+1hour")
    found["night"] = submit("--partition=night", "--time=5")
    row = [
        str(10**6),
        "PENDING",
        "Resources",
        "999",
        "main",
        "1:00",
        "1",
        "1",
        "",
        "",
        "",
        "",
        "",
        "",
        "rms1:7g.80gb:1;s=1;l=1;",
    ]
    found["forger"] = submit("--hold", "--comment=" + "".join(f"\n{mark.join(row)}" for mark in ("\x1f", "|", "||")))
    found["other"] = slurm.sbatch("sleep 300", "--hold", "--comment=no mig", user=user)
    waiting = ("waits", "array")
    slurm.wait(
        lambda: all(slurm.job(found[k])["Reason"] in ("Resources", "Priority") for k in waiting), 60, "they wait"
    )
    yield found
    slurm.run("scancel", *map(str, found.values()))


@pytest.mark.slurm
def test_the_queue(slurm: Cluster, jobs: dict[str, int], way: ask.Ask) -> None:
    now = time.time()
    queue = way.queue()
    found = {name: next((job for job in queue if job.id == number), None) for name, number in jobs.items()}
    assert found.pop("other") is None
    assert {job.id for job in queue} == {job.id for job in found.values() if job}
    assert [job.priority for job in queue] == sorted((job.priority for job in queue), reverse=True)
    runs, limit, waits = found["runs"], found["limit"], found["waits"]
    assert runs and limit and waits
    assert (runs.state, runs.limit, runs.tasks) == ("RUNNING", 5, 1) and {runs.node, limit.node} == {"n1", "n2"}
    assert runs.ticket == Ticket("7g.80gb:2", runs.ticket.submit, 5)
    assert runs.start and now - 300 < runs.submit <= runs.start <= now + 1
    assert limit.limit in (1440 + 123, 1440 + 124), "Slurm counts minutes"
    assert (waits.state, waits.node, waits.start, waits.limit) == ("PENDING", "", None, 90)
    assert (waits.partitions, waits.wants, waits.avoids, waits.reservation) == (("main",), (), (), "")
    # What nobody typed may be a gate of our own.
    assert waits.features is not None and all(name.startswith("fit") for name in waits.features)
    after, array = found["after"], found["array"]
    assert after and array
    assert (after.wants, after.avoids) == (("n1",), ("n2",))
    assert (array.tasks, array.limit) == (5, None)
    reasons = {name: job.reason for name, job in found.items() if job}
    assert {reasons[name] for name in ("waits", "array")} <= {"Resources", "Priority"}
    assert (reasons["held"], reasons["after"], reasons["future"]) == ("JobHeldUser", "Dependency", "BeginTime")
    assert reasons["night"] == "PartitionDown" or reasons["night"] == "Priority"
    assert found["held"] and found["held"].priority == 0


@pytest.mark.slurm
def test_the_nodes(slurm: Cluster, way: ask.Ask) -> None:
    one, two = way.nodes()
    assert (one.name, two.name) == ("n1", "n2")
    assert (one.comment, two.comment) == (TOLD, "")
    assert one.partitions == two.partitions == ("main",), "the other one starts nothing"
    assert one.gres["mig:7g.80gb"] == 2 and one.gres["migm"] == 16 and "gpu" not in one.gres
    assert one.state.partition("+")[0] in ("idle", "mixed", "allocated", "planned")
    slurm.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=a test")
    assert "drain" in way.nodes()[1].state
    slurm.run("scontrol", "update", "NodeName=n2", "State=RESUME")


@pytest.mark.slurm
def test_commenting(slurm: Cluster, way: ask.Ask) -> None:
    commands = ask.Commands(str(slurm.conf))
    try:
        commands.comment(["n1", "n2"], "the same")
        assert [node.comment for node in way.nodes()] == ["the same", "the same"]
        commands.comment(["n2"], "")
        assert [node.comment for node in way.nodes()] == ["the same", ""]
    finally:
        commands.comment(["n1"], TOLD)
        commands.comment(["n2"], "")


@pytest.mark.slurm
def test_pyslurm_is_used_only_where_it_fits(slurm: Cluster) -> None:
    said: list[str] = []
    found = ask.best(str(slurm.conf), said.append)
    assert isinstance(found, ask.Commands), "no pyslurm says of itself that it is for this Slurm"
    assert len(said) == 1 and ("pyslurm is for Slurm 25.11" if BUILT else "pyslurm: not installed") in said[0]


@pytest.mark.slurm
def test_a_slurmctld_that_is_silent(slurm: Cluster, way: ask.Commands | ask.Pyslurm) -> None:
    way.nodes()
    quick = type(way)(str(slurm.conf), 2)
    slurmctld = slurm.pid("slurmctld")
    os.kill(slurmctld, signal.SIGSTOP)
    try:
        for asking in (quick.queue, quick.nodes):
            began = time.monotonic()
            with pytest.raises(SilentError, match="no answer in 2 s"):
                asking()
            assert time.monotonic() - began < 4
    finally:
        os.kill(slurmctld, signal.SIGCONT)
    assert len(way.nodes()) == len(quick.nodes()) == 2, "it asks again"


def test_where_there_is_no_slurm_conf_that_is_said(tmp_path: Path) -> None:
    with pytest.raises(SilentError, match=f"^sleep: no answer in 0.1 s, and there is no {tmp_path}/none$"):
        Slurmctld(f"{tmp_path}/none", 0.1).run("sleep", "9")


def test_a_pyslurm_that_ends_its_process(tmp_path: Path) -> None:
    # Without a slurm.conf its import does that; without pyslurm the import fails.
    with pytest.raises(SilentError, match="pyslurm"):
        ask.Pyslurm(str(tmp_path / "none")).queue()


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("5:00", 5),
        ("1:00:00", 60),
        ("1-02:03:04", 1564),
        ("0:30", 1),
        ("UNLIMITED", None),
        ("NOT_SET", None),
        ("", None),
    ],
)
def test_time_limits(text: str, limit: int | None) -> None:
    assert ask.minutes(text) == limit


@pytest.mark.parametrize(
    ("text", "count"), [("0-9%3", 10), ("1-9:2%3", 5), ("7", 1), ("N/A", 1), ("1,3-5,...", 4), ("", 1)]
)
def test_array_tasks(text: str, count: int) -> None:
    assert ask.tasks(text) == count


@pytest.mark.slurm
def test_a_long_comment_is_read_whole_and_what_can_t_be_is_left_alone(slurm: Cluster) -> None:
    """What is cut off would be written back."""
    commands = ask.Commands(str(slurm.conf), 30)
    try:
        for comment, names in [("x" * 2 * ask.WIDE, ["n1", "n2"]), ("x" * 2 * ask.WIDEST, ["n1"]), ("a\nb", ["n1"])]:
            commands.comment(["n2"], comment)
            nodes = commands.nodes()
            assert [node.name for node in nodes] == names
            assert nodes[1:] == [] or nodes[1].comment == comment
    finally:
        commands.comment(["n2"], "")
    assert [node.name for node in commands.nodes()] == ["n1", "n2"]


SINFO = """#!/usr/bin/env python3
import os, sys
widths = [int(field.partition(":")[2]) for field in sys.argv[-1].partition("=")[2].split(",")]
for row in ROWS:
    if not any(a.startswith("--nodes=") and row[0] not in a[8:].split(",") for a in sys.argv):
        cells = [os.fsencode(text)[:width].ljust(width) for text, width in zip(row, widths, strict=True)]
        sys.stdout.buffer.write(b"".join(cells) + b"\\n")
"""


def shown(root: Path, monkeypatch: pytest.MonkeyPatch, **more: str) -> list[ask.Node]:
    """What is read of nodes n1, as usual, and n2, with what `more` says."""
    usual = {"gres": "mig:7g.80gb:2,migc:14", "features": "a100,ib,rms_1g.10gb+me_1", "comment": "rack 7"}
    rows = [[name, "main", "idle", "up", *(usual | own).values()] for name, own in (("n1", {}), ("n2", more))]
    (root / "sinfo").write_text(SINFO.replace("ROWS", repr(rows)))
    (root / "sinfo").chmod(0o755)
    monkeypatch.setattr("slurm.slurmctld.PATH", f"{root}:{os.environ['PATH']}")
    return ask.Commands("/nowhere").nodes()


@pytest.mark.parametrize("size", [ask.WIDE, 2 * ask.WIDE])
@pytest.mark.parametrize("field", ["gres", "features", "comment"])
def test_what_is_long_is_never_taken_for_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, size: int
) -> None:
    """Cut off, n2 would seem to be of another board, to lack a feature, or to have another comment."""
    text = {"gres": "lustre:1," * size + "mig:7g.80gb:16", "features": "x" * size + ",a100", "comment": "x" * size}[
        field
    ]
    one, *other = shown(tmp_path, monkeypatch, **{field: text})
    assert (one.name, one.comment, one.features[:2]) == ("n1", "rack 7", ("a100", "ib"))
    assert field != "gres" or size == ask.WIDE or other == [], "9 times the length is too much to be read"
    for node in other:
        assert (node.name, node.comment) == ("n2", text if field == "comment" else "rack 7")
        assert node.gres["mig:7g.80gb"] == (16 if field == "gres" else 2) and "a100" in node.features


def test_who_names_many_lists_of_nodes_holds_nobody_up() -> None:
    asked: list[str] = []

    def run(*command: str) -> str:
        asked.append(command[-1])
        return "n1 n2"

    for _ in range(2):
        assert all(ask._hosts(run, f"n[1,{number}]") == ("n1", "n2") for number in range(2000))
    assert len(asked) == 2000


def test_the_features_that_a_site_has_are_read_beside_all_that_may_be_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ",".join(publish.names(geometry.load("RTX-PRO-6000"), 8))
    assert len(names) > ask.WIDE
    _, node = shown(tmp_path, monkeypatch, features=f"a100,x*y,{names}")
    assert node.features[:2] == ("a100", "x*y")
    asks = Queued(
        1, "PENDING", "Resources", 1, ("main",), Ticket("7g.80gb:1", 1, None), 60, 1, None, "", (), (),
        ask._names(f"a100&{publish.name(Request((('1g.10gb+me', 1), ('7g.80gb', 1))))}"), "", 1,
    )  # fmt: skip
    assert watch.may_run(asks, node)
