"""`rms doctor` and `rms mig`, on the stand-in for libnvidia-ml.so.1."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pynvml
import pytest
from conftest import Node, needs_root
from standin import DESTROY_CI, Machine

from rms import cli, fence, geometry, hardware
from rms.device import Nvml
from rms.doctor import describe, examine
from rms.errors import NoRoomError
from rms.inventory import State

BACKENDS = ["nvml"]

NO_SLURM = "Slurm is not examined: there is no /nowhere/slurm.conf\n"

Rms = Callable[..., tuple[str, str]]


@pytest.fixture
def rms(node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Rms:
    """What `rms ARGUMENTS` prints to standard output and error on the node."""
    monkeypatch.setenv("RMS_CONFIG", str(node.toml))
    monkeypatch.setenv("SLURM_CONF", "/nowhere/slurm.conf")

    def call(*arguments: str, code: int = 0) -> tuple[str, str]:
        node.machine.use()
        assert cli.main(arguments) == code
        out, err = capsys.readouterr()
        return out, err

    return call


def modes(node: Node) -> list[str]:
    with node.machine.state() as lines:
        return [line for line in lines if line.startswith("mig ")]


# Looking.

A100 = """\
GPU 0  NVIDIA A100-SXM4-80GB  {0}
  driver 580.65.06, PCI 0000:01:00.0, device 20B2 (A100-80GB in geometry.json)
  MIG mode on, persistence mode on
  profile           id  max  compute     MiB  placements
  1g.10gb           19    7        1    9728  {{0,1,2,3,4,5,6}}:1
  1g.10gb+me        20    1        1    9728  {{0,1,2,3,4,5,6}}:1
  1g.20gb           15    4        1   19968  {{0,2,4,6}}:2
  2g.20gb           14    3        2   19968  {{0,2,4}}:2
  3g.40gb            9    2        3   40192  {{0,4}}:4
  4g.40gb            5    1        4   40192  {{0}}:4
  7g.80gb            0    1        7   80896  {{0}}:8
nothing wrong found
"""


def test_doctor_on_a_sound_node(node: Node, rms: Rms) -> None:
    node.configure(gpus=[0])
    assert rms("doctor") == (A100.format(*node.machine.uuids), NO_SLURM)
    printed = json.loads(rms("doctor", "--json")[0])
    (gpu,) = printed["gpus"]
    assert (printed["schema"], gpu["uuid"], gpu["problems"]) == (1, node.machine.uuids[0], [])
    assert gpu["board"]["offers"][4]["placements"] == [[0, 4], [4, 4]]
    assert node.machine.opened() == {0}, "no other GPU is opened"
    assert node.journal() == []


def test_doctor_says_what_is_wrong(node: Node, rms: Rms) -> None:
    node.machine.mig_mode(1, False, False)
    node.machine.hold(os.getpid(), 0)
    out, _ = rms("doctor", code=6)
    first, second = out.split("GPU 1  ")
    name = Path("/proc/self/comm").read_text().strip()
    assert first.splitlines()[-1] == (
        f"! instances can't be created or destroyed while a process has the whole GPU: {os.getpid()} ({name})"
    )
    assert f"! MIG mode is off: rms mig enable {node.machine.uuids[1]}\n" in second
    assert "  3g.40gb            9    2        3   40192  unknown\n" in second, "NVML tells the rest without MIG mode"
    assert "geometry.json:" not in out
    node.machine.mig_mode(1, False, True)
    assert "! MIG mode will be on after a reset" in rms("doctor", code=6)[0]
    node.machine.fail("nvmlDeviceGetName", Nvml.GPU_IS_LOST, gpu=0)
    out, _ = rms("doctor", code=6)
    assert out.startswith(f"GPU 0  {node.machine.uuids[0]}\n! read the GPU: NVML error 15 (gpu is lost); look for Xid")
    assert "GPU 1  NVIDIA A100" in out


def test_a_process_s_name_is_only_text(node: Node, rms: Rms) -> None:
    """A user may give it any; here it would wipe the administrator's terminal."""
    comm = Path("/proc/self/comm")
    before = comm.read_text().strip()
    node.machine.hold(os.getpid(), 0)
    try:
        comm.write_text("\x1b[2J\u202e")
        out, _ = rms("doctor", code=6)
    finally:
        comm.write_text(before)
    assert f"a process has the whole GPU: {os.getpid()} (\\x1b[2J\\u202e)\n" in out


