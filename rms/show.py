"""What `rms show` tells of a node: `look` reads it, `report` puts it into one JSON object, `draw` makes that readable.

Nothing here takes a lock or changes anything: whoever may read the state file may look, and no Prolog waits for them.
The drawing is plain ASCII, so that it is the same on every terminal, in a mail and in a log.
"""

from __future__ import annotations

import pwd
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from rms import config as configuration
from rms.config import Config
from rms.errors import NodeError
from rms.geometry import Geometry, Placement
from rms.inventory import Allocation, State
from rms.request import printable
from rms.store import Damaged, Store

SCHEMA = 1
NARROWEST = 60
"""Columns below which nothing is made narrower."""
WIDEST_SLICE = 16
"""Columns of one memory slice at most: wider is not easier to read."""

Paint = Callable[[str, str], str]
"""Gives a text (first) the looks of a kind of thing (second): a status, `free`, `unusable`, `warning` or `heading`."""

_STYLES = {
    "busy": "30;42",
    "idle": "30;46",
    "making": "30;43",
    "removing": "30;43",
    "quarantined": "97;41",
    "free": "2",
    "unusable": "2",
    "warning": "31",
    "heading": "1",
}


def plain(text: str, kind: str) -> str:
    """No looks."""
    return text


def coloured(text: str, kind: str) -> str:
    """The colours of a terminal."""
    return f"\x1b[{_STYLES[kind]}m{text}\x1b[0m"


class Seen(NamedTuple):
    """The state as it was found. `status`: current, missing (no MIG job yet), before-boot (of no use any more), or
    damaged (the previous generation is shown); `code` is the exit code that says the same."""

    state: State
    path: str
    status: str
    note: str
    code: int


def look(config: Config) -> Seen:
    """Read a node's state without its lock. Raises NodeError where there is nothing to be shown."""
    boot_id = configuration.boot_id(config)
    store = Store(config.state_dir, 0.0)
    try:
        state, damage = store.glance(), ""
    except Damaged as damaged:
        if damaged.state is None:
            raise NodeError(f"{damaged}; the next MIG job's Prolog rebuilds it from the GPUs") from None
        state, damage = damaged.state, str(damaged)
    if not state.boot_id:
        return Seen(State(), store.path, "missing", f"no MIG job has run here yet: there is no {store.path}", 0)
    if state.boot_id != boot_id:
        note = "the state is from before this boot, which ended all instances; the next MIG job begins a new one"
        return Seen(State(), store.path, "before-boot", note, 0)
    if damage:
        return Seen(state, store.path, "damaged", f"{damage}; the next MIG job's Prolog mends it", NodeError.code)
    note = "" if state.managed == list(config.gpus) else "the configuration names other GPUs now: from the next MIG job"
    return Seen(state, store.path, "current", note, 0)


def report(
    seen: Seen,
    node: str,
    policy: Mapping[str, str | None],
    now: float | None = None,
    user_name: Callable[[int], str | None] | None = None,
) -> dict[str, Any]:
    """All that is known, as the JSON object of `rms show --json`. Times are epoch seconds, UUIDs whole."""
    state = seen.state
    user_name = user_name or _user_name
    runs = {generation: a for a in state.allocations for generation in a.instances}
    working = {intent.number: intent for intent in state.intents}
    return {
        "schema": SCHEMA,
        "node": node,
        "time": time.time() if now is None else now,
        "state": {"path": seen.path, "status": seen.status, "note": seen.note},
        "policy": dict(policy),
        "gpus": [
            {
                "number": number,
                "uuid": gpu.uuid,
                "model": gpu.model,
                "fault": gpu.fault,
                "doubt": gpu.doubt,
                "left": gpu.left,
                "tries": gpu.tries,
                "retry": gpu.retry,
                "instances": [
                    {
                        "generation": i.generation,
                        **i.placement._asdict(),
                        "status": i.status,
                        "gi": i.gi,
                        "ci": i.ci,
                        "uuid": i.uuid,
                        "used": i.used,
                        "trouble": i.trouble,
                        "note": i.note,
                        "intent": i.intent,
                        "prewarmed": i.prewarmed,
                        "run": str(runs[i.generation].run) if i.generation in runs else None,
                    }
                    for i in sorted(gpu.instances, key=lambda i: i.placement.start)
                ],
            }
            for number, gpu in enumerate(state.gpus)
        ],
        "geometries": {model: known.to_json() for model, known in state.geometries.items()},
        "allocations": [
            {
                **a.run._asdict(),
                "status": _status(a, state),
                "uid": a.uid,
                "user": user_name(a.uid),
                "request": a.request,
                "submit": a.submit,
                "limit_minutes": a.limit,
                "started": a.started,
                "ends": a.started + a.limit * 60 if a.limit else None,
                "instances": a.instances,
            }
            for a in state.allocations
        ],
        "intents": [
            {
                "number": intent.number,
                "kind": intent.kind,
                **intent.run._asdict(),
                "pid": intent.owner.pid,
                "alive": intent.owner.alive(),
            }
            for intent in working.values()
        ],
        "prewarmed": {"made": state.prewarmed[0], "used": state.prewarmed[1]},
        "recent": [{"submit": when, "request": text, "limit_minutes": limit} for when, text, limit in state.recent],
    }


