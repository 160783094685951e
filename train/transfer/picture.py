"""The picture of a coordinate check: each layer's outputs, and their change, against width."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from largebatch.common.figures import BLUE, GREY, GRID, RED, paper_style
from largebatch.train.transfer.coordinates import Coordinates, drifting

MOST_NAMED = 6


def draw(found: Sequence[Coordinates], tolerance: float, title: str) -> Figure:
    """Two panels over width; what drifts in red, by its name."""
    drifts = drifting(found, tolerance)
    with paper_style():
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        after, change = figure.subplots(1, 2, sharex=True)
        for axes, kind in ((after, "after"), (change, "change")):
            _draw(axes, found, kind, drifts)
        after.set_ylabel("RMS of outputs after the steps")
        change.set_ylabel("RMS of their change")
        if drifts:
            names = ", ".join(drifts[:MOST_NAMED])
            more = f" and {len(drifts) - MOST_NAMED} more" if len(drifts) > MOST_NAMED else ""
            figure.supxlabel(f"drifting: {names}{more}", fontsize=8, color=RED)
        figure.suptitle(title, fontsize=9.5)
    return figure


def _draw(axes: Axes, found: Sequence[Coordinates], kind: str, drifts: Sequence[str]) -> None:
    widths = [one.width for one in found]
    for name in found[0].change:
        red = name in drifts
        axes.plot(
            widths, [getattr(one, kind)[name] for one in found], marker="o", markersize=2.5,
            linewidth=1.1, color=RED if red else BLUE, zorder=3 if red else 2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(widths))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda width, _: f"{width:g}"))
    axes.grid(True, color=GRID, linewidth=0.6)
    axes.set_xlabel("Width", color=GREY)
