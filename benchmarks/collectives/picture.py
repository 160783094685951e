"""Pictures of collectives: what was measured, and what a cost model makes of it at scale."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, NullLocator

from largebatch.benchmarks.collectives.models import ALL_REDUCE, Cluster, binary, project
from largebatch.common.figures import COLOURS, GREY, GRID

DASHES: Final = ("-", "--", "-.", ":")
PANEL = 3.4  # inches
MAP_BYTES = [2**power for power in range(10, 37)]


def measured_figure(rows: Sequence[tuple[str, int, int, float]], title: str) -> Figure:
    """Seconds against bytes, a panel a collective; rows of (collective, ranks, bytes, seconds)."""
    names = list(dict.fromkeys(row[0] for row in rows))
    counts = sorted({row[1] for row in rows})
    figure = Figure(figsize=(PANEL * len(names) + 0.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for panel, name in zip(panels, names, strict=True):
        for index, count in enumerate(counts):
            points = sorted((row[2], row[3]) for row in rows if row[:2] == (name, count))
            panel.plot(
                [nbytes for nbytes, _ in points], [seconds for _, seconds in points],
                marker="osD^v"[index % 5], markersize=3, linewidth=1.2,
                color=COLOURS[index % len(COLOURS)], label=f"{count:,} ranks",
            )  # fmt: skip
        _in_bytes(panel)
        panel.set_title(name, fontsize=9.5)
    panels[0].set_ylabel("Seconds")
    panels[0].legend(fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10)
    return figure


def projection_figure(
    cluster: Cluster, nodes: Sequence[int], sizes: Sequence[int], algorithms: Sequence[str]
) -> Figure:
    """Seconds against nodes at each size; and which algorithm is the fastest, sizes by nodes."""
    colours = {name: COLOURS[index] for index, name in enumerate(ALL_REDUCE)}
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    curves, areas = figure.subplots(1, 2)
    for index, nbytes in enumerate(sizes):
        rows = [project(cluster, count, nbytes, algorithms) for count in nodes]
        for name in algorithms:
            seconds = [row.seconds.get(name, np.nan) for row in rows]
            dashes = DASHES[index % len(DASHES)]
            curves.plot(nodes, seconds, color=colours[name], linestyle=dashes, linewidth=1.2)
    curves.set(xscale="log", yscale="log", xlabel="Nodes", ylabel="Seconds of an all-reduce")
    curves.xaxis.set_major_formatter(EngFormatter(sep=""))
    curves.grid(True, color=GRID, linewidth=0.6)
    lines = [Line2D([], [], color=colours[name], label=name) for name in algorithms]
    lines += [
        Line2D([], [], color=GREY, linestyle=DASHES[i % len(DASHES)], label=binary(nbytes))
        for i, nbytes in enumerate(sizes)
    ]
    curves.legend(handles=lines, fontsize=7, frameon=False, ncols=2)
    _draw_areas(areas, cluster, algorithms, colours)
    figure.suptitle("Projection from a cost model, not a measurement", fontsize=10)
    return figure


def _draw_areas(
    axes: Axes, cluster: Cluster, algorithms: Sequence[str], colours: dict[str, str]
) -> None:
    nodes = sorted(
        {*(round(2 ** (step / 4)) for step in range(4, 54)), *(2**p for p in range(1, 14))}
    )
    fastest = [
        [algorithms.index(project(cluster, n, b, algorithms).fastest) for n in nodes]
        for b in MAP_BYTES
    ]
    palette = ListedColormap([colours[name] for name in algorithms])
    axes.pcolormesh(
        nodes, MAP_BYTES, fastest, cmap=palette, vmin=-0.5, vmax=len(algorithms) - 0.5,
        shading="nearest", alpha=0.8,
    )  # fmt: skip
    axes.set(xscale="log", xlabel="Nodes", ylabel="Message before the node's own reduction")
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(lambda value, _: binary(value))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    seen = sorted({index for row in fastest for index in row})
    handles = [Patch(color=colours[algorithms[i]], label=algorithms[i]) for i in seen]
    axes.legend(handles=handles, title="Fastest", fontsize=7, title_fontsize=7, loc="lower right")


def _in_bytes(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: binary(value))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("Bytes")
    axes.grid(True, color=GRID, linewidth=0.6)
