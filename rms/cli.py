"""The administrator's command line, `rms VERB`.

A verb is a function that takes the parsed options and returns the exit code; `_parser` lists them, those about policies
are in `rms.cli_policy`. What a verb needs of slurm, policy or the controller it imports itself: `rms show` must work
where those do not.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import rms
from rms import cli_policy, config
from rms.errors import NodeError, RequestError, RmsError, UsageError, unheard
from rms.request import MESSAGE, printable

if TYPE_CHECKING:
    from rms.geometry import Geometry
    from rms.inventory import Run, State
    from rms.nvml import NvmlDevice


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

    cli_policy.add(verbs, _node_options)
    return parser


def _slurm_option(verb: argparse.ArgumentParser) -> None:
    """Which Slurm a verb asks."""
    verb.add_argument(
        "--slurm-conf",
        metavar="PATH",
        default=os.environ.get("SLURM_CONF", "/etc/slurm/slurm.conf"),
        help="default: $SLURM_CONF or /etc/slurm/slurm.conf, else what slurmd has fetched",
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

    settings = config.load(options.config, options.node)
    seen = look(settings)
    found = report(seen, options.node, _policy(settings, list(seen.state.geometries.values())))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print(draw(found, shutil.get_terminal_size().columns, coloured if colours else plain), end="")
    return seen.code


def doctor(options: argparse.Namespace) -> int:
    """Print what the GPUs are and what is wrong with them, with RMS's directories, and with Slurm's configuration.

    Returns 6 if anything is wrong.
    """
    import json

    from rms.doctor import describe, directories, examine, report
    from slurm.slurmctld import present

    settings = config.load(options.config, options.node)
    found = []
    if settings.simulated:
        print("this node's GPUs are simulated: nothing to examine", file=sys.stderr)
    else:
        with _real(settings) as device:
            found = examine(device, _state(settings))
    own = list(directories(settings))
    wrong = []
    if os.path.exists(present(options.slurm_conf)):
        from slurm import check

        wrong = check.examine(settings, options.slurm_conf, options.node, _state(settings))
    else:
        print(f"Slurm is not examined: there is no {options.slurm_conf}", file=sys.stderr)
    sound = not own and not wrong and not any(one.problems for one in found)
    if options.json:
        print(json.dumps({**report(found, settings.fence), "directories": own, "slurm": wrong}, indent=2))
    else:
        print(describe(found, settings.fence) + "".join(f"! {text}\n" for text in [*own, *wrong]), end="")
        if sound:
            print("nothing wrong found")
    return 0 if sound else NodeError.code


def reconcile(options: argparse.Namespace) -> int:
    """Compare state, GPUs and Slurm, and mend what differs: one line for each thing that was found."""
    import controller
    from slurm.slurmctld import SilentError, Slurmctld, SlurmError, present
    from slurm.stuck import back, stuck

    told = []
    # To ask slurmctld once more would only take as long again, and at boot slurmd waits for us.
    silent = not os.path.exists(present(options.slurm_conf))

    def tell(text: str) -> None:
        told.append(text)
        print(printable(text, MESSAGE), flush=True)

    def over(runs: Sequence[Run]) -> Sequence[Run]:
        nonlocal silent
        try:
            asks = runs and not silent
            return Slurmctld(options.slurm_conf, SLURM_SECONDS).over(runs, options.node) if asks else ()
        except SlurmError as error:  # no answer is no reason to take anything from anybody
            silent = True
            tell(f"Slurm does not say what runs here, so no run is taken for over: {error}")
            return ()

    settings = config.load(options.config, options.node)
    if silent:
        tell(f"Slurm is not asked, nor told anything: there is no {options.slurm_conf}")
    controller.Controller(settings, log=tell, rehearsal=options.dry_run).reconcile(over)
    if not silent:
        try:
            slurmctld = Slurmctld(options.slurm_conf, SLURM_SECONDS)
            for job in stuck(slurmctld, options.node, settings.run_dir):
                try:
                    done = "to be requeued" if options.dry_run else back(slurmctld, job, options.node)
                except SlurmError as error:
                    done = f"it can't be requeued: {error}"
                tell(f"job {job.name} is in a Prolog of which there is no process: {done}")
        except SilentError as error:
            silent = True
            tell(f"Slurm is not told what fits here: {error}")
        except SlurmError as error:
            tell(f"Slurm does not say which jobs are in their Prolog: {error}")
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
    settings = config.load(options.config, options.node)
    if settings.simulated:
        raise NodeError("this node's GPUs are simulated: they are always in MIG mode")
    if options.mode == "disable" and not options.gpus:
        raise UsageError("say for which GPU: rms mig disable GPU")
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
    cluster = site.kinds(zip(options.model, options.gpus, options.nodes, strict=True))
    admission, why = site.choose(options.admission, options.config, version)
    made = site.files(cluster, options.config, options.slurm_conf, admission, options.preempting)
    print(f'admission = "{admission}": {why}', file=sys.stderr)
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

    if not 0.1 <= options.seconds <= 60:
        raise UsageError("--seconds is from 0.1 to 60")
    most = config.load(options.config, config.node_name()).keep_gpus
    service.run(options.slurm_conf, most, options.seconds, lambda text: print(text, file=sys.stderr, flush=True))


def publish(options: argparse.Namespace) -> int:
    """Tell slurmctld what fits, after the inventory was looked at: it may be from before a reboot."""
    settings = config.load(options.config, options.node)
    if settings.admission == "sums":
        print('admission = "sums": nothing is published')
        return 0
    import controller
    from slurm.publish import Publisher

    controller.Controller(settings).look()
    Publisher(settings, options.slurm_conf, options.node, lambda text: print(f"rms: {text}", file=sys.stderr)).now()
    return 0


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
        try:
            options = _parser().parse_args(arguments)
        except SystemExit:
            sys.stdout.flush()  # what --help and --version have printed
            raise
        code: int = options.verb(options)
        sys.stdout.flush()
        return code
    except RmsError as error:
        return _fail(str(error), error.code)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename:
            return _fail(f"{error.filename}: {error.strerror}", 1)
        try:
            print(flush=True)  # what could not be written names no file; if it was this, it still can't
        except OSError as unwritten:
            return unheard(unwritten)
        return _fail(str(error), 1)
    except Exception as error:
        if os.environ.get("RMS_TRACEBACK"):
            raise
        return _fail(f"a fault of RMS: {type(error).__name__}: {error} (RMS_TRACEBACK=1 shows where)", 1)


def _fail(text: str, code: int) -> int:
    print(f"rms: {printable(text, MESSAGE)}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
