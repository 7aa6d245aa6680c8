"""slurm/rms.lua: in-process under Lua 5.1 (which Slurm 22.05 embeds) and 5.4, then a few forms on a real slurmctld."""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from throwaway import Cluster, missing

from rms import geometry, planner, request
from rms.errors import RequestError
from slurm import publish, site

SOURCE = Path(site.HERE) / "rms.lua"
NOT_GIVEN, UNLIMITED = 4294967294, 4294967295
SUCCESS, ERROR = 0, -1
USER = 1000
ONE_KIND = site.kinds([("A100-80GB", 2, "n[1-2]")])

STUBS = """
said, logged, errors = {}, {}, {}
local function into(list) return function(form, ...) list[#list + 1] = form:format(...) end end
slurm = { SUCCESS = 0, ERROR = -1, log_user = into(said), log_info = into(logged), log_error = into(errors) }
os.time = function() return 1700000000 end
local known = {}
local names = "tres_per_node tres_per_job tres_per_socket tres_per_task comment name"
    .. " min_nodes max_nodes time_limit argc script features prefer extra req_nodes reservation partition qos"
for name in names:gmatch("%S+") do known[name] = true end
local settable = { tres_per_node = true, comment = true, min_nodes = true, max_nodes = true }
settable.features, settable.extra = true, true -- see admission
-- A job_desc as slurmctld gives it: an empty table with a metatable. Anything but these fields must not be written.
function job_desc(fields)
    return setmetatable({}, {
        __index = function(_, name)
            if fields.broken == name then error("this field is broken") end
            if not known[name] then error("read " .. name) end
            return fields[name]
        end,
        __newindex = function(_, name, value)
            if not settable[name] then error("wrote " .. name) end
            fields[name] = value
        end,
    })
end
"""


Parts = Mapping[str, Mapping[str, int]]
"""Partitions as slurmctld shows them."""


class Lua:
    """rms.lua in an interpreter of its own. `say` has what the user was told in the last call."""

    def __init__(self, table: str, version: str = "lua51") -> None:
        # latin-1: a comment is bytes, whatever they mean
        self.runtime = importlib.import_module(f"lupa.{version}").LuaRuntime(encoding="latin-1")
        self.runtime.execute(STUBS)
        load = "function(text) return (loadstring or load)(text) end"
        self.runtime.globals().package.preload["rms_table"] = self.runtime.eval(load)(table)
        module = self.runtime.execute(SOURCE.read_text())
        self.module = module[0] if isinstance(module, tuple) else module
        self.say = ""
        self.comment: str | None = None

    def submit(self, parts: Parts | None = None, **fields: Any) -> dict[str, Any] | None:
        """The job as admitted, or None; a refused job must not have been changed."""
        wanted = {"min_nodes": NOT_GIVEN, "max_nodes": NOT_GIVEN, "time_limit": NOT_GIVEN} | fields
        job = self.runtime.table_from(wanted)
        if self._answer(self.module.submit, job, self._parts(parts), USER):
            return dict(job)
        assert dict(job) == wanted
        return None

    def modify(
        self,
        record: Mapping[str, Any],
        uid: int = USER,
        wanted: Mapping[str, Any] | None = None,
        parts: Parts | None = None,
        **fields: Any,
    ) -> bool:
        """Whether a change is allowed. `wanted` has what else is changed by that, beside the comment."""
        given = {"min_nodes": NOT_GIVEN, "max_nodes": NOT_GIVEN} | fields
        job = self.runtime.table_from(given)
        known = self.runtime.table_from({"job_id": 7} | record)
        allowed = self._answer(self.module.modify, job, known, self._parts(parts), uid)
        self.comment = dict(job).get("comment")
        followed = self.comment is not None and (not uid or {"time_limit", "partition"} & {*fields})
        more = {"comment": self.comment} if followed else {}
        assert dict(job) == given | more | {name: value for name, value in (wanted or {}).items() if value}
        return allowed

    def list(self, name: str) -> list[str]:
        return list(self.runtime.globals()[name].values())

    def _parts(self, parts: Parts | None) -> Any:
        return parts and self.runtime.table_from({name: self.runtime.table_from(parts[name]) for name in parts})

    def _answer(self, function: Any, job: Any, *rest: Any) -> bool:
        self.runtime.execute("said = {}; slurm.log_user = function(form, ...) said[#said + 1] = form:format(...) end")
        answer = function(self.runtime.globals().job_desc(job), *rest)
        self.say = "\n".join(self.list("said"))
        assert answer in (SUCCESS, ERROR)
        assert (answer == ERROR) == bool(self.say)
        assert not self.say or (self.say.startswith("rms: ") and "\n" not in self.say)
        return bool(answer == SUCCESS)


@functools.cache
def lua(model: str = "A100-80GB", gpus: int = 2, version: str = "lua51", admission: str = "sums") -> Lua:
    made = Lua(site.table(site.kinds([(model, gpus, "n")]), admission), version)
    assert made.list("errors") == []
    return made


def gres(spec: str) -> str:
    return ",".join(f"gres:{item}" for item in spec.split(","))


# What is admitted


@pytest.mark.parametrize("version", ["lua51", "lua54"])
@pytest.mark.parametrize(
    ("typed", "canonical", "slices"),
    [
        ("mig:3g", "3g.40gb:1", (3, 4)),
        ("mig:3g.40gb", "3g.40gb:1", (3, 4)),
        ("mig:3G.40GB:1", "3g.40gb:1", (3, 4)),
        ("MIG:3g:1", "3g.40gb:1", (3, 4)),
        ("mig:3g.40gb=2", "3g.40gb:2", (6, 8)),
        ("mig=3g.40gb=2", "3g.40gb:2", (6, 8)),
        ("mig:3g:002", "3g.40gb:2", (6, 8)),
        (" mig : 3g :1 ", "3g.40gb:1", (3, 4)),
        ("mig:1g.10gb+me", "1g.10gb+me:1", (1, 1)),
        ("mig:1g+ME:2", "1g.10gb+me:2", (2, 2)),
        ("mig:1g:2,mig:3g,mig:1g:1", "1g.10gb:3,3g.40gb:1", (6, 7)),
        ("mig:7g:2", "7g.80gb:2", (14, 16)),
        ("mig:1g.20gb:8", "1g.20gb:8", (8, 16)),
        ("mig:1g:14", "1g.10gb:14", (14, 14)),
    ],
)
def test_writes_what_was_typed_in_full(version: str, typed: str, canonical: str, slices: tuple[int, int]) -> None:
    mig = ",".join(f"gres:mig:{item}" for item in canonical.split(","))
    job = lua(version=version).submit(tres_per_node=gres(typed), time_limit=90.0)  # slurmctld pushes doubles
    assert job == {
        "tres_per_node": f"{mig},gres:migc:{slices[0]},gres:migm:{slices[1]}",
        "comment": f"rms1:{canonical};s=1700000000;l=90;",
        "min_nodes": 1,
        "max_nodes": 1,
        "time_limit": 90,
    }


