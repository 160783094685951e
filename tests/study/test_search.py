"""The search at one batch size on made-up functions, whose best setting is known."""

import math
import random
from collections.abc import Callable

import pytest

from largebatch.study.protocol.search import CUT, FARTHEST, Result, Search, SearchTrial, Setting

Truth = Callable[[Setting, int], Result]
"""What a run at (setting, seed) would come to if nothing cut it short."""

DIVERGED = Result(None, math.inf)
LEFT_OVER = 2.4
"""The loss of a run that ends without its target."""


def bowl(best: int, steps: float = 100.0, curvature: float = 0.08) -> Truth:
    """A basin like those of real runs: log steps grow by `curvature` a squared grid point."""

    def truth(setting: Setting, seed: int) -> Result:
        return Result(steps * math.exp(curvature * (setting.grid_point - best) ** 2), 2.19)

    return truth


def table(steps: dict[int, float | None]) -> Truth:
    """Steps by grid point, the same on every seed; elsewhere runs diverge."""

    def truth(setting: Setting, seed: int) -> Result:
        found = steps.get(setting.grid_point)
        return DIVERGED if found is None else Result(found, 2.19)

    return truth


def cut(result: Result, trial: SearchTrial) -> Result:
    """The result as the loop would record it: given up where the trial says so."""
    if result.steps is None or result.steps <= trial.give_up_steps:
        return result
    return Result(None, LEFT_OVER)


def finish(
    search: Search, truth: Truth, *, chance: int | None = None, cutting: bool = True
) -> list[set[SearchTrial]]:
    """Run the search to its end; returns what it asked each time."""
    rounds = []
    while trials := search.ask():
        rounds.append(set(trials))
        assert len(rounds[-1]) == len(trials)
        assert len(rounds) < 1000
        if chance is not None:
            random.Random(chance + len(rounds)).shuffle(trials)
        for trial in trials:
            assert not search.done
            assert search.ask() == []
            result = truth(trial.setting, trial.seed)
            limit = trial if cutting else trial._replace(give_up_steps=search.most_steps)
            search.tell(trial, cut(result, limit))
    assert search.done
    return rounds


def rates(rounds: list[set[SearchTrial]], seed: int = 0) -> list[int]:
    """The grid points asked on one seed, in order of their rounds."""
    return [
        trial.setting.grid_point
        for trials in rounds
        for trial in sorted(trials)
        if trial.seed == seed
    ]


