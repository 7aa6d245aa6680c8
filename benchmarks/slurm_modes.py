"""What each way of admission does to the same jobs on a throw-away Slurm: misplacements, waits, load on slurmctld.

    python benchmarks/slurm_modes.py [--nodes N] [--gpus G] [--jobs J] [--between S,S] [--gap S] [--short J]
                                     [--modes LIST] [--seeds N] [--write | --json]

Three loads per mode and seed, on simulated GPUs. `short`: 1g jobs that end at once, submitted while the nodes are idle.
`idle`: three jobs for each GPU that need all of it, one after the other. `overload`: a uniform mix of 1g, 2g, 3g, 4g
and 7g, submitted faster than they can run. Who got what is judged from what the jobs wrote and the GPUs' own journal;
slurmctld's time is what `sdiag` counts for the commands of the hooks. `policy.simulator` then runs the same jobs.

Modes: sums, features, extra (Slurm 23.11 and newer: where the one here is older it runs in the chroot of `make newest`)
and shard, which is Slurm alone (`on_shards`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import shutil
import stat
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import records  # noqa: E402
import slurm_waits  # noqa: E402
import tables  # noqa: E402
from rms_cluster import rms_cluster  # noqa: E402
from slurm_waits import CREDENTIAL, MODEL, Ran, Refusal, Run, mean  # noqa: E402
from throwaway import PATH, Cluster  # noqa: E402

import controller  # noqa: E402
from rms import geometry, planner  # noqa: E402

SHARDS = {"1g": 13, "2g": 26, "3g": 48, "4g": 52, "7g": 100}
"""The profiles of the mix, and how many of the 100 shards of a GPU each is worth: together they are more than 100
exactly where the compute or the memory slices are too many (tests/test_bench_slurm.py tries all)."""
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
FIRST_SEED = 7
LOGGING = "SlurmctldDebug=info\n"
"""Slurm's own default; a line for each message and each job looked at would be in the times."""
STALLED = 180.0
"""Seconds beside a job's own in which at least one must end."""


def overload(count: int, seed: int, between: tuple[float, float]) -> list[tuple[str, float]]:
    """Requests and seconds of work."""
    chance = random.Random(seed)
    return [(chance.choice(list(SHARDS)), round(chance.uniform(*between), 1)) for _ in range(count)]


class Submitted(NamedTuple):
    """A job that was submitted: its request, where its output goes, when (epoch)."""

    request: str
    output: Path
    at: float


def submit(
    slurm: Cluster, jobs: Sequence[tuple[str, float]], gap: float, gres: Mapping[str, str] | None = None
) -> dict[int, Submitted]:
    """Submit the jobs, one each `gap` seconds."""
    made = {}
    limit = f"--time={math.ceil(max(seconds for _, seconds in jobs) / 60)}"
    for number, (request, seconds) in enumerate(jobs):
        user = slurm.users[number % 2]
        now = time.time()
        asked = f"--gres={gres[request] if gres else f'mig:{request}'}"
        job = slurm.sbatch(records.script(f"sleep {seconds}"), asked, limit, "--output=%j.out", user=user)
        made[job] = Submitted(request, user.work / f"{job}.out", now)
        time.sleep(max(0.0, now + gap - time.time()))
    return made


def over(jobs: Mapping[int, Submitted], longest: float) -> dict[int, records.Record]:
    """Wait until all have written that they are over: what they wrote. Stops the benchmark when none ends any more."""
    left = dict(jobs)
    found: dict[int, records.Record] = {}
    progress = time.monotonic()
    while left:
        for job, submitted in list(left.items()):
            if submitted.output.exists() and (wrote := records.read(submitted.output)):
                found[job] = wrote[-1]
                del left[job]
                progress = time.monotonic()
        if time.monotonic() > progress + STALLED + longest:
            raise SystemExit(f"no job has ended for {STALLED + longest:.0f} s; {len(left)} are left: {list(left)[:9]}")
        time.sleep(0.5)
    return found


def audit(slurm: Cluster) -> list[dict[str, Any]]:
    """All nodes' audit logs, each line with its node."""
    logs = {node: slurm.root / node / "audit.jsonl" for node in slurm.nodes}
    return [
        {**json.loads(line), "node": node}
        for node, log in logs.items()
        if log.exists()
        for line in log.read_text().splitlines()
    ]


