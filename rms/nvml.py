"""Real GPUs, through NVIDIA's own `nvidia-ml-py` (the extra `nvml`). Imported only when the hardware is needed.

Profiles and placements are what the driver says, never a table. Nothing is remembered about instances: each call finds
them again by their ids, since handles are void once an instance is gone and may then mean another one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ctypes import byref, c_uint
from typing import Any, NamedTuple

import pynvml

from rms import fence, geometry
from rms.device import Capability, DeviceError, DeviceInstance, Nvml
from rms.geometry import Geometry, Placement, Profile

_KINDS = {
    value: name.removeprefix("NVML_GPU_INSTANCE_PROFILE_")
    for name, value in vars(pynvml).items()
    if name.startswith("NVML_GPU_INSTANCE_PROFILE_") and not name.endswith("_COUNT")
}
_ABSENT = (Nvml.NOT_FOUND, Nvml.INVALID_ARGUMENT)
_NO_INSTANCE = 0xFFFFFFFF


class Offer(NamedTuple):
    """A profile of a GPU. `placements` (start, size) is None where NVML does not tell: without MIG mode or root."""

    name: str
    kind: str
    id: int
    limit: int
    compute: int
    memory_mb: int
    placements: tuple[tuple[int, int], ...] | None


class Board(NamedTuple):
    """What NVML tells of a GPU without changing it, be it in MIG mode or not. `pci` is its device id, four hex digits;
    `mig` whether MIG mode is on now, and after a reset (None: it can't do MIG); `processes` those that have the whole
    GPU, not an instance."""

    uuid: str
    name: str
    address: str
    pci: str
    driver: str
    mig: tuple[bool, bool] | None
    persistence: bool
    offers: tuple[Offer, ...]
    processes: tuple[int, ...]


class NvmlDevice:
    """A session with the driver, over the GPUs in `managed` (UUIDs or NVML indices); no other one is opened.

    One that is lost does not stop the others: a GPU that is named by UUID is opened when it is first asked for, and one
    that is named by index and does not tell its UUID goes by that number.
    `root` is where the driver's /proc and /dev are; without `fenced` its capability nodes are left alone.
    """

    def __init__(self, managed: Sequence[str | int], root: str = "/", fenced: bool = True) -> None:
        self._root = root
        self._driver = fence.Driver(root) if fenced else None
        self._minors: dict[str, int] = {}
        self._indices: dict[str, int] = {}
        self._gpus: dict[str, Any] = {}
        self._geometries: dict[str, Geometry] = {}
        self._compute_profiles: dict[tuple[str, int], list[Any]] = {}
        with _asking("open NVML"):
            pynvml.nvmlInit()
        try:
            self._managed = [self._uuid_at(name) if isinstance(name, int) else name for name in managed]
            if len(set(self._managed)) < len(managed):
                raise DeviceError(Nvml.INVALID_ARGUMENT, f"one GPU is named twice ({' '.join(self._managed)})")
        except DeviceError:
            self.close()
            raise

    # The interface of rms.device.Device.

    def gpus(self) -> Sequence[str]:
        return self._managed

    def geometry(self, gpu: str) -> Geometry:
        if gpu not in self._geometries:
            device = self._gpu(gpu)
            with _asking("read the profiles"):
                self._geometries[gpu] = _geometry(device)
        return self._geometries[gpu]

    def instances(self, gpu: str) -> Sequence[DeviceInstance]:
        # The GPU instances themselves are listed, not the MIG devices: one without compute instance has no MIG device.
        found = []
        with _asking("list the instances"):
            for profile in self.geometry(gpu).profiles:
                for gi in _listed(
                    pynvml.nvmlDeviceGetGpuInstances,
                    self._gpu(gpu),
                    profile.id,
                    pynvml.c_nvmlGpuInstance_t * profile.limit,
                ):
                    info = pynvml.nvmlGpuInstanceGetInfo(gi)
                    placement = Placement(profile.name, info.placement.start, info.placement.size)
                    found.append((int(info.id), placement, self._spanning(gpu, gi, profile)))
        return [
            DeviceInstance(gi, placement, ci, None if ci is None else self.uuid(gpu, gi, ci))
            for gi, placement, ci in sorted(found)
        ]

    def placement(self, gpu: str, gi: int) -> Placement:
        instance = self._gpu_instance(gpu, gi)
        with _asking(f"GI {gi}"):
            info = pynvml.nvmlGpuInstanceGetInfo(instance)
        name = next(p.name for p in self.geometry(gpu).profiles if p.id == info.profileId)
        return Placement(name, int(info.placement.start), int(info.placement.size))

    def create_gpu_instance(self, gpu: str, profile: str, start: int) -> int:
        wanted = self.geometry(gpu).by_name.get(profile)
        what = f"create {profile} at {start}"
        if wanted is None or start not in wanted.starts:
            raise DeviceError(Nvml.INVALID_ARGUMENT, what)
        with _asking(what):
            # By reference: nvidia-ml-py passes on what it is given, and the struct itself crashes the interpreter.
            place = byref(pynvml.c_nvmlGpuInstancePlacement_t(start, wanted.memory))
            gi = pynvml.nvmlDeviceCreateGpuInstanceWithPlacement(self._gpu(gpu), wanted.id, place)
            return int(pynvml.nvmlGpuInstanceGetInfo(gi).id)

    def create_compute_instance(self, gpu: str, gi: int) -> int:
        instance = self._gpu_instance(gpu, gi)
        with _asking(f"create CI in GI {gi}"):
            number = pynvml.nvmlGpuInstanceGetInfo(instance).profileId
            whole = next(p for p in self.geometry(gpu).profiles if p.id == number)
            spanning = [p for p in self._of_compute(gpu, instance, number) if p.sliceCount == whole.compute]
            if not spanning:
                raise DeviceError(Nvml.NOT_SUPPORTED, f"no CI profile has all {whole.compute} slices of GI {gi}")
            ci = pynvml.nvmlGpuInstanceCreateComputeInstance(instance, spanning[0].id)
            return int(pynvml.nvmlComputeInstanceGetInfo(ci).id)

    def destroy_compute_instance(self, gpu: str, gi: int, ci: int) -> None:
        instance = self._compute_instance(gpu, gi, ci)
        with _asking(f"destroy CI {ci} of GI {gi}"):
            pynvml.nvmlComputeInstanceDestroy(instance)

    def destroy_gpu_instance(self, gpu: str, gi: int) -> None:
        instance = self._gpu_instance(gpu, gi)
        with _asking(f"destroy GI {gi}"):
            pynvml.nvmlGpuInstanceDestroy(instance)

    def uuid(self, gpu: str, gi: int, ci: int) -> str:
        device = self._mig_device(gpu, gi, ci)
        with _asking(f"UUID of GI {gi} CI {ci}"):
            return str(pynvml.nvmlDeviceGetUUID(device))

    def holders(self, gpu: str, gi: int, ci: int) -> Sequence[int]:
        device = self._mig_device(gpu, gi, ci)
        with _asking(f"processes on GI {gi} CI {ci}"):
            on_it = _processes(device)
            # The whole GPU's list too: it has the processes of every compute instance that somebody made in this GI.
            beside = [process for process in _processes(self._gpu(gpu)) if process.gpuInstanceId == gi]
        return sorted({int(process.pid) for process in (*on_it, *beside)})

    def clients(self, gpu: str) -> Sequence[int]:
        with _asking("processes on the GPU"):
            return _clients(self._opened(gpu))

    def capabilities(self, gpu: str, gi: int, ci: int | None) -> Sequence[Capability]:
        if self._driver is None:
            return []
        if gpu not in self._minors:
            with _asking("read the minor number"):
                self._minors[gpu] = int(pynvml.nvmlDeviceGetMinorNumber(self._gpu(gpu)))
        return self._driver.capabilities(self._minors[gpu], gi, ci)

    @property
    def config(self) -> Capability | None:
        """The capability to create and destroy instances of any GPU; None without fence."""
        return self._driver.config() if self._driver else None

    def close(self) -> None:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()

    # Beyond the interface: for the administrator's verbs.

    def board(self, gpu: str) -> Board:
        """All that can be read of a GPU without MIG mode and without root. Raises DeviceError."""
        with _asking("read the GPU"):
            device = self._opened(gpu)
            return Board(
                uuid=str(pynvml.nvmlDeviceGetUUID(device)),
                name=str(pynvml.nvmlDeviceGetName(device)),
                address=str(pynvml.nvmlDeviceGetPciInfo(device).busId),
                pci=_pci(device),
                driver=str(pynvml.nvmlSystemGetDriverVersion()),
                mig=_mig_mode(device),
                persistence=bool(pynvml.nvmlDeviceGetPersistenceMode(device)),
                offers=tuple(_offers(device)),
                processes=tuple(_clients(device)),
            )

    def set_mig_mode(self, gpu: str, on: bool) -> None:
        """Turn MIG mode on or off. IN_USE while something uses the GPU, RESET_REQUIRED where that must follow."""
        with _asking(f"turn MIG mode {'on' if on else 'off'}"):
            # NVML says that it went well, and beside it whether it did.
            activation = pynvml.nvmlDeviceSetMigMode(self._opened(gpu), int(on))
            if activation:
                raise pynvml.NVMLError(activation)
        self._gpus.pop(gpu, None)

    # GPUs.

    def _uuid_at(self, index: int) -> str:
        with _asking(f"GPU {index}"):
            if not 0 <= index < pynvml.nvmlDeviceGetCount():
                raise DeviceError(Nvml.NOT_FOUND, f"GPU {index}")
            try:
                gpu = str(pynvml.nvmlDeviceGetUUID(pynvml.nvmlDeviceGetHandleByIndex(index)))
            except pynvml.NVMLError as error:
                if error.value in _ABSENT:
                    raise
                gpu = str(index)  # whoever asks for it will be told; the others go on
        self._indices[gpu] = index
        return gpu

    def _gpu(self, gpu: str) -> Any:
        """The handle of a GPU that is in MIG mode. Raises DeviceError that says what to do where it is not."""
        if gpu not in self._gpus:
            device = self._opened(gpu)
            with _asking("read the MIG mode"):
                mode = _mig_mode(device)
            if mode is None:
                raise DeviceError(Nvml.NOT_SUPPORTED, "this GPU has no MIG mode")
            if mode == (False, True):
                raise DeviceError(Nvml.RESET_REQUIRED, "MIG mode is not on yet")
            if not mode[0]:
                raise DeviceError(Nvml.NOT_SUPPORTED, f"MIG mode is off, `rms mig enable {gpu}` turns it on")
            self._gpus[gpu] = device
        return self._gpus[gpu]

    def _opened(self, gpu: str) -> Any:
        with _asking("open"):
            index = self._indices.get(gpu)
            return self._found(gpu) if index is None else pynvml.nvmlDeviceGetHandleByIndex(index)

    def _found(self, gpu: str) -> Any:
        # NVML opens one GPU after the other when it looks for a UUID, and fails where any of them is lost. Asked for a
        # PCI address it opens that GPU alone, as for an index.
        if address := self._address(gpu):
            return pynvml.nvmlDeviceGetHandleByPciBusId(address)
        try:
            return pynvml.nvmlDeviceGetHandleByUUID(gpu)
        except pynvml.NVMLError as error:
            raise DeviceError(Nvml.NOT_FOUND if error.value in _ABSENT else error.value, "open") from error

    def _address(self, gpu: str) -> str | None:
        """The PCI address of a GPU, from the kernel module, which opens none for it. None where it does not tell: of a
        GPU that nobody has opened yet."""
        gpus = os.path.join(self._root, "proc/driver/nvidia/gpus")
        with suppress(OSError):
            for address in os.listdir(gpus):
                path = f"{gpus}/{address}/information"
                with suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
                    if gpu in file.read().split():
                        return address
        return None

    # Instances.

    def _gpu_instance(self, gpu: str, gi: int) -> Any:
        device = self._gpu(gpu)
        with _asking(f"GI {gi}"):
            return pynvml.nvmlDeviceGetGpuInstanceById(device, gi)

    def _compute_instance(self, gpu: str, gi: int, ci: int) -> Any:
        instance = self._gpu_instance(gpu, gi)
        with _asking(f"GI {gi} CI {ci}"):
            return pynvml.nvmlGpuInstanceGetComputeInstanceById(instance, ci)

    def _of_compute(self, gpu: str, instance: Any, profile: int) -> list[Any]:
        """The compute instance profiles that a GPU instance of this profile id offers; asked once a session."""
        key = (gpu, profile)
        if key not in self._compute_profiles:
            shared = pynvml.NVML_COMPUTE_INSTANCE_ENGINE_PROFILE_SHARED
            self._compute_profiles[key] = [
                info
                for _, info in _probed(
                    pynvml.NVML_COMPUTE_INSTANCE_PROFILE_COUNT,
                    lambda number: pynvml.nvmlGpuInstanceGetComputeInstanceProfileInfo(instance, number, shared),
                )
            ]
        return self._compute_profiles[key]

    def _spanning(self, gpu: str, instance: Any, profile: Profile) -> int | None:
        """The id of the compute instance that is the only one in a GPU instance and has all its slices, if there is."""
        slices = {
            int(pynvml.nvmlComputeInstanceGetInfo(ci).id): int(offered.sliceCount)
            for offered in self._of_compute(gpu, instance, profile.id)
            for ci in _listed(
                pynvml.nvmlGpuInstanceGetComputeInstances,
                instance,
                offered.id,
                pynvml.c_nvmlComputeInstance_t * offered.instanceCount,
            )
        }
        return next(iter(slices)) if list(slices.values()) == [profile.compute] else None

    def _mig_device(self, gpu: str, gi: int, ci: int) -> Any:
        self._compute_instance(gpu, gi, ci)  # NOT_FOUND means that the instance is gone, and nothing else
        with _asking(f"MIG device of GI {gi} CI {ci}"):
            if (device := _mig_devices(self._gpu(gpu)).get((gi, ci))) is None:
                # A session may keep an old picture of what another process has changed: a new one sees it as it is.
                self._gpus.clear()
                pynvml.nvmlShutdown()
                pynvml.nvmlInit()
                device = _mig_devices(self._gpu(gpu)).get((gi, ci))
        if device is None:
            raise DeviceError(Nvml.UNKNOWN, f"GI {gi} CI {ci} exists, but has no MIG device")
        return device


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """NVML's errors as ours: `what` is what was to be done."""
    try:
        yield
    except pynvml.NVMLError as error:
        raise DeviceError(error.value, what) from error


def _pci(device: Any) -> str:
    return f"{pynvml.nvmlDeviceGetPciInfo(device).pciDeviceId >> 16:04X}"


def _mig_mode(device: Any) -> tuple[bool, bool] | None:
    """Whether MIG mode is on, and whether it will be after a reset."""
    try:
        current, pending = pynvml.nvmlDeviceGetMigMode(device)
    except pynvml.NVMLError as error:
        if error.value != Nvml.NOT_SUPPORTED:
            raise
        return None
    return bool(current), bool(pending)


def _offers(device: Any) -> Iterator[Offer]:
    """The profiles of a GPU, small to large as geometry.json has them."""
    found = []
    for kind, info in _probed(
        pynvml.NVML_GPU_INSTANCE_PROFILE_COUNT,
        lambda number: pynvml.nvmlDeviceGetGpuInstanceProfileInfo(device, number),
    ):
        try:
            placements = _placements(device, info.id)
        except pynvml.NVMLError as error:
            if error.value not in (Nvml.NOT_SUPPORTED, Nvml.NO_PERMISSION):
                raise
            placements = None
        name = str(info.name).removeprefix("MIG ")
        limit, compute, memory_mb = int(info.instanceCount), int(info.sliceCount), int(info.memorySizeMB)
        found.append(Offer(name, _KINDS[kind], int(info.id), limit, compute, memory_mb, placements))
    yield from sorted(found, key=lambda offer: (offer.compute, offer.memory_mb))


def _placements(device: Any, profile: int) -> tuple[tuple[int, int], ...]:
    count = c_uint()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, None, byref(count))
    places = (pynvml.c_nvmlGpuInstancePlacement_t * count.value)()
    pynvml.nvmlDeviceGetGpuInstancePossiblePlacements(device, profile, places, byref(count))
    return tuple(sorted((int(place.start), int(place.size)) for place in places[: count.value]))


