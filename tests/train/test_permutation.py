"""The shuffle that is computed place by place: a permutation, a fair one, and of no memory."""

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest

from largebatch.train.data.sampler import ROUNDS, permuted

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def order(num_samples: int, seed: int = 0, stream: int = 0, epoch: int = 0) -> list[int]:
    places = np.arange(num_samples, dtype=np.int64)
    return permuted(places, num_samples, seed, stream, np.full_like(places, epoch)).tolist()


def splitmix(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def by_hand(place: int, num_samples: int, seed: int, stream: int, epoch: int) -> int:
    """One place, in Python's integers, from the cipher's description."""
    a = math.ceil(math.sqrt(num_samples))
    b = math.ceil(num_samples / a)
    key = splitmix((seed * GAMMA + splitmix(stream + 1)) & MASK)

    def drawn(turn: int, coordinate: int, below: int) -> int:
        word = splitmix((key + (epoch * ROUNDS + turn + 1) * GAMMA) & MASK)
        return splitmix((word + (coordinate + 1) * GAMMA) & MASK) % below

    while True:
        left, right = divmod(place, b)
        for turn in range(ROUNDS):
            if turn % 2 == 0:
                left = (left + drawn(turn, right, a)) % a
            else:
                right = (right + drawn(turn, left, b)) % b
        place = left * b + right
        if place < num_samples:
            return place


@pytest.mark.parametrize(
    ("num_samples", "seed", "stream", "epoch"),
    [(1, 0, 0, 0), (2, 1, 0, 3), (13, 5, 7, 2), (1000, 2**63, 2**41, 10**6), (999_983, 0, 1, 0)],
)
def test_a_place_is_what_the_cipher_gives_by_hand(
    num_samples: int, seed: int, stream: int, epoch: int
) -> None:
    places = np.unique(np.linspace(0, num_samples - 1, 40).astype(np.int64))
    found = permuted(places, num_samples, seed, stream, np.full_like(places, epoch))
    expected = [by_hand(int(place), num_samples, seed, stream, epoch) for place in places]
    assert found.tolist() == expected


@pytest.mark.parametrize("num_samples", [1, 2, 3, 4, 5, 7, 97, 100, 101, 1024, 65_537])
def test_every_epoch_holds_every_sample_once(num_samples: int) -> None:
    for epoch in (0, 1, 10**9):
        assert sorted(order(num_samples, epoch=epoch)) == list(range(num_samples))


def test_places_of_several_epochs_can_be_asked_for_at_once() -> None:
    epochs = np.repeat(np.arange(6), 11)
    places = np.tile(np.arange(11), 6)
    together = permuted(places, 11, 3, 4, epochs).reshape(6, 11)
    assert together.tolist() == [order(11, 3, 4, epoch) for epoch in range(6)]


@pytest.mark.parametrize("num_samples", [2, 3, 4, 5, 6])
def test_all_orders_of_a_small_set_come_equally_often(num_samples: int) -> None:
    num_orders, each = math.factorial(num_samples), 100
    count = num_orders * each
    epochs = np.repeat(np.arange(count), num_samples)
    places = np.tile(np.arange(num_samples), count)
    orders = permuted(places, num_samples, 1, 2, epochs).reshape(count, num_samples)
    found = Counter(map(tuple, orders.tolist()))
    chi_squared = sum(
        (found[one] - each) ** 2 / each for one in itertools.permutations(range(num_samples))
    )
    # Of num_orders - 1 degrees of freedom; five deviations away.
    assert chi_squared < num_orders - 1 + 5 * math.sqrt(2 * (num_orders - 1)) + 5


@pytest.mark.parametrize("num_samples", [20, 50])
def test_two_places_know_nothing_of_each_other(num_samples: int) -> None:
    pairs, each = num_samples * (num_samples - 1), 50
    epochs = np.arange(pairs * each)
    for one, other in [(0, 1), (2, num_samples - 1)]:
        x = permuted(np.full_like(epochs, one), num_samples, 1, 2, epochs)
        y = permuted(np.full_like(epochs, other), num_samples, 1, 2, epochs)
        found = np.bincount(x * num_samples + y, minlength=num_samples**2).reshape(
            num_samples, num_samples
        )
        assert not found.diagonal().any()
        unequal = found[~np.eye(num_samples, dtype=bool)]
        chi_squared = np.square(unequal - each).sum() / each
        assert abs(chi_squared - (pairs - 1)) < 5 * math.sqrt(2 * (pairs - 1))


def test_a_long_order_is_unlike_the_one_it_shuffles_and_unlike_others() -> None:
    orders = [
        np.array(order(65_536, seed, stream, epoch))
        for seed, stream, epoch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for one, other in itertools.combinations([np.arange(65_536), *orders], 2):
        assert np.count_nonzero(one == other) < 10  # 1 is to be expected
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.02
    assert np.count_nonzero(np.diff(orders[0]) == 1) < 10


def test_an_order_of_a_trillion_samples_takes_no_memory() -> None:
    places = np.arange(10**12 - 50_000, 10**12, dtype=np.int64)
    tracemalloc.start()
    found = permuted(places, 10**12, 0, 0, np.zeros_like(places))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(found)) == 50_000
    assert found.min() >= 0
    assert found.max() < 10**12
    assert abs(found.mean() / 10**12 - 0.5) < 0.01
    assert peak < 50_000 * 8 * (ROUNDS + 20)
