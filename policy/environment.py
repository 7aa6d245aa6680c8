"""The placing of instances as a Gymnasium environment, on the simulator: for agents that bring their own training.

Loss mode. One step is one decision: an arrival that fits somewhere. Those that fit nowhere are lost between two steps,
since no policy may do anything about them: it says where, never whether.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from policy import rules, seeds, simulator, transitions, workload
from policy.simulator import Node

Observation = dict[str, Any]


class PlacingEnv(gymnasium.Env[Observation, np.int64]):
    """A fixed pool of GPUs under one mix and load, over `jobs` arrivals; then the episode is truncated.

    Observation: `busy` [GPU, placement]; `left` [GPU, placement], exp(-t) of the expected remaining time t of what is
    busy in mean durations, so 0 where none is known; `profile`, the number of the one that is asked for.
    Action: GPU times the number of placements plus placement. `info["action_mask"]` says which are possible; another
    one is taken for the first of those, and `info["legal"]` is then False.
    Reward: minus the memory slices that are lost before the next step, in GPUs.
    """

    def __init__(
        self,
        model: str = "A100-80GB",
        gpus: int = 8,
        mix: str = "uniform",
        load: float = 0.9,
        jobs: int = 2000,
        service: str = "exponential",
        limit: str = "1to3",
    ) -> None:
        self.moves = transitions.load(model)
        self.tables = rules.tables(model)
        self.node = Node(gpus)
        self.demand = (jobs, workload.mix(mix, self.moves), load, gpus, service, limit)
        self.places = len(self.moves.placements)
        self.held = np.array([[p in state for p in self.moves.placements] for state in self.moves.states], np.int8)
        shape = gpus, self.places
        self.observation_space = spaces.Dict(
            {
                "busy": spaces.MultiBinary(shape),
                "left": spaces.Box(0.0, 1.0, shape, np.float32),
                "profile": spaces.Discrete(len(self.moves.profiles)),
            }
        )
        self.action_space = spaces.Discrete(gpus * self.places)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """An empty pool, and its first arrival."""
        super().reset(seed=seed)
        stream = int(self.np_random.integers(seeds.TRAINING.start, seeds.TRAINING.stop))
        self.jobs = workload.stream(self.moves, stream, *self.demand)
        self.world = simulator.world(self.tables, self.node, len(self.jobs.submit))
        self.come(0)
        return self.observation(), {"action_mask": self.mask()}

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Place what is asked for, and go on to the next arrival that fits."""
        mask = self.mask()
        legal = bool(mask[action])
        self.place(int(action) if legal else int(mask.argmax()))
        lost = 0
        self.come(self.arrived + 1)
        while self.arrived < len(self.jobs.submit) and not self.mask().any():
            lost += int(self.tables.profile_memory[self.profile])
            self.come(self.arrived + 1)
        over = self.arrived == len(self.jobs.submit)
        return (
            self.observation(),
            -lost / self.tables.slots,
            False,
            over,
            {"action_mask": self.mask(), "legal": legal},
        )

    def come(self, job: int) -> None:
        """Go on to the arrival of a job: whoever ends until then leaves."""
        self.arrived = job
        if job < len(self.jobs.submit):
            w = self.world
            w.clock[simulator.NOW] = self.jobs.submit[job]
            while w.tally[simulator.EVENTS] and w.times[0] <= self.jobs.submit[job]:
                gpu, placement = divmod(simulator.pop(w), self.places)
                simulator.become(self.tables, w, gpu, self.tables.before[w.state[gpu], placement])

    def place(self, where: int) -> None:
        """Start the job that has arrived at a GPU and placement."""
        now, job = self.world.clock[simulator.NOW], self.arrived
        simulator.settle(self.tables, self.node, self.world, job, where, now + self.jobs.limit[job])
        simulator.push(self.world, now + self.jobs.duration[job], where)

    @property
    def profile(self) -> int:
        """What is asked for; after the last arrival the last one again."""
        return int(self.jobs.profile[min(self.arrived, len(self.jobs.submit) - 1)])

    def mask(self) -> npt.NDArray[np.int8]:
        """The possible actions."""
        fits = self.tables.after[self.world.state] >= 0
        first = self.tables.first
        fits[:, : first[self.profile]] = False
        fits[:, first[self.profile + 1] :] = False
        return fits.ravel().astype(np.int8)

    def observation(self) -> Observation:
        """What an agent sees."""
        busy = self.held[self.world.state]
        left = np.maximum(self.world.ends - self.world.clock[simulator.NOW], 0.0)
        return {
            "busy": busy,
            "left": np.where(busy, np.exp(-left), 0.0).astype(np.float32),
            "profile": np.int64(self.profile),
        }
