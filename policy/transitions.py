"""What one GPU can become: every busy set, what adding or removing an instance makes of it, and which are equivalent.

Generated from `rms.geometry`, once for each GPU model, and shared by all of `policy/`. A *state* is a set of placements
that jobs hold (an A100 has 723), a *class* a set of states that no future can tell apart (100 of them).
"""

from __future__ import annotations

from functools import cache

from rms import geometry
from rms.geometry import Geometry, Layout


class Transitions:
    """The states of one GPU; state 0 is empty. Only plain profiles: an attribute (`+me`) changes nothing about room.

    `placements` are numbered by profile, then start; `held[s]` has a bit for each that is in state s. `after[s][k]`
    is state s with placement k added, `before[s][k]` with it removed, -1 where that can't be.
    `classes[s]` numbers the equivalence classes, the empty state's is 0.
    """

    def __init__(self, board: Geometry) -> None:
        self.geometry = board
        self.profiles = tuple(p.name for p in board.profiles if p.plain)
        self.placements = tuple(p for name in self.profiles for p in board.placements(name))
        self.of_profile = tuple(
            tuple(k for k, p in enumerate(self.placements) if p.profile == name) for name in self.profiles
        )
        self.states: tuple[Layout, ...] = tuple(board.layouts(self.profiles))
        self.held = tuple(sum(1 << self.placements.index(p) for p in state) for state in self.states)
        number = {frozenset(state): s for s, state in enumerate(self.states)}
        self.after = tuple(
            tuple(-1 if p in state else number.get(frozenset((*state, p)), -1) for p in self.placements)
            for state in self.states
        )
        self.before = tuple(
            tuple(number[frozenset(state) - {p}] if p in state else -1 for p in self.placements)
            for state in self.states
        )
        self.classes = equivalent(self)

    def number(self, held: Layout) -> int:
        """The state that holds exactly these placements."""
        state = 0
        for placement in held:
            state = self.after[state][self.placements.index(placement)]
        return state

    def mask(self, state: int) -> int:
        """The memory slices that are taken, as bits."""
        return sum(placement.mask for placement in self.states[state])


def equivalent(transitions: Transitions) -> tuple[int, ...]:
    """The class of each state: the coarsest classes in which states agree on the classes that each profile can lead to,
    and on those that each departure leads to. A Markov decision process on the classes is then exact (a bisimulation).
    Found by refining: all states in one class at first, split until nothing changes."""
    classes, count = [0] * len(transitions.states), 1
    while True:
        keys: dict[object, int] = {}
        finer = []
        for s, state_class in enumerate(classes):
            after, before = transitions.after[s], transitions.before[s]
            leads = tuple(
                tuple(sorted({classes[after[k]] for k in places if after[k] >= 0})) for places in transitions.of_profile
            )
            left = tuple(sorted(classes[t] for t in before if t >= 0))
            finer.append(keys.setdefault((state_class, leads, left), len(keys)))
        if len(keys) == count:
            return tuple(finer)
        classes, count = finer, len(keys)


@cache
def load(model: str) -> Transitions:
    """The transitions of a GPU model by its name in `geometry.json`."""
    return Transitions(geometry.load(model))
