"""What a site puts into its Slurm configuration, made for its GPUs: `rms slurm-config`.

The hooks are shell scripts with absolute paths written into them, since slurmd gives them neither PATH nor anything of
ours; the lua gets a table of the profiles and of what one empty GPU can hold.
"""

from __future__ import annotations

import glob
import os
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rms import config, geometry, planner
from rms.errors import NodeError, RequestError
from rms.files import replace
from rms.geometry import Geometry, Layout, Placement, Profile
from rms.planner import GpuView, View
from rms.request import Request
from slurm import publish
from slurm.slurmctld import FETCHED

HERE = os.path.dirname(os.path.abspath(__file__))
SETTINGS = "slurm.conf.rms"
SENTINEL = "rmsfit"
"""The node that is never there: it has every name that a node may publish, or slurmctld would refuse the jobs that ask
for one which no node publishes just now."""
HEALTH_CHECK = "healthcheck"
NEEDED = {"features": (22, 5), "extra": (23, 11), "sums": (20, 11)}
"""The oldest Slurm (major, minor) for each mode of admission, the best mode first."""
MOST_GPUS = 64
"""More are in no node."""
MIXED = 4
"""Mixes of so many instances wait for what is surely enough for them, if that is less than empty GPUs (`gates`)."""
HOOKS = {"Prolog": "prolog", "Epilog": "epilog", "TaskProlog": "task_prolog"}


class Kind(NamedTuple):
    """Nodes that are alike: their GPUs, how many each has, their names as slurm.conf has them, and of the profiles of
    these GPUs those that jobs may ask for there."""

    known: Geometry
    gpus: int
    nodes: str
    profiles: tuple[Profile, ...]


def kinds(asked: Iterable[tuple[str, int, str]]) -> list[Kind]:
    """The kinds of nodes of a cluster, each by the model of its GPUs, how many a node has, and the nodes.

    A name may mean something else on other GPUs: 1g.10gb is an eighth of an A100-80GB and a quarter of an A100-40GB.
    It is then what it is on the first of them, and can't be asked for on the others. Raises RequestError.
    """
    found: list[Kind] = []
    for model, gpus, nodes in asked:
        if not 1 <= gpus <= MOST_GPUS:
            raise RequestError(f"--gpus is {gpus}; a node has 1 to {MOST_GPUS}")
        if not re.fullmatch(r"[\w.,[\]-]+", nodes, re.ASCII) or nodes == SENTINEL:
            raise RequestError(f"{nodes!a} is no list of nodes, such as gpu[01-16],gpu20")
        known = geometry.load(model)
        theirs = {p.name for kind in found if _shape(kind.known) != _shape(known) for p in kind.profiles}
        found.append(Kind(known, gpus, nodes, tuple(p for p in known.profiles if p.name not in theirs)))
    return found


def _shape(known: Geometry) -> object:
    """What is equal for GPUs that hold the same."""
    return known.slots, [(p.name, p.limit, p.compute, p.memory, p.starts) for p in known.profiles]


def files(
    cluster: Sequence[Kind],
    config_path: str,
    slurm_conf: str,
    admission: str,
    preempting: Sequence[str] = (),
) -> dict[str, str]:
    """Every file of a site by its name, to lie beside slurm.conf: the hooks, the lua, and the lines for slurm.conf.

    `admission` is the mode (see `choose`), `preempting` are partitions and QOS whose jobs may preempt others.
    Raises RequestError on a name or path that can't be, NodeError if the configuration exists and can't be read.
    """
    if bad := [word for word in preempting if not re.fullmatch(r"[\w.-]+", word, re.ASCII)]:
        raise RequestError(f"{bad[0]!a} is no name of a partition or QOS")
    for option, path in (("--config", config_path), ("--slurm-conf", slurm_conf)):
        if not os.path.isabs(path):
            raise RequestError(f"{option} is {path!a}; the hooks need a full path")
    directory = os.path.dirname(slurm_conf)
    run_dirs = {found.run_dir for found in _present(config_path).values()} or {config.Config(()).run_dir}
    if len(run_dirs) > 1:
        raise NodeError(f"{config_path}: the nodes must agree on run_dir, not have {' and '.join(sorted(run_dirs))}")
    values = {
        "@PYTHON@": shlex.quote(sys.executable),
        "@CONFIG@": shlex.quote(config_path),
        "@SLURM_CONF@": shlex.quote(slurm_conf),
        "@FETCHED@": FETCHED,
        "@RUN_DIR@": _shell(*run_dirs),
        "@BIN@": shlex.quote(os.path.dirname(_which("scontrol"))),
        "@DIR@": directory,
    }
    made = {name: _fill(name, values) for name in (*HOOKS.values(), HEALTH_CHECK, "job_submit.lua", "rms.lua")}
    made["rms_table.lua"] = table(cluster, admission, preempting)
    made[SETTINGS] = settings(cluster, directory, admission)
    return made


