#!/usr/bin/env python3
"""The local controller: gives a run of a job its MIG instances and takes them back. One transaction per call.

    controller.py acquire --job ID --restart N --uid UID --request SPEC [--submit EPOCH] [--limit MINUTES] [--json]
    controller.py release --job ID --restart N [--json]
    controller.py [--gpus N]            reads `acquire USER SPEC` and `release USER` from standard input (rms/loop.py)

A transaction has three phases: decide and save the intent (state lock), change the hardware (locks of the GPUs), save
the outcome (state lock). A killed process leaves an intent whose owner is dead; whoever comes next takes it over.
Exit codes: rms/errors.py.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar

from rms import config as configuration
from rms import demand, grant, hardware, inventory, planner
from rms.audit import Audit, basis, explain, picture
from rms.config import Config
from rms.device import Device, DeviceError
from rms.errors import ClosedRunError, LockTimeoutError, NodeError, NoRoomError, RequestError, RmsError, unheard
from rms.geometry import Placement
from rms.inventory import Allocation, Claim, Intent, Outcome, Owner, Run, State, Step, Survey
from rms.planner import Decision, View
from rms.request import MESSAGE, Request, parse, printable
from rms.store import Damaged, NeedlessError, Store

SKEW_SECONDS = 300
"""How far the clocks of node and slurmctld may be apart: munge takes no more either."""
BUDGET_SECONDS = 0.2
"""How long the policy may take to place one request, while the state is locked; then the built-in rule does. The
shipped model needs half a millisecond for an instance on 8 GPUs, and to make one takes the GPU longer than this."""
PAUSE_SECONDS = 0.1
"""Between two instances that are made ahead of time: who waits for a GPU's lock looks for it more often than that."""
LONG_SECONDS = 0.1
"""A look at a GPU that took longer is a look for all processes that have waited for it."""
BUSY_SECONDS = 0.5
"""How long a release waits to mend a GPU on which another process is at work: it may be making one instance after the
other there, and until an Epilog is over Slurm starts nothing on the node."""
TRIES = 2
"""How often one call tries the hardware of a GPU that fails before it leaves that GPU out."""

if TYPE_CHECKING:
    from rms.reconcile import Grants

T = TypeVar("T")


class Granted(NamedTuple):
    """An instance that a run has: its GPU's UUID and number in the config's order, its placement, its MIG UUID."""

    gpu: str
    number: int
    placement: Placement
    uuid: str


