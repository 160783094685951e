"""The learning rate's curve over a run, as a factor on its peak.

A curve is a function of the samples seen before the step. Warm-up counts the batch in hand as well:
the factor rises linearly, min(1, (samples + batch) / warmup_samples), so that the first step is not
wasted at zero and the peak is met by the step that completes the warm-up. The decay runs from the
end of the warm-up to the budget, whatever batch sizes lie between.

The shapes are functions of the progress through the decay, from 0 to 1; the classes say where it
begins and ends, and between which factors it runs.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from largebatch.common.numbers import check_fits, real_number, whole_number
from largebatch.schedules.fields import Checked, count, real


def linear(progress: float) -> float:
    """Fall from 1 to 0 in a straight line."""
    return 1.0 - progress


def half_cosine(progress: float) -> float:
    """Fall from 1 to 0 by half a cosine (Loshchilov & Hutter, 1608.03983, equation 5)."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def one_minus_sqrt(progress: float) -> float:
    """Fall from 1 to 0 as 1 - sqrt(progress) (Hägele et al., 2405.18392)."""
    return 1.0 - math.sqrt(progress)


def power_law(progress: float, power: float) -> float:
    """Fall from 1 to 0 as (1 - progress)^power: 1 is linear, 2 is LARS's own (1708.03888)."""
    return math.pow(1.0 - progress, power)


def inverse_sqrt(samples: float, timescale: float) -> float:
    """Fall from 1 as sqrt(t / (t + samples)), without an end (Vaswani et al., 1706.03762)."""
    return math.sqrt(timescale / (timescale + samples))


def geometric(progress: float, first: float, last: float) -> float:
    """Go from `first` to `last` in equal ratios."""
    return math.pow(first, 1.0 - progress) * math.pow(last, progress)


SHAPES: Final[Mapping[str, Callable[[float], float]]] = {
    "linear": linear,
    "cosine": half_cosine,
    "sqrt": one_minus_sqrt,
}
"""Decays of `lr=wsd`, by the names of `lr.shape`."""


@dataclass(frozen=True, kw_only=True)
class Curve(Checked, ABC):
    """A factor on the peak learning rate, in [0, 1] but for `GeometricSweep`.

    Attributes:
        warmup_samples: samples over which the factor rises linearly to 1; 0 for no warm-up.

    Raises:
        ValueError: a value out of range.
    """

    warmup_samples: int = count("lr.warmup_samples", 0)

    @abstractmethod
    def decay(self, done: int, total: int) -> float:
        """The factor after `done` of the `total` samples from the end of the warm-up to the
        budget; of all curves but `GeometricSweep` it never rises with `done`.
        """

    def check(self, budget_samples: int) -> None:
        """Refuse a run too short for the curve."""
        check_fits(self.warmup_samples, "lr.warmup_samples", budget_samples)

    def after_warmup(self, samples: int, budget_samples: int) -> float:
        """The factor after `samples` samples, warm-up left out."""
        total = max(1, budget_samples - self.warmup_samples)
        return self.decay(min(total, max(0, samples - self.warmup_samples)), total)

    def factor(self, samples: int, batch_size: int, budget_samples: int) -> float:
        """The factor for a step of `batch_size` samples that begins after `samples` samples."""
        warmup = min(1.0, (samples + batch_size) / max(1, self.warmup_samples))
        return warmup * self.after_warmup(samples, budget_samples)


@dataclass(frozen=True, kw_only=True)
class Constant(Curve):
    """The peak, after any warm-up."""

    def decay(self, done: int, total: int) -> float:
        del done, total
        return 1.0


@dataclass(frozen=True, kw_only=True)
class _Decaying(Curve):
    final_fraction: float = real("lr.final_fraction", 0.0, least=0.0, most=1.0)

    def _above_final(self, fraction: float) -> float:
        return self.final_fraction + (1.0 - self.final_fraction) * fraction


@dataclass(frozen=True, kw_only=True)
class Linear(_Decaying):
    """A straight line from the peak to `final_fraction` of it."""

    def decay(self, done: int, total: int) -> float:
        return self._above_final(linear(done / total))


@dataclass(frozen=True, kw_only=True)
class Cosine(_Decaying):
    """Half a cosine from the peak to `final_fraction` of it.

    >>> curve = Cosine(warmup_samples=100)
    >>> [curve.factor(samples, 50, budget_samples=1100) for samples in (0, 50, 100, 600)]
    [0.5, 1.0, 1.0, 0.5]
    """

    def decay(self, done: int, total: int) -> float:
        return self._above_final(half_cosine(done / total))


@dataclass(frozen=True, kw_only=True)
class Polynomial(_Decaying):
    """A power of what is left of the run, from the peak to `final_fraction` of it."""

    power: float = real("lr.power", 1.0, above=0.0)

    def decay(self, done: int, total: int) -> float:
        return self._above_final(power_law(done / total, self.power))


