"""What each way of admission does to the same jobs on a throw-away Slurm: misplacements, waits, load on slurmctld.

    python benchmarks/slurm_modes.py [--nodes N] [--gpus G] [--jobs J] [--modes LIST] [--seed S] [--write]

Two loads per mode, on simulated GPUs. `overload`: a uniform mix of 1g, 2g, 3g, 4g and 7g of 2 to 6 s, submitted faster
than they can run. `short`: 1g jobs that end at once, submitted while the nodes are idle. Who got what is judged from
what the jobs wrote and the GPUs' own journal; slurmctld's time is what `sdiag` counts for the commands of the hooks.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import records  # noqa: E402
from rms_cluster import RmsCluster, rms_cluster  # noqa: E402

DOCUMENT = ROOT / "docs/benchmarks.md"
PROFILES = ["1g", "2g", "3g", "4g", "7g"]
OURS = (
    "NODE_INFO_SINGLE",
    "PARTITION_INFO",
    "UPDATE_NODE",
    "UPDATE_JOB",
    "JOB_REQUEUE",
    "JOB_INFO",
    "JOB_INFO_SINGLE",
    "BUILD_INFO",
    "KILL_JOB",
    "JOB_NOTIFY",
)
"""The messages that hooks send by Slurm's commands; while jobs run the benchmark itself sends none of them."""


class Row(NamedTuple):
    """One mode. Times are seconds, but for `rpc_ms` and `passes_ms`: slurmctld's own, per job."""

    slurm: str
    mode: str
    jobs: int
    dispatches: int
    misplaced: int
    without: int
    drained: int
    wait: float
    total: float
    next_start: float
    rate: float
    rpcs: float
    rpc_ms: float
    passes_ms: float


def overload(count: int, seed: int) -> list[tuple[str, float]]:
    """Requests and seconds of work."""
    chance = random.Random(seed)
    return [(chance.choice(PROFILES), round(chance.uniform(2, 6), 1)) for _ in range(count)]


def submit(slurm: RmsCluster, jobs: Sequence[tuple[str, float]], gap: float) -> dict[int, tuple[Path, float]]:
    """Submit the jobs; for each its output and when it was submitted."""
    made = {}
    for number, (request, seconds) in enumerate(jobs):
        user = slurm.users[number % 2]
        now = time.time()
        job = slurm.sbatch(
            records.script(f"sleep {seconds}"), f"--gres=mig:{request}", "--time=1", "--output=%j.out", user=user
        )
        made[job] = user.work / f"{job}.out", now
        time.sleep(max(0.0, now + gap - time.time()))
    return made


def over(slurm: RmsCluster, jobs: dict[int, tuple[Path, float]], seconds: float) -> None:
    """Wait until all have written that they are over, then until slurmctld knows it, too."""
    left = {path for path, _ in jobs.values()}

    def done() -> bool:
        for path in list(left):
            if path.exists() and "\nend " in path.read_text():
                left.remove(path)
        return not left

    slurm.wait(done, seconds, "every job has ended")


def audit(slurm: RmsCluster) -> list[dict[str, object]]:
    """All nodes' audit logs."""
    logs = [slurm.root / node / "audit.jsonl" for node in slurm.nodes]
    return [json.loads(line) for log in logs if log.exists() for line in log.read_text().splitlines()]


def load(slurm: RmsCluster) -> tuple[int, float, float]:
    """Messages of ours since the last reset, the seconds that slurmctld spent on them, and on scheduling passes."""
    text = slurm.run("sdiag").stdout
    found = re.findall(r"REQUEST_(\w+)\s+\(\s*\d+\)\s+count:(\d+)\s+ave_time:\d+\s+total_time:(\d+)", text)
    ours = [(int(count), int(total)) for name, count, total in found if name in OURS]
    cycles = re.search(r"Main schedule.*?Total cycles:\s+(\d+)\s+Mean cycle:\s+(\d+)", text, re.DOTALL)
    passes = int(cycles[1]) * int(cycles[2]) / 1e6 if cycles else 0.0
    return sum(c for c, _ in ours), sum(t for _, t in ours) / 1e6, passes


def gaps(found: Sequence[records.Slot]) -> list[float]:
    """From the end of a job to the start of the next one in its slices, where that was next."""
    out = []
    for slot in found:
        later = [
            s.record.start
            for s in found
            if s.gpu == slot.gpu
            and s.record.start >= slot.record.end
            and s.start < slot.start + slot.size
            and slot.start < s.start + s.size
        ]
        if later:
            out.append(min(later) - slot.record.end)
    return out


