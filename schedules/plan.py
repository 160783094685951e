"""The plan of a run: the batch size and hyperparameters of every step, known before it starts.

Ramps that are decided during the run (`adaptive.py`) leave the future open; all else about them is
the same.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from largebatch.schedules.adaptive import AdaptiveRamp
from largebatch.schedules.coupled import CoupledRamp
from largebatch.schedules.curves import Curve
from largebatch.schedules.fields import Checked, count, real
from largebatch.schedules.hyper import Hyper
from largebatch.schedules.ramps import Ramp
from largebatch.schedules.scaling import (
    OWN,
    Rule,
    check_duration,
    find_rule,
    for_duration,
    resolve_hold,
    scale,
)


class Point(NamedTuple):
    """What one step takes."""

    samples: int
    """Samples seen before the step."""
    batch_size: int
    """Global batch size of the step, in samples."""
    lr: float
    """Learning rate of the step: scaled for its batch size, times the curve's factor."""
    hyper: Hyper
    """All that holds at this batch size; its lr is the peak, before the curve's factor."""


class PlannedStage(NamedTuple):
    """A stretch of steps with one batch size."""

    samples: int
    """Samples seen before it."""
    step: int
    """Steps completed before it."""
    batch_size: int
    lr: float
    """Learning rate of its first step."""
    num_steps: int
    last_lr: float
    """Learning rate of its last step."""
    hyper: Hyper


class PlanTotals(NamedTuple):
    """Totals of a run that spends its budget."""

    steps: int
    samples: int
    """The budget, and what the last batch takes beyond it."""
    tokens: int
    steps_saved: int
    """Fewer steps than the first batch size would need for the same budget."""


@dataclass(frozen=True)
class BatchSplit:
    """How ranks and micro-batches make up a global batch."""

    global_batch_size: int
    data_parallel_size: int = 1
    gradient_accumulation_steps: int = 1

    @property
    def per_rank(self) -> int:
        """Samples of one rank in a step."""
        return self.global_batch_size // self.data_parallel_size

    @property
    def micro_batch_size(self) -> int:
        """Samples in one backward pass on one rank."""
        return self.per_rank // self.gradient_accumulation_steps


