"""How far a sweep is: done, running, failed, nodes left out, and about how long it will take."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class SweepProgress:
    """A bar on a terminal, else a line every tenth of the way. Silent within a study, which has its
    own; what has to be said is said in any case.
    """

    def __init__(self, num_trials: int, silent: bool, console: Console | None = None) -> None:
        self._num_trials, self._silent = num_trials, silent
        self._console = console or Console(stderr=True, soft_wrap=True)
        self._begin = time.monotonic()
        self._found: int | None = None
        self._next_line = 0.0
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._silent:
            columns = (BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("", total=self._num_trials)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, *, done: int, running: int, failed: int, nodes_out: int) -> None:
        """Bring the display up to date."""
        if self._found is None:  # what was there before says nothing of the pace
            self._found = done
        text = f"{done} of {self._num_trials} trials done, {running} running, {failed} failed"
        text += f", {nodes_out} nodes left out" if nodes_out else ""
        text += self._left(done)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, description=text)
        elif not self._silent and done / self._num_trials >= self._next_line:
            self._console.print(text, highlight=False, markup=False)
            self._next_line = int(10 * done / self._num_trials + 1) / 10

    def tell(self, sentence: str) -> None:
        """Say something above the bar."""
        self._console.print(sentence, highlight=False, markup=False)

    def _left(self, done: int) -> str:
        gone, made = time.monotonic() - self._begin, done - (self._found or 0)
        if made <= 0 or done >= self._num_trials:
            return ""
        left = gone * (self._num_trials - done) / made
        return f", about {int(left) // 60}:{int(left) % 60:02d} left"
