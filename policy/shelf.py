"""The models of a site: which it has, which of them decides on a node, and how it came to that.

    models/NAME.model    every model that was put here
    slots8.model         a link to the one in use, one for each kind of board; without it the shipped model decides
    history.json         what was used before, for the way back, and how often learning has tried

The link is what counts: a hook reads the file behind it and nothing else (`policy.model.in_use`), and a swap is one
rename. The history is written first; where a crash came between, its last entry is not what is in use, and is passed
over.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

from policy import model
from policy.model import Model, ModelError
from rms import files
from rms.errors import NodeError, RequestError
from rms.geometry import Geometry

SHIPPED = "shipped"
"""The name of the model that comes with RMS."""
SCHEMA = 1
KEPT = 100
"""Entries of the history that are kept."""
SECONDS = 0.02
"""The longest that reading a model and asking it for the values may take; the shipped one needs 1 ms."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", re.ASCII)


class Used(NamedTuple):
    """One entry of the history: since when (epoch) which model decided, by its name and hash, who swapped it in (`use`
    or `learn`), and what mean wait was expected against the one before, in percent (None where nobody measured)."""

    since: float
    name: str
    model: str
    by: str
    expected: float | None = None


class History(NamedTuple):
    """`used` is the way back, oldest first, from before which the shipped model decided; `attempts` are the times
    (epochs) at which learning has put a challenger to the test."""

    used: tuple[Used, ...] = ()
    attempts: tuple[float, ...] = ()


class Listed(NamedTuple):
    """A model of the list; `fault` says why it can't be used, where it can't (`model` is None then)."""

    name: str
    model: Model | None
    fault: str
    used: bool


