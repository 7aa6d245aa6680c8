"""The inventory: which instances exist, which run owns which, and what is being changed just now.

Plain data and pure transitions on it; `rms.store` keeps it in a file, `controller.py` decides when to change it.
Instances are known by a *generation*, a number given once and never again: GI ids and MIG UUIDs come back for the
next instance at the same place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rms.device import DeviceInstance
from rms.errors import RequestError
from rms.geometry import Geometry, Placement
from rms.planner import Busy, Decision, Demand, GpuView, View
from rms.request import parse

SCHEMA = 1
RECENT = 64
"""Requests that the state remembers, for the policy's estimate of demand."""
CLOSED = 1000
"""Released runs that are remembered, newest first, so that a late Prolog of one gets nothing."""

HALF_MADE = "half-made"
"""Why a GPU instance of ours without compute instance is quarantined: it is removed as soon as the hardware lets us."""

FOREIGN = "half-made, and not by RMS"
"""Why a GPU instance of somebody else without compute instance is quarantined: for good."""

LEFT = "no longer in the configuration"
"""The fault of a GPU that is only known because a job still holds an instance of it."""

Status = Literal["idle", "busy", "making", "removing", "quarantined"]


class Run(NamedTuple):
    """One run of a job. A requeued job keeps its id and counts its restarts."""

    cluster: str
    job: int
    restart: int

    def __str__(self) -> str:
        return f"{self.job}.{self.restart}"


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

    `intent` is the number of the intent that is changing it; `note` says why it is quarantined; `used` is when a job
    last had it or it was made (epoch).
    """

    generation: int
    placement: Placement
    status: Status
    gi: int | None = None
    ci: int | None = None
    uuid: str | None = None
    intent: int | None = None
    used: float = 0.0
    note: str = ""


@dataclass
class Gpu:
    """One managed GPU. `doubt` says why its records must be compared with the hardware before they are believed;
    `fault` why it is not offered at all."""

    uuid: str
    model: str
    instances: list[Instance] = field(default_factory=list)
    doubt: str = ""
    fault: str = ""


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
    """A change of the hardware that has been decided, and reserved, but whose outcome is not saved yet."""

    number: int
    kind: Literal["acquire", "release"]
    run: Run
    owner: Owner


@dataclass
class State:
    """All of it. `managed` is the config's list of GPUs when they were last read; `counter` gives generations and
    intents their numbers; `closed` maps a job to the last restart that was released and when; `recent` holds submit
    time, request and limit (minutes) of the last requests."""

    boot_id: str = ""
    managed: list[str | int] = field(default_factory=list)
    counter: int = 0
    gpus: list[Gpu] = field(default_factory=list)
    geometries: dict[str, Geometry] = field(default_factory=dict)
    allocations: list[Allocation] = field(default_factory=list)
    intents: list[Intent] = field(default_factory=list)
    closed: dict[int, tuple[int, float]] = field(default_factory=dict)
    recent: list[tuple[float, str, int | None]] = field(default_factory=list)

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
    """The state from the object that `to_json` spelled. Raises KeyError, TypeError or ValueError on anything else."""
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
    )


def view(state: State, now: float) -> View:
    """What a policy may see. GPUs with a fault offer no room: all their slices are blocked."""
    runs = {generation: a for a in state.allocations for generation in a.instances}
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
            elif instance.status == "removing":
                continue  # free as soon as the intent ahead has done its work: `ahead` tells whom to wait for
            else:
                blocked.append(instance.placement)
        gpus.append(GpuView(gpu.uuid, geometry, tuple(busy), tuple(idle), tuple(blocked)))
    return View(tuple(gpus), tuple(_recent(state)), None, now)


def _recent(state: State) -> Iterable[Demand]:
    for when, request, limit in state.recent:
        try:
            yield Demand(when, parse(request, next(iter(state.geometries.values()))), limit * 60 if limit else None)
        except RequestError:  # of another model, before the node's GPUs were changed
            continue


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


def begin_release(state: State, allocation: Allocation, owner: Owner) -> Intent:
    """Mark a run's instances as being taken back."""
    intent = Intent(state.number(), "release", allocation.run, owner)
    for _, instance in state.held(allocation):
        instance.intent = intent.number
    state.intents.append(intent)
    return intent


