"""What stands out in the network counters of a run's nodes, in words.

A node stands out in a stretch of time when it lies above the other nodes' median by SIGMAS robust
standard deviations and by the kind's `floor`; all nodes together, when their median lies so above
what it usually is.
"""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from largebatch.common import robust
from largebatch.common.text import and_more
from largebatch.launch.diagnose.nic.counters import CounterKind, quantity
from largebatch.launch.diagnose.nic.survey import Reading, Survey
from largebatch.launch.diagnose.run_times import SlowSpell, Steps, slow_spells
from largebatch.records.fields import LAST_MOMENT

FEWEST_NODES: Final = 4  # to compare one with the others
MOST_NAMED: Final = 6


@dataclass(frozen=True)
class Episode:
    """What stood out. `nodes` in order of how much; times in seconds since 1970."""

    kind: CounterKind
    nodes: tuple[str, ...]
    everywhere: bool
    begin: float
    end: float
    value: float
    usual: float
    counter: str

    @property
    def where(self) -> str:
        return "all nodes" if self.everywhere else and_more(self.nodes, MOST_NAMED)

    def __str__(self) -> str:
        where = f"{self.where}{' together' * self.everywhere}"
        usual = "their usual" if self.everywhere else "the others'"
        return (
            f"{self.kind.name} on {where}, {clock(self.begin)} to {clock(self.end)}: "
            f"{quantity(self.value, self.kind)}, {usual} {quantity(self.usual, self.kind)}; "
            f"most of it in {self.counter}"
        )


def unusual(survey: Survey | None) -> list[Episode]:
    """Everything that stands out, kind by kind."""
    if survey is None:
        return []
    names, borders = survey.nodes, survey.borders
    found: list[Episode] = []
    for reading in survey.readings:
        if len(names) >= FEWEST_NODES:
            found += _apart(reading, names, borders)
            middle = robust.known_median(reading.values)
            found += _over_time(reading, tuple(names), middle, borders, True, reading.worst[0])
            continue
        for name, series, counter in zip(names, reading.values, reading.worst, strict=True):
            found += _over_time(reading, (name,), series, borders, False, counter)
    return found


def _apart(reading: Reading, names: Sequence[str], borders: robust.Series) -> Iterator[Episode]:
    """Nodes above the others, in stretches of time or over all of it; at one time, one episode."""
    kind, values = reading.kind, reading.values
    middle = robust.known_median(values)
    noise = robust.MAD_TO_SIGMA * robust.known_median(np.abs(values - middle))
    usual = float(np.median(reading.means))
    length, bins = float(borders[1] - borders[0]), len(borders) - 1
    least = max(kind.floor, robust.SIGMAS * counting_noise(kind, usual, length))
    above = values > middle + np.maximum(least, robust.SIGMAS * noise)
    least = max(kind.floor, robust.SIGMAS * counting_noise(kind, usual, length * bins))
    most = usual + max(least, robust.SIGMAS * robust.spread(reading.means))
    stretches: list[tuple[int, int, int]] = []  # first, last, row
    for row in range(len(names)):
        found = robust.spells(above[row], min(robust.SHORTEST, bins))
        if reading.means[row] > most and not found:
            found = [(0, bins - 1)]
        stretches += [(first, last, row) for first, last in found]
    for group in _overlapping(sorted(stretches)):
        first, last = min(f for f, _, _ in group), max(of for _, of, _ in group)
        height: dict[int, float] = {}
        for begin, end, row in group:
            here = float(np.nanmean(values[row, begin : end + 1]))
            height[row] = max(height.get(row, 0.0), here)
        order = sorted(height, key=lambda row: -height[row])
        yield Episode(
            kind, tuple(names[row] for row in order), False,
            float(borders[first]), float(borders[last + 1]), height[order[0]],
            float(np.nanmedian(middle[first : last + 1])), reading.worst[order[0]],
        )  # fmt: skip