@pytest.mark.parametrize("model", [*geometry.models(), "L4"])
def test_doctor_on_every_model(fast_dir: Path, model: str) -> None:
    with Machine(fast_dir / "machine", [model], options=["no-persistence"]).device() as device:
        (found,) = examine(device, State())
    text = describe([found], True)
    assert ("it has no MIG mode" in text) == (model == "L4")
    assert "persistence mode is off, which makes" in text
    assert "differs" not in text
    assert found.board is not None
    assert len(found.board.offers) == (0 if model == "L4" else len(geometry.load(model).profiles))


def test_doctor_without_the_right_to(fast_dir: Path) -> None:
    with Machine(fast_dir / "machine", ["A30"], privileged=os.geteuid() + 1).device() as device:
        (found,) = examine(device, State())
    assert found.problems == ("NVML does not tell the placements: only root may ask",)


def test_doctor_compares_with_the_data(fast_dir: Path) -> None:
    machine = Machine(fast_dir / "machine", ["A100-80GB"])
    text = machine.path.read_text()
    changed = [(" 4g.40gb 0\n", " 4g.40gb 4\n"), ("0 0 19 7 1", "0 0 18 7 1"), (" 7g.80gb ", " 7g.79gb ")]
    for old, new in changed:
        assert old in text
        text = text.replace(old, new)
    machine.path.write_text(text)
    with machine.device() as device:
        (found,) = examine(device, State())
    rest = "at most 7, 1 compute slices, placements {0,1,2,3,4,5,6}:1"
    assert found.problems == (
        f"differs from geometry.json: 1g.10gb is id 18, {rest} here, id 19, {rest} there",
        "differs from geometry.json: 4g.40gb is id 5, at most 1, 4 compute slices, placements {4}:4 here, "
        "id 5, at most 1, 4 compute slices, placements {0}:4 there",
        "differs from geometry.json: A100-80GB has 7g.80gb there, and this GPU does not",
        "differs from geometry.json: 7g.79gb is not there",
    )


def test_doctor_without_a_driver(node: Node, rms: Rms) -> None:
    text = node.machine.path.read_text()
    node.machine.path.write_text(text.replace("broken 0", "broken 9"))
    assert rms("doctor", code=6) == (
        "",
        "rms: cannot open the GPUs: open NVML: NVML error 9 (driver not loaded); load the nvidia kernel module\n",
    )


