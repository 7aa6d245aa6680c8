"""Online learning: a challenger from a site's own audit logs, and the gate that it must pass to decide from then on.

The first half of a log's jobs is what the challenger is trained on: streams of jobs drawn from it, at its load, in the
simulator, where cross-entropy search moves what demand the net takes this site's for, and how far ahead it looks. Those
are seven numbers on an A100; a search over the 24 biases of the last hidden layer found no more, and took longer. The
second half is replayed with champion and challenger, the jobs submitted at the same times; `gate` looks at nothing but
those pairs of waits, and at the made-up mixes that RMS is measured on. Whoever was swapped in is watched: the next time
the jobs since then are replayed with it and with what it replaced.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from math import isfinite, sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

import rms
from policy import audits, evaluate, model, rules, seeds, transitions, workload
from policy.audits import Logs
from policy.evaluate import DEPTH
from policy.model import Model, ModelError, Times
from policy.shelf import Shelf
from policy.simulator import Node, simulate
from policy.transitions import Transitions
from policy.workload import Bools, Floats, Ints, Jobs
from rms import geometry
from rms.errors import RequestError
from rms.geometry import Geometry

LEAST_JOBS = 2000
"""Jobs in the replay, those of the user with most of them not counted: nobody's flood decides what all get."""
LEAST_BLOCKS = 12
MOST_BLOCKS = 100
LONGER = 2.0
"""How many times as long as the longest job a block is."""
LEAST_BETTER = 1.0
"""By how many percent the mean wait must surely be shorter."""
MEAN_WORSE, TAIL_WORSE, SUITE_WORSE = 10.0, 15.0, 2.0
"""Percent by which a profile's mean wait, its 95th percentile, and a made-up mix's mean wait may be longer."""
LEAST_TAIL = 0.05
"""Waits below this share of the mean duration are alike; for means a fifth of it."""
LEAST_WATCHED = 500
"""Jobs since a swap, before it is judged."""
TAIL = 0.025
"""Of a 95 % interval."""
DRAWS = 10_000
"""Of the bootstrap."""
YEAR = 365 * 86400.0
"""How long an attempt counts."""
FALSE, ONE_USER, UNKNOWN_SUBMIT = 0.01, 0.5, 0.05
"""Shares of a log's jobs beyond which it is no basis: what can't be true, one user's, without submit time."""
USERS_SHARE = 0.25
"""As how much of the training jobs one user's may count."""
STREAMS, LENGTH = 16, 8000
"""Of a round of training: streams of jobs, and jobs in each."""
CANDIDATES, ELITE = 24, 6
"""Of a round: what is tried, and of that what the next round begins from."""
EIGHT = (0.8, 8)
"""Load and GPUs of the made-up mixes."""
SUITE_JOBS = 100_000
"""Of each made-up mix."""
REPLAYS = 8
JITTER = 0.05
"""Mean durations by which jobs may come later in a replay."""

Progress = Callable[[str, float], None]


class Log(NamedTuple):
    """A log as a stream: its jobs in seconds since the first submit, which was at `began` (epoch); `heads` are the
    first rows of jobs, `users` who submitted each of them. `names` are the node's own for the profiles of `moves`."""

    moves: Transitions
    names: tuple[str, ...]
    gpus: int
    jobs: Jobs
    heads: Ints
    users: Ints
    began: float


class Paired(NamedTuple):
    """What both models made of the same jobs: submit times, profiles (the largest of a job), waits; all in seconds.
    `counted` leaves out the user with most jobs. `longest` and `mean` are of the durations."""

    submit: Floats
    profile: Ints
    used: Floats
    other: Floats
    counted: Bools
    longest: float
    mean: float


class Change(NamedTuple):
    """By how many percent the other one's mean wait is longer than that of the one in use, with its interval."""

    percent: float
    low: float
    high: float
    blocks: int


