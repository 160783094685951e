"""Outer steps: DiLoCo's formula on real ranks, who talks to whom, what is saved and refused."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from fixture_types import Command, ReadRun, Train
from gloo_ranks import Outcome, launch, successful
from hydra import compose, initialize_config_module
from outer_ranks import (
    BATCH_SIZE,
    FEATURES,
    INTERVAL,
    OUTER_LR,
    OUTER_MOMENTUM,
    STEPS,
    Cell,
    Regression,
    first_weights,
    table,
    work,
)
from safetensors.torch import load_file

from largebatch.common.errors import ConfigError
from largebatch.conf.config import TrainConfig, typed
from largebatch.distributed.ranks import Ranks
from largebatch.train.checkpoints.export import export
from largebatch.train.checkpoints.torch_format import SharingPlanner
from largebatch.train.data.sampler import Sampler
from largebatch.train.engines.deepspeed import DeepSpeed
from largebatch.train.weights.build import build_outer, parted_ranks

Array = npt.NDArray[np.float64]

ADAMW = ("optim=adamw", "optim.lr=0.05")
MUON = ("optim=muon", "optim.lr=0.01")
FSDP = ("engine=fsdp",)
CLIPPED = ("clip_norm=0.4",)
NOISY = ("noise.small=micro_batch", "engine.micro_batch_size=2")
PLAIN = ("outer.nesterov=false",)

FORMULA = {
    1: [Cell(1), Cell(1, ADAMW), Cell(1, words=PLAIN)],
    2: [Cell(1), Cell(1, ADAMW, FSDP), Cell(2), Cell(2, ADAMW), Cell(2, words=(*CLIPPED, *NOISY)),
        Cell(2, ADAMW, FSDP)],
    4: [Cell(2), Cell(2, ADAMW), Cell(2, ADAMW, FSDP), Cell(2, words=CLIPPED),
        Cell(2, ADAMW, (*FSDP, *CLIPPED, "engine.replicas=2")), Cell(4)],
}  # fmt: skip
TALKING = {2: [Cell(0, MUON, deep=True), Cell(1, MUON, deep=True)], 4: [Cell(2, MUON, deep=True)]}
ROWS = [(world, cell) for world, cells in FORMULA.items() for cell in cells]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Outcome]]]:
    """What each rank of a world has found in all its jobs."""

    @cache
    def of_world(world: int) -> list[dict[str, Outcome]]:
        jobs = [*FORMULA[world], *TALKING.get(world, []), *["buffers", "loss scale"] * (world == 2)]
        return launch(work, jobs, world, tmp_path_factory.mktemp("outer"))

    return of_world


# The formula -------------------------------------------------------------------------------------


def sgd(state: dict[str, Array], g: Array) -> Array:
    """Nesterov's momentum as torch has it: what a step subtracts."""
    state["b"] = 0.9 * state["b"] + g if "b" in state else g
    return 0.1 * (g + 0.9 * state["b"])


def adamw(state: dict[str, Array], g: Array) -> Array:
    t = state["t"] = state.get("t", np.zeros(())) + 1
    state["m"] = 0.9 * state.get("m", 0 * g) + 0.1 * g
    state["v"] = 0.99 * state.get("v", 0 * g) + 0.01 * g**2
    v = state["v"] / (1 - 0.99**t)
    update: Array = 0.05 * state["m"] / (1 - 0.9**t) / (np.sqrt(v) + 1e-8)
    return update


