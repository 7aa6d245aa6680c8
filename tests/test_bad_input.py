"""Whatever is put in, each fault gets one line on stderr and the exit code that says whose it is; nothing is lost."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from conftest import Node, needs_root
from hypothesis import example, given, settings
from hypothesis import strategies as st

import controller as local
from rms import cli, config, geometry, grant, inventory
from rms.errors import NodeError, RequestError
from rms.inventory import Run
from rms.request import COMMENT_TAG, MAX_BYTES, parse, parse_comment, printable
from rms.store import Store
from slurm import site

USAGE, USER, NO_ROOM, CLOSED, NODE, LOCK = 2, 3, 4, 5, 6, 7

ACQUIRE = ("acquire", "--job=2", "--restart=0", "--uid=1000")
RELEASE = ("release", "--job=1", "--restart=0")


@pytest.fixture
def busy(node: Node) -> Node:
    """A node on which job 1 runs."""
    node.acquire(1, "3g")
    return node


def called(node: Node, *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of the command line, called in this process."""
    os.environ["RMS_CONFIG"] = str(node.toml)
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        try:
            code = local.main(arguments)
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            del os.environ["RMS_CONFIG"]
    return code, out.getvalue(), err.getvalue()


def refused(node: Node, code: int, *arguments: str, says: str = "") -> str:
    """The one line with which a call is refused."""
    found, out, err = called(node, *arguments)
    one_line(err)
    assert (found, out) == (code, ""), err
    assert says in err, err
    if code != USAGE:
        found, out, silent = called(node, *arguments, "--json")
        assert (found, silent) == (code, "")
        answer = json.loads(out)
        assert (answer["schema"], answer["code"]) == (1, code)
        assert out.count("\n") == 1
    return err


def one_line(text: str) -> None:
    assert text.startswith("rms: "), text
    assert text.endswith("\n")
    assert text[:-1].isprintable(), repr(text)
    assert len(text) < 2100
    assert "Traceback" not in text
    assert "internal error" not in text


# Requests.


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("9g", "unknown profile '9g'; A100-80GB has: 1g.10gb 1g.10gb+me 1g.20gb 2g.20gb 3g.40gb 4g.40gb 7g.80gb"),
        ("2g.12gb", "unknown profile"),  # another model's
        ("3g.41gb", "unknown profile"),
        ("3g.40gb+me", "unknown profile"),
        ("mig", "unknown profile"),
        ("2", "unknown profile"),
        ("mig:2", "unknown profile '2'"),
        ("3g:0", "count of 3g.40gb is 0"),
        ("3g:-1", "cannot read '3g:-1'"),
        ("3g:+1", "cannot read"),
        ("3g:1.5", "cannot read"),
        ("3g:x", "cannot read"),
        ("3g:", "cannot read"),
        ("3g:1:2", "cannot read"),
        (":1", "cannot read"),
        ("3g:1000", "at most 999"),
        ("3g:999999999", "at most 999"),
        ("3g:9999999999999999999999", "cannot read"),
        ("3g:500,3g:500", "count of 3g.40gb is 1000"),
        ("3g:5", "more than the 2 GPUs"),
        ("7g:2,1g", "more than the 2 GPUs"),
        ("1g:999,2g:999,3g:999,7g:999,1g.20gb:999,1g+me:999,4g:999", "more than the 2 GPUs"),
        ("", "cannot read ''"),
        (",", "cannot read ''"),
        ("3g,", "cannot read ''"),
        ("3g,,1g", "cannot read ''"),
        (" 3g", "cannot read ' 3g'"),
        ("3g 1g", "cannot read"),
        ("3g\n1g", "cannot read '3g\\n1g'"),
        ("3g\x00", "cannot read"),
        ("3g;rm -rf /", "cannot read"),
        ("\x1b[31m3g", "cannot read '\\x1b[31m3g'"),
        ("\uff13g", "cannot read"),
        ("3g:\uff11", "cannot read"),
        ("gpu:1", "unknown profile"),
        ("3g.40gb:1," * 300, "longer than 1024 bytes"),
        ("x" * 10_000, "longer than 1024 bytes"),
        ("x" * 1000, "cannot read"),
        ("\udcff\udcfe", "cannot read"),
        ("é" * 600, "longer than 1024 bytes"),
    ],
)
def test_requests_that_cannot_be_are_the_user_s_fault(busy: Node, spec: str, says: str) -> None:
    before, done = busy.state(), busy.journal()
    error = refused(busy, USER, *ACQUIRE, f"--request={spec}")
    assert says in error, error
    assert busy.journal() == done
    assert busy.state().allocations == before.allocations
    assert not busy.marker(2).exists() or not busy.marker(2).read_text().startswith("granted")
    busy.check()


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("3g", "3g.40gb:1"),
        ("MIG:3G.40GB:1", "3g.40gb:1"),
        ("mig:3g.39gb", "3g.40gb:1"),
        ("1g.10gb:2,mig:3g.40gb:1", "1g.10gb:2,3g.40gb:1"),
        ("1g,2g,1g:2", "1g.10gb:3,2g.20gb:1"),
        ("1g+me:001", "1g.10gb+me:1"),
        ("1g.20gb", "1g.20gb:1"),
    ],
)
def test_requests_as_people_write_them(busy: Node, spec: str, canonical: str) -> None:
    code, out, err = called(busy, *ACQUIRE, f"--request={spec}")
    assert (code, err) == (0, "")
    assert out.startswith("MIG-")
    assert busy.marker(2).read_text().split("\n")[0] == f"granted 0 1000 cluster {canonical}"


