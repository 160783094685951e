"""Runs over their course, laid over each other: loss, learning rate, batch size, gradient norm, and
what else any of them recorded.

A panel a quantity, all over one axis. Training losses and gradient norms are faint as recorded and
solid as running means; markers are evaluations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from largebatch.common.figures import GREY
from largebatch.common.text import counted
from largebatch.records.names import EVALUATED
from largebatch.records.target import is_unbounded
from largebatch.study.labels import plain
from largebatch.study.page.axes import (
    WIDE,
    Picture,
    curve_handles,
    handle,
    new_panels,
    set_grid,
    set_log_axis,
)
from largebatch.study.page.styles import Style
from largebatch.study.page.words import three_digits
from largebatch.study.single_runs.history import RunHistory, Series

Against = Literal["samples", "steps", "seconds"]
AXES: Final[Mapping[Against, tuple[str, str]]] = {
    "samples": ("samples", "Samples seen"),
    "steps": ("step", "Optimizer steps"),
    "seconds": ("seconds", "Seconds of training"),
}
MOST_POINTS: Final = 800
"""Of a line in a picture: more cannot be told apart, and a page of megabytes opens slowly."""
MOST_METRICS: Final = 6
"""That have a panel."""
_SMOOTHED: Final = 50
"""Running means reach back over this fraction of a run's lines."""
_LABELS: Final = 0.14
"""Inches from the left edge to the middle of the axes' labels."""
_WIDE_SPAN: Final = 8.0
"""Positive values that span more than this factor are drawn on a logarithmic axis; shares, rates
and scores never are, whatever they span."""


@dataclass(frozen=True)
class Panel:
    """One quantity: its field, the axis' label, inches, and how its lines are drawn."""

    key: str
    label: str
    height: float
    kind: Literal["loss", "noisy", "line", "steps", "evaluated"]
    always: bool = True

    @property
    def metric(self) -> str:
        """What a target would call it."""
        return self.key.removeprefix(EVALUATED)

    @property
    def is_linear(self) -> bool:
        """Whether its axis is linear by what it shows: 0.1 to 0.2 of an accuracy is as much as 0.8
        to 0.9.
        """
        return self.kind == "evaluated" and not is_unbounded(self.metric)


PANELS: Final = (
    Panel("loss", "Loss", 2.4, "loss"),
    Panel("lr", "Learning rate", 1.0, "line"),
    Panel("global_batch_size", "Batch size", 1.0, "steps"),
    Panel("grad_norm", "Gradient norm", 1.0, "noisy"),
    Panel("noise_scale", "Noise scale", 1.0, "line", always=False),
    Panel("trust_ratio_median", "Trust ratio", 1.0, "noisy", always=False),
    Panel("samples_per_second", "Samples / s", 1.0, "noisy", always=False),
)


def runs_figure(
    histories: Sequence[RunHistory], names: Sequence[str], styles: Mapping[str, Style],
    width: float, against: Against = "samples",
) -> Picture:  # fmt: skip
    """All panels that any of the runs has something for, over `against`."""
    panels = [
        panel for panel in (PANELS[0], *_metric_panels(histories), *PANELS[1:])
        if panel.always or any(history.has(panel.key) for history in histories)
    ]  # fmt: skip
    handles = curve_handles(styles, names) if len(names) > 1 else []
    marker = styles[names[0]].marker if len(names) == 1 else "o"
    handles += [handle(marker, "evaluation", markersize=4.5)]
    handles += [Line2D([], [], color=GREY, linewidth=1.6, label="training, running mean")]
    targets = {one.target for one in histories if one.target is not None}
    if targets:
        handles.append(Line2D([], [], color=GREY, linestyle="--", label="target"))
    picture, drawn = new_panels(
        width, [panel.height for panel in panels], 1, handles, gaps=(0.0, 0.16), sharex=True
    )
    for panel, axes in zip(panels, drawn, strict=True):
        for history, name in zip(histories, names, strict=True):
            _draw(picture, axes, panel, history, name, styles[name], AXES[against][0])
        axes.set_ylabel(panel.label, fontsize=8.5 if width >= WIDE else 7.5)
        box = axes.get_position()
        axes.yaxis.set_label_coords((_LABELS / width - box.x0) / box.width, 0.5)
        _set_scale(axes, panel, histories)
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
        set_grid(axes)
        for target in targets:
            if target.metric == panel.metric:
                axes.axhline(target.value, color=GREY, linestyle="--", linewidth=1.0)
    last = drawn[-1]
    last.set_xlabel(AXES[against][1])
    last.set_xlim(left=0)
    last.xaxis.set_major_locator(MaxNLocator(6 if width >= WIDE else 4))
    last.xaxis.set_major_formatter(FuncFormatter(plain))
    return picture


def _metric_panels(histories: Sequence[RunHistory]) -> list[Panel]:
    """One a metric of the tasks."""
    names = dict.fromkeys(name for history in histories for name in history.metrics)
    return [
        Panel(f"{EVALUATED}{name}", f"{name[:1].upper()}{name[1:]}".replace("_", " "), 1.4,
              "evaluated")
        for name in [*names][:MOST_METRICS]
    ]  # fmt: skip


