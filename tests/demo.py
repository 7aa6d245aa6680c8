"""`make demo`: two nodes with two simulated A100-80GB each, a real Slurm, and jobs that need MIG slices.

Where Slurm is not installed the same jobs go through the controller alone. Exits 0 if every job had what it asked for
and no two had the same slice at the same time, judged from what they wrote and from the GPUs' own journal.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import records
from records import Record
from rms_cluster import rms_cluster
from throwaway import Cluster, ClusterError, missing

HERE = Path(__file__).resolve().parent
SECONDS_IN_ALL = 80

JOBS = [  # user, request, seconds, more options
    (0, "mig:3g:1", 4, ()),
    (1, "mig:1g.10gb:2", 3, ("--ntasks=2",)),
    (0, "mig:2g.20gb:1,mig:1g.10gb:1", 3, ()),
    (1, "mig:4g", 3, ()),
    (0, "mig:7g.80gb:1", 3, ()),
    (1, "mig:3g.40gb:2", 3, ()),
    (0, "mig:1g", 2, ("--array=0-3",)),
    (1, "mig:2g", 3, ()),
    (0, "mig:1g.20gb:1", 3, ("--comment=my own words",)),
    (1, "mig:7g", 2, ()),
    (0, "mig:2g:2", 3, ()),
    (1, "mig:1g.10gb:3", 2, ()),
    (0, "mig:3g.39gb", 2, ()),
    (1, "", 2, ()),
]


class Outcome(NamedTuple):
    """A row of the table. Times in seconds; `printed` is what the job said of its CUDA_VISIBLE_DEVICES."""

    job: int
    user: str
    request: str
    record: Record
    submitted: float
    called: float | None
    root: Path


def main() -> int:
    began = time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="rms-demo-"))
    try:
        if lacking := missing():
            print(f"No Slurm here (apt-get install {' '.join(lacking)}): the same jobs through the controller alone.\n")
            outcomes = alone(root)
        else:
            outcomes = with_slurm(root)
        return report(outcomes, root, time.monotonic() - began)
    except ClusterError as error:
        print(f"rms: the demo's Slurm failed: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(root, ignore_errors=True)


def with_slurm(root: Path) -> list[Outcome]:
    """Every job through a real slurmctld and slurmd."""
    # Slurm 22.05 must not see a refused job again while its credential lives: 120 s by default, 5 s at the least.
    with rms_cluster(root, admission="features", create=0.3, destroy=0.15, cred_expire=5) as slurm:
        print(f"Slurm {slurm.run('sinfo', '--version').stdout.split()[-1]}: 2 nodes, each with 2 simulated A100-80GB\n")
        follow = Follower(root, slurm.nodes)
        jobs: dict[int, tuple[str, str, float]] = {}
        for user, request, seconds, more in JOBS:
            owner = slurm.users[user]
            options = [*([f"--gres={request}"] if request else []), "--time=5", *more]
            script = records.script(f"sleep {seconds}")
            job = slurm.sbatch(script, *options, "--output=%A_%a_%j.out", user=owner)
            jobs[job] = owner.name, request or "no MIG", time.time()
            print(f"{owner.name:>8}$ sbatch {' '.join(options)}   -> job {job}")
        print()
        slurm.wait(lambda: follow() or not slurm.queue(), SECONDS_IN_ALL, "every job is over")
        follow()
        print("\nThe node's own view, while everything is idle again:\n")
        subprocess.run(
            [sys.executable, "-m", "rms.cli", "show", "--node", "n1", "--config", str(root / "etc" / "rms.toml")],
            check=False,
        )
        calls = called(root, slurm.nodes)
        outcomes = []
        for user in slurm.users:
            for path in sorted(user.work.glob("*.out")):
                job = int(path.name.split("_")[0])
                for record in records.read(path):
                    owner_name, request, submitted = jobs[job]
                    outcomes.append(Outcome(job, owner_name, request, record, submitted, calls.get(record.job), root))
        expected = len(JOBS) + 3  # the array has four tasks
        if len(outcomes) != expected:
            raise ClusterError(f"{len(outcomes)} of {expected} jobs ran to their end")
        return outcomes


class Follower:
    """Prints what the nodes' hooks do, as they do it."""

    def __init__(self, root: Path, nodes: list[str]) -> None:
        self._logs = {node: root / node / "hooks.log" for node in nodes}
        self._read = dict.fromkeys(nodes, 0)

    def __call__(self) -> None:
        for node, path in self._logs.items():
            if path.exists():
                lines = path.read_text().splitlines()
                for line in lines[self._read[node] :]:
                    when, _, rest = line.partition(" ")
                    print(f"{when.partition('T')[2]} {node} {rest}", flush=True)
                self._read[node] = len(lines)


