"""A study as a protocol: which searches it opens, what it asks of them and of the rules."""

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hydra import compose, initialize_config_module

from largebatch.conf.config import typed
from largebatch.conf.sweep_config import StudyConfig
from largebatch.study.protocol.protocol import Protocol, StudyJob
from largebatch.study.protocol.search import Result, SearchTrial, Setting
from largebatch.study.protocol.tuned_keys import tuned_keys

Simulate = Callable[[str, int, float, int, int], Result]

BATCHES = [16, 32, 64, 128, 256]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"_target_": "torch.optim.AdamW", "lr": 0.016, "betas": [0.9, 0.99]},
    "sgd": {"_target_": "torch.optim.SGD", "lr": 0.45, "momentum": 0.9, "nesterov": True},
    "lamb": {"_target_": "largebatch.optim.LAMB", "lr": 0.02, "betas": [0.9, 0.99]},
    "hopeless": {"_target_": "torch.optim.Adagrad", "lr": 0.1},
}
BUDGET = 100_000


def make_protocol(**study: Any) -> Protocol:
    config = {
        "optimizers": ["adamw", "sgd"],
        "batch_sizes": BATCHES,
        "start_batch": 64,
        "rules": ["sqrt", "linear"],
        "rule_batches": [16, 64, 256],
    }
    return Protocol(StudyConfig(**config | study), OPTIMIZERS, BUDGET)


def run(job: StudyJob, simulate: Simulate) -> Result:
    kappa = 1.0 if job.base_batch is None else job.batch_size / job.base_batch
    lr = job.lr * {"none": 1.0, "sqrt": math.sqrt(kappa), "linear": kappa}[job.rule]
    seed, give_up = job.trial.seed, job.trial.give_up_steps
    momentum = {name: value for name, value, _ in job.tuned}.get("momentum")
    if momentum is not None and job.optimizer == "sgd":  # it sums gradients
        lr *= 0.1 / (1 - momentum)
    result = simulate(job.optimizer, job.batch_size, lr, seed, give_up)
    if momentum is None or result.steps is None:
        return result
    # The best momentum falls as the batch grows: 0.9 at 64, 0.5 at 256.
    best = 0.9 if job.batch_size <= 64 else 0.75 if job.batch_size < 256 else 0.5
    return result._replace(steps=result.steps * (1 + abs(momentum - best)))


def finish(protocol: Protocol, simulate: Simulate) -> list[StudyJob]:
    """Run the protocol to its end; returns all its jobs."""
    asked = []
    while jobs := protocol.ask():
        for job in jobs:
            protocol.tell(job, run(job, simulate))
        asked += jobs
        assert len(asked) < 10_000
    assert protocol.done
    return asked


def test_every_optimizer_is_searched_at_every_batch_size(simulate: Simulate) -> None:
    protocol = make_protocol()
    finish(protocol, simulate)
    assert set(protocol.searches) == {(name, size) for name in ("adamw", "sgd") for size in BATCHES}
    assert sorted(protocol.places) == sorted(protocol.searches)
    assert protocol.ask() == []
    for (optimizer, batch_size), search in protocol.searches.items():
        shift = 8.0 if optimizer == "sgd" else 1.0
        best_lr = 0.02 * shift * math.sqrt(batch_size / 64)
        assert search.chosen is not None
        found = OPTIMIZERS[optimizer]["lr"] * math.sqrt(2) ** search.chosen.grid_point
        assert found == pytest.approx(best_lr, rel=0.3)


