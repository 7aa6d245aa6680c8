"""Asking and telling slurmctld, by Slurm's own commands. Only the rare paths of a hook come here.

Every command has a deadline: with slurmctld down `scontrol` blocks for 20 s and more.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from rms.inventory import Run

HOOKS_SECONDS = 10
"""What is added to a credential's life: the end of a Prolog and the Epilog fall into it."""
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/opt/slurm/bin"


FETCHED = "/run/slurm/conf/slurm.conf"
"""What slurmd has fetched from slurmctld, on a node that has no slurm.conf of its own ("configless")."""


def present(slurm_conf: str) -> str:
    """The slurm.conf to go by: on a node that has none there, what slurmd has fetched, as Slurm's own commands do.
    They do not where SLURM_CONF names a file: then they look for that one for a minute."""
    return FETCHED if not os.path.exists(slurm_conf) and os.path.exists(FETCHED) else slurm_conf


class SlurmError(Exception):
    """A Slurm command failed. The text is its message."""


class SilentError(SlurmError):
    """slurmctld did not answer, or not in time. It may later."""


class Job(NamedTuple):
    """A job as slurmctld sees it. `name` is what requeue, update and cancel must be given: `scontrol requeue 45` would
    requeue the whole array 45 where the task that runs under the id 45 is meant, so tasks of arrays are called `45_3`;
    a component of a heterogeneous job only goes with its leader. (A notice goes to `id`: `45_3` reaches job 45.)"""

    id: int
    name: str
    batch: bool
    requeue: bool


