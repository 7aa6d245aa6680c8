"""The state file and its locks: what is damaged is recovered loudly, what is full or stuck is said by name."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Node, needs_root, run
from hypothesis import given, settings
from hypothesis import strategies as st

from rms import inventory, store
from rms.errors import LockTimeoutError, NodeError
from rms.inventory import State
from rms.store import Damaged, Store

BACKENDS = ["simulated", "nvml"]


def opened(directory: Path, deadline: float = 10) -> Store:
    return Store(str(directory), time.monotonic() + deadline)


def written(directory: Path, *boot_ids: str) -> Store:
    """A store with some generations."""
    for boot_id in boot_ids:
        it = opened(directory)
        with it.open("test") as state:
            state.boot_id = boot_id
            it.save(state)
    return opened(directory)


def content(node: Node) -> dict[str, Any]:
    """The inventory, without what recovery may number or date anew."""
    state = node.state()
    return {
        str(a.run): (a.uid, a.request, [(g.uuid, i.placement, i.gi, i.ci, i.uuid, i.status) for g, i in state.held(a)])
        for a in state.allocations
    }


# The file.


def test_starts_empty_and_makes_no_file(fast_dir: Path) -> None:
    with opened(fast_dir).open("test") as state:
        assert state == State()
    assert sorted(p.name for p in fast_dir.iterdir()) == ["state.lock"]


def test_keeps_one_generation_before(fast_dir: Path) -> None:
    it = written(fast_dir, "a", "b", "c")
    with it.open("test") as state:
        assert state.boot_id == "c"
    shutil.copy(fast_dir / "state.json.previous", fast_dir / "state.json")
    with it.open("test") as state:
        assert state.boot_id == "b"


def test_files_are_root_s_alone(node: Node) -> None:
    before = os.umask(0)
    try:
        node.acquire(1, "3g")
        node.release(1)
    finally:
        os.umask(before)
    files = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (node.root / "state").iterdir()}
    assert {"state.json", "state.json.previous", "state.lock"} < set(files)
    assert set(files.values()) == {0o600}, files


@pytest.mark.parametrize("what", ["open to all", "to its group", "another user's"])
def test_a_state_directory_that_others_can_write_to(node: Node, what: str) -> None:
    node.acquire(1, "3g")
    directory = node.root / "state"
    if what == "another user's":
        os.chown(directory, 65534, -1)
    else:
        directory.chmod(0o757 if what == "open to all" else 0o775)
    with pytest.raises(NodeError, match="must be root's own, for nobody else to write"):
        node.acquire(2, "1g")
    os.chown(directory, os.geteuid(), -1)
    directory.chmod(0o700)
    node.acquire(2, "1g")
    node.check()


def test_nothing_is_written_when_nothing_changed(fast_dir: Path) -> None:
    it = written(fast_dir, "a", "b")
    before = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in fast_dir.glob("state.json*")}
    with it.open("test") as state:
        it.save(state)
    assert before == {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in fast_dir.glob("state.json*")}


def test_an_exception_keeps_the_old_state(fast_dir: Path) -> None:
    it = written(fast_dir, "a")
    with pytest.raises(ZeroDivisionError), it.open("test") as state:
        state.boot_id = "b"
        raise ZeroDivisionError
    with it.open("test") as state:
        assert state.boot_id == "a"


def test_a_left_over_temporary_file_is_no_matter(fast_dir: Path) -> None:
    it = written(fast_dir, "a", "b")
    for name in ("state.json.new", "state.json.previous.new"):
        (fast_dir / name).write_text("left by a killed process" * 1000)
    written(fast_dir, "c", "d")
    with it.open("test") as state:
        assert state.boot_id == "d"
    assert not (fast_dir / "state.json.new").exists()


def test_a_planted_link_is_not_followed(fast_dir: Path) -> None:
    it = written(fast_dir, "a")
    victim = fast_dir / "victim"
    victim.write_text("mine")
    (fast_dir / "state.json.new").symlink_to(victim)
    with pytest.raises(NodeError, match=r"state\.json"), it.open("test") as state:
        state.boot_id = "b"
        it.save(state)
    assert victim.read_text() == "mine"


def test_what_is_read_is_what_was_written(node: Node) -> None:
    node.acquire(1, "3g,1g:2", limit=5)
    node.acquire(2, "2g")
    node.release(2)
    state = node.state()
    again = inventory.from_json(json.loads(inventory.to_json(state)))
    assert inventory.to_json(again) == inventory.to_json(state)
    again.geometries = state.geometries  # a geometry is compared by what it says, above
    assert again == state
    # A list where a tuple was would not compare equal, and would not hash.
    assert isinstance(state.allocations[0].run, inventory.Run)
    assert isinstance(state.gpus[0].instances[0].placement.start, int)


# Locks.

HOLD = """
import os, sys, time
from rms.store import Store
it = Store(sys.argv[1], time.monotonic() + 10)
with (it.open("stuck") if sys.argv[2] == "state" else it.hardware([sys.argv[2]], "stuck")):
    print(os.getpid(), flush=True)
    time.sleep(100)
