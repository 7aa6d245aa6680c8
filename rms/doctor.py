"""`rms doctor`: what is to be known of a node's GPUs, and what is wrong with them. Looks, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from rms import geometry
from rms.device import DeviceError
from rms.nvml import Board, NvmlDevice


class Examined(NamedTuple):
    """One GPU. `board` is None where it could not be read; `problems` are lines for the administrator."""

    gpu: str
    board: Board | None
    problems: tuple[str, ...]


def examine(device: NvmlDevice) -> list[Examined]:
    """Every GPU that the config names."""
    found = []
    for gpu in device.gpus():
        try:
            board = device.board(gpu)
        except DeviceError as error:
            found.append(Examined(gpu, None, (str(error),)))
        else:
            found.append(Examined(gpu, board, tuple(_problems(board))))
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
            return file.read().strip()
    except OSError:
        return "gone, or in another container"


def report(found: Sequence[Examined]) -> dict[str, Any]:
    """The same as one JSON object."""
    return {
        "schema": 1,
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


def describe(found: Sequence[Examined]) -> str:
    """The same for people; problems begin with `!`."""
    lines = []
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
