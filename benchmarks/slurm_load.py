"""What it costs slurmctld to be told what fits, on a large cluster and with many jobs waiting.

    python benchmarks/slurm_load.py [--nodes N] [--pending J] [--rate R] [--seconds S] [--where LIST] [--write]

A real slurmctld with N nodes. R jobs a second are submitted, start and end on four of them, with RMS's hooks; the
others have shown that they are there, and have no slurmd any more. In turn the four tell slurmctld what fits (`told`)
and say nothing (`silent`: the hooks do all but publish, the names of the stream's jobs stay published and the token is
as wide as it can be, so that slurmctld starts the same jobs). Jobs, their gres, their constraints, submissions, starts
and ends are alike; what `told` has more of scheduling passes was set off by the updates, and counts with the mean of
all passes. Then the same with J jobs waiting, each submitted by an sbatch of its own, for a whole GPU of which there is
none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import slurm_modes  # noqa: E402
import tables  # noqa: E402
from rms_cluster import RmsCluster, rms_cluster  # noqa: E402

from slurm import publish, site  # noqa: E402

MODEL, GPUS = "A100-80GB", 2
REAL = 4
"""How many nodes have a slurmd, and jobs. On each a 7g and a 1g run all the time: no 7g fits, six 1g do."""
BATCH = 50
"""How many other slurmds run at once."""
ROUNDS = 2
SCHEDULER = "bf_continue,batch_sched_delay=1"
"""As `rms slurm-config` prints it; the rest is Slurm's own default."""


class Seen(NamedTuple):
    """Of a stream of so many jobs: messages by name, with how many and the seconds they took slurmctld; its scheduling
    passes and their seconds; its CPU time, and the seconds that all took."""

    jobs: int
    messages: dict[str, tuple[int, float]]
    passes: int
    passing: float
    cpu: float
    seconds: float


class Row(NamedTuple):
    """The same stream without and with the updates."""

    slurm: str
    nodes: int
    pending: int
    silent: Seen
    told: Seen
    load: float


def cluster(root: Path, nodes: int) -> RmsCluster:
    """n1 to n4 with a slurmd, m1, m2, ... without; not started."""
    kind = site.kinds([(MODEL, GPUS, "n1")])[0]
    others = nodes - REAL
    port = random.randrange(10_000, 20_000 - others)
    more = (
        f"NodeName=m[1-{others}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{port}-{port + others - 1}] "
        f"CPUs=64 Gres={site.gres(kind, 'features')}\n"
        # No pings while it is measured: nobody would answer (`register`). `info` is Slurm's own default.
        "SlurmctldDebug=info\nSlurmdTimeout=60000\n"
        # Or --nice would make no difference on newer ones (`submit`).
        "PriorityType=priority/basic\n"
    )
    return rms_cluster(
        root, nodes=REAL, gpus=GPUS, model=MODEL, create=0.0, destroy=0.0, admission="features", scheduler=SCHEDULER,
        cpus=64, extra_conf=more,
    )  # fmt: skip


def register(slurm: RmsCluster, names: Sequence[str]) -> None:
    """Have each node say once that it is there, by a slurmd that is then killed: slurmctld plans with it from now on,
    as long as it does not ask again."""
    for first in range(0, len(names), BATCH):
        some = names[first : first + BATCH]
        daemons = [slurm.popen("slurmd", "-D", "-N", name) for name in some]
        slurm.wait(lambda some=some: set(some) <= idle(slurm), 120, f"{some[0]} to {some[-1]} are idle")
        for daemon in daemons:
            daemon.kill()
            daemon.communicate()


def idle(slurm: RmsCluster) -> set[str]:
    """The nodes that are."""
    return {name for name, state in slurm.node_states().items() if state.state == "idle"}


def submit(slurm: RmsCluster, count: int) -> None:
    """So many jobs that wait behind all others: distinct ones, for a task of an array is none until it starts."""
    one = "sbatch --quiet --nice=1000000 --gres=mig:7g --output=/dev/null --wrap=true"
    loop = f"i=0; while [ $i -lt {count} ]; do {one} || exit 1; i=$((i+1)); done"
    slurm.run("sh", "-c", loop, user=slurm.users[0], timeout=1800)
    waiting = sum("PENDING" in line for line in slurm.queue())
    if waiting != count:
        raise SystemExit(f"{waiting} of {count} jobs wait")


def speak(slurm: RmsCluster, aloud: bool) -> None:
    """Let the nodes publish from now on, or not any more."""
    toml = slurm.etc / "rms.toml"
    says = [f'admission = "{mode}"' for mode in ("sums", "features")]
    toml.write_text(toml.read_text().replace(says[not aloud], says[aloud]))
    if aloud:
        slurm.publish(*slurm.nodes)
        return
    for node in slurm.nodes:
        record = publish.read(slurm.run(*publish.question(node)).stdout, node)
        names = tuple(name for name in record.active.split(",") if name.startswith(publish.PREFIX))
        wide = publish.Offer(names, 50, 100)
        slurm.run("scontrol", "update", f"NodeName={node}", *publish.changes(record, wide, "features"))


def stream(slurm: RmsCluster, rate: float, seconds: float) -> Seen:
    """Jobs of a second, until the last of them is over."""
    slurm.run("sdiag", "--reset")
    began, cpu, before = time.monotonic(), cpu_seconds(slurm), released(slurm)
    jobs = 0
    while time.monotonic() - began < seconds:
        slurm.sbatch("sleep 1", "--gres=mig:1g", "--output=/dev/null", user=slurm.users[1])
        jobs += 1
        time.sleep(max(0.0, began + jobs / rate - time.monotonic()))
    slurm.wait(lambda: released(slurm) >= before + jobs, 120, f"{jobs} jobs are over")
    time.sleep(1.5)  # for the update and the pass that the last end sets off
    messages, passes, passing = slurm_modes.diagnosis(slurm)
    return Seen(jobs, messages, passes, passing, cpu_seconds(slurm) - cpu, time.monotonic() - began)


