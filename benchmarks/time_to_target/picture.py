"""Time to target and node-hours against tiles."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from largebatch.benchmarks.time_to_target.model import TimeCurve, TimePoint
from largebatch.common.figures import GREY, GRID, paper_style
from largebatch.study.page.styles import Style, curve_styles
from largebatch.study.statistics.intervals import Estimate


def time_figure(curves: Sequence[TimeCurve], tiles_per_node: int) -> Figure:
    """Two panels; bands are 95% intervals, an upright line is where more tiles do not pay."""
    styles = curve_styles((curve.optimizer, curve.optimizer.split()[0]) for curve in curves)
    with paper_style():
        figure = Figure(figsize=(7.4, 3.3), layout="constrained")
        times, hours = figure.subplots(1, 2)
        for curve in curves:
            style = styles[curve.optimizer]
            _draw(times, curve, [point.seconds for point in curve.points], style)
            _draw(hours, curve, [point.node_hours for point in curve.points], style)
            if curve.pays_to is not None:
                for panel in (times, hours):
                    panel.axvline(
                        curve.pays_to.value, color=style.colour, linewidth=0.9, linestyle=":"
                    )
        first: TimePoint = curves[0].points[0]
        counts = [point.tiles for point in curves[0].points]
        ideal = [first.seconds.value * first.tiles / count for count in counts]
        times.plot(counts, ideal, color=GREY, linestyle="--", linewidth=1.0, label="ideal")
        times.set_ylabel("Seconds to target")
        hours.set_ylabel("Node-hours")
        times.legend(frameon=False)
        for panel in (times, hours):
            panel.set(xscale="log", yscale="log", xlabel=f"Tiles, {tiles_per_node} a node")
            panel.grid(True, color=GRID, linewidth=0.6)
        figure.suptitle("Projection from a curve and a cost model, not a measurement", fontsize=9.5)
    return figure


def _draw(axes: Axes, curve: TimeCurve, values: Sequence[Estimate], style: Style) -> None:
    counts = [point.tiles for point in curve.points]
    axes.plot(
        counts, [value.value for value in values], color=style.colour, marker=style.marker,
        markersize=3.5, linewidth=1.4, linestyle=style.line, label=curve.optimizer,
    )  # fmt: skip
    ends = [
        (count, value.low, value.high)
        for count, value in zip(counts, values, strict=True)
        if value.low is not None and value.high is not None
    ]
    if ends:
        at, low, high = zip(*ends, strict=True)
        axes.fill_between(at, low, high, color=style.colour, alpha=0.15, linewidth=0)
