"""The picture of a coordinate check: each layer's outputs, and their change, against width."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from largebatch.common.figures import BLUE, GREY, GRID, RED, paper_style
from largebatch.common.text import and_more
from largebatch.train.transfer.coordinates import Coordinates, drifting

MOST_NAMED: Final = 24
MOST_LINES: Final = 3
"""Of names of what drifts; the others are counted."""
_HEIGHT, _LINE, _MARGIN = 3.6, 0.16, 0.15
"""Inches: of the picture with one line of names, of each further one, and to its sides."""


def draw(found: Sequence[Coordinates], tolerance: float, title: str) -> Figure:
    """Two panels over width; what drifts in red, by its name."""
    drifts = drifting(found, tolerance)
    with paper_style():
        figure = Figure(figsize=(7.0, _HEIGHT), layout="constrained")
        canvas: Any = FigureCanvasAgg(figure)
        renderer = canvas.get_renderer()
        after, change = figure.subplots(1, 2, sharex=True)
        for axes, kind in ((after, "after"), (change, "change")):
            _draw(axes, found, kind, drifts)
        after.set_ylabel("RMS of outputs after the steps")
        change.set_ylabel("RMS of their change")
        if drifts:
            label = figure.supxlabel("", fontsize=8, color=RED, parse_math=False)
            lines = named_in_lines(drifts, partial(_fits, figure, label, renderer))
            label.set_text("\n".join(lines))
            figure.set_figheight(_HEIGHT + _LINE * (len(lines) - 1))
        head = figure.suptitle("", fontsize=9.5, parse_math=False)
        head.set_text(_shortened(title, partial(_fits, figure, head, renderer)))
    return figure


def named_in_lines(names: Sequence[str], fits: Callable[[str], bool]) -> list[str]:
    """As many of the names as go into `MOST_LINES` lines that fit, and how many more there are; one
    that alone is too long for a line loses its middle.

    >>> named_in_lines(["a.bias", "b.weight", "c"], lambda line: len(line) <= 17)
    ['drifting: a.bias,', 'b.weight, c']
    >>> named_in_lines(["decoder.attention.query"], lambda line: len(line) <= 17)
    ['drifting:', 'decoder…on.query']
    """
    fits = cache(fits)  # measuring a text is what takes time, and lines begin alike
    named = [_shortened(name, lambda text: fits(f"{text},")) for name in names[:MOST_NAMED]]
    short = [*named, *names[MOST_NAMED:]]
    lines: list[str] = []
    for most in range(min(MOST_NAMED, len(short)), 0, -1):
        lines = ["drifting:"]
        for word in and_more(short, most).split():
            longer = f"{lines[-1]} {word}"
            lines[-1:] = [longer] if fits(longer) else [lines[-1], word]
        if len(lines) <= MOST_LINES:
            break
    return lines


def _shortened(text: str, fits: Callable[[str], bool]) -> str:
    """The text without as much of its middle as makes it fit."""
    if len(text) <= 2 or fits(text):
        return text

    def around_middle(kept: int) -> str:
        return f"{text[: kept // 2]}…{text[len(text) - (kept - kept // 2) :]}"

    least, most = 2, len(text) - 1
    while least < most:
        kept = (least + most + 1) // 2
        least, most = (kept, most) if fits(around_middle(kept)) else (least, kept - 1)
    return around_middle(least)


def _fits(figure: Figure, label: Text, renderer: RendererBase, text: str) -> bool:
    """Whether a line of the label is within the figure."""
    label.set_text(text)
    return label.get_window_extent(renderer).width <= figure.bbox.width - 2 * _MARGIN * figure.dpi


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
