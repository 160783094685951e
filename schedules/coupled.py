"""Ramps that follow the run: batch sizes that rise where its curve or its budget says.

A trade takes a curve and gives back a ramp and a curve: where the learning rate would have fallen,
the batch grows instead. The peak learning rate is that of the `start` batch, from where the trade
itself moves it with a power of the batch size; the scaling rule moves the rest (betas, eps, …).
"""

import itertools
import math
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from largebatch.schedules.curves import Curve, StepDecay
from largebatch.schedules.fields import Checked, count, real
from largebatch.schedules.ramps import Ramp, Stage, StagesRamp, check_rises


class ResolvedRamp(NamedTuple):
    """A coupled ramp's batch sizes and learning rates in one run."""

    ramp: Ramp
    curve: Curve
    exponent: float | None
    """The peak learning rate grows with this power of batch / start; None: by the scaling rule."""


@dataclass(frozen=True)
class _Steps(StagesRamp):
    stages: Sequence[Stage]

    def check(self, budget_samples: int) -> None:
        """Accept any: `size` is a cap, which a curve may be over before it is met."""
        del budget_samples


@dataclass(frozen=True, kw_only=True)
class CoupledRamp(Checked, ABC):
    """From `start` to at most `size`, in samples.

    Raises:
        ValueError: a value out of range.
    """

    start: int = count("batch.start", least=1)
    size: int = count("batch.size", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rises(self.start, self.size)

    @abstractmethod
    def resolve(self, curve: Curve, budget_samples: int) -> ResolvedRamp:
        """The ramp, and what becomes of `curve`, in a run of `budget_samples`.

        Raises:
            ValueError: a curve that cannot be traded.
        """

    def at_drops(self, curve: StepDecay, budget_samples: int) -> StagesRamp:
        """The batch grown at each drop by as much as the learning rate falls, until the cap."""
        stages: list[Stage] = [(0, self.start)]
        for drop in curve.drops(budget_samples):
            if stages[-1][1] < self.size:
                grown = round(self.start / curve.after_warmup(drop, budget_samples))
                stages.append((drop, min(self.size, grown)))
        return _Steps(tuple(stages))


@dataclass(frozen=True, kw_only=True)
class LateSwitch(CoupledRamp):
    """`start` for most of the run, `size` from `switch_fraction` of the budget on (2602.14208).

    A late switch spends few samples on large batches and its loss soon meets that of the run that
    had them all along. The curve stays as it is, the scaling rule co-scales.
    """

    switch_fraction: float = real("batch.switch_fraction", 0.8, above=0.0, most=1.0)

    def resolve(self, curve: Curve, budget_samples: int) -> ResolvedRamp:
        switch = math.ceil(self.switch_fraction * budget_samples)
        first = switch // -self.start * -self.start  # the first step that begins there or later
        if first >= budget_samples:
            raise ValueError(
                f"batch.switch_fraction must leave a step to switch for, got "
                f"{self.switch_fraction:g} of {budget_samples} samples in steps of {self.start}"
            )
        return ResolvedRamp(_Steps(((0, self.start), (switch, self.size))), curve, None)


@dataclass(frozen=True, kw_only=True)
class Smith(CoupledRamp):
    """Each drop of the learning rate is a rise of the batch by as much, until `size` (Smith et al.
    2018, arXiv:1711.00489); then the learning rate drops.

    Keeps SGD's noise, lr / batch, as the drops would have it. For `lr=step`. The rise at the cap
    may be smaller than the drop: the learning rate takes the rest.
    """

    def resolve(self, curve: Curve, budget_samples: int) -> ResolvedRamp:
        if not isinstance(curve, StepDecay):
            raise ValueError(
                "batch=smith trades the drops of lr=step; for another curve use batch=seesaw"
            )
        return ResolvedRamp(self.at_drops(curve, budget_samples), curve, 1.0)


@dataclass(frozen=True, kw_only=True)
class Seesaw(CoupledRamp):
    """Where the curve falls to 1 / factor of what it was: lr / sqrt(factor), batch * factor
    (Meterez et al. 2025, arXiv:2510.14717).

    A transform of any curve into stairs: where it first is at factor^-k, the batch becomes start
    factor^k and the learning rate peak factor^(-k/2), which Adam and normalized SGD are expected to
    answer as they would the fall alone. From the cap on the learning rate is that of the curve
    itself, times sqrt(size / start), down to its end. The drops of `lr=step` are traded as they
    are, whatever `factor`.
    """

    factor: float = real("batch.factor", 2.0, above=1.0)

    def resolve(self, curve: Curve, budget_samples: int) -> ResolvedRamp:
        if isinstance(curve, StepDecay):
            return ResolvedRamp(self.at_drops(curve, budget_samples), curve, 0.5)
        stages: dict[int, tuple[int, float]] = {0: (self.start, 1.0)}
        for rises in itertools.count(1):
            level = self.factor**-rises
            place = _first_at(curve, level, budget_samples)
            if place is None:
                break
            grown = min(self.size, round(self.start * self.factor**rises))
            stages[place] = (grown, level)
            if grown == self.size:
                break
        if len(stages) == 1:
            raise ValueError(
                f"batch=seesaw needs a learning rate that falls to 1/{self.factor:g} of its peak: "
                "use lr=cosine or another that does, or batch=stages"
            )
        ramp = _Steps(tuple((place, size) for place, (size, _) in stages.items()))
        stairs = _Stairs(
            warmup_samples=curve.warmup_samples,
            curve=curve,
            ramp=ramp,
            levels=tuple(level for _, level in stages.values()),
            capped=ramp.stages[-1][1] == self.size,
        )
        return ResolvedRamp(ramp, stairs, 0.5)


@dataclass(frozen=True, kw_only=True)
class _Stairs(Curve):
    """`levels` of a seesaw by the stages of its ramp, and `curve` from the cap on."""

    curve: Curve
    ramp: StagesRamp
    levels: Sequence[float]
    capped: bool

    def decay(self, done: int, total: int) -> float:
        stage = self.ramp.index(done + self.warmup_samples)
        if self.capped and stage == len(self.levels) - 1:
            return self.curve.decay(done, total)
        return self.levels[stage]


def _first_at(curve: Curve, level: float, budget_samples: int) -> int | None:
    """The first sample count of a run after which `curve` is at `level` or below."""
    place = bisect_left(
        range(budget_samples),
        -level * (1.0 + 1e-12),  # half a cosine is 0.5 on paper
        key=lambda samples: -curve.after_warmup(samples, budget_samples),
    )
    return place if place < budget_samples else None