def learn(
    paths: Sequence[str], shelf: Shelf, now: float, rounds: int, seed: int, dry: bool, progress: Progress
) -> dict[str, Any]:
    """One turn: back to the former model, or a challenger's trial; what came of it. Raises RequestError where the logs
    are no basis for anything."""
    logs = audits.read(paths, shelf.geometry, now, lambda done: progress("reading", done))
    distrust(logs)
    log = stream(logs, shelf)
    told: dict[str, Any] = {"schema": 1, "dry_run": dry, "board": shelf.geometry.model, **workload_of(log)}
    told["left_out"] = {**logs.left_out, **logs.false}
    champion = deciding(shelf)
    told |= {"champion": shelf.in_use(), "champion_model": champion.name}
    if watched := watch(log, shelf, champion, progress):
        told["since_swap"] = watched
        if watched["worse"]:
            if not dry:
                shelf.rollback()
            return told | {"outcome": "rolled back", "reasons": [watched["text"]]}
    first = len(log.heads) // 2
    counted = others(log.users[first:])
    if counted.sum() < LEAST_JOBS:
        why = f"{counted.sum()} jobs to replay, without the user with most; {LEAST_JOBS} are needed: give more logs"
        return told | {"outcome": "kept", "reasons": [why]}
    attempts = 1 + sum(now - YEAR < t for t in shelf.history().attempts)
    if not dry:
        shelf.tried(now)
    starts = [champion]
    with suppress(ModelError):  # boards for which none is shipped
        starts.insert(0, model.load(shelf.geometry))
    data = train(log, first, starts, rounds, seed, progress)
    challenger = model.unpack(data, shelf.geometry)
    waits = [replay(log, of, progress) for of in (champion, challenger)]
    pairs = paired(log, first, *waits)
    progress("made-up mixes", 0.0)
    made_up = suite(log.moves, champion, challenger)
    change, reasons = gate(pairs, log.names, made_up, attempts)
    told |= {
        "challenger": challenger.name,
        "replayed": len(pairs.submit),
        "attempts": attempts,
        "change": change._asdict(),
        "profiles": profiles(pairs, log.names),
        "made_up": made_up,
    }
    if reasons:
        return told | {"outcome": "kept", "reasons": reasons}
    name = f"learned-{time.strftime('%Y%m%d', time.gmtime(now))}-{challenger.name}"
    if not dry:
        shelf.add(data, name)
        shelf.use(name, "learn", change.percent)
    return told | {"outcome": "swapped", "reasons": [], "name": name}


def distrust(logs: Logs) -> None:
    """Raises RequestError if these logs are no basis for anything."""
    count, false = len(logs.jobs), sum(logs.false.values())
    if false > FALSE * count:
        worst = max(logs.false, key=lambda reason: logs.false[reason])
        raise RequestError(f"the log is damaged or forged, beside {count} jobs it has {logs.false[worst]} {worst}")
    without = logs.left_out.get("jobs without a submit time", 0)
    if without > UNKNOWN_SUBMIT * (count + without):
        raise RequestError(
            f"{without} of {count + without} jobs in the log have no submit time: waits can't be replayed"
        )
    if not count:
        raise RequestError("the log has no job that ran and ended")
    most = max(np.unique([job.uid for job in logs.jobs], return_counts=True)[1])
    if most > ONE_USER * count:
        raise RequestError(f"{most} of {count} jobs in the log are one user's: no basis for what all get")


def stream(logs: Logs, shelf: Shelf) -> Log:
    """The logs' jobs as the simulator takes them."""
    plain = model.plain_names(shelf.geometry)
    names = tuple(p.name for p in shelf.geometry.profiles if p.plain)
    number = {name: names.index(plain[name]) for name in plain}
    rows = [
        (job, profile, len(asked) - 1 - i)
        for job in logs.jobs
        for asked in [sorted((number[p] for p in job.profiles if p in number), reverse=True)]
        for i, profile in enumerate(asked)
    ]
    jobs = Jobs(
        np.array([job.submit - logs.jobs[0].submit for job, _, _ in rows]),
        np.array([profile for _, profile, _ in rows], dtype=np.int64),
        np.array([job.duration for job, _, _ in rows]),
        np.array([job.limit for job, _, _ in rows]),
        np.array([rest for _, _, rest in rows], dtype=np.int64),
    )
    heads = np.flatnonzero(workload.first_rows(jobs))
    users = np.array([job.uid for job, _, _ in rows])[heads]
    return Log(alike(shelf.geometry), names, logs.gpus, jobs, heads, users, logs.jobs[0].submit)


def alike(board: Geometry) -> Transitions:
    """The transitions of a board: from the table of boards with the same placements, whatever NVML calls this one."""
    wanted = model.signature(board)
    names = [name for name in geometry.models() if model.signature(geometry.load(name)) == wanted]
    if not names:
        raise RequestError(f"the simulator knows no board with the placements of {board.model}")
    return transitions.load(board.model if board.model in names else names[0])


