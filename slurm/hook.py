"""The Prolog and the Epilog of a job that asks for MIG: `python -I -m slurm.hook prolog|epilog CONFIG SLURM_CONF`.

With the verb `prewarm` it is what an Epilog leaves behind: a process that makes instances ahead of time.

Called by the shell scripts beside this file, as root, with slurmd's environment. Whose fault it was decides what
happens: no room is nobody's (the job goes back to the queue), a request that can't be is the user's (the job is
cancelled with a message), everything else is the node's (it is drained, the job is requeued). The exit code is 0 in
all three; where slurmctld can't be told, the shell part makes Slurm itself drain the node and hold the job.
"""

from __future__ import annotations

import os
import sys
import syslog
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import controller
from rms import config as configuration
from rms import grant, inventory, planner, sent_back
from rms.audit import Audit
from rms.config import Config
from rms.errors import ClosedRunError, NodeError, NoRoomError, RequestError, RmsError
from rms.inventory import Run
from rms.request import Ticket, parse, parse_comment, printable
from rms.sent_back import SentBack
from rms.store import Damaged, Store

if TYPE_CHECKING:
    from slurm.publish import Publisher
    from slurm.slurmctld import Job, Slurmctld

UNTOLD = 75
"""Exit code when slurmctld can't be told what to do (EX_TEMPFAIL). Not 1, with which Python ends when it is broken."""
RETRY_SECONDS = 30
"""How soon a job without room is tried again, where Slurm allows it; it is woken sooner where room has been made."""
REMEMBERED_SECONDS = 90
"""For how long a job without room is remembered, and its room kept."""
WAKE_SECONDS = 3.0
"""How long an Epilog waits for an answer when it wakes a job, and asks about those that are to be forgotten."""
ELSEWHERE_SECONDS = 5
"""How soon a job may start on another node: later than the Epilog here ends, or Slurm makes it a credential's life."""
PUBLISH_SECONDS = 3.0
"""How long an Epilog waits until slurmctld knows what fits now."""
POLL_SECONDS = 1.0
"""How often a waiting Prolog looks for room, and whether its job still exists."""


class Hook(NamedTuple):
    """What slurmd tells a hook. `asks` is what the job must find published on its node."""

    node: str
    run: Run
    uid: int
    comment: str
    asks: str = ""

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Hook:
        """Raises NodeError where slurmd's variables are missing or make no sense."""

        def number(name: str, default: str | None = None) -> int:
            text = environment.get(name, default) or ""
            if not (text.isascii() and text.isdigit() and len(text) < 11):
                raise NodeError(f"{name} is '{printable(text)}', not a number: is this run by slurmd?")
            return int(text)

        run = Run(
            environment.get("SLURM_CLUSTER_NAME", "") or "cluster",
            number("SLURM_JOB_ID"),
            number("SLURM_JOB_RESTART_COUNT", "0"),
        )
        asks = " ".join(environment.get(name, "") for name in ("SLURM_JOB_CONSTRAINTS", "SLURM_JOB_EXTRA"))
        comment = environment.get("SLURM_JOB_COMMENT", "")
        return cls(configuration.node_name(), run, number("SLURM_JOB_UID"), comment, asks)


class Log:
    """One line to syslog, and to the file that the configuration names."""

    def __init__(self, verb: str) -> None:
        self.path = ""
        self._verb = verb
        self._job = "-"

    def about(self, run: Run) -> None:
        """Whose lines the following are."""
        self._job = str(run)

    def __call__(self, text: str) -> None:
        line = f"{self._verb}: job {self._job}: {printable(text, 900)}"
        syslog.syslog(syslog.LOG_NOTICE, line)
        if self.path:
            with suppress(OSError), open(self.path, "a", encoding="utf-8", opener=_unlinked) as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")


def _unlinked(path: str, flags: int) -> int:
    # A site may have put the file where users write: no link is followed, and a FIFO not waited for.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)


