"""The administrator's command line, `rms VERB`.

A verb is a function that takes the parsed options and returns the exit code; `_parser` lists them. What a verb needs
of slurm, policy or the controller it imports itself: `rms show` must work where those do not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import rms
from rms import config
from rms.device import DeviceError
from rms.errors import NodeError, RequestError, RmsError
from rms.request import printable

if TYPE_CHECKING:
    from policy.shelf import Shelf
    from rms.geometry import Geometry
    from rms.inventory import Run, State
    from rms.nvml import NvmlDevice
    from rms.planner import View


SLURM_SECONDS = 10.0
"""How long slurmctld may take to say what runs on this node."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rms", description="Dynamic NVIDIA MIG for Slurm.", allow_abbrev=False, epilog="Exit codes: docs/admin.md."
    )
    parser.add_argument("-V", "--version", action="version", version=f"rms {rms.__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    verb = verbs.add_parser(
        "show", allow_abbrev=False, help="the GPUs of this node, slice by slice, and the jobs on them"
    )
    verb.set_defaults(verb=show)
    verb.add_argument("--json", action="store_true", help="everything, as one JSON object")
    _node_options(verb)

    verb = verbs.add_parser(
        "doctor", allow_abbrev=False, help="what this node's GPUs are, and what is wrong with them; changes nothing"
    )
    verb.set_defaults(verb=doctor)
    verb.add_argument("--json", action="store_true", help="everything, as one JSON object")
    _slurm_option(verb)
    _node_options(verb)

    verb = verbs.add_parser(
        "reconcile", allow_abbrev=False, help="make the inventory agree with the GPUs and with Slurm's running jobs"
    )
    verb.set_defaults(verb=reconcile)
    verb.add_argument("--dry-run", action="store_true", help="say what would be done, and change nothing")
    _slurm_option(verb)
    _node_options(verb)

    verb = verbs.add_parser("mig", allow_abbrev=False, help="turn MIG mode on or off, while no job uses the GPU")
    verb.set_defaults(verb=mig)
    verb.add_argument("mode", choices=["enable", "disable"])
    verb.add_argument("gpus", nargs="*", metavar="GPU", help="UUID, or as the configuration names it; default: all")
    _node_options(verb)

    verb = verbs.add_parser(
        "slurm-config", allow_abbrev=False, help="the hooks, the lua and the slurm.conf lines for this site's GPUs"
    )
    verb.set_defaults(verb=slurm_config)
    # These three once for each kind of node.
    verb.add_argument("--model", action="append", required=True, help="GPU model, such as A100-80GB")
    verb.add_argument("--gpus", action="append", required=True, type=int, metavar="N", help="GPUs in each node")
    verb.add_argument(
        "--nodes",
        action="append",
        required=True,
        metavar="LIST",
        help="the nodes as slurm.conf names them: gpu[01-02]; all three again for each further kind of node",
    )
    verb.add_argument("--config", metavar="PATH", default=config.DEFAULT_PATH, help="where the nodes have rms.toml")
    verb.add_argument(
        "--slurm-conf", metavar="PATH", default="/etc/slurm/slurm.conf", help="where they have slurm.conf"
    )
    verb.add_argument(
        "--admission",
        choices=config.ADMISSIONS,
        help="what slurmctld is told of what fits (default: as rms.toml says, else the best for the Slurm here)",
    )
    verb.add_argument(
        "--preempting",
        action="append",
        default=[],
        metavar="NAME",
        help="a partition or QOS whose jobs may preempt others (docs/slurm.md); may be given several times",
    )
    verb.add_argument("--write", metavar="DIR", help="write the files into DIR instead of printing them")

    verb = verbs.add_parser(
        "watch", allow_abbrev=False, help="a service beside slurmctld: large jobs do not starve (docs/slurm.md)"
    )
    verb.set_defaults(verb=watch)
    _slurm_option(verb)
    _config_option(verb)
    verb.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="between two looks at the queue (default: %(default)s)"
    )

    verb = verbs.add_parser(
        "publish", allow_abbrev=False, help="tell slurmctld what fits on this node: at boot, from a timer"
    )
    verb.set_defaults(verb=publish)
    _slurm_option(verb)
    _node_options(verb)

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
        _node_options(part)

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
    _node_options(verb)

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

    return parser


