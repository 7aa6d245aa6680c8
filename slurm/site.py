"""What a site puts into its Slurm configuration, made for its GPUs: `rms slurm-config`.

The hooks are shell scripts with absolute paths written into them, since slurmd gives them neither PATH nor anything of
ours; the lua gets a table of the profiles and of what one empty GPU can hold.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from rms import config, geometry
from rms.errors import NodeError, RequestError
from rms.geometry import Geometry
from rms.request import Request
from slurm import publish

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = "slurm.conf.rms"
SENTINEL = "rmsfit"
"""The node that is never there: it has every name that a node may publish, or slurmctld would refuse the jobs that ask
for one which no node publishes just now."""
HEALTH_CHECK = "healthcheck"
HOOKS = {"Prolog": "prolog", "Epilog": "epilog", "TaskProlog": "task_prolog"}


def files(
    model: str,
    gpus: int,
    nodes: str,
    config_path: str,
    slurm_conf: str,
    admission: str | None = None,
    preempting: Sequence[str] = (),
) -> dict[str, str]:
    """Every file of a site by its name, to lie beside slurm.conf: the hooks, the lua, and the lines for slurm.conf.

    `admission` is the mode; None for what the configuration says, or `features` where there is none yet. `preempting`
    are partitions and QOS whose jobs may preempt others.
    Raises RequestError on an unknown model or a count below 1, NodeError if the configuration exists and can't be read.
    """
    if gpus < 1:
        raise RequestError(f"--gpus is {gpus}; a node has 1 or more")
    if bad := [word for word in preempting if not re.fullmatch(r"[\w.-]+", word, re.ASCII)]:
        raise RequestError(f"{bad[0]!a} is no name of a partition or QOS")
    known = geometry.load(model)
    directory = os.path.dirname(slurm_conf)
    present = config.load(config_path, "%n") if os.path.exists(config_path) else None
    run_dir = (present or config.Config(())).run_dir
    admission = admission or (present.admission if present else "features")
    if present and present.admission != admission:
        raise NodeError(f'{config_path} says admission = "{present.admission}": the nodes and the lua must agree')
    values = {
        "@PYTHON@": shlex.quote(sys.executable),
        "@CONFIG@": shlex.quote(config_path),
        "@SLURM_CONF@": shlex.quote(slurm_conf),
        "@RUN_DIR@": _shell(run_dir),
        "@BIN@": shlex.quote(os.path.dirname(_which("scontrol"))),
        "@DIR@": directory,
    }
    made = {name: _fill(name, values) for name in (*HOOKS.values(), HEALTH_CHECK, "job_submit.lua", "rms.lua")}
    made["rms_table.lua"] = table(known, gpus, admission, preempting)
    made[SETTINGS] = settings(known, gpus, nodes, directory, admission)
    return made


def settings(known: Geometry, gpus: int, nodes: str, directory: str, admission: str) -> str:
    """The lines that slurm.conf needs."""
    hooks = "".join(f"{option}={os.path.join(directory, name)}\n" for option, name in HOOKS.items())
    types = "mig,migc,migm" + (f",{publish.TOKEN}" if admission != "sums" else "")
    scheduling = {
        "sums": "",
        "features": "# among the others of this line; so a job starts a second after it is known that it fits\n"
        "SchedulerParameters=bf_continue,batch_sched_delay=1\n",
        "extra": "# among the others of this line; extra_constraints is needed\n"
        "SchedulerParameters=extra_constraints,bf_continue,batch_sched_delay=1\n",
    }
    return f"""\
# RMS, for {gpus} x {known.model} per node; printed by `rms slurm-config --admission {admission}`
# rms.toml of these nodes must say admission = "{admission}"
GresTypes={types}
JobSubmitPlugins=lua
PrologFlags=Alloc,Contain
{scheduling[admission]}{hooks}# or called from a health check of the site's own:
HealthCheckProgram={os.path.join(directory, HEALTH_CHECK)}
HealthCheckInterval=300
# on the line of these nodes, beside what it says of CPUs and memory:
NodeName={nodes} Gres={gres(known, gpus, admission)}
""" + (sentinel(known, gpus) if admission == "features" else "")


def sentinel(known: Geometry, gpus: int) -> str:
    """The line of the node that is never there."""
    names = ",".join(publish.name(request) for request in publish.listed(known, gpus))
    return f"""\
# A node that is never there (never polled, not shown by sinfo), without which slurmctld would refuse jobs that do not
# fit just now. It belongs into every partition of these nodes (PartitionName=... Nodes=...,{SENTINEL}), and needs at
# least the CPUs, RealMemory, Features and Gres of the largest of them: a job that asks for more than it has is refused
# while no node has room. Add what your nodes have besides; `rms doctor` compares.
NodeName={SENTINEL} NodeAddr=127.0.0.1 State=FUTURE CPUs=256 RealMemory=4000000 \\
 Gres={gres(known, gpus, "features")} \\
 Features={names}