def workload_of(log: Log) -> dict[str, Any]:
    """The log in a few numbers: demand, load, how long jobs run and how much too long their limits are."""
    limited = np.isfinite(log.jobs.limit[log.heads])
    too_long = (log.jobs.limit / log.jobs.duration)[log.heads][limited]
    return {
        "gpus": log.gpus,
        "jobs": len(log.heads),
        "days": float(log.jobs.submit[-1]) / 86400,
        "load": load(log, slice(None)),
        "mix": dict(zip(log.names, map(float, shares(log, log.jobs.profile)), strict=True)),
        "mean_seconds": float(log.jobs.duration[log.heads].mean()),
        "longest_seconds": float(log.jobs.duration.max()),
        "with_limits": float(limited.mean()),
        "limits_too_long": float(np.median(too_long)) if limited.any() else None,
    }


def shares(log: Log, profile: Ints) -> Floats:
    """The profiles' shares."""
    counts = np.bincount(profile, minlength=len(log.moves.profiles))
    return np.asarray(counts / counts.sum())


def load(log: Log, rows: slice) -> float:
    """Memory slices that some rows of a log ask for, by those that there are."""
    duration = log.jobs.duration[rows]
    offered = float((workload.sizes(log.moves)[log.jobs.profile[rows]] * duration).sum())
    span = max(float(np.ptp(log.jobs.submit[rows])), float(duration.mean()))
    return offered / (log.moves.geometry.slots * log.gpus * span)


def deciding(shelf: Shelf) -> Model:
    """What decides: the shipped model where the site's own can't. Raises RequestError where there is neither."""
    try:
        return model.in_use(shelf.geometry, shelf.folder)[0]
    except ModelError as error:
        raise RequestError(f"{error}; rms train makes one") from None


# Training.


class Game(NamedTuple):
    """Jobs to try a model on: their shares, the GPUs, and what a node would know of times (at foresight 1)."""

    jobs: Jobs
    shares: Floats
    node: Node
    known: Times


def game(of: Model, jobs: Jobs, shares: Floats, node: Node) -> Game:
    """The jobs and what they tell; whichever model `of` is makes no difference."""
    return Game(jobs, shares, node, evaluate.told(of._replace(foresight=1.0), jobs))


def mean_wait(moves: Transitions, of: Model, games: Sequence[Game]) -> float:
    """The mean wait under a model, the demand known."""
    t, total = rules.tables(moves.geometry.model), 0.0
    for jobs, shares, node, known in games:
        rule = evaluate.learned(moves, shares, node.gpus, of, known._replace(rate=known.rate * of.foresight))
        total += float((simulate(t, node, rule, jobs).start - jobs.submit).mean())
    return total / len(games)


def train(log: Log, first: int, starts: Sequence[Model], rounds: int, seed: int, progress: Progress) -> bytes:
    """A challenger to the last of `starts`, from the jobs before the `first` one to be replayed, as a model file.

    Cross-entropy search, from whichever start is better on these jobs, over a shift of the shares that the net is shown
    and the logarithm of the foresight. What it minimises is the mean wait on them by the champion's, and by how much it
    is worse on made-up mixes: without that it found what the gate then refused. All mixes in one mean, since each of
    them alone is mostly noise.
    """
    rng = np.random.default_rng(seeds.LEARNING[seed])
    moves, part = log.moves, slice(0, int(log.heads[first]))
    seen, odds = shares(log, log.jobs.profile[part]), trusted(log.users[:first])
    at, node = float(np.clip(load(log, part), 0.5, 0.95)), Node(log.gpus, depth=DEPTH, lazy=True)
    mixes = [workload.mix(name, moves) for name in workload.MIXES]

    def fresh() -> list[list[Game]]:
        own = [drawn(rng, log, log.heads[:first], odds, LENGTH, at) for _ in range(STREAMS)]
        seeded = (int(rng.integers(2**62)) for _ in mixes)
        made_up = [
            (workload.stream(moves, s, 2 * LENGTH, mix, *EIGHT, limit="1to3"), mix)
            for s, mix in zip(seeded, mixes, strict=True)
        ]
        return [
            [game(starts[0], jobs, seen, node) for jobs in own],
            *([game(starts[0], jobs, mix, Node(8, depth=DEPTH))] for jobs, mix in made_up),
        ]

    games = fresh()
    start = min(starts, key=lambda of: mean_wait(moves, of, games[0]))
    # Of the shifts of the shares, and of the logarithm of the foresight.
    middle, spread = np.zeros(len(seen) + 1), np.array([*[0.15] * len(seen), 0.4])
    for turn in range(rounds):
        base = [mean_wait(moves, starts[-1], g) for g in games]
        tried = middle + spread * rng.standard_normal((CANDIDATES, len(middle)))
        tried[0] = middle
        scores = []
        for i, x in enumerate(tried):
            progress("training", (turn + i / CANDIDATES) / rounds)
            of = moved(start, x)
            own, *others = (mean_wait(moves, of, g) / max(was, 1e-9) for g, was in zip(games, base, strict=True))
            scores.append(own + 2 * max(0.0, sum(others) / len(others) - 1.0))
        best = tried[np.argsort(scores)[:ELITE]]
        # Smoothed, and never so narrow that nothing is tried any more.
        middle = 0.3 * middle + 0.7 * best.mean(axis=0)
        spread = np.maximum(0.3 * spread + 0.7 * best.std(axis=0), 0.03)
        games = fresh()  # others in each round: what is learned is the workload, not these jobs
    found = moved(start, middle)
    made = {"by": f"rms learn {rms.__version__}", "from": start.name, "jobs": first, "rounds": rounds, "seed": seed}
    rule = {"foresight": found.foresight, "reuse": found.reuse, "stranding": found.stranding}
    wider = [(min(least, s), max(most, s)) for (least, most), s in zip(found.trained, seen.tolist(), strict=True)]
    return model.pack(moves, found.layers, seen.tolist(), rule, made, wider)


