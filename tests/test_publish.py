"""slurm/publish.py: what is published is exact, what the token lets in fits, nothing older follows what is newer."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Node
from hypothesis import given, settings
from hypothesis import strategies as st

from rms import demand, geometry, planner
from rms.errors import NodeError
from rms.geometry import Geometry, Placement
from rms.inventory import Allocation, Gpu, Instance, Intent, Owner, Run, State
from rms.planner import Busy, GpuView, View
from rms.request import Request, parse
from slurm import publish
from slurm.publish import NOTHING, Offer, Publisher, Record, changes, listed, name, offer, weight

A100 = geometry.load("A100-80GB")
MODELS = ["A100-80GB", "A30", "RTX-PRO-6000"]


def state(known: Geometry, layouts: list[list[Placement]], boot_id: str = "boot") -> State:
    """A node on whose GPUs each of these instances is a job's."""
    made = State(boot_id=boot_id, managed=list(range(len(layouts))), geometries={known.model: known})
    for number, layout in enumerate(layouts):
        gpu = Gpu(f"GPU-{number}", known.model)
        for placement in layout:
            instance = Instance(made.number(), placement, "busy", 1, 0, "MIG")
            run = Run("c", instance.generation, 0)
            request = f"{placement.profile}:1"
            made.allocations.append(
                Allocation(run, 1, request, None, None, 0.0, boot_id, [instance.generation], granted=True)
            )
            gpu.instances.append(instance)
        made.gpus.append(gpu)
    return made


def view(known: Geometry, layouts: list[list[Placement]]) -> View:
    gpus = (GpuView(f"GPU-{n}", known, tuple(Busy(p, 0.0, None) for p in held)) for n, held in enumerate(layouts))
    return View(tuple(gpus), (), None, 0.0)


@st.composite
def nodes(draw: st.DrawFn) -> tuple[Geometry, list[list[Placement]]]:
    """GPUs of a model with instances wherever a policy may have put them."""
    known = geometry.load(draw(st.sampled_from(MODELS)))
    layouts: list[list[Placement]] = [[] for _ in range(draw(st.integers(1, 3)))]
    for layout in layouts:
        for profile in draw(st.lists(st.sampled_from(list(known.by_name)), max_size=6)):
            if free := known.legal(profile, layout):
                layout.append(draw(st.sampled_from(free)))
    return known, layouts


@given(nodes())
@settings(deadline=None)
def test_a_name_is_published_exactly_if_its_request_fits(node: tuple[Geometry, list[list[Placement]]]) -> None:
    known, layouts = node
    said = offer(state(known, layouts), "boot", 0.0)
    now = view(known, layouts)
    assert said.names == tuple(name(r) for r in listed(known, len(layouts)) if planner.fits(now, r))


@given(nodes(), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=300, deadline=None)
def test_whatever_the_token_lets_in_fits_wherever_it_is_placed(
    node: tuple[Geometry, list[list[Placement]]], chance: random.Random, keeping: bool
) -> None:
    known, layouts = node
    before = state(known, layouts)
    kept = chance.choice(listed(known, len(layouts))) if keeping else None
    told = demand.Told(100, 999_999, str(kept)) if kept else None
    said = offer(before, "boot", 0.0, told)

    def places(profile: str, wanted: Request) -> list[tuple[int, Placement]]:
        """Where the controller may put it: beside what is kept, if there is room."""
        whole = view(known, layouts)
        room = planner.first_room(whole, kept) if kept and wanted != kept else None
        beside = planner.beside(whole, room, None) if room else whole
        found = [[(c.gpu, c.placement) for c in planner.candidates(v, profile)] for v in (beside, whole)]
        return found[0] or found[1]

    jobs = said.jobs - len(before.allocations)
    size = said.size - sum(weight(known, parse(a.request, known)) for a in before.allocations)
    assert 1 <= jobs <= size == publish.span(known)
    published = [r for r in listed(known, len(layouts)) if name(r) in said.names]
    small = [r for r in published if weight(known, r) < size]
    while jobs and (allowed := [r for r in published if weight(known, r) <= size]):
        wanted = chance.choice([r for r in allowed if r in small] or allowed)
        jobs, size = jobs - 1, size - weight(known, wanted)
        assert planner.fits(view(known, layouts), wanted), f"{wanted} beside {layouts}"
        for profile in wanted.profiles:  # as badly as can be: anywhere
            if not (free := places(profile, wanted)):
                break  # only one instance at a time is placed badly; a request as a whole is planned
            gpu, place = chance.choice(free)
            layouts[gpu].append(place)