def reference(cell: Cell) -> tuple[Array, list[dict[str, Any]]]:
    """DiLoCo's Algorithm 1 with K replicas in one process; the weights, and each step's numbers."""
    inner = adamw if cell.inner == ADAMW else sgd
    rows, values = (each.numpy() for each in table(Regression.num_train + Regression.num_eval))
    rows = np.hstack([rows, np.ones((len(rows), 1))])
    theta, b = first_weights().numpy(), np.zeros(FEATURES + 1)
    replicas = [theta for _ in range(cell.groups)]
    states: list[dict[str, Array]] = [{} for _ in replicas]
    order, numbers = Sampler(Regression.num_train, 0, False), []
    for step in range(1, STEPS + 1):
        batch = order.take((step - 1) * BATCH_SIZE, BATCH_SIZE)
        losses, squares = [], []
        for k, share in enumerate(np.split(batch, cell.groups)):
            x, error = rows[share], rows[share] @ replicas[k] - values[share]
            g = x.T @ error / len(share)
            losses.append(np.mean(error**2) / 2)
            squares.append(g @ g)
            if CLIPPED[0] in cell.words:
                g = g * min(1.0, 0.4 / np.sqrt(g @ g))
            replicas[k] = replicas[k] - inner(states[k], g)
        number = {"loss": np.mean(losses), "grad_norm": np.sqrt(np.mean(squares))}
        if step % INTERVAL == 0 or step == STEPS:
            delta = theta - np.mean(replicas, axis=0)
            b = OUTER_MOMENTUM * b + delta
            theta = theta - OUTER_LR * (b if PLAIN[0] in cell.words else delta + OUTER_MOMENTUM * b)
            replicas = [theta for _ in replicas]
            errors = rows[Regression.num_train :] @ theta - values[Regression.num_train :]
            number["eval_loss"] = np.mean(errors**2) / 2
        numbers.append(number)
    return theta, numbers


@pytest.mark.parametrize(("world", "cell"), ROWS, ids=lambda value: str(value))
def test_every_rank_ends_with_the_weights_of_the_paper(world: int, cell: Cell, found: Any) -> None:
    theta, _ = reference(cell)
    for outcome in successful([of_rank[str(cell)] for of_rank in found(world)]):
        np.testing.assert_allclose(outcome["weights"].numpy(), theta, rtol=1e-9)


@pytest.mark.parametrize(("world", "cell"), ROWS, ids=lambda value: str(value))
def test_records_are_means_over_groups_and_evaluations_of_the_outer_weights(
    world: int, cell: Cell, found: Any
) -> None:
    _, expected = reference(cell)
    lines = json.loads(found(world)[0][str(cell)]["lines"])
    for line, number in zip(lines, expected, strict=True):
        assert ("eval_loss" in line) == ("eval_loss" in number), line["step"]
        assert {key: line[key] for key in number} == pytest.approx(number, rel=1e-5)