# Numbers.


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "-1",
        "+1",
        "1.5",
        "1e3",
        "0x10",
        " 1",
        "1 ",
        "\uff11",
        "\u00b2",
        "1_0",
        "9" * 16,
        "9" * 10_000,
        "1\n",
        "\x1b[2J",
        "\udcff",
        "nan",
        "1.0",
    ],
)
@pytest.mark.parametrize("option", ["job", "restart", "uid", "submit", "limit"])
def test_numbers_that_are_none(busy: Node, option: str, value: str) -> None:
    arguments = [a for a in ACQUIRE if not a.startswith(f"--{option}=")]
    error = refused(busy, USAGE, *arguments, "--request=1g", f"--{option}={value}", says=f"--{option}")
    assert "is not a whole number" in error
    busy.check()


@pytest.mark.parametrize("uid", [2**32 - 1, 2**32, 10**14])
def test_a_uid_that_is_none(busy: Node, uid: int) -> None:
    arguments = [a for a in ACQUIRE if not a.startswith("--uid=")]
    assert "can be a uid" in refused(busy, USAGE, *arguments, "--request=1g", f"--uid={uid}", says="--uid")
    busy.check()


@pytest.mark.parametrize(
    "arguments",
    [
        ("take",),
        ("acquire",),
        ("release",),
        ("acquire", "--job=1"),
        ("release", "--job=1"),
        (*ACQUIRE,),
        (*ACQUIRE, "--request"),
        (*ACQUIRE, "--request=1g", "--frobnicate"),
        (*ACQUIRE, "--request=1g", "more"),
        (*ACQUIRE, "--request=1g", "\x1b[31m\n"),
        (*RELEASE, "--request=1g"),
        ("--gpus=x",),
        ("--gpus=-1",),
        ("\n" * 500,),
        ("--x" * 4000,),
    ],
)
def test_command_lines_that_make_no_sense(busy: Node, arguments: tuple[str, ...]) -> None:
    refused(busy, USAGE, *arguments)
    busy.check()


@pytest.mark.parametrize(
    "name", ["", "a b", "a\nMIG-1", "a\tb", "\x00", "é", "x" * 65, "x" * 10_000, "a/b", "\udcff", "a;b"]
)
def test_cluster_names_that_would_break_the_grant(busy: Node, name: str) -> None:
    for arguments in ((*ACQUIRE, "--request=1g"), RELEASE):
        refused(busy, NODE, *arguments, f"--cluster={name}", says="cluster name")
    busy.check()


# The configuration.


