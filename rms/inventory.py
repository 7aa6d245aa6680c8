"""The inventory: which instances exist, which run owns which, and what is being changed just now.

Plain data and pure transitions on it; `rms.store` keeps it in a file, `controller.py` decides when to change it.
Instances are known by a *generation*, a number given once and never again: GI ids and MIG UUIDs come back for the
next instance at the same place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

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
            # One that is being made is its job's already: it will be free when that ends, and others plan with that.
            if instance.status in ("busy", "making") and (run := runs.get(instance.generation)):
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


class Survey(NamedTuple):
    """What the hardware shows of one GPU: its geometry, its instances, and by GI id who holds one, and why the GPU
    would not destroy one."""

    geometry: Geometry
    seen: Sequence[DeviceInstance]
    held: Mapping[int, str]
    refused: Mapping[int, str] = {}


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
        if not to_mend(gpu, numbers, now, everything):
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


def to_mend(gpu: Gpu, dead: Container[int], now: float, everything: bool = False) -> bool:
    """Whether a GPU must be compared with the hardware before a decision; `dead` are intents that are taken over."""
    left_undone = any(i.intent in dead for i in gpu.instances)
    held = any(i.trouble == "held" for i in gpu.instances)
    if gpu.left:
        return left_undone or held
    waits = gpu.fault or any(i.status == "quarantined" for i in gpu.instances)
    return bool(everything or left_undone or gpu.doubt or (held and not gpu.fault) or (waits and _due(gpu, now)))


def _due(gpu: Gpu, now: float) -> bool:
    return not now < gpu.retry <= now + LAST_RETRY  # farther away than that: the clock was set back


def nameless(state: State, now: float, everything: bool = False) -> bool:
    """Whether it is time to ask again for a GPU that the config names by index and that has never told its UUID."""
    return any(gpu.uuid.isdecimal() and not gpu.doubt and (everything or _due(gpu, now)) for gpu in state.gpus)


def in_use(state: State, gpu: Gpu) -> bool:
    """Whether a run holds an instance of this GPU, or one is being changed."""
    owned = {generation for a in state.allocations for generation in a.instances}
    return any(i.intent is not None or i.generation in owned for i in gpu.instances)