def first(slurm: Cluster) -> None:
    """Have slurmctld and munged run before everything else, as if they had a machine of their own: sdiag counts by the
    clock, and here all nodes, their hooks and the users share a few cores with them."""
    for daemon in ("munged", "slurmctld"):
        command = ["chrt", "--fifo", "--all-tasks", "--pid", "1", str(slurm.pid(daemon))]
        subprocess.run(command, check=True, capture_output=True)


def diagnosis(slurm: Cluster) -> tuple[dict[str, tuple[int, float]], int, float]:
    """What sdiag says since its last reset: messages of ours by name, how many and the seconds that slurmctld spent on
    them; scheduling passes, and the seconds in them."""
    text = slurm.run("sdiag").stdout
    found = re.findall(r"REQUEST_(\w+)\s+\(\s*\d+\)\s+count:(\d+)\s+ave_time:\d+\s+total_time:(\d+)", text)
    ours = {name: (int(count), int(total) / 1e6) for name, count, total in found if name in OURS}
    cycles = re.search(r"Main schedule.*?Total cycles:\s+(\d+)\s+Mean cycle:\s+(\d+)", text, re.DOTALL)
    return (ours, int(cycles[1]), int(cycles[1]) * int(cycles[2]) / 1e6) if cycles else (ours, 0, 0.0)


def freed(found: Sequence[records.Slot]) -> dict[int, float]:
    """When the slices of each job were free: the last end before it of a job that had one; 0 where nobody had."""
    return {
        slot.record.job: max(
            [
                other.record.end
                for other in found
                if other.gpu == slot.gpu
                and other.record.end <= slot.record.start
                and other.start < slot.start + slot.size
                and slot.start < other.start + other.size
            ],
            default=0.0,
        )
        for slot in found
    }


def judged(slurm: Cluster, found: Sequence[records.Record]) -> list[records.Slot]:
    """Where the jobs' instances were; stops the benchmark where two had the same slice, or one changed meanwhile."""
    journals = {node: records.journal(slurm.root / node / "gpus.json.journal") for node in slurm.nodes}
    slots, faults = records.slots(found, journals)
    if faults := faults + records.overlaps(slots):
        raise SystemExit("; ".join(faults))
    return slots


@contextmanager
def a_place() -> Iterator[Path]:
    """A directory that users may enter."""
    root = Path(tempfile.mkdtemp(prefix="rms-modes-"))
    root.chmod(0o755)
    try:
        yield root
    finally:
        shutil.rmtree(root, ignore_errors=True)


def version(slurm: Cluster) -> str:
    """Of Slurm."""
    return slurm.run("sinfo", "--version").stdout.split()[-1]


def drained(slurm: Cluster) -> int:
    """How many nodes are."""
    return sum(state.state.startswith("drain") for state in slurm.node_states().values())


def with_rms(mode: str, seed: int, options: argparse.Namespace) -> Run:
    """All three loads, on a cluster of RMS's."""
    with a_place() as place, rms_cluster(
        place / "c", nodes=options.nodes, gpus=options.gpus, create=0.05, destroy=0.05, admission=mode, cpus=64,
        cred_expire=CREDENTIAL, extra_conf=LOGGING,
    ) as slurm:  # fmt: skip
        first(slurm)
        rate = at_once(slurm, options.short) if options.short else None
        idle = one_by_one(slurm, options.nodes * options.gpus) if options.short else None
        slurm.run("sdiag", "--reset")
        began = time.time()
        jobs = submit(slurm, overload(options.jobs, seed, options.between), options.gap)
        found = over(jobs, options.between[1])
        total = time.time() - began
        messages, _, passes = diagnosis(slurm)
        busy = os.getloadavg()[0]
        slurm.wait_all(120)
        events = [event for event in audit(slurm) if event["t"] >= began]
        sent_back = [int(event["run"][1]) for event in events if event["event"] == "refused"]
        known = let_in(slurm)
        free = freed(judged(slurm, list(found.values())))
        return Run(
            version(slurm),
            mode,
            seed,
            len(sent_back) + sum(event["event"] == "granted" for event in events),
            len(sent_back),
            sum(not one.uuids for one in found.values()),
            drained(slurm),
            total,
            idle,
            rate,
            sum(count for count, _ in messages.values()) / options.jobs,
            sum(took for _, took in messages.values()) * 1e3 / options.jobs,
            passes * 1e3 / options.jobs,
            busy,
            refusals(events, known),
            ran(known, jobs, found, {j: None if j in sent_back else free[j] for j in found}),
        )


