"""What `rms watch` tells a node: the message in the node's comment, and what planner and controller make of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from conftest import Node, run
from hypothesis import given
from hypothesis import strategies as st

from rms import demand, geometry, planner
from rms.demand import Told, Waiting
from rms.errors import NoRoomError
from rms.planner import Busy, GpuView, View
from rms.request import Request, parse

A100 = geometry.load("A100-80GB")
MODELS = [geometry.load(name) for name in geometry.models()]
REQUESTS = ["7g.80gb:1", "3g.40gb:2,1g.10gb:1", "1g.10gb+me:1", "2g.20gb:3"]

waiting = st.builds(
    Waiting,
    st.sampled_from(REQUESTS),
    st.integers(1, demand.MOST),
    st.integers(0, 10**6),
    st.integers(0, 2 * 10**9),
)
told = st.builds(
    Told,
    st.integers(1000, 2 * 10**9),
    st.integers(1, 10**6),
    st.sampled_from(REQUESTS),
    st.lists(waiting, max_size=30).map(demand.queue),
)


@given(told, st.text(st.characters(codec="utf-8"), max_size=80))
def test_a_message_is_read_as_it_was_written_and_the_sites_text_stays(one: Told, site: str) -> None:
    site = demand.own_text(site)
    comment = f"{one}{site}"
    assert demand.read(comment, one.until - 1) == one
    assert demand.read(comment, one.until) is None, "it has expired"
    assert demand.own_text(comment) == site
    assert len(str(one)) < 900


@given(st.text(max_size=60) | st.text("rms1:ujkq=;*@|0123456789g.", max_size=60).map(lambda text: f"rms1:u=9{text}"))
def test_whatever_else_stands_in_a_comment_is_no_fault(text: str) -> None:
    demand.read(text, 0)
    assert demand.own_text(text) == text or text.startswith("rms1:")


@given(st.lists(waiting, max_size=40))
def test_the_queue_is_its_first_jobs(jobs: list[Waiting]) -> None:
    found = demand.queue(jobs)
    assert sum(job.jobs for job in found) <= demand.MOST
    assert len({(job.request, job.limit) for job in found}) == len(found)
    alone = {(job.request, job.limit) for job in jobs}
    assert {(job.request, job.limit) for job in found} <= alone
    if sum(job.jobs for job in jobs) <= demand.MOST and len(alone) <= 8:
        assert sum(job.jobs for job in found) == sum(job.jobs for job in jobs)
    for entry in Told(9, waiting=found).pending(A100):
        assert entry.request == parse(str(entry.request), A100)


def test_jobs_for_other_gpus_are_left_out() -> None:
    jobs = (Waiting("7g.141gb:1", 3, 5, 100), Waiting("3g.40gb:1", 2, 0, 200))
    assert Told(9, waiting=jobs).pending(A100) == (planner.Demand(200.0, Request((("3g.40gb", 1),)), None),) * 2


# What is kept, where, and until when.


@st.composite
def views(draw: st.DrawFn) -> View:
    """One to three GPUs of a model, with jobs that end at some time, and idle instances."""
    board = draw(st.sampled_from(MODELS))
    gpus = []
    for number in range(draw(st.integers(1, 3))):
        layout = draw(st.sampled_from(board.layouts([p.name for p in board.profiles if p.plain])))
        busy, idle = [], []
        for placement in layout:
            kind = draw(st.sampled_from(["busy", "busy", "idle", "free"]))
            if kind == "busy":
                busy.append(Busy(placement, 0.0, draw(st.none() | st.integers(50, 400).map(float))))
            elif kind == "idle":
                idle.append(placement)
        gpus.append(GpuView(f"GPU-{number}", board, tuple(busy), tuple(idle)))
    return View(tuple(gpus), (), None, 100.0)


@st.composite
def wishes(draw: st.DrawFn, view: View) -> Request:
    board = view.gpus[0].geometry
    names = draw(st.lists(st.sampled_from([p.name for p in board.profiles]), min_size=1, max_size=2, unique=True))
    return Request(tuple((name, draw(st.integers(1, 3))) for name in names))


def ended(view: View, moment: float | None) -> View:
    """The view at a later moment, when every job has ended that should have."""
    gpus = (
        g._replace(busy=tuple(b for b in g.busy if b.end is None or moment is None or b.end > moment))
        for g in view.gpus
    )
    return view._replace(gpus=tuple(gpus))


@given(st.data())
def test_room_that_is_kept_is_there_when_it_was_promised(data: st.DataObject) -> None:
    view = data.draw(views())
    wanted = data.draw(wishes(view))
    kept = planner.first_room(view, wanted)
    empty = view._replace(gpus=tuple(GpuView(g.uuid, g.geometry) for g in view.gpus))
    assert (kept is None) == (not planner.fits(empty, wanted))
    if kept is None or kept.free is None:
        return
    assert planner.fits(ended(view, kept.free), wanted) or kept.free == view.now
    sooner = [b.end for g in view.gpus for b in g.busy if b.end and view.now < b.end < kept.free]
    assert not any(planner.fits(ended(view, end), wanted) for end in sooner)
    # Others come, one after the other, and are let in beside it. Who goes in time may use the place itself.
    for _ in range(data.draw(st.integers(0, 6))):
        other = data.draw(wishes(view))
        end = data.draw(st.none() | st.integers(101, 500).map(float))
        if decisions := planner.plan(planner.beside(view, kept, end), other, end):
            for decision in decisions:
                view = planner.after(view, decision.choice.candidate, end)
            again = planner.first_room(view, wanted)
            assert again and again.free is not None and again.free <= kept.free, "it comes no later for that"
            kept = again
    assert planner.fits(ended(view, kept.free), wanted) or kept.free == view.now


@given(st.data())
def test_others_do_not_get_what_is_kept(data: st.DataObject) -> None:
    view = data.draw(views())
    kept = planner.first_room(view, data.draw(wishes(view)))
    if kept is None:
        return
    others = planner.beside(view, kept, None)
    for profile in view.gpus[0].geometry.profiles:
        for candidate in planner.candidates(others, profile.name):
            slots = sum(p.mask for g, p in kept.places if g == candidate.gpu)
            assert not candidate.placement.mask & slots


def gpus_of(held: list[planner.Placement]) -> tuple[GpuView, ...]:
    return tuple(GpuView(f"GPU-{i}", A100, (Busy(p, 0.0, 200.0 + i),)) for i, p in enumerate(held))


def test_the_gpu_that_is_free_first_is_kept() -> None:
    view = View(gpus_of([A100.placements("3g.40gb")[0]] * 3), (), None, 100.0)
    seven = parse("7g", A100)
    assert planner.first_room(view, seven) == planner.Kept(((0, A100.placements("7g.80gb")[0]),), 200.0)
    two = planner.first_room(view, parse("7g:2", A100))
    assert two is not None and {gpu for gpu, _ in two.places} == {0, 1} and two.free == 201.0


# The controller, with what the publishing step has left.


def tell(node: Node, keep: str, seconds: float = 60) -> None:
    demand.save(node.config.state_dir, f"{Told(int(time.time() + seconds), 9, keep)}rack 7")


def test_the_controller_puts_others_beside_what_is_kept(node: Node) -> None:
    node.acquire(1, "1g", limit=1)
    first = node.statuses()
    tell(node, "7g.80gb:1")
    gpu = next(place for place, status in first.items() if status == "busy")[0]
    # GPU 0 is kept, or GPU 1, whichever is free first: the one without a job.
    for job in (2, 3, 4):
        assert [str(g.number) for g in node.acquire(job, "1g", limit=60)] == [gpu]
    assert [g.placement.profile for g in node.acquire(9, "7g")] == ["7g.80gb"]
    node.check()


def test_what_slurmctld_let_in_all_the_same_is_not_refused(node: Node) -> None:
    tell(node, "7g.80gb:2")
    assert len(node.acquire(1, "1g")) == 1
    with pytest.raises(NoRoomError):
        node.acquire(9, "7g:2")


def test_the_same_request_of_another_job_has_the_place(node: Node) -> None:
    one = node.acquire(1, "3g")
    node.release(1)
    tell(node, "3g.40gb:1")
    assert node.acquire(2, "3g") == one


@pytest.mark.parametrize(
    ("ends", "limit", "there"), [(60, 30, True), (60, 61, False), (60, None, False), (None, 30, False)]
)
def test_who_has_ended_by_then_may_have_what_is_kept(
    node: Node, ends: int | None, limit: int | None, there: bool
) -> None:
    """The GPU with less room is kept, from when its job ends."""
    (one,) = node.acquire(1, "3g", limit=ends)
    assert node.acquire(5, "4g")[0].gpu == one.gpu
    assert node.acquire(2, "1g")[0].gpu != one.gpu
    node.release(5)
    tell(node, "7g.80gb:1")
    assert (node.acquire(3, "1g", limit=limit)[0].gpu == one.gpu) == there


def test_nothing_is_kept_for_a_job_that_has_come(node: Node) -> None:
    tell(node, "3g.40gb:1")
    (nine,) = node.acquire(9, "3g")
    assert node.acquire(2, "1g")[0].gpu == nine.gpu, "a place for another 3g is left there"


@pytest.mark.parametrize("left", ["", "rms1:nonsense", "\0\xff", "rms1:u=9;j=1;k=7g.80gb:1;q=;"])
def test_nothing_told_is_nothing_kept(node: Node, left: str) -> None:
    (Path(node.config.state_dir) / demand.FILE).write_bytes(left.encode("latin-1"))
    assert len(node.acquire(1, "7g:2")) == 2


def test_a_profile_that_nobody_has_keeps_nothing(node: Node) -> None:
    tell(node, "9g.99gb:1")
    assert len(node.acquire(1, "7g:2")) == 2


def test_without_a_message_the_file_goes(node: Node) -> None:
    tell(node, "7g.80gb:2")
    demand.save(node.config.state_dir, "rack 7")
    assert demand.load(node.config.state_dir, 0) is None
    demand.save(node.config.state_dir, "rack 7")


def test_the_policy_sees_what_waits(node: Node) -> None:
    seen: list[View] = []

    def choose(view: View, asked: planner.Asked, candidates: Sequence[planner.Candidate]) -> planner.Choice:
        seen.append(view)
        return planner.built_in(view, asked, candidates)

    local = node.controller(choose)
    local.acquire(run(1), 1000, "1g", 1, None)
    waiting = (Waiting("3g.40gb:1", 2, 5, 100), Waiting("9g.99gb:1", 1, 0, 100))
    demand.save(node.config.state_dir, str(Told(int(time.time()) + 60, waiting=waiting)))
    local.acquire(run(2), 1000, "1g", 1, None)
    assert seen[0].pending is None, "nobody has told"
    assert seen[1].pending == (planner.Demand(100.0, Request((("3g.40gb", 1),)), 300.0),) * 2