def prolog(hook: Hook, config: Config, slurm_conf: str, log: Log) -> int:
    """Give the job its instances, or see to it that it does not run. Returns the exit code. Raises RmsError."""
    began = time.monotonic()
    ticket = parse_comment(hook.comment)
    if ticket is None:
        raise RequestError("the job has no MIG request")  # the shell part sends no such job here
    if not os.path.lexists(left := os.path.join(grant.directory(config.run_dir), str(hook.run.job))):
        grant.refuse(config.run_dir, hook.run)  # says so where nothing can be written there
        # The TaskProlog would look elsewhere for the grant, and send the job back each time.
        raise NodeError(
            f"the Prolog's shell part left no {left}: if run_dir in rms.toml was changed, "
            "write the hooks again with `rms slurm-config`"
        )
    try:
        granted = _acquire(hook, config, ticket, log)
    except NoRoomError as error:
        from slurm.publish import PREFIX

        named = PREFIX in hook.asks
        Audit(config.audit_log).write("misplaced", run=hook.run, request=ticket.request, named=named)
        if publisher := _publisher(hook, config, slurm_conf, log):
            publisher.anew()  # slurmctld was wrong about this node, or has let in a job that did not ask
        waited = _refuse(hook, config, ticket, slurm_conf, log, str(error))
        if isinstance(waited, int):
            return waited
        granted = waited
    _forget(hook, config)
    if publisher := _publisher(hook, config, slurm_conf, log):
        publisher.job_came()
    places = ", ".join(f"GPU {g.number} {g.placement} {g.uuid}" for g in granted)
    log(f"granted {ticket.request} in {time.monotonic() - began:.3f} s: {places}")
    return 0


def epilog(hook: Hook, config: Config, slurm_conf: str, log: Log) -> int:
    """Take back what the job has, if anything. Returns the exit code. Raises RmsError."""
    began = time.monotonic()
    local = controller.Controller(config, log=log)
    for run in _ending(hook, config, local):
        local.release(run)
        log(f"released run {run} in {time.monotonic() - began:.3f} s")
    publisher = _publisher(hook, config, slurm_conf, log)
    if publisher and not publisher.job_went(PUBLISH_SECONDS):
        log("what fits is not published yet; it is tried on in the background")
    _wake(config, slurm_conf, log)
    return 0


def prewarm(config: Config, log: Log) -> int:
    """Make what the policy expects to be asked for. Returns the exit code. Raises RmsError."""
    began = time.monotonic()
    made = controller.Controller(config, log=log).prewarm(partial(controller.wish, site=config.policy_dir))
    if made:
        log(f"{made} instances made ahead of time, in {time.monotonic() - began:.3f} s")
    return 0


def _leave_behind(arguments: Sequence[str], log: Log) -> None:
    """Start `prewarm` as a process that has nothing of the Epilog's: slurmd waits neither for it nor for what it has
    open, and does not end it with the Epilog."""
    null = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_RDWR, 0) for descriptor in (0, 1, 2)]
    command = [sys.executable, "-I", "-m", "slurm.hook", "prewarm", *arguments]
    try:
        os.posix_spawn(sys.executable, command, os.environ, file_actions=null, setsid=True)
    except OSError as error:
        log(f"cannot prewarm: no process: {error.strerror}")


def _publisher(hook: Hook, config: Config, slurm_conf: str, log: Log) -> Publisher | None:
    """Who tells slurmctld what fits; None where it is not told."""
    if config.admission == "sums":
        return None
    from slurm.publish import Publisher

    return Publisher(config, slurm_conf, hook.node, log)


def _ending(hook: Hook, config: Config, local: controller.Controller) -> list[Run]:
    """The run that this Epilog ends. The restart count that slurmd tells is not it: after a requeue (by anybody) the
    Epilog of run N is told N + 1, as seen on 22.05.8. What the run's own Prolog has left is right."""
    if left := grant.read(config.run_dir, hook.run.job):
        return [hook.run._replace(restart=left.restart)]
    return [run for run in local.standing(hook.run) if run.restart <= hook.run.restart]


def _acquire(hook: Hook, config: Config, ticket: Ticket, log: Log) -> list[controller.Granted]:
    local = controller.Controller(config, controller.chooser(config), log)
    return local.acquire(hook.run, hook.uid, ticket.request, ticket.submit, ticket.limit)


