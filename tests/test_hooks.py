"""The hooks as slurmd runs them, with Slurm's commands played by small scripts: whatever comes in, nothing is lost.

Each test starts the generated scripts themselves, in a node of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, run

from rms import grant, sent_back
from rms.store import Store
from slurm import site

MIG = "rms1:3g.40gb:1;s=1;l=0;"
WHOLE_NODE = "rms1:7g:2;s=1;l=0;"
UNREACHABLE = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"

# Says which command was called with what, and does what the test has written for it, if anything.
COMMAND = """#!/bin/sh
{ printf %s "${0##*/}"; printf ' [%s]' "$@"; echo; } >>CALLS
if [ -r "$0.does" ]; then . "$0.does"; fi
"""
# One running batch job. Both ways in which the hooks ask squeue for it.
SQUEUE = """
case "$*" in
*--Format=*) echo "$id $name $state $batch $requeue $restarts $nodes" ;;
*'%A %i %N'*) [ "$state" = RUNNING ] && echo "$id $name $nodes" ;;
*'%A %i'*) echo "$id $name" ;;
*'%A %k'*) echo "$id $comment" ;;
esac
"""


class Hooks:
    """The hooks of a node, and the Slurm that they talk to."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.etc = node.root / "etc"
        self.bin = node.root / "bin"
        self.calls_file = node.root / "calls"
        self.python_calls = node.root / "python_calls"
        self.bin.mkdir()
        for name in ("squeue", "scontrol", "scancel", "sinfo"):
            self.script(self.bin / name, COMMAND.replace("CALLS", str(self.calls_file)))
        self.does("sinfo", "echo idle")
        self.job()
        node.configure(hook_log=str(node.root / "hooks.log"), interactive_wait_seconds=0.1)
        self.install()

    def install(self) -> None:
        """Write the hooks, with the paths of the scripts in place of Slurm's own commands."""
        wrapper, inside = self.node.root / "python", self.node.root / "inside.py"
        inside.write_text(
            "import sys, time, slurm.slurmctld\n"
            "real = time.sleep\n"
            "time.sleep = lambda seconds: real(min(seconds, 0.02))\n"
            f"slurm.slurmctld.PATH = '{self.bin}:/usr/bin:/bin'\n"
            "from slurm import hook\n"
            "sys.exit(hook.main(sys.argv[-3:]))\n"
        )
        self.script(
            wrapper,
            f'#!/bin/sh\necho "$*" >>{self.python_calls}\nexec {shlex.quote(sys.executable)} -I {inside} "$@"\n',
        )
        kind = site.kinds([("A100-80GB", 2, "n1")])
        made = site.files(kind, str(self.node.toml), str(self.etc / "slurm.conf"), "sums")
        real = os.path.dirname(site._which("scontrol"))
        for name in site.HOOKS.values():
            text = made[name].replace(sys.executable, str(wrapper)).replace(f"{real}/$1", f"{self.bin}/$1")
            made[name] = text.replace("\nPATH=", f"\nPATH={self.bin}:").replace("sleep 1\n", "sleep 0.02\n")
        site.write(made, str(self.etc))

    @staticmethod
    def script(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def does(self, command: str, text: str) -> None:
        """What a command of Slurm does from now on."""
        (self.bin / f"{command}.does").write_text(text)

    def job(self, **fields: object) -> None:
        """What squeue says: a running batch job 7, but for `fields`."""
        told: dict[str, object] = {"id": 7, "state": "RUNNING", "batch": 1, "requeue": 1, "restarts": 0, "nodes": "n1"}
        told |= fields
        told.setdefault("name", told["id"])
        told.setdefault("comment", MIG)
        self.does("squeue", "".join(f"{k}={shlex.quote(str(v))}\n" for k, v in told.items()) + SQUEUE)

    def environment(self, **changed: str | None) -> dict[str, str]:
        """What slurmd tells a Prolog or Epilog; None takes a variable away."""
        told: dict[str, str | None] = {
            "SLURMD_NODENAME": "n1",
            "SLURM_CLUSTER_NAME": "cluster",
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_UID": "65534",
            "SLURM_JOB_RESTART_COUNT": "0",
            "SLURM_JOB_COMMENT": MIG,
            **changed,
        }
        return {key: value for key, value in told.items() if value is not None}

    def call(self, hook: str, job: int | str = 7, **changed: str | None) -> subprocess.CompletedProcess[str]:
        """Run the Prolog or the Epilog to its end. Never a traceback, whatever comes in."""
        done = subprocess.run(
            [str(self.etc / hook)],
            env=self.environment(SLURM_JOB_ID=str(job), **changed),
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return done

    def prolog(self, job: int | str = 7, comment: str = MIG, **changed: str | None) -> None:
        """A Prolog that ends well."""
        done = self.call("prolog", job, SLURM_JOB_COMMENT=comment, **changed)
        assert done.returncode == 0, done.stderr

    def epilog(self, job: int | str = 7, comment: str = MIG, **changed: str | None) -> None:
        """An Epilog that ends well."""
        done = self.call("epilog", job, SLURM_JOB_COMMENT=comment, **changed)
        assert done.returncode == 0, done.stderr

    def task(
        self, title: str = "[7.batch]", environment: Mapping[str, str] | None = None, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """The TaskProlog below a parent with slurmstepd's title."""
        command = f"exec -a 'slurmstepd: {title}' /bin/sh -c '{self.etc}/task_prolog; exit $?'"
        return subprocess.run(
            ["/bin/bash", "-c", f"{command}"],
            env={**(environment or {}), **more},
            cwd=self.node.root,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def calls(self) -> str:
        """What was called of Slurm since the last look."""
        text = self.calls_file.read_text() if self.calls_file.exists() else ""
        self.calls_file.unlink(missing_ok=True)
        return text

    def log(self) -> str:
        path = self.node.root / "hooks.log"
        return path.read_text() if path.exists() else ""

    def left(self, job: int = 7) -> str | None:
        """The first line of what the job's own side finds."""
        marker = self.node.marker(job)
        return marker.read_text().partition("\n")[0] if marker.exists() else None

    def leave(self, text: str, job: int = 7) -> None:
        """Put a file for the job's own side there."""
        (self.node.root / "run" / "jobs").mkdir(parents=True, exist_ok=True)
        self.node.marker(job).write_text(text)

    def holders(self) -> list[str]:
        """Runs that hold instances."""
        return [str(a.run) for a in self.node.state().allocations]


@pytest.fixture
def hooks(node: Node) -> Hooks:
    return Hooks(node)


@contextlib.contextmanager
def mounted(path: Path, options: str = "size=64k") -> Iterator[Callable[[str], None]]:
    """A small file system of its own. Gives what remounts it with other options."""
    if os.geteuid() != 0:
        pytest.fail("needs root") if os.environ.get("CI") else pytest.skip("needs root")
    path.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"{options},mode=755", "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        message = f"cannot mount: {done.stderr.strip()}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    try:
        yield lambda more: subprocess.run(["mount", "-o", f"remount,{more}", str(path)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def fill(directory: Path) -> Path:
    """A file that takes what is left of a disk."""
    path = directory / "filler"
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while file.write(b"x" * size):
                    pass
    return path


# What comes in.

STRANGE = [
    "",
    "a\nb",
    "\x01\x1b[31m\x7f",
    "x" * 10_240,
    "1" * 10_240,
    "$(touch PWNED)`touch PWNED`;touch PWNED&|",
    "ünï\u202e\U0001f600",
    "-n",
    "../../../tmp/x",
    "7 8",
    "*",
    "%n%s",
]


def test_a_job_id_that_is_none_leaves_everything_alone(hooks: Hooks) -> None:
    for text in STRANGE:
        for hook in ("prolog", "epilog"):
            done = hooks.call(hook, text)
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), text
    assert hooks.calls() == "" and not hooks.python_calls.exists()
    assert not (hooks.node.root / "run").exists()


@pytest.mark.parametrize("name", ["SLURM_JOB_UID", "SLURM_CLUSTER_NAME", "SLURM_JOB_RESTART_COUNT"])
def test_nonsense_from_slurmd_is_the_node_s_fault(hooks: Hooks, name: str) -> None:
    for text in ("a\nb\x1b[31m$(touch PWNED)", "x" * 10_240):
        done = hooks.call("prolog", **{name: text})
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        calls = hooks.calls()
        if name != "SLURM_JOB_RESTART_COUNT":  # whose nonsense the shell part makes a 0
            assert "[State=DRAIN] [Reason=rms: " in calls and len(calls) < 1000 and "\x1b" not in calls
            assert hooks.left() == "refused 0"
        hooks.epilog()
    assert hooks.holders() == []


def test_a_comment_that_makes_no_sense_is_the_user_s_fault(hooks: Hooks) -> None:
    hooks.does("scontrol", "exit 1")  # nobody is there to be told
    for text in (
        "rms1:",
        "rms1:\x01\n",
        "rms1:" + "3g," * 4000,
        "rms1:$(touch PWNED);s=1;l=0;",
        b"rms1:\xff\xfe;s=1;l=0;".decode(errors="surrogateescape"),
        "rms1:7g:3;s=1;l=0;",
    ):
        done = hooks.call("prolog", SLURM_JOB_COMMENT=text)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        calls = hooks.calls()
        assert "scancel [7]" in calls and "scontrol [notify] [7] [rms: " in calls and "DRAIN" not in calls
        assert "\x01" not in calls and calls.count("\n") == 3
        assert hooks.left() == "refused 0"
    assert hooks.log().isprintable() or set(hooks.log()) - set(map(chr, range(32, 127))) == {"\n"}


def test_a_job_without_mig_starts_no_python(hooks: Hooks) -> None:
    for comment in (None, "", "x" * 10_240, "\n rms1:7g:1;s=1;l=0;", " rms1:", "$(touch PWNED)"):
        assert hooks.call("prolog", SLURM_JOB_COMMENT=comment).returncode == 0
        assert hooks.left() == "none 0"
        assert hooks.call("epilog", SLURM_JOB_COMMENT=comment).returncode == 0
        assert hooks.left() is None
    assert not hooks.python_calls.exists() and hooks.calls() == ""


def test_an_epilog_without_a_prolog(hooks: Hooks) -> None:
    hooks.prolog(1)
    hooks.epilog(7)
    hooks.epilog(7, comment="")
    assert hooks.holders() == ["1.0"] and hooks.calls() == ""


# Whose run it is.


def test_a_job_id_may_come_again(hooks: Hooks) -> None:
    """A slurmctld that has lost its state counts from the beginning."""
    hooks.prolog(7, SLURM_JOB_RESTART_COUNT="2")
    hooks.epilog(7, SLURM_JOB_RESTART_COUNT="2")
    hooks.prolog(7)
    assert hooks.left() == "refused 0", "an orphan of the run that is over"
    for restart in ("0", "1"):
        hooks.prolog(7, comment=f"rms1:3g:1;s={int(time.time()) + 1000};l=0;", SLURM_JOB_RESTART_COUNT=restart)
        assert str(hooks.left()).startswith(f"granted {restart} ")
        hooks.epilog(7, SLURM_JOB_RESTART_COUNT=restart)
        assert hooks.holders() == []


@pytest.mark.parametrize(
    "told",
    [{"restarts": 1}, {"nodes": "n2"}, {"state": "PENDING", "nodes": ""}, {"state": "COMPLETING"}, {"id": 8}],
    ids=str,
)
def test_a_prolog_that_outlived_its_run_leaves_the_job_alone(hooks: Hooks, told: dict[str, Any]) -> None:
    """The job was started elsewhere, or waits: an order to requeue would end a run that has nothing to do with us."""
    hooks.prolog(1, comment=WHOLE_NODE)
    hooks.job(**told)
    hooks.prolog(7)
    assert "the job is gone" in hooks.log()
    calls = hooks.calls()
    assert "requeue" not in calls and "scancel" not in calls and "update" not in calls


# Slurm does not do what it is told.


def test_a_job_whose_holder_is_about_to_end(hooks: Hooks) -> None:
    """What the job needs is held by a process that is just ending: the job does not go back to the queue for that."""
    hooks.node.configure(holder_seconds=30)
    hooks.prolog(1, WHOLE_NODE)
    uuid = hooks.node.marker(1).read_text().split()[-1]
    hooks.epilog(1, WHOLE_NODE)
    with subprocess.Popen(["sleep", "1"]) as process:
        hooks.node.device().hold(uuid, process.pid)
        reaper = threading.Thread(target=process.wait)
        reaper.start()
        hooks.prolog(7, WHOLE_NODE)
        reaper.join()
    assert str(hooks.left()).startswith("granted 0 ")
    assert "requeue" not in hooks.calls()
    assert f"instance {uuid} is quarantined: held by process {process.pid}" in hooks.log()


def test_no_room_while_slurmctld_is_away(hooks: Hooks) -> None:
    """The Prolog waits for slurmctld, longer than for room: to fail would drain the node and hold the job."""
    hooks.prolog(1, comment=WHOLE_NODE)
    answer = (hooks.bin / "squeue.does").read_text()
    count = hooks.node.root / "asked"
    hooks.does(
        "squeue",
        f"echo >>{count}\n[ $(wc -l <{count}) -gt 9 ] || {{ echo '{UNREACHABLE}' >&2; exit 1; }}\n{answer}",
    )
    hooks.prolog(7)
    assert "waiting for slurmctld" in hooks.log() and "requeued" in hooks.log()
    assert "scontrol [requeue] [7]\nscontrol [update] [JobId=7] [StartTime=now+" in hooks.calls()


def test_what_is_misplaced_is_counted_by_whether_it_had_asked(hooks: Hooks) -> None:
    hooks.prolog(1, comment=WHOLE_NODE)
    hooks.prolog(7)  # as one that may preempt
    hooks.prolog(7, SLURM_JOB_RESTART_COUNT="1", SLURM_JOB_CONSTRAINTS="ib&rms_3g.40gb_1")
    lines = [json.loads(line) for line in (hooks.node.root / "audit.jsonl").read_text().splitlines()]
    misplaced = [
        (entry["run"][1:], entry["request"], entry["named"]) for entry in lines if entry["event"] == "misplaced"
    ]
    assert misplaced == [([7, 0], "3g.40gb:1", False), ([7, 1], "3g.40gb:1", True)]


def test_no_room_and_slurm_says_no(hooks: Hooks) -> None:
    hooks.prolog(1, comment=WHOLE_NODE)
    hooks.does("scontrol", 'if [ "$1" = requeue ]; then echo "Requested operation is disabled" >&2; exit 1; fi')
    began = time.monotonic()
    assert hooks.call("prolog", 7).returncode == 1
    assert time.monotonic() - began < 10
    assert hooks.left() == "refused 0"


def test_a_node_out_of_order_while_slurmctld_is_away(hooks: Hooks) -> None:
    """Slurm itself drains it then, since the hook fails: one that ended well would have the job started."""
    hooks.node.toml.write_text("gpu = 1\n")
    hooks.does("scontrol", f"echo '{UNREACHABLE}' >&2; exit 1")
    for hook in ("prolog", "epilog"):
        assert hooks.call(hook).returncode == 1
    assert hooks.left() == "refused 0"


def test_on_a_node_out_of_order_srun_is_told_and_ends(hooks: Hooks) -> None:
    hooks.node.toml.write_text("gpu = 1\n")
    hooks.job(batch=0)
    hooks.prolog()
    calls = hooks.calls()
    assert "[NodeName=n1] [State=DRAIN] [Reason=rms: " in calls and "requeue" not in calls
    assert calls.endswith("scontrol [notify] [7] [rms: node n1 is out of order; try again]\nscancel [7]\n")


def test_a_node_that_is_drained_keeps_its_reason(hooks: Hooks) -> None:
    hooks.node.toml.write_text("gpu = 1\n")
    hooks.does("sinfo", "echo drained")
    hooks.prolog()
    assert "Reason" not in (calls := hooks.calls()) and "scontrol [requeue] [7]" in calls


def test_a_fault_of_rms_itself_drains_the_node_and_costs_no_job(hooks: Hooks) -> None:
    inside = hooks.node.root / "inside.py"
    inside.write_text(inside.read_text().replace("sys.exit", "hook.controller.Controller = None\nsys.exit"))
    hooks.prolog()
    calls = hooks.calls()
    assert "[State=DRAIN] [Reason=rms: internal error: TypeError: " in calls and "scontrol [requeue] [7]" in calls
    assert hooks.left() == "refused 0"
    hooks.epilog()
    assert "[State=DRAIN] [Reason=rms: internal error: TypeError: " in (calls := hooks.calls())
    assert "requeue" not in calls, "what ends here is not started anew"


def test_a_request_that_can_not_be_while_slurmctld_is_away(hooks: Hooks) -> None:
    """The user's fault is never the node's."""
    hooks.does("squeue", f"echo '{UNREACHABLE}' >&2; exit 1")
    hooks.prolog(comment="rms1:7g:3;s=1;l=0;")
    assert "cannot cancel the job" in hooks.log() and "DRAIN" not in hooks.calls()
    assert hooks.left() == "refused 0"


def test_an_older_slurm_has_a_job_wait_for_a_credential_s_life_and_nobody_wakes_it(hooks: Hooks) -> None:
    """It would start without a Prolog."""
    hooks.prolog(1, comment=WHOLE_NODE)
    answer = (hooks.bin / "squeue.does").read_text()
    hooks.does("squeue", f'case "$*" in *EligibleTime*) echo PENDING 1 4711; exit ;; esac\n{answer}')
    for version, expire, seconds in (
        ("23.02.6", "", 130),
        ("22.05.8", "cred_expire=20", 30),
        ("22.05.8", "cred_expire=4", 130),
    ):
        hooks.does(
            "scontrol", f'[ "$*" != "show config" ] || printf "AuthInfo = {expire}\nSLURM_VERSION = {version}\n"'
        )
        hooks.prolog(7)
        assert f"[JobId=7] [StartTime=now+{seconds}]" in hooks.calls()
        assert sent_back.load(hooks.node.config.state_dir, time.time()) == []


def test_a_job_that_was_sent_back_is_woken_as_soon_as_there_is_room(hooks: Hooks) -> None:
    """On a Slurm that needs no credential's life before it may come again (23.02.7)."""
    hooks.prolog(1, comment=WHOLE_NODE)
    start = int(time.time()) + 30
    answer = (hooks.bin / "squeue.does").read_text()
    hooks.does("scontrol", '[ "$*" != "show config" ] || echo "SLURM_VERSION = 24.05.0"')
    for priority in (0, 1):  # 0: held by its user, it does not come back
        hooks.does("squeue", f'case "$*" in *EligibleTime*) echo PENDING {priority} {start}; exit ;; esac\n{answer}')
        assert sent_back.load(hooks.node.config.state_dir, time.time()) == []
        hooks.calls()
        hooks.prolog(7)
    assert "scontrol [requeue] [7]\nscontrol [update] [JobId=7] [StartTime=now+30]\n" in hooks.calls()
    (waiting,) = sent_back.load(hooks.node.config.state_dir, time.time())
    assert (waiting.job, waiting.request, waiting.submit, waiting.start) == (7, "3g.40gb:1", 1, start)
    hooks.epilog(7)
    assert "StartTime" not in hooks.calls(), "there is no room yet"
    hooks.epilog(1)
    assert "scontrol [update] [JobId=7] [StartTime=now]\n" in hooks.calls()
    hooks.prolog(7, SLURM_JOB_RESTART_COUNT="1")
    assert sent_back.load(hooks.node.config.state_dir, time.time()) == []


@pytest.mark.parametrize(
    ("fails", "says"),
    [("requeue", "Requested operation is disabled"), ("requeue", UNREACHABLE), ("*StartTime*", "Job is completing")],
)
def test_a_job_that_may_not_be_requeued_may_not_afterwards_either(hooks: Hooks, fails: str, says: str) -> None:
    """Whatever fails meanwhile: once, or for as long as the Prolog tries."""
    hooks.prolog(1, comment=WHOLE_NODE)
    hooks.job(requeue=0)
    allowed, failed = hooks.node.root / "allowed", hooks.node.root / "failed"
    answer = (hooks.bin / "squeue.does").read_text().replace("requeue=0\n", f"requeue=$(cat {allowed})\n")
    allowed.write_text("0")
    hooks.does("squeue", answer)
    hooks.does(
        "scontrol",
        f'case "$*" in {fails}*) [ -e {failed} ] && [ "{says}" = "{UNREACHABLE}" ] ||'
        f" {{ touch {failed}; echo '{says}' >&2; exit 1; }} ;; *Requeue=?) echo ${{3#*=}} >{allowed} ;; esac\n",
    )
    hooks.call("prolog", 7)
    assert failed.exists() and "Requeue=1" in hooks.calls()
    assert allowed.read_text() == "0\n"


def test_an_interactive_job_that_ends_at_the_last_moment(hooks: Hooks) -> None:
    hooks.prolog(1, comment=WHOLE_NODE)
    hooks.job(batch=0)
    hooks.does("scancel", "exit 1")
    hooks.prolog(7)
    calls = hooks.calls()
    assert "scancel [7]" in calls and "[notify] [7] [rms: no room for 3g.40gb:1" in calls and "DRAIN" not in calls


@pytest.mark.parametrize("death", ["exit 1", "kill -9 $$", "exit 127"])
def test_a_python_that_dies_drains_the_node_and_costs_no_job(hooks: Hooks, death: str) -> None:
    Hooks.script(hooks.node.root / "python", f"#!/bin/sh\n{death}\n")
    hooks.job(name="3_7")
    hooks.prolog()
    calls = hooks.calls()
    assert "[NodeName=n1] [State=DRAIN] [Reason=rms: prolog: " in calls
    assert calls.endswith("scontrol [requeue] [3_7]\n"), "the task, not the array"

    # --no-requeue: allowed for a moment.
    hooks.does("scontrol", f'[ "$1" != requeue ] || grep -q Requeue=1 {hooks.calls_file}')
    hooks.prolog()
    assert hooks.calls().endswith(
        "scontrol [requeue] [3_7]\nscontrol [update] [JobId=3_7] [Requeue=1]\n"
        "scontrol [requeue] [3_7]\nscontrol [update] [JobId=3_7] [Requeue=0]\n"
    )
    # srun and salloc are told.
    hooks.does("scontrol", '[ "$1" != requeue ]')
    hooks.prolog()
    assert "scontrol [notify] [7] [rms: " in (calls := hooks.calls()) and calls.endswith("scancel [3_7]\n")
    # What the user has cancelled or requeued is left alone.
    hooks.job(state="COMPLETING")
    hooks.prolog()
    assert "requeue" not in (calls := hooks.calls()) and "scancel" not in calls


def test_a_slurmd_that_died_meanwhile(hooks: Hooks) -> None:
    """The next slurmd neither runs the Prolog again nor starts the job: it would stay in its Prolog for ever."""
    done = hooks.node.root / "done"
    command = f"({hooks.etc}/prolog; echo $? >{done}) & sleep 0.02"
    # The Prolog's own parent is the subshell that waits for it, so that one is the slurmd that dies.
    killed = f"sh -c '{hooks.etc}/prolog & sleep 0.02'; until grep -q requeue {hooks.calls_file}; do sleep 0.05; done"
    for line, requeued in ((f"{command}; wait", False), (killed, True)):
        subprocess.run(["sh", "-c", line], env={**hooks.environment(), "PATH": "/usr/bin:/bin"}, timeout=60, check=True)
        assert ("scontrol [requeue] [7]" in hooks.calls()) == requeued
        assert str(hooks.left()).startswith("granted 0 ")
    hooks.epilog()
    assert hooks.holders() == []


# What an Epilog that fails leaves behind.


@pytest.mark.parametrize("fault", ["killed", "killed at once", "lock", "config", "state"])
def test_an_epilog_that_fails_leaks_nothing(hooks: Hooks, fault: str) -> None:
    hooks.node.configure(deadline_seconds=0.5)
    hooks.prolog(1)
    state, toml, python = (hooks.node.root / name for name in ("state/state.json", "rms.toml", "python"))
    kept = {path: path.read_bytes() for path in (state, toml, python)}
    with contextlib.ExitStack() as stack:
        if fault == "killed":
            python.write_text("#!/bin/sh\nkill -9 $$\n")
        elif fault == "killed at once":
            python.write_text("#!/bin/sh\nkill -9 $PPID $$\n")
        elif fault == "lock":
            holder = stack.enter_context((hooks.node.root / "state" / "state.lock").open("w"))
            fcntl.flock(holder, fcntl.LOCK_EX)
            holder.write("pid 4711 (acquire)")
            holder.flush()
        elif fault == "config":
            toml.write_text("gpu = 1\n")
        else:
            state.unlink()
            state.mkdir()
        done = hooks.call("epilog", 1)
        assert done.returncode == (-9 if fault == "killed at once" else 0)
        if done.returncode == 0:
            assert "[State=DRAIN] [Reason=rms: " in (calls := hooks.calls())
            assert fault != "lock" or "is held by pid 4711 (acquire)" in calls
    if state.is_dir():
        state.rmdir()
    for path, data in kept.items():
        path.write_bytes(data)
    assert hooks.left(1) == "ended 0" and hooks.holders() == ["1.0"]
    assert hooks.task("[1.batch]").returncode == 1, "a start without Prolog must not get what is no longer the job's"
    hooks.prolog(2, comment=WHOLE_NODE)
    assert str(hooks.left(2)).startswith("granted 0 ") and hooks.holders() == ["2.0"]
    hooks.epilog(2)
    hooks.node.check()


# Disks.


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_a_state_directory_that_cannot_be_written(hooks: Hooks, fault: str) -> None:
    directory = hooks.node.root / "state"
    with mounted(directory) as remount:
        hooks.prolog(1)
        remount("ro") if fault == "read-only" else fill(directory)
        hooks.prolog(7)
        calls = hooks.calls()
        assert "[State=DRAIN] [Reason=rms: cannot " in calls and "scontrol [requeue] [7]" in calls
        hooks.epilog(7)
        hooks.epilog(1)
        if fault == "full":
            (directory / "filler").unlink()
        remount("rw")
        hooks.prolog(8, comment=WHOLE_NODE)
        hooks.epilog(8)
        hooks.node.check()
        assert hooks.holders() == []


@pytest.mark.parametrize("fault", ["full", "read-only", "no more files"])
def test_a_run_directory_that_cannot_be_written(hooks: Hooks, fault: str) -> None:
    directory = hooks.node.root / "run"
    with mounted(directory, "size=64k,nr_inodes=4" if fault == "no more files" else "size=64k") as remount:
        if fault != "no more files":
            hooks.prolog(1)
            remount("ro") if fault == "read-only" else fill(directory)
        else:
            hooks.prolog(1, comment="")
            hooks.prolog(2, comment="")
        hooks.prolog(7)
        calls = hooks.calls()
        assert "[State=DRAIN] [Reason=rms: cannot write " in calls and "scontrol [requeue] [7]" in calls
        assert not str(hooks.left(7)).startswith("granted")
        hooks.epilog(7)
        # A job without MIG needs nothing from us: its TaskProlog asks slurmctld.
        hooks.prolog(9, comment="")
        hooks.job(id=9, comment="")
        assert (hooks.task("[9.batch]").returncode, hooks.task("[9.batch]").stdout) == (0, "")
        hooks.epilog(9, comment="")
        hooks.calls()
        hooks.epilog(1)
        remount("rw,size=1m,nr_inodes=100")
        hooks.epilog(9, comment="")
        assert hooks.left(9) is None
        assert hooks.holders() == []
        assert "DRAIN" not in hooks.calls(), "an Epilog gives back without that directory"


def test_an_audit_log_on_a_full_disk_costs_no_job_its_instance(hooks: Hooks) -> None:
    directory = hooks.node.root / "audit"
    with mounted(directory, "size=4k") as remount:
        hooks.node.configure(audit_log=str(directory / "audit.jsonl"))
        for job in range(1, 9):
            hooks.prolog(job)
            assert str(hooks.left(job)).startswith("granted")
            hooks.epilog(job)
        assert hooks.calls() == "" and "cannot write the audit log" in hooks.log()
        remount("size=64k")
        hooks.prolog(20)
        events = [json.loads(line)["event"] for line in (directory / "audit.jsonl").read_text().splitlines()]
        assert events[-1] == "granted"


@pytest.mark.parametrize("kind", ["link", "fifo", "fifo with a reader"])
def test_something_else_in_the_place_of_the_logs(hooks: Hooks, kind: str) -> None:
    """A site may have them where users write."""
    target = hooks.node.root / "target"
    target.touch()
    paths = [hooks.node.root / "theirs.log", hooks.node.root / "theirs.jsonl"]
    for path in paths:
        path.symlink_to(target) if kind == "link" else os.mkfifo(path)
    hooks.node.configure(hook_log=str(paths[0]), audit_log=str(paths[1]))
    readers = [os.open(path, os.O_RDONLY | os.O_NONBLOCK) for path in paths if kind == "fifo with a reader"]
    hooks.prolog()
    assert str(hooks.left()).startswith("granted 0 ")
    hooks.epilog()
    assert hooks.calls() == "" and hooks.holders() == [] and target.read_text() == ""
    for reader in readers:
        os.close(reader)


@pytest.mark.parametrize("kind", ["link", "dangling", "file", "fifo", "a user's", "open to all"])
def test_something_else_in_the_place_of_the_grants(hooks: Hooks, kind: str) -> None:
    hooks.prolog(1)
    elsewhere, jobs = hooks.node.root / "elsewhere", hooks.node.root / "run" / "jobs"
    jobs.rename(elsewhere)
    if kind == "link":
        jobs.symlink_to(elsewhere)
    elif kind == "dangling":
        jobs.symlink_to("/nonexistent/x")
    elif kind == "file":
        jobs.touch()
    elif kind == "fifo":
        os.mkfifo(jobs)
    else:
        jobs.mkdir()
        jobs.chmod(0o777)
        (jobs / "8").symlink_to(elsewhere / "8")
        if kind == "a user's":
            os.chown(jobs, 65534, 65534)
    (elsewhere / "7").write_text("none 0\n")
    hooks.prolog(7)
    calls = hooks.calls()
    assert "must be a directory of root's own" in calls and "scontrol [requeue] [7]" in calls
    hooks.prolog(8, comment="")
    assert (elsewhere / "7").read_text() == "none 0\n" and not (elsewhere / "8").exists(), "written through a link"
    hooks.epilog(7)
    hooks.epilog(8, comment="")
    if jobs.is_dir() and not jobs.is_symlink():
        shutil.rmtree(jobs)
    else:
        jobs.unlink()
    elsewhere.rename(jobs)
    hooks.epilog(1)
    assert hooks.holders() == []


# TaskProlog.

GRANT = "granted 0 65534 cluster 1g.10gb:3\nMIG-a\nMIG-b\nMIG-c\n"


def given(done: subprocess.CompletedProcess[str]) -> str | None:
    """The list that a TaskProlog gave; None where it stopped the task."""
    if done.returncode:
        assert done.stdout.startswith("print rms: ") and done.stdout.count("\n") == 1
        return None
    words = dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines())
    assert set(words) <= {"CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"} and len(set(words.values())) <= 1
    return words.get("CUDA_VISIBLE_DEVICES", "")


def test_a_user_s_variables_do_not_decide(hooks: Hooks) -> None:
    hooks.leave(GRANT)
    hooks.leave("granted 0 0 cluster 1g.10gb:1\nMIG-other\n", 8)
    evil = hooks.node.root / "evil.sh"
    evil.write_text(f"echo export CUDA_VISIBLE_DEVICES=MIG-evil; touch {hooks.node.root}/PWNED\n")
    names = ("job", "file", "status", "list", "count", "step", "title", "place", "chosen", "number", "comment", "rank")
    variables: list[dict[str, str]] = [
        {"SLURM_JOB_ID": "8", "SLURM_STEP_ID": "0", "SLURM_JOBID": "8"},
        {"SLURMD_NODENAME": "../../x", "SLURM_CONF": "/nonexistent", "SLURM_CLUSTERS": "other"},
        {"ENV": str(evil), "PATH": "/nonexistent", "PS4": f"$({evil})"},
        {"IFS": "MIG-", "PPID": "1", "OPTIND": "x", "POSIXLY_CORRECT": "1", "CDPATH": "/tmp", "LC_ALL": "xx"},
        {"BASH_FUNC_read%%": "() { status=none; }", "BASH_FUNC_echo%%": "() { printf evil; }"},
        dict.fromkeys(names, "8"),
        {"SLURM_LOCALID": "2", "SLURM_STEP_TASKS_PER_NODE": "3", "SLURM_ARRAY_JOB_ID": "8", "SLURM_HET_JOB_ID": "8"},
        {"SLURM_LOCALID": "x" * 10_240, "SLURM_STEP_TASKS_PER_NODE": "\n"},
    ]
    for changed in variables:
        assert given(hooks.task("[7.batch]", changed)) == "MIG-a,MIG-b,MIG-c", changed
    assert not (hooks.node.root / "PWNED").exists()


def test_instances_and_tasks(hooks: Hooks) -> None:
    hooks.leave(GRANT)
    for tasks, rank, expected in [
        ("1", "0", "MIG-a,MIG-b,MIG-c"),
        ("2", "0", "MIG-a"),
        ("2(x3),1", "1", "MIG-b"),
        ("7", "5", "MIG-c"),
        ("2", "1;id", "MIG-a"),
        ("x", "1", "MIG-a,MIG-b,MIG-c"),
    ]:
        done = hooks.task("[7.0]", SLURM_STEP_TASKS_PER_NODE=tasks, SLURM_LOCALID=rank)
        assert given(done) == expected, (tasks, rank)
    (hooks.node.root / "0").touch()  # a file in the job's directory, for the asterisk
    for chosen, expected in [("2,0", "MIG-c,MIG-a"), ("", "MIG-a,MIG-b,MIG-c"), ("0,", "MIG-a")]:
        assert given(hooks.task("[7.0]", RMS_INSTANCES=chosen)) == expected
    for chosen in ("3", "-1", ",", " ", "*", "0;id", "$(id)", "0 1", "0\n1", "0x1", "1" * 10_240, "a\nb"):
        assert given(hooks.task("[7.0]", RMS_INSTANCES=chosen)) is None, chosen


@pytest.mark.parametrize("left", ["refused 0\n", "ended 0\n", "", None, "garbage\n"], ids=repr)
def test_without_a_grant_a_mig_job_goes_back(hooks: Hooks, left: str | None) -> None:
    if left is not None:
        hooks.leave(left)
    hooks.job(name="3_7")
    # A job that was submitted from within an array's task has that task's variables.
    assert given(hooks.task("[7.batch]", SLURM_ARRAY_JOB_ID="99", SLURM_ARRAY_TASK_ID="1")) is None
    assert [line for line in hooks.calls().splitlines() if "scontrol" in line] == ["scontrol [requeue] [3_7]"]
    assert given(hooks.task("[7.0]")) is None
    assert "requeue" not in hooks.calls(), "only a batch script can go back"
    # --no-requeue: allowed for a moment. The TaskProlog is killed right after the requeue, hence one process for all.
    hooks.does("scontrol", f'[ "$1" != requeue ] && cat >>{hooks.calls_file}')
    assert given(hooks.task("[7.batch]")) is None
    assert hooks.calls().endswith("\nupdate JobId=3_7 Requeue=1\nrequeue 3_7\nupdate JobId=3_7 Requeue=0\n")


def test_where_no_prolog_ran_slurmctld_decides(hooks: Hooks) -> None:
    # What a user may have set to shape their own squeue does not hide the job.
    hooks.does("squeue", 'env >&2; [ -z "$SQUEUE_PARTITION" ] && [ -z "$SLURM_CLUSTERS" ] && echo \'7 rms1:x\'')
    assert given(hooks.task(SQUEUE_PARTITION="x", SLURM_CLUSTERS="x", SLURM_CONF="/x")) is None
    for comment in ("", "mine", "mine\nrms1:3g:1;s=1;l=0;", "mine\n8 rms1:3g:1;s=1;l=0;"):
        hooks.job(comment=comment)
        assert given(hooks.task()) == ""
    hooks.does("squeue", f"echo '{UNREACHABLE}' >&2; exit 1")
    assert given(hooks.task()) is None


def test_what_the_hooks_leave_is_what_the_controller_reads(hooks: Hooks) -> None:
    hooks.prolog(7, comment="rms1:1g:2,2g:1;s=1;l=5;")
    found = grant.granted(hooks.node.config.run_dir)[7]
    assert (found.restart, found.uid, found.cluster) == (0, 65534, "cluster")
    assert given(hooks.task()) == ",".join(found.uuids) and len(found.uuids) == 3
    hooks.epilog(7)
    assert not grant.ended(hooks.node.config.run_dir, run(7)) and given(hooks.task()) is None


# What an Epilog leaves behind: instances are made ahead of time.


def background(node: Node) -> subprocess.Popen[str]:
    """What an Epilog leaves behind, as a process."""
    command = [sys.executable, "-I", "-m", "slurm.hook", "prewarm", str(node.toml), "/nowhere"]
    environment = node.environment(SLURM_JOB_ID="7", SLURM_JOB_UID="0", SLURMD_NODENAME="n1")
    return subprocess.Popen(command, env=environment, cwd="/", text=True)


def until(seen: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not seen():
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.01)


def at_work(node: Node) -> bool:
    """Whether something is being made ahead of time."""
    return any(intent.kind == "prewarm" for intent in Store(node.config.state_dir, 0.0).glance().intents)


@pytest.mark.timed
def test_a_job_waits_for_one_operation_at_most(node: Node) -> None:
    """All that is published fits at once, whatever is being made: here a whole GPU, and what lies on the other one."""
    node.acquire(1, "1g")
    node.release(1)
    node.configure(sim_create_seconds=0.6, prewarm=True)
    process = background(node)
    until(lambda: at_work(node))
    began = time.monotonic()
    node.acquire(2, "7g:2")
    took = time.monotonic() - began
    assert process.wait(30) == 0
    # The operation under way, and its own two, one after the other; and what it must destroy.
    assert took < 0.6 + 2 * 0.6 + 1.0, took
    assert sorted(node.statuses().values()) == ["busy", "busy"]
    assert node.state().prewarmed[0] <= 1, "it has given up"
    assert len([line for line in node.audit() if line["event"] == "decision"]) == 2, "one line a job"
    node.check_empties()


def test_a_release_makes_it_yield_too(node: Node) -> None:
    node.configure(gpus=[0])
    node.acquire(1, "1g")
    node.configure(sim_create_seconds=0.5, prewarm=True)
    process = background(node)
    until(lambda: at_work(node))
    node.release(1)
    assert process.wait(30) == 0 and node.state().prewarmed[0] == 1
    node.check()


@pytest.mark.timed
def test_the_epilog_leaves_it_behind(hooks: Hooks) -> None:
    """slurmd waits neither for it nor for its descriptors: the pipes of the Epilog are closed when that ends."""
    hooks.node.configure(prewarm=True)
    hooks.prolog(7)
    hooks.node.configure(sim_create_seconds=0.8)
    began = time.monotonic()
    hooks.epilog(7)
    assert time.monotonic() - began < 0.8, "it has waited"
    until(lambda: "ahead of time" in hooks.log())
    assert "prewarm: job 7.0: " in hooks.log() and hooks.node.state().prewarmed[0] >= 1
    hooks.node.check()
    shown = subprocess.run(
        [sys.executable, "-I", "-m", "rms.cli", "show", "--config", str(hooks.node.toml), "--node", "n1"],
        capture_output=True, text=True, check=True, env={"PATH": os.environ["PATH"]},
    )  # fmt: skip
    assert "made ahead of time: " in shown.stdout


def test_without_the_key_nothing_is_left_behind(hooks: Hooks) -> None:
    hooks.prolog(7)
    hooks.epilog(7)
    time.sleep(0.5)
    assert hooks.node.state().prewarmed == (0, 0) and not (hooks.node.root / "state/prewarm.lock").exists()


def test_its_faults_are_told_and_drain_nothing(hooks: Hooks) -> None:
    hooks.prolog(7)
    (hooks.node.root / "state" / "state.json").write_text(json.dumps({"schema": 99}))
    hooks.node.toml.write_text("nonsense")
    hooks.calls()
    assert background(hooks.node).wait(30) == 0
    assert hooks.calls() == ""
