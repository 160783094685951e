"""An update does not depend on how the model is spread over ranks.

Held against one process on the whole batch: FP32 from the same gradients to 1e-6, bf16 to one unit
in the last place of bf16, real training in FP64. A part of the cells runs in every test run; the
marker `matrix` has the others, and `make matrix` runs all of them and prints the figures.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec

import pytest
from gloo_ranks import Outcome, launch, one_thread, successful
from parity_cells import ROWS, Cell
from parity_checks import check
from parity_figures import assert_copies_are_bit_identical, difference, relative
from parity_layouts import LAYOUTS
from zero_training import WORLD_SIZE, control_cells, zero_cells

FP32_LIMIT = 1e-6  # ‖a - b‖ / ‖b‖ of the worst tensor
FP64_LIMIT = 1e-12  # the same; here the backward pass is real
BF16_LIMIT = 1.0  # units in the last place of the worst element

PRECISIONS = ("fp32", "bf16", "bf16+master", "fp64")
SPREAD = [
    (layout.name, world_size)
    for layout in LAYOUTS.values()
    for world_size in layout.world_sizes
    if world_size > 1
]
CELLS = [
    Cell(layout, world_size, row.name, precision)
    for layout, world_size in SPREAD
    for row in ROWS.values()
    for precision in PRECISIONS
    if not row.name.startswith("deaf") and (row.ours or precision != "bf16+master")
]
DEAF_CELLS = [
    Cell(layout, world_size, row, "fp32")
    for layout, world_size in SPREAD
    for row in ("deaf-LARS", "deaf-LAMB", "deaf-LAMB-clip")
    if LAYOUTS[layout].reductions
]
COUNTED = [
    Cell(layout, min(LAYOUTS[layout].world_sizes), row, "fp32", "collectives")
    for layout in ("DDP", "ZeRO-redundancy", "FSDP2", "FSDP2+ignored", "HSDP", "TP", "FSDP2+TP")
    for row in ("LARS", "LARS-clip-fused", "LAMB", "LAMB-clip")
]
SKIPPING = [
    Cell(layout, max(LAYOUTS[layout].world_sizes), row, precision, "found_inf")
    for layout in ("DDP", "FSDP2", "FSDP2+ignored", "FSDP2-columns", "HSDP", "TP", "FSDP2+TP")
    for row, precision in (
        ("LAMB-clip", "fp32"),
        ("LARS", "bf16+master"),
        ("LARS-clip-fused", "bf16"),
    )
]
DEEPSPEED = [
    Cell(f"DeepSpeed-{cell.stage}", WORLD_SIZE, cell.row.replace(" ", "-"), cell.dtype, "deepspeed")
    for cell in (*zero_cells(), *control_cells())
]
SCALED = [Cell("FSDP2", 2, "LAMB", "fp32", "scaler"), Cell("HSDP", 4, "LARS", "fp32", "scaler")]
ABSENT = [Cell("FSDP2", size, row, "fp32", "absent") for size in (2, 4) for row in ("LARS", "LAMB")]


def covering(cell: Cell) -> bool:
    """Whether the cell runs in every test run."""
    if (cell.layout, cell.world_size) == ("FSDP2", 3):
        return cell.precision in ("fp32", "bf16+master")
    if cell.world_size < max(LAYOUTS[cell.layout].world_sizes):
        return False
    if (cell.row, cell.precision) == ("LAMB-clip", "fp32"):
        return True
    chosen = {("LARS-clip-fused", "fp32"), ("LAMB-clip", "fp64"), ("LAMB-fused", "bf16+master")}
    return cell.layout not in ("FSDP2+HSDP", "DDP") and (cell.row, cell.precision) in chosen


def each(cells: list[Cell], always: Callable[[Cell], bool]) -> pytest.MarkDecorator:
    marks = [() if always(cell) else pytest.mark.matrix for cell in cells]
    params = [pytest.param(cell, marks=mark) for cell, mark in zip(cells, marks, strict=True)]
    return pytest.mark.parametrize("cell", params, ids=str)


Outcomes = Callable[[Cell], Sequence[Outcome]]


@pytest.fixture(scope="module")
def outcomes_of(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Outcomes:
    """What each rank has found in a cell. One launch per world size runs all chosen cells.

    DeepSpeed changes the process it is imported in and has one of its own.
    """
    items = [item for item in request.session.items if item.module is request.module]
    cells = [item.callspec.params["cell"] for item in items if hasattr(item, "callspec")]
    folder = tmp_path_factory.mktemp("parity")

    @functools.cache
    def launched(world_size: int, deepspeed: bool) -> list[dict[str, Outcome]]:
        ours = [cell for cell in cells if cell.world_size == world_size]
        chosen = [cell for cell in ours if (cell.check == "deepspeed") == deepspeed]
        return launch(check, chosen, world_size, folder)

    def outcomes(cell: Cell) -> Sequence[Outcome]:
        found = launched(cell.world_size, cell.check == "deepspeed")
        return successful([outcomes[str(cell)] for outcomes in found])

    return outcomes


def expected(cell: Cell) -> Outcome:
    return found_alone(cell.alone)


@functools.cache
def found_alone(cell: Cell) -> Outcome:
    with one_thread():
        return check(cell)


@pytest.fixture(scope="module")
def matrix(request: pytest.FixtureRequest) -> Iterator[dict[Cell, str]]:
    """Collects the figures of the cells, and prints them where the whole matrix has run."""
    figures: dict[Cell, str] = {}
    yield figures
    if all(cell in figures for cell in CELLS):
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n" + "\n".join(table(figures)))


def table(figures: dict[Cell, str]) -> Iterator[str]:
    """A line for each layout and precision, with a column for each optimizer; then the counts."""
    lines: dict[str, dict[str, str]] = {}
    for cell in [*CELLS, *DEAF_CELLS, *DEEPSPEED]:
        if cell in figures:
            label = f"{cell.layout} on {cell.world_size}, {cell.precision}"
            lines.setdefault(label, {})[cell.row] = figures[cell]
    yield " " * 34 + "".join(f"{row:>16}" for row in ROWS)
    for label, columns in sorted(lines.items()):
        yield f"{label:<34}" + "".join(f"{columns.get(row, ''):>16}" for row in ROWS)
    for cell in COUNTED:
        if cell in figures:
            yield f"{cell}: {figures[cell]}"


# Tests --------------------------------------------------------------------------------------------


@each(CELLS, covering)
def test_a_spread_model_takes_the_steps_of_one_process(
    cell: Cell, outcomes_of: Outcomes, matrix: dict[Cell, str]
) -> None:
    outcomes = outcomes_of(cell)
    figures = difference(cell, outcomes, expected(cell))
    if cell.precision.startswith("bf16"):
        matrix[cell] = f"{figures['ulps']:.0f} ulp {figures['relative']:.0e}"
        assert figures["ulps"] <= BF16_LIMIT
    else:
        matrix[cell] = f"{figures['relative']:.0e}"
    # The state follows the weights, also where those differ by one unit.
    if figures["ulps"] == 0:
        limit = FP64_LIMIT if cell.precision == "fp64" else FP32_LIMIT
        assert figures["relative"] <= limit
        assert figures["stats"] <= limit
    pairs = assert_copies_are_bit_identical(outcomes)
    assert pairs > 0 or cell.layout in ("FSDP2", "FSDP2-columns")  # the others hold copies


@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@each(DEEPSPEED, lambda cell: False)
def test_zero_takes_the_steps_of_one_process(
    cell: Cell, outcomes_of: Outcomes, matrix: dict[Cell, str]
) -> None:
    for outcome in outcomes_of(cell):
        matrix[cell] = f"{outcome['num_ulps']} ulp {outcome['difference']:.0e}"
        assert outcome["num_ulps"] <= BF16_LIMIT
        assert outcome["difference"] <= FP32_LIMIT


@each(DEAF_CELLS, lambda cell: cell.world_size == 4 and cell.row != "deaf-LAMB")
def test_norms_of_shards_alone_are_seen_to_be_wrong(
    cell: Cell, outcomes_of: Outcomes, matrix: dict[Cell, str]
) -> None:
    name = cell.row.removeprefix("deaf-")
    right = expected(Cell(cell.layout, cell.world_size, name, cell.precision))
    assert difference(cell, [expected(cell)], right)["relative"] == 0
    figures = difference(cell, outcomes_of(cell), right)
    matrix[cell] = f"{figures['relative']:.0e}"
    assert figures["relative"] > 1e3 * FP32_LIMIT


@each([Cell("ZeRO-redundancy", 2, "LAMB-clip", "fp32", "unbound")], lambda cell: True)
def test_a_clip_by_the_gradients_of_one_rank_is_refused(cell: Cell, outcomes_of: Outcomes) -> None:
    for outcome in outcomes_of(cell):
        assert "call largebatch.optim.zero.bind" in outcome["said"]


def test_the_clip_of_the_given_gradients_is_active() -> None:
    plain, clipped = (expected(Cell("FSDP2", 4, row)) for row in ("LAMB", "LAMB-clip"))
    assert difference(Cell("FSDP2", 4, "LAMB"), [clipped], plain)["relative"] > 1e-2


@each([Cell("FSDP2", 2, "AdamW", "fp32", "counter")], lambda cell: True)
def test_the_counter_sees_every_kind_of_collective(cell: Cell, outcomes_of: Outcomes) -> None:
    assert [outcome["seen"] for outcome in outcomes_of(cell)] == [6, 6]


@each(COUNTED, lambda cell: cell.row in ("LARS", "LAMB-clip"))
def test_collectives_of_a_step_are_one_for_each_process_group(
    cell: Cell, outcomes_of: Outcomes, matrix: dict[Cell, str]
) -> None:
    outcomes = outcomes_of(cell)
    matrix[cell] = str(outcomes[0])
    groups = LAYOUTS[cell.layout].reductions
    count = 2 * groups if "clip" in cell.row else groups
    for outcome in outcomes:
        assert outcome["plain"] == {10: count, 100: count}
        assert outcome["amp"] == {10: 2 * groups, 100: 2 * groups}


@each(SKIPPING, lambda cell: cell.row == "LAMB-clip")
def test_all_ranks_skip_a_step_that_one_rank_cannot_take(cell: Cell, outcomes_of: Outcomes) -> None:
    outcomes = outcomes_of(cell)
    assert all(outcome["unchanged"] for outcome in outcomes)
    assert_copies_are_bit_identical(outcomes)
    reference = expected(Cell(cell.layout, 1, cell.row, cell.precision, "without_bad_step"))
    figures = difference(cell, outcomes, reference)
    assert figures["ulps"] <= BF16_LIMIT
    assert figures["relative"] <= FP32_LIMIT or figures["ulps"] > 0


@each(SCALED, lambda cell: True)
def test_torchs_grad_scaler_skips_the_same_step_on_all_ranks(
    cell: Cell, outcomes_of: Outcomes
) -> None:
    outcomes = outcomes_of(cell)
    for outcome in outcomes:
        assert outcome["scales"] == [4.0, 4.0, 4.0, 2.0, 2.0, 2.0]
    reference = expected(Cell(cell.layout, 1, cell.row, cell.precision, "without_bad_step"))
    assert difference(cell, outcomes, reference)["relative"] <= FP32_LIMIT


@each(ABSENT, lambda cell: cell.world_size == 4)
def test_a_rank_without_elements_needs_no_gradient(cell: Cell, outcomes_of: Outcomes) -> None:
    outcomes = outcomes_of(cell)
    assert sum(outcome["num_absent"] for outcome in outcomes) > 0
    reference = expected(Cell(cell.layout, 1, cell.row, cell.precision))["tensors"]
    for outcome in outcomes:
        for name, weight in outcome["weights"].items():
            assert relative(weight, reference[name]) <= FP32_LIMIT


@each([Cell("TP", 2, "LAMB-clip", "fp32", "partial")], lambda cell: True)
def test_a_gradient_left_as_summands_is_added_up_and_left(
    cell: Cell, outcomes_of: Outcomes
) -> None:
    outcomes = outcomes_of(cell)
    assert all(outcome["unchanged"] for outcome in outcomes)
    reference = expected(Cell(cell.layout, 1, cell.row, cell.precision))
    assert difference(cell, outcomes, reference)["relative"] <= FP32_LIMIT


@each([Cell("FSDP2", 2, row, "fp32", "flat") for row in ("LARS", "LAMB")], lambda cell: True)
def test_flat_parameters_of_fsdp1_are_refused_in_a_sentence(
    cell: Cell, outcomes_of: Outcomes
) -> None:
    for outcome in outcomes_of(cell):
        for use_orig_params in (False, True):
            said = outcome["said"][use_orig_params]
            assert "fully_shard" in said
            assert "\n" not in said


@each([Cell("FSDP2+TP", 4, "LAMB", "fp32", "interleaved")], lambda cell: True)
def test_a_fused_tensor_whose_rows_are_interleaved_is_refused(
    cell: Cell, outcomes_of: Outcomes
) -> None:
    for outcome in outcomes_of(cell):
        assert "'up.weight'" in outcome["said"]
        assert "interleaved" in outcome["said"]