@pytest.mark.parametrize("model", MODELS)
def test_small_jobs_start_together_on_an_empty_gpu(model: str) -> None:
    known = geometry.load(model)
    said = offer(state(known, [[]]), "boot", 0.0)
    smallest = min(known.profiles, key=lambda p: (p.memory, p.compute))
    one = Request(((smallest.name, 1),))
    assert said.jobs == publish.span(known) >= 4
    assert weight(known, one) * smallest.limit <= said.size


def test_in_doubt_nothing_fits() -> None:
    node = state(A100, [[], []])
    assert offer(node, "another boot", 0.0) == NOTHING == offer(State(), "boot", 0.0)
    node.gpus[0].doubt = "it failed"
    assert name(parse("7g:2", A100)) not in offer(node, "boot", 0.0).names
    assert name(parse("7g:1", A100)) in offer(node, "boot", 0.0).names
    node.gpus[1].fault = "lost"
    assert offer(node, "boot", 0.0).names == ()


def test_what_is_being_changed_is_taken() -> None:
    node = state(A100, [[]])
    for status in ("making", "removing", "quarantined"):
        node.gpus[0].instances = [Instance(1, Placement("3g.40gb", 0, 4), status)]
        assert name(parse("3g:2", A100)) not in offer(node, "boot", 0.0).names, status
    node.gpus[0].instances = [Instance(1, Placement("3g.40gb", 0, 4), "idle")]
    assert name(parse("7g:1", A100)) in offer(node, "boot", 0.0).names


def test_a_job_that_is_ending_no_longer_counts_but_its_slices_do() -> None:
    node = state(A100, [[Placement("3g.40gb", 0, 4)]])
    (allocation,) = node.allocations
    busy = offer(node, "boot", 0.0)
    node.intents.append(Intent(9, "release", allocation.run, Owner(1, 1)))
    ending = offer(node, "boot", 0.0)
    assert ending.names == busy.names and (ending.jobs, ending.size) == (busy.jobs - 1, busy.size - 6)
    node.intents[0].kind = "acquire"
    assert offer(node, "boot", 0.0) == busy


def test_what_is_kept_for_one_job_is_not_offered_to_others() -> None:
    node = state(A100, [[Placement("1g.10gb", 0, 1)], [Placement("3g.40gb", 0, 4), Placement("3g.40gb", 4, 4)]])
    told = demand.Told(100, 7, "7g.80gb:1")
    said = offer(node, "boot", 0.0, told)
    assert said.names == ()
    assert offer(node, "boot", 0.0).names
    here = told._replace(job=node.allocations[0].run.job)
    assert offer(node, "boot", 0.0, here) == offer(node, "boot", 0.0), "it runs here already"
    node = state(A100, [[], [Placement("1g.10gb", 0, 1)]])
    said = offer(node, "boot", 0.0, told)
    assert name(parse("7g:1", A100)) in said.names  # the one it is kept for
    assert name(parse("1g:6", A100)) in said.names and name(parse("1g:7", A100)) not in said.names


def test_every_model_has_few_names_and_the_largest_empty_node_is_quick() -> None:
    for model in geometry.models():
        known = geometry.load(model)
        requests = listed(known, 8)
        assert len({name(r) for r in requests}) == len(requests) < 200
        for profile in known.profiles:
            assert Request(((profile.name, profile.limit * 8),)) in requests


# The record in slurmctld

TOKEN = "migt:job:21,migt:size:147,migt:shut:168"


