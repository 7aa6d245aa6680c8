"""Planning: a request succeeds exactly when a brute force over placements finds room, and the rule is as documented."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import event, example, given, settings
from hypothesis import strategies as st

from rms import geometry, planner
from rms.geometry import Placement
from rms.planner import Asked, Busy, Candidate, Choice, GpuView, View, built_in, fits, plan
from rms.request import Request, parse

DATA = json.loads(Path(geometry.DATA).read_text())["models"]
"""The geometry as data: the brute force reads nothing else."""

PROFILES = {model: {p["name"]: p for p in data["profiles"]} for model, data in DATA.items()}


def goes_with(model: str, new: Placement, held: Sequence[Placement]) -> bool:
    """The rules of MIG once more: no shared slice, no more than a profile's count, one set of media engines."""
    mine = PROFILES[model][new.profile]
    slices = {s for p in held for s in range(p.start, p.start + p.size)}
    if slices & set(range(new.start, new.start + new.size)):
        return False
    if sum(p.profile == new.profile for p in held) >= mine["max"]:
        return False
    return not ("+me" in new.profile and any("+me" in p.profile for p in held))


def room(model: str, gpus: Sequence[Sequence[Placement]], wanted: Sequence[str]) -> bool:
    """Whether all of `wanted` can be placed beside what the GPUs hold: every way is tried."""
    if not wanted:
        return True
    profile, *rest = wanted
    data = PROFILES[model][profile]
    for index, held in enumerate(gpus):
        for start in data["starts"]:
            new = Placement(profile, start, data["memory"])
            if goes_with(model, new, held) and room(model, [*gpus[:index], [*held, new], *gpus[index + 1 :]], rest):
                return True
    return False


@st.composite
def views(draw: st.DrawFn) -> tuple[str, View]:
    """One to three GPUs of a model, each with a random layout of busy, idle and blocked instances."""
    model = draw(st.sampled_from(sorted(DATA)))
    known = geometry.load(model)
    gpus = []
    for number in range(draw(st.integers(1, 3))):
        held: list[Placement] = []
        kinds: dict[str, list[Any]] = {"busy": [], "idle": [], "blocked": []}
        for _ in range(draw(st.integers(0, 7))):
            name = draw(st.sampled_from(sorted(PROFILES[model])))
            data = PROFILES[model][name]
            new = Placement(name, draw(st.sampled_from(data["starts"])), data["memory"])
            if goes_with(model, new, held):
                held.append(new)
                kinds[draw(st.sampled_from(sorted(kinds)))].append(new)
        busy = tuple(Busy(p, 0.0, None) for p in kinds["busy"])
        gpus.append(GpuView(f"GPU-{number}", known, busy, tuple(kinds["idle"]), tuple(kinds["blocked"])))
    return model, View(tuple(gpus), (), None, 0.0)


@st.composite
def questions(draw: st.DrawFn) -> tuple[str, View, Request]:
    """A node and a request of one to five instances."""
    model, view = draw(views())
    names = draw(st.lists(st.sampled_from(sorted(PROFILES[model])), min_size=1, max_size=5))
    return model, view, Request(tuple((name, names.count(name)) for name in dict.fromkeys(names)))


def taken(view: View) -> list[list[Placement]]:
    """What nothing may be made over, by GPU."""
    return [[*(b.placement for b in gpu.busy), *gpu.blocked] for gpu in view.gpus]


@settings(max_examples=600)
@given(questions())
def test_succeeds_exactly_when_a_brute_force_does(question: tuple[str, View, Request]) -> None:
    model, view, request = question
    possible = room(model, taken(view), request.profiles)
    event("fits" if possible else "does not fit")
    assert fits(view, request) == possible
    decisions = plan(view, request, None)
    assert (decisions is not None) == possible
    if decisions is not None:
        check(model, view, request, decisions)


def check(model: str, view: View, request: Request, decisions: Sequence[planner.Decision]) -> None:
    """A plan is whole, in the request's order, and can be carried out: destroy first, then create."""
    assert [d.choice.candidate.placement.profile for d in decisions] == list(request.profiles)
    assert [d.asked.profile for d in decisions] == list(request.profiles)
    idle = [set(gpu.idle) for gpu in view.gpus]
    held = taken(view)
    chosen = [d.choice.candidate for d in decisions]
    for candidate in chosen:
        assert set(candidate.destroys) <= idle[candidate.gpu], "destroyed twice, or what is not idle"
        idle[candidate.gpu] -= set(candidate.destroys)
        for gone in candidate.destroys:
            needed = gone.mask & candidate.placement.mask
            alike = gone.profile == candidate.placement.profile
            media = "+me" in gone.profile and "+me" in candidate.placement.profile
            assert needed or alike or media, "destroyed without need"
    for candidate in chosen:
        if candidate.reuse:
            assert candidate.placement in idle[candidate.gpu], "reused, but not there any more"
            assert candidate.destroys == ()
            idle[candidate.gpu].remove(candidate.placement)
            held[candidate.gpu].append(candidate.placement)
    for number, spared in enumerate(idle):
        held[number] += spared
    for candidate in chosen:
        if not candidate.reuse:
            assert candidate.placement.start in PROFILES[model][candidate.placement.profile]["starts"]
            assert goes_with(model, candidate.placement, held[candidate.gpu]), "the hardware would refuse it"
            held[candidate.gpu].append(candidate.placement)
    for decision in decisions:
        assert len(decision.choice.scores) == len(decision.candidates)
        assert decision.choice.candidate in decision.candidates


