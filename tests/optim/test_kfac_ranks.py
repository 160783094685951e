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

# ‖a - b‖ / ‖b‖ of the worst parameter after NUM_STEPS steps.
LIMITS = {("defaults", FP32): 1e-4, ("ridge", FP32): 1e-5} | {(row, FP64): 1e-9 for row in ROWS}
PASSES = {2: (5, 3), 4: (3, 1)}
CELLS = [
    *(Cell(*spread, row, FP32) for spread in SPREADS for row in ("defaults", "ridge")),
    *(Cell(*spread, "defaults", FP64, PASSES[spread[1]]) for spread in SPREADS),
    *(Cell(*spread, "eigen", FP64) for spread in (("DDP", 2), ("FSDP2", 4))),
    *(Cell(*spread, "exact", FP64) for spread in (("FSDP2", 2), ("HSDP", 4))),
    *(Cell(*spread, "diagonal", FP64) for spread in (("FSDP2", 2), ("DDP", 4), ("HSDP", 4))),
]
IN_MATRIX = {
    Cell("FSDP2", 2, "defaults", FP32),
    Cell("DDP", 4, "ridge", FP32),
    Cell("FSDP2", 4, "defaults", FP32),
    Cell("HSDP", 4, "defaults", FP32),
    Cell("HSDP", 4, "ridge", FP32),
    Cell("DDP", 4, "defaults", FP64, PASSES[4]),
    Cell("HSDP", 4, "defaults", FP64, PASSES[4]),
    Cell("FSDP2", 4, "eigen", FP64),
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
    that run, in this order; a leg of a route that cannot be among them has one of its own.
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
            for size in {t.world_size for t in tasks.values()}:
                if place(size) < place(task.world_size):
                    launched(size)  # where routes begin
            ranks = launched(task.world_size)
        else:
            ranks = launch(do, [task], task.world_size, folder)
        return successful([rank[str(task)] for rank in ranks])

    return find


def tasks_of(params: dict[str, Any], folder: Path) -> Sequence[Task]:
    """What a test asks the ranks for, but for legs of a route that would have to come before."""
    if "cell" in params:
        return [Task(train, params["cell"])]
    if "size" in params:
        return [Task(preconditioned, job) for job in repetitions(**params)]
    if "work" in params:
        return [Task(params["work"], params["together"])]
    if "route" in params:
        legs = legs_of(params["row"], params["dtype"], params["route"], folder)
        sizes, begun = [leg.cell.world_size for leg in legs], 1
        while legs[begun:] and place(sizes[begun]) >= place(sizes[begun - 1]):
            begun += 1
        return [Task(travel, leg) for leg in legs[:begun]]
    return [Task(say, job) for job in TOLD]


def place(size: int) -> int:
    """Of a world size, among the launches."""
    return (2, 4, 1).index(size)


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over the parameters."""
    assert found.keys() == expected.keys()
    return max(relative(found[name], expected[name]) for name in expected)


@each_cell
def test_ranks_take_the_steps_of_one_process(cell: Cell, found: Find) -> None:
    reference = alone(cell.alone)
    assert len(reference["stats"]) == 5
    for outcome in found(Task(train, cell)):
        limit = LIMITS[cell.row, cell.dtype]
        assert worst(outcome["weights"], reference["weights"]) <= limit
        assert {*outcome["names"]} == {*reference["names"]}
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


def repetitions(row: str, dtype: torch.dtype, size: int, swapped: bool) -> list[Repetition]:
    """The same 16 samples 8, 32 and 128 times, in one pass, two, and an uneven two.

    On several ranks each pair of these has one of two layouts, in turn, or `swapped` the other.
    """
    found = []
    layouts = ("one-process",) * 2 if size == 1 else ("DDP", "FSDP2")
    for row_of, repeated in enumerate((1, 8, 32, 128)):
        share = BATCH_SIZE * repeated // size
        for column, passes in enumerate(((share,), (share // 2, share // 2), (share - 1, 1))):
            layout = layouts[(row_of + column + swapped) % 2]
            found.append(Repetition(Cell(layout, size, row, dtype, passes), repeated))
    return found


MATRIX = pytest.mark.matrix
WAYS = [
    *((1, False), (2, False)),
    *(pytest.param(*way, marks=MATRIX) for way in ((2, True), (4, False), (4, True))),
]


def by_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weight and bias are one matrix to K-FAC."""
    layers: dict[str, list[Tensor]] = {}
    for name, tensor in tensors.items():
        layers.setdefault(name.rpartition(".")[0], []).append(tensor.reshape(-1))
    return {name: torch.cat(parts) for name, parts in layers.items()}


REPEATED = [("defaults", FP32), ("exact", FP64)]


@pytest.mark.parametrize(("size", "swapped"), WAYS)
@pytest.mark.parametrize(("row", "dtype"), REPEATED, ids=str)
def test_a_repeated_batch_is_preconditioned_alike_whatever_its_split(
    row: str, dtype: torch.dtype, size: int, swapped: bool, found: Find
) -> None:
    with one_thread():
        reference = preconditioned(Repetition(Cell("one-process", 1, row, dtype), 1))
    assert len(reference) == 8
    for job in repetitions(row, dtype, size, swapped):
        for outcome in found(Task(preconditioned, job)):
            figure = worst(by_layer(outcome), by_layer(reference))
            assert figure <= (1e-5 if dtype == FP32 else 1e-9), str(job)


ROUTES = [
    ("exact", FP64, (("DDP", 2), ("FSDP2", 4), ("HSDP", 4))),
    *(
        pytest.param(row, dtype, route, marks=MATRIX)
        for row, dtype, route in (
            ("exact", FP64, (("FSDP2", 4), ("DDP", 2), ("HSDP", 4))),
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
    own = folder / f"{row}-{dtype}-{route[0]}"
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
        assert worst(outcome["weights"], whole["weights"]) <= limit


TOGETHER = [Cell(*spread, "defaults", FP64, PASSES[spread[1]]) for spread in SPREADS]
SKIPPING = [cell for cell in TOGETHER if cell.world_size == 2 or cell.layout == "HSDP"]


@pytest.mark.parametrize(
    ("work", "together"),
    [
        pytest.param(work, cell, marks=() if work is skipped and cell in SKIPPING else MATRIX)
        for work in (skipped, fisher_pass)
        for cell in TOGETHER
    ],
    ids=lambda it: getattr(it, "__name__", str(it)),
)
def test_what_ranks_do_alone_they_do_together(
    work: Callable[[Cell], Outcome], together: Cell, found: Find
) -> None:
    """A step that one rank's `found_inf` masks everywhere; the true Fisher's passes."""
    reference = done_alone(work)
    for outcome in found(Task(work, together)):
        assert worst(outcome["weights"], reference["weights"]) <= 1e-9
        assert outcome.get("unchanged", True)


@functools.cache
def done_alone(work: Callable[[Cell], Outcome]) -> Outcome:
    with one_thread():
        return work(Cell("one-process", 1, "defaults", FP64))


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