def let_in(slurm: Cluster) -> dict[int, list[float]]:
    """When slurmctld let each job in, as often as it did, as far as its log says so."""
    line = r"^\[(\S+)\] sched(?:: Allocate|/backfill: _start_job: Started) JobId=(\d+) "
    found: dict[int, list[float]] = {}
    for at, job in re.findall(line, (slurm.log / "slurmctld.log").read_text(), re.MULTILINE):
        found.setdefault(int(job), []).append(datetime.fromisoformat(at).timestamp())
    return found


def refusals(events: Sequence[Mapping[str, Any]], let_in: Mapping[int, Sequence[float]]) -> list[Refusal]:
    """The jobs that were sent back, as far as slurmctld's log says when they were let in."""
    over = {tuple(event["run"]): event["t"] for event in events if event["event"] == "release"}
    found = []
    for event in events:
        if event["event"] == "refused" and (end := over.get(tuple(event["run"]))):
            before = [at for at in let_in.get(event["run"][1], ()) if at <= event["t"]]
            found += [Refusal(event["node"], before[-1], end)] if before else []
    return found


def ran(
    let_in: Mapping[int, Sequence[float]],
    jobs: Mapping[int, Submitted],
    found: Mapping[int, records.Record],
    free: Mapping[int, float | None],
) -> list[Ran]:
    """What became of the jobs, whose slices were `free` then."""
    rows = []
    for number, wrote in found.items():
        job, at = jobs[number], free[number]
        could = None if at is None else max(job.at, at)
        last = let_in[number][-1] if number in let_in else None
        rows.append(Ran(job.request, wrote.node, job.at, could, last, wrote.start, wrote.end))
    return rows


def at_once(slurm: Cluster, count: int) -> float:
    """Jobs per second and node, of as many 1g jobs that end at once: from the first start to the last."""
    found = over(submit(slurm, [("1g", 0.0)] * count, 0.0), 0.0)
    slurm.wait_all(120)
    starts = [one.start for one in found.values()]
    return (count - 1) / max(max(starts) - min(starts), 0.01) / len(slurm.nodes)


def one_by_one(slurm: Cluster, gpus: int) -> list[float]:
    """How long after the one before it each job starts that needs a GPU as a whole, while nothing else goes on."""
    jobs = submit(slurm, [("7g", 1.0)] * (3 * gpus), 0.0)
    found = over(jobs, 1.0)
    slurm.wait_all(120)
    free = freed(judged(slurm, list(found.values())))
    return [one.start - free[job] for job, one in found.items() if free[job]]


def on_shards(seed: int, options: argparse.Namespace) -> Run:
    """The overload on Slurm alone, which counts shards of each GPU: 100, of which a job takes what SHARDS says.

    There is no RMS here and nobody is sent back: Slurm says on which GPU each job ran, and what cannot be placed there,
    in the order of the starts and by the same policy, would have been misplaced. So its waits are those of jobs that
    share GPUs as if slices could lie anywhere: shorter than any MIG can have.
    """
    with a_place() as place:
        root = place / "c"
        (root / "etc").mkdir(parents=True)
        lines = []
        for node in range(1, options.nodes + 1):
            for gpu in range(options.gpus):  # any character device will do
                os.mknod(root / f"n{node}_gpu{gpu}", stat.S_IFCHR | 0o666, os.makedev(1, 3))
            lines.append(f"NodeName=n{node} Name=gpu File={root}/n{node}_gpu[0-{options.gpus - 1}]\n")
            lines.append(f"NodeName=n{node} Name=shard Count={100 * options.gpus}\n")
        with Cluster(
            root, nodes=options.nodes, cpus=64, gres=f"gpu:{options.gpus},shard:{100 * options.gpus}",
            files={"gres.conf": "".join(lines)}, cred_expire=CREDENTIAL, extra_conf=LOGGING,
        ) as slurm:  # fmt: skip
            first(slurm)
            slurm.run("sdiag", "--reset")
            began = time.time()
            work = overload(options.jobs, seed, options.between)
            jobs = submit(slurm, work, options.gap, {p: f"shard:{count}" for p, count in SHARDS.items()})
            found = over(jobs, options.between[1])
            total, (_, _, passes), busy = time.time() - began, diagnosis(slurm), os.getloadavg()[0]
            return Run(
                version(slurm),
                "shard",
                seed,
                len(found),
                misfits({job: submitted.request for job, submitted in jobs.items()}, list(found.values())),
                None,
                drained(slurm),
                total,
                None,
                None,
                None,
                None,
                passes * 1e3 / options.jobs,
                busy,
                [],
                ran(let_in(slurm), jobs, found, dict.fromkeys(found)),
            )


