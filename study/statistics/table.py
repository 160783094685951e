"""A study's steps as rows, one a seed, and as arrays over optimizers, batch sizes and seeds."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from largebatch.common.numbers import real_number, whole_number
from largebatch.study.statistics.solver import Array, Mask


@dataclass(frozen=True)
class SeedSteps:
    """The steps to the target of one seed, of one optimizer at one batch size.

    `steps` may be fractional, where the crossing is interpolated between two evaluations; None is a
    miss, as are NaN and infinity. `rate` is the learning rate it had. `at_least` is what a miss
    still says: more steps than this; it is used at batch sizes below all that reached the target,
    where a run that is too short is why one misses. Elsewhere a miss says nothing about the curve.
    """

    optimizer: str
    batch_size: int
    seed: int
    steps: float | None
    rate: float | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class StepsTable:
    """Arrays (optimizers, batch sizes, seeds), NaN where there is no such row.

    A batch size where any seed missed has no mean, so it is no point of the curve: its steps stand
    here, for the count, and are not `used`, which is NaN there. Below all points `used` has a
    bound in the place of a miss where each miss has one; such a batch size `is_bound`.
    """

    optimizers: tuple[str, ...]
    batch_sizes: Array
    log_steps: Array
    missed: Mask
    log_rates: Array
    used: Array
    is_bound: Mask

    @property
    def points(self) -> Array:
        """`used` without the bounds."""
        return np.where(self.is_bound[:, :, None], np.nan, self.used)


def table_of(rows: Iterable[Any]) -> StepsTable:
    """The arrays of `rows`: SeedSteps, or anything with its fields as attributes or keys.

    Raises:
        ValueError: a value that cannot be, or two rows of one optimizer, batch size and seed.
    """
    read = [_read(row) for row in rows]
    optimizers = tuple(dict.fromkeys(row.optimizer for row in read))
    sizes = sorted({row.batch_size for row in read})
    seeds = sorted({row.seed for row in read})
    shape = (len(optimizers), len(sizes), len(seeds))
    log_steps, log_rates, bounds = (np.full(shape, np.nan) for _ in range(3))
    missed, filled = np.zeros(shape, dtype=np.bool_), np.zeros(shape, dtype=np.bool_)
    for row in read:
        cell = optimizers.index(row.optimizer), sizes.index(row.batch_size), seeds.index(row.seed)
        if filled[cell]:
            raise ValueError(
                f"two rows of optimizer {row.optimizer!r}, batch size {row.batch_size} and seed "
                f"{row.seed}: steps need one row a seed, at the learning rate that was chosen"
            )
        filled[cell] = True
        log_rates[cell] = _log(row.rate)
        log_steps[cell], bounds[cell] = _log(row.steps), _log(row.at_least)
        missed[cell] = row.steps is None
    reached = filled.any(axis=2) & ~missed.any(axis=2)
    bounded = np.where(missed, bounds, log_steps)
    is_bound = missed.any(axis=2) & ~np.logical_or.accumulate(reached, axis=1)
    is_bound &= ~(missed & np.isnan(bounds)).any(axis=2)
    used = np.where((reached | is_bound)[:, :, None], bounded, np.nan)
    batch_sizes = np.array(sizes, dtype=np.float64)
    return StepsTable(optimizers, batch_sizes, log_steps, missed, log_rates, used, is_bound)


def _read(row: Any) -> SeedSteps:
    def field(name: str) -> Any:
        value = row.get(name) if isinstance(row, Mapping) else getattr(row, name, None)
        # As pandas writes a missing value, or a median over misses.
        return None if isinstance(value, float) and not math.isfinite(value) else value

    def positive(name: str) -> float | None:
        value = field(name)
        return None if value is None else real_number(value, name, above=0)

    optimizer, batch_size, seed = field("optimizer"), field("batch_size"), field("seed")
    if optimizer is None or batch_size is None or seed is None:
        raise ValueError(f"a row needs optimizer, batch_size, seed and steps, got {row!r:.200}")
    return SeedSteps(
        optimizer=str(optimizer),
        batch_size=whole_number(batch_size, "batch_size", 1),
        seed=whole_number(seed, "seed"),
        steps=positive("steps"),
        rate=positive("rate"),
        at_least=positive("at_least"),
    )


def _log(value: float | None) -> float:
    return math.nan if value is None else math.log(value)