def moved(of: Model, x: Floats) -> Model:
    """The model shown shares that are shifted by x, and its foresight multiplied by exp of x's last. The shift of the
    shares is one of the first layer's biases."""
    (rows, biases), *rest = of.layers
    shifted = [b + float(np.dot(row[: len(x) - 1], x[:-1])) for row, b in zip(rows, biases, strict=True)]
    return of._replace(layers=[(rows, shifted), *rest], foresight=of.foresight * float(np.exp(x[-1])))


def trusted(users: Ints) -> Floats:
    """How likely each job is to be drawn: equally, but no user's jobs together more than a share."""
    _, whose, counts = np.unique(users, return_inverse=True, return_counts=True)
    odds = np.minimum(1.0, USERS_SHARE * len(users) / counts)[whose]
    return np.asarray(odds / odds.sum())


def drawn(rng: np.random.Generator, log: Log, heads: Ints, odds: Floats, count: int, at: float) -> Jobs:
    """A stream of jobs of a log, as Poisson arrivals at a load: profiles, durations and limits stay together."""
    picked = rng.choice(heads, count, p=odds)
    sizes = log.jobs.rest[picked] + 1
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rows = np.repeat(picked, sizes) + within
    work = float((workload.sizes(log.moves)[log.jobs.profile[rows]] * log.jobs.duration[rows]).sum()) / count
    submit = np.cumsum(rng.exponential(work / (at * log.moves.geometry.slots * log.gpus), count))
    of = log.jobs
    return Jobs(np.repeat(submit, sizes), of.profile[rows], of.duration[rows], of.limit[rows], of.rest[rows])


# The trial.


def replay(log: Log, of: Model, progress: Progress) -> Floats:
    """The wait of every job, in seconds, if a model decides on all the GPUs together, estimating as a node does.

    The mean of several replays in which jobs are submitted up to a few minutes later than they were: where two models
    place one job differently all that follows differs by accident, too, and these accidents are most of the noise.
    """
    t, node = rules.tables(log.moves.geometry.model), Node(log.gpus, depth=DEPTH, lazy=True)
    rng = np.random.default_rng(seeds.LEARNING[1])
    most = JITTER * float(log.jobs.duration[log.heads].mean())
    sizes = log.jobs.rest[log.heads] + 1
    total = np.zeros(len(log.heads))
    for turn in range(REPLAYS):
        progress(f"replaying {of.name}", turn / REPLAYS)
        submit = np.repeat(log.jobs.submit[log.heads] + rng.uniform(0, most, len(log.heads)), sizes)
        order = np.argsort(submit, kind="stable")
        was = log.jobs
        jobs = Jobs(submit[order], was.profile[order], was.duration[order], was.limit[order], was.rest[order])
        w = evaluate.simulate_estimating(log.moves, t, node, of, jobs, pending=True)
        waits = np.empty(len(submit))
        waits[order] = w.start - jobs.submit
        total += waits[log.heads]
    return total / REPLAYS