class Slurmctld:
    """The slurmctld of a slurm.conf."""

    def __init__(self, slurm_conf: str, seconds: float = 25.0) -> None:
        self._slurm_conf = present(slurm_conf)
        self._environment = {"PATH": PATH, "SLURM_CONF": self._slurm_conf, "LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
        self._seconds = seconds

    def job(self, job_id: int, restart: int, node: str) -> Job | None:
        """The job with this id; None unless this run of it is, to slurmctld's mind, on this node.

        A Prolog may outlive its run: a node that was taken for dead has its jobs started elsewhere, and a slurmctld
        that was killed may come back with a state in which the job still waits.
        """
        fields = "JobID:20,JobArrayID:60,State:20,BatchFlag:10,Requeue:10,RestartCnt:10,NodeList:1000"
        for line in self._shown(str(job_id), fields).splitlines():
            words = line.split()
            if len(words) == 7 and [words[0], *words[5:]] == [str(job_id), str(restart), node] and words[2] in RUNNING:
                return Job(job_id, words[1].partition("+")[0], words[3] != "0", words[4] == "1")
        return None

    def in_prolog(self, node: str) -> list[Job]:
        """The jobs on a node whose Prolog has not ended, to slurmctld's mind. Raises SlurmError."""
        fields = "JobID:20,JobArrayID:60,BatchFlag:10,Requeue:10,Reason:40"
        output = self.run(
            "squeue", "--noheader", "--all", "--states=running", f"--nodelist={node}", f"--Format={fields}"
        )
        rows = [line.split() for line in output.splitlines()]
        return [
            Job(int(job), name.partition("+")[0], batch != "0", requeue == "1")
            for job, name, batch, requeue, *reason in rows
            if reason == ["Prolog"]
        ]

    def over(self, runs: Sequence[Run], node: str) -> list[Run]:
        """Those of some runs that are not, or no longer, on a node, to slurmctld's mind. Raises SlurmError.

        A job that is completing is there until its Epilog has ended, under whatever restart count: a requeue has
        counted on by then.
        """
        fields = "JobID:20,RestartCnt:10,State:20"
        output = self.run("squeue", "--noheader", "--all", "--states=all", f"--nodelist={node}", f"--Format={fields}")
        rows = [(int(job), int(restart), state) for job, restart, state in map(str.split, output.splitlines())]
        there = {(job, restart) for job, restart, state in rows if state in RUNNING}
        leaving = {job for job, _, state in rows if state == "COMPLETING"}
        return [run for run in runs if (run.job, run.restart) not in there and run.job not in leaving]

    def requeue(self, job: Job, delay: int) -> None:
        """Put a running batch job back in the queue, to start `delay` seconds from now at the earliest.

        The order is what Slurm takes: the start time can only be set once the job is no longer running, and a job
        submitted with --no-requeue must be allowed it for a moment, and for no longer whatever fails.
        """
        try:
            if not job.requeue:
                self._update(job, "Requeue=1")
            self.run("scontrol", "requeue", job.name)
            self._update(job, f"StartTime=now+{delay}")
        finally:
            if not job.requeue:
                self._update(job, "Requeue=0")

    def comes_back(self, name: str) -> int | None:
        """From when on a job in the queue may start (epoch); None for one that is held, or not in the queue.

        One that was requeued a moment ago is shown as completing until its Epilog has ended.
        """
        words = self._shown(name, "State:20,PriorityLong:20,EligibleTime:30").split()
        waits = len(words) == 3 and words[0] in ("PENDING", "COMPLETING") and words[1] != "0"
        return int(words[2]) if waits and words[2].isdecimal() else None

    def wake(self, name: str) -> None:
        """Let a job that waits for its start time start at once."""
        self.run("scontrol", "update", f"JobId={name}", "StartTime=now")

    def cancel(self, job: Job, message: str) -> None:
        """End a job and tell its user why."""
        with suppress(SlurmError):  # only a job with somebody to tell can be told
            self.run("scontrol", "notify", str(job.id), message)
        self.run("scancel", job.name)

    def drain(self, node: str, reason: str) -> None:
        """Let no more jobs start on a node. A node that is drained already keeps the reason that it has."""
        state = self.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T")
        if "drain" in state:
            return
        self.run("scontrol", "update", f"NodeName={node}", "State=DRAIN", f"Reason={reason}")

    def show(self, *what: str, future: bool = False) -> str:
        """What `scontrol show` prints; with `future` of nodes that are not there yet."""
        return self.run("scontrol", *(["--future"] if future else []), "show", *what)

    def credential_seconds(self) -> int | None:
        """How long this Slurm may mistake a requeued job's new start for the old one; None if it never does.

        Before 23.02.7 slurmd can start a job that comes back within its credential's life without running the Prolog.
        """
        settings = dict(re.findall(r"^(\w+)\s*=\s*(.*)$", self.show("config"), re.MULTILINE))
        version = [int(part) for part in re.findall(r"\d+", settings.get("SLURM_VERSION", "0"))[:3]]
        if version >= [23, 2, 7]:
            return None
        expire = re.search(r"cred_expire=(\d+)", settings.get("AuthInfo", ""))
        # Slurm refuses a value below 5 ("invalid" in slurmd's log) and uses its default then.
        return int(expire[1]) if expire and int(expire[1]) >= 5 else 120

    def _shown(self, name: str, fields: str) -> str:
        """What squeue prints of a job; nothing of one that is over for so long that slurmctld has forgotten it."""
        try:
            return self.run("squeue", "--noheader", "--states=all", f"--jobs={name}", f"--Format={fields}")
        except SlurmError as error:
            if "Invalid job id" in str(error):
                return ""
            raise

    def _update(self, job: Job, setting: str) -> None:
        self.run("scontrol", "update", f"JobId={job.name}", setting)

    def run(self, *command: str) -> str:
        """What a Slurm command prints, odd bytes kept (surrogateescape). Raises SilentError, SlurmError."""
        import subprocess  # not before it is needed: most calls of a hook run no command

        try:
            done = subprocess.run(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._seconds,
                check=False,
            )
        except subprocess.TimeoutExpired:
            # Without a slurm.conf they wait for one, for longer than that.
            why = "" if os.path.exists(self._slurm_conf) else f", and there is no {self._slurm_conf}"
            raise SilentError(f"{command[0]}: no answer in {self._seconds:g} s{why}") from None
        except OSError as error:
            raise SlurmError(f"{command[0]}: {error}") from error
        if done.returncode != 0:
            fault = " ".join((done.stderr or done.stdout).decode(errors="replace").split())
            text = f"{' '.join(command[:2])}: {fault or f'exit {done.returncode}'}"
            raise (SilentError if SILENT.search(text) else SlurmError)(text)
        return os.fsdecode(done.stdout)


RUNNING = {"RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "RESIZING", "SIGNALING"}
"""States of a job whose Prolog may still lead to something."""
SILENT = re.compile("unable to contact|timed out|connect|communicat|zero bytes|authentication|munge", re.IGNORECASE)
"""What Slurm's commands say where slurmctld, the network or munge is away."""
