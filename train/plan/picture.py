"""The picture of a plan: batch size, learning rate and steps against samples."""

import math

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, NullLocator

from largebatch.common.figures import BLUE, GREEN, GREY, GRID, RED, paper_style
from largebatch.schedules import Plan, PlannedStage

BATCH, RATE, STEPS = BLUE, RED, GREEN
MARKS_A_RUN = 600  # points that the learning rate is drawn from
MOST_MARKED_CHANGES = 12
MOST_LABELLED_SIZES = 6
MOST_SIZES_IN_OCTAVES = 12  # more of them are a ramp by increments, a straight line
MOST_ABOVE = 3.0  # times the run's own steps, where the constant batch's line leaves the panel


def draw(plan: Plan, title: str) -> Figure:
    """Three panels over one axis of samples; tokens on top where a sample holds several."""
    stages = plan.stages()
    with paper_style():
        figure = Figure(figsize=(7.0, 5.6), layout="constrained")
        batch, rate, steps = figure.subplots(3, 1, sharex=True, height_ratios=[1.0, 1.2, 1.0])
        _draw_batch(batch, stages)
        _draw_rate(rate, plan, stages)
        _draw_steps(steps, plan, stages)
        for panel in (batch, rate, steps):
            panel.grid(True, color=GRID, linewidth=0.6)
            if len(stages) <= MOST_MARKED_CHANGES:
                for stage in stages[1:]:
                    panel.axvline(stage.samples, color=GREY, linewidth=0.6, linestyle=":", zorder=1)
        steps.set_xlim(0, _end(stages))
        steps.set_xlabel("Samples")
        steps.xaxis.set_major_formatter(EngFormatter(sep=""))
        if plan.tokens_per_sample > 1:
            per = plan.tokens_per_sample
            top = batch.secondary_xaxis(
                "top", functions=(lambda samples: samples * per, lambda tokens: tokens / per)
            )
            top.xaxis.set_major_formatter(FuncFormatter(_tokens))
            top.set_xlabel("Tokens")
        figure.align_ylabels([batch, rate, steps])
        figure.suptitle(title, fontsize=9.5)
    return figure


def _draw_batch(axes: Axes, stages: list[PlannedStage]) -> None:
    edges = [stage.samples for stage in stages] + [_end(stages)]
    sizes = [stage.batch_size for stage in stages]
    axes.plot(edges, [*sizes, sizes[-1]], drawstyle="steps-post", color=BATCH, linewidth=1.6)
    axes.set_ylabel("Global batch size")
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


def _draw_rate(axes: Axes, plan: Plan, stages: list[PlannedStage]) -> None:
    """The learning rate as each step takes it, held over the step's samples."""
    places: list[float] = []
    rates: list[float] = []
    for stage in stages:
        share = stage.num_steps * stage.batch_size / _end(stages)
        marks = min(stage.num_steps, max(2, math.ceil(share * MARKS_A_RUN)))
        for mark in range(marks):
            step = mark * (stage.num_steps - 1) // max(1, marks - 1)
            point = plan.at(stage.samples + step * stage.batch_size)
            places.append(point.samples)
            rates.append(point.lr)
        places.append(stage.samples + stage.num_steps * stage.batch_size)
        rates.append(rates[-1])
    axes.plot(places, rates, color=RATE, linewidth=1.6)
    axes.set_ylabel("Learning rate")
    axes.set_ylim(0, max(rates) * 1.1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.4g}"))


def _draw_steps(axes: Axes, plan: Plan, stages: list[PlannedStage]) -> None:
    end, totals = _end(stages), plan.totals()
    alone = totals.steps + totals.steps_saved
    top = max(totals.steps, min(alone, MOST_ABOVE * totals.steps))
    notes = [(STEPS, f"{totals.steps:,} steps")]
    places = [stage.samples for stage in stages] + [end]
    axes.plot(places, [stage.step for stage in stages] + [totals.steps], color=STEPS, linewidth=1.6)
    if totals.steps_saved:
        axes.plot([0, end], [0, alone], color=GREY, linewidth=1.0, linestyle="--", zorder=1)
        notes.append((GREY, f"{alone:,} at a constant {stages[0].batch_size:,}"))
    for row, (colour, text) in enumerate(notes):
        # Left of a guide that rises to the right corner, right of one that leaves the panel early.
        right = alone > top
        axes.text(
            0.985 if right else 0.015, 0.94 - 0.16 * row, text, color=colour, va="top",
            ha="right" if right else "left", transform=axes.transAxes,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    axes.set_ylabel("Steps")
    axes.set_ylim(0, top * 1.08)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))


def _end(stages: list[PlannedStage]) -> int:
    *_, last = stages
    return last.samples + last.num_steps * last.batch_size


def _tokens(value: float, _: object = None) -> str:
    """Billions as people count tokens: 250B rather than 250G."""
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"
