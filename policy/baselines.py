"""The rules that a learned policy is measured against, each as the simulator's `Rule` over the states of one GPU.

They are named for what they do. All break ties by the lowest GPU, then the lowest start, unless they say otherwise.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from policy.rules import Rule, Tables, rule, tabulate
from policy.transitions import Transitions
from policy.workload import Floats

FIRST = 1000.0
"""Weight of a first criterion over a second: no second one here reaches it."""


def random(moves: Transitions, shares: Floats) -> Rule:
    """Any place where it fits, each as likely."""
    t = tabulate(moves)
    return rule(t, np.zeros(t.after.shape), random=True)


def first_fit_low(moves: Transitions, shares: Floats) -> Rule:
    """The first GPU with room, at its lowest start."""
    t = tabulate(moves)
    return rule(t, -starts(moves, t), lowest=True)


def first_fit_high(moves: Transitions, shares: Floats) -> Rule:
    """The first GPU with room, at its highest start."""
    t = tabulate(moves)
    return rule(t, starts(moves, t), lowest=True)


def best_fit_high(moves: Transitions, shares: Floats) -> Rule:
    """The fullest GPU with room, at its highest start."""
    t = tabulate(moves)
    return rule(t, starts(moves, t) - FIRST * free(t))


def best_fit_least_blocking(moves: Transitions, shares: Floats) -> Rule:
    """The fullest GPU with room, where the fewest possible placements are lost: `rms.planner.built_in`, its scores."""
    t = tabulate(moves)
    blocked = [
        [sum(1 for p in moves.placements if p.mask & new.mask and not p.mask & taken) for new in moves.placements]
        for taken in map(moves.mask, range(len(moves.states)))
    ]
    return rule(t, -(100 * free(t) + np.array(blocked, dtype=np.float64)), reuse=0.5)


def mfi(moves: Transitions, shares: Floats) -> Rule:
    """Minimum fragmentation increment: where `fragmentation` grows least. The rule of Zambianco, Fasol and
    Doriguzzi-Corin (arXiv:2511.18906), the measure written after their abstract: theirs may differ in detail."""
    t = tabulate(moves)
    return rule(t, -growth(t, fragmentation(moves)))


def mfi_best_fit(moves: Transitions, shares: Floats) -> Rule:
    """Minimum fragmentation increment, ties to the fullest GPU."""
    t = tabulate(moves)
    return rule(t, -FIRST * growth(t, fragmentation(moves)) - free(t))


def best_fit_mfi(moves: Transitions, shares: Floats) -> Rule:
    """The fullest GPU with room, there the slot where fragmentation grows least."""
    t = tabulate(moves)
    return rule(t, -FIRST * free(t) - growth(t, fragmentation(moves)))


def fgd(moves: Transitions, shares: Floats) -> Rule:
    """Fragmentation gradient descent (Weng et al., USENIX ATC 2023), ties to the fullest GPU: where the free slices of
    a GPU that has no place for a request, as expected over the mix, grow least."""
    t = tabulate(moves)
    stranded = ((t.slots - t.memory)[:, None] * (1 - t.fits)) @ shares
    return rule(t, -FIRST * growth(t, stranded) - free(t))


def look_ahead(moves: Transitions, shares: Floats) -> Rule:
    """One step of capability: keep the node able to take as much of the next request, by memory slices expected over
    the mix, as possible; then where the free slices that the next request could not use grow least, then best-fit.

    Of the ties that were tried this is the strongest: with those of best-fit and MFI's slot it gains half as much.
    """
    t = tabulate(moves)
    score = -FIRST * growth(t, unusable(moves) @ shares) - free(t)
    return rule(t, score / 1e6, capability=shares * t.profile_memory)


def nvidia_order(moves: Transitions, shares: Floats) -> Rule:
    """The first GPU with room, at the start that the driver would take of itself.

    Known from the driver: a first 3g goes to the upper half. 1g from the middle up, then from the bottom; the others
    from the middle up too: as far as we recollect it, and a guess for the two of two memory slices.
    """
    t = tabulate(moves)
    middle = t.slots // 2
    return rule(t, -((starts(moves, t) - middle) % t.slots), lowest=True)


def worst_fit(moves: Transitions, shares: Floats) -> Rule:
    """The emptiest GPU, at its lowest start."""
    t = tabulate(moves)
    return rule(t, FIRST * free(t) - starts(moves, t))


ALL: dict[str, Callable[[Transitions, Floats], Rule]] = {
    "random": random,
    "first-fit low": first_fit_low,
    "first-fit high": first_fit_high,
    "best-fit, high slot": best_fit_high,
    "best-fit, least-blocking slot": best_fit_least_blocking,
    "MFI": mfi,
    "MFI, best-fit ties": mfi_best_fit,
    "best-fit, MFI slot": best_fit_mfi,
    "FGD, best-fit ties": fgd,
    "capability look-ahead": look_ahead,
    "NVIDIA's order": nvidia_order,
    "worst-fit": worst_fit,
}
"""Every baseline, made for a GPU model and the shares of the mix (which only FGD and the look-ahead use)."""


def starts(moves: Transitions, t: Tables) -> Floats:
    """The start of each placement, the same in every state."""
    return np.broadcast_to(np.array([float(p.start) for p in moves.placements]), t.after.shape)


def free(t: Tables) -> Floats:
    """The free memory slices of the GPU before the decision, the same for every placement."""
    return np.broadcast_to((t.slots - t.memory)[:, None].astype(np.float64), t.after.shape)


def growth(t: Tables, of_state: Floats) -> Floats:
    """How much a number of a state grows with each placement."""
    return np.where(t.after >= 0, of_state[t.after] - of_state[:, None], 0.0)


def fragmentation(moves: Transitions) -> Floats:
    """MFI's measure of a state: over the profiles that have enough free slices, the memory slices of the placements
    that something stands in the way of."""
    slots = moves.geometry.slots
    scores = []
    for state in range(len(moves.states)):
        taken = moves.mask(state)
        room = slots - taken.bit_count()
        scores.append(sum(p.size for p in moves.placements if p.size <= room and p.mask & taken))
    return np.array(scores, dtype=np.float64)


def unusable(moves: Transitions) -> Floats:
    """By state and profile, the free slices that no placement of the profile can use."""
    rows = []
    for state in range(len(moves.states)):
        taken = moves.mask(state)
        row = []
        for places in moves.of_profile:
            usable = 0
            for k in places:
                if moves.after[state][k] >= 0:
                    usable |= moves.placements[k].mask
            row.append(moves.geometry.slots - (taken | usable).bit_count())
        rows.append(row)
    return np.array(rows, dtype=np.float64)
