"""What it costs slurmctld to be told what fits, on a large cluster and with many jobs waiting.

    python benchmarks/slurm_load.py [--nodes N] [--pending J] [--rate R] [--seconds S] [--write]

A real slurmctld with N nodes; all but one have shown that they are there, and have no slurmd any more. R jobs a second
start and as many end on them, as far as the nodes are concerned: the controller's own transactions, each followed by
what a hook publishes. slurmctld itself starts and ends nothing meanwhile, so each scheduling pass beyond those of an
idle slurmctld was set off by an update. (Where jobs do start and end, many of these passes are due anyway.) Then the
same with J jobs waiting, each submitted by an sbatch of its own, for a whole GPU of which there is none.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rms_cluster import RmsCluster, rms_cluster  # noqa: E402

import controller  # noqa: E402
from rms import config  # noqa: E402
from rms.errors import NoRoomError  # noqa: E402
from rms.inventory import Run  # noqa: E402
from slurm import site  # noqa: E402
from slurm.publish import Publisher  # noqa: E402

DOCUMENT = ROOT / "docs/benchmarks.md"
MODEL, GPUS = "A100-80GB", 2
BATCH = 50
"""How many slurmds run at once."""
ACTIVE = 50
"""On how many of the nodes jobs start and end. On each runs a 7g and a 1g all the time, so that no 7g fits."""
SCHEDULER = "bf_continue,batch_sched_delay=1"
"""As `rms slurm-config` prints it; the rest is Slurm's own default."""
OURS = ("NODE_INFO_SINGLE", "PARTITION_INFO", "UPDATE_NODE")


class Seen(NamedTuple):
    """Of some seconds of slurmctld: messages by name and the seconds they took it, passes, their mean, its CPU time."""

    seconds: float
    messages: dict[str, tuple[int, float]]
    passes: int
    mean: float
    cpu: float


class Row(NamedTuple):
    """The same slurmctld without and with the updates; `jobs` is how many have started, as many have ended."""

    pending: int
    jobs: int
    without: Seen
    told: Seen
    load: float