def test_keeps_the_form_and_the_other_items() -> None:
    def submit(typed: str) -> str:
        job = lua().submit(tres_per_node=typed)
        assert job
        return str(job["tres_per_node"])

    assert submit("gres/mig:3g:1") == "gres/mig:3g.40gb:1,gres/migc:3,gres/migm:4"
    assert submit("mig:3g:1") == "mig:3g.40gb:1,migc:3,migm:4"
    assert submit("gres:NIC:2,gres:mig:3g,gres:foo:a:1") == (
        "gres:NIC:2,gres:foo:a:1,gres:mig:3g.40gb:1,gres:migc:3,gres:migm:4"
    )
    assert submit("gres:mig:3g:1,gres:") == "gres:mig:3g.40gb:1,gres:migc:3,gres:migm:4"  # --gres=mig:3g:1,
    # slurmctld 22.05 finds "gres:" anywhere in an item
    assert submit("xgres:mig:3g:1") == "gres:mig:3g.40gb:1,gres:migc:3,gres:migm:4"


@pytest.mark.parametrize("nodes", [(NOT_GIVEN, NOT_GIVEN), (1, NOT_GIVEN), (1, 1), (1, 3), (NOT_GIVEN, 4)])
def test_pins_to_one_node(nodes: tuple[int, int]) -> None:
    job = lua().submit(tres_per_node="gres:mig:1g", min_nodes=nodes[0], max_nodes=nodes[1])
    assert job
    assert (job["min_nodes"], job["max_nodes"]) == (1, 1)


@pytest.mark.parametrize(
    ("limit", "written"), [(NOT_GIVEN, 0), (UNLIMITED, 0), (None, 0), (0, 0), (1, 1), (999999999, 999999999)]
)
def test_writes_the_limit(limit: int | None, written: int) -> None:
    job = lua().submit(tres_per_node="gres:mig:1g", time_limit=limit)
    assert job
    ticket = request.parse_comment(job["comment"])
    assert ticket == request.Ticket("1g.10gb:1", 1700000000, written or None)


words = st.sampled_from(sorted(geometry.load("A100-80GB").names()))
items = st.lists(st.tuples(words, st.integers(1, 3)), min_size=1, max_size=4)


@given(items)
def test_reads_a_request_as_the_node_does(wanted: list[tuple[str, int]]) -> None:
    known = geometry.load("A100-80GB")
    parsed = request.parse(",".join(f"{word}:{count}" for word, count in wanted), known)
    job = lua(gpus=12).submit(tres_per_node=",".join(f"gres:mig:{word}:{count}" for word, count in wanted))
    assert job
    ticket = request.parse_comment(job["comment"])
    assert ticket
    assert ticket.request == str(parsed)
    assert request.parse(ticket.request, known) == parsed
    slices = [sum(n * size for n, size in zip(parsed.counts, sizes, strict=True)) for sizes in _sizes(parsed, known)]
    assert job["tres_per_node"].endswith(f",gres:migc:{slices[0]},gres:migm:{slices[1]}")


def _sizes(parsed: request.Request, known: geometry.Geometry) -> Iterator[list[int]]:
    profiles = [known.by_name[name] for name, _ in parsed.items]
    yield [profile.compute for profile in profiles]
    yield [profile.memory for profile in profiles]


# What is refused


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("mig", "say which profile"),
        ("mig:2", "say which profile"),
        ("mig:0", "say which profile"),
        ("mig:-1", "say which profile"),
        ("mig:1k", "say which profile"),
        ("mig:", "say which profile"),
        ("mig::1", "say which profile"),
        ("mig:9g:1", "unknown profile '9g'; known: 1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb"),
        ("mig:9g", "unknown profile '9g'"),
        ("mig:3g.20gb", "unknown profile"),
        ("mig:3g:1,mig:a\x07b:1", "unknown profile 'a?b'"),
        ("mig:" + "x" * 900 + ":1", "unknown profile '" + "x" * 60 + "'"),
        ("mig:3g:0", "count of 3g.40gb is '0'"),
        ("mig:3g:-1", "count of 3g.40gb is '-1'"),
        ("mig:3g:1k", "count of 3g.40gb is '1k'"),
        ("mig:3g:1.5", "count of 3g.40gb is '1.5'"),
        ("mig:3g:1:1", "count of 3g.40gb is '1:1'"),
        ("mig:3g:1000", "from 1 to 999"),
        ("mig:3g:" + "9" * 400, "from 1 to 999"),
        ("mig:3g:999,mig:3g:999", "3g.40gb:1998 is more than an empty node can place (2 x A100-80GB)"),
        ("mig:3g:5", "more than an empty node"),
        ("mig:3g:4,mig:1g:1", "more than an empty node"),
        ("mig:4g:3", "more than an empty node"),
        ("migc:1", "counted by the system"),
        ("mig:3g:1,migm:1", "counted by the system"),
        ("foo:1,MIGM", "counted by the system"),
        ("mig:3g:1,gpu:1", "mig and gpu"),
        ("shard:1,mig:3g:1", "mig and shard"),
        ("mig:3g:1,mps:50", "mig and mps"),
        ("mig:3g:1," + "foo:1," * 200, "longer than 1024 bytes"),
    ],
)
def test_refuses_with_one_clear_line(typed: str, said: str) -> None:
    assert lua().submit(tres_per_node=gres(typed)) is None
    assert said in lua().say


@pytest.mark.parametrize("field", ["tres_per_job", "tres_per_socket", "tres_per_task"])
def test_looks_at_every_way_to_ask(field: str) -> None:
    assert lua().submit(**{field: "gres:mig:3g:1"}) is None
    assert "--gres=mig:PROFILE:COUNT" in lua().say
    assert lua().submit(**{field: "gres:migc:1"}) is None
    assert lua().submit(tres_per_node="gres:mig:3g:1", **{field: "gres/gpu:1"}) is None
    assert "mig and gpu" in lua().say
    assert lua().submit(tres_per_node="gres:mig:3g:1", **{field: "cpu:2"})


@pytest.mark.parametrize("nodes", [(2, 2), (2, NOT_GIVEN), (4, 8), (UNLIMITED, UNLIMITED)])
def test_refuses_several_nodes(nodes: tuple[int, int]) -> None:
    assert lua().submit(tres_per_node="gres:mig:1g", min_nodes=nodes[0], max_nodes=nodes[1]) is None
    assert "one node" in lua().say
    assert lua().submit(min_nodes=nodes[0], max_nodes=nodes[1])