"""


@contextmanager
def holding(directory: Path, what: str) -> Iterator[int]:
    """Another process that holds a lock and is stuck."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory), what], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@pytest.mark.timed
def test_a_stuck_holder_is_named_and_its_end_frees_the_lock(fast_dir: Path) -> None:
    written(fast_dir, "a")
    with holding(fast_dir, "state") as pid:
        began = time.monotonic()
        with pytest.raises(LockTimeoutError, match=rf"state\.lock is held by pid {pid} \(stuck\)"):
            opened(fast_dir, 0.3).open("test").__enter__()
        assert 0.25 < time.monotonic() - began < 2
        os.kill(pid, signal.SIGKILL)
        with opened(fast_dir).open("test") as state:
            assert state.boot_id == "a"


def test_a_gpu_that_is_stuck_stops_only_its_own(node: Node) -> None:
    node.acquire(1, "7g")
    node.acquire(2, "7g")
    node.release(1)
    node.release(2)
    first, second = (gpu.uuid for gpu in node.state().gpus)
    node.configure(deadline_seconds=0.5)
    with (
        holding(node.root / "state", first) as pid,
        pytest.raises(LockTimeoutError, match=rf"{first}\.lock is held by pid {pid}"),
    ):
        node.acquire(3, "7g")
    # What that call had reserved is given back by the next one.
    assert node.acquire(4, "7g:2")[1].gpu == second
    node.check()


def test_no_deadline_is_left(fast_dir: Path) -> None:
    written(fast_dir, "a")
    with opened(fast_dir, -5).open("test") as state:
        assert state.boot_id == "a"


INCREMENT = """
import sys, time
from rms.store import Store
for _ in range(25):
    it = Store(sys.argv[1], time.monotonic() + 30)
    with it.open("count") as state:
        state.counter += 1
        it.save(state)
"""


def test_writers_do_not_lose_each_other_s_changes(fast_dir: Path) -> None:
    command = [sys.executable, "-c", INCREMENT, str(fast_dir)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in processes] == [0] * 4
    with opened(fast_dir).open("test") as state:
        assert state.counter == 100


# A directory that can't be used, a disk that is full.


@pytest.mark.parametrize("place", ["file", "proc", "loop of links"])
def test_a_state_directory_that_cannot_be_used(node: Node, place: str) -> None:
    directory = node.root / "elsewhere"
    match place:
        case "file":
            directory.write_text("")
        case "proc":
            directory = Path("/proc/rms")
        case "loop of links":
            directory.symlink_to(directory)
    node.configure(state_dir=str(directory), deadline_seconds=1)
    with pytest.raises(NodeError, match=str(directory)):
        node.acquire(1, "3g")
    with pytest.raises(NodeError, match=str(directory)):
        node.release(1)


@needs_root
def test_a_state_directory_of_another_user(node: Node) -> None:
    node.acquire(1, "3g")
    node.root.chmod(0o755)
    node.root.parent.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            os.setresuid(65534, 65534, 65534)
            node.release(1)
        except NodeError as error:
            code = 6 if "state" in str(error) else 98
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 6
    node.check()


