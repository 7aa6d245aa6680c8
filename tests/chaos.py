"""Everything that can go wrong on a node, at random, for as long as one likes: `make chaos`.

    python tests/chaos.py [--minutes M] [--operations N] [--seed S]

A *life* is a node with some GPUs of some model, simulated or behind the stand-in for NVML, and a few hundred events:
jobs come and go, processes are killed, operations fail, GPUs are lost, disks are full, the clock jumps, the node boots,
files are damaged, somebody resets a GPU or makes instances by hand. A model beside it knows what must be. After each
event it is held against the state file, the grants and the GPUs:

- no two jobs share a slice; every running job keeps its instances and their UUIDs;
- an acquire succeeds exactly when the geometry says that it fits (by a search of its own, over the placements);
- once `reconcile` has run nothing has leaked: what is there is a job's, idle, or quarantined for a reason that stands.

Each life has its seed: where an invariant breaks, `--seed` with what is printed plays that life again.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import filelock
import pynvml
import test_crash
from conftest import Node

import controller as local
from rms import geometry, grant, hardware, simulated
from rms.device import DeviceInstance, Nvml
from rms.errors import ClosedRunError, NodeError, NoRoomError, RequestError, RmsError
from rms.geometry import Placement
from rms.store import Damaged

EVENTS = 400
"""Events in a life."""
MODELS = {"simulated": ["A100-80GB", "A30", "H100-80GB", "RTX-PRO-6000"], "nvml": ["A100-80GB", "A30"]}
"""NVML's are those that keep MIG mode over a reboot."""
WEIGHTS = {
    "acquire": 42,
    "release": 30,
    "reconcile": 6,
    "again": 2,
    "late": 2,
    "requeue": 3,
    "kill": 4,
    "fault": 4,
    "hold": 2,
    "let_go": 2,
    "full": 3,
    "damage": 2,
    "lose": 1.5,
    "find": 2,
    "vanish": 1,
    "stranger": 2,
    "tidy": 2,
    "jump": 2,
    "vanished_epilog": 2,
    "reboot": 0.7,
    "prewarm": 3,
}
"""How often each event is tried, by the method of its name."""
RECOVERIES = ("rebuilt", "took over", "is offered again", "is over", "idle", "removed", "has booted")
"""What the log says of things that were mended."""

Place = tuple[int, Placement]
"""GPU by number, and where on it."""


class Job:
    """A job that runs, to Slurm's mind. `places` and `uuids` go together; `lost` are the places whose instance
    vanished under it."""

    def __init__(self, restart: int, places: Sequence[Place], uuids: Sequence[str]) -> None:
        self.restart = restart
        self.places = list(places)
        self.uuids = list(uuids)
        self.lost: set[Place] = set()
        self.whole = True


