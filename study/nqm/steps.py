"""Steps to a target loss of the noisy quadratic model, to the step.

The map of 2^j steps is the map of 2^(j-1) applied twice ("binary lifting"), so any step is reached
in as many products as its number has digits. The loss need not fall steadily: momentum swings, and
fast modes rise to their noise floor while slow ones fall. So a stretch of 2^j steps is leapt over
only where no step in it can have reached the target, and halved elsewhere, down to single steps.
What bounds the loss within a stretch from below: noise that has come in since the learning rate
last changed only grows; what was there before goes monotonically to 0 (or grows) in a mode of SGD,
and from rest to 0 in a mode whose momentum and average do not swing; in others it is at least 0.
So the step found is the first one, for all methods. With momentum or averaging the stretches after
a change of rate or batch are walked step by step, up to where the noise alone exceeds the target.

>>> from largebatch.study.nqm import Descent, best_steps, loss_after, power_law, steps_to_target
>>> paper = power_law(10_000, groups=100)
>>> [f"{loss:.2f}" for loss in loss_after(paper, Descent(), [0.01, 1.0], 64, 1000)]
['2.82', '0.65']
>>> steps_to_target(paper, Descent(), [0.01, 0.1, 1.0], 64, 0.01).tolist()
[1348167.0, 152234.0, inf]
>>> [point.steps for point in best_steps(paper, Descent(), [64, 65536], 0.01)]
[95837.0, 6895.0]
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from largebatch.study.nqm.model import (
    Array,
    Descent,
    Moments,
    Spectrum,
    at_start,
    expected_loss,
    one_step,
)

MOST_STEPS = 2**40
Runs = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class BatchStage:
    """Steps at one batch size and one multiple of the learning rate; None: all that follow.

    Raises:
        ValueError: a number out of range.
    """

    batch_size: float
    lr_factor: float = 1.0
    steps: int | None = None

    def __post_init__(self) -> None:
        if not self.batch_size > 0:
            raise ValueError(f"batch_size must be > 0, got {self.batch_size}")
        if not 0 < self.lr_factor < math.inf:
            raise ValueError(f"lr_factor must be > 0 and finite, got {self.lr_factor}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be >= 1, got {self.steps}: leave the stage out")


Batch = float | Sequence[BatchStage]
"""One batch size, or stages of which the last alone has no end: batch ramps, rates in pieces."""


def loss_after(
    spectrum: Spectrum, descent: Descent, lrs: ArrayLike, batch: Batch, steps: int
) -> Array:
    """E[L] after `steps` steps at each of `lrs`; shape (rates,)."""
    rates = _rates(lrs)
    second = at_start(spectrum, descent, len(rates))
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        for stage in _stages(batch):
            count = steps if stage.steps is None else min(steps, stage.steps)
            steps -= count
            moments = one_step(spectrum, descent, stage.lr_factor * rates)
            while count:
                if count & 1:
                    second = moments.after(second) + moments.noise / stage.batch_size
                count >>= 1
                if count:
                    moments = moments.doubled()
        return expected_loss(spectrum, second)


def steps_to_target(
    spectrum: Spectrum,
    descent: Descent,
    lrs: ArrayLike,
    batch: Batch,
    target: float,
    most_steps: int = MOST_STEPS,
) -> Array:
    """The first step after which E[L] is at most `target`, at each of `lrs`; shape (rates,).

    Infinity where it never is, or not within about `most_steps`. A rate at which the last stage is
    unstable counts as never, whatever its loss falls to before it grows.
    """
    if not target > 0:
        raise ValueError(f"target must be > 0, got {target}")
    walk = _Walk(spectrum, descent, _rates(lrs), target)
    return walk.through(_stages(batch), most_steps)


@dataclass
class _Walk:
    """Runs side by side, one for each learning rate, all at the same step."""

    spectrum: Spectrum
    descent: Descent
    lrs: Array
    target: float
    race: bool = False
    """Whether only the first to reach the target are asked for: the others stay at infinity."""
    reached: Array = field(init=False)
    _step: int = 0
    _before: Array = field(init=False)
    """E[z zᵀ] of what was there when the stage began."""
    _since: Array = field(init=False)
    """E[z zᵀ] of the stage's noise."""
    _sure: NDArray[np.bool_] = field(init=False)
    """Modes whose `_before` is least at one end of any stretch; shape (rates, modes)."""
    _levels: list[Moments] = field(init=False)
    """The maps of 1, 2, 4, … steps of the stage."""

    def __post_init__(self) -> None:
        self._before = at_start(self.spectrum, self.descent, len(self.lrs))
        self._since = np.zeros_like(self._before)
        there = expected_loss(self.spectrum, self._before) <= self.target
        self.reached = np.where(there, 0.0, math.inf)

    def _left(self, runs: Runs) -> Runs:
        """Those of `runs` that are still on their way."""
        there = np.isfinite(self.reached)
        return runs[:0] if self.race and np.any(there) else runs[~there[runs]]

    def through(self, stages: Sequence[BatchStage], most_steps: int) -> Array:
        """Walk to the target, or to where no run can reach it any more; returns `reached`."""
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            for stage in stages:
                self._through(stage, most_steps)
        return self.reached

    def _through(self, stage: BatchStage, most_steps: int) -> None:
        self._before, self._since = self._before + self._since, np.zeros_like(self._since)
        lrs = stage.lr_factor * self.lrs
        step = one_step(self.spectrum, self.descent, lrs)
        self._levels = [Moments(step.matrix, step.noise / stage.batch_size)]
        sharpness = lrs[:, None] * self.spectrum.curvature ** (1 - self.descent.preconditioner)
        self._sure = np.full(sharpness.shape, len(self.descent.state) == 1)
        if self._step == 0:
            self._sure |= sharpness <= self.descent.monotone_up_to
        runs, end = self._left(np.arange(len(lrs))), most_steps
        if stage.steps is not None:
            end = min(most_steps, self._step + stage.steps)
        else:
            stable = np.max(sharpness, axis=1) < self.descent.stable_below
            runs = runs[stable[runs]]
        level = 0
        while len(runs) and self._step < end:
            while self._step + 2**level > end:
                level -= 1
            self._scan(runs, level, self._step)
            self._step += 2**level
            level += 1
            runs = self._left(runs)
            if stage.steps is None:  # its noise never falls
                noise = expected_loss(self.spectrum, self._since[:, :, runs])
                runs = runs[noise <= self.target]
        self._step = end

    def _scan(self, runs: Runs, level: int, step: int) -> None:
        """Take `runs` through the 2^level steps after `step`, and note which get there when."""
        if not len(runs):
            return
        while len(self._levels) <= level:
            self._levels.append(self._levels[-1].doubled())
        leap = self._levels[level].of(runs)
        before, since = self._before[:, :, runs], self._since[:, :, runs]
        before_then, since_then = leap.after(before), leap.after(since) + leap.noise
        if level:
            least = np.where(self._sure[runs], np.minimum(before[-1, -1], before_then[-1, -1]), 0.0)
            clear = (least + since[-1, -1]) @ self.spectrum.weights > self.target
        else:  # one that has overflowed is not there
            clear = ~(expected_loss(self.spectrum, before_then + since_then) <= self.target)
        ahead, rest = runs[clear], runs[~clear]
        self._before[:, :, ahead] = before_then[:, :, clear]
        self._since[:, :, ahead] = since_then[:, :, clear]
        if level:
            self._scan(rest, level - 1, step)
            self._scan(self._left(rest), level - 1, step + 2 ** (level - 1))
        else:
            self.reached[rest] = step + 1


