"""One global batch, one trajectory: under every engine, world and accumulation."""

import json
from functools import cache
from pathlib import Path

import pytest
from collective_ranks import work_and_reductions
from engine_ranks import ENGINES, OPTIMIZERS, Cell, cells, figures, work
from fixture_types import Command
from gloo_ranks import Outcome, launch, successful

WORLDS = (1, 2, 4)
# Every engine, accumulation and optimizer on two ranks.
COVERING = [
    Cell("ddp", 4, "shampoo"), Cell("fsdp", 4, "lamb"), Cell("hsdp", 1, "shampoo"),
    Cell("zero1", 4, "adamw"), Cell("zero2", 1, "lamb"), Cell("zero3", 4, "lamb"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


PLAIN = [Cell("ddp", 1, optimizer) for optimizer in OPTIMIZERS]
FASTER = Cell("fsdp", 1, "adamw", words=("optim.lr=0.00402",))


@cache
def of_one(folder: Path) -> list[dict[str, Outcome]]:
    """What one process finds that takes whole batches."""
    return launch(work, [*PLAIN, FASTER], 1, folder)


def alone(folder: Path) -> dict[str, list[float]]:
    """The losses of that process, by optimizer."""
    found = of_one(folder)[0]
    return {cell.optimizer: successful([found[str(cell)]])[0]["losses"] for cell in PLAIN}


def check(world_size: int, these: list[Cell], folder: Path) -> None:
    check_figures(world_size, these, launch(work, these, world_size, folder), folder)


def check_figures(
    world_size: int, these: list[Cell], found: list[dict[str, Outcome]], folder: Path
) -> None:
    strays = {}
    for cell in these:
        successful([of_rank[str(cell)] for of_rank in found])
        difference = figures(found, alone(folder)[cell.optimizer], cell)
        print(f"world {world_size}, {cell}: {difference:.1e}")
        if difference > 1e-5:
            strays[str(cell)] = difference
    assert strays == {}


NOISE = ("noise.small=rank", "noise.half_life_samples=512")
WHOLE_EACH = Cell("hsdp", 4, "adamw", NOISE)


@cache
def covering(folder: Path) -> list[dict[str, Outcome]]:
    return launch(work_and_reductions, [*COVERING, WHOLE_EACH], 2, folder)


def test_engines_follow_the_trajectory_of_one_process(folder: Path) -> None:
    check_figures(2, COVERING, covering(folder), folder)


def test_no_collective_reduces_by_the_mean(folder: Path) -> None:
    """Which oneCCL 2021.17 has wrong; what DDP, FSDP2 and DeepSpeed themselves call is seen too."""
    for cell in COVERING:
        seen = covering(folder)[1][str(cell)]["reductions"]
        assert seen, cell
        assert all(what.endswith(" SUM") for what in seen), (cell, seen)


# Ways to spend less memory or time, which change no number.
WAYS = {
    "activation_checkpointing": Cell("fsdp", 4, "adamw", ("engine.activation_checkpointing=true",)),
    "accumulate": Cell("fsdp", 4, "lamb", ("engine.accumulate=sharded",)),
    "reshard": Cell("fsdp", 4, "lamb", ("engine.reshard_after_forward=false",)),
    "of replicas": Cell("ddp", 4, "lamb", ("engine.activation_checkpointing=true",)),
}
COMPILED = [Cell("ddp", 1, "adamw", ("engine.compile=true",)),
            Cell("fsdp", 1, "adamw", ("engine.compile=true",))]  # fmt: skip


@pytest.mark.matrix
def test_ways_to_spend_less_leave_the_trajectory(folder: Path) -> None:
    check(2, [*WAYS.values()], folder)


@pytest.mark.matrix
def test_compiled_blocks_leave_the_trajectory(folder: Path) -> None:
    check(1, COMPILED, folder)


@pytest.mark.matrix
def test_the_noise_scale_is_the_same_under_every_sharding(folder: Path) -> None:
    """Of small gradients that are the same: a rank's, replicated, sharded, and both."""
    noisy = [Cell(engine, 2, "adamw", NOISE) for engine in ("ddp", "fsdp", "hsdp")]
    found = launch(work, noisy, 4, folder)
    successful([of_rank[str(cell)] for cell in noisy for of_rank in found])
    of_ddp, *others = [json.loads(found[0][str(cell)]["lines"]) for cell in noisy]
    for lines in others:
        for one, other in zip(of_ddp, lines, strict=True):
            for field in ("grad_sq_norm", "grad_trace", "grad_norm"):
                assert other[field] == pytest.approx(one[field], rel=2e-4), field
    assert of_ddp[-1]["grad_trace"] > 0


def test_the_noise_scale_is_refused_where_nothing_is_reduced(folder: Path) -> None:
    told = covering(folder)[0][str(WHOLE_EACH)]["error"]
    assert "use fewer replicas, or engine=ddp" in told


@pytest.mark.matrix
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_whole_matrix(
    world_size: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with capsys.disabled():
        print()
        check(world_size, cells(world_size), folder)


def test_the_covering_cells_cover() -> None:
    assert {cell.engine for cell in COVERING} == set(ENGINES)
    assert {cell.optimizer for cell in COVERING} == set(OPTIMIZERS)
    assert {cell.accumulation for cell in COVERING} == {1, 4}
    assert set(COVERING) <= set(cells(2))


@pytest.mark.parametrize(
    ("word", "told"), [("stage=3", "set engine.stage alone"), ("colour=3", "colour Extra inputs")]
)
def test_what_deepspeed_does_not_take_is_refused_in_one_sentence(
    word: str, told: str, command: Command
) -> None:
    done = command("train", "task=digits", "engine=deepspeed", f"+engine.zero.{word}")
    assert done.returncode == 2
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("largebatch: ")]
    assert told in sentence
    assert done.stderr.splitlines()[-1] == sentence


def test_a_trajectory_that_parts_is_found(folder: Path) -> None:
    """The bound is one that a real difference passes: half a percent more of the learning rate."""
    assert figures(of_one(folder), alone(folder)["adamw"], FASTER) > 1e-4
