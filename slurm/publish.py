"""Telling slurmctld what fits on this node, after every change (docs/slurm.md, "What slurmctld knows").

Slurm adds slices up; whether a request can be *placed* only the node knows. So the node publishes two things, in one
update of its record in slurmctld. First a name for each of a bounded list of requests that fits now: as node features
(`features`), or as numbers in the node's Extra (`extra`, Slurm 23.11 and newer); the lua makes each job ask for its
name. Second the token, a gres of which each job takes a share: there is never more of it free than jobs that slurmctld
may start, each unknown to the node as yet, with the proof that they all fit.

Only the token changes, and only in how its total is split: slurmd reports a gres as slurm.conf has it, and slurmctld
drains a node whose total has changed while jobs use it (seen on 22.05; the code is the same in newer ones).
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import combinations_with_replacement
from typing import NamedTuple

from rms import config as configuration
from rms import demand, files, inventory, planner
from rms.config import Config
from rms.demand import Told
from rms.errors import LockTimeoutError, NodeError, RequestError, RmsError
from rms.geometry import Geometry, Placement
from rms.inventory import Allocation, State
from rms.planner import GpuView, View
from rms.request import Request, parse
from rms.store import Damaged, NeedlessError, Store
from slurm.slurmctld import Slurmctld, SlurmError

PREFIX = "rms_"
"""How every published name begins."""
TOKEN = "migt"  # noqa: S105
"""The gres of which every MIG job takes `job:1`, `size:<weight>` and `open:1`. `open` is the rest of the constant
total: plenty, but in slurm.conf 1, so that a slurmctld which has forgotten what it was told starts nothing more."""
SHARES = (f"{TOKEN}:job", f"{TOKEN}:size", f"{TOKEN}:open")
EXACT = 8
"""Requests of one profile have a name for each count up to here, and from here on for what whole GPUs hold."""
MIXES = 64
"""Requests of several profiles have names as long as there are no more than this: an update costs slurmctld time with
the square of their number (0.4 ms for 50, 1.2 ms for 150, 7 ms for 400 on 22.05)."""
SHORT_MINUTES = 10
"""A job of one small instance whose time limit is no longer than this asks for a name of its own (`short`). That is
published, too, while there is room for it only in what is kept for another job until after that."""
SPARE_SECONDS = 120.0
"""That name goes so much sooner: the timer comes once a minute, and slurmctld looks once a second or more rarely."""
PATIENCE = 3.0
"""Seconds that a process waits for one that is publishing already."""
RETRY_SECONDS = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Pauses between attempts while slurmctld does not answer; the last is repeated."""
GIVE_UP_SECONDS = 3600.0
"""For how long it is tried: the timer that runs `rms publish` goes on after that."""
COMMAND_SECONDS = 30.0
ENOUGH = 0.5
"""So much of the token must be left for a Prolog's update to wait for others."""
TOGETHER_SECONDS = 0.3
"""For how long. With a whole second a node took a quarter fewer short jobs: whom it was not told of holds its share."""
FILE = "published"
"""In the state directory: what the node was when slurmctld was told of it last (`Sent`)."""


# What is published. All pure.


def listed(geometry: Geometry, gpus: int) -> list[Request]:
    """The requests that have a name, for a node of `gpus` GPUs; any other one waits for what is enough (site.gates)."""
    found = []
    for profile in geometry.profiles:
        most = profile.limit * gpus
        counts = {*range(1, min(EXACT, most) + 1), *(profile.limit * n for n in range(1, gpus + 1))}
        found += [Request(((profile.name, count),)) for count in sorted(counts)]
    empty = View(tuple(GpuView(str(n), geometry) for n in range(gpus)), (), None, 0.0)
    names = [profile.name for profile in geometry.profiles]
    mixes: list[Request] = []
    for size in range(2, EXACT):
        level = [_request(chosen) for chosen in combinations_with_replacement(names, size) if len(set(chosen)) > 1]
        if len(mixes) + len(level) > MIXES:
            break
        mixes += [request for request in level if planner.fits(empty, request)]
    return found + mixes