class Shelf:
    """The models in `folder`, for one kind of board. Raises NodeError where the folder can't be used."""

    def __init__(self, folder: str, geometry: Geometry) -> None:
        self.folder = folder
        self.geometry = geometry
        self._link = os.path.join(folder, model.file_name(geometry))
        self._models = os.path.join(folder, "models")
        self._history = os.path.join(folder, "history.json")

    def in_use(self) -> str:
        """The name of the model that the link names; it may be damaged."""
        try:
            target = os.readlink(self._link)
        except FileNotFoundError:
            return SHIPPED
        except OSError:  # somebody has put a file there by hand: it counts all the same
            return os.path.basename(self._link).removesuffix(".model")
        return os.path.basename(target).removesuffix(".model")

    def list(self) -> list[Listed]:
        """The shipped model, then all others of this kind of board and the damaged ones, by name."""
        names = []
        with suppress(OSError):
            names = sorted(n.removesuffix(".model") for n in os.listdir(self._models) if n.endswith(".model"))
        used = self.in_use()
        if used != SHIPPED and used not in names:
            names.append(used)
        found = []
        for name in (SHIPPED, *names):
            try:
                found.append(Listed(name, self.read(name), "", name == used))
            except ModelError as error:
                found.append(Listed(name, None, str(error), name == used))
        return found

    def read(self, name: str) -> Model:
        """The model of that name. Raises ModelError."""
        return model.load(self.geometry) if name == SHIPPED else model.unpack(_read(self._path(name)), self.geometry)

    def add(self, data: bytes, name: str) -> None:
        """Put a model here. Raises RequestError if it is none that can decide on boards like this."""
        if not _NAME.fullmatch(name) or name == SHIPPED:
            raise RequestError(f"{name!a} can't be a model's name: letters, digits, '.', '_' and '-', not {SHIPPED}")
        try:
            check(data, self.geometry)
        except ModelError as error:
            raise RequestError(f"{name} {error}") from None
        with self._locked():
            if not os.path.exists(self._path(name)):
                self._write(self._path(name), data)
            elif _read(self._path(name)) != data:
                raise RequestError(f"there is another model of the name {name}; give the file another name")

    def use(self, name: str, by: str = "use", expected: float | None = None) -> None:
        """Let a model decide from now on. Raises RequestError if there is none of that name that can."""
        try:
            found = self.read(name) if name == SHIPPED else check(_read(self._path(name)), self.geometry)
        except ModelError as error:
            raise RequestError(f"{name} {error}; rms policy list has the others") from None
        with self._locked():
            history = self.history()
            way = (*self._way(history), Used(time.time(), name, found.name, by, expected))
            self._remember(history._replace(used=way[-KEPT:]))
            self._point(name)

    def has(self, name: str) -> bool:
        """Whether there is a model of that name."""
        return name == SHIPPED or (bool(_NAME.fullmatch(name)) and os.path.exists(self._path(name)))

    def rollback(self) -> str:
        """Let the model before the one in use decide again. Returns its name. Raises RequestError if there is none."""
        with self._locked():
            history = self.history()
            way = self._way(history)
            if not way:
                raise RequestError(f"nothing to roll back: the {self.in_use()} model is in use and none was before it")
            way = way[:-1]
            name = way[-1].name if way else SHIPPED
            try:
                self.read(name)
            except ModelError as error:
                raise RequestError(f"{name}, which was used before, {error}; rms policy use {SHIPPED}") from None
            self._point(name)
            self._remember(history._replace(used=way))
        return name

    def last(self) -> Used | None:
        """How the model in use came to it; None where the shipped one was always."""
        way = self._way(self.history())
        return way[-1] if way else None

    def before(self) -> str:
        """The name of the model that a rollback leads to."""
        way = self._way(self.history())
        return way[-2].name if len(way) > 1 else SHIPPED

    def tried(self, now: float) -> None:
        """Note that a challenger is put to the test."""
        with self._locked():
            history = self.history()
            self._remember(history._replace(attempts=(*history.attempts, now)[-KEPT:]))

    def history(self) -> History:
        """What is remembered of this kind of board; nothing where the file is missing or damaged."""
        try:
            mine = json.loads(_read(self._history))["boards"][model.file_name(self.geometry)]
            used = (Used(float(u[0]), str(u[1]), str(u[2]), str(u[3]), u[4]) for u in mine["used"])
            return History(tuple(used), tuple(float(t) for t in mine["attempts"]))
        except (ModelError, ValueError, KeyError, IndexError, TypeError):
            return History()

    def _way(self, history: History) -> tuple[Used, ...]:
        """The history up to what is in use. All of it, where the link was changed by hand."""
        name = self.in_use()
        found = [i for i, used in enumerate(history.used) if used.name == name]
        return history.used[: found[-1] + 1] if found else () if name == SHIPPED else history.used

    def _path(self, name: str) -> str:
        return os.path.join(self._models, f"{name}.model")

    def _point(self, name: str) -> None:
        try:
            if name == SHIPPED:
                with suppress(FileNotFoundError):
                    os.unlink(self._link)
                return
            spare = f"{self._link}.new"
            with suppress(FileNotFoundError):
                os.unlink(spare)
            os.symlink(os.path.join("models", f"{name}.model"), spare)
            os.rename(spare, self._link)
        except OSError as error:
            raise NodeError(f"cannot write {self._link}: {error.strerror}") from error

    def _remember(self, history: History) -> None:
        boards: dict[str, Any] = {}
        with suppress(ModelError, ValueError, KeyError, TypeError):
            boards = dict(json.loads(_read(self._history))["boards"])
        boards[model.file_name(self.geometry)] = history._asdict()
        self._write(self._history, json.dumps({"schema": SCHEMA, "boards": boards}, indent=1).encode() + b"\n")

    def _write(self, path: str, data: bytes) -> None:
        try:
            files.replace(path, data, 0o644)
        except OSError as error:
            raise NodeError(f"cannot write {path}: {error.strerror}") from error

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            os.makedirs(self._models, exist_ok=True)
            descriptor = os.open(os.path.join(self.folder, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise NodeError(f"cannot use {self.folder}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)  # held for milliseconds, by whoever swaps
            yield
        finally:
            os.close(descriptor)


def check(data: bytes, geometry: Geometry) -> Model:
    """The model if it can decide on boards like this: whole, with a value for each state, quick. Raises ModelError."""
    from policy.transitions import Transitions

    times = []
    for _ in range(5):
        began = time.perf_counter()
        found = model.unpack(data, geometry)
        model.values(found, found.prior, 1)
        times.append(time.perf_counter() - began)
    if min(times) > SECONDS:
        raise ModelError(f"takes {1000 * min(times):.0f} ms to read and ask; at most {1000 * SECONDS:.0f} are allowed")
    moves = Transitions(geometry)
    if set(moves.held) != set(found.classes):
        raise ModelError(f"has not the states of {geometry.model}")
    return found


def describe(told: Mapping[str, Any]) -> str:
    """What `rms policy show` found, for people."""
    made = told["manifest"].get("made", {})
    stood, seen = told["decisions"], f"{told['requests_seen']} requests seen"
    if told["requests_waiting"] is not None:
        seen += f", {told['requests_waiting']} waiting"
    if told["jobs_minutes"]:
        seen += f", jobs of {told['jobs_minutes']} min in the mean"
    lines = [
        f"{told['name']}: model {told['model']}, {'in use' if told['in_use'] else 'not in use'}",
        f"board of {told['manifest']['board'][0][0]} memory slices, net {told['manifest']['shape']}",
        *(f"{key}: {json.dumps(value)}" for key, value in made.items()),
        f"demand as this node sees it: {_shares(told['demand'])} ({seen})",
        *([f"  outside of what it was trained on: taken for {_shares(told['clamped'])}"] if told["clamped"] else []),
        f"instances placed, by the audit log: {stood['instances']}, {stood['built_in']} of them by the built-in rule,"
        f" {stood['clamped']} for a demand outside of what was trained on",
        *(f"  {count}: {reason}" for reason, count in stood["reasons"].items()),
    ]
    for used in told["used"]:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(used["since"]))
        expected = "" if used["expected"] is None else f", mean wait {used['expected']:+.1f} % in the replay"
        lines.append(f"since {since}: {used['name']} ({used['model']}), by rms {used['by']}{expected}")
    return "\n".join([*lines, f"rollback leads to {told['rollback']}"] if told["used"] else lines)


def _shares(shares: Mapping[str, float]) -> str:
    return " ".join(f"{name} {share:.2f}" for name, share in shares.items())


def _read(path: str) -> bytes:
    """A small file's bytes. Raises ModelError."""
    try:
        with open(path, "rb") as file:
            data = file.read(model.MOST_BYTES + 1)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}") from error
    if len(data) > model.MOST_BYTES:
        raise ModelError(f"has more than {model.MOST_BYTES} bytes")
    return data