class BestSteps(NamedTuple):
    """The fewest steps at one batch size; infinite where no rate reaches the target."""

    batch_size: float
    lr: float
    steps: float
    crossing: float
    """Where between the step before and this one the target lies, log steps against loss."""


def best_steps(
    spectrum: Spectrum,
    descent: Descent,
    batch_sizes: Sequence[float],
    target: float,
    lrs: ArrayLike | None = None,
) -> list[BestSteps]:
    """The fewest steps to `target` over constant learning rates, at each batch size.

    Args:
        lrs: the rates there are; None: all of the 30 octaves below the limit of stability, in steps
            of 1 % around the best.
    """
    found = []
    for batch_size in batch_sizes:
        if lrs is not None:
            found.append(_best_of(spectrum, descent, batch_size, target, _rates(lrs)))
            continue
        sharpest = np.max(spectrum.curvature ** (1 - descent.preconditioner))
        limit = descent.stable_below / sharpest
        best = _best_of(spectrum, descent, batch_size, target, limit * 2.0 ** (-COARSE / 4))
        for spacing in (16, 64):
            around = best.lr * 2.0 ** (FINE / spacing)
            around = around[around < limit]
            best = _best_of(spectrum, descent, batch_size, target, around)
        found.append(best)
    return found


COARSE: Final = np.arange(1, 121)
"""Quarter octaves below the limit of stability."""
FINE: Final = np.arange(-5, 6)


def _best_of(
    spectrum: Spectrum, descent: Descent, batch_size: float, target: float, lrs: Array
) -> BestSteps:
    steps = _Walk(spectrum, descent, lrs, target, race=True).through(
        _stages(batch_size), MOST_STEPS
    )
    fewest = float(np.min(steps))
    tied = lrs[steps == fewest]
    crossing = np.full(len(tied), fewest)
    if 1 < fewest < math.inf:
        before, after = (
            loss_after(spectrum, descent, tied, batch_size, int(fewest) - back) for back in (1, 0)
        )
        crossing *= (1 - 1 / fewest) ** ((target - after) / (before - after))
    best = int(np.argmin(crossing))
    return BestSteps(float(batch_size), float(tied[best]), fewest, float(crossing[best]))


def _rates(lrs: ArrayLike) -> Array:
    rates = np.atleast_1d(np.asarray(lrs, np.float64))
    if rates.ndim != 1 or not np.all((rates > 0) & np.isfinite(rates)):
        raise ValueError(f"lrs must be finite numbers > 0, got {lrs!r}")
    return rates


def _stages(batch: Batch) -> Sequence[BatchStage]:
    stages = [BatchStage(batch_size=batch)] if isinstance(batch, int | float) else list(batch)
    endless = [stage.steps is None for stage in stages]
    if endless != [False] * (len(stages) - 1) + [True]:
        raise ValueError("of the stages the last, and it alone, must have steps=None")
    return stages