@dataclass(frozen=True, kw_only=True)
class StepDecay(Curve):
    """Times `drop_factor` at each of several sample counts, as ResNets were trained (1512.03385).

    Attributes:
        drop_factor: what the learning rate is multiplied with at each drop.
        drop_fractions: where it drops, as shares of the budget.
        drop_samples: where it drops, in samples from the start of the run; in place of
            `drop_fractions`.
    """

    drop_factor: float = real("lr.drop_factor", 0.1, above=0.0, most=1.0)
    drop_fractions: Sequence[float] = (0.5, 0.75)
    drop_samples: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        fractions = tuple(
            real_number(share, "lr.drop_fractions", above=0.0, most=1.0)
            for share in self.drop_fractions
        )
        object.__setattr__(self, "drop_fractions", _rising(fractions, "lr.drop_fractions"))
        if self.drop_samples is not None:
            samples = tuple(whole_number(s, "lr.drop_samples", 1) for s in self.drop_samples)
            object.__setattr__(self, "drop_samples", _rising(samples, "lr.drop_samples"))

    def drops(self, budget_samples: int) -> list[int]:
        """Where the learning rate drops, in samples from the start of the run."""
        if self.drop_samples is not None:
            return list(self.drop_samples)
        return [math.ceil(share * budget_samples) for share in self.drop_fractions]

    def check(self, budget_samples: int) -> None:
        super().check(budget_samples)
        drops = self.drops(budget_samples)
        if drops and drops[0] < self.warmup_samples:
            raise ValueError(
                f"lr.warmup_samples is {self.warmup_samples}, longer than the {drops[0]} samples "
                "before the first drop: lower it, or drop later"
            )
        if drops and drops[-1] >= budget_samples:
            raise ValueError(
                f"the learning rate drops at {drops[-1]} samples, where the run of "
                f"{budget_samples} is over: drop earlier, or raise budget.samples"
            )

    def decay(self, done: int, total: int) -> float:
        seen, budget = done + self.warmup_samples, total + self.warmup_samples
        return self.drop_factor ** sum(seen >= drop for drop in self.drops(budget))


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(Curve):
    """sqrt(t / (t + samples since the warm-up)), whatever the budget.

    Attributes:
        timescale_samples: t; None for the warm-up's length, as in the paper, where the factor is
            sqrt(warmup / samples).
    """

    timescale_samples: int | None = count("lr.timescale_samples", None, least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.timescale_samples is None and not self.warmup_samples:
            raise ValueError(
                "lr.timescale_samples must be given where lr.warmup_samples is 0, got null"
            )

    def decay(self, done: int, total: int) -> float:
        del total
        timescale = self.timescale_samples or self.warmup_samples
        return inverse_sqrt(done, timescale)


@dataclass(frozen=True, kw_only=True)
class WSD(_Decaying):
    """Warm-up, stable, decay: the peak until the last part of the run (Hu et al., 2404.06395).

    Attributes:
        decay_fraction: the decay's share of the budget.
        decay_samples: its length in samples; in place of `decay_fraction`.
        shape: of the decay, one of `SHAPES`.
    """

    decay_fraction: float = real("lr.decay_fraction", 0.2, least=0.0, most=1.0)
    decay_samples: int | None = count("lr.decay_samples", None)
    shape: str = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in SHAPES:
            raise ValueError(f"lr.shape must be one of {', '.join(SHAPES)}, got {self.shape!r}")

    def decaying(self, budget_samples: int) -> int:
        """The decay's length in samples."""
        if self.decay_samples is not None:
            return self.decay_samples
        return round(self.decay_fraction * budget_samples)

    def check(self, budget_samples: int) -> None:
        super().check(budget_samples)
        both = self.warmup_samples + self.decaying(budget_samples)
        if self.decay_samples is not None:
            name = "the sum of lr.warmup_samples and lr.decay_samples"
            check_fits(both, name, budget_samples)
        elif both > budget_samples:
            raise ValueError(
                f"lr.decay_fraction is {self.decay_fraction:g} of the run, and "
                f"lr.warmup_samples leaves {1 - self.warmup_samples / budget_samples:.3g}: "
                "lower one of them"
            )

    def decay(self, done: int, total: int) -> float:
        length = self.decaying(total + self.warmup_samples)
        progress = max(0.0, 1.0 - (total - done) / length) if length else 0.0
        return self._above_final(SHAPES[self.shape](progress))


@dataclass(frozen=True, kw_only=True)
class GeometricSweep(Curve):
    """From `first` up to `last` times the peak in equal ratios, then `last` (a learning-rate range
    test, Smith, 1506.01186, on a log axis). It rises, and so it is no curve for a ramp of
    `coupled.py`.

    Attributes:
        first: factor of the first step.
        last: factor of the step that begins after `sweep_samples` samples.
        sweep_samples: samples from the one to the other.
    """

    first: float = real("first", above=0.0)
    last: float = real("last", above=0.0)
    sweep_samples: int = count("sweep_samples", least=1)

    def check(self, budget_samples: int) -> None:
        super().check(budget_samples)
        check_fits(self.warmup_samples + self.sweep_samples, "sweep_samples", budget_samples)

    def decay(self, done: int, total: int) -> float:
        del total
        progress = min(1.0, done / self.sweep_samples)
        return geometric(progress, self.first, self.last)


def _rising(values: tuple[float, ...], name: str) -> tuple[float, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError(f"{name} must rise, got {list(values)}")
    return values
