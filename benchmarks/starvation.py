"""How long a job that needs a whole GPU waits behind a stream of small ones: `make bench-slurm`.

One node with two GPUs, 50 s of 1g jobs of 5 to 8 s, one each 0.6 s, and a 7g job as the 20th; all have a time limit
of a minute. Prints a line of a table for each mode, with and without `rms watch`.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import starvation  # noqa: E402

MODES = [("sums", False), ("features", False), ("features", True)]


def main() -> None:
    """Run all."""
    print("mode | the 7g waits | the 1g wait (mean) | compute slices used | jobs | refusals\n---|---|---|---|---|---")
    for admission, watched in MODES:
        with tempfile.TemporaryDirectory(prefix="rms-bench-") as place:
            Path(place).chmod(0o755)
            found = starvation.run(Path(place) / "cluster", admission, watched, seconds=50, before=19)
        print(f"{admission}{', rms watch' if watched else ''} | {found.row}", flush=True)


if __name__ == "__main__":
    main()
