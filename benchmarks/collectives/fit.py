"""Alpha and beta of a machine, from times of collectives.

The times t of collectives over p ranks and n bytes are taken as alpha M(p) + beta B(p, n), where a
cost model counts the messages M and the bytes B. An error of a time is taken to be a share of it.
Outliers count less: Huber's M-estimator of the relative errors, by iteratively reweighted least
squares (Huber: Robust Statistics, 1981, chapter 7). Gamma cannot be separated from beta where an
algorithm adds up a fixed share of what it sends; it is left inside beta.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from largebatch.benchmarks.collectives.models import ALL_REDUCE, Cost, Link
from largebatch.common.robust import MAD_TO_SIGMA

HUBER: Final = 1.345  # spreads beyond which an error counts less; 95% efficient for normal errors
FEWEST: Final = 5  # times for two unknowns and a spread
MOST_SPREAD: Final = 0.25
MOST_ERROR: Final = 0.5
ITERATIONS: Final = 100

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    ranks: int
    nbytes: float
    seconds: float


@dataclass(frozen=True)
class Fit:
    """Alpha in seconds a message, beta in seconds a byte, with their standard errors."""

    algorithm: str
    alpha: float
    alpha_error: float
    beta: float
    beta_error: float
    spread: float
    """Of the relative errors: their median absolute value, scaled to a normal sigma."""
    doubts: tuple[str, ...] = ()
    """Why the fit is poor; none where it is not."""

    @property
    def link(self) -> Link:
        return Link(self.alpha, self.beta)


def fit_link(timings: Sequence[Timing], algorithm: str = "ring") -> Fit:
    """Alpha and beta with which `algorithm` would have taken these times for an all-reduce.

    Raises:
        ValueError: fewer than FEWEST times of more than one rank, or times that are not positive.
    """
    taken = [timing for timing in timings if timing.ranks > 1]
    if len(taken) < FEWEST or not all(timing.seconds > 0 for timing in taken):
        raise ValueError(
            f"a fit needs {FEWEST} or more times above 0 of collectives over 2 or more ranks, "
            f"got {len(taken)}: measure more sizes"
        )
    seconds = np.array([timing.seconds for timing in taken])
    link = Link(1e-6, 1e-9)
    # The double tree's chunks depend on the link that is sought; two rounds settle them.
    for _ in range(3 if algorithm == "double_tree" else 1):
        costs = [ALL_REDUCE[algorithm](timing.ranks, timing.nbytes, link) for timing in taken]
        fit = Fit(algorithm, *_fit(costs, seconds))
        link = fit.link
    return replace(fit, doubts=_doubts(taken, fit))


def fits(timings: Sequence[Timing]) -> list[Fit]:
    """One an algorithm, the least spread first. One number of ranks tells none of them apart."""
    return sorted((fit_link(timings, name) for name in ALL_REDUCE), key=lambda fit: fit.spread)


def _fit(costs: Sequence[Cost], seconds: Array) -> tuple[float, float, float, float, float]:
    """(alpha, its error, beta, its error, spread); 0 with an infinite error for one below 0."""
    counts = np.array([(cost.messages, cost.bytes) for cost in costs])
    values, errors, spread = _huber(counts, seconds)
    if (values < 0).any():
        kept = int(np.argmax(values))
        one, one_error, spread = _huber(counts[:, [kept]], seconds)
        values, errors = np.zeros(2), np.full(2, np.inf)
        values[kept], errors[kept] = one[0], one_error[0]
    return (
        float(values[0]), float(errors[0]), float(values[1]), float(errors[1]), float(spread),
    )  # fmt: skip


def _huber(counts: Array, seconds: Array) -> tuple[Array, Array, float]:
    """Coefficients (columns,), standard errors (columns,) and spread of the relative errors."""
    num, columns = counts.shape
    model = seconds
    weights = np.ones(num)
    values = np.zeros(columns)
    for _ in range(ITERATIONS):
        rows, wanted = counts / model[:, None], seconds / model
        root = np.sqrt(weights)
        scale = np.linalg.norm(rows, axis=0)  # messages and bytes are far apart in size
        before = values
        values = np.linalg.lstsq(rows / scale * root[:, None], wanted * root)[0] / scale
        errors = wanted - rows @ values
        spread = max(float(MAD_TO_SIGMA * np.median(np.abs(errors))), 1e-12)
        weights = np.minimum(1.0, HUBER * spread / np.maximum(np.abs(errors), 1e-300))
        fitted = counts @ values
        if (fitted > 0).all():
            model = fitted  # the error is a share of the model, not of the time that it made
        if np.allclose(values, before, rtol=1e-9, atol=0):
            break
    inside = np.abs(errors) <= HUBER * spread
    share = max(float(inside.mean()), 1 / num)
    bent = np.clip(errors, -HUBER * spread, HUBER * spread)
    # Huber 1981, equation 7.6.6, with his correction for small samples.
    correction = 1 + columns / num * (1 - share) / share
    variance = correction**2 * float(bent @ bent) / (num - columns) / share**2
    inverse = np.linalg.pinv((rows / scale).T @ (rows / scale))
    return values, np.sqrt(variance * np.diag(inverse)) / scale, spread


def _doubts(timings: Sequence[Timing], fit: Fit) -> tuple[str, ...]:
    found = []
    if fit.spread > MOST_SPREAD:
        found.append(f"half of the times are {fit.spread / MAD_TO_SIGMA:.0%} or more off the model")
    if fit.alpha_error > MOST_ERROR * fit.alpha:
        found.append("alpha is not resolved from 0")
    if fit.beta_error > MOST_ERROR * fit.beta:
        found.append("beta is not resolved from 0")
    sizes = [timing.nbytes for timing in timings]
    if max(sizes) < 1000 * min(sizes):
        found.append("sizes span less than a factor of 1000, which tells alpha from beta")
    return tuple(found)
