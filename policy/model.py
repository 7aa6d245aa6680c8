"""The runtime of the learned policy: reads a model file and decides with it. Plain Python: it runs in a job's Prolog.

A file is a magic line, a CRC of all that follows, the length of a JSON manifest, the manifest, and little-endian
arrays: the sets of placements that a GPU can hold (as bits), the class of each, and the weights of the net that values
the classes for a demand. A GPU model is known by its plain profiles' slices, starts and counts, so boards with equal
placements share a file.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from math import exp, gcd, isfinite, tanh
from operator import mul
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from rms import planner
from rms.geometry import Geometry, Layout, Placement
from rms.planner import Asked, Candidate, Choice, View

if TYPE_CHECKING:
    from policy.transitions import Transitions

WEIGHTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "weights")
MAGIC = b"RMS policy 2\n"
MOST_BYTES = 1 << 20
"""The largest file that is read; the larger one of those that ship has 31 kB."""
PRIOR = 32.0
"""How many requests a model's prior counts for in the estimate of the demand."""
SAME = 1.0
"""Limits that differ by less (seconds) are the same one."""
GUESSES = 3
"""How many guesses of the remaining times a score is the mean of."""
GOLDEN = 0.6180339887498949
"""Spreads the quantiles of placements evenly, here and in `policy.simulator`."""
FEW = 16
"""On nodes of more GPUs, slices that are stranded count (`stranded`)."""
TELLING = 8
"""From so few limits, or ended jobs, nothing is concluded."""

Layers = Sequence[tuple[Sequence[Sequence[float]], Sequence[float]]]


class ModelError(Exception):
    """There is no model to decide with, and why."""


class Times(NamedTuple):
    """What the times of jobs say. The future's weight falls by `rate` per second (0: limits say nothing); `ratios`,
    rising, are the parts of their limits that the last jobs ran for."""

    rate: float = 0.0
    ratios: Sequence[float] = (1.0,)

    @property
    def guesses(self) -> int:
        """How many guesses of the remaining times are worth while."""
        return GUESSES if self.ratios[0] < self.ratios[-1] else 1


class Model(NamedTuple):
    """A model as read. `places` numbers the plain placements by compute slices, memory slices and start; `classes` maps
    the set of numbers that are held, as bits, to its class. The net has two values for each class: at a moment, and for
    integrating over the times that are known. `foresight` is a rate per mean duration, `reuse` what making an
    instance costs, and destroying one, beside the value of GPUs, `stranding` a GPU all of whose slices are stranded in
    a pool without end."""

    name: str
    plain: tuple[str, ...]
    sizes: tuple[int, ...]
    of_profile: tuple[tuple[int, ...], ...]
    places: Mapping[tuple[int, int, int], int]
    classes: Mapping[int, int]
    layers: Layers
    prior: tuple[float, ...]
    foresight: float
    reuse: float
    stranding: float
    trained: tuple[tuple[float, float], ...]
    """The least and the largest share of each profile in the mixes that it was trained on."""
    manifest: Mapping[str, Any]


class Basis(NamedTuple):
    """What a decision goes by beside the GPUs: the shares of the profiles in the demand, how many instances were asked
    for here lately, and what is known of times."""

    shares: tuple[float, ...]
    seen: int
    times: Times