@contextmanager
def small_disk(node: Node) -> Iterator[Callable[[], None]]:
    """The state directory on a disk of 256 kB; gives what fills it. Where nothing can be mounted: a limit to writes."""
    directory = node.root / "state"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "rms-test", str(directory)],
        capture_output=True,
        check=False,
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill() -> None:
        if mounted.returncode:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
            return
        with suppress_full(), (directory / "ballast").open("wb", buffering=0) as file:
            while file.write(b"x" * 512):
                pass

    try:
        yield fill
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
        if not mounted.returncode:
            subprocess.run(["umount", "--lazy", str(directory)], check=True)


@contextmanager
def suppress_full() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        assert error.errno == errno.ENOSPC


def test_a_full_disk(node: Node) -> None:
    with small_disk(node) as fill:
        node.acquire(1, "3g")
        before = content(node)
        fill()
        if (node.root / "state" / "ballast").exists():
            for call in (lambda: node.acquire(2, "2g"), lambda: node.release(1), lambda: node.acquire(3, "1g")):
                with pytest.raises(NodeError, match=r"cannot write .*state\.json: No space left"):
                    call()
            assert content(node) == before
            os.unlink(node.root / "state" / "ballast")
        else:
            with pytest.raises(NodeError, match=r"cannot write .*state\.json"):
                node.acquire(2, "2g")
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        # Room again: the release had perhaps begun, perhaps not; nothing of it is in the way.
        node.acquire(2, "2g")
        node.check(1)
        node.release(1)
        node.check()
        node.check_empties()


CALLS = ("open", "write", "fsync", "rename", "link")


@pytest.mark.parametrize("verb", ["acquire", "release"])
@pytest.mark.parametrize("call", CALLS)
def test_any_call_to_the_disk_may_fail(node: Node, monkeypatch: pytest.MonkeyPatch, verb: str, call: str) -> None:
    """Not a kill but an error, at each place in turn: an answer by name, or the work done all the same."""
    node.acquire(1, "1g")
    left = [0]
    real = getattr(os, call)

    def failing(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, failing)
    failures = 0
    for step in range(1, 200):
        job = 1000 + step
        if verb == "release":
            node.acquire(job, "2g,1g")
        left[0] = step
        try:
            node.acquire(job, "2g,1g") if verb == "acquire" else node.release(job)
        except (NodeError, OSError) as error:  # the simulated GPUs' own file fails as the disk does, which no GPU would
            assert "No space left" in str(error)
            failures += 1
        reached = left[0] <= 0
        left[0] = 0
        node.release(job)
        node.acquire(job + 1000, "4g")
        node.release(job + 1000)
        node.check()
        if not reached:
            break
    assert failures > 0
    node.check_empties()


# Damage.


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def wrong_sum(path: Path) -> None:
    head, rest = path.read_bytes().split(b",", 1)
    path.write_bytes(head[:-1] + bytes([head[-1] ^ 1]) + b"," + rest)


def missing(path: Path) -> None:
    path.unlink()


def zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def text(path: Path) -> None:
    path.write_text("hello\n")


def other_json(path: Path) -> None:
    body = '["not", "a", "state"]'
    path.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')


def half_a_state(path: Path) -> None:
    body = json.dumps({"schema": 1, "boot_id": "first boot"})
    path.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')


DAMAGE = {f.__name__: f for f in (cut, flip, empty, wrong_sum, missing, zeros, text, other_json, half_a_state)}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("last", ["acquire", "release", "refuse"])
def test_running_jobs_keep_what_they_have(node: Node, damage: str, both: bool, last: str) -> None:
    node.acquire(1, "3g,1g:2")
    node.acquire(2, "2g")
    node.acquire(3, "1g")
    if last == "release":
        node.release(3)
    elif last == "refuse":
        with pytest.raises(Exception, match="no room"):
            node.acquire(4, "7g:1,1g.20gb:2")
    before = content(node)
    DAMAGE[damage](node.root / "state" / "state.json")
    if both:
        DAMAGE[damage](node.root / "state" / "state.json.previous")
    node.log.clear()
    node.acquire(5, "1g")
    loud = [line for line in node.log if "rebuilt" in line]
    assert len(loud) == 1, "a recovery must be reported once"
    assert "state.json" in loud[0] or (both and damage == "missing")
    assert any(e["event"] == "warning" and "rebuilt" in e["text"] for e in node.audit())
    after = content(node)
    del after["5.0"]
    assert after == before
    node.check()
    assert node.acquire(1, "3g,1g:2") == node.acquire(1, "3g,1g:2")
    node.check_empties()


