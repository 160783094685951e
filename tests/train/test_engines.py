"""One global batch, one trajectory: under every engine, world and accumulation."""

from functools import cache
from pathlib import Path

import pytest
from engine_ranks import ENGINES, OPTIMIZERS, Cell, cells, figures, work
from gloo_ranks import launch, successful

WORLDS = (1, 2, 4)
# Every engine, world, accumulation and optimizer, and each pair of engine and world but one.
COVERING = {
    1: [Cell("fsdp", 4, "shampoo"), Cell("zero1", 1, "lamb"), Cell("zero2", 4, "adamw")],
    2: [
        Cell("ddp", 4, "shampoo"), Cell("fsdp", 4, "lamb"), Cell("hsdp", 1, "shampoo"),
        Cell("zero1", 4, "adamw"), Cell("zero2", 1, "lamb"), Cell("zero3", 4, "lamb"),
    ],
    4: [Cell("fsdp", 1, "adamw"), Cell("hsdp", 4, "lamb"), Cell("zero3", 1, "adamw")],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@cache
def alone(folder: Path) -> dict[str, list[float]]:
    """The losses of one process that takes whole batches, by optimizer."""
    plain = [Cell("ddp", 1, optimizer) for optimizer in OPTIMIZERS]
    found = launch(work, plain, 1, folder)
    return {cell.optimizer: successful([found[0][str(cell)]])[0]["losses"] for cell in plain}


def check(world_size: int, these: list[Cell], folder: Path) -> None:
    found = launch(work, these, world_size, folder)
    strays = {}
    for cell in these:
        successful([of_rank[str(cell)] for of_rank in found])
        difference = figures(found, alone(folder)[cell.optimizer], cell)
        print(f"world {world_size}, {cell}: {difference:.1e}")
        if difference > 1e-5:
            strays[str(cell)] = difference
    assert strays == {}


@pytest.mark.parametrize("world_size", WORLDS)
def test_engines_follow_the_trajectory_of_one_process(world_size: int, folder: Path) -> None:
    check(world_size, COVERING[world_size], folder)


@pytest.mark.matrix
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("world_size", WORLDS)
def test_the_whole_matrix(world_size: int, folder: Path) -> None:
    check(world_size, cells(world_size), folder)


def test_the_covering_cells_cover() -> None:
    of_all = [cell for these in COVERING.values() for cell in these]
    assert {cell.engine for cell in of_all} == set(ENGINES)
    assert {cell.optimizer for cell in of_all} == set(OPTIMIZERS)
    assert {cell.accumulation for cell in of_all} == {1, 4}
    for world_size, these in COVERING.items():
        assert set(these) <= set(cells(world_size))


def test_a_trajectory_that_parts_is_found(folder: Path) -> None:
    """The bound is one that a real difference passes: half a percent more of the learning rate."""
    other = Cell("fsdp", 1, "adamw", words=("optim.lr=0.00402",))
    found = launch(work, [other], 1, folder)
    assert figures(found, alone(folder)["adamw"], other) > 1e-4