def test_srun_must_write_it_in_full() -> None:
    """Its step asks by itself for what the user typed (seen in 22.05): an alias would fail when the job has started."""
    assert lua().submit(tres_per_node="gres:mig:3g,gres:mig:1g:2", argc=1) is None
    assert "--gres=mig:3g.40gb:1,mig:1g.10gb:2" in lua().say
    assert lua().submit(tres_per_node="gres:mig:3g.40gb:1,gres:mig:1g.10gb:2", argc=1)
    assert lua().submit(tres_per_node="gres:mig:3g", argc=0)  # salloc
    assert lua().submit(tres_per_node="gres:mig:3g", argc=1, name="interactive")  # salloc of 26.05
    assert lua().submit(tres_per_node="gres:mig:3g", argc=1, script="#!/bin/sh")  # sbatch


# The comment

comments = st.lists(
    st.one_of(
        st.sampled_from(["rms1:", "rms1:3g:1;s=1;l=1;", "rms1:7g.80gb:2;s=9;l=0;", "rms", "1:", ";", "s=1;", "\n"]),
        st.text(st.characters(min_codepoint=1, max_codepoint=255), max_size=20),
    ),
    max_size=6,
).map("".join)


@given(comments)
def test_a_comment_without_mig_only_loses_a_forged_prefix(comment: str) -> None:
    job = lua().submit(comment=comment)
    assert job
    if comment.startswith("rms1:"):
        assert comment.endswith(job.pop("comment"))
    assert not job.get("comment", "").startswith("rms1:")
    assert job == {"min_nodes": NOT_GIVEN, "max_nodes": NOT_GIVEN, "time_limit": NOT_GIVEN} | (
        {} if comment.startswith("rms1:") else {"comment": comment}
    )


@given(comments)
def test_a_comment_with_mig_keeps_the_users_part(comment: str) -> None:
    job = lua().submit(comment=comment, tres_per_node="gres:mig:3g")
    assert job
    prefix = "rms1:3g.40gb:1;s=1700000000;l=0;"
    own = job["comment"].removeprefix(prefix)
    assert job["comment"] == prefix + own
    assert own == comment if not comment.startswith("rms1:") else comment.endswith(own)
    assert not own.startswith("rms1:")


def test_takes_off_prefixes_one_after_the_other() -> None:
    for forged in ["rms1:7g.80gb:1;s=1;l=1;", "rms1:", "rms1:rms1:3g:1;s=1;l=1;", "rms1:rms1:rms1:"]:
        job = lua().submit(comment=forged + "mine; and more")
        assert job
        assert job["comment"] == "mine; and more"


@pytest.mark.timed
def test_says_by_how_much_a_comment_is_too_long() -> None:
    prefix = len("rms1:3g.40gb:1;s=1700000000;l=0;")
    assert lua().submit(tres_per_node="gres:mig:3g", comment="x" * (1024 - prefix))
    assert lua().submit(tres_per_node="gres:mig:3g", comment="x" * (1024 - prefix + 3)) is None
    assert f"3 bytes too long (at most {1024 - prefix} beside mig)" in lua().say
    assert lua().submit(comment="x" * 5000)  # slurmctld's own business
    assert lua().submit(comment="rms1:" + "x" * 1020) is None
    assert "1 bytes too long (at most 1024)" in lua().say
    began = time.monotonic()
    assert lua().submit(comment="rms1:" * 200_000) is None
    assert lua().submit(tres_per_node="gres:mig:" + "3g," * 400_000) is None
    assert lua().submit(tres_per_node="gres:mig: " + " " * 1_000_000) is None
    assert time.monotonic() - began < 1


# What an empty node can place, against placements tried one by one


@functools.cache
def placeable(model: str, gpus: int) -> frozenset[tuple[int, ...]]:
    """Every count vector that some layouts of so many GPUs hold together."""
    known = geometry.load(model)
    names = [profile.name for profile in known.profiles]
    if gpus == 0:
        return frozenset([(0,) * len(names)])
    one = {tuple(sum(p.profile == name for p in held) for name in names) for held in known.layouts()}
    rest = placeable(model, gpus - 1)
    return frozenset(tuple(a + b for a, b in zip(x, y, strict=True)) for x in one for y in rest)


def fits(model: str, gpus: int, counts: Sequence[int], version: str = "lua51") -> bool:
    names = [profile.name for profile in geometry.load(model).profiles]
    asked = [f"gres:mig:{name}:{count}" for name, count in zip(names, counts, strict=True) if count]
    interpreter = lua(model, gpus, version)
    admitted = interpreter.submit(tres_per_node=",".join(asked)) is not None
    assert admitted or "more than an empty node can place" in interpreter.say
    return admitted