def others(users: Ints) -> Bools:
    """Which jobs are not those of the user with most of them."""
    names, counts = np.unique(users, return_counts=True)
    return np.asarray(users != names[counts.argmax()])


def paired(log: Log, first: int, used: Floats, other: Floats) -> Paired:
    """The waits from the `first` job on."""
    rows = log.heads[first:]
    duration = log.jobs.duration[rows]
    return Paired(
        log.jobs.submit[rows],
        log.jobs.profile[rows],
        used[first:],
        other[first:],
        others(log.users[first:]),
        float(duration.max()),
        float(duration.mean()),
    )


def suite(moves: Transitions, champion: Model, challenger: Model) -> dict[str, float]:
    """By how many percent the challenger's mean wait is longer, on each of the made-up mixes: 8 GPUs at load 0.8,
    limits 1 to 3 times too long."""
    found = {}
    for number, name in enumerate(workload.MIXES):
        mix = workload.mix(name, moves)
        jobs = workload.stream(moves, seeds.LEARNING[-1 - number], SUITE_JOBS, mix, *EIGHT, limit="1to3")
        games = [game(champion, jobs, mix, Node(8, depth=DEPTH))]
        found[name] = 100 * (mean_wait(moves, challenger, games) / mean_wait(moves, champion, games) - 1)
    return found


def gate(pairs: Paired, names: Sequence[str], made_up: Mapping[str, float], attempts: int) -> tuple[Change, list[str]]:
    """How the challenger compares, and every reason why it may not decide; none: it may.

    `attempts` counts this one and those of the last year: the k-th has 1 / (2 k (k + 1)) of the interval's tail, so
    that all together have half of that of a single one; half, since an interval over blocks misses up to twice as often
    as it should where waits hang together for about as long as the longest job.
    """
    change = compare(pairs, TAIL / (2 * attempts * (attempts + 1)))
    reasons = []
    if (count := int(pairs.counted.sum())) < LEAST_JOBS:
        reasons.append(f"{count} jobs to compare, {LEAST_JOBS} are needed")
    if change.blocks < LEAST_BLOCKS:
        reasons.append(f"the log is only {change.blocks} times as long as its longest job, {LEAST_BLOCKS} are needed")
    if not change.high <= -LEAST_BETTER:
        reasons.append(
            f"its mean wait is {change.percent:+.1f} % ({change.low:+.1f} to {change.high:+.1f}); "
            f"all of that must be below -{LEAST_BETTER:g} %"
        )
    for p in np.unique(pairs.profile):
        here = pairs.profile == p
        for what, number, most, least in (
            ("mean", np.mean, MEAN_WORSE, LEAST_TAIL / 5),
            ("95th percentile", lambda x: np.quantile(x, 0.95), TAIL_WORSE, LEAST_TAIL),
        ):
            used, other = float(number(pairs.used[here])), float(number(pairs.other[here]))
            worse = 100 * (other / max(used, least * pairs.mean) - 1)
            if not worse <= most:
                reasons.append(f"the {what} of {names[p]}'s wait is {worse:+.0f} %, at most +{most:g} may be")
    reasons += [
        f"on the made-up mix {name} its mean wait is {worse:+.1f} %, at most +{SUITE_WORSE:g} may be"
        for name, worse in made_up.items()
        if not worse <= SUITE_WORSE
    ]
    return change, reasons


