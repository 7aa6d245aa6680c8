"""`rms show`, to the byte: what it draws is an interface, and so is its JSON."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, needs_root

from rms import cli, show
from rms.errors import NodeError
from rms.geometry import Placement, load
from rms.inventory import SCHEMA, Allocation, Gpu, Instance, Intent, Owner, Run, State
from rms.show import Seen, coloured, draw, plain, report
from rms.store import Store

NOW = 1_790_000_000.0
POLICY: dict[str, str | None] = {"source": "built-in", "model": None, "reason": "best fit", "fault": ""}
USERS = {1001: "alice", 1002: "bob", 1003: "a-user-with-a-very-long-name"}
GONE = Owner(2**22 + 1, 1)


def instance(number: int, spot: str, status: str = "busy", intent: int | None = None, note: str = "") -> Instance:
    profile, start, size = re.split("[@:]", spot)
    made = status != "making"
    return Instance(
        number,
        Placement(profile, int(start), int(size)),
        status,  # type: ignore[arg-type]
        number if made else None,
        0 if made else None,
        f"MIG-{number:08x}-1111-5222-a333-444444444444" if made else None,
        intent,
        NOW - 60,
        "held" if note else "",
        note,
    )


def allocation(job: str, uid: int, request: str, ago: float, limit: int | None, *held: int, **more: Any) -> Allocation:
    number, restart = map(int, job.split("."))
    run = Run("tin", number, restart)
    return Allocation(
        run, uid, request, int(NOW - ago) - 5, limit, NOW - ago, "boot", list(held), **{"granted": True, **more}
    )


def gpu(number: int, *instances: Instance, model: str = "A100-80GB", **more: str) -> Gpu:
    return Gpu(f"GPU-{number:08x}-aaaa-5bbb-accc-dddddddddddd", model, list(instances), **more)


def state(*gpus: Gpu, allocations: tuple[Allocation, ...] = (), intents: tuple[Intent, ...] = ()) -> State:
    return State(
        "boot",
        [0, 1],
        20,
        list(gpus),
        {g.model: load(g.model) for g in gpus},
        list(allocations),
        list(intents),
        {4700: (0, NOW - 100)},
        [(NOW - 65, "3g.40gb:1", 60), (NOW - 5, "1g.10gb:1", None)],
    )


def found(held: State, status: str = "current", note: str = "", node: str = "gpu01") -> dict[str, Any]:
    return report(Seen(held, "/var/lib/rms/state.json", status, note, 0), node, POLICY, NOW, USERS.get)


BUSY = state(
    gpu(
        1,
        instance(1, "3g.40gb@4:4"),
        instance(2, "1g.10gb@0:1"),
        instance(3, "1g.10gb@1:1", "idle"),
        instance(4, "2g.20gb@2:2", "quarantined", note="held by process 4321"),
    ),
    gpu(
        2,
        instance(5, "1g.10gb@6:1", "making", 9),
        instance(6, "2g.20gb@0:2", "removing", 9),
        instance(7, "1g.10gb@4:1"),
    ),
    gpu(3, fault="create 1g.10gb at 0: NVML error 15 (gpu is lost)"),
    allocations=(
        allocation("4712.0", 1002, "1g.10gb:2", 93784, 3000, 2, 7),
        allocation("4711.1", 1001, "3g.40gb:1", 3723, 60, 1),
        allocation("4713.0", 1003, "1g.10gb:1", 0, None, 5, granted=False),
    ),
    intents=(Intent(9, "acquire", Run("tin", 4713, 0), Owner.me()),),
)

DRAWN = """\
gpu01: 3 GPUs, 3 jobs; policy: built-in

 0        1        2        3        4        5        6        7
GPU 0  A100-80GB  GPU-00000001
|4712.0  |idle    |quarantined      |3g.40gb 4711.1 alice               |
! 2g.20gb@2:2 quarantined: held by process 4321
GPU 1  A100-80GB  GPU-00000002
|removing 2g.20gb |free             |4712.0  |free    |making  |unusable|
GPU 2  A100-80GB  GPU-00000003
|unusable                                                               |
! not offered: create 1g.10gb at 0: NVML error 15 (gpu is lost)

