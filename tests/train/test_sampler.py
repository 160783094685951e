"""The order of the samples: a function of (seed, position) that no later version may change."""

import itertools
import random
from collections.abc import Iterable

import numpy as np
import pytest

from largebatch.train.data.sampler import Indices, Sampler, mix, random_word, random_words

KINDS = pytest.mark.parametrize("replacement", [True, False], ids=["replacement", "epochs"])


def joined(sampler: Sampler, cuts: Iterable[int]) -> list[int]:
    """The sequence up to the last cut, taken piece by piece."""
    marks = [0, *cuts]
    pieces = [sampler.take(start, end - start) for start, end in itertools.pairwise(marks)]
    return [int(index) for piece in pieces for index in piece]


def test_the_words_are_those_of_splitmix64() -> None:
    # The outputs that its reference implementation (S. Vigna, splitmix64.c) gives for seed 1234567.
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * gamma) % 2**64 for step in (1, 2, 3)], np.uint64)
    assert mix(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
    ]


@pytest.mark.parametrize(
    ("seed", "start", "expected"),
    [
        (0, 0, [31, 162, 184, 891, 849, 576]),
        (0, 10**12, [573, 119, 37]),
        (1, 0, [49, 841, 664, 626, 307, 39]),
        (2**63, 0, [282, 174, 803, 874, 42, 315]),
    ],
)
def test_the_order_with_replacement_stays_as_it_was(
    seed: int, start: int, expected: list[int]
) -> None:
    sampler = Sampler(num_samples=1000, seed=seed, replacement=True)
    assert sampler.take(start, len(expected)).tolist() == expected


@pytest.mark.parametrize(
    ("num_samples", "seed", "start", "expected"),
    [
        (7, 0, 0, [3, 1, 6, 0, 2, 4, 5, 0, 3, 5, 2, 4, 6, 1]),
        (7, 1, 0, [6, 2, 1, 0, 5, 3, 4, 2, 6, 5, 0, 3, 4, 1]),
        (1000, 0, 123_456_789, [96, 588, 99]),
    ],
)
def test_the_order_of_the_epochs_stays_as_it_was(
    num_samples: int, seed: int, start: int, expected: list[int]
) -> None:
    sampler = Sampler(num_samples, seed, replacement=False)
    assert sampler.take(start, len(expected)).tolist() == expected


@KINDS
@pytest.mark.parametrize("num_samples", [1, 37, 1000])
def test_every_cut_of_the_range_gives_the_same_sequence(
    num_samples: int, replacement: bool
) -> None:
    sampler = Sampler(num_samples, seed=3, replacement=replacement)
    whole = sampler.take(0, 500).tolist()
    assert joined(sampler, range(1, 501)) == whole
    for chance in range(5):
        cuts = sorted(random.Random(chance).sample(range(1, 500), 20))
        assert joined(sampler, [*cuts, 500]) == whole


@KINDS
def test_the_sequence_does_not_depend_on_what_was_taken_before(replacement: bool) -> None:
    used = Sampler(50, seed=4, replacement=replacement)
    for start in (700, 3, 120, 0):
        used.take(start, 60)
    fresh = Sampler(50, seed=4, replacement=replacement)
    assert used.take(90, 40).tolist() == fresh.take(90, 40).tolist()


@KINDS
def test_indices_lie_within_the_set(replacement: bool) -> None:
    indices: Indices = Sampler(13, seed=0, replacement=replacement).take(5, 1000)
    assert indices.shape == (1000,)
    assert indices.dtype == np.int64
    assert set(indices.tolist()) == set(range(13))


@pytest.mark.parametrize("seed", range(4))
def test_draws_with_replacement_are_uniform_and_repeat(seed: int) -> None:
    indices = Sampler(100, seed, replacement=True).take(0, 100_000)
    counts = np.bincount(indices, minlength=100)
    # Chi-squared over 99 degrees of freedom: 99 +- 14, and 160 is four of these away.
    assert 45 < np.square(counts - 1000).sum() / 1000 < 160
    # A birthday: 100 draws from 100 hold 63 different ones, and never all of them.
    assert 50 < len(set(indices[:100].tolist())) < 76
    # Neighbours in the sequence know nothing of each other.
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.015


@pytest.mark.parametrize("num_samples", [1, 2, 10, 1437])
def test_without_replacement_each_epoch_is_a_permutation(num_samples: int) -> None:
    sampler = Sampler(num_samples, seed=5, replacement=False)
    for epoch in range(4):
        indices = sampler.take(epoch * num_samples, num_samples)
        assert sorted(indices.tolist()) == list(range(num_samples))


def test_each_epoch_is_shuffled_anew() -> None:
    sampler = Sampler(1000, seed=5, replacement=False)
    epochs = [sampler.take(epoch * 1000, 1000) for epoch in range(5)]
    for one, other in itertools.pairwise(epochs):
        assert np.count_nonzero(one == other) < 10
    assert np.count_nonzero(epochs[0] == np.arange(1000)) < 10


def test_a_batch_may_span_the_border_of_epochs_and_whole_epochs() -> None:
    sampler = Sampler(10, seed=6, replacement=False)
    epochs = [sampler.take(10 * epoch, 10).tolist() for epoch in range(5)]
    assert sampler.take(8, 4).tolist() == epochs[0][8:] + epochs[1][:2]
    assert sampler.take(9, 32).tolist() == [
        *epochs[0][9:],
        *epochs[1],
        *epochs[2],
        *epochs[3],
        *epochs[4][:1],
    ]


@KINDS
def test_different_seeds_give_unrelated_orders(replacement: bool) -> None:
    orders = [Sampler(1000, seed, replacement).take(0, 1000) for seed in (0, 1, 2, 2**32)]
    for index, one in enumerate(orders):
        for other in orders[index + 1 :]:
            assert np.count_nonzero(one == other) < 10


def test_streams_of_one_seed_are_unrelated() -> None:
    positions = np.arange(1000, dtype=np.int64)
    words = [random_words(0, stream, positions) for stream in range(3)]
    shifted = random_words(0, 0, positions + 1)
    assert len({int(word) for stream in words for word in stream}) == 3000
    assert shifted[:-1].tolist() == words[0][1:].tolist()


@pytest.mark.parametrize("seed", [0, 7, 2**63 + 5, 2**64 - 1])
@pytest.mark.parametrize("position", [0, 1, 2**40, 2**62])
def test_one_word_is_that_of_the_arrays(seed: int, position: int) -> None:
    for stream in (0, 3, 1 << 43):
        (word,) = random_words(seed, stream, np.array([position], np.int64))
        assert random_word(seed, stream, position) == int(word)