@settings(max_examples=300)
@given(questions())
def test_offers_every_way_that_leaves_room_and_no_other(question: tuple[str, View, Request]) -> None:
    model, view, request = question
    decisions = plan(view, request, None)
    if decisions is None:
        return
    # The first instance to be placed is the largest: what was offered for it must be all that there is.
    first = max(decisions, key=lambda d: (size(model, d.asked.profile), -decisions.index(d)))
    profile = first.asked.profile
    rest = list(request.profiles)
    rest.remove(profile)
    before = taken(view)
    right = set()
    for index, held in enumerate(before):
        for start in PROFILES[model][profile]["starts"]:
            new = Placement(profile, start, PROFILES[model][profile]["memory"])
            after = [*before[:index], [*held, new], *before[index + 1 :]]
            if goes_with(model, new, held) and room(model, after, rest):
                right.add((index, new))
    assert {(c.gpu, c.placement) for c in first.candidates} == right
    assert len(first.candidates) == len(right)


def size(model: str, profile: str) -> tuple[int, int]:
    return PROFILES[model][profile]["memory"], PROFILES[model][profile]["compute"]


@settings(max_examples=300)
@given(views(), st.data())
def test_the_built_in_rule_is_the_documented_one(place: tuple[str, View], data: st.DataObject) -> None:
    model, view = place
    profile = data.draw(st.sampled_from(sorted(PROFILES[model])))
    decisions = plan(view, Request(((profile, 1),)), None)
    if decisions is None:
        return
    plain = [p for p in PROFILES[model].values() if p["name"].endswith("gb")]

    def rank(candidate: Candidate) -> tuple[int, int, bool, int, int]:
        """Best-fit GPU, then the slot that blocks the fewest placements, then reuse; the lowest GPU, then start."""
        full = {s for p in taken(view)[candidate.gpu] for s in range(p.start, p.start + p.size)}
        mine = set(range(candidate.placement.start, candidate.placement.start + candidate.placement.size))
        free = DATA[model]["slots"] - len(full)
        blocked = 0
        for p in plain:
            for start in p["starts"]:
                slices = set(range(start, start + p["memory"]))
                blocked += bool(slices & mine) and not slices & full
        return free, blocked, not candidate.reuse, candidate.gpu, candidate.placement.start

    (decision,) = decisions
    ranks = [rank(candidate) for candidate in decision.candidates]
    assert rank(decision.choice.candidate) == min(ranks)
    # The scores say the same, but for the last two tie-breaks: higher is better.
    scores = decision.choice.scores
    for one, two in itertools.pairwise(ranks):
        better = scores[ranks.index(one)] - scores[ranks.index(two)]
        assert (better > 0, better < 0) == (one[:3] < two[:3], one[:3] > two[:3])


A100 = geometry.load("A100-80GB")


def node(*gpus: tuple[str, str, str]) -> View:
    """A node of A100s, each spelled as its busy, idle and blocked placements: `3g@4 1g@0`."""

    def placements(text: str) -> tuple[Placement, ...]:
        pairs = [item.split("@") for item in text.split()]
        return tuple(Placement(A100.find(name).name, int(start), A100.find(name).memory) for name, start in pairs)

    return View(
        tuple(
            GpuView(
                f"GPU-{n}",
                A100,
                tuple(Busy(p, 0.0, None) for p in placements(busy)),
                placements(idle),
                placements(blocked),
            )
            for n, (busy, idle, blocked) in enumerate(gpus)
        ),
        (),
        None,
        0.0,
    )


EMPTY = ("", "", "")


