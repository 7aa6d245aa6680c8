"""The GPUs as NVML shows them: the interface behind which simulated and real ones stand.

Every call is one that NVML has, with NVML's own errors; nothing here knows of jobs. GPUs are named by UUID, instances
by (GPU, GI id, CI id). Who calls must hold the GPU's lock.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from rms.geometry import Geometry, Placement


class Nvml(enum.IntEnum):
    """NVML's return codes, those that matter here (nvml.h)."""

    INVALID_ARGUMENT = 2  # illegal placement, unknown profile
    NOT_SUPPORTED = 3  # MIG is off, or the GPU has none
    NO_PERMISSION = 4  # not root
    NOT_FOUND = 6  # no such GPU, GI or CI
    DRIVER_NOT_LOADED = 9
    LIBRARY_NOT_FOUND = 12
    FUNCTION_NOT_FOUND = 13  # the driver is older than the call
    GPU_IS_LOST = 15  # fell off the bus
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    IN_USE = 19  # a process holds the CI, the GI still has a CI, or a process has the whole GPU
    INSUFFICIENT_RESOURCES = 23  # no room, or the exact place is taken
    UNKNOWN = 999


_ADVICE = {
    Nvml.NO_PERMISSION: "RMS must run as root",
    Nvml.DRIVER_NOT_LOADED: "load the nvidia kernel module",
    Nvml.LIBRARY_NOT_FOUND: "there is no libnvidia-ml.so.1: install the driver",
    Nvml.FUNCTION_NOT_FOUND: "install a newer driver",
    Nvml.GPU_IS_LOST: "look for Xid in the kernel's log; a lost GPU comes back with a reboot at best",
    Nvml.RESET_REQUIRED: "reset the GPU while nothing uses it, or reboot",
    Nvml.LIB_RM_VERSION_MISMATCH: "the driver was updated: load its new kernel module, or reboot",
}


class DeviceError(Exception):
    """An NVML call failed. `code` is NVML's; codes that the enum does not list count as UNKNOWN."""

    def __init__(self, code: int, call: str) -> None:
        self.code = Nvml(code) if code in Nvml._value2member_map_ else Nvml.UNKNOWN
        advice = f"; {_ADVICE[self.code]}" if self.code in _ADVICE else ""
        super().__init__(f"{call}: NVML error {code} ({self.code.name.lower().replace('_', ' ')}){advice}")


class DeviceInstance(NamedTuple):
    """A GPU instance that exists. `ci` and `uuid` are None unless one compute instance spans it: half-made, or cut up
    by somebody else."""

    gi: int
    placement: Placement
    ci: int | None
    uuid: str | None


class Capability(NamedTuple):
    """One of the capabilities of an instance: its device node, the device number that this must have, and the file by
    which the driver tells nvidia-modprobe whether to change the node (empty where there is no driver)."""

    node: str
    device: int
    entry: str = ""


class Device(Protocol):
    """One session with the driver, over the GPUs that the config names and no others. All calls raise DeviceError."""

    def gpus(self) -> Sequence[str]:
        """UUIDs of the managed GPUs, in the config's order."""

    def geometry(self, gpu: str) -> Geometry:
        """The profiles and placements that this GPU offers."""

    def instances(self, gpu: str) -> Sequence[DeviceInstance]:
        """Every GPU instance on the GPU, whoever made it."""

    def placement(self, gpu: str, gi: int) -> Placement:
        """Where a GPU instance is. NOT_FOUND where there is none of that id."""

    def create_gpu_instance(self, gpu: str, profile: str, start: int) -> int:
        """Make a GI at an explicit placement; its id. INSUFFICIENT_RESOURCES when the place is taken."""

    def create_compute_instance(self, gpu: str, gi: int) -> int:
        """Make the one CI that spans the GI; its id."""

    def destroy_compute_instance(self, gpu: str, gi: int, ci: int) -> None:
        """IN_USE while a process holds it."""

    def destroy_gpu_instance(self, gpu: str, gi: int) -> None:
        """IN_USE while it has a CI."""

    def uuid(self, gpu: str, gi: int, ci: int) -> str:
        """`MIG-...`, the name for CUDA_VISIBLE_DEVICES. The same place may get the same one again: never a key."""

    def holders(self, gpu: str, gi: int, ci: int) -> Sequence[int]:
        """Process ids that hold the instance now, as far as the driver tells; see `rms.hardware.holders`."""

    def clients(self, gpu: str) -> Sequence[int]:
        """Process ids that have the whole GPU, not an instance: meanwhile creating and destroying are IN_USE."""

    def capabilities(self, gpu: str, gi: int, ci: int | None) -> Sequence[Capability]:
        """What a process needs to use the instance (rms.fence). Empty where there is nothing to fence."""

    def close(self) -> None:
        """End the session."""