def choose(wanted: str | None, config_path: str, version: str | None) -> tuple[str, str]:
    """The mode of admission for a site, and why: what is wanted, else what the configuration says, else the best one
    for the Slurm of this `version` ("22.05.8"; None where it is not known).

    Raises NodeError where configuration and wish differ, or Slurm is too old for it.
    """
    present = {path: found.admission for path, found in _present(config_path).items()}
    mode = wanted or next(iter(present.values()), None)
    for path, says in present.items():
        if says != mode:
            raise NodeError(f'{path} says admission = "{says}": the nodes and the lua must agree')
    found = tuple(int(part) for part in re.findall(r"\d+", version or "")[:2])
    if mode:
        if found and found < NEEDED[mode]:
            raise NodeError(
                'admission = "{}" needs Slurm {}.{:02} or newer, this is {}'.format(mode, *NEEDED[mode], version)
            )
        return mode, "as --admission says" if wanted else f"as {config_path} says"
    if not found:
        return "features", f"no Slurm was found here to choose for; {config_path} must say the same"
    mode = next(mode for mode, oldest in NEEDED.items() if found >= oldest or mode == "sums")
    return mode, f"the best for Slurm {version}; {config_path} must say the same"


def _present(config_path: str) -> dict[str, config.Config]:
    """The configurations that are there already: one for all nodes, or with %n in its name one for each."""
    paths = sorted(glob.glob(glob.escape(config_path).replace("%n", "*")))
    return {path: config.load(path, "%n") for path in paths}


def settings(cluster: Sequence[Kind], directory: str, admission: str) -> str:
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
    nodes = "".join(f"NodeName={kind.nodes} Gres={gres(kind, admission)}\n" for kind in cluster)
    return f"""\
# RMS, for {_named(cluster)} per node; printed by `rms slurm-config --admission {admission}`
# rms.toml of these nodes must say admission = "{admission}"
GresTypes={types}
JobSubmitPlugins=lua
PrologFlags=Alloc,Contain
{scheduling[admission]}{hooks}# or called from a health check of the site's own:
HealthCheckProgram={os.path.join(directory, HEALTH_CHECK)}
HealthCheckInterval=300
# on the line of these nodes, beside what it says of CPUs and memory:
{nodes}""" + (sentinel(cluster) if admission == "features" else "")


def _named(cluster: Sequence[Kind]) -> str:
    return " or ".join(f"{kind.gpus} x {kind.known.model}" for kind in cluster)


def sentinel(cluster: Sequence[Kind]) -> str:
    """The line of the node that is never there."""
    names = ",".join(dict.fromkeys(name for kind in cluster for name in publish.names(kind.known, kind.gpus)))
    most: dict[str, int] = {}
    for item in ",".join(gres(kind, "features") for kind in cluster).split(","):
        name, _, count = item.rpartition(":")
        most[name] = max(most.get(name, 0), int(count))
    largest = ",".join(f"{name}:{count}" for name, count in most.items())
    return f"""\
# A node that is never there (never polled, not shown by sinfo), without which slurmctld would refuse jobs that do not
# fit just now. It belongs into every partition of these nodes (PartitionName=... Nodes=...,{SENTINEL}), with
# topology/tree to their switch in topology.conf, and needs at least the CPUs, sockets, cores, threads, RealMemory,
# TmpDisk, Features and Gres of the largest of them: a job that asks for more than it has is refused while no node has
# room. And no more: a job that only this node could hold waits for ever. Add what your nodes have besides;
# `rms doctor` compares.
NodeName={SENTINEL} NodeAddr=127.0.0.1 State=FUTURE \\
 CPUs=256 Sockets=2 CoresPerSocket=64 ThreadsPerCore=2 RealMemory=4000000 \\
 Gres={largest} \\
 Features={names}
"""


