"""Machines for the stand-in libnvidia-ml.so.1 (tests/libnvml/nvml.c): GPUs from the geometry data, and what tests do to
them from outside."""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import functools
import json
import os
import shutil
import stat
import subprocess
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pynvml

from rms import geometry
from rms.device import DeviceError, Nvml
from rms.nvml import _KINDS, NvmlDevice

VARIABLE = "RMS_NVML_MACHINE"
CREATE_GI, CREATE_CI = "nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlGpuInstanceCreateComputeInstance"
DESTROY_GI, DESTROY_CI = "nvmlGpuInstanceDestroy", "nvmlComputeInstanceDestroy"
CALLS = {
    "create_gpu_instance": CREATE_GI,
    "create_compute_instance": CREATE_CI,
    "destroy_compute_instance": DESTROY_CI,
    "destroy_gpu_instance": DESTROY_GI,
}
"""The call of NVML that does an operation of rms.device."""
NAMES = {"A100-80GB": "NVIDIA A100-SXM4-80GB", "H100-80GB": "NVIDIA H100 80GB HBM3"}
"""What NVML calls some of the models of geometry.json."""


@functools.cache
def library() -> Path:
    """The directory with the stand-in, compiled once: LD_LIBRARY_PATH for other processes. In this one it is loaded
    already, and so it is what `dlopen("libnvidia-ml.so.1")` finds."""
    directory = Path(tempfile.mkdtemp(prefix="rms-libnvml-"))
    directory.chmod(0o755)
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    built = directory / "libnvidia-ml.so.1"
    source = Path(__file__).with_name("libnvml") / "nvml.c"
    flags = ["-std=c11", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-Wl,-soname,{built.name}"]
    subprocess.run(["gcc", *flags, "-o", str(built), str(source)], check=True)
    ctypes.CDLL(str(built))
    return directory


class Machine:
    """A machine with GPUs of the named models (a model that geometry.json lacks can't do MIG), in files named `path`.*

    `use` makes it the one that NVML shows to this process; `environment` does so for others. Options of the stand-in:
    `high` gives the last MIG index first, `odd-ids` other GI ids than the usual ones, `passthrough` has GPUs that the
    driver can't reset, `stale` sessions that do not see the MIG devices which others make, `no-persistence`. `broken`
    is the code that opening NVML fails with, `modify` the driver's NVreg_ModifyDeviceFiles.

    The driver's /proc and /dev are in `root`. Behind the nodes of its capabilities is no device, so that to open one is
    ENXIO for whom its permissions let through; but GI 2 of GPU 0 has /dev/full, which can be held open.
    """

    def __init__(
        self,
        path: Path,
        models: Sequence[str] = ("A100-80GB", "A100-80GB"),
        boot_id_file: str = "/proc/sys/kernel/random/boot_id",
        create: float = 0.0,
        destroy: float = 0.0,
        options: Sequence[str] = (),
        privileged: int | None = None,
        broken: int = 0,
        modify: bool = True,
    ) -> None:
        self.path = path
        self.root = Path(f"{path}.root")
        self.models = list(models)
        self.uuids = [f"GPU-{uuid.uuid5(uuid.NAMESPACE_URL, f'{path}/{number}')}" for number in range(len(models))]
        seconds = {CREATE_GI: create / 2, CREATE_CI: create / 2, DESTROY_GI: destroy / 2, DESTROY_CI: destroy / 2}
        lines = [
            "driver 580.65.06",
            f"privileged {os.geteuid() if privileged is None else privileged}",
            f"boot {boot_id_file}",
            f"broken {broken}",
            f"modify {modify:d}",
            *(f"option {option}" for option in options),
            *(f"latency {call} {round(each * 1000)}" for call, each in seconds.items()),
        ]
        different = list(dict.fromkeys(models))
        for number, model in enumerate(different):
            lines += _model(number, model)
        for number, (gpu, model) in enumerate(zip(self.uuids, models, strict=True)):
            lines.append(f"gpu {gpu} {different.index(model)} {number} {self.address(number)}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines))
        self._capabilities()

    def _capabilities(self) -> None:
        minors = {"config": 1001, "monitor": 1002}
        for gpu in range(len(self.models)):
            for gi in range(15):
                minors[f"gpu{gpu}/gi{gi}/access"] = len(minors) + 1001
                minors |= {f"gpu{gpu}/gi{gi}/ci{ci}/access": len(minors) + 1001 + ci for ci in range(8)}
        minors["gpu0/gi2/access"] = os.minor(os.stat("/dev/full").st_rdev)
        for directory in ["dev/nvidia-caps", "proc/driver/nvidia-caps"]:
            (self.root / directory).mkdir(parents=True, exist_ok=True)
        for gpu in range(len(self.models)):
            (self.root / f"proc/driver/nvidia/capabilities/gpu{gpu}/mig").mkdir(parents=True, exist_ok=True)
        devices = "Character devices:\n  1 mem\n  1 nvidia-caps\n  2 nvidia-caps-imex-channels\n\nBlock devices:\n"
        (self.root / "proc/devices").write_text(devices)
        text = "".join(f"{name} {minor}\n" for name, minor in minors.items())
        (self.root / "proc/driver/nvidia-caps/mig-minors").write_text(text)

    def modprobe(self) -> None:
        """What NVIDIA's setuid nvidia-modprobe does for any user who asks: nodes as the driver's entries want them."""
        for entry in self.root.glob("proc/driver/nvidia/capabilities/**/access"):
            values = dict(line.split(": ") for line in entry.read_text().splitlines())
            if values["DeviceFileModify"] == "1":
                node = self.root / f"dev/nvidia-caps/nvidia-cap{values['DeviceFileMinor']}"
                if not node.exists():
                    os.mknod(node, 0o444 | stat.S_IFCHR, os.makedev(1, int(values["DeviceFileMinor"])))
                node.chmod(int(values["DeviceFileMode"]))
                os.chown(node, 0, 0)

    @staticmethod
    def address(number: int) -> str:
        """The PCI address of a GPU."""
        return f"0000:{number + 1:02x}:00.0"

    def use(self) -> None:
        """Let NVML in this process show this machine."""
        library()
        os.environ[VARIABLE] = str(self.path)

    @property
    def environment(self) -> dict[str, str]:
        """What lets NVML in another process show it."""
        return {VARIABLE: str(self.path), "LD_LIBRARY_PATH": str(library())}

    @contextmanager
    def state(self) -> Iterator[list[str]]:
        """The lines of its state, to be changed from outside (nvml.c says what they mean)."""
        self.use()
        pynvml.nvmlInit()
        pynvml.nvmlDeviceGetCount()  # it looks at the boot id with every call
        pynvml.nvmlShutdown()
        with open(f"{self.path}.lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = Path(f"{self.path}.state")
            lines = path.read_text().splitlines()
            yield lines
            path.write_text("".join(f"{line}\n" for line in lines))

    @contextmanager
    def device(self, managed: Sequence[str | int] | None = None) -> Iterator[NvmlDevice]:
        """A session with all its GPUs, or with those named."""
        self.use()
        device = NvmlDevice(range(len(self.models)) if managed is None else managed, str(self.root))
        try:
            yield device
        finally:
            device.close()

    def fail(self, call: str, code: int, gpu: int = -1, after: int = 0, times: int = 1) -> None:
        """Let an NVML call (`*` for any) on a GPU (-1 for any) fail: `times` calls (-1 for ever), `after` good ones."""
        with self.state() as lines:
            lines.append(f"fault {call} {gpu} {int(code)} {after} {times}")

    def mend(self) -> None:
        """No more faults."""
        with self.state() as lines:
            lines[:] = [line for line in lines if not line.startswith("fault ")]

    def hold(self, pid: int, gpu: int, gi: int = -1, ci: int = -1) -> None:
        """Let a process hold a compute instance, or the whole GPU, until it ends."""
        with self.state() as lines:
            lines.append(f"hold {pid} {gpu} {gi} {ci}")

    def vanish(self, gpu: int) -> None:
        """Take all instances of a GPU away, as a reset does."""
        with self.state() as lines, open(f"{self.path}.journal", "a") as journal:
            for instance in [line for line in lines if line.startswith(f"gi {gpu} ")]:
                *_, gi, _, _, serial = instance.split()
                lines[:] = [line for line in lines if line != instance and not line.startswith(f"ci {serial} ")]
                shutil.rmtree(self.root / f"proc/driver/nvidia/capabilities/gpu{gpu}/mig/gi{gi}")
                entry = {"op": "destroy_gpu_instance", "gpu": self.uuids[gpu], "gi": int(gi), "code": 0}
                journal.write(json.dumps(entry) + "\n")

    def mig_mode(self, gpu: int, current: bool, pending: bool) -> None:
        """Set the MIG mode of a GPU."""
        with self.state() as lines:
            lines[:] = [line for line in lines if not line.startswith(f"mig {gpu} ")]
            lines.append(f"mig {gpu} {current:d} {pending:d}")

    def opened(self) -> set[int]:
        """The GPUs that any process has opened."""
        path = Path(f"{self.path}.opened")
        return {int(word) for word in path.read_text().split()} if path.exists() else set()

    def journal(self) -> list[dict[str, Any]]:
        """What was done to the GPUs, as SimulatedDevice tells it."""
        path = Path(f"{self.path}.journal")
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def kernel(self, known: Sequence[int]) -> None:
        """Fill /proc/driver/nvidia/gpus; the kernel module tells the UUIDs of the GPUs `known`."""
        for number, gpu in enumerate(self.uuids):
            directory = self.root / "proc/driver/nvidia/gpus" / self.address(number)
            directory.mkdir(parents=True, exist_ok=True)
            shown = gpu if number in known else "GPU-????????-????-????-????-????????????"
            (directory / "information").write_text(f"Model: \t\t {self.models[number]}\nGPU UUID: \t {shown}\n")


class Hands:
    """The hands of a test on all GPUs of a machine: the interface of rms.device with a session for each call, and what
    SimulatedDevice offers to tests."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with self._machine.device() as device:
                return getattr(device, name)(*arguments)

        return call

    def hold(self, uuid: str, pid: int) -> None:
        """Let process `pid` hold the MIG device `uuid` until it ends."""
        for number, gpu in enumerate(self._machine.uuids):
            for found in self.instances(gpu):
                if found.uuid == uuid:
                    self._machine.hold(pid, number, found.gi, found.ci)
                    return
        raise DeviceError(Nvml.NOT_FOUND, uuid)

    def fail(self, op: str, code: int, after: int = 0, times: int = 1) -> None:
        """Let an operation fail: `times` calls, `after` good ones."""
        self._machine.fail(CALLS[op], code, after=after, times=times)


def _model(number: int, model: str) -> Iterator[str]:
    known = geometry.load(model) if model in geometry.models() else None
    pci = {"A100-80GB": 0x20B2, "A100-40GB": 0x20B0, "A30": 0x20B7, "H100-80GB": 0x2330}.get(model, 0x1234)
    resetless = not model.startswith("A")  # Ampere needs a reset for MIG mode, and keeps it
    yield f"model {known.slots if known else 0} {resetless:d} {pci:x} {NAMES.get(model, f'NVIDIA {model}')}"
    kinds = {name: value for value, name in _KINDS.items()}
    for p in known.profiles if known else ():
        gigabytes = int(p.name.partition(".")[2].partition("gb")[0])
        memory_mb = p.memory_mb or (gigabytes - 2) * 1024  # nobody has published it
        starts = ",".join(str(start) for start in p.starts)
        yield f"profile {number} {kinds[p.kind]} {p.id} {p.limit} {p.compute} {p.memory} {memory_mb} {p.name} {starts}"
