"""What the pictures of a study share: logarithmic axes in plain numbers, names beside the ends of
lines, handles, legends, tips.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from largebatch.common.figures import GREY, GRID
from largebatch.study.labels import label, plain
from largebatch.study.page.legend import PlainLegend
from largebatch.study.page.styles import Style
from largebatch.study.page.ticks import PlainAxes

WIDE: Final = 7.0
"""Inches, of a picture on paper or on a screen; text keeps its size at any width."""
NARROW: Final = 3.7
"""Of a picture on a phone."""
_LEFT: Final = 0.72
_RIGHT: Final = 0.2
_LONGEST_BESIDE: Final = 16
"""Characters of a name that may stand beside a panel; a legend takes longer ones."""
_MOST_BESIDE: Final = 16
_NAME_SIZE: Final = 8.5
_POINTS_AN_INCH: Final = 72.0

_TICKS: Final = (
    (1.0,),
    (1.0, 3.0),
    (1.0, 2.0, 5.0),
    (1.0, 1.5, 2.0, 3.0, 5.0, 7.0),
    (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0),
    tuple(round(1 + 0.1 * step, 1) for step in range(90)),
)
"""Within a decade, from coarse to fine."""


@dataclass
class Picture:
    """A figure, and what its markers say where a pointer rests on them."""

    figure: Figure
    tips: dict[str, list[str]] = field(default_factory=dict)

    def tell(self, line: Line2D, tips: Sequence[str]) -> None:
        """A text for each of a line's markers."""
        name = f"tips-{len(self.tips)}"
        line.set_gid(name)
        self.tips[name] = list(tips)


def new_panels(
    width: float, heights: Sequence[float], columns: int, handles: Sequence[Line2D], *,
    gaps: tuple[float, float] = (0.62, 0.42), top: float = 0.1, room: float = 0.0,
    sharex: bool = False,
) -> tuple[Picture, list[Axes]]:  # fmt: skip
    """Panels row by row, with a legend below all of them if it has anything; lengths in inches.

    Margins are fixed: a layout that asks every text for its size takes as long as the drawing.

    Args:
        heights: of each row of panels.
        gaps: between columns and between rows.
        top: room for a title.
        room: right of each panel, for the names of its lines.
    """
    longest = max((len(str(one.get_label())) for one in handles), default=0)
    legend_columns = max(1, min(len(handles), int(width * 13 / (longest + 8))))
    legend_height = 0.19 * math.ceil(len(handles) / legend_columns) + 0.08 * bool(handles)
    rows = len(heights)
    bottom = legend_height + 0.48
    height = top + sum(heights) + gaps[1] * (rows - 1) + bottom
    between, right = gaps[0] + room, _RIGHT + room
    panel_width = (width - _LEFT - right - between * (columns - 1)) / columns
    figure = Figure(figsize=(width, height))
    panels = figure.subplots(
        rows, columns, squeeze=False, sharex=sharex, subplot_kw={"axes_class": PlainAxes},
        gridspec_kw={
            "left": _LEFT / width,
            "right": 1 - right / width,
            "bottom": bottom / height,
            "top": 1 - top / height,
            "wspace": between / panel_width,
            "hspace": gaps[1] * rows / sum(heights),
            "height_ratios": heights,
        },
    )  # fmt: skip
    if handles:
        legend: Any = PlainLegend(handles, legend_columns)
        legend.set_figure(figure)
        figure.legends.append(legend)
    return Picture(figure), list(panels.ravel())


class LineEnd(NamedTuple):
    """Where a line ends, in data, and what it is called."""

    name: str
    x: float
    y: float
    colour: str


def room_for(names: Sequence[str], width: float) -> float:
    """Inches that names beside a panel take; 0 where a legend has to name its lines: on a phone,
    and where names are long or many.
    """
    longest = max(map(len, names), default=0)
    fits = width >= WIDE and longest <= _LONGEST_BESIDE and len(names) <= _MOST_BESIDE
    return 0.12 + 0.078 * longest if fits and longest else 0.0


