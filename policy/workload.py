"""Streams of jobs: demand mixes, service times, time limits. The mean service time is 1, all times are in that unit."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from policy.transitions import Transitions

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

MIXES = {
    "uniform": (1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6, 1 / 6),
    "skew-small": (0.30, 0.25, 0.20, 0.10, 0.10, 0.05),
    "skew-big": (0.05, 0.10, 0.10, 0.20, 0.25, 0.30),
    "bimodal": (0.30, 0.15, 0.05, 0.05, 0.15, 0.30),
}
"""Shares of requests by profile, small to large, for the six plain profiles of a board with seven compute slices."""

SERVICES = ("exponential", "hyperexponential", "lognormal", "pareto")
LIMITS = ("exact", "1to3", "1to10", "rounded", "some", "default", "none")

ROUND = np.array([0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0])
"""What users round their limits up to."""

UNKNOWN = np.inf
"""The time limit of a job that has none, and the expected end that follows."""


class Jobs(NamedTuple):
    """A stream in order of submission: when, which profile (its number), how long it will run, its time limit.

    A job of several instances has a row for each, largest first; `rest` counts those that follow and belong to it.
    """

    submit: Floats
    profile: Ints
    duration: Floats
    limit: Floats
    rest: Ints


def first_rows(jobs: Jobs) -> Bools:
    """Which rows are the first of a job."""
    return np.concatenate([[True], jobs.rest[:-1] == 0])[: len(jobs.rest)]


def mix(name: str, transitions: Transitions) -> Floats:
    """A named mix for a GPU model. Where a board has three plain profiles each stands for two neighbours of the six."""
    shares = np.array(MIXES[name])
    return np.asarray(shares.reshape(len(transitions.profiles), -1).sum(axis=1))


def sizes(transitions: Transitions) -> Floats:
    """The memory slices of each profile."""
    by_name = transitions.geometry.by_name
    return np.array([by_name[name].memory for name in transitions.profiles], dtype=np.float64)


def rate(transitions: Transitions, shares: Floats, load: float, gpus: int) -> float:
    """Requests per mean service time at which the offered memory slices are `load` of what the GPUs have."""
    return float(load * transitions.geometry.slots * gpus / (shares @ sizes(transitions)))


def durations(rng: np.random.Generator, service: str, count: int) -> Floats:
    """Service times of mean 1."""
    if service == "exponential":
        return rng.exponential(size=count)
    if service == "hyperexponential":  # two exponentials of equal share in the work, squared variation 4
        often = (1 + np.sqrt(3 / 5)) / 2
        share = np.where(rng.random(count) < often, often, 1 - often)
        return np.asarray(rng.exponential(size=count) / (2 * share))
    if service == "lognormal":  # squared variation 8.5
        return rng.lognormal(-(1.5**2) / 2, 1.5, count)
    if service == "pareto":  # tail index 2.1: the variance is finite, hardly
        return np.asarray((1 + rng.pareto(2.1, count)) * (1.1 / 2.1))
    raise ValueError(f"unknown service {service!r}; known: {' '.join(SERVICES)}")


def limits(rng: np.random.Generator, kind: str, duration: Floats) -> Floats:
    """Time limits as users give them: right, too long by a factor, the partition's default, or none."""
    if kind == "exact":
        return duration.copy()
    if kind in ("1to3", "1to10"):
        return duration * rng.uniform(1, 3 if kind == "1to3" else 10, len(duration))
    if kind == "rounded":  # up to the next of what people write
        return np.asarray(np.maximum(duration, ROUND[np.minimum(np.searchsorted(ROUND, duration), len(ROUND) - 1)]))
    if kind == "some":  # two thirds say something, 1 to 3 times too long
        return np.where(rng.random(len(duration)) < 2 / 3, duration * rng.uniform(1, 3, len(duration)), UNKNOWN)
    if kind == "default":  # 10 mean service times; who needs more says so
        return np.maximum(duration, 10.0)
    if kind == "none":
        return np.full(len(duration), UNKNOWN)
    raise ValueError(f"unknown limits {kind!r}; known: {' '.join(LIMITS)}")


def stream(
    transitions: Transitions,
    seed: int,
    count: int,
    shares: Floats,
    load: float,
    gpus: int,
    service: str = "exponential",
    limit: str = "none",
    pairs: float = 0.0,
) -> Jobs:
    """Poisson arrivals. The same seed gives the same submits, profiles and durations whatever the limits are.

    `pairs` is the share of jobs that ask for two instances, both of profiles that take at most half a GPU.
    """
    rng = np.random.default_rng(seed)
    submit = np.cumsum(rng.exponential(1 / rate(transitions, shares, load, gpus), count))
    profile = rng.choice(len(shares), count, p=shares)
    duration = durations(rng, service, count)
    jobs = Jobs(submit, profile, duration, limits(rng, limit, duration), np.zeros(count, dtype=np.int64))
    return paired(rng, jobs, transitions, shares, pairs) if pairs else jobs


def paired(rng: np.random.Generator, jobs: Jobs, transitions: Transitions, shares: Floats, pairs: float) -> Jobs:
    """The stream with that share of its jobs asking for two instances; later, so that the load stays the same."""
    memory = sizes(transitions)
    halves = np.where(memory <= transitions.geometry.slots / 2, shares, 0.0)
    two = rng.choice(len(shares), (len(jobs.submit), 2), p=halves / halves.sum())
    two = np.sort(two, axis=1)[:, ::-1]  # profiles are numbered small to large
    chosen = rng.random(len(jobs.submit)) < pairs
    first = np.where(chosen, two[:, 0], jobs.profile)
    slower = 1 - pairs + pairs * 2 * float(halves @ memory / halves.sum()) / float(shares @ memory)
    again = np.repeat(np.arange(len(chosen)), 1 + chosen)
    second = np.concatenate([[False], again[1:] == again[:-1]])
    return Jobs(
        jobs.submit[again] * slower,
        np.where(second, two[again, 1], first[again]),
        jobs.duration[again],
        jobs.limit[again],
        np.where(second, 0, chosen[again]).astype(np.int64),
    )
