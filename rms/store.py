"""The state file and the locks around it.

One JSON file with a checksum, replaced whole at every change, the generation before it kept beside it. Locks, all in
the state directory: one for the state, held for milliseconds; one per GPU, held while its hardware is changed; two for
publishing, one for the list of jobs that were sent back, one for prewarming, one for who rebuilds a lost state. A
process that holds one of the others may take the state's, never the other way round.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from rms import files, inventory
from rms.errors import LockTimeoutError, NodeError
from rms.inventory import State

POLL_SECONDS = 0.005
"""How often a waiting process tries again: a held state lock is free again after about two syncs of the disk."""
HARDWARE_POLL_SECONDS = 0.025
"""The same for a GPU: it is held for as long as its hardware takes, and many who wait must not take the processor."""

NEEDLESS_SECONDS = 0.25
"""How often who waits for a lock asks whether it is needed any more: that is to read the whole state, mostly."""


class NeedlessError(Exception):
    """What a lock was wanted for has been done by another process."""


class Damaged(Exception):
    """Neither the state file nor its previous generation can be read; or only the previous one could (`state`)."""

    def __init__(self, text: str, state: State | None) -> None:
        super().__init__(text)
        self.state = state


class Store:
    """The state in `directory`. `deadline` is when waiting for locks must end (time.monotonic). With `rehearsal` what
    is saved is remembered here, and not written."""

    def __init__(self, directory: str, deadline: float, rehearsal: bool = False) -> None:
        self.path = os.path.join(directory, "state.json")
        self._directory = directory
        self._deadline = deadline
        self._body = ""  # the JSON text that the file is known to have: what need not be written again
        self._checked = False
        self._rehearsal = rehearsal
        self._rehearsed = ""

    @contextmanager
    def open(self, what: str) -> Iterator[State]:
        """The state, with its lock held. Call `save` inside to keep a change. `what` tells others who holds the lock.

        Raises NodeError if the directory can't be used, LockTimeoutError, and Damaged where only recovery helps.
        """
        with self._locked("state.lock", what):
            yield self._load()

    def glance(self) -> State:
        """The state as it stands, without its lock: right for a look, since the file is replaced whole.

        Empty where there is none yet. Raises NodeError and Damaged.
        """
        return self._load()

    @contextmanager
    def recovering(self) -> Iterator[None]:
        """The lock of who rebuilds a state that is lost or damaged. It comes before those of the GPUs."""
        with self._locked("recover.lock", "recover"):
            yield

    @contextmanager
    def rebuild(self, what: str) -> Iterator[State]:
        """What is left of the state, with its lock held, to be rebuilt and saved. For who holds `recovering`."""
        with self._locked("state.lock", what):
            try:
                state = self._load()
            except Damaged as damaged:
                state = damaged.state or State()
            yield state

    @contextmanager
    def hardware(self, gpus: Iterable[str], what: str, needless: Callable[[], bool] | None = None) -> Iterator[None]:
        """The locks of some GPUs, taken in order. Raises NeedlessError as soon as `needless` says so, if it is given:
        it is asked now and then while this waits, and when a lock is there."""
        with ExitStack() as stack:
            for gpu in sorted(set(gpus)):
                stack.enter_context(self._locked(f"{gpu}.lock", what, HARDWARE_POLL_SECONDS, needless))
            yield

    @contextmanager
    def publishing(self, needless: Callable[[], bool] | None = None) -> Iterator[None]:
        """The lock of who tells slurmctld what fits; the state's is not held meanwhile. `needless` as in `hardware`."""
        what = "publish, for as long as slurmctld does not answer"
        with self._locked("publish.lock", what, needless=needless):
            yield

    @contextmanager
    def prewarming(self) -> Iterator[None]:
        """The lock of who makes instances ahead of time: one process at a time."""
        with self._locked("prewarm.lock", "prewarm"):
            yield

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """The lock of who will publish in a moment, together with what comes until then."""
        with self._locked("gather.lock", "publish in a moment"):
            yield

    @contextmanager
    def sending_back(self) -> Iterator[None]:
        """The lock of the jobs that were sent back (rms/sent_back.py)."""
        with self._locked("sent_back.lock", "send a job back"):
            yield

    def save(self, state: State) -> None:
        """Keep `state`, on the disk before this returns; nothing is written if nothing changed.

        Raises NodeError (read-only, disk full); the old state stands then.
        """
        body = inventory.to_json(state)
        if body == self._body:
            return
        if self._rehearsal:
            self._rehearsed = body
            return
        data = f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n'
        try:
            files.replace(self.path, data.encode(), keep=f"{self.path}.previous")
        except OSError as error:
            raise NodeError(f"cannot write {self.path}: {error.strerror}") from error
        self._body = body

    def _load(self) -> State:
        self._body = ""
        if self._rehearsed:
            return inventory.from_json(json.loads(self._rehearsed))
        try:
            state, self._body = _read(self.path)
            return state
        except FileNotFoundError:
            if not os.path.exists(f"{self.path}.previous"):
                return State()
            fault = "is missing"
        except (ValueError, KeyError, TypeError) as error:
            fault = f"is damaged ({error})"
        except OSError as error:
            raise NodeError(f"cannot read {self.path}: {error.strerror}{_who()}") from error
        try:
            raise Damaged(f"{self.path} {fault}; its previous generation is used", _read(f"{self.path}.previous")[0])
        except (OSError, ValueError, KeyError, TypeError):
            raise Damaged(f"{self.path} {fault}, and there is no previous generation", None) from None

    def check(self) -> None:
        """Raises NodeError without the directory, or if somebody else could put another state in the place of ours."""
        if not self._checked:
            try:
                self._checked = files.private(os.path.realpath(self._directory))
            except FileNotFoundError:
                raise NodeError(
                    f"there is no state directory {self._directory}: make it, mode 0700 (etc/tmpfiles.d/rms.conf does)"
                ) from None
            except OSError as error:
                raise NodeError(f"cannot use the state directory {self._directory}: {error.strerror}") from error
        if not self._checked:
            raise NodeError(
                f"cannot use the state directory {self._directory}: it must be root's own, for nobody else to write"
                + _who()
            )

    @contextmanager
    def _locked(
        self, name: str, what: str, poll: float = POLL_SECONDS, needless: Callable[[], bool] | None = None
    ) -> Iterator[None]:
        self.check()
        asked = time.monotonic()

        def cancelled() -> bool:
            nonlocal asked
            if needless and time.monotonic() - asked > NEEDLESS_SECONDS:
                asked = time.monotonic()
                if needless():
                    raise NeedlessError
            return False

        from filelock import FileLock, Timeout  # most of a hook's start-up; the loop on standard input needs no lock

        path = os.path.join(self._directory, name)
        lock = FileLock(
            path,
            timeout=max(0.0, self._deadline - time.monotonic()),
            mode=0o600,
            poll_interval=poll,
            preserve_lock_file=True,  # and no soft lock where flock is missing: it would outlive a killed process
            on_acquired=lambda descriptor: _sign(descriptor, what),
        )
        try:
            lock.acquire(cancel_check=cancelled)
        except Timeout:
            raise LockTimeoutError(f"{path} is held by {_holder(path)}; end that process if it is stuck") from None
        except OSError as error:
            raise NodeError(f"cannot use the state directory {self._directory}: {error.strerror}") from error
        try:
            if needless and needless():
                raise NeedlessError
            yield
        finally:
            lock.release()


