"""The inventory: which instances exist, which run owns which, and what is being changed just now.

Plain data and pure transitions on it; `rms.store` keeps it in a file, `controller.py` decides when to change it.
Instances are known by a *generation*, a number given once and never again: GI ids and MIG UUIDs come back for the
next instance at the same place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, TypeVar

from rms import planner
from rms.device import DeviceInstance
from rms.errors import RequestError
from rms.geometry import Geometry, Placement
from rms.planner import Busy, Decision, Demand, Ended, GpuView, View
from rms.request import Request, parse

SCHEMA = 3
"""Of the state file. It counts up with all that is written differently, also a field more: an older RMS then says that
it does not know this state, and does not take it for damaged. A newer one reads every older schema."""
RECENT = 256
"""How many requests, and how many ended jobs, the state remembers for the policy's estimate of demand."""
SPARED_SECONDS = 600.0
"""An idle instance that was used or made since is not destroyed to prewarm another one."""
CLOSED = 1000
"""Released runs that are remembered, newest first, so that a late Prolog of one gets nothing."""

FIRST_RETRY, LAST_RETRY = 10.0, 600.0
"""Seconds until what the hardware refused is tried again: twice as long each time, up to the last."""

Answer = TypeVar("Answer")
Status = Literal["idle", "busy", "making", "removing", "quarantined"]

Trouble = Literal["", "held", "refused", "half-made", "foreign", "lost"]
"""What is wrong with an instance. All but the last are reasons for quarantine:

held       a process holds it, or might for all that the GPU says: idle again as soon as that is over
refused    the GPU would not destroy it, and nobody is seen to hold it: tried again later
half-made  a GPU instance of ours that lacks its compute instance: removed as soon as the GPU lets us
foreign    somebody else's: half-made, cut up, or on the place of a lost one. The administrator's to remove
lost       it vanished under the run that has it: the place stays that run's until it ends
"""


class Run(NamedTuple):
    """One run of a job. A requeued job keeps its id and counts its restarts."""

    cluster: str
    job: int
    restart: int

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}"


NOBODY = Run("", 0, 0)
"""The run of an intent to prewarm."""


class Owner(NamedTuple):
    """The process that works on an intent: a pid alone could be another process's by now."""

    pid: int
    started: int

    @classmethod
    def me(cls) -> Owner:
        """The calling process."""
        return cls(os.getpid(), process_started(os.getpid()) or 0)

    def alive(self) -> bool:
        """Whether that process still runs."""
        return process_started(self.pid) == self.started


