"""What the simulator decides by: the transitions of a GPU, and a rule of placing, as numbers and arrays."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from policy import transitions
from policy.transitions import Transitions
from policy.workload import Floats, sizes

Array = npt.NDArray[Any]

LEAST = -(2**62)
"""Below every score."""

EXACT = np.ones(1)
"""The ratios where time limits are taken at their word."""


class Tables(NamedTuple):
    """`Transitions` as arrays. The placements of profile p are first[p] to first[p + 1] - 1."""

    after: Array
    before: Array
    fits: Array
    first: Array
    overlaps: Array
    compute: Array
    memory: Array
    profile_compute: Array
    profile_memory: Array
    slots: int


class Rule(NamedTuple):
    """Where instances go: the highest score wins, then the lowest GPU, then the lowest start.

    `score[s, k]` is the score of placement k on a GPU in state s, `best[s, p]` the best placement of a profile there.
    `bonus` is added where an idle instance is reused, `toll` taken off for each one that is destroyed. `lowest` takes
    the first GPU with room, whatever the others score; `random` scores at random. `capability` weighs what profiles the
    node can still place afterwards, before `score`. With `rate` above 0 the score is that of `value` over the remaining
    times (`over_time`), the mean over `draws` guesses of them: `ratios`, rising, are the parts of their time limits
    that jobs run for (`remaining`). `expected` are the shares of the profiles that instances are made ahead for.
    """

    score: Array
    best: Array
    value: Array
    rate: float
    ratios: Array
    draws: int
    capability: Array
    expected: Array
    bonus: int
    toll: int
    lowest: bool
    random: bool


@cache
def tables(model: str) -> Tables:
    """The tables of a GPU model."""
    return tabulate(transitions.load(model))


def tabulate(moves: Transitions) -> Tables:
    """Transitions as arrays."""
    by_name = moves.geometry.by_name
    after = np.array(moves.after, dtype=np.int32)
    first = np.array([0, *np.cumsum([len(places) for places in moves.of_profile])], dtype=np.int32)
    fits = np.array([[any(row[k] >= 0 for k in ks) for ks in moves.of_profile] for row in moves.after], dtype=np.int32)
    overlaps = [
        sum(1 << other for other, q in enumerate(moves.placements) if p.mask & q.mask) for p in moves.placements
    ]
    return Tables(
        after,
        np.array(moves.before, dtype=np.int32),
        fits,
        first,
        np.array(overlaps, dtype=np.int64),
        np.array([sum(by_name[p.profile].compute for p in held) for held in moves.states], dtype=np.int32),
        np.array([sum(p.size for p in held) for held in moves.states], dtype=np.int32),
        np.array([by_name[name].compute for name in moves.profiles], dtype=np.int32),
        sizes(moves).astype(np.int32),
        moves.geometry.slots,
    )


def rule(
    t: Tables,
    score: Floats,
    *,
    value: Floats | None = None,
    rate: float = 0.0,
    ratios: Floats = EXACT,
    draws: int = 1,
    capability: Floats | None = None,
    expected: Floats | None = None,
    reuse: float = 0.0,
    toll: float = 0.0,
    lowest: bool = False,
    random: bool = False,
) -> Rule:
    """A rule from its scores. They count in millionths, so that all implementations see the same ties; a reuse that
    scores nothing in itself still breaks them."""
    whole = 2 * np.round(np.where(t.after >= 0, score, 0.0) * 1e6).astype(np.int64)
    whole[t.after < 0] = LEAST
    best = np.stack([a + whole[:, a:b].argmax(axis=1) for a, b in zip(t.first, t.first[1:], strict=False)], axis=1)
    return Rule(
        whole,
        best.astype(np.int32),
        np.zeros(len(t.after)) if value is None else value,
        rate,
        ratios,
        draws,
        np.zeros(len(t.first) - 1, dtype=np.int64)
        if capability is None
        else np.round(capability * 1e6).astype(np.int64),
        np.ones(len(t.first) - 1) if expected is None else expected,
        2 * round(reuse * 1e6) + 1,
        2 * round(toll * 1e6),
        lowest,
        random,
    )


def by_value(
    t: Tables,
    value: Floats,
    rate: float = 0.0,
    reuse: float = 0.0,
    ratios: Floats = EXACT,
    draws: int = 1,
    expected: Floats | None = None,
) -> Rule:
    """The rule that wants the highest sum of `value[state]` over the GPUs after the decision. Making an instance costs
    `reuse`, and so does destroying one."""
    gain = np.where(t.after >= 0, value[t.after], 0.0) - value[:, None]
    return rule(t, gain, value=value, rate=rate, ratios=ratios, draws=draws, expected=expected, reuse=reuse, toll=reuse)
