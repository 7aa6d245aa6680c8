"""How long a job that needs a whole GPU waits behind a stream of small ones: part of `make bench-slurm`.

    python benchmarks/starvation.py [--seeds N] [--write]

One node with two GPUs, 50 s of 1g jobs of 5 to 8 s, one each 0.6 s, and a 7g job as the 20th; all have a time limit
of a minute. Prints a line of a table for each mode and seed, with and without `rms watch`, about 75 s each, then one
for each mode with the medians; `--write` puts these into the docs.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import starvation  # noqa: E402
import tables  # noqa: E402

MODES = {"sums": ("sums", False), "features": ("features", False), "features, `rms watch`": ("features", True)}
FIRST = 7
"""The first seed."""


def cell(values: Sequence[float], form: str) -> str:
    """The median, and the least and the most where they differ."""
    least, middle, most = (format(f(values), form) for f in (min, statistics.median, max))
    return middle if least == most else f"{middle} ({least} to {most})"


def row(mode: str, found: Sequence[starvation.Waits], loads: Sequence[float]) -> str:
    """A line of the table, of one run or of several."""
    times = [cell([one.large for one in found], ".1f"), cell([one.small for one in found], ".1f")]
    rest = [cell([one.used for one in found], ".0%"), str(sum(one.jobs for one in found))]
    return f"| {' | '.join([mode, *times, *rest, str(sum(one.refused for one in found)), cell(loads, '.0f')])} |"


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description="A large job behind a stream of small ones.")
    parser.add_argument("--seeds", type=int, default=1, metavar="N")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    found: dict[str, list[starvation.Waits]] = {mode: [] for mode in MODES}
    loads: dict[str, list[float]] = {mode: [] for mode in MODES}
    for seed in range(FIRST, FIRST + options.seeds):
        for mode, (admission, watched) in MODES.items():
            with tempfile.TemporaryDirectory(prefix="rms-bench-") as place:
                Path(place).chmod(0o755)
                cluster = Path(place) / "cluster"
                found[mode].append(starvation.run(cluster, admission, watched, seconds=50, before=19, seed=seed))
            loads[mode].append(os.getloadavg()[0])
            print(f"seed {seed} {row(mode, found[mode][-1:], loads[mode][-1:])}", flush=True)
    seeds = (
        f"seed {FIRST}"
        if options.seeds == 1
        else f"seeds {FIRST} to {FIRST + options.seeds - 1}: median (least to most)"
    )
    lines = [
        f"{seeds[0].upper()}{seeds[1:]}.",
        "",
        "| mode | the 7g waits s | the 1g wait s (mean) | compute slices used | jobs | refusals | load |",
        "|---|---:|---:|---:|---:|---:|---:|",
        *(row(mode, found[mode], loads[mode]) for mode in MODES),
    ]
    text = "".join(f"{line}\n" for line in lines)
    print(text)
    if options.write:
        tables.put("starvation", text)


if __name__ == "__main__":
    main()