def test_simulated_gpus_have_neither(fast_dir: Path, rms: Rms, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Node(fast_dir / "other")
    monkeypatch.setenv("RMS_CONFIG", str(other.toml))
    said = f"this node's GPUs are simulated: nothing to examine\n{NO_SLURM}"
    assert rms("doctor") == ("nothing wrong found\n", said)
    assert "always in MIG mode" in rms("mig", "enable", code=6)[1]


def test_directories_that_nobody_has_made(fast_dir: Path, rms: Rms, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Node(fast_dir / "other")
    monkeypatch.setenv("RMS_CONFIG", str(other.toml))
    other.configure(state_dir=str(fast_dir / "no"), audit_log=str(fast_dir / "neither" / "audit.jsonl"))
    assert rms("doctor", code=6)[0].splitlines() == [
        f"! there is no state directory {fast_dir}/no: make it, mode 0700 (etc/tmpfiles.d/rms.conf does)",
        f"! nothing can be written to {fast_dir}/neither, where the audit log belongs "
        "(etc/tmpfiles.d/rms.conf makes it)",
    ]
    assert len(json.loads(rms("doctor", "--json", code=6)[0])["directories"]) == 2
    assert not (other.root / "run").exists(), "nothing is made"


@pytest.mark.parametrize("place", ["run", "run/jobs"])
def test_a_directory_of_the_grants_that_others_can_write(
    fast_dir: Path, rms: Rms, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Found before the first job's Prolog does, which drains the node for it."""
    other = Node(fast_dir / "other")
    monkeypatch.setenv("RMS_CONFIG", str(other.toml))
    (other.root / "run" / "jobs").mkdir(parents=True, mode=0o755)
    (other.root / place).chmod(0o777)
    (line,) = rms("doctor", code=6)[0].splitlines()
    assert line.startswith(f"! {other.root / place} must be a directory of root's own")


# MIG mode.


def test_enable_at_boot(node: Node, rms: Rms) -> None:
    """What etc/systemd/rms-mig.service does."""
    first, second = node.machine.uuids
    node.machine.mig_mode(1, False, False)
    assert rms("mig", "enable")[0] == f"GPU {first}: MIG mode is on already\nGPU {second}: MIG mode is on\n"
    assert modes(node) == ["mig 0 1 1", "mig 1 1 1"]
    assert node.acquire(1, "7g:2")
    unit = (Path(__file__).parents[1] / "etc" / "systemd" / "rms-mig.service").read_text()
    assert "ExecStart=/opt/rms/bin/rms mig enable\n" in unit
    assert "Before=slurmd.service\n" in unit


def test_disable_destroys_what_is_idle(node: Node, rms: Rms) -> None:
    first, second = node.machine.uuids
    node.acquire(1, "3g,1g:2")
    node.release(1)
    assert rms("mig", "disable", code=2)[1] == "rms: say for which GPU: rms mig disable GPU\n"
    assert rms("mig", "disable", "0")[0] == f"GPU {first}: MIG mode is off\n"
    assert modes(node) == ["mig 0 0 0", "mig 1 1 1"]
    # The controller finds out, and goes on with the other.
    assert node.acquire(2, "7g")[0].gpu == second
    assert rms("mig", "enable", first)[0] == f"GPU {first}: MIG mode is on\n"
    assert node.acquire(3, "7g")[0].gpu == first
    node.check_empties()


def test_disable_refuses_while_anything_runs(node: Node, rms: Rms) -> None:
    (granted,) = node.acquire(1, "3g")
    assert rms("mig", "disable", "0", code=6)[1] == (
        f"rms: GPU {granted.gpu}: 3g.40gb@4:4 is busy; drain the node and try again\n"
    )
    node.release(1)
    node.device().hold(granted.uuid, os.getpid())
    assert f"3g.40gb@4:4 is held by process {os.getpid()}\n" in rms("mig", "disable", "0", code=6)[1]
    node.machine.hold(os.getpid(), 0)
    assert f"is used by process {os.getpid()}: end it first\n" in rms("mig", "disable", "0", code=6)[1]
    assert modes(node) == ["mig 0 1 1", "mig 1 1 1"]
    assert [e["op"] for e in node.journal()] == ["create_gpu_instance", "create_compute_instance"]


def test_disable_leaves_what_others_made(node: Node, rms: Rms) -> None:
    node.device().create_gpu_instance(node.machine.uuids[0], "3g.40gb", 4)
    assert "GPU instance 2 is not whole; `nvidia-smi mig` removes it" in rms("mig", "disable", "0", code=6)[1]
    node.machine.vanish(0)
    assert rms("mig", "disable", "0")


def test_a_mode_that_does_not_come_at_once(node: Node, rms: Rms, monkeypatch: pytest.MonkeyPatch) -> None:
    first = node.machine.uuids[0]
    node.machine.mig_mode(0, False, False)
    with node.machine.path.open("a") as file:
        file.write("option passthrough\n")
    _, err = rms("mig", "enable", "0", code=6)
    assert err.startswith(f"rms: GPU {first}: MIG mode will be on after a reset: `nvidia-smi --gpu-reset -i {first}`")
    assert modes(node)[0] == "mig 0 0 1"
    monkeypatch.setattr(pynvml, "nvmlDeviceSetMigMode", lambda *_: pynvml.NVML_ERROR_IN_USE)
    assert "MIG mode is not on, something uses the GPU" in rms("mig", "enable", "0", code=6)[1]


def test_one_gpu_that_fails_does_not_stop_the_others(node: Node, rms: Rms) -> None:
    node.machine.mig_mode(1, False, False)
    node.machine.fail("nvmlDeviceGetName", Nvml.UNKNOWN, gpu=0)
    out, err = rms("mig", "enable", code=6)
    assert "read the GPU: NVML error 999" in err
    assert out == f"GPU {node.machine.uuids[1]}: MIG mode is on\n"


def test_only_gpus_of_the_configuration(node: Node, rms: Rms) -> None:
    node.machine.kernel([0, 1])
    node.configure(gpus=[node.machine.uuids[1]])
    for name in ("0", node.machine.uuids[0]):
        assert (
            f"the configuration names no GPU {name}, but {node.machine.uuids[1]}"
            in rms("mig", "enable", name, code=6)[1]
        )
    assert node.machine.opened() == set()


def test_a_disable_that_fails_half_way(node: Node, rms: Rms) -> None:
    node.acquire(1, "3g,1g:2")
    node.release(1)
    node.machine.fail(DESTROY_CI, Nvml.UNKNOWN, after=1)
    assert "NVML error 999" in rms("mig", "disable", "0", code=6)[1]
    assert modes(node)[0] == "mig 0 1 1"
    assert node.acquire(2, "7g:2")
    node.check()
    node.check_empties()


@needs_root
def test_doctor_names_what_keeps_an_instance_from_being_destroyed(
    node: Node, rms: Rms, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process of root's that has its node open is no holder to the hooks, but may be the one in the way."""
    monkeypatch.setattr(hardware, "DESTROY_SECONDS", 0.0)
    node.configure(gpus=[0], fence=True)
    node.acquire(1, "3g")
    node.release(1)
    node.machine.fail(DESTROY_CI, Nvml.IN_USE, times=-1)
    with pytest.raises(NoRoomError):
        node.acquire(2, "7g")
    with open("/dev/full"):  # the stand-in's device behind that instance
        out, _ = rms("doctor", code=6)
    name = Path("/proc/self/comm").read_text().strip()
    refused = "! 3g.40gb@4:4 is quarantined: destroy CI 0 of GI 2: NVML error 19 (in use)"
    assert f"{refused}; held by process {os.getpid()} ({name}, uid 0)\n" in out
    assert f"{refused}\n" in rms("doctor", code=6)[0]


# The fence.


@needs_root
def test_who_may_open_what(node: Node, rms: Rms) -> None:
    node.acquire(1, "3g,1g")
    node.acquire(2, "2g")
    node.release(2)
    assert json.loads(rms("doctor", "--json")[0])["fenced"] is True
    hands = node.device()
    uuids = {g.uuid: g.placement for g in node.acquire(1, "3g,1g")}
    nodes = {}
    for gpu in hands.gpus():
        for found in hands.instances(gpu):
            nodes[found.placement.profile] = hands.capabilities(gpu, found.gi, found.ci)
            assert (found.uuid in uuids) == (found.placement.profile != "2g.20gb")
    Path(nodes["2g.20gb"][0].node).chmod(0o444)
    fence.fence(nodes["3g.40gb"], 1234)
    entry = Path(nodes["1g.10gb"][1].entry)
    entry.write_text(entry.read_text().replace("Modify: 0", "Modify: 1"))
    config = node.machine.root / "dev/nvidia-caps/nvidia-cap1001"
    os.mknod(config, 0o444 | stat.S_IFCHR, os.makedev(1, 1001))
    out, _ = rms("doctor", code=6)
    for text in (
        f": {nodes['2g.20gb'][0].node} may be opened by every user\n",
        f": {nodes['3g.40gb'][1].node} may be opened by user 1234; it should be user 1000\n",
        f"nvidia-modprobe may open {nodes['1g.10gb'][1].node} to every user, {entry} does not forbid it\n",
        f"! {config}: others than root may open it, and destroy the instances of any job\n",
    ):
        assert text in out
    node.configure(fence=False)
    assert rms("doctor")[0].startswith("fence = false: every user of this node may open every instance\nGPU 0")