class Life:
    """One node and what happens to it."""

    def __init__(self, root: Path, seed: int) -> None:
        self.chance = random.Random(seed)
        self.backend = self.chance.choice(["simulated", "simulated", "nvml"])
        model = self.chance.choice(MODELS[self.backend])
        count = self.chance.choice([1, 2, 2, 3])
        self.node = Node(
            root, self.backend, gpus=list(range(count)), sim_model=model, sim_gpus=count, deadline_seconds=30,
            fence=os.geteuid() == 0 and self.chance.random() < 0.1,
        )  # fmt: skip
        self.known = geometry.load(model)
        self.count = count
        self.uuids = list(self.node.device().gpus())
        self.jobs: dict[int, Job] = {}
        self.over: set[int] = set()  # jobs that have ended
        self.gone: set[int] = set()  # GPUs that are lost
        self.unknown: set[int] = set()  # those of them of which nothing but grants is left
        self.blank = False  # nothing but grants is left of any, as long as nobody has called
        self.strangers: set[tuple[int, int]] = set()  # GPU and GI id of what somebody left half-made
        self.holders: dict[tuple[str, str], subprocess.Popen[bytes]] = {}  # by GPU's and MIG UUID
        self.there: dict[int, list[DeviceInstance]] | None = None  # what the GPUs had after the last event
        self.unseen = False  # whether somebody has left half an instance that RMS has not seen yet
        self.settled = True  # nothing has happened since that RMS need not know of yet
        self.last = 0
        self.told = 0
        self.now = 1_790_000_000.0
        self.events: Counter[str] = Counter()
        self.story: list[str] = [f"{self.backend}, {count} x {model}"]

    def play(self, events: int) -> None:
        """So many events, with the invariants checked after each."""
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        while self.events.total() < events:
            (name,) = self.chance.choices(names, weights)
            self.now += self.chance.choice([0.01, 1.0, 30.0])
            self.story.append(name)
            if name not in ("acquire", "release", "requeue"):
                self.there = None
            if getattr(self, name)() is not False:
                self.events[name] += 1
                self.check()
        for number in list(self.gone):
            self.back(number)
        for process in self.holders.values():
            end(process)
        self.holders.clear()
        self.tidy()
        self.reconcile()
        for job in list(self.jobs):
            self.end(job)
        self.reconcile()
        self.check()
        whole = self.known.profiles[-1].name
        self.node.acquire(self.job(), f"{whole}:{self.count}")  # nothing has leaked

    # Events. One that can't be now returns False.

    def acquire(self) -> None:
        spec = self.request()
        self.grant(self.job(), 0, spec)

    def release(self) -> bool | None:
        if not self.jobs:
            return False
        self.end(self.chance.choice(list(self.jobs)))
        return None

    def again(self) -> bool | None:
        """The same Prolog once more: the same instances."""
        whole = [job for job, known in self.jobs.items() if known.whole and not known.lost and not self.touches(job)]
        if not whole:
            return False
        job = self.chance.choice(whole)
        known = self.jobs[job]
        granted = self.node.acquire(job, self.spec(known), known.restart)
        assert [g.uuid for g in granted] == known.uuids, "another instance for the same run"
        return None

    def late(self) -> bool | None:
        """A Prolog of a run that was released: it gets nothing."""
        if not self.over:
            return False
        try:
            self.node.acquire(self.chance.choice(sorted(self.over)), "1g")
        except (ClosedRunError, NodeError):
            return None
        raise AssertionError("a run that was released is given something")

    def requeue(self) -> bool | None:
        """A newer run of a job begins before the older one's Epilog."""
        if not self.jobs:
            return False
        job = self.chance.choice(list(self.jobs))
        older = self.jobs.pop(job)
        self.grant(job, older.restart + 1, self.request(), older)
        return None

    def reconcile(self) -> None:
        try:
            self.node.reconcile()
        except NodeError:
            assert len(self.gone) == self.count, "no GPU is usable, it says"
            return
        self.settled, self.blank, self.unseen = True, False, False
        self.unknown &= self.gone
        if not self.gone:
            self.check_leaks()

    def vanished_epilog(self) -> bool | None:
        """A job ends, and its Epilog is never run: Slurm knows."""
        if not self.jobs:
            return False
        job = self.chance.choice(list(self.jobs))
        with suppress(NodeError):
            self.node.reconcile(job)
        if len(self.gone) == self.count:
            self.end(job)
        else:
            self.jobs.pop(job)
        return None

    def kill(self) -> None:
        """A hook is killed somewhere; another one may come before slurmd does what it does then."""
        self.see()
        step = self.chance.randrange(1, 130)
        if self.jobs and self.chance.random() < 0.5:
            job = self.chance.choice(list(self.jobs))
            test_crash.die_at(step, lambda: self.node.release(job, self.jobs[job].restart), may_fail=True)
            if self.chance.random() < 0.5:
                self.end(job)
            else:
                self.jobs.pop(job)
                self.settle(job)
            return
        job, spec = self.job(), self.request()
        test_crash.die_at(step, lambda: self.node.acquire(job, spec), may_fail=True)
        if self.chance.random() < 0.3:
            with self.unsettled():
                self.acquire()
        if self.chance.random() < 0.5:
            self.node.release(job)
        else:
            self.grant(job, 0, spec)

    def fault(self) -> None:
        """Some operations fail while a job comes or goes."""
        operations = ["create_gpu_instance", "create_compute_instance", "destroy_compute_instance"]
        operation = self.chance.choice([*operations, "destroy_gpu_instance"])
        code = self.chance.choice([Nvml.UNKNOWN, Nvml.IN_USE, Nvml.INSUFFICIENT_RESOURCES])
        times = self.chance.choice([1, 1, 2, 5, 50])
        self.node.device().fail(operation, code, after=self.chance.choice([0, 0, 1, 2]), times=times)
        with self.unsettled():
            if self.chance.random() < 0.8:
                self.acquire()
            else:
                self.release()
        self.mend()
        self.settled = False

    def hold(self) -> bool | None:
        """A process holds an instance, a job's or an idle one, whatever becomes of the job."""
        there = [
            (gpu, found.uuid)
            for number, gpu in enumerate(self.uuids)
            if number not in self.gone
            for found in self.node.device().instances(gpu)
            if found.uuid and (gpu, found.uuid) not in self.holders
        ]
        if not there or len(self.holders) > 3 or self.gone:
            return False
        gpu, uuid = self.chance.choice(there)
        self.holders[gpu, uuid] = subprocess.Popen(["sleep", "1000"])
        self.node.device().hold(uuid, self.holders[gpu, uuid].pid)
        return None

    def let_go(self) -> bool | None:
        if not self.holders:
            return False
        end(self.holders.pop(self.chance.choice(list(self.holders))))
        return None

    def full(self) -> None:
        """The disk is full from some write on, while a job comes or goes."""
        step = self.chance.randrange(0, 12)
        job = self.chance.choice(list(self.jobs)) if self.jobs and self.chance.random() < 0.5 else 0
        if job:
            with full(self.node, step), suppress(NodeError):
                self.node.release(job, self.jobs[job].restart)
            self.jobs.pop(job)
            self.settle(job)
            return
        job, spec = self.job(), self.request()
        try:
            with full(self.node, step):
                self.node.acquire(job, spec)
        except RmsError:
            self.node.release(job)  # the Epilog of a job that goes back to the queue
        else:
            self.grant(job, 0, spec)

    def damage(self) -> bool | None:
        """The state file is cut, changed or lost, and sometimes the one before it too."""
        if len(self.gone) == self.count:
            return False  # nothing could be rebuilt, and no hook would do anything
        if not self.settled:
            self.reconcile()  # what is half-made then would be taken for a stranger's
        self.over.clear()
        both = self.chance.random() < 0.3
        for name in ("state.json", "state.json.previous")[: 1 + both]:
            path = self.node.root / "state" / name
            if not path.exists() or not path.stat().st_size:  # damaged before
                continue
            data = bytearray(path.read_bytes())
            how = self.chance.randrange(3)
            if how == 0:
                path.unlink()
            else:
                data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
                path.write_bytes(data if how == 1 else data[: self.chance.randrange(len(data))])
        if both:  # who had lost an instance has only the others now
            self.unknown |= self.gone
            self.blank = True
            for known in self.jobs.values():
                forget(known, set(known.lost))
        return None

    def lose(self) -> bool | None:
        """A GPU falls off the bus."""
        there = [number for number in range(self.count) if number not in self.gone]
        if not there:
            return False
        number = self.chance.choice(there)
        if len(there) == 1:
            self.node.controller().look()  # a state that is damaged is rebuilt while that can be done
        self.node.lose(number)
        self.gone.add(number)
        self.settled = False
        return None

    def find(self) -> bool | None:
        """It comes back, with or without what it had."""
        if not self.gone:
            return False
        number = self.chance.choice(sorted(self.gone))
        self.back(number)
        if self.chance.random() < 0.5:
            self.reset(number)
        return None

    def vanish(self) -> bool | None:
        """A GPU is reset under its jobs."""
        there = [number for number in range(self.count) if number not in self.gone]
        if not there:
            return False
        self.reset(self.chance.choice(there))
        return None

    def stranger(self) -> bool | None:
        """Somebody makes an instance by hand, or half of one."""
        number = self.chance.randrange(self.count)
        if number in self.gone or not self.settled:
            return False
        device, gpu = self.node.device(), self.uuids[number]
        taken = [found.placement for found in device.instances(gpu)]
        taken += [place for job in self.jobs.values() for n, place in job.places if n == number]
        free = [p for profile in self.known.by_name for p in self.known.legal(profile, taken)]
        if not free:
            return False
        place = self.chance.choice(free)
        gi = device.create_gpu_instance(gpu, place.profile, place.start)
        if self.chance.random() < 0.5:
            device.create_compute_instance(gpu, gi)
        else:
            self.strangers.add((number, gi))
            self.unseen = True
        self.settled = False
        return None

    def tidy(self) -> bool | None:
        """The administrator removes what somebody left half-made."""
        theirs = [(number, gi) for number, gi in sorted(self.strangers) if number not in self.gone]
        if not theirs:
            return False
        for number, gi in theirs:
            self.node.device().destroy_gpu_instance(self.uuids[number], gi)
            self.strangers.discard((number, gi))
        self.settled = False
        return None

    def jump(self) -> None:
        """The clock is set."""
        self.now += self.chance.choice([-1, 1]) * self.chance.choice([60.0, 3600.0, 86400.0 * 3])

    def reboot(self) -> None:
        self.node.boot(f"boot {self.now} {self.chance.random()}")
        for process in self.holders.values():
            end(process)
        for number in list(self.gone):
            self.back(number)
        self.jobs.clear()
        self.holders.clear()
        self.strangers.clear()
        self.unknown.clear()
        self.settled, self.blank = True, False

    def prewarm(self) -> None:
        """What an Epilog leaves behind makes what the policy expects; it may die over it."""

        def act() -> int:
            return self.node.controller().prewarm(local.wish)

        if self.chance.random() < 0.3:
            self.see()
            test_crash.die_at(self.chance.randrange(1, 130), act, may_fail=True)
        else:
            with suppress(NodeError):
                act()

    # What they are made of.

    def job(self) -> int:
        self.last += 1
        return self.last

    def request(self) -> str:
        names = [profile.name for profile in self.known.profiles]
        wanted = {self.chance.choice(names): self.chance.choice([1, 1, 1, 2, 3])}
        if self.chance.random() < 0.25:
            wanted[self.chance.choice(names)] = self.chance.choice([1, 2])
        return ",".join(f"{name}:{count}" for name, count in wanted.items())

    def spec(self, job: Job) -> str:
        return ",".join(f"{place.profile}:1" for _, place in job.places)

    def grant(self, job: int, restart: int, spec: str, older: Job | None = None) -> bool:
        """An acquire, and whether it may end as it does."""
        items = [word.split(":") for word in spec.split(",")]
        wanted = tuple(sorted(name for name, count in items for _ in range(int(count))))
        expected = self.expected(wanted)
        if self.settled and older is None:
            self.story[-1] += f" {job}.{restart} {spec}: {expected.__name__ if expected else 'fits'}"
        self.there = None
        try:
            granted = self.node.acquire(job, spec, restart)
        except RmsError as error:
            text = f"{type(error).__name__}: {error}, not {expected}"
            assert not self.settled or older or type(error) is expected, text
            assert not isinstance(error, ClosedRunError)
            self.node.release(job, restart)  # the Epilog of a job that goes back to the queue
            self.over.add(job)
            return False
        assert expected is None or not self.settled, f"granted, although {expected}"
        places = [(g.number, g.placement) for g in granted]
        assert sorted(place.profile for _, place in places) == list(wanted)
        self.jobs[job] = Job(restart, places, [g.uuid for g in granted])
        return True

    def expected(self, wanted: tuple[str, ...]) -> type[RmsError] | None:
        """How an acquire must end."""
        empty: list[tuple[Placement, ...]] = [()] * self.count
        if not fits(self.known, empty, wanted):
            return RequestError
        if len(self.gone) == self.count:
            return NodeError
        taken = [[] if number not in self.gone else None for number in range(self.count)]
        for job in self.jobs.values():
            for number, place in job.places:
                if (gpu := taken[number]) is not None:
                    gpu.append(place)
        for number, gpu in enumerate(taken):
            if gpu is None:
                continue
            for found in self.look()[number]:
                held = (self.uuids[number], found.uuid or "") in self.holders
                if (held or (number, found.gi) in self.strangers) and found.placement not in gpu:
                    gpu.append(found.placement)
        usable = [tuple(sorted(gpu)) for gpu in taken if gpu is not None]
        return None if fits(self.known, usable, wanted) else NoRoomError

    def look(self) -> dict[int, list[DeviceInstance]]:
        """What there is on each GPU that answers."""
        if self.there is None:
            device = self.node.device()
            here = [(number, gpu) for number, gpu in enumerate(self.uuids) if number not in self.gone]
            self.there = {number: list(device.instances(gpu)) for number, gpu in here}
        return self.there

    def end(self, job: int) -> None:
        """A job ends, its Epilog runs."""
        self.node.release(job, self.jobs.pop(job).restart)
        self.over.add(job)

    def settle(self, job: int) -> None:
        """The Epilog of a job did not end well: Slurm knows that it is over."""
        with suppress(NodeError):
            self.node.reconcile(job)
        if len(self.gone) == self.count:
            self.node.release(job, 10**6)
        self.over.add(job)

    @contextmanager
    def unsettled(self) -> Iterator[None]:
        before, self.settled = self.settled, False
        yield
        self.settled = before

    def see(self) -> None:
        """Half an instance on the very place that a hook was about to use when it was killed looks like the hook's."""
        if self.unseen:
            self.reconcile()

    def mend(self) -> None:
        """No operation fails any more; lost GPUs stay lost."""
        device = self.node.device()
        if self.backend == "simulated":
            with device._state() as state:
                state["faults"] = []
                device._save(state)
        else:
            self.node.machine.mend()
            for number in self.gone:
                self.node.lose(number)

    def back(self, number: int) -> None:
        self.gone.discard(number)
        self.node.lose(number, lost=False)
        device, gpu = self.node.device(), self.uuids[number]
        for found in device.instances(gpu) if number in self.unknown else ():
            if found.ci is None and (number, found.gi) not in self.strangers:
                device.destroy_gpu_instance(gpu, found.gi)  # RMS does not know any more that it was its own
        for other in self.gone:
            self.node.lose(other)
        self.settled = False

    def reset(self, number: int) -> None:
        if self.blank:  # of an instance that only a grant knows nobody could say where it was
            with suppress(NodeError):
                self.node.reconcile()
            self.blank, self.unknown = False, self.unknown & self.gone
        for key in [key for key in self.holders if key[0] == self.uuids[number]]:
            end(self.holders.pop(key))
        self.node.vanish(number)
        self.strangers = {(n, gi) for n, gi in self.strangers if n != number}
        for job in self.jobs.values():
            places = {place for place in job.places if place[0] == number}
            if number in self.unknown:
                forget(job, places)
            else:
                job.lost |= places
        self.settled = False

    def touches(self, job: int) -> bool:
        """Whether a job has something on a GPU that is lost."""
        return any(number in self.gone for number, _ in self.jobs[job].places)

    # What must hold.

    def check(self) -> None:
        """After every event."""
        if back := self.unknown - self.gone:  # what runs get there from now on is known, also without a reconcile
            with suppress(Damaged):
                seen = {n for n, gpu in enumerate(self.node.state().gpus) if not (gpu.fault or gpu.doubt)}
                self.unknown -= back & seen
        slices: set[tuple[int, int]] = set()
        for job in self.jobs.values():
            for number, place in job.places:
                mine = {(number, at) for at in range(place.start, place.start + place.size)}
                assert not mine & slices, "two jobs share a slice"
                slices |= mine
        self.there = None
        there = {number: {i.placement: i.uuid for i in found} for number, found in self.look().items()}
        for job, known in self.jobs.items():
            for (number, place), uuid in zip(known.places, known.uuids, strict=True):
                if number in there and (number, place) not in known.lost:
                    assert there[number].get(place) == uuid, f"job {job} has lost {place} on GPU {number}"
            told = grant.read(self.node.config.run_dir, job)
            stands = told and (told.status, told.restart) == ("granted", known.restart)
            assert stands or not known.places, f"job {job}: {told}"
            if told and not self.touches(job):
                assert set(known.uuids) <= set(told.uuids), f"job {job} was told {told.uuids}, not {known.uuids}"

    def check_leaks(self) -> None:
        """After a reconcile, with all GPUs there."""
        state, device = self.node.state(), self.node.device()
        assert state.intents == []
        jobs = {a.run.job for a in state.allocations}
        assert {job for job, known in self.jobs.items() if known.places} <= jobs <= set(self.jobs)
        for allocation in state.allocations:
            known = self.jobs[allocation.run.job]
            assert [i.uuid for _, i in state.held(allocation)] == known.uuids
        owned = {generation for a in state.allocations for generation in a.instances}
        for number, gpu in enumerate(state.gpus):
            assert not gpu.fault and not gpu.doubt, gpu
            found = {i.placement: (i.gi, i.ci, i.uuid) for i in device.instances(gpu.uuid)}
            assert {i.placement: (i.gi, i.ci, i.uuid) for i in gpu.instances if i.trouble != "lost"} == found
            for i in gpu.instances:
                if i.generation in owned:
                    assert i.status == "busy"
                elif (gpu.uuid, i.uuid or "") in self.holders:
                    assert (i.status, i.trouble) == ("quarantined", "held")
                elif (number, i.gi) in self.strangers:
                    assert (i.status, i.trouble) == ("quarantined", "foreign")
                else:
                    assert i.status == "idle", i