class Outcome(NamedTuple):
    """What the hardware says of one instance after an intent: its ids (all None once it is gone), and why it must not
    be used (`held`, empty if it may)."""

    generation: int
    gi: int | None
    ci: int | None
    uuid: str | None
    held: str = ""


def conclude(state: State, intent: Intent, outcomes: Iterable[Outcome], now: float, granted: bool) -> None:
    """Save the outcome of an intent. With `granted` the run owns its instances; without, they are idle again."""
    found = {outcome.generation: outcome for outcome in outcomes}
    allocation = state.of_run(intent.run)
    owned = set(allocation.instances) if granted and allocation else set()
    for gpu in state.gpus:
        for instance in list(gpu.instances):
            if instance.intent != intent.number:
                continue
            instance.intent = None
            if outcome := found.get(instance.generation):
                instance.gi, instance.ci, instance.uuid = outcome.gi, outcome.ci, outcome.uuid
                instance.note = outcome.held
            if instance.gi is None and instance.note != HALF_MADE:
                gpu.instances.remove(instance)
            elif instance.note or instance.uuid is None:
                instance.status = "quarantined"
            else:
                instance.status = "busy" if instance.generation in owned else "idle"
                instance.used = now
    if allocation and granted:
        allocation.granted = True
    elif allocation:
        state.allocations.remove(allocation)
    state.intents.remove(intent)


class Claim(NamedTuple):
    """Mending to do before a decision: dead intents taken over, and GPUs whose records are in doubt."""

    intents: tuple[int, ...]
    gpus: tuple[str, ...]
    places: frozenset[tuple[str, Placement]]
    """GPU and placement of what the dead intents were changing: what is half-made there is ours to remove."""


def claim(state: State, owner: Owner) -> Claim | None:
    """Take over every intent whose owner is dead; None if there is nothing to mend.

    Their allocations are dropped: one that was being made was never granted, one that was being released is closed.
    """
    # An intent of the caller's own is left over from an earlier call of this process: a call begins with none.
    dead = [intent for intent in state.intents if intent.owner == owner or not intent.owner.alive()]
    numbers = tuple(intent.number for intent in dead)
    for intent in dead:
        intent.owner = owner
        if allocation := state.of_run(intent.run):
            state.allocations.remove(allocation)
    gpus, places = [], set()
    for gpu in state.gpus:
        in_doubt = bool(gpu.doubt or gpu.fault) and gpu.fault != LEFT
        for instance in gpu.instances:
            half_made = instance.status == "quarantined" and instance.note == HALF_MADE
            half_gone = instance.status == "idle" and in_doubt  # a destroy may have failed after the CI was gone
            if instance.intent in numbers or half_made or half_gone:
                places.add((gpu.uuid, instance.placement))
            in_doubt = in_doubt or instance.intent in numbers or instance.status == "quarantined"
        if in_doubt:
            gpus.append(gpu.uuid)
    state.intents = [i for i in state.intents if i.number not in numbers or state.touched(i)]
    return Claim(numbers, tuple(gpus), frozenset(places)) if numbers or gpus else None


def reconcile(
    state: State, gpu: Gpu, seen: Sequence[DeviceInstance], held: Mapping[int, str], dead: Container[int], now: float
) -> None:
    """Make the records of one GPU agree with what the hardware shows.

    `held` says for a GI id who holds it; `dead` are the intents that were abandoned. Records of living intents and of
    running jobs are left alone. What RMS does not know is adopted as idle if it is whole and nobody holds it,
    quarantined otherwise: never destroyed.
    """
    owned = {generation for a in state.allocations for generation in a.instances}
    there = {instance.placement: instance for instance in seen}
    for record in list(gpu.instances):
        actual = there.pop(record.placement, None)
        if record.generation in owned or (record.intent is not None and record.intent not in dead):
            continue
        record.intent = None
        if actual is None:
            gpu.instances.remove(record)
            continue
        record.gi, record.ci, record.uuid = actual.gi, actual.ci, actual.uuid
        half_made = FOREIGN if record.note == FOREIGN else HALF_MADE
        record.note = held.get(actual.gi, "") or (half_made if actual.ci is None else "")
        record.status = "quarantined" if record.note else "idle"
    for placement, actual in there.items():
        if any(i.intent is not None and i.placement.mask & placement.mask for i in gpu.instances):
            continue  # a living intent is at work just there
        note = held.get(actual.gi, "") or (FOREIGN if actual.ci is None else "")
        status: Status = "quarantined" if note else "idle"
        gpu.instances.append(
            Instance(state.number(), placement, status, actual.gi, actual.ci, actual.uuid, used=now, note=note)
        )
    gpu.doubt, gpu.fault = "", LEFT if gpu.fault == LEFT else ""
    state.intents = [i for i in state.intents if i.number not in dead or state.touched(i)]


