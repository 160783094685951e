"""Several sources by weight: each has its share everywhere, and its epochs whole."""

import itertools
import random
from fractions import Fraction

import numpy as np
import pytest

from largebatch.train.data.mixture import MOST_WEIGHT, Mixture, dealt, whole_weights
from largebatch.train.data.sampler import permuted

WEIGHTS = {
    "one": (1,),
    "equal": (1,) * 7,
    "a half and two quarters": (2, 1, 1),
    "powers of two": tuple(2**power for power in range(10)),
    "one that is rare": (1, 99_999),
    "many that are rare": (*(1,) * 9, 10_000),
    "of nine digits": (123_456_789, 987_654_321, 500_000_000),
}
MIXED = pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)


def mixture(sizes: tuple[int, ...], weights: tuple[int, ...], seed: int = 0) -> Mixture:
    return Mixture(sum(sizes), seed, False, sizes, weights)


def by_source(indices: np.ndarray, sizes: tuple[int, ...]) -> list[list[int]]:
    """What each source gave, in order, numbered within the source."""
    edges = np.cumsum([0, *sizes])
    return [
        (indices[(low <= indices) & (indices < high)] - low).tolist()
        for low, high in itertools.pairwise(edges)
    ]


@MIXED
@pytest.mark.parametrize("start", [0, 10**15 + 7])
def test_every_source_has_its_share_to_within_two_samples(
    weights: tuple[int, ...], start: int
) -> None:
    count = 30_000
    sources, draws = dealt(start, count, weights)
    for source, weight in enumerate(weights):
        taken = np.concatenate([[0], np.cumsum(sources == source)])
        before = int(draws[sources == source][0]) if taken[-1] else None
        share = Fraction(weight, sum(weights))
        for at in (0, 1, 999, count // 2, count):  # exactly, in fractions
            if before is not None:
                assert abs(before + int(taken[at]) - share * (start + at)) < 2
        strays = taken - float(share) * np.arange(count + 1)
        assert strays.max() - strays.min() < 4


@pytest.mark.parametrize(
    ("weights", "turns"),
    [
        ((1, 1), [0, 1, 0, 1, 0, 1, 0, 1]),  # source 0 after floor((t + 1) / 2) turns of it
        ((3, 1), [0, 1, 0, 0, 0, 1, 0, 0]),  # source 1 after floor((t + 2) / 4)
        # 1 and 2 share a branch as heavy as 0, which came first and so is the left one.
        ((2, 1, 1), [0, 1, 0, 2, 0, 1, 0, 2]),
    ],
)
def test_turns_are_those_worked_out_by_hand(weights: tuple[int, ...], turns: list[int]) -> None:
    assert dealt(0, 8, weights)[0].tolist() == turns


def test_each_source_is_shuffled_by_its_own_stream() -> None:
    """Of (seed, 2^41 + source, epoch): no later version may change an order."""
    sizes, weights, seed = (10, 7), (2, 1), 5
    sources, draws = dealt(0, 60, weights)
    expected = [
        10 * int(source)
        + int(
            permuted(
                np.array([draw % sizes[source]]),
                sizes[source],
                seed,
                2**41 + int(source),
                np.array([draw // sizes[source]]),
            )[0]
        )
        for source, draw in zip(sources, draws, strict=True)
    ]
    assert mixture(sizes, weights, seed).take(0, 60).tolist() == expected


def test_many_weights_stay_within_two_samples() -> None:
    for trial in range(60):
        chance = random.Random(trial)
        weights = [chance.randint(1, 1000) for _ in range(chance.randint(2, 14))]
        sources, _ = dealt(0, 5000, weights)
        for source, weight in enumerate(weights):
            taken = np.cumsum(sources == source)
            assert abs(taken - weight / sum(weights) * np.arange(1, 5001)).max() < 2


@MIXED
def test_draws_of_a_source_are_counted_without_a_gap(weights: tuple[int, ...]) -> None:
    sources, draws = dealt(10**9, 20_000, weights)
    gaps = [np.diff(draws[sources == source]) for source in range(len(weights))]
    assert all((gap == 1).all() for gap in gaps)
    assert sum(len(gap) for gap in gaps) > 19_900


def test_no_sample_comes_again_before_its_source_is_through() -> None:
    sizes, weights = (10, 97, 1), (3, 5, 1)
    indices = mixture(sizes, weights).take(0, 5000)
    for size, of_it in zip(sizes, by_source(indices, sizes), strict=True):
        assert len(of_it) > 4 * size
        epochs = [of_it[start : start + size] for start in range(0, len(of_it) - size, size)]
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
        if size > 5:
            assert all(one != other for one, other in itertools.pairwise(epochs))


@MIXED
def test_every_cut_of_the_range_gives_the_same_order(weights: tuple[int, ...]) -> None:
    sizes = tuple(range(11, 11 + len(weights)))
    order = mixture(sizes, weights, seed=3)
    whole = order.take(0, 600).tolist()
    for chance in range(2):
        cuts = sorted(random.Random(chance).sample(range(1, 600), 8))
        pieces = [order.take(a, b - a).tolist() for a, b in itertools.pairwise([0, *cuts, 600])]
        assert [index for piece in pieces for index in piece] == whole


def test_a_run_that_goes_on_far_away_finds_its_place_at_once() -> None:
    order = mixture((10**9, 10**7), (7, 3))
    at = 10**14
    assert order.take(at + 5, 10).tolist() == order.take(at, 15).tolist()[5:]


def test_seeds_shuffle_differently_and_take_the_same_turns() -> None:
    sizes, weights = (1000, 1000), (1, 3)
    one, other = (mixture(sizes, weights, seed).take(0, 1000) for seed in (0, 1))
    assert ((one < 1000) == (other < 1000)).all()
    assert np.count_nonzero(one == other) < 10


def test_sources_of_one_size_are_shuffled_differently() -> None:
    first, second = by_source(mixture((500, 500), (1, 1)).take(0, 1000), (500, 500))
    assert sum(a == b for a, b in zip(first, second, strict=True)) < 10


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["0.7", "0.3"], (7, 3)),
        (["2", "4", "6"], (1, 2, 3)),
        (["1e-3", "1"], (1, 1000)),
        (["0.5"], (1,)),
        (["0.1", "0.2", "0.25"], (2, 4, 5)),
    ],
)
def test_weights_are_taken_as_they_are_written(
    written: list[str], expected: tuple[int, ...]
) -> None:
    assert whole_weights([Fraction(weight) for weight in written]) == expected


def test_weights_of_too_many_digits_are_refused() -> None:
    with pytest.raises(ValueError, match=f"at most {MOST_WEIGHT}: write them with fewer digits"):
        whole_weights([Fraction("0.12345678901"), Fraction("0.5")])