def forget(job: Job, places: set[Place]) -> None:
    """Nobody knows any more that a job had these."""
    kept = [(p, u) for p, u in zip(job.places, job.uuids, strict=True) if p not in places]
    job.whole = job.whole and len(kept) == len(job.places)
    job.places, job.uuids = [p for p, _ in kept], [u for _, u in kept]
    job.lost -= places


def fits(known: geometry.Geometry, gpus: Sequence[tuple[Placement, ...]], wanted: tuple[str, ...]) -> bool:
    """Whether all of `wanted` can be placed, by trying."""
    order = sorted(wanted, key=lambda name: (-known.by_name[name].memory, name))
    return _fits(known.model, tuple(sorted(gpus)), tuple(order))


@lru_cache(maxsize=100_000)
def _fits(model: str, gpus: tuple[tuple[Placement, ...], ...], wanted: tuple[str, ...]) -> bool:
    if not wanted:
        return True
    profile = geometry.load(model).by_name[wanted[0]]
    for number, taken in enumerate(gpus):
        if sum(p.profile == profile.name for p in taken) >= profile.limit:
            continue
        if "+me" in profile.name and any("+me" in p.profile for p in taken):
            continue
        busy = {at for p in taken for at in range(p.start, p.start + p.size)}
        for start in profile.starts:
            if not busy & set(range(start, start + profile.memory)):
                more = tuple(sorted((*taken, Placement(profile.name, start, profile.memory))))
                if _fits(model, tuple(sorted((*gpus[:number], more, *gpus[number + 1 :]))), wanted[1:]):
                    return True
    return False