def discover(
    state: State, boot_id: str, managed: Sequence[str | int], geometries: dict[str, Geometry], now: float
) -> None:
    """Take in the GPUs that the config names (`geometries` by UUID), after a reboot, a change of config or at first.

    A reboot ends every instance, and so every allocation. A GPU that the config no longer names is forgotten, unless a
    job still holds an instance of it: then it stays until that is released, and offers no room.
    """
    if state.boot_id != boot_id:
        for allocation in state.allocations:
            state.close(allocation.run, now)
        state.allocations, state.intents, state.gpus = [], [], []
    known = {gpu.uuid: gpu for gpu in state.gpus}
    fresh = [known.pop(uuid, Gpu(uuid, geometry.model)) for uuid, geometry in geometries.items()]
    for gpu in fresh:
        gpu.doubt, gpu.fault = "not yet compared with the hardware", ""
    for gpu in known.values():
        if in_use(state, gpu):
            gpu.fault = LEFT
            fresh.append(gpu)
    state.boot_id, state.managed, state.gpus = boot_id, list(managed), fresh
    offered = state.geometries | {geometry.model: geometry for geometry in geometries.values()}
    state.geometries = {gpu.model: offered[gpu.model] for gpu in fresh}


def in_use(state: State, gpu: Gpu) -> bool:
    """Whether a run holds an instance of this GPU, or one is being changed."""
    owned = {generation for a in state.allocations for generation in a.instances}
    return any(i.intent is not None or i.generation in owned for i in gpu.instances)


class Survey(NamedTuple):
    """What the hardware shows of one GPU: its geometry, its instances, and for a GI id who holds it."""

    geometry: Geometry
    seen: Sequence[DeviceInstance]
    held: Mapping[int, str]


def recover(
    state: State,
    boot_id: str,
    managed: Sequence[str | int],
    surveys: Mapping[str, Survey],
    grants: Mapping[int, tuple[Run, int, str, Sequence[str]]],
    now: float,
) -> None:
    """Rebuild the inventory from an older state (or none), the hardware, and the grants that jobs were given.

    The grants (job: run, uid, request, UUIDs) decide who has what: they are written after the state and removed with
    it, so what the older state says of a run without one is out of date.
    """
    discover(state, boot_id, managed, {gpu: survey.geometry for gpu, survey in surveys.items()}, now)
    in_flight = {intent.run for intent in state.intents}
    state.allocations = [
        a
        for a in state.allocations
        if a.granted and a.run not in in_flight and grants.get(a.run.job, (None,))[0] == a.run
    ]
    state.intents = []
    state.counter += 1000  # numbers that the lost state may have given
    for gpu in state.gpus:
        if survey := surveys.get(gpu.uuid):
            reconcile(state, gpu, survey.seen, survey.held, range(state.counter), now)
    owned = {generation for a in state.allocations for generation in a.instances}
    by_uuid = {i.uuid: i for gpu in state.gpus for i in gpu.instances if i.uuid and i.generation not in owned}
    for run, uid, request, uuids in grants.values():
        if state.of_run(run) is None:
            theirs = [by_uuid.pop(uuid) for uuid in uuids if uuid in by_uuid]
            if not theirs:
                continue  # a grant from before a reboot, or whose instances are gone: nothing to protect
            for instance in theirs:
                instance.status, instance.note = "busy", ""
            generations = [instance.generation for instance in theirs]
            state.allocations.append(Allocation(run, uid, request, None, None, now, boot_id, generations, granted=True))
