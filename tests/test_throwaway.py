"""The throw-away Slurm itself: it starts, runs a user's job, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from throwaway import Cluster, ClusterError, missing

pytestmark = pytest.mark.slurm
if missing() and "CI" not in os.environ:
    pytest.skip(f"Slurm is not installed: {missing()}", allow_module_level=True)


def is_listening(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_runs_the_jobs_of_two_users_and_leaves_nothing() -> None:
    began = time.monotonic()
    with Cluster(gres="mig:1g.10gb:14,migc:14") as slurm:
        assert time.monotonic() - began < 10
        first, second = slurm.users
        one = slurm.sbatch("id -un; echo $SLURMD_NODENAME", "--gres=mig:1g.10gb:1", user=first)
        array = slurm.sbatch("#!/bin/sh\nid -un\n", "--array=1-2", "--output=task%a", user=second)
        slurm.wait_all(120)
        assert (first.work / f"slurm-{one}.out").read_text().split() == [first.name, "n1"]
        assert (second.work / "task2").read_text() == f"{second.name}\n"
        assert slurm.job(one)["UserId"] == f"{first.name}({first.uid})"
        assert slurm.states() == {str(one): "COMPLETED", f"{array}_1": "COMPLETED", f"{array}_2": "COMPLETED"}
        assert slurm.job(f"{array}_1")["ArrayTaskId"] == "1"
        assert slurm.node_states()["n2"] == ("idle", "")

        # Stopping in the midst of a job, with what the job left behind in a session of its own.
        ready = first.work / "ready"
        slurm.sbatch(f"setsid sleep 1000 & touch {ready}; exec sleep 1000", user=first)
        slurm.wait(ready.exists)
        slurm.restart_slurmd("n1", signal.SIGKILL)
        assert len(slurm.processes()) > 4
        ports, root = slurm.ports.values(), slurm.root
        assert all(is_listening(port) for port in ports)
    assert slurm.processes() == []
    assert not any(is_listening(port) for port in ports)
    assert not root.exists()
    slurm.stop()


def test_what_cannot_start_says_why_in_one_line() -> None:
    slurm = Cluster(extra_conf="SelectType=select/nonsense")
    with pytest.raises(ClusterError, match="select/nonsense") as failed:
        slurm.start()
    assert "\n" not in str(failed.value)
    assert slurm.processes() == []


def test_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import time, throwaway\n"
        "slurm = throwaway.Cluster(nodes=1)\n"
        "slurm.start()\n"
        "slurm.sbatch('sleep 1000', user=slurm.users[0])\n"
        "print(slurm.root, flush=True)\n"
        "time.sleep(1000)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        root = Path(child.stdout.readline().strip())
        child.send_signal(signal.SIGTERM)
        assert child.wait(30) == 128 + signal.SIGTERM
    assert root.name.startswith("rms-slurm-")
    assert not root.exists()
    assert Cluster(root).processes() == []
