"""The gradient noise scale of one run, from its `metrics.jsonl`, as a picture.

Noise scale and batch size share an axis, both being in samples: where the batch is far below the
noise scale, averaging still pays; far above it, samples are spent on what is known already. What
the record calls resolved is drawn solid, the rest faint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import NDArray

from largebatch.common.figures import COLOURS, GRID, INK, paper_style
from largebatch.records.columns import read_columns
from largebatch.records.fields import Check, flag
from largebatch.records.names import METRICS
from largebatch.study.labels import label
from largebatch.study.page.axes import WIDE, set_log_axis
from largebatch.study.single_runs.history import COUNTED, SCALE, Series, increasing

FIELD = "noise_scale"
LAYER = "noise_scale/"
MOST_NAMED = 6  # layers that a legend can still tell apart
WHOLE, PRECONDITIONED = COLOURS[0], COLOURS[1]
OF_LAYERS: Final = (*COLOURS[2:6], COLOURS[7], COLOURS[6])


@dataclass(frozen=True)
class NoiseCurve:
    """A noise scale over a run, in samples; NaN where a line has none."""

    scale: Series
    error: Series
    """Standard error; NaN where it is not known."""
    resolved: NDArray[np.bool_]

    @property
    def ends(self) -> tuple[Series, Series]:
        """A standard error to either side, positive at both: R / (1 + E / R) and R (1 + E / R)."""
        factor = 1 + self.error / self.scale
        return self.scale / factor, self.scale * factor


@dataclass(frozen=True)
class NoiseHistory:
    """What the lines of a run say of the noise scale, each array of shape (lines,)."""

    samples: Series
    batch_size: Series
    whole: NoiseCurve
    preconditioned: NoiseCurve | None
    layers: dict[str, Series]
    """Each layer's, where it is resolved."""


def read_noise(folder: Path, problems: list[str]) -> NoiseHistory:
    """The noise scales that a run recorded; what is damaged is noted.

    Raises:
        ValueError: it recorded none.
    """
    columns = read_columns(folder / METRICS, _wanted, problems, lambda line: FIELD in line)
    if not columns:
        raise ValueError(
            f"{folder} holds one run, and no noise scale: train it with noise.small=auto"
        )
    rows = len(columns[FIELD])
    samples = np.array(columns.get("samples", np.full(rows, np.nan)))
    shown = increasing(samples)
    if not shown.any():
        raise ValueError(
            f"{folder / METRICS} says of no line after how many samples it was written"
        )

    def series(key: str) -> Series:
        return np.array(columns.get(key, np.full(rows, np.nan)))[shown]

    def curve(kind: str) -> NoiseCurve:
        name = f"{FIELD}{kind}"
        return NoiseCurve(
            series(name), series(f"{name}_error"), series(f"noise{kind}_resolved") == 1
        )

    return NoiseHistory(
        samples=samples[shown],
        batch_size=series("global_batch_size"),
        whole=curve(""),
        preconditioned=curve("_preconditioned") if f"{FIELD}_preconditioned" in columns else None,
        layers={key.removeprefix(LAYER): series(key) for key in columns if key.startswith(LAYER)},
    )


def _wanted(key: str) -> Check[Any] | None:
    if key in ("samples", "global_batch_size"):
        return COUNTED
    if key.endswith("_resolved"):
        return flag
    return SCALE if key.startswith(FIELD) else None


def noise_figure(history: NoiseHistory, title: str, width: float = WIDE) -> Figure:
    """Noise scales and the batch size against samples seen, all axes logarithmic.

    Args:
        width: in inches.
    """
    with paper_style():
        figure = Figure(figsize=(width, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.set(title=label(title), xlabel="Samples seen", ylabel="Samples")
        axes.set(xscale="log", yscale="log")
        axes.grid(True, which="major", color=GRID, linewidth=0.6)
        handles = _draw_layers(axes, history)
        if history.preconditioned is not None:
            _draw(axes, history.samples, history.preconditioned, PRECONDITIONED, 1.1)
            handles.insert(0, _handle("Noise scale, preconditioned", PRECONDITIONED, 1.1))
        _draw(axes, history.samples, history.whole, WHOLE, 1.8)
        axes.plot(
            history.samples, history.batch_size, drawstyle="steps-pre", color=INK, linewidth=1.2,
            linestyle=(0, (5, 2)), label="_batch",
        )  # fmt: skip
        _set_limits(axes, history)
        set_log_axis(axes.xaxis, *axes.get_xlim(), 6 if width >= WIDE else 4)
        set_log_axis(axes.yaxis, *axes.get_ylim(), 6)
        first = [
            _handle("Noise scale", WHOLE, 1.8),
            Patch(facecolor=WHOLE, alpha=0.2, label="its standard error"),
            Line2D([], [], color=WHOLE, alpha=0.3, linewidth=1.0, label="not resolved"),
            Line2D([], [], color=INK, linewidth=1.2, linestyle=(0, (5, 2)), label="Global batch"),
        ]
        figure.legend(handles=first + handles, loc="outside lower center", frameon=False,
                      ncols=4 if width >= WIDE else 2)  # fmt: skip
    return figure


def _handle(label: str, colour: Any, width: float) -> Line2D:
    return Line2D([], [], color=colour, linewidth=width, label=label)


def _draw(axes: Axes, samples: Series, curve: NoiseCurve, colour: str, width: float) -> None:
    """The curve faint throughout, and solid with its band where it is resolved."""
    low, high = curve.ends
    known = curve.resolved & np.isfinite(curve.error)
    axes.fill_between(samples, low, high, where=known, color=colour, alpha=0.2, linewidth=0)
    axes.plot(samples, curve.scale, color=colour, alpha=0.3, linewidth=1.0, label="_faint")
    solid = np.where(curve.resolved, curve.scale, np.nan)
    axes.plot(samples, solid, color=colour, linewidth=width, label="_solid", zorder=3)


def _draw_layers(axes: Axes, history: NoiseHistory) -> list[Line2D]:
    """Thin, from first to last layer by colour; returns what the legend says of them."""
    count = len(history.layers)
    # Neither so dark nor so light that light or dark paper swallows it.
    many = colormaps["viridis"](np.linspace(0.3, 0.7, max(count, 1)))
    colours: Sequence[Any] = OF_LAYERS if count <= MOST_NAMED else [*many]
    for (name, scale), colour in zip(history.layers.items(), colours, strict=False):
        axes.plot(
            history.samples, scale, color=colour, linewidth=0.7, alpha=0.8, label=f"_layer {name}"
        )
    if count <= MOST_NAMED:
        return [_handle(label(n), c, 0.9) for n, c in zip(history.layers, colours, strict=False)]
    names = [label(name) for name in history.layers]
    return [_handle(f"{names[0]} (first layer)", colours[0], 0.9),
            _handle(f"{names[-1]} (last)", colours[-1], 0.9)]  # fmt: skip


def _set_limits(axes: Axes, history: NoiseHistory) -> None:
    """By what is resolved, and the batch: an unresolved reading may be anything."""
    steady = history.whole.resolved  # a single layer may be called so by chance, early on
    shown = [history.batch_size, *(scale[steady] for scale in history.layers.values())]
    for curve in (history.whole, history.preconditioned):
        if curve is not None:
            shown += [values[curve.resolved] for values in (curve.scale, *curve.ends)]
    values = np.concatenate(shown)
    values = values[np.isfinite(values) & (values > 0)]
    if values.size:
        axes.set_ylim(values.min() / 1.5, values.max() * 1.5)
    if history.samples[0] < history.samples[-1]:
        axes.set_xlim(history.samples[0], history.samples[-1])
