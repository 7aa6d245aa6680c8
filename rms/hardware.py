"""What a transaction does to instances between deciding and saving the outcome, with the locks of their GPUs held.

Each function does one step and says how it ended; none of them knows the state file or a job.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from rms import fence
from rms.config import Config
from rms.device import Device, DeviceError, DeviceInstance, Nvml
from rms.errors import NodeError, RequestError
from rms.inventory import Claim, Gpu, Outcome, State, Step, Survey

RETRY_SECONDS = 0.1
"""Pause between two looks at what another process has to let go."""
DESTROY_SECONDS = 2.0
"""How long a destroy that is IN_USE is tried again: the driver lets go of a client a moment after it ended."""
FIRST_PAUSE = 0.02
"""Seconds before it is tried for the second time; each further pause is twice as long."""

NOTHING = Claim((), (), frozenset(), frozenset())


def open_device(config: Config, boot_id: str) -> Device:
    """A session with the GPUs that the config names: real ones, unless it has simulated ones. Raises NodeError."""
    try:
        if sim := config.simulated:
            from rms.simulated import SimulatedDevice

            return SimulatedDevice(
                sim.file,
                sim.model,
                sim.gpus,
                config.gpus,
                boot_id,
                sim.create_seconds,
                sim.destroy_seconds,
                sim.nodes if config.fence else "",
            )
        from rms.nvml import NvmlDevice

        return NvmlDevice(config.gpus, config.driver_root, config.fence)
    except (DeviceError, RequestError) as error:
        raise NodeError(f"cannot open the GPUs: {error}") from error
    except ImportError as error:
        raise NodeError(
            f"real GPUs need nvidia-ml-py beside RMS, {sys.prefix}/bin/pip install nvidia-ml-py: {error}"
        ) from error


class _TakenError(DeviceError):
    """Somebody else has an instance on the place: nothing of ours is there."""

    def __init__(self, error: DeviceError) -> None:
        Exception.__init__(self, str(error))
        self.code = error.code


def change(
    device: Device,
    steps: Sequence[Step],
    uid: int | None,
    deadline: float,
    told: Callable[..., None],
    go_on: Callable[[], bool] = lambda: True,
) -> tuple[list[Outcome], dict[str, str]]:
    """All of an acquire. Stops at the first instance that is held or fails; says which GPU failed, and why.

    `told` is called with event, gpu, placement, seconds and result of each step; before each `go_on` is asked. The
    user, if there is one, is let in last, so that what comes to nothing is still fenced from everybody.
    """
    outcomes: list[Outcome] = []
    steps = sorted(steps, key=lambda s: ("busy", "removing", "making").index(s.status))
    for step in steps:
        if not go_on():
            return outcomes, {}
        began = time.monotonic()
        fault = ""
        try:
            outcomes.append(make(device, step) if step.status == "making" else take(device, step, deadline))
            if outcomes[-1].trouble == "refused":  # counts against the GPU: another instance of it hardly fares better
                fault = outcomes[-1].note
        except DeviceError as error:
            fault = str(error)
            if step.status == "making" and not isinstance(error, _TakenError):
                # What it has left on the GPU, if anything, is ours to remove.
                outcomes.append(Outcome(step.generation, None, None, None, "half-made", "half-made"))
        told(
            event={"busy": "reuse", "removing": "destroy", "making": "create"}[step.status],
            gpu=step.gpu,
            placement=str(step.placement),
            seconds=round(time.monotonic() - began, 6),
            result=fault or outcomes[-1].note or "done",
        )
        if fault:
            return outcomes, {step.gpu: fault}
        if outcomes[-1].trouble:
            return outcomes, {}
    theirs = [(step, outcome) for step, outcome in zip(steps, outcomes, strict=True) if step.status != "removing"]
    if broken := _admit_all(device, theirs, uid):
        broken |= _admit_all(device, theirs, None)
    return outcomes, broken


def _admit_all(device: Device, theirs: Sequence[tuple[Step, Outcome]], uid: int | None) -> dict[str, str]:
    broken = {}
    for step, outcome in theirs:
        try:
            admit(device, step.gpu, outcome.gi, outcome.ci, uid)
        except DeviceError as error:
            broken[step.gpu] = str(error)
    return broken


def make(device: Device, step: Step) -> Outcome:
    """Create an instance, GI then CI, and fence it from all users; it is taken back where that fails.

    Raises DeviceError.
    """
    try:
        gi = device.create_gpu_instance(step.gpu, step.placement.profile, step.placement.start)
    except DeviceError as error:
        if error.code != Nvml.INSUFFICIENT_RESOURCES:
            raise
        raise _TakenError(error) from error
    ci = None
    try:
        admit(device, step.gpu, gi, None, None)  # at once: until then nvidia-modprobe opens the node to whoever asks
        ci = device.create_compute_instance(step.gpu, gi)
        admit(device, step.gpu, gi, ci, None)
        made = Outcome(step.generation, gi, ci, device.uuid(step.gpu, gi, ci))
        pids = holders(device, step.gpu, gi, ci, fence.Look())  # who was quicker than the fence
    except DeviceError:
        with suppress(DeviceError):
            if ci is not None:
                device.destroy_compute_instance(step.gpu, gi, ci)
            device.destroy_gpu_instance(step.gpu, gi)
        raise
    return made._replace(trouble="held", note=_held_by(pids)) if pids else made


def admit(device: Device, gpu: str, gi: int | None, ci: int | None, uid: int | None) -> None:
    """Let one user open an instance besides root, or nobody. Raises DeviceError."""
    if gi is not None:
        fence.fence(device.capabilities(gpu, gi, ci), uid)


def take(device: Device, step: Step, deadline: float) -> Outcome:
    """Make sure that nobody holds an idle instance; destroy it if it is to be removed. Raises DeviceError."""
    gi, ci = step.gi, step.ci
    if gi is None or ci is None:
        raise DeviceError(Nvml.NOT_FOUND, f"{step.placement} has no instance")
    stands = Outcome(step.generation, gi, ci, step.uuid)
    _find(device, step)
    admit(device, step.gpu, gi, ci, None)
    if pids := holders(device, step.gpu, gi, ci, fence.Look()):
        return stands._replace(trouble="held", note=_held_by(pids))
    if step.status == "busy":
        return stands
    until = min(time.monotonic() + DESTROY_SECONDS, deadline)
    try:
        _patiently(lambda: device.destroy_compute_instance(step.gpu, gi, ci), until)
    except DeviceError as error:
        if error.code == Nvml.IN_USE:  # nobody is to be seen: a process that has the whole GPU does that
            return stands._replace(trouble="refused", note=str(error))
        raise
    _patiently(lambda: device.destroy_gpu_instance(step.gpu, gi), until)
    return Outcome(step.generation, None, None, None)


def intruders(device: Device, gpu: str) -> list[int]:
    """The processes of users that have a whole GPU: meanwhile nothing on it can be created or destroyed."""
    found = []
    with suppress(DeviceError):  # it is asked for after another error
        for pid in device.clients(gpu):
            with suppress(OSError):  # it has ended
                found += [] if fence.roots(pid) else [pid]
    return found


def _find(device: Device, step: Step) -> None:
    """Raises NOT_FOUND where the instance is gone, also if another one, on another place, has its id now."""
    if device.placement(step.gpu, step.gi or 0) != step.placement:
        raise DeviceError(Nvml.NOT_FOUND, f"{step.placement}: GI {step.gi} is another one")


def _patiently(destroy: Callable[[], None], until: float) -> None:
    """Destroy as soon as the driver lets us, asking it more and more rarely: each time may hold it up for others."""
    pause = FIRST_PAUSE
    while True:
        try:
            return destroy()
        except DeviceError as error:
            left = until - time.monotonic()
            if error.code != Nvml.IN_USE or left < 0:
                raise
        time.sleep(min(pause, left))
        pause *= 2


def holders(device: Device, gpu: str, gi: int, ci: int, look: fence.Look) -> list[int]:
    """The processes that hold an instance: those that the driver lists, and users' that have its nodes open.

    Raises DeviceError.
    """
    return sorted({*device.holders(gpu, gi, ci), *look.holders(device.capabilities(gpu, gi, ci))})


def look(device: Device, steps: Sequence[Step]) -> tuple[list[Outcome], dict[str, str]]:
    """Fence instances from the user whose run has ended, and look whether anybody still holds them; says which GPU
    failed, and why."""
    once = fence.Look()  # by the first who asks: all of them are shut by then
    outcomes = [Outcome(step.generation, step.gi, step.ci, step.uuid) for step in steps]
    broken = {}
    for ask in (_shut, partial(_let_go, shared=once)):
        for number, step in enumerate(steps):
            if outcomes[number].trouble or outcomes[number].gi is None:
                continue
            try:
                note = ask(device, step)
            except DeviceError as error:
                if error.code == Nvml.NOT_FOUND:  # it vanished while the job ran: nothing to take back
                    outcomes[number] = Outcome(step.generation, None, None, None)
                    continue
                broken[step.gpu] = note = str(error)
            if note:
                outcomes[number] = outcomes[number]._replace(trouble="held", note=note)
    return outcomes, broken


def _shut(device: Device, step: Step) -> str:
    _find(device, step)
    admit(device, step.gpu, step.gi, step.ci, None)
    return ""


def _let_go(device: Device, step: Step, shared: fence.Look) -> str:
    """Why an instance is not let go; empty if it is."""
    pids = holders(device, step.gpu, step.gi or 0, step.ci or 0, shared)
    return _held_by(pids) if pids else ""


def survey(device: Device, gpu: str, claim: Claim = NOTHING, rehearsal: bool = False) -> Survey:
    """What is on a GPU, once what the claim says is ours to remove was removed. Raises DeviceError.

    In a rehearsal nothing is removed, and what would be is left out.
    """
    seen, held, refused = [], {}, {}
    look = fence.Look()
    for found in device.instances(gpu):
        ours = (gpu, found.placement) in (claim.places if found.ci is None else claim.refused)
        if found.ci is not None and (pids := holders(device, gpu, found.gi, found.ci, look)):
            held[found.gi] = _held_by(pids)
        elif ours and rehearsal:
            continue
        elif ours and (refusal := _remove(device, gpu, found)):
            refused[found.gi] = refusal
        elif ours:
            continue
        seen.append(found)
    return Survey(device.geometry(gpu), seen, held, refused)


def _remove(device: Device, gpu: str, found: DeviceInstance) -> str:
    """Destroy an instance, whole or not. Returns why the GPU would not."""
    try:
        if found.ci is not None:
            device.destroy_compute_instance(gpu, found.gi, found.ci)
        device.destroy_gpu_instance(gpu, found.gi)
    except DeviceError as error:
        return str(error)
    return ""


def fence_all(device: Device, state: State, gpu: Gpu, before: str, rehearsal: bool = False) -> list[str]:
    """Make the fences on a GPU agree with the inventory. Returns lines for the administrator.

    A GPU where one can't be shut is not offered; `before` is why it was not so far.
    """
    users = {generation: a.uid for a in state.allocations for generation in a.instances}
    lines = []
    # Whoever is at work on an instance sees to its fence.
    for instance in [] if rehearsal or gpu.fault else [i for i in gpu.instances if i.intent is None]:
        uid = None if instance.trouble == "lost" else users.get(instance.generation)  # its place may be another's now
        try:
            admit(device, gpu.uuid, instance.gi, instance.ci, uid)
        except DeviceError as error:
            if uid is not None:
                lines.append(f"instance {instance.uuid} of user {uid}: {error}")
            else:
                gpu.fault = str(error)
                lines += [f"GPU {gpu.uuid} is not offered: {error}"] if gpu.fault != before else []
    if before and not gpu.fault:
        lines.append(f"GPU {gpu.uuid} is offered again")
    return lines


def _held_by(pids: Sequence[int]) -> str:
    return f"held by process {', '.join(str(pid) for pid in pids[:5])}"
