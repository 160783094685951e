"""How long a step takes at which batch size: the running medians, and a line through them."""

from collections import deque
from statistics import median
from typing import Any

NUM_KEPT = 15
"""Times of one batch size: enough for a median, few enough to follow the machine."""


class StepTimes:
    """The last few measured times of each batch size.

    Medians, because the first steps at a batch size may take a hundred times as long (compilation,
    allocation): in a mean over a few boundaries that would stay for good once the batch has grown.
    """

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = {}

    def __contains__(self, batch_size: int) -> bool:
        return batch_size in self._seconds

    def add(self, batch_size: int, seconds: float) -> None:
        """Take in the seconds a step of `batch_size` samples took."""
        self._seconds.setdefault(batch_size, deque(maxlen=NUM_KEPT)).append(seconds)

    def medians(self) -> dict[int, float]:
        """Seconds a step by batch size."""
        return {size: median(seconds) for size, seconds in self._seconds.items()}

    def fit(self) -> tuple[float, float]:
        """(a, b) of a step's seconds a + b · batch size, with the least squares of relative errors.

        One batch size alone is taken to say a; b is then 0.
        """
        times = self.medians()
        assert times
        if len(times) == 1:
            return next(iter(times.values())), 0.0
        weights = {size: seconds**-2 for size, seconds in times.items()}
        total = sum(weights.values())
        mean_size = sum(weights[size] * size for size in times) / total
        mean_seconds = sum(weights[size] * times[size] for size in times) / total
        offsets = {size: size - mean_size for size in times}
        covariance = sum(weights[size] * offsets[size] * times[size] for size in times)
        variance = sum(weights[size] * offsets[size] ** 2 for size in times)
        slope = covariance / variance
        return mean_seconds - slope * mean_size, slope

    def state_dict(self) -> list[Any]:
        """What was measured, in plain numbers."""
        return [[size, list(seconds)] for size, seconds in self._seconds.items()]

    def load_state_dict(self, state: list[Any]) -> None:
        """Resume from a `state_dict`."""
        self._seconds = {
            int(size): deque(map(float, seconds), maxlen=NUM_KEPT) for size, seconds in state
        }
