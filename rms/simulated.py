"""Simulated GPUs that behave as NVML does, for the demo, the tests and a site's first try without a GPU.

The GPUs live in one JSON file that all processes share, beside a journal of every operation. They survive processes,
not a reboot (a new boot id empties them), as real instances do. Errors, ids and UUIDs follow what is known of the
driver: exact place taken 23, illegal placement 2, still in use 19, unknown 6; the GI id follows from the place, and so
the UUID of an instance comes back when the same place is used again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from filelock import FileLock

from rms import files, geometry
from rms.device import Capability, DeviceError, DeviceInstance, Nvml
from rms.geometry import Geometry, Placement

_MEM, _FIRST_NODE = 1, 1000
"""Where no device is: the kernel's own /dev/null, /dev/zero and their like have few minors."""


class SimulatedDevice:
    """A session with simulated GPUs.

    `path` is their state file, made on first use with `count` GPUs of `model`; the journal is `path` + `.journal`, one
    JSON object a line: t (epoch), op, gpu, gi, ci, profile, start, size, uuid, pid, code (0 or NVML's error).
    `create` and `destroy` are seconds that each of the two creating and destroying calls takes, half of it each.
    `nodes` is a directory for their capability nodes. No driver answers behind these: to open one is "no such device"
    for whom the fence lets through, "permission denied" for all others.
    """

    def __init__(
        self,
        path: str,
        model: str,
        count: int,
        managed: Sequence[str | int],
        boot_id: str,
        create: float = 0.0,
        destroy: float = 0.0,
        nodes: str = "",
    ) -> None:
        self._path = path
        self._nodes = nodes
        self._boot_id = boot_id
        self._seconds = {"create": create / 2, "destroy": destroy / 2}
        self._geometry = geometry.load(model)
        self._fresh = [{"uuid": f"GPU-{_uuid(path, str(i))}", "instances": []} for i in range(count)]
        self._lock = FileLock(f"{path}.lock", timeout=60, poll_interval=0.005)
        known = [str(gpu["uuid"]) for gpu in self._fresh]
        self._managed = [known[g] if isinstance(g, int) and 0 <= g < count else str(g) for g in managed]
        missing = [g for g in self._managed if g not in known]
        if missing:
            raise DeviceError(Nvml.NOT_FOUND, f"GPU {missing[0]}")
        if len(set(self._managed)) < len(managed):
            raise DeviceError(Nvml.INVALID_ARGUMENT, f"one GPU is named twice ({' '.join(self._managed)})")

    # The interface of rms.device.Device.

    def gpus(self) -> Sequence[str]:
        return self._managed

    def geometry(self, gpu: str) -> Geometry:
        with self._state() as state:
            _gpu(state, gpu)
        return self._geometry

    def instances(self, gpu: str) -> Sequence[DeviceInstance]:
        with self._state() as state:
            return [DeviceInstance(i["gi"], _placement(i), i["ci"], i["uuid"]) for i in _gpu(state, gpu)["instances"]]

    def placement(self, gpu: str, gi: int) -> Placement:
        with self._state() as state:
            return _placement(_instance(_gpu(state, gpu), gi))

    def create_gpu_instance(self, gpu: str, profile: str, start: int) -> int:
        with self._operation("create_gpu_instance", gpu, profile=profile, start=start) as (board, entry, _):
            legal = self._geometry.by_name.get(profile)
            if legal is None or start not in legal.starts:
                raise DeviceError(Nvml.INVALID_ARGUMENT, f"create {profile} at {start}")
            placement = Placement(profile, start, legal.memory)
            taken = [_placement(i) for i in board["instances"]]
            if placement not in self._geometry.legal(profile, taken):
                raise DeviceError(Nvml.INSUFFICIENT_RESOURCES, f"create {profile} at {start}")
            gi = gi_id(self._geometry.slots, start, legal.memory)
            made = {"gi": gi, "profile": profile, "start": start, "size": legal.memory, "ci": None, "uuid": None}
            board["instances"].append(made)
            entry |= {"gi": gi, "size": legal.memory}
            return gi

    def create_compute_instance(self, gpu: str, gi: int) -> int:
        with self._operation("create_compute_instance", gpu, gi=gi) as (board, entry, _):
            instance = _instance(board, gi)
            if instance["ci"] is not None:
                raise DeviceError(Nvml.INSUFFICIENT_RESOURCES, f"create CI in GI {gi}")
            instance |= {"ci": 0, "uuid": f"MIG-{_uuid(gpu, str(gi), '0')}"}
            entry |= {k: instance[k] for k in ("ci", "profile", "start", "size", "uuid")}
            return 0

    def destroy_compute_instance(self, gpu: str, gi: int, ci: int) -> None:
        with self._operation("destroy_compute_instance", gpu, gi=gi, ci=ci) as (board, entry, state):
            instance = _instance(board, gi, ci)
            entry |= {k: instance[k] for k in ("profile", "start", "size", "uuid")}
            if _holders(state, gpu, gi, ci):
                raise DeviceError(Nvml.IN_USE, f"destroy CI {ci} of GI {gi}")
            instance |= {"ci": None, "uuid": None}

    def destroy_gpu_instance(self, gpu: str, gi: int) -> None:
        with self._operation("destroy_gpu_instance", gpu, gi=gi) as (board, entry, _):
            instance = _instance(board, gi)
            entry |= {k: instance[k] for k in ("profile", "start", "size")}
            if instance["ci"] is not None:
                raise DeviceError(Nvml.IN_USE, f"destroy GI {gi}")
            board["instances"].remove(instance)

    def uuid(self, gpu: str, gi: int, ci: int) -> str:
        with self._state() as state:
            return str(_instance(_gpu(state, gpu), gi, ci)["uuid"])

    def holders(self, gpu: str, gi: int, ci: int) -> Sequence[int]:
        with self._state() as state:
            _instance(_gpu(state, gpu), gi, ci)
            return _holders(state, gpu, gi, ci)

    def clients(self, gpu: str) -> Sequence[int]:
        return []

    def capabilities(self, gpu: str, gi: int, ci: int | None) -> Sequence[Capability]:
        if not self._nodes:
            return []
        number = next(i for i, fresh in enumerate(self._fresh) if fresh["uuid"] == gpu)
        first = _FIRST_NODE + 135 * number + 9 * gi  # in the driver's order
        minors = [first, *([] if ci is None else [first + 1 + ci])]
        return [Capability(f"{self._nodes}/nvidia-cap{minor}", os.makedev(_MEM, minor)) for minor in minors]

    def close(self) -> None:
        """Nothing is kept open between calls."""

    # What tests and the demo do to the GPUs from outside.

    def hold(self, uuid: str, pid: int) -> None:
        """Let process `pid` hold the MIG device `uuid` until it ends."""
        with self._state() as state:
            for gpu in state["gpus"]:
                for i in gpu["instances"]:
                    if i["uuid"] == uuid:
                        state["holders"].setdefault(_key(gpu["uuid"], i["gi"], i["ci"]), []).append(pid)
                        self._save(state)
                        return
        raise DeviceError(Nvml.NOT_FOUND, uuid)

    def fail(self, op: str, code: int, after: int = 0, times: int = 1) -> None:
        """Let calls of `op` (`*` for any that changes something) fail with `code`: `times` calls, `after` good ones."""
        with self._state() as state:
            state["faults"].append({"op": op, "code": code, "after": after, "times": times})
            self._save(state)

    def lose(self, gpu: str, lost: bool = True) -> None:
        """Let a GPU answer GPU_IS_LOST to everything; or (False) answer again, with what it had."""
        with self._state() as state:
            state["lost"] = [uuid for uuid in state.get("lost", []) if uuid != gpu] + [gpu] * lost
            self._save(state)

    # How it is kept.

    @contextmanager
    def _state(self) -> Iterator[dict[str, Any]]:
        with self._reporting(), self._lock:
            try:
                with open(self._path, encoding="utf-8") as file:
                    state: dict[str, Any] = json.load(file)
            except FileNotFoundError:
                state = {"schema": 1, "boot_id": None}
            if state["boot_id"] != self._boot_id:
                state |= {
                    "boot_id": self._boot_id,
                    "gpus": self._fresh,
                    "holders": {},
                    "faults": [],
                    "lost": [],
                    "last": None,
                }
                state["journal"] = self._journal_size()
                self._save(state)
            elif state["last"] is not None and self._journal_size() < state["journal"] + len(_line(state["last"])):
                # A writer was killed between the state and its line in the journal, or within the line.
                with open(f"{self._path}.journal", "ab") as file:
                    file.truncate(state["journal"])
                self._log(state["last"])
            yield state

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DeviceError(Nvml.UNKNOWN, f"{self._path}: {error.strerror or error}") from error

    @contextmanager
    def _operation(
        self, op: str, gpu: str, **arguments: Any
    ) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        # The driver's time passes outside the file's lock: operations on different GPUs overlap.
        if seconds := self._seconds[op.split("_", maxsplit=1)[0]]:
            time.sleep(seconds)
        with self._state() as state:
            entry = {"t": time.time(), "op": op, "gpu": gpu, **arguments, "pid": os.getpid(), "code": 0}
            board = _gpu(state, gpu)
            try:
                _strike(state["faults"], op)
                yield board, entry, state
            except DeviceError as error:
                entry["code"] = int(error.code)
                raise
            finally:
                state |= {"last": entry, "journal": self._journal_size()}
                self._save(state)
                self._log(entry)

    def _save(self, state: dict[str, Any]) -> None:
        files.replace(self._path, json.dumps(state).encode(), mode=0o644, durable=False)

    def _journal_size(self) -> int:
        return os.path.getsize(f"{self._path}.journal") if os.path.exists(f"{self._path}.journal") else 0

    def _log(self, entry: dict[str, Any]) -> None:
        with open(f"{self._path}.journal", "ab", buffering=0) as file:
            file.write(_line(entry))


