"""Geometry against what is published of it, and every search in it against brute force."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rms import geometry
from rms.errors import RequestError
from rms.geometry import Counts, Geometry, Placement, load, models, undominated

MODELS = ["A100-40GB", "A100-80GB", "A30", "H100-80GB", "H100-NVL", "H200", "RTX-PRO-6000"]
SEVEN_SLICES = ["A100-40GB", "A100-80GB", "H100-80GB", "H100-NVL", "H200"]

# One row a profile of NVIDIA's boards with seven compute slices, whatever its memory is called:
# compute, kind, id, most on a GPU, memory slices, first slices.
PATTERN = [
    ("1g", "1_SLICE", 19, 7, 1, [0, 1, 2, 3, 4, 5, 6]),
    ("1g+me", "1_SLICE_REV1", 20, 1, 1, [0, 1, 2, 3, 4, 5, 6]),
    ("1g", "1_SLICE_REV2", 15, 4, 2, [0, 2, 4, 6]),
    ("2g", "2_SLICE", 14, 3, 2, [0, 2, 4]),
    ("3g", "3_SLICE", 9, 2, 4, [0, 4]),
    ("4g", "4_SLICE", 5, 1, 4, [0]),
    ("7g", "7_SLICE", 0, 1, 8, [0]),
]
NAMES = {
    "A100-40GB": "1g.5gb 1g.5gb+me 1g.10gb 2g.10gb 3g.20gb 4g.20gb 7g.40gb",
    "A100-80GB": "1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb",
    "A30": "1g.6gb 1g.6gb+me 2g.12gb 2g.12gb+me 4g.24gb",
    "H100-80GB": "1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb",
    "H100-NVL": "1g.12gb 1g.12gb+me 1g.24gb 2g.24gb 3g.47gb 4g.47gb 7g.94gb",
    "H200": "1g.18gb 1g.18gb+me 1g.35gb 2g.35gb 3g.71gb 4g.71gb 7g.141gb",
    "RTX-PRO-6000": "1g.24gb 1g.24gb+me 1g.24gb+gfx 1g.24gb+me.all 1g.24gb-me "
    "2g.48gb 2g.48gb+gfx 2g.48gb+me.all 2g.48gb-me 4g.96gb 4g.96gb+gfx",
}

# The numbered layouts of the A100, left to right, each instance as compute slices @ first memory slice.
FIGURE = {
    1: "7@0",
    2: "4@0 3@4",
    3: "4@0 2@4 1@6",
    4: "4@0 1@4 1@5 1@6",
    5: "3@0 3@4",
    6: "3@0 2@4 1@6",
    7: "3@0 1@4 1@5 1@6",
    8: "2@0 2@2 3@4",
    9: "2@0 1@2 1@3 3@4",
    10: "1@0 1@1 2@2 3@4",
    11: "1@0 1@1 1@2 1@3 3@4",
    12: "2@0 2@2 2@4 1@6",
    13: "2@0 1@2 1@3 2@4 1@6",
    14: "1@0 1@1 2@2 2@4 1@6",
    15: "2@0 1@2 1@3 1@4 1@5 1@6",
    16: "1@0 1@1 2@2 1@4 1@5 1@6",
    17: "1@0 1@1 1@2 1@3 2@4 1@6",
    18: "2@0 2@2 1@4 1@5 1@6",  # the figure has 1 1 1 1 1 2 here: no GPU can make it, since 2g never starts at 5
    19: "1@0 1@1 1@2 1@3 1@4 1@5 1@6",
}

# The survey that geometry.json was condensed from, where it lies beside the repository.
SURVEY = Path(__file__).parents[2] / "shared" / "facts" / "mig-geometry.json"
SURVEY_NAMES = {
    "A30": "A30-24GB",
    "H100-NVL": "H100-NVL-94GB",
    "H200": "H200-141GB",
    "RTX-PRO-6000": "RTX-PRO-6000-Blackwell-96GB",
}


def data() -> dict[str, Any]:
    entries: dict[str, Any] = json.loads(Path(geometry.DATA).read_text())["models"]
    return entries


def brute_layouts(known: Geometry, names: list[str]) -> set[frozenset[Placement]]:
    """Every legal layout, by trying for each placement in turn to have it or not; the rules written out once more."""
    spots = [Placement(p.name, s, p.memory) for p in known.profiles if p.name in names for s in p.starts]
    found: set[frozenset[Placement]] = set()

    def decide(index: int, held: list[Placement], slices: frozenset[int]) -> None:
        if index == len(spots):
            found.add(frozenset(held))
            return
        decide(index + 1, held, slices)
        spot = spots[index]
        covered = set(range(spot.start, spot.start + spot.size))
        most = known.by_name[spot.profile].limit
        media = "+me" in spot.profile and any("+me" in p.profile for p in held)
        if not covered & slices and sum(p.profile == spot.profile for p in held) < most and not media:
            decide(index + 1, [*held, spot], slices | covered)

    decide(0, [], frozenset())
    return found


def counts_of(layout: frozenset[Placement], names: list[str]) -> Counts:
    counted = Counter(p.profile for p in layout)
    return tuple(counted[name] for name in names)


# The data.


def test_models() -> None:
    assert models() == MODELS
    with pytest.raises(RequestError, match=r"^unknown GPU model 'V100'; known: A100-40GB .* RTX-PRO-6000$"):
        load("V100")


@pytest.mark.parametrize("model", MODELS)
def test_model_is_consistent(model: str) -> None:
    known = load(model)
    assert [p.name for p in known.profiles] == NAMES[model].split()
    assert Geometry.from_json(model, json.loads(json.dumps(known.to_json()))).profiles == known.profiles
    largest = max(known.profiles, key=lambda p: p.memory)
    for p in known.profiles:
        assert p.name.startswith(f"{p.compute}g.")
        assert list(p.starts) == sorted(set(p.starts))
        assert all(start >= 0 and start + p.memory <= known.slots for start in p.starts)
        assert 1 <= p.limit <= len(p.starts)
        assert (p.limit == 1) if p.media else True
        assert [placement.start for placement in known.placements(p.name)] == list(p.starts)
        if p.memory_mb:  # the name is a little generous: 1g.18gb has 16 GiB, 2g.35gb 32.5
            assert 0.88 < p.memory_mb / 1024 / int(re.findall(r"\.(\d+)gb", p.name)[0]) < 1.01
            assert p.memory_mb * largest.memory <= (largest.memory_mb or 0) * p.memory * 1.01
    assert len({p.kind for p in known.profiles}) == len(known.profiles) == len({p.id for p in known.profiles})
    assert largest.memory == known.slots


@pytest.mark.parametrize("model", SEVEN_SLICES)
def test_boards_with_seven_slices_follow_the_pattern(model: str) -> None:
    entry = data()[model]
    assert entry["slots"] == 8
    for p, (name, kind, number, most, memory, starts) in zip(entry["profiles"], PATTERN, strict=True):
        assert (re.sub(r"\.\d+gb", "", p["name"]), p["kind"], p["id"], p["max"]) == (name, kind, number, most)
        assert (p["compute"], p["memory"], p["starts"]) == (int(name[0]), memory, starts)


def test_verified_says_what_was_seen_on_a_real_gpu() -> None:
    for model, entry in data().items():
        for p in entry["profiles"]:
            if model != "H200":
                assert p["verified"] == ["id", "placements"], (model, p["name"])
            else:  # only a list of the ids 19, 20, 14 and 0 is published
                assert p["verified"] == (["id"] if p["id"] in (19, 20, 14, 0) else []), p["name"]


@pytest.mark.skipif(not SURVEY.exists(), reason="the survey is not beside the repository")
@pytest.mark.parametrize("model", MODELS)
def test_data_is_the_surveys(model: str) -> None:
    entry, survey = data()[model], json.loads(SURVEY.read_text())["gpus"][SURVEY_NAMES.get(model, model)]
    assert (entry["slots"], entry["pci"]) == (survey["grid"], survey["pci"])
    assert len(entry["profiles"]) == len(survey["profiles"])
    for mine, theirs in zip(
        sorted(entry["profiles"], key=lambda p: p["name"]),
        sorted(survey["profiles"], key=lambda p: p["name"]),
        strict=True,
    ):
        assert mine["name"] == theirs["name"].removeprefix("MIG ")
        assert f"NVML_GPU_INSTANCE_PROFILE_{mine['kind']}" == theirs["nvml_enum_const"]
        for key, name in [
            ("id", "profile_id"),
            ("max", "max_instances"),
            ("compute", "compute_slices"),
            ("memory", "memory_slots"),
            ("memory_mb", "memory_mb"),
        ]:
            assert mine[key] == theirs[name], (mine["name"], key)
        assert [{"start": start, "size": mine["memory"]} for start in mine["starts"]] == theirs["placements"]
        seen = re.fullmatch(r"verified(?:\(([\d,]+)\).*)?", theirs["id_confidence"])
        ids = seen is not None and (seen[1] is None or str(mine["id"]) in seen[1].split(","))
        assert ("id" in mine["verified"]) == ids, mine["name"]
        assert ("placements" in mine["verified"]) == (theirs["placement_confidence"] == "verified"), mine["name"]


# Names.


@pytest.mark.parametrize("model", MODELS)
def test_names_are_unambiguous(model: str) -> None:
    known = load(model)
    words = [word for p in known.profiles for word in (p.name, *p.aliases)]
    assert len(set(words)) == len(words)
    assert all(word == word.lower() for word in words)
    assert known.names() == {word: p.name for p in known.profiles for word in (p.name, *p.aliases)}
    for word, name in known.names().items():
        assert known.find(word).name == known.find(word.upper()).name == name
        # An alias never changes compute slices or attributes, and rounds the memory by one at most.
        parts, own = (re.fullmatch(r"(\d+)g(?:\.(\d+)gb)?(.*)", text) for text in (word, name))
        assert parts is not None and own is not None
        assert (parts[1], parts[3]) == (own[1], own[3])
        assert parts[2] is None or abs(int(parts[2]) - int(own[2])) <= 1
        if parts[2] is None:  # the short name is the one with the least memory for its compute slices
            rivals = [p for p in known.profiles if re.sub(r"\.\d+gb", "", p.name) == word]
            assert min(rivals, key=lambda p: p.memory).name == name
    assert {known.find(f"{slices}g").compute for slices in {p.compute for p in known.profiles}} == {
        p.compute for p in known.profiles
    }


@pytest.mark.parametrize(
    "word", ["5g", "", "3g.30gb", "3g.80gb", "mig", "3", "3g.40gb+me", "\uff13g", "3g\n", "1g.20gb+me"]
)
def test_unknown_names_are_refused_with_the_known_ones(word: str) -> None:
    with pytest.raises(RequestError, match=r"A100-80GB has: 1g\.10gb 1g\.10gb\+me .* 7g\.80gb$") as refused:
        load("A100-80GB").find(word)
    assert str(refused.value).isprintable() and str(refused.value).isascii()


# Layouts.


@pytest.mark.parametrize("model", SEVEN_SLICES)
def test_layouts_are_as_many_as_published(model: str) -> None:
    known = load(model)
    base = known.base()
    assert len(base) == 5
    assert len(known.layouts(base)) == 298
    assert len(known.maximal(base)) == 19
    assert len({counts_of(frozenset(layout), base) for layout in known.maximal(base)}) == 14
    double = next(p.name for p in known.profiles if p.kind == "1_SLICE_REV2")
    assert len(known.layouts([*base, double])) == 723
    assert len(known.maximal([*base, double])) == 78
    # Drivers before R510 did not put a 3g beside a 4g: the 18 of older papers.
    three, four = known.find("3g").name, known.find("4g").name
    assert sum(not {three, four} <= {p.profile for p in layout} for layout in known.maximal(base)) == 18


@pytest.mark.parametrize(("model", "layouts"), [("A30", 5), ("RTX-PRO-6000", 5)])
def test_boards_with_four_compute_slices(model: str, layouts: int) -> None:
    known = load(model)
    assert len(known.base()) == 3
    assert len(known.maximal(known.base())) == layouts


@pytest.mark.parametrize("model", MODELS)
def test_layouts_against_brute_force_and_compute_suffices(model: str) -> None:
    known = load(model)
    names = [p.name for p in known.profiles]
    every = brute_layouts(known, names)
    found = known.layouts()
    assert len(found) == len(every) and {frozenset(layout) for layout in found} == every
    assert all(list(layout) == sorted(layout, key=lambda p: p.start) for layout in found)
    most = max(p.compute for p in known.profiles)
    assert max(sum(known.by_name[p.profile].compute for p in layout) for layout in every) == most
    # Whatever goes together on slices obeys the count of each plain profile by itself.
    assert all(sum(p.size for p in layout) <= known.slots for layout in every)
    for held in random.Random(1).sample(sorted(every, key=sorted), 40):
        for name in names:
            beside = [p for p in known.placements(name) if p not in held and held | {p} in every]
            assert known.legal(name, held) == beside
    maximal = {
        layout for layout in every if not any(layout < other for other in every if len(other) == len(layout) + 1)
    }
    assert {frozenset(layout) for layout in known.maximal()} == maximal


# Config ids.


@pytest.mark.parametrize("model", ["A100-40GB", "A100-80GB"])
def test_config_ids_are_exactly_the_maximal_layouts(model: str) -> None:
    known = load(model)
    for number, text in FIGURE.items():
        spots = [(known.find(f"{part[0]}g"), int(part[2])) for part in text.split()]
        layout = tuple(Placement(p.name, start, p.memory) for p, start in spots)
        assert known.config(number) == layout
        assert known.config_id(layout) == known.config_id(reversed(layout)) == number
    assert len(known.configs) == 19
    assert {frozenset(known.config(number)) for number in FIGURE} == {frozenset(m) for m in known.maximal(known.base())}


def test_the_impossible_layout_has_no_number() -> None:
    known = load("A100-80GB")
    impossible = [Placement("1g.10gb", start, 1) for start in range(5)] + [Placement("2g.20gb", 5, 2)]
    assert known.config_id(impossible) is None
    assert "1 1 1 1 1 2" not in known.configs
    assert known.config_id(()) is None
    assert known.config_id(known.config(19)[:6]) is None  # the original tool's 19 had six 1g


def test_only_the_a100_has_numbers() -> None:
    assert [model for model in MODELS if load(model).configs] == ["A100-40GB", "A100-80GB"]
    assert load("H100-80GB").config_id(load("A100-80GB").config(1)) is None


# What can still be held.


@pytest.mark.parametrize("model", ["A100-80GB", "A30", "RTX-PRO-6000"])
def test_frontier_against_brute_force(model: str) -> None:
    known = load(model)
    names = [p.name for p in known.profiles]
    every = sorted(brute_layouts(known, names), key=sorted)
    as_set = set(every)
    dice = random.Random(2)
    for round_ in range(60):
        taken = dice.choice(every) if round_ else frozenset()
        picked = dice.sample(names, dice.randint(1, min(4, len(names))))
        wanted = tuple(dice.randint(0, 4) for _ in picked)
        reachable = {
            vector
            for layout in as_set
            if taken <= layout and all(p.profile in picked for p in layout - taken)
            for vector in [counts_of(layout - taken, picked)]
            if all(n <= most for n, most in zip(vector, wanted, strict=True))
        }
        best = {
            v
            for v in reachable
            if not any(v != o and all(a <= b for a, b in zip(v, o, strict=True)) for o in reachable)
        }
        assert known.frontier(picked, wanted, taken) == best, (taken, picked, wanted)


def test_frontier_of_an_empty_gpu_knows_that_slices_do_not_add_up() -> None:
    known = load("A100-80GB")
    assert known.frontier(["3g.40gb", "1g.10gb"], (2, 7)) == {(2, 0), (1, 4), (0, 7)}
    assert known.frontier(["1g.10gb+me"], (3,)) == {(1,)}
    assert known.frontier(["7g.80gb"], (1,), [Placement("1g.10gb", 6, 1)]) == {(0,)}


def vectors(dice: random.Random, length: int) -> Iterator[Counts]:
    for _ in range(dice.randint(1, 12)):
        yield tuple(dice.randint(0, 4) for _ in range(length))


def test_undominated_against_brute_force() -> None:
    dice = random.Random(3)
    for _ in range(200):
        found = set(vectors(dice, dice.randint(1, 4)))
        best = {v for v in found if not any(v != o and all(map(int.__le__, v, o)) for o in found)}
        assert undominated(found) == best
