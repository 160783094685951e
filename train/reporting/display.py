"""What a single run shows: what it is, at once, and how far it is while it goes."""

import os
import time
from collections.abc import Callable
from typing import Any, Final, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from largebatch.common.progress import BAR, minutes
from largebatch.common.text import SEPARATOR, LineField, counted, fitted, wrapped
from largebatch.records.names import EVALUATED
from largebatch.train.run_spec import RunSpec

FIRST_LINE: Final = 10.0
"""Seconds until the first line where there is no terminal; each further one takes half as long
again.
"""
LONGEST_SILENCE: Final = 300.0


class Display:
    """Takes each line of a run. On a terminal a bar fills with the sample budget; elsewhere, as in
    a job's output, there is a line now and then.
    """

    def __init__(
        self, spec: RunSpec, console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._spec, self._clock = spec, clock
        self._console = console or Console(stderr=True)
        self._bar = Progress(
            BarColumn(BAR), TextColumn("{task.description}", markup=False), console=self._console,
            disable=not self._console.is_terminal, transient=True,
        )  # fmt: skip
        config = spec.config
        self._total = min(
            config.target.give_up_samples or config.budget.samples, config.budget.samples
        )
        self._evaluation: dict[str, float] = {}
        """The last evaluation, by fields of the record."""
        self._task = self._bar.add_task("", total=self._total)
        self._begin: tuple[float, int] | None = None
        """Seconds on the clock, and samples, at the first line: what is imported and compiled
        before says nothing of the pace."""
        self._wait, self._next = FIRST_LINE, clock() + FIRST_LINE

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, num_parameters: int, micro_batch_size: int, ranks: int, device: Any) -> None:
        """Say what is trained, on what and where its record is."""
        self._print(begun(self._spec, num_parameters, micro_batch_size, ranks, device))

    def __call__(self, line: dict[str, Any]) -> None:
        now = self._clock()
        if self._begin is None:
            self._begin = (now, line["samples"])
        self._evaluation |= {key: line[key] for key in line if key.startswith(EVALUATED)}
        if not self._bar.disable:
            text = fitted(self._parts(line, now), self._console.width - BAR - 1)
            self._bar.update(self._task, completed=line["samples"], description=text)
        elif now >= self._next:
            self._wait = min(1.5 * self._wait, LONGEST_SILENCE)
            self._next = now + self._wait
            self._print(fitted(self._parts(line, now), None))

    def _print(self, text: str) -> None:
        text = wrapped(text, self._console.width if self._console.is_terminal else None)
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _parts(self, line: dict[str, Any], now: float) -> list[LineField]:
        """What is said of a step. Beside a bar that leaves too little room, the rate goes first,
        then the pace, other metrics, the samples, the time left, the evaluation, the loss.
        """
        assert self._begin is not None
        samples, target = line["samples"], self._spec.config.target.aim
        parts = [
            LineField(f"{min(1, samples / self._total):.0%}", 6),
            LineField(f"{counted(samples)} of {counted(self._total)} samples", 2),
        ]
        passed, made = now - self._begin[0], samples - self._begin[1]
        if passed > 0 and made > 0:
            parts.append(LineField(f"{counted(made / passed)} samples/s", 1))
        parts += [LineField(f"lr {line['lr']:.4g}", 0), LineField(f"loss {line['loss']:.4g}", 5)]
        for key, value in self._evaluation.items():
            name = key.removeprefix(EVALUATED)
            is_aim = target is not None and target.metric == name
            aim = f" (target {target.value:.4g})" if target is not None and is_aim else ""
            weight = 4 if name == "loss" or is_aim else 1
            called = "eval" if name == "loss" else name
            parts.append(LineField(f"{called} {value:.4g}{aim}", weight))
        if passed > 0 and made > 0:
            left = max(0.0, (self._total - samples) * passed / made)
            parts.append(LineField(f"{minutes(left)} left", 3))
        return parts


def begun(
    spec: RunSpec, num_parameters: int, micro_batch_size: int, ranks: int, device: Any
) -> str:
    """One line: task, model, optimizer, batch as micro x accumulation x ranks, budget, folder."""
    config, size = spec.config, spec.plan.final_batch_size
    accumulated = -(-size // (micro_batch_size * ranks))
    factors = [f"{micro_batch_size:,}"]
    factors += [f"{accumulated:,} accumulated"] if accumulated > 1 else []
    factors += [f"{ranks:,} ranks"] if ranks > 1 else []
    of = f" = {' x '.join(factors)}" if len(factors) > 1 else ""
    ramp = f"{spec.plan.at(0).batch_size:,} to " if spec.plan.at(0).batch_size != size else ""
    aim = config.target.aim
    name = "" if aim is None or aim.metric == "loss" else f"{aim.metric} "
    target = "" if aim is None else f", target {name}{aim.value:.4g}"
    resumed = "" if spec.resumption is None else f"resumed at {spec.resumption.samples:,} samples"
    parts = [
        spec.task,
        f"{spec.model} ({counted(num_parameters)} parameters)",
        spec.optimizer,
        f"batch {ramp}{size:,}{of}",
        f"{counted(config.budget.samples)} samples{target}",
        str(device),
        resumed,
        os.path.relpath(spec.folder),
    ]
    return SEPARATOR.join(part for part in parts if part)
