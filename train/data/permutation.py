"""A shuffle of any length that is computed place by place, so that no list of it is ever held.

The generalized Feistel cipher of J. Black and P. Rogaway, "Ciphers with arbitrary finite domains"
(CT-RSA 2002, section 5): the numbers below n stand on a grid of a x b >= n cells; a round adds a
keyed function of one coordinate to the other, which can be undone and so is a permutation of the
grid; where the result is n or above, it is taken as the next argument ("cycle walking"), which
leaves a permutation of the numbers below n. Deviation: the round function is SplitMix64's, not a
cipher's. It shuffles; it keeps no secret.
"""

import math
from typing import Final

import numpy as np

from largebatch.train.sampler import Indices, mix, random_words

ROUNDS: Final = 20
"""Even. A chi-squared test over all orders of six samples tells 12 from chance, and 20 no more."""

_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)


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


def _draw(keys: "np.typing.NDArray[np.uint64]", coordinate: Indices, below: int) -> Indices:
    words = mix(keys + (coordinate.astype(np.uint64) + np.uint64(1)) * _GAMMA)
    return (words % np.uint64(below)).astype(np.int64)