def _geometry(device: Any) -> Geometry:
    offers = list(_offers(device))
    names = {offer.name for offer in offers}
    profiles = [
        Profile(
            name=offer.name,
            kind=offer.kind,
            id=offer.id,
            limit=offer.limit,
            compute=offer.compute,
            memory=places[0][1],
            memory_mb=offer.memory_mb,
            starts=tuple(start for start, _ in places),
            aliases=tuple(
                alias for alias in geometry.aliases(offer.name, offer.kind, offer.memory_mb) if alias not in names
            ),
        )
        for offer in offers
        # Asked once more where NVML did not tell, for its reason.
        if (places := offer.placements if offer.placements is not None else _placements(device, offer.id))
    ]
    model = str(pynvml.nvmlDeviceGetName(device))
    slots = max((start + p.memory for p in profiles for start in p.starts), default=0)
    measured = Geometry(model, slots, profiles)
    known = geometry.of_device(_pci(device))
    if known and _shape(known) == _shape(measured):
        return Geometry(model, slots, profiles, known.configs)
    return measured


def _shape(known: Geometry) -> set[tuple[int, int, tuple[int, ...]]]:
    """What the numbers of the layouts speak of."""
    base = (known.by_name[name] for name in known.base())
    return {(p.compute, p.memory, p.starts) for p in base}