def signature(geometry: Geometry) -> list[list[Any]]:
    """What boards that share a model have in common: slices, starts and number of each plain profile. Memory slices
    count in the largest unit of which all are multiples: an RTX PRO 6000 has an A30's placements, thrice as wide."""
    u = width(geometry)
    plain = [p for p in geometry.profiles if p.plain]
    return [[geometry.slots // u], *([p.compute, p.memory // u, [s // u for s in p.starts], p.limit] for p in plain)]


def width(geometry: Geometry) -> int:
    """The memory slices that every plain placement's are multiples of."""
    plain = [p for p in geometry.profiles if p.plain]
    return gcd(geometry.slots, *(p.memory for p in plain), *(start for p in plain for start in p.starts))


def pack(
    moves: Transitions,
    layers: Layers,
    prior: Sequence[float],
    rule: Mapping[str, float],
    made: Mapping[str, Any],
    trained: Sequence[Sequence[float]],
) -> bytes:
    """The bytes of a model file. `rule` has foresight, reuse and stranding, `made` is for people: how it came to be;
    the rest is as in `Model`."""
    weights = array("f", [w for rows, biases in layers for row in (*rows, biases) for w in row])
    arrays = (array("I", moves.held), array("B", moves.classes), weights)
    if sys.byteorder == "big":
        for one in arrays:
            one.byteswap()
    body = b"".join(one.tobytes() for one in arrays)
    manifest = {
        "board": signature(moves.geometry),
        "states": len(moves.held),
        "shape": [len(layers[0][0][0]), *(len(biases) for _, biases in layers)],
        "prior": list(prior),
        "trained": [list(pair) for pair in trained],
        **rule,
        "made": made,
    }
    head = json.dumps(manifest, separators=(",", ":")).encode()
    return MAGIC + struct.pack("<II", zlib.crc32(head + body), len(head)) + head + body


def unpack(data: bytes, geometry: Geometry) -> Model:
    """The model from a file's bytes. Raises ModelError if it is damaged, or not for boards like this."""
    try:
        if not data.startswith(MAGIC):
            raise ModelError("is no model of this version")
        crc, length = struct.unpack_from("<II", data, len(MAGIC))
        start = len(MAGIC) + 8
        if zlib.crc32(data[start:]) != crc:
            raise ModelError("is damaged")
        manifest = json.loads(data[start : start + length])
        body = data[start + length :]
        if manifest["board"] != signature(geometry):
            raise ModelError(f"is not for the placements of {geometry.model}")
        states, shape = manifest["states"], manifest["shape"]
        held, classes, weights = array("I"), array("B"), array("f")
        held.frombytes(body[: 4 * states])
        classes.frombytes(body[4 * states : 5 * states])
        weights.frombytes(body[5 * states :])
        if sys.byteorder == "big":
            held.byteswap()
            weights.byteswap()
        layers, at = [], 0
        for inputs, outputs in pairwise(shape):
            rows = [weights[at + i * inputs : at + (i + 1) * inputs] for i in range(outputs)]
            at += inputs * outputs
            layers.append((rows, weights[at : at + outputs]))
            at += outputs
        plain = [p for p in geometry.profiles if p.plain]
        prior = tuple(map(float, manifest["prior"]))
        foresight, reuse, stranding = (float(manifest[name]) for name in ("foresight", "reuse", "stranding"))
        trained = tuple((float(least), float(most)) for least, most in manifest["trained"])
        whole = at == len(weights) and len(held) == len(classes) == states and 2 * (max(classes) + 1) == shape[-1]
        if not whole or not len(prior) == len(trained) == len(plain) == shape[0] - 1:
            raise ModelError("is damaged")
        if not all(map(isfinite, (*weights, *prior, foresight, reuse, stranding))):
            raise ModelError("has weights that are no numbers")
        if not all(least <= share <= most for share, (least, most) in zip(prior, trained, strict=True)):
            raise ModelError("has a prior that it was not trained on")
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, OverflowError, struct.error) as error:
        raise ModelError(f"is damaged ({type(error).__name__})") from error
    places = [(p.compute, p.memory, start) for p in plain for start in p.starts]
    firsts = [sum(len(p.starts) for p in plain[:i]) for i in range(len(plain) + 1)]
    return Model(
        f"{zlib.crc32(data):08x}",
        tuple(p.name for p in plain),
        tuple(p.memory for p in plain),
        tuple(tuple(range(a, b)) for a, b in pairwise(firsts)),
        {place: number for number, place in enumerate(places)},
        dict(zip(held, classes, strict=True)),
        layers,
        prior,
        foresight,
        reuse,
        stranding,
        trained,
        manifest,
    )


def file_name(geometry: Geometry) -> str:
    """What the file of the model for a board is called, in whatever folder."""
    return f"slots{geometry.slots // width(geometry)}.model"


@lru_cache
def load(geometry: Geometry, folder: str = WEIGHTS) -> Model:
    """The model for a board. Raises ModelError if there is none that is whole."""
    path = os.path.join(folder, file_name(geometry))
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES)
    except OSError as error:
        raise ModelError(f"no model for {geometry.model}: {path}: {error.strerror}") from error
    try:
        return unpack(data, geometry)
    except ModelError as error:
        raise ModelError(f"{path} {error}") from None


def in_use(geometry: Geometry, site: str = "", shipped: str = WEIGHTS) -> tuple[Model, str]:
    """The model that decides: that in the folder `site` (`policy.shelf`), the shipped one where there is none that is
    whole. And why the site's own does not, if it should. Raises ModelError if there is neither."""
    if not site or not os.path.lexists(os.path.join(site, file_name(geometry))):
        return load(geometry, shipped), ""
    try:
        return load(geometry, site), ""
    except ModelError as error:
        return load(geometry, shipped), f"{error}; the shipped model stands in"


