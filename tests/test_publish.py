"""slurm/publish.py: what is published is exact, what the token lets in fits, nothing older follows what is newer."""

from __future__ import annotations

import errno
import functools
import json
import os
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Node
from hypothesis import given, settings
from hypothesis import strategies as st

import slurm.slurmctld
from rms import demand, geometry, planner
from rms.errors import NodeError
from rms.geometry import Geometry, Placement
from rms.inventory import Allocation, Gpu, Instance, Intent, Owner, Run, State, Status
from rms.planner import Busy, GpuView, View
from rms.request import Request, parse
from rms.store import Store
from slurm import publish, site
from slurm.publish import (
    NOTHING,
    Offer,
    Publisher,
    Record,
    changes,
    left,
    listed,
    name,
    offer,
    sent,
    short,
    stands,
    weight,
)

A100 = geometry.load("A100-80GB")
MODELS = ["A100-80GB", "A30", "RTX-PRO-6000"]


def state(
    known: Geometry, layouts: list[list[Placement]], boot_id: str = "boot", limits: Iterator[int | None] | None = None
) -> State:
    """A node on whose GPUs each of these instances is a job's, begun at 0 with one of these time limits (minutes)."""
    made = State(boot_id=boot_id, managed=list(range(len(layouts))), geometries={known.model: known})
    for number, layout in enumerate(layouts):
        gpu = Gpu(f"GPU-{number}", known.model)
        for placement in layout:
            instance = Instance(made.number(), placement, "busy", 1, 0, "MIG")
            run = Run("c", instance.generation, 0)
            request = f"{placement.profile}:1"
            made.allocations.append(
                Allocation(
                    run,
                    1,
                    request,
                    None,
                    next(limits) if limits else None,
                    0.0,
                    boot_id,
                    [instance.generation],
                    granted=True,
                )
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
    fitting = [name(r) for r in listed(known, len(layouts)) if planner.fits(now, r)]
    brief = [called for profile, called in short(known).items() if name(Request(((profile, 1),))) in fitting]
    assert said.names == (*fitting, *brief)


@functools.cache
def gates(model: str, gpus: int) -> dict[Request, Request]:
    return site.gates(geometry.load(model), gpus)


@given(nodes())
@settings(deadline=None)
def test_a_mix_without_a_name_fits_where_that_is_published_for_which_it_waits(
    node: tuple[Geometry, list[list[Placement]]],
) -> None:
    known, layouts = node
    now = view(known, layouts)
    for mix, published in gates(known.model, len(layouts)).items():
        if mix != published and planner.fits(now, published):
            assert planner.fits(now, mix), (str(mix), str(published))


def test_what_a_mix_waits_for_never_needs_more_empty_gpus_than_it_does() -> None:
    for mix, published in gates("A100-80GB", 2).items():
        for gpus in (1, 2):
            empty = view(A100, [[] for _ in range(gpus)])
            assert not planner.fits(empty, mix) or planner.fits(empty, published), (str(mix), str(published))
    assert str(gates("A100-80GB", 2)[parse("1g.10gb:2,3g.40gb:1", A100)]) == "2g.20gb:1,3g.40gb:1"


@given(nodes(), st.randoms(use_true_random=False), st.booleans())
@settings(max_examples=200, deadline=None)
def test_whatever_the_token_lets_in_fits_wherever_it_is_placed(
    node: tuple[Geometry, list[list[Placement]]], chance: random.Random, keeping: bool
) -> None:
    known, layouts = node
    limits = chance.choices((None, 5, 13), k=20)
    before = state(known, layouts, limits=iter(limits))
    ends = iter([limit and limit * 60.0 for limit in limits])
    free_at = {(gpu, place): next(ends) for gpu, layout in enumerate(layouts) for place in layout}
    kept = chance.choice(listed(known, len(layouts))) if keeping else None
    told = demand.Told(100, 999_999, str(kept)) if kept else None
    said = offer(before, "boot", 0.0, told)

    def places(profile: str, wanted: Request, end: float | None) -> list[tuple[int, Placement]]:
        """Where the controller may put it: beside what is kept, if there is room."""
        gpus = enumerate(view(known, layouts).gpus)
        held = [
            gpu._replace(busy=tuple(b._replace(end=free_at.get((n, b.placement))) for b in gpu.busy)) for n, gpu in gpus
        ]
        whole = View(tuple(held), (), None, 0.0)
        room = planner.first_room(whole, kept) if kept and wanted != kept else None
        beside = planner.beside(whole, room, end) if room else whole
        found = [[(c.gpu, c.placement) for c in planner.candidates(v, profile)] for v in (beside, whole)]
        return found[0] or found[1]

    jobs = said.jobs - len(before.allocations)
    size = said.size - sum(weight(known, parse(a.request, known)) for a in before.allocations)
    assert 1 <= jobs <= size == publish.span(known)
    ours: dict[str, tuple[Request, float | None]] = {name(r): (r, None) for r in listed(known, len(layouts))}
    ours |= {
        called: (Request(((profile, 1),)), publish.SHORT_MINUTES * 60.0) for profile, called in short(known).items()
    }
    published = [ours[called] for called in said.names]
    small = [asked for asked in published if weight(known, asked[0]) < size]
    while jobs and (allowed := [asked for asked in published if weight(known, asked[0]) <= size]):
        wanted, end = chance.choice([asked for asked in allowed if asked in small] or allowed)
        jobs, size = jobs - 1, size - weight(known, wanted)
        assert planner.fits(view(known, layouts), wanted), f"{wanted} beside {layouts}"
        for profile in wanted.profiles:  # as badly as can be: anywhere
            if not (free := places(profile, wanted, end)):
                break  # only one instance at a time is placed badly; a request as a whole is planned
            gpu, place = chance.choice(free)
            layouts[gpu].append(place)


@given(nodes(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_what_was_told_stands_while_those_whom_it_lets_in_come_and_go(
    node: tuple[Geometry, list[list[Placement]]], chance: random.Random
) -> None:
    """slurmctld goes by one offer all the time: whom it lets in fits, as long as the node says that it stands."""
    known, layouts = node
    before = state(known, layouts)
    said, last = offer(before, "boot", 0.0), sent(NOTHING, "", before, "boot")
    mine = [(gpu, place) for gpu, layout in enumerate(layouts) for place in layout]
    jobs: dict[tuple[int, Placement], int] = {}  # that have come since, each alone on its place

    def now() -> State:
        made = state(known, [[p for g, p in mine if g == gpu] for gpu in range(len(layouts))])
        for gpu, place in jobs:
            run = Run("new", jobs[gpu, place], 0)
            instance = Instance(made.number() + 1000, place, "busy", 1, 0, "MIG")
            made.gpus[gpu].instances.append(instance)
            request = f"{place.profile}:1"
            made.allocations.append(Allocation(run, 1, request, None, None, 0.0, "boot", [instance.generation], True))
        return made

    for number in range(1000, 1012):
        here = now()
        assert stands(last, here, "boot")
        taken = sum(weight(known, parse(f"{place.profile}:1", known)) for _, place in jobs)
        assert left(last, here) == pytest.approx(1 - taken / publish.span(known))
        free = said.jobs - len(mine) - len(jobs)
        single = [r for r in listed(known, len(layouts)) if name(r) in said.names and sum(r.counts) == 1]
        allowed = [r for r in single if weight(known, r) <= publish.span(known) - taken] if free > 0 else []
        if jobs and (not allowed or chance.random() < 0.4):
            del jobs[chance.choice(list(jobs))]
        elif allowed:
            wanted = chance.choice(allowed)
            held = [[p for g, p in (*mine, *jobs) if g == gpu] for gpu in range(len(layouts))]
            found = planner.candidates(view(known, held), wanted.profiles[0])
            assert found, f"{wanted} beside {held}"
            place = chance.choice(found)
            jobs[place.gpu, place.placement] = number
    if mine:
        mine.pop()
        assert not stands(last, now(), "boot")
        return
    worse = now()
    worse.gpus[0].instances.append(Instance(5000, known.placements(known.profiles[0].name)[0], "quarantined"))
    assert not stands(last, worse, "boot") and not stands(last, now(), "another boot")


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


def test_what_was_told_while_a_job_ended_does_not_stand_once_it_has() -> None:
    """Its slices counted as taken: that they are free must be told, by its own Epilog if nobody else does."""
    node = state(A100, [[Placement("3g.40gb", 0, 4)]])
    node.intents.append(Intent(9, "release", node.allocations[0].run, Owner(1, 1)))
    last = sent(NOTHING, "", node, "boot")
    assert not stands(last, node, "boot")
    assert not stands(last, state(A100, [[]]), "boot")


def test_what_is_kept_for_one_job_is_not_offered_to_others() -> None:
    node = state(A100, [[Placement("1g.10gb", 0, 1)], [Placement("3g.40gb", 0, 4), Placement("3g.40gb", 4, 4)]])
    told = demand.Told(100, 7, "7g.80gb:1")
    said = offer(node, "boot", 0.0, told)
    assert said.names == ()
    assert offer(node, "boot", 0.0).names
    node.allocations[0].limit = 13
    brief = ("rms_1g.10gb_1_short", "rms_1g.10gb+me_1_short", "rms_1g.20gb_1_short", "rms_2g.20gb_1_short")
    said = offer(node, "boot", 0.0, told)
    assert said.names == brief, "who has ended by then may use it"
    assert said.jobs - len(node.allocations) > 1, "and several of them at once"
    assert offer(node, "boot", 60.0, told).names == brief and offer(node, "boot", 61.0, told).names == ()
    here = told._replace(job=node.allocations[0].run.job)
    assert offer(node, "boot", 0.0, here) == offer(node, "boot", 0.0), "it runs here already"
    node = state(A100, [[], [Placement("1g.10gb", 0, 1)]])
    said = offer(node, "boot", 0.0, told)
    assert name(parse("7g:1", A100)) in said.names  # the one it is kept for
    assert name(parse("1g:6", A100)) in said.names and name(parse("1g:7", A100)) not in said.names
    node = state(A100, [[Placement("3g.40gb", 0, 4), Placement("1g.10gb", 6, 1)]])
    assert offer(node, "boot", 0.0, told._replace(keep="2g.20gb:1")).names == (name(parse("2g", A100)), brief[-1]), (
        "it may itself be one that is over soon"
    )
    node = state(A100, [[Placement("2g.20gb", 0, 2)]])
    names = offer(node, "boot", 0.0, told._replace(keep="3g.40gb:1,1g.10gb:1")).names
    assert "rms_1g.10gb_1_3g.40gb_1" in names, "in whatever order it was asked for"
    assert name(parse("3g", A100)) not in names
    node = state(A100, [[Placement("1g.10gb", 0, 1)]])
    names = offer(node, "boot", 0.0, told._replace(keep="4g.40gb:1")).names
    assert name(parse("3g", A100)) in names, "in the other half of the GPU"
    assert name(parse("1g:3", A100)) in names and name(parse("1g:4", A100)) not in names


@pytest.mark.parametrize("status", ["making", "removing"])
def test_what_is_kept_is_kept_while_something_is_made_or_removed_there(status: Status) -> None:
    """As after each start on the node: else a job of whatever length comes into what the large one waits for."""
    node = state(A100, [[Placement("3g.40gb", 0, 4)]])
    told = demand.Told(100, 7, "7g.80gb:1")
    assert offer(node, "boot", 0.0, told).names == ()
    if status == "making":
        node.gpus[0].instances[0].status = status
    else:
        node.gpus[0].instances.append(Instance(node.number(), Placement("1g.10gb", 4, 1), status))
    assert offer(node, "boot", 0.0).names
    assert offer(node, "boot", 0.0, told).names == ()


def test_every_model_has_few_names_and_the_largest_empty_node_is_quick() -> None:
    for model in geometry.models():
        known = geometry.load(model)
        requests = listed(known, 8)
        assert len({*publish.names(known, 8)}) == len(requests) + len(short(known)) < 200
        for profile in known.profiles:
            assert Request(((profile.name, profile.limit * 8),)) in requests


# The record in slurmctld

TOKEN = "migt:job:21,migt:size:147,migt:open:1"


def told(gres: str, features: str = "", extra: str = "") -> Record:
    return Record(features, features, gres, extra, "")


def test_only_the_token_and_our_names_change() -> None:
    record = told(f"gpu:a100:2(S:0-1),mig:1g.10gb:14,{TOKEN},license:3", "a100,rms_7g.80gb_1,ib")
    said = Offer(("rms_1g.10gb_1", "rms_1g.10gb_2"), 4, 10)
    assert changes(record, said, "features") == [
        "Gres=gpu:a100:2,mig:1g.10gb:14,migt:job:4,migt:size:10,migt:open:155,license:3",
        "AvailableFeatures=a100,ib,rms_1g.10gb_1,rms_1g.10gb_2",
        "ActiveFeatures=a100,ib,rms_1g.10gb_1,rms_1g.10gb_2",
    ]
    assert changes(told(TOKEN, "a100"), NOTHING, "features") == ["Gres=migt:job:1,migt:size:1,migt:open:167"]
    assert changes(told("gpu:2(S:0-1),migt:job:1,migt:size:1,migt:open:167", "a100"), NOTHING, "features") == []


@given(st.integers(1, 1000), st.integers(1, 1000))
def test_the_total_of_the_token_never_changes(jobs: int, size: int) -> None:
    (gres, *_) = changes(told(TOKEN), Offer((), jobs, size), "features") or [TOKEN]
    shares = [int(item.split(":")[2]) for item in gres.removeprefix("Gres=").split(",")]
    assert sum(shares) == 21 + 147 + 1 and min(shares) >= 1


def test_a_count_that_slurm_shortens_is_read() -> None:
    (gres,) = changes(told("migt:job:1,migt:size:2,migt:open:1K"), Offer((), 2, 2), "features")
    assert gres == "Gres=migt:job:2,migt:size:2,migt:open:1023"


def test_extra_keeps_what_a_site_has_there() -> None:
    (_, extra) = changes(told(TOKEN, extra='{"rack":7,"rms_old":1}'), Offer(("rms_a_1",), 1, 1), "extra")
    assert json.loads(extra.removeprefix("Extra=")) == {"rack": 7, "rms_a_1": 1}
    for other in ("rack 7", "[7]"):  # it can't be kept: slurmctld reads nothing but an object
        assert changes(told(TOKEN, extra=other), Offer(("rms_a_1",), 1, 1), "extra")[1:] == ['Extra={"rms_a_1":1}']


def test_a_node_without_the_token_is_told_of() -> None:
    with pytest.raises(NodeError, match="no gres migt"):
        changes(told("mig:1g.10gb:14"), NOTHING, "features")


def test_reads_what_sinfo_prints() -> None:
    fields = ["a100", "a100", TOKEN, "(null)", "rms1:u=1;j=;k=;q=;mine"]
    line = "".join(text.ljust(width) for text, (_, width) in zip(fields, publish.FIELDS, strict=True))
    assert publish.read(f"{line}\n{line}\n", "n1") == Record("a100", "a100", TOKEN, "", "rms1:u=1;j=;k=;q=;mine")
    # Columns are as wide in bytes: one letter of two of them must not move what stands behind it.
    fields[0] = "Süd"
    line = "".join(text.ljust(width) for text, (_, width) in zip(fields, publish.FIELDS, strict=True))
    line = line.replace("Süd ", "Süd")
    assert publish.read(f"{line}\n", "n1") == Record("Süd", "a100", TOKEN, "", "rms1:u=1;j=;k=;q=;mine")
    with pytest.raises(NodeError, match="no node"):
        publish.read("", "n1")
    with pytest.raises(NodeError, match="24000 bytes or more in features of node n1: shorten"):
        publish.read("x" * 50_000, "n1")


@pytest.mark.parametrize("own", ["line one\nline two", "x" * 3000], ids=["line feed", "long"])
def test_a_site_s_comment_keeps_no_node_from_publishing(own: str) -> None:
    """Nor does it take the site's own part of Extra with it."""
    fields = ["a100", "a100", TOKEN, '{"rack":7}', f"rms1:u=1;j=;k=;q=;{own}"]
    line = "".join(text[:width].ljust(width) for text, (_, width) in zip(fields, publish.FIELDS, strict=True))
    record = publish.read(f"{line}\n", "n1")
    assert record.comment.startswith("rms1:u=1;j=;k=;q=;")
    (_, extra) = changes(record, Offer(("rms_a_1",), 1, 1), "extra")
    assert extra == 'Extra={"rack":7,"rms_a_1":1}'


@pytest.mark.parametrize("model", geometry.models())
def test_an_empty_node_of_the_most_gpus_can_be_read_back(model: str) -> None:
    known = geometry.load(model)
    said = Offer(tuple(publish.names(known, site.MOST_GPUS)), 1, 1)
    shown = {**dict.fromkeys(("features", "features_act"), ",".join(said.names)), "extra": publish._merged("", said)}
    line = "".join(shown.get(field, "").ljust(width) for field, width in publish.FIELDS)
    assert publish.read(line, "n1")[:2] == (shown["features"], shown["features_act"])
    assert publish.read(line, "n1").extra == shown["extra"]


# The order of what is sent, with stand-ins for Slurm's commands


class Slurmctld:
    """Commands that note what they were told, and take their time; `down` while that file exists. With `half` it goes
    down after it has done what it was told, and before it says so."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.down = root / "down"
        self.half = root / "half"
        self.told = root / "told"
        self.gres = root / "gres"
        self.gres.write_text("migt:job:900,migt:size:900,migt:open:900")
        widths = " ".join(f"%-{width}s" for _, width in publish.FIELDS).replace(" ", "")
        guard = f"[ -e {self.down} ] && {{ echo no contact >&2; exit 1; }}"
        (root / "sinfo").write_text(f"#!/bin/sh\n{guard}\nprintf '{widths}\\n' '' '' $(cat {self.gres}) '' ''\n")
        (root / "scontrol").write_text(
            f"#!/bin/sh\n{guard}\nsleep 0.0$(($$ % 10))\nfor a; do case $a in Gres=*) echo ${{a#Gres=}} >{self.gres};"
            f' esac; done\necho "$@" >>{self.told}\n[ ! -e {self.half} ] || {{ mv {self.half} {self.down}; exit 1; }}\n'
        )
        for command in ("sinfo", "scontrol"):
            (root / command).chmod(0o755)
        monkeypatch.setattr(slurm.slurmctld, "PATH", f"{root}:/usr/bin:/bin")
        monkeypatch.setattr(publish, "RETRY_SECONDS", (0.1,))
        monkeypatch.setattr(publish, "PATIENCE", 60.0)
        monkeypatch.setattr(publish, "TOGETHER_SECONDS", 1.5)

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
                os._exit(0 if publisher(node).job_went(60) else 1)
            finally:
                os._exit(2)
        children.append(child)
    assert {os.waitpid(child, 0)[1] for child in children} == {0}
    publisher(node).now()  # the last of them may have found that what the others had told stands
    assert slurmctld.sizes() == sorted(slurmctld.sizes())
    assert slurmctld.sizes()[-1] == 8 + publish.span(A100)
    known = len(slurmctld.sizes())
    assert publisher(node).job_went(0) and len(slurmctld.sizes()) == known <= 9  # nothing new: nothing is sent
    slurmctld.gres.write_text("migt:job:900,migt:size:900,migt:open:900")  # as after scontrol reconfigure
    publisher(node).anew()
    until(lambda: slurmctld.sizes()[known:] == [8 + publish.span(A100)])


def test_while_slurmctld_is_away_one_process_goes_on_trying(node: Node, slurmctld: Slurmctld) -> None:
    slurmctld.down.touch()
    node.acquire(1, "1g.10gb:1")
    began = time.monotonic()
    assert not publisher(node).job_went(0.3)
    assert time.monotonic() - began < 20
    node.acquire(2, "1g.10gb:1")
    assert not publisher(node).job_went(0)
    with pytest.raises(NodeError, match=r"is held by .* as long as slurmctld does not answer"):
        Publisher(node.config._replace(admission="features"), "", "n1", print).now(1.0)
    assert slurmctld.sizes() == []
    slurmctld.down.unlink()
    until(lambda: slurmctld.sizes()[-1:] == [2 + publish.span(A100)])
    until(lambda: publisher(node).job_went(0))


def test_what_comes_together_is_told_together_and_what_has_come_and_gone_not_at_all(
    node: Node, slurmctld: Slurmctld
) -> None:
    node.acquire(1, "1g.10gb:1")
    publisher(node).now()
    assert slurmctld.sizes() == [1 + 7]
    for job in (2, 3):
        node.acquire(job, "1g.10gb:1")
        publisher(node).job_came()
    node.release(2)
    assert publisher(node).job_went(0), "nobody has told slurmctld of it: nothing is to be taken back"
    assert slurmctld.sizes() == [1 + 7]
    until(lambda: slurmctld.sizes() == [1 + 7, 2 + 7])  # a moment later, and once
    node.acquire(4, "4g.40gb:1")
    publisher(node).job_came()  # takes all of the token: at once
    until(lambda: slurmctld.sizes()[2:] == [2 + 7 + 7])
    node.release(3)
    assert publisher(node).job_went(60)
    assert slurmctld.sizes()[3:] == [1 + 7 + 7], "one that slurmctld knows of"
    time.sleep(0.5)
    assert len(slurmctld.sizes()) == 4


def test_an_end_waits_for_what_is_told_of_it_and_not_for_who_goes_on(node: Node, slurmctld: Slurmctld) -> None:
    for job in (1, 2):
        node.acquire(job, "1g.10gb:1")
    publisher(node).now()
    node.release(1)
    go = node.root / "go"
    if (child := os.fork()) == 0:
        try:
            until(go.exists)
            os._exit(0 if publisher(node).job_went(60) else 1)
        finally:
            os._exit(2)
    store = Store(node.config.state_dir, time.monotonic() + 60)
    with store.publishing():
        go.touch()
        time.sleep(0.6)
        assert os.waitpid(child, os.WNOHANG) == (0, 0), "slurmctld has not been told yet"
        publisher(node)._publish(store, None)
        assert os.waitpid(child, 0)[1] == 0
    assert slurmctld.sizes() == [2 + 7, 1 + 7]


def test_an_update_that_may_or_may_not_have_come_through_is_not_relied_on(node: Node, slurmctld: Slurmctld) -> None:
    publisher(node).now()
    node.acquire(1, "1g.10gb:1")
    slurmctld.down.touch()
    with pytest.raises(NodeError, match="no contact"):
        publisher(node).now()
    node.release(1)
    assert not publisher(node).job_went(0.1)
    slurmctld.down.unlink()
    until(lambda: publisher(node).job_went(0))


def test_one_that_came_through_without_an_answer_is_taken_back(node: Node, slurmctld: Slurmctld) -> None:
    node.acquire(1, "1g.10gb:1")
    publisher(node).now()
    slurmctld.half.touch()
    node.acquire(2, "4g.40gb:1")
    publisher(node).job_came()
    until(slurmctld.down.exists)
    node.release(2)
    slurmctld.down.unlink()
    until(lambda: slurmctld.sizes() == [1 + 7, 1 + 7 + 7, 1 + 7])


def test_nothing_is_asked_where_the_same_is_to_be_told(node: Node, slurmctld: Slurmctld) -> None:
    node.acquire(1, "1g.10gb:1")
    publisher(node).now()
    slurmctld.down.touch()
    node.release(1)
    node.acquire(2, "1g.10gb:1")
    assert publisher(node).job_went(60)
    with pytest.raises(NodeError, match="no contact"):
        publisher(node).now()  # as the timer does: slurmctld may have forgotten it


def test_what_slurmctld_seems_to_have_forgotten_is_told_whatever_others_note_meanwhile(
    node: Node, slurmctld: Slurmctld
) -> None:
    node.acquire(1, "1g.10gb:1")
    publisher(node).now()
    note = node.root / "state" / publish.FILE
    written = note.read_bytes()
    slurmctld.gres.write_text("migt:job:900,migt:size:900,migt:open:900")
    with Store(node.config.state_dir, time.monotonic() + 60).publishing():
        publisher(node).anew()
        note.write_bytes(written)  # by whom has the lock
    until(lambda: slurmctld.sizes() == [1 + 7, 1 + 7])


def test_a_full_disk_does_not_make_it_try_for_ever(
    node: Node, slurmctld: Slurmctld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    node.acquire(1, "1g.10gb:1")
    monkeypatch.setattr(publish.files, "replace", full)
    assert publisher(node).job_went(60)
    assert slurmctld.sizes() == [1 + 7]


def test_a_node_without_a_process_to_spare_drains_nothing(
    node: Node, slurmctld: Slurmctld, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fork() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    node.acquire(1, "1g.10gb:1")
    monkeypatch.setattr(os, "fork", fork)
    said: list[str] = []
    assert not Publisher(node.config._replace(admission="features"), "", "n1", said.append).job_went(60)
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
    script.write_text(script.read_text().replace("'' ''\n", f"'' '{message}mine'\n"))
    publisher(node).now()
    left = demand.load(node.config.state_dir, time.time())
    assert left and left.keep == "7g.80gb:1"