def _request(profiles: Sequence[str]) -> Request:
    return Request(tuple((name, profiles.count(name)) for name in dict.fromkeys(profiles)))


def name(request: Request) -> str:
    """What a request is called in features and in Extra: `rms_3g.40gb_2`, `rms_1g.10gb_1_3g.40gb_1`."""
    return PREFIX + "_".join(f"{profile}_{count}" for profile, count in request.items)


def short(geometry: Geometry) -> dict[str, str]:
    """What jobs with a short time limit ask for, by profile: those of less than half a GPU, one instance of them."""
    small = (profile.name for profile in geometry.profiles if 2 * profile.memory < geometry.slots)
    return {profile: f"{name(Request(((profile, 1),)))}_short" for profile in small}


def names(geometry: Geometry, gpus: int) -> list[str]:
    """All names that a node of `gpus` GPUs publishes at some time."""
    return [*map(name, listed(geometry, gpus)), *short(geometry).values()]


def span(geometry: Geometry) -> int:
    """The most jobs that are let in at once: as many instances as one GPU holds."""
    return max(profile.limit for profile in geometry.profiles)


def weight(geometry: Geometry, request: Request) -> int:
    """The share of `size` that a job takes: small where others can start beside it without its being in doubt.

    One instance leaves `span` - weight for others, one less than there are places for it on an empty GPU: however the
    others lie, one place is left. A job with more than one instance takes all.
    """
    if sum(request.counts) > 1:
        return span(geometry)
    return span(geometry) - geometry.by_name[request.items[0][0]].limit + 1


class Offer(NamedTuple):
    """What a node says: the names of what fits; of the token, what all known jobs and those to come may take."""

    names: tuple[str, ...]
    jobs: int
    size: int


NOTHING = Offer((), 1, 1)
"""What is published in doubt."""


def offer(state: State, boot_id: str, now: float, told: Told | None = None) -> Offer:
    """What fits on a node in this state. What is being changed counts as taken, a GPU in doubt as full."""
    if not state.gpus or state.boot_id != boot_id:
        return NOTHING
    view = _pessimistic(state, now)
    geometry = view.gpus[0].geometry
    known = [parse(a.request, geometry) for a in _known(state)]
    others, kept, room = view, None, None
    if told and told.keep and all(a.run.job != told.job for a in state.allocations):
        with suppress(RequestError):
            kept = parse(told.keep, geometry)
            # By then what is being removed now is gone.
            if room := planner.first_room(_pessimistic(state, now, removed=True), kept):
                others = planner.beside(view, room, None)
    counts = {p.name: sum(_most(gpu, p.name) for gpu in others.gpus) for p in geometry.profiles}
    fitting = []
    for request in listed(geometry, len(view.gpus)):
        if kept is not None and _same(request, kept):
            fits = planner.fits(view, request)
        elif len(request.items) == 1:
            fits = request.items[0][1] <= counts[request.items[0][0]]
        else:
            fits = all(count <= counts[p] for p, count in request.items) and planner.fits(others, request)
        if fits:
            fitting.append(name(request))
    if kept is not None and name(kept) in fitting and len(kept.profiles) == 1:
        # It may come, too, and to another place than its own.
        counts[kept.profiles[0]] = max(counts[kept.profiles[0]], 1)
    for profile, called in short(geometry).items():
        if not counts[profile] and room and room.free and room.free - now >= SHORT_MINUTES * 60 + SPARE_SECONDS:
            counts[profile] = sum(_most(gpu, profile) for gpu in view.gpus)
        if counts[profile]:
            fitting.append(called)
    return Offer(
        tuple(fitting),
        len(known) + at_once(geometry, counts),
        sum(weight(geometry, request) for request in known) + span(geometry),
    )