class Controller:
    """The controller of one node. `log` is told what an administrator should know. Raises RmsError and nothing else."""

    def __init__(
        self,
        config: Config,
        choose: planner.Choose = planner.built_in,
        log: Callable[[str], None] = lambda text: print(f"rms: {printable(text, MESSAGE)}", file=sys.stderr),
        rehearsal: bool = False,
    ) -> None:
        self.config = config
        self.audit = Audit(os.devnull if rehearsal else config.audit_log)
        self._choose = choose
        self._log = log
        self._boot_id = configuration.boot_id(config)
        self._deadline = time.monotonic() + config.deadline_seconds
        self._rehearsal = rehearsal
        self._store = Store(config.state_dir, self._deadline, rehearsal)
        self._owner = Owner.me()
        self._session: Device | None = None
        self._crowded: set[str] = set()  # GPUs that would not, and that a user's process has as a whole

    def acquire(
        self, run: Run, uid: int, spec: str, submit: int | None = None, limit: int | None = None
    ) -> list[Granted]:
        """Give `run` the instances that `spec` asks for, in its order; the same again if it has them already.

        `submit` is an epoch, `limit` minutes. Raises RequestError (can never be), NoRoomError (not now), ClosedRunError
        (the run was released, or a newer one exists), NodeError.
        """
        _check(run)
        self.audit.write("acquire", run=run, uid=uid, request=spec, submit=submit, limit=limit)
        try:
            return self._recovering(lambda: self._acquire(run, uid, spec, submit, limit))
        except NoRoomError:
            raise  # written where it was decided, with what was there
        except RmsError as error:
            self.audit.write("failed", run=run, error=str(error), code=error.code)
            raise

    def release(self, run: Run) -> None:
        """Take back what `run` has, and what older runs of its job have left.

        Right for a run that never had anything too: it gets nothing from now on. Raises NodeError.
        """
        _check(run)
        self._recovering(lambda: self._release(run))

    def look(self) -> None:
        """Mend what was left undone, and take in the GPUs after a reboot. Raises NodeError."""

        def look() -> None:
            with self._open("look"):
                pass

        self._recovering(look)

    def standing(self, run: Run) -> list[Run]:
        """The runs of a run's job that hold something. Raises NodeError."""

        def look() -> list[Run]:
            with self._open("look") as state:
                return [allocation.run for allocation in state.of_job(run)]

        return self._recovering(look)

    def reconcile(self, over: Callable[[Sequence[Run]], Iterable[Run]]) -> None:
        """Make the inventory agree with the GPUs, and with Slurm. What is found and done goes to `log`, a line each.

        `over` says which of some runs have ended. It is asked while no lock is held, and only of runs that had their
        instances before: one that begins meanwhile is not among them. In a rehearsal nothing is changed. Raises
        NodeError, also if no GPU can be used.
        """

        def settle() -> list[Run]:
            with self._open("reconcile", everything=True) as state:
                if all(gpu.fault for gpu in state.gpus):
                    raise NodeError("; ".join(f"GPU {gpu.uuid}: {gpu.fault}" for gpu in state.gpus))
                at_work = {intent.run for intent in state.intents}
                return [a.run for a in state.allocations if a.run not in at_work]

        standing = self._recovering(settle)
        ended = [run for run in standing if grant.ended(self.config.run_dir, run)]
        for run in (*ended, *over([run for run in standing if run not in ended])):
            self._report(f"run {run} is over: what it had is taken back")
            if not self._rehearsal:
                self.release(run)

    # Acquire.

    def _acquire(self, run: Run, uid: int, spec: str, submit: int | None, limit: int | None) -> list[Granted]:
        failures: dict[str, list[str]] = {}
        held: dict[int, float] = {}
        grant.directory(self.config.run_dir)  # before anything in it is believed, or anything is changed
        while True:
            with self._open("acquire") as state:
                if standing := self._granted_already(state, run, submit):
                    return standing
                older = self._over(state, run)
                busy = next((i for i in state.intents if i.run == (older or run)), None)
                planned = None
                if older is None and busy is None:
                    asked = parse(spec, next(iter(state.geometries.values())))
                    planned = self._plan(state, run, asked, limit, failures, held)
                if planned:
                    decisions, line = planned
                    if busy := inventory.prewarming(state, decisions):
                        busy.yielding = True
                        self._store.save(state)
                if planned and busy is None:
                    self.audit.write("decision", run=run, request=str(asked), **line)
                    for fault in dict.fromkeys(d.choice.fault for d in decisions if d.choice.fault):
                        self._log(fault)
                    allocation = Allocation(run, uid, str(asked), submit, limit, time.time(), self._boot_id, [])
                    intent = inventory.reserve(state, decisions, allocation, self._owner)
                    state.recent = [*state.recent, (float(submit or time.time()), str(asked), limit)]
                    state.recent = state.recent[-inventory.RECENT :]
                    steps = inventory.steps(state, intent)
                    ahead = inventory.ahead(state, intent)
                    self._store.save(state)
            if busy is not None:
                what = "a GPU that is being prewarmed" if busy.kind == "prewarm" else f"run {run}"
                self._wait(f"{what} is being worked on by process {busy.owner.pid}")
            elif older is not None:
                self._release(older)
            elif planned is None:
                time.sleep(hardware.RETRY_SECONDS)  # who holds what we could have may be about to end
            elif granted := self._fulfil(intent, uid, steps if self._pass(ahead, steps) else [], failures, held):
                return granted

    def _over(self, state: State, run: Run) -> Run | None:
        """A run to release before `run` is served: an older one of its job, or one whose Epilog began and died."""
        if older := next((a.run for a in state.of_job(run) if a.run.restart < run.restart), None):
            return older
        at_work = {intent.run for intent in state.intents}
        standing = (a.run for a in state.allocations if a.run not in at_work)
        return next((other for other in standing if grant.ended(self.config.run_dir, other)), None)

    def _granted_already(self, state: State, run: Run, submit: int | None) -> list[Granted] | None:
        """What the run has already. Raises ClosedRunError if it may not have anything any more."""
        if (closed := state.closed.get(run.job)) and run.restart <= closed[0]:
            if submit is None or submit < closed[1] + SKEW_SECONDS:
                raise ClosedRunError(f"run {run} was released already; nothing is granted to it")
            del state.closed[run.job]  # submitted after that: slurmctld has lost its state and counts anew
        if newer := next((a.run for a in state.of_job(run) if a.run.restart > run.restart), None):
            raise ClosedRunError(f"run {run} is over: {newer} runs here; nothing is granted to it")
        if (left := grant.read(self.config.run_dir, run.job)) and left.restart > run.restart:
            raise ClosedRunError(f"run {run} is over: run {run.job}.{left.restart} was here; nothing is granted to it")
        allocation = state.of_run(run)
        return self._give(state, allocation) if allocation and allocation.granted else None

    def _give(self, state: State, allocation: Allocation) -> list[Granted]:
        """Leave the job's grant and say what is in it."""
        numbers = {gpu.uuid: number for number, gpu in enumerate(state.gpus)}
        if len(state.held(allocation)) < len(parse(allocation.request, next(iter(state.geometries.values()))).profiles):
            raise NodeError(f"run {allocation.run} has instances on a GPU that does not answer")
        granted = [
            Granted(gpu.uuid, numbers[gpu.uuid], instance.placement, instance.uuid or "")
            for gpu, instance in state.held(allocation)
        ]
        uuids = [instance.uuid for instance in granted]
        grant.give(self.config.run_dir, allocation.run, allocation.uid, allocation.request, uuids)
        return granted

    def _plan(
        self,
        state: State,
        run: Run,
        asked: Request,
        limit: int | None,
        failures: Mapping[str, Sequence[str]],
        held: Mapping[int, float],
    ) -> tuple[list[Decision], dict[str, Any]] | None:
        """The decisions for a request, and what the audit log says of them. None where there is no other place than one
        that this call has found held, and it may wait for that; `held` says of such instances until when."""
        now = time.time()
        view = inventory.view(state, now)
        left = {gpu.uuid for gpu in state.gpus if gpu.left}
        empty = [planner.GpuView(gpu.uuid, gpu.geometry) for gpu in view.gpus if gpu.uuid not in left]
        if not planner.fits(view._replace(gpus=tuple(empty)), asked):
            raise RequestError(f"{asked} is more than the {len(empty)} GPUs of this node hold when empty")
        faults = {gpu.uuid: gpu.fault for gpu in state.gpus if gpu.fault and not gpu.left}
        faults |= {uuid: texts[-1] for uuid, texts in failures.items() if len(texts) >= TRIES and uuid not in left}
        out_of_order = "; ".join(f"GPU {uuid}: {fault}" for uuid, fault in faults.items())
        if len(faults) == len(empty) and not self._crowded & faults.keys():
            raise NodeError(out_of_order)
        view = view._replace(gpus=tuple(gpu.without_room() if gpu.uuid in faults else gpu for gpu in view.gpus))
        end = now + limit * 60 if limit else None
        view = view._replace(until=time.monotonic() + BUDGET_SECONDS)
        decisions = None
        if told := demand.load(self.config.state_dir, now):
            geometry = view.gpus[0].geometry
            view = view._replace(pending=told.pending(geometry))
            if kept := _kept(state, view, told, asked):
                beside = planner.beside(view, kept, end)
                if decisions := planner.plan(beside, asked, end, self._choose):
                    view = beside
        # A job that slurmctld has let in before it knew what is to be kept is not sent back for that.
        decisions = decisions or planner.plan(view, asked, end, self._choose)
        if decisions is None and any(
            i.trouble == "held" and time.monotonic() < held.get(i.generation, 0.0)
            for gpu in state.gpus
            for i in gpu.instances
        ):
            return None
        if decisions is None:
            grant.refuse(self.config.run_dir, run)
            self.audit.write("refused", run=run, request=str(asked), gpus=picture(view))
            raise NoRoomError(f"no room for {asked} now" + (f" ({out_of_order})" if faults else ""))
        known = {"gpus": picture(view), "basis": basis(decisions), "instances": explain(decisions, view)}
        return decisions, {"now": now, "end": end, **known}

    def _pass(self, ahead: Sequence[Intent], steps: Sequence[Step]) -> bool:
        """Wait until others have removed what is in our way. False if one of them died over it."""
        left = list(ahead)
        while left:
            if not all(other.owner.alive() for other in left):
                return False
            for gpu in sorted({step.gpu for step in steps}):
                with self._store.hardware([gpu], "acquire"):
                    pass  # they hold it while they remove: to look at the state again and again would keep it from them
            there = {other.number for other in self._store.glance().intents}
            if all(other.number in there for other in left):
                self._wait(f"process {left[0].owner.pid} is removing instances")
            left = [other for other in left if other.number in there]
        return True

    def _fulfil(
        self, intent: Intent, uid: int, steps: Sequence[Step], failures: dict[str, list[str]], held: dict[int, float]
    ) -> list[Granted] | None:
        """Phases 2 and 3. None if the hardware would not: the inventory knows why, and another plan may do. `failures`
        and `held` are told what failed, and what is held."""
        with self._store.hardware([step.gpu for step in steps], f"run {intent.run}"):
            if not any(i.number == intent.number for i in self._store.glance().intents):
                return None  # the state was lost and recovered before we had the locks: others may plan with our slices
            outcomes, broken = hardware.change(
                self._device, steps, uid, self._deadline, lambda **done: self.audit.write(run=intent.run, **done)
            )
            for gpu in broken:
                if pids := hardware.intruders(self._device, gpu):  # no user's process may drain the node
                    self._crowded.add(gpu)
                    broken[gpu] += f"; process {', '.join(map(str, pids))} has the whole GPU"
            with self._store.open("acquire") as state:
                current = next((i for i in state.intents if i.number == intent.number), None)
                allocation = state.of_run(intent.run)
                if current is None or allocation is None:
                    return None  # the state was lost and recovered meanwhile, and what we made was adopted
                prewarmed = sum(instance.prewarmed for _, instance in state.held(allocation))
                complete = not broken and len(outcomes) == len(steps) > 0 and not any(o.trouble for o in outcomes)
                inventory.conclude(state, current, outcomes, broken, time.time(), granted=complete)
                self._store.save(state)
                granted = self._give(state, allocation) if complete else None
        self._tell(outcomes, broken)
        for gpu, fault in broken.items():
            failures.setdefault(gpu, []).append(fault)
        until = min(held.values(), default=self._patience())
        held |= {outcome.generation: until for outcome in outcomes if outcome.trouble == "held"}
        if granted:
            self.audit.write("granted", run=intent.run, instances=granted, prewarmed=prewarmed)
        return granted

    # Release.

    def _release(self, run: Run) -> None:
        self.audit.write("release", run=run)
        while True:
            with self._open("release", waits=False) as state:
                state.close(run, time.time())
                # The grant goes first: one left by a release that died would give a recovery an owner who is gone.
                self._forget(run, grant.end)
                older = next((a.run for a in state.of_job(run) if a.run.restart < run.restart), None)
                busy = next((i for i in state.intents if i.run == run), None)
                if older is None and busy is None:
                    allocation = state.of_run(run)
                    intent = inventory.begin_release(state, allocation, self._owner) if allocation else None
                    steps = inventory.steps(state, intent) if intent else []
                self._store.save(state)
            if older is not None:
                self._release(older)  # its own Epilog never came
            elif busy is not None:
                # A Prolog outlives its slurmd, and the Epilog does not wait for it.
                self._wait(f"run {run} is being worked on by process {busy.owner.pid}")
            else:
                break
        if intent is None:
            self._forget(run)
            return
        outcomes, broken = self._let_go(steps)
        with self._store.open("release") as state:
            if current := next((i for i in state.intents if i.number == intent.number), None):
                inventory.conclude(state, current, outcomes, broken, time.time(), granted=False)
                self._store.save(state)
        self._forget(run)  # only now: as long as it says that the run has ended, the next call will release it
        self._tell(outcomes, broken)
        self.audit.write("released", run=run, instances=outcomes)

    def _forget(self, run: Run, how: Callable[[str, Run], None] = grant.remove) -> None:
        if self._rehearsal:
            return
        try:
            how(self.config.run_dir, run)
        except NodeError as error:  # the instances are taken back all the same; the next acquire will stop at it
            self._report(str(error))

    def _let_go(self, steps: Sequence[Step]) -> tuple[list[Outcome], dict[str, str]]:
        """Phase 2 of a release: wait, without a lock, until no process holds the instances or patience ends."""
        until = self._patience()
        while True:
            with self._store.hardware([step.gpu for step in steps], "release"):
                outcomes, broken = hardware.look(self._device, steps)
            if broken or not any(outcome.trouble for outcome in outcomes) or time.monotonic() > until:
                return outcomes, broken
            time.sleep(hardware.RETRY_SECONDS)

    def _patience(self) -> float:
        """Until when to wait for who holds an instance: half of the time that is left at most, the rest is for what
        follows."""
        now = time.monotonic()
        return now + min(self.config.holder_seconds, (self._deadline - now) / 2)

    def _tell(self, outcomes: Sequence[Outcome], broken: Mapping[str, str]) -> None:
        for outcome in outcomes:
            if outcome.trouble and outcome.uuid:
                self._report(f"instance {outcome.uuid} is quarantined: {outcome.note}")
        for gpu, fault in broken.items():
            self._report(f"GPU {gpu}: {fault}")

    # Ahead of time.

    def prewarm(self, wish: inventory.Wish) -> int:
        """Make what the policy wishes for, one instance after the other, until all is there or somebody else needs the
        GPU. Does nothing where another process is at it. Returns how many were made. Raises NodeError."""
        made = 0

        def work() -> None:
            nonlocal made
            while self._prewarm(wish):
                made += 1
                time.sleep(PAUSE_SECONDS)

        with suppress(LockTimeoutError), Store(self.config.state_dir, time.monotonic()).prewarming():
            self._recovering(work)
        return made

    def _prewarm(self, wish: inventory.Wish) -> bool:
        """Make one instance, and remove what is in its way. Whether that was done and there may be more."""
        with self._open("prewarm") as state:
            now = time.time()
            view = inventory.view(state, now)
            if told := demand.load(self.config.state_dir, now):
                view = view._replace(pending=told.pending(view.gpus[0].geometry))
            late = time.monotonic() > self._deadline
            intent = None if late else inventory.begin_prewarm(state, view, wish, self._owner)
            if intent is None:
                return False
            steps = inventory.steps(state, intent)
            self._store.save(state)
        number = intent.number

        def wanted() -> bool:
            return any(i.number == number and not i.yielding for i in self._store.glance().intents)

        def told_of(event: str, **done: Any) -> None:
            self.audit.write("prewarm", did=event, **done)

        with self._store.hardware([step.gpu for step in steps], "prewarm"):
            outcomes, broken = hardware.change(self._device, steps, None, self._deadline, told_of, wanted)
            with self._store.open("prewarm") as state:
                current = next((i for i in state.intents if i.number == number), None)
                if current is None:
                    return False  # the state was lost and recovered meanwhile, and what we made was adopted
                inventory.conclude(state, current, outcomes, broken, time.time(), granted=False)
                self._store.save(state)
        self._tell(outcomes, broken)
        return len(outcomes) == len(steps) and not (current.yielding or broken or any(o.trouble for o in outcomes))

    # Before a decision: the inventory must be known, and true.

    @contextmanager
    def _open(self, what: str, everything: bool = False, waits: bool = True) -> Iterator[State]:
        """The state with its lock held, after whatever others have left undone has been mended.

        With `everything` all GPUs are compared with their records first, also what is not due yet. Without `waits` none
        is on which another process is at work, unless a dead one has left something there: right for who plans nothing.
        """
        mended = named = False
        while True:
            with self._store.open(what) as state:
                if not state.boot_id:
                    raise Damaged("first start here, or the state is gone", state)
                stale = self._stale(state)
                nameless = not named and inventory.nameless(state, time.time(), everything)
                known = not stale and not nameless
                claim = inventory.claim(state, self._owner, time.time(), everything) if known and not mended else None
                if known and claim is None:
                    yield state
                    return
                self._store.save(state)
            if stale:
                self._discover()
            elif claim is None:
                named = True
                with suppress(NodeError):  # it still does not tell, and no other GPU does just now
                    self._discover()
            else:
                self._mend(claim, everything, waits)
                mended = True

    def _stale(self, state: State) -> bool:
        """Whether the GPUs must be taken in anew: after a reboot or a change of the configuration."""
        if state.boot_id != self._boot_id or state.managed != list(self.config.gpus):
            return True
        return any(gpu.left and not inventory.in_use(state, gpu) for gpu in state.gpus)

    def _discover(self) -> None:
        """Take in the GPUs after a reboot or a change of the configuration, unless another process just has."""
        from rms import reconcile

        found = self._asked(self._device.geometry)
        with self._store.open("discover") as state:
            if not self._stale(state) and not inventory.nameless(state, time.time(), everything=True):
                return  # to do it again would put the GPUs in doubt on which others are at work by now
            if state.boot_id != self._boot_id:
                self._report("this node has booted: instances and allocations from before are gone")
                for run, *_ in self._grants().values():
                    self._forget(run)
            reconcile.discover(state, self._boot_id, self.config.gpus, found, time.time())
            self._store.save(state)

    def _mend(self, claim: Claim, everything: bool, waits: bool) -> None:
        """Compare GPUs with their records: what dead processes left, what is in doubt, what is quarantined."""
        since = time.monotonic()
        for gpu in claim.gpus:
            with suppress(NeedlessError):
                self._compare(gpu, claim, everything, since, inf if waits else time.monotonic() + BUSY_SECONDS)
        if claim.intents:
            self._report(f"took over {len(claim.intents)} unfinished change(s) of processes that are gone")

    def _compare(self, gpu: str, claim: Claim, everything: bool, since: float, until: float) -> None:
        """Compare one GPU of a claim. Not where another process has mended it while we waited for its lock, nor where
        one has had a long look at it that began after `since`; nor where its lock is not to be had by `until`
        (time.monotonic), unless what is to be mended is ours to do. Raises NeedlessError."""
        from rms import reconcile

        def needless() -> bool:
            known = next((g for g in self._store.glance().gpus if g.uuid == gpu), None)
            if known is None:
                return True  # taken out of the configuration
            theirs = any(i.intent in claim.intents for i in known.instances)
            seen = known.looked > since and not known.doubt
            if (seen or time.monotonic() > until) and not theirs:
                return True
            return not inventory.to_mend(known, claim.intents, time.time(), everything)

        with self._store.hardware([gpu], "mend", needless):
            survey: Survey | str
            began = time.monotonic()
            try:
                survey = hardware.survey(self._device, gpu, claim, self._rehearsal)
            except DeviceError as error:
                survey = str(error)
            with self._store.open("mend") as state:
                record = next((g for g in state.gpus if g.uuid == gpu), None)
                if record is None:
                    return  # taken out of the configuration meanwhile
                before, lost = record.fault, reconcile.lost(state)
                told = reconcile.mend(state, record, survey, claim.intents, self._grants(), time.time())
                told += hardware.fence_all(self._device, state, record, before, self._rehearsal)
                lost = reconcile.lost(state) - lost
                if time.monotonic() - began > LONG_SECONDS:
                    record.looked = began
                self._store.save(state)
        for line in told:
            self._report(line)
        for run, where, placement in sorted(lost):
            self.audit.write("lost", run=run, gpu=where, placement=str(placement))

    def _recovering(self, work: Callable[[], T]) -> T:
        """Do `work`, rebuilding the state first where it is lost or damaged."""
        try:
            while True:
                try:
                    return work()
                except Damaged as damaged:
                    self._recover(damaged)
        finally:
            if self._session is not None:
                with suppress(DeviceError):  # the work is done, or has failed with an error of its own
                    self._session.close()
                self._session = None
            if self.audit.fault:
                self._log(self.audit.fault)

    def _recover(self, damaged: Damaged) -> None:
        """Rebuild the state from the GPUs and the grants. Of the processes that find it damaged one does; the others
        wait for that alone, and not for what it makes on the GPUs next."""
        from rms import reconcile

        with self._store.recovering():
            with suppress(Damaged):
                if self._store.glance().boot_id:
                    return
            gpus = self._managed()
            with self._store.hardware(gpus, "recover"):
                surveys = self._asked(lambda gpu: hardware.survey(self._device, gpu))
                with self._store.rebuild("recover") as state:
                    grants = self._grants()
                    told = reconcile.recover(state, self._boot_id, self.config.gpus, surveys, grants, time.time())
                    for record in state.gpus:
                        told += hardware.fence_all(self._device, state, record, record.fault, self._rehearsal)
                    # A UUID comes back for others, who must not be robbed of it at the next recovery.
                    for run, uid, request, uuids in grants.values():
                        allocation = state.of_run(run)
                        held = [i.uuid or "" for _, i in state.held(allocation)] if allocation else []
                        if allocation is None:
                            self._forget(run)
                        elif held != list(uuids) and not self._rehearsal and not any(gpu.fault for gpu in state.gpus):
                            grant.give(self.config.run_dir, run, uid, request, held)
                    self._store.save(state)
        for line in (*told, f"{damaged}: rebuilt from {len(gpus)} GPUs and {len(grants)} grants"):
            self._report(line)

    def _grants(self) -> Grants:
        return {
            job: (Run(g.cluster, job, g.restart), g.uid, g.request, g.uuids)
            for job, g in grant.granted(self.config.run_dir).items()
        }

    @property
    def _device(self) -> Device:
        """The session with the driver, opened when the hardware is first needed."""
        if self._session is None:
            self._session = hardware.open_device(self.config, self._boot_id)
        return self._session

    def _asked(self, question: Callable[[str], T]) -> dict[str, T | str]:
        """Every GPU's answer, or why it has none. Raises NodeError if none of them answers."""
        answers: dict[str, T | str] = {}
        for gpu in self._managed():
            try:
                answers[gpu] = question(gpu)
            except DeviceError as error:
                answers[gpu] = str(error)
        if all(isinstance(answer, str) for answer in answers.values()):
            raise NodeError("; ".join(f"GPU {gpu}: {fault}" for gpu, fault in answers.items()))
        return answers

    def _managed(self) -> Sequence[str]:
        try:
            return self._device.gpus()
        except DeviceError as error:
            raise NodeError(f"cannot list the GPUs: {error}") from error

    def _wait(self, why: str) -> None:
        if time.monotonic() > self._deadline:
            raise NodeError(f"{why}, for longer than {self.config.deadline_seconds:g} s")
        time.sleep(hardware.RETRY_SECONDS)

    def _report(self, text: str) -> None:
        self.audit.write("warning", text=text)
        self._log(text)