@contextmanager
def full(node: Node, step: int) -> Iterator[None]:
    """From its `step`-th write on the disk with state and grants is full: files can be made, and are cut short."""
    left = [step]
    ours: set[int] = set()
    real_open, real_write, real_close = os.open, os.write, os.close
    roots = (str(node.root / "state"), str(node.root / "run"))

    def opened(path: Any, flags: int, *more: Any, **options: Any) -> int:
        descriptor = real_open(path, flags, *more, **options)
        if str(path).startswith(roots) and not str(path).endswith(".lock"):
            ours.add(descriptor)
        else:
            ours.discard(descriptor)
        return descriptor

    def write(descriptor: int, data: Any) -> int:
        if descriptor in ours:
            left[0] -= 1
            if left[0] < 0:
                real_write(descriptor, bytes(data)[: len(data) // 2])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real_write(descriptor, data)

    def close(descriptor: int) -> None:
        ours.discard(descriptor)
        real_close(descriptor)

    os.open, os.write, os.close = opened, write, close
    try:
        yield
    finally:
        os.open, os.write, os.close = real_open, real_write, real_close


class Lock:
    """As much of filelock.FileLock as RMS uses, and much faster."""

    def __init__(self, path: str, on_acquired: Callable[[int], None] | None = None, **_: Any) -> None:
        self._path = path
        self._sign = on_acquired
        self._descriptor = -1

    def acquire(self, **_: Any) -> None:
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        if self._sign:
            self._sign(self._descriptor)

    def release(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process that holds an instance."""
    process.kill()
    process.wait()


@contextmanager
def quick(life: Callable[[], Life | None]) -> Iterator[None]:
    """A clock of the life's own, quick locks, no waiting for disks, and no patience with a busy GPU. Kills come between
    the calls of NVML too."""
    locks = filelock.FileLock, simulated.FileLock
    filelock.FileLock = simulated.FileLock = Lock
    kept = time.time, os.fsync, hardware.DESTROY_SECONDS, hardware.RETRY_SECONDS, test_crash.WORLD
    steps = ["nvmlDeviceCreateGpuInstanceWithPlacement", "nvmlGpuInstanceCreateComputeInstance"]
    steps += ["nvmlGpuInstanceDestroy", "nvmlComputeInstanceDestroy", "nvmlInit", "nvmlShutdown"]
    real = time.time
    time.time = lambda: known.now if (known := life()) else real()
    os.fsync = lambda _: None
    hardware.DESTROY_SECONDS, hardware.RETRY_SECONDS = 0.0, 0.001
    test_crash.WORLD = [*test_crash.WORLD, *((pynvml, step) for step in steps)]
    try:
        yield
    finally:
        filelock.FileLock, simulated.FileLock = locks
        time.time, os.fsync, hardware.DESTROY_SECONDS, hardware.RETRY_SECONDS, test_crash.WORLD = kept


def chaos(seed: int, seconds: float, operations: int, events: int = EVENTS, tell: Callable[[str], None] = print) -> int:
    """Lives with the seeds from `seed` on, until the time is over and so many operations were done. Returns how many.

    Raises AssertionError that says how the broken life can be played again.
    """
    began = time.monotonic()
    total: Counter[str] = Counter()
    mended: Counter[str] = Counter()
    life: Life | None = None
    lives = 0
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with quick(lambda: life):
        while time.monotonic() - began < seconds or total.total() < operations:
            root = Path(tempfile.mkdtemp(prefix="rms-chaos-", dir=parent))
            try:
                life = Life(root / "node", seed + lives)
                life.play(events)
            except Exception as error:
                story = " | ".join(life.story[-12:]) if life else ""
                log = " | ".join(life.node.log[-6:]) if life else ""
                raise AssertionError(
                    f"seed {seed + lives}, event {life.events.total() if life else 0} of {events}: "
                    f"{type(error).__name__}: {error}\n  {life.story[0] if life else ''}; {story}\n  log: {log}\n"
                    f"  again: make chaos SEED={seed + lives} MINUTES=0"
                ) from error
            finally:
                for process in life.holders.values() if life else ():
                    end(process)
                shutil.rmtree(root, ignore_errors=True)
            total += life.events
            mended.update(word for line in life.node.log for word in RECOVERIES if word in line)
            lives += 1
            if lives % 20 == 0:
                tell(f"{total.total()} operations in {lives} lives so far")
    taken = time.monotonic() - began
    tell(f"seed {seed}: {total.total()} operations in {lives} lives, {taken:.0f} s, no broken invariant")
    tell("events:     " + ", ".join(f"{name} {number}" for name, number in total.most_common()))
    tell("recoveries: " + ", ".join(f"{name!r} {number}" for name, number in mended.most_common()))
    return total.total()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Everything that can go wrong on a node, at random.")
    parser.add_argument("--minutes", type=float, default=1.0, help="at least so long (default: %(default)s)")
    parser.add_argument("--operations", type=int, default=1, help="at least so many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=int(time.time()), help="of the first life (default: the time)")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    try:
        chaos(options.seed, options.minutes * 60, options.operations, tell=partial(print, flush=True))
    except AssertionError as error:
        print(f"broken: {error}", file=sys.stderr)
        if os.environ.get("RMS_TRACEBACK"):
            raise
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
