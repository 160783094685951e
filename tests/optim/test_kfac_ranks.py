"""K-FAC is one algorithm however a batch is repeated, split into passes, and spread over ranks."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import Outcome, launch, one_thread, successful
from kfac_ranks import (
    BATCH_SIZE,
    NUM_STEPS,
    ROWS,
    Cell,
    Failing,
    Leg,
    Refused,
    Repetition,
    Task,
    Tied,
    do,
    fisher_pass,
    preconditioned,
    say,
    skipped,
    train,
    train_alone,
    travel,
)
from parity_figures import relative
from torch import Tensor

FP32, FP64 = torch.float32, torch.float64
SPREADS = (("DDP", 2), ("FSDP2", 2), ("DDP", 4), ("FSDP2", 4), ("HSDP", 4))

# ‖a - b‖ / ‖b‖ of the worst parameter after 20 steps.
LIMITS = {("defaults", FP32): 1e-4, ("ridge", FP32): 1e-5} | {(row, FP64): 1e-9 for row in ROWS}
PASSES = {2: (5, 3), 4: (3, 1)}
CELLS = [
    *(Cell(*spread, row, FP32) for spread in SPREADS for row in ("defaults", "ridge")),
    *(Cell(*spread, "defaults", FP64, PASSES[spread[1]]) for spread in SPREADS),
    *(Cell(*spread, "inverse", FP64) for spread in (("DDP", 2), ("FSDP2", 4))),
    *(Cell(*spread, "exact", FP64) for spread in (("FSDP2", 2), ("HSDP", 4))),
    *(Cell(*spread, "diagonal", FP64) for spread in (("FSDP2", 2), ("DDP", 4), ("HSDP", 4))),
]
IN_MATRIX = {
    Cell("DDP", 4, "ridge", FP32),
    Cell("FSDP2", 4, "defaults", FP32),
    Cell("HSDP", 4, "defaults", FP32),
    Cell("HSDP", 4, "ridge", FP32),
    Cell("DDP", 4, "defaults", FP64, PASSES[4]),
    Cell("HSDP", 4, "defaults", FP64, PASSES[4]),
    Cell("FSDP2", 4, "inverse", FP64),
    Cell("DDP", 4, "diagonal", FP64),
}
each_cell = pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=pytest.mark.matrix if cell in IN_MATRIX else ()) for cell in CELLS],
    ids=str,
)
alone = functools.cache(train_alone)


Find = Callable[[Task], Sequence[Outcome]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kfac")


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest, folder: Path) -> Find:
    """What the ranks have found in a task. One launch for each world size does those of all tests
    that run; a leg of a route that cannot be among them has one of its own, after these.
    """
    items = [item for item in request.session.items if item.module is request.module]
    tasks: dict[str, Task] = {}
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for task in tasks_of(params, folder):
            tasks[str(task)] = task

    @functools.cache
    def launched(size: int) -> list[dict[str, Outcome]]:
        return launch(do, [t for t in tasks.values() if t.world_size == size], size, folder)

    def find(task: Task) -> Sequence[Outcome]:
        if str(task) in tasks:
            for size in sorted({t.world_size for t in tasks.values()}, reverse=True):
                if size > task.world_size:
                    launched(size)  # where routes begin
            ranks = launched(task.world_size)
        else:
            ranks = launch(do, [task], task.world_size, folder)
        return successful([rank[str(task)] for rank in ranks])

    return find


def tasks_of(params: dict[str, Any], folder: Path) -> Sequence[Task]:
    """What a test asks the ranks for, but for legs of a route that come after larger ones."""
    if "cell" in params:
        return [Task(train, params["cell"])]
    if "size" in params:
        jobs = [job for other in REPEATED for job in repetitions(params["size"], *other)]
        return [Task(preconditioned, job) for job in jobs]
    if "work" in params:
        return [Task(params["work"], cell) for cell in TOGETHER]
    if "route" in params:
        legs = legs_of(params["row"], params["dtype"], params["route"], folder)
        begun = 1
        while legs[begun:] and legs[begun].cell.world_size < legs[begun - 1].cell.world_size:
            begun += 1
        return [Task(travel, leg) for leg in legs[:begun]]
    return [Task(say, job) for job in TOLD]


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over the parameters."""
    assert found.keys() == expected.keys()
    return max(relative(found[name], expected[name]) for name in expected if "/" not in name)


