"""Locks on open files, which end with the process that holds them. Some mounts have none."""

import errno
import fcntl
import sys
from pathlib import Path
from typing import Final

_NO_LOCKS: Final = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)
_told: set[str] = set()


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
    """Take the lock as `lock` does; where there are none, say so once a file and go on."""
    taken = lock(descriptor, wait)
    if taken is None and str(path) not in _told:
        _told.add(str(path))
        print(
            f"largebatch: the file system of {path} has no locks: going on without; two processes "
            "that write there at once are not kept apart",
            file=sys.stderr,
        )
    return taken is not False