def test_a_study_begins_at_the_start_batch_with_each_optimizers_own_learning_rate() -> None:
    jobs = make_protocol().ask()
    assert [(job.optimizer, job.batch_size, job.lr) for job in jobs] == [
        ("adamw", 64, 0.016),
        ("sgd", 64, 0.45),
    ]
    assert {job.trial for job in jobs} == {SearchTrial(Setting(0), 0, BUDGET // 64)}


def test_each_search_starts_a_step_from_the_best_of_its_neighbour_nearer_to_the_start(
    simulate: Simulate,
) -> None:
    protocol = make_protocol()
    finish(protocol, simulate)
    for optimizer in ("adamw", "sgd"):
        searches = {size: protocol.searches[optimizer, size] for size in BATCHES}
        assert searches[64].start == Setting(0)
        for size, neighbour, moved in ((32, 64, -1), (16, 32, -1), (128, 64, 1), (256, 128, 1)):
            best = searches[neighbour].best
            assert best is not None
            assert searches[size].start == Setting(best.grid_point + moved)
        assert searches[16].chosen < searches[256].chosen


def test_a_search_waits_for_its_neighbour(simulate: Simulate) -> None:
    protocol = make_protocol(optimizers=["adamw"])
    done_before: set[int] = set()
    while jobs := protocol.ask():
        for job in jobs:
            neighbour = {16: 32, 32: 64, 128: 64, 256: 128}.get(job.batch_size)
            assert neighbour is None or neighbour in done_before
            protocol.tell(job, run(job, simulate))
        done_before = {size for (_, size), search in protocol.searches.items() if search.done}


@pytest.mark.parametrize("start_batch", [16, 256])
def test_a_study_may_start_at_either_end(start_batch: int, simulate: Simulate) -> None:
    protocol = make_protocol(start_batch=start_batch)
    finish(protocol, simulate)
    assert len(protocol.searches) == 2 * len(BATCHES)


def test_all_batch_sizes_of_an_optimizer_share_one_grid(simulate: Simulate) -> None:
    for job in finish(make_protocol(rules=[]), simulate):
        expected = OPTIMIZERS[job.optimizer]["lr"] * 2 ** (job.trial.setting.grid_point / 2)
        assert job.lr == pytest.approx(expected, rel=1e-5)


def test_no_run_may_take_more_than_the_budget_or_twice_its_neighbours_steps(
    simulate: Simulate,
) -> None:
    protocol = make_protocol()
    jobs = finish(protocol, simulate)
    for job in jobs:
        assert job.most_samples == job.trial.give_up_steps * job.batch_size
        if job.base_batch is None:
            assert job.most_samples <= BUDGET
    for optimizer in ("adamw", "sgd"):
        steps = {size: protocol.searches[optimizer, size].best_steps for size in BATCHES}
        most = {size: protocol.searches[optimizer, size].most_steps for size in BATCHES}
        assert most[64] == BUDGET // 64
        assert (most[128], most[256]) == (int(2 * steps[64]), int(2 * steps[128]))
        assert (most[32], most[16]) == (int(4 * steps[64]), int(4 * steps[32]))
        # As long as nothing has reached the target, 1.3 times no gain or perfect scaling.
        first = {size: protocol.searches[optimizer, size].climb_steps for size in BATCHES}
        assert first[64] == BUDGET // 64
        assert first[128] == math.ceil(1.3 * steps[64])
        assert first[32] == math.ceil(1.3 * 2 * steps[64])


def test_a_budget_of_less_than_a_batch_still_makes_one_step() -> None:
    protocol = Protocol(StudyConfig(["adamw"], [64], 64), OPTIMIZERS, budget_samples=10)
    assert [job.trial.give_up_steps for job in protocol.ask()] == [1]


def test_where_a_neighbour_missed_the_next_starts_where_it_did(simulate: Simulate) -> None:
    protocol = make_protocol(optimizers=["hopeless", "adamw"])
    jobs = finish(protocol, simulate)
    for batch_size in BATCHES:
        search = protocol.searches["hopeless", batch_size]
        assert search.missed
        assert (search.start, search.most_steps) == (Setting(0), BUDGET // batch_size)
    assert not any(job.optimizer == "hopeless" and job.base_batch is not None for job in jobs)
    assert any(job.optimizer == "adamw" and job.base_batch is not None for job in jobs)


def test_rules_are_tried_once_from_the_smallest_batchs_best_learning_rate(
    simulate: Simulate,
) -> None:
    protocol = make_protocol(select_seeds=[5, 6], report_seeds=[0, 1])
    jobs = [job for job in finish(protocol, simulate) if job.base_batch is not None]
    same = {
        (rule.optimizer, rule.batch_size, rule.rule) for rule in protocol.decisions().same_rules
    }
    assert same
    tried = sorted((job.optimizer, job.batch_size, job.rule, job.trial.seed) for job in jobs)
    missed = [job for job in jobs if run(job, simulate).steps is None]
    assert missed
    # Where the first seed misses, the rule has: the second is not run.
    missed_at = {(job.optimizer, job.batch_size, job.rule) for job in missed if not job.trial.seed}
    assert tried == [
        (optimizer, batch_size, rule, seed)
        for optimizer in ("adamw", "sgd")
        for batch_size in (64, 256)  # at 16 itself every rule is the tuned learning rate
        for rule in ("linear", "sqrt")
        for seed in (0, 1)
        if (optimizer, batch_size, rule) not in same
        and not (seed and (optimizer, batch_size, rule) in missed_at)
    ]
    for job in jobs:
        tuned = protocol.searches[job.optimizer, job.batch_size].best_steps
        base = protocol.searches[job.optimizer, 16].chosen
        assert base is not None
        assert job.base_batch == 16
        assert job.lr == protocol.lr(job.optimizer, base.grid_point)
        assert job.trial.give_up_steps == int(2 * tuned)


def test_a_rule_whose_rate_is_the_tuned_one_is_not_run_again(simulate: Simulate) -> None:
    protocol = make_protocol()
    jobs = finish(protocol, simulate)
    for same in protocol.decisions().same_rules:
        ends = [protocol.searches[same.optimizer, size].chosen for size in (16, same.batch_size)]
        assert ends[0] is not None
        assert ends[1] is not None
        doublings = math.log2(same.batch_size / 16)
        steps = {"sqrt": doublings, "linear": 2 * doublings}[same.rule]
        assert ends[1].grid_point - ends[0].grid_point == steps
        assert not any(
            (job.optimizer, job.rule, job.batch_size)
            == (same.optimizer, same.rule, same.batch_size)
            for job in jobs
        )


def test_the_result_of_a_rule_decides_nothing(simulate: Simulate) -> None:
    with_rules, without = make_protocol(), make_protocol(rules=[])
    tuned = [job for job in finish(with_rules, simulate) if job.base_batch is None]
    assert sorted(tuned) == sorted(finish(without, simulate))


@pytest.mark.parametrize("chance", range(5))
def test_the_same_jobs_are_asked_in_whatever_order_results_come(
    chance: int, simulate: Simulate
) -> None:
    in_order = finish(make_protocol(select_seeds=[0, 1], report_seeds=[2, 3, 4]), simulate)
    protocol, generator = (
        make_protocol(select_seeds=[0, 1], report_seeds=[2, 3, 4]),
        random.Random(chance),
    )
    asked = protocol.ask()
    waiting = list(asked)
    while waiting:
        generator.shuffle(waiting)
        job = waiting.pop()
        protocol.tell(job, run(job, simulate))
        new = protocol.ask()
        asked, waiting = asked + new, waiting + new
    assert protocol.done
    assert sorted(asked, key=str) == sorted(in_order, key=str)


def test_the_costliest_jobs_come_first(simulate: Simulate) -> None:
    protocol = make_protocol(select_seeds=[0, 1])
    while jobs := protocol.ask():
        costs = [job.most_samples for job in jobs]
        assert costs == sorted(costs, reverse=True)
        for job in jobs:
            protocol.tell(job, run(job, simulate))


def test_every_job_has_a_folder_of_its_own(simulate: Simulate) -> None:
    jobs = finish(make_protocol(select_seeds=[0, 1], report_seeds=[2, 3, 4]), simulate)
    assert len({job.folder for job in jobs}) == len(jobs)


def test_a_tuned_job_is_a_configuration_without_scaling() -> None:
    job = StudyJob("lamb", 128, SearchTrial(Setting(-3), 7, 90), 0.00707107)
    assert job.folder == "lamb/batch-128/lr-0.007071/seed-7"
    assert job.overrides == [
        "optim=lamb",
        "batch.size=128",
        "optim.lr=0.00707107",
        "scaling=none",
        "seed=7",
        "target.give_up_samples=11520",
        "hydra.sweep.subdir=lamb/batch-128/lr-0.007071/seed-7",
    ]


@pytest.mark.parametrize("lr", [1e-05, 2.82843e-06, 0.1, 12.3457])
@pytest.mark.parametrize("base_batch", [None, 16])
def test_a_jobs_overrides_compose_to_just_that_run(lr: float, base_batch: int | None) -> None:
    rule = "none" if base_batch is None else "sqrt"
    trial = SearchTrial(Setting(1, (2,)), 3, 40)
    tuned = (("momentum", 0.7, "optim.momentum=0.7"),)
    job = StudyJob("sgd", 512, trial, lr, tuned, rule, base_batch)
    assert job.folder.endswith("-momentum-0.7/seed-3")
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        config = typed(compose("train", ["study=digits", *job.overrides]))
    assert config.optim["_target_"] == "torch.optim.SGD"
    assert config.optim["lr"] == lr
    assert config.optim["momentum"] == 0.7
    assert config.batch["size"] == 512
    assert config.seed == 3
    assert config.target.give_up_samples == 40 * 512
    assert config.target.loss == 0.1
    assert config.scaling.rule == rule
    assert config.scaling.base_batch == base_batch or base_batch is None


def test_momentum_is_tuned_at_both_ends_and_between_them_from_the_one_to_the_other(
    simulate: Simulate,
) -> None:
    protocol = make_protocol(search=["lr", "momentum"], select_seeds=[0, 1], report_seeds=[2, 3])
    jobs = finish(protocol, simulate)
    for optimizer in ("adamw", "sgd"):
        chosen = {}
        for batch_size in BATCHES:
            setting = protocol.searches[optimizer, batch_size].chosen
            assert setting is not None
            chosen[batch_size] = protocol.values(optimizer, setting)["momentum"]
        assert chosen == {16: 0.9, 32: 0.9, 64: 0.9, 128: 0.75, 256: 0.5}
        for batch_size in (16, 32, 128):
            tried = {
                {name: value for name, value, _ in job.tuned}["momentum"]
                for job in jobs
                if (job.optimizer, job.batch_size) == (optimizer, batch_size)
            }
            between = {0.9, 0.75, 0.5} if batch_size == 128 else {0.9}
            assert tried == between


def test_an_optimizer_without_momentum_has_its_rate_alone_searched(simulate: Simulate) -> None:
    protocol = make_protocol(optimizers=["hopeless"], search=["lr", "momentum"])
    assert all(job.tuned == () for job in finish(protocol, simulate))


def test_decisions_say_what_was_chosen_and_what_it_cost(simulate: Simulate) -> None:
    protocol = make_protocol(optimizers=["adamw", "hopeless"], report_seeds=[2, 3])
    jobs = finish(protocol, simulate)
    decisions = protocol.decisions()
    assert (decisions.select_seeds, decisions.report_seeds) == ((0,), (2, 3))
    assert decisions.points.keys() == set(protocol.places)
    for (optimizer, batch_size), point in decisions.points.items():
        assert (point.chosen is None) == (optimizer == "hopeless")
        own = [j for j in jobs if (j.optimizer, j.batch_size) == (optimizer, batch_size)]
        assert point.trials == sum(job.base_batch is None for job in own)


def test_an_optimizers_own_momentum_takes_the_place_of_the_nearest_on_the_grid() -> None:
    grids = {own: tuned_keys({"betas": [own, 0.99]}, ["momentum"])[0] for own in (0.5, 0.7, 0.95)}
    assert [(key.grid, key.start) for key in grids.values()] == [
        ((0.5, 0.75, 0.9, 0.95, 0.98), 0),
        ((0.5, 0.7, 0.9, 0.95, 0.98), 1),
        ((0.5, 0.75, 0.9, 0.95, 0.98), 3),
    ]


@pytest.mark.parametrize("start_batch", [16, 256])
def test_momentum_is_tuned_where_a_study_starts_at_either_end(
    start_batch: int, simulate: Simulate
) -> None:
    protocol = make_protocol(
        optimizers=["adamw"], search=["lr", "momentum"], start_batch=start_batch, report_seeds=[2]
    )
    finish(protocol, simulate)
    smallest = protocol.searches["adamw", 16].chosen
    assert smallest is not None
    expected = {16: 0.9, 256: 0.5}[start_batch]
    assert protocol.values("adamw", smallest)["momentum"] == expected
