"""Two nodes of a real Slurm. 200 short jobs: nothing overlaps, nothing is lost, nothing is refused that fits."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import records
from rms_cluster import rms_cluster

from rms import geometry
from rms.geometry import Placement

pytestmark = pytest.mark.slurm

JOBS = 200
SEED = 20261122
SMALL = ["1g", "1g:2", "1g.20gb", "2g"]
LARGE = ["3g", "3g:2", "3g:3", "4g", "4g:2", "7g", "2g:5", "2g:1,1g:1", "3g:1,2g:1", "1g:3,3g:1", "4g:1,3g:1"]
"""Small ones run longer, so that they stand about and slices often add up where nothing large can be placed."""


class Job(NamedTuple):
    """What was submitted: the request (empty: no MIG) and the options."""

    request: str
    options: tuple[str, ...]


def random_jobs() -> list[tuple[Job, float]]:
    """The jobs, with how long each works (seconds)."""
    chance = random.Random(SEED)
    jobs = []
    for _ in range(JOBS):
        kind = chance.choices([[""], SMALL, LARGE], [0.1, 0.35, 0.55])[0]
        request = chance.choice(kind)
        gres = ["--gres=" + ",".join(f"mig:{item}" for item in request.split(","))] if request else []
        more = [o for o, p in (("--no-requeue", 0.1), ("--ntasks=2", 0.2), ("--time=3", 0.5)) if chance.random() < p]
        seconds = chance.uniform(1.0, 5.0) if kind is SMALL else chance.uniform(0.3, 1.5)
        jobs.append((Job(request, (*gres, *more)), round(seconds, 2)))
    return jobs


def audit(root: Path, node: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / node / "audit.jsonl").read_text().splitlines()]


def refused_although_it_fits(events: list[dict[str, Any]]) -> list[str]:
    """Refusals at a moment when the request fitted beside all that was decided and not yet released."""
    known = geometry.load("A100-80GB")
    gpus = 2
    held: dict[str, list[tuple[int, Placement]]] = {}
    wrong = []

    def place(left: list[str], taken: list[list[Placement]]) -> bool:
        """Brute force: every placement of the first, then the rest."""
        if not left:
            return True
        seen = set()
        for gpu in range(gpus):
            for spot in known.legal(left[0], taken[gpu]):
                key = (frozenset(taken[gpu]), spot)
                if key not in seen:
                    seen.add(key)
                    taken[gpu].append(spot)
                    if place(left[1:], taken):
                        return True
                    taken[gpu].remove(spot)
        return False

    for event in events:
        run = str(event.get("run"))
        if event["event"] == "decision":
            held[run] = []
            for instance in event["instances"]:
                profile, _, where = instance["placement"].partition("@")
                start, size = map(int, where.split(":"))
                held[run].append((instance["gpu"], Placement(profile, start, size)))
        elif event["event"] == "released":
            held.pop(run, None)
        elif event["event"] == "refused":
            taken = [[p for places in held.values() for g, p in places if g == gpu] for gpu in range(gpus)]
            items = [item.split(":") for item in event["request"].split(",")]
            wanted = [profile for profile, count in items for _ in range(int(count))]
            wanted.sort(key=lambda profile: -known.by_name[profile].memory)
            if place(wanted, taken):
                wrong.append(f"{run} {event['request']} beside {taken}")
    return wrong


def test_het_components_have_their_own_instances(slurm_root: Path) -> None:
    show = 'echo "$SLURM_PROCID $CUDA_VISIBLE_DEVICES"'
    with rms_cluster(slurm_root.with_name("het")) as slurm:
        wrap = f"--wrap=srun --het-group=0,1 sh -c '{show}'"
        components = ["--gres=mig:1g:2", "-n2", wrap, ":", "-n1", "--gres=mig:2g"]
        job = int(slurm.run("sbatch", "--parsable", *components, user=slurm.users[0]).stdout)
        slurm.wait_all(120)
        text = (slurm.users[0].work / f"slurm-{job}.out").read_text()
        journal = [e for node in slurm.nodes for e in records.journal(slurm.root / node / "gpus.json.journal")]
    made = {e["uuid"]: e["profile"] for e in journal if e["op"] == "create_compute_instance"}
    seen = dict(line.split() for line in text.splitlines())
    assert [made[seen[rank]] for rank in "012"] == ["1g.10gb", "1g.10gb", "2g.20gb"] and len(set(seen.values())) == 3


def test_two_hundred_jobs(slurm_root: Path) -> None:
    jobs = random_jobs()
    with rms_cluster(slurm_root, create=0.05, destroy=0.05, cred_expire=5) as slurm:
        submitted: dict[int, Job] = {}
        for index, (job, seconds) in enumerate(jobs):
            number = slurm.sbatch(
                records.script(f"sleep {seconds}"), *job.options, "--output=%j.out", user=slurm.users[index % 2]
            )
            submitted[number] = job
        slurm.wait_all(240)
        states = slurm.states()
        nodes = slurm.node_states()
        found = {
            number: [r for user in slurm.users for path in [user.work / f"{number}.out"] if path.exists()
                     for r in records.read(path)]
            for number in submitted
        }  # fmt: skip
        shown = {
            node: json.loads(slurm.run(
                "env", f"RMS_CONFIG={slurm.etc}/rms.toml", str(Path(sys.executable).with_name("rms")),
                "show", "--json", "--node", node).stdout)
            for node in slurm.nodes
        }  # fmt: skip

    assert Counter(states[str(number)] for number in submitted) == {"COMPLETED": JOBS}
    assert {number: len(found[number]) for number in submitted} == dict.fromkeys(submitted, 1), "each ran exactly once"
    assert {node: tuple(state) for node, state in nodes.items()} == {"n1": ("idle", ""), "n2": ("idle", "")}

    everything = [found[number][0] for number in submitted]
    slots, faults = records.slots(everything, {n: records.journal(slurm_root / n / "gpus.json.journal") for n in nodes})
    assert faults == []
    assert records.overlaps(slots) == []
    known = geometry.load("A100-80GB")
    for number, job in submitted.items():
        mine = [slot.profile for slot in slots if slot.record.job == number]
        items = [item.partition(":") for item in job.request.split(",") if item]
        assert mine == [known.find(name).name for name, _, count in items for _ in range(int(count or 1))], number

    moments = sorted(r.start for r in everything)
    assert max(sum(r.start <= t < r.end for r in everything) for t in moments) >= 6, "jobs at once"
    events = {node: audit(slurm_root, node) for node in nodes}
    refused = {tuple(e["run"][:2]) for node in nodes for e in events[node] if e["event"] == "refused"}
    assert len(refused) >= 20, "jobs that were refused at least once"
    for node in nodes:
        assert refused_although_it_fits(events[node]) == []
        assert shown[node]["allocations"] == []
        statuses = {i["status"] for gpu in shown[node]["gpus"] for i in gpu["instances"]}
        assert statuses <= {"idle"}
