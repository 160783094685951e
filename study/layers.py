"""The trust ratio of every layer over one run, from its `metrics.jsonl`, as a picture.

Layers are rows, in the model's order, and the run goes from left to right: a layer that the
optimizer holds back, or drives, stands out as a band. Runs record it with `record.layers=true`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

PREFIX = "trust_ratio/"
TALLEST = 14.0  # inches


@dataclass(frozen=True)
class LayerHistory:
    """Trust ratios of a run: `ratios[layer, line]`, NaN where a line has none for the layer."""

    layers: list[str]
    samples: NDArray[np.float64]
    """Seen by each recorded line, shape (lines,)."""
    ratios: NDArray[np.float64]


def is_run(folder: Path) -> bool:
    """Whether the folder is that of one run rather than of many."""
    return (folder / "metrics.jsonl").is_file()


def read_lines(folder: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a run's record; that of a run that was killed may end in half of one."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:
        for text in file:
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                return


def read_layers(folder: Path) -> LayerHistory:
    """The trust ratios that a run recorded.

    Raises:
        ValueError: it recorded none.
    """
    lines = [line for line in read_lines(folder) if any(key.startswith(PREFIX) for key in line)]
    if not lines:
        raise ValueError(
            f"{folder} holds one run, and no trust ratios by layer: train it with "
            "record.layers=true and an optimizer that has them (optim=lars, optim=lamb), or give "
            "the folder of a sweep"
        )
    layers = list(dict.fromkeys(key for line in lines for key in line if key.startswith(PREFIX)))
    none = float("nan")
    ratios = [[none if line.get(key) is None else line[key] for line in lines] for key in layers]
    return LayerHistory(
        layers=[key.removeprefix(PREFIX) for key in layers],
        samples=np.array([line["samples"] for line in lines], dtype=np.float64),
        ratios=np.array(ratios, dtype=np.float64),
    )


def layers_figure(history: LayerHistory, title: str) -> Figure:
    """Layers against samples seen, the colour telling the trust ratio on a logarithmic scale."""
    num_layers = len(history.layers)
    figure = Figure(figsize=(7.0, min(1.6 + 0.22 * num_layers, TALLEST)), layout="constrained")
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
    axes.set_yticks([row + 0.5 for row in rows], [history.layers[row] for row in rows], fontsize=7)
    axes.invert_yaxis()
    axes.set(title=title, xlabel="Samples seen")
    figure.colorbar(mesh, ax=axes, label="Trust ratio")
    return figure


def write_layers(folder: Path, out: Path | None = None) -> Path:
    """Draw a run's trust ratios into `out` (default: its own folder); returns the picture's path.

    Raises:
        ValueError: it recorded none.
    """
    history = read_layers(folder)
    target = folder if out is None else out
    target.mkdir(parents=True, exist_ok=True)
    path = target / "layers.png"
    layers_figure(history, f"Trust ratio by layer: {folder.resolve().name}").savefig(path, dpi=200)
    return path
