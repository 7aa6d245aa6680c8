"""The benchmark of the policy: every table that does not solve nodes exactly, with short streams."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_the_tables(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("policy_targets", ROOT / "benchmarks/policy_targets.py")
    assert spec and spec.loader
    targets = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "policy_targets", targets)  # other processes know the module by its name
    spec.loader.exec_module(targets)
    document = tmp_path / "policy.md"
    document.write_text((ROOT / "docs/policy.md").read_text())
    monkeypatch.setattr(targets, "DOCUMENT", document)
    chosen = ["queue", "admissions", "reuse", "elastic"]
    targets.main([*chosen, "--quick", "--write"])
    printed = capsys.readouterr().out
    assert printed.count("\n### ") == len(chosen) and "| uniform | exact | -" in printed
    written = document.read_text()
    for part in targets.PARTS:
        assert written.count(f"policy_targets.py {part} --quick`.") == (part in chosen)
        assert written.count(f"<!-- end of {part} -->") == 1