def _probed(count: int, ask: Any) -> Iterator[tuple[int, Any]]:
    """What NVML answers for each number of an enum that it knows."""
    for number in range(count):
        try:
            yield number, ask(number)
        except pynvml.NVMLError as error:
            if error.value == Nvml.INVALID_ARGUMENT:
                return  # the driver is older than our list
            if error.value != Nvml.NOT_SUPPORTED:
                raise


def _listed(ask: Any, of: Any, profile: int, array: Any) -> list[Any]:
    """The instances of one profile."""
    handles, count = array(), c_uint(array._length_)
    ask(of, profile, handles, byref(count))
    return list(handles[: count.value])


def _mig_devices(device: Any) -> dict[tuple[int, int], Any]:
    """The MIG devices of a GPU by GI and CI id. Their indices may have holes."""
    found = {}
    for index in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(device)):
        try:
            mig = pynvml.nvmlDeviceGetMigDeviceHandleByIndex(device, index)
            ids = pynvml.nvmlDeviceGetGpuInstanceId(mig), pynvml.nvmlDeviceGetComputeInstanceId(mig)
        except pynvml.NVMLError as error:
            if error.value not in _ABSENT:
                raise
        else:
            found[ids] = mig
    return found


def _processes(device: Any) -> list[Any]:
    """Every process that NVML shows on a GPU or MIG device. Graphics and MPS are not asked for on all of them."""
    found = list(pynvml.nvmlDeviceGetComputeRunningProcesses_v3(device))
    for ask in (pynvml.nvmlDeviceGetGraphicsRunningProcesses_v3, pynvml.nvmlDeviceGetMPSComputeRunningProcesses_v3):
        try:
            found += ask(device)
        except pynvml.NVMLError as error:
            if error.value not in (Nvml.NOT_SUPPORTED, Nvml.INVALID_ARGUMENT, Nvml.FUNCTION_NOT_FOUND):
                raise
    return found


def _clients(device: Any) -> list[int]:
    """The processes that have a whole GPU."""
    return sorted({int(process.pid) for process in _processes(device) if process.gpuInstanceId == _NO_INSTANCE})