def configured(node: Node, text: str) -> Node:
    node.toml.write_bytes(text.encode("utf-8", "surrogateescape"))
    return node


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "gpus must list"),
        ("gpus = []", "gpus must list"),
        ("gpus = [true]", "gpus must list"),
        ("gpus = [0.5]", "gpus must list"),
        ("gpus = [[0]]", "gpus must list"),
        ("gpus = 2", "gpus must be list, not int"),
        ('gpus = "all"', "gpus must be list, not str"),
        ("gpus = [0]\nstate_directory = '/x'", "unknown key state_directory; known: gpus"),
        ('gpus = [0]\n"a\\nb" = 1', "unknown key a\\nb"),
        ("gpus = [0]\nstate_dir = 5", "state_dir must be str, not int"),
        ("gpus = [0]\nstate_dir = 'state'", "state_dir is 'state'; it must be a full path"),
        ("gpus = [0]\nrun_dir = ''", "run_dir is ''; it must be a full path"),
        ("gpus = [0]\nhook_log = '~/hooks.log'", "hook_log is '~/hooks.log'; it must be a full path"),
        ("gpus = [0]\n[simulated]\nfile = 'gpus.json'\nmodel = 'A30'\ngpus = 1", "simulated.file is 'gpus.json'; it"),
        ("gpus = [0]\ndeadline_seconds = '5'", "deadline_seconds must be int or float, not str"),
        ("gpus = [0]\ndeadline_seconds = true", "deadline_seconds must be"),
        ("gpus = [0]\ndeadline_seconds = -1", "it must be from 0 to 1,000,000"),
        (f"gpus = [0]\ndeadline_seconds = {10**400}", "it must be from 0 to 1,000,000"),
        ("gpus = [0]\nholder_seconds = nan", "holder_seconds"),
        ("gpus = [0]\nsimulated = 5", "simulated must be dict"),
        ("gpus = [0]\n[simulated]\nfile = '/dev/shm/x'", "simulated.model is missing"),
        (
            "gpus = [0]\n[simulated]\nfile = '/x'\nmodel = 'A100-80GB'\ngpus = 1\nlatency = 1",
            "unknown key simulated.latency",
        ),
        ("gpus = [0]\n[simulated]\nfile = '/x'\nmodel = 'A100-80GB'\ngpus = 1.5", "simulated.gpus must be int"),
        ("gpus = [0]\n[simulated]\nfile = '/x'\nmodel = 'A100-80GB'\ngpus = -1", "it must be from 0"),
        ("gpus = [0]\n[other]\nx = 1", "unknown key other"),
        ("gpus = [0", "not valid TOML"),
        ("gpus = [0]\ngpus = [1]", "not valid TOML"),
        ("\x00\x01", "not valid TOML"),
        ("\udcff\udcfe", "not valid TOML"),
        ("[" * 5000, "not valid TOML"),
        ("gpus = [" + "9" * 5000 + "]", ""),
    ],
)
def test_configurations_that_make_no_sense(busy: Node, text: str, says: str) -> None:
    configured(busy, text)
    for arguments in ((*ACQUIRE, "--request=1g"), RELEASE):
        error = refused(busy, NODE, *arguments, says=says)
        assert str(busy.toml) in error or "cannot open" in error
    busy.configure()
    busy.check()


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("slurm-config", "--model=A30", "--gpus=0", "--nodes=a"), USER, "--gpus is 0; a node has 1 to 64"),
        (("slurm-config", "--model=A30", "--gpus=65", "--nodes=a"), USER, "--gpus is 65; a node has 1 to 64"),
        (("slurm-config", "--model=A30", "--gpus=2", "--nodes="), USER, "'' is no list of nodes"),
        (("slurm-config", "--model=A30", "--gpus=2", "--nodes=a b"), USER, "'a b' is no list of nodes"),
        (("slurm-config", "--model=A30", "--gpus=2", "--nodes=a", "--slurm-conf=slurm.conf"), USER, "a full path"),
        (("slurm-config", "--model=A30", "--gpus=2", "--nodes=a", "--config=rms.toml"), USER, "a full path"),
        (("watch", "--seconds=nan"), USAGE, "--seconds is from 0.1 to 60"),
        (("watch", "--seconds=0"), USAGE, "--seconds is from 0.1 to 60"),
        (("simulate", "--mix=uniform", "--gpus=" + "9" * 400), USER, "from 1 to 128 can be simulated"),
    ],
)
def test_options_that_no_verb_takes(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, says: str
) -> None:
    assert cli.main(words) == code
    out, err = capsys.readouterr()
    assert out == "" and says in err
    one_line(err)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpus": [5]}, "cannot open the GPUs: GPU 5"),
        ({"gpus": [-1]}, "cannot open the GPUs: GPU -1"),
        ({"gpus": ["GPU-\x1b[31m"]}, "cannot open the GPUs: GPU GPU-"),
        ({"gpus": ["x" * 10_000]}, "cannot open the GPUs: GPU xxx"),
        ({"gpus": [0], "sim_gpus": 0}, "cannot open the GPUs"),
        ({"gpus": [1], "sim_model": "B9000"}, "unknown GPU model 'B9000'; known: A100-40GB"),
        ({"state_dir": "/proc/version"}, "cannot use the state directory /proc/version"),
        ({"state_dir": "/dev/null/x"}, "cannot use the state directory"),
        ({"state_dir": "/" + "x" * 300}, "cannot use the state directory"),
        ({"run_dir": "/proc/version"}, "/proc/version must be a directory of root's own"),
        ({"run_dir": "/dev/null/x"}, "cannot use /dev/null"),
        ({"boot_id_file": "/nonexistent"}, "cannot read /nonexistent"),
        ({"boot_id_file": "/dev/null"}, "/dev/null is empty"),
        ({"boot_id_file": "/"}, "cannot read /"),
    ],
)
def test_configurations_of_what_is_not_there(busy: Node, change: dict[str, Any], says: str) -> None:
    before = {**busy.settings, **{f"sim_{k}": v for k, v in busy.simulated.items()}}
    busy.configure(deadline_seconds=2, **change)
    refused(busy, NODE, *ACQUIRE, "--request=1g", says=says)
    busy.configure(**before)
    busy.check()


