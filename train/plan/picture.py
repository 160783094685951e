"""The picture of a plan: batch size, learning rate and steps against samples.

In ink: elsewhere a colour stands for an optimizer.
"""

import math
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from largebatch.common.figures import GREY, GRID, INK, paper_style
from largebatch.schedules import Plan, PlannedStage

NAMES = "Global batch size", "Learning rate", "Steps"
MARKS_A_RUN = 600  # points that the learning rate is drawn from
MOST_MARKED_CHANGES = 12
MOST_LABELLED_SIZES = 6
MOST_SIZES_IN_OCTAVES = 12  # more of them are a ramp by increments, a straight line
EARLY = 0.1  # of the run: a ramp that is over by then is drawn by itself too
MOST_ABOVE = 3.0  # times the run's own steps, where the constant batch's line leaves the panel


def draw(plan: Plan, title: str) -> Figure:
    """Three panels over one axis of samples; tokens on top where a sample holds several. A ramp
    that is over early has a column of its own before that of the run.
    """
    stages = plan.stages()
    ends = _ends(stages)
    with paper_style():
        figure = Figure(figsize=(7.0, 5.6), layout="constrained")
        panels = figure.subplots(
            3, len(ends), sharex="col", squeeze=False, height_ratios=[1.0, 1.2, 1.0],
            width_ratios=[1.0, 1.4][-len(ends) :],
        )  # fmt: skip
        for end, (batch, rate, steps) in zip(ends, panels.T, strict=True):
            _draw_batch(batch, stages)
            _draw_rate(rate, plan, stages, end)
            _draw_steps(steps, plan, stages, end)
            for panel in (batch, rate, steps):
                panel.grid(True, color=GRID, linewidth=0.6)
                if len(stages) <= MOST_MARKED_CHANGES:
                    for stage in stages[1:]:
                        panel.axvline(
                            stage.samples, color=GREY, linewidth=0.6, linestyle=":", zorder=1
                        )
            steps.set_xlim(0, end)
            steps.set_xlabel("Samples" if end == ends[-1] else "Samples, to the ramp's end")
            if len(ends) > 1:
                steps.xaxis.set_major_locator(MaxNLocator(5))
            steps.xaxis.set_major_formatter(EngFormatter(sep=""))
            if plan.tokens_per_sample > 1:
                _add_tokens(batch, plan.tokens_per_sample)
        for panel, name in zip(panels[:, 0], NAMES, strict=True):
            panel.set_ylabel(name)
        figure.align_ylabels(panels[:, 0])
        figure.suptitle(title, fontsize=9.5)
    return figure


def _ends(stages: list[PlannedStage]) -> list[float]:
    """Where the columns end: the run's, and before it that of a ramp which it would squeeze."""
    whole, last_change = _end(stages), stages[-1].samples
    early = 0 < last_change < EARLY * whole
    return [last_change * 1.25, whole] if early else [whole]


def _add_tokens(axes: Axes, per: int) -> None:
    def to_tokens(samples: Any) -> Any:
        return samples * per

    def to_samples(tokens: Any) -> Any:
        return tokens / per

    top = axes.secondary_xaxis("top", functions=(to_tokens, to_samples))
    top.xaxis.set_major_formatter(FuncFormatter(_tokens))
    top.set_xlabel("Tokens")


def _draw_batch(axes: Axes, stages: list[PlannedStage]) -> None:
    edges = [stage.samples for stage in stages] + [_end(stages)]
    sizes = [stage.batch_size for stage in stages]
    axes.plot(edges, [*sizes, sizes[-1]], drawstyle="steps-post", color=INK, linewidth=1.6)
    least, most = min(sizes), max(sizes)
    if most >= 4 * least and len(set(sizes)) <= MOST_SIZES_IN_OCTAVES:
        axes.set_yscale("log", base=2)
        few = len(set(sizes)) <= MOST_LABELLED_SIZES
        ticks = sorted(set(sizes)) if few else _powers(least, most)
        axes.yaxis.set_major_locator(FixedLocator(ticks))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(least / 1.3, most * 1.3)
    else:
        axes.set_ylim(0, most * 1.15)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:,.0f}"))


def _powers(least: int, most: int) -> list[int]:
    first, last = math.ceil(math.log2(least)), math.floor(math.log2(most))
    every = math.ceil((last - first + 1) / MOST_LABELLED_SIZES)
    return [2**power for power in range(first, last + 1, every)]


def _draw_rate(axes: Axes, plan: Plan, stages: list[PlannedStage], end: float) -> None:
    """The learning rate as each step up to `end` takes it, held over the step's samples."""
    places: list[float] = []
    rates: list[float] = []
    for stage in stages:
        steps = min(stage.num_steps, math.ceil((end - stage.samples) / stage.batch_size))
        if steps <= 0:
            break
        marks = min(steps, max(2, math.ceil(steps * stage.batch_size / end * MARKS_A_RUN)))
        for mark in range(marks):
            step = mark * (steps - 1) // max(1, marks - 1)
            point = plan.at(stage.samples + step * stage.batch_size)
            places.append(point.samples)
            rates.append(point.lr)
        places.append(stage.samples + steps * stage.batch_size)
        rates.append(rates[-1])
    axes.plot(places, rates, color=INK, linewidth=1.6)
    axes.set_ylim(0, max(rates) * 1.1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.4g}"))


def _draw_steps(axes: Axes, plan: Plan, stages: list[PlannedStage], end: float) -> None:
    whole, totals = _end(stages), plan.totals()
    alone = totals.steps + totals.steps_saved
    places = [*(stage.samples for stage in stages), whole]
    counts = [*(stage.step for stage in stages), totals.steps]
    axes.plot(places, counts, color=INK, linewidth=1.6)
    if totals.steps_saved:
        axes.plot([0, whole], [0, alone], color=GREY, linewidth=1.0, linestyle="--", zorder=1)
    if end < whole:
        axes.set_ylim(0, alone * end / whole * 1.08)
    else:
        top = max(totals.steps, min(alone, MOST_ABOVE * totals.steps))
        axes.set_ylim(0, top * 1.08)
        _name_totals(axes, stages[0].batch_size, totals.steps, alone, right=alone > top)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _name_totals(axes: Axes, first: int, steps: int, alone: int, *, right: bool) -> None:
    """Left of a guide that rises to the right corner, right of one that leaves the panel early."""
    notes = [(INK, f"{steps:,} steps")]
    notes += [(GREY, f"{alone:,} at a constant {first:,}")] * (alone > steps)
    for row, (colour, text) in enumerate(notes):
        axes.text(
            0.985 if right else 0.015, 0.94 - 0.16 * row, text, color=colour, va="top",
            ha="right" if right else "left", transform=axes.transAxes,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip


def _end(stages: list[PlannedStage]) -> int:
    *_, last = stages
    return last.samples + last.num_steps * last.batch_size


def _tokens(value: float, _: object = None) -> str:
    """Billions as people count tokens: 250B rather than 250G."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