def around(vectors: frozenset[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """The vectors themselves and those with one more of one profile."""
    more = ((*v[:i], v[i] + 1, *v[i + 1 :]) for v in vectors for i in range(len(v)))
    return {v for v in itertools.chain(vectors, more) if any(v)}


@pytest.mark.parametrize(
    ("model", "gpus"),
    [(model, 1) for model in geometry.models()] + [("A100-80GB", 2), ("A30", 2), ("A30", 3), ("RTX-PRO-6000", 2)],
)
def test_places_exactly_what_an_empty_node_can(model: str, gpus: int) -> None:
    can = placeable(model, gpus)
    wrong = [counts for counts in sorted(around(can)) if fits(model, gpus, counts) != (counts in can)]
    assert wrong == []


@settings(max_examples=300)
@given(st.data())
def test_places_exactly_what_three_gpus_can(data: st.DataObject) -> None:
    can = placeable("A100-80GB", 3)
    counts = data.draw(st.tuples(*(st.integers(0, most) for most in map(max, zip(*can, strict=True)))))
    if any(counts):
        assert fits("A100-80GB", 3, counts, data.draw(st.sampled_from(["lua51", "lua54"]))) == (counts in can)


@settings(max_examples=200)
@given(st.data(), st.sampled_from(["A100-80GB", "H100-NVL", "RTX-PRO-6000", "A30"]), st.integers(4, 16))
def test_places_what_many_gpus_can_and_no_more(data: st.DataObject, model: str, gpus: int) -> None:
    known = geometry.load(model)
    one = sorted(placeable(model, 1))
    held = data.draw(st.lists(st.sampled_from(one), min_size=gpus, max_size=gpus))
    counts = [sum(column) for column in zip(*held, strict=True)]
    if any(counts):
        assert fits(model, gpus, counts)
    small = data.draw(st.integers(0, len(counts) - 1))  # more of one than memory slices could hold
    free = known.slots * gpus - sum(c * p.memory for c, p in zip(counts, known.profiles, strict=True))
    counts[small] += free // known.profiles[small].memory + 1
    assert not fits(model, gpus, counts)


@pytest.mark.parametrize(
    ("model", "counts"),
    [  # the slowest of half a million requests that a search for slow ones tried
        ("A100-80GB", (29, 5, 23, 3, 9, 1, 0)),
        ("A100-80GB", (5, 11, 14, 14, 7, 6, 0)),
        ("A100-80GB", (16, 16, 48, 0, 0, 0, 0)),
        ("A100-80GB", (10, 8, 20, 22, 5, 1, 0)),
        ("RTX-PRO-6000", (0, 0, 0, 0, 64, 0, 0, 0, 0, 0, 0)),
    ],
)
def test_is_quick_for_sixteen_gpus(model: str, counts: Sequence[int]) -> None:
    fits(model, 16, counts)
    began = time.process_time()
    fits(model, 16, counts)
    assert time.process_time() - began < 0.05


# Changes of a submitted job

PREFIX = "rms1:3g.40gb:1;s=1700000000;l=5;"
OURS = {"comment": PREFIX + "mine"}


@pytest.mark.parametrize(
    "change",
    [
        {"tres_per_node": "gres:mig:7g.80gb:1"},
        {"tres_per_node": ""},
        {"tres_per_job": "gres:foo:1"},
        {"tres_per_socket": "gres:mig:1g.10gb:1"},
        {"tres_per_task": ""},
        {"min_nodes": 2},
        {"max_nodes": 2},
        {"min_nodes": 0},
        {"min_nodes": UNLIMITED},
        {"comment": ""},
        {"comment": "forged"},
        {"comment": "rms1:7g.80gb:1;s=1700000000;l=5;"},
        {"comment": PREFIX[:-1]},
        {"comment": PREFIX.upper()},
    ],
)
def test_guards_a_job_with_mig(change: dict[str, Any]) -> None:
    assert not lua().modify(OURS, **change)
    assert lua().list("logged")[-1] == f"rms: refused uid {USER} a change of job 7: {lua().say.removeprefix('rms: ')}"
    assert lua().modify(OURS, uid=0, **change)
    typed = change.get("comment")
    assert lua().comment == (typed if typed is None or typed.startswith("rms1:") else PREFIX + typed)
    if "comment" in change:
        assert lua().modify(OURS, 0, tres_per_node="", **change) and lua().comment == typed, (
            "it asks for no mig any more"
        )


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"comment": PREFIX},
        {"comment": PREFIX + "other; text"},
        {"min_nodes": 1, "max_nodes": 1},
    ],
)
def test_leaves_other_changes_alone(change: dict[str, Any]) -> None:
    assert lua().modify(OURS, **change)


def test_the_comment_has_the_new_time_limit() -> None:
    made = lua()
    for own in ("", "mine", ";l=7;"):
        comment = PREFIX + own
        assert made.modify({"comment": comment}, time_limit=3.0)
        assert made.comment == comment.replace(PREFIX, PREFIX[: PREFIX.rindex("l=")] + "l=3;")
        assert made.modify({"comment": PREFIX}, comment=comment, time_limit=4294967295.0)
        assert made.comment == comment.replace(PREFIX, PREFIX[: PREFIX.rindex("l=")] + "l=0;")


PARTS: Parts = {
    "main": {"flag_default": 1, "default_time": 7, "max_time": 90},
    "long": {"flag_default": 0, "default_time": NOT_GIVEN, "max_time": 90},
    "free": {"flag_default": 0, "default_time": NOT_GIVEN, "max_time": UNLIMITED},
}


@pytest.mark.parametrize(
    ("partition", "limit"),
    [(None, 7), ("main", 7), ("long", 90), ("main,long", 90), ("long,free", 0), ("lon", 0)],
)
def test_without_a_time_limit_that_of_the_partition_counts(partition: str | None, limit: int) -> None:
    told = lua(admission="features")
    job = told.submit(PARTS, tres_per_node="gres:mig:1g:1", partition=partition)
    assert job and job["comment"].endswith(f";l={limit};")
    assert job["features"] == ("rms_1g.10gb_1_short" if 0 < limit <= 10 else "rms_1g.10gb_1")
    job = told.submit(PARTS, tres_per_node="gres:mig:1g:1", partition=partition, time_limit=20)
    assert job and job["comment"].endswith(";l=20;") and job["features"] == "rms_1g.10gb_1"


@pytest.mark.parametrize("uid", [USER, 0])
def test_the_partition_s_limit_counts_where_that_is_changed(uid: int) -> None:
    told = lua(admission="features")
    record = {"comment": PREFIX, "features": "rms_1g.10gb_1_short", "job_state": 0.0, "time_limit": float(NOT_GIVEN)}
    longer = {"features": "rms_1g.10gb_1"}
    for partition in ("long", "main"):
        assert told.modify(record, uid, parts=PARTS, partition=partition, wanted=longer)
        assert told.comment == PREFIX.replace("l=5", "l=90"), "slurmctld gives it no DefaultTime any more"
    assert told.modify(record | {"time_limit": 5.0}, uid, parts=PARTS, partition="long")
    assert told.comment is None, "it has a limit of its own"
    assert told.modify(record | {"time_limit": 5.0}, uid, parts=PARTS, time_limit=40.0, wanted=longer)
    assert told.comment == PREFIX.replace("l=5", "l=40")


@pytest.mark.parametrize("uid", [USER, 0])
@pytest.mark.parametrize("typed", [{}, {"comment": "new"}])
def test_a_change_of_an_array_or_of_all_components(uid: int, typed: dict[str, str]) -> None:
    """slurmctld shows it once for each, in one table, with what was written for the one before (22.05)."""
    told, name = lua(admission="features"), "rms_1g.10gb_1"
    waits = {"job_state": 0.0, "job_id": 7}
    records = [
        {"comment": "rms1:1g.10gb:1;s=1;l=5;a", "features": f"{name}_short"} | waits,
        {"comment": "rms1:2g.20gb:1;s=1;l=9;b", "features": f"ib&{name}_short"} | waits,
        {"comment": "rms1:3g.40gb:1;s=1;l=70;c", "features": "rms_3g.40gb_1"} | waits,
        {"comment": "none of ours", "features": "ib"} | waits,
        {"features": None} | waits,
        {"comment": "rms1:1g.10gb:1;s=1;l=5;a", "features": f"{name}_short"} | waits,
    ]
    if typed and uid:  # not a user's to change
        records = records[3:5]
    fields = {"min_nodes": NOT_GIVEN, "max_nodes": NOT_GIVEN, "time_limit": 40.0} | typed
    table = told.runtime.table_from(fields)
    job = told.runtime.globals().job_desc(table)
    for record in records:
        assert told.module.modify(job, told.runtime.table_from(record), None, uid) == SUCCESS, record
        comment, features = str(record.get("comment")), str(record["features"])
        begins, _, own = comment.rpartition(";")
        limited = begins[: begins.rindex("=") + 1] + "40;" if begins else ""
        wanted = limited + typed.get("comment", own if begins else comment)
        assert (table["comment"] or "None") == wanted
        assert (table["features"] or features) == features.removesuffix("_short")


