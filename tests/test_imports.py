"""Who may know whom: the rules of the design, held over every import statement, those inside functions included."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"rms", "policy", "slurm", "controller"}
HOOKS = ["slurm.hook", "controller"]
"""Where the Python of a hook begins."""

THIRD_PARTY = {
    "rms": {"filelock", "pynvml"},
    "policy": {"torch", "numpy", "numba", "gymnasium"},
    "slurm": {"pyslurm"},
    "controller": set[str](),
}
HEAVY = {"torch", "numpy", "numba", "gymnasium", "pyslurm"}


class Import(NamedTuple):
    """One imported module: who imports it, where, and whether only when a function is called or types are checked."""

    module: str
    line: int
    name: str
    inside: bool
    typing: bool

    @property
    def top(self) -> str:
        return self.name.partition(".")[0]

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.name}"


def modules(root: Path) -> dict[str, Path]:
    """The project's modules by name."""
    files = [root / "controller.py", *(path for part in sorted(OURS) for path in sorted((root / part).rglob("*.py")))]
    return {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for path in files
        if path.exists()
    }


def imports(module: str, source: str, known: Mapping[str, Path]) -> Iterator[Import]:
    """Every import statement of a module; `from a import b` gives a.b where that is a module of ours, else a."""

    def walk(node: ast.AST, inside: bool, typing: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(module, child.lineno, alias.name, inside, typing)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{module}:{child.lineno}: a relative import"
                base = child.module or ""
                for name in {f"{base}.{a.name}" if f"{base}.{a.name}" in known else base for a in child.names}:
                    yield Import(module, child.lineno, name, inside, typing)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                guard = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
                yield from walk(child, inside or function, typing or guard)

    yield from walk(ast.parse(source), False, False)


def everything(root: Path) -> list[Import]:
    known = modules(root)
    return [found for module, path in known.items() for found in imports(module, path.read_text(), known)]


def may(found: Import) -> bool:
    """The rules, for one import of one of ours by one of ours."""
    who, whom = found.module.partition(".")[0], found.top
    if who == whom or whom not in OURS or found.typing:
        return True
    if found.module in ("rms.cli", "rms.cli_policy"):
        return found.inside  # inside the verb that needs it
    if who == "policy":
        return found.name in ("rms", "rms.geometry", "rms.planner", "rms.request", "rms.errors", "rms.files")
    return (who, whom) in {
        ("controller", "rms"),
        ("controller", "policy"),
        ("slurm", "rms"),
        ("slurm", "controller"),
    }


def faults(root: Path) -> list[str]:
    """What breaks a rule."""
    found = []
    for one in everything(root):
        who = one.module.partition(".")[0]
        if not may(one):
            found.append(f"{one}, which {who} must not know")
        if one.top not in OURS | THIRD_PARTY[who] | set(sys.stdlib_module_names):
            found.append(f"{one}, which is not in the install of {who}")
    return found


def reach(root: Path, start: str) -> dict[str, list[str]]:
    """Every module that `start` may ever load, ours or not, with the way there."""
    known = modules(root)
    by_module: dict[str, list[Import]] = {}
    for one in everything(root):
        by_module.setdefault(one.module, []).append(one)
    ways = {start: [start]}
    queue = [start]
    while queue:
        module = queue.pop()
        parents = [module.rpartition(".")[0]] if "." in module and module in known else []
        for name in [*(one.name for one in by_module.get(module, []) if not one.typing), *parents]:
            if name not in ways:
                ways[name] = [*ways[module], name]
                queue.append(name)
    return ways


def test_nobody_knows_whom_they_must_not() -> None:
    assert faults(ROOT) == []


def test_every_module_is_looked_at() -> None:
    known = modules(ROOT)
    assert {"controller", "rms", "rms.cli", "rms.geometry", "rms.planner", "rms.store"} <= set(known)
    assert set(HOOKS) <= set(known)
    assert len(everything(ROOT)) > 100


@pytest.mark.parametrize("hook", HOOKS)
def test_nothing_heavy_in_a_hooks_path(hook: str) -> None:
    ways = reach(ROOT, hook)
    heavy = {" -> ".join(way) for name, way in ways.items() if name.partition(".")[0] in HEAVY}
    assert heavy == set()
    assert "rms.store" in ways and "filelock" in ways, "the search does reach what a hook needs"
    assert not {"rms.cli", "rms.show"} & set(ways), "nor the administrator's command line"


def test_nobody_imports_tests_or_benchmarks() -> None:
    names = {path.stem for part in ("tests", "benchmarks") for path in (ROOT / part).glob("*.py")}
    assert [str(one) for one in everything(ROOT) if one.top in names | {"tests", "benchmarks"}] == []


def fresh(statement: str) -> set[str]:
    """The modules that a fresh Python has after a statement, and did not have before."""
    program = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("hook", HOOKS)
def test_a_hook_loads_no_more_than_it_needs(hook: str) -> None:
    loaded = fresh(f"import {hook}")
    assert "rms.inventory" in loaded
    # What only its command line, or only its rare paths, need: each would be felt at the start of every job.
    rare = {"argparse", "subprocess", "socket", "asyncio", "pynvml", "rms.nvml", "rms.simulated", "rms.loop"}
    rare |= {"slurm.slurmctld", "slurm.site"}
    assert loaded & (rare | HEAVY) == set(), "is it imported inside the function that needs it?"


def test_the_command_line_alone_needs_no_slurm_and_no_policy() -> None:
    loaded = fresh("import rms.cli")
    assert not {name for name in loaded if name.partition(".")[0] in {"slurm", "policy", "controller", "filelock"}}


# The rules bite.


@pytest.mark.parametrize(
    ("module", "source", "broken"),
    [
        ("rms/bad.py", "import controller", True),
        ("rms/bad.py", "def f():\n    from policy.runtime import score", True),
        ("rms/bad.py", "import torch", True),
        ("rms/bad.py", "def f():\n    import requests", True),
        ("rms/bad.py", "import json, rms.geometry", False),
        ("rms/cli.py", "import controller", True),
        ("rms/cli.py", "from slurm import site", True),
        ("rms/cli.py", "def show():\n    import controller\n    from slurm import site", False),
        ("policy/bad.py", "from rms import store", True),
        ("policy/bad.py", "from rms.store import Store", True),
        ("policy/bad.py", "import controller", True),
        ("policy/good.py", "from rms import geometry, planner\nimport torch", False),
        ("controller.py", "from policy import runtime\nfrom rms import store", False),
        ("controller.py", "import slurm.hook", True),
        ("controller.py", "import numpy", True),
        ("slurm/bad.py", "from policy import runtime", True),
        ("slurm/good.py", "import controller\nfrom rms import config\ndef f():\n    import pyslurm", False),
        ("rms/bad.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import controller", False),
    ],
)
def test_the_rules(tmp_path: Path, module: str, source: str, broken: bool) -> None:
    for name in ("rms/__init__.py", "rms/store.py", "rms/geometry.py", "rms/planner.py", "slurm/site.py", module):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / module).write_text(source)
    assert bool(faults(tmp_path)) == broken


def test_a_detour_to_something_heavy_is_found(tmp_path: Path) -> None:
    (tmp_path / "slurm").mkdir()
    (tmp_path / "controller.py").write_text("def f():\n    from slurm import ask")
    (tmp_path / "slurm/__init__.py").write_text("")
    (tmp_path / "slurm/ask.py").write_text("class A:\n    def f(self):\n        import pyslurm.core")
    assert reach(tmp_path, "controller")["pyslurm.core"] == ["controller", "slurm.ask", "pyslurm.core"]
