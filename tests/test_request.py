"""The grammar of requests and of the job comment, with everything that a user can type into them."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as some

from rms.errors import RequestError
from rms.geometry import load, models
from rms.request import MAX_BYTES, MAX_COUNT, Request, Ticket, parse, parse_comment, printable

A100 = load("A100-80GB")
WORDS = sorted(A100.names())


def is_one_line(error: pytest.ExceptionInfo[RequestError]) -> bool:
    text = str(error.value)
    return text.isascii() and text.isprintable() and len(text) < 700


# Requests.


@pytest.mark.parametrize(
    ("spec", "canonical"),
    [
        ("3g", "3g.40gb:1"),
        ("3g.40gb", "3g.40gb:1"),
        ("3g.39gb", "3g.40gb:1"),  # as drivers print it that round the other way
        ("mig:3g", "3g.40gb:1"),
        ("3g.40gb:2", "3g.40gb:2"),
        ("mig:3g.40gb:2", "3g.40gb:2"),
        ("1g.10gb:2,3g.40gb:1", "1g.10gb:2,3g.40gb:1"),
        ("mig:1g:2,mig:3g", "1g.10gb:2,3g.40gb:1"),
        ("3g,1g,3g", "3g.40gb:2,1g.10gb:1"),  # first-seen order
        ("3g,3g.40gb,mig:3g.39gb:1", "3g.40gb:3"),
        ("MIG:3G.40GB:01", "3g.40gb:1"),
        ("1g+me", "1g.10gb+me:1"),
        ("1g.20gb", "1g.20gb:1"),
        ("1g:999", "1g.10gb:999"),
    ],
)
def test_what_users_type(spec: str, canonical: str) -> None:
    assert str(parse(spec, A100)) == canonical


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("5g", "unknown profile '5g'"),
        ("mig", "unknown profile 'mig'"),
        ("mig:2", "unknown profile '2'"),
        ("gpu:1", "unknown profile 'gpu'"),
        ("3g.80gb", "unknown profile '3g.80gb'"),
        ("3g:0", "count of 3g.40gb is 0; it must be 1 or more"),
        ("3g:-1", "cannot read '3g:-1'"),
        ("3g:1.5", "cannot read '3g:1.5'"),
        ("3g:1k", "cannot read '3g:1k'"),
        ("3g:", "cannot read '3g:'"),
        ("3g:1:1", "cannot read '3g:1:1'"),
        ("3g:1000", "count of 3g.40gb is 1000; at most 999 can be asked for"),
        ("3g:999,1g,3g:1", "count of 3g.40gb is 1000; at most 999 can be asked for"),
        ("3g:999999999999999999999", "cannot read '3g:999999999999999999999'"),
        ("", "cannot read ''"),
        ("3g,", "cannot read ''"),
        (",3g", "cannot read ''"),
        ("3g,,1g", "cannot read ''"),
        ("3g 1g", "cannot read '3g 1g'"),
        (" 3g", "cannot read ' 3g'"),
        ("mig:mig:3g", "cannot read 'mig:mig:3g'"),
        ("3g:٣", "cannot read"),  # digits, but not ours
        ("\uff13g", "cannot read"),
        ("3g:²", "cannot read"),
        ("3g\n", "cannot read"),
        ("3g:1\n", "cannot read"),
        ("\x1b[31m3g", "cannot read"),
        ("3g\0", "cannot read"),
        ("3g;rm -rf /", "cannot read"),
        ("$(id)", "cannot read"),
        ("3g=1", "cannot read"),
        ("\udcff", "cannot read"),
        ("K" * 41, "cannot read"),
        ("K" * 40, "unknown profile"),
    ],
)
def test_what_can_not_be(spec: str, message: str) -> None:
    with pytest.raises(RequestError) as refused:
        parse(spec, A100)
    assert str(refused.value).startswith(message)
    assert is_one_line(refused)


@pytest.mark.parametrize("text", ["3g," * 4000, "x" * 10_000, "\n" * 10_000, "é" * 600, "3g:" + "9" * 10_000])
def test_ten_kilobytes_are_refused_in_one_line(text: str) -> None:
    with pytest.raises(RequestError, match=f"^request is longer than {MAX_BYTES} bytes$"):
        parse(text, A100)


items = some.tuples(some.sampled_from(WORDS), some.none() | some.integers(1, 20), some.booleans(), some.booleans())


def spelled(word: str, count: int | None, prefix: bool, upper: bool) -> str:
    text = ("mig:" if prefix else "") + word + ("" if count is None else f":{count}")
    return text.upper() if upper else text


@given(some.lists(items, min_size=1, max_size=12))
def test_any_spelling_has_one_meaning(parts: list[tuple[str, int | None, bool, bool]]) -> None:
    request = parse(",".join(spelled(*part) for part in parts), A100)
    meant: dict[str, int] = {}
    for word, count, _, _ in parts:
        meant[A100.names()[word]] = meant.get(A100.names()[word], 0) + (count or 1)
    assert list(request.items) == list(meant.items())
    assert parse(str(request), A100) == request, "the canonical form stands for itself"
    assert request.counts == tuple(meant.values())
    assert request.profiles == tuple(name for name, count in meant.items() for _ in range(count))


@given(some.text(max_size=60) | some.text("mig:,.0123456789gb+-e \n\x1b", max_size=40))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        request = parse(text, A100)
    except RequestError as error:
        assert str(error).isascii() and str(error).isprintable()
    else:
        assert isinstance(request, Request)
        assert all(1 <= count <= MAX_COUNT for count in request.counts)
        assert len(str(request)) <= MAX_BYTES


def test_every_model_knows_its_own_names() -> None:
    for model in models():
        known = load(model)
        spec = ",".join(p.name for p in known.profiles)
        assert parse(spec, known).profiles == tuple(spec.split(","))


# The comment.


def test_comment() -> None:
    assert parse_comment("rms1:3g.40gb:1,1g.10gb:2;s=1790000000;l=90;") == Ticket("3g.40gb:1,1g.10gb:2", 1790000000, 90)
    assert parse_comment("rms1:3g.40gb:1;s=1790000000;l=0;") == Ticket("3g.40gb:1", 1790000000, None)


@pytest.mark.parametrize("own", ["", "mine", "a;b", "rms1:7g.80gb:1;s=1;l=1;", "l=5;", "\n", "é\x1b\0", "x" * 10_000])
def test_the_users_own_comment_changes_nothing(own: str) -> None:
    assert parse_comment(f"rms1:3g.40gb:1;s=1;l=2;{own}") == Ticket("3g.40gb:1", 1, 2)


@pytest.mark.parametrize(
    "comment", ["", "mine", " rms1:3g:1;s=1;l=2;", "rms2:3g:1;s=1;l=2;", "rms", "RMS1:3g;s=1;l=1;", "x" * 10_000]
)
def test_comments_that_are_not_ours(comment: str) -> None:
    assert parse_comment(comment) is None


@pytest.mark.parametrize(
    "comment",
    [
        "rms1:",
        "rms1:;s=1;l=2;",
        "rms1:3g:1",
        "rms1:3g:1;s=1;l=2",
        "rms1:3g:1;s=;l=2;",
        "rms1:3g:1;s=-1;l=2;",
        "rms1:3g:1;s=1.5;l=2;",
        "rms1:3g:1;s=1;l=-2;",
        "rms1:3g:1;l=2;s=1;",
        "rms1:3g:1;s=1;l=UNLIMITED;",
        "rms1:3g:1;s=٣;l=2;",
        "rms1:3g:1;s=1;l=²;",
        "rms1:3g:1;s=1;l=9999999999;",
        "rms1:3g:1;s=9999999999999;l=2;",
        "rms1:3g:1; s=1;l=2;",
        "rms1:" + "3" * 10_000 + ";s=1;l=2;",
        "rms1:3g\x1b[2J",
        "rms1:\n",
        "rms1:" + "\x1b" * 10_000,
    ],
)
def test_comments_that_were_tampered_with(comment: str) -> None:
    with pytest.raises(RequestError, match=r"^cannot read the job's comment") as refused:
        parse_comment(comment)
    assert is_one_line(refused)


@given(some.text(max_size=80))
def test_any_comment_is_ours_or_not_or_refused(text: str) -> None:
    for comment in (text, f"rms1:{text}", f"rms1:{text};s=1;l=2;"):
        try:
            ticket = parse_comment(comment)
        except RequestError as error:
            assert str(error).isascii() and str(error).isprintable()
        else:
            assert ticket is None or (ticket.submit >= 0 and ticket.request)


def test_what_passes_the_comment_is_still_checked_as_a_request() -> None:
    ticket = parse_comment("rms1:7g.80gb:1\n;s=1;l=2;")
    assert ticket is not None
    with pytest.raises(RequestError):
        parse(ticket.request, A100)


# Untrusted text in messages.


@given(some.text())
def test_printable_is_one_short_line_of_ascii(text: str) -> None:
    shown = printable(text)
    assert shown.isascii() and shown.isprintable() and len(shown) <= 600
    if text.isascii() and text.isprintable() and "\\" not in text and len(text) <= 60:
        assert shown == text


def test_printable_tells_different_bytes_apart() -> None:
    dice = random.Random(4)
    names = {dice.randbytes(8) for _ in range(500)}
    assert len({printable(name.decode(errors="surrogateescape")) for name in names}) == len(names)