def process_started(pid: int) -> int | None:
    """When a process started, in clock ticks since boot; None if there is none (a zombie is none)."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return None if fields[0] == b"Z" else int(fields[19])


@dataclass
class Instance:
    """One instance, or the place of one that is being made (`gi`, `ci`, `uuid` None until it exists).

    `intent` is the number of the intent that is changing it; `trouble` is what is wrong with it, if anything is, and
    `note` tells people more; `used` is when a job last had it or it was made (epoch); `prewarmed`: made ahead of time,
    and no job has had it yet.
    """

    generation: int
    placement: Placement
    status: Status
    gi: int | None = None
    ci: int | None = None
    uuid: str | None = None
    intent: int | None = None
    used: float = 0.0
    trouble: Trouble = ""
    note: str = ""
    prewarmed: bool = False


@dataclass
class Gpu:
    """One managed GPU. `doubt` says why its records must be compared with the hardware before they are believed;
    `fault` why it is not offered at all. `left`: the config no longer names it, but a job still holds an instance.
    `model` is that of another GPU of the node as long as this one has never answered. `tries` counts how often what is
    wrong with it was looked at in vain, `retry` is when to look again (epoch), `looked` when the last look that took
    long has begun (time.monotonic)."""

    uuid: str
    model: str
    instances: list[Instance] = field(default_factory=list)
    doubt: str = ""
    fault: str = ""
    left: bool = False
    tries: int = 0
    retry: float = 0.0
    looked: float = 0.0


@dataclass
class Allocation:
    """Which run holds which instances (generations, in the order of the request). Times are epochs, `limit` is minutes.

    It counts once `granted`; before that, and while it is released, an intent is at work on it.
    """

    run: Run
    uid: int
    request: str
    submit: int | None
    limit: int | None
    started: float
    boot_id: str
    instances: list[int]
    granted: bool = False


@dataclass
class Intent:
    """A change of the hardware that has been decided, and reserved, but whose outcome is not saved yet.

    One to prewarm reserves nothing: who needs its GPU sets `yielding`, and waits until its next operation has ended.
    """

    number: int
    kind: Literal["acquire", "release", "prewarm"]
    run: Run
    owner: Owner
    yielding: bool = False


@dataclass
class State:
    """All of it. `managed` is the config's list of GPUs when they were last read; `counter` gives generations and
    intents their numbers; `closed` maps a job to the last restart that was released and when; `recent` holds submit
    time, request and limit (minutes) of the last requests, `ended` for how many seconds the last jobs with a limit
    (minutes) held their instances; `prewarmed` how many instances were made ahead of time, and how many of these a job
    has had."""

    boot_id: str = ""
    managed: list[str | int] = field(default_factory=list)
    counter: int = 0
    gpus: list[Gpu] = field(default_factory=list)
    geometries: dict[str, Geometry] = field(default_factory=dict)
    allocations: list[Allocation] = field(default_factory=list)
    intents: list[Intent] = field(default_factory=list)
    closed: dict[int, tuple[int, float]] = field(default_factory=dict)
    recent: list[tuple[float, str, int | None]] = field(default_factory=list)
    ended: list[tuple[float, int]] = field(default_factory=list)
    prewarmed: tuple[int, int] = (0, 0)

    def number(self) -> int:
        """The next generation or intent number."""
        self.counter += 1
        return self.counter

    def gpu(self, uuid: str) -> Gpu:
        """The record of a GPU."""
        return next(gpu for gpu in self.gpus if gpu.uuid == uuid)

    def of_run(self, run: Run) -> Allocation | None:
        """The allocation of a run, if it has one."""
        return next((a for a in self.allocations if a.run == run), None)

    def of_job(self, run: Run) -> list[Allocation]:
        """All allocations of the run's job."""
        return [a for a in self.allocations if (a.run.cluster, a.run.job) == (run.cluster, run.job)]

    def held(self, allocation: Allocation) -> list[tuple[Gpu, Instance]]:
        """The instances of an allocation with their GPUs, in the order of the request."""
        known = {i.generation: (gpu, i) for gpu in self.gpus for i in gpu.instances}
        return [known[generation] for generation in allocation.instances if generation in known]

    def touched(self, intent: Intent) -> list[str]:
        """UUIDs of the GPUs that an intent works on."""
        return [gpu.uuid for gpu in self.gpus if any(i.intent == intent.number for i in gpu.instances)]

    def close(self, run: Run, now: float) -> None:
        """Remember that a run is over."""
        last = self.closed.pop(run.job, (0, 0.0))[0]
        self.closed[run.job] = (max(last, run.restart), now)  # moves to the end: the dict is in order of closing
        for job in list(self.closed)[: -CLOSED or None]:
            del self.closed[job]


def to_json(state: State) -> str:
    """The state as JSON text."""

    def plain(value: Any) -> Any:
        return value.to_json() if isinstance(value, Geometry) else vars(value)

    return json.dumps({"schema": SCHEMA, **vars(state)}, default=plain, separators=(",", ":"))


