"""Work shared out between this process and a copy of it."""

import os
import pickle
import sys
import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

Result = TypeVar("Result")


def may_fork() -> bool:
    """Whether a copy of this process can work beside it: on a core of its own, and as whole as it.

    A copy lacks all threads but the one that makes it, and may wait for ever for one of these.
    numpy's, which multiply matrices, end before a copy is made; torch's do not.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return cores > 1 and threading.active_count() == 1 and "torch" not in sys.modules


def made(calls: Sequence[Callable[[], Result]], *, forked: bool) -> list[Result]:
    """What the calls return; where `forked`, every second of them is made in a copy of this
    process, and again in this one if that fails, which then tells why.
    """
    if not forked or len(calls) < 2:
        return [call() for call in calls]
    source, sink = os.pipe()
    copy = os.fork()
    if copy == 0:
        failed = True
        try:
            with open(sink, "wb") as file:
                pickle.dump([call() for call in calls[1::2]], file)
            failed = False
        finally:
            os._exit(failed)  # nothing that this process has to do at its end is done twice
    os.close(sink)
    try:
        own = [call() for call in calls[::2]]
    finally:
        with open(source, "rb") as file:
            told = file.read()
        _, status = os.waitpid(copy, 0)
    others = [call() for call in calls[1::2]] if status else pickle.loads(told)
    found = own + others
    found[::2], found[1::2] = own, others
    return found