def told(gres: str, features: str = "", extra: str = "") -> Record:
    return Record(features, features, gres, "", extra)


def test_only_the_token_and_our_names_change() -> None:
    record = told(f"gpu:a100:2(S:0-1),mig:1g.10gb:14,{TOKEN},license:3", "a100,rms_7g.80gb_1,ib")
    said = Offer(("rms_1g.10gb_1", "rms_1g.10gb_2"), 4, 10)
    assert changes(record, said, "features") == [
        "Gres=gpu:a100:2,mig:1g.10gb:14,migt:job:4,migt:size:10,migt:shut:322,license:3",
        "AvailableFeatures=a100,ib,rms_1g.10gb_1,rms_1g.10gb_2",
        "ActiveFeatures=a100,ib,rms_1g.10gb_1,rms_1g.10gb_2",
    ]
    assert changes(told(TOKEN, "a100"), NOTHING, "features") == ["Gres=migt:job:1,migt:size:1,migt:shut:334"]
    assert changes(told("migt:job:1,migt:size:1,migt:shut:334", "a100"), NOTHING, "features") == []


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_the_total_of_the_token_never_changes(jobs: int, size: int) -> None:
    (gres, *_) = changes(told(TOKEN), Offer((), jobs, size), "features") or [TOKEN]
    shares = [int(item.split(":")[2]) for item in gres.removeprefix("Gres=").split(",")]
    assert sum(shares) == 21 + 147 + 168 and min(shares) >= 1


def test_a_count_that_slurm_shortens_is_read() -> None:
    (gres,) = changes(told("migt:job:1,migt:size:2,migt:shut:1K"), Offer((), 2, 2), "features")
    assert gres == "Gres=migt:job:2,migt:size:2,migt:shut:1023"


def test_extra_keeps_what_a_site_has_there() -> None:
    (_, extra) = changes(told(TOKEN, extra='{"rack":7,"rms_old":1}'), Offer(("rms_a_1",), 1, 1), "extra")
    assert json.loads(extra.removeprefix("Extra=")) == {"rack": 7, "rms_a_1": 1}


def test_a_node_without_the_token_is_told_of() -> None:
    with pytest.raises(NodeError, match="no gres migt"):
        changes(told("mig:1g.10gb:14"), NOTHING, "features")


def test_reads_what_sinfo_prints() -> None:
    fields = ["a100", "a100", TOKEN, "rms1:u=1;j=;k=;q=;mine", "(null)"]
    line = "".join(text.ljust(width) for text, (_, width) in zip(fields, publish.FIELDS, strict=True))
    assert publish.read(f"{line}\n{line}\n", "n1") == Record("a100", "a100", TOKEN, "rms1:u=1;j=;k=;q=;mine", "")
    # Columns are as wide in bytes: one letter of two of them must not move what stands behind it.
    line = line.replace("mine ", "Süd ")
    assert publish.read(f"{line}\n", "n1") == Record("a100", "a100", TOKEN, "rms1:u=1;j=;k=;q=;Süd", "")
    with pytest.raises(NodeError, match="no node"):
        publish.read("", "n1")
    with pytest.raises(NodeError, match="too long"):
        publish.read("x" * 50_000, "n1")


# The order of what is sent, with stand-ins for Slurm's commands


