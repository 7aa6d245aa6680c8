"""Deciding: which GPU and placement a request gets. Pure: no file, clock, lock or random number behind it.

`plan` makes the candidates, asks a policy (`Choose`) for one instance at a time and checks its answer; only candidates
after which the rest of the request still fits are offered, so a request succeeds exactly when it can. The policy
chooses where, never whether.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from math import inf
from operator import add, mul
from typing import Any, NamedTuple

from rms.geometry import Counts, Geometry, Layout, Placement, undominated
from rms.request import Request


class Busy(NamedTuple):
    """An instance that a job holds. `start` and `end` (expected, from the time limit; None if unknown) are epochs."""

    placement: Placement
    start: float
    end: float | None


class GpuView(NamedTuple):
    """One GPU as a policy sees it. `busy` are a job's, also those that are being made for it; `idle` instances exist,
    belong to nobody and may be reused or destroyed; `blocked` places are taken but not a job's, as if quarantined."""

    uuid: str
    geometry: Geometry
    busy: tuple[Busy, ...] = ()
    idle: tuple[Placement, ...] = ()
    blocked: tuple[Placement, ...] = ()

    @property
    def taken(self) -> Layout:
        """The placements that nothing can be made over."""
        return (*(b.placement for b in self.busy), *self.blocked)

    def without_room(self) -> GpuView:
        """The same GPU, offering nothing."""
        whole = max((p for name in self.geometry.by_name for p in self.geometry.placements(name)), key=lambda p: p.size)
        return self._replace(idle=(), blocked=(whole,))


class Demand(NamedTuple):
    """One request that the node has seen, or that waits in the queue: when it was submitted (epoch), what it asks,
    its time limit in seconds (None if unknown)."""

    submit: float
    request: Request
    limit: float | None


class Ended(NamedTuple):
    """A job that is over: for how long it ran, and its time limit, both in seconds."""

    ran: float
    limit: float


class View(NamedTuple):
    """All that a policy may use. `pending` is None where the queue is not known; `ended` are the last jobs that had a
    time limit and are over. `now` is an epoch; the answer must be there by `until` (time.monotonic)."""

    gpus: tuple[GpuView, ...]
    recent: tuple[Demand, ...]
    pending: tuple[Demand, ...] | None
    now: float
    ended: tuple[Ended, ...] = ()
    until: float = inf


class Kept(NamedTuple):
    """Where a request that does not fit now will fit first: places by GPU (index in the view), and when they will be
    free (epoch; None where a job in the way has no time limit)."""

    places: tuple[tuple[int, Placement], ...]
    free: float | None


class Asked(NamedTuple):
    """The one instance that is being placed: its profile, and when its job should end (epoch, None if unknown)."""

    profile: str
    end: float | None


class Candidate(NamedTuple):
    """A way to serve an instance: `gpu` is the index in the view, `destroys` the idle instances in its way."""

    gpu: int
    placement: Placement
    reuse: bool
    destroys: tuple[Placement, ...]


class Choice(NamedTuple):
    """What a policy decided. `scores`, one per candidate, higher is better; `source` names the rule or model, `model`
    is the hash of its weights if it has any; `wanted` is the layout that it has in mind for that GPU. `basis` is what
    it went by beside the GPUs, the same for each instance of a request: for the audit log, from which the decision can
    be made again. `fault` says why not the policy decided that should have, where that is so."""

    candidate: Candidate
    scores: tuple[float, ...]
    reason: str
    source: str
    model: str | None
    wanted: Layout
    basis: Mapping[str, Any] | None = None
    fault: str = ""


BUILT_IN = "built-in"
"""The source of what the rule here has decided."""

Choose = Callable[[View, Asked, Sequence[Candidate]], Choice]


class Decision(NamedTuple):
    """One instance of a plan: what was asked, what could have been chosen, what was, what the built-in rule would."""

    asked: Asked
    candidates: tuple[Candidate, ...]
    choice: Choice
    rule: Candidate


