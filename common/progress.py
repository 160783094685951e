"""How far something is, on stderr: a bar on a terminal, elsewhere lines or nothing."""

from collections.abc import Sequence
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from largebatch.common.text import LineField, fitted

BAR: Final = 12
"""Characters of a bar: the words beside it matter more."""


def progress_bar() -> Progress:
    """Make a bar with a task's description and time remaining, erased at its end."""
    console = Console(stderr=True)
    return Progress(
        BarColumn(BAR),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


class BarOrLines:
    """A bar on a terminal, else a line every tenth of the way.

    Args:
        next_line: the fraction of the way at which the first line is printed; inf: neither lines
            nor a bar.
    """

    def __init__(self, console: Console, next_line: float) -> None:
        self.console, self._next_line = console, next_line
        shown = console.is_terminal and next_line <= 1.0
        columns = (BarColumn(BAR), TextColumn("{task.description}", markup=False))
        self._bar = Progress(*columns, console=console) if shown else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("", total=1.0)
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, fraction: float, parts: Sequence[LineField]) -> None:
        """Show the fields at a fraction of the way; beside a bar those that fit."""
        if self._bar is not None:
            text = fitted(parts, self.console.width - BAR - 1)
            self._bar.update(self._task, completed=fraction, description=text)
        elif fraction >= self._next_line:
            line = fitted(parts, None)
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._next_line = int(fraction * 10 + 1) / 10


def minutes(seconds: float) -> str:
    """Minutes and seconds, as 3:07; from an hour on with hours, as 2:03:07."""
    whole = int(seconds)
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d}"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def time_left(seconds: float, made: float, left: float) -> str:
    """The time that what is `left` will take at the pace of what was `made` in `seconds`."""
    return f"about {minutes(seconds * left / made)} left"