def _slurm_option(verb: argparse.ArgumentParser) -> None:
    """Which Slurm a verb asks."""
    verb.add_argument(
        "--slurm-conf",
        metavar="PATH",
        default=os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf"),
        help="default: $SLURM_CONF or /etc/slurm/slurm.conf",
    )


def _node_options(verb: argparse.ArgumentParser) -> None:
    """Which node a verb is about, and its configuration."""
    _config_option(verb)
    verb.add_argument("--node", metavar="NAME", default=config.node_name(), help="the node's name in Slurm")


def _config_option(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--config",
        metavar="PATH",
        default=os.environ.get("RMS_CONFIG", config.DEFAULT_PATH),
        help=f"configuration file (default: $RMS_CONFIG or {config.DEFAULT_PATH}); %%n in it is the node's name",
    )


def show(options: argparse.Namespace) -> int:
    """Draw the node's GPUs, or print all that is known of them as JSON."""
    import json

    from rms.show import coloured, draw, look, plain, report

    settings = _settings(options)
    seen = look(settings)
    found = report(seen, options.node, _policy(settings, list(seen.state.geometries.values())))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print(draw(found, shutil.get_terminal_size().columns, coloured if colours else plain), end="")
    return seen.code


def doctor(options: argparse.Namespace) -> int:
    """Print what the GPUs are and what is wrong with them, and with Slurm's configuration. Returns 6 if anything is."""
    import json

    from rms.doctor import describe, examine, report

    settings = _settings(options)
    found = []
    if settings.simulated:
        print("this node's GPUs are simulated: nothing to examine", file=sys.stderr)
    else:
        with _real(settings) as device:
            found = examine(device, _state(settings))
    wrong = []
    if os.path.exists(options.slurm_conf):
        from slurm import check

        wrong = check.examine(settings, options.slurm_conf, options.node, _state(settings))
    else:
        print(f"Slurm is not examined: there is no {options.slurm_conf}", file=sys.stderr)
    if options.json:
        print(json.dumps({**report(found, settings.fence), "slurm": wrong}, indent=2))
    else:
        print(describe(found, settings.fence) + "".join(f"! {text}\n" for text in wrong), end="")
    return NodeError.code if wrong or any(one.problems for one in found) else 0


def reconcile(options: argparse.Namespace) -> int:
    """Compare state, GPUs and Slurm, and mend what differs: one line for each thing that was found."""
    import controller
    from slurm.slurmctld import Slurmctld, SlurmError
    from slurm.stuck import back, stuck

    told = []
    silent = False

    def tell(text: str) -> None:
        told.append(text)
        print(printable(text, 1000), flush=True)

    def over(runs: Sequence[Run]) -> Sequence[Run]:
        nonlocal silent
        try:
            return Slurmctld(options.slurm_conf, SLURM_SECONDS).over(runs, options.node) if runs else ()
        except SlurmError as error:  # no answer is no reason to take anything from anybody
            silent = True
            tell(f"Slurm does not say what runs here, so no run is taken for over: {error}")
            return ()

    settings = _settings(options)
    controller.Controller(settings, log=tell, rehearsal=options.dry_run).reconcile(over)
    if not silent:  # to ask it once more would only take as long again
        with suppress(SlurmError):
            slurmctld = Slurmctld(options.slurm_conf, SLURM_SECONDS)
            for job in stuck(slurmctld, options.node, settings.run_dir):
                try:
                    done = "to be requeued" if options.dry_run else back(slurmctld, job, options.node)
                except SlurmError as error:
                    done = f"it can't be requeued: {error}"
                tell(f"job {job.name} is in a Prolog of which there is no process: {done}")
    if not (silent or options.dry_run) and settings.admission != "sums":
        from slurm.publish import Publisher

        try:  # whatever was published before: slurmctld forgets it when it is reconfigured
            Publisher(settings, options.slurm_conf, options.node, tell).now(SLURM_SECONDS)
        except NodeError as error:
            tell(str(error))
    if options.dry_run:
        print("dry run: nothing was changed")
    elif not told:
        print("nothing to do")
    return 0


