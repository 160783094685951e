"""nic.png: how long the nodes' interfaces were paused over a run, beside the time of its steps."""

from collections.abc import Sequence
from datetime import datetime

import matplotlib.dates as dates
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.common.figures import INK, paper_style
from largebatch.common.robust import Series
from largebatch.launch.diagnose.nic.survey import Reading, Survey
from largebatch.launch.diagnose.run_times import Steps

MOST_MAPS = 4
MOST_NODE_NAMES = 24
SECONDS_A_DAY = 86_400
LEAST_SCALE = 4.0  # times the kind's floor
MOST_SHOWN = 0.98  # of the steps' times


def nic_figure(survey: Survey, steps: Steps | None) -> Figure:
    """A map of nodes and time for each kind that moved, seconds a step below."""
    with paper_style():
        return _drawn(survey, steps)


def _drawn(survey: Survey, steps: Steps | None) -> Figure:
    borders = survey.borders
    shown = sorted(survey.readings, key=_height, reverse=True)[:MOST_MAPS]
    with_steps = steps is not None and bool(np.isfinite(steps.times).any())
    panels = max(1, len(shown)) + with_steps
    height = min(3.0, 0.9 + 0.12 * len(survey.nodes))
    figure = Figure(figsize=(9.0, 0.8 + height * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for panel, reading in zip(axes, shown, strict=False):
        _draw_map(figure, panel, reading, survey.nodes, borders)
    if not shown:
        axes[0].text(0.5, 0.5, "no counter moved", ha="center", transform=axes[0].transAxes)
    if with_steps and steps is not None:
        _draw_steps(axes[-1], steps)
    axes[-1].set_xlim(borders[0] / SECONDS_A_DAY, borders[-1] / SECONDS_A_DAY)
    zone = datetime.now().astimezone().tzinfo  # the words are in local time as well
    axes[-1].xaxis.set_major_locator(dates.AutoDateLocator(tz=zone))  # type: ignore[no-untyped-call]
    axes[-1].xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S", tz=zone))  # type: ignore[no-untyped-call]
    axes[-1].set_xlabel("Time of day")
    return figure


def _height(reading: Reading) -> float:
    """How far it goes, as a multiple of what is ordinary."""
    return float(np.nanmax(reading.values)) / reading.kind.floor


def _draw_map(
    figure: Figure, axes: Axes, reading: Reading, nodes: Sequence[str], borders: Series
) -> None:
    rows = np.arange(len(nodes) + 1)
    # A scale that reaches well above what is ordinary: noise stays dark.
    top = max(float(np.nanmax(reading.values)), LEAST_SCALE * reading.kind.floor)
    drawn = axes.pcolormesh(
        borders / SECONDS_A_DAY, rows, reading.values, cmap="viridis", vmin=0, vmax=top,
        rasterized=True,
    )  # fmt: skip
    figure.colorbar(drawn, ax=axes, label=reading.kind.unit, pad=0.01)
    axes.set_title(f"{reading.kind.name}, {reading.kind.unit}", fontsize=9.5, loc="left")
    every = -(-len(nodes) // MOST_NODE_NAMES)
    axes.set_yticks(rows[:-1:every] + 0.5, nodes[::every], fontsize=6)
    axes.invert_yaxis()


def _draw_steps(axes: Axes, steps: Steps) -> None:
    axes.plot(steps.times / SECONDS_A_DAY, steps.seconds, color=INK, linewidth=0.9)
    most = float(np.nanquantile(steps.seconds, MOST_SHOWN)) if len(steps.seconds) else 1.0
    axes.set_ylim(0, 1.3 * most)  # the first steps, where things are compiled, may leave the panel
    axes.set_title(f"seconds a step (times by {steps.anchor})", fontsize=9.5, loc="left")
