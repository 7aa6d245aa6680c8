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
from collections.abc import Sequence

import rms
from rms import config
from rms.errors import RmsError


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
        "slurm-config", allow_abbrev=False, help="the hooks, the lua and the slurm.conf lines for this site's GPUs"
    )
    verb.set_defaults(verb=slurm_config)
    verb.add_argument("--model", required=True, help="GPU model, such as A100-80GB")
    verb.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs in each node")
    verb.add_argument("--nodes", required=True, metavar="LIST", help="the nodes as slurm.conf names them: gpu[01-02]")
    verb.add_argument("--config", metavar="PATH", default=config.DEFAULT_PATH, help="where the nodes have rms.toml")
    verb.add_argument(
        "--slurm-conf", metavar="PATH", default="/etc/slurm/slurm.conf", help="where they have slurm.conf"
    )
    verb.add_argument("--write", metavar="DIR", help="write the files into DIR instead of printing them")

    return parser


def _node_options(verb: argparse.ArgumentParser) -> None:
    """Which node a verb is about, and its configuration."""
    verb.add_argument(
        "--config",
        metavar="PATH",
        default=os.environ.get("RMS_CONFIG", config.DEFAULT_PATH),
        help=f"configuration file (default: $RMS_CONFIG or {config.DEFAULT_PATH}); %%n in it is the node's name",
    )
    verb.add_argument("--node", metavar="NAME", default=config.node_name(), help="the node's name in Slurm")


def show(options: argparse.Namespace) -> int:
    """Draw the node's GPUs, or print all that is known of them as JSON."""
    import json

    from rms.show import coloured, draw, look, plain, report

    settings = config.load(options.config.replace("%n", options.node), options.node)
    seen = look(settings)
    found = report(seen, options.node, _policy())
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print(draw(found, shutil.get_terminal_size().columns, coloured if colours else plain), end="")
    return seen.code


def slurm_config(options: argparse.Namespace) -> int:
    """Print or write what a site puts into its Slurm configuration."""
    from slurm import site

    made = site.files(options.model, options.gpus, options.nodes, options.config, options.slurm_conf)
    if options.write:
        site.write(made, options.write)
        print(f"{len(made)} files in {options.write}; {site.SETTINGS} has the lines for slurm.conf")
    else:
        for name, text in made.items():
            print(f"##### {os.path.join(os.path.dirname(options.slurm_conf), name)}\n{text}")
    return 0


def _policy() -> dict[str, str | None]:
    """What decides on this node. Only an answer tells, since a policy that fails is replaced: ask with an empty GPU."""
    import controller
    from rms import geometry, planner
    from rms.request import Request

    known = geometry.load(geometry.models()[0])
    view = planner.View((planner.GpuView("", known),), (), None, 0.0)
    decisions = planner.plan(view, Request(((known.profiles[0].name, 1),)), None, controller.choose) or []
    choice = decisions[0].choice
    return {"source": choice.source, "model": choice.model, "reason": choice.reason}


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
