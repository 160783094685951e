"""Shampoo, SOAP and Muon on ranks that share the work take the steps of one process."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo_ranks import Outcome, launch, successful
from parity_figures import assert_copies_are_bit_identical, relative
from second_order_training import (
    Cell,
    CommonState,
    Failing,
    Forms,
    Leg,
    Route,
    Trouble,
    alone,
    begin_alone,
    stumble,
    train,
    uninterrupted,
    work,
)

FP32, FP64 = torch.float32, torch.float64
# Of the worst tensor, over the steps of training.
LIMITS = {
    ("Shampoo", FP32): 1e-4,
    ("Shampoo-1e-4", FP32): 1e-5,
    ("Shampoo", FP64): 1e-9,
    ("Shampoo-far", FP64): 1e-9,
    ("Shampoo-one-sided", FP64): 1e-9,
    ("Muon", FP32): 1e-4,
    ("Muon", FP64): 1e-9,
    ("Muon-sphere", FP64): 1e-9,
    ("Mano", FP32): 1e-4,
    ("Mano", FP64): 1e-9,
}
ROWS_OF = {
    ("DDP", 2): [("Shampoo", FP32)],
    ("DDP+group", 2): [("Shampoo", FP64), ("Muon", FP64), ("Muon-sphere", FP64)],
    ("FSDP2", 2): [("Shampoo", FP64), ("Shampoo-1e-4", FP32), ("Mano", FP64)],
    ("DDP+group", 4): [("Shampoo-far", FP64)],
    ("FSDP2", 4): [*LIMITS],
    ("HSDP", 4): [
        *(("Shampoo-far", FP64), ("Shampoo", FP32), ("Shampoo-1e-4", FP32)),
        *(("Muon", FP64), ("Mano", FP64)),
    ],
}
CELLS = [Cell(*spread, *row) for spread, rows in ROWS_OF.items() for row in rows]
# Other ways to be cut; with tensor parallelism in meshes that have copies of the work.
OTHERS = [
    Cell("FSDP2-columns", 2, "Shampoo-far", FP64, 6),
    Cell("FSDP2", 2, "Shampoo-one-sided", FP64, 6),
    Cell("FSDP2+TP", 4, "Shampoo-far", FP64, 6),
    Cell("FSDP2-columns", 2, "Mano", FP64, 6),
    Cell("FSDP2+TP", 4, "Mano", FP64, 6),
]
COMMON = [
    Cell(*spread, row, FP32, steps)
    for spread in (("DDP+group", 2), ("FSDP2", 4), ("HSDP", 4))
    for row, steps in (("SOAP", 3), ("SOAP-often", 6), ("SOAP-Muon", 4))
]
ROUTES = [
    Route((("FSDP2", 4), ("DDP+group", 2), ("one-process", 1)), "Shampoo-far"),
    Route((("HSDP", 4), ("FSDP2", 2), ("one-process", 1)), "Shampoo"),
    Route((("FSDP2", 2), ("one-process", 1)), "Shampoo-one-sided"),
    Route((("DDP+group", 4), ("FSDP2", 2)), "SOAP", given=True),
    Route((("FSDP2", 4), ("one-process", 1)), "SOAP-often", given=True),
    Route((("FSDP2", 4), ("DDP", 2), ("one-process", 1)), "Mano"),
    Route((("HSDP", 4), ("FSDP2", 2), ("one-process", 1)), "Muon-sphere"),
    Route((("FSDP2", 4), ("DDP+group", 2), ("one-process", 1)), "Muon"),
]
TROUBLES = [
    Trouble(Cell(layout, 4, row, FP64, 3), what)
    for layout, row, what in (
        ("FSDP2", "Shampoo", "missing"),
        ("FSDP2", "SOAP-often", "missing"),
        ("FSDP2", "Shampoo-far", "inf"),
        ("FSDP2", "SOAP-often", "inf"),
        ("HSDP", "Shampoo", "inf"),
        ("FSDP2", "Muon", "missing"),
        ("FSDP2", "Mano", "missing"),
        ("HSDP", "Muon", "inf"),
    )
]
# Both of two ranks, which share the work on what one of them owns.
FAILING = [
    Failing(Cell("DDP+group", 2, "SOAP-often", FP64, 8)),
    Failing(Cell("FSDP2", 2, "SOAP-often", FP64, 8)),
]
FORMS = [
    Cell("FSDP2", 2, "Shampoo-far", FP64, 6),
    Cell("DDP+group", 2, "SOAP", FP64, 3),
    Cell("FSDP2", 2, "Muon", FP64, 2),
]
WORLD_SIZES = (4, 2, 1)  # in which every route passes them
# Of the jobs of four ranks, those of every test run: one of each kind.
HERE = {
    str(job)
    for job in (
        Cell("FSDP2", 4, "Shampoo", FP32),
        Cell("HSDP", 4, "Shampoo-far", FP64),
        Cell("FSDP2", 4, "SOAP-often", FP32, 6),
        Cell("FSDP2", 4, "Muon", FP64),
        Cell("HSDP", 4, "Mano", FP64),
        Trouble(Cell("FSDP2", 4, "Muon", FP64, 3), "missing"),
        Trouble(Cell("FSDP2", 4, "SOAP-often", FP64, 3), "missing"),
        Trouble(Cell("HSDP", 4, "Shampoo", FP64, 3), "inf"),
        ROUTES[1],
        ROUTES[-1],
    )
}

Find = Callable[[Any], Sequence[Outcome]]


def each(name: str, jobs: Sequence[Any]) -> pytest.MarkDecorator:
    """Those of four ranks that are not `HERE` in the matrix only."""
    params = []
    for job in jobs:
        sizes = [size for _, size in job.legs] if isinstance(job, Route) else []
        cell = job.cell if isinstance(job, Trouble | Failing) else job
        large = 4 in sizes if sizes else cell.world_size == 4
        marks = pytest.mark.matrix if large and str(job) not in HERE else ()
        params.append(pytest.param(job, marks=marks))
    return pytest.mark.parametrize(name, params, ids=str)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("second_order")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Outcome]:
    """What one process finds, from whose state the ranks go on."""
    jobs = [common_job(cell, folder) for cell in COMMON]
    return {str(job): begin_alone(job) for job in jobs}


def common_job(cell: Cell, folder: Path) -> CommonState:
    return CommonState(cell, folder / f"{cell.layout}{cell.world_size}{cell.row}.pt")


def forms_of(cell: Cell, folder: Path) -> Forms:
    return Forms(cell, folder / f"forms{FORMS.index(cell)}")


def leg_of(route: Route, number: int, folder: Path) -> Leg:
    own = folder / str(ROUTES.index(route))
    own.mkdir(exist_ok=True)
    return Leg(route, number, own)


@pytest.fixture(scope="module")
def found(folder: Path, references: dict[str, Outcome], wanted: set[str]) -> Find:
    """What the ranks have found in a job. One launch for each world size, in the routes' order."""
    jobs: list[tuple[int, Any]] = [
        (cell.world_size, cell) for cell in (*CELLS, *OTHERS) if str(cell) in wanted
    ]
    jobs += [(cell.world_size, common_job(cell, folder)) for cell in COMMON if str(cell) in wanted]
    jobs += [(t.cell.world_size, t) for t in TROUBLES if str(t) in wanted]
    jobs += [(cell.world_size, forms_of(cell, folder)) for cell in FORMS]
    jobs += [(job.cell.world_size, job) for job in FAILING]
    for route in [route for route in ROUTES if str(route) in wanted]:
        for number, (_, size) in enumerate(route.legs):
            jobs.append((size, leg_of(route, number, folder)))

    @functools.cache
    def launched() -> dict[int, list[dict[str, Outcome]]]:
        return {
            size: launch(work, [job for world, job in jobs if world == size], size, folder)
            for size in WORLD_SIZES
        }

    def find(job: Any) -> Sequence[Outcome]:
        sizes = {str(job): size for size, job in jobs}
        return successful([rank[str(job)] for rank in launched()[sizes[str(job)]]])

    return find