@pytest.mark.parametrize("where", [{"req_nodes": "n2"}, {"reservation": "mine"}])
def test_a_job_that_asks_for_its_name_is_not_bound_to_nodes_later(where: dict[str, str]) -> None:
    told, asks = lua(admission="features"), OURS | {"features": "ib&rms_3g.40gb_1"}
    for uid in (USER, 0):
        assert not told.modify(asks, uid, **where)
        assert told.modify(OURS, uid, **where) and told.modify(asks, uid, **dict.fromkeys(where, ""))
    assert told.modify(asks, 0, features="", **where), "who takes the name away, too, knows"
    assert lua(admission="extra").modify(OURS | {"extra": "rms_3g.40gb_1>=1"}, **where)


@pytest.mark.parametrize("record", [{}, {"comment": "mine"}, {"comment": " rms1:"}])
def test_nobody_can_add_mig_later(record: dict[str, str]) -> None:
    for change in [
        {"comment": PREFIX},
        {"comment": "rms1:"},
        {"tres_per_node": "gres:mig:3g.40gb:1"},
        {"tres_per_node": "gres:foo:1,xgres:mig:3g.40gb:1"},
        {"tres_per_node": "gres:mig"},
        {"tres_per_node": "gres:migc:1"},
        {"tres_per_job": "gres/mig:3g.40gb:1"},
        {"tres_per_task": "gres:migm:1"},
    ]:
        assert not lua().modify(record, **change)
    for change in [
        {"comment": "other"},
        {"comment": ""},
        {"comment": "x rms1:"},
        {"tres_per_node": "gres:gpu:1,gres:migraine:1"},
        {"min_nodes": 4, "max_nodes": 8},
    ]:
        assert lua().modify(record, **change)


def test_a_damaged_prefix_can_only_be_kept() -> None:
    assert not lua().modify({"comment": "rms1:bogus"}, comment="rms1:7g.80gb:1;s=1;l=1;")
    assert lua().modify({"comment": "rms1:bogus"}, comment="rms1:bogus")


# When something of ours is broken


@pytest.mark.parametrize("table", ["return {}", "return true", "return nil", "error('gone')", "return { gpus = 2 }"])
def test_without_a_usable_table_only_mig_is_refused(table: str) -> None:
    broken = Lua(table)
    assert "rms_table.lua can't be used" in broken.list("errors")[0]
    assert broken.submit(tres_per_node="gres:mig:3g:1") is None
    assert "tell the administrators" in broken.say
    assert broken.submit(tres_per_node="gres:gpu:1", comment="mine")
    job = broken.submit(comment="rms1:x")
    assert job
    assert job["comment"] == "x"
    assert broken.modify({"comment": "mine"}, comment="other")


def test_an_error_of_ours_refuses_only_mig() -> None:
    bad = Lua(
        "return { alias = {}, several = {}, boards = {"
        " { model = 'x', gpus = 2, profiles = { { name = 'a', compute = 1, memory = 1 } }, fit = {} } } }"
    )
    bad.runtime.execute("package.loaded.rms_table.alias = nil")
    assert bad.submit(tres_per_node="gres:mig:3g:1") is None
    assert "internal error" in bad.say
    assert "internal error" in bad.list("errors")[-1]
    # A field that can't be read, where nothing tells of mig (comment is read first) and where something does.
    assert lua().submit(broken="min_nodes")
    assert lua().submit(broken="min_nodes", tres_per_node="gres:mig:3g:1") is None
    assert "internal error" in lua().say
    assert lua().submit(broken="script", argc=1, tres_per_node="gres:mig:3g:1") is None
    assert not lua().modify(OURS, broken="max_nodes")
    assert lua().modify(OURS, 0, broken="req_nodes"), "nothing of the hooks', which are root's, is refused"
    assert not lua().modify({"comment": "mine"}, broken="max_nodes", comment="rms1:")


def test_a_profile_that_fits_nowhere_does_not_hang() -> None:
    odd = Lua(
        "return { alias = { a = 'a', b = 'b' }, several = {}, boards = { { model = 'x', gpus = 2, fit = { { 2, 0 } },"
        " profiles = { { name = 'a', compute = 1, memory = 1 }, { name = 'b', compute = 2, memory = 0 } } } } }"
    )
    assert odd.submit(tres_per_node="gres:mig:a:4")
    assert odd.submit(tres_per_node="gres:mig:b:1") is None


# Where nodes publish what fits


@pytest.mark.parametrize("version", ["lua51", "lua54"])
@pytest.mark.parametrize(
    ("spec", "name", "size"),
    [
        ("mig:1g", "rms_1g.10gb_1", 1),
        ("mig:2g", "rms_2g.20gb_1", 5),
        ("mig:7g", "rms_7g.80gb_1", 7),
        ("mig:1g:2", "rms_1g.10gb_2", 7),
        ("mig:1g:9", "rms_1g.10gb_14", 7),  # no name of its own: the next larger count
        ("mig:3g,mig:1g", "rms_1g.10gb_1_3g.40gb_1", 7),  # in the profiles' order, whatever was typed first
        ("mig:3g,mig:1g:2", "rms_2g.20gb_1_3g.40gb_1", 7),  # no name of its own: both 1g have room where a 2g has
        ("mig:2g,mig:1g:4", "rms_7g.80gb_1", 7),  # a whole GPU is enough
        ("mig:4g:1,mig:3g:1,mig:2g:1,mig:1g:1", "rms_7g.80gb_2", 7),
    ],
)
def test_a_job_asks_for_the_name_of_what_it_needs(version: str, spec: str, name: str, size: int) -> None:
    job = lua(version=version, admission="features").submit(tres_per_node=gres(spec))
    assert job and job["features"] == name and "extra" not in job
    assert job["tres_per_node"].endswith(f",gres:migt:job:1,gres:migt:size:{size},gres:migt:open:1")
    newer = lua(version=version, admission="extra").submit(tres_per_node=gres(spec))
    assert newer and newer["extra"] == f"{name}>=1" and "features" not in newer
    assert newer["tres_per_node"] == job["tres_per_node"]
    plain = lua(version=version).submit(tres_per_node=gres(spec))
    assert plain and "features" not in plain and "migt" not in plain["tres_per_node"]