def test_an_idle_instance_is_idle_again_and_a_held_one_is_not(node: Node) -> None:
    (one,) = node.acquire(1, "3g")
    (two,) = node.acquire(2, "2g")
    node.release(1)
    node.release(2)
    cut(node.root / "state" / "state.json")
    cut(node.root / "state" / "state.json.previous")
    with subprocess.Popen(["sleep", "60"]) as holder:
        node.device().hold(one.uuid, holder.pid)
        try:
            assert node.acquire(3, "2g") == [two]
            assert sorted(node.statuses().values()) == ["busy", "quarantined"]
            assert node.acquire(4, "3g")[0].uuid != one.uuid
        finally:
            holder.kill()
    node.check_empties()


def test_a_recovery_and_a_reboot_at_once(node: Node) -> None:
    node.acquire(1, "3g")
    node.boot("second boot")
    cut(node.root / "state" / "state.json")
    node.acquire(2, "7g")
    node.acquire(3, "7g")
    node.check()
    assert list(content(node)) == ["2.0", "3.0"]


def test_grants_from_before_a_reboot_rob_nobody(node: Node) -> None:
    """A run_dir that survives a reboot: the UUIDs of its stale grants come back for other jobs."""
    node.acquire(1, "7g")
    kept = node.marker(1).read_text()
    node.boot("second boot")
    node.marker(1).parent.mkdir(parents=True)
    node.marker(1).write_text(kept)
    cut(node.root / "state" / "state.json")
    (granted,) = node.acquire(2, "7g")
    assert granted.uuid in kept
    cut(node.root / "state" / "state.json")
    cut(node.root / "state" / "state.json.previous")
    node.acquire(3, "1g")
    assert set(content(node)) == {"2.0", "3.0"}
    node.check()


def test_a_grant_of_what_is_nowhere_protects_nothing(node: Node) -> None:
    (one,) = node.acquire(1, "3g")
    node.vanish(one.number)
    for name in ("state.json", "state.json.previous"):
        cut(node.root / "state" / name)
    node.reconcile()
    assert node.state().allocations == [] and not node.marker(1).exists()
    node.check_empties()


def test_two_grants_of_one_instance_are_not_both_believed(node: Node) -> None:
    node.acquire(1, "7g")
    forged = node.marker(1).read_text()
    node.marker(7).write_text(forged)
    for name in ("state.json", "state.json.previous"):
        cut(node.root / "state" / name)
    node.acquire(2, "1g")
    node.check()


@pytest.mark.parametrize("text", ["", "granted\n", "granted x 1 c 3g:1\n", "\xff", "granted 0 1\nMIG-1\n", "none 0\n"])
def test_markers_that_make_no_sense_do_not_stop_a_recovery(node: Node, text: str) -> None:
    node.acquire(1, "3g")
    before = content(node)
    node.marker(50).write_bytes(text.encode("latin-1"))
    node.marker(51).mkdir()
    (node.marker(1).parent / "not a job").write_text("granted 0 1 c 3g:1\nMIG-1\n")
    cut(node.root / "state" / "state.json")
    cut(node.root / "state" / "state.json.previous")
    node.acquire(2, "1g")
    assert before.items() < content(node).items()