def compare(pairs: Paired, tail: float) -> Change:
    """The change of the mean wait of the jobs that count, with a bootstrap interval over blocks of time: `tail` is what
    lies beyond each of its ends.

    All that happens within a block may hang together, and a little beyond, so blocks are longer than the longest job.
    What is drawn again are the differences, against a fixed mean wait of the one in use, and the interval is as wide on
    both sides: waits are so skewed that ratios, plain percentiles and studentised ones take equals for better up to
    twice as often. It is as much wider as Student's t is beyond the normal quantile: few blocks are too narrow by that.
    """
    span = float(pairs.submit[-1] - pairs.submit[0]) if len(pairs.submit) else 0.0
    blocks = int(min(MOST_BLOCKS, span // max(LONGER * pairs.longest, 1e-9)))
    used, other = pairs.used[pairs.counted], pairs.other[pairs.counted]
    if blocks < 2 or not used.sum() > 0 or not isfinite(float(other.sum())):
        return Change(float("nan"), float("-inf"), float("inf"), blocks)
    place = ((pairs.submit - pairs.submit[0]) * (blocks / span)).astype(int).clip(0, blocks - 1)[pairs.counted]
    changes = 100 * np.bincount(place, other - used, blocks) / used.sum()
    rng = np.random.default_rng(seeds.LEARNING[0])
    again = changes[rng.integers(blocks, size=(DRAWS, blocks))].sum(axis=1)
    z = -NormalDist().inv_cdf(tail)
    wide = (z + (z**3 + z) / (4 * (blocks - 1))) * sqrt(blocks / (blocks - 1))
    percent = float(changes.sum())
    off = float(np.quantile(abs(again - percent), 1 - 2 * NormalDist().cdf(-wide)))
    half = max(off, wide * float(again.std()))  # so far out that hardly any draw is: by their deviation
    return Change(percent, percent - half, percent + half, blocks)


def profiles(pairs: Paired, names: Sequence[str]) -> dict[str, Any]:
    """The waits by profile, in seconds."""
    found = {}
    for p in map(int, np.unique(pairs.profile)):
        here = pairs.profile == p
        found[names[p]] = {
            "jobs": int(here.sum()),
            **{
                f"{who}_{what}": float(value)
                for who, waits in (("champion", pairs.used[here]), ("challenger", pairs.other[here]))
                for what, value in (("mean", waits.mean()), ("p95", np.quantile(waits, 0.95)))
            },
        }
    return found


# Afterwards.


def watch(log: Log, shelf: Shelf, champion: Model, progress: Progress) -> dict[str, Any] | None:
    """How the model that learning has swapped in does against what it replaced, on the jobs submitted since; None where
    there is nothing to judge."""
    last, before = shelf.last(), shelf.before()
    if last is None or last.by != "learn" or last.model != champion.name:
        return None
    first = int(np.searchsorted(log.jobs.submit[log.heads], last.since - log.began))
    if len(log.heads) - first < LEAST_WATCHED:
        return None
    try:
        former = shelf.read(before)
    except ModelError:
        return None
    change = compare(paired(log, first, replay(log, former, progress), replay(log, champion, progress)), TAIL)
    worse = change.blocks >= LEAST_BLOCKS and change.low > 0
    expected = "" if last.expected is None else f", {last.expected:+.1f} % expected"
    text = (
        f"since its swap {last.name} has waits {change.percent:+.1f} % ({change.low:+.1f} to {change.high:+.1f}) "
        f"against {before}{expected}"
    )
    return {**change._asdict(), "jobs": len(log.heads) - first, "before": before, "worse": worse, "text": text}


def describe(told: Mapping[str, Any]) -> str:
    """What came of it, for people."""
    mix = " ".join(f"{name} {share:.2f}" for name, share in told["mix"].items())
    limits = told["limits_too_long"]
    much = "none has a time limit" if limits is None else f"time limits are {limits:.1f} times as long (median)"
    lines = [
        f"{told['jobs']:,} jobs in {told['days']:.1f} days on {told['gpus']} {told['board']}, load {told['load']:.2f}",
        f"  {mix}",
        f"  run {told['mean_seconds'] / 60:.0f} min (mean), {told['longest_seconds'] / 3600:.1f} h at most; {much}",
        *(f"  left out: {count} {reason}" for reason, count in told["left_out"].items()),
    ]
    if "since_swap" in told:
        lines.append(told["since_swap"]["text"])
    if "change" in told:
        change = told["change"]
        interval = f"{change['low']:+.1f} to {change['high']:+.1f}, attempt {told['attempts']}"
        lines += [
            f"challenger {told['challenger']} against {told['champion']}, {told['replayed']:,} jobs replayed:",
            f"  mean wait {change['percent']:+.1f} % ({interval})",
            "  made-up mixes " + ", ".join(f"{name} {worse:+.1f} %" for name, worse in told["made_up"].items()),
        ]
    would = "would have been " if told["dry_run"] and told["outcome"] != "kept" else ""
    what = told.get("name", "") if told["outcome"] == "swapped" else told["champion"]
    lines.append(f"{would}{told['outcome']}: {what}")
    lines += [f"  {reason}" for reason in told["reasons"]]
    return "\n".join(lines)