def _pessimistic(state: State, now: float, removed: bool = False) -> View:
    view = inventory.view(state, now)
    yielding = {intent.number for intent in state.intents if intent.kind == "prewarm"}
    gpus = []
    for gpu, record in zip(view.gpus, state.gpus, strict=True):
        if record.doubt:  # one with a fault has no room as it is
            gpus.append(gpu.without_room())
        else:
            doomed = (i for i in record.instances if i.status == "removing" and i.intent not in yielding)
            removing = () if removed else tuple(i.placement for i in doomed)
            gpus.append(gpu._replace(blocked=(*gpu.blocked, *removing)))
    return view._replace(gpus=tuple(gpus))


def _same(one: Request, other: Request) -> bool:
    return sorted(one.items) == sorted(other.items)


def _most(gpu: GpuView, profile: str) -> int:
    """How many instances of one profile a GPU can still hold."""
    if profile not in gpu.geometry.by_name:
        return 0
    free = gpu.geometry.legal(profile, gpu.taken)
    alike = sum(placement.profile == profile for placement in gpu.taken)
    return min(len(_disjoint(free)), gpu.geometry.by_name[profile].limit - alike)


def _disjoint(places: Sequence[Placement]) -> list[Placement]:
    """The most of these places, all of one size and by start, that do not overlap."""
    chosen: list[Placement] = []
    for place in places:
        if not chosen or place.start >= chosen[-1].start + chosen[-1].size:
            chosen.append(place)
    return chosen


def at_once(geometry: Geometry, counts: dict[str, int]) -> int:
    """How many jobs, any of those that are let in, surely fit together wherever each is placed.

    `counts` says how many instances of each profile fit. Jobs come while their weights add up to `span` at most. One
    more instance q takes away at most `_damage` places of a profile p; so the last of the jobs, p, has a place if all
    before it take fewer than there are.
    """
    most = span(geometry)
    single = {p: weight(geometry, Request(((p, 1),))) for p, count in counts.items() if count}
    jobs = most
    for p, own in single.items():
        harm = {q: _damage(geometry, q, p) for q in single}
        # worst[w]: the most places that jobs of weight w in all can take, and with how many jobs at least
        while jobs > 1 and _worst(single, harm, most - own, jobs - 1) >= counts[p]:
            jobs -= 1
    return jobs


def _worst(weights: dict[str, int], harm: dict[str, int], budget: int, jobs: int) -> int:
    """The most harm that `jobs` jobs can do whose weights add up to `budget` at most."""
    worst = [0] * (budget + 1)
    for _ in range(jobs):
        worst = [
            max([worst[b], *(worst[b - w] + harm[q] for q, w in weights.items() if w <= b)]) for b in range(budget + 1)
        ]
    return worst[budget]


def _damage(geometry: Geometry, new: str, profile: str) -> int:
    """The most places of `profile` that one instance of `new` takes away."""
    return max(
        len(_disjoint([p for p in geometry.placements(profile) if p.mask & place.mask]))
        for place in geometry.placements(new)
    )


# What slurmctld has of the node, and the one command that changes it.


class Record(NamedTuple):
    """What slurmctld has of a node, as far as it matters here."""

    available: str
    active: str
    gres: str
    extra: str
    comment: str


FIELDS = (("features", 24000), ("features_act", 24000), ("gres", 4000), ("extra", 24000), ("comment", 2000))
"""The columns of `sinfo -O` that make a Record, with their widths: room for what the largest node publishes. The
comment is last, since a site's own may have a line feed in it; its beginning counts, and it is not sent back."""


def question(node: str) -> list[str]:
    """The command that asks for a node's record: of this node alone, where `scontrol show node` would fetch all."""
    columns = ",".join(f"{name}:{width}" for name, width in FIELDS)
    return ["sinfo", "--noheader", "--all", f"--nodes={node}", f"--Format={columns}"]


def read(shown: str, node: str) -> Record:
    """The record in what `question` has printed: a line for each partition, all alike. Raises NodeError."""
    if not shown.strip():
        raise NodeError(f"slurmctld knows no node {node}, or none in a partition")
    line = os.fsencode(shown.split("\n", 1)[0])
    found = []
    for column, width in FIELDS:  # of bytes
        text, line = os.fsdecode(line[:width].rstrip()), line[width:]
        if len(os.fsencode(text)) == width and column != "comment":
            raise NodeError(f"slurmctld has {width} bytes or more in {column} of node {node}: shorten the site's own")
        found.append("" if text == "(null)" else text)
    return Record(*found)