@functools.cache
def trained_alone(cell: Cell) -> Outcome:
    return alone(train, cell.alone)


def worst(ours: Outcome, reference: Outcome, *, of_state: bool = False) -> float:
    """‖a - b‖ / ‖b‖ of the worst parameter, or of the worst of all tensors."""
    assert {*ours["names"]} == {*reference["names"]}
    names = [name for name in reference["names"] if of_state or "/" not in name]
    return max(relative(ours["tensors"][name], reference["tensors"][name]) for name in names)


@each("cell", [*CELLS, *OTHERS])
def test_ranks_take_the_steps_of_one_process(cell: Cell, found: Find) -> None:
    reference = trained_alone(cell.alone)
    for outcome in found(cell):
        assert worst(outcome, reference) < LIMITS[cell.row, cell.dtype]
        assert outcome["stats"].keys() == reference["stats"].keys()
        if cell.dtype == FP64:
            for name, stats in reference["stats"].items():
                torch.testing.assert_close(outcome["stats"][name], stats, rtol=1e-7, atol=1e-9)
    assert_copies_are_bit_identical(found(cell))


@each("cell", CELLS)
def test_one_sum_and_one_round_each_way_a_step(cell: Cell, found: Find) -> None:
    """Under DDP none at all, or results alone where the ranks share the work; with several copies
    in parts they go on from copy to copy, here of two kinds of tensors."""
    a_step = {"DDP": 0, "DDP+group": 2, "HSDP": 6}.get(cell.layout, 4)
    expected = a_step * cell.steps
    if cell.row == "Mano":  # two sums, and for columns, which lie across ranks, one more
        of_gradients = 1 if cell.layout == "HSDP" else 0  # from copy to copy, by FSDP2 itself
        expected = (2 + of_gradients) * cell.steps + (cell.steps + 1) // 2
    for outcome in found(cell):
        assert outcome["collectives"] == expected


