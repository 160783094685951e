"""The gradient noise scale: how large a batch still averages out more noise than it costs.

McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", appendix A.1,
https://arxiv.org/abs/1812.06162. With G the true gradient and Σ the covariance of one sample's, the
squared norm of a gradient over a batch of b samples is ‖G‖² + tr Σ / b on average. From n gradients
over b samples each, the mean q of their squared norms, and the squared norm Q of their mean, which
is the gradient over B = n b samples, both follow without bias:

    ‖G‖² = (B Q - b q) / (B - b)         tr Σ = (q - Q) / (1/b - 1/B)

and their ratio is the (simple) noise scale tr Σ / ‖G‖². A single pair says next to nothing: where
the noise scale is far above B, up to half of all estimates of ‖G‖² are negative. So both are
averaged apart, never the ratios, and never clipped before they are averaged, which would bias them;
and a reading comes with its standard error. Arithmetic only: where the norms come from is the
training loop's concern. They have to be those of gradients before clipping and weight decay, over
equally many samples each, at parameters that did not move in between.
"""

import math
from typing import Any, NamedTuple

from largebatch.common.numbers import real_number, whole_number

# A signal is resolved where zero lies outside of its 95% interval.
NORMAL_QUANTILE = 1.96

_SUMS = ("weight", "squared_weight", "grad", "trace", "grad_grad", "trace_trace", "grad_trace")
"""Of weights and of their squares, the two weighted means, and the weighted sums of squares and
products about them."""


class NoiseReading(NamedTuple):
    """What is known of the noise scale, in samples, and how well."""

    noise_scale: float
    """tr Σ / ‖G‖²; infinite where the mean of ‖G‖² is not positive."""
    standard_error: float
    """Of `noise_scale`, from the spread of the estimates; infinite where that is not known."""
    resolved: bool
    """Whether the 95% intervals of ‖G‖² and of tr Σ lie above zero."""
    grad_sq_norm: float
    """‖G‖²."""
    trace: float
    """tr Σ."""


class NoiseScale:
    """Running averages of ‖G‖² and tr Σ.

    Args:
        half_life_samples: samples after which an estimate counts half. A length in samples stays
            the same length of training when the batch grows.

    Raises:
        ValueError: it is not positive.
    """

    def __init__(self, half_life_samples: float) -> None:
        name = "half_life_samples"
        self.half_life_samples = real_number(half_life_samples, name, above=0.0)
        self._sums = dict.fromkeys(_SUMS, 0.0)

    def update(
        self,
        *,
        small_sq_norm: float,
        big_sq_norm: float,
        small_batch: int,
        big_batch: int,
        samples: int | None = None,
    ) -> None:
        """Take in one step's pair of squared gradient norms.

        Args:
            small_sq_norm: the mean, over n gradients of `small_batch` samples, of their ‖g‖².
            big_sq_norm: ‖g‖² of those gradients' mean, over `big_batch` samples.
            samples: seen since the last update, by which older ones have faded; None: the batch.
                More, where not every step is measured.

        Raises:
            ValueError: batches from which nothing follows, such as equal ones, or norms that are
                not finite, as of a step that is skipped.
        """
        small = whole_number(small_batch, "small_batch", 1)
        big = whole_number(big_batch, "big_batch", 1)
        if small >= big:
            raise ValueError(
                f"small_batch must be smaller than big_batch, got {small} and {big}: the noise is "
                "seen in the difference of two batch sizes; use more ranks or more micro-batches"
            )
        q = real_number(small_sq_norm, "small_sq_norm", least=0.0)
        big_q = real_number(big_sq_norm, "big_sq_norm", least=0.0)
        grad = (big * big_q - small * q) / (big - small)
        trace = (q - big_q) / (1 / small - 1 / big)
        passed = big if samples is None else whole_number(samples, "samples", 1)
        self._add(grad, trace, samples=passed)

    def _add(self, grad: float, trace: float, samples: int) -> None:
        """Fade what was, and add one estimate (West 1979, https://doi.org/10.1145/359146.359153)."""
        keep = 0.5 ** (samples / self.half_life_samples)
        weight, s = 1 - keep, self._sums
        total = keep * s["weight"] + weight
        # About the means of the moment, which move on: squares about anything else would lose
        # their digits in a run whose gradients shrink by many orders of magnitude.
        x, y = grad - s["grad"], trace - s["trace"]
        s["grad"] += weight / total * x
        s["trace"] += weight / total * y
        after_x, after_y = grad - s["grad"], trace - s["trace"]
        s["grad_grad"] = keep * s["grad_grad"] + weight * x * after_x
        s["trace_trace"] = keep * s["trace_trace"] + weight * y * after_y
        s["grad_trace"] = keep * s["grad_trace"] + weight * x * after_y
        s["weight"], s["squared_weight"] = total, keep * keep * s["squared_weight"] + weight**2

    def reading(self) -> NoiseReading:
        """The averages now.

        Raises:
            ValueError: there was no update yet.
        """
        s = self._sums
        if not s["weight"]:
            raise ValueError("a noise scale needs at least one update before it is read, got none")
        grad, trace = s["grad"], s["trace"]
        spread = s["squared_weight"] / s["weight"] ** 2  # 1/n for n equal weights
        if spread > 1 - 1e-9:
            return NoiseReading(_ratio(trace, grad), math.inf, False, grad, trace)
        # Weighted sample covariances, then those of the means.
        of_means = spread / (1 - spread)
        var_grad = max(0.0, s["grad_grad"] / s["weight"]) * of_means
        var_trace = max(0.0, s["trace_trace"] / s["weight"]) * of_means
        covariance = s["grad_trace"] / s["weight"] * of_means
        quantile = student_quantile(1 / spread - 1)
        resolved = grad > quantile * math.sqrt(var_grad) and trace > quantile * math.sqrt(var_trace)
        if grad <= 0:
            return NoiseReading(math.inf, math.inf, False, grad, trace)
        ratio = trace / grad
        variance = (var_trace - 2 * ratio * covariance + ratio * ratio * var_grad) / grad**2
        return NoiseReading(ratio, math.sqrt(max(0.0, variance)), resolved, grad, trace)

    def state_dict(self) -> dict[str, Any]:
        """All there is to know, in plain numbers; the half-life is the constructor's."""
        return dict(self._sums)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self._sums = {name: float(state[name]) for name in _SUMS}


def student_quantile(degrees: float) -> float:
    """97.5% quantile of Student's t, in powers of 1 / degrees of freedom: to 1% from 2 on, and too
    small by a tenth at 1 (Abramowitz, Stegun 1964, 26.7.5).
    """
    z, n = NORMAL_QUANTILE, degrees
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / n + second / n**2 + third / n**3 + fourth / n**4


def _ratio(trace: float, grad: float) -> float:
    return trace / grad if grad > 0 else math.inf