def mig(options: argparse.Namespace) -> int:
    """Turn MIG mode on or off. The GPUs that can be switched are, also if others can't."""
    settings = _settings(options)
    if settings.simulated:
        raise NodeError("this node's GPUs are simulated: they are always in MIG mode")
    if options.mode == "disable" and not options.gpus:
        return _fail("say for which GPU: rms mig disable GPU", 2)
    code = 0
    with _real(settings) as device:
        from rms.mig import switch

        names = dict(zip(device.gpus(), map(str, settings.gpus), strict=True))
        if unknown := set(options.gpus) - {*names, *names.values()}:
            raise NodeError(f"the configuration names no GPU {min(unknown)}, but {' '.join(names.values())}")
        for gpu, name in names.items():
            if not options.gpus or {gpu, name} & set(options.gpus):
                try:
                    switch(settings, device, gpu, options.mode == "enable", print)
                except RmsError as error:
                    code = _fail(str(error), error.code)
    return code


def _settings(options: argparse.Namespace) -> config.Config:
    return config.load(options.config.replace("%n", options.node), options.node)


def _state(settings: config.Config) -> State:
    """What RMS knows of the GPUs; nothing where its state can't be read, about which `rms show` has more to say."""
    from rms.inventory import State
    from rms.store import Damaged, Store

    try:
        return Store(settings.state_dir, 0.0).glance()
    except (NodeError, Damaged):
        return State()


@contextmanager
def _real(settings: config.Config) -> Iterator[NvmlDevice]:
    """A session with the configured GPUs, for what only real ones can do."""
    from rms import hardware

    device = hardware.open_device(settings, "")
    try:
        yield cast("NvmlDevice", device)
    finally:
        device.close()


def slurm_config(options: argparse.Namespace) -> int:
    """Print or write what a site puts into its Slurm configuration."""
    from slurm import site
    from slurm.slurmctld import Slurmctld, SlurmError

    if not len(options.model) == len(options.gpus) == len(options.nodes):
        raise RequestError("give --model, --gpus and --nodes once for each kind of node")
    version = None
    for program in ("slurmctld", "slurmd"):  # they need no slurm.conf to say it; one is on every machine of Slurm's
        with suppress(SlurmError):
            version = Slurmctld(options.slurm_conf).run(program, "-V").split()[-1]
    admission, why = site.choose(options.admission, options.config, version)
    print(f'admission = "{admission}": {why}', file=sys.stderr)
    made = site.files(
        site.kinds(zip(options.model, options.gpus, options.nodes, strict=True)),
        options.config,
        options.slurm_conf,
        admission,
        options.preempting,
    )
    if options.write:
        site.write(made, options.write)
        print(f"{len(made)} files in {options.write}; {site.SETTINGS} has the lines for slurm.conf")
    else:
        for name, text in made.items():
            print(f"##### {os.path.join(os.path.dirname(options.slurm_conf), name)}\n{text}")
    return 0


def watch(options: argparse.Namespace) -> int:
    """Watch the queue, until ended. Nobody waits for it: what it has told the nodes expires."""
    from slurm import watch as service

    most = config.load(options.config, config.node_name()).keep_gpus
    service.run(options.slurm_conf, most, options.seconds, lambda text: print(text, file=sys.stderr, flush=True))