@each_cell
def test_ranks_take_the_steps_of_one_process(cell: Cell, found: Find) -> None:
    reference = alone(cell.alone)
    assert len(reference["stats"]) == 5
    for outcome in found(Task(train, cell)):
        limit = LIMITS[cell.row, cell.dtype]
        assert worst(outcome["tensors"], reference["tensors"]) <= limit
        for name, numbers in reference["stats"].items():
            assert relative(outcome["stats"][name], numbers) <= 100 * limit


@each_cell
def test_collectives_are_few_and_factors_lie_on_one_rank_each(cell: Cell, found: Find) -> None:
    """One for the statistics, one for sums, one for results, and where gradients are sharded one
    for them; with several copies in parts one more, from copy to copy; at the first step one more,
    for what weights have been used for."""
    outcomes = found(Task(train, cell))
    updates = [step % ROWS[cell.row].get("factor_interval", 1) == 0 for step in range(NUM_STEPS)]
    others = {"DDP": 2, "FSDP2": 3, "HSDP": 4}[cell.layout]
    expected = [others + update for update in updates]
    expected[0] += 1
    assert all(outcome["collectives"] == expected for outcome in outcomes)
    memory = [outcome["memory"] for outcome in outcomes]
    assert sum(memory) == alone(cell.alone)["memory"]
    assert min(memory) > 0


