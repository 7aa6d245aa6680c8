"""Why a job was put where it is: a decision read back from a line of the audit log, and made again from it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from policy import model
from policy.model import Model
from rms import planner
from rms.errors import RequestError
from rms.geometry import Geometry, Placement
from rms.planner import Asked, Busy, Candidate, Choice, Decision, GpuView, View
from rms.request import parse


def seen(entry: Mapping[str, Any], boards: Mapping[str, Geometry]) -> View:
    """The GPUs as the line shows them. `boards` are the geometries of models. Raises RequestError if one is missing."""
    gpus = []
    for uuid, gpu in entry["gpus"].items():
        if gpu["model"] not in boards:
            raise RequestError(f"the placements of {gpu['model']} are not known here")
        known = boards[gpu["model"]]
        busy = tuple(Busy(_place(known, place), start, end) for place, start, end in gpu["busy"])
        idle, blocked = (tuple(_place(known, place) for place in gpu[kind]) for kind in ("idle", "blocked"))
        gpus.append(GpuView(uuid, known, busy, idle, blocked))
    return View(tuple(gpus), (), None, float(entry["now"]))


def again(entry: Mapping[str, Any], view: View, of: Model | None) -> list[Decision] | None:
    """The decisions of a line, made again from nothing but it, what is `seen` in it, and the model that it names.

    Raises KeyError, TypeError, RequestError where the line is damaged.
    """
    request = parse(entry["request"], view.gpus[0].geometry)
    known = model.reread(of, entry["basis"]) if of and entry["basis"] else None
    logged = iter([entry["instances"][i] for i in planner.turns(view, request)])

    def choose(view: View, asked: Asked, candidates: Sequence[Candidate]) -> Choice:
        one = next(logged)  # who stood in, and why, is no decision
        if one["source"] == planner.BUILT_IN or of is None or known is None:
            return planner.built_in(view, asked, candidates)._replace(fault=one["fault"])
        return model.decide(of, known, view, asked, candidates)._replace(fault=one["fault"])

    return planner.plan(view, request, entry["end"], choose)


def describe(entry: Mapping[str, Any], checked: str) -> str:
    """A line for people. `checked` says how making the decision again went."""
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(entry["now"]))
    job = f"job {entry['run'][1]}.{entry['run'][2]}"
    lines = [f"{job}: {entry['request']}, {when}; {checked}"]
    numbers = {uuid: number for number, uuid in enumerate(entry["gpus"])}
    for uuid, gpu in entry["gpus"].items():
        held = [f"{kind} {place}" for kind in ("idle", "blocked") for place in gpu[kind]]
        held = [f"busy {place}{_until(end, entry['now'])}" for place, _, end in gpu["busy"]] + held
        lines.append(f"GPU {numbers[uuid]} {uuid}: {', '.join(held) or 'empty'}")
    if basis := entry["basis"]:
        for name in ("demand", "clamped"):
            if basis[name]:
                shares = " ".join(f"{profile} {share:.3f}" for profile, share in basis[name].items())
                lines.append(
                    f"{'demand' if name == 'demand' else '  outside of what was trained on: taken for'} {shares}"
                )
    for one in entry["instances"]:
        destroys = f", destroying {' '.join(one['destroys'])}" if one["destroys"] else ""
        how = "reused" if one["reuse"] else f"made{destroys}"
        lines += ["", f"{one['profile']}: GPU {one['gpu']} {one['placement']}, {how}; {one['reason']}"]
        lines += [f"! {one['fault']}"] if one["fault"] else []
        for gpu, place, score in sorted(one["candidates"], key=lambda found: -found[2]):
            chosen = [gpu, place] == [one["gpu"], one["placement"]]
            rule = "  the built-in rule's choice" if [gpu, place] == one["rule"] else ""
            lines.append(f"{'*' if chosen else ' '} {score:12.6f}  GPU {gpu} {place}{rule}")
        lines.append(f"  in mind for this GPU: {' '.join(one['wanted'])}")
    return "\n".join(lines)


def _place(known: Geometry, text: str) -> Placement:
    profile, _, where = text.rpartition("@")
    start, _, size = where.partition(":")
    if profile not in known.by_name:
        raise RequestError(f"{known.model} has no {profile}")
    return Placement(profile, int(start), int(size))


def _until(end: float | None, now: float) -> str:
    return "" if end is None else f" for {(end - now) / 60:.0f} min more at most" if end > now else " (past its limit)"
