"""`rms simulate`: what it reads, what it refuses, and that its numbers are those of the jobs."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tracemalloc
from html.parser import HTMLParser
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from policy import bounds, report, study, traces, transitions
from policy.study import Wanted
from rms import cli
from rms.errors import RequestError

ROOT = Path(__file__).parents[1]
A100 = transitions.load("A100-80GB")
PACKING = bounds.Packing(A100)

CSV = """submit,start,duration,time_limit,profile,count
0,5,100,200,7g.80gb,1
10,110,50.5,,3g,1
10.5,111,0:01:40,1-00:00:00,1g.10gb,2
"""
SACCT = """\
JobID|Submit|Start|End|Elapsed|Timelimit|State|AllocTRES|ReqTRES
1|2026-03-01T10:00:00|2026-03-01T10:00:10|2026-03-01T11:00:10|01:00:00|02:00:00|COMPLETED|billing=1,gres/gpu:a100_3g.40gb=1,gres/gpu=1|cpu=1
1.batch|2026-03-01T10:00:10|2026-03-01T10:00:10|2026-03-01T11:00:10|01:00:00|||cpu=1,gres/gpu:a100_3g.40gb=1|
2|2026-03-01T10:02:00|2026-03-01T10:02:00|2026-03-02T11:02:00|1-01:00:00|UNLIMITED|TIMEOUT|cpu=1|gres/mig:1g.10gb=2,gres/migc=2,gres/migm=2
3|2026-03-01T10:01:00|2026-03-01T10:01:00|2026-03-01T10:31:00|00:30:00|Partition_Limit|COMPLETED|gres/mig:7g=1,gres/migc=7|
4|2026-03-01T10:03:00|2026-03-01T10:03:00|2026-03-01T10:33:00|00:30:00|01:00:00|COMPLETED|cpu=1,gres/gpu:a100=1|cpu=1
5|2026-03-01T10:03:00|Unknown|Unknown|00:00:00|01:00:00|PENDING||gres/mig:7g.80gb=1
6|2026-03-01T10:03:00|2026-03-01T10:04:00|2026-03-01T10:04:00|00:00:00|01:00:00|CANCELLED||gres/mig:7g.80gb=1
7|2026-03-01T10:03:00|None|2026-03-01T10:04:00|00:00:00|01:00:00|CANCELLED by 0||gres/mig:7g.80gb=1
8|2026-03-01T10:03:00|2026-03-01T10:04:00|2026-03-01T10:04:00|00:00:00|01:00:00|COMPLETED|gres/mig:7g.80gb=1|gres/mig:7g.80gb=1
"""


def wide(counts: tuple[int, ...]) -> bool:
    return PACKING.fits(counts, 2)


def read(path: Path, content: str | bytes, skip: bool = False) -> traces.Trace:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return traces.read(str(path), A100, wide, skip)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "jobs"


# Reading.


def test_a_csv(path: Path) -> None:
    jobs, left_out = read(path, CSV)
    assert [A100.profiles[p] for p in jobs.profile] == ["7g.80gb", "3g.40gb", "1g.10gb", "1g.10gb"]
    assert jobs.submit.tolist() == [0, 10, 10.5, 10.5]
    assert jobs.duration.tolist() == [100, 50.5, 100, 100]
    assert jobs.limit.tolist() == [200, inf, 86400, 86400]
    assert jobs.rest.tolist() == [0, 0, 1, 0]
    assert left_out == {}


def test_what_sacct_prints(path: Path) -> None:
    jobs, left_out = read(path, SACCT)
    assert [A100.profiles[p] for p in jobs.profile] == ["3g.40gb", "7g.80gb", "1g.10gb", "1g.10gb"]
    assert jobs.submit.tolist() == [0, 60, 120, 120], "sacct sorts by job, we by submission"
    assert jobs.duration.tolist() == [3600, 1800, 90000, 90000]
    assert jobs.limit.tolist() == [7200, inf, inf, inf]
    assert left_out == {
        "steps of jobs": 1,
        "jobs without MIG instances": 1,
        "jobs that have not started or not ended": 3,
        "jobs of less than a second": 1,
    }


def test_minutes_of_timelimitraw(path: Path) -> None:
    head = "Submit|ElapsedRaw|TimelimitRaw|ReqTRES\n"
    jobs, _ = read(path, head + "1700000000|60|90|gres/gpu:1g.10gb=1\n1700000001|60||gres/gpu:1g.10gb+me=1\n")
    assert (jobs.limit.tolist(), jobs.profile.tolist()) == ([5400, inf], [0, 0])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + CSV.encode(),
        CSV.encode("utf-16"),
        CSV.replace("\n", "\r\n").encode(),
        CSV.replace(",", ";").encode(),
        CSV.replace(",", "\t").encode(),
        CSV.replace("\n", "\n\n").encode(),
        CSV.replace("time_limit", "Time Limit").replace("submit", " Submit").encode(),
        CSV.replace("3g", '"3G.40GB"').encode(),
    ],
)
def test_spellings_of_the_same(path: Path, content: bytes) -> None:
    for one, other in zip(read(path, CSV).jobs, read(path, content).jobs, strict=True):
        assert np.array_equal(one, other)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("1.5", 1.5), ("02:03", 123), ("1:02:03", 3723), ("1-00:00:01", 86401), ("2-03", 183600)],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert traces.span(text) == seconds


def test_dates() -> None:
    assert traces.moment("2026-03-01T10:00:00") == traces.moment("2026-03-01 11:00:00+01:00")


# Bad input.


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("20,20,10,20,9g,1", "unknown profile: '9g'; A100-80GB has 1g.10gb"),
        ("20,20,0,20,3g,1", "lasts no time"),
        ("20,20,-1,20,3g,1", "ends before it starts"),
        ("20,20,nan,20,3g,1", "ends before it starts, or never"),
        ("20,20,soon,20,3g,1", "not a length of time: 'soon'"),
        ("yesterday,20,10,20,3g,1", "not a time: 'yesterday'"),
        ("inf,20,10,20,3g,1", "not a time: 'inf'"),
        ("9,20,10,20,3g,1", "submitted before the line above it"),
        ("20,19,10,20,3g,1", "starts before it is submitted"),
        ("20,20,10,0,3g,1", "a time limit of nothing"),
        ("20,20,10,20,3g,0", "not a count: '0'"),
        ("20,20,10,20,3g,-1", "not a count: '-1'"),
        ("20,20,10,20,3g,1e99", "not a count: '1e99'"),
        ("20,20,10,20,3g,²", "not a count: "),
        ("20,20,10,20,3g," + "9" * 5000, "not a count: '99999999999999999999'"),
        ("20,20,10,20,3g,5", "more than the GPUs can hold: 3g:5"),
        ("20,20,10,20,3g,999", "more than the GPUs can hold"),
        ("20,20,10,20", "too few fields: 4 of 6"),
        ("20,20,10,20,\udcff,1", "not UTF-8"),
        ('20,20,10,20,"' + "x" * 200_000 + '",1', "too few fields"),
        ("20,20,10,20,\x00,1", "unknown profile: '\\x00'"),
    ],
)
def test_a_bad_line_is_named_or_counted(path: Path, line: str, complaint: str) -> None:
    content = (CSV + line + "\n30,30,1,2,3g,1\n").encode("utf-8", "surrogateescape")
    with pytest.raises(RequestError) as error:
        read(path, content)
    assert str(error.value).startswith(f"{path}: line 5: {complaint}")
    assert "--skip-bad-lines" in str(error.value)
    jobs, left_out = read(path, content, skip=True)
    assert jobs.submit.tolist() == [0, 10, 10.5, 10.5, 30]
    ((reason, count),) = left_out.items()
    assert reason.startswith(f"bad: {complaint.partition(':')[0]}") and count == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "line 1: no column for submit; duration, or start and end; profile"),
        ("\n", "line 1: no column for submit"),
        ("submit,start,profile\n", "line 1: no column for duration, or start and end; it has: 'submit start profile'"),
        ("submit,duration\n", "no column for profile"),
        ("Submit|Elapsed\n", "no column for AllocTRES or ReqTRES"),
        ("Submit|ReqTRES|Start\n", "no column for Elapsed, or Start and End"),
        ("submit,duration,profile\n", "no job to replay (the file ends after its first line)"),
        ("Submit|Elapsed|ReqTRES\n1|1|cpu=1\n", "no job to replay (1 jobs without MIG instances)"),
        (b"\x1f\x8b\x08\x00\xff\xfe", "line 1: no column for submit"),
        ("x" * 100_000, "line 1: no column for submit"),
    ],
)
def test_a_file_without_jobs(path: Path, content: str | bytes, complaint: str) -> None:
    with pytest.raises(RequestError) as error:
        read(path, content)
    assert complaint in str(error.value)


@given(st.lists(st.text(max_size=12) | st.sampled_from(["1", "20", "3g", "1-00:00:00"]), max_size=40), st.binary())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_is_read_or_refused(path: Path, fields: list[str], tail: bytes) -> None:
    lines = "".join(",".join(fields[i : i + 4]) + "\n" for i in range(0, len(fields), 4))
    for head, separator in (
        ("submit,duration,limit,profile\n", ","),
        ("Submit|Elapsed|Timelimit|ReqTRES\n", "|"),
        ("", ","),
    ):
        content = (head + lines.replace(",", separator)).encode() + tail
        for skip in (False, True):
            try:
                jobs = read(path, content, skip).jobs
            except RequestError as error:
                assert "\n" not in str(error)
            else:
                assert (jobs.duration > 0).all() and (np.diff(jobs.submit) >= 0).all()


def test_a_large_file_streams(path: Path) -> None:
    lines = 60_000
    content = "submit,duration,profile\n" + "".join(f"{i},10,1g\n" for i in range(lines))
    path.write_text(content)
    done = list[float]()
    tracemalloc.start()
    jobs, _ = traces.read(str(path), A100, wide, progress=done.append)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(jobs.submit) == lines
    assert peak < 150 * lines, "bytes a job, at the end, when lists have become arrays"
    assert done == sorted(done) and 0 < done[-1] <= 1 and len(done) == lines // 10_000


# Numbers.


def simulated(path: Path, content: str, **more: Any) -> dict[str, Any]:
    path.write_text(content)
    return study.simulate(Wanted("A100-80GB", trace=str(path), **more))


WHOLE = """submit,duration,profile
0,100,7g
10,100,7g
20,100,7g
30,10,1g
"""


def test_waits_are_those_of_the_jobs(path: Path) -> None:
    found = simulated(path, WHOLE, gpus=1, policy="mfi")
    row = found["policies"][0]
    # The whole-GPU jobs start at 0, 100 and 200, the small one then at 300: it was always behind another.
    assert row["wait_mean"] == pytest.approx((0 + 90 + 180 + 270) / 4)
    assert row["profiles"]["7g.80gb"] == pytest.approx({"jobs": 3, "wait_mean": 90, "wait_p95": 171})
    assert row["profiles"]["1g.10gb"]["wait_mean"] == pytest.approx(270)
    assert row["creates_per_job"] == pytest.approx(0.5), "two of the large ones found theirs there"
    assert (found["time"], found["span"], found["slices"]) == ("seconds", 30, 8)
    assert np.allclose(row["busy_slices"], 8)


def test_acceptance_is_that_of_the_jobs(path: Path) -> None:
    row = simulated(path, WHOLE, gpus=2, mode="loss", policy="mfi")["policies"][0]
    assert row["accepted"] == pytest.approx(100 * 16 / 25)
    assert row["profiles"]["1g.10gb"] == {"jobs": 1, "accepted": 0.0}


def test_gpus_needed_are_those_of_the_jobs(path: Path) -> None:
    row = simulated(path, WHOLE, gpus=100, mode="elastic", policy="mfi")["policies"][0]
    assert (row["wait_mean"], row["gpus_most"]) == (0, 4)
    assert row["gpus_needed"] == pytest.approx(310 / 120)
    assert np.mean(row["busy_gpus"]) == pytest.approx((30 + 20 + 10) / 30)


def test_jobs_of_several_count_once(path: Path) -> None:
    content = "submit,duration,profile,count\n0,10,3g,2\n1,10,1g,1\n"
    row = simulated(path, content, gpus=1, policy="built-in,free-migration")["policies"][0]
    assert row["profiles"] == {
        "1g.10gb": pytest.approx({"jobs": 1, "wait_mean": 9, "wait_p95": 9}),
        "3g.40gb": pytest.approx({"jobs": 1, "wait_mean": 0, "wait_p95": 0}),
    }
    assert row["creates_per_job"] == pytest.approx(3 / 2)


def test_busy_slices_are_the_mean_of_each_stretch() -> None:
    rng = np.random.default_rng(1)
    starts, length, memory = rng.uniform(0, 90, 50), rng.exponential(20, 50), rng.integers(1, 8, 50).astype(float)
    seen = study.busy(starts, starts + length, memory, 100.0)
    edges = np.linspace(0, 100, study.POINTS + 1)
    for i, (a, b) in enumerate(itertools.pairwise(edges)):
        overlap = np.clip(np.minimum(starts + length, b) - np.maximum(starts, a), 0, None)
        assert seen[i] == pytest.approx((memory * overlap).sum() / (b - a))


def test_gpus_in_use_are_those_with_something_on_them() -> None:
    rng = np.random.default_rng(2)
    starts, length, gpu = rng.uniform(0, 100, 40), rng.exponential(10, 40), rng.integers(0, 5, 40).astype(np.int16)
    seen = study.in_use(starts, starts + length, gpu)
    for moment in rng.uniform(0, 110, 200):
        there = {int(g) for g, a, n in zip(gpu, starts, length, strict=True) if a <= moment < a + n}
        assert sum(a <= moment < b for a, b, _ in zip(*seen, strict=True)) == len(there)


@pytest.mark.parametrize("mode", ["queue", "loss"])
def test_the_difference_to_the_first(mode: str) -> None:
    found = study.simulate(
        Wanted("A100-80GB", 4, mode, mix="skew-small", jobs=20_000, policy="mfi,worst-fit,free-migration,mfi")
    )
    first, worst, free = found["policies"]
    assert (first["against_first"], first["interval"]) == (0, 0)
    sign = 1 if mode == "loss" else -1
    assert sign * free["against_first"] > free["interval"] > 0
    assert sign * worst["against_first"] < -worst["interval"] < 0
    if mode == "loss":
        assert free["against_first"] == pytest.approx(free["accepted"] - first["accepted"])
    else:
        assert free["against_first"] == pytest.approx(100 * (free["wait_mean"] / first["wait_mean"] - 1))


def test_every_policy_runs_on_every_model() -> None:
    for model in ("A30", "H200"):
        policy = ",".join([study.LEARNED, *study.POLICIES, "free-migration"])
        found = study.simulate(Wanted(model, 2, "loss", mix="uniform", jobs=300, policy=policy))
        assert len(found["policies"]) == len(study.POLICIES) + 2
    names = [row["policy"] for row in found["policies"]]
    assert "mfi" in names and "nvidia-order" in names and all(name.replace("-", "").isalnum() for name in names)


def test_the_clairvoyant_is_best(path: Path) -> None:
    profiles = ["1g", "3g", "2g", "4g", "1g", "7g"]
    lines = "".join(f"{3 * i},{9 + 7 * (i % 5)},{profiles[i % 6]}\n" for i in range(45))
    found = simulated(path, "submit,duration,profile\n" + lines, gpus=2, mode="loss", policy="clairvoyant,mfi,random")
    best, *others = [row["accepted"] for row in found["policies"]]
    assert 100 > best > max(others)


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"gpus": 0}, "from 1 to 128"),
        ({"gpus": 129}, "from 1 to 128"),
        ({"model": "H100"}, "unknown GPU model 'H100'"),
        ({"mix": "unifrom"}, "unknown mix 'unifrom'; known: uniform"),
        ({"load": 0.0}, "--load is above 0"),
        ({"load": float("nan")}, "--load is above 0"),
        ({"jobs": 5}, "--jobs from 20"),
        ({"seed": -1}, "--seed below"),
        ({"policy": "mfi,nosuch"}, "unknown policy 'nosuch'; known: learned built-in random"),
        ({"policy": ""}, "unknown policy ''"),
        ({"mode": "elastic", "policy": "free-migration"}, "free-migration is not for --mode elastic"),
        ({"policy": "clairvoyant"}, "clairvoyant is not for --mode queue"),
    ],
)
def test_what_cannot_be_simulated(more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint):
        study.simulate(Wanted(**{"model": "A100-80GB", "gpus": 2, "mix": "uniform", **more}))


# The verb.

MIX = ["simulate", "--mix", "uniform", "--gpus", "2", "--load", "0.6", "--jobs", "2000"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*MIX, "--policy", "built-in,mfi,free-migration", "--reserve"]) == 0
    out, err = capsys.readouterr()
    assert err == "", "no bar where no terminal is"
    assert "mix uniform, load 0.6, 2,000 jobs; 2 A100-80GB; queue, a GPU reserved for the large job" in out
    rows = [line.split() for line in out.splitlines()[-4:]]
    assert rows[0][:5] == ["policy", "mean", "wait", "p95", "wait"] and rows[0][-1] == "7g.80gb"
    assert [row[0] for row in rows[1:]] == ["built-in", "mfi", "free-migration"]


@pytest.mark.parametrize("mode", ["queue", "loss", "elastic"])
def test_json_and_page(capsys: pytest.CaptureFixture[str], tmp_path: Path, mode: str) -> None:
    page = tmp_path / "page.html"
    assert cli.main([*MIX, "--mode", mode, "--json", "--report", str(page)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == 1 and len(found["policies"]) == 3
    text = page.read_text()
    tags = well_formed(text)
    assert tags.count("svg") == 3 and tags.count("polyline") == (6 if mode == "elastic" else 3)
    assert not {"script", "link", "img", "iframe"} & set(tags)
    assert text.replace("http://www.w3.org/2000/svg", "").count("http") == 0
    assert all(row["policy"] in text for row in found["policies"])


def well_formed(text: str) -> list[str]:
    """The tags of a page, each closed where it should be."""
    opened, tags = list[str](), list[str]()

    class Checker(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            if tag != "meta":
                opened.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Checker().feed(text)
    assert opened == []
    return tags


def test_a_page_quotes_what_it_names(tmp_path: Path) -> None:
    path = tmp_path / "<script>.csv"
    assert "&lt;script&gt;" in report.page(simulated(path, WHOLE, gpus=1))
    assert "script" not in well_formed(report.page(simulated(path, WHOLE, gpus=1)))


def test_no_waits_at_all_can_be_drawn(path: Path) -> None:
    found = simulated(path, "submit,duration,profile\n5,1,1g\n", gpus=1)
    assert found["policies"][0]["wait_mean"] == 0
    well_formed(report.page(found))
    assert "built-in" in report.text(found)


@pytest.mark.parametrize(
    ("arguments", "code", "complaint"),
    [
        (["--trace", "/nosuch", "--gpus", "1"], 1, "No such file"),
        (["--trace", "/nosuch", "--gpus", "1", "--load", "0.5"], 2, "for made-up jobs"),
        (["--mix", "uniform", "--gpus", "1", "--policy", "x"], 3, "unknown policy 'x'"),
        (["--mix", "uniform", "--gpus", "1", "--jobs", "100", "--report", "/nosuch/a.html"], 1, "No such file"),
    ],
)
def test_one_line_says_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, complaint: str
) -> None:
    assert cli.main(["simulate", *arguments]) == code
    _, err = capsys.readouterr()
    assert complaint in err and err.count("\n") == 1


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert cli.main([*MIX, "--policy", "mfi"]) == 0
    _, err = capsys.readouterr()
    assert "mfi" in err and " 50%" in err and err.endswith("\r\x1b[K")


def test_without_numpy_it_says_so() -> None:
    program = "import sys; sys.modules['numpy'] = None; from rms import cli; sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *MIX], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "pip install numpy numba" in done.stderr
