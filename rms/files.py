"""Files that survive a crash: written whole or not at all."""

from __future__ import annotations

import os
import stat


def private(path: str) -> bool:
    """Whether this is a directory, not a link, in which nobody but the caller's user can write. OSError if missing."""
    found = os.lstat(path)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def replace(path: str, data: bytes, mode: int = 0o600, keep: str | None = None, durable: bool = True) -> None:
    """Put `data` at `path` in one step; whoever reads sees the old content or the new. OSError if it can't be done.

    `keep` is where the content so far stays as a second name. `durable`: on the disk before this returns (file and
    directory synced). A temporary file left by a killed writer is overwritten by the next one, who holds the same lock.
    """
    temporary = f"{path}.new"
    # O_NOFOLLOW: the directories are root's own, but a link planted by a careless restore must not redirect a write.
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]
        if durable:
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if keep is not None and os.path.exists(path):
        # Link and rename rather than rename away: at no moment is `path` missing.
        spare = f"{keep}.new"
        if os.path.lexists(spare):
            os.unlink(spare)
        os.link(path, spare)
        os.rename(spare, keep)
    os.rename(temporary, path)
    if durable:
        directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