@pytest.mark.parametrize(
    ("spec", "minutes", "name"),
    [
        ("mig:1g", 10, "rms_1g.10gb_1_short"),
        ("mig:2g", 1, "rms_2g.20gb_1_short"),
        ("mig:1g", 11, "rms_1g.10gb_1"),
        ("mig:1g", NOT_GIVEN, "rms_1g.10gb_1"),  # its partition's default, which may be more
        ("mig:1g", 0, "rms_1g.10gb_1"),  # none
        ("mig:1g:2", 5, "rms_1g.10gb_2"),
        ("mig:3g", 5, "rms_3g.40gb_1"),
    ],
)
def test_a_small_job_that_is_over_soon_asks_for_a_name_of_its_own(spec: str, minutes: int, name: str) -> None:
    job = lua(admission="features").submit(tres_per_node=gres(spec), time_limit=float(minutes))
    assert job and job["features"] == name


@pytest.mark.parametrize(
    ("minutes", "features", "state", "wanted"),
    [
        (11, "rms_1g.10gb_1_short", 0, "rms_1g.10gb_1"),
        (UNLIMITED, "a100&rms_2g.20gb_1_short", 0, "a100&rms_2g.20gb_1"),
        (11, "(a|b_short)&farms_x_short&rms_1g.10gb+me_1_short", 1 << 15, "(a|b_short)&farms_x_short&rms_1g.10gb+me_1"),
        (10, "rms_1g.10gb_1_short", 0, None),
        (11, "rms_1g.10gb_1_short", 1, None),  # it runs
        (11, "rms_1g.10gb_1", 0, None),
        (11, "farms_x_short", 0, None),  # with -w
        (11, None, 0, None),
    ],
)
def test_a_job_that_is_given_more_time_asks_for_the_ordinary_name(
    minutes: int, features: str | None, state: int, wanted: str | None
) -> None:
    record = {"comment": PREFIX, "features": features, "job_state": float(state)}
    assert lua(admission="features").modify(record, time_limit=float(minutes), wanted={"features": wanted})
    record = {"comment": PREFIX, "extra": f"{features}>=1" if features else None, "job_state": float(state)}
    wanted = f"{wanted}>=1" if wanted and "&" not in wanted else wanted
    if not (features and "&" in features):  # there nothing of the user's stands beside it
        assert lua(admission="extra").modify(record, time_limit=float(minutes), wanted={"extra": wanted})


@functools.cache
def gates(gpus: int) -> dict[request.Request, request.Request]:
    return site.gates(geometry.load("A100-80GB"), gpus)


@given(st.dictionaries(st.sampled_from(list(geometry.load("A100-80GB").by_name)), st.integers(1, 4), min_size=1))
def test_where_the_name_is_published_the_request_fits(counts: dict[str, int]) -> None:
    wanted = request.Request(tuple(counts.items()))
    job = lua(admission="features").submit(tres_per_node=gres(",".join(f"mig:{p}:{n}" for p, n in counts.items())))
    known = geometry.load("A100-80GB")
    empty = planner.View(tuple(planner.GpuView(str(n), known) for n in range(2)), (), None, 0.0)
    assert (job is not None) == planner.fits(empty, wanted)
    if job:
        (meant,) = [r for r in publish.listed(known, 2) if publish.name(r) == job["features"]]
        if next((n for r, n in gates(2).items() if dict(r.items) == counts), None) == meant:
            return  # test_publish.py tries these
        if meant.items == tuple(sorted(wanted.items, key=lambda item: list(known.by_name).index(item[0]))):
            return
        if len(meant.items) == 1 and meant.items[0][0] in counts and len(counts) == 1:
            assert meant.items[0][1] >= counts[meant.items[0][0]]
        else:
            whole = planner.View(empty.gpus[: meant.items[0][1]], (), None, 0.0)
            assert meant.items[0][0] == "7g.80gb" and planner.fits(whole, wanted)


@pytest.mark.parametrize(
    ("own", "together"),
    [
        ("", "rms_3g.40gb_1"),
        ("a100", "a100&rms_3g.40gb_1"),
        ("a100&ib", "a100&ib&rms_3g.40gb_1"),
        ("a100|h100", "(a100|h100)&rms_3g.40gb_1"),
        ("(a100|h100)&ib", "(a100|h100)&ib&rms_3g.40gb_1"),
        ("[a100|h100]", "[a100|h100]&rms_3g.40gb_1"),
        ("farms_x", "farms_x&rms_3g.40gb_1"),
        ("(a100&ib)|h100", None),
        ("rms_1g.10gb_1", None),
        ("a100&rms_1g.10gb_1", None),
    ],
)
def test_the_users_own_constraint_holds_as_well(own: str, together: str | None) -> None:
    job = lua(admission="features").submit(tres_per_node="gres:mig:3g:1", features=own)
    assert (job and job["features"]) == together


@pytest.mark.parametrize("admission", ["features", "extra"])
def test_who_may_preempt_goes_without_a_name(admission: str) -> None:
    made = Lua(site.table(ONE_KIND, admission, ["high", "gold.now"]), "lua51")
    for fields in ({"partition": "high"}, {"partition": "main,high"}, {"qos": "gold.now"}):
        job = made.submit(tres_per_node="gres:mig:3g:1", **fields)
        assert job and admission not in job and "migt:job:1" in job["tres_per_node"], fields
    for fields in ({}, {"partition": "highest"}, {"qos": "gold"}):
        job = made.submit(tres_per_node="gres:mig:3g:1", **fields)
        assert job and "rms_3g.40gb_1" in job[admission], fields
    with pytest.raises(RequestError, match="no name of a partition or QOS"):
        site.files(ONE_KIND, "/nonexistent", "/etc/slurm/slurm.conf", admission, ['a"] = b'])


def test_what_goes_without_a_name_and_what_not_at_all() -> None:
    told = lua(admission="features")
    for fields in ({"req_nodes": "n1"}, {"reservation": "mine"}):
        job = told.submit(tres_per_node="gres:mig:3g:1", **fields)
        assert job and "features" not in job and "migt:job:1" in job["tres_per_node"]
    for fields in ({"prefer": "a100"}, {"req_nodes": "n1,rmsfit"}, {"tres_per_node": "gres:migt:job:1"}):
        assert told.submit(**{"tres_per_node": "gres:mig:3g:1"} | fields) is None, fields
    assert lua(admission="extra").submit(tres_per_node="gres:mig:3g:1", extra="a>1") is None
    assert told.submit(features="rms_3g.40gb_1") is None
    assert told.submit(features="a100", req_nodes="n1", prefer="ib", comment="mine")  # no MIG: left alone