def publish(options: argparse.Namespace) -> int:
    """Tell slurmctld what fits, after the inventory was looked at: it may be from before a reboot."""
    settings = _settings(options)
    if settings.admission == "sums":
        print('admission = "sums": nothing is published')
        return 0
    import controller
    from slurm.publish import Publisher

    controller.Controller(settings).look()
    Publisher(settings, options.slurm_conf, options.node, lambda text: print(f"rms: {text}", file=sys.stderr)).now()
    return 0


def simulate(options: argparse.Namespace) -> int:
    """Run policies side by side on the same jobs."""
    import json

    made_up = {"load": options.load, "jobs": options.jobs, "seed": options.seed}
    if options.trace and any(value is not None for value in made_up.values()):
        return _fail("--load, --jobs and --seed are for made-up jobs (--mix): a trace brings its own", 2)
    try:
        from policy import report, study
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "numba"):
            raise
        return _fail(f"rms simulate needs {error.name}, which is not installed: pip install numpy numba", 1)
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
        return _fail(f"rms train needs {error.name}, which is not installed: pip install 'rms-mig[train]'", 1)
    with _progress() as progress:
        training.run(options.config, options.seed, options.out, options.folder, options.device, progress)
    print(f"{options.out}: {os.path.getsize(options.out)} bytes")
    return 0


def policy_list(options: argparse.Namespace) -> int:
    """The models that this node could use."""
    import json

    shelf = _shelf(_settings(options))
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

    settings = _settings(options)
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

    settings = _settings(options)
    job, _, restart = options.job.partition(".")
    if not (job.isdecimal() and (restart or "0").isdecimal()):
        raise RequestError(f"{printable(options.job)} is no job; write 4711, or 4711.1 for its second run")
    entry = audits.decision(options.logs or [settings.audit_log], int(job), int(restart) if restart else None)
    if entry is None:
        raise RequestError(f"the audit log has no decision about job {options.job}; name older logs, if there are")
    boards = {name: geometry.load(name) for name in geometry.models()} | _state(settings).geometries
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

    settings = _settings(options)
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
    shelf.use(name)
    _swapped(settings, shelf, "use", before)
    print(f"{name} decides from now on; rms policy rollback leads back to {before}")
    return 0


def policy_rollback(options: argparse.Namespace) -> int:
    """Swap back."""
    settings = _settings(options)
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
        return _fail("--rounds is from 0 to 1000, --seed from 0 to 999", 2)
    try:
        from policy import learn as learning
    except ModuleNotFoundError as error:
        if error.name not in ("numpy", "numba"):
            raise
        return _fail(f"rms learn needs {error.name}, which is not installed: pip install numpy numba", 1)
    settings = _settings(options)
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


def _policy(settings: config.Config, known: Sequence[Geometry]) -> dict[str, str | None]:
    """What decides on this node. Only an answer tells, since a policy that fails is replaced: ask with empty GPUs."""
    import controller
    from rms import geometry, planner
    from rms.request import Request

    known = known or [geometry.load(geometry.models()[0])]
    view = planner.View(tuple(planner.GpuView("", one) for one in known), (), None, 0.0)
    request = Request(((known[0].profiles[0].name, 1),))
    choice = (planner.plan(view, request, None, controller.chooser(settings)) or [])[0].choice
    return {"source": choice.source, "model": choice.model, "reason": choice.reason, "fault": choice.fault}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb. Returns the exit code. The one place where an exception becomes a line for people."""
    try:
        options = _parser().parse_args(arguments)
        code: int = options.verb(options)
        sys.stdout.flush()
        return code
    except RmsError as error:
        return _fail(str(error), error.code)
    except BrokenPipeError:
        # As in `rms show | head`. Without this Python would complain when it flushes once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        return _fail(str(error), 1)
    except Exception as error:
        if os.environ.get("RMS_TRACEBACK"):
            raise
        return _fail(f"a fault of RMS: {type(error).__name__}: {error} (RMS_TRACEBACK=1 shows where)", 1)


def _fail(text: str, code: int) -> int:
    # One line whatever the text quotes; a letter that the terminal lacks is stderr's own business.
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    print(f"rms: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