def built_in(view: View, asked: Asked, candidates: Sequence[Candidate]) -> Choice:
    """Best-fit GPU, then the slot that blocks the fewest placements, then reuse; ties to the lowest GPU, then start.

    Blocking is counted over the plain profiles' placements that are possible now. The weights only put the three
    criteria one after the other: a GPU has at most 12 slices and fewer than 50 plain placements.
    """
    scores = []
    for candidate in candidates:
        gpu = view.gpus[candidate.gpu]
        taken = 0
        for placement in gpu.taken:
            taken |= placement.mask
        free = gpu.geometry.slots - taken.bit_count()
        blocked = sum(
            1
            for profile in gpu.geometry.profiles
            if profile.plain
            for p in gpu.geometry.placements(profile.name)
            if p.mask & candidate.placement.mask and not p.mask & taken
        )
        scores.append(-float(free * 100 + blocked + (0 if candidate.reuse else 0.5)))
    best = min(range(len(candidates)), key=lambda i: (-scores[i], candidates[i].gpu, candidates[i].placement.start))
    chosen = candidates[best]
    wanted = fill(view.gpus[chosen.gpu], chosen.placement)
    return Choice(chosen, tuple(scores), "best-fit GPU, least-blocking slot", BUILT_IN, None, wanted)


def fill(gpu: GpuView, new: Placement) -> Layout:
    """The layout to expect on a GPU that gets `new`: what is taken, and more of the same, then the largest that fit."""
    held = [*gpu.taken, new]
    base = gpu.geometry.base()
    for profile in (new.profile, *reversed(base)):
        while free := gpu.geometry.legal(profile, held):
            held.append(free[0])
    return tuple(sorted(held, key=lambda p: p.start))


def candidates(view: View, profile: str) -> list[Candidate]:
    """Every way to serve one instance of `profile` now, by GPU and start."""
    found = []
    for index, gpu in enumerate(view.gpus):
        if profile not in gpu.geometry.by_name:
            continue
        for placement in gpu.geometry.legal(profile, gpu.taken):
            if placement in gpu.idle:
                found.append(Candidate(index, placement, True, ()))
            else:
                found.append(Candidate(index, placement, False, in_the_way(gpu, placement)))
    return found


def in_the_way(gpu: GpuView, placement: Placement) -> tuple[Placement, ...]:
    """The idle instances that must be destroyed for another one to be made."""
    doomed = [idle for idle in gpu.idle if idle.mask & placement.mask]
    spared = [idle for idle in gpu.idle if not idle.mask & placement.mask]
    # A profile's count (or the one set of media engines) may be used up by idle instances elsewhere on the GPU.
    while placement not in gpu.geometry.legal(placement.profile, (*gpu.taken, *spared)):
        wanted = gpu.geometry.by_name[placement.profile]
        rival = next(
            idle
            for idle in reversed(spared)
            if idle.profile == placement.profile or (wanted.media and gpu.geometry.by_name[idle.profile].media)
        )
        spared.remove(rival)
        doomed.append(rival)
    return tuple(doomed)


def fits(view: View, request: Request) -> bool:
    """Whether the whole request can be placed at once, idle instances destroyed where they are in the way. Exact."""
    # Sums and a quick packing answer most questions; only where they do not are all layouts looked at.
    return _within(view, request) and (_packs(view, request) or _reaches(view, request))


def first_room(view: View, request: Request) -> Kept | None:
    """Where `request` will fit first, going by the ends of the jobs; None if not even with all of them gone."""
    ends = sorted({max(b.end, view.now) for gpu in view.gpus for b in gpu.busy if b.end is not None})
    moments = [view.now, *ends, None]

    def at(moment: float | None) -> View:
        def stays(busy: Busy) -> bool:
            return moment is not None and (busy.end is None or busy.end > moment or moment == view.now)

        gpus = (gpu._replace(busy=tuple(b for b in gpu.busy if stays(b))) for gpu in view.gpus)
        return view._replace(gpus=tuple(gpus))

    # With each end there is more room, never less.
    first = bisect_left(moments, True, key=lambda moment: fits(at(moment), request))
    decisions = plan(at(moments[first]), request, None) if first < len(moments) else None
    if decisions is None:
        return None
    chosen = (decision.choice.candidate for decision in decisions)
    return Kept(tuple((c.gpu, c.placement) for c in chosen), moments[first])


