"""The learning-rate search on made-up functions, whose best point is known."""

import math
import random
from collections.abc import Callable

import pytest

from largebatch.study.protocol.search import FARTHEST, MISS, LearningRateTrial, Result, Search

Truth = Callable[[int, int], Result]
"""What a run at (grid point, seed) would come to if nothing cut it short."""

DIVERGED = Result(None, math.inf)
LEFT_OVER = 2.4
"""The loss of a run that ends without its target."""


def bowl(best: int, steps: int = 100) -> Truth:
    """A convex function with its lowest point at `best`."""
    return lambda point, seed: Result(steps + 7 * (point - best) ** 2, 2.19)


def cut(result: Result, trial: LearningRateTrial) -> Result:
    """The result as the loop would record it: given up where the trial says so."""
    if result.steps is None or result.steps <= trial.give_up_steps:
        return result
    return Result(None, LEFT_OVER)


def finish(
    search: Search, truth: Truth, *, chance: int | None = None, cutting: bool = True
) -> list[set[LearningRateTrial]]:
    """Run the search to its end; returns what it asked each time."""
    rounds = []
    while trials := search.ask():
        rounds.append(set(trials))
        assert len(rounds[-1]) == len(trials)
        if chance is not None:
            random.Random(chance + len(rounds)).shuffle(trials)
        for trial in trials:
            assert not search.done
            assert search.ask() == []
            result = truth(trial.grid_point, trial.seed)
            search.tell(trial, cut(result, trial) if cutting else result)
    assert search.done
    return rounds


@pytest.mark.parametrize("start", range(-8, 9, 2))
@pytest.mark.parametrize("best", [-3, 0, 1, 2])
def test_the_best_point_is_found_from_any_start(start: int, best: int) -> None:
    search = Search(start, most_steps=10_000)
    finish(search, bowl(best))
    assert search.best == best
    assert search.best_score.steps == 100
    assert {best - 1, best, best + 1} <= set(search.tried)


@pytest.mark.parametrize("start", range(-9, 10, 3))
def test_the_best_point_is_found_where_most_learning_rates_fail(start: int) -> None:
    def truth(point: int, seed: int) -> Result:
        if point > 2:
            return DIVERGED
        return Result(100 + 40 * (point - 1) ** 2, 2.19)

    search = Search(start, most_steps=300)  # reached from -1 to 2 only
    finish(search, truth)
    assert search.best == 1
    assert not search.missed


def test_what_is_asked_stops_at_a_worse_neighbour_on_either_side() -> None:
    search = Search(0, most_steps=10_000)
    rounds = finish(search, bowl(3))
    asked = [sorted(trial.grid_point for trial in trials) for trials in rounds]
    assert asked == [[0], [-1, 1], [2], [3], [4]]


def test_runs_are_asked_to_give_up_at_the_best_so_far() -> None:
    search = Search(0, most_steps=999)
    rounds = finish(search, bowl(3))
    limits = [{trial.give_up_steps for trial in trials} for trials in rounds]
    assert limits == [{999}, {163}, {128}, {107}, {100}]


def test_while_all_miss_runs_are_asked_to_use_all_their_steps() -> None:
    search = Search(0, most_steps=150)
    rounds = finish(search, bowl(5))  # 163 steps three points from the best, 128 two points
    limits = {trial.grid_point: trial.give_up_steps for trials in rounds for trial in trials}
    assert {limits.pop(point) for point in range(-3, 4)} == {150}
    assert limits == {4: 128, 5: 107, 6: 100}


@pytest.mark.parametrize("slope", [1, -1])
def test_a_best_point_at_the_edge_extends_the_grid_as_far_as_it_goes(slope: int) -> None:
    search = Search(2, most_steps=10_000)
    finish(search, lambda point, seed: Result(1000 - 10 * slope * point, 2.19))
    assert search.best == 2 + slope * FARTHEST
    assert search.tried == sorted(2 + slope * step for step in range(-1, FARTHEST + 1))


