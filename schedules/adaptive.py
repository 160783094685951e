"""Ramps that are decided during the run, from what it measures.

Such a ramp is asked at boundaries (evaluations) only, with readings that are the same on every
rank, and what it has decided is a list of stages: a function of the samples again, with the future
open. A checkpoint takes `state_dict`.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from largebatch.common.numbers import real_number
from largebatch.schedules.fields import count
from largebatch.schedules.ramps import Stage, StagesRamp, pairs


@dataclass(kw_only=True)
class AdaptiveRamp(StagesRamp):
    """Begins with `start` samples a step; `decide` says what follows.

    Attributes:
        stages: what has been decided so far.

    Raises:
        ValueError: a value out of range.
    """

    start: int = count("batch.start", least=1)
    stages: list[Stage] = field(init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stages = [(0, self.start)]

    @property
    def batch_size(self) -> int:
        """The global batch size as last decided."""
        return self.stages[-1][1]

    @abstractmethod
    def sizes(self) -> Iterator[int]:
        """Every batch size that the ramp may reach, in order."""

    @abstractmethod
    def decide(self, samples: int, readings: Mapping[str, float]) -> int:
        """The batch size from `samples` samples on.

        Args:
            readings: named as in a run's record (`eval_loss`, …), the same on every rank.
        """

    def observe(self, samples: int, readings: Mapping[str, float]) -> None:
        """Decide at a boundary: after `samples` samples, before the next step."""
        begun = self.stages[-1][0]
        assert samples >= begun
        size = self.decide(samples, readings)
        if size != self.batch_size:
            if samples == begun:  # two readings at one boundary: the later word counts
                self.stages.pop()
            self.stages.append((samples, size))

    def state_dict(self) -> dict[str, Any]:
        """What was decided, in plain numbers."""
        return {"stages": [list(stage) for stage in self.stages]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.stages = [(int(samples), int(size)) for samples, size in state["stages"]]


@dataclass(kw_only=True)
class LossTriggered(AdaptiveRamp):
    """A larger batch at the first evaluation whose loss is at or below a level: "3:128 2.5:256".

    As MiniMax-01 doubled its batch at losses that a fitted critical batch size named (Li et al.
    2025, arXiv:2501.08313). The batch never falls again, whatever the loss does.

    Attributes:
        start: the batch size before the first level.
        spec: entries LOSS:SIZE, losses falling and sizes rising, separated by blanks.

    Raises:
        ValueError: an entry that cannot be read, or one out of order.
    """

    spec: str
    levels: list[tuple[float, int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.levels = [
            (real_number(loss, "a loss of batch.spec"), size)
            for loss, size in pairs(self.spec, "batch.spec", "3:128 2.5:256")
        ]
        losses, sizes = [loss for loss, _ in self.levels], list(self.sizes())
        if losses != sorted(set(losses), reverse=True) or sizes != sorted(set(sizes)):
            raise ValueError(
                f"the losses of batch.spec must fall and its batch sizes rise from batch.start = "
                f"{self.start}, got {self.spec!r}"
            )

    def sizes(self) -> Iterator[int]:
        yield self.start
        yield from (size for _, size in self.levels)

    def decide(self, samples: int, readings: Mapping[str, float]) -> int:
        del samples
        loss = readings.get("eval_loss", math.inf)
        reached = [size for level, size in self.levels if loss <= level]
        return max([self.batch_size, *reached])
