"""slurm/check.py: every line of slurm.conf that a mode needs is missed when it is not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from rms import cli
from rms.errors import NodeError
from slurm import publish, site
from slurm.check import problems, timeouts

KIND = site.kinds([("A100-80GB", 2, "n1")])[0]
NAMES = publish.names(KIND.known, KIND.gpus)
TOKEN = ",migt:job:7,migt:size:7,migt:open:322"
BEST = "features"
"""On the newest Slurm."""
MODES = ["features", "extra", "sums"]

SETTINGS = {
    "SLURM_VERSION": "24.11.5",
    "GresTypes": "gpu,mig,migc,migm,migt",
    "JobSubmitPlugins": "lua",
    "PrologFlags": "Alloc,Contain",
    "SchedulerParameters": "bf_continue,extra_constraints",
    "Prolog": "/etc/slurm/prolog",
    "Epilog": "/etc/slurm/epilog",
    "TaskProlog": "/etc/slurm/task_prolog",
}
NODE = {
    "AvailableFeatures": "ib,rms_1g.10gb_1",
    "ActiveFeatures": "ib,rms_1g.10gb_1",
    "Extra": '{"rms_1g.10gb_1":1}',
    "Gres": f"gpu:a100:2(S:0-1),{site.gres(KIND, 'sums')}{TOKEN}",
    "Partitions": "main,long",
    "CPUTot": "64",
    "Sockets": "2",
    "CoresPerSocket": "16",
    "ThreadsPerCore": "2",
    "RealMemory": "1000",
}
NEVER = {
    "State": "FUTURE",
    "AvailableFeatures": ",".join(["ib", *NAMES]),
    "Gres": f"gpu:a100:4,{site.gres(KIND, 'features')}",
    "Partitions": "main,long,debug",
    "CPUTot": "128",
    "Sockets": "2",
    "CoresPerSocket": "32",
    "ThreadsPerCore": "2",
    "RealMemory": "1000",
}


Fields = Mapping[str, str]
NONE: Fields = {}


def found(mode: str, settings: Fields = NONE, node: Fields = NONE, never: Fields = NONE) -> list[str]:
    changed = {**NEVER, **never} if mode == "features" else None
    there = {**NODE, **node}
    if mode == "sums" and not node:
        there["Gres"] = there["Gres"].removesuffix(TOKEN)
    return list(problems(mode, {**SETTINGS, **settings}, there, changed, KIND))


@pytest.mark.parametrize("mode", MODES)
def test_all_is_well(mode: str) -> None:
    assert found(mode) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"SLURM_VERSION": "20.02.7"}, "needs Slurm"),
        ({"GresTypes": "gpu,mig,migm,migt"}, "GresTypes lacks migc"),
        ({"JobSubmitPlugins": "(null)"}, "JobSubmitPlugins lacks lua"),
        ({"PrologFlags": "(null)"}, "PrologFlags lacks Alloc"),
        ({"PrologFlags": "Alloc,Contain,RunInJob"}, "PrologFlags has RunInJob"),
        ({"PrologFlags": "Alloc,NoHold"}, "PrologFlags has NoHold"),
        ({"Epilog": "(null)"}, "no Epilog"),
    ],
)
def test_settings(mode: str, settings: dict[str, str], said: str) -> None:
    (one,) = found(mode, settings)
    assert said in one


def test_what_only_one_mode_needs() -> None:
    assert "extra_constraints" in found("extra", {"SchedulerParameters": "bf_continue"})[0]
    assert found("features", {"SchedulerParameters": "(null)"}) == []
    assert "needs Slurm 23.11" in found("extra", {"SLURM_VERSION": "22.05.8"})[0]
    assert found("features", {"SLURM_VERSION": "22.05.8"}) == []
    assert "GresTypes lacks migt" in found("features", {"GresTypes": "mig,migc,migm"})[0]
    assert found("sums", {"GresTypes": "mig,migc,migm"}) == []


def test_the_node() -> None:
    bare = site.gres(KIND, "sums")
    assert found("features", node={"Gres": bare}) == ["slurm.conf: this node's Gres lacks migt"]
    assert found("sums", node={"Gres": bare}) == []
    assert found("features", node={"AvailableFeatures": "ib", "ActiveFeatures": "ib"}) == [], "it is full"
    for mode in ("features", "extra"):  # after a reconfigure: features are gone, Extra is not, the token is shut
        (silent,) = found(mode, node={"Gres": site.gres(KIND, mode)})
        assert "rms publish" in silent
        (old,) = found(mode, node={"Gres": f"{bare},migt:job:21,migt:size:147,migt:shut:168"})
        assert "lacks migt:open: take the lines" in old
        assert found(mode, node={"Gres": f"{bare},migt:job:7,migt:size:1K,migt:open:1K"}) == []
    (other,) = found("sums", node={"Gres": NODE["Gres"]})
    assert "must be for the same mode" in other
    assert found("features", node={"Gres": "(null)"}) == ["slurm.conf: this node's Gres lacks mig migc migm migt"]
    less = NODE["Gres"].replace("migm:16", "migm:8")
    (fewer,) = found("features", node={"Gres": less})
    assert "this node's Gres has migm:8, its GPUs (2 x A100-80GB) have 16" in fewer
    old = site.gres(KIND, "features").replace("migt:open:1", "migt:shut:168")
    assert found("features", never={"Gres": f"gpu:a100:4,{old}"}) == ["slurm.conf: node rmsfit lacks gres migt:open"]


@pytest.mark.parametrize(
    ("never", "said"),
    [
        ({"State": "IDLE"}, "rmsfit is IDLE, not FUTURE"),
        ({"AvailableFeatures": ",".join(NAMES)}, "lacks features: ib"),
        ({"AvailableFeatures": "ib," + ",".join(NAMES[1:])}, f"lacks features: {NAMES[0]}"),
        ({"Partitions": "main"}, "not in partition long"),
        ({"CPUTot": "32"}, "CPUTot=32, this node 64"),
        ({"RealMemory": "1"}, "RealMemory=1, this node 1000"),
        ({"Switches": "SwitchName=one Level=0 LinkSpeed=1 Nodes=n[1-2]\n"}, "rmsfit is at no switch"),
        ({"CoresPerSocket": "1"}, "CoresPerSocket=1, this node 16"),
        ({"ThreadsPerCore": "1"}, "ThreadsPerCore=1, this node 2"),
        ({"Gres": site.gres(KIND, "features")}, "0 of gres gpu:a100, this node 2"),
    ],
)
def test_the_node_that_is_never_there(never: dict[str, str], said: str) -> None:
    (one,) = found("features", never=never)
    assert said in one
    (one,) = problems("features", SETTINGS, NODE, {}, KIND)
    assert "rmsfit with State=FUTURE is missing" in one


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, ""),
        ({"PrologEpilogTimeout": "65534"}, ""),
        ({"PrologEpilogTimeout": "180"}, ""),
        ({"PrologEpilogTimeout": "0"}, ""),
        ({"PrologTimeout": "unlimited"}, ""),
        ({"PrologEpilogTimeout": "179"}, "PrologEpilogTimeout is 179 s, and a hook may take 180"),
        ({"EpilogTimeout": "60 sec"}, "EpilogTimeout is 60 s"),
    ],
)
def test_what_would_end_a_hook(settings: dict[str, str], said: str) -> None:
    found = list(timeouts(SETTINGS | settings, 180.0))
    assert (said in found[0]) if said else not found


@pytest.mark.parametrize(
    ("wanted", "says", "version", "mode"),
    [
        (None, None, "20.11.9", "sums"),
        (None, None, "22.05.8", "features"),
        (None, None, "23.02.7", "features"),
        (None, None, "26.05.5", BEST),
        (None, None, None, "features"),
        ("sums", None, "26.05.5", "sums"),
        (None, "sums", "26.05.5", "sums"),
        ("features", "features", "22.05.8", "features"),
        ("features", "sums", "22.05.8", None),
        ("extra", None, "22.05.8", None),
        (None, "extra", "23.02.7", None),
    ],
)
def test_slurm_config_takes_what_fits_slurm_and_what_the_nodes_do(
    tmp_path: Path, wanted: str | None, says: str | None, version: str | None, mode: str | None
) -> None:
    toml = tmp_path / "rms.toml"
    if says:
        toml.write_text(f'gpus = [0]\nadmission = "{says}"\n')
    if mode:
        found, why = site.choose(wanted, str(toml), version)
        assert found == mode and (wanted or str(toml) in why)
    else:
        with pytest.raises(NodeError, match=r"must agree|needs Slurm 23\.11"):
            site.choose(wanted, str(toml), version)


@pytest.mark.parametrize("verb", ["doctor", "publish", "reconcile", "watch"])
def test_every_verb_asks_the_same_slurm(verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", "/srv/slurm.conf")
    assert cli._parser().parse_args([verb]).slurm_conf == "/srv/slurm.conf"
    monkeypatch.delenv("SLURM_CONF")
    assert cli._parser().parse_args([verb]).slurm_conf == "/etc/slurm/slurm.conf"
