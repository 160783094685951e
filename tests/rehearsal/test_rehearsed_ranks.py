"""Two ranks on the rehearsal's device, with checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import rehearsal_cells as cells
from rehearsal_runs import Outcome, Run, rehearse
from rehearsal_waits import MARKS, ended, largest_difference

pytestmark = MARKS

RUNS = cells.on_two_ranks()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


def on_two(run: Run, folder: Path) -> list[Outcome]:
    return [ended(found, run.name) for found in rehearse([run], folder, world_size=2)]


# Each engine, each mode, and each optimizer at least once; make matrix has the rest.
HERE = ("ddp kfac", "fsdp lamb", "fsdp shampoo")
MORE = pytest.mark.matrix


@pytest.mark.parametrize(
    "run",
    [pytest.param(run, marks=() if run.name in HERE else MORE, id=run.name) for run in RUNS],
)
def test_two_ranks_reduce_by_sums_and_go_on_from_a_checkpoint(folder: Path, run: Run) -> None:
    """Averaging is refused, as by oneCCL 2021.17; what lies on the CPU is refused too."""
    ours = on_two(run, folder)
    if run.name.startswith("ddp"):
        assert largest_difference(*ours) == 0
    assert not any(step.hosted for outcome in ours for step in outcome["steps"])
    resumed = on_two(replace(run, name=f"{run.name} resumed", folder=run.name), folder)
    for whole, again in zip(ours, resumed, strict=True):
        assert len(again["steps"]) == len(whole["steps"]) // 2 + 1
        assert largest_difference(whole, again) == 0