def repetitions(size: int, row: str, dtype: torch.dtype) -> tuple[Repetition, ...]:
    """The same 16 samples 8, 32 and 128 times, in one pass, two, and an uneven two."""
    found = []
    for repeated in (1, 8, 32, 128):
        share = BATCH_SIZE * repeated // size
        for layout in ("one-process",) if size == 1 else ("DDP", "FSDP2"):
            for passes in ((share,), (share // 2, share // 2), (share - 1, 1)):
                found.append(Repetition(Cell(layout, size, row, dtype, passes), repeated))
    return tuple(found)


def by_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias are one matrix to K-FAC."""
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.rpartition(".")[0], []).append(tensor.reshape(-1))
    return {name: torch.cat(parts) for name, parts in layers.items()}


REPEATED = [("defaults", FP32), ("exact", FP64)]


@pytest.mark.parametrize("size", [1, 2, pytest.param(4, marks=pytest.mark.matrix)])
@pytest.mark.parametrize(("row", "dtype"), REPEATED, ids=str)
def test_a_repeated_batch_is_preconditioned_alike_whatever_its_split(
    row: str,
    dtype: torch.dtype,
    size: int,
    found: Find,
) -> None:
    with one_thread():
        reference = preconditioned(Repetition(Cell("one-process", 1, row, dtype), 1))
    assert len(reference) == 8
    for job in repetitions(size, row, dtype):
        for outcome in found(Task(preconditioned, job)):
            figure = worst(by_layer(outcome), by_layer(reference))
            assert figure <= (1e-5 if dtype == FP32 else 1e-9), str(job)


ROUTES = [
    ("exact", FP64, (("FSDP2", 4), ("DDP", 2), ("HSDP", 4))),
    *(
        pytest.param(row, dtype, route, marks=pytest.mark.matrix)
        for row, dtype, route in (
            ("defaults", FP32, (("DDP", 2), ("FSDP2", 4), ("one-process", 1))),
            ("defaults", FP64, (("one-process", 1), ("FSDP2", 2), ("DDP", 4))),
            ("diagonal", FP64, (("HSDP", 4), ("one-process", 1), ("FSDP2", 2))),
        )
    ),
]
LEG_STEPS = 5  # a multiple of no row's intervals


def legs_of(
    row: str, dtype: torch.dtype, route: tuple[tuple[str, int], ...], folder: Path
) -> list[Leg]:
    own = folder / f"{row}-{dtype}"
    return [
        Leg(
            Cell(layout, size, row, dtype),
            LEG_STEPS * number,
            LEG_STEPS * (number + 1),
            own / f"{number - 1}" if number > 0 else None,
            own / f"{number}" if number + 1 < len(route) else None,
        )
        for number, (layout, size) in enumerate(route)
    ]


@pytest.mark.parametrize(("row", "dtype", "route"), ROUTES, ids=str)
def test_a_checkpoint_goes_on_in_another_layout_and_world_size(
    row: str, dtype: torch.dtype, route: tuple[tuple[str, int], ...], found: Find, folder: Path
) -> None:
    legs = legs_of(row, dtype, route, folder)
    for leg in legs:
        last = found(Task(travel, leg))
    with one_thread():
        whole = travel(Leg(legs[0].cell.alone, 0, LEG_STEPS * len(route), None, None))
    for outcome in last:
        limit = 1e-9 if dtype == FP64 else 1e-4
        assert worst(outcome["tensors"], whole["tensors"]) <= limit


TOGETHER = [Cell(*spread, "defaults", FP64, PASSES[spread[1]]) for spread in SPREADS]


@pytest.mark.parametrize("work", [skipped, pytest.param(fisher_pass, marks=pytest.mark.matrix)])
def test_what_ranks_do_alone_they_do_together(work: Callable[[Cell], Outcome], found: Find) -> None:
    """A step that one rank's `found_inf` masks everywhere; the true Fisher's passes."""
    with one_thread():
        reference = work(Cell("one-process", 1, "defaults", FP64))
    for cell in TOGETHER:
        for outcome in found(Task(work, cell)):
            assert worst(outcome["tensors"], reference["tensors"]) <= 1e-9
            assert outcome.get("unchanged", True)


TOLD = (
    Refused(Cell("TP", 2, "defaults")),
    *(Tied(Cell(layout, 2, "defaults")) for layout in ("DDP", "FSDP2")),
    *(Failing(Cell(layout, 2, "exact", FP64)) for layout in ("DDP", "FSDP2")),
)


def test_layers_that_cannot_be_seen_whole_are_refused_by_name(
    found: Find,
) -> None:
    for outcome in found(Task(say, TOLD[0])):
        assert "process_group must be given on 2 ranks" in outcome["plain"]
        assert "'embedding.weight'" in outcome["plain"]
        assert "whole rows of layer 'up.weight', which is tensor-parallel" in outcome["parallel"]


@pytest.mark.parametrize("job", [job for job in TOLD if isinstance(job, Tied)], ids=str)
def test_a_weight_that_one_rank_uses_without_its_module_has_no_curvature_on_any(
    job: Tied, found: Find
) -> None:
    for outcome in found(Task(say, job)):
        names = ["conv.weight", "grouped.weight", "head.weight", "over_positions.weight"]
        assert outcome["curved"] == names
        (sentence,) = outcome["warned"]
        assert "leaves 'embedding.weight' to its fallback" in sentence
        assert outcome["goes on"]


@pytest.mark.parametrize("job", [job for job in TOLD if isinstance(job, Failing)], ids=str)
def test_all_ranks_raise_what_one_of_them_has_failed_in(job: Failing, found: Find) -> None:
    """The same sentence in the same step, one after that in which its owner was out of patience."""
    first, *others = (outcome["raised"] for outcome in found(Task(say, job)))
    assert others == [first] * len(others)
    step, sentence = first[0]
    assert step == 5  # three failures are tolerated, from the second step on
    assert sentence.startswith("layer 'over_positions.weight': the decomposition of a factor was")
