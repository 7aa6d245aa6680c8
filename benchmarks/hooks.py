"""What the hooks cost: the whole process of each, started as slurmd starts it, without Slurm and without a GPU.

    python benchmarks/hooks.py [--rounds N] [--quick] [--json] [--write] [--disk DIR]

Every round starts each program, one after the other, so that whatever slows the machine down hits all of them; those
that the others are compared with have a turn before, between and after the rest. The hooks are those that
`rms slurm-config` makes, with the variables that slurmd gives and nothing else; each start is checked to have done what
its row says. The node remembers as much as one that has run thousands of jobs. Its state directory and audit log are on
tmpfs for one half of the rows and on a disk for the other; /run, as on every node, and the simulated GPUs are in memory
for both.

Syncs apart: how often a hook calls fsync is counted in a forked child that does the same; what one save's syncs take
(file and directory) is timed in every round on a file of the same size, written in the same way in the same directory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import tables

import controller
from rms import config as configuration
from rms import files
from rms.errors import NoRoomError
from rms.inventory import CLOSED, RECENT, Run, State
from rms.store import Store
from slurm import hook, site

ROOT = Path(__file__).resolve().parents[1]
NODE = "n1"
REQUEST = "3g.40gb:1"
TOO_MUCH = "7g.80gb:2"
GIVEN = "export CUDA_VISIBLE_DEVICES=MIG-"
CREATES = ["create_gpu_instance", "create_compute_instance"]
MIG_AIM = 1.5
"""A MIG hook without its fsyncs, in starts of a Python that imports what it cannot do without."""
PLAIN_AIM = 5.0
"""The hooks of a job without MIG, in starts of a shell."""

SHELL = "`sh -c :`"
PYTHON = "`python3 -I -c pass`"
IMPORTS = '`python3 -I -c "import filelock, json"`'


class Program(NamedTuple):
    """Something that is started. `prints` is what its output must begin with (all output is looked at, empty for none);
    `aim` is the row that it is compared with, and how many times that it may take; `inside` counts the syncs of the
    same call; `after`, not timed, checks what it has done."""

    name: str
    medium: str
    command: Sequence[str]
    environment: Mapping[str, str]
    code: int = 0
    prints: str = ""
    aim: tuple[str, float] | None = None
    inside: Callable[[], int] | None = None
    after: Callable[[], None] = lambda: None


class Row(NamedTuple):
    """What was measured of one program. Times are milliseconds; `ratio` is (median - syncs) by the aim's median."""

    name: str
    medium: str
    median: float
    p95: float
    least: float
    fsyncs: int
    fsync_ms: float
    aim: tuple[str, float] | None
    ratio: float | None
    least_ratio: float | None


class Node:
    """A node of RMS whose state directory and audit log lie in `directory`, everything else in `memory`."""

    def __init__(self, medium: str, directory: Path, memory: Path) -> None:
        self.medium = medium
        self.directory = directory
        self.memory = memory
        self.journal = memory / "gpus.json.journal"
        self.toml = memory / "rms.toml"
        self.jobs = memory / "run/jobs"
        self.seen = 0
        (directory / "state").mkdir(mode=0o700)
        (memory / "run").mkdir()
        self.toml.write_text(f"""\
gpus = [0, 1]
state_dir = "{directory}/state"
run_dir = "{memory}/run"
audit_log = "{directory}/audit.jsonl"
[simulated]
file = "{memory}/gpus.json"
model = "A100-80GB"
gpus = 2
""")
        self.slurm_conf = str(memory / "slurm.conf")  # only written into the hooks: none of these asks slurmctld
        kinds = site.kinds([("A100-80GB", 2, NODE)])
        site.write(site.files(kinds, str(self.toml), self.slurm_conf, "sums"), str(memory))
        self._live()
        self.kept = {path: path.read_bytes() for path in self._files()}

    def _live(self) -> None:
        """What months of jobs leave behind: three that run, an idle instance, and as much history as is ever kept."""
        config = configuration.load(str(self.toml), NODE)

        def local() -> controller.Controller:
            return controller.Controller(config, log=lambda text: None)

        for job, request in enumerate(["4g.40gb:1", "2g.20gb:1,1g.10gb:1", "1g.10gb:1", "1g.10gb:1"], 1):
            local().acquire(Run("cluster", job, 0), 65534, request, int(time.time()), 60)
        local().release(Run("cluster", 4, 0))
        store = Store(config.state_dir, time.monotonic() + 60)
        with store.open("benchmark") as state:
            now = time.time()
            for number in range(CLOSED):
                state.close(Run("cluster", 10_000 + number, 0), now)
            state.recent = [(now - 60.0 * number, REQUEST, 60) for number in range(RECENT)]
            store.save(state)

    def _files(self) -> list[Path]:
        return [
            path
            for parent in (self.directory / "state", self.jobs)
            for path in parent.iterdir()
            if path.is_file() and path.suffix != ".lock"
        ] + [self.memory / "gpus.json", self.journal]

    def restore(self) -> None:
        """Everything as it was at first, and on the disk: no program pays for the one before it."""
        for path in self._files():
            if path not in self.kept:
                path.unlink()
        for path, data in self.kept.items():
            files.replace(str(path), data, path.stat().st_mode & 0o777 if path.exists() else 0o644)
        self.seen = len(self.journal.read_text().splitlines())

    def operations(self) -> list[str]:
        """What the GPUs were made to do since the last call."""
        lines = self.journal.read_text().splitlines()
        new, self.seen = lines[self.seen :], len(lines)
        return [json.loads(line)["op"] for line in new]

    def state(self) -> State:
        """The inventory now."""
        return Store(str(self.directory / "state"), 0.0).glance()

    def hook(self, what: str, option: str, job: int, comment: str, **more: Any) -> Program:
        """One of this node's hooks, for a job."""
        path = str(self.memory / site.HOOKS[option])
        environment = slurmd(self.slurm_conf, option, job, comment)
        verb = [option.lower(), str(self.toml), self.slurm_conf]

        def inside() -> int:
            if option == "Prolog":  # what its shell part does first
                (self.jobs / str(job)).write_text("refused 0\n")
            return within(environment, lambda: hook.main(verb))

        python = comment and option != "TaskProlog"
        return Program(what, self.medium, [path], environment, inside=inside if python else None, **more)