def test_the_noise_scale_is_that_of_gradients_within_groups(found: Any) -> None:
    cell = Cell(2, words=(*CLIPPED, *NOISY))
    line = json.loads(found(2)[0][str(cell)]["lines"])[0]
    rows, values = (each.numpy() for each in table(Regression.num_train + Regression.num_eval))
    rows, w = np.hstack([rows, np.ones((len(rows), 1))]), first_weights().numpy()
    batch = Sampler(Regression.num_train, 0, False).take(0, BATCH_SIZE)

    def square(size: int) -> Any:
        """The mean squared norm of the gradients of so many samples each."""
        shares = np.split(batch, BATCH_SIZE // size)
        grads = [rows[share].T @ (rows[share] @ w - values[share]) / size for share in shares]
        return np.mean([g @ g for g in grads])

    small, big = square(2), square(8)
    assert line["grad_sq_norm"] == pytest.approx((8 * big - 2 * small) / 6, rel=1e-4)
    assert line["grad_trace"] == pytest.approx((small - big) / (1 / 2 - 1 / 8), rel=1e-4)


# Who talks to whom -------------------------------------------------------------------------------


def by_step(outcome: Outcome) -> list[list[Any]]:
    """The collectives of each step, [name, ranks, elements]."""
    steps: list[list[Any]] = []
    for word in json.loads(outcome["collectives"]):
        if word == "step":
            steps.append([])
        elif steps:
            steps[-1].append(word)
    assert len(steps) == STEPS
    return steps


def test_between_outer_steps_groups_exchange_nothing_but_the_record(found: Any) -> None:
    (cell,) = TALKING[4]
    num_weights = FEATURES * 5 + 5 + 5 + 1
    for outcome in successful([of_rank[str(cell)] for of_rank in found(4)]):
        for step, seen in enumerate(by_step(outcome), start=1):
            across = [each for each in seen if each[1] == 4]
            within = [each for each in seen if each[1] == 2]
            assert len(across) + len(within) == len(seen)
            assert sum(elements for *_, elements in within) >= num_weights  # gradients, and Muon's
            if step % INTERVAL == 0 or step == STEPS:
                assert [each for each in across if each[2] == num_weights] == [
                    ["allreduce_.default", 4, num_weights]
                ]
            else:
                # The loss and its like, as without outer steps.
                assert across == [["allreduce_.default", 4, 6]]


def test_one_group_asks_no_other_rank(found: Any) -> None:
    """Where both runs are evaluated they talk alike; between outer steps one is not evaluated."""
    without, one = (by_step(successful([found(2)[0][str(cell)]])[0]) for cell in TALKING[2])
    for step in range(1, STEPS + 1):
        if step % INTERVAL == 0 or step == STEPS:
            assert one[step - 1] == without[step - 1]
        else:
            assert len(one[step - 1]) < len(without[step - 1])


def test_what_else_has_parted_meets(found: Any) -> None:
    for of_rank in successful([each["buffers"] for each in found(2)]):
        assert of_rank["found"] == [1.5, 1.5, 1.5, 5.0]
    for of_rank in successful([each["loss scale"] for each in found(2)]):
        assert of_rank["found"] == {"loss_scale": 2.0**15, "good_steps": 1.0}


# Saved, resumed, interrupted ---------------------------------------------------------------------

SHORT = ("target.loss=null", "batch.size=64", "evaluation.growth=1.0", "outer.interval=3",
         "checkpoint.keep=9", "hydra.run.dir=run")  # fmt: skip
OWN_TASK = (*SHORT, "outer=diloco", "task=custom", "model=digits_mlp")
RUN = (*SHORT, "outer=diloco", "task=digits")
GROUPS = (*RUN, "outer.groups=2", "optim=muon", "optim.lr=0.02", "optim.ns_precision=fp32",
          "checkpoint.every_samples=100", "resume=auto")  # fmt: skip


def exported(run: Path) -> dict[str, torch.Tensor]:
    """The weights in the last checkpoint of a run."""
    last = max((run / "checkpoints").glob("samples-*"), key=lambda path: path.name)
    export(last, run / "weights.safetensors")
    return load_file(run / "weights.safetensors")


def test_groups_are_resumed_to_the_bit_and_in_other_worlds_and_engines(
    train: Train, command: Command, read_run: ReadRun, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def run(folder: str, num_ranks: int, num_steps: int, engine: str = "ddp") -> None:
        words = (
            f"engine={engine}",
            f"engine.nproc={num_ranks}",
            f"budget.samples={64 * num_steps}",
        )
        done = command("train", *GROUPS, f"hydra.run.dir={folder}", *words)
        assert done.returncode == 0, done.stderr

    run("whole", 2, 12)
    names = sorted(path.name for path in (tmp_path / "whole" / "checkpoints").glob("samples-*"))
    assert [int(name.removeprefix("samples-")) for name in names] == [192, 384, 576, 768]
    run("again", 2, 6)
    shutil.copytree(tmp_path / "again", tmp_path / "moving", symlinks=True)
    one = ("outer.groups=1", "budget.samples=768")
    assert train(*GROUPS, "hydra.run.dir=again", *one) == 2
    assert "outer.groups=2 (now 1)" in capsys.readouterr().err
    assert train(*GROUPS, "hydra.run.dir=branch", "branch_from=again", *one) == 2
    assert "state of 2 group(s) of ranks, and there are 1 now" in capsys.readouterr().err
    run("again", 2, 12)
    whole, again = exported(tmp_path / "whole"), exported(tmp_path / "again")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    run("moving", 4, 9, "fsdp")
    run("moving", 2, 12)
    lines, moved = (read_run(tmp_path / name)[0] for name in ("whole", "moving"))
    for field in ("loss", "eval_loss"):
        kept, other = ([line[field] for line in each if field in line] for each in (lines, moved))
        assert other == pytest.approx(kept, rel=1e-5)


def test_an_interrupted_run_goes_on_to_its_outer_step_and_resumes_to_the_bit(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    words = (*OWN_TASK, "task._target_=outer_tasks.Signalled", "+task.at=4",
             f"+task.mark={tmp_path}/mark", "budget.samples=576", "resume=auto",
             "checkpoint.every_samples=5760", "optim=lamb")  # fmt: skip
    assert train(*words) == 128 + 15
    lines, summary = read_run(tmp_path / "run")
    assert (summary["status"], summary["steps"]) == ("interrupted", 6)
    assert [line["step"] for line in lines if "eval_loss" in line] == [3, 6]
    assert train(*words) == 0
    assert train(*words, "hydra.run.dir=whole") == 0
    whole, again = exported(tmp_path / "whole"), exported(tmp_path / "run")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_run_that_goes_back_forgets_the_outer_step_too(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    """The step that is not finite, the 16th, is followed by an outer step of what it left."""
    assert train(
        *OWN_TASK, "task._target_=guarded_tasks.Spoiled", "+task.position=1001",
        "outer.interval=4", "checkpoint.every_samples=256", "guard.non_finite=rollback",
        "budget.samples=1280", "optim=lamb",
    ) == 0  # fmt: skip
    lines, summary = read_run(tmp_path / "run")
    assert (summary["status"], summary["steps"]) == ("exhausted", 20)
    assert np.isfinite([line["loss"] for line in lines]).all()
    assert summary["eval_loss"] < lines[11]["eval_loss"]


def test_a_branch_of_a_plain_run_begins_its_outer_momentum(train: Train, tmp_path: Path) -> None:
    short = ("budget.samples=192", "checkpoint.every_samples=192")
    assert train(*SHORT, "task=digits", *short) == 0
    assert train(*RUN, "branch_from=run", "hydra.run.dir=own", "budget.samples=384") == 0


def test_the_first_of_a_group_writes_what_others_may_not_hold() -> None:
    counts = []
    for shares in (False, True):
        planner = SharingPlanner(Ranks(rank=35, size=70), shares)  # not one of 32 writers
        planner.set_up_planner({"optimizer_1": {"moment": torch.zeros(2)}})
        counts.append(len(planner.create_local_plan().items))
    assert counts == [0, 1]


# Refused -----------------------------------------------------------------------------------------

REFUSED = {
    "outer.groups must divide the 1 rank(s), got 2: set it to 1, or start a multiple of 2 ranks": (
        "outer.groups=2",
    ),
    "outer.groups=2 splits the ranks for outer steps, and outer=none makes none": (
        "outer.kind=null", "outer.groups=2",
    ),
    "average=ema and outer=diloco each say which weights are evaluated": ("average=ema",),
    "mode=lr_find sweeps the rate of each inner step": ("mode=lr_find",),
    "optim.master_weights=true steps a copy of the weights": (
        "optim=lamb", "+optim.master_weights=true",
    ),
    "outer.momentum must be in [0, 1), got 1": ("outer.momentum=1.0",),
    "outer.interval": ("outer.interval=0",),
    "outer.kind must be null or one of diloco": ("outer.kind=local",),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_is_refused(
    sentence: str, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*RUN, *REFUSED[sentence]) == 2
    assert sentence in capsys.readouterr().err


def test_a_world_that_cannot_be_cut_is_refused_whoever_started_it(command: Command) -> None:
    done = command("train", *RUN, "outer.groups=3", "engine.nproc=4")
    assert done.returncode == 2
    assert "outer.groups must divide the 4 rank(s), got 3: set it to one of 1, 2, 4" in done.stderr


def deepspeed(*words: str) -> TrainConfig:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        return typed(compose("train", ["outer=diloco", "engine=deepspeed", *words]))


def test_an_engine_that_keeps_its_weights_or_knows_of_no_groups_is_refused() -> None:
    unbegun = DeepSpeed.__new__(DeepSpeed)
    with pytest.raises(ConfigError, match="outer is not for engine=deepspeed"):
        build_outer(deepspeed(), unbegun)
    with pytest.raises(ConfigError, match=r"outer.groups=2 is for engine=ddp and fsdp"):
        parted_ranks(deepspeed("outer.groups=2"), Ranks(size=2))


def test_a_run_whose_last_round_was_cut_short_is_not_lengthened(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (*RUN, "resume=auto", "checkpoint.every_samples=192")
    assert train(*words, "budget.samples=256") == 0
    assert train(*words, "budget.samples=768") == 2
    told = capsys.readouterr().err
    assert "an outer step after 1 of outer.interval=3 inner steps, where the budget ended" in told
