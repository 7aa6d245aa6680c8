"""The original tool's loop, as its README describes it: `python controller.py`, asked through its standard input.

What the original did wrong, thirteen things, has a test each (`test_bug_...`).
"""

from __future__ import annotations

import io
import os
import random
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import controller
from rms import loop, planner
from rms.errors import NoRoomError, RequestError
from rms.geometry import Placement, load
from rms.planner import Asked, Candidate, Choice, Choose, View

ROOT = Path(__file__).parents[1]
A100 = load(loop.MODEL)
SPECS = ["1g", "2g", "3g", "4g", "7g"]


def ask(*lines: str | bytes, arguments: Sequence[str] = (), **environment: str) -> list[str]:
    """The answers of a fresh process to some lines, after which its input ends. It must say nothing else and exit 0."""
    told = b"".join(
        line.encode() if isinstance(line, str) else line
        for line in (f"{x}\n" if isinstance(x, str) else x for x in lines)
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "controller.py"), *arguments],
        input=told,
        capture_output=True,
        timeout=60,
        check=False,
        env={"PATH": "/usr/bin:/bin", **environment},
    )
    assert (done.stderr, done.returncode) == (b"", 0)
    answers = done.stdout.decode("ascii").splitlines()
    assert all(line.isprintable() for line in answers)
    return answers


def split(answer: str) -> tuple[int, int]:
    gpu, config = answer.split(" ")
    return int(gpu), int(config)


def compute(config: int) -> list[int]:
    """The compute slices of the instances of a numbered layout, sorted."""
    return sorted(A100.by_name[p.profile].compute for p in A100.config(config))


# What its README says.


def test_readme_example() -> None:
    assert ask("acquire user-1 3g") == ["0 5"]


def test_answers_have_exactly_the_form() -> None:
    answers = ask(*(f"acquire user-{i} {spec}" for i, spec in enumerate(SPECS)))
    assert len(answers) == 5
    for answer in answers:
        gpu, config = split(answer)
        assert answer == f"{gpu} {config}" and gpu >= 0 and 1 <= config <= 19


def test_release_prints_nothing_and_gives_the_instance_back() -> None:
    lines = ["acquire a 7g", "release a", "acquire b 7g", "release b", "acquire a 3g"]
    assert ask(*lines, arguments=["--gpus", "1"]) == ["0 1", "0 1", "0 5"]


def test_one_instance_a_user() -> None:
    answers = ask("acquire a 3g", "acquire a 1g", "release a", "acquire a 1g")
    assert answers[1] == "error: a has an instance already; release it first"
    assert answers[2].startswith("0 ")


def test_gpus_are_provisioned_one_by_one_up_to_the_limit() -> None:
    lines = [f"acquire u{i} 7g" for i in range(4)]
    assert ask(*lines) == ["0 1", "1 1", "2 1", "3 1"]
    assert ask(*lines, arguments=["--gpus", "3"]) == ["0 1", "1 1", "2 1", "error: no room for 7g.80gb on 3 GPU(s)"]
    assert ask("acquire a 1g", arguments=["--gpus", "0"]) == ["error: no room for 1g.10gb on 0 GPU(s)"]


@pytest.mark.parametrize("number", ["-1", "x", "1.5", "", "9" * 30])
def test_a_limit_that_is_none_is_refused(number: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "controller.py"), "--gpus", number],
        input="acquire a 1g\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "") and "--gpus" in done.stderr


def test_any_end_of_input_is_the_end() -> None:
    assert ask() == []
    assert ask("") == []
    assert ask(b"acquire a 3g") == ["0 5"], "a last line without its line feed"
    assert ask(b"acquire a 3g\nrele") == [
        "0 5",
        "error: cannot read 'rele'; write: acquire USER SPEC, or: release USER",
    ]