def changes(record: Record, said: Offer, admission: str) -> list[str]:
    """The arguments for `scontrol update` that make the record say what is offered; none if it does already.

    Whatever is not ours stays as it is. Raises NodeError where the node lacks the token.
    """
    present = gres_items(record.gres)
    gres = _split(present, said)
    wanted = [f"Gres={','.join(gres)}"] if gres != present else []
    if admission == "features":
        available, active = (",".join([*_others(f), *said.names]) for f in (record.available, record.active))
        if (available, active) != (record.available, record.active):
            wanted += [f"AvailableFeatures={available}", f"ActiveFeatures={active}"]
    elif (extra := _merged(record.extra, said)) != record.extra:
        wanted.append(f"Extra={extra}")
    return wanted


def _others(features: str) -> list[str]:
    return [feature for feature in features.split(",") if feature and not feature.startswith(PREFIX)]


def gres_items(gres: str) -> list[str]:
    """The items of a gres string without sockets, as in gpu:2(S:0-1): slurmd found them out, slurm.conf has none."""
    return [re.sub(r"\(.*\)$", "", item) for item in re.findall(r"(?:\([^)]*\)|[^,])+", gres) if item != "(null)"]


def gres_count(item: str) -> tuple[str, int]:
    """What an item is of, and how many: 1024 are shown as 1K, and one without a number is one."""
    match = re.fullmatch(r"(.*):(\d+)(K?)", item)
    return (match[1], int(match[2]) * (1024 if match[3] else 1)) if match else (item, 1)


def gres_counts(gres: str) -> dict[str, int]:
    """How many there are of what in a gres string."""
    return dict(map(gres_count, gres_items(gres)))


def _split(items: Sequence[str], said: Offer) -> list[str]:
    """The items of a gres string with the token's constant total split anew."""
    shares = {kind: count for kind, count in map(gres_count, items) if kind.startswith(f"{TOKEN}:")}
    if set(shares) != set(SHARES):
        raise NodeError(f"this node has no gres {TOKEN} in slurm.conf: take the lines of `rms slurm-config`")
    total = sum(shares.values())
    job = min(said.jobs, total - 2)
    size = min(said.size, total - 1 - job)
    new = {"job": job, "size": size, "open": total - job - size}  # each at least 1: a type without any is set up anew
    return [
        f"{TOKEN}:{(kind := item.split(':')[1])}:{new[kind]}" if item.startswith(f"{TOKEN}:") else item
        for item in items
    ]


def _merged(extra: str, said: Offer) -> str:
    """The node's Extra with our numbers. It must be a JSON object: what else a site has written there is lost."""
    try:
        data = json.loads(extra) if extra else {}
    except ValueError:
        data = {}
    kept = {k: v for k, v in data.items() if not k.startswith(PREFIX)} if isinstance(data, dict) else {}
    return json.dumps({**kept, **dict.fromkeys(said.names, 1)}, separators=(",", ":"))


# Whether what slurmctld was told still stands.


class Sent(NamedTuple):
    """What slurmctld was told last, and what the node was then: which state, the runs that it knew, how its GPUs
    were."""

    said: Offer
    state: str
    runs: tuple[str, ...]
    gpus: tuple[str, ...]


def sent(said: Offer, moment: str, state: State, boot_id: str) -> Sent:
    """What to remember of a state that is being told: also the runs that are ending, as their slices count as taken."""
    return Sent(said, moment, tuple(str(a.run) for a in state.allocations), _health(state, boot_id))