@each("cell", CELLS)
def test_factors_are_shared_out_over_the_ranks(cell: Cell, found: Find) -> None:
    """No rank has more than its share and one block's, the largest of which is 6 by 6 by 3."""
    whole = trained_alone(cell.alone)["memory"]
    memory = [outcome["memory"] for outcome in found(cell)]
    if cell.layout == "DDP":
        assert memory == [whole] * cell.world_size
        return
    assert sum(memory) == whole
    assert max(memory) < whole / cell.world_size + 2 * (36 + 36 + 9) + 2 * 108


@each("cell", COMMON)
def test_one_step_from_a_common_state(
    cell: Cell, found: Find, references: dict[str, Outcome], folder: Path
) -> None:
    """SOAP's trajectories are chaotic: in the null space of a factor any basis is as good."""
    job = common_job(cell, folder)
    for outcome in found(job):
        assert worst(outcome, references[str(job)]) < 1e-5


@each("route", ROUTES)
def test_training_goes_on_at_another_world_size(route: Route, found: Find, folder: Path) -> None:
    reference = alone(uninterrupted, route)
    last = len(route.legs) - 1
    for outcome in found(leg_of(route, last, folder)):
        assert worst(outcome, reference, of_state=True) < 1e-9


@each("cell", FORMS)
def test_state_comes_back_from_every_form_of_state_dict(
    cell: Cell, found: Find, folder: Path
) -> None:
    for outcome in found(forms_of(cell, folder)):
        assert outcome == {"flattened": True, "full": True, "broadcast": True}


@each("job", [t for t in TROUBLES if t.what == "missing"])
def test_a_gradient_that_a_rank_lacks_counts_as_zeros(job: Trouble, found: Find) -> None:
    """And a parameter that no rank has a gradient for is not stepped."""
    reference = alone(stumble, replace(job, cell=job.cell.alone))
    for outcome in found(job):
        assert worst(outcome, reference) < 1e-9
        assert float(outcome["tensors"]["down.weight/step"]) == 2
        assert float(outcome["tensors"]["kv/step"]) == 3


@each("job", [t for t in TROUBLES if t.what == "inf"])
def test_a_step_that_one_rank_wants_skipped_changes_nothing(job: Trouble, found: Find) -> None:
    """Found by one rank, followed by all; the next step is as if it had not been."""
    reference = alone(stumble, replace(job, cell=job.cell.alone, what="skipped"))
    for outcome in found(job):
        assert worst(outcome, reference, of_state=True) < 1e-9


@each("job", FAILING)
def test_all_ranks_raise_what_one_of_them_has_failed_in(job: Failing, found: Find) -> None:
    """The same sentence in the same step, one after that in which its owner was out of patience."""
    first, *others = (outcome["raised"] for outcome in found(job))
    assert others == [first] * len(others)
    step, sentence = first[0]
    assert step == 5  # three failures are tolerated, from the second step on
    assert sentence.startswith("layer 'up.weight': the decomposition of a factor was asked of")