def _status(allocation: Allocation, state: State) -> str:
    if any(intent.run == allocation.run and intent.kind == "release" for intent in state.intents):
        return "ending"
    held = state.held(allocation)
    if any(i.trouble == "lost" or (gpu.fault and not gpu.left) for gpu, i in held) or (allocation.granted and not held):
        return "lost"
    return "running" if allocation.granted else "starting"


def _user_name(uid: int) -> str | None:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return None


def draw(found: Mapping[str, Any], width: int = 80, paint: Paint = plain) -> str:
    """The report for people, lines of at most `width` columns (or 60, if that is more)."""
    width = max(width, NARROWEST)
    gpus, allocations, policy = found["gpus"], found["allocations"], found["policy"]
    counted = f"{_count(gpus, 'GPU')}, {_count(allocations, 'job')}; " if gpus else ""
    lines = [paint(f"{printable(found['node'])}: {counted}policy: {printable(policy['source'])}", "heading")]
    if found["state"]["note"]:
        lines += _warning(found["state"]["note"], width, paint)
    if policy["fault"]:
        lines += _warning(policy["fault"], width, paint)
    for intent in found["intents"]:
        if not intent["alive"]:
            whose = "" if intent["kind"] == "prewarm" else f" of job {intent['job']}.{intent['restart']}"
            text = f"{intent['kind']}{whose} was cut off: its process"
            lines += _warning(f"{text} {intent['pid']} is gone; the next MIG job's Prolog mends it", width, paint)
    if found["prewarmed"]["made"]:
        waiting = sum(i["prewarmed"] for gpu in gpus for i in gpu["instances"] if i["status"] == "idle")
        lines.append(
            "made ahead of time: {made}, used by a job: {used}, ".format(**found["prewarmed"]) + f"idle: {waiting}"
        )
    users = {f"{a['job']}.{a['restart']}": _user(a) for a in allocations}
    slots = 0
    for gpu in gpus:
        known = Geometry.from_json(gpu["model"], found["geometries"][gpu["model"]])
        cell = min((width - 1) // known.slots, WIDEST_SLICE)
        if known.slots != slots:
            slots = known.slots
            lines += ["", "".join(f" {i}".ljust(cell) for i in range(slots)).rstrip()]
        title = f"GPU {gpu['number']}  {printable(gpu['model'])}  {gpu['uuid'][:12]}"
        lines += [paint(title, "heading"), _bar(gpu, known, users, cell, paint)]
        for about, text in (("not offered", gpu["fault"]), ("to be checked", gpu["doubt"])):
            if text:
                lines += _warning(f"{about}: {text}", width, paint)
        for i in gpu["instances"]:
            if i["note"]:
                place = Placement(i["profile"], i["start"], i["size"])
                what = "lost" if i["trouble"] == "lost" else i["status"]
                lines += _warning(f"{place} {what}: {i['note']}", width, paint)
    if allocations:
        lines += ["", *_table(_rows(found), width, paint)]
    return "".join(f"{line}\n" for line in lines)


def _bar(gpu: Mapping[str, Any], known: Geometry, users: Mapping[str, str], cell: int, paint: Paint) -> str:
    """One GPU as a row of boxes, `cell` columns for each memory slice."""
    boxes: list[tuple[int, int, str, list[str]]] = []  # start, size, kind, texts from long to short
    there = {i["start"]: i for i in gpu["instances"]}
    usable = _usable(gpu, known)
    at = 0
    while at < known.slots:
        if instance := there.get(at):
            boxes.append((at, instance["size"], instance["status"], _labels(instance, users)))
        else:
            kind = "free" if usable >> at & 1 else "unusable"
            if boxes and boxes[-1][2] == kind:
                start, size, kind, texts = boxes.pop()
                boxes.append((start, size + 1, kind, texts))
            else:
                boxes.append((at, 1, kind, [kind, "-"]))
        at = boxes[-1][0] + boxes[-1][1]
    drawn = []
    for _, size, kind, texts in boxes:
        room = size * cell - 1
        text = next((t for t in texts if len(t) <= room), _cut(texts[-1], room))
        drawn.append(paint(text.ljust(room), kind))
    return f"|{'|'.join(drawn)}|"


def _usable(gpu: Mapping[str, Any], known: Geometry) -> int:
    """Memory slices, as bits, that something could be made on now, idle instances set aside."""
    taken = [Placement(i["profile"], i["start"], i["size"]) for i in gpu["instances"] if i["status"] != "idle"]
    mask = 0
    for name in () if gpu["fault"] else known.by_name:
        for placement in known.legal(name, taken):
            mask |= placement.mask
    return mask


def _labels(instance: Mapping[str, Any], users: Mapping[str, str]) -> list[str]:
    profile, status, run = instance["profile"], instance["status"], instance["run"]
    if status == "busy":
        job = str(run).partition(".")[0]
        return [f"{profile} {run} {users.get(run, '?')}", f"{profile} {run}", str(run), job]
    if status == "making":
        return [*([f"making {profile} for {run}"] if run else []), f"making {profile}", "making"]
    return [f"{status} {profile}", status]


def _rows(found: Mapping[str, Any]) -> list[list[str]]:
    """The table of allocations: one line an instance, what is the job's own on its first."""
    rows = [["JOB", "USER", "REQUEST", "GPU", "PLACEMENT", "MIG", "HELD", "ENDS IN"]]
    held = {i["generation"]: (gpu["number"], i) for gpu in found["gpus"] for i in gpu["instances"]}
    now = found["time"]
    for a in sorted(found["allocations"], key=lambda a: (a["job"], a["restart"])):
        since = _duration(now - a["started"]) if a["status"] == "running" else a["status"]
        left = "-" if a["ends"] is None else _duration(a["ends"] - now) if a["ends"] > now else "over"
        job = [f"{a['job']}.{a['restart']}", _user(a), a["request"]]
        for generation in a["instances"]:
            number, i = held.get(generation, ("?", None))
            where = [str(Placement(i["profile"], i["start"], i["size"])), (i["uuid"] or "-")[:12]] if i else ["?", "?"]
            rows.append([*job, str(number), *where, since, left])
            job, since, left = ["", "", ""], "", ""
        if not a["instances"]:
            rows.append([*job, "-", "-", "-", since, left])
    return rows


def _table(rows: Sequence[Sequence[str]], width: int, paint: Paint) -> list[str]:
    """Rows as lines. Where they would be too long, the user's name and the request are cut, as `sacct` does it."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    while sum(widths) + len(widths) - 1 > width:
        column = max((1, 2), key=lambda c: widths[c])
        if widths[column] <= 8:
            break
        widths[column] -= 1
    lines = [
        " ".join(_cut(text, room).ljust(room) for text, room in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [paint(lines[0], "heading"), *lines[1:]]


def _warning(text: str, width: int, paint: Paint) -> list[str]:
    lines = textwrap.wrap(printable(text, 1000), width, initial_indent="! ", subsequent_indent="  ")
    return [paint(line, "warning") for line in lines]


def _user(allocation: Mapping[str, Any]) -> str:
    return printable(allocation["user"]) if allocation["user"] else str(allocation["uid"])


def _cut(text: str, room: int) -> str:
    return text if len(text) <= room else f"{text[: room - 1]}+"


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _duration(seconds: float) -> str:
    """As Slurm writes it: days-hours:minutes:seconds, leading zeros left out."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}-{hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
