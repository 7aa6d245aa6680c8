"""MIG geometry: which instances a GPU can hold, and where.

All lengths and positions are in *memory slices*, the unit of NVML's placements (`start:size`): 8 on an A100 or H100,
4 on an A30, 12 on an RTX PRO 6000. Two instances go together exactly when their placements do not overlap and no
profile exceeds its count; that compute slices then suffice too follows from the placements (a test holds it).
Source of the data: `geometry.json`, which says what was verified; a real GPU is asked through NVML instead.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rms.errors import RequestError

DATA = os.path.join(os.path.dirname(os.path.abspath(__file__)), "geometry.json")

Counts = tuple[int, ...]
"""How many instances of each profile, in the order of some list of profiles."""


class Profile(NamedTuple):
    """One GPU instance profile of a model. `starts` are the legal first memory slices, `limit` is per GPU."""

    name: str
    kind: str
    id: int
    limit: int
    compute: int
    memory: int
    memory_mb: int | None
    starts: tuple[int, ...]
    aliases: tuple[str, ...]

    @property
    def media(self) -> bool:
        """Whether it takes the media engines, of which a GPU has one set: at most one such instance per GPU."""
        return "+me" in self.name

    @property
    def plain(self) -> bool:
        """Whether it is told from others by its slices alone (no media or graphics attribute)."""
        return self.name.endswith("gb")


class Placement(NamedTuple):
    """Where an instance sits: the profile's name, first memory slice and number of memory slices."""

    profile: str
    start: int
    size: int

    @property
    def mask(self) -> int:
        """The memory slices as bits, slice 0 the lowest."""
        return ((1 << self.size) - 1) << self.start

    def __str__(self) -> str:
        return f"{self.profile}@{self.start}:{self.size}"


Layout = tuple[Placement, ...]
"""Placements that go together on one GPU, sorted by start."""