def thinned(x: Series, y: Series, most: int = MOST_POINTS) -> tuple[Series, Series]:
    """At most `most` points: means over stretches of equal length, without what is not finite.

    >>> x, y = thinned(np.arange(6.0), np.array([1.0, 3, np.nan, 5, 7, 9]), 3)
    >>> x.tolist(), y.tolist()
    ([0.5, 3.5, 5.0], [2.0, 6.0, 9.0])
    """
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    length = -(-len(x) // most)
    if length <= 1:
        return x, y
    starts = np.arange(0, len(x), length)
    counts = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts


def running_mean(y: Series, reach: float) -> Series:
    """Exponential running means that reach back over `reach` values, unbiased from the first on.

    >>> running_mean(np.array([4.0, 2.0, 2.0]), 2.0).round(3).tolist()
    [4.0, 2.667, 2.286]
    """
    kept = 1 - 1 / max(reach, 1.0)
    total = weight = 0.0
    means = np.empty_like(y)
    for place, value in enumerate(y):
        total, weight = kept * total + value, kept * weight + 1
        means[place] = total / weight
    return means


def _draw(
    picture: Picture, axes: Axes, panel: Panel, history: RunHistory, name: str, style: Style,
    against: str,
) -> None:  # fmt: skip
    if not history.has(panel.key) or not history.has(against):
        return
    if panel.kind == "evaluated":
        _draw_evaluations(picture, axes, panel, history, name, style, against)
        return
    x, y = history.columns[against], _shown(history, panel.key)
    if panel.kind == "steps":  # a mean of two sizes is none
        every = -(-len(x) // MOST_POINTS)
        axes.plot(x[::every], y[::every], color=style.colour, linestyle=style.line,
                  linewidth=1.3, drawstyle="steps-pre")  # fmt: skip
        return
    x, y = thinned(x, y)
    if panel.kind == "line":
        axes.plot(x, y, color=style.colour, linestyle=style.line, linewidth=1.3)
        return
    axes.plot(x, y, color=style.colour, alpha=0.25, linewidth=0.7)
    axes.plot(x, running_mean(y, len(y) / _SMOOTHED), color=style.colour, linestyle=style.line,
              linewidth=1.6)  # fmt: skip
    if panel.kind == "loss" and history.has("eval_loss"):
        _draw_evaluations(picture, axes, panel, history, name, style, against)


def _shown(history: RunHistory, key: str) -> Series:
    """A field as it is drawn: of a noise scale what is resolved."""
    values = history.columns[key]
    if key != "noise_scale":
        return values
    resolved = history.columns.get("noise_resolved", np.zeros_like(values)) == 1
    return np.where(resolved, values, np.nan)


def _tick(value: float, _: object = None) -> str:
    """A number that leaves room for the label beside it: 120 k."""
    return counted(value) if abs(value) >= 100_000 else plain(value)


def _draw_evaluations(
    picture: Picture, axes: Axes, panel: Panel, history: RunHistory, name: str, style: Style,
    against: str,
) -> None:  # fmt: skip
    key = "eval_loss" if panel.kind == "loss" else panel.key
    x, y = history.columns[against], history.columns[key]
    places = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
    places = places[:: -(-len(places) // 200)]
    (line,) = axes.plot(
        x[places], y[places], linestyle="none" if panel.kind == "loss" else style.line,
        linewidth=1.3, color=style.colour, marker=style.marker,
        markersize=4, markeredgecolor="white", markeredgewidth=0.5, clip_on=False,
    )  # fmt: skip
    picture.tell(line, [_tip(history, name, key, int(place)) for place in places])


def _tip(history: RunHistory, name: str, key: str, place: int) -> str:
    def value(key: str) -> str:
        column = history.columns.get(key)
        return "unknown" if column is None else three_digits(column[place])

    what = "evaluation loss" if key == "eval_loss" else key.removeprefix(EVALUATED)
    return (
        f"{name}: {what} {history.columns[key][place]:.4g} after step "
        f"{value('step')}, {value('samples')} samples; rate {value('lr')}"
    )


def _set_scale(axes: Axes, panel: Panel, histories: Sequence[RunHistory]) -> None:
    """Linear by what the panel shows, or logarithmic where values span much; what leaves the range
    of a loss's start is cut off.
    """
    keys = (panel.key, "eval_loss") if panel.kind == "loss" else (panel.key,)
    found = [_shown(history, key) for history in histories for key in keys if history.has(key)]
    targets = [history.target for history in histories if history.target is not None]
    aims = [target.value for target in targets if target.metric == panel.metric]
    values = np.concatenate([*found, np.array(aims)]) if found else np.empty(0)
    values = values[np.isfinite(values) & (panel.is_linear | (values > 0))]
    if not values.size:
        return
    low, high = float(values.min()), float(values.max())
    if panel.kind == "loss":
        begin = [float(np.nanmedian(h.columns["loss"][:5])) for h in histories if h.has("loss")]
        high = min(high, 1.15 * max([b for b in begin if np.isfinite(b)] or [high]))
    if high > _WIDE_SPAN * low and not panel.is_linear:
        set_log_axis(axes.yaxis, low / 1.2, high * 1.2, 4)
        return
    if low == high and not panel.is_linear:
        axes.set_ylim(0, 2 * high)
    else:
        pad = 0.06 * ((high - low) or abs(high) or 1.0)
        axes.set_ylim(low - pad, high + pad)
    axes.yaxis.set_major_locator(MaxNLocator(4))
