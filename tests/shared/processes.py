"""Processes that a test has started, looked at from outside."""

from pathlib import Path


def is_running(pid: int) -> bool:
    """Tell whether a process is there and has not ended.

    One that has ended stays in /proc until its parent looks, which for an orphan is process 1 of a
    container, and that need not look.
    """
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
