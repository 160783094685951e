"""LARS and LAMB inside DeepSpeed ZeRO take the steps of one process on the whole batch."""

import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import pytest
import torch
from gloo_ranks import Outcome, launch, successful
from zero_ranks import work
from zero_refusals import REFUSALS, Refusal
from zero_training import (
    WORLD_SIZE,
    Cell,
    Network,
    control_cells,
    layer_names,
    more_cells,
    unbound_cells,
    zero_cells,
)

from largebatch.optim.zero import bind

needs_deepspeed = pytest.mark.skipif(
    find_spec("deepspeed") is None, reason="DeepSpeed is not installed"
)
LIMIT = 1e-6  # ‖w - ŵ‖ / ‖ŵ‖ of the FP32 weights of the worst tensor

# The others of `zero_cells` run in the parity matrix.
CELLS = [
    *(cell for cell in zero_cells() if (cell.dtype, cell.row) == ("fp32", "LARS")),
    *(cell for cell in zero_cells() if cell.row == "LAMB clip"),
    *more_cells(),
]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Sequence[Outcome]]:
    """What each rank has found, by cell or refusal. One launch of two ranks does them all."""
    jobs = [*CELLS, *control_cells(), *unbound_cells(), *REFUSALS]
    assert len({str(job) for job in jobs}) == len(jobs)
    of_ranks = launch(work, jobs, WORLD_SIZE, tmp_path_factory.mktemp("zero"))
    return {str(job): [found[str(job)] for found in of_ranks] for job in jobs}


@needs_deepspeed
@pytest.mark.parametrize("cell", [*CELLS, *control_cells()], ids=str)
def test_two_ranks_take_the_steps_of_one_process(
    cell: Cell, outcomes: dict[str, Sequence[Outcome]]
) -> None:
    for found in successful(outcomes[str(cell)]):
        assert found["difference"] <= LIMIT
        assert found["num_ulps"] <= 1


@needs_deepspeed
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_one_collective_a_flat_tensor(cell: Cell, outcomes: dict[str, Sequence[Outcome]]) -> None:
    expected = 1 if cell.stage else 0
    assert {found["num_collectives"] for found in successful(outcomes[str(cell)])} == {expected}


@needs_deepspeed
@pytest.mark.parametrize("cell", [cell for cell in CELLS if cell.stage], ids=str)
def test_layer_stats_are_of_layers_by_name(
    cell: Cell, outcomes: dict[str, Sequence[Outcome]]
) -> None:
    for found in successful(outcomes[str(cell)]):
        assert found["layers"]
        assert set(found["layers"]) <= layer_names(cell)


@needs_deepspeed
@pytest.mark.parametrize("cell", unbound_cells(), ids=str)
def test_without_bind_the_same_training_goes_wrong(
    cell: Cell, outcomes: dict[str, Sequence[Outcome]]
) -> None:
    for found in successful(outcomes[str(cell)]):
        assert found["difference"] > 0.1


@needs_deepspeed
@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_what_is_not_understood_is_refused_on_all_ranks(
    refusal: Refusal, outcomes: dict[str, Sequence[Outcome]]
) -> None:
    for found in successful(outcomes[str(refusal)]):
        assert re.search(refusal.says, found["refusal"])
        assert found["refusal"].count(". ") == 0  # one sentence


def test_bind_refuses_what_is_no_engine() -> None:
    model = Network()
    with pytest.raises(TypeError, match="got Network"):
        bind(model)
    with pytest.raises(
        TypeError, match="got SGD; an optimizer that is in neither needs no binding"
    ):
        bind(torch.optim.SGD(model.parameters(), lr=0.1))


def test_bind_imports_no_deepspeed() -> None:
    code = (
        "import sys, torch, largebatch.optim, largebatch.optim.zero as zero\n"
        "try: zero.bind(torch.nn.Linear(1, 1))\n"
        "except TypeError: pass\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'deepspeed'])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