def from_json(data: dict[str, Any]) -> State:
    """The state from the object that `to_json` spelled, of this schema or an older one (what that lacks is as new).

    Raises KeyError, TypeError or ValueError on anything else.
    """
    if data["schema"] < 2:
        _from_schema_1(data)
    made, used = data.get("prewarmed", (0, 0))
    return State(
        boot_id=data["boot_id"],
        managed=data["managed"],
        counter=data["counter"],
        gpus=[
            Gpu(
                **{
                    **g,
                    "instances": [Instance(**{**i, "placement": Placement(*i["placement"])}) for i in g["instances"]],
                }
            )
            for g in data["gpus"]
        ],
        geometries={model: Geometry.from_json(model, g) for model, g in data["geometries"].items()},
        allocations=[Allocation(**{**a, "run": Run(*a["run"])}) for a in data["allocations"]],
        intents=[Intent(**{**i, "run": Run(*i["run"]), "owner": Owner(*i["owner"])}) for i in data["intents"]],
        closed={int(job): (restart, when) for job, (restart, when) in data["closed"].items()},
        recent=[(when, request, limit) for when, request, limit in data["recent"]],
        ended=[(float(ran), int(limit)) for ran, limit in data.get("ended", [])],
        prewarmed=(int(made), int(used)),
    )


def _from_schema_1(data: dict[str, Any]) -> None:
    # What was wrong stood in the notes only.
    for gpu in data["gpus"]:
        gpu["left"] = gpu["fault"] == "no longer in the configuration"
        for instance in gpu["instances"]:
            known: dict[str, Trouble] = {"": "", "half-made": "half-made", "half-made, and not by RMS": "foreign"}
            instance["trouble"] = known.get(instance["note"], "held")


def view(state: State, now: float) -> View:
    """What a policy may see. GPUs with a fault offer no room: all their slices are blocked."""
    runs = {generation: a for a in state.allocations for generation in a.instances}
    prewarming = {intent.number for intent in state.intents if intent.kind == "prewarm"}
    gpus = []
    for gpu in state.gpus:
        geometry = state.geometries[gpu.model]
        if gpu.fault:
            gpus.append(GpuView(gpu.uuid, geometry).without_room())
            continue
        busy, idle, blocked = [], [], []
        for instance in gpu.instances:
            if instance.status == "busy" and (run := runs.get(instance.generation)):
                busy.append(Busy(instance.placement, run.started, run.started + run.limit * 60 if run.limit else None))
            elif instance.status == "idle":
                idle.append(instance.placement)
            elif instance.status == "removing" or instance.intent in prewarming:
                continue  # free as soon as who is at work there has ended or yielded: `ahead`, `prewarming`
            else:
                blocked.append(instance.placement)
        gpus.append(GpuView(gpu.uuid, geometry, tuple(busy), tuple(idle), tuple(blocked)))
    ended = tuple(Ended(ran, limit * 60.0) for ran, limit in state.ended)
    return View(tuple(gpus), tuple(_recent(state)), None, now, ended)


def _recent(state: State) -> Iterable[Demand]:
    known: dict[str, Request | None] = {}
    for when, text, limit in state.recent:
        if text not in known:
            known[text] = None
            with suppress(RequestError):  # of another model, before the node's GPUs were changed
                known[text] = parse(text, next(iter(state.geometries.values())))
        if request := known[text]:
            yield Demand(when, request, limit * 60 if limit else None)


def reserve(state: State, decisions: Sequence[Decision], allocation: Allocation, owner: Owner) -> Intent:
    """Save a plan as an intent: from now on nobody else can plan with these slices."""
    intent = Intent(state.number(), "acquire", allocation.run, owner)
    for decision in decisions:
        candidate = decision.choice.candidate
        gpu = state.gpus[candidate.gpu]
        idle = {i.placement: i for i in gpu.instances if i.status == "idle"}
        for placement in candidate.destroys:
            idle[placement].status, idle[placement].intent = "removing", intent.number
        if candidate.reuse:
            instance = idle[candidate.placement]
            instance.status, instance.intent = "busy", intent.number
        else:
            instance = Instance(state.number(), candidate.placement, "making", intent=intent.number)
            gpu.instances.append(instance)
        allocation.instances.append(instance.generation)
    state.allocations.append(allocation)
    state.intents.append(intent)
    return intent


