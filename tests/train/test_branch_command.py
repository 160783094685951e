"""`largebatch branch`: which batch sizes hold from a checkpoint on, where that can be computed."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from fixture_types import ReadRun, Train

from largebatch.study.nqm import BatchStage, Descent, Spectrum, loss_after
from largebatch.train.branch import command

LR, BATCH, STEPS_BEFORE, MULTIPLES = 0.1, 8, 100, (1, 2, 4, 8, 16)
TRUNK = (
    "task=nqm", "task.dimension=64", "optim=sgd", f"optim.lr={LR}", "optim.momentum=0",
    "optim.nesterov=false", f"batch.size={BATCH}", "target.loss=null", "seed=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def trunks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves the trunk that it makes to the others."""
    return tmp_path_factory.mktemp("trunks")


@pytest.fixture
def branch(monkeypatch: pytest.MonkeyPatch, train: Train, trunks: Path, tmp_path: Path) -> Train:
    """`largebatch branch` in this process, from a trunk of 100 steps in `trunk/`."""
    if not [*trunks.iterdir()]:
        words = (*TRUNK, f"budget.samples={BATCH * STEPS_BEFORE}", "checkpoint.every_samples=800")
        assert train(*words, f"hydra.run.dir={trunks / 'trunk'}") == 0
    shutil.copytree(trunks / "trunk", tmp_path / "trunk")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["largebatch"])
        return command.main([*arguments, "hydra/launcher=basic"])  # in this process

    return run


def expected_excess(multiple: int, other: int, window: int) -> float:
    """The expected loss over the last quarter of the window, less that of another multiple."""
    spectrum = Spectrum(np.arange(1, 65) ** -0.5)

    def mean(k: int) -> float:
        steps = window // (k * BATCH)
        first = steps - steps // 4
        stages = [
            BatchStage(batch_size=BATCH, steps=STEPS_BEFORE),
            BatchStage(batch_size=k * BATCH, lr_factor=k),
        ]
        losses = [
            loss_after(spectrum, Descent(), [LR], stages, STEPS_BEFORE + step)[0]
            for step in range(first, steps)  # each before its step, as a training loss is
        ]
        return float(np.mean(losses))

    return mean(multiple) - mean(other)


def test_the_largest_batch_that_holds_is_that_of_the_expected_losses(
    branch: Train, train: Train, read_run: ReadRun, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    window = 8 * 16 * BATCH
    capsys.readouterr()
    assert branch("trunk", "--multiples", "2,4,8,16,32", "--window", str(window * 2),
                  "--tolerance", "0.3", "--out", "out") == 0  # fmt: skip
    printed = capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "branches.csv").read_text().splitlines()))
    assert [int(row["multiple"]) for row in rows] == [1, 2, 4, 8, 16, 32]
    assert [float(row["lr"]) for row in rows] == pytest.approx(
        [LR * k for k in (1, 2, 4, 8, 16, 32)]
    )
    for row in rows[1:4]:
        other = int(row["over_batch"]) // BATCH
        expected = expected_excess(int(row["multiple"]), other, window * 2)
        assert float(row["over"]) == pytest.approx(expected, abs=0.15)
    # From k = 20 on the first mode is unstable: k lr h > 2.
    assert rows[-1]["holds"] == "false"
    holding = [row["holds"] == "true" for row in rows]
    critical = BATCH * (1, 2, 4, 8, 16, 32)[holding.index(False) - 1]
    assert f"critical batch size: {critical:,} holds" in printed
    assert {row["critical"] for row in rows} == {str(critical)}
    # The noise scale at the checkpoint: tr(H) over the squared norm of the gradient.
    assert "noise scale there:" in printed
    assert (tmp_path / "out" / "branches.png").stat().st_size > 5_000

    # k = 1 is the trunk, gone on with, to the bit.
    until = BATCH * STEPS_BEFORE + window * 2
    assert train(*TRUNK, f"budget.samples={until}", "hydra.run.dir=on") == 0
    whole, _ = read_run(tmp_path / "on")
    lines, _ = read_run(tmp_path / "out" / f"batch-{BATCH}")
    assert [(line["samples"], line["loss"], line["grad_norm"]) for line in lines] == [
        (line["samples"], line["loss"], line["grad_norm"]) for line in whole[STEPS_BEFORE:]
    ]

    # The same command finds what has ended.
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("summary.json")}
    assert branch("trunk", "--multiples", "2,4,8,16,32", "--window", str(window * 2),
                  "--tolerance", "1e9", "--no-noise", "--out", "out") == 0  # fmt: skip
    assert "noise scale: not measured" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["nowhere"], "has no checkpoints"),
        (["trunk", "--multiples", "0"], "--multiples must be whole numbers"),
        (["trunk", "--window", "100"], "is fewer than 8 steps of batch 256"),
        (["trunk", "--tolerance", "-1"], "--tolerance must be a number >= 0"),
    ],
)
def test_what_cannot_be_branched_is_refused_in_a_sentence(
    words: list[str], named: str, branch: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert branch(*words, "--out", "out") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert named in said
    assert not (tmp_path / "out").exists()


def change(trunk: Path, name: str, old: str, new: str) -> None:
    path = trunk / ".hydra" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_a_trunk_that_does_not_say_what_comes_next_is_refused(
    branch: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trunk = tmp_path / "trunk"
    change(trunk, "config.yaml", "schedules.Constant\n", "schedules.Cosine\n")
    assert branch("trunk") == 2
    assert "the schedule of lr=Cosine says nothing beyond" in capsys.readouterr().err
    change(trunk, "config.yaml", "schedules.Cosine\n", "schedules.Constant\n")
    change(trunk, "overrides.yaml", "- seed=3", "- seed=3\n- task._target_=strange.Task")
    assert branch("trunk") == 2
    assert "is code that its folder names" in capsys.readouterr().err
    (trunk / ".hydra" / "config.yaml").unlink()
    assert branch("trunk") == 2
    assert "config.yaml is not there" in capsys.readouterr().err
    (state,) = trunk.glob("checkpoints/*/state.json")
    state.write_text(json.dumps({"progress": math.pi}))
    assert branch("trunk") == 2
    assert "no checkpoint is whole" in capsys.readouterr().err


def test_a_batch_beyond_the_data_is_refused(
    branch: Train, train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("task=digits", "batch.size=64", "budget.samples=128", "checkpoint.every_samples=128")
    assert train(*words, "target.loss=null", "hydra.run.dir=digits") == 0
    assert branch("digits", "--multiples", "32") == 2
    said = capsys.readouterr().err
    assert "a batch of 2048 is more than the 1437 samples" in said
    assert "above 22" in said