@pytest.mark.parametrize("field", ["features", "prefer", "extra"])
def test_the_name_stays(field: str) -> None:
    told = lua(admission="features")
    assert not told.modify(OURS, **{field: "a100"})
    assert not told.modify({"comment": "mine"}, **{field: "rms_3g.40gb_1"})
    assert told.modify({"comment": "mine"}, **{field: "a100"})
    assert told.modify(OURS, uid=0, **{field: "a100"})
    assert lua().modify(OURS, **{field: "a100"})


# A cluster with several kinds of nodes


@pytest.fixture(scope="module")
def mixed() -> Lua:
    kinds = [("A100-80GB", 2, "a[1-9]"), ("H100-80GB", 8, "h1"), ("A100-40GB", 4, "old[1-9]"), ("A30", 4, "b1")]
    return Lua(site.table(site.kinds(kinds), "features"))


@pytest.mark.parametrize(
    ("typed", "fields"),
    [
        ("mig:3g.40gb:1", "mig:3g.40gb:1 migc:3 migm:4 migt:job:1 migt:size:6 migt:open:1 rms_3g.40gb_1"),
        ("mig:3g.20gb:1", "mig:3g.20gb:1 migc:3 migm:4 migt:job:1 migt:size:6 migt:open:1 rms_3g.20gb_1"),
        (
            "mig:1g.10gb:1",
            "mig:1g.10gb:1 migc:1 migm:1 migt:job:1 migt:size:1 migt:open:1 rms_1g.10gb_1",
        ),
        ("mig:4g.24gb:1", "mig:4g.24gb:1 migc:4 migm:4 migt:job:1 migt:size:4 migt:open:1 rms_4g.24gb_1"),
        (
            "mig:7g.80gb:8",
            "mig:7g.80gb:8 migc:56 migm:64 migt:job:1 migt:size:7 migt:open:1 rms_7g.80gb_8",
        ),
    ],
)
def test_each_kind_of_node_has_its_profiles(mixed: Lua, typed: str, fields: str) -> None:
    job = mixed.submit(tres_per_node=gres(typed))
    assert job
    assert [item.removeprefix("gres:") for item in job["tres_per_node"].split(",")] == fields.split()[:-1]
    assert job["features"] == fields.split()[-1]


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("mig:3g:1", "rms: 3g may be 3g.40gb or 3g.20gb here; say which"),
        ("mig:3g.40gb:1,mig:4g.24gb:1", "rms: 3g.40gb and 4g.24gb are profiles of different GPUs; a job"),
        ("mig:7g.40gb:5", "rms: 7g.40gb:5 is more than an empty node can place (4 x A100-40GB)"),
        ("mig:9g:1", "rms: unknown profile '9g'; known: 1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb"),
    ],
)  # fmt: skip
def test_what_no_kind_of_node_can_do(mixed: Lua, typed: str, said: str) -> None:
    assert mixed.submit(tres_per_node=gres(typed)) is None
    assert mixed.say.startswith(said)


def test_a_name_of_two_sizes_is_in_the_gres_of_one_kind() -> None:
    kinds = site.kinds([("A100-40GB", 1, "old1"), ("A100-80GB", 2, "a1")])
    assert "mig:1g.10gb:4," in site.gres(kinds[0], "sums")
    assert "mig:1g.10gb:" not in site.gres(kinds[1], "sums")
    with pytest.raises(RequestError, match="--gpus is 0"):
        site.kinds([("A30", 0, "b1")])


def test_what_one_kind_can_be_asked_it_can_be_asked_among_others(mixed: Lua) -> None:
    """With names in full, each profile alone and every pair, a cluster's lua says of a kind what its own says."""
    alone = lua("A100-40GB", 4, admission="features")
    names = [name for name in geometry.load("A100-40GB").by_name if name != "1g.10gb"]
    for pair in [(name,) for name in names] + list(itertools.combinations(names, 2)):
        for count in (1, 2, 5, 9):
            typed = gres(",".join(f"mig:{name}:{count}" for name in pair))
            assert mixed.submit(tres_per_node=typed) == alone.submit(tres_per_node=typed), typed


# On a real slurmctld


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if missing() and "CI" not in os.environ:
        pytest.skip(f"Slurm is not installed: {missing()}")
    conf = "GresTypes=mig,migc,migm,gpu\nPartitionName=short Nodes=ALL DefaultTime=7 MaxTime=30\n"
    conf += "PartitionName=main Nodes=ALL Default=YES MaxTime=60\n"
    made = Cluster(nodes=2, gres=site.gres(ONE_KIND[0], "sums"), extra_conf=conf)
    # The hooks are no part of this: only what lies beside slurm.conf for slurmctld.
    files = site.files(ONE_KIND, "/nonexistent/rms.toml", str(made.conf), "sums")
    made.etc.mkdir()
    for name in ["job_submit.lua", "rms.lua", "rms_table.lua"]:
        (made.etc / name).write_text(files[name])
    with made:
        yield made


@pytest.mark.slurm
def test_slurm_admits_every_profile_and_form(cluster: Cluster) -> None:
    user = cluster.users[0]
    for name in [*geometry.load("A100-80GB").by_name, "3g", "1g+me"]:
        job = cluster.job(cluster.sbatch("true", f"--gres=mig:{name}", "--hold", user=user))
        profile = geometry.load("A100-80GB").find(name)
        assert job["TresPerNode"].replace("gres/", "gres:") == (  # the form of newer Slurm
            f"gres:mig:{profile.name}:1,gres:migc:{profile.compute},gres:migm:{profile.memory}"
        )
        assert job["Comment"].startswith(f"rms1:{profile.name}:1;s=")
        assert job["NumNodes"] == "1-1"
    array = cluster.sbatch("true", "--gres=mig:1g:2,mig:1g:1", "--array=1-2", "--comment=a; b", user=user)
    het = cluster.sbatch("srun true", "--gres=mig:1g", ":", "--gres=mig:2g", "-N1-2", user=user)
    ours = {
        f"{array}_1": ("1g.10gb:3", "a; b"), f"{array}_2": ("1g.10gb:3", "a; b"),
        f"{het}": ("1g.10gb:1", ""), f"{het + 1}": ("2g.20gb:1", ""),
    }  # fmt: skip
    for job_id, (spec, own) in ours.items():
        ticket = request.parse_comment(cluster.job(job_id)["Comment"])
        assert ticket
        assert ticket.request == spec
        assert abs(ticket.submit - time.time()) < 60
        assert cluster.job(job_id)["Comment"].endswith(f";{own}")
    step = cluster.sbatch("srun echo step-ran", "--gres=mig:3g", user=user)
    assert cluster.run("srun", "--gres=mig:3g.40gb:1", "echo", "ran", user=user).stdout == "ran\n"
    assert "ran" in cluster.run("salloc", "--gres=mig:3g", "srun", "echo", "ran", user=user).stdout
    cluster.wait(lambda: cluster.states()[str(step)] == "COMPLETED")
    assert (user.work / f"slurm-{step}.out").read_text() == "step-ran\n"