def test_simulated_gpus_without_a_place(busy: Node) -> None:
    busy.configure(gpus=[1], sim_file="/proc/version/gpus.json")
    code, out, err = called(busy, *ACQUIRE, "--request=1g")
    assert (code, out) == (NODE, "")
    for line in err.splitlines():
        one_line(f"{line}\n")
    assert "/proc/version/gpus.json" in err.splitlines()[-1]


def test_a_configuration_that_is_missing_or_a_directory(busy: Node) -> None:
    busy.toml.unlink()
    refused(busy, NODE, *RELEASE, says=f"cannot read the configuration {busy.toml}: No such file")
    busy.toml.mkdir()
    refused(busy, NODE, *RELEASE, says="Is a directory")
    busy.toml.rmdir()
    busy.toml.symlink_to(busy.toml)
    refused(busy, NODE, *RELEASE, says="cannot read the configuration")
    busy.toml.unlink()
    busy.configure()
    busy.check()


@pytest.mark.parametrize("name", ["n1", "x" * 10_000, "a\nb", "\x1b[31m", "../../../x", "n 1", "%n"])
def test_node_names_in_paths(busy: Node, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", name)
    busy.configure(state_dir=str(busy.root / "state-%n"), deadline_seconds=2)
    code, out, err = called(busy, *ACQUIRE, "--request=1g")
    if code:
        assert code == NODE
        one_line(err)
    else:
        assert out.startswith("MIG-")


def test_percent_n_is_replaced_in_every_path(busy: Node) -> None:
    text = busy.toml.read_text().replace(str(busy.root), "/somewhere/%n")
    busy.toml.write_text(text)
    found = config.load(str(busy.toml), "n7")
    assert found.simulated is not None
    assert {found.state_dir, found.run_dir, found.audit_log, found.simulated.file} == {
        f"/somewhere/n7/{name}" for name in ("state", "run", "audit.jsonl", "gpus.json")
    }


# The node's directories.


def test_the_directory_of_the_grants_replaced_by_a_link(busy: Node) -> None:
    jobs = busy.root / "run" / "jobs"
    elsewhere = busy.root / "elsewhere"
    jobs.rename(elsewhere)
    jobs.symlink_to(elsewhere)
    before = {p.name: p.read_text() for p in elsewhere.iterdir()}
    refused(busy, NODE, *ACQUIRE, "--request=1g", says=f"{jobs} must be a directory of root's own")
    refused(busy, NODE, *ACQUIRE, "--request=4g:2", says=f"{jobs} must be a directory of root's own")
    assert {p.name: p.read_text() for p in elsewhere.iterdir()} == before, "nothing is written behind a link"
    code, _, err = called(busy, *RELEASE)
    assert code == 0, "the instances are taken back all the same"
    assert all(line.startswith("rms: ") and str(jobs) in line for line in err.splitlines())
    assert {p.name: p.read_text() for p in elsewhere.iterdir()} == before
    jobs.unlink()
    elsewhere.rename(jobs)
    busy.release(1)
    busy.acquire(3, "1g")
    busy.release(2)
    assert busy.state().of_run(Run("cluster", 1, 0)) is None


@needs_root
@pytest.mark.parametrize("change", ["owner", "group can write", "all can write"])
@pytest.mark.parametrize("place", ["run", "run/jobs"])
def test_a_directory_of_the_grants_that_others_can_write(busy: Node, place: str, change: str) -> None:
    """Nor one above it: who can write there can put another one in its place."""
    there = busy.root / place
    if change == "owner":
        os.chown(there, 65534, 65534)
    else:
        there.chmod(0o775 if "group" in change else 0o777)
    busy.marker(1).write_text("ended 0\n")  # as whoever can write would end the runs of others
    refused(busy, NODE, *ACQUIRE, "--request=1g", says=f"{there} must be a directory of root's own")
    with pytest.raises(NodeError, match="must be a directory of root's own"):
        busy.reconcile()
    assert busy.state().of_run(Run("cluster", 1, 0))
    os.chown(there, 0, 0)
    there.chmod(0o755)
    busy.acquire(2, "1g")
    busy.check()


@pytest.mark.parametrize("kind", ["link", "dangling link", "directory", "fifo", "binary", "long"])
def test_a_marker_that_is_something_else(busy: Node, kind: str) -> None:
    victim = busy.root / "victim"
    victim.write_text("granted 0 0 cluster 3g.40gb:1\nMIG-1\n")
    marker = busy.marker(2)
    match kind:
        case "link":
            marker.symlink_to(victim)
        case "dangling link":
            marker.symlink_to("nowhere")
        case "directory":
            marker.mkdir()
        case "fifo":
            os.mkfifo(marker)
        case "binary":
            marker.write_bytes(bytes(range(256)))
        case "long":
            marker.write_text("granted " + "9" * 10_000 + "\n" + "x" * 100_000)
    began = time.monotonic()
    code, out, err = called(busy, *ACQUIRE, "--request=1g")
    assert time.monotonic() - began < 5
    assert victim.read_text() == "granted 0 0 cluster 3g.40gb:1\nMIG-1\n"
    if code:
        assert code == NODE, err
        for line in err.splitlines():
            one_line(f"{line}\n")
    else:
        assert out.startswith("MIG-")
        assert marker.read_text().startswith("granted 0 1000 ")
        assert not marker.is_symlink()
    code, _, err = called(busy, "release", "--job=2", "--restart=0")
    assert code in (0, NODE)
    assert "internal" not in err


def test_a_stuck_lock_through_the_command_line(busy: Node) -> None:
    busy.configure(deadline_seconds=0.2)
    with Store(busy.config.state_dir, time.monotonic() + 5).open("nothing at all"):
        shown = busy.cli(*RELEASE)
    assert shown.returncode == LOCK
    one_line(shown.stderr)
    assert f"held by pid {os.getpid()} (nothing at all)" in shown.stderr
    busy.configure(deadline_seconds=20)
    busy.check()
    assert busy.cli(*RELEASE).returncode == 0


def test_a_newer_state_through_the_command_line(busy: Node) -> None:
    path = busy.root / "state" / "state.json"
    text = path.read_text()
    import zlib

    body = json.dumps({"schema": inventory.SCHEMA + 1})
    path.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')
    refused(
        busy,
        NODE,
        *ACQUIRE,
        "--request=1g",
        says=f"has schema {inventory.SCHEMA + 1}, this RMS knows {inventory.SCHEMA}",
    )
    path.write_text(text)
    busy.check()


def test_a_state_that_cannot_be_read(busy: Node) -> None:
    path = busy.root / "state" / "state.json"
    path.rename(busy.root / "kept")
    path.mkdir()
    refused(busy, NODE, *ACQUIRE, "--request=1g", says="cannot read")
    path.rmdir()
    (busy.root / "kept").rename(path)
    busy.check()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_nobody_listens(busy: Node, stream: str) -> None:
    """The grant stands, whoever reads the answer."""
    reader, writer = os.pipe()
    os.close(reader)
    shown = subprocess.run(
        busy.command(*ACQUIRE, "--request=1g"),
        env=busy.environment(),
        stdout=writer if stream == "stdout" else subprocess.PIPE,
        stderr=writer if stream == "stderr" else subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert "Traceback" not in (shown.stderr or "")
    busy.check()
    assert busy.marker(2).exists()


def test_files_for_slurm_are_never_seen_half_written(tmp_path: Path) -> None:
    """A new version is written while slurmd and slurmctld go on."""
    words = ["slurm-config", "--nodes=n1", f"--config={tmp_path}/rms.toml", f"--write={tmp_path}", "--model"]
    assert cli.main([*words, "A100-80GB", "--gpus=2"]) == 0
    old = [path.open() for path in sorted(tmp_path.iterdir())]
    before = {file.name: Path(file.name).read_text() for file in old}
    (tmp_path / "epilog").rename(tmp_path / "elsewhere")
    (tmp_path / "epilog").symlink_to("elsewhere")
    assert cli.main([*words, "A30", "--gpus=4", "--admission=sums"]) == 0
    assert all(file.read() == before[file.name] for file in old), "who is reading goes on with what there was"
    assert "A30" in (tmp_path / "rms_table.lua").read_text()
    assert (tmp_path / "epilog").is_symlink() and os.access(tmp_path / "epilog", os.X_OK), "a site's own link stays"
    for name in before:
        assert os.access(name, os.X_OK) == (Path(name).name in (*site.HOOKS.values(), site.HEALTH_CHECK))


@pytest.mark.parametrize(
    "words",
    ["show --json", "slurm-config --model A30 --gpus 4 --nodes n1", "--version", "--help"],
)
def test_an_answer_that_finds_no_room_on_its_disk(busy: Node, words: str) -> None:
    shown = unheard(busy, sys.executable, "-m", "rms.cli", *words.split())
    assert (shown.returncode, shown.stderr.splitlines()[-1:]) == (1, [UNHEARD]), shown.stderr
    assert all("Exception ignored" not in line and "Errno" not in line for line in shown.stderr.splitlines())


def test_an_answer_of_the_controller_that_finds_no_room_on_its_disk(busy: Node) -> None:
    for arguments in ((*ACQUIRE, "--request=1g"), ("release", "--job=9", "--restart=0", "--json")):
        shown = unheard(busy, *busy.command(*arguments))
        assert (shown.returncode, shown.stderr.splitlines()) == (1, [UNHEARD])
    assert busy.marker(2).exists(), "the grant stands"
    shown = unheard(busy, *busy.command(), text="acquire alice 3g\n")
    assert (shown.returncode, shown.stderr.splitlines()) == (1, [UNHEARD])


UNHEARD = "rms: cannot write to standard output: No space left on device"


def unheard(node: Node, *command: str, text: str = "") -> subprocess.CompletedProcess[str]:
    with open("/dev/full", "w") as full:
        return subprocess.run(
            command, env=node.environment(), input=text, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )


def test_faults_as_a_process_of_its_own(busy: Node) -> None:
    """The same by a real process: nothing of Python's own reaches the user."""
    bad = [
        (USER, (*ACQUIRE, "--request=9g")),
        (USER, (*ACQUIRE, "--request=\x1b[31m\n")),
        (NO_ROOM, (*ACQUIRE, "--request=7g:2")),
        (USAGE, (*ACQUIRE,)),
        (USAGE, (*ACQUIRE, "--request=1g", "--uid=\udcff")),
    ]
    for code, arguments in bad:
        shown = busy.cli(*arguments)
        one_line(shown.stderr)
        assert (shown.returncode, shown.stdout) == (code, "")
    busy.toml.write_text("gpus = 1")
    shown = busy.cli(*RELEASE)
    assert shown.returncode == NODE
    one_line(shown.stderr)
    shown = subprocess.run(
        busy.command(*RELEASE), env={"RMS_CONFIG": "/nonexistent/\n"}, capture_output=True, text=True, check=False
    )
    assert shown.returncode == NODE
    one_line(shown.stderr)


def test_a_bug_of_ours_is_one_line_too(busy: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("a\nb")

    monkeypatch.setattr(local.Controller, "release", broken)
    code, out, err = called(busy, *RELEASE)
    assert (code, out, err) == (1, "", "rms: internal error: ZeroDivisionError: a\\nb\n")
    code, out, err = called(busy, *RELEASE, "--json")
    assert (code, json.loads(out)["error"], err) == (1, "internal error: ZeroDivisionError: a\nb", "")


# Anything at all.


@settings(max_examples=400)
@example("3g.40gb:1,1g.10gb:2")
@given(st.one_of(st.text(), st.from_regex(r"(mig:)?[1-7]g(\.\d+gb)?(:\d+)?(,(mig:)?[1-7]g(:\d+)?)*", fullmatch=True)))
def test_any_text_is_a_request_or_the_user_s_fault(spec: str) -> None:
    for model in ("A100-80GB", "RTX-PRO-6000"):
        known = geometry.load(model)
        try:
            request = parse(spec, known)
        except RequestError as error:
            assert str(error).isprintable()
            assert len(str(error)) < 400
        else:
            assert parse(str(request), known) == request
            assert all(count > 0 for count in request.counts)
            assert len(dict(request.items)) == len(request.items)


@settings(max_examples=400)
@example("rms1:3g.40gb:1;s=1;l=0;mine")
@example("rms1:;s=1;l=0;")
@example("rms1:3g;s=x;l=0;")
@example("rms1:3g;s=1;l=0")
@example("rms1:")
@example("rms1")
@example("RMS1:3g;s=1;l=0;")
@example("rms1:" + "x" * 10_000)
@example("rms1:3g;s=" + "1" * 10_000 + ";l=0;")
@example("rms1:3g;s=\uff11;l=0;")
@given(st.one_of(st.text(), st.text().map(lambda t: COMMENT_TAG + t), st.text().map(lambda t: f"rms1:3g;s=1;l=2;{t}")))
def test_any_text_is_a_comment_or_the_user_s_fault(comment: str) -> None:
    try:
        ticket = parse_comment(comment)
    except RequestError as error:
        assert comment.startswith(COMMENT_TAG)
        assert str(error).isprintable()
        assert len(str(error)) < 600
    else:
        assert (ticket is None) == (not comment.startswith(COMMENT_TAG))
        if ticket:
            assert comment.startswith(f"rms1:{ticket.request};s=")
            assert ticket.submit >= 0
            assert ticket.limit is None or ticket.limit > 0
            assert len(ticket.request) <= MAX_BYTES


@given(st.text(max_size=200))
def test_printable_is(text: str) -> None:
    shown = printable(text)
    assert shown.isprintable() and shown.isascii()
    assert printable(shown, 600) == shown


WORDS = st.one_of(
    st.sampled_from(
        [
            "acquire",
            "release",
            "--job=3",
            "--restart=0",
            "--uid=1",
            "--request=1g",
            "--json",
            "--request=3g:0",
            "--limit=5",
        ]
    ),
    st.text(max_size=12).filter(lambda t: not t.startswith(("-h", "--h")) and "\x00" not in t),
)


@settings(max_examples=150)
@given(st.lists(WORDS, min_size=1, max_size=7))
def test_any_command_line(tmp_path_factory: pytest.TempPathFactory, words: list[str]) -> None:
    if not {"acquire", "release"} & set(words):
        words = ["acquire", *words]  # without a verb it is the loop, which reads standard input
    root = tmp_path_factory.getbasetemp() / "any-command-line"
    node = Node(root) if not root.exists() else ANY[0]
    ANY[:] = [node]
    if not (root / "state" / "state.json").exists():
        node.acquire(1, "3g")
    code, out, err = called(node, *words)
    assert code in (0, USAGE, USER, NO_ROOM, CLOSED)
    if code and "--json" not in words:
        one_line(err)
        assert out == ""


@pytest.mark.parametrize("name", ["²", "٣", "-1", "7 ", "x"])
def test_a_file_among_the_grants_that_is_of_no_job(busy: Node, name: str) -> None:
    stray = busy.marker(1).with_name(name)
    stray.write_text("granted 0 1000 cluster 1g.10gb:1\nMIG-1\n")
    os.utime(stray, (0, 0))
    for path in (busy.root / "state").glob("state.json*"):
        path.unlink()
    assert called(busy, *ACQUIRE, "--request=7g:2")[0] == NO_ROOM, (
        "rebuilt from the grants, and those too old are swept"
    )
    assert not stray.exists()
    assert busy.state().of_run(Run("cluster", 1, 0))


ANY: list[Node] = []


@settings(max_examples=200)
@given(st.binary(max_size=200))
def test_any_marker(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    root = tmp_path_factory.getbasetemp() / "any-marker"
    (root / "jobs").mkdir(parents=True, exist_ok=True)
    root.chmod(0o755)
    (root / "jobs").chmod(0o755)
    (root / "jobs" / "5").write_bytes(data)
    grant.read(str(root), 5)
    assert all(isinstance(found, grant.Grant) for found in grant.granted(str(root)).values())
    grant.write(str(root), Run("c", 5, 10**9), grant.Grant("refused", 10**9))
    grant.remove(str(root), Run("c", 5, 10**9))
    grant.sweep(str(root))
