"""Jobs that this node had no room for and has sent back: in the order of their submission, until they come again.

Whose turn is first has its room kept, unless the queue wants other room kept (rms/demand.py); the Epilog that makes its
room wakes it (slurm/hook.py). One small file in the state directory, for as long as each is remembered.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from rms import files

FILE = "sent_back.json"
MOST = 32
"""So many are remembered; those behind come by themselves, at the time that they were given."""


class SentBack(NamedTuple):
    """A job that was sent back. `name` is what Slurm's commands call it, `submit` when it was submitted, `start` when
    it will come by itself, `until` for how long it is remembered (epochs)."""

    job: int
    name: str
    request: str
    submit: int
    start: int
    until: float


def load(state_dir: str, now: float) -> list[SentBack]:
    """Those that are remembered, first in line first."""
    try:
        with open(os.path.join(state_dir, FILE), encoding="ascii") as file:
            found = [SentBack(*entry) for entry in json.load(file)]
    except (OSError, ValueError, TypeError):
        return []
    return sorted((one for one in found if one.until > now), key=lambda one: (one.submit, one.job))


def save(state_dir: str, waiting: Sequence[SentBack]) -> None:
    """Remember these and no others. Who calls holds the lock (`Store.sending_back`). Raises OSError."""
    path = os.path.join(state_dir, FILE)
    if waiting:
        files.replace(path, json.dumps(waiting[:MOST]).encode(), 0o600, durable=False)
    else:
        with suppress(FileNotFoundError):
            os.remove(path)
