"""How long a job that needs a whole GPU waits behind a stream of small ones: part of `make bench-slurm`.

    python benchmarks/starvation.py [--write]

One node with two GPUs, 50 s of 1g jobs of 5 to 8 s, one each 0.6 s, and a 7g job as the 20th; all have a time limit
of a minute. Prints a line of a table for each mode, with and without `rms watch`; `--write` puts it into the docs.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import starvation  # noqa: E402

DOCUMENT = ROOT / "docs/benchmarks.md"
MODES = [("sums", False), ("features", False), ("features", True)]


def main() -> None:
    """Run all."""
    lines = [
        "| mode | the 7g waits s | the 1g wait s (mean) | compute slices used | jobs | refusals | load |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for admission, watched in MODES:
        with tempfile.TemporaryDirectory(prefix="rms-bench-") as place:
            Path(place).chmod(0o755)
            found = starvation.run(Path(place) / "cluster", admission, watched, seconds=50, before=19)
        name = f"{admission}, `rms watch`" if watched else admission
        figures = f"{found.large:.1f} | {found.small:.1f} | {found.used:.0%} | {found.jobs} | {found.refused}"
        lines.append(f"| {name} | {figures} | {os.getloadavg()[0]:.1f} |")
        print(lines[-1], flush=True)
    if "--write" in sys.argv[1:]:
        text = "".join(f"{line}\n" for line in lines)
        marks = re.compile(r"(<!-- starvation: written by make bench-slurm -->\n).*?(<!-- end of starvation -->)", re.S)
        DOCUMENT.write_text(marks.sub(lambda m: m[1] + text + m[2], DOCUMENT.read_text()))


if __name__ == "__main__":
    main()