@settings(max_examples=300)
@given(st.data())
def test_no_flipped_bit_or_cut_is_ever_believed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.mkdir(exist_ok=True)
    state = State(
        boot_id="b", managed=[0, "GPU-1"], counter=12, closed={5: (0, 1.5)}, recent=[(1.0, "3g.40gb:1", None)]
    )
    it = opened(path)
    for name in ("state.json", "state.json.previous"):
        (path / name).unlink(missing_ok=True)
    it.save(state)
    raw = bytearray((path / "state.json").read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del raw[position:]
    (path / "state.json").write_bytes(raw)
    with pytest.raises(Damaged) as caught:
        it.glance()
    assert caught.value.state is None


def newer(path: Path) -> bytes:
    """A state that a newer RMS wrote."""
    state = json.loads(path.read_text())["state"] | {"schema": inventory.SCHEMA + 1, "something": "new"}
    body = json.dumps(state)
    path.write_text(f'{{"crc32":{zlib.crc32(body.encode())},"state":{body}}}\n')
    return path.read_bytes()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_newer_state_is_refused_by_name_and_not_touched(node: Node, damaged: bool) -> None:
    node.acquire(1, "3g")
    path = node.root / "state" / ("state.json.previous" if damaged else "state.json")
    if damaged:
        cut(node.root / "state" / "state.json")
    kept = newer(path)
    others = {p: p.read_bytes() for p in (node.root / "state").iterdir()}
    wanted = rf"{path} has schema {inventory.SCHEMA + 1}, this RMS knows {inventory.SCHEMA}"
    for call in (lambda: node.acquire(2, "1g"), lambda: node.release(1)):
        with pytest.raises(NodeError, match=wanted):
            call()
    assert path.read_bytes() == kept
    assert {
        p: p.read_bytes() for p in (node.root / "state").iterdir() if "lock" not in p.name
    }.items() <= others.items()
    shown = node.cli("acquire", "--job", "2", "--restart", "0", "--uid", "0", "--request", "1g")
    assert shown.returncode == 6
    assert f"schema {inventory.SCHEMA + 1}" in shown.stderr


def test_two_recover_at_once(node: Node) -> None:
    node.acquire(1, "3g")
    before = content(node)
    for _ in range(3):
        for name in ("state.json", "state.json.previous"):
            cut(node.root / "state" / name)
        jobs = [str(100 + n) for n in range(4)]
        calls = [node.start("acquire", "--job", j, "--restart", "0", "--uid", "1", "--request", "1g") for j in jobs]
        answers = [call.communicate(timeout=60) for call in calls]
        assert [call.returncode for call in calls] == [0] * 4, answers
        assert sum("rebuilt" in errors for _, errors in answers) == 1
        assert before.items() < content(node).items()
        for job in jobs:
            node.release(int(job), 0)
        for job in jobs:
            node.marker(int(job)).unlink(missing_ok=True)
        state = node.state()
        state.closed.clear()
        it = Store(node.config.state_dir, time.monotonic() + 5)
        it.save(state)


def test_the_state_is_lost_between_deciding_and_doing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process recovers, and plans with slices that this one had reserved: this one must not use them."""
    node.configure(gpus=[0])
    node.acquire(1, "3g:2")
    node.release(1)
    real = store.Store.hardware
    done = []

    @contextmanager
    def late(self: Store, gpus: Any, what: str) -> Iterator[None]:
        if what == "run 3.0" and not done:
            done.append(node.state().counter)
            for name in ("state.json", "state.json.previous"):
                cut(node.root / "state" / name)
            node.acquire(4, "3g:2")  # reuses the instances that run 3 has meant to destroy
        with real(self, gpus, what):
            yield

    monkeypatch.setattr(store.Store, "hardware", late)
    with pytest.raises(Exception, match="no room"):
        node.acquire(3, "7g")
    (given,) = done
    assert all(i.generation > given for gpu in node.state().gpus for i in gpu.instances), "a number is given once"
    monkeypatch.undo()
    node.check()
    node.check_empties()


def test_the_state_is_lost_while_a_run_is_released(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.acquire(1, "3g")
    node.acquire(2, "3g")
    real = store.Store.hardware
    done = []

    @contextmanager
    def late(self: Store, gpus: Any, what: str) -> Iterator[None]:
        with real(self, gpus, what):
            yield
        if what == "release" and not done:
            done.append(what)
            for name in ("state.json", "state.json.previous"):
                cut(node.root / "state" / name)
            node.acquire(4, "1g")

    monkeypatch.setattr(store.Store, "hardware", late)
    node.release(1)
    assert done
    monkeypatch.undo()
    node.check()
    assert set(content(node)) == {"2.0", "4.0"}
    assert node.state().of_run(run(1)) is None
    node.check_empties()