def _overlapping(stretches: Sequence[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """Groups of stretches, in the order of their beginnings, that touch in time, or nearly."""
    groups: list[list[tuple[int, int, int]]] = []
    end = -1
    for stretch in stretches:
        if groups and stretch[0] <= end + robust.SHORTEST:
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
        end = max(end, stretch[1])
    return groups


def _over_time(
    reading: Reading,
    names: tuple[str, ...],
    series: robust.Series,
    borders: robust.Series,
    everywhere: bool,
    counter: str,
) -> Iterator[Episode]:
    kind = reading.kind
    known = np.flatnonzero(np.isfinite(series))
    mask: robust.Mask = np.zeros(len(series), dtype=bool)
    mean = float(series[known].mean()) if len(known) else 0.0
    noise = counting_noise(kind, mean, float(borders[1] - borders[0]))
    least = max(kind.floor, robust.SIGMAS * noise)
    mask[known], usual = robust.raised(series[known], least)
    if kind.always is not None and len(known) and np.median(series[known]) > kind.always:
        mask[known] |= series[known] > kind.always
        usual = 0.0 if usual > kind.always else usual
    for first, last in robust.spells(mask):
        height = float(np.nanmean(series[first : last + 1]))
        yield Episode(
            kind, names, everywhere, float(borders[first]), float(borders[last + 1]), height, usual,
            counter,
        )  # fmt: skip


def counting_noise(kind: CounterKind, rate: float, seconds: float) -> float:
    """Noise of a rate over a number of seconds, for independent events: √(rate / seconds), one
    event at the least. Most stretches of a rare event hold none, which looks like no noise at all.
    """
    return math.sqrt(max(rate, 1 / seconds) / seconds) if kind.unit == "a second" else 0.0


# ---- words


def format_survey(survey: Survey, steps: Steps | None) -> list[str]:
    """The report, a line an entry."""
    minutes = (survey.borders[-1] - survey.borders[0]) / 60
    lines = [
        f"{len(survey.nodes):,} nodes, {survey.interfaces} interfaces that counted, {minutes:.1f} "
        f"minutes, a sample every {survey.every:.3g} s"
    ]
    for reading in survey.readings:
        highest = int(np.argmax(reading.means))
        lines.append(
            f"{reading.kind.name}: {quantity(float(np.median(reading.means)), reading.kind)} on "
            f"the median node, {quantity(float(reading.means[highest]), reading.kind)} on "
            f"{survey.nodes[highest]} ({reading.worst[highest]})"
        )
    if survey.resets:
        lines.append(f"{survey.resets} times a counter began anew at 0")
    if survey.lost_lines:
        lines.append(f"{survey.lost_lines} lines are lost: recorders were killed, or the disk full")
    episodes = unusual(survey)
    lines += [f"unusual: {episode}" for episode in episodes]
    if not episodes:
        lines.append("nothing stands out")
    if steps is not None:
        slow = slow_spells(steps)
        lines += [f"at the same time: {pair}" for pair in coincidences(episodes, slow)]
    return lines


def coincidences(episodes: Sequence[Episode], slow: Sequence[SlowSpell]) -> list[str]:
    """Slow steps and unusual counters that overlap in time."""
    return [
        f"steps {spell.first} to {spell.last} took {spell.seconds:.3g} s instead of "
        f"{spell.usual:.3g} s, and {episode.kind.name} on "
        f"{'all nodes' if episode.everywhere else ', '.join(episode.nodes[:MOST_NAMED])}"
        for spell in slow
        for episode in episodes
        if overlap(episode, spell)
    ]


def overlap(episode: Episode, spell: SlowSpell) -> bool:
    return episode.begin < spell.end and spell.begin < episode.end


def clock(seconds: float) -> str:
    """Local time of day, with its date."""
    if not 0 <= seconds < LAST_MOMENT:
        return "at no date"
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