def ahead(state: State, intent: Intent) -> list[Intent]:
    """The intents that must be over before this one's hardware work: they remove instances on the same GPUs.

    They are older, so that no two ever wait for each other.
    """
    gpus = state.touched(intent)
    removing = {i.intent for gpu in state.gpus if gpu.uuid in gpus for i in gpu.instances if i.status == "removing"}
    return [other for other in state.intents if other.number in removing and other.number < intent.number]


def prewarming(state: State, decisions: Iterable[Decision]) -> Intent | None:
    """The intent to prewarm that is at work on a GPU of a plan: it must have ended before that is reserved."""
    gpus = {state.gpus[decision.choice.candidate.gpu].uuid for decision in decisions}
    return next((i for i in state.intents if i.kind == "prewarm" and gpus & set(state.touched(i))), None)


Wish = Callable[[View, int], Sequence[Placement]]
"""What a policy would have idle on a GPU of a view, by its number; what it expects most comes first."""


def begin_prewarm(state: State, view: View, wish: Wish, owner: Owner) -> Intent | None:
    """Mark the first instance of those wished for that can be made without disturbing anybody; None if there is none.

    A GPU where anything is out of order, or being changed, is left alone, and so is what a job has had lately.
    """
    for number, gpu in enumerate(state.gpus):
        out_of_order = gpu.fault or gpu.doubt or gpu.left or gpu.tries
        if out_of_order or any(i.trouble or i.intent is not None for i in gpu.instances):
            continue
        idle = {i.placement: i for i in gpu.instances if i.status == "idle"}
        spared = tuple(place for place, i in idle.items() if view.now - i.used < SPARED_SECONDS)
        seen = view.gpus[number]
        old = tuple(place for place in seen.idle if place not in spared)
        seen = seen._replace(idle=old, blocked=(*seen.blocked, *spared))
        wanted = wish(view._replace(gpus=(*view.gpus[:number], seen, *view.gpus[number + 1 :])), number)
        for placement in (place for place in wanted if place not in idle):
            destroys = planner.in_the_way(seen, placement)
            if not set(wanted) & set(destroys):
                intent = Intent(state.number(), "prewarm", NOBODY, owner)
                for doomed in destroys:
                    idle[doomed].status, idle[doomed].intent = "removing", intent.number
                new = Instance(state.number(), placement, "making", intent=intent.number, prewarmed=True)
                gpu.instances.append(new)
                state.intents.append(intent)
                return intent
    return None


def begin_release(state: State, allocation: Allocation, owner: Owner) -> Intent:
    """Mark a run's instances as being taken back."""
    intent = Intent(state.number(), "release", allocation.run, owner)
    gpus = {gpu.uuid for gpu, _ in state.held(allocation)}
    for other in state.intents:
        other.yielding = other.yielding or (other.kind == "prewarm" and bool(gpus & set(state.touched(other))))
    for _, instance in state.held(allocation):
        instance.intent = intent.number
    state.intents.append(intent)
    return intent


class Step(NamedTuple):
    """One instance that an intent changes; `status` is its status in the inventory meanwhile."""

    gpu: str
    generation: int
    status: Status
    placement: Placement
    gi: int | None
    ci: int | None
    uuid: str | None


def steps(state: State, intent: Intent) -> list[Step]:
    """What an intent has to do, GPU by GPU."""
    return [
        Step(gpu.uuid, i.generation, i.status, i.placement, i.gi, i.ci, i.uuid)
        for gpu in state.gpus
        for i in gpu.instances
        if i.intent == intent.number
    ]


class Outcome(NamedTuple):
    """What the hardware says of one instance after an intent: its ids (all None once it is gone), and why it must not
    be used (`trouble` and `note`, empty if it may)."""

    generation: int
    gi: int | None
    ci: int | None
    uuid: str | None
    trouble: Trouble = ""
    note: str = ""


