"""The trust ratio of every layer over one run, from its `metrics.jsonl`, as a picture.

Layers are rows, in the model's order, and the run goes from left to right: a layer that the
optimizer holds back, or drives, stands out as a band. Runs record it with `record.layers=true`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from largebatch.records.columns import read_columns
from largebatch.records.fields import Check, Fields, number
from largebatch.records.names import METRICS
from largebatch.study.labels import label, plain
from largebatch.study.page.axes import WIDE, round_numbers
from largebatch.study.single_runs.history import COUNTED, increasing

PREFIX = "trust_ratio/"
TALLEST = 14.0  # inches


@dataclass(frozen=True)
class LayerHistory:
    """Trust ratios of a run: `ratios[layer, line]`, NaN where a line has none for the layer."""

    layers: list[str]
    samples: NDArray[np.float64]
    """Seen by each recorded line, shape (lines,)."""
    ratios: NDArray[np.float64]


def read_layers(folder: Path, problems: list[str]) -> LayerHistory:
    """The trust ratios that a run recorded; what is damaged is noted.

    Raises:
        ValueError: it recorded none.
    """

    def wanted(key: str) -> Check[Any] | None:
        return COUNTED if key == "samples" else number if key.startswith(PREFIX) else None

    def has_ratios(line: Fields) -> bool:
        return any(key.startswith(PREFIX) for key in line)

    columns = read_columns(folder / METRICS, wanted, problems, has_ratios)
    layers = [key for key in columns if key.startswith(PREFIX)]
    if not layers or "samples" not in columns:
        raise ValueError(
            f"{folder} holds one run, and no trust ratios by layer: train it with "
            "record.layers=true and an optimizer that has them (optim=lars, optim=lamb), or give "
            "the folder of a sweep"
        )
    samples, ratios = np.array(columns["samples"]), np.array([columns[key] for key in layers])
    shown = increasing(samples)
    if not shown.any():
        raise ValueError(f"{folder / METRICS} holds no line with samples and a trust ratio")
    return LayerHistory(
        [key.removeprefix(PREFIX) for key in layers], samples[shown], ratios[:, shown]
    )


def layers_figure(history: LayerHistory, title: str, width: float = WIDE) -> Figure:
    """Layers against samples seen, the colour telling the trust ratio on a logarithmic scale.

    Args:
        width: in inches.
    """
    num_layers = len(history.layers)
    figure = Figure(figsize=(width, min(1.6 + 0.22 * num_layers, TALLEST)), layout="constrained")
    axes = figure.subplots()
    positive = history.ratios[history.ratios > 0]
    low, high = (positive.min(), positive.max()) if positive.size else (0.1, 10.0)
    if low == high:
        low, high = low / 2, high * 2
    edges = np.concatenate([[0.0], history.samples])
    mesh = axes.pcolormesh(
        edges,
        np.arange(num_layers + 1),
        np.ma.masked_where(~(history.ratios > 0), history.ratios),
        norm=LogNorm(low, high),
        cmap="cividis",
        rasterized=True,
    )
    every = max(1, -(-num_layers // 60))  # a label a row, as long as they can be read
    rows = range(0, num_layers, every)
    names = [label(history.layers[row]) for row in rows]
    axes.set_yticks([row + 0.5 for row in rows], names, fontsize=7)
    axes.invert_yaxis()
    axes.set(title=label(title), xlabel="Samples seen")
    axes.xaxis.set_major_locator(MaxNLocator(6 if width >= WIDE else 3))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    ticks = round_numbers(low, high, 4)
    bar = figure.colorbar(mesh, ax=axes, label="Trust ratio", ticks=ticks, format=plain)
    bar.ax.minorticks_off()
    return figure
