"""How far a sweep is: done, running, failed, nodes left out, and about how long it will take."""

import math
import time

from rich.console import Console

from largebatch.common.progress import BarOrLines, time_left


class SweepProgress(BarOrLines):
    """A bar on a terminal, else a line every tenth of the way. Silent within a study, which has its
    own; what has to be said is said in any case.
    """

    def __init__(self, num_trials: int, silent: bool, console: Console | None = None) -> None:
        console = console or Console(stderr=True, soft_wrap=True)
        super().__init__(console, math.inf if silent else 0.0)
        self._num_trials = num_trials
        self._begin = time.monotonic()
        self._found: int | None = None

    def show(self, *, done: int, running: int, failed: int, nodes_out: int) -> None:
        """Bring the display up to date."""
        if self._found is None:  # what was there before says nothing of the pace
            self._found = done
        text = f"{done} of {self._num_trials} trials done, {running} running, {failed} failed"
        text += f", {nodes_out} nodes left out" if nodes_out else ""
        made, left = done - self._found, self._num_trials - done
        if made > 0 and left > 0:
            text += time_left(time.monotonic() - self._begin, made, left)
        self.update(done / self._num_trials, text)

    def tell(self, sentence: str) -> None:
        """Say something above the bar."""
        self.console.print(sentence, highlight=False, markup=False)