def _refuse(
    hook: Hook, config: Config, ticket: Ticket, slurm_conf: str, log: Log, why: str
) -> list[controller.Granted] | int:
    """No room: back to the queue with a batch job. Who can't be requeued waits here for a while.

    Returns what the job was given after all, or the exit code.
    """
    from slurm.slurmctld import HOOKS_SECONDS, SilentError, Slurmctld, SlurmError

    slurmctld = Slurmctld(slurm_conf)
    until = time.monotonic() + config.interactive_wait_seconds
    silent = False
    may = True
    while True:
        fault = ""
        job: Job | None = None
        try:
            job = _job(slurmctld, hook)
            if job is None:
                log(f"{why}; the job is gone")
                return 0
            may = may and job.requeue  # an attempt before this one may have left it allowed
            job = job._replace(requeue=may)
            if job.batch:
                life = slurmctld.credential_seconds()
                _requeue(slurmctld, job, RETRY_SECONDS if life is None else life + HOOKS_SECONDS, log, why)
                if life is None:
                    _remember(hook, config, ticket, slurmctld, job.name)
                return 0
        except SilentError as error:
            # To end now would have this node drained and the job held as soon as slurmctld is back.
            if not silent:
                log(f"{why}; waiting for slurmctld: {error}")
            silent = True
            until = time.monotonic() + config.interactive_wait_seconds
        except SlurmError as error:
            fault = str(error)
        if time.monotonic() > until:
            break
        time.sleep(POLL_SECONDS)
        with suppress(NoRoomError):
            return _acquire(hook, config, ticket, log)
    if fault or job is None:
        log(f"{why}, and slurmctld can't be told: {fault}")
        return UNTOLD
    log(f"{why} in {config.interactive_wait_seconds:g} s; cancelled, since only batch jobs can wait in the queue")
    with suppress(SlurmError):  # it has just ended by itself; and without a grant nothing of it would run
        slurmctld.cancel(job, f"rms: {why} on {hook.node}; try again later, or use sbatch, which waits in the queue")
    return 0


def _job(slurmctld: Slurmctld, hook: Hook) -> Job | None:
    return slurmctld.job(hook.run.job, hook.run.restart, hook.node)


def _requeue(slurmctld: Slurmctld, job: Job, delay: int, log: Log, why: str) -> None:
    slurmctld.requeue(job, delay)
    log(f"{why}; requeued, to start in {delay} s at the earliest")
    # The order to end reaches slurmd a moment after the command: until then this Prolog must not end.
    time.sleep(1)


def _remember(hook: Hook, config: Config, ticket: Ticket, slurmctld: Slurmctld, name: str) -> None:
    """Note a job that was sent back, with its place in line."""
    from slurm.slurmctld import SlurmError

    with suppress(SlurmError, OSError, RmsError):  # it comes back by itself at its start time
        start = slurmctld.comes_back(name)
        if start is None:
            return
        now = time.time()
        one = SentBack(hook.run.job, name, ticket.request, ticket.submit, start, now + REMEMBERED_SECONDS)
        with Store(config.state_dir, time.monotonic() + WAKE_SECONDS).sending_back():
            others = [other for other in sent_back.load(config.state_dir, now) if other.job != one.job]
            sent_back.save(config.state_dir, sorted([*others, one], key=lambda other: (other.submit, other.job)))


def _forget(hook: Hook, config: Config) -> None:
    """A job that has what it was sent back for waits no more: neither is room kept for it, nor can it be woken."""
    if any(one.job == hook.run.job for one in sent_back.load(config.state_dir, time.time())):
        with suppress(OSError, RmsError), Store(config.state_dir, time.monotonic() + WAKE_SECONDS).sending_back():
            waiting = sent_back.load(config.state_dir, time.time())
            sent_back.save(config.state_dir, [one for one in waiting if one.job != hook.run.job])


