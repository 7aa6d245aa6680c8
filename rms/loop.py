"""The original tool's interface: `acquire USER SPEC` and `release USER` on standard input, `GPU CONFIG` on its output.

It plans for A100-80GB GPUs that exist only in memory; no node's state is read or changed. A GPU is provisioned when no
other fits. CONFIG is the number, 1 to 19, of the layout that the policy has in mind for that GPU. A line that can't be
served is answered with one line that begins with `error:`, and the loop goes on. A release that succeeds is silent.
"""

from __future__ import annotations

import bisect
import signal
import time
from collections.abc import Iterable
from typing import TextIO

from rms import geometry, planner
from rms.errors import NoRoomError, RequestError, RmsError, unheard
from rms.geometry import Placement
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
        self._alike: dict[frozenset[Placement], list[int]] = {}  # GPUs by what they hold, in order
        self._users: dict[str, tuple[int, Busy]] = {}

    def acquire(self, user: str, spec: str) -> tuple[int, int]:
        """GPU id and config id of the instance that `user` now has. Raises RequestError or NoRoomError."""
        if user in self._users:
            raise RequestError(f"{printable(user)} has an instance already; release it first")
        profile = self._geometry.find(spec).name
        if profile not in self._geometry.base():
            raise RequestError(f"{profile} is in none of the numbered layouts; ask for 1g, 2g, 3g, 4g or 7g")
        request = Request(((profile, 1),))
        shown, decisions = self._plan(request)
        if decisions is None:
            if self._limit is not None and len(self._gpus) >= self._limit:
                raise NoRoomError(f"no room for {profile} on {self._limit} GPU(s)")
            self._gpus.append(GpuView(f"GPU-{len(self._gpus)}", self._geometry))
            self._alike.setdefault(frozenset(), []).append(len(self._gpus) - 1)
            shown, decisions = self._plan(request)
        choice = (decisions or [])[0].choice
        index = shown[choice.candidate.gpu]
        gpu = self._gpus[index]
        busy = Busy(choice.candidate.placement, time.time(), None)
        self._put(index, (*gpu.busy, busy))
        self._users[user] = index, busy
        config = self._geometry.config_id(choice.wanted)
        if config is None or not set(self._gpus[index].taken) <= set(choice.wanted):
            # A policy may wish for what has no number, or for what the instances already there rule out.
            config = self._geometry.config_id(planner.fill(gpu, busy.placement))
        return index, config or 0

    def release(self, user: str) -> None:
        """Free the user's instance. Raises RequestError if there is none."""
        if user not in self._users:
            raise RequestError(f"{printable(user)} has no instance")
        index, busy = self._users.pop(user)
        self._put(index, tuple(b for b in self._gpus[index].busy if b is not busy))

    def _plan(self, request: Request) -> tuple[list[int], list[planner.Decision] | None]:
        """The plan, and which GPU each of its view is: of those that hold the same, only the first is offered.

        There are 298 ways to fill a GPU, so thousands of users cost no more time than hundreds.
        """
        shown = sorted(alike[0] for alike in self._alike.values())
        view = View(tuple(self._gpus[index] for index in shown), (), None, time.time())
        return shown, planner.plan(view, request, None, self._choose)

    def _put(self, index: int, busy: tuple[Busy, ...]) -> None:
        before = frozenset(self._gpus[index].taken)
        self._alike[before].remove(index)
        if not self._alike[before]:
            del self._alike[before]
        self._gpus[index] = self._gpus[index]._replace(busy=busy)
        bisect.insort(self._alike.setdefault(frozenset(self._gpus[index].taken), []), index)


def answer(pool: Pool, line: str) -> str | None:
    """What to print for one line of input; None for nothing. Never raises."""
    # Spaces alone divide: a user's name may hold any other character, even one that `str.split` takes for white space.
    words = [word for word in line.rstrip("\r\n").split(" ") if word]
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
                    f"cannot read '{printable(line.strip())}'; write: acquire USER SPEC, or: release USER"
                )
    except RmsError as error:
        return f"error: {error}"


def run(lines: Iterable[str], output: TextIO, choose: Choose, limit: int | None) -> int:
    """Answer line by line until the input ends. Returns the exit code."""
    pool = Pool(choose, limit)
    try:
        for line in lines:
            if (text := answer(pool, line)) is not None:
                try:
                    print(text, file=output, flush=True)
                except OSError as error:
                    return unheard(error)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    return 0
