"""Whose fault it was. One class per answer that a caller can give; `rms.cli` and `controller` turn them into one line.

Exit codes (also in docs/admin.md): 0 done, 1 a fault of RMS itself, then one per class below.
"""


def unheard(error: OSError) -> int:
    """The exit code where standard output can't be written; says why, unless it is that nobody reads it any more.

    Python would try once more when it ends, and complain in its own way.
    """
    import os
    import signal
    import sys

    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):  # as in `rms show | head`
        return 128 + signal.SIGPIPE
    print(f"rms: cannot write to standard output: {error.strerror}", file=sys.stderr)
    return 1


class RmsError(Exception):
    """Base of all that RMS raises on purpose: the text is one line that says what to do."""

    code = 1


class UsageError(RmsError):
    """A command line that makes no sense."""

    code = 2


class RequestError(RmsError):
    """The user's fault: the request can't be, on this node, whatever the others do. Never a reason to drain."""

    code = 3


class NoRoomError(RmsError):
    """Nobody's fault: the request does not fit now. The job waits; nothing of it has run."""

    code = 4


class ClosedRunError(RmsError):
    """A late call for a run that was released already, or that a newer run of the job has replaced."""

    code = 5


class NodeError(RmsError):
    """The node's fault: no config, state that can't be written or recovered, a GPU that fails. The node is drained."""

    code = 6


class LockTimeoutError(NodeError):
    """Another process held the lock for longer than the deadline; the text names it."""

    code = 7
