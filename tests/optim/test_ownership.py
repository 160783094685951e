"""Work is spread evenly, alike on every rank, and a larger world never waits longer."""

import itertools
import math
import random

import pytest

from largebatch.optim.sharding.work_assignment import assign


def heaviest(costs: list[int], bins: list[int], num_bins: int) -> int:
    return max(
        sum(cost for cost, chosen in zip(costs, bins, strict=True) if chosen == number)
        for number in range(num_bins)
    )


def random_costs(seed: int) -> list[int]:
    """Of many sizes: a few heavy blocks among many light ones, as cubes of matrix sizes are."""
    numbers = random.Random(seed)
    return [numbers.choice((2, 3, 16, 17, 128)) ** 3 for _ in range(numbers.randrange(1, 40))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("num_bins", [1, 2, 3, 4, 7, 12])
def test_no_bin_is_heavier_than_the_mean_and_one_item(seed: int, num_bins: int) -> None:
    costs = random_costs(seed)
    bins = assign(costs, num_bins)
    assert set(bins) <= set(range(num_bins))
    assert heaviest(costs, bins, num_bins) <= sum(costs) / num_bins + max(costs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_bins", [2, 3])
def test_no_bin_is_heavier_than_four_thirds_of_the_best(seed: int, num_bins: int) -> None:
    """The best of all ways, tried one by one."""
    numbers = random.Random(seed)
    costs = [numbers.randrange(1, 20) for _ in range(8)]
    every_way = itertools.product(range(num_bins), repeat=len(costs))
    best = min(heaviest(costs, list(way), num_bins) for way in every_way)
    found = heaviest(costs, assign(costs, num_bins), num_bins)
    assert found <= (4 / 3 - 1 / (3 * num_bins)) * best + 1e-9


def test_equal_costs_go_round() -> None:
    bins = assign([5] * 12, 4)
    assert [bins.count(number) for number in range(4)] == [3, 3, 3, 3]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("with_rounds", [False, True])
def test_a_larger_world_is_never_slower(seed: int, with_rounds: bool) -> None:
    costs = random_costs(seed)
    rounds = assign(costs, 10) if with_rounds else None
    makespans = [heaviest(costs, assign(costs, n, rounds=rounds), n) for n in range(1, 16)]
    assert makespans == sorted(makespans, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_items_that_are_settled_stay_where_they_are(seed: int) -> None:
    costs = [*random_costs(seed), 1, 2, 3]
    settled = assign(costs[:-3], 4)
    assert assign(costs, 4, given=settled)[:-3] == settled


def test_added_items_fill_up_the_lightest_bins() -> None:
    assert assign([8, 4, 5, 1], 2, given=[0, 1]) == [0, 1, 1, 0]
    assert assign([8, 1, 3, 3], 2, given=[0, 1]) == [0, 1, 1, 1]


def test_a_bins_items_are_in_different_rounds_where_they_can_be() -> None:
    """576 blocks of one size, in rounds of an interval of 10, over 64 ranks: 9 blocks a rank."""
    costs = [1] * 576
    rounds = assign(costs, 10)
    assert [rounds.count(number) for number in range(10)] == [58] * 6 + [57] * 4
    pairs = list(zip(assign(costs, 64, rounds=rounds), rounds, strict=True))
    assert max(pairs.count(pair) for pair in set(pairs)) == 1
    # What they are spread for: by turns alone a rank has several in the same round.
    pairs = list(zip(assign(costs, 64), rounds, strict=True))
    assert max(pairs.count(pair) for pair in set(pairs)) > 1


def test_no_items() -> None:
    assert assign([], 3) == []


@pytest.mark.parametrize("cost", [-1, math.nan])
def test_a_cost_that_is_none_is_refused(cost: float) -> None:
    with pytest.raises(ValueError, match=rf"costs must be >= 0, got {cost}"):
        assign([1, cost], 2)


def test_no_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="num_bins must be >= 1, got 0"):
        assign([1], 0)
