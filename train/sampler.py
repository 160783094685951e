"""Which sample stands at which position of a run: a function of (seed, position) and of nothing
else.

World size, accumulation, micro-batch size and batch ramps cut the same sequence differently; none
of them changes, skips or repeats a sample.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]


def mix(words: _Words) -> _Words:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014): 64 well-mixed bits for each word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(seed: int, stream: int, positions: Indices) -> _Words:
    """Random 64-bit words at `positions` of the sequence named by (seed, stream)."""
    gamma = np.uint64(0x9E3779B97F4A7C15)
    key = mix(np.array([seed], np.uint64) * gamma + mix(np.array([stream + 1], np.uint64)))
    return mix(key + (positions.astype(np.uint64) + np.uint64(1)) * gamma)


@lru_cache(maxsize=4)
def shuffled(num_samples: int, seed: int, epoch: int) -> Indices:
    """All of range(num_samples), in the order that (seed, epoch) gives."""
    words = random_words(seed, epoch + 1, np.arange(num_samples, dtype=np.int64))
    return np.argsort(words, kind="stable").astype(np.int64)


@dataclass(frozen=True)
class Sampler:
    """The order of the training samples.

    Attributes:
        num_samples: size of the training set.
        replacement: draw each sample independently; else every epoch is a fresh shuffle of the set.
    """

    num_samples: int
    seed: int
    replacement: bool

    def take(self, start: int, count: int) -> Indices:
        """Indices of the samples at positions `start` to `start + count`; shape (count,)."""
        positions = np.arange(start, start + count, dtype=np.int64)
        if self.replacement:
            words = random_words(self.seed, 0, positions)
            return (words % np.uint64(self.num_samples)).astype(np.int64)
        epochs, places = np.divmod(positions, self.num_samples)
        indices = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = shuffled(self.num_samples, self.seed, epoch)[places[here]]
        return indices
