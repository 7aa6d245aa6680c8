"""The audit log: one JSON object a line for every decision, operation, start and end. Read by people and by learning.

Every line has t (epoch seconds), event, pid. Lines are appended in one write, so processes do not mix them.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rms.planner import Decision, View


class Audit:
    """The log at `path`. `fault` says why it can't be written, if it can't: that costs no job its instance."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.fault = ""

    def write(self, event: str, **fields: Any) -> None:
        """Append one line."""
        line = json.dumps({"t": round(time.time(), 6), "event": event, "pid": os.getpid(), **fields}, default=str)
        try:
            # A site may have put the file where users write: no link is followed, and a FIFO not waited for.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o640)
            try:
                data = line.encode() + b"\n"
                written = os.write(descriptor, data)
                if written < len(data):  # the disk is full: half a line would spoil the next one, too
                    os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            self.fault = f"cannot write the audit log {self._path}: {error.strerror}"


def picture(view: View) -> dict[str, dict[str, Any]]:
    """The GPUs as the log shows them."""
    return {
        gpu.uuid: {
            "model": gpu.geometry.model,
            "busy": [[str(b.placement), b.start, b.end] for b in gpu.busy],
            "idle": [str(p) for p in gpu.idle],
            "blocked": [str(p) for p in gpu.blocked],
        }
        for gpu in view.gpus
    }


def basis(decisions: Sequence[Decision]) -> Mapping[str, Any] | None:
    """What the policy went by beside the GPUs; None where the built-in rule decided alone."""
    return next((d.choice.basis for d in decisions if d.choice.basis is not None), None)


def explain(decisions: Sequence[Decision], view: View) -> list[dict[str, Any]]:
    """The instances of a plan as the log shows them: what could have been chosen, what was, and why."""
    return [
        {
            "profile": asked.profile,
            "gpu": choice.candidate.gpu,
            "placement": str(choice.candidate.placement),
            "reuse": choice.candidate.reuse,
            "destroys": [str(p) for p in choice.candidate.destroys],
            "candidates": [[c.gpu, str(c.placement), score] for c, score in zip(offered, choice.scores, strict=False)],
            "rule": [rule.gpu, str(rule.placement)],
            "source": choice.source,
            "model": choice.model,
            "reason": choice.reason,
            "fault": choice.fault,
            "wanted": [str(p) for p in choice.wanted],
            "config": view.gpus[choice.candidate.gpu].geometry.config_id(choice.wanted),
        }
        for asked, offered, choice, rule in decisions
    ]