def stands(last: Sent, state: State, boot_id: str) -> bool:
    """Whether what slurmctld was told does no harm yet: it lets in no job that does not fit.

    The token was split with the proof that all jobs which it lets in beside the known ones fit. As long as those are
    there, jobs that it has let in may come and go: each takes its share of the token with it, and leaves the room that
    was there before. It is another matter where a known one has ended, or a GPU or an instance has gone bad.
    """
    return {*last.runs} <= {str(a.run) for a in _known(state)} and last.gpus == _health(state, boot_id)


def left(last: Sent, state: State) -> float:
    """Which part of the token, 1 to 0, slurmctld can still give away, as far as the node knows."""
    came = [a for a in _known(state) if str(a.run) not in last.runs]
    if not came:
        return 1.0
    geometry = next(iter(state.geometries.values()))
    return 1.0 - sum(weight(geometry, parse(a.request, geometry)) for a in came) / span(geometry)


def _known(state: State) -> list[Allocation]:
    """The allocations of jobs that are not ending."""
    releasing = {intent.run for intent in state.intents if intent.kind == "release"}
    return [a for a in state.allocations if a.run not in releasing]


def _health(state: State, boot_id: str) -> tuple[str, ...]:
    """What else than jobs makes a difference to what fits: which GPUs are offered, what is quarantined on them."""
    bad = [
        f"{gpu.uuid} {bool(gpu.doubt)} {bool(gpu.fault)} "
        + " ".join(sorted(str(i.placement) for i in gpu.instances if i.status == "quarantined"))
        for gpu in state.gpus
    ]
    return (f"{boot_id} {state.boot_id}", *bad)


# Doing it.