def run(mode: str, nodes: int, gpus: int, jobs: int, short: int, seed: int, gap: float) -> Row:
    """Both loads on a cluster of its own."""
    root = Path(tempfile.mkdtemp(prefix="rms-modes-"))
    root.chmod(0o755)
    try:
        with rms_cluster(root / "c", nodes=nodes, gpus=gpus, create=0.05, destroy=0.05, admission=mode, cpus=64,
                         cred_expire=5) as slurm:  # fmt: skip
            quick = submit(slurm, [("1g", 0.0)] * short, 0.0)
            over(slurm, quick, 600)
            slurm.wait_all(120)
            ran = [one for path, _ in quick.values() for one in records.read(path)]
            # From the first start to the last, less the one that began it.
            spread = max(r.start for r in ran) - min(r.start for r in ran)
            before = len([e for e in audit(slurm) if e["event"] in ("granted", "refused")])
            refused = len([e for e in audit(slurm) if e["event"] == "refused"])
            slurm.run("sdiag", "--reset")
            began = time.time()
            long = submit(slurm, overload(jobs, seed), gap)
            over(slurm, long, 60 + 30.0 * jobs / (nodes * gpus))
            total = time.time() - began
            messages, seconds, passes = load(slurm)
            slurm.wait_all(120)
            events = audit(slurm)
            found = {job: records.read(path) for job, (path, _) in long.items()}
            ends = [one for many in found.values() for one in many]
            journals = {n: records.journal(slurm.root / n / "gpus.json.journal") for n in slurm.nodes}
            slots, faults = records.slots(ends, journals)
            if faults or records.overlaps(slots):
                raise SystemExit(f"{mode}: {faults} {records.overlaps(slots)}")
            return Row(
                slurm.run("sinfo", "--version").stdout.split()[-1],
                mode,
                len(ends),
                len([e for e in events if e["event"] in ("granted", "refused")]) - before,
                len([e for e in events if e["event"] == "refused"]) - refused,
                sum(not one.uuids for one in ends),
                sum(state.state.startswith("drain") for state in slurm.node_states().values()),
                statistics.mean(found[job][0].start - at for job, (_, at) in long.items()),
                total,
                statistics.median(gaps(slots)),
                (short - 1) / max(spread, 0.01) / nodes,
                messages / jobs,
                seconds * 1e3 / jobs,
                passes * 1e3 / jobs,
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)


def table(rows: Sequence[Row], options: argparse.Namespace) -> str:
    """For docs/benchmarks.md."""
    head = (
        f"Slurm {rows[0].slurm}, {options.nodes} nodes with {options.gpus} simulated A100-80GB each, "
        f"{options.jobs} jobs of 2 to 6 s, one each {options.gap} s, seed {options.seed}; "
        f"then {options.short} short 1g jobs.\n\n"
        "| mode | jobs | dispatches | misplaced | without an instance | drained | mean wait s | all done s "
        "| next in the same slices s | short jobs a second and node | messages a job | slurmctld ms a job "
        "| scheduling passes ms a job |\n|---|" + "---:|" * 12 + "\n"
    )
    return head + "".join(
        f"| {r.mode} | {r.jobs} | {r.dispatches} | {r.misplaced} | {r.without} | {r.drained} | {r.wait:.1f} "
        f"| {r.total:.1f} | {r.next_start:.2f} | {r.rate:.1f} | {r.rpcs:.1f} | {r.rpc_ms:.2f} | {r.passes_ms:.2f} |\n"
        for r in rows
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the modes one after the other and print the table; `--write` puts it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description="The modes of admission side by side.")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--short", type=int, default=56)
    parser.add_argument("--gap", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--modes", default="sums,features")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    rows = []
    for mode in options.modes.split(","):
        rows.append(run(mode, options.nodes, options.gpus, options.jobs, options.short, options.seed, options.gap))
        print(rows[-1], file=sys.stderr, flush=True)
    text = table(rows, options)
    print(text)
    if options.write:
        name = f"modes {options.nodes}x{options.gpus}"
        marks = re.compile(rf"(<!-- {name}: written by make bench-slurm -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        DOCUMENT.write_text(marks.sub(lambda m: m[1] + text + m[2], DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