@pytest.mark.parametrize("truth", [bowl(0, steps=1000), lambda point, seed: DIVERGED])
def test_a_miss_stays_a_miss_after_the_farthest_points_on_both_sides(truth: Truth) -> None:
    search = Search(-1, most_steps=500, seeds=(0, 1))
    rounds = finish(search, truth)
    assert search.missed
    assert search.best_score == MISS
    assert search.tried == list(range(-1 - FARTHEST, FARTHEST))
    assert sum(map(len, rounds)) == 2 * (2 * FARTHEST + 1)
    assert {trial.give_up_steps for trials in rounds for trial in trials} == {500}
    assert search.ask() == []


def noisy(chance: int, best: int, num_seeds: int) -> Truth:
    """A bowl under noise that differs by seed, no two runs alike in steps, some diverging."""
    generator = random.Random(chance)
    points = range(best - 2 * FARTHEST, best + 2 * FARTHEST + 1)
    noise = list(range(num_seeds * len(points)))
    generator.shuffle(noise)
    results = {}
    for point in points:
        for seed in range(num_seeds):
            steps = 100 * (200 + 30 * (point - best) ** 2) + 50 * noise.pop()
            diverges = point > best and generator.random() < 0.2 * (point - best)
            results[point, seed] = DIVERGED if diverges else Result(steps, 2.19)
    return lambda point, seed: results[point, seed]


@pytest.mark.parametrize("num_seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("chance", range(8))
def test_runs_cut_short_decide_as_whole_runs_would(chance: int, num_seeds: int) -> None:
    truth = noisy(chance, best=chance % 5 - 2, num_seeds=num_seeds)
    cut_short, whole = (Search(0, 1_000_000, tuple(range(num_seeds))) for _ in range(2))
    asked = finish(cut_short, truth)
    assert asked == finish(whole, truth, cutting=False)
    assert cut_short.best == whole.best
    assert cut_short.best_score.steps == whole.best_score.steps < math.inf
    run_to_the_end = [
        truth(trial.grid_point, trial.seed) == cut(truth(trial.grid_point, trial.seed), trial)
        for trials in asked
        for trial in trials
    ]
    assert not all(run_to_the_end)


@pytest.mark.parametrize("chance", range(8))
def test_the_same_trials_are_asked_in_whatever_order_results_come(chance: int) -> None:
    truth = noisy(chance, best=2, num_seeds=3)
    searches = [Search(0, 1_000_000, (0, 1, 2)) for _ in range(4)]
    rounds = [
        finish(search, truth, chance=None if index == 0 else 100 * index)
        for index, search in enumerate(searches)
    ]
    assert rounds[1:] == rounds[:1] * 3
    assert len({search.best for search in searches}) == 1


@pytest.mark.parametrize(
    ("steps", "median"),
    [
        ([30], 30),
        ([30, 40], 40),
        ([50, 30, 40], 40),
        ([30, None, 40], 40),
        ([None, 30, None], math.inf),
        ([30, None], math.inf),
    ],
)
def test_a_score_is_the_upper_median_over_seeds(steps: list[int | None], median: float) -> None:
    search = Search(0, 1000, tuple(range(len(steps))))
    for trial, count in zip(search.ask(), steps, strict=True):
        search.tell(trial, Result(count, 2.0))
    assert search.best_score.steps == median
    assert search.missed == (median == math.inf)


def test_equal_steps_are_decided_by_the_loss() -> None:
    losses = {-1: 2.18, 0: 2.17, 1: 2.15, 2: 2.16}
    search = Search(0, 1000)
    finish(search, lambda point, seed: Result(50, losses.get(point, 2.19)))
    assert search.best == 1


def test_of_equals_the_lowest_is_the_best() -> None:
    search = Search(0, 1000)
    finish(search, lambda point, seed: Result(50 if -2 <= point <= 2 else 60, 2.19))
    assert search.best == -2


def test_a_search_asks_nothing_while_results_are_out() -> None:
    search = Search(0, 1000, (0, 1))
    first, second = search.ask()
    assert (search.ask(), search.done, search.missed) == ([], False, True)
    search.tell(second, Result(40, 2.0))
    assert (search.ask(), search.done) == ([], False)
    search.tell(first, Result(50, 2.0))
    assert {trial.grid_point for trial in search.ask()} == {-1, 1}


def test_a_result_that_was_not_asked_for_is_refused() -> None:
    search = Search(0, 1000)
    (trial,) = search.ask()
    search.tell(trial, Result(40, 2.0))
    with pytest.raises(KeyError):
        search.tell(trial, Result(40, 2.0))
