"""A run that branches from another's checkpoint: all that is taken over, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fixture_types import ReadRun, Train

TRUNK = (
    "task=nqm", "task.dimension=64", "optim=sgd", "optim.lr=0.1", "batch.size=8",
    "target.loss=null", "seed=3",
)  # fmt: skip
MEASURED = ("loss", "grad_norm", "eval_loss", "lr", "samples", "global_batch_size")


def trajectory(lines: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(line.get(name) for name in MEASURED) for line in lines]


@pytest.fixture
def trunk(train: Train, tmp_path: Path) -> Path:
    """A run of 50 steps at a constant rate, saved after 30 and at its end."""
    folder = tmp_path / "trunk"
    words = (*TRUNK, "budget.samples=400", "checkpoint.every_samples=240")
    assert train(*words, f"hydra.run.dir={folder}") == 0
    return folder


def test_a_branch_is_to_the_bit_the_whole_run_whose_decay_begins_there(
    train: Train, trunk: Path, read_run: ReadRun, tmp_path: Path
) -> None:
    # Stable until 400 of 500 samples, as lr.decay_fraction is 0.2.
    whole = (*TRUNK, "lr=wsd", "budget.samples=500", "optim.momentum=0.9")
    assert train(*whole, "hydra.run.dir=whole") == 0
    branch = (*whole, f"branch_from={trunk}", "hydra.run.dir=branch")
    assert train(*branch) == 0
    lines, summary = read_run(tmp_path / "branch")
    expected, undisturbed = read_run(tmp_path / "whole")
    assert lines[0]["samples"] == 408
    assert trajectory(lines) == trajectory(expected[-len(lines) :])
    assert summary["eval_loss"] == undisturbed["eval_loss"]
    assert (summary["samples"], summary["steps"]) == (504, 63)


def test_another_batch_size_begins_as_under_a_ramp(
    train: Train, trunk: Path, read_run: ReadRun, tmp_path: Path
) -> None:
    more = ("scaling=linear", "scaling.base_batch=8", "budget.samples=400")
    ramp = ("batch=stages", "batch.spec=0:8 240:32")
    assert train(*TRUNK[:-3], "target.loss=null", "seed=3", *ramp, *more) == 0
    checkpoint = trunk / "checkpoints" / "samples-000000000000240"
    words = (*TRUNK, *more, "batch.size=32", f"branch_from={checkpoint}", "noise.small=micro_batch",
             "engine.micro_batch_size=8", "hydra.run.dir=branch")  # fmt: skip
    assert train(*words) == 0
    lines, _ = read_run(tmp_path / "branch")
    (run,) = (tmp_path / "runs").iterdir()
    expected, _ = read_run(run)
    assert [line["lr"] for line in lines] == [0.4] * 5
    assert [line["samples"] for line in lines] == [272, 304, 336, 368, 400]
    # Micro-batches add up in another order.
    for line, whole in zip(lines, expected[-5:], strict=True):
        assert line["loss"] == pytest.approx(whole["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["branch_from=nowhere"], "has no checkpoints"),
        (["branch_from=trunk", "budget.samples=400"], "raise budget.samples above it"),
        (["branch_from=trunk", "optim.momentum=0.5"], "optim.momentum=0.9 (now 0.5)"),
        (["branch_from=trunk", "seed=4"], "seed=3 (now 4)"),
        (["branch_from=trunk", "task.power=1"], "task.power=0.5 (now 1"),
    ],
)
def test_what_no_branch_can_be_is_refused_before_a_folder_is_made(
    words: list[str], named: str, train: Train, trunk: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    capsys.readouterr()
    assert train(*TRUNK, "budget.samples=500", *words, "hydra.run.dir=branch") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    assert not (tmp_path / "branch").exists()


def test_a_broken_checkpoint_and_one_without_optimizer_state_are_named(
    train: Train, trunk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = trunk / "checkpoints" / "samples-000000000000400"
    words = (*TRUNK, "budget.samples=500")
    shutil.copytree(last, tmp_path / "samples-400")
    (tmp_path / "samples-400" / "state.json").write_text("{")
    assert train(*words, "branch_from=samples-400", "hydra.run.dir=branch") == 2
    assert "it is broken: state.json" in capsys.readouterr().err
    # Without its run a checkpoint's tensors say whether it fits: this one is of plain SGD.
    words_of_plain = (*TRUNK, "optim.momentum=0", "optim.nesterov=false", "budget.samples=400")
    assert train(*words_of_plain, "checkpoint.every_samples=400", "hydra.run.dir=plain") == 0
    (plain,) = (tmp_path / "plain" / "checkpoints").iterdir()
    shutil.copytree(plain, tmp_path / "samples-401")
    assert train(*words, "branch_from=samples-401", "hydra.run.dir=other") == 2
    assert "it has no optimizer.state.theta.momentum_buffer" in capsys.readouterr().err


def test_a_branch_that_was_cut_off_resumes_from_its_own_checkpoint(
    train: Train, trunk: Path, read_run: ReadRun, tmp_path: Path
) -> None:
    words = (*TRUNK, "budget.samples=800", f"branch_from={trunk}", "checkpoint.every_samples=80")
    assert train(*words, "hydra.run.dir=whole") == 0
    assert train(*words, "hydra.run.dir=branch", "checkpoint.keep=9") == 0
    folder = tmp_path / "branch"
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    for checkpoint in sorted((folder / "checkpoints").iterdir())[2:]:
        shutil.rmtree(checkpoint)
    assert train(*words, "hydra.run.dir=branch", "checkpoint.keep=9", "resume=auto") == 0
    lines, _ = read_run(folder)
    expected, _ = read_run(tmp_path / "whole")
    assert trajectory(lines) == trajectory(expected)