def conclude(
    state: State,
    intent: Intent,
    outcomes: Iterable[Outcome],
    doubts: Mapping[str, str],
    now: float,
    granted: bool,
) -> None:
    """Save the outcome of an intent. With `granted` the run owns its instances; without, they are idle again.

    `doubts` says for the GPUs that failed meanwhile what they did.
    """
    found = {outcome.generation: outcome for outcome in outcomes}
    allocation = state.of_run(intent.run)
    made, used = state.prewarmed
    owned = set(allocation.instances) if granted and allocation else set()
    for gpu in state.gpus:
        gpu.doubt = doubts.get(gpu.uuid, gpu.doubt)
        for instance in list(gpu.instances):
            if instance.intent != intent.number:
                continue
            instance.intent = None
            if outcome := found.get(instance.generation):
                if instance.status == "busy" and (outcome.gi is None or instance.trouble == "lost"):
                    gpu.doubt = "an instance was lost here"  # somebody may have put another one on its place
                instance.gi, instance.ci, instance.uuid = outcome.gi, outcome.ci, outcome.uuid
                instance.trouble, instance.note = outcome.trouble, outcome.note
            if instance.gi is None and instance.trouble != "half-made":
                gpu.instances.remove(instance)
            elif instance.trouble:
                instance.status = "quarantined"
            else:
                made += instance.status == "making" and intent.kind == "prewarm"
                if instance.status != "removing":
                    instance.used = now
                instance.status = "busy" if instance.generation in owned else "idle"
                if instance.status == "busy" and instance.prewarmed:
                    used, instance.prewarmed = used + 1, False
    state.prewarmed = made, used
    if allocation and granted:
        allocation.granted = True
    elif allocation:
        state.allocations.remove(allocation)
        if allocation.granted and allocation.limit and now > allocation.started:
            state.ended = [*state.ended, (round(now - allocation.started, 1), allocation.limit)][-RECENT:]
    state.intents.remove(intent)


class Claim(NamedTuple):
    """Mending to do before a decision: dead intents taken over, and GPUs to be compared with the hardware."""

    intents: tuple[int, ...]
    gpus: tuple[str, ...]
    places: frozenset[tuple[str, Placement]]
    """GPU and placement of what is ours to remove if it turns out to be half-made."""
    refused: frozenset[tuple[str, Placement]]
    """GPU and placement of whole instances to destroy, which the GPU has refused before."""


def claim(state: State, owner: Owner, now: float, everything: bool = False) -> Claim | None:
    """Take over every intent whose owner is dead; None if there is nothing to mend.

    Their allocations are dropped: one that was being made was never granted, one that was being released is closed.
    What the hardware refused before waits for its time, unless `everything` is to be looked at.
    """
    # An intent of the caller's own is left over from an earlier call of this process: a call begins with none.
    dead = [intent for intent in state.intents if intent.owner == owner or not intent.owner.alive()]
    numbers = tuple(intent.number for intent in dead)
    for intent in dead:
        intent.owner = owner
        if allocation := state.of_run(intent.run):
            state.allocations.remove(allocation)
    gpus, places, refused = [], set(), set()
    for gpu in state.gpus:
        urgent = any(i.intent in numbers or (i.trouble == "held" and not gpu.fault) for i in gpu.instances)
        waits = bool(gpu.fault) or any(i.status == "quarantined" for i in gpu.instances)
        if gpu.left and not any(i.intent in numbers or i.trouble == "held" for i in gpu.instances):
            continue
        if not (everything or urgent or gpu.doubt or gpu.left or (waits and _due(gpu, now))):
            continue
        gpus.append(gpu.uuid)
        for i in gpu.instances:
            # Idle: a destroy may have failed after the compute instance was gone.
            half_gone = i.status == "idle" and (gpu.doubt or gpu.fault)
            if i.intent in numbers or i.trouble == "half-made" or half_gone:
                places.add((gpu.uuid, i.placement))
            elif i.trouble == "refused":
                refused.add((gpu.uuid, i.placement))
    state.intents = [i for i in state.intents if i.number not in numbers or state.touched(i)]
    return Claim(numbers, tuple(gpus), frozenset(places), frozenset(refused)) if numbers or gpus else None