def beside(view: View, kept: Kept, end: float | None) -> View:
    """What a job that ends at `end` may use while `kept` is kept for another one: all, if it is gone by then."""
    if end is not None and kept.free is not None and end <= kept.free:
        return view
    gpus = list(view.gpus)
    for index, place in kept.places:
        gpu = gpus[index]
        if place in gpu.geometry.legal(place.profile, gpu.taken):
            filling = [place]
        elif gpu.geometry.by_name[place.profile].media:  # slices would not do: somebody else could take the engines
            gpus[index] = gpu.without_room()
            continue
        else:  # what is free of it, by instances as small as there are: they are legal beside the busy ones
            small = min((p for p in gpu.geometry.profiles if p.plain), key=lambda p: (p.memory, p.compute)).name
            filling = [p for p in gpu.geometry.legal(small, gpu.taken) if p.mask & place.mask]
        idle = tuple(i for i in gpu.idle if gpu.geometry.by_name[i.profile].media or not i.mask & place.mask)
        gpus[index] = gpu._replace(blocked=(*gpu.blocked, *filling), idle=idle)
    return view._replace(gpus=tuple(gpus))


def _within(view: View, request: Request) -> bool:
    """Whether the slices suffice by their sums, which is necessary: it refuses at once what is far too much."""
    return all(
        sum(count * _least(view, profile)[kind] for profile, count in request.items)
        <= sum(_free(g)[kind] for g in view.gpus)
        for kind in (0, 1)
    )


def _least(view: View, profile: str) -> tuple[int, int]:
    """Memory and compute slices of a profile, on the GPU where it takes least; more than any has if it is unknown."""
    known = [gpu.geometry.by_name[profile] for gpu in view.gpus if profile in gpu.geometry.by_name]
    return min((p.memory for p in known), default=99), min((p.compute for p in known), default=99)


def _free(gpu: GpuView) -> tuple[int, int]:
    """Memory and compute slices that nobody has, or more."""
    mask = 0
    for placement in gpu.taken:
        mask |= placement.mask
    compute = max(p.compute for p in gpu.geometry.profiles)
    if sum(p.size for p in gpu.taken) == mask.bit_count():  # else some overlap: a GPU that offers nothing has a blocker
        compute -= sum(gpu.geometry.by_name[p.profile].compute for p in gpu.taken)
    return gpu.geometry.slots - mask.bit_count(), compute


def _packs(view: View, request: Request) -> bool:
    # Largest first, each at the highest start that any GPU has free: high slices are the ones that block least.
    held = [list(gpu.taken) for gpu in view.gpus]
    for profile in sorted(request.profiles, key=lambda name: _size(view, name), reverse=True):
        best = (-1, 0)
        for index, gpu in enumerate(view.gpus):
            free = gpu.geometry.legal(profile, held[index]) if profile in gpu.geometry.by_name else []
            if free and free[-1].start > best[0]:
                best = (free[-1].start, index)
        if best[0] < 0:
            return False
        geometry = view.gpus[best[1]].geometry
        held[best[1]].append(Placement(profile, best[0], geometry.by_name[profile].memory))
    return True


def _reaches(view: View, request: Request) -> bool:
    names = [profile for profile, _ in request.items]
    counts = request.counts
    least = [_least(view, profile) for profile in names]
    later = [_free(gpu) for gpu in view.gpus]
    reach: set[Counts] = {(0,) * len(names)}
    for gpu in view.gpus:
        # A profile that this model lacks is wanted zero times of it; any name stands in for it.
        here = tuple(name if name in gpu.geometry.by_name else gpu.geometry.profiles[0].name for name in names)
        wanted = tuple(c if name in gpu.geometry.by_name else 0 for name, c in request.items)
        alone = _holds(gpu.geometry, here, wanted, frozenset(gpu.taken))
        sums = {tuple(map(min, map(add, x, y), counts)) for x in reach for y in alone}
        if counts in sums:
            return True
        # What the GPUs to come can't make up for, by the sums of their slices, leads nowhere.
        later = later[1:]
        for kind in (0, 1):
            room = sum(free[kind] for free in later)
            need = [size[kind] for size in least]
            most = sum(map(mul, counts, need)) - room
            sums = {found for found in sums if sum(map(mul, found, need)) >= most}
        reach = undominated(sums)
    return False


