"""The documents name tests, verbs and options that exist."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rms import cli

ROOT = Path(__file__).resolve().parents[1]


def test_the_verbs_and_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """`rms VERB --option` in backticks, in examples, and with a path before it."""
    seen = 0
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "etc/systemd").glob("*.service")):
        command = r"(?:`|^ {4,}(?:\$ )?|bin/)rms ((?:policy |mig )?[a-z][a-z-]*)([^\n`|#]*)"
        for verb, rest in re.findall(command, path.read_text(), re.MULTILINE):
            with pytest.raises(SystemExit) as ended:
                cli.main([*verb.split(), "--help"])
            assert ended.value.code == 0, f"{path.name}: no such verb: rms {verb}"
            known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
            unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", rest)) - known
            assert not unknown, f"{path.name}: rms {verb} has no {unknown}"
            seen += 1
    assert seen > 80


def test_each_failure_has_a_test_that_exists() -> None:
    """A row of docs/failures.md: failure, job, node, administrator, tests."""
    rows = [line for line in (ROOT / "docs" / "failures.md").read_text().splitlines() if line.startswith("| ")]
    rows = [row for row in rows if not row.startswith("| failure ")]
    assert len(rows) > 30
    texts = [path.read_text() for path in (ROOT / "tests").glob("test_*.py")]
    known = {name for text in texts for name in re.findall(r"def (test_\w+)", text)}
    for row in rows:
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert len(cells) == 5, row
        named = re.findall(r"`(\w+)`", cells[4])
        assert named, f"no test: {row}"
        assert set(named) <= known, f"no such test: {set(named) - known}"


TESTS = {path.name: set(re.findall(r"def (test_\w+)", path.read_text())) for path in (ROOT / "tests").glob("test_*.py")}


@pytest.mark.parametrize(("document", "least"), [("slurm.md", 30), ("security.md", 20), ("design.md", 2)])
def test_the_tests_in_brackets_exist(document: str, least: int) -> None:
    """`[test_lua.py; test_slurm.py: no_room, requeue]`: files, and for some of them parts of the names of tests."""
    text = (ROOT / "docs" / document).read_text()
    usual = re.search(r"named in brackets\s+are those of tests/(\w+\.py)", text)
    seen = 0
    for name in re.findall(r"test_\w+\.py", text):
        assert name in TESTS, f"no such file: {name}"
        seen += 1
    for bracket in re.findall(r"\[([^][]+)\](?!\()", text):
        file = usual[1] if usual else ""
        for word in re.findall(r"(?<![\w./-])[a-z]+_\w+(?:\.py)?", bracket):
            if word.endswith(".py"):
                file = word
            else:
                assert any(word in name for name in TESTS[file]), f"no test of {file} has {word} in its name: {bracket}"
                seen += 1
    assert seen >= least


@pytest.mark.parametrize("unit", sorted((ROOT / "etc" / "systemd").glob("*.service")), ids=lambda path: path.name)
def test_nothing_waits_for_ever_for_a_unit_of_ours(unit: Path) -> None:
    """systemd gives a oneshot service all the time there is, unless it is told: slurmd is started after two of them,
    and a timer does not start one that runs."""
    text = unit.read_text()
    if "Type=oneshot" in text and "rms-learn" not in unit.name:  # which is not in anybody's way
        assert re.search(r"^TimeoutStartSec=\d+min$", text, re.MULTILINE)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="no systemd here")
def test_systemd_finds_nothing_wrong_with_our_units(tmp_path: Path) -> None:
    units = [tmp_path / unit.name for unit in (ROOT / "etc" / "systemd").iterdir()]
    for unit in units:
        unit.write_text((ROOT / "etc" / "systemd" / unit.name).read_text().replace("/opt/rms/bin/rms", sys.executable))
    done = subprocess.run(
        ["systemd-analyze", "verify", *units], capture_output=True, text=True, check=False, timeout=60
    )
    ours = [line for line in done.stderr.splitlines() if str(tmp_path) in line or line.startswith("rms-")]
    assert (done.returncode, ours) == (0, [])
