"""The site's one configuration file, TOML. Unknown keys are refused by name: a typo must not become a default."""

from __future__ import annotations

import os
import tomllib
from typing import Any, NamedTuple

from rms.errors import NodeError

DEFAULT_PATH = "/etc/rms/rms.toml"


class Simulated(NamedTuple):
    """`[simulated]`: GPUs that exist only in a file."""

    file: str
    model: str
    gpus: int
    create_seconds: float = 0.0
    destroy_seconds: float = 0.0
    nodes: str = ""
    """A directory for their capability nodes; empty: they have none, and there is nothing to fence."""


class Config(NamedTuple):
    """All that a node needs to know. `%n` in a path stands for the node's Slurm name: one file serves many nodes."""

    gpus: tuple[str | int, ...]
    """The GPUs that RMS manages, by UUID or NVML index; it never opens another one."""
    simulated: Simulated | None = None
    state_dir: str = "/var/lib/rms"
    """State and locks: root's own, on a local disk."""
    run_dir: str = "/run/rms"
    """One small file per job, readable by its user: emptied by a reboot, as the instances are."""
    audit_log: str = "/var/log/rms/audit.jsonl"
    hook_log: str = ""
    """Where hooks write their line besides syslog; empty for syslog only."""
    deadline_seconds: float = 60.0
    """The longest that one transaction waits for locks and for the GPUs."""
    holder_seconds: float = 5.0
    """How long to wait for a process that holds an instance: a release before the instance is quarantined, an acquire
    that has no other place before it gives up."""
    interactive_wait_seconds: float = 60.0
    """How long the Prolog of a job that can't be requeued (srun, salloc) waits for room."""
    fence: bool = True
    """Whether only the user of a job may open its instances. Without, every user of the node may open any instance."""
    driver_root: str = "/"
    """Where the driver's /proc and /dev are; another directory only in tests."""
    admission: str = "sums"
    """What slurmctld is told of what fits: `features` or `extra` of the node, or nothing (`sums` of slices)."""
    keep_gpus: int = 4
    """On how many GPUs of the whole cluster `rms watch` keeps room for large jobs at most."""
    prewarm: bool = False
    """Whether instances that the policy expects to be asked for are made ahead of time, after an Epilog."""
    boot_id_file: str = "/proc/sys/kernel/random/boot_id"
    """Another file only in tests, to play a reboot."""

    @property
    def policy_dir(self) -> str:
        """The site's own models and which of them decides (`policy.shelf`): beside the state, root's own."""
        return os.path.join(self.state_dir, "policy")


ADMISSIONS = ("features", "extra", "sums")
MOST = 1_000_000
"""The largest number that a key may have, ten days where it is seconds."""
_NUMBER = (int, float)
_KEYS: dict[str, tuple[type, ...]] = {
    "gpus": (list,),
    "simulated": (dict,),
    "state_dir": (str,),
    "run_dir": (str,),
    "audit_log": (str,),
    "hook_log": (str,),
    "deadline_seconds": _NUMBER,
    "holder_seconds": _NUMBER,
    "interactive_wait_seconds": _NUMBER,
    "fence": (bool,),
    "driver_root": (str,),
    "admission": (str,),
    "keep_gpus": (int,),
    "prewarm": (bool,),
    "boot_id_file": (str,),
}
_SIMULATED: dict[str, tuple[type, ...]] = {
    "file": (str,),
    "model": (str,),
    "gpus": (int,),
    "create_seconds": _NUMBER,
    "destroy_seconds": _NUMBER,
    "nodes": (str,),
}
_PATHS = {"state_dir", "run_dir", "audit_log", "hook_log", "driver_root", "boot_id_file", "file", "nodes"}
"""Hooks and administrators have different working directories."""
_OPTIONAL = {"hook_log", "nodes"}


def load(path: str, node: str) -> Config:
    """The configuration in `path`, for the node called `node`. Raises NodeError, one line that names file and key."""
    path = path.replace("%n", node)
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise NodeError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # of any kind: tomllib lets more through than its own
        raise NodeError(f"{path} is not valid TOML: {error}") from error
    _check(path, data, _KEYS, "")
    gpus = data.get("gpus", [])
    if not gpus or not all(isinstance(g, (str, int)) and not isinstance(g, bool) for g in gpus):
        raise NodeError(f"{path}: gpus must list the GPUs to manage, by UUID or index, as in gpus = [0, 1]")
    if data.get("admission", "sums") not in ADMISSIONS:
        raise NodeError(f"{path}: admission must be one of {' '.join(ADMISSIONS)}, not {data['admission']!r}")
    simulated = None
    if "simulated" in data:
        _check(path, data["simulated"], _SIMULATED, "simulated.")
        for key in ("file", "model", "gpus"):
            if key not in data["simulated"]:
                raise NodeError(f"{path}: simulated.{key} is missing")
        simulated = Simulated(**data.pop("simulated"))
        simulated = simulated._replace(
            file=simulated.file.replace("%n", node), nodes=simulated.nodes.replace("%n", node)
        )
    texts = {key: value.replace("%n", node) for key, value in data.items() if isinstance(value, str)}
    return Config(**{**data, **texts, "gpus": tuple(gpus), "simulated": simulated})


def _check(path: str, data: dict[str, Any], keys: dict[str, tuple[type, ...]], prefix: str) -> None:
    for key, value in data.items():
        if key not in keys:
            raise NodeError(f"{path}: unknown key {prefix}{key}; known: {' '.join(keys)}")
        if not isinstance(value, keys[key]) or isinstance(value, bool) != (bool in keys[key]):
            expected = " or ".join(kind.__name__ for kind in keys[key])
            raise NodeError(f"{path}: {prefix}{key} must be {expected}, not {type(value).__name__}")
        if key in _PATHS and not os.path.isabs(str(value)) and (value or key not in _OPTIONAL):
            raise NodeError(f"{path}: {prefix}{key} is {value!r}; it must be a full path, as /var/lib/rms")
        if isinstance(value, _NUMBER) and not 0 <= value <= MOST:
            raise NodeError(f"{path}: {prefix}{key} is {value}; it must be from 0 to {MOST:,}")


def boot_id(config: Config) -> str:
    """What tells this boot from the one before. Raises NodeError."""
    try:
        with open(config.boot_id_file, encoding="ascii", errors="replace") as file:
            text = file.read().strip()
    except OSError as error:
        raise NodeError(f"cannot read {config.boot_id_file}: {error.strerror}") from error
    if not text:
        raise NodeError(f"{config.boot_id_file} is empty: it must tell this boot from the one before")
    return text


def node_name() -> str:
    """What `%n` stands for: the node's name in Slurm where slurmd tells it, else the short host name."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename.partition(".")[0]