def _check(run: Run) -> None:
    # The grant is a line of words.
    if not (0 < len(run.cluster) <= 64 and all(c.isascii() and (c.isalnum() or c in "._-") for c in run.cluster)):
        raise NodeError(f"cluster name {printable(run.cluster)!r} is not made of letters, digits, '.', '_' and '-'")


def _kept(state: State, view: View, told: demand.Told, asked: Request) -> planner.Kept | None:
    """What is kept from `asked` for another job: nothing if that asks for the same, since they come in their order, or
    if it is here already."""
    if told.keep and all(a.run.job != told.job for a in state.allocations):
        with suppress(RequestError):
            wanted = parse(told.keep, view.gpus[0].geometry)
            if sorted(wanted.items) != sorted(asked.items):
                return planner.first_room(view, wanted)
    return None


def choose(view: View, asked: planner.Asked, candidates: Sequence[planner.Candidate], site: str = "") -> planner.Choice:
    """The policy that this controller asks: the one place where it is chosen. The planner's rule stands in for it.

    `site` is where a node may have models of its own (`Config.policy_dir`).
    """
    from policy import model

    return model.choose(view, asked, candidates, site)


def wish(view: View, gpu: int, site: str = "") -> Sequence[Placement]:
    """What the policy would have idle on a GPU, by its number in the view: the same policy that `choose` asks."""
    from policy import model

    return model.wish(view, gpu, site)


