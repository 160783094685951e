"""Runs on the rehearsal's device: as on the CPU, and the host waits for it where it has to only."""

from collections.abc import Callable
from pathlib import Path

import pytest
import rehearsal_cells as cells
from rehearsal_runs import Outcome, rehearse
from rehearsal_steps import ROWS
from rehearsal_waits import (
    MARKS,
    PER_REFRESH,
    REFRESH,
    ROOTS,
    at,
    each,
    ended,
    largest_difference,
    refreshes,
    steady,
    table,
)

pytestmark = MARKS

NAMES = [run.name for run in cells.plain()]
# Of bytes each optimizer has a run in bf16 too (test_rehearsed_features): here with two.
HERE = [name for name in NAMES if not name.startswith("bytes")] + ["bytes lamb", "bytes kfac"]
# Whose roots and inverses the device makes by products, to how near the CPU's weights they come in
# FP32: where eigenvalues are 1e-5 or less of the largest, neither way knows them to all digits.
BY_PRODUCTS = {"shampoo": 1e-3, "kfac": 2e-4}
# Of those whose steps ask a device for decompositions, and of one other.
AS_CUDA = [name for name in HERE if name.split()[-1] in (*cells.SECOND_ORDER, "lamb")]
each_here = each("name", NAMES, HERE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


@pytest.fixture(scope="module")
def found(folder: Path, wanted: set[str]) -> dict[str, Outcome]:
    """The runs on the device and on the CPU, and the optimizers alone, in one process."""
    runs = [run for run in cells.plain() if run.name in wanted]
    (outcomes,) = rehearse([*runs, *cells.on_the_cpu(runs)], folder, steps=[*ROWS])
    return outcomes


@pytest.fixture(scope="module")
def as_cuda(folder: Path, wanted: set[str]) -> dict[str, Outcome]:
    """Those on the device, whose module has the names of torch.cuda."""
    runs = [run for run in cells.plain() if f"cuda {run.name}" in wanted]
    (outcomes,) = rehearse(runs, folder / "cuda", like="cuda")
    return outcomes


# Waits --------------------------------------------------------------------------------------------


@each_here
def test_a_steady_step_waits_for_nothing_but_what_a_refresh_needs(
    found: dict[str, Outcome], name: str
) -> None:
    outcome = ended(found, name)
    optimizer = name.split()[-1]
    assert outcome["summary"]["provenance"]["device"] == "Rehearsal accelerator"
    assert len(outcome["steps"]) == cells.PLAIN_STEPS
    assert len(steady(outcome)) == cells.PLAIN_STEPS - 2  # an evaluation after the first step
    for step in steady(outcome):
        assert all(at(line, REFRESH) for _, line in step.waits), step.waits
        assert refreshes(step) <= PER_REFRESH.get(optimizer, 0)
        assert not [kind for kind, _ in step.uploads if kind == "waiting upload"]
        if name in {f"text {each}" for each in BY_PRODUCTS}:
            assert not [line for _, line in step.uploads if at(line, REFRESH)], "made on the host"
        assert not step.hosted, "XPU would do it on the host, without a word"
    assert outcome["steps"][0].waits.total() <= PER_REFRESH.get(optimizer, 0)
    assert_refreshes_wait_where_they_have_to(name, outcome)


def assert_refreshes_wait_where_they_have_to(name: str, outcome: Outcome) -> None:
    """Those in the step, and not in every step; none of those beside the steps."""
    with_refresh = [step for step in steady(outcome) if refreshes(step)]
    in_step = name.split()[-1] in cells.SECOND_ORDER and not name.startswith("beside")
    assert bool(with_refresh) == in_step
    assert len(with_refresh) < len(steady(outcome))


def test_the_table_of_waits(
    found: dict[str, Outcome], record_property: Callable[[str, object], None]
) -> None:
    """Printed at the end of the tests, and by `make rehearse`."""
    record_property(
        "table", table("plain", {name: ended(found, name) for name in NAMES if name in found})
    )


@each("cuda", [f"cuda {name}" for name in NAMES], [f"cuda {name}" for name in AS_CUDA])
def test_with_the_names_of_torch_cuda(
    found: dict[str, Outcome], as_cuda: dict[str, Outcome], cuda: str
) -> None:
    """There decompositions are the device's own; each reads whether it has succeeded."""
    name = cuda.removeprefix("cuda ")
    outcome = ended(as_cuda, name)
    for step in steady(outcome):
        assert all(at(line, ROOTS) for _, line in step.waits), step.waits
    assert_refreshes_wait_where_they_have_to(name, outcome)
    assert largest_difference(outcome, ended(found, f"{name} cpu")) < 1e-6


# Arithmetic ---------------------------------------------------------------------------------------


@each_here
def test_a_run_has_the_weights_of_the_cpu(found: dict[str, Outcome], name: str) -> None:
    """In FP32, with attention by the same operators."""
    one, other = ended(found, name), ended(found, f"{name} cpu")
    limit = BY_PRODUCTS.get(name.split()[-1], 1e-6)
    assert largest_difference(one, other) < limit
    assert one["lines"][-1]["loss"] == pytest.approx(other["lines"][-1]["loss"], abs=limit)


@pytest.mark.parametrize("name", [*ROWS])
def test_an_optimizer_has_the_weights_of_the_cpu_in_fp64(
    found: dict[str, Outcome], name: str
) -> None:
    assert found["steps"][name] < 1e-12