class Geometry:
    """What one GPU model can hold. `profiles` keeps the order of the data: small to large."""

    def __init__(self, model: str, slots: int, profiles: Sequence[Profile], configs: Sequence[str] = ()) -> None:
        self.model = model
        self.slots = slots
        self.profiles = tuple(profiles)
        self.configs = tuple(configs)
        self.by_name = {profile.name: profile for profile in self.profiles}
        self._names = {alias: profile for profile in self.profiles for alias in (profile.name, *profile.aliases)}
        self._placements = {
            profile.name: tuple(Placement(profile.name, start, profile.memory) for start in profile.starts)
            for profile in self.profiles
        }

    @classmethod
    def from_json(cls, model: str, data: Mapping[str, Any]) -> Geometry:
        """The geometry from one entry of `geometry.json`'s models, or from what `to_json` gave."""
        profiles = [
            Profile(
                p["name"],
                p["kind"],
                p["id"],
                p["max"],
                p["compute"],
                p["memory"],
                p["memory_mb"],
                tuple(p["starts"]),
                tuple(p["aliases"]),
            )
            for p in data["profiles"]
        ]
        return cls(model, data["slots"], profiles, data.get("configs", ()))

    def to_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` takes."""
        profiles = [
            {
                "name": p.name,
                "kind": p.kind,
                "id": p.id,
                "max": p.limit,
                "compute": p.compute,
                "memory": p.memory,
                "memory_mb": p.memory_mb,
                "starts": list(p.starts),
                "aliases": list(p.aliases),
            }
            for p in self.profiles
        ]
        return {"slots": self.slots, "profiles": profiles, "configs": list(self.configs)}

    def find(self, name: str) -> Profile:
        """The profile that a user's word means (`3g`, `3g.40gb`, `3g.39gb`). Raises RequestError, naming the known."""
        profile = self._names.get(name.lower())
        if profile is None:
            known = " ".join(p.name for p in self.profiles)
            raise RequestError(f"unknown profile {name[:40]!a}; {self.model} has: {known}")
        return profile

    def names(self) -> dict[str, str]:
        """Every accepted name, in lower case, with the profile's canonical name."""
        return {alias: profile.name for alias, profile in self._names.items()}

    def placements(self, profile: str) -> tuple[Placement, ...]:
        """All placements of a profile on an empty GPU, by start."""
        return self._placements[profile]

    def legal(self, profile: str, taken: Iterable[Placement]) -> list[Placement]:
        """Where an instance of `profile` can be made beside `taken`, by start."""
        mask, alike, media = 0, 0, False
        for placement in taken:
            mask |= placement.mask
            alike += placement.profile == profile
            media = media or self.by_name[placement.profile].media
        wanted = self.by_name[profile]
        if alike >= wanted.limit or (media and wanted.media):
            return []
        return [p for p in self._placements[profile] if not p.mask & mask]

    def frontier(self, profiles: Sequence[str], wanted: Counts, taken: Iterable[Placement] = ()) -> set[Counts]:
        """What one GPU can still hold beside `taken`: the count vectors over `profiles` that no other one exceeds.

        Vectors are cut off at `wanted`, since nobody asks for more: that keeps the set small.
        """
        found: set[Counts] = set()
        base = tuple(taken)

        def extend(held: Layout, counts: Counts, first: int) -> None:
            found.add(counts)
            # Profiles in their order and starts rising within one: each set of placements is visited once.
            for index in range(first, len(profiles)):
                if counts[index] >= wanted[index]:
                    continue
                last = max((p.start for p in held if p.profile == profiles[index]), default=-1)
                grown = (*counts[:index], counts[index] + 1, *counts[index + 1 :])
                for placement in self.legal(profiles[index], base + held):
                    if placement.start > last:
                        extend((*held, placement), grown, index)

        extend((), (0,) * len(profiles), 0)
        return undominated(found)

    def layouts(self, profiles: Sequence[str] | None = None) -> list[Layout]:
        """Every set of placements that goes together on one GPU, the empty one included; A100: 298 of the base five."""
        names = [p.name for p in self.profiles] if profiles is None else list(profiles)
        spots = sorted((p for name in names for p in self._placements[name]), key=lambda p: (p.start, p.profile))
        found: list[Layout] = []

        def extend(held: Layout, first: int) -> None:
            found.append(held)
            for index in range(first, len(spots)):
                if spots[index] in self.legal(spots[index].profile, held):
                    extend((*held, spots[index]), index + 1)

        extend((), 0)
        return found

    def maximal(self, profiles: Sequence[str] | None = None) -> list[Layout]:
        """The layouts to which no instance of `profiles` (default: all) can be added; A100, base five: 19."""
        names = [p.name for p in self.profiles] if profiles is None else list(profiles)
        return [held for held in self.layouts(names) if not any(self.legal(name, held) for name in names)]

    def base(self) -> list[str]:
        """The plain profiles, one per number of compute slices (no double-memory 1g): what the config ids speak of."""
        return [p.name for p in self.profiles if p.plain and not p.kind.endswith("REV2")]

    def config(self, config_id: int) -> Layout:
        """The placements of a numbered layout, 1 to 19 on an A100: each slice count at its first start still free."""
        held: list[Placement] = []
        for slices in self.configs[config_id - 1].split():
            name = self.find(f"{slices}g").name
            end = held[-1].start + held[-1].size if held else 0
            held.append(next(p for p in self._placements[name] if p.start >= end))
        return tuple(held)

    def config_id(self, layout: Iterable[Placement]) -> int | None:
        """The number of a maximal layout, or None where it has none."""
        wanted = tuple(sorted(layout, key=lambda p: p.start))
        return next((i for i in range(1, len(self.configs) + 1) if self.config(i) == wanted), None)


def undominated(vectors: Iterable[Counts]) -> set[Counts]:
    """Those count vectors that no other one reaches in every component."""
    kept: set[Counts] = set()
    for vector in sorted(vectors, reverse=True):  # a vector can only be exceeded by a lexicographically larger one
        if not any(all(a <= b for a, b in zip(vector, other, strict=True)) for other in kept):
            kept.add(vector)
    return kept


def load(model: str) -> Geometry:
    """The geometry of a model by its name in `geometry.json`. Raises RequestError naming the known models."""
    with open(DATA, encoding="utf-8") as file:
        models = json.load(file)["models"]
    if model not in models:
        raise RequestError(f"unknown GPU model {model!r}; known: {' '.join(models)}")
    return Geometry.from_json(model, models[model])


def of_device(pci: str) -> Geometry | None:
    """The geometry of the model with this PCI device id (four hex digits), if `geometry.json` has one."""
    with open(DATA, encoding="utf-8") as file:
        models = json.load(file)["models"]
    return next((Geometry.from_json(name, data) for name, data in models.items() if pci in data["pci"]), None)


def aliases(name: str, kind: str, memory_mb: int) -> tuple[str, ...]:
    """Other names of a profile, by the rule that `geometry.json` follows.

    The short one without memory, unless it is a profile of double memory; and the one with the gigabytes that a driver
    prints which rounds the other way, where that is 1 GB off.
    """
    slices, _, rest = name.partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    attribute = rest.removeprefix(digits).removeprefix("gb")
    short = () if kind.endswith("REV2") else (f"{slices}{attribute}",)
    whole = memory_mb // 1024
    other = {int(digits) - 1: int(digits) - 1, int(digits): int(digits) + 1}.get(whole)
    return (*short, f"{slices}.{other}gb{attribute}") if other else short


def models() -> list[str]:
    """The names of the GPU models in `geometry.json`."""
    with open(DATA, encoding="utf-8") as file:
        return list(json.load(file)["models"])