def chooser(config: Config) -> planner.Choose:
    """The policy with the models of this node's site."""
    return partial(choose, site=config.policy_dir)


def main(arguments: Sequence[str]) -> int:
    """The command line. Returns the exit code."""
    import argparse
    import json

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"rms: {printable(message, MESSAGE)}; controller.py --help tells more\n")

    parser = Parser(prog="controller.py", description="Gives runs of jobs their MIG instances.")
    parser.add_argument("--gpus", type=_whole, metavar="N", help="standard-input mode: provision at most N GPUs")
    verbs = parser.add_subparsers(dest="verb", prog="controller.py")  # asked for it, argparse would import shutil
    acquire = verbs.add_parser("acquire", help="give a run its instances")
    release = verbs.add_parser("release", help="take a run's instances back")
    for verb in (acquire, release):
        verb.add_argument("--job", type=_whole, required=True, metavar="ID")
        verb.add_argument("--restart", type=_whole, required=True, metavar="N")
        verb.add_argument("--cluster", default="cluster", metavar="NAME")
        verb.add_argument("--json", action="store_true", help="answer as one JSON object")
    acquire.add_argument("--uid", type=_uid, required=True)
    acquire.add_argument("--request", required=True, metavar="SPEC", help="such as 3g.40gb:1,1g.10gb:2")
    acquire.add_argument("--submit", type=_whole, metavar="EPOCH")
    acquire.add_argument("--limit", type=_whole, metavar="MINUTES")
    options = parser.parse_args(arguments)

    if options.verb is None:
        from rms import loop

        # A user's name may be any bytes but spaces and line feeds; it is only compared.
        with open(sys.stdin.fileno(), encoding="utf-8", errors="surrogateescape", newline="\n", closefd=False) as lines:
            return loop.run(lines, sys.stdout, choose, options.gpus)
    try:
        path = os.environ.get("RMS_CONFIG", configuration.DEFAULT_PATH)
        settings = configuration.load(path, configuration.node_name())
        controller = Controller(settings, chooser(settings))
        run = Run(options.cluster, options.job, options.restart)
        if options.verb == "release":
            controller.release(run)
            granted = []
        else:
            granted = controller.acquire(run, options.uid, options.request, options.submit, options.limit)
    except RmsError as error:
        return _fail(str(error), error.code, options.json)
    except Exception as error:  # a fault of RMS itself
        return _fail(f"internal error: {type(error).__name__}: {error}", RmsError.code, options.json)
    if options.json:
        instances = [{**g._asdict(), "placement": g.placement._asdict()} for g in granted]
        return _answer(json.dumps({"schema": 1, "run": str(run), "instances": instances}) + "\n", 0)
    return _answer("".join(f"{g.uuid} {g.number} {g.placement}\n" for g in granted), 0)


def _answer(text: str, code: int) -> int:
    try:
        print(text, end="", flush=True)
    except OSError as error:
        return unheard(error)
    return code


def _fail(text: str, code: int, as_json: bool) -> int:
    if as_json:
        import json

        return _answer(json.dumps({"schema": 1, "error": text, "code": code}) + "\n", code)
    print(f"rms: {printable(text, MESSAGE)}", file=sys.stderr)
    return code


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{printable(text)!r} is not a whole number")
    return int(text)


def _uid(text: str) -> int:
    if _whole(text) >= 2**32 - 1:  # that one is nobody's, and more an access list can't hold
        from argparse import ArgumentTypeError

        raise ArgumentTypeError(f"{printable(text)!r} is not a whole number that can be a uid")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