def misfits(requests: Mapping[int, str], found: Sequence[records.Record]) -> int:
    """How many of these jobs could not have been placed on the GPU that Slurm gave them, beside the others there."""
    board = geometry.load(MODEL)
    names = board.names()
    moments = sorted([(one.end, 0, one) for one in found] + [(one.start, 1, one) for one in found])
    held: dict[tuple[str, str], dict[int, planner.Busy]] = {}
    count = 0
    for now, what, one in moments:
        there = held.setdefault((one.node, one.uuids[0]), {})
        if what == 0:
            there.pop(one.job, None)
            continue
        view = planner.View((planner.GpuView("GPU", board, tuple(there.values())),), (), None, now)
        profile = names[requests[one.job]]
        if offered := planner.candidates(view, profile):
            choice = controller.choose(view, planner.Asked(profile, None), offered)
            there[one.job] = planner.Busy(choice.candidate.placement, now, None)
        else:
            count += 1
    return count


def in_chroot(program: str, *words: str) -> list[Any]:
    """What one of these programs prints in the chroot with the newest Slurm; nothing, and a loud line, where there is
    none or it fails."""
    newest = str(ROOT / "tests/newest.sh")
    if subprocess.run([newest, "there"], check=False).returncode:
        print(f"rms: !!!!! {program} NOT RUN on the newest Slurm: it is not here (make newest) !!!!!", file=sys.stderr)
        return []
    command = [newest, "run", "python3", f"benchmarks/{program}", *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        print(f"rms: !!!!! {program} FAILED on the newest Slurm, see above !!!!!", file=sys.stderr)
        return []
    return list(json.loads(done.stdout))


def elsewhere(mode: str, options: argparse.Namespace) -> list[Run]:
    """The same in the chroot with the newest Slurm."""
    same = {"jobs": options.jobs, "gap": options.gap, "short": options.short, "nodes": options.nodes,
            "gpus": options.gpus, "between": ",".join(map(str, options.between)),
            "seeds": len(options.seeds)}  # fmt: skip
    words = [f"--{name}={value}" for name, value in same.items()]
    runs = in_chroot("slurm_modes.py", f"--modes={mode}", "--json", *words)
    return [slurm_waits.read(run) for run in runs]


def cell(values: Sequence[float | None], digits: int) -> str:
    """The median over the seeds; of several, the least and the most, too."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    middle = f"{statistics.median(known):.{digits}f}"
    return middle if len(known) == 1 else f"{middle} ({min(known):.{digits}f} to {max(known):.{digits}f})"


def ratio(pairs: Sequence[tuple[float, float]]) -> str:
    """Of the sums over all seeds; of several, the least and the most, too."""
    if not pairs:
        return "-"
    together = f"{sum(one for one, _ in pairs) / sum(other for _, other in pairs):.2f}"
    each = [one / other for one, other in pairs]
    return together if len(pairs) == 1 else f"{together} ({min(each):.2f} to {max(each):.2f})"


NAMES = (
    "Slurm",
    "jobs",
    "dispatches",
    "misplaced",
    "without an instance",
    "drained",
    "mean wait s",
    "by the simulator's",
    "by that without latency",
    "all done s",
    "start after it could: median s",
    "alone: mean s",
    "behind another: mean s",
    "ending: median s",
    "idle: median s",
    "short jobs a second and node",
    "messages a job",
    "slurmctld ms a job",
    "scheduling passes ms a job",
    "load",
)


def column(runs: Sequence[Run], options: argparse.Namespace) -> list[str]:
    """One mode: counts of all seeds together, of the rest the median."""
    waits = [statistics.mean(job.start - job.submit for job in run.ran) for run in runs]
    known = [(run, wait, late) for run, wait in zip(runs, waits, strict=True) if (late := slurm_waits.latency(run)).all]
    without = [run.without for run in runs if run.without is not None]
    counts = [sum(n) for n in zip(*((len(run.ran), run.dispatches, run.misplaced) for run in runs), strict=True)]
    return [
        runs[0].slurm,
        *map(str, counts),
        str(sum(without)) if without else "-",
        str(sum(run.drained for run in runs)),
        cell(waits, 1),
        ratio([(w, mean(slurm_waits.simulated(run, options, late))) for run, w, late in known]),
        ratio([(w, mean(slurm_waits.simulated(run, options, None))) for run, w, _ in known]),
        cell([run.total for run in runs], 0),
        cell([statistics.median(late.all) for _, _, late in known], 2),
        cell([mean(late.alone) for _, _, late in known], 2),
        cell([mean(late.behind) for _, _, late in known], 2),
        cell([statistics.median(late.ending) for _, _, late in known if late.ending], 2),
        cell([statistics.median(run.idle) for run in runs if run.idle], 2),
        cell([run.rate for run in runs], 1),
        cell([run.rpcs for run in runs], 1),
        cell([run.rpc_ms for run in runs], 2),
        cell([run.passes_ms for run in runs], 2),
        cell([run.load for run in runs], 1),
    ]


def table(runs: Sequence[Run], options: argparse.Namespace, before: float) -> str:
    """For docs/benchmarks.md."""
    least, most = options.between
    short = f"; before them {options.short} short 1g jobs, and 3 of 1 s for each whole GPU" if options.short else ""
    lines = [
        f"{options.nodes} nodes with {options.gpus} simulated {MODEL} each, {options.jobs} jobs of {least:g} to "
        f"{most:g} s, one each {options.gap} s, seed {', '.join(map(str, options.seeds))}{short}. "
        f"{os.cpu_count()} cores, load before {before:.1f}.",
        "",
    ]
    modes = list(dict.fromkeys(run.mode for run in runs))
    columns = [column([run for run in runs if run.mode == mode], options) for mode in modes]
    lines += [f"| | {' | '.join(modes)} |", "|---|" + "---:|" * len(modes)]
    lines += [f"| {name} | {' | '.join(cells)} |" for name, *cells in zip(NAMES, *columns, strict=True)]
    return "".join(f"{line}\n" for line in lines)


def knows_extra() -> bool:
    """Whether the Slurm here can be told of what fits by the nodes' Extra."""
    # sinfo wants a slurm.conf even for that.
    shown = subprocess.run(["slurmctld", "-V"], capture_output=True, text=True, check=True, env={"PATH": PATH}).stdout
    return tuple(map(int, re.findall(r"\d+", shown)[:2])) >= (23, 11)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the modes one after the other and print the table; `--write` puts it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description="The modes of admission side by side.")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=300)
    parser.add_argument("--short", type=int, default=56, help="0: neither these nor the jobs on idle nodes")
    parser.add_argument("--gap", type=float, default=0.1)
    parser.add_argument("--between", default="2,6", help="seconds that jobs of the overload take")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 7 on")
    parser.add_argument("--modes", default="sums,shard,features,extra")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true", help="what was measured instead of a table")
    options = parser.parse_args(arguments)
    options.seeds = list(range(FIRST_SEED, FIRST_SEED + options.seeds))
    options.between = tuple(float(seconds) for seconds in options.between.split(","))
    before = os.getloadavg()[0]
    runs: list[Run] = []
    for mode in options.modes.split(","):
        if mode == "extra" and not knows_extra():
            runs += elsewhere(mode, options)
            continue
        for seed in options.seeds:
            runs.append(on_shards(seed, options) if mode == "shard" else with_rms(mode, seed, options))
            print(runs[-1]._replace(ran=[]), file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([run._asdict() for run in runs]))
        return 0
    text = table(runs, options, before)
    print(text)
    if options.write:
        tables.put(f"modes {options.nodes}x{options.gpus}", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