JOB    USER           REQUEST   GPU PLACEMENT   MIG          HELD       ENDS IN
4711.1 alice          3g.40gb:1 0   3g.40gb@4:4 MIG-00000001 1:02:03    over
4712.0 bob            1g.10gb:2 0   1g.10gb@0:1 MIG-00000002 1-02:03:04 23:56:56
                                1   1g.10gb@4:1 MIG-00000007
4713.0 a-user-with-a+ 1g.10gb:1 1   1g.10gb@6:1 -            starting   -
"""


# The drawing.


def test_a_busy_node() -> None:
    assert draw(found(BUSY)) == DRAWN


def test_an_idle_node() -> None:
    expected = """\
gpu01: 1 GPU, 0 jobs; policy: built-in

 0        1        2        3        4        5        6        7
GPU 0  A100-80GB  GPU-00000001
|free                                                                   |
"""
    assert draw(found(state(gpu(1)))) == expected


def test_other_boards_have_other_slices() -> None:
    held = state(
        gpu(1, instance(1, "2g.12gb@2:2", "idle"), model="A30"),
        gpu(2, instance(2, "1g.6gb@0:1", "idle"), model="A30"),
        gpu(3, instance(3, "1g.24gb+me@3:3"), instance(4, "2g.48gb@6:6", "idle"), model="RTX-PRO-6000"),
        allocations=(allocation("12345678.12", 1001, "1g.24gb+me:1", 59.9, 1, 3),),
    )
    expected = """\
gpu01: 3 GPUs, 1 job; policy: built-in

 0               1               2               3
GPU 0  A30  GPU-00000001
|free                           |idle 2g.12gb                   |
GPU 1  A30  GPU-00000002
|idle 1g.6gb    |free                                           |

 0     1     2     3     4     5     6     7     8     9     10    11
GPU 2  RTX-PRO-6000  GPU-00000003
|free             |12345678.12      |idle 2g.48gb                       |

JOB         USER  REQUEST      GPU PLACEMENT      MIG          HELD ENDS IN
12345678.12 alice 1g.24gb+me:1 2   1g.24gb+me@3:3 MIG-00000003 0:59 0:00
"""
    assert draw(found(held)) == expected


def test_slice_7_is_unusable_when_its_only_neighbour_is_taken() -> None:
    def bar(*held: Instance) -> str:
        return draw(found(state(gpu(1, *held)))).splitlines()[4]

    assert bar(instance(1, "1g.10gb@6:1", "making")).endswith("|making  |unusable|")
    sevens = [instance(i + 1, f"1g.10gb@{i}:1", "making") for i in range(7)]
    assert bar(*sevens) == "|making  |making  |making  |making  |making  |making  |making  |unusable|"
    idles = [instance(i + 1, f"1g.10gb@{i}:1", "idle") for i in range(7)]
    assert bar(*idles).endswith("|idle    |free    |"), "an idle neighbour can be destroyed"


def test_release_and_trouble_are_told() -> None:
    held = state(
        gpu(1, instance(1, "3g.40gb@0:4", intent=3), doubt="create 1g.10gb at 4: NVML error 999 (unknown)"),
        gpu(2, instance(2, "7g.80gb@0:8", intent=4)),
        allocations=(allocation("8.0", 0, "3g.40gb:1", 5, 10, 1), allocation("9.2", 1002, "7g.80gb:1", 5, 10, 2)),
        intents=(
            Intent(3, "release", Run("tin", 8, 0), Owner.me()),
            Intent(4, "release", Run("tin", 9, 2), GONE),
        ),
    )
    expected = """\
gpu01: 2 GPUs, 2 jobs; policy: built-in
! the configuration names other GPUs now: from the next MIG job
! release of job 9.2 was cut off: its process 4194305 is gone; the next MIG
  job's Prolog mends it

 0        1        2        3        4        5        6        7
GPU 0  A100-80GB  GPU-00000001
|3g.40gb 8.0 0                      |free                               |
! to be checked: create 1g.10gb at 4: NVML error 999 (unknown)
GPU 1  A100-80GB  GPU-00000002
|7g.80gb 9.2 bob                                                        |