def slurmd(slurm_conf: str, option: str, job: int, comment: str) -> dict[str, str]:
    """The variables that slurmd 22.05 gives to the hooks of an sbatch job; there is no PATH among them."""
    told = {
        "SLURMD_NODENAME": NODE,
        "SLURM_CLUSTER_NAME": "cluster",
        "SLURM_CONF": slurm_conf,
        "SLURM_JOBID": str(job),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_CPUS_PER_NODE": "1",
        "SLURM_JOB_GID": "65534",
        "SLURM_JOB_UID": "65534",
        "SLURM_UID": "65534",
        "SLURM_JOB_USER": "nobody",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_JOB_PARTITION": "main",
        "SLURM_JOB_RESTART_COUNT": "0",
        "SLURM_JOB_STDIN": "/dev/null",
        "SLURM_JOB_STDOUT": f"/tmp/slurm-{job}.out",
        "SLURM_JOB_WORK_DIR": "/tmp",
        "SLURM_NODELIST": NODE,
    }
    if comment:
        told["SLURM_JOB_COMMENT"] = comment
    context = {"Prolog": "prolog_slurmd", "Epilog": "epilog_slurmd", "TaskProlog": "prolog_task"}
    told["SLURM_SCRIPT_CONTEXT"] = context[option]
    if option == "Epilog":
        told |= {"SLURM_JOB_DERIVED_EC": "0", "SLURM_JOB_EXIT_CODE": "0", "SLURM_JOB_EXIT_CODE2": "0:0"}
    if option == "TaskProlog":  # has the user's whole environment besides
        told |= {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "SLURM_LOCALID": "0", "SLURM_PROCID": "0"}
    return told


