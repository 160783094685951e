"""The picture of a learning-rate sweep: the loss that each learning rate left.

In ink: elsewhere a colour stands for an optimizer.
"""

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from largebatch.common.figures import GREY, GRID, INK, paper_style
from largebatch.records.summary import SummaryRecord
from largebatch.train.lr_find.search import LRFinder, smoothed

FOUND = (
    ("lr_suggested", "suggestion", "--"),
    ("lr_at_minimum", "least loss", "-."),
    ("lr_at_blow_up", "blow-up", ":"),
)
"""Keys of what is found, their names and lines."""


def draw(finder: LRFinder, summary: SummaryRecord) -> Figure:
    """Loss against learning rate, and the three learning rates where they were found."""
    smooth = [smoothed(finder.losses, place) for place in range(len(finder.losses))]
    with paper_style():
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        axes = figure.subplots()
        axes.set_xscale("log")
        lrs = finder.lrs[:-1]
        axes.plot(lrs, finder.losses[1:], color=GREY, linewidth=0.8, label="loss after the step")
        axes.plot(lrs, smooth[1:], color=INK, linewidth=1.8, label="median of five")
        if "lr_find" in summary:
            _mark(axes, summary["lr_find"])
        axes.set_ylim(*_limits(finder, smooth))
        axes.set_xlabel("Learning rate")
        axes.set_ylabel("Loss")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda rate, _: f"{rate:.4g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(True, color=GRID, linewidth=0.6)
        axes.set_title(
            f"{summary['optimizer']} on {summary['model']}, batch {summary['batch_size']:,}, "
            f"{summary['data_parallel_size']} rank(s), seed {summary['seed']}",
            fontsize=9.5,
        )
        figure.legend(loc="outside lower center", frameon=False, ncols=3)
    return figure


def _mark(axes: Axes, found: Mapping[str, Any]) -> None:
    for key, name, line in FOUND:
        label = f"{name} {found[key]:.3g}"
        axes.axvline(found[key], color=INK, linewidth=1.0, linestyle=line, label=label)


def _limits(finder: LRFinder, smooth: list[float]) -> tuple[float, float]:
    """A blown-up loss leaves the panel: up to a little above where it counts as one."""
    least = min((loss for loss in finder.losses if math.isfinite(loss)), default=1.0)
    top = max(smooth[0] if math.isfinite(smooth[0]) else least, finder.mode.blow_up * least)
    margin = 0.06 * (top - least) or 1.0
    return least - margin, top + 2 * margin