def name_ends(axes: Axes, ends: Sequence[LineEnd]) -> None:
    """Name lines right of a panel whose limits are set, none over another, each led to its end."""
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    scaled = axes.transData + axes.transAxes.inverted()
    figure: Any = axes.get_figure(root=True)
    position = axes.get_position()
    gap = 1.3 * _NAME_SIZE / _POINTS_AN_INCH / (position.height * figure.get_figheight())
    points = [
        scaled.transform((min(max(end.x, left), right), min(max(end.y, low), high))) for end in ends
    ]
    order = sorted(range(len(ends)), key=lambda place: points[place][1])
    heights = spread([float(points[place][1]) for place in order], gap)
    margin = 1.0 + 0.1 / (position.width * figure.get_figwidth())
    for place, height in zip(order, heights, strict=True):
        end, (x, y) = ends[place], points[place]
        axes.plot(
            [x, 1.0, margin], [y, y if x < 1 else height, height], color=end.colour, linewidth=0.8,
            transform=axes.transAxes, clip_on=False, zorder=2,
        )  # fmt: skip
        axes.text(
            margin, height, f" {label(end.name)}", transform=axes.transAxes, va="center_baseline",
            fontsize=_NAME_SIZE,
        )  # fmt: skip


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Ascending places as near as can be to those wanted, each at least `gap` from the next.

    >>> spread([0.0, 0.5, 5.0], 1.0)
    [-0.25, 0.75, 5.0]
    """
    blocks: list[list[float]] = []
    for place, value in enumerate(wanted):
        blocks.append([value - place * gap])
        while len(blocks) > 1 and statistics.fmean(blocks[-2]) > statistics.fmean(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    means = [statistics.fmean(block) for block in blocks for _ in block]
    return [mean + place * gap for place, mean in enumerate(means)]


def columns_of(width: float, count: int) -> int:
    """How many of `count` panels stand side by side."""
    return min(count, 3 if width >= WIDE and count not in (2, 4) else 2)


def set_batch_axis(axes: Axes, sizes: Sequence[int], most: int) -> None:
    """Powers of two as plain numbers: every one where `most` allow it, else every second, third."""
    first, last = round(math.log2(min(sizes))), round(math.log2(max(sizes)))
    every = max(1, math.ceil((last - first + 1) / most))
    axes.set(xscale="log", xlim=(min(sizes) / 1.35, max(sizes) * 1.35))
    labelled = [2.0**power for power in range(first, last + 1, every)]
    axes.xaxis.set_major_locator(FixedLocator(labelled))
    axes.xaxis.set_minor_locator(FixedLocator([2.0**power for power in range(first, last + 1)]))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.xaxis.set_minor_formatter(NullFormatter())


def set_log_axis(axis: Axis, low: float, high: float, most: int = 8) -> None:
    """The limits, and from 3 to `most` ticks on round numbers, however short the axis."""
    # matplotlib gives every kind of Axis its name, x or y, and types it nowhere.
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})  # type: ignore[attr-defined]
    axis.axes.set(**{f"{axis.axis_name}lim": (low, high)})  # type: ignore[attr-defined]
    axis.set_major_locator(FixedLocator(round_numbers(low, high, most)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(plain))


def round_numbers(low: float, high: float, most: int = 8) -> list[float]:
    """Round numbers between two, as many as can be and no more than `most`.

    >>> round_numbers(11, 65)
    [12.5, 15.0, 20.0, 25.0, 30.0, 40.0, 50.0, 60.0]
    >>> round_numbers(0.9, 2.2, 6)
    [1.0, 1.25, 1.5, 2.0]
    """
    decades = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    found: list[float] = []
    for subs in _TICKS:
        ticks = [float(f"{sub * 10.0**power:.3g}") for power in decades for sub in subs]
        within = [tick for tick in ticks if low <= tick <= high]
        if len(within) > most:
            break
        found = within
    if not found:
        every = math.ceil(len(decades) / most)
        found = [10.0**power for power in decades if power % every == 0]
        found = [tick for tick in found if low <= tick <= high]
    return found


def set_grid(axes: Axes) -> None:
    """Faint lines at the labelled ticks."""
    axes.grid(True, which="major", color=GRID, linewidth=0.6)


def handle(marker: str, text: str, **look: Any) -> Line2D:
    """A marker of a legend."""
    return Line2D([], [], linestyle="none", color=GREY, marker=marker, label=text, **look)


def curve_handles(styles: Mapping[str, Style], names: Sequence[str]) -> list[Line2D]:
    """A line and a marker for each curve."""
    return [
        Line2D(
            [], [], color=styles[name].colour, linestyle=styles[name].line,
            marker=styles[name].marker, markersize=5.5, label=label(name),
        )
        for name in names
    ]  # fmt: skip
