"""The original tool's interface: `acquire USER SPEC` and `release USER` on standard input, `GPU CONFIG` on its output.

It plans for A100-80GB GPUs that exist only in memory; no node's state is read or changed. A GPU is provisioned when no
other fits. CONFIG is the number, 1 to 19, of the layout that the policy has in mind for that GPU. A line that can't be
served is answered with one line that begins with `error:`, and the loop goes on. A release that succeeds is silent.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TextIO

from rms import geometry, planner
from rms.errors import NoRoomError, RequestError, RmsError
from rms.planner import Busy, Choose, GpuView, View
from rms.request import Request, printable

MODEL = "A100-80GB"


class Pool:
    """GPUs in memory, at most `limit` of them (None: no limit)."""

    def __init__(self, choose: Choose, limit: int | None) -> None:
        self._choose = choose
        self._limit = limit
        self._geometry = geometry.load(MODEL)
        self._gpus: list[GpuView] = []
        self._users: dict[str, tuple[int, Busy]] = {}

    def acquire(self, user: str, spec: str) -> tuple[int, int]:
        """GPU id and config id of the instance that `user` now has. Raises RequestError or NoRoomError."""
        if user in self._users:
            raise RequestError(f"{printable(user)} has an instance already; release it first")
        profile = self._geometry.find(spec).name
        if profile not in self._geometry.base():
            raise RequestError(f"{profile} is in none of the numbered layouts; ask for 1g, 2g, 3g, 4g or 7g")
        request = Request(((profile, 1),))
        decisions = planner.plan(self._view(self._gpus), request, None, self._choose)
        if decisions is None:
            if self._limit is not None and len(self._gpus) >= self._limit:
                raise NoRoomError(f"no room for {profile} on {self._limit} GPU(s)")
            self._gpus.append(GpuView(f"GPU-{len(self._gpus)}", self._geometry))
            decisions = planner.plan(self._view(self._gpus), request, None, self._choose) or []
        choice = decisions[0].choice
        index = choice.candidate.gpu
        busy = Busy(choice.candidate.placement, time.time(), None)
        self._gpus[index] = self._gpus[index]._replace(busy=(*self._gpus[index].busy, busy))
        self._users[user] = index, busy
        config = self._geometry.config_id(choice.wanted)
        if config is None:  # a policy may have a wish that is no maximal layout of the base profiles
            config = self._geometry.config_id(planner.fill(self._gpus[index], busy.placement))
        return index, config or 0

    def release(self, user: str) -> None:
        """Free the user's instance. Raises RequestError if there is none."""
        if user not in self._users:
            raise RequestError(f"{printable(user)} has no instance")
        index, busy = self._users.pop(user)
        gpu = self._gpus[index]
        self._gpus[index] = gpu._replace(busy=tuple(b for b in gpu.busy if b is not busy))

    def _view(self, gpus: list[GpuView]) -> View:
        return View(tuple(gpus), (), None, time.time())


def answer(pool: Pool, line: str) -> str | None:
    """What to print for one line of input; None for nothing. Never raises."""
    words = line.split()
    try:
        match words:
            case []:
                return None
            case ["acquire", user, spec]:
                gpu, config = pool.acquire(user, spec)
                return f"{gpu} {config}"
            case ["release", user]:
                pool.release(user)
                return None
            case _:
                raise RequestError(
                    f"cannot read {printable(line.strip())!r}; write: acquire USER SPEC, or: release USER"
                )
    except RmsError as error:
        return f"error: {error}"


def run(lines: Iterable[str], output: TextIO, choose: Choose, limit: int | None) -> int:
    """Answer line by line until the input ends. Returns the exit code."""
    pool = Pool(choose, limit)
    for line in lines:
        if (text := answer(pool, line)) is not None:
            print(text, file=output, flush=True)
    return 0
