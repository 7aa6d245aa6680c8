"""What a job asks for: the one grammar of requests, and of the job comment that carries one from slurmctld to the node.

    request   3g.40gb:1,1g.10gb:2         each item with or without `mig:` in front; a count left out is 1
    comment   rms1:<request>;s=<submit epoch>;l=<limit minutes, 0 for none>;<the user's own comment>

`slurm/rms.lua` writes the comment (Slurm gives the Prolog no other channel: a count-only gres appears in none of its
variables); everything here treats it as a string that anybody may have typed.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from rms.errors import RequestError
from rms.geometry import Counts, Geometry

COMMENT_TAG = "rms1:"
MAX_BYTES = 1024
"""Longest request and longest comment: slurmctld's own limit for a comment."""
MAX_COUNT = 999
MESSAGE = 2000
"""Longest message of one line, about a screen."""

_ITEM = re.compile(r"(?:mig:)?([0-9a-z.+-]{1,40})(?::([0-9]{1,9}))?", re.ASCII | re.IGNORECASE)
_COMMENT = re.compile(r"rms1:([^;]{1,1000});s=([0-9]{1,12});l=([0-9]{1,9});", re.ASCII)


class Request(NamedTuple):
    """Instances by profile, in the order asked: `(("3g.40gb", 1), ("1g.10gb", 2))`. Each profile stands once."""

    items: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return ",".join(f"{profile}:{count}" for profile, count in self.items)

    @property
    def profiles(self) -> tuple[str, ...]:
        """The profile of each instance, in the order in which the job is given them."""
        return tuple(profile for profile, count in self.items for _ in range(count))

    @property
    def counts(self) -> Counts:
        """How many of each item's profile."""
        return tuple(count for _, count in self.items)


class Ticket(NamedTuple):
    """What the comment says: the request as text (the node's geometry resolves it), submit time (epoch seconds),
    time limit (minutes, None for none)."""

    request: str
    submit: int
    limit: int | None


def printable(text: str, most: int = 60) -> str:
    """Untrusted text, fit for one line of a message or a log: shortened, and what is no printable ASCII is escaped.

    A second time changes nothing any more, so a message may quote such text and be treated as a whole too.
    """
    text = text if len(text) <= most else text[: most - 3] + "..."
    return "".join(c if c.isascii() and c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def parse(spec: str, geometry: Geometry) -> Request:
    """The request that `spec` spells, with the names of `geometry`'s profiles.

    Raises RequestError, one line that names the faulty part.
    """
    if len(spec.encode(errors="replace")) > MAX_BYTES:
        raise RequestError(f"request is longer than {MAX_BYTES} bytes")
    counts: dict[str, int] = {}
    for item in spec.split(","):
        match = _ITEM.fullmatch(item)
        if match is None:
            raise RequestError(f"cannot read '{printable(item)}' in the request; write PROFILE or PROFILE:COUNT")
        profile = geometry.find(match[1]).name
        count = int(match[2] or 1)
        if count < 1:
            raise RequestError(f"count of {profile} is {count}; it must be 1 or more")
        counts[profile] = counts.get(profile, 0) + count
        if counts[profile] > MAX_COUNT:
            raise RequestError(f"count of {profile} is {counts[profile]}; at most {MAX_COUNT} can be asked for")
    return Request(tuple(counts.items()))


def parse_comment(comment: str) -> Ticket | None:
    """What a job's comment asks of RMS; None where it lacks our tag. Raises RequestError if it does not parse."""
    if not comment.startswith(COMMENT_TAG):
        return None
    match = _COMMENT.match(comment)
    if match is None:
        raise RequestError(
            f"cannot read the job's comment '{printable(comment)}'; submit the job again with --gres=mig:..."
        )
    return Ticket(match[1], int(match[2]), int(match[3]) or None)
