"""The short form of `make chaos` (tests/chaos.py): a few lives with the same seeds each time."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos import Life, chaos, fits

from rms import geometry
from rms.geometry import Placement


@pytest.mark.parametrize("seed", [2, 3, 17])  # two of them simulated; 17 is nvml
def test_a_life(seed: int) -> None:
    told: list[str] = []
    assert chaos(seed, 0, 1, events=250, tell=told.append) == 250
    assert told[0].startswith(f"seed {seed}: 250 operations in 1 lives")


def test_an_invariant_that_breaks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A place that is given twice, and the seed that shows it again."""

    def robbed(self: Life) -> None:
        if self.jobs:
            job = self.jobs[min(self.jobs)]
            self.jobs[10**6] = job

    monkeypatch.setattr(Life, "jump", robbed)
    with pytest.raises(AssertionError, match=r"seed 2, event \d+ of 250: .*two jobs share a slice(.|\n)*SEED=2"):
        chaos(2, 0, 1, events=250, tell=lambda _: None)


def test_what_is_damaged_already_may_be_damaged_again(fast_dir: Path) -> None:
    """As far as that goes: it may be empty."""
    life = Life(fast_dir / "node", 2)
    while not life.jobs:
        life.acquire()
    for _ in range(20):
        (life.node.root / "state" / "state.json").write_bytes(b"")
        life.damage()
    life.reconcile()
    life.check()


def test_its_own_search_for_room() -> None:
    known = geometry.load("A100-80GB")
    assert fits(known, [()], ("1g.10gb",) * 7)
    assert not fits(known, [()], ("3g.40gb", "3g.40gb", "1g.10gb"))
    assert fits(known, [(), ()], ("3g.40gb", "3g.40gb", "1g.10gb"))
    assert not fits(known, [(Placement("1g.10gb", 0, 1),)], ("4g.40gb",))
    assert not fits(known, [()], ("1g.10gb+me", "1g.10gb+me"))
