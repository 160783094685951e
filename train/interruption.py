"""Ctrl-C and SIGTERM end a run between two steps, with its record closed."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interruption:
    """Within it, the first SIGINT or SIGTERM is noted in `signal`; a second one acts as it would
    have.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        # Signals reach the main thread alone; elsewhere (a thread of the user's) there is none to
        # note.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signal = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