def cluster(root: Path, nodes: int) -> RmsCluster:
    """One node with a slurmd, m1, m2, ... without; not started."""
    kind = site.kinds([(MODEL, GPUS, "n1")])[0]
    port = random.randrange(10_000, 20_000 - nodes)
    more = (
        f"NodeName=m[1-{nodes - 1}] NodeHostname=localhost NodeAddr=127.0.0.1 Port=[{port}-{port + nodes - 2}] "
        f"CPUs=64 Gres={site.gres(kind, 'features')}\n"
        # No pings while it is measured: nobody would answer (`register`).
        "SlurmctldDebug=info\nSlurmdTimeout=60000\n"
    )
    return rms_cluster(
        root, nodes=1, gpus=GPUS, model=MODEL, create=0.0, destroy=0.0, admission="features", scheduler=SCHEDULER,
        extra_conf=more,
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


class Nodes:
    """The nodes on which jobs start and end: their state is real, their slurmd is not there."""

    def __init__(self, slurm: RmsCluster, names: Sequence[str]) -> None:
        self._slurm = slurm
        self._names = names
        self._chance = random.Random(7)
        self._running: deque[tuple[str, Run]] = deque()
        self._jobs = 1_000_000
        for name in self._names:
            for folder, mode in (("state", 0o700), ("run", 0o755)):
                (slurm.root / name / folder).mkdir(mode, parents=True)
            self._start(name, "7g,1g")
            self._publisher(name).now()
        for _ in self._names:
            self.start()

    def start(self) -> None:
        """A job starts somewhere."""
        while True:
            name = self._chance.choice(self._names)
            try:
                self._running.append((name, self._start(name, self._chance.choice(["1g", "2g", "3g", "4g"]))))
            except NoRoomError:
                continue
            self._publisher(name).job_came()
            return

    def end(self) -> None:
        """The job that runs longest ends."""
        name, run = self._running.popleft()
        controller.Controller(self._config(name), controller.choose).release(run)
        if not self._publisher(name).job_went(10.0):
            raise SystemExit(f"{name} could not publish in 10 s")
        with suppress(ChildProcessError):  # what has published in the background meanwhile
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass

    def _start(self, name: str, spec: str) -> Run:
        self._jobs += 1
        run = Run("throwaway", self._jobs, 0)
        controller.Controller(self._config(name), controller.choose, lambda text: None).acquire(
            run, self._slurm.users[0].uid, spec
        )
        return run

    def _publisher(self, name: str) -> Publisher:
        return Publisher(self._config(name), str(self._slurm.conf), name, lambda text: print(text, file=sys.stderr))

    def _config(self, name: str) -> config.Config:
        return config.load(str(self._slurm.etc / "rms.toml"), name)


def submit(slurm: RmsCluster, count: int) -> None:
    """So many jobs that wait: distinct ones, for a task of an array is no job of its own until it starts."""
    one = "sbatch --quiet --gres=mig:7g --output=/dev/null --wrap=true"
    loop = f"i=0; while [ $i -lt {count} ]; do {one} || exit 1; i=$((i+1)); done"
    slurm.run("sh", "-c", loop, user=slurm.users[0], timeout=1800)
    waiting = sum("PENDING" in line for line in slurm.queue())
    if waiting != count:
        raise SystemExit(f"{waiting} of {count} jobs wait")


def seen(slurm: RmsCluster, began: float, cpu: float) -> Seen:
    """What sdiag and the kernel say of slurmctld since then, and since the last reset."""
    text = slurm.run("sdiag").stdout
    found = re.findall(r"REQUEST_(\w+)\s+\(\s*\d+\)\s+count:(\d+)\s+ave_time:\d+\s+total_time:(\d+)", text)
    cycles = re.search(r"Main schedule.*?Total cycles:\s+(\d+)\s+Mean cycle:\s+(\d+)", text, re.DOTALL)
    return Seen(
        time.monotonic() - began,
        {name: (int(count), int(total) / 1e6) for name, count, total in found if name in OURS},
        int(cycles[1]) if cycles else 0,
        int(cycles[2]) / 1e6 if cycles else 0.0,
        cpu_seconds(slurm) - cpu,
    )


def cpu_seconds(slurm: RmsCluster) -> float:
    """What slurmctld has used so far."""
    words = Path(f"/proc/{slurm.pid('slurmctld')}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def measure(slurm: RmsCluster, nodes: Nodes, rate: float, seconds: float, pending: int) -> Row:
    """Half of the time nothing, then the updates."""
    slurm.run("sdiag", "--reset")
    began, cpu = time.monotonic(), cpu_seconds(slurm)
    time.sleep(seconds / 2)
    without = seen(slurm, began, cpu)
    slurm.run("sdiag", "--reset")
    began, cpu = time.monotonic(), cpu_seconds(slurm)
    jobs = 0
    while time.monotonic() - began < seconds:
        nodes.start()
        nodes.end()
        jobs += 1
        time.sleep(max(0.0, began + jobs / rate - time.monotonic()))
    return Row(pending, jobs, without, seen(slurm, began, cpu), os.getloadavg()[0])


def line(row: Row, nodes: int) -> str:
    """Of the table."""
    told, idle = row.told, row.without
    messages = sum(count for count, _ in told.messages.values())
    spent = sum(seconds for _, seconds in told.messages.values())
    extra = max(0.0, told.passes * told.mean - idle.passes * idle.mean * told.seconds / idle.seconds)
    cpu = told.cpu - idle.cpu * told.seconds / idle.seconds
    each = [f"{1e3 * seconds / row.jobs:.2f}" for seconds in (spent, extra, spent + extra, cpu)]
    return " | ".join(
        [
            f"| {nodes}",
            str(row.pending),
            f"{row.jobs / told.seconds:.1f}",
            f"{messages / row.jobs:.1f}",
            each[0],
            f"{idle.passes / idle.seconds:.2f}",
            f"{told.passes / told.seconds:.2f}",
            f"{1e3 * told.mean:.2f}",
            *each[1:],
            f"{100 * idle.cpu / idle.seconds:.1f}",
            f"{100 * told.cpu / told.seconds:.1f}",
            f"{row.load:.1f} |",
        ]
    )


HEAD = (
    "| nodes | jobs waiting | jobs a second | messages a job | their time, ms a job | passes a second, idle "
    "| with updates | mean pass ms | extra passes, ms a job | both, ms a job | slurmctld's CPU, ms a job "
    "| CPU idle, % of a core | with updates | load |\n|---:" + "|---:" * 13 + "|\n"
)


def main() -> int:
    """Print the table; `--write` puts it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description="What being told what fits costs slurmctld.")
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--pending", type=int, default=5000)
    parser.add_argument("--rate", type=float, default=5.0)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="rms-load-"))
    root.chmod(0o755)
    try:
        with cluster(root / "c", options.nodes) as slurm:
            full = slurm.sbatch("sleep 86400", "--gres=mig:7g:2", user=slurm.users[0])  # the one that could run jobs
            slurm.wait(lambda: slurm.job(full)["JobState"] == "RUNNING", 60, "the first node is full")
            names = [f"m{n}" for n in range(1, options.nodes)]
            register(slurm, names)
            nodes = Nodes(slurm, names[:ACTIVE])
            rows = [measure(slurm, nodes, options.rate, options.seconds, 0)]
            print(line(rows[0], options.nodes), file=sys.stderr, flush=True)
            submit(slurm, options.pending)
            rows.append(measure(slurm, nodes, options.rate, options.seconds, options.pending))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    text = HEAD + "".join(f"{line(row, options.nodes)}\n" for row in rows)
    print(text)
    if options.write:
        marks = re.compile(r"(<!-- load: written by make bench-load -->\n).*?(<!-- end of load -->)", re.DOTALL)
        DOCUMENT.write_text(marks.sub(lambda m: m[1] + text + m[2], DOCUMENT.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
