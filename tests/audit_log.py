"""Audit logs as nodes would have written them, of jobs that the simulator has run: for tests, and to try `rms learn`.

    python tests/audit_log.py FILE [--gpus 4] [--mix uniform] [--load 0.8] [--jobs 20000] [--limit 1to3]
                              [--scale 4,3,2,1,.5,.25] [--hours 1] [--seed 0] [--model NAME.model]

`--scale` makes the jobs of each profile, small to large, so much longer; `--model` is what has decided.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from policy import evaluate, model, rules, seeds, transitions, workload
from policy.model import Model
from policy.simulator import Node
from policy.workload import Jobs

A100 = transitions.load("A100-80GB")


def jobs(
    mix: str | Sequence[float] = "uniform",
    gpus: int = 4,
    load: float = 0.8,
    count: int = 20_000,
    limit: str = "1to3",
    scale: Sequence[float] = (1,) * 6,
    seed: int = 0,
) -> Jobs:
    """A stream in mean durations; the load is right whatever the profiles' scales are."""
    shares = workload.mix(mix, A100) if isinstance(mix, str) else np.array(mix)
    sizes = workload.sizes(A100)
    made = workload.stream(A100, seeds.USERS[seed], count, shares, load, gpus, limit=limit)
    longer = np.array(scale)[made.profile] * (shares @ sizes) / (shares @ (sizes * scale))
    return made._replace(duration=made.duration * longer, limit=made.limit * longer)


def lines(
    made: Jobs, gpus: int, hours: float = 1.0, of: Model | None = None, users: int = 20
) -> Iterator[dict[str, Any]]:
    """What nodes would write, in order of time; the last job ends an hour ago."""
    of = of or model.load(A100.geometry)
    t, node = rules.tables("A100-80GB"), Node(gpus, depth=300, lazy=True)
    w = evaluate.simulate_estimating(A100, t, node, of, made, pending=True)
    unit = 3600 * hours
    ends = w.start + made.duration
    # To the second: submit times are whole seconds, so with its fraction the log would be another one at each call.
    begin = int(time.time()) - 3600 - unit * float(ends.max())
    whose = np.random.default_rng(1).integers(users, size=len(made.submit))
    moments = sorted([(e, 0, j) for j, e in enumerate(ends)] + [(s, 1, j) for j, s in enumerate(w.start)])
    for moment, what, j in moments:
        run = ["cluster", j + 1, 0]
        common = {"t": begin + unit * moment, "pid": 1}
        if what == 0:
            yield {**common, "event": "release", "run": run}
            continue
        place = A100.placements[w.placement[j]]
        gpu, limit = f"GPU-{w.gpu[j]}", made.limit[j] * unit / 60
        yield {
            **common,
            "event": "acquire",
            "run": run,
            "uid": 1000 + int(whose[j]),
            "request": f"{place.profile}:1",
            "submit": int(begin + unit * made.submit[j]),
            "limit": int(limit) + 1 if np.isfinite(limit) else None,
        }
        yield {**common, "event": "granted", "run": run, "instances": [[gpu, int(w.gpu[j]), list(place), "MIG-"]]}


def write(path: Path, entries: Iterator[dict[str, Any]]) -> None:
    """The lines as a file."""
    with path.open("w") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def main(arguments: Sequence[str]) -> None:
    """Write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--mix", default="uniform")
    parser.add_argument("--load", type=float, default=0.8)
    parser.add_argument("--jobs", type=int, default=20_000)
    parser.add_argument("--limit", default="1to3")
    parser.add_argument("--scale", default="1,1,1,1,1,1")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model")
    o = parser.parse_args(arguments)
    of = model.unpack(Path(o.model).read_bytes(), A100.geometry) if o.model else None
    scale = [float(x) for x in o.scale.split(",")]
    made = jobs(o.mix, o.gpus, o.load, o.jobs, o.limit, scale, o.seed)
    write(o.file, lines(made, o.gpus, o.hours, of))


if __name__ == "__main__":
    main(sys.argv[1:])
