"""The verbs about policies: `rms simulate`, `rms policy`, `rms learn`, `rms train`. A part of `rms.cli`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rms import config
from rms.device import DeviceError
from rms.errors import NodeError, RequestError, RmsError, UsageError
from rms.request import printable

if TYPE_CHECKING:
    from policy.shelf import Shelf
    from rms.geometry import Geometry
    from rms.planner import View


def add(
    verbs: argparse._SubParsersAction[argparse.ArgumentParser], node_options: Callable[[argparse.ArgumentParser], None]
) -> None:
    """Add the verbs; `node_options` adds to one what says which node it is about."""
    verb = verbs.add_parser(
        "simulate", allow_abbrev=False, help="policies side by side on recorded or made-up jobs (docs/simulate.md)"
    )
    verb.set_defaults(verb=simulate)
    jobs = verb.add_mutually_exclusive_group(required=True)
    jobs.add_argument("--trace", metavar="FILE", help="recorded jobs: a CSV, or what sacct -P printed")
    jobs.add_argument("--mix", metavar="NAME", help="made-up jobs: uniform, skew-small, skew-big, bimodal")
    verb.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs; with --mode elastic the most")
    verb.add_argument("--model", default="A100-80GB", help="GPU model (default: %(default)s)")
    verb.add_argument("--load", type=float, metavar="X", help="offered memory slices by GPUs' (--mix; default: 0.8)")
    verb.add_argument("--jobs", type=int, metavar="N", help="how many jobs (--mix; default: 50000)")
    verb.add_argument("--seed", type=int, metavar="N", help="of the made-up jobs (--mix; default: 0)")
    verb.add_argument(
        "--policy",
        default="built-in,mfi,learned",
        metavar="LIST",
        help="names with commas between (default: %(default)s)",
    )
    verb.add_argument(
        "--mode",
        choices=["queue", "loss", "elastic"],
        default="queue",
        help="who does not fit waits, or is lost; elastic: takes another GPU (default: %(default)s)",
    )
    verb.add_argument("--reserve", action="store_true", help="keep a GPU for the job that waits for a whole one")
    verb.add_argument("--skip-bad-lines", action="store_true", help="leave out and count lines that can't be read")
    verb.add_argument("--json", action="store_true", help="everything, as one JSON object")
    verb.add_argument("--report", metavar="FILE.html", help="write a page with pictures")

    verb = verbs.add_parser("policy", allow_abbrev=False, help="which model decides on this node (docs/learning.md)")
    parts = verb.add_subparsers(title="what to do", metavar="WHAT", required=True)
    about = "the models of this node's GPUs, the one in use marked"
    for name, do, text in (
        ("list", policy_list, about),
        ("show", policy_show, "one model, what this node sees of the demand, how often the built-in rule stood in"),
        ("explain", policy_explain, "why a job's instances were put where they are, from the audit log"),
        ("use", policy_use, "let a model decide from now on"),
        ("rollback", policy_rollback, "let the model before this one decide again"),
    ):
        part = parts.add_parser(name, allow_abbrev=False, help=text)
        part.set_defaults(verb=do)
        if name == "show":
            part.add_argument("name", nargs="?", metavar="NAME", help="default: the one in use")
        if name == "explain":
            part.add_argument("job", metavar="JOB", help="its id, or id.restart for one of its runs")
            part.add_argument("logs", nargs="*", metavar="LOG", help="audit logs (default: this node's)")
        if name == "use":
            part.add_argument("name", metavar="NAME|FILE", help="a name of the list, or a model file to add to it")
        if name in ("list", "show", "explain"):
            part.add_argument("--json", action="store_true", help="everything, as one JSON object")
        node_options(part)

    verb = verbs.add_parser(
        "learn",
        allow_abbrev=False,
        help="a better model from the audit logs, if they show that it is (docs/learning.md)",
    )
    verb.set_defaults(verb=learn)
    verb.add_argument("logs", nargs="*", metavar="LOG", help="audit logs of one node or many (default: this node's)")
    verb.add_argument("--dry-run", action="store_true", help="change nothing, say what would have been done")
    verb.add_argument("--json", action="store_true", help="everything, as one JSON object")
    verb.add_argument("--rounds", type=int, default=12, metavar="N", help="how long to train (default: %(default)s)")
    verb.add_argument("--seed", type=int, default=0, metavar="N", help="of the training")
    node_options(verb)

    verb = verbs.add_parser("train", allow_abbrev=False, help="train a policy for a GPU model; needs rms-mig[train]")
    verb.set_defaults(verb=train)
    verb.add_argument("--config", required=True, metavar="FILE", help="such as policy/configs/slots8.toml")
    verb.add_argument("--seed", type=int, default=0, metavar="N")
    verb.add_argument("--out", required=True, metavar="FILE", help="the model file to write")
    verb.add_argument(
        "--folder", required=True, metavar="DIR", help="solved nodes, checkpoint and learning curve; goes on from there"
    )
    verb.add_argument(
        "--device", default="cpu", choices=("cpu", "cuda"), help="where the net is (default: %(default)s)"
    )


def simulate(options: argparse.Namespace) -> int:
    """Run policies side by side on the same jobs."""
    import json

    made_up = {"load": options.load, "jobs": options.jobs, "seed": options.seed}
    if options.trace and any(value is not None for value in made_up.values()):
        raise UsageError("--load, --jobs and --seed are for made-up jobs (--mix): a trace brings its own")
    try:
        from policy import report, study
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "numba"):
            raise
        raise RmsError(
            f"rms simulate needs {error.name}, which is not installed: {sys.prefix}/bin/pip install numpy numba"
        ) from None
    with _progress() as progress:
        found = study.simulate(
            study.Wanted(
                options.model,
                options.gpus,
                options.mode,
                options.reserve,
                options.policy,
                options.trace,
                options.skip_bad_lines,
                options.mix,
                **{key: value for key, value in made_up.items() if value is not None},
            ),
            progress,
        )
    if options.report:
        with open(options.report, "w", encoding="utf-8") as file:
            file.write(report.page(found))
    print(json.dumps(found, indent=2) + "\n" if options.json else report.text(found), end="")
    return 0


@contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """A bar on stderr, where that is a terminal; gone at the end."""
    shown = sys.stderr.isatty()

    def progress(what: str, done: float) -> None:
        if shown:
            print(f"\r\x1b[K{what:30.30} [{'#' * int(30 * done):30}] {done:4.0%}", end="", file=sys.stderr, flush=True)

    try:
        yield progress
    finally:
        if shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def train(options: argparse.Namespace) -> int:
    """Train a policy, or go on with it."""
    try:
        from policy import train as training
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "numba", "torch"):
            raise
        raise RmsError(
            f"rms train needs {error.name}, which is not installed: {sys.prefix}/bin/pip install torch numpy numba"
        ) from None
    with _progress() as progress:
        training.run(options.config, options.seed, options.out, options.folder, options.device, progress)
    print(f"{options.out}: {os.path.getsize(options.out)} bytes")
    return 0


def policy_list(options: argparse.Namespace) -> int:
    """The models that this node could use."""
    import json

    shelf = _shelf(config.load(options.config, options.node))
    rows = [
        {"name": m.name, "model": m.model.name if m.model else None, "fault": m.fault, "in_use": m.used}
        for m in shelf.list()
    ]
    if options.json:
        print(json.dumps({"schema": 1, "board": shelf.geometry.model, "models": rows}, indent=2))
    else:
        for row in rows:
            print(f"{'*' if row['in_use'] else ' '} {row['name']:32} {row['model'] or row['fault']}")
    return 0


def policy_show(options: argparse.Namespace) -> int:
    """All that is known of a model, and of how it does here."""
    import json
    import time

    from policy import audits, model
    from policy import shelf as shelves

    settings = config.load(options.config, options.node)
    shelf = _shelf(settings)
    name = options.name or shelf.in_use()
    try:
        found = shelf.read(name)
    except model.ModelError as error:
        raise RequestError(f"{name} {error}; rms policy list has the others") from None
    view = _seen(settings, shelf.geometry, time.time())
    known = model.basis(found, view, shelf.geometry)
    stood = audits.stand_ins(settings.audit_log)
    told = {
        "schema": 1,
        "name": name,
        "model": found.name,
        "in_use": name == shelf.in_use(),
        "used": [used._asdict() for used in shelf.history().used],
        "rollback": shelf.before(),
        "manifest": dict(found.manifest),
        "requests_seen": len(view.recent),
        "requests_waiting": None if view.pending is None else len(view.pending),
        **model.written(found, known),
        "jobs_minutes": model.minutes(found, known.times) if known.times.rate else None,
        "decisions": stood._asdict(),
    }
    print(json.dumps(told, indent=2) if options.json else shelves.describe(told))
    return 0


def policy_explain(options: argparse.Namespace) -> int:
    """The last decision about a job, made again from its line in the log to show that it follows from that."""
    import json

    from policy import audits
    from policy import explain as explaining
    from rms import audit, geometry
    from rms.show import look

    settings = config.load(options.config, options.node)
    match = re.fullmatch(r"([0-9]{1,15})(?:\.([0-9]{1,15}))?", options.job)
    if match is None:
        raise RequestError(
            f"{printable(options.job)} is no job; write 4711, or 4711.1 for its second run, "
            "and of an array's task the JobId that `scontrol show job` has for it"
        )
    restart = int(match[2]) if match[2] else None
    entry = audits.decision(options.logs or [settings.audit_log], int(match[1]), restart)
    if entry is None:
        raise RequestError(f"the audit log has no decision about job {options.job}; name older logs, if there are")
    boards = {name: geometry.load(name) for name in geometry.models()} | look(settings).state.geometries
    try:
        hashes = {one["model"] for one in entry["instances"]} - {None}
        models = [known.model for known in _shelf(settings).list() if known.model and known.model.name in hashes]
        view = explaining.seen(entry, boards)
        if hashes and not models:
            same, checked = None, f"model {', '.join(sorted(hashes))} is not here, so it was not made again"
        else:
            decisions = explaining.again(entry, view, models[0] if models else None)
            same = json.loads(json.dumps(audit.explain(decisions or [], view))) == entry["instances"]
            checked = "made again from this line: " + ("the same" if same else "NOT the same")
        text = explaining.describe(entry, checked)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise RequestError(f"the line about job {options.job} is damaged, or another RMS's ({error!r})") from None
    print(json.dumps({"schema": 1, "same": same, "line": entry}, indent=2) if options.json else text)
    return 0


def policy_use(options: argparse.Namespace) -> int:
    """Swap the model."""
    from policy import model

    settings = config.load(options.config, options.node)
    shelf = _shelf(settings)
    before, name = shelf.in_use(), options.name
    if not shelf.has(name):
        path, name = name, os.path.basename(name).removesuffix(".model")
        try:
            with open(path, "rb") as file:
                data = file.read(model.MOST_BYTES + 1)
        except OSError as error:
            raise RequestError(f"{path} is no model of rms policy list, and no file: {error.strerror}") from error
        shelf.add(data, name)
    if name == before:
        print(f"{name} decides already")
        return 0
    shelf.use(name)
    _swapped(settings, shelf, "use", before)
    print(f"{name} decides from now on; rms policy rollback leads back to {before}")
    return 0


def policy_rollback(options: argparse.Namespace) -> int:
    """Swap back."""
    settings = config.load(options.config, options.node)
    shelf = _shelf(settings)
    before = shelf.in_use()
    name = shelf.rollback()
    _swapped(settings, shelf, "rollback", before)
    print(f"{name} decides from now on, and no longer {before}")
    return 0


def learn(options: argparse.Namespace) -> int:
    """Learn from audit logs; swap models where that is shown to be better."""
    import json
    import time

    if not (0 <= options.rounds <= 1000 and 0 <= options.seed < 1000):
        raise UsageError("--rounds is from 0 to 1000, --seed from 0 to 999")
    try:
        from policy import learn as learning
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "numba"):
            raise
        raise RmsError(
            f"rms learn needs {error.name}, which is not installed: {sys.prefix}/bin/pip install numpy numba"
        ) from None
    settings = config.load(options.config, options.node)
    shelf = _shelf(settings)
    before = shelf.in_use()
    with _progress() as progress:
        told = learning.learn(
            options.logs or [settings.audit_log],
            shelf,
            time.time(),
            options.rounds,
            options.seed,
            options.dry_run,
            progress,
        )
    if shelf.in_use() != before:
        _swapped(settings, shelf, "learn", before)
    print(json.dumps(told, indent=2) if options.json else learning.describe(told))
    return 0


def _swapped(settings: config.Config, shelf: Shelf, by: str, before: str) -> None:
    """Note a swap in the audit log."""
    from rms.audit import Audit

    audit = Audit(settings.audit_log)
    name = shelf.in_use()
    audit.write("policy", by=by, name=name, model=shelf.read(name).name, before=before)
    if audit.fault:
        print(f"rms: {audit.fault}", file=sys.stderr)


def _shelf(settings: config.Config) -> Shelf:
    """The models for this node's GPUs."""
    from policy.shelf import Shelf

    return Shelf(settings.policy_dir, _board(settings))


def _board(settings: config.Config) -> Geometry:
    """The geometry of this node's GPUs, as the state has it; before the first MIG job, as the hardware has it."""
    from rms.show import look

    if known := look(settings).state.geometries:
        return next(iter(known.values()))
    from rms import hardware

    device = hardware.open_device(settings, config.boot_id(settings))
    try:
        return device.geometry(device.gpus()[0])
    except DeviceError as error:
        raise NodeError(f"cannot read the placements of the GPUs: {error}") from error
    finally:
        device.close()


def _seen(settings: config.Config, board: Geometry, now: float) -> View:
    """What a policy would see of this node now."""
    from rms import demand, inventory
    from rms.show import look

    view = inventory.view(look(settings).state, now)
    told = demand.load(settings.state_dir, now)
    return view._replace(pending=told.pending(board)) if told else view
