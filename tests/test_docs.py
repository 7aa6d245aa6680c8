"""The documents name tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_each_failure_has_a_test_that_exists() -> None:
    """A row of docs/failures.md: failure, job, node, administrator, tests."""
    rows = [line for line in (ROOT / "docs" / "failures.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| failure ")]
    assert len(rows) > 30
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    known = {name for text in texts for name in re.findall(r"def (test_\w+)", text)}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        named = re.findall(r"`(\w+)`", cells[4])
        assert named, f"no test: {row}"
        assert set(named) <= known, f"no such test: {set(named) - known}"