def gres(kind: Kind, admission: str) -> str:
    """What a node has: of each profile as many as fit alone, and the slices that all of them share.

    And of the token as much as can ever be wanted: slurmctld forgets what jobs hold beyond it when it is restarted. Not
    of `open`, which counts nothing: with one job there slurmctld has none left, until the node publishes.
    """
    known, gpus = kind.known, kind.gpus
    mig = ",".join(f"mig:{profile.name}:{profile.limit * gpus}" for profile in kind.profiles)
    compute = max(profile.compute for profile in known.profiles)
    both = f"{mig},migc:{compute * gpus},migm:{known.slots * gpus}"
    if admission == "sums":
        return both
    jobs = (gpus + 1) * publish.span(known)
    size = jobs * publish.span(known)
    return f"{both},{publish.TOKEN}:job:{jobs},{publish.TOKEN}:size:{size},{publish.TOKEN}:open:1"


def table(cluster: Sequence[Kind], admission: str, preempting: Sequence[str] = ()) -> str:
    """The lua table: the boards, and what the names mean. GPUs that hold the same are one board, and its profiles no
    other one's: nodes that have fewer of them publish fewer names."""
    largest: dict[str, Kind] = {}
    for kind in sorted(cluster, key=lambda kind: -kind.gpus):
        largest.setdefault(repr(_shape(kind.known)), kind)
    ordered = sorted(largest.values(), key=cluster.index)
    boards = "".join(_board(kind, admission) for kind in ordered)
    meant: dict[str, list[str]] = {}
    for kind in ordered:
        names = {profile.name for profile in kind.profiles}
        for word, name in kind.known.names().items():
            if name in names and name not in meant.setdefault(word, []):
                meant[word].append(name)
    meant = {word: [word] if word in names else names for word, names in meant.items()}
    alias = "\n".join(f'    ["{word}"] = "{names[0]}",' for word, names in meant.items() if len(names) == 1)
    several = "\n".join(f'    ["{word}"] = "{" or ".join(names)}",' for word, names in meant.items() if len(names) > 1)
    free = ", ".join(f'["{word}"] = true' for word in preempting)
    published = f"""\
  sentinel = "{SENTINEL}",
  preempting = {{ {free} }}, -- partitions and QOS whose jobs do not ask whether they fit
  short_minutes = {publish.SHORT_MINUTES},
"""
    called = " ".join(f"--model {kind.known.model} --gpus {kind.gpus}" for kind in cluster)
    return f"""\
-- Made by `rms slurm-config {called}`; used by rms.lua. Do not edit: make it again.
return {{
  admission = "{admission}",
{"" if admission == "sums" else published}\
  alias = {{ -- every accepted name, in lower case
{alias}
  }},
  several = {{ -- names that mean one thing here and another there
{several}
  }},
  boards = {{ -- GPUs that hold the same; no profile is in two of them
{boards}\
  }},
}}
"""


def _board(kind: Kind, admission: str) -> str:
    """One board: its profiles, the maximal count vectors of one empty GPU, and what is published."""
    known = kind.known
    names = [profile.name for profile in kind.profiles]
    fit = sorted(known.frontier(names, tuple(profile.limit for profile in kind.profiles)), reverse=True)
    profiles = "\n".join(
        f'        {{ name = "{p.name}", compute = {p.compute}, memory = {p.memory}, '
        f"weight = {publish.weight(known, Request(((p.name, 1),)))} }},"
        for p in kind.profiles
    )
    vectors = "\n".join(f"        {{ {', '.join(str(n) for n in vector)} }}," for vector in fit)
    whole = max(known.profiles, key=lambda profile: (profile.memory, profile.plain)).name
    asked = [item for item in gates(known, kind.gpus).items() if {*item[0].profiles} <= {*names}]
    lines = "\n".join(f'        ["{request}"] = "{publish.name(published)}",' for request, published in asked)
    brief = "\n".join(f'        ["{n}:1"] = "{called}",' for n, called in publish.short(known).items() if n in names)
    published = f"""\
      gates = {{ -- what each request waits for, the profiles in the order above
{lines}
      }},
      short = {{ -- and these ones with a time limit of {publish.SHORT_MINUTES} minutes or less
{brief}
      }},
      whole = "{whole}", -- takes a whole GPU
      span = {publish.span(known)}, -- the token's size of a job that starts alone
"""
    return f"""\
    {{
      model = "{known.model}",
      gpus = {kind.gpus}, -- of one node
      profiles = {{
{profiles}
      }},
      fit = {{ -- the most that one empty GPU holds: how many of each profile, in the order above
{vectors}
      }},
{"" if admission == "sums" else published}\
    }},
"""