def _due(gpu: Gpu, now: float) -> bool:
    return not now < gpu.retry <= now + LAST_RETRY  # farther away than that: the clock was set back


class Survey(NamedTuple):
    """What the hardware shows of one GPU: its geometry, its instances, and by GI id who holds one, and why the GPU
    would not destroy one."""

    geometry: Geometry
    seen: Sequence[DeviceInstance]
    held: Mapping[int, str]
    refused: Mapping[int, str] = {}


Grants = Mapping[int, tuple[Run, int, str, Sequence[str]]]
"""What jobs were told, by job id: run, uid, request, UUIDs."""


def mend(state: State, gpu: Gpu, survey: Survey | str, dead: Container[int], grants: Grants, now: float) -> list[str]:
    """Make the records of one GPU agree with what the hardware shows, or with that it does not answer (and why).

    `dead` are the intents that were abandoned. Returns a line for each thing that an administrator should know.
    """
    if isinstance(survey, str):
        lines = [*_lose(state, gpu, survey, dead)]
    else:
        gpu.model = survey.geometry.model
        state.geometries[gpu.model] = survey.geometry
        lines = [*_compare(state, gpu, survey, dead, now)]
        _entitle(state, grants, now)  # the inventory may have been rebuilt while this GPU did not answer
    state.intents = [i for i in state.intents if i.number not in dead or state.touched(i)]
    refused = survey.refused if isinstance(survey, Survey) else {}
    if any(i.trouble in ("refused", "half-made") and i.gi not in refused for i in gpu.instances) and not gpu.fault:
        gpu.retry = 0.0  # not tried yet: at once
    elif gpu.fault or any(i.trouble in ("refused", "half-made", "foreign") for i in gpu.instances):
        gpu.retry = now + min(FIRST_RETRY * 2**gpu.tries, LAST_RETRY)
        gpu.tries = min(gpu.tries + 1, 10)
    else:
        gpu.retry, gpu.tries = 0.0, 0
    return lines


def _lose(state: State, gpu: Gpu, fault: str, dead: Container[int]) -> Iterator[str]:
    """A GPU that does not answer: it is not offered, and what its jobs have stays theirs."""
    if gpu.fault != fault and not gpu.left:
        runs = [str(a.run) for a in state.allocations for g, _ in state.held(a) if g is gpu]
        yield f"GPU {gpu.uuid} is not offered: {fault}; " + (
            f"lost with it: run {', '.join(dict.fromkeys(runs))}" if runs else "no run has an instance of it"
        )
    gpu.doubt, gpu.fault = "", fault
    for record in gpu.instances:
        if record.intent is not None and record.intent in dead:
            record.intent = None
            if record.status == "busy":
                record.status = "idle"
            else:  # whatever is left there is ours to remove, once the GPU is back
                record.status, record.trouble, record.note = "quarantined", "half-made", "its GPU did not answer"


