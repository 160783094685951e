"""How long the steps of a run took, and when they were made, from its folder."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from largebatch.common.robust import Series, raised, spells
from largebatch.records.columns import read_columns
from largebatch.records.fields import within
from largebatch.records.heartbeat import find_beat
from largebatch.records.names import METRICS

WARM_UP: Final = 5  # steps at the beginning of a run, where things are compiled and filled
LEAST_SLOWER: Final = 0.3  # of the usual time of a step
LEAST_LOST_SECONDS: Final = 1.0
"""By a spell of slow steps in all: below it, it is the noise of a short run."""
STALL_TIMES: Final = 20.0
STALL_SECONDS: Final = 10.0
"""A single step above both, the multiple of the usual time and the extra seconds, is a stall."""


@dataclass(frozen=True)
class Steps:
    """Recorded steps; each array of shape (lines,). Seconds of a step leave evaluations and saves
    out where the record tells; `work` are samples of a global batch, and steps of different batches
    are not compared; `times` are seconds since 1970 at the end of the step, NaN where not known,
    and `anchor` is what they are known by.
    """

    numbers: Series
    seconds: Series
    work: Series
    times: Series
    anchor: str


@dataclass(frozen=True)
class SlowSpell:
    """Steps that took longer than usual. Times are seconds since 1970, NaN where not known."""

    first: int
    last: int
    seconds: float
    usual: float
    begin: float
    end: float


_COUNT: Final = within(0, 2**53)
_FIELDS: Final = {
    "step": _COUNT,
    "seconds": within(0, 1e11),
    "samples": _COUNT,
    "global_batch_size": within(1, 2**53),
    "samples_per_second": within(0, 1e18),
}


def read_steps(folder: Path, problems: list[str]) -> Steps | None:
    """None where the folder holds no record of two steps or more."""
    columns = read_columns(folder / METRICS, _FIELDS.get, problems)
    if not {"step", "seconds"} <= columns.keys():
        return None
    rows = len(columns["step"])
    read = {key: np.array(columns.get(key, [np.nan] * rows)) for key in _FIELDS}
    known = np.isfinite(read["step"]) & np.isfinite(read["seconds"])
    if np.count_nonzero(known) < 2:
        return None
    numbers, since, samples, work, rates = (read[key][known] for key in _FIELDS)
    work = np.where(np.isnan(work), 1.0, work)
    rates = np.where(rates > 0, rates, np.nan)
    made = np.diff(numbers, prepend=0.0)
    between = np.diff(since, prepend=0.0) / np.maximum(made, 1.0)
    seconds = np.where(np.isnan(rates), between, work / rates)
    times, anchor = _times(folder, samples, numbers, since)
    return Steps(numbers, seconds, work, times, anchor)


def _times(folder: Path, samples: Series, numbers: Series, since: Series) -> tuple[Series, str]:
    beat = find_beat(folder, [])
    if beat is not None and beat.time is not None and beat.step is not None:
        at = int(np.searchsorted(numbers, beat.step, side="right")) - 1
        begun, anchor = beat.time - since[max(at, 0)], "the heartbeat, to a few seconds"
    else:
        written = os.stat(folder / METRICS).st_mtime
        begun, anchor = written - since[-1], f"when {METRICS} was last written, roughly"
    times = begun + since
    # A resumed run's seconds go on, the clock did not stop in between.
    resumed = max(
        (float(found[1]) for path in (folder / ".hydra").glob("resumed-*")
         if (found := re.match(r"resumed-([0-9]{1,18})-", path.name))),
        default=0.0,
    )  # fmt: skip
    times[np.where(np.isnan(samples), np.inf, samples) <= resumed] = np.nan
    return times, anchor


def slow_spells(steps: Steps) -> list[SlowSpell]:
    """Runs of steps slower than usual for their batch size, and single steps that stalled."""
    slow = np.zeros(len(steps.numbers), dtype=bool)
    usual = np.full(len(steps.numbers), np.nan)
    compared = steps.numbers > steps.numbers[0] + WARM_UP - 1
    for work in np.unique(steps.work):
        of_size = np.flatnonzero(compared & (steps.work == work) & np.isfinite(steps.seconds))
        if not len(of_size):
            continue
        seconds = steps.seconds[of_size]
        mask, typical = raised(seconds, LEAST_SLOWER * float(np.quantile(seconds, 0.25)))
        usual[of_size] = typical
        slow[of_size] = mask
    found = [
        _spell(steps, usual, first, last)
        for first, last in spells(slow)
        if np.sum((steps.seconds - usual)[first : last + 1]) > LEAST_LOST_SECONDS
    ]
    stalls = (steps.seconds > STALL_TIMES * usual) & (steps.seconds > usual + STALL_SECONDS)
    found += [_spell(steps, usual, i, i) for i in np.flatnonzero(stalls & ~slow).tolist()]
    return sorted(found, key=lambda spell: spell.first)


def _spell(steps: Steps, usual: Series, first: int, last: int) -> SlowSpell:
    seconds = float(np.median(steps.seconds[first : last + 1]))
    return SlowSpell(
        int(steps.numbers[first]), int(steps.numbers[last]), seconds,
        float(np.nanmedian(usual[first : last + 1])),
        float(steps.times[first] - steps.seconds[first]), float(steps.times[last]),
    )  # fmt: skip
