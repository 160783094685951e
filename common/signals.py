"""Signals by which a batch system, or a user, ends a run between two steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGXCPU)


@contextmanager
def on_stop_signal(note: Callable[[int], None]) -> Iterator[None]:
    """Within it `note` is given each of `STOP_SIGNALS`, which then does nothing else. Signals reach
    a process's main thread alone: in another one there are none to note.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, lambda number, frame: note(number)) for number in STOP_SIGNALS
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