def released(slurm: RmsCluster) -> int:
    """How many jobs have ended on all nodes."""
    return sum(event["event"] == "released" for event in slurm_modes.audit(slurm))


def cpu_seconds(slurm: RmsCluster) -> float:
    """What slurmctld has used so far."""
    words = Path(f"/proc/{slurm.pid('slurmctld')}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def measure(slurm: RmsCluster, nodes: int, pending: int, rate: float, seconds: float) -> Row:
    """Silent and told in turn; `seconds` of each in all."""
    found: dict[bool, list[Seen]] = {False: [], True: []}
    for number in range(2 * ROUNDS):
        aloud = number % 2 == 1
        speak(slurm, aloud)
        found[aloud].append(stream(slurm, rate, seconds / ROUNDS))
    silent, told = (together(found[aloud]) for aloud in (False, True))
    return Row(slurm_modes.version(slurm), nodes, pending, silent, told, os.getloadavg()[0])


def together(several: Sequence[Seen]) -> Seen:
    """As one."""
    names = {name for one in several for name in one.messages}
    each = {name: [one.messages.get(name, (0, 0.0)) for one in several] for name in sorted(names)}
    return Seen(
        sum(one.jobs for one in several),
        {name: (sum(count for count, _ in some), sum(took for _, took in some)) for name, some in each.items()},
        sum(one.passes for one in several),
        sum(one.passing for one in several),
        sum(one.cpu for one in several),
        sum(one.seconds for one in several),
    )


def line(row: Row) -> str:
    """Of the table."""
    silent, told = row.silent, row.told
    messages = sum(count for count, _ in told.messages.values())
    spent = 1e3 * sum(took for _, took in told.messages.values()) / told.jobs
    more = told.passes / told.jobs - silent.passes / silent.jobs
    extra = 1e3 * more * (told.passing + silent.passing) / max(told.passes + silent.passes, 1)
    cpu = 1e3 * (told.cpu / told.jobs - silent.cpu / silent.jobs)
    return " | ".join(
        [
            f"| {row.slurm}",
            str(row.nodes),
            str(row.pending),
            f"{told.jobs / told.seconds:.1f}",
            f"{messages / told.jobs:.1f}",
            f"{spent:.2f}",
            *(f"{one.passes / one.jobs:.2f} x {1e3 * one.passing / max(one.passes, 1):.2f}" for one in (silent, told)),
            f"{extra:.2f}",
            f"{spent + extra:.2f}",
            f"{cpu:.2f}",
            f"{row.load:.1f} |",
        ]
    )


HEAD = (
    "| Slurm | nodes | jobs waiting | jobs a second | messages a job | their time, ms a job | passes a job x ms, "
    "silent | told | extra passes, ms a job | both, ms a job | more CPU of slurmctld, ms a job | load |\n|---"
    + "|---:" * 11 + "|\n"
)  # fmt: skip
KINDS = "\n| Slurm | jobs waiting | message | a job | ms each | ms a job |\n|---|---:|---|---:|---:|---:|\n"


def kinds(row: Row) -> str:
    """Lines of the second table: the messages by name."""
    return "".join(
        f"| {row.slurm} | {row.pending} | REQUEST_{name} | {count / row.told.jobs:.2f} | {1e3 * took / count:.2f} | "
        f"{1e3 * took / row.told.jobs:.2f} |\n"
        for name, (count, took) in sorted(row.told.messages.items(), key=lambda item: -item[1][1])
    )


def here(options: argparse.Namespace) -> list[Row]:
    """Measured with the Slurm of this machine."""
    root = Path(tempfile.mkdtemp(prefix="rms-load-"))
    root.chmod(0o755)
    try:
        with cluster(root / "c", options.nodes) as slurm:
            slurm_modes.first(slurm)
            full = [slurm.sbatch("sleep 86400", "--gres=mig:7g,mig:1g", user=slurm.users[0]) for _ in slurm.nodes]
            slurm.wait(lambda: all(slurm.job(one)["JobState"] == "RUNNING" for one in full), 60, "no 7g fits")
            slurm.publish()  # or their Prologs' updates would come later
            register(slurm, [f"m{n}" for n in range(1, options.nodes - REAL + 1)])
            rows = []
            for pending in (0, options.pending):
                submit(slurm, pending)
                rows.append(measure(slurm, options.nodes, pending, options.rate, options.seconds))
                print(line(rows[-1]), file=sys.stderr, flush=True)
            return rows
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    """Print the tables; `--write` puts them into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description="What being told what fits costs slurmctld.")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--pending", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--where", default="here,newest", help="with the Slurm here, and in the chroot of make newest")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--json", action="store_true", help="what was measured instead of the tables")
    options = parser.parse_args()
    rows: list[Row] = []
    for where in options.where.split(","):
        if where == "here":
            rows += here(options)
        else:
            same = [f"--{name}={getattr(options, name)}" for name in ("nodes", "pending", "rate", "seconds")]
            found = slurm_modes.in_chroot("slurm_load.py", "--where=here", "--json", *same)
            rows += [Row(**{**row, **{k: Seen(*row[k]) for k in ("silent", "told")}}) for row in found]
    if options.json:
        print(json.dumps([row._asdict() for row in rows]))
        return 0
    text = HEAD + "".join(f"{line(row)}\n" for row in rows) + KINDS + "".join(map(kinds, rows))
    print(text)
    if options.write:
        tables.put("load", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