def gi_id(slots: int, start: int, size: int) -> int:
    """The driver's GI id for a place: 0 the whole board, 1-2 halves, 3-6 quarters, 7-14 eighths.

    Source: kernel_mig_manager.c of NVIDIA's open kernel modules, for 8 slices; the other boards by the same rule.
    """
    parts = slots // size
    return parts - 1 + start // size


def _uuid(*names: str) -> str:
    digits = hashlib.sha1("/".join(names).encode(), usedforsecurity=False).hexdigest()
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-a{digits[17:20]}-{digits[20:32]}"


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"


def _placement(instance: dict[str, Any]) -> Placement:
    return Placement(instance["profile"], instance["start"], instance["size"])


def _gpu(state: dict[str, Any], uuid: str) -> dict[str, Any]:
    if uuid in state.get("lost", []):
        raise DeviceError(Nvml.GPU_IS_LOST, f"GPU {uuid}")
    for gpu in state["gpus"]:
        if gpu["uuid"] == uuid:
            found: dict[str, Any] = gpu
            return found
    raise DeviceError(Nvml.NOT_FOUND, f"GPU {uuid}")


def _instance(board: dict[str, Any], gi: int, ci: int | None = None) -> dict[str, Any]:
    for instance in board["instances"]:
        if instance["gi"] == gi and (ci is None or instance["ci"] == ci):
            found: dict[str, Any] = instance
            return found
    raise DeviceError(Nvml.NOT_FOUND, f"GI {gi}" if ci is None else f"GI {gi} CI {ci}")


def _key(gpu: str, gi: int, ci: int) -> str:
    return f"{gpu}/{gi}/{ci}"


def _holders(state: dict[str, Any], gpu: str, gi: int, ci: int) -> list[int]:
    # A process lets go of the GPU when it ends, however it ends.
    return [pid for pid in state["holders"].get(_key(gpu, gi, ci), []) if os.path.exists(f"/proc/{pid}")]


def _strike(faults: list[dict[str, Any]], op: str) -> None:
    for fault in faults:
        if fault["op"] in ("*", op) and fault["times"] > 0:
            if fault["after"] > 0:
                fault["after"] -= 1
                continue
            fault["times"] -= 1
            raise DeviceError(fault["code"], op)