def programs(nodes: Sequence[Node]) -> list[Program]:
    """All that is started in a round, in order."""
    python = [sys.executable, "-I", "-c"]
    references = [
        Program(SHELL, "", ["/bin/sh", "-c", ":"], {}),
        Program(PYTHON, "", [*python, "pass"], {}),
        Program(IMPORTS, "", [*python, "import filelock, json"], {}),
    ]

    def word(node: Node, job: int, wanted: str | None) -> Callable[[], None]:
        def check() -> None:
            path = node.jobs / str(job)
            status = path.read_text().split()[0] if path.exists() else None
            expect(status == wanted, f"the file of job {job} says {status}, not {wanted}")

        return check

    def did(node: Node, job: int, operations: list[str], wanted: str | None) -> Callable[[], None]:
        def check() -> None:
            done = node.operations()
            expect(done == operations, f"the GPUs were made to {done or 'do nothing'}")
            owner = node.state().of_run(Run("cluster", job, 0))
            expect((owner is not None) == (wanted == "granted"), f"the state has {owner} for job {job}")
            word(node, job, wanted)()

        return check

    cheap: dict[str, Any] = {"aim": (SHELL, PLAIN_AIM)}
    mig: dict[str, Any] = {"aim": (IMPORTS, MIG_AIM)}
    plain = nodes[0]
    found = [
        plain.hook("Prolog, job without MIG", "Prolog", 100, "", after=word(plain, 100, "none"), **cheap),
        plain.hook("TaskProlog, job without MIG", "TaskProlog", 100, "", **cheap),
        plain.hook("Epilog, job without MIG", "Epilog", 100, "", after=word(plain, 100, None), **cheap),
    ]
    found = [*references, *(program._replace(medium="") for program in found)]  # a shell never looks at the state
    for node in nodes:
        comment = f"rms1:{REQUEST};s={int(time.time())};l=60;"
        refused = ["acquire", "--job", "99", "--restart", "0", "--uid", "65534", "--request", TOO_MUCH]
        environment = {"RMS_CONFIG": str(node.toml), "SLURMD_NODENAME": NODE}
        found += [
            Program(
                "no room: the decision alone",
                node.medium,
                [sys.executable, "-I", "-m", "controller", *refused],
                environment,
                code=NoRoomError.code,
                prints="rms: no room for",
                inside=lambda e=environment, r=refused: within(e, lambda: controller.main(r)),
                after=did(node, 99, [], "refused"),
                **mig,
            ),
            node.hook("Prolog, creates", "Prolog", 101, comment, after=did(node, 101, CREATES, "granted"), **mig),
            node.hook("Epilog after it", "Epilog", 101, comment, after=did(node, 101, [], None), **mig),
            node.hook("Prolog, reuses", "Prolog", 102, comment, after=did(node, 102, [], "granted"), **mig),
            node.hook("TaskProlog, job with MIG", "TaskProlog", 102, comment, prints=GIVEN, **cheap)._replace(
                medium=""
            ),
            node.hook("Epilog after that", "Epilog", 102, comment, after=did(node, 102, [], None), **mig),
            *references,
        ]
    return found


def start(program: Program, output: str) -> float:
    """Start a program and wait for its end. Milliseconds; what it prints goes to the file `output`."""
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    began = time.perf_counter_ns()
    pid = os.posix_spawn(program.command[0], program.command, program.environment, file_actions=actions)
    status = os.wait4(pid, 0)[1]
    took = (time.perf_counter_ns() - began) / 1e6
    code = os.waitstatus_to_exitcode(status)
    printed = Path(output).read_text(errors="replace")
    right = code == program.code and printed.startswith(program.prints) and bool(printed) == bool(program.prints)
    expect(right, f"{program.name}: exit {code}, printed {printed!r}")
    return took


def within(environment: Mapping[str, str], call: Callable[[], int]) -> int:
    """How often `call` syncs, found out in a forked child. The child's exit code is not looked at."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.environ.clear()
            os.environ.update(environment)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.dup2(1, 2)
            sync = os.fsync

            def counted(descriptor: int) -> None:
                os.write(writer, b".")
                sync(descriptor)

            os.fsync = counted
            call()
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        count = len(pipe.read())
    os.waitpid(pid, 0)
    return count


def save_ms(node: Node) -> float:
    """What the syncs of one save take now on the node's medium, in milliseconds."""
    path = node.directory / "state/state.json"
    probe = node.directory / "probe/state.json"
    probe.parent.mkdir(exist_ok=True)
    spent = 0
    sync = os.fsync

    def timed(descriptor: int) -> None:
        nonlocal spent
        began = time.perf_counter_ns()
        sync(descriptor)
        spent += time.perf_counter_ns() - began

    os.fsync = timed
    try:
        files.replace(str(probe), path.read_bytes(), keep=f"{probe}.previous")
    finally:
        os.fsync = sync
    return spent / 1e6


def measure(rounds: int, disk: Path) -> tuple[list[Row], dict[str, float]]:
    """Make the nodes, run all rounds, compare. Rows, and by medium what one save's syncs take (median, ms)."""
    with ExitStack() as stack:

        def directory(parent: str | Path) -> Path:
            path = Path(tempfile.mkdtemp(prefix="rms-bench-", dir=parent))
            stack.callback(shutil.rmtree, path, ignore_errors=True)
            return path

        memory = Path("/dev/shm")
        nodes = [Node("tmpfs", directory(memory), directory(memory)), Node("disk", directory(disk), directory(memory))]
        todo = programs(nodes)
        output = str(directory(memory) / "output")

        unique = {program[:2]: program for program in todo}
        counts = dict.fromkeys(unique, 0)
        for node in nodes:
            node.restore()
        for key, program in unique.items():
            if program.inside:
                counts[key] = program.inside()
                program.after()
        times: dict[tuple[str, str], list[float]] = {key: [] for key in unique}
        saves: dict[str, list[float]] = {node.medium: [] for node in nodes}
        for number in range(rounds + 1):
            for node in nodes:
                node.restore()
            time.sleep(0.02)  # for the kernel, which has just been kept busy
            for program in todo:
                took = start(program, output)
                program.after()
                if number:  # the first round only fills the caches, and writes the .pyc files where they are missing
                    times[program[:2]].append(took)
            for node in nodes:
                saves[node.medium].append(save_ms(node))

    medians = {medium: statistics.median(found) for medium, found in saves.items()}
    return [_row(program, times, counts[key], medians) for key, program in unique.items()], medians