def make(start: int = 0, most_steps: int = 10_000, **options: object) -> Search:
    return Search(Setting(start), most_steps, (0, 1), (2, 3, 4), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("start", range(-8, 9, 2))
@pytest.mark.parametrize("best", [-2, 0, 1, 2])
def test_the_best_point_is_found_from_any_start(start: int, best: int) -> None:
    search = make(start)
    finish(search, bowl(best))
    assert search.best == search.chosen == Setting(best)
    assert search.best_steps == 100
    assert search.open_sides == (False, False)


@pytest.mark.parametrize("start", range(-9, 10, 3))
def test_the_best_point_is_found_where_most_learning_rates_fail(start: int) -> None:
    search = make(start, most_steps=300)
    finish(search, table({-1: 260, 0: 140, 1: 100, 2: 130}))
    assert search.chosen == Setting(1)
    assert not search.missed


def test_a_climb_walks_over_ties_to_the_better_rate() -> None:
    """A convolutional network's LAMB: 42, 42, 32, 27, 21 steps at rates sqrt(2) apart."""
    search = make()
    finish(search, table({-2: 60, -1: 47, 0: 42, 1: 42, 2: 32, 3: 27, 4: 21, 5: None}))
    assert search.chosen == Setting(4)


def test_a_climb_walks_over_rates_that_are_a_little_worse() -> None:
    search = make()
    finish(search, table({-2: 120, -1: 111, 0: 100, 1: 104, 2: 109, 3: 90, 4: 85, 5: 99, 6: 120}))
    assert search.chosen == Setting(4)


def test_a_climb_ends_at_a_wall_on_either_side() -> None:
    search = make()
    rounds = finish(search, table({-3: 115, -2: 113, -1: 111, 0: 100, 1: 113, 2: 90}))
    assert sorted(set(rates(rounds))) == [-2, -1, 0, 1]  # 113 of 100 is a wall, 111 is none
    assert search.chosen == Setting(0)


def test_a_side_without_a_wall_is_walked_three_rates_and_marked() -> None:
    search = make()
    rounds = finish(search, table({point: 100 + abs(point) for point in range(-9, 1)} | {1: 200}))
    assert sorted(set(rates(rounds))) == [-3, -2, -1, 0, 1]
    assert search.open_sides == (True, False)


def test_runs_of_the_climb_are_cut_behind_the_wall_and_no_others() -> None:
    search = make(most_steps=999)
    rounds = finish(search, bowl(3))
    best = 999 / CUT
    for trials in rounds:
        for trial in sorted(trials):
            if trial.seed == 0:
                assert trial.give_up_steps == min(999, math.ceil(CUT * best))
            else:
                assert trial.give_up_steps == 999
        climbed = [bowl(3)(trial.setting, 0).steps or 0.0 for trial in trials if trial.seed == 0]
        best = min([best, *climbed])


def test_runs_are_cut_by_hope_until_one_has_reached_the_target() -> None:
    search = make(most_steps=200, climb_steps=120)
    rounds = finish(search, table({0: 130, -1: 110, -2: 150}))
    assert [{trial.give_up_steps for trial in trials} for trials in rounds[:3]] == [
        {120}, {120}, {127}
    ]  # fmt: skip
    assert search.chosen == Setting(-1)


@pytest.mark.parametrize("slope", [1, -1])
def test_a_best_point_at_the_edge_extends_the_grid_as_far_as_it_goes(slope: int) -> None:
    search = make(2)
    finish(search, lambda setting, seed: Result(1000 - 10 * slope * setting.grid_point, 2.19))
    assert search.best == Setting(2 + slope * FARTHEST)
    assert search.open_sides[slope > 0]


@pytest.mark.parametrize("truth", [bowl(0, steps=1000), lambda setting, seed: DIVERGED])
def test_a_miss_stays_a_miss_after_the_farthest_points_on_both_sides(truth: Truth) -> None:
    search = make(-1, most_steps=500)
    rounds = finish(search, truth)
    assert search.missed
    assert (search.best, search.chosen) == (None, None)
    assert sorted(rates(rounds)) == list(range(-1 - FARTHEST, FARTHEST))
    assert sum(map(len, rounds)) == 2 * FARTHEST + 1  # one seed is enough
    assert {trial.give_up_steps for trials in rounds for trial in trials} == {500}
    assert search.ask() == []


def test_at_most_three_rates_near_the_best_are_confirmed_and_one_is_reported() -> None:
    search = make()
    rounds = finish(search, table({-3: 120, -2: 108, -1: 104, 0: 100, 1: 105, 2: 110, 3: 130}))
    assert sorted(rates(rounds, seed=1)) == [-1, 0, 1]
    for seed in (2, 3, 4):
        assert rates(rounds, seed) == [0]


def test_the_least_mean_over_the_selecting_seeds_is_chosen() -> None:
    steps = {(-1, 0): 104.0, (0, 0): 100.0, (1, 0): 106.0, (-1, 1): 90.0, (0, 1): 99.0}
    search = make()
    finish(search, lambda setting, seed: Result(steps.get((setting.grid_point, seed), 130.0)))
    assert search.chosen == Setting(-1)


def test_a_rate_that_misses_on_a_selecting_seed_is_not_chosen() -> None:
    def cliff(setting: Setting, seed: int) -> Result:
        if setting.grid_point > (2 if seed == 0 else 1):
            return DIVERGED
        return Result(100 - 5 * setting.grid_point, 2.19)

    search = make()
    finish(search, cliff)
    assert search.best == Setting(2)
    assert search.chosen == Setting(1)


def test_where_all_near_the_best_miss_on_a_seed_lower_rates_are_tried_in_full() -> None:
    def cliff(setting: Setting, seed: int) -> Result:
        if setting.grid_point > (0 if seed == 0 else -4):
            return DIVERGED
        return Result(100 + 5 * setting.grid_point**2, 2.19)

    search = make()
    rounds = finish(search, cliff)
    assert search.chosen == Setting(-4)
    whole = [t for trials in rounds for t in trials if t.give_up_steps == search.most_steps]
    assert {0, 1} == {trial.seed for trial in whole if trial.setting == Setting(-4)} - {2, 3, 4}


def test_where_a_report_seed_misses_all_move_to_the_next_lower_rate() -> None:
    def truth(setting: Setting, seed: int) -> Result:
        if seed == 3 and setting.grid_point >= 0:
            return DIVERGED
        return Result(100 + 9 * setting.grid_point**2, 2.19)

    search = make()
    rounds = finish(search, truth)
    assert search.best == Setting(0)
    assert search.chosen == Setting(-1)
    assert search.dropped == [Setting(0)]
    for seed in (2, 3, 4):
        assert rates(rounds, seed) == [0, -1]


def noisy(chance: int, best: int) -> Truth:
    """A basin under noise that differs by run, some of the high rates diverging."""

    def truth(setting: Setting, seed: int) -> Result:
        draw = random.Random(f"{chance} {setting} {seed}")
        if draw.random() < 0.2 * (setting.grid_point - best):
            return DIVERGED
        steps = bowl(best)(setting, seed).steps
        assert steps is not None
        return Result(steps * math.exp(draw.gauss(0, 0.08)), 2.19)

    return truth


UNCUT = (5, 14, 28)
"""Draws in which no run happens to be longer than its limit."""


@pytest.mark.parametrize("chance", range(40))
def test_runs_cut_short_decide_as_whole_runs_would(chance: int) -> None:
    truth = noisy(chance, best=chance % 5 - 2)
    cut_short, whole = make(most_steps=600), make(most_steps=600)
    asked = finish(cut_short, truth)
    finish(whole, truth, cutting=False)
    assert cut_short.best == whole.best
    assert cut_short.chosen == whole.chosen
    assert cut_short.best_steps == whole.best_steps < math.inf
    results = [(truth(trial.setting, trial.seed), trial) for trials in asked for trial in trials]
    assert any(cut(result, trial) != result for result, trial in results) or chance in UNCUT


@pytest.mark.parametrize("chance", range(8))
def test_the_same_trials_are_asked_in_whatever_order_results_come(chance: int) -> None:
    truth = noisy(chance, best=2)
    searches = [make() for _ in range(4)]
    rounds = [
        finish(search, truth, chance=None if index == 0 else 100 * index)
        for index, search in enumerate(searches)
    ]
    assert rounds[1:] == rounds[:1] * 3
    assert len({search.chosen for search in searches}) == 1


def test_equal_steps_are_decided_by_the_loss_then_by_the_distance_to_the_start() -> None:
    losses = {-1: 2.18, 0: 2.17, 1: 2.15, 2: 2.16}
    search = make()
    finish(search, lambda setting, seed: Result(50, losses.get(setting.grid_point, 2.19)))
    assert search.best == Setting(1)
    search = make(2)
    finish(search, lambda setting, seed: Result(50, 2.19))
    assert search.best == Setting(2)


def test_one_seed_is_chosen_and_reported_by_itself() -> None:
    search = Search(Setting(0), 1000)
    rounds = finish(search, bowl(1))
    assert search.chosen == Setting(1)
    assert {trial.seed for trials in rounds for trial in trials} == {0}


def test_a_climb_ends_where_its_trials_are_spent() -> None:
    search = make(most_trials=4)
    rounds = finish(search, bowl(8, curvature=0.02))
    assert 4 <= len(rates(rounds)) <= 5  # both of a pair are asked
    assert search.chosen is not None
    assert search.open_sides[1]


def plane(best: Setting, shift: int = 0) -> Truth:
    """A basin in the rate and in one key's value, whose best rate moves with the value."""

    def truth(setting: Setting, seed: int) -> Result:
        off = setting.values[0] - best.values[0]
        rate = setting.grid_point - best.grid_point - shift * off
        if rate > 3:
            return DIVERGED
        return Result(100 * math.exp(0.08 * rate**2 + 0.05 * off**2), 2.19)

    return truth


@pytest.mark.parametrize("best", [(0, 0), (2, 2), (-1, 5), (3, 4)])
@pytest.mark.parametrize("shift", [0, 2])
def test_a_second_key_is_tuned_with_the_rate(best: tuple[int, int], shift: int) -> None:
    target = Setting(best[0], (best[1],))
    search = Search(
        Setting(0, (3,)), 10_000, (0, 1), (2, 3),
        ranges=(range(6),), shifts=(tuple(shift * value for value in range(6)),),
    )  # fmt: skip
    finish(search, plane(target, shift))
    assert search.chosen == target
    assert search.open_sides == (False, False)


def test_a_second_key_costs_a_few_trials_a_value() -> None:
    search = Search(
        Setting(0, (3,)), 10_000, (0, 1), (2, 3), ranges=(range(6),), shifts=((0,) * 6,)
    )
    rounds = finish(search, plane(Setting(0, (3,))))
    values = [t.setting.values for trials in rounds for t in trials if t.seed == 0]
    assert {value: values.count((value,)) for value in (2, 4)} == {2: 3, 4: 3}
    assert set(values) == {(2,), (3,), (4,)}


def test_a_search_asks_nothing_while_results_are_out() -> None:
    search = make()
    finish_first = search.ask()
    search.tell(finish_first[0], Result(50, 2.0))
    first, second = search.ask()
    assert (search.ask(), search.done) == ([], False)
    search.tell(second, Result(40, 2.0))
    assert (search.ask(), search.done) == ([], False)
    search.tell(first, Result(50, 2.0))
    assert search.ask()


def test_a_result_that_was_not_asked_for_is_refused() -> None:
    search = make()
    (trial,) = search.ask()
    search.tell(trial, Result(40, 2.0))
    with pytest.raises(KeyError):
        search.tell(trial, Result(40, 2.0))
