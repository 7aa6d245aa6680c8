"""Event-driven simulator of a node, or of several alike: where a rule puts instances, and what becomes of the jobs.

Loss mode (a request that does not fit is lost) or a queue with backfill; a fixed pool or an elastic one. Everything
mutable is in a `World`, so that a run can be stopped after any arrival and gone on with, by a rule that has learned
meanwhile. The rules of placing are those of `rms.planner`; a test holds the two together, job by job.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from policy.jit import compiled, inlined
from policy.model import GOLDEN
from policy.rules import LEAST, Array, Rule, Tables
from policy.workload import Jobs

NONE = np.zeros(0, dtype=np.int64)
"""No further profiles."""

FIT, GPU_SUMS, NODE_SUMS = 0, 1, 2
"""What Slurm knows when it starts a job: whether it fits; or how many slices are free, on each GPU or on all."""

# Event codes of the heap: 0 and up is a departure (GPU and placement), WAKE a second look at the queue, from MADE down
# the end of making an instance ahead (MADE less the GPU).
WAKE, MADE = -1, -2
# What is made ahead on a GPU, in World.making, if no placement: nothing; what a job took before its event has come;
# nothing yet, but it is to be looked at.
NOTHING, TAKEN, LOOK = -1, -2, -3
# Places in World.tally and World.clock.
ARRIVED, EVENTS, HEAD, TAIL, QUEUED, RESERVED, NONEMPTY, PEAK, RANDOM, AHEAD, USED = range(11)
NOW, DRAINED, GPU_TIME, BACKFILL = range(4)
# What becomes of a job in a pass of Slurm's over its queue.
STARTED, PASSED, STOPS = range(3)


class Node(NamedTuple):
    """What is simulated. `depth` is how many waiting jobs backfill looks at; 0 is loss mode, 1 strict order.

    `reserve`: for the first waiting job that needs a whole GPU the one that drains first is kept, and only jobs that
    end by then are started there. `elastic`: an empty GPU is taken only when nothing else fits. `lazy`: instances stay
    when their job ends, for reuse, and are destroyed when in the way. `prewarm`: after a job has ended the instances
    that are wanted are made ahead (`lacking`), except over one used or made in the last `spared`. `create`
    and `destroy` are times that delay a start. `latency` is the time from a start until Slurm knows of it and may start
    the next (the token). `hold` is how long a job waits that Slurm started and that did not fit. `nodes`: to how many
    nodes the GPUs belong. Slurm starts a job on the first of them on which it would; each has a token of its own.
    `backfill` is Slurm's bf_interval (docs/slurm.md, "Who holds up whom"): a pass over the queue ends at the first job
    for which a node is only busy, which takes it but for the token or, where Slurm goes by sums, but for slices. A pass
    of backfill goes on, and plans such a job on the node where a time limit ends first: nobody behind it gets that who
    may still run then. With 0 every pass goes through all of the queue, and nothing is planned.
    `ending` is for how long a job that is over is ending to Slurm (its Epilog): until then, the last part of its
    duration here, no job starts on its node, and the node is busy. `refusal` is for how long it takes none after one
    that did not fit: from its start to its Epilog, nearly all of it is Slurm's completing.
    """

    gpus: int
    depth: int = 0
    reserve: bool = False
    elastic: bool = False
    lazy: bool = False
    prewarm: bool = False
    spared: float = 0.0
    create: float = 0.0
    destroy: float = 0.0
    admission: int = FIT
    latency: float = 0.0
    hold: float = 0.02
    nodes: int = 1
    backfill: float = 0.0
    ending: float = 0.0
    refusal: float = 0.0


class World(NamedTuple):
    """A node at one moment, and what became of each job so far.

    By GPU: `state` (what is busy), `idle` (existing instances that nobody has, as bits), and by placement `began` (when
    the job was started), `ends` (when its time limit is over) and `used` (when a job last left it, or it was made
    ahead). `room[p]` counts the GPUs that can take profile p. Made ahead: `ahead` (idle instances that nobody has used
    yet, as bits), `making` (the placement being made) and `made` (when it is there); `tally[AHEAD]` counts them,
    `tally[USED]` those that a job got.
    `gates[n]` is when node n takes the next job; until then it is `told`, by GPU, what was busy before the last start,
    and that is what Slurm knows. `plans[n]` is when a job is planned there, in a pass of backfill.
    By job: `start` (nan as long as it has none), `gpu` and `placement` (-1), how many instances were `created` and
    `destroyed` for it, how long that was its `delay`, and how often it was `misplaced`; a job of several instances has
    that many rows, as in `Jobs`.
    `times` and `codes` are the heap of events (`push`, `pop`). `follower` and `leader` link those that wait, in order
    of submission; a job is tried again from `ready` on. `tally` and `clock` are the rest (their places are named
    above). The others only spare a function an array of its own: `planned` for `lacking`, `spots` and `placed` for
    `fit`, `path`, `weight`, `leaver` and `left` for `foresee`, `gains` for `decide`.
    """

    state: Array
    idle: Array
    began: Array
    ends: Array
    used: Array
    ahead: Array
    making: Array
    made: Array
    planned: Array
    room: Array
    times: Array
    codes: Array
    follower: Array
    leader: Array
    ready: Array
    spots: Array
    placed: Array
    path: Array
    weight: Array
    leaver: Array
    left: Array
    gains: Array
    tally: Array
    clock: Array
    gates: Array
    told: Array
    plans: Array
    start: Array
    gpu: Array
    placement: Array
    created: Array
    destroyed: Array
    delay: Array
    misplaced: Array


def world(t: Tables, node: Node, count: int) -> World:
    """An empty node before the first of `count` jobs."""
    placements = len(t.overlaps)
    events = node.gpus * (t.slots + 1) + 3 + (0 if node.admission == FIT and node.latency == 0 else 2 * count)
    counters = np.zeros(11, dtype=np.int64)
    counters[[HEAD, TAIL, RESERVED]] = -1
    counters[RANDOM] = np.random.default_rng(0).integers(1, 2**62)
    linked = count if node.depth else 0
    return World(
        state=np.zeros(node.gpus, dtype=np.int32),
        idle=np.zeros(node.gpus, dtype=np.int64),
        began=np.zeros((node.gpus, placements)),
        ends=np.full((node.gpus, placements), np.inf),
        used=np.full((node.gpus, placements), -np.inf),
        ahead=np.zeros(node.gpus, dtype=np.int64),
        making=np.full(node.gpus, NOTHING, dtype=np.int64),
        made=np.zeros(node.gpus),
        planned=np.zeros(len(t.first) - 1),
        room=np.full(len(t.first) - 1, node.gpus, dtype=np.int64),
        times=np.empty(events),
        codes=np.empty(events, dtype=np.int64),
        follower=np.full(linked, -1, dtype=np.int32),
        leader=np.full(linked, -1, dtype=np.int32),
        ready=np.zeros(linked),
        spots=np.zeros(node.gpus * t.slots + 1, dtype=np.int64),
        placed=np.zeros(node.gpus * t.slots + 1, dtype=np.int8),
        path=np.zeros(t.slots + 1, dtype=np.int32),
        weight=np.zeros(t.slots + 1),
        leaver=np.zeros(t.slots, dtype=np.int64),
        left=np.zeros(t.slots),
        gains=np.zeros(placements),
        tally=counters,
        clock=np.zeros(4),
        gates=np.full(node.nodes, -np.inf),
        told=np.zeros(node.gpus, dtype=np.int32),
        plans=np.full(node.nodes, np.inf),
        start=np.full(count, np.nan),
        gpu=np.full(count, -1, dtype=np.int16),
        placement=np.full(count, -1, dtype=np.int16),
        created=np.zeros(count, dtype=np.int8),
        destroyed=np.zeros(count, dtype=np.int8),
        delay=np.zeros(count),
        misplaced=np.zeros(count, dtype=np.int32),
    )


def simulate(t: Tables, node: Node, rule: Rule, jobs: Jobs) -> World:
    """A whole run: every job has ended or is lost, and the world says what became of each."""
    w = world(t, node, len(jobs.submit))
    advance(t, node, rule, jobs, w, len(jobs.submit))
    finish(t, node, rule, jobs, w)
    return w


def finish(t: Tables, node: Node, rule: Rule, jobs: Jobs, w: World) -> None:
    """Go on after the last arrival until nothing runs and nobody waits."""
    advance(t, node, rule, jobs, w, len(jobs.submit) + 1)


# What follows is compiled. Numbers and arrays only; a function gets all that it reads.


@inlined()
def draw(w: World) -> int:
    """The next random number, 62 bits (xorshift64, kept in the world so that a stopped run goes on the same)."""
    x = np.uint64(w.tally[RANDOM])
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    w.tally[RANDOM] = np.int64(x)
    return int(x >> np.uint64(2))


@inlined()
def push(w: World, time: float, code: int) -> None:
    """Add an event to the heap."""
    i = w.tally[EVENTS]
    w.tally[EVENTS] = i + 1
    while i > 0:
        parent = (i - 1) >> 1
        if w.times[parent] <= time:
            break
        w.times[i], w.codes[i] = w.times[parent], w.codes[parent]
        i = parent
    w.times[i], w.codes[i] = time, code


@inlined()
def pop(w: World) -> int:
    """Take the earliest event off the heap; its code."""
    code = int(w.codes[0])
    w.tally[EVENTS] -= 1
    last = w.tally[EVENTS]
    time, moved = w.times[last], w.codes[last]
    i = 0
    while True:
        child = 2 * i + 1
        if child >= last:
            break
        if child + 1 < last and w.times[child + 1] < w.times[child]:
            child += 1
        if w.times[child] >= time:
            break
        w.times[i], w.codes[i] = w.times[child], w.codes[child]
        i = child
    w.times[i], w.codes[i] = time, moved
    return code


@inlined()
def become(t: Tables, w: World, g: int, new: int) -> None:
    """Change what is busy on a GPU."""
    old = w.state[g]
    w.state[g] = new
    for p in range(len(w.room)):
        w.room[p] += t.fits[new, p] - t.fits[old, p]
    if old == 0:
        w.tally[NONEMPTY] += 1
        w.tally[PEAK] = max(w.tally[PEAK], w.tally[NONEMPTY])
    elif new == 0:
        w.tally[NONEMPTY] -= 1


@inlined()
def remaining(r: Rule, age: float, limit: float, quantile: float) -> float:
    """How much longer a job of that age and time limit is guessed to run: what a quantile of the jobs that came so far
    into their limits did. Beyond all of them it is the limit that counts; inf where that is unknown or past."""
    if limit == np.inf:
        return np.inf
    first, last = 0, len(r.ratios)
    while first < last:  # how many of them had ended by then
        middle = (first + last) >> 1
        if r.ratios[middle] * limit <= age:
            first = middle + 1
        else:
            last = middle
    many = len(r.ratios) - first
    if many == 0:
        return limit - age if age < limit else np.inf
    return float(r.ratios[first + int(quantile * many)] * limit - age)


@compiled()
def foresee(t: Tables, r: Rule, w: World, g: int, now: float, guess: int) -> int:
    """Write down how a GPU is guessed to empty: its states in w.path, and until when each lasts in w.weight, as
    exp(-rate * time). Returns how many there are. An instance whose end is unknown or past is taken to stay."""
    state, known = w.state[g], 0
    for k in range(len(t.overlaps)):
        if t.before[state, k] >= 0:
            quantile = ((guess + 0.5) / r.draws + k * GOLDEN) % 1.0
            left = remaining(r, now - w.began[g, k], w.ends[g, k] - w.began[g, k], quantile)
            if left < np.inf:
                i = known
                while i > 0 and w.left[i - 1] > left:
                    w.left[i], w.leaver[i] = w.left[i - 1], w.leaver[i - 1]
                    i -= 1
                w.left[i], w.leaver[i] = left, k
                known += 1
    for i in range(known):
        w.path[i], w.weight[i] = state, np.exp(-r.rate * w.left[i])
        state = t.before[state, w.leaver[i]]
    w.path[known], w.weight[known] = state, 0.0
    return known + 1


@compiled()
def over_time(t: Tables, r: Rule, w: World, count: int, k: int, until: float) -> float:
    """What placement k adds to the value of the GPU that was foreseen, over the time that its job is expected to run:
    the mean over tau, weighted by rate * exp(-rate * tau), of value(state at tau with it) - value(state without).

    `until` is exp(-rate * that time). Where no end is known this is the plain difference of values.
    """
    since, total = 1.0, 0.0
    for i in range(count):
        left = max(w.weight[i], until)
        total += (since - left) * (r.value[t.after[w.path[i], k]] - r.value[w.path[i]])
        since = left
        if left <= until:
            break
    return total


@compiled()
def capability(t: Tables, r: Rule, w: World, old: int, new: int) -> int:
    """The weights of the profiles that the node can still place when a GPU goes from state `old` to `new`."""
    total = 0
    for p in range(len(w.room)):
        if w.room[p] + t.fits[new, p] - t.fits[old, p] > 0:
            total += r.capability[p]
    return total


@compiled()
def fit(t: Tables, w: World, profiles: Array, kept: int, low: int, high: int) -> bool:
    """Whether all of these profiles can be placed together on the GPUs from `low` to `high` - 1, none of them on GPU
    `kept`. Exact: all ways are tried."""
    base, states = len(t.overlaps), w.state
    spots, depth = w.spots, 0
    spots[0] = -1
    while 0 <= depth < len(profiles):
        p, spot, found = profiles[depth], spots[depth], -1
        if spot >= 0 and w.placed[depth] == 1:  # back here: take it off again, and go on after it
            states[spot // base] = t.before[states[spot // base], spot % base]
            w.placed[depth] = 0
        for g in range(max(low, (spot + 1) // base), high):
            state = states[g]
            if g == kept or t.fits[state, p] == 0:
                continue
            for k in range(t.first[p], t.first[p + 1]):
                if t.after[state, k] >= 0 and g * base + k > spot:
                    found = g * base + k
                    break
            if found >= 0:
                break
        if found < 0:
            depth -= 1
            continue
        spots[depth], w.placed[depth] = found, 1
        states[found // base] = t.after[states[found // base], found % base]
        depth += 1
        if depth < len(profiles):  # alike instances are placed in one order only
            spots[depth] = found if profiles[depth] == p else -1
            w.placed[depth] = 0
    fits = depth == len(profiles)
    while depth > 0:
        depth -= 1
        spot = spots[depth]
        states[spot // base] = t.before[states[spot // base], spot % base]
        w.placed[depth] = 0
    return fits


@inlined()
def decide(t: Tables, node: Node, r: Rule, w: World, profile: int, end: float, now: float, rest: Array, n: int) -> int:
    """The GPU and placement (GPU * number of placements + placement) of an instance on node n, -1 if none is offered.

    Only places are offered that leave room for all of `rest`, the profiles that the same job still needs.
    """
    best, chosen = LEAST, -1
    timed = r.rate > 0.0
    plain = not (timed or r.random or node.lazy or r.capability[0] != 0 or len(rest))
    over = end > w.clock[DRAINED] or end == np.inf
    kept = w.tally[RESERVED] if over and t.profile_memory[profile] < t.slots else -1
    size = len(w.state) // node.nodes
    for empties in (False, True):
        for g in range(n * size, n * size + size):
            state = w.state[g]
            if t.fits[state, profile] == 0 or (node.elastic and empties != (state == 0)):
                continue
            if g == kept:
                continue
            if plain:
                k = r.best[state, profile]
                if r.score[state, k] > best:
                    best, chosen = r.score[state, k], g * len(t.overlaps) + k
            else:
                if timed:
                    w.gains[:] = 0.0
                    for guess in range(r.draws):
                        foreseen = foresee(t, r, w, g, now, guess)
                        until = np.exp(-r.rate * remaining(r, 0.0, end - now, (guess + 0.5) / r.draws))
                        for k in range(t.first[profile], t.first[profile + 1]):
                            if t.after[state, k] >= 0:
                                w.gains[k] += over_time(t, r, w, foreseen, k, until)
                for k in range(t.first[profile], t.first[profile + 1]):
                    new = t.after[state, k]
                    if new < 0:
                        continue
                    if r.random:
                        score = draw(w)
                    elif timed:
                        score = 2 * int(np.rint(w.gains[k] / r.draws * 1e6))
                    else:
                        score = r.score[state, k]
                        if r.capability[0] != 0:
                            score += capability(t, r, w, state, new) * 10**10
                    if (w.idle[g] >> k) & 1:
                        score += r.bonus
                    elif r.toll:
                        doomed = w.idle[g] & t.overlaps[k]
                        while doomed:
                            doomed &= doomed - 1
                            score -= r.toll
                    if score > best:
                        if len(rest):
                            w.state[g] = new
                            room = fit(t, w, rest, kept, n * size, n * size + size)
                            w.state[g] = state
                            if not room:
                                continue
                        best, chosen = score, g * len(t.overlaps) + k
            if chosen >= 0 and (r.lowest or (node.elastic and empties)):
                return chosen  # one empty GPU is as good as another
        if chosen >= 0 or not node.elastic:
            break
    return chosen


@compiled()
def lacking(t: Tables, node: Node, r: Rule, w: World, g: int) -> int:
    """The first instance that is wanted on a GPU and not there, -1 if there is none: beside what is busy, and what was
    used or made lately, it is filled with the profiles that are expected, by memory slices and the fewer of them are
    planned already, each where it costs least value (as `policy.model.wish`)."""
    state = w.state[g]
    for k in range(len(t.overlaps)):
        if (w.idle[g] >> k) & 1 and w.clock[NOW] - w.used[g, k] < node.spared:
            state = t.after[state, k]
    w.planned[:] = 0.0
    while True:
        profile, most = -1, -1.0
        for p in range(len(w.planned)):
            expected = r.expected[p] * t.profile_memory[p] / (1.0 + w.planned[p])
            if t.fits[state, p] > 0 and expected >= most:
                profile, most = p, expected
        if profile < 0:
            return -1
        spot, best = -1, 0.0
        for k in range(t.first[profile], t.first[profile + 1]):
            new = t.after[state, k]
            if new >= 0:
                value = r.value[new] + r.toll / 2e6 * ((w.idle[g] >> k) & 1)  # less to be made
                if spot < 0 or value > best:
                    spot, best = k, value
        w.planned[profile] += 1.0
        state = t.after[state, spot]
        if not (w.idle[g] >> spot) & 1:
            return spot


@inlined()
def prepare(t: Tables, node: Node, r: Rule, w: World, g: int) -> None:
    """Begin to make what is wanted next on a GPU."""
    k = lacking(t, node, r, w, g)
    w.making[g] = k if k >= 0 else NOTHING
    if k >= 0:
        doomed = w.idle[g] & t.overlaps[k]
        w.idle[g] &= ~doomed
        w.ahead[g] &= ~doomed
        w.made[g] = w.clock[NOW] + node.create
        while doomed:
            doomed &= doomed - 1
            w.made[g] += node.destroy
        push(w, w.made[g], MADE - g)


@inlined()
def appear(w: World, g: int) -> None:
    """The instance that was being made ahead is there."""
    w.used[g, w.making[g]] = w.made[g]
    w.idle[g] |= 1 << w.making[g]
    w.ahead[g] |= 1 << w.making[g]
    w.tally[AHEAD] += 1


@inlined()
def settle(t: Tables, node: Node, w: World, j: int, where: int, end: float) -> float:
    """Give row j its GPU and placement; the time that this takes."""
    now = w.clock[NOW]
    g, k = where // len(t.overlaps), where % len(t.overlaps)
    delay = 0.0
    if node.prewarm and w.making[g] >= 0:  # nothing else can be done to that GPU until then
        delay = w.made[g] - now
        appear(w, g)
        w.making[g] = TAKEN
    doomed = w.idle[g] & t.overlaps[k]
    w.idle[g] &= ~doomed
    w.tally[USED] += (w.ahead[g] >> k) & 1
    w.ahead[g] &= ~doomed
    if (doomed >> k) & 1:
        doomed = 0  # it is there already; nothing else can stand in its way
    else:
        w.created[j] = 1
    delay += node.create * w.created[j]
    while doomed:
        doomed &= doomed - 1
        w.destroyed[j] += 1
        delay += node.destroy
    w.delay[j] = delay
    w.start[j], w.gpu[j], w.placement[j] = now, g, k
    w.began[g, k], w.ends[g, k] = now, end
    become(t, w, g, t.after[w.state[g], k])
    if t.memory[t.after[0, k]] == t.slots:
        w.tally[RESERVED] = -1  # the first job that waited for a whole GPU has one, be it another than the one kept
    return float(delay)


@inlined()
def admitted(t: Tables, node: Node, w: World, jobs: Jobs, j: int, n: int) -> bool:
    """Whether Slurm would start the job whose first row is j on node n."""
    if node.admission == FIT:  # for one instance on one node this is all; the rest is looked at when they are placed
        return bool(w.room[jobs.profile[j]] > 0)
    size = len(w.state) // node.nodes
    states = w.state[n * size : n * size + size]
    compute, memory, most = 0, 0, t.profile_compute[-1]
    if node.admission == NODE_SUMS:
        for row in range(j, j + jobs.rest[j] + 1):
            compute += t.profile_compute[jobs.profile[row]]
            memory += t.profile_memory[jobs.profile[row]]
        for state in states:
            compute += t.compute[state]
            memory += t.memory[state]
        return bool(compute <= most * size and memory <= t.slots * size)
    compute, memory = t.profile_compute[jobs.profile[j]], t.profile_memory[jobs.profile[j]]
    for state in states:  # noqa: SIM110 (numba has no any())
        if t.compute[state] + compute <= most and t.memory[state] + memory <= t.slots:
            return True
    return False


@inlined()
def is_ending(t: Tables, node: Node, w: World, n: int) -> bool:
    """Whether a job of node n is."""
    size = len(w.state) // node.nodes
    for i in range(w.tally[EVENTS]):
        if w.codes[i] >= 0 and w.codes[i] // len(t.overlaps) // size == n and w.times[i] - node.ending <= w.clock[NOW]:
            return True
    return False


@inlined()
def is_busy(t: Tables, node: Node, w: World, profile: int, n: int) -> bool:
    """Whether node n, which does not start a job now, is only busy as far as Slurm knows (its ESLURM_NODES_BUSY)."""
    if node.admission != FIT:
        return True
    size = len(w.state) // node.nodes
    late = w.clock[NOW] < w.gates[n]
    if late or (node.ending > 0.0 and is_ending(t, node, w, n)):
        known = w.told if late else w.state
        for state in known[n * size : n * size + size]:
            if t.fits[state, profile] > 0:
                return True
    return False


@inlined()
def plan(t: Tables, node: Node, w: World, profile: int) -> None:
    """Plan a job for which nodes are only busy on that where a time limit ends first."""
    first, chosen, size = np.inf, -1, len(w.state) // node.nodes
    for n in range(node.nodes):
        if w.plans[n] == np.inf and is_busy(t, node, w, profile, n):
            for g in range(n * size, n * size + size):
                for k in range(len(t.overlaps)):
                    if t.before[w.state[g], k] >= 0 and w.ends[g, k] < first:
                        first, chosen = w.ends[g, k], n
    if chosen >= 0:
        w.plans[chosen] = first


@inlined()
def attempt(t: Tables, node: Node, r: Rule, jobs: Jobs, w: World, j: int) -> int:
    """Start the job whose first row is j if Slurm would and it fits. STARTED, or whether the pass STOPS with it."""
    now, last = w.clock[NOW], j + jobs.rest[j] + 1
    end, outcome, size = now + jobs.limit[j], PASSED, len(w.state) // node.nodes
    for n in range(node.nodes):
        if end > w.plans[n]:
            continue
        closed = now < w.gates[n] or (node.ending > 0.0 and is_ending(t, node, w, n))
        if closed or not admitted(t, node, w, jobs, j, n):
            if node.backfill > 0.0 and is_busy(t, node, w, jobs.profile[j], n):
                outcome = STOPS
            continue
        delay, where = 0.0, -1
        if node.latency > 0.0:
            for g in range(n * size, n * size + size):
                w.told[g] = w.state[g]
        for row in range(j, last):
            where = decide(t, node, r, w, jobs.profile[row], end, now, jobs.profile[row + 1 : last], n)
            if where < 0:  # only ever the first row: none is placed before all are known to fit
                break
            delay += settle(t, node, w, row, where, end)
        if where >= 0:
            for row in range(j, last):
                push(w, now + (delay + jobs.duration[j]), w.gpu[row] * len(t.overlaps) + w.placement[row])
            if node.latency > 0.0:
                w.gates[n] = now + node.latency
                push(w, w.gates[n], WAKE)
            return STARTED
        if node.admission != FIT:
            if w.tally[RESERVED] < 0:
                w.misplaced[j] += 1
                if node.depth:
                    w.ready[j] = now + node.hold
                    push(w, w.ready[j], WAKE)
                if node.refusal > 0.0:
                    w.gates[n] = now + node.refusal
                    push(w, w.gates[n], WAKE)
            return PASSED
    return outcome


@compiled()
def keep_one(t: Tables, w: World) -> None:
    """Reserve the GPU that is expected to drain first; where ends are unknown, the one with the least on it."""
    first, least, chosen = np.inf, t.slots + 1, -1
    for g in range(len(w.state)):
        drained = w.clock[NOW]
        for k in range(len(t.overlaps)):
            if t.before[w.state[g], k] >= 0:
                drained = max(drained, w.ends[g, k])
        busy = t.memory[w.state[g]]
        if drained < first or (drained == first and busy < least):
            first, least, chosen = drained, busy, g
    w.tally[RESERVED], w.clock[DRAINED] = chosen, first


@inlined()
def any_open(w: World) -> bool:
    """Whether some node takes a job now."""
    for gate in w.gates:  # noqa: SIM110 (numba has no any())
        if w.clock[NOW] >= gate:
            return True
    return False


@inlined()
def scan(t: Tables, node: Node, r: Rule, jobs: Jobs, w: World) -> None:
    """Start the waiting jobs that can be, in order of submission, up to one that stops a pass (`Node.backfill`)."""
    j, looked = w.tally[HEAD], 0
    goes_on = w.clock[NOW] >= w.clock[BACKFILL]
    while j >= 0 and looked < node.depth and any_open(w):
        following = w.follower[j]
        looked += 1
        outcome = attempt(t, node, r, jobs, w, j) if w.ready[j] <= w.clock[NOW] else PASSED
        if outcome == STARTED:
            leader = w.leader[j]
            if leader >= 0:
                w.follower[leader] = following
            else:
                w.tally[HEAD] = following
            if following >= 0:
                w.leader[following] = leader
            else:
                w.tally[TAIL] = leader
            w.tally[QUEUED] -= 1
        elif node.reserve and w.tally[RESERVED] < 0 and t.profile_memory[jobs.profile[j]] == t.slots:
            keep_one(t, w)
        if outcome == STOPS and not goes_on:
            break
        if outcome == STOPS:
            plan(t, node, w, jobs.profile[j])
        j = following
    if goes_on and node.backfill > 0.0:
        w.plans[:] = np.inf
        w.clock[BACKFILL] = w.clock[NOW] + node.backfill
        if w.tally[EVENTS] > 0:
            push(w, w.clock[BACKFILL], WAKE)


@compiled()
def advance(t: Tables, node: Node, r: Rule, jobs: Jobs, w: World, until: int) -> None:
    """Go on until `until` jobs have arrived; with more than there are, until nothing is left to happen."""
    total = len(jobs.submit)
    while True:
        arrived = w.tally[ARRIVED]
        arrival = jobs.submit[arrived] if arrived < total else np.inf
        event = w.times[0] if w.tally[EVENTS] > 0 else np.inf
        if arrived >= until or (arrived == total and event == np.inf):
            return
        now = min(event, arrival)
        w.clock[GPU_TIME] += w.tally[NONEMPTY] * (now - w.clock[NOW])
        w.clock[NOW] = now
        if event <= arrival:
            left = False
            while w.tally[EVENTS] > 0 and w.times[0] == now:  # a job's instances leave together
                code = pop(w)
                if code >= 0:
                    g, k = code // len(t.overlaps), code % len(t.overlaps)
                    become(t, w, g, t.before[w.state[g], k])
                    if node.lazy:
                        w.idle[g] |= 1 << k
                        w.used[g, k] = now
                    left = True
                elif code <= MADE:
                    if w.making[MADE - code] >= 0:
                        appear(w, MADE - code)
                    w.making[MADE - code] = LOOK
            if w.tally[QUEUED] > 0:
                scan(t, node, r, jobs, w)
            if node.prewarm:  # who waits comes first
                for g in range(len(w.state)):
                    if w.making[g] == LOOK or (left and w.making[g] == NOTHING):
                        prepare(t, node, r, w, g)
            continue
        w.tally[ARRIVED] += 1 + jobs.rest[arrived]
        if node.depth == 0:
            attempt(t, node, r, jobs, w, arrived)
            continue
        tail = w.tally[TAIL]
        w.leader[arrived], w.follower[arrived] = tail, -1
        if tail >= 0:
            w.follower[tail] = arrived
        else:
            w.tally[HEAD] = arrived
        w.tally[TAIL] = arrived
        w.tally[QUEUED] += 1
        scan(t, node, r, jobs, w)


@compiled()
def choose_all(t: Tables, node: Node, r: Rule, w: World, members: Array, where: Array) -> None:
    """What the rule does on every node whose GPUs are in states of `members`: `where[x, p]` is the GPU and placement of
    profile p where GPU g is in state members[(x // len(members) ** g) % len(members)]."""
    for x in range(len(where)):
        rest = x
        w.room[:] = 0
        for g in range(len(w.state)):
            w.state[g] = members[rest % len(members)]
            rest //= len(members)
            for p in range(len(w.room)):
                w.room[p] += t.fits[w.state[g], p]
        for p in range(len(w.room)):
            where[x, p] = decide(t, node, r, w, p, np.inf, 0.0, NONE, 0)
