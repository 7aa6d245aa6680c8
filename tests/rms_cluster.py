"""A throw-away Slurm whose nodes are run by RMS, with simulated GPUs: for the demo, the tests and the benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import records
from throwaway import SCHEDULER, Cluster

from slurm import site


class RmsCluster(Cluster):
    """Whose nodes tell slurmctld what fits as soon as all runs, as they do at boot."""

    def start(self, timeout: float = 30) -> None:
        super().start(timeout)
        try:
            self.publish()
        except BaseException:
            self.stop()
            raise

    def publish(self, *nodes: str) -> None:
        """`rms publish` on these nodes, or all."""
        for node in nodes or self.nodes:
            self.run(sys.executable, "-m", "rms.cli", "publish", "--node", node, "--config", self.config(node))

    def config(self, node: str) -> str:
        """A node's rms.toml: the same file for all, unless they differ in their GPUs."""
        own = self.etc / f"{node}.toml"
        return str(own if own.exists() else self.etc / "rms.toml")


def rms_cluster(
    root: Path,
    *,
    nodes: int = 2,
    gpus: int = 2,
    model: str | Sequence[str] = "A100-80GB",
    create: float = 0.1,
    destroy: float = 0.1,
    admission: str = "sums",
    others: str = "",
    features: str = "",
    settings: str = "",
    preempting: Sequence[str] = (),
    **options: Any,
) -> RmsCluster:
    """A cluster, not started, whose hooks, lua and gres are what `rms slurm-config` makes.

    Each node keeps its files in `root`/<node>. `others` are more gres, `features` those of the nodes; `settings` are
    more lines for rms.toml, `options` go to Cluster. `model` may be a list, with one for each node.
    """
    etc = root / "etc"
    etc.mkdir(parents=True)
    models = [model] * nodes if isinstance(model, str) else model
    config = etc / ("rms.toml" if len({*models}) == 1 else "%n.toml")
    for node, one in enumerate(models, 1):
        Path(str(config).replace("%n", f"n{node}")).write_text(f"""\
gpus = {list(range(gpus))}
state_dir = "{root}/%n/state"
run_dir = "{root}/%n/run"
audit_log = "{root}/%n/audit.jsonl"
hook_log = "{root}/%n/hooks.log"
admission = "{admission}"
{settings}
[simulated]
file = "{root}/%n/gpus.json"
model = "{one}"
gpus = {gpus}
create_seconds = {create}
destroy_seconds = {destroy}
nodes = "{root}/%n/nodes"
""")
    cluster = site.kinds((one, gpus, f"n{node}") for node, one in enumerate(models, 1))
    made = site.files(cluster, str(config), str(etc / "slurm.conf"), admission, preempting)
    site.write(made, str(etc))
    root.chmod(0o755)
    for node in range(1, nodes + 1):
        (root / f"n{node}").mkdir()
        (root / f"n{node}" / "state").mkdir(mode=0o700)
        (root / f"n{node}" / "run").mkdir(mode=0o755)
    hooks = {option: etc / name for option, name in site.HOOKS.items()}
    if admission == "features":
        line = site.sentinel(cluster).replace(" Gres=", f" Gres={others},").replace("=,", "=")
        line = line.replace(" Sockets=2 CoresPerSocket=64 ThreadsPerCore=2", "")  # nor have our nodes more than CPUs
        line = line.replace(" Features=", f" Features={features},").replace("=,", "=")
        options["extra_conf"] = f"{line}{options.get('extra_conf', '')}"
    if admission == "extra":
        options["scheduler"] = f"{options.get('scheduler', SCHEDULER)},extra_constraints"
    gres = [",".join(filter(None, [site.gres(kind, admission), others])) for kind in cluster]
    return RmsCluster(root, nodes=nodes, gres=gres, features=features, hooks=hooks, **options)


@contextmanager
def waiting_prologs(slurm: Cluster) -> Iterator[Callable[[], None]]:
    """Prologs that begin in this block wait at their first line, until what it gives is called or the block is left."""
    prolog, gate = slurm.etc / "prolog", slurm.root / "gate"
    text = prolog.read_text()
    changed = text.replace("\njobs=", f"\nwhile [ -e {gate} ]; do sleep 0.1; done\njobs=", 1)
    assert changed != text
    gate.touch()
    try:
        prolog.write_text(changed)
        yield lambda: gate.unlink(missing_ok=True)
    finally:
        prolog.write_text(text)
        gate.unlink(missing_ok=True)


def journal(root: Path, node: str) -> list[dict[str, Any]]:
    """Every operation that was tried on a node's simulated GPUs, in order."""
    return records.journal(root / node / "gpus.json.journal")