JOB USER REQUEST   GPU PLACEMENT   MIG          HELD   ENDS IN
8.0 0    3g.40gb:1 0   3g.40gb@0:4 MIG-00000001 ending 9:55
9.2 bob  7g.80gb:1 1   7g.80gb@0:8 MIG-00000002 ending 9:55
"""
    assert draw(found(held, note="the configuration names other GPUs now: from the next MIG job")) == expected


def test_a_policy_that_fails_is_told() -> None:
    broken = {**POLICY, "fault": "policy failed: ValueError: bad weights; the built-in rule stands in"}
    text = draw(report(Seen(state(gpu(1)), "", "current", "", 0), "n", broken, NOW, USERS.get))
    assert text.splitlines()[1] == "! policy failed: ValueError: bad weights; the built-in rule stands in"


def test_an_allocation_whose_instances_vanished() -> None:
    held = state(
        gpu(1),
        allocations=(allocation("7.0", 1001, "1g.10gb:1", 5, None, 99), allocation("6.0", 1001, "2g:1", 5, None)),
    )
    assert draw(found(held)).splitlines()[-2:] == [
        "6.0 alice 2g:1      -   -         -   lost -",
        "7.0 alice 1g.10gb:1 ?   ?         ?   lost -",
    ]


@pytest.mark.parametrize("width", [1, 60, 72, 80, 100, 132, 400])
def test_lines_are_never_wider_than_the_terminal(width: int) -> None:
    lines = draw(found(BUSY), width).splitlines()
    assert all(line == line.rstrip() for line in lines)
    bars = [line for line in lines if line.startswith("|")]
    assert len({len(bar) for bar in bars}) == 1 and len(bars[0]) <= max(width, 60)
    assert len(bars[0]) > min(max(width, 60), 129) - 8, "and use what there is"
    # The table's other columns are never cut: a terminal narrower than they are has to wrap them.
    assert all(len(line) <= max(width, 77) for line in lines)
    assert all(run in draw(found(BUSY), width) for run in ("4711", "4712", "quarant"))


def test_nothing_that_others_chose_can_garble_the_terminal() -> None:
    nasty = "\x1b[2J\u202eé\n"
    held = state(
        gpu(
            1,
            instance(1, "3g.40gb@0:4"),
            instance(2, "1g.10gb@4:1", "quarantined", note=nasty),
            fault=nasty,
            doubt=nasty,
        ),
        allocations=(allocation("1.0", 5, "3g.40gb:1", 5, 5, 1),),
    )
    seen = Seen(held, nasty, "current", nasty, 0)
    text = draw(report(seen, nasty, {**POLICY, "source": nasty}, NOW, lambda uid: nasty), 200)
    assert text.isascii() and all(line.isprintable() for line in text.splitlines())
    assert len(text.splitlines()) == 12


def test_colours_are_added_to_the_same_text() -> None:
    text = draw(found(BUSY), paint=coloured)
    assert re.sub(r"\x1b\[[0-9;]*m", "", text) == DRAWN
    assert draw(found(BUSY), paint=plain) == DRAWN
    looks = dict(re.findall(r"\x1b\[([0-9;]+)m(\w+)", text)[::-1])
    assert looks["30;42"] == "4712" or looks["30;42"].startswith("3g")
    assert (looks["97;41"], looks["30;46"], looks["2"]) == ("quarantined", "idle", "free")
    assert all(line.count("\x1b[0m") * 2 == line.count("\x1b[") for line in text.splitlines()), "no colour runs on"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.9, "0:59"),
        (60, "1:00"),
        (3599, "59:59"),
        (3600, "1:00:00"),
        (86399, "23:59:59"),
        (86400, "1-00:00:00"),
        (1e7, "115-17:46:40"),
    ],
)
def test_durations_are_slurms(seconds: float, text: str) -> None:
    assert show._duration(seconds) == text


# The JSON.


def test_json_has_everything() -> None:
    known = json.loads(json.dumps(found(BUSY, note="a note")))
    assert list(known) == [
        "schema",
        "node",
        "time",
        "state",
        "policy",
        "gpus",
        "geometries",
        "allocations",
        "intents",
        "prewarmed",
        "recent",
    ]
    assert (known["schema"], known["node"], known["time"]) == (1, "gpu01", NOW)
    assert known["state"] == {"path": "/var/lib/rms/state.json", "status": "current", "note": "a note"}
    assert known["policy"] == POLICY
    assert [(g["number"], g["model"], len(g["instances"])) for g in known["gpus"]] == [
        (0, "A100-80GB", 4),
        (1, "A100-80GB", 3),
        (2, "A100-80GB", 0),
    ]
    assert known["gpus"][0]["uuid"] == "GPU-00000001-aaaa-5bbb-accc-dddddddddddd"
    assert known["gpus"][2]["fault"].startswith("create 1g.10gb") and known["gpus"][2]["doubt"] == ""
    assert known["gpus"][0]["instances"][0] == {
        "generation": 2,
        "profile": "1g.10gb",
        "start": 0,
        "size": 1,
        "status": "busy",
        "gi": 2,
        "ci": 0,
        "uuid": "MIG-00000002-1111-5222-a333-444444444444",
        "used": NOW - 60,
        "trouble": "",
        "note": "",
        "intent": None,
        "prewarmed": False,
        "run": "4712.0",
    }
    assert known["geometries"]["A100-80GB"] == load("A100-80GB").to_json()
    assert known["allocations"][1] == {
        "cluster": "tin",
        "job": 4711,
        "restart": 1,
        "status": "running",
        "uid": 1001,
        "user": "alice",
        "request": "3g.40gb:1",
        "submit": int(NOW - 3723) - 5,
        "limit_minutes": 60,
        "started": NOW - 3723,
        "ends": NOW - 123,
        "instances": [1],
    }
    assert (known["allocations"][2]["status"], known["allocations"][2]["ends"]) == ("starting", None)
    assert known["intents"] == [
        {"number": 9, "kind": "acquire", "cluster": "tin", "job": 4713, "restart": 0, "pid": os.getpid(), "alive": True}
    ]
    assert known["recent"] == [
        {"submit": NOW - 65, "request": "3g.40gb:1", "limit_minutes": 60},
        {"submit": NOW - 5, "request": "1g.10gb:1", "limit_minutes": None},
    ]


def test_the_drawing_needs_nothing_but_the_json() -> None:
    assert draw(json.loads(json.dumps(found(BUSY)))) == DRAWN


# The command.


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A node called n1 whose state directory is still empty. Nothing of the machine's own is looked at."""
    (tmp_path / "n1").mkdir()
    (tmp_path / "boot_id").write_text("boot\n")
    (tmp_path / "rms.toml").write_text(
        f"""gpus = [0, 1]
state_dir = "{tmp_path}/%n"
run_dir = "{tmp_path}/run"
audit_log = "{tmp_path}/audit.jsonl"
boot_id_file = "{tmp_path}/boot_id"
[simulated]
file = "{tmp_path}/gpus.json"
model = "A100-80GB"
gpus = 2
"""
    )
    monkeypatch.setenv("RMS_CONFIG", str(tmp_path / "rms.toml"))
    monkeypatch.setenv("SLURMD_NODENAME", "n1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return tmp_path


def save(site: Path, held: State, node: str = "n1") -> Path:
    store = Store(str(site / node), time.monotonic() + 5)
    with store.open("test") as _:
        store.save(held)
    return Path(store.path)


def rms(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    """What `rms ARGUMENTS` prints to standard output and error, in this process."""
    assert cli.main(arguments) == code
    out, err = capsys.readouterr()
    return out, err


def test_show(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(site, state(gpu(1, instance(1, "7g.80gb@0:8", "idle"))))
    assert rms(capsys, "show") == (
        """\
n1: 1 GPU, 0 jobs; policy: learned

 0        1        2        3        4        5        6        7
GPU 0  A100-80GB  GPU-00000001
|idle 7g.80gb                                                           |
""",
        "",
    )
    assert sorted(os.listdir(site)) == ["boot_id", "n1", "rms.toml"], "looking makes nothing"


def test_show_json(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(site, BUSY)
    out, err = rms(capsys, "show", "--json")
    printed = json.loads(out)
    assert err == "" and printed["schema"] == 1 and printed["node"] == "n1"
    assert printed["gpus"] == found(BUSY)["gpus"]
    assert printed["policy"]["source"] == "learned" and len(printed["policy"]["model"]) == 8
    assert abs(printed["time"] - time.time()) < 60


def test_another_node_another_file(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (site / "n2").mkdir()
    save(site, state(gpu(1), gpu(2)), "n2")
    assert rms(capsys, "show", "--node", "n2")[0].startswith("n2: 2 GPUs, 0 jobs;")
    (site / "n2.toml").write_text((site / "rms.toml").read_text())
    assert rms(capsys, "show", "--node", "n2", "--config", str(site / "%n.toml"))[0].startswith("n2: 2 GPUs")


def test_no_state_yet(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rms(capsys, "show")[0].startswith("n1: policy: learned\n! no MIG job has run here yet: there is no ")
    printed = json.loads(rms(capsys, "show", "--json")[0])
    assert (printed["state"]["status"], printed["gpus"]) == ("missing", [])
    (site / "n1").rmdir()
    assert json.loads(rms(capsys, "show", "--json")[0])["state"]["status"] == "missing"


def test_state_from_before_this_boot(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(site, BUSY)
    (site / "boot_id").write_text("another\n")
    assert rms(capsys, "show") == (
        """\
n1: policy: learned
! the state is from before this boot, which ended all instances; the next MIG
  job begins a new one
""",
        "",
    )
    printed = json.loads(rms(capsys, "show", "--json")[0])
    assert (printed["state"]["status"], printed["gpus"], printed["allocations"]) == ("before-boot", [], [])


def test_damaged_state_shows_the_previous_generation(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(site, state(gpu(1)))
    path = save(site, state(gpu(1), gpu(2)))
    path.write_bytes(path.read_bytes()[:-20])
    out, err = rms(capsys, "show", code=NodeError.code)
    assert err == ""
    told = " ".join(line[2:] for line in out.splitlines() if line.startswith(("! ", "  ")))
    assert told == (
        f"{path} is damaged (cut short); its previous generation is used; the next MIG job's Prolog mends it"
    )
    assert out.startswith("n1: 1 GPU, 0 jobs;")
    assert json.loads(rms(capsys, "show", "--json", code=NodeError.code)[0])["state"]["status"] == "damaged"
    path.unlink()
    assert "is missing; its previous generation is used" in rms(capsys, "show", code=NodeError.code)[0].replace(
        "\n ", ""
    )


@pytest.mark.parametrize(
    "rubbish", [b"", b"{}", b"\0" * 4096, b"\xff\xfe", b'{"crc32":0,"state":{}}\n', b"[" * 100_000]
)
def test_state_that_is_lost_is_one_line(site: Path, capsys: pytest.CaptureFixture[str], rubbish: bytes) -> None:
    (site / "n1" / "state.json").write_bytes(rubbish)
    out, err = rms(capsys, "show", code=NodeError.code)
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"rms: {site}/n1/state.json is damaged (")
    assert err.endswith("there is no previous generation; the next MIG job's Prolog rebuilds it from the GPUs\n")


def test_state_of_a_newer_rms(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save(site, state(gpu(1)))
    body = path.read_text().partition(',"state":')[2][:-2].replace(f'"schema":{SCHEMA}', f'"schema":{SCHEMA + 1}')
    path.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')
    out, err = rms(capsys, "show", code=NodeError.code)
    assert (
        out == ""
        and err.startswith(f"rms: {path} has schema {SCHEMA + 1}, this RMS knows {SCHEMA}: ")
        and err.count("\n") == 1
    )


@pytest.mark.timed
def test_it_waits_for_no_lock_and_leaves_none(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(site, BUSY)
    before = {name: (site / "n1" / name).stat().st_mtime_ns for name in os.listdir(site / "n1")}
    store = Store(str(site / "n1"), time.monotonic() + 5)
    with store.open("test"), store.hardware(["GPU-1"], "test"):
        began = time.monotonic()
        rms(capsys, "show")
        assert time.monotonic() - began < 1
    del before["state.lock"]
    assert all((site / "n1" / name).stat().st_mtime_ns == when for name, when in before.items())


def test_every_look_is_whole_while_the_state_is_being_replaced(site: Path) -> None:
    """The file is replaced, not rewritten: a look without the lock sees one generation or the next, never a mixture."""
    save(site, state(gpu(1)))
    program = f"""
import sys, time
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
import test_show as t
store = t.Store({str(site / "n1")!r}, time.monotonic() + 30)
until = time.monotonic() + 1.5
while time.monotonic() < until:
    for held in (t.BUSY, t.state(t.gpu(1))):
        with store.open("test"):
            store.save(held)
"""
    sizes = []
    with subprocess.Popen([sys.executable, "-c", program]) as writer:
        while writer.poll() is None:
            sizes.append(len(Store(str(site / "n1"), 0.0).glance().gpus))
        assert writer.returncode == 0
    assert set(sizes) == {1, 3} and len(sizes) > 200


@needs_root
def test_any_user_who_may_read_the_state_may_look(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rms(capsys, "show")  # whatever is imported is imported: the Python that runs this may be root's own
    with tempfile.TemporaryDirectory() as public:
        shutil.copytree(site, public, dirs_exist_ok=True)
        os.chmod(public, 0o755)
        settings = Path(public, "rms.toml")
        settings.write_text(settings.read_text().replace(str(site), public))
        path = save(Path(public), state(gpu(1)))
        os.seteuid(65534)
        try:
            out, err = rms(capsys, "show", "--config", str(settings), code=NodeError.code)
            assert (out, err) == (
                "",
                f"rms: cannot read {path}: Permission denied (this is uid 65534: run it as root)\n",
            )
            assert (
                "own, for nobody else to write (this is uid 65534: run it as root)"
                in rms(capsys, "reconcile", "--config", str(settings), code=NodeError.code)[1]
            )
            os.seteuid(0)
            path.chmod(0o644)
            os.seteuid(65534)
            assert rms(capsys, "show", "--config", str(settings))[0].startswith("n1: 1 GPU, 0 jobs;")
        finally:
            os.seteuid(0)


BAD_CONFIGS = [
    ("gpus = ", " is not valid TOML: "),
    ("gpus = []\n", ": gpus must list the GPUs to manage, by UUID or index, as in gpus = [0, 1]\n"),
    ("gpus = [0]\nstate_dri = 'x'\n", ": unknown key state_dri; known: gpus simulated state_dir "),
    ("gpus = [0]\nstate_dir = 1\n", ": state_dir must be str, not int\n"),
    ("gpus = [0]\n[simulated]\n", ": simulated.file is missing\n"),
    ("\xff", " is not valid TOML: "),
    ('gpus = [0]\n"\\u001b[2J\\n" = 1\n', ": unknown key \\x1b[2J\\n; known: "),
]


@pytest.mark.parametrize(("text", "message"), BAD_CONFIGS)
def test_bad_config_is_one_line(site: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    (site / "rms.toml").write_text(text, encoding="latin-1")
    out, err = rms(capsys, "show", code=NodeError.code)
    assert out == "" and err.startswith(f"rms: {site}/rms.toml{message}")
    assert err.count("\n") == 1 and err[:-1].isprintable()


def test_missing_config_and_boot_id(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(site / "nowhere.toml")
    assert rms(capsys, "show", "--config", nowhere, code=6)[1] == (
        f"rms: cannot read the configuration {nowhere}: No such file or directory\n"
    )
    (site / "boot_id").unlink()
    assert rms(capsys, "show", code=6)[1] == f"rms: cannot read {site}/boot_id: No such file or directory\n"


@pytest.mark.parametrize("arguments", [[], ["shwo"], ["show", "--jso"], ["show", "extra"], ["show", "--config"]])
def test_usage_errors_are_code_2(site: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "") and err.startswith("usage: rms")


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, start in ((["--help"], "usage: rms"), (["-V"], "rms 0."), (["show", "-h"], "usage: rms show")):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == 0 and capsys.readouterr().out.startswith(start)


def test_a_fault_of_our_own_is_one_line_too(
    site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("two\nlines")

    save(site, state(gpu(1)))
    monkeypatch.setattr(show, "report", broken)
    assert rms(capsys, "show", code=1) == (
        "",
        "rms: a fault of RMS: KeyError: 'two\\nlines' (RMS_TRACEBACK=1 shows where)\n",
    )
    monkeypatch.setenv("RMS_TRACEBACK", "1")
    with pytest.raises(KeyError):
        cli.main(["show"])


def test_ctrl_c(site: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(show, "look", interrupted)
    assert rms(capsys, "show", code=130) == ("", "")


def process(*arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-m", "rms.cli", *arguments], cwd=Path(cli.__file__).parents[1], **more)


def test_a_reader_that_leaves_is_no_error(site: Path) -> None:
    save(site, BUSY)
    read, write = os.pipe()
    os.close(read)
    with process("show", "--json", stdout=write, stderr=subprocess.PIPE) as started:
        os.close(write)
        assert started.communicate(timeout=60)[1] == b""
        assert started.returncode == 141


def test_a_full_disk_is_one_line(site: Path) -> None:
    save(site, BUSY)
    with open("/dev/full", "wb") as full, process("show", stdout=full, stderr=subprocess.PIPE) as started:
        assert started.communicate(timeout=60)[1] == b"rms: cannot write to standard output: No space left on device\n"
        assert started.returncode == 1


def on_a_terminal(columns: int, **environment: str) -> bytes:
    """What `rms show` writes to a terminal of that many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    variables = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "TERM")}
    variables |= {"TERM": "xterm", **environment}
    with process("show", stdin=theirs, stdout=theirs, stderr=theirs, env=variables) as started:
        os.close(theirs)
        written = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
            if not part:
                break
            written += part
        os.close(ours)
        assert started.wait(20) == 0
    return written.replace(b"\r\n", b"\n")


def test_colour_on_a_terminal_only(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(site, state(gpu(1, instance(1, "7g.80gb@0:8", "idle"))))
    without = rms(capsys, "show")[0].encode()
    assert b"\x1b" not in without
    written = on_a_terminal(80)
    assert b"|\x1b[30;46midle 7g.80gb " in written
    assert re.sub(rb"\x1b\[[0-9;]*m", b"", written) == without
    assert on_a_terminal(80, NO_COLOR="1") == on_a_terminal(80, TERM="dumb") == without
    assert on_a_terminal(80, NO_COLOR="") == written, "an empty NO_COLOR is none"
    wide = re.sub(rb"\x1b\[[0-9;]*m", b"", on_a_terminal(132)).splitlines()
    assert len(wide[-1]) == 129


def test_an_ascii_terminal(site: Path) -> None:
    save(site, BUSY)
    with process(
        "show", stdout=subprocess.PIPE, env={**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    ) as started:
        out = started.communicate(timeout=60)[0]
    assert out.decode("ascii").startswith("n1: 3 GPUs, 3 jobs") and started.returncode == 0


def test_what_the_controller_leaves(
    node: Node, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(show, "_user_name", {1000: "carol"}.get)
    monkeypatch.setenv("COLUMNS", "80")
    node.acquire(41, "3g", limit=60)
    node.acquire(42, "1g:2,2g", restart=1)
    node.acquire(43, "1g")
    node.release(43)
    out, err = rms(capsys, "show", "--config", str(node.toml), "--node", "n1")
    assert err == "" and out.startswith("n1: 2 GPUs, 2 jobs;")
    bars = [line for line in out.splitlines() if line.startswith("|")]
    assert bars == [
        "|2g.20gb 42.1     |42.1    |42.1    |3g.40gb 41.0 carol                 |",
        "|free                                                 |idle    |free    |",
    ]
    printed = json.loads(rms(capsys, "show", "--json", "--config", str(node.toml))[0])
    uuids = {i["uuid"] for g in printed["gpus"] for i in g["instances"]}
    held = [i for a in node.state().allocations for _, i in node.state().held(a)]
    assert {i.uuid for i in held} < uuids