@lru_cache(maxsize=1024)
def _holds(geometry: Geometry, profiles: tuple[str, ...], wanted: Counts, taken: frozenset[Placement]) -> set[Counts]:
    # The GPUs of a node are often alike, and most stay the same from one instance of a request to the next.
    return geometry.frontier(profiles, wanted, taken)


def _size(view: View, profile: str) -> tuple[int, int]:
    for gpu in view.gpus:
        if known := gpu.geometry.by_name.get(profile):
            return known.memory, known.compute
    return 0, 0


def plan(view: View, request: Request, end: float | None, choose: Choose = built_in) -> list[Decision] | None:
    """A decision for each instance, in the order of `request.profiles`; None if the request does not fit now.

    `end` is when the job is expected to end (epoch, None if unknown). Instances are placed largest first. A policy that
    fails or answers with something that was not offered is replaced by the built-in rule, which its `fault` then says.
    """
    if not fits(view, request):
        return None
    order = turns(view, request)
    decisions: list[Decision | None] = [None] * len(order)
    left = dict(request.items)
    for position in order:
        profile = request.profiles[position]
        left[profile] -= 1
        rest = Request(tuple((name, count) for name, count in left.items() if count))
        offered = tuple(_leaving_room(view, candidates(view, profile), rest, end))
        choice = _checked(view, Asked(profile, end), offered, choose)
        own = choice.source == BUILT_IN
        rule = choice.candidate if own else built_in(view, Asked(profile, end), offered).candidate
        decisions[position] = Decision(Asked(profile, end), offered, choice, rule)
        view = after(view, choice.candidate, end)
    return [decision for decision in decisions if decision is not None]


def turns(view: View, request: Request) -> list[int]:
    """The order in which the instances of a request are placed, by their places in `request.profiles`."""
    return sorted(range(len(request.profiles)), key=lambda i: _size(view, request.profiles[i]), reverse=True)


def _leaving_room(view: View, found: list[Candidate], rest: Request, end: float | None) -> list[Candidate]:
    if not rest.items:
        return found
    known: dict[tuple[frozenset[Placement], Placement], bool] = {}  # GPUs in the same state answer alike
    kept = []
    for candidate in found:
        gpu = view.gpus[candidate.gpu]
        key = (frozenset(gpu.taken), candidate.placement)
        if key not in known:
            known[key] = fits(after(view, candidate, end), rest)
        if known[key]:
            kept.append(candidate)
    return kept


def _checked(view: View, asked: Asked, offered: Sequence[Candidate], choose: Choose) -> Choice:
    try:
        choice = choose(view, asked, offered)
        if choice.candidate not in offered:
            fault = f"{choice.source} chose what was not offered"
        elif len(choice.scores) != len(offered) or not all(isinstance(p, Placement) for p in choice.wanted):
            fault = f"{choice.source} left out scores, or wants what is no layout"
        else:
            return choice._replace(candidate=offered[offered.index(choice.candidate)])
    except Exception as error:  # whatever a policy does wrong, the job still gets its instance
        fault = f"policy failed: {type(error).__name__}: {error}"
    safe = built_in(view, asked, offered)
    return safe._replace(fault=f"{fault}; the built-in rule stands in")


def after(view: View, candidate: Candidate, end: float | None) -> View:
    """The view once a candidate is taken by a job that ends at `end` (epoch, None if unknown)."""
    gpu = view.gpus[candidate.gpu]
    gone = (*candidate.destroys, candidate.placement)
    changed = gpu._replace(
        busy=(*gpu.busy, Busy(candidate.placement, view.now, end)),
        idle=tuple(idle for idle in gpu.idle if idle not in gone),
    )
    return view._replace(gpus=(*view.gpus[: candidate.gpu], changed, *view.gpus[candidate.gpu + 1 :]))