NAMES = [
    b"user-1",
    b"alice",
    b"a-1",
    b"b-1",
    b"-",
    b"--gpus",
    b"0",
    b"acquire",
    b"release",
    b"3g",
    b"error:",
    b"a\tb",
    "björn".encode(),
    "bjo\u0308rn".encode(),
    "no\u00a0break".encode(),
    "line\u2028separator".encode(),
    "wide\u3000space".encode(),
    "\u202eright to left".replace(" ", "").encode(),
    "名前".encode(),
    b"latin-\xe9",
    b"\xff\xfe",
    b"\xed\xb3\xbf",  # a surrogate, encoded
    b"\xff",
    b"\x00",
    b"a\x00b",
    b"\x1b[31mred",
    b"\x0c",
    b"\x1c",
    b"\x85",
    b"a\rb",
    b"'; drop table",
    b"x" * 10_000,
]


def test_any_name_without_spaces_is_a_user_of_its_own() -> None:
    names = [name.replace(b" ", b"") for name in NAMES]
    assert len(set(names)) == len(names)
    everyone = [b"acquire " + name + b" 7g\n" for name in names]
    assert ask(*everyone) == [f"{gpu} 1" for gpu in range(len(names))]
    again = ask(*everyone, *everyone)[len(names) :]
    assert all(answer.endswith(" has an instance already; release it first") for answer in again)
    assert (
        ask(*everyone, *(b"release " + name + b"\n" for name in names), *everyone)
        == [f"{gpu} 1" for gpu in range(len(names))] * 2
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_any_terminal_can_show_the_answers(encoding: str) -> None:
    lines = ["acquire a é", "release björn", "acquire a 3g"]
    assert ask(*lines, PYTHONIOENCODING=encoding, LC_ALL="C")[-1] == "0 5"


BAD = [
    "foo",
    "foo user-1",
    "acquire",
    "acquire a",
    "acquire a 3g 1",
    "release",
    "release a b",
    "ACQUIRE a 3g",
    "acquire a 5g",
    "acquire a 3",
    "acquire a g3",
    "acquire a 3g:1",
    "acquire a 3g:2",
    "acquire a 3g,1g",
    "acquire a 1g.20gb",
    "acquire a 1g+me",
    "acquire a 3g.20gb",
    "acquire a \x1b[31m",
    "acquire a " + "3" * 10_000,
    "x" * 10_000,
    "release nobody",
    "release \x1b[2J",
    "\x00",
    "\t",
]


def test_bad_lines_get_one_line_each_and_the_loop_goes_on() -> None:
    answers = ask("acquire first 3g", *BAD, "acquire last 3g")
    assert (answers[0], answers[-1]) == ("0 5", "0 5")
    assert len(answers) == len(BAD) + 2
    for line, answer in zip(BAD, answers[1:-1], strict=True):
        assert answer.startswith("error: ") and len(answer) < 400, line[:40]


def test_blank_lines_and_other_line_ends_are_harmless() -> None:
    assert ask("", "   ", b"\r\n", b"acquire a 3g\r\n", "  acquire   b   3g  ", b"release a\r\n", "acquire a 3g") == [
        "0 5",
        "0 5",
        "0 5",
    ]


def test_answers_come_line_by_line() -> None:
    with subprocess.Popen(
        [sys.executable, str(ROOT / "controller.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin and process.stdout
        for user in range(3):
            process.stdin.write(b"acquire u%d 7g\n" % user)
            process.stdin.flush()
            assert process.stdout.readline() == b"%d 1\n" % user
        process.stdin.close()
        assert process.wait(60) == 0


def test_a_reader_that_leaves_and_ctrl_c_are_no_crash() -> None:
    for end in ("reader", "ctrl-c"):
        with subprocess.Popen(
            [sys.executable, str(ROOT / "controller.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as process:
            assert process.stdin and process.stdout and process.stderr
            process.stdin.write(b"acquire a 3g\n")
            process.stdin.flush()
            assert process.stdout.readline() == b"0 5\n"
            if end == "reader":
                process.stdout.close()
                process.stdin.write(b"acquire b 3g\n")
                process.stdin.close()
            else:
                process.send_signal(signal.SIGINT)
            assert process.wait(60) == {"reader": 141, "ctrl-c": 130}[end]
            assert process.stderr.read() == b""


def test_the_nodes_state_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "rms.toml").write_text("this is no configuration")
    assert ask("acquire a 3g", RMS_CONFIG=str(tmp_path / "rms.toml")) == ["0 5"]
    assert os.listdir(tmp_path) == ["rms.toml"]


# The thirteen things that the original does wrong.


def test_bug_1_it_starts_at_all() -> None:
    assert ask("acquire user-1 3g") != []


def test_bug_2_it_needs_nothing_that_is_not_in_the_core_install() -> None:
    program = f"""
import sys
class Only:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top not in sys.stdlib_module_names and top not in ("rms", "policy", "controller", "filelock"):
            raise ImportError(f"{{name}} is not in the core install")
sys.meta_path.insert(0, Only())
sys.path.insert(0, {str(ROOT)!r})
import controller
sys.exit(controller.main([]))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], input="acquire a 3g\n", capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout, done.stderr, done.returncode) == ("0 5\n", "", 0)


def test_bug_3_the_readmes_answer_is_the_answer_every_time() -> None:
    assert {tuple(ask("acquire user-1 3g", PYTHONHASHSEED=str(seed))) for seed in range(4)} == {("0 5",)}
    lines = [f"acquire user-{i} {spec}" for i, spec in enumerate(random.Random(1).choices(SPECS, k=60))]
    assert ask(*lines, PYTHONHASHSEED="1") == ask(*lines, PYTHONHASHSEED="2")


def test_bug_4_the_layouts_are_not_used_up() -> None:
    cycle = ["acquire a 3g", "acquire b 3g", "release a", "release b"]
    assert ask(*cycle * 200) == ["0 5", "0 5"] * 200


def test_bug_5_many_users_of_one_size() -> None:
    assert ask(*(f"acquire user-{i} 7g" for i in range(1, 51))) == [f"{gpu} 1" for gpu in range(50)]
    assert ask(*(f"acquire user-{i} 3g" for i in range(1, 27))) == [f"{gpu // 2} 5" for gpu in range(26)]


def test_bug_6_the_first_user_of_a_new_gpu_is_known() -> None:
    assert ask("acquire user-1 3g", "acquire user-1 3g")[1].startswith("error: user-1 has an instance already")
    lines = ["acquire user-1 7g", "release user-1", "acquire user-2 7g"]
    assert ask(*lines) == ["0 1", "0 1"], "what was released is free again"


def test_bug_7_nothing_is_freed_twice() -> None:
    lines = [
        "acquire user-1 4g",
        "acquire user-2 3g",
        "release user-2",
        "release user-2",
        "acquire a 3g",
        "acquire b 3g",
    ]
    answers = ask(*lines)
    assert answers[2] == "error: user-2 has no instance"
    assert [split(answers[i])[0] for i in (0, 1, 3, 4)] == [0, 0, 0, 1], "one 3g was free on the first GPU, not two"


def test_bug_8_any_name_is_a_user() -> None:
    assert ask("acquire alice 3g", "acquire a-1 3g", "acquire b-1 3g", "release a-1", "acquire c-1 3g") == [
        "0 5",
        "0 5",
        "1 5",
        "0 5",
    ]


def test_bug_9_unknown_sizes_words_and_the_end_of_input() -> None:
    answers = ask("acquire user-1 3g", "acquire user-2 5g", "foo user-1", b"acquire user-1 3g")
    assert answers[1].startswith("error: unknown profile '5g'; A100-80GB has: ")
    assert answers[2].startswith("error: cannot read 'foo user-1'")
    assert answers[3].startswith("error: user-1 has an instance already"), "an unknown word releases nothing"


def test_bug_10_more_than_eighty_gpus() -> None:
    assert ask(*(f"acquire u{i} 7g" for i in range(400))) == [f"{gpu} 1" for gpu in range(400)]


def test_bug_11_no_gpu_is_laid_out_anew_under_a_user() -> None:
    sizes = [1, 7, 4, 3]
    placed = [split(answer) for answer in ask(*(f"acquire user-{size} {size}g" for size in sizes))]
    assert placed[1][0] != placed[0][0], "a 7g takes a whole GPU, and the first is in use"
    for count, (gpu, config) in enumerate(placed, start=1):
        room = compute(config)
        for size, (other, _) in zip(sizes[:count], placed, strict=False):
            if other == gpu:
                room.remove(size)  # ValueError: the layout has no place for somebody who is there


def test_bug_12_config_ids_tell_layouts_apart_and_stay_true() -> None:
    # 9 and 10 hold the same instances, at other places; so do 13, 14 and 18, and 15, 16 and 17.
    assert compute(9) == compute(10) and A100.config(9) != A100.config(10)
    answers = ask(*(f"acquire u{i} 1g" for i in range(7)), "release u3", "acquire v 1g")
    assert answers[6:] == ["0 19", "0 19"], "after some use it is still the layout of what is there"


def test_bug_13_the_policy_sees_the_request_that_it_answers() -> None:
    seen: list[tuple[str, int]] = []

    def spy(view: View, asked: Asked, candidates: Sequence[Candidate]) -> Choice:
        seen.append((asked.profile, sum(len(gpu.busy) for gpu in view.gpus)))
        assert all(c.placement.profile == asked.profile for c in candidates)
        return planner.built_in(view, asked, candidates)

    pool = loop.Pool(spy, None)
    for user, spec in enumerate(["3g", "1g", "2g"]):
        pool.acquire(str(user), spec)
    assert seen == [("3g.40gb", 0), ("1g.10gb", 1), ("2g.20gb", 2)]


# Thousands of random requests, against a model.


def stream(dice: random.Random, length: int, users: int) -> list[tuple[str, str | None]]:
    """User and size (None: release), a good part of it wrong on purpose."""
    weights = dice.choice([[1, 1, 1, 1, 1], [6, 4, 2, 1, 1], [1, 1, 2, 3, 4]])
    return [
        (f"user-{dice.randrange(users)}", None if dice.random() < 0.45 else dice.choices(SPECS, weights)[0])
        for _ in range(length)
    ]


class Model:
    """What must hold of the answers, kept beside the pool: who sits where on which GPU."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.gpus: list[dict[str, Placement]] = []

    def fits(self, profile: str) -> bool:
        return any(A100.legal(profile, held.values()) for held in self.gpus)

    def acquired(self, user: str, profile: str, gpu: int, config: int, placement: Placement) -> None:
        assert placement.profile == profile
        if gpu == len(self.gpus):
            assert not self.fits(profile), "a GPU is provisioned only when no other fits"
            assert self.limit is None or gpu < self.limit
            self.gpus.append({})
        held = self.gpus[gpu]
        assert not any(placement.mask & other.mask for other in held.values()), "no two overlap"
        held[user] = placement
        assert set(held.values()) <= set(A100.config(config)), "the layout has this instance and all the others"

    def where(self, user: str) -> int | None:
        return next((gpu for gpu, held in enumerate(self.gpus) if user in held), None)


def careless(seed: int) -> Choose:
    """A policy that places at random, wishes for anything, and sometimes fails or answers nonsense."""
    dice = random.Random(seed)

    def choose(view: View, asked: Asked, candidates: Sequence[Candidate]) -> Choice:
        kind = dice.randrange(9)
        if kind == 0:
            raise ZeroDivisionError("a bug")
        chosen = dice.choice(candidates)
        if kind == 1:
            chosen = chosen._replace(placement=Placement(asked.profile, 1, 4))
        wanted = dice.choice([(), A100.config(dice.randint(1, 19)), (chosen.placement,), A100.config(12)[:2]])
        scores = () if kind == 2 else (0.0,) * len(candidates)
        return Choice(chosen, scores, "dice", "dice", None, wanted)

    return choose


@pytest.mark.parametrize("limit", [None, 1, 6])
@pytest.mark.parametrize("policy", [planner.built_in, careless(5)], ids=["built-in", "careless"])
def test_thousands_of_random_requests(policy: Choose, limit: int | None) -> None:
    pool, model = loop.Pool(policy, limit), Model(limit)
    refused = 0
    for user, spec in stream(random.Random(f"{limit}"), 3000, 60):
        had = model.where(user)
        if spec is None:
            if had is None:
                with pytest.raises(RequestError, match=f"^{user} has no instance$"):
                    pool.release(user)
            else:
                pool.release(user)
                del model.gpus[had][user]
            continue
        profile = A100.find(spec).name
        try:
            gpu, config = pool.acquire(user, spec)
        except NoRoomError:
            assert limit is not None and len(model.gpus) == limit and not model.fits(profile)
            refused += 1
        except RequestError as error:
            assert had is not None and str(error) == f"{user} has an instance already; release it first"
        else:
            assert had is None
            _, busy = pool._users[user]  # the answer does not tell the place
            model.acquired(user, profile, gpu, config, busy.placement)
    assert (refused > 0) == (limit is not None)


@pytest.mark.parametrize("policy", [careless(6), careless(7)])
def test_a_policy_that_fails_costs_nobody_an_instance(policy: Choose) -> None:
    pool = loop.Pool(policy, None)
    for user in range(300):
        gpu, config = pool.acquire(str(user), random.Random(user).choice(SPECS))
        assert gpu >= 0 and 1 <= config <= 19


@pytest.mark.parametrize("limit", [None, 8])
def test_the_process_answers_what_the_model_was_held_against(limit: int | None) -> None:
    """The same stream through the process: its answers are the pool's, line by line."""
    pool = loop.Pool(controller.choose, limit)
    lines = [
        f"release {user}" if spec is None else f"acquire {user} {spec}"
        for user, spec in stream(random.Random(8), 4000, 80)
    ]
    lines = [line if i % 50 else BAD[i // 50 % len(BAD)] for i, line in enumerate(lines)]
    expected = [answer for line in lines if (answer := loop.answer(pool, line)) is not None]
    assert ask(*lines, arguments=[] if limit is None else ["--gpus", str(limit)]) == expected
    assert len(expected) > 2000


def test_the_whole_answer_is_written_to_what_it_is_given() -> None:
    output = io.StringIO()
    assert loop.run(["acquire a 3g\n", "release a\n", "bad\n"], output, planner.built_in, None) == 0
    assert output.getvalue().splitlines()[0] == "0 5" and len(output.getvalue().splitlines()) == 2


def test_thousands_of_users_are_served_quickly() -> None:
    dice = random.Random(9)
    lines = [f"acquire user-{i} {dice.choice(SPECS)}" for i in range(5000)]
    before = os.times().children_user
    answers = ask(*lines, *(f"release user-{i}" for i in range(0, 5000, 2)), *(f"acquire v-{i} 1g" for i in range(500)))
    assert (
        os.times().children_user - before < 15
    )  # 2 s on two slow cores; it took a minute when every GPU was looked at
    assert len(answers) == 5500
    assert max(split(answer)[0] for answer in answers[5000:]) < max(split(answer)[0] for answer in answers[:5000])


def test_needs_nothing_but_python() -> None:
    """Not even filelock: the loop touches no state. `-S` leaves out whatever is installed."""
    command = [sys.executable, "-E", "-S", str(ROOT / "controller.py")]
    done = subprocess.run(command, input="acquire user-1 3g\n", capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    gpu, config = done.stdout.split()
    assert gpu == "0" and 1 <= int(config) <= 19