@pytest.mark.slurm
def test_slurm_tells_the_user_why(cluster: Cluster) -> None:
    for options, said in {
        ("--gres=mig:2",): "say which profile",
        ("--gres=mig:9g:1",): "unknown profile '9g'; known: 1g.10gb",
        ("--gres=mig:7g:3",): "7g.80gb:3 is more than an empty node can place",
        ("--gres=migc:1",): "counted by the system",
        ("--gres=mig:1g:1", "-N2"): "one node",
        ("--gres=mig:1g:1", "-wn1,n2"): "one node",
        ("--gres=mig:1g:1", "--gpus=1"): "mig and gpu",
        ("--gres=mig:1g:1", "--comment=" + "x" * 1024): "bytes too long",
        ("--gres=mig:1g:1", ":", "--gres=mig:9g:1"): "1: rms: unknown profile",
    }.items():
        done = cluster.run("sbatch", *options, "--wrap=true", user=cluster.users[0], check=False)
        assert done.returncode != 0
        assert said in done.stderr
    for command in ["srun", "salloc"]:
        done = cluster.run(command, "--gres=mig:9g:1", "true", user=cluster.users[0], check=False)
        assert "rms: unknown profile '9g'" in done.stderr
    done = cluster.run("srun", "--gres=mig:3g", "true", user=cluster.users[0], check=False)
    assert "srun needs the full form, --gres=mig:3g.40gb:1" in done.stderr


@pytest.mark.slurm
def test_slurm_keeps_the_user_from_forging(cluster: Cluster) -> None:
    user = cluster.users[0]
    ours = cluster.sbatch("true", "--gres=mig:3g", "--comment=mine", "--hold", user=user)
    plain = cluster.sbatch("true", "--comment=rms1:7g.80gb:1;s=1;l=1;mine", "--hold", user=user)
    assert cluster.job(plain)["Comment"] == "mine"
    comment = cluster.job(ours)["Comment"]
    prefix = comment.removesuffix("mine")

    def update(job: int, change: str, as_root: bool = False) -> bool:
        who = None if as_root else user
        return cluster.run("scontrol", "update", f"jobid={job}", change, user=who, check=False).returncode == 0

    def states() -> list[tuple[str | None, ...]]:
        jobs = [cluster.job(ours), cluster.job(plain)]
        return [tuple(job.get(k) for k in ["Comment", "TresPerNode", "NumNodes"]) for job in jobs]

    before = states()
    for change in ["gres=mig:7g.80gb:1", "gres=", "TresPerNode=", "TresPerJob=gres:mig:1g.10gb:1", "NumNodes=2",
                   "NumNodes=ALL", "comment=forged", "comment=", f"comment={prefix[:-1]}"]:  # fmt: skip
        assert not update(ours, change), change
    for change in ["gres=mig:7g.80gb:1", "TresPerNode=xgres:mig:7g.80gb:1", "gres=migc:1", f"comment={prefix}"]:
        assert not update(plain, change), change
    assert states() == before
    assert "refused uid" in (cluster.log / "slurmctld.log").read_text()
    for change in ["NumNodes=1", f"comment={prefix}other", "JobName=x", "Requeue=0", "TimeLimit=3"]:
        assert update(ours, change), change
    assert cluster.job(ours)["Comment"] == prefix.replace("l=60", "l=3") + "other"
    for change in ["comment=other", "NumNodes=2", "TimeLimit=3"]:
        assert update(plain, change), change
    for change in ["comment=moved", "TimeLimit=40"]:
        assert update(ours, change, as_root=True), change
    assert cluster.job(ours)["Comment"] == prefix.replace("l=60", "l=40") + "moved"


@pytest.mark.slurm
@pytest.mark.parametrize("as_root", [False, True])
def test_slurm_changes_all_components_and_tasks(cluster: Cluster, as_root: bool) -> None:
    """Each keeps its own request, whoever changes them."""
    user = cluster.users[0]
    het = cluster.sbatch("true", "--gres=mig:1g", "-H", ":", "--gres=mig:2g", "-H", ":", "-H", user=user)
    array = cluster.sbatch("true", "--gres=mig:3g", "-H", "--array=1-2", user=user)

    def update(job: int | str, limit: int) -> None:
        cluster.run("scontrol", "update", f"jobid={job}", f"TimeLimit={limit}", user=None if as_root else user)

    update(het, 33)
    update(f"{array}_2", 20)  # a record of its own from now on
    update(array, 30)
    comments = [cluster.job(job).get("Comment", "") for job in (het, het + 1, het + 2, f"{array}_1", f"{array}_2")]
    assert [re.sub(r"s=\d+;", "", comment) for comment in comments] == [
        "rms1:1g.10gb:1;l=33;", "rms1:2g.20gb:1;l=33;", "", "rms1:3g.40gb:1;l=30;", "rms1:3g.40gb:1;l=30;"
    ]  # fmt: skip


@pytest.mark.slurm
def test_slurm_tells_the_limit_of_the_partition(cluster: Cluster) -> None:
    user = cluster.users[0]
    for options, limit in ((), 60), (["-p", "short"], 7), (["-p", "short,main"], 60), (["-p", "short", "-t9"], 9):
        job = cluster.sbatch("true", "--gres=mig:1g", "--hold", *options, user=user)
        assert f";l={limit};" in cluster.job(job)["Comment"], options
    for origin, to, limit in (("short", "main", 7), ("main", "short", 30)):  # from main it brings no limit
        moved = cluster.sbatch("true", "--gres=mig:1g", "--hold", "-p", origin, user=user)
        move = ["scontrol", "update", f"jobid={moved}", f"Partition={to}"]
        # 26.05 now and then says "Resource temporarily unavailable" to this, of any job.
        cluster.wait(lambda move=move: cluster.run(*move, user=user, check=False).returncode == 0, 20, "it is moved")
        assert f";l={limit};" in cluster.job(moved)["Comment"]
        assert cluster.job(moved)["TimeLimit"] == f"00:{limit:02}:00"
