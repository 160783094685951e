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
from largebatch.study.protocol.search import LearningRateTrial, Result

Simulate = Callable[[str, int, float, int, int], Result]

BATCHES = [16, 32, 64, 128, 256]
START_LRS = {"adamw": 0.016, "sgd": 0.45, "lamb": 0.02, "hopeless": 0.1}
BUDGET = 100_000


def make_protocol(**study: Any) -> Protocol:
    config = {
        "optimizers": ["adamw", "sgd"],
        "batch_sizes": BATCHES,
        "start_batch": 64,
        "rules": ["sqrt", "linear"],
        "rule_batches": [16, 64, 256],
    }
    return Protocol(StudyConfig(**config | study), START_LRS, BUDGET)


def run(job: StudyJob, simulate: Simulate) -> Result:
    kappa = 1.0 if job.base_batch is None else job.batch_size / job.base_batch
    lr = job.lr * {"none": 1.0, "sqrt": math.sqrt(kappa), "linear": kappa}[job.rule]
    seed, give_up = job.trial.seed, job.trial.give_up_steps
    return simulate(job.optimizer, job.batch_size, lr, seed, give_up)


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
        found = START_LRS[optimizer] * math.sqrt(2) ** search.best
        assert found == pytest.approx(best_lr, rel=0.3)


def test_a_study_begins_at_the_start_batch_with_each_optimizers_own_learning_rate() -> None:
    jobs = make_protocol().ask()
    assert [(job.optimizer, job.batch_size, job.lr) for job in jobs] == [
        ("adamw", 64, 0.016),
        ("sgd", 64, 0.45),
    ]
    assert {job.trial for job in jobs} == {LearningRateTrial(0, 0, BUDGET // 64)}


def test_each_search_starts_from_the_best_of_its_neighbour_nearer_to_the_start(
    simulate: Simulate,
) -> None:
    protocol = make_protocol()
    finish(protocol, simulate)
    for optimizer in ("adamw", "sgd"):
        searches = {size: protocol.searches[optimizer, size] for size in BATCHES}
        assert searches[64].start == 0
        for size, neighbour in ((32, 64), (16, 32), (128, 64), (256, 128)):
            assert searches[size].start == searches[neighbour].best
        assert searches[16].best < searches[256].best


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
        expected = START_LRS[job.optimizer] * 2 ** (job.trial.grid_point / 2)
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
        steps = {size: protocol.searches[optimizer, size].best_score.steps for size in BATCHES}
        most = {size: protocol.searches[optimizer, size].most_steps for size in BATCHES}
        assert most[64] == BUDGET // 64
        assert (most[128], most[256]) == (2 * steps[64], 2 * steps[128])
        assert (most[32], most[16]) == (4 * steps[64], 4 * steps[32])


def test_a_budget_of_less_than_a_batch_still_makes_one_step() -> None:
    protocol = Protocol(StudyConfig(["adamw"], [64], 64), START_LRS, budget_samples=10)
    assert [job.trial.give_up_steps for job in protocol.ask()] == [1]


def test_where_a_neighbour_missed_the_next_starts_where_it_did(simulate: Simulate) -> None:
    protocol = make_protocol(optimizers=["hopeless", "adamw"])
    jobs = finish(protocol, simulate)
    for batch_size in BATCHES:
        search = protocol.searches["hopeless", batch_size]
        assert search.missed
        assert (search.start, search.most_steps) == (0, BUDGET // batch_size)
    assert not any(job.optimizer == "hopeless" and job.base_batch is not None for job in jobs)
    assert any(job.optimizer == "adamw" and job.base_batch is not None for job in jobs)


def test_rules_are_tried_once_from_the_smallest_batchs_best_learning_rate(
    simulate: Simulate,
) -> None:
    protocol = make_protocol(seeds=[0, 1])
    jobs = [job for job in finish(protocol, simulate) if job.base_batch is not None]
    assert sorted((job.optimizer, job.batch_size, job.rule, job.trial.seed) for job in jobs) == [
        (optimizer, batch_size, rule, seed)
        for optimizer in ("adamw", "sgd")
        for batch_size in (64, 256)  # at 16 itself every rule is the tuned learning rate
        for rule in ("linear", "sqrt")
        for seed in (0, 1)
    ]
    for job in jobs:
        tuned = protocol.searches[job.optimizer, job.batch_size].best_score.steps
        best = protocol.searches[job.optimizer, 16].best
        assert job.base_batch == 16
        assert job.lr == pytest.approx(START_LRS[job.optimizer] * 2 ** (best / 2), rel=1e-5)
        assert job.trial.give_up_steps == 2 * tuned


def test_the_result_of_a_rule_decides_nothing(simulate: Simulate) -> None:
    with_rules, without = make_protocol(), make_protocol(rules=[])
    tuned = [job for job in finish(with_rules, simulate) if job.base_batch is None]
    assert sorted(tuned) == sorted(finish(without, simulate))


@pytest.mark.parametrize("chance", range(5))
def test_the_same_jobs_are_asked_in_whatever_order_results_come(
    chance: int, simulate: Simulate
) -> None:
    in_order = finish(make_protocol(seeds=[0, 1, 2]), simulate)
    protocol, generator = make_protocol(seeds=[0, 1, 2]), random.Random(chance)
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
    protocol = make_protocol(seeds=[0, 1])
    while jobs := protocol.ask():
        costs = [job.most_samples for job in jobs]
        assert costs == sorted(costs, reverse=True)
        for job in jobs:
            protocol.tell(job, run(job, simulate))


def test_every_job_has_a_folder_of_its_own(simulate: Simulate) -> None:
    jobs = finish(make_protocol(seeds=[0, 1, 2]), simulate)
    assert len({job.folder for job in jobs}) == len(jobs)


def test_a_tuned_job_is_a_configuration_without_scaling() -> None:
    job = StudyJob("lamb", 128, LearningRateTrial(-3, 7, 90), 0.00707107)
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
    job = StudyJob("sgd", 512, LearningRateTrial(1, 3, 40), lr, rule, base_batch)
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        config = typed(compose("train", ["study=digits", *job.overrides]))
    assert config.optim["_target_"] == "torch.optim.SGD"
    assert config.optim["lr"] == lr
    assert config.batch["size"] == 512
    assert config.seed == 3
    assert config.target.give_up_samples == 40 * 512
    assert config.target.loss == 0.1
    assert config.scaling.rule == rule
    assert config.scaling.base_batch == base_batch or base_batch is None
