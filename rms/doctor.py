"""`rms doctor`: what is to be known of a node's GPUs, and what is wrong with them. Looks, and changes nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from rms import fence, geometry, grant
from rms.config import Config
from rms.device import DeviceError
from rms.errors import NodeError
from rms.inventory import State
from rms.nvml import Board, NvmlDevice
from rms.request import printable
from rms.store import Store


class Examined(NamedTuple):
    """One GPU. `board` is None where it could not be read; `problems` are lines for the administrator."""

    gpu: str
    board: Board | None
    problems: tuple[str, ...]


def examine(device: NvmlDevice, state: State) -> list[Examined]:
    """Every GPU that the config names. `state` is what RMS knows of their instances."""
    found = []
    for gpu in device.gpus():
        try:
            board = device.board(gpu)
        except DeviceError as error:
            found.append(Examined(gpu, None, (str(error),)))
        else:
            found.append(Examined(gpu, board, (*_problems(board), *_access(device, board, state))))
    return found


def _problems(board: Board) -> Iterator[str]:
    if board.mig is None:
        yield "it has no MIG mode: take it out of gpus in rms.toml"
    elif board.mig == (False, False):
        yield f"MIG mode is off: rms mig enable {board.uuid}"
    elif board.mig[0] != board.mig[1]:
        yield f"MIG mode will be {'on' if board.mig[1] else 'off'} after a reset of the GPU or a reboot"
    if not board.persistence:
        yield "persistence mode is off, which makes each hook about a second slower: start nvidia-persistenced"
    if board.processes:
        pids = ", ".join(f"{pid} ({_command(pid)})" for pid in board.processes)
        yield f"instances can't be created or destroyed while a process has the whole GPU: {pids}"
    if board.mig and board.mig[0] and any(offer.placements is None for offer in board.offers):
        yield "NVML does not tell the placements: only root may ask"
    yield from (f"differs from geometry.json: {text}" for text in differences(board))


def _access(device: NvmlDevice, board: Board, state: State) -> Iterator[str]:
    """What is wrong with who may open the instances of a GPU, and who holds those that are quarantined."""
    if not (board.mig and board.mig[0]) or any(offer.placements is None for offer in board.offers):
        return  # it has no instances, or only root may ask for them
    records = {i.gi: i for gpu in state.gpus if gpu.uuid == board.uuid for i in gpu.instances}
    look = fence.Look(everybody=True)  # what keeps an instance from being destroyed may be root's as well
    users = {generation: {a.uid} for a in state.allocations for generation in a.instances}
    try:
        if device.config and os.path.lexists(device.config.node) and fence.readers(device.config) != set():
            yield f"{device.config.node}: others than root may open it, and destroy the instances of any job"
        for instance in device.instances(board.uuid):
            record = records.get(instance.gi)
            if record and record.status == "quarantined":
                pids = {*look.holders(device.capabilities(board.uuid, instance.gi, instance.ci))}
                pids |= {*device.holders(board.uuid, instance.gi, instance.ci)} if instance.ci is not None else set()
                who = ", ".join(f"{pid} ({_command(pid)}, uid {_user(pid)})" for pid in sorted(pids))
                notes = [record.note] if record.trouble != "held" or not who else []
                notes += [f"held by process {who}"] if who else []
                yield f"{instance.placement} is quarantined: {'; '.join(notes)}"
            if record and record.intent is not None:
                continue  # it is being given or taken just now
            theirs = users.get(record.generation, set()) if record else set()
            for capability in device.capabilities(board.uuid, instance.gi, instance.ci):
                yield from (f"{instance.placement}: {text}" for text in fence.problems(capability, theirs))
    except DeviceError as error:
        yield str(error)


def directories(config: Config) -> Iterator[str]:
    """What is wrong with the directories that every MIG job needs, and with that of the audit log."""
    for check in (Store(config.state_dir, 0.0).check, partial(grant.directory, config.run_dir, make=False)):
        try:
            check()
        except NodeError as error:
            yield str(error)
    logs = os.path.dirname(config.audit_log)
    if not os.access(logs, os.W_OK):
        yield f"nothing can be written to {logs}, where the audit log belongs (etc/tmpfiles.d/rms.conf makes it)"


def differences(board: Board) -> list[str]:
    """Where geometry.json, from which slurm.conf and the lua are made, is not what the GPU says."""
    known = geometry.of_device(board.pci)
    if known is None:
        return []
    found = []
    offered = {offer.name: offer for offer in board.offers}
    for profile in known.profiles:
        if (offer := offered.pop(profile.name, None)) is None:
            found.append(f"{known.model} has {profile.name} there, and this GPU does not")
            continue
        places = offer.placements and tuple((start, profile.memory) for start in profile.starts)
        here = _facts(offer.id, offer.limit, offer.compute, offer.placements)
        there = _facts(profile.id, profile.limit, profile.compute, places)
        if here != there:
            found.append(f"{profile.name} is {here} here, {there} there")
    return found + [f"{name} is not there" for name in offered]


def _facts(number: int, limit: int, compute: int, places: Sequence[tuple[int, int]] | None) -> str:
    return f"id {number}, at most {limit}, {compute} compute slices, placements {_places(places)}"


def _places(places: Sequence[tuple[int, int]] | None) -> str:
    """As nvidia-smi prints them: {0,4}:4."""
    return f"{{{','.join(str(start) for start, _ in places)}}}:{places[0][1]}" if places else "unknown"


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return printable(file.read().strip())  # whoever started it may have named it
    except OSError:
        return "gone, or in another container"


def _user(pid: int) -> str:
    try:
        return str(os.stat(f"/proc/{pid}").st_uid)
    except OSError:
        return "unknown"


def report(found: Sequence[Examined], fenced: bool) -> dict[str, Any]:
    """The same as one JSON object."""
    return {
        "schema": 1,
        "fenced": fenced,
        "gpus": [
            {
                "uuid": one.gpu,
                "board": one.board
                and {**one.board._asdict(), "offers": [offer._asdict() for offer in one.board.offers]},
                "problems": list(one.problems),
            }
            for one in found
        ],
    }


def describe(found: Sequence[Examined], fenced: bool) -> str:
    """The same for people; problems begin with `!`."""
    lines = [] if fenced else ["fence = false: every user of this node may open every instance"]
    for number, (gpu, board, problems) in enumerate(found):
        lines.append("  ".join([f"GPU {number}", *([board.name] if board else []), gpu]))
        if board:
            known = geometry.of_device(board.pci)
            modes = {None: "none", (True, True): "on", (False, False): "off"}
            lines += [
                f"  driver {board.driver}, PCI {board.address}, device {board.pci}"
                f" ({f'{known.model} in geometry.json' if known else 'not in geometry.json'})",
                f"  MIG mode {modes.get(board.mig, 'changes with a reset')}, "
                f"persistence mode {'on' if board.persistence else 'off'}",
            ]
            if board.offers:
                lines.append(f"  {'profile':<16}{'id':>4}{'max':>5}{'compute':>9}{'MiB':>8}  placements")
            lines += [
                f"  {o.name:<16}{o.id:>4}{o.limit:>5}{o.compute:>9}{o.memory_mb:>8}  {_places(o.placements)}"
                for o in board.offers
            ]
        lines += [f"! {text}" for text in problems]
    return "".join(f"{line}\n" for line in lines)