def _compare(state: State, gpu: Gpu, survey: Survey, dead: Container[int], now: float) -> Iterator[str]:
    """What RMS does not know is adopted as idle if it is whole and nobody holds it, quarantined otherwise: never
    destroyed. Records of living intents are left alone, and those of runs are never given away."""
    runs = {generation: a.run for a in state.allocations for generation in a.instances}
    there = {instance.placement: instance for instance in survey.seen}
    gpu.doubt, gpu.fault = "", gpu.fault if gpu.left else ""
    free, living, lost = [], 0, 0  # memory slices as bits
    for record in gpu.instances:
        actual = there.get(record.placement)
        if record.intent is not None and record.intent not in dead:
            living |= record.placement.mask
        elif (run := runs.get(record.generation)) is None:
            free.append(record)
        elif actual and (actual.gi, actual.ci, actual.uuid) == (record.gi, record.ci, record.uuid):
            record.trouble, record.note = "", ""
            del there[record.placement]
        else:
            lost |= record.placement.mask
            if record.trouble != "lost":
                record.trouble, record.note = "lost", "it vanished: a reset, a reloaded driver, or by hand"
                yield f"{_where(gpu, record.placement)}: the instance of run {run} is lost; {record.note}"
    for record in free:
        actual = there.pop(record.placement, None)
        record.intent, before = None, record.trouble
        if actual is None:
            gpu.instances.remove(record)
            if before or record.status == "idle":
                how = "removed" if before in ("half-made", "refused") else "gone, by somebody else's hand"
                yield f"{_where(gpu, record.placement)}: {before or 'idle'}, now {how}"
            continue
        record.gi, record.ci, record.uuid = actual.gi, actual.ci, actual.uuid
        record.trouble, record.note = _judge(actual, survey, lost, before or "half-made")
        record.status = "quarantined" if record.trouble else "idle"
        if record.trouble != before:
            yield f"{_where(gpu, record.placement)}: {_fate(record)}"
    for placement, actual in there.items():
        if placement.mask & living:
            continue  # a living intent is at work just there
        trouble, note = _judge(actual, survey, lost, "foreign")
        ids = (actual.gi, actual.ci, actual.uuid)
        new = Instance(state.number(), placement, "quarantined" if trouble else "idle", *ids, None, now, trouble, note)
        gpu.instances.append(new)
        yield f"{_where(gpu, placement)}: not known to RMS; {_fate(new)}"


def _judge(actual: DeviceInstance, survey: Survey, lost: int, before: Trouble) -> tuple[Trouble, str]:
    """What is wrong with an instance that no run has. `lost` are the slices where runs have lost theirs, `before` is
    what was wrong with it, or will be if it is not whole."""
    refusal = survey.refused.get(actual.gi, "")
    if actual.gi in survey.held:
        return "held", survey.held[actual.gi]
    if actual.placement.mask & lost:
        return "foreign", "it stands where a run has lost its instance"
    if actual.ci is None and before == "foreign":
        return "foreign", "half-made, and not by RMS"
    if actual.ci is None:
        return "half-made", refusal or "half-made"
    return ("refused", refusal or "the GPU would not destroy it") if before == "refused" else ("", "")


def lost(state: State) -> set[tuple[Run, str, Placement]]:
    """What runs have and can't use: what vanished, and what is on a GPU that does not answer."""
    return {
        (allocation.run, gpu.uuid, instance.placement)
        for allocation in state.allocations
        for gpu, instance in state.held(allocation)
        if instance.trouble == "lost" or (gpu.fault and not gpu.left)
    }


def _where(gpu: Gpu, placement: Placement) -> str:
    return f"GPU {gpu.uuid} {placement}"


def _fate(instance: Instance) -> str:
    return f"quarantined: {instance.note}" if instance.trouble else "idle"


def discover(
    state: State, boot_id: str, managed: Sequence[str | int], found: Mapping[str, Geometry | str], now: float
) -> None:
    """Take in the GPUs that the config names, after a reboot, a change of config or at first.

    `found` has by UUID the geometry of each, or why it does not answer; one at least must. A reboot ends every
    instance, and so every allocation. A GPU that the config no longer names is forgotten, unless a job still holds an
    instance of it: then it stays until that is released, and offers no room.
    """
    found = known_as(state, boot_id, managed, found)
    if state.boot_id != boot_id:
        for allocation in state.allocations:
            state.close(allocation.run, now)
        state.allocations, state.intents, state.gpus = [], [], []
    offered = state.geometries | {answer.model: answer for answer in found.values() if isinstance(answer, Geometry)}
    known = {gpu.uuid: gpu for gpu in state.gpus}
    fresh = [known.pop(uuid, Gpu(uuid, next(reversed(offered)))) for uuid in found]
    for gpu in fresh:
        answer = found[gpu.uuid]
        gpu.model = answer.model if isinstance(answer, Geometry) else gpu.model
        gpu.doubt, gpu.fault, gpu.left = "not yet compared with the hardware", "", False
    for gpu in known.values():
        if in_use(state, gpu):
            gpu.fault, gpu.left = "no longer in the configuration", True
            fresh.append(gpu)
    state.boot_id, state.managed, state.gpus = boot_id, list(managed), fresh
    state.geometries = {gpu.model: offered[gpu.model] for gpu in fresh}