def values(model: Model, shares: Sequence[float], gpus: int, timed: bool = False) -> list[float]:
    """The value of each class for a demand, on a node of so many GPUs, at a moment or for integrating over time; the
    empty GPU's is 0."""
    x: Sequence[float] = [*clamped(model, shares), float(gpus == 1)]
    for rows, biases in model.layers[:-1]:
        x = [tanh(sum(map(mul, row, x)) + bias) for row, bias in zip(rows, biases, strict=True)]
    rows, biases = model.layers[-1]
    half = slice(len(rows) // 2, None) if timed else slice(len(rows) // 2)
    out = [sum(map(mul, row, x)) + bias for row, bias in zip(rows[half], biases[half], strict=True)]
    return [value - out[0] for value in out]


def worth(model: Model, shares: Sequence[float], gpus: int, timed: bool = False) -> Mapping[int, float]:
    """The value of each set of placements that a GPU can hold (as in `Model.classes`), on a node of so many GPUs."""
    of_class = values(model, shares, gpus, timed and gpus > 1)  # nobody has played on a single GPU
    if gpus <= FEW or not model.stranding:
        return {held: of_class[c] for held, c in model.classes.items()}
    price, lost = model.stranding * (1 - FEW / gpus), stranded(model, shares)
    return {held: of_class[c] - price * lost[held] for held, c in model.classes.items()}


def stranded(model: Model, shares: Sequence[float]) -> Mapping[int, float]:
    """The part of a GPU that is free and of no use, by what it holds: its free slices, times the share of the requests
    that have no place there (the measure of FGD: Weng et al., USENIX ATC 2023)."""
    of_place = {number: memory for (_, memory, _), number in model.places.items()}
    lost: dict[int, float] = {}
    found = {}
    for held, c in model.classes.items():
        if c not in lost:  # states of a class have room for the same
            places = zip(shares, model.of_profile, strict=True)
            lost[c] = sum(share for share, ks in places if not any(free(model, held, k) for k in ks))
        taken = sum(memory for k, memory in of_place.items() if held >> k & 1)
        found[held] = (1 - taken / max(model.sizes)) * lost[c]
    return found


def clamped(model: Model, shares: Sequence[float]) -> Sequence[float]:
    """The shares, if the model was trained on the like of them; else as far towards the prior as is needed for that."""
    back = 0.0
    for share, usual, (least, most) in zip(shares, model.prior, model.trained, strict=True):
        if not least <= share <= most:
            back = max(back, (share - (most if share > most else least)) / (share - usual))
    return (
        [share + back * (usual - share) for share, usual in zip(shares, model.prior, strict=True)] if back else shares
    )


def estimate(model: Model, view: View, geometry: Geometry) -> list[float]:
    """The shares of the profiles in the demand: what was seen here and what waits, beside the prior.

    Who waits has not been seen yet: with them the large profiles, which wait longest, are not underrated.
    """
    counts = [PRIOR * share for share in model.prior]
    alike = plain_names(geometry)
    for demand in (*view.recent, *(view.pending or ())):
        for profile, count in demand.request.items:
            if (name := alike.get(profile)) is not None:
                counts[model.plain.index(name)] += count
    total = sum(counts)
    return [count / total for count in counts]


@lru_cache
def plain_names(geometry: Geometry) -> Mapping[str, str]:
    """Every profile's plain one of the same slices: an attribute (`+me`) changes nothing about room."""
    of_slices = {(p.compute, p.memory): p.name for p in geometry.profiles if p.plain}
    return {p.name: of_slices[p.compute, p.memory] for p in geometry.profiles if (p.compute, p.memory) in of_slices}


def times(model: Model, view: View) -> Times:
    """What this node's past says of time limits. They count in mean durations, so that limits which are all too long by
    the same factor change nothing; and for how much of theirs jobs run is learned from those that have ended.

    Where most jobs have no limit, or all the same one (a partition's default), limits say nothing.
    """
    limits = [d.limit or 0.0 for d in view.recent]
    if not limits:
        return Times()
    usual = sorted(limits)[len(limits) // 2]  # what more than half have in common is their median
    alike = 2 * sum(abs(limit - usual) < SAME for limit in limits) > len(limits)
    if usual <= 0.0 or (alike and len(limits) >= TELLING):
        return Times()
    if len(view.ended) >= TELLING:
        mean = sum(e.ran for e in view.ended) / len(view.ended)
        return Times(model.foresight / mean, sorted(round(min(e.ran / e.limit, 1.0), 3) for e in view.ended))
    known = [limit for limit in limits if limit > 0.0]
    return Times(model.foresight * len(known) / sum(known))


def choose(view: View, asked: Asked, candidates: Sequence[Candidate], site: str = "", shipped: str = WEIGHTS) -> Choice:
    """`rms.planner.Choose`: where the value of the GPUs, over the known remaining times, grows most.

    Ties by GPU, then start. The model is that of the folder `site`, else the shipped one; where there is none for the
    boards, or no answer by `view.until`, the built-in rule decides. `fault` says so.
    """
    geometry = view.gpus[candidates[0].gpu].geometry
    try:
        model, fault = in_use(geometry, site, shipped)
        if any(signature(view.gpus[c.gpu].geometry) != model.manifest["board"] for c in candidates):
            raise ModelError("GPUs that are not alike: no model compares them")
        return decide(model, basis(model, view, geometry), view, asked, candidates)._replace(fault=fault)
    except ModelError as error:
        return planner.built_in(view, asked, candidates)._replace(fault=f"{error}; the built-in rule stands in")


def basis(model: Model, view: View, geometry: Geometry) -> Basis:
    """What a node's past, and the queue, say."""
    seen = sum(count for d in view.recent for _, count in d.request.items)
    return Basis(tuple(estimate(model, view, geometry)), seen, times(model, view))


def written(model: Model, known: Basis) -> dict[str, Any]:
    """A basis for the audit log, as JSON; `clamped` is what the demand was taken for, where that is something else."""
    taken = clamped(model, known.shares)
    return {
        "demand": dict(zip(model.plain, known.shares, strict=True)),
        "clamped": None if taken is known.shares else dict(zip(model.plain, taken, strict=True)),
        "seen": known.seen,
        "rate": known.times.rate,
        "ratios": list(known.times.ratios),
    }


def reread(model: Model, logged: Mapping[str, Any]) -> Basis:
    """The basis that `written` wrote. Raises KeyError, TypeError."""
    shares = tuple(logged["demand"][name] for name in model.plain)
    return Basis(shares, logged["seen"], Times(logged["rate"], logged["ratios"]))


def decide(model: Model, known: Basis, view: View, asked: Asked, candidates: Sequence[Candidate]) -> Choice:
    """The model's choice. Raises ModelError where it is not made in time."""
    value = worth(model, known.shares, len(view.gpus), known.times.rate > 0)
    scores = score(model, value, view, asked, candidates, known.times)
    best = min(range(len(candidates)), key=lambda i: (-scores[i], candidates[i].gpu, candidates[i].placement.start))
    chosen = candidates[best]
    mix = " ".join(f"{name} {share:.2f}" for name, share in zip(model.plain, known.shares, strict=True))
    return Choice(
        chosen,
        tuple(s / 2e6 for s in scores),
        f"most value left for the demand {mix}"
        + (f", jobs of {minutes(model, known.times)} min" if known.times.rate else ""),
        "learned",
        model.name,
        layout(model, value, known, view.gpus[chosen.gpu], chosen.placement),
        written(model, known),
    )


def wish(view: View, index: int, site: str = "") -> Sequence[Placement]:
    """What the policy has in mind for the free slices of a GPU, what it expects most first; nothing without a model."""
    gpu = view.gpus[index]
    try:
        model, _ = in_use(gpu.geometry, site)
    except ModelError:
        return ()
    known = basis(model, view, gpu.geometry)
    value = worth(model, known.shares, len(view.gpus), known.times.rate > 0)
    return planned(model, value, known.shares, gpu, gpu.taken)


def minutes(model: Model, known: Times) -> str:
    """How long jobs run, for people: the mean, and the part of their time limits that this is."""
    mean = sum(known.ratios) / len(known.ratios)
    return f"{model.foresight / known.rate / 60:.0f}" + (f" ({mean:.0%} of the limits)" if known.guesses > 1 else "")


def score(
    model: Model, value: Mapping[int, float], view: View, asked: Asked, candidates: Sequence[Candidate], known: Times
) -> list[int]:
    """Each candidate's gain in value, over time, less what making and destroying instances costs; in half millionths,
    so that an idle instance to reuse breaks ties. Raises ModelError where that takes longer than the view allows."""
    guesses = range(known.guesses)
    until = []
    for guess in guesses:
        left = None
        if asked.end is not None:
            left = remaining(known.ratios, 0.0, asked.end - view.now, (guess + 0.5) / known.guesses)
        until.append(exp(-known.rate * left) if known.rate and left is not None else 0.0)
    toll = 2 * round(model.reuse * 1e6)
    paths: dict[int, list[list[tuple[int, float]]]] = {}
    found = []
    for candidate in candidates:
        if monotonic() > view.until:
            raise ModelError("the policy took too long")
        gpu = view.gpus[candidate.gpu]
        if candidate.gpu not in paths:
            paths[candidate.gpu] = [foresee(model, gpu, view.now, known, guess) for guess in guesses]
        bit = number(model, gpu.geometry, candidate.placement)
        total = 0.0
        for path, least in zip(paths[candidate.gpu], until, strict=True):
            total += over_time(value, path, bit, least)
        saved = toll + 1 if candidate.reuse else -toll * len(candidate.destroys)
        found.append(2 * round(total / len(until) * 1e6) + saved)
    return found


def over_time(value: Mapping[int, float], path: Sequence[tuple[int, float]], bit: int, until: float) -> float:
    """What an instance adds to the value of a GPU that empties like this, over the time that it stays itself."""
    since, total = 1.0, 0.0
    for held, lasts in path:
        left = max(lasts, until)
        total += (since - left) * (value[held | bit] - value[held])
        since = left
        if left <= until:
            break
    return total


def number(model: Model, geometry: Geometry, placement: Placement) -> int:
    """The bit of a placement, or of the plain one that takes the same slices."""
    return 1 << model.places[geometry.by_name[placement.profile].compute, placement.size, placement.start]


def remaining(ratios: Sequence[float], age: float, limit: float, quantile: float) -> float | None:
    """How much longer a job of that age and time limit is guessed to run: what a quantile of the jobs that came so far
    into their limits did. Beyond all of them it is the limit that counts; None where that is past."""
    first = bisect_right(ratios, age, key=lambda ratio: ratio * limit)
    many = len(ratios) - first
    if many == 0:
        return limit - age if age < limit else None
    return ratios[first + int(quantile * many)] * limit - age


def foresee(model: Model, gpu: planner.GpuView, now: float, known: Times, guess: int) -> list[tuple[int, float]]:
    """How a GPU is guessed to empty: what it holds, and until when, as exp(-rate * time). What has no known end, or
    should be over already, stays."""
    held = sum(number(model, gpu.geometry, p) for p in gpu.taken)
    leaving = []
    if known.rate:
        for busy in gpu.busy:
            if busy.end is None:
                continue
            bit = number(model, gpu.geometry, busy.placement)
            quantile = ((guess + 0.5) / known.guesses + (bit.bit_length() - 1) * GOLDEN) % 1.0
            left = remaining(known.ratios, now - busy.start, busy.end - busy.start, quantile)
            if left is not None:
                leaving.append((left, bit))
    path = []
    for left, bit in sorted(leaving):
        path.append((held, exp(-known.rate * left)))
        held -= bit
    return [*path, (held, 0.0)]


def layout(model: Model, value: Mapping[int, float], known: Basis, gpu: planner.GpuView, new: Placement) -> Layout:
    """The layout that the policy has in mind for a GPU where `new` is placed now: a request that was seen too."""
    shares = list(known.shares)
    shares[model.plain.index(plain_names(gpu.geometry)[new.profile])] += 1 / (PRIOR + known.seen)
    held = (*gpu.taken, new)
    return tuple(sorted((*held, *planned(model, value, shares, gpu, held)), key=lambda p: p.start))


def planned(
    model: Model, value: Mapping[int, float], shares: Sequence[float], gpu: planner.GpuView, taken: Layout
) -> list[Placement]:
    """The slices beside what is taken, filled with the profiles that are expected: by memory slices and the fewer of
    them are planned already, each where it costs least value, to which the price of making it counts."""
    held = sum(number(model, gpu.geometry, p) for p in taken)
    idle = sum(number(model, gpu.geometry, p) for p in gpu.idle)
    here = [0] * len(shares)
    found: list[Placement] = []
    while True:
        open_to = [p for p, places in enumerate(model.of_profile) if any(free(model, held, k) for k in places)]
        if not open_to:
            return found
        profile = max(open_to, key=lambda p: (shares[p] * model.sizes[p] / (1 + here[p]), p))
        spots = [k for k in model.of_profile[profile] if free(model, held, k)]
        spot = max(spots, key=lambda k: value[held | 1 << k] + model.reuse * (idle >> k & 1))
        here[profile] += 1
        held |= 1 << spot
        found.append(gpu.geometry.placements(model.plain[profile])[model.of_profile[profile].index(spot)])


def free(model: Model, held: int, place: int) -> bool:
    """Whether a place can be taken beside what is held."""
    return not held >> place & 1 and held | 1 << place in model.classes