class Slurmctld:
    """Commands that note what they were told, and take their time; `down` while that file exists."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.down = root / "down"
        self.told = root / "told"
        self.gres = root / "gres"
        self.gres.write_text("migt:job:900,migt:size:900,migt:shut:900")
        widths = " ".join(f"%-{width}s" for _, width in publish.FIELDS).replace(" ", "")
        guard = f"[ -e {self.down} ] && {{ echo no contact >&2; exit 1; }}"
        (root / "sinfo").write_text(f"#!/bin/sh\n{guard}\nprintf '{widths}\\n' '' '' $(cat {self.gres}) '' ''\n")
        (root / "scontrol").write_text(
            f"#!/bin/sh\n{guard}\nsleep 0.0$(($$ % 10))\nfor a; do case $a in Gres=*) echo ${{a#Gres=}} >{self.gres};"
            f' esac; done\necho "$@" >>{self.told}\n'
        )
        for command in ("sinfo", "scontrol"):
            (root / command).chmod(0o755)
        monkeypatch.setattr(publish, "PATH", f"{root}:/usr/bin:/bin")
        monkeypatch.setattr(publish, "RETRY_SECONDS", (0.1,))
        monkeypatch.setattr(publish, "PATIENCE", 60.0)

    def sizes(self) -> list[int]:
        """The token's sizes, in the order in which they were told."""
        text = self.told.read_text() if self.told.exists() else ""
        return [int(size) for size in re.findall(r"migt:size:(\d+)", text)]


@pytest.fixture
def slurmctld(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slurmctld:
    return Slurmctld(tmp_path, monkeypatch)


def publisher(node: Node) -> Publisher:
    return Publisher(node.config._replace(admission="features"), "/nowhere", "n1", lambda text: None)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_older_follows_what_is_newer(node: Node, slurmctld: Slurmctld) -> None:
    children = []
    for job in range(1, 9):
        if (child := os.fork()) == 0:
            try:
                node.acquire(job, "1g.10gb:1")
                os._exit(0 if publisher(node).soon(60) else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}
    assert slurmctld.sizes() == sorted(slurmctld.sizes())
    assert slurmctld.sizes()[-1] == 8 + publish.span(A100)
    known = len(slurmctld.sizes())
    assert publisher(node).soon() and len(slurmctld.sizes()) == known <= 8  # nothing new: nothing is sent
    slurmctld.gres.write_text("migt:job:900,migt:size:900,migt:shut:900")  # as after scontrol reconfigure
    assert publisher(node).soon(60, again=True)
    assert slurmctld.sizes()[known:] == [8 + publish.span(A100)]


def test_while_slurmctld_is_away_one_process_goes_on_trying(node: Node, slurmctld: Slurmctld) -> None:
    slurmctld.down.touch()
    node.acquire(1, "1g.10gb:1")
    began = time.monotonic()
    assert not publisher(node).soon(0.3)
    assert time.monotonic() - began < 20
    node.acquire(2, "1g.10gb:1")
    assert not publisher(node).soon()
    with pytest.raises(NodeError, match=r"is held by .* as long as slurmctld does not answer"):
        Publisher(node.config._replace(admission="features"), "", "n1", print).now(1.0)
    assert slurmctld.sizes() == []
    slurmctld.down.unlink()
    until(lambda: slurmctld.sizes()[-1:] == [2 + publish.span(A100)])
    until(lambda: publisher(node).soon())


def test_a_node_without_a_process_to_spare_drains_nothing(
    node: Node, slurmctld: Slurmctld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    node.acquire(1, "1g.10gb:1")
    monkeypatch.setattr(os, "fork", fork)
    said: list[str] = []
    assert not Publisher(node.config._replace(admission="features"), "", "n1", said.append).soon(60)
    assert said == ["cannot publish what fits: no process: Resource temporarily unavailable"]


def test_a_state_that_cannot_be_read_offers_nothing(node: Node, slurmctld: Slurmctld) -> None:
    node.acquire(1, "1g.10gb:1")
    for path in Path(node.config.state_dir).glob("state.json*"):
        path.write_text("rubbish")
    publisher(node).now()
    assert slurmctld.sizes() == [1]


def test_what_the_queue_wants_is_left_for_the_hooks(node: Node, slurmctld: Slurmctld) -> None:
    node.acquire(1, "1g.10gb:1")
    message = str(demand.Told(int(time.time()) + 60, 7, "7g.80gb:1"))
    script = slurmctld.gres.with_name("sinfo")
    script.write_text(script.read_text().replace("'' ''\n", f"'{message}mine' ''\n"))
    publisher(node).now()
    left = demand.load(node.config.state_dir, time.time())
    assert left and left.keep == "7g.80gb:1"
