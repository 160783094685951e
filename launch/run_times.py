"""How long the steps of a run took, and when they were made, from its folder."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from largebatch.launch.robust import Series, raised, spells
from largebatch.train.record import METRICS

HEARTBEAT: Final = "heartbeat.json"
WARM_UP: Final = 5  # steps at the beginning of a run, where things are compiled and filled
LEAST_SLOWER: Final = 0.3  # of the usual time of a step
LEAST_LOST_SECONDS: Final = 1.0
"""By a spell of slow steps in all: below it, it is the noise of a short run."""
STALL_TIMES: Final = 20.0
STALL_SECONDS: Final = 10.0
"""A single step that took so many times the usual, and so much longer, is a stall."""


@dataclass(frozen=True)
class Steps:
    """Recorded steps; each array of shape (lines,).

    Attributes:
        seconds: of a step, evaluations and saves left out where the record tells.
        work: samples of a global batch; steps of different batches are not compared.
        times: seconds since 1970 at the end of the step; NaN where it is not known.
        anchor: what the times are known by.
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


def read_json_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(number of the line, what it holds), without lines that are not whole."""
    found = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                except ValueError:
                    continue
                if isinstance(line, dict):
                    found.append((number, line))
    except OSError:
        return []
    return found


def read_json(path: Path) -> dict[str, Any]:
    """What a file holds; nothing where there is none, or half of one."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def read_steps(folder: Path) -> Steps | None:
    """None where the folder holds no record of two steps or more."""
    lines = [line for _, line in read_json_lines(folder / METRICS)]
    lines = [
        line
        for line in lines
        if all(isinstance(line.get(name), (int, float)) for name in ("step", "seconds"))
    ]
    if len(lines) < 2:
        return None
    numbers = np.array([float(line["step"]) for line in lines])
    since = np.array([float(line["seconds"]) for line in lines])
    work = np.array([float(line.get("global_batch_size", 1)) for line in lines])
    rates = np.array([float(line.get("samples_per_second") or np.nan) for line in lines])
    made = np.diff(numbers, prepend=0.0)
    between = np.diff(since, prepend=0.0) / np.maximum(made, 1.0)
    seconds = np.where(np.isnan(rates), between, work / rates)
    times, anchor = _times(folder, lines, numbers, since)
    return Steps(numbers, seconds, work, times, anchor)


def _times(
    folder: Path, lines: list[dict[str, Any]], numbers: Series, since: Series
) -> tuple[Series, str]:
    beat = read_json(folder / HEARTBEAT)
    if "time" in beat and "step" in beat:
        at = int(np.searchsorted(numbers, beat["step"], side="right")) - 1
        begun, anchor = beat["time"] - since[max(at, 0)], "the heartbeat, to a few seconds"
    else:
        written = os.stat(folder / METRICS).st_mtime
        begun, anchor = written - since[-1], f"when {METRICS} was last written, roughly"
    times = begun + since
    # A resumed run's seconds go on, the clock did not stop in between.
    resumed = max(
        (int(found[1]) for path in (folder / ".hydra").glob("resumed-*")
         if (found := re.match(r"resumed-(\d+)", path.name))),
        default=0,
    )  # fmt: skip
    samples = np.array([float(line.get("samples", np.inf)) for line in lines])
    times[samples <= resumed] = np.nan
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
