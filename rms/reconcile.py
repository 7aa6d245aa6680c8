"""Making the inventory agree with the GPUs: after a boot, a change of the configuration, a crash, or the loss of the
state. Pure transitions, as in `rms.inventory`, which says when there is anything to mend (`claim`). Most hooks find
nothing, so `controller.py` imports this only where one does.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TypeVar

from rms.device import DeviceInstance
from rms.geometry import Geometry, Placement
from rms.inventory import (
    FIRST_RETRY,
    LAST_RETRY,
    Allocation,
    Gpu,
    Instance,
    Run,
    State,
    Survey,
    Trouble,
    in_use,
)

Answer = TypeVar("Answer")

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
        elif actual and record.gi is None and record.trouble != "lost" and actual.uuid == record.uuid:
            # Known from its grant only, and looked at now for the first time: the GPU did not answer (`_came_to_be`).
            record.gi, record.ci = actual.gi, actual.ci
            del there[record.placement]
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
        known[name].uuid if gpu.isdecimal() and name in known else gpu: answer
        for name, (gpu, answer) in zip(managed, found.items(), strict=True)
    }


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
    of a run without one is out of date, and what it was about to make for a run with one was made. Of a GPU that does
    not answer the older state is believed. Returns lines for the administrator.
    """
    surveys = known_as(state, boot_id, managed, surveys)
    found = {gpu: survey if isinstance(survey, str) else survey.geometry for gpu, survey in surveys.items()}
    discover(state, boot_id, managed, found, now)
    _came_to_be(state, surveys, grants)
    in_flight = {intent.run for intent in state.intents}
    state.allocations = [
        a
        for a in state.allocations
        if a.granted and a.run not in in_flight and grants.get(a.run.job, (None,))[0] == a.run
    ]
    state.intents = []
    # Beyond what the lost state may have given, also where nothing is left of it: no node needs a thousand a second.
    state.counter = max(state.counter + 1000, int(now * 1000))
    lines = [
        line
        for gpu in state.gpus
        if gpu.uuid in surveys
        for line in mend(state, gpu, surveys[gpu.uuid], range(state.counter), {}, now)
    ]
    _entitle(state, grants, now)
    return lines


def _came_to_be(state: State, surveys: Mapping[str, Survey | str], grants: Grants) -> None:
    """Let the runs own what they were about to get, and what a grant says that they got. If an instance has vanished
    since, nothing else knows its place, which stays theirs."""
    shown = {i.uuid: i for survey in surveys.values() if isinstance(survey, Survey) for i in survey.seen}
    for intent in [intent for intent in state.intents if intent.kind == "acquire"]:
        allocation, (run, _, _, uuids) = state.of_run(intent.run), grants.get(intent.run.job, (None, 0, "", ()))
        if allocation is None or run != intent.run:
            continue  # it was not granted yet
        theirs = [instance for _, instance in state.held(allocation)]
        shows = [shown.get(uuid) for uuid in uuids]
        if len(theirs) != len(uuids) or any(
            actual and actual.placement != instance.placement for actual, instance in zip(shows, theirs, strict=True)
        ):
            continue  # another attempt has come to be, of which this state is too old to know
        for uuid, actual, instance in zip(uuids, shows, theirs, strict=True):
            instance.status, instance.intent, instance.uuid = "busy", None, uuid
            instance.gi, instance.ci = (actual.gi, actual.ci) if actual else (None, None)
        allocation.granted = True
        state.intents.remove(intent)


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
