"""What telling slurmctld what fits adds to the hooks: on a throw-away Slurm, in mode `features`, beside mode `sums`.

    python benchmarks/publishing.py [--rounds N] [--write]

The hooks are started as slurmd starts them (benchmarks/hooks.py), one after the other in each round, for a job of which
slurmctld knows nothing: no Prolog that grants asks about its job. CPU is the hook's own, with its children's.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import tables  # noqa: E402
from hooks import NODE, slurmd  # noqa: E402
from rms_cluster import RmsCluster, rms_cluster  # noqa: E402

from rms import config as configuration  # noqa: E402
from slurm import site  # noqa: E402
from slurm.publish import TOGETHER_SECONDS, Publisher  # noqa: E402

Took = tuple[float, float]
"""Milliseconds from start to end, and of CPU."""


def take(work: Callable[[], object]) -> Took:
    """Do something in a process of its own."""
    began = time.perf_counter()
    if (pid := os.fork()) == 0:
        try:
            work()
        finally:
            os._exit(0)
    _, status, usage = os.wait4(pid, 0)
    if status:
        raise SystemExit(f"publishing.py: exit {os.waitstatus_to_exitcode(status)}")
    return (time.perf_counter() - began) * 1e3, (usage.ru_utime + usage.ru_stime) * 1e3


def measure(slurm: RmsCluster, rounds: int) -> dict[str, list[Took]]:
    """All rows, by name."""
    toml = slurm.etc / "rms.toml"
    silent = slurm.root / "silent"
    silent.mkdir()
    (silent / "rms.toml").write_text(toml.read_text().replace('admission = "features"', 'admission = "sums"'))
    made = site.files(site.kinds([("A100-80GB", 2, NODE)]), str(silent / "rms.toml"), str(slurm.conf), "sums")
    site.write(made, str(silent))
    publisher = Publisher(configuration.load(str(toml), NODE), str(slurm.conf), NODE, print)
    comment = f"rms1:1g.10gb:1;s={int(time.time())};l=60;"
    job = 1000

    def hook(where: Path, option: str) -> Took:
        path = str(where / site.HOOKS[option])
        return take(lambda: os.execve(path, [path], slurmd(str(slurm.conf), option, job, comment)))

    rows: dict[str, list[Took]] = {}
    for number in range(rounds + 1):
        publisher.now()
        found = {}
        job += 1
        found["Prolog, `sums`"] = hook(silent, "Prolog")
        found["Epilog, `sums`"] = hook(silent, "Epilog")
        publisher.now()
        job += 1
        found["Prolog, `features`"] = hook(slurm.etc, "Prolog")
        found["Epilog, `features`, of a job that came and went between two updates"] = hook(slurm.etc, "Epilog")
        job += 1
        hook(slurm.etc, "Prolog")
        time.sleep(TOGETHER_SECONDS + 0.5)  # what the two Prologs have left behind is over
        found["an update by itself (`sinfo`, `scontrol`), in the background of a Prolog"] = take(publisher.now)
        found["Epilog, `features`, of a job that slurmctld was told of"] = hook(slurm.etc, "Epilog")
        for name, took in found.items():
            if number:  # the first round fills the caches
                rows.setdefault(name, []).append(took)
    return rows


def table(rows: dict[str, list[Took]], load: float) -> str:
    """For docs/benchmarks.md."""
    count = len(next(iter(rows.values())))
    lines = [
        f"{count} rounds, {os.cpu_count()} cores, load {load:.0f}.\n",
        "| program | median ms | of CPU |",
        "|---|---:|---:|",
    ]
    for name, took in rows.items():
        wall, cpu = (statistics.median(one[part] for one in took) for part in (0, 1))
        lines.append(f"| {name} | {wall:.0f} | {cpu:.0f} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; `--write` puts it into docs/benchmarks.md."""
    parser = argparse.ArgumentParser(description="What telling slurmctld what fits adds to the hooks.")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(arguments)
    root = Path(tempfile.mkdtemp(prefix="rms-publishing-"))
    root.chmod(0o755)
    try:
        with rms_cluster(root / "c", nodes=1, create=0.0, destroy=0.0, admission="features") as slurm:
            text = table(measure(slurm, options.rounds), os.getloadavg()[0])
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(text)
    if options.write:
        tables.put("publishing", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