def called(root: Path, nodes: list[str]) -> dict[int, float]:
    """When each job's Prolog asked the controller, the last time: from the audit logs."""
    calls: dict[int, float] = {}
    for node in nodes:
        log = root / node / "audit.jsonl"
        for line in log.read_text().splitlines() if log.exists() else ():
            entry = json.loads(line)
            if entry["event"] == "acquire":
                calls[entry["run"][1]] = max(entry["t"], calls.get(entry["run"][1], 0.0))
    return calls


def alone(root: Path) -> list[Outcome]:
    """The same jobs, first come first served with backfill, on one node, through `controller.py` itself."""
    cluster: Cluster = rms_cluster(root, nodes=1, create=0.3, destroy=0.15)
    environment = {"RMS_CONFIG": str(cluster.etc / "rms.toml"), "SLURMD_NODENAME": "n1", "PATH": os.environ["PATH"]}
    program = [sys.executable, str(HERE.parent / "controller.py")]

    def controller(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True, check=False)

    waiting = [(number, *job) for number, job in enumerate(JOBS, 1) if job[1]]
    submitted = time.time()
    running: dict[int, tuple[subprocess.Popen[bytes], Path, float]] = {}
    outcomes = []
    while waiting or running:
        for job in list(waiting):
            number, _, request, seconds, _ = job
            call = time.time()
            answer = controller("acquire", f"--job={number}", "--restart=0", "--uid=1", f"--request={request}")
            if answer.returncode == 4:
                continue
            if answer.returncode != 0:
                raise ClusterError(answer.stderr.strip())
            waiting.remove(job)
            uuids = ",".join(line.split()[0] for line in answer.stdout.splitlines())
            print(f"job {number}: {request} -> {answer.stdout.strip().replace(chr(10), '; ')}", flush=True)
            path = root / f"{number}.out"
            words = {"CUDA_VISIBLE_DEVICES": uuids, "SLURM_JOB_ID": str(number), "SLURMD_NODENAME": "n1"}
            with open(path, "wb") as out:
                script = records.script(f"sleep {seconds}")
                process = subprocess.Popen(["sh", "-c", script], stdout=out, env={**environment, **words})
            running[number] = process, path, call
        for number, (process, path, call) in list(running.items()):
            if process.poll() is not None:
                controller("release", f"--job={number}", "--restart=0")
                _, request, *_ = JOBS[number - 1]
                (record,) = records.read(path)
                outcomes.append(Outcome(number, "you", request, record, submitted, call, root))
                del running[number]
        time.sleep(0.05)
    return outcomes


def report(outcomes: list[Outcome], root: Path, seconds: float) -> int:
    """The table, and the verdict."""
    nodes = sorted({o.record.node for o in outcomes})
    journals = {node: records.journal(root / node / "gpus.json.journal") for node in nodes}
    slots, faults = records.slots([o.record for o in outcomes], journals)
    faults += records.overlaps(slots)
    numbers: dict[str, int] = {}
    for node in nodes:
        with open(root / node / "gpus.json") as file:
            numbers |= {gpu["uuid"]: i for i, gpu in enumerate(json.load(file)["gpus"])}
    head = (
        "job",
        "user",
        "request",
        "node",
        "GPU",
        "placement",
        "waited",
        "start delay",
        "CUDA_VISIBLE_DEVICES in the job",
    )
    rows = []
    for o in sorted(outcomes, key=lambda o: o.record.start):
        mine = [slot for slot in slots if slot.record is o.record]
        rows.append((
            str(o.record.job), o.user, o.request, o.record.node,
            "+".join(str(numbers[s.gpu]) for s in mine) or "-",
            "+".join(f"{s.profile.partition('.')[0]}@{s.start}:{s.size}" for s in mine) or "-",
            f"{o.record.start - o.submitted:.1f} s",
            f"{o.record.start - o.called:.2f} s" if o.called else "-",
            ",".join(o.record.uuids) or "(not set)",
        ))  # fmt: skip
        if bool(o.record.uuids) != (o.request != "no MIG"):
            faults.append(f"job {o.record.job}: asked for {o.request}, was shown {o.record.uuids}")
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    print()
    for row in (head, tuple("-" * w for w in widths), *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        "\nwaited: from submission to the job's first line; start delay: to it from the moment its Prolog asked RMS\n"
    )
    for fault in faults:
        print(f"WRONG: {fault}")
    verdict = "no two jobs had the same slice at the same time" if not faults else f"{len(faults)} faults"
    print(f"{len(outcomes)} jobs, {len(slots)} instances, {seconds:.0f} s: {verdict}")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
