"""Which sample stands at which position of a run: a function of (seed, position) and of nothing
else.

World size, accumulation, micro-batch size and batch ramps cut the same sequence differently; none
of them changes, skips or repeats a sample.

A set of up to 2^24 samples is shuffled as a list. The order of a larger one, and of the sources of
a mixture, is computed place by place, so that no list of it is ever held, by the generalized
Feistel cipher of J. Black and P. Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002,
section 5): the numbers below n stand on a grid of a x b >= n cells; a round adds a keyed function
of one coordinate to the other, which can be undone and so is a permutation of the grid; where the
result is n or above, it is taken as the next argument ("cycle walking"), which leaves a permutation
of the numbers below n. Deviation: the round function is SplitMix64's, not a cipher's. It shuffles;
it keeps no secret.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

Indices = npt.NDArray[np.int64]
_Words = npt.NDArray[np.uint64]

MOST_LISTED: Final = 1 << 24
"""Samples whose order is kept as a list, of 128 MiB."""

MOST_SAMPLES: Final = 1 << 62
"""Whose places, and the sums with them, are numbers of 64 bits."""

# Beside the streams of epochs, steps (randomness.py) and mixtures (mixture.py).
_PERMUTED_STREAM: Final = 1 << 42

_GAMMA_ALONE: Final = 0x9E3779B97F4A7C15
_GAMMA: Final = np.uint64(_GAMMA_ALONE)
_ALL_BITS: Final = (1 << 64) - 1


def mix(words: _Words) -> _Words:
    """SplitMix64's finalizer (Steele, Lea & Flood 2014): 64 well-mixed bits for each word."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(seed: int, stream: int, positions: Indices) -> _Words:
    """Random 64-bit words at `positions` of the sequence named by (seed, stream)."""
    key = mix(np.array([seed], np.uint64) * _GAMMA + mix(np.array([stream + 1], np.uint64)))
    return mix(key + (positions.astype(np.uint64) + np.uint64(1)) * _GAMMA)


def random_word(seed: int, stream: int, position: int) -> int:
    """The word at one position, in Python's numbers: for one, numpy's take ten times as long."""
    key = _mix_one(seed * _GAMMA_ALONE + _mix_one(stream + 1))
    return _mix_one(key + (position + 1) * _GAMMA_ALONE)


def _mix_one(word: int) -> int:
    """`mix` of one word, its lowest 64 bits."""
    word &= _ALL_BITS
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & _ALL_BITS
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & _ALL_BITS
    return word ^ (word >> 31)


@lru_cache(maxsize=4)
def shuffled(num_samples: int, seed: int, epoch: int) -> Indices:
    """All of range(num_samples), in the order that (seed, epoch) gives."""
    words = random_words(seed, epoch + 1, np.arange(num_samples, dtype=np.int64))
    return np.argsort(words, kind="stable").astype(np.int64)


ROUNDS: Final = 20
"""Even. A chi-squared test over all orders of six samples tells 12 from chance, and 20 no more."""


def permuted(places: Indices, num_samples: int, seed: int, stream: int, epochs: Indices) -> Indices:
    """What stands at `places` of the shuffled range(num_samples), each in its own epoch.

    Args:
        places: each below `num_samples`; shape (count,).
        stream: tells apart what one seed shuffles.
        epochs: shape (count,); each epoch has a shuffle of its own.
    """
    width = math.isqrt(num_samples - 1) + 1
    height = -(-num_samples // width)  # width x height >= num_samples, by less than width
    keys = [
        random_words(seed, stream, epochs * ROUNDS + turn) for turn in range(ROUNDS)
    ]  # ROUNDS of (count,)
    found = places.astype(np.int64)
    outside = np.arange(len(found))
    while len(outside):
        x, y = np.divmod(found[outside], height)
        for turn in range(0, ROUNDS, 2):
            x = (x + _draw(keys[turn][outside], y, width)) % width
            y = (y + _draw(keys[turn + 1][outside], x, height)) % height
        found[outside] = x * height + y
        outside = outside[found[outside] >= num_samples]
    return found


def _draw(keys: _Words, coordinate: Indices, below: int) -> Indices:
    words = mix(keys + (coordinate.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (words % np.uint64(below)).astype(np.int64)


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
        if self.num_samples > MOST_LISTED:
            return permuted(places, self.num_samples, self.seed, _PERMUTED_STREAM, epochs)
        indices = np.empty_like(positions)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            indices[here] = shuffled(self.num_samples, self.seed, epoch)[places[here]]
        return indices