def known_as(
    state: State, boot_id: str, managed: Sequence[str | int], found: Mapping[str, Answer]
) -> dict[str, Answer]:
    """Answers of GPUs by UUID, also of one that does not tell its own and that the config names by index."""
    known = dict(zip(state.managed, state.gpus, strict=False)) if state.boot_id == boot_id else {}
    return {
        known[name].uuid if gpu.isdigit() and name in known else gpu: answer
        for name, (gpu, answer) in zip(managed, found.items(), strict=True)
    }


def nameless(state: State, now: float, everything: bool = False) -> bool:
    """Whether it is time to ask again for a GPU that the config names by index and that has never told its UUID."""
    return any(gpu.uuid.isdigit() and not gpu.doubt and (everything or _due(gpu, now)) for gpu in state.gpus)


def in_use(state: State, gpu: Gpu) -> bool:
    """Whether a run holds an instance of this GPU, or one is being changed."""
    owned = {generation for a in state.allocations for generation in a.instances}
    return any(i.intent is not None or i.generation in owned for i in gpu.instances)


def recover(
    state: State,
    boot_id: str,
    managed: Sequence[str | int],
    surveys: Mapping[str, Survey | str],
    grants: Grants,
    now: float,
) -> list[str]:
    """Rebuild the inventory from an older state (or none), the hardware, and the grants that jobs were given.

    The grants decide who has what: they are written after the state and removed with it, so what the older state says
    of a run without one is out of date. Of a GPU that does not answer the older state is believed. Returns lines for
    the administrator.
    """
    surveys = known_as(state, boot_id, managed, surveys)
    found = {gpu: survey if isinstance(survey, str) else survey.geometry for gpu, survey in surveys.items()}
    discover(state, boot_id, managed, found, now)
    in_flight = {intent.run for intent in state.intents}
    state.allocations = [
        a
        for a in state.allocations
        if a.granted and a.run not in in_flight and grants.get(a.run.job, (None,))[0] == a.run
    ]
    state.intents = []
    state.counter += 1000  # numbers that the lost state may have given
    lines = [
        line
        for gpu in state.gpus
        if gpu.uuid in surveys
        for line in mend(state, gpu, surveys[gpu.uuid], range(state.counter), {}, now)
    ]
    _entitle(state, grants, now)
    return lines


def _entitle(state: State, grants: Grants, now: float) -> None:
    """Let the runs own what their grants name and nobody has. A run of whose instances nothing is found is dropped,
    unless they may be on a GPU that does not answer."""
    owned = {generation for a in state.allocations for generation in a.instances}
    by_uuid = {i.uuid: i for gpu in state.gpus for i in gpu.instances if i.uuid and i.generation not in owned}
    unseen = any(gpu.fault and not gpu.left for gpu in state.gpus)
    for run, uid, request, uuids in grants.values():
        if run.restart <= state.closed.get(run.job, (-1, 0.0))[0]:
            continue
        allocation = state.of_run(run)
        theirs = {i.uuid: i for _, i in state.held(allocation)} if allocation else {}
        theirs |= {uuid: by_uuid.pop(uuid) for uuid in uuids if uuid in by_uuid and uuid not in theirs}
        if allocation is None:
            if not theirs and not unseen:
                continue  # a grant from before a reboot, or whose instances are gone: nothing to protect
            allocation = Allocation(run, uid, request, None, None, now, state.boot_id, [], granted=True)
            state.allocations.append(allocation)
        for instance in theirs.values():
            if instance.generation not in owned:
                instance.status, instance.trouble, instance.note = "busy", "", ""
        allocation.instances = [theirs[uuid].generation for uuid in uuids if uuid in theirs]