def gates(known: Geometry, gpus: int) -> dict[Request, Request]:
    """For each request that is published, and for small mixes that are not, the published request that it waits for.

    Where instances of it can be changed for those of a mix, in their own places and whatever is beside them, the mix
    fits where it does: 3g+1g+1g where 3g+2g does. For a mix it is the smallest such request that fits on as few empty
    GPUs as the mix itself; without one the mix has none here, and waits for empty GPUs (lua).
    """
    published = publish.listed(known, gpus)
    order = [profile.name for profile in known.profiles]
    inside = _inside(known)
    nothing = (0,) * len(order)

    def size(request: Request) -> tuple[int, int]:
        profiles = [(known.by_name[name], count) for name, count in request.items]
        return sum(p.memory * count for p, count in profiles), sum(p.compute * count for p, count in profiles)

    found = {request: request for request in published}
    for larger in sorted(published, key=size):
        if sum(larger.counts) > MIXED or not all(name in inside for name in larger.profiles):
            continue
        sums = {nothing}
        for name in (name for name, count in larger.items for _ in range(count)):
            added = ({(*map(sum, zip(one, more, strict=True)),) for more in inside[name]} for one in sums)
            sums = {counts for several in added for counts in several if sum(counts) <= MIXED}
        needs = empty(known, larger)
        for counts in sorted(sums):
            mix = Request(tuple((name, count) for name, count in zip(order, counts, strict=True) if count))
            if len(mix.items) > 1 and mix not in found and (needs == 1 or needs <= empty(known, mix)):
                found[mix] = larger
    return found


def _inside(known: Geometry) -> dict[str, set[tuple[int, ...]]]:
    """For each profile that leaves room beside it, what an instance of it can be changed for, in its own place and
    whatever is beside it: counts in the order of the profiles, itself and nothing among them. Without those that have
    media engines or graphics, of which there are few wherever they lie."""
    order = [profile.name for profile in known.profiles]
    plain = [profile.name for profile in known.profiles if profile.plain]
    found: dict[str, set[tuple[int, ...]]] = {}
    # What is beside it makes a difference by how many of each profile there are, not by where they are.
    pairs = {(old, tuple(sorted(p.profile for p in held if p != old))) for held in known.maximal(plain) for old in held}
    for old, beside in pairs:
        if not beside:
            continue
        base = tuple(Placement(name, known.slots, 1) for name in beside)
        held: list[Layout] = [()]
        for new in held:  # grows
            for name in plain[plain.index(new[-1].profile) if new else 0 :]:
                held += [(*new, place) for place in known.legal(name, base + new) if not place.mask & ~old.mask]
        can = {tuple(sum(p.profile == name for p in new) for name in order) for new in held}
        found[old.profile] = found.get(old.profile, can) & can
    return found


def empty(known: Geometry, request: Request) -> int:
    """How many empty GPUs a request needs; MIXED + 1 where that is more."""
    for gpus in range(1, MIXED + 1):
        if planner.fits(View(tuple(GpuView(str(n), known) for n in range(gpus)), (), None, 0.0), request):
            return gpus
    return MIXED + 1


def write(made: Mapping[str, str], directory: str) -> None:
    """Put the files into `directory`, hooks executable. Raises NodeError, also where a site has one of its own."""
    try:
        os.makedirs(directory, exist_ok=True)
        for path in [os.path.join(directory, name) for name in made]:
            if os.path.exists(path):
                with open(path, encoding="utf-8", errors="replace") as file:
                    if "rms slurm-config" not in file.read() and not path.endswith("rms.lua"):
                        raise NodeError(f"{path} is not ours: move it away, or call RMS from it (docs/admin.md)")
        for name, text in made.items():  # in one step: slurmd may be about to run it, or slurmctld to read it anew
            mode = 0o755 if name in (*HOOKS.values(), HEALTH_CHECK) else 0o644
            replace(os.path.realpath(os.path.join(directory, name)), text.encode(), mode, durable=False)
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