@dataclass(frozen=True, kw_only=True)
class Plan(Checked):
    """Ramp, curve, rule and budget joined, a function of samples.

    Attributes:
        ramp: the batch size at each sample.
        curve: the learning rate's factor at each sample. Its warm-up is that of `base_batch`; a
            rule that moves warm-ups does so for the ramp's first batch size.
        budget_samples: the run ends with the first step that reaches it; batches are never cut.
        base_lr: peak learning rate at `base_batch`; `rule` makes it that of the batch in hand.
        hold: what stays of the weight decay as the batch grows, see `scale`.
        base_samples: samples of the run that was tuned, for hold="timescale" and
            `duration_exponent`; None for as many.
        duration_exponent: how the rate falls with the run's length, see `for_duration`.
        hyper: what else was tuned at `base_batch`; its lr and warm-up are those above.
        tokens_per_sample: for the totals.

    Raises:
        ValueError: a warm-up or a ramp that the budget would cut off, an unknown rule, a batch size
            that the rule does not reach, a value out of range.

    >>> from largebatch.schedules import Constant, RampupBatch
    >>> ramp = RampupBatch(start=100, increment=100, ramp_samples=300, size=200)
    >>> plan = Plan(ramp=ramp, curve=Constant(), budget_samples=600, base_lr=0.1, base_batch=100,
    ...             rule="linear")
    >>> [(point.samples, point.batch_size, point.lr) for point in plan]
    [(0, 100, 0.1), (100, 100, 0.1), (200, 100, 0.1), (300, 200, 0.2), (500, 200, 0.2)]
    """

    ramp: Ramp | CoupledRamp
    curve: Curve
    budget_samples: int = count("budget.samples", least=1)
    base_lr: float = real("optim.lr", above=0.0)
    base_batch: int = count("scaling.base_batch", least=1)
    rule: str | Rule = "none"
    hold: str | None = OWN
    base_samples: int | None = None
    duration_exponent: float = real("scaling.duration_exponent", 0.0, least=0.0)
    hyper: Hyper | None = None
    tokens_per_sample: int = count("budget.tokens_per_sample", 1, least=1)
    _ramp: Ramp = field(init=False, repr=False, compare=False)
    _curve: Curve = field(init=False, repr=False, compare=False)
    _exponent: float | None = field(init=False, repr=False, compare=False)
    _hypers: dict[int, Hyper] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_duration(self.duration_exponent, self.base_samples)
        self._set(_ramp=self.ramp, _curve=self.curve, _exponent=None, _hypers={})
        # Warm up as the rule says, and resolve a coupled ramp into a ramp and a curve.
        start = self.ramp.start if isinstance(self.ramp, CoupledRamp) else self.ramp.at(0)
        warmup = self._prolonged(self._base, self.base_batch, start).warmup_samples
        self._set(_curve=replace(self.curve, warmup_samples=warmup))
        if isinstance(self.ramp, CoupledRamp):
            self._curve.check(self.budget_samples)
            resolved = self.ramp.resolve(self._curve, self.budget_samples)
            self._set(_ramp=resolved.ramp, _curve=resolved.curve, _exponent=resolved.exponent)
        self._curve.check(self.budget_samples)
        self._ramp.check(self.budget_samples)
        for size in self._ramp.sizes():
            self._hyper(size)  # what the rule does not reach is refused now

    def _set(self, **values: Any) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @property
    def _base(self) -> Hyper:
        hyper = self.hyper or Hyper(lr=self.base_lr, betas=None, eps=None, weight_decay=None)
        return replace(hyper, lr=self.base_lr, warmup_samples=self.curve.warmup_samples)

    def _hyper(self, batch_size: int) -> Hyper:
        if batch_size not in self._hypers:
            self._hypers[batch_size] = self.rescale(self._base, batch_size)
        return self._hypers[batch_size]

    def rescale(self, hyper: Hyper, batch_size: int) -> Hyper:
        """What `hyper`, tuned at `base_batch`, becomes at another batch size of this plan."""
        hold = resolve_hold(self.hold, find_rule(self.rule))
        rule, duration = self._rule, self._duration
        return scale(hyper, self.base_batch, batch_size, rule, hold=hold, duration=duration)

    @property
    def _duration(self) -> float:
        return self.budget_samples / (self.base_samples or self.budget_samples)

    @property
    def _prolonged(self) -> Rule:
        """The scaling rule, for a run of this length."""
        return for_duration(find_rule(self.rule), self._duration, self.duration_exponent)

    def _rule(self, hyper: Hyper, base_batch: int, batch: int) -> Hyper:
        """The same, but for the learning rate where a trade moves it."""
        rule = self._prolonged
        scaled = rule(hyper, base_batch, batch)
        if self._exponent is None:
            return scaled
        start = self._ramp.at(0)
        lr = rule(hyper, base_batch, start).lr * (batch / start) ** self._exponent
        return replace(scaled, lr=lr)

    def at(self, samples: int) -> Point:
        """The step that begins after `samples` samples."""
        batch_size = self._ramp.at(samples)
        hyper = self._hyper(batch_size)
        factor = self._curve.factor(samples, batch_size, self.budget_samples)
        return Point(samples, batch_size, hyper.lr * factor, hyper)

    @property
    def final_batch_size(self) -> int:
        """The batch size at the end; of a ramp that is decided in the run, as decided so far."""
        return self._ramp.at(max(self.budget_samples, self._ramp.ends_at))

    @property
    def peak_lr(self) -> float:
        """The learning rate at the ramp's last batch size, before the curve's factor; under a trade
        that at its first, which it never exceeds.
        """
        size = self.final_batch_size if self._exponent is None else self._ramp.at(0)
        return self._hyper(size).lr

    def __iter__(self) -> Iterator[Point]:
        return self.steps_from(0)

    def steps_from(self, samples: int) -> Iterator[Point]:
        """Every step from the one that begins after `samples` samples to the budget."""
        while samples < self.budget_samples:
            point = self.at(samples)
            yield point
            samples += point.batch_size

    def stages(self) -> list[PlannedStage]:
        """The whole run, batch size by batch size, without walking through its steps."""
        stages: list[PlannedStage] = []
        samples = step = 0
        while samples < self.budget_samples:
            point = self.at(samples)
            change = self._ramp.next_change(samples)
            end = self.budget_samples if change is None else min(change, self.budget_samples)
            num_steps = -((end - samples) // -point.batch_size)
            last = samples + (num_steps - 1) * point.batch_size
            stages.append(
                PlannedStage(
                    samples, step, point.batch_size, point.lr, num_steps,
                    self.at(last).lr, point.hyper,
                )
            )  # fmt: skip
            samples, step = last + point.batch_size, step + num_steps
        return stages

    def totals(self) -> PlanTotals:
        """Totals of the run if it spends its budget."""
        stages = self.stages()
        *_, last = stages
        steps = last.step + last.num_steps
        samples = last.samples + last.num_steps * last.batch_size
        alone = -(self.budget_samples // -stages[0].batch_size)
        return PlanTotals(steps, samples, samples * self.tokens_per_sample, alone - steps)

    @property
    def is_open(self) -> bool:
        """Whether later batch sizes are decided during the run."""
        return isinstance(self._ramp, AdaptiveRamp)

    def observe(self, samples: int, **readings: float) -> None:
        """Tell the ramp what the run has measured after `samples` samples, the same on every rank.

        Args:
            readings: named as in a run's record.
        """
        if isinstance(self._ramp, AdaptiveRamp):
            self._ramp.observe(samples, readings)

    def state_dict(self) -> dict[str, Any]:
        """What the run has decided; empty where everything was planned."""
        return self._ramp.state_dict() if isinstance(self._ramp, AdaptiveRamp) else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        if isinstance(self._ramp, AdaptiveRamp):
            self._ramp.load_state_dict(state)

    def splits(self, data_parallel_size: int, micro_batch_size: int | None) -> list[BatchSplit]:
        """How each batch size is made: the micro-batch stays, accumulation varies.

        Args:
            micro_batch_size: samples per rank and backward pass; None for the whole local batch.

        Raises:
            ValueError: batch sizes that ranks and micro-batches do not divide, and the nearest ones
                that would do.
        """
        self.check_divisible(data_parallel_size, micro_batch_size)
        return [
            BatchSplit(size, data_parallel_size, size // (data_parallel_size * micro))
            for size in self._ramp.sizes()
            for micro in (micro_batch_size or size // data_parallel_size,)
        ]

    def check_divisible(self, data_parallel_size: int, micro_batch_size: int | None) -> None:
        """Refuse batch sizes that ranks and micro-batches do not divide."""
        unit = data_parallel_size * (micro_batch_size or 1)
        strays = [size for size in self._ramp.sizes() if size % unit]
        if not strays:
            return
        others = [f"{size} ({_nearest(size, unit)})" for size in strays[1:_MOST_NAMED]]
        if len(strays) > _MOST_NAMED:
            others.append(f"{len(strays) - _MOST_NAMED} more")
        also = f"; neither are {', '.join(others)}" if others else ""
        raise ValueError(
            f"a batch size of {strays[0]} is not divisible by {unit} "
            f"({data_parallel_size} rank(s) times micro-batch {micro_batch_size or 1}); "
            f"the nearest batch size is {_nearest(strays[0], unit)}, "
            f"or change engine.micro_batch_size{also}"
        )


_MOST_NAMED = 6


def _nearest(size: int, unit: int) -> str:
    below = size - size % unit
    return f"{below} or {below + unit}" if below else f"{unit}"
