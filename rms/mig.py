"""MIG mode, turned on and off by an administrator or at boot; never on the way of a job."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

from rms import fence, hardware
from rms.config import Config
from rms.device import DeviceError, Nvml
from rms.errors import NodeError
from rms.inventory import State
from rms.nvml import NvmlDevice
from rms.store import Damaged, Store


def switch(config: Config, device: NvmlDevice, gpu: str, on: bool, say: Callable[[str], None]) -> None:
    """Turn MIG mode of one GPU on or off, with its lock held. Idle instances are destroyed when it goes off.

    Raises NodeError, which says what is in the way, or what is left to do.
    """
    store = Store(config.state_dir, time.monotonic() + config.deadline_seconds)
    try:
        with store.hardware([gpu], "mig"):
            board = device.board(gpu)
            if board.mig is None:
                raise NodeError(f"GPU {gpu} ({board.name}) has no MIG mode")
            if board.mig == (on, on):
                say(f"GPU {gpu}: MIG mode is {_word(on)} already")
                return
            if board.processes:
                raise NodeError(f"GPU {gpu} is used by process {', '.join(map(str, board.processes))}: end it first")
            if board.mig[0] and not on:
                _empty(device, gpu, _look(store))
            device.set_mig_mode(gpu, on)
            _mark(store, gpu)
            say(f"GPU {gpu}: MIG mode is {_word(on)}")
    except DeviceError as error:
        if error.code == Nvml.RESET_REQUIRED:
            raise NodeError(
                f"GPU {gpu}: MIG mode will be {_word(on)} after a reset: `nvidia-smi --gpu-reset -i {gpu}` while "
                "nothing uses it, or a reboot (Ampere needs one; in a virtual machine it may be the host's)"
            ) from error
        if error.code == Nvml.IN_USE:
            raise NodeError(
                f"GPU {gpu}: MIG mode is not {_word(on)}, something uses the GPU: stop what has it open (DCGM, X, "
                "nvidia-persistenced, monitoring; `fuser -v /dev/nvidia*` shows them) and try again"
            ) from error
        raise NodeError(f"GPU {gpu}: {error}") from error


def _empty(device: NvmlDevice, gpu: str, state: State) -> None:
    """Destroy all instances of a GPU, if none is busy or held. Raises NodeError otherwise, with none touched."""
    for record in next((known.instances for known in state.gpus if known.uuid == gpu), []):
        if record.status != "idle":
            raise NodeError(f"GPU {gpu}: {record.placement} is {record.status}; drain the node and try again")
    there, look = device.instances(gpu), fence.Look()
    for instance in there:
        if instance.ci is None:
            raise NodeError(f"GPU {gpu}: GPU instance {instance.gi} is not whole; `nvidia-smi mig` removes it")
        if pids := hardware.holders(device, gpu, instance.gi, instance.ci, look):
            raise NodeError(f"GPU {gpu}: {instance.placement} is held by process {', '.join(map(str, pids))}")
    for instance in there:
        if instance.ci is not None:
            device.destroy_compute_instance(gpu, instance.gi, instance.ci)
            device.destroy_gpu_instance(gpu, instance.gi)


def _mark(store: Store, gpu: str) -> None:
    """Let the next hook look at a GPU, and not only when it is time for that."""
    with suppress(Damaged), store.open("mig") as state:
        for known in state.gpus:
            if known.uuid == gpu:
                known.doubt = "its MIG mode was changed"
                store.save(state)


def _look(store: Store) -> State:
    try:
        return store.glance()
    except Damaged as damaged:
        raise NodeError(f"{damaged}: the next MIG job's Prolog mends it") from damaged


def _word(on: bool) -> str:
    return "on" if on else "off"