@pytest.mark.parametrize(
    ("gpus", "spec", "expected"),
    [
        ([EMPTY], "1g", "0:1g.10gb@6"),
        ([EMPTY], "2g", "0:2g.20gb@4"),
        ([EMPTY], "3g", "0:3g.40gb@4"),
        ([EMPTY], "1g+me", "0:1g.10gb+me@6"),
        ([EMPTY, ("1g@6", "", "")], "1g", "1:1g.10gb@4"),  # the fuller GPU
        ([EMPTY, ("", "", "1g@6")], "1g", "1:1g.10gb@4"),  # blocked slices make it fuller too
        ([EMPTY, ("", "1g@0", "")], "1g", "0:1g.10gb@6"),  # idle ones do not; the better slot beats reuse
        ([EMPTY, ("", "1g@6", "")], "1g", "1:1g.10gb@6+"),  # reuse breaks the tie, before the GPU's number
        ([("", "1g@6 1g@5", "")], "1g", "0:1g.10gb@6+"),
        ([("", "1g@4", "")], "3g", "0:3g.40gb@4-1g.10gb@4"),
        ([("3g@4", "1g@1", "")], "7g", None),
        ([("3g@4", "", ""), ("", "1g@6", "")], "7g", "1:7g.80gb@0-1g.10gb@6"),
        ([("1g+me@0", "", "")], "1g+me", None),
        ([("", "1g+me@0", "")], "1g+me", "0:1g.10gb+me@6-1g.10gb+me@0"),
        ([EMPTY], "3g,1g:2,1g.20gb", "0:3g.40gb@4 0:1g.10gb@2 0:1g.10gb@3 0:1g.20gb@0"),
        ([EMPTY, EMPTY], "7g:2", "0:7g.80gb@0 1:7g.80gb@0"),
        ([EMPTY, EMPTY], "4g,3g,4g,3g", "0:4g.40gb@0 0:3g.40gb@4 1:4g.40gb@0 1:3g.40gb@4"),
        ([EMPTY], "4g:2", None),
        ([EMPTY], "1g:7,1g+me", None),
    ],
)
def test_examples(gpus: list[tuple[str, str, str]], spec: str, expected: str | None) -> None:
    request = parse(spec, A100)
    decisions = plan(node(*gpus), request, None)
    if decisions is None:
        assert expected is None
        return
    texts: dict[str, list[str]] = {}
    for d in decisions:
        c = d.choice.candidate
        gone = "".join(f"-{p.profile}@{p.start}" for p in c.destroys)
        text = f"{c.gpu}:{c.placement.profile}@{c.placement.start}{'+' if c.reuse else ''}{gone}"
        texts.setdefault(c.placement.profile, []).append(text)
    assert expected is not None
    # Several of one profile are alike to the job: their order among themselves is not fixed.
    assert sorted(t for found in texts.values() for t in found) == sorted(expected.split())