def _who() -> str:
    """What to do where somebody else than root meets what is root's own."""
    return f" (this is uid {os.geteuid()}: run it as root)" if os.geteuid() else ""


def _read(path: str) -> tuple[State, str]:
    """The state in a file, and the JSON text of it."""
    with open(path, "rb") as file:
        text = file.read().decode()
    head, separator, body = text.partition(',"state":')
    if not separator or not body.endswith("}\n"):
        raise ValueError("cut short")
    body = body[:-2]
    if json.loads(head + "}") != {"crc32": zlib.crc32(body.encode())}:
        raise ValueError("checksum does not match")
    data: Any = json.loads(body)
    if not isinstance(data, dict):
        raise ValueError("not an object")
    if data.get("schema") not in range(1, inventory.SCHEMA + 1):
        raise NodeError(
            f"{path} has schema {data.get('schema')}, this RMS knows {inventory.SCHEMA}: "
            "install the RMS that wrote it, or move the file away while no job runs"
        )
    return inventory.from_json(data), body


def _sign(descriptor: int, what: str) -> None:
    # Only for the message of whoever waits too long; a full disk must not make a lock fail.
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"pid {os.getpid()} ({what})".encode(), 0)


def _holder(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(200) or "an unknown process"
    except OSError:
        return "an unknown process"