def _row(
    program: Program, times: Mapping[tuple[str, str], Sequence[float]], fsyncs: int, saves: Mapping[str, float]
) -> Row:
    found = sorted(times[program[:2]])
    median = statistics.median(found)
    syncing = fsyncs / 2 * saves.get(program.medium, 0.0)
    ratio = least_ratio = None
    if program.aim:
        reference = times[program.aim[0], ""]
        ratio = (median - syncing) / statistics.median(reference)
        least_ratio = max(0.0, found[0] - syncing) / min(reference)
    p95 = found[-(-len(found) * 95 // 100) - 1]
    return Row(*program[:2], median, p95, found[0], fsyncs, syncing, program.aim, ratio, least_ratio)


def machine(disk: Path) -> dict[str, Any]:
    """The machine in words, without its name."""
    import filelock

    release = re.match(r"\d+\.\d+", os.uname().release)
    return {
        "cores": os.cpu_count(),
        "kernel": f"{os.uname().sysname} {release[0] if release else ''}",
        "python": sys.version.split()[0],
        "filelock": filelock.__version__,
        "disk": file_system(disk),
        "shell": Path(os.path.realpath("/bin/sh")).name,
        "syslog": Path("/dev/log").exists(),
        "pyc": all(Path(module.__cached__).exists() for module in (controller, files, hook, filelock)),
    }


def file_system(directory: Path) -> str:
    """The type of the file system that a directory is on."""
    device = directory.stat().st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[2] == f"{os.major(device)}:{os.minor(device)}":
            return words[words.index("-") + 1]
    return "of unknown type"


def table(rows: Sequence[Row]) -> str:
    """The rows as a table of Markdown."""
    lines = [
        "| program | state on | median ms | p95 ms | fsyncs | they take | without them | aim: at most |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [row.name, row.medium, f"{row.median:.1f}", f"{row.p95:.1f}"]
        cells += [str(row.fsyncs), f"{row.fsync_ms:.1f} ms"] if row.fsyncs else ["", ""]
        if row.aim and row.ratio is not None:
            cells.append(f"{row.ratio:.2f} x {'import' if row.aim[0] == IMPORTS else 'sh'}")
            cells.append(f"{row.aim[1]:g}" + ("" if row.ratio <= row.aim[1] else ", missed"))
        else:
            cells += ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def report(rows: Sequence[Row], saves: Mapping[str, float], seen: Mapping[str, Any], rounds: int) -> str:
    """What was measured, on what, as the document has it."""
    syncs = ", ".join(f"{took:.2f} ms on {medium}" for medium, took in saves.items())
    return f"""\
{rounds} rounds on {seen["cores"]} cores, {seen["kernel"]}, Python {seen["python"]}, filelock {seen["filelock"]}, \
/bin/sh is {seen["shell"]}, the disk has {seen["disk"]}; \
.pyc files {"existed" if seen["pyc"] else "did not exist"}; \
a syslog {"listened" if seen["syslog"] else "did not listen"}.
The two fsyncs of one save of the state (the file, its directory) took {syncs} (median, same rounds).

{table(rows)}
"""


def expect(true: bool, otherwise: str) -> None:
    """End the benchmark, with one line, where it would measure something else than it says."""
    if not true:
        sys.exit(f"hooks.py: {otherwise}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="What the hooks cost.")
    parser.add_argument("--rounds", type=int, default=40, metavar="N")
    parser.add_argument("--quick", action="store_true", help="5 rounds: whether it works, not how fast it is")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md too")
    parser.add_argument("--disk", type=Path, default=Path("/var/tmp"), metavar="DIR", help="a directory on a disk")
    options = parser.parse_args()
    rounds = 5 if options.quick else options.rounds
    expect(rounds > 0, "--rounds must be 1 or more")
    expect(os.access("/dev/shm", os.W_OK), "needs a tmpfs on /dev/shm")
    rows, saves = measure(rounds, options.disk)
    seen = machine(options.disk)
    text = report(rows, saves, seen, rounds)
    if options.json:
        print(json.dumps({"schema": 1, "machine": seen, "rounds": rounds, "rows": [row._asdict() for row in rows]}))
    else:
        print(text, end="")
    if options.write:
        tables.put("hooks", text)


if __name__ == "__main__":
    main()