BROKEN: dict[str, Callable[[View, Asked, Sequence[Candidate]], Any]] = {
    "raises": lambda view, asked, offered: 1 // 0,
    "raises without words": lambda view, asked, offered: next(iter(())),
    "answers nothing": lambda view, asked, offered: None,
    "answers another thing": lambda view, asked, offered: "the first one",
    "recurses": lambda view, asked, offered: BROKEN["recurses"](view, asked, tuple(offered)),
    "makes up a place": lambda view, asked, offered: built_in(view, asked, offered)._replace(
        candidate=Candidate(0, Placement("1g.10gb", 7, 1), False, ())
    ),
    "makes up a GPU": lambda view, asked, offered: built_in(view, asked, offered)._replace(
        candidate=offered[0]._replace(gpu=17)
    ),
    "destroys more": lambda view, asked, offered: built_in(view, asked, offered)._replace(
        candidate=offered[0]._replace(destroys=(Placement("3g.40gb", 4, 4),))
    ),
    "chooses the busy one": lambda view, asked, offered: built_in(view, asked, offered)._replace(
        candidate=Candidate(0, Placement("3g.40gb", 4, 4), True, ())
    ),
    "tampers with what is offered": lambda view, asked, offered: offered.clear(),  # type: ignore[attr-defined]
    "has no scores": lambda view, asked, offered: built_in(view, asked, offered)._replace(scores=()),
    "has odd scores": lambda view, asked, offered: built_in(view, asked, offered)._replace(scores=None),  # type: ignore[arg-type]
    "wants nonsense": lambda view, asked, offered: built_in(view, asked, offered)._replace(wanted=("3g",)),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_policy_is_replaced(name: str) -> None:
    view = node(("3g@4", "2g@0", ""), EMPTY)
    for spec in ("1g", "2g,1g:3"):
        request = parse(spec, A100)
        right = plan(view, request, None)
        decisions = plan(view, request, None, BROKEN[name])
        assert right is not None
        assert decisions is not None
        assert [d.choice.candidate for d in decisions] == [d.choice.candidate for d in right]
        for decision in decisions:
            assert decision.choice.source == "built-in"
            assert decision.choice.fault.endswith("; the built-in rule stands in"), "it must say what went wrong"


def test_a_policy_decides() -> None:
    seen = []

    def last(view: View, asked: Asked, offered: Sequence[Candidate]) -> Choice:
        seen.append((asked, len(view.gpus)))
        scores = tuple(float(i) for i in range(len(offered)))
        return Choice(offered[-1], scores, "the last", "test", "abc", (offered[-1].placement,))

    decisions = plan(node(EMPTY, EMPTY), parse("1g:2,3g", A100), 77.0, last)
    assert decisions is not None
    assert {d.choice.source for d in decisions} == {"test"}
    assert [d.choice.candidate.gpu for d in decisions] == [1, 1, 1]
    assert seen == [(Asked("3g.40gb", 77.0), 2), (Asked("1g.10gb", 77.0), 2), (Asked("1g.10gb", 77.0), 2)]


def test_an_equal_answer_of_another_type_is_taken_as_what_was_offered() -> None:
    def floating(view: View, asked: Asked, offered: Sequence[Candidate]) -> Choice:
        choice = built_in(view, asked, offered)
        return choice._replace(candidate=choice.candidate._replace(gpu=float(choice.candidate.gpu), reuse=0))  # type: ignore[arg-type]

    decisions = plan(node(EMPTY, EMPTY), parse("1g:2", A100), None, floating)
    assert decisions is not None
    assert all(type(d.choice.candidate.gpu) is int for d in decisions)


@pytest.mark.timed
@pytest.mark.parametrize(
    ("model", "spec", "possible"),
    [
        ("A100-80GB", "1g:56", True),
        ("A100-80GB", "1g:57", False),
        ("A100-80GB", "1g:999", False),
        ("A100-80GB", "1g.20gb:32", True),
        ("A100-80GB", "1g:8,1g.20gb:8,2g:8,1g+me:4,3g:3,4g:1", True),
        ("H100-80GB", "1g:999,1g.20gb:999,2g:999,3g:999,4g:999,7g:999,1g+me:999", False),
        ("A30", "1g:32", True),
        ("RTX-PRO-6000", "1g:32", True),
        ("RTX-PRO-6000", "1g:17,2g:10", False),
    ],
)
def test_big_requests_stay_fast(model: str, spec: str, possible: bool) -> None:
    known = geometry.load(model)
    view = View(tuple(GpuView(f"GPU-{n}", known) for n in range(8)), (), None, 0.0)
    began = time.process_time()
    decisions = plan(view, parse(spec, known), None)
    seconds = time.process_time() - began
    assert (decisions is not None) == possible
    assert seconds < 1
    if decisions is not None:
        check(model, view, parse(spec, known), decisions)


def test_the_worst_known_request_takes_seconds_not_minutes() -> None:
    # Six profiles, nearly every slice of 8 GPUs, nothing that a quick packing finds: it took half a minute once.
    known = geometry.load("H100-80GB")
    view = View(tuple(GpuView(f"GPU-{n}", known) for n in range(8)), (), None, 0.0)
    request = parse("2g.20gb:3,4g.40gb:4,1g.20gb:7,1g.10gb+me:5,1g.10gb:5,3g.40gb:4", known)
    began = time.process_time()
    decisions = plan(view, request, None)
    assert time.process_time() - began < 8
    assert decisions is not None
    check("H100-80GB", view, request, decisions)


def test_gpus_of_two_models() -> None:
    a30 = geometry.load("A30")
    view = View((GpuView("GPU-0", a30), GpuView("GPU-1", A100)), (), None, 0.0)
    decisions = plan(view, Request((("1g.6gb", 4), ("3g.40gb", 2))), None)
    assert decisions is not None
    assert [d.choice.candidate.gpu for d in decisions] == [0, 0, 0, 0, 1, 1]
    assert plan(view, Request((("1g.6gb", 5),)), None) is None
    assert plan(view, Request((("3g.40gb", 3),)), None) is None
    assert plan(view, Request((("9g.99gb", 1),)), None) is None


def test_a_gpu_without_room_takes_nothing_from_the_others() -> None:
    broken = node(("3g@4", "", ""), EMPTY)
    view = broken._replace(gpus=(broken.gpus[0].without_room(), broken.gpus[1]))
    assert fits(view, parse("7g", A100))
    assert fits(view, parse("1g:7", A100))
    assert not fits(view, parse("1g:8", A100))


@settings(max_examples=100)
@example([EMPTY, ("3g@4", "1g@0", "")])
@given(st.lists(st.sampled_from([EMPTY, ("3g@4", "1g@0", ""), ("", "7g@0", ""), ("1g@6", "", "2g@0")]), min_size=1))
def test_planning_is_pure(gpus: list[tuple[str, str, str]]) -> None:
    request = parse("2g,1g:2", A100)
    assert plan(node(*gpus), request, None) == plan(node(*gpus), request, None)
