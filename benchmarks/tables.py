"""Where the benchmarks put what they have measured: into docs/benchmarks.md, between its marks."""

from __future__ import annotations

import re
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs/benchmarks.md"


def put(name: str, text: str) -> None:
    """Replace what stands between `<!-- NAME: written by make ... -->` and `<!-- end of NAME -->`.

    Ends the benchmark where the document has not these marks once, say for a cluster of another size.
    """
    marks = re.compile(
        rf"(<!-- {re.escape(name)}: written by make [\w-]+ -->\n).*?(<!-- end of {re.escape(name)} -->\n)", re.DOTALL
    )
    made, count = marks.subn(lambda found: found[1] + text + found[2], DOCUMENT.read_text())
    if count != 1:
        raise SystemExit(f"{DOCUMENT.name} has not the marks of {name!r} once: nothing is written")
    DOCUMENT.write_text(made)
