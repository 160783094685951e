"""What is out of the ordinary in a series, when some of it may be: medians, and runs of time."""

import warnings
from typing import Final

import numpy as np
from numpy.typing import NDArray

Series = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAD_TO_SIGMA: Final = 1.4826  # of a normal distribution
SIGMAS: Final = 8.0
"""Counters and step times have long tails; with fewer, healthy runs were suspected."""
SHORTEST: Final = 3
"""Points in a row that make a spell: one alone is a hiccup."""
WINDOW: Final = 5


def spread(values: Series) -> float:
    """A robust standard deviation."""
    return float(MAD_TO_SIGMA * np.median(np.abs(values - np.median(values))))


def spells(mask: Mask, shortest: int = SHORTEST) -> list[tuple[int, int]]:
    """First and last index of each run of at least `shortest` trues."""
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return [
        (int(first), int(after) - 1)
        for first, after in edges.reshape(-1, 2)
        if after - first >= shortest
    ]


def running_median(series: Series) -> Series:
    """Over WINDOW points around each; shorter at the ends."""
    half = WINDOW // 2
    padded = np.concatenate((np.full(half, np.nan), series, np.full(half, np.nan)))
    return known_median(np.lib.stride_tricks.sliding_window_view(padded, WINDOW).T)


def known_median(values: Series) -> Series:
    """Of each column, over what is known; NaN where nothing is. (rows, columns) to (columns,)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of a column that is all NaN
        middle: Series = np.nanmedian(values, axis=0)
    return middle


def raised(series: Series, least: float) -> tuple[Mask, float]:
    """Where a series runs above what it usually is, and that.

    Usual is the lower quartile of its running median: a series that has been high for up to three
    quarters of its time is still seen. Noise is measured between neighbours, which a change of
    level does not widen. Raised is what lies above by `least` and by SIGMAS times the noise.
    """
    if len(series) < 2 * SHORTEST:
        return np.zeros(len(series), dtype=bool), float(np.median(series)) if len(series) else 0.0
    smooth = running_median(series)
    usual = float(np.quantile(smooth, 0.25))
    noise = float(MAD_TO_SIGMA * np.median(np.abs(np.diff(series))) / np.sqrt(2))
    return smooth > usual + max(least, SIGMAS * noise), usual