class Publisher:
    """Publishes the state of one node. `log` is told what an administrator should know."""

    def __init__(self, config: Config, slurm_conf: str, node: str, log: Callable[[str], None]) -> None:
        self._config = config
        self._slurmctld = Slurmctld(slurm_conf, COMMAND_SECONDS)
        self._node = node
        self._log = log
        self._last = os.path.join(config.state_dir, FILE)

    def job_came(self) -> None:
        """Publish soon, in a process of its own: at once where the token is running out, else with what comes until
        then. Nothing waits for it: until slurmctld has heard of a job, the job's share of the token is gone."""
        self._start(self._lazily)

    def job_went(self, wait: float) -> bool:
        """Publish if slurmctld must know it before it counts the job as over; wait for that so long. Whether it does.

        The process outlives the hook where slurmctld does not answer, and there is never more than one that tries:
        it looks for a newer state after each success, others only wait a moment for its lock.
        """
        # Who publishes just now may go on for long, while others change the state: we wait for our own change alone.
        work = partial(self._patiently, needless=self._stands)
        if self._stands() or (child := self._start(work)) is None:
            return True
        until = time.monotonic() + wait
        while child and time.monotonic() < until:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return status == 0
            time.sleep(0.002)
        return False

    def anew(self) -> None:
        """Publish in a process of its own, whatever was published before: slurmctld seems to have forgotten it."""
        self._forget()
        self._start(lambda: self._patiently(anew=True))

    def now(self, patience: float = COMMAND_SECONDS) -> None:
        """Publish, whatever was published before. Raises NodeError."""
        store = Store(self._config.state_dir, time.monotonic() + patience)
        with store.publishing():
            try:
                self._publish(store, None)
            except SlurmError as error:
                raise NodeError(f"cannot publish what fits: {error}") from error

    def _start(self, work: Callable[[], bool]) -> int | None:
        """Do `work` in a process of its own: its pid, 0 if there is none to be had, None if nothing is to be done."""
        if self._is_published():
            return None
        try:
            child = os.fork()
        except OSError as error:  # of no concern to the job: the timer publishes
            self._log(f"cannot publish what fits: no process: {error.strerror}")
            return 0
        if child == 0:
            code = 1
            try:
                _detach()
                code = 0 if work() else 1
            except Exception as error:  # nobody is there to see it but the log
                self._log(f"cannot publish what fits: {type(error).__name__}: {error}")
            finally:
                os._exit(code)
        return child

    def _lazily(self) -> bool:
        if self._stands(ENOUGH):
            try:
                with Store(self._config.state_dir, time.monotonic()).gathering():
                    time.sleep(TOGETHER_SECONDS)
            except LockTimeoutError:
                return True  # who waits already will read the newest state
        return self._is_published() or self._patiently()

    def _patiently(self, anew: bool = False, needless: Callable[[], bool] | None = None) -> bool:
        store = Store(self._config.state_dir, time.monotonic() + PATIENCE)
        try:
            with store.publishing(needless):
                until = time.monotonic() + GIVE_UP_SECONDS
                pauses = _pauses()
                told = None if anew else self._remembered()  # who had the lock may have noted it without asking
                while told is None or told.state != self._now():
                    try:
                        told = self._publish(store, told)
                        pauses = _pauses()
                    except SlurmError as error:
                        told = None
                        self._log(f"cannot publish what fits: {error}")
                        if time.monotonic() > until:
                            return False
                        time.sleep(next(pauses))
        except NeedlessError:
            return True
        except LockTimeoutError:
            return False  # who has the lock looks for a newer state before it lets go
        except NodeError as error:  # to try again would not help
            self._log(f"cannot publish what fits: {error}")
            return False
        return True

    def _publish(self, store: Store, last: Sent | None) -> Sent:
        """One attempt, with the lock held. Raises SlurmError, NodeError."""
        # Before the state is read: a job that ends from now on finds nothing that stands, and waits for the next one.
        # And it stays so where slurmctld may or may not have got what we send.
        self._forget()
        # A hook writes the state more than once, mostly without a difference here: a third of all questions were that.
        if last is None or (told := self._present(store)).said != last.said:
            record = read(self._slurmctld.run(*question(self._node)), self._node)
            with suppress(OSError, UnicodeError):
                demand.save(self._config.state_dir, record.comment)
            told = self._present(store)
            if wanted := changes(record, told.said, self._config.admission):
                self._slurmctld.run("scontrol", "update", f"NodeName={self._node}", *wanted)
        with suppress(OSError):
            files.replace(self._last, json.dumps(told).encode(), durable=False)
        return told

    def _present(self, store: Store) -> Sent:
        """What to tell of the state as it is now."""
        moment, now = self._now(), time.time()
        boot_id = configuration.boot_id(self._config)
        try:
            state = store.glance()
            said = offer(state, boot_id, now, demand.load(self._config.state_dir, now))
            return sent(said, moment, state, boot_id)
        except (Damaged, RequestError):
            return Sent(NOTHING, moment, (), ())  # the next call of the controller mends it

    def _now(self) -> str:
        """What tells the present state from all others: its file is replaced at every change."""
        try:
            found = os.stat(os.path.join(self._config.state_dir, "state.json"))
        except OSError:
            return "none"
        return f"{found.st_ino} {found.st_mtime_ns}"

    def _remembered(self) -> Sent | None:
        """What slurmctld was told last; None if that is not known."""
        try:
            with open(self._last, "rb") as file:
                (names, jobs, size), moment, runs, gpus = json.load(file)
            return Sent(Offer(tuple(names), jobs, size), moment, tuple(runs), tuple(gpus))
        except (OSError, ValueError, TypeError):
            return None

    def _forget(self) -> None:
        with suppress(OSError):
            os.unlink(self._last)

    def _is_published(self) -> bool:
        last = self._remembered()
        return last is not None and last.state == self._now()

    def _stands(self, least: float = 0.0) -> bool:
        """Whether what slurmctld was told stands, with so much of the token left."""
        if (last := self._remembered()) is None:
            return False
        try:
            state = Store(self._config.state_dir, 0.0).glance()
            return stands(last, state, configuration.boot_id(self._config)) and left(last, state) >= least
        except (Damaged, RmsError):
            return False


def _pauses() -> Iterator[float]:
    yield from RETRY_SECONDS
    while True:
        yield RETRY_SECONDS[-1]


def _detach() -> None:
    """Let nothing of the hook's hold slurmd up, and slurmd's end of the hook not end us."""
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
