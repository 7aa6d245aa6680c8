"""Whether the running slurmctld is set up for this node's mode of admission: the part of `rms doctor` about Slurm."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence

from rms.config import Config
from rms.inventory import State
from slurm import publish, site
from slurm.slurmctld import Slurmctld, SlurmError

PARTS = {"JobSubmitPlugins": "lua", "PrologFlags": "Alloc"}
"""What must be among the values of a setting."""
UNFIT = {
    "NoHold": "srun and salloc would go on before their Prolog has ended",
    "RunInJob": "RMS is not tested with it: what a hook leaves behind to publish ends with the job's cgroup",
}
"""What must not be among PrologFlags, and why."""


def examine(config: Config, slurm_conf: str, node: str, state: State) -> list[str]:
    """What is wrong, a line each. `state` tells the GPUs that the node has; an empty one compares none."""
    ask = Slurmctld(slurm_conf).show
    try:
        settings = _settings(ask("config"))
        record = _record(ask("node", node))
    except SlurmError as error:
        return [f"cannot ask slurmctld: {error}"]
    never = None
    if config.admission == "features":
        try:
            never = _record(ask("node", site.SENTINEL, future=True))
            if "/tree" in settings.get("TopologyPlugin", ""):
                never["Switches"] = ask("topology")
        except SlurmError:
            never = never or {}
    kind = None
    if state.gpus:
        known = state.geometries[state.gpus[0].model]
        kind = site.Kind(known, len(state.gpus), node, known.profiles)
    found = problems(config.admission, settings, record, never, kind)
    patience = config.interactive_wait_seconds + 2 * config.deadline_seconds
    return [*found, *timeouts(settings, patience), *_files(config.admission, settings, os.path.dirname(slurm_conf))]


def problems(
    admission: str,
    settings: Mapping[str, str],
    node: Mapping[str, str],
    never: Mapping[str, str] | None,
    kind: site.Kind | None,
) -> Iterator[str]:
    """The same of what slurmctld has shown: its configuration, the node, and the one that is never there; `kind` is
    what the node has. Pure."""
    version = tuple(int(part) for part in re.findall(r"\d+", settings.get("SLURM_VERSION", ""))[:2])
    if version < site.NEEDED[admission]:
        yield 'admission = "{}" needs Slurm {}.{:02} or newer, this is {}'.format(
            admission, *site.NEEDED[admission], settings.get("SLURM_VERSION", "unknown")
        )
    types = {"mig", "migc", "migm"} | ({publish.TOKEN} if admission != "sums" else set())
    if lacking := types - set(_words(settings.get("GresTypes", ""))):
        yield f"slurm.conf: GresTypes lacks {' '.join(sorted(lacking))}"
    for key, part in PARTS.items():
        if part.lower() not in [word.lower() for word in _words(settings.get(key, ""))]:
            yield f"slurm.conf: {key} lacks {part}"
    flags = [word.lower() for word in _words(settings.get("PrologFlags", ""))]
    yield from (f"slurm.conf: PrologFlags has {flag}: {why}" for flag, why in UNFIT.items() if flag.lower() in flags)
    yield from (f"slurm.conf: no {hook}" for hook in site.HOOKS if settings.get(hook, "(null)") in ("", "(null)"))
    if admission == "extra" and "extra_constraints" not in _words(settings.get("SchedulerParameters", "")):
        yield "slurm.conf: SchedulerParameters lacks extra_constraints: no job would wait for room"
    there = _gres(node)
    if lacking := types - {kind.split(":")[0] for kind in there}:
        yield f"slurm.conf: this node's Gres lacks {' '.join(sorted(lacking))}"
    elif admission != "sums" and (lacking := {*publish.SHARES} - {*there}):  # lines of an older RMS
        yield f"slurm.conf: this node's Gres lacks {' '.join(sorted(lacking))}: take the lines of `rms slurm-config`"
    elif admission == "sums" and f"{publish.TOKEN}:open" in there:
        yield (
            f'slurm.conf: this node\'s Gres has {publish.TOKEN}, which is not for admission = "sums": '
            "rms.toml, slurm.conf and the lua must be for the same mode"
        )
    if kind:
        has = publish.gres_counts(site.gres(kind, "sums"))
        for slices in ("migc", "migm"):
            if there.get(slices, has[slices]) != has[slices]:
                yield (
                    f"slurm.conf: this node's Gres has {slices}:{there[slices]}, its GPUs ({kind.gpus} x "
                    f"{kind.known.model}) have {has[slices]}: take the lines of `rms slurm-config`"
                )
    if never is not None:
        yield from _sentinel(node, never, publish.names(kind.known, kind.gpus) if kind else ())
    if admission != "sums" and there.get(f"{publish.TOKEN}:open") == 1:  # as slurm.conf has it
        yield "slurmctld has forgotten what fits here, or was never told: rms publish, and rms-publish.timer"


def timeouts(settings: Mapping[str, str], patience: float) -> Iterator[str]:
    """What ends a Prolog or Epilog that may take `patience` seconds. Pure."""
    for key in ("PrologEpilogTimeout", "PrologTimeout", "EpilogTimeout"):  # the last two in newer releases
        if (match := re.match(r"\d+", settings.get(key, ""))) and 0 < int(match[0]) < patience:
            yield (
                f"slurm.conf: {key} is {match[0]} s, and a hook may take {patience:g} (interactive_wait_seconds and "
                "twice deadline_seconds in rms.toml): slurmd would kill it and drain the node"
            )


def _sentinel(node: Mapping[str, str], never: Mapping[str, str], names: Sequence[str]) -> Iterator[str]:
    called = f"slurm.conf: node {site.SENTINEL}"
    if not never:
        yield f"{called} with State=FUTURE is missing: jobs that do not fit now would be refused"
        return
    if "FUTURE" not in (state := never.get("State", "")):
        yield (
            f"node {site.SENTINEL} is {state}, not FUTURE (scontrol update NodeName=ALL State=RESUME does that): "
            f"scontrol update NodeName={site.SENTINEL} State=FUTURE"
        )
    features = set(_words(never.get("AvailableFeatures", "")))
    own = [f for f in _words(node.get("AvailableFeatures", "")) if not f.startswith(publish.PREFIX)]
    if lacking := [name for name in (*own, *names) if name not in features]:
        yield f"{called} lacks features: {' '.join(lacking[:5])}{' ...' if len(lacking) > 5 else ''}"
    if site.SENTINEL not in never.get("Switches", site.SENTINEL):
        yield f"topology.conf: node {site.SENTINEL} is at no switch: jobs that do not fit now may be refused"
    if lacking := [p for p in _words(node.get("Partitions", "")) if p not in _words(never.get("Partitions", ""))]:
        yield f"{called} is not in partition {' '.join(lacking)}"
    for key in ("CPUTot", "Sockets", "CoresPerSocket", "ThreadsPerCore", "RealMemory", "TmpDisk"):
        if int(never.get(key, 0)) < int(node.get(key, 0)):
            yield f"{called} has {key}={never.get(key)}, this node {node[key]}: it must have as much"
    there = _gres(never)
    if lacking := [kind for kind in publish.SHARES if kind not in there]:
        yield f"{called} lacks gres {' '.join(lacking)}"
    for kind, count in _gres(node).items():
        if not kind.startswith(publish.TOKEN) and there.get(kind, 0) < count:
            yield f"{called} has {there.get(kind, 0)} of gres {kind}, this node {count}: it must have as much"


def _files(admission: str, settings: Mapping[str, str], directory: str) -> Iterator[str]:
    """What is wrong with the files on this machine: the hooks, and where slurmctld has its lua here, its table."""
    for hook in site.HOOKS:
        path = settings.get(hook, "")  # of several hooks, with a pattern in it
        if os.path.isabs(path) and not any(os.access(found, os.X_OK) for found in glob.glob(path)):
            yield f"slurm.conf: {hook} is {path}, which is not there or can't be run: `rms slurm-config` writes it"
    table = os.path.join(directory, "rms_table.lua")
    try:
        with open(table, encoding="utf-8", errors="replace") as file:
            made = re.search(r'^ *admission = "(\w+)"', file.read(), re.MULTILINE)
    except OSError:
        return  # on most nodes
    if made and made[1] != admission:
        yield (
            f'{table} is made for admission = "{made[1]}", rms.toml says "{admission}": '
            "make it again with `rms slurm-config`"
        )


def _settings(shown: str) -> dict[str, str]:
    return {key: value.strip() for key, value in re.findall(r"^(\w+)(?:\[0\])?\s*= (.*)$", shown, re.MULTILINE)}


def _record(shown: str) -> dict[str, str]:
    """The fields of `scontrol show node` that hold one word."""
    found: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)(\w+)=(\S*)", shown):
        found.setdefault(key, value)
    return found


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word and word != "(null)"]


def _gres(node: Mapping[str, str]) -> dict[str, int]:
    return publish.gres_counts(node.get("Gres", ""))