def _wake(config: Config, slurm_conf: str, log: Log) -> None:
    """Wake the first job in line, if there is room for it by now. One that was held, changed, or has started meanwhile
    is forgotten: what its user has done counts."""
    now = time.time()
    waiting = sent_back.load(config.state_dir, now)
    if not waiting:
        return
    from slurm.slurmctld import Slurmctld, SlurmError

    slurmctld = Slurmctld(slurm_conf, WAKE_SECONDS)
    until = time.monotonic() + WAKE_SECONDS
    store = Store(config.state_dir, until)
    over: list[SentBack] = []
    try:
        state = store.glance()
        for one in waiting:  # without the lock: each question may take as long as slurmctld does
            if slurmctld.comes_back(one.name) == one.start:
                if planner.fits(inventory.view(state, now), parse(one.request, next(iter(state.geometries.values())))):
                    slurmctld.wake(one.name)
                    log(f"there is room for {one.request}: woke job {one.name}")
                break
            over.append(one)
            if time.monotonic() > until:
                break  # the next Epilog goes on
        if over:
            with store.sending_back():
                left = [one for one in sent_back.load(config.state_dir, now) if one not in over]
                sent_back.save(config.state_dir, left)
    except (SlurmError, OSError, RmsError, Damaged) as error:
        log(f"cannot wake the jobs that wait for room: {error}")


def _cancel(hook: Hook, slurm_conf: str, log: Log, why: str) -> int:
    """The user's fault: the job ends, the user is told."""
    from slurm.slurmctld import Slurmctld, SlurmError

    log(f"cancelled: {why}")
    try:
        slurmctld = Slurmctld(slurm_conf)
        if job := _job(slurmctld, hook):
            slurmctld.cancel(job, f"rms: {why}")
    except SlurmError as error:
        log(f"cannot cancel the job ({error}); it will not run all the same: it has no grant")
    return 0


def _drain(hook: Hook | None, slurm_conf: str, log: Log, why: str, starting: bool) -> int:
    """The node's fault: nothing more starts here; a job that was starting goes back to the queue."""
    from slurm.slurmctld import Slurmctld, SlurmError

    log(f"draining this node: {why}")
    try:
        slurmctld = Slurmctld(slurm_conf)
        slurmctld.drain(configuration.node_name(), f"rms: {printable(why, 200)}")
        if starting and hook and (job := _job(slurmctld, hook)):
            if job.batch:
                _requeue(slurmctld, job, ELSEWHERE_SECONDS, log, "node drained")
            else:
                slurmctld.cancel(job, f"rms: node {hook.node} is out of order; try again")
        return 0
    except SlurmError as error:
        log(f"cannot tell slurmctld: {error}")
        return UNTOLD


def main(arguments: Sequence[str]) -> int:
    """Run one hook. Returns its exit code."""
    verb, config_path, slurm_conf = arguments
    if verb == "prewarm":
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # whatever slurmd's own process had left open
    starting = verb == "prolog"
    log = Log(verb)
    syslog.openlog("rms", syslog.LOG_PID, syslog.LOG_DAEMON)
    hook = None
    config = None
    try:
        hook = Hook.read(os.environ)
        log.about(hook.run)
        config = configuration.load(config_path, hook.node)
        log.path = config.hook_log
        if verb == "prewarm":
            return prewarm(config, log)
        code = prolog(hook, config, slurm_conf, log) if starting else epilog(hook, config, slurm_conf, log)
        if config.prewarm and not starting:
            _leave_behind([config_path, slurm_conf], log)
        return code
    except ClosedRunError as error:
        log(str(error))  # an orphan of a run that is over: its job is no longer this one's business
        return 0
    except RequestError as error:
        fault, blame = str(error), _cancel
    except RmsError as error:
        fault, blame = str(error), None
    except Exception as error:  # a bug must not become a held job with an empty reason
        fault, blame = f"internal error: {type(error).__name__}: {error}", None
    if verb == "prewarm":  # it is nobody's job: whoever comes next with one finds the same fault, if it stands
        log(fault)
        return 0
    if starting and hook and config:
        with suppress(RmsError, OSError):
            grant.refuse(config.run_dir, hook.run)
    if blame is not None and hook is not None:
        return blame(hook, slurm_conf, log, fault)
    return _drain(hook, slurm_conf, log, fault, starting)


if __name__ == "__main__":
    # Nothing is left to be written, and to take the interpreter down tidily costs as much time as the decision.
    os._exit(main(sys.argv[1:]))
