"""Mode `extra`, which needs Slurm 23.11: `make newest` runs it; mode `features` is in test_slurm_publish.py."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import records
from rms_cluster import RmsCluster, rms_cluster
from throwaway import PATH

pytestmark = pytest.mark.slurm


def version() -> tuple[int, ...]:
    command = ["slurmctld", "-V"]
    shown = subprocess.run(command, env={"PATH": PATH}, capture_output=True, text=True, check=True).stdout
    return tuple(int(part) for part in re.findall(r"\d+", shown)[:2])


def extra(slurm: RmsCluster, node: str) -> dict[str, int]:
    shown = slurm.run("scontrol", "show", "node", node).stdout
    found = re.search(r"Extra=(\{.*\})", shown)
    return json.loads(found[1]) if found else {}


def test_nothing_is_misplaced_under_overload(slurm_root: Path) -> None:
    if version() < (23, 11):
        pytest.skip("Slurm is older than 23.11")
    chance = random.Random(11)
    with rms_cluster(slurm_root, admission="extra", create=0.02, destroy=0.02, cred_expire=5) as slurm:
        slurm.run("scontrol", "update", "NodeName=n1", 'Extra={"rack":7}')
        slurm.publish()
        jobs = {}
        for number in range(25):
            gres = chance.choice(["1g", "2g", "3g", "4g", "7g", "1g:2", "3g,mig:1g"])
            user = slurm.users[number % 2]
            script = records.script(f"sleep {chance.uniform(1, 3):.1f}")
            jobs[slurm.sbatch(script, f"--gres=mig:{gres}", "--output=%j.out", user=user)] = user
        waiting = slurm.sbatch("true", "--gres=mig:7g:2", "-wn1", user=slurm.users[0])
        slurm.wait_all(240)
        assert Counter(slurm.states()[str(job)] for job in [*jobs, waiting]) == {"COMPLETED": 26}
        slurm.wait(lambda: all("rms_7g.80gb_2" in extra(slurm, node) for node in slurm.nodes), 60, "all fits again")
        assert extra(slurm, "n1")["rack"] == 7
        audit = "".join((slurm.root / node / "audit.jsonl").read_text() for node in slurm.nodes)
        assert audit.count('"event": "refused"') == 0 and audit.count('"event": "granted"') == 26
        found = [one for job, user in jobs.items() for one in records.read(user.work / f"{job}.out")]
        journals = {node: records.journal(slurm.root / node / "gpus.json.journal") for node in slurm.nodes}
        slots, faults = records.slots(found, journals)
        assert faults == records.overlaps(slots) == [] and len(found) == 25
        held = slurm.sbatch("true", "--gres=mig:1g", "--hold", user=slurm.users[0])
        change = ["scontrol", "update", f"jobid={held}", "extra=rms_1g.10gb_1>=0"]
        assert slurm.run(*change, user=slurm.users[0], check=False).returncode
        slurm.run("scancel", str(held))
        grown = slurm.sbatch("true", "--gres=mig:1g", "--hold", "--time=5", user=slurm.users[0])
        assert slurm.job(grown)["Extra"] == "rms_1g.10gb_1_short>=1"
        slurm.run("scontrol", "update", f"jobid={grown}", "TimeLimit=11", user=slurm.users[0])
        assert slurm.job(grown)["Extra"] == "rms_1g.10gb_1>=1"
        slurm.run("scancel", str(grown))


def test_a_slurmctld_that_has_forgotten_the_token_starts_nothing(slurm_root: Path) -> None:
    """It still has the names of what fits: only `open` of the token, one in slurm.conf, keeps jobs from starting."""
    if version() < (23, 11):
        pytest.skip("Slurm is older than 23.11")
    with rms_cluster(slurm_root / "one", nodes=1, admission="extra", create=0.02, destroy=0.02) as slurm:
        first = slurm.sbatch("sleep 600", "--gres=mig:1g", user=slurm.users[0])
        for forget in ("reconfigure", "restart"):
            slurm.wait(lambda: "rms_7g.80gb_2" not in extra(slurm, "n1"), 60, "told")
            slurm.publish()  # whoever is still at it in the background has nothing more to say then
            if forget == "restart":
                slurm.stop_daemon("slurmctld")
                slurm.start_daemon("slurmctld")
            else:
                slurm.run("scontrol", "reconfigure")
            slurm.wait(lambda: "migt:open:1," in f"{gres(slurm, 'n1')},", 60, "as slurm.conf has it")
            assert "rms_7g.80gb_1" in extra(slurm, "n1")
            jobs = [slurm.sbatch("true", f"--gres=mig:{what}", user=slurm.users[0]) for what in ("7g", "4g", "1g")]
            time.sleep(3)
            assert {slurm.job(job)["JobState"] for job in jobs} == {"PENDING"}

            def ran(jobs: list[int] = jobs) -> bool:
                slurm.publish()  # again and again, as the timer does: a slurmd that reports later has it forgotten anew
                return {slurm.job(job)["JobState"] for job in jobs} == {"COMPLETED"}

            slurm.wait(ran, 60, "they ran")
        slurm.run("scancel", str(first))
        slurm.wait_all(60)
        audit = (slurm.root / "n1" / "audit.jsonl").read_text()
        assert audit.count('"event": "refused"') == 0 and audit.count('"event": "granted"') == 7
        # PLANNED until backfill looks again
        slurm.wait(lambda: slurm.node_states()["n1"] == ("idle", ""), 60, "idle")


def gres(slurm: RmsCluster, node: str) -> str:
    found = re.search(r"Gres=(\S+)", slurm.run("scontrol", "show", "node", node).stdout)
    return found[1] if found else ""