"""


def gres(known: Geometry, gpus: int, admission: str) -> str:
    """What a node with `gpus` GPUs has: of each profile as many as fit alone, and the slices that all of them share.

    And of the token as much as can ever be wanted: slurmctld forgets what jobs hold beyond it when it is restarted.
    """
    mig = ",".join(f"mig:{profile.name}:{profile.limit * gpus}" for profile in known.profiles)
    both = f"{mig},migc:{compute(known) * gpus},migm:{known.slots * gpus}"
    if admission == "sums":
        return both
    jobs = (gpus + 1) * publish.span(known)
    size = jobs * publish.span(known)
    return f"{both},{publish.TOKEN}:job:{jobs},{publish.TOKEN}:size:{size},{publish.TOKEN}:shut:{jobs + size}"


def compute(known: Geometry) -> int:
    """The compute slices of one GPU: those of its largest profile."""
    return max(profile.compute for profile in known.profiles)


def table(known: Geometry, gpus: int, admission: str, preempting: Sequence[str] = ()) -> str:
    """The lua table: the profiles, the maximal count vectors of one empty GPU, and what is published."""
    names = [profile.name for profile in known.profiles]
    fit = sorted(known.frontier(names, tuple(profile.limit for profile in known.profiles)), reverse=True)
    profiles = "\n".join(
        f'    {{ name = "{p.name}", compute = {p.compute}, memory = {p.memory}, '
        f"weight = {publish.weight(known, Request(((p.name, 1),)))} }},"
        for p in known.profiles
    )
    alias = "\n".join(f'    ["{word}"] = "{name}",' for word, name in known.names().items())
    vectors = "\n".join(f"    {{ {', '.join(str(n) for n in vector)} }}," for vector in fit)
    whole = max(known.profiles, key=lambda profile: (profile.memory, profile.plain)).name
    gates = "\n".join(f'    ["{request}"] = "{publish.name(request)}",' for request in publish.listed(known, gpus))
    free = ", ".join(f'["{word}"] = true' for word in preempting)
    published = f"""\
  gates = {{ -- what is published for each request, the profiles in the order above
{gates}
  }},
  whole = "{whole}", -- takes a whole GPU
  span = {publish.span(known)}, -- the token's size of a job that starts alone
  sentinel = "{SENTINEL}",
  preempting = {{ {free} }}, -- partitions and QOS whose jobs go without such a name
"""
    return f"""\
-- Made by `rms slurm-config --model {known.model} --gpus {gpus}`; used by rms.lua. Do not edit: make it again.
return {{
  model = "{known.model}",
  gpus = {gpus}, -- of one node
  admission = "{admission}",
  profiles = {{
{profiles}
  }},
  alias = {{ -- every accepted name, in lower case
{alias}
  }},
  fit = {{ -- the most that one empty GPU holds: how many of each profile, in the order above
{vectors}
  }},
{"" if admission == "sums" else published}}}
"""


def write(made: Mapping[str, str], directory: str) -> None:
    """Put the files into `directory`, hooks executable. Raises NodeError, also where a site has one of its own."""
    try:
        os.makedirs(directory, exist_ok=True)
        for path in [os.path.join(directory, name) for name in made]:
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    if "rms slurm-config" not in file.read() and not path.endswith("rms.lua"):
                        raise NodeError(f"{path} is not ours: move it away, or call RMS from it (docs/admin.md)")
        for name, text in made.items():
            path = os.path.join(directory, name)
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(path, 0o755 if name in (*HOOKS.values(), HEALTH_CHECK) else 0o644)
    except OSError as error:
        raise NodeError(f"cannot write to {directory}: {error.strerror}") from error


def _fill(name: str, values: Mapping[str, str]) -> str:
    with open(os.path.join(HERE, name), encoding="utf-8") as file:
        text = file.read()
    for placeholder, value in values.items():
        text = text.replace(placeholder, value)
    return text


def _shell(path: str) -> str:
    """A path for a shell script, `%n` being the node's name, which slurmd puts into every hook's environment."""
    return '"$SLURMD_NODENAME"'.join(shlex.quote(part) for part in path.split("%n"))


def _which(program: str) -> str:
    for directory in ["/usr/local/bin", "/usr/bin", "/bin", "/usr/sbin", "/opt/slurm/bin"]:
        if os.access(os.path.join(directory, program), os.X_OK):
            return os.path.join(directory, program)
    return f"/usr/bin/{program}"  # printed on a machine without Slurm, for one that has it in the usual place
