"""Files that other processes see: replaced in one step, and locked while one holds them open."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any, Final

from largebatch.common.text import say

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
_reported: set[str] = set()


def lock(descriptor: int, wait: bool = False) -> bool | None:
    """Take the lock of an open file: True, or False where another process holds it, or None where
    the file system has no locks (Lustre without `flock`, DAOS through dfuse).

    Args:
        wait: until the other process lets go.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def lock_or_warn(descriptor: int, path: Path, wait: bool = False) -> bool:
    """Take the lock as `lock` does; where there are none, say so once a file and continue."""
    taken = lock(descriptor, wait)
    if taken is None and str(path) not in _reported:
        _reported.add(str(path))
        say(
            f"the file system of {path} has no locks: going on without; two processes "
            "that write there at once are not kept apart"
        )
    return taken is not False


def read_json(path: Path) -> Any:
    """The JSON in a file of our own; for files from elsewhere see `largebatch.records`."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_whole(path: Path, text: str, durable: bool = True) -> None:
    """Replace `path` in one step, so that no reader and no crash sees half of it. The draft of a
    writer that was killed is the next one's.

    Args:
        durable: wait until it would survive a crash of the machine.

    Raises:
        OSError: the disk is full, or gone; `path` is as it was.
    """
    draft = path.with_name(f".{path.name}.draft")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        draft.replace(path)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
