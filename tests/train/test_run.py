"""One run: its record, its end, and what it does on the way."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

Train = Callable[..., int]
ReadRun = Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]]

DIGITS = ("task=digits", "optim=sgd", "batch.size=64")
SHORT = (*DIGITS, "budget.samples=640", "target.loss=null")


def test_a_run_leaves_its_configuration_lines_and_summary(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(*DIGITS, "hydra.run.dir=run", "seed=3") == 0
    lines, summary = read_run(tmp_path / "run")
    assert sorted(p.name for p in (tmp_path / "run" / ".hydra").iterdir()) == [
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    ]
    assert summary["status"] == "reached"
    assert summary["eval_loss"] <= summary["target_loss"] == 0.1
    assert summary["steps_to_target"] == summary["steps"] == len(lines) == lines[-1]["step"]
    assert summary["samples_to_target"] == 64 * summary["steps"] == lines[-1]["samples"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]["eval_loss"] == summary["eval_loss"]
    assert all(line["eval_loss"] > 0.1 for line in lines[:-1] if "eval_loss" in line)
    assert {line["lr"] for line in lines} == {0.45}
    assert summary["seed"] == 3
    versions = summary["provenance"]["versions"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(summary["provenance"]["data_hash"]) == 64
    ask = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(ask, capture_output=True, text=True).stdout.strip()
    commit = summary["provenance"]["git_commit"] or ""
    assert commit.removesuffix("+changes") == head  # both empty outside of a checkout


def test_the_loss_is_the_mean_over_the_global_batch_before_the_update(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    import torch

    from largebatch.train.data.sampler import Sampler
    from largebatch.train.models import MLP
    from largebatch.train.tasks.digits import Digits

    assert train(*SHORT, "hydra.run.dir=run", "engine.micro_batch_size=16") == 0
    lines, _ = read_run(tmp_path / "run")
    task = Digits()
    torch.manual_seed(0)
    model = MLP(64, 64, 10)
    batch = task.train_batch(Sampler(task.num_train, 0, False).take(0, 64))
    loss = task.loss(model, batch)
    torch.autograd.backward(loss)
    norm = math.sqrt(
        sum(float((p.grad**2).sum()) for p in model.parameters() if p.grad is not None)
    )
    assert lines[0]["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert lines[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert lines[0]["gradient_accumulation_steps"] == 4


def test_micro_batches_do_not_change_the_trajectory(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    losses = []
    for size in (64, 16, 1):
        words = (f"hydra.run.dir=micro{size}", f"engine.micro_batch_size={size}")
        assert train(*SHORT, "budget.samples=256", *words) == 0
        losses.append([line["loss"] for line in read_run(tmp_path / f"micro{size}")[0]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_evaluations_stand_on_the_geometric_grid(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    train(*DIGITS, "target.loss=null", "budget.samples=3200", "evaluation.growth=1.5",
          "hydra.run.dir=run")  # fmt: skip
    lines, summary = read_run(tmp_path / "run")
    assert 0 < summary["evaluation_seconds"] < summary["seconds"]
    assert 0 < summary["record_seconds"] < summary["seconds"]
    evaluated = [line["step"] for line in lines if "eval_loss" in line]
    assert evaluated == [1, 2, 3, 5, 8, 12, 18, 27, 41, 50]  # and the last step


def test_an_evaluation_is_the_same_in_smaller_and_larger_pieces(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    losses = []
    for size in ("null", "100", "4096"):  # 1,437 samples: the last piece is a smaller one
        train(*SHORT, f"evaluation.micro_batch_size={size}", f"hydra.run.dir=in-{size}")
        lines, _ = read_run(tmp_path / f"in-{size}")
        losses.append([line["eval_loss"] for line in lines if "eval_loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)


def test_record_every_thins_the_lines_but_keeps_evaluations(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    train(*DIGITS, "target.loss=null", "budget.samples=1280", "evaluation.growth=3",
          "record.every=4", "hydra.run.dir=run")  # fmt: skip
    lines, _ = read_run(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 3, 4, 8, 9, 12, 16, 20]


def test_a_ramp_takes_each_sample_once_and_the_plan_its_lr(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    train("task=digits", "optim=lamb", "batch=rampup", "batch.start=16", "batch.increment=16",
          "batch.ramp_samples=320", "batch.size=64", "scaling=sqrt", "scaling.base_batch=64",
          "optim.lr=0.02", "lr=cosine", "lr.warmup_samples=128", "target.loss=null",
          "budget.samples=1024", "hydra.run.dir=run")  # fmt: skip
    lines, summary = read_run(tmp_path / "run")
    seen = 0
    for line in lines:
        assert line["samples"] == seen + line["global_batch_size"]
        seen = line["samples"]
    sizes = [line["global_batch_size"] for line in lines]
    assert sizes[:7] == [16] * 7
    assert set(sizes) == {16, 32, 48, 64}
    assert lines[0]["lr"] == pytest.approx(0.02 * 0.5 * 16 / 128)  # √(16/64), an eighth of the way
    assert summary["lr"] == 0.02
    assert summary["samples"] == seen >= 1024 > seen - 64


def test_the_budget_ends_a_run_that_misses_its_target(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(*DIGITS, "budget.samples=100", "hydra.run.dir=run") == 3
    _, summary = read_run(tmp_path / "run")
    assert (summary["status"], summary["samples"]) == ("exhausted", 128)
    assert summary["steps_to_target"] is None


def test_giving_up_ends_a_run_without_changing_its_schedule(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    overrides = (*DIGITS, "lr=cosine", "budget.samples=1280")
    train(*overrides, "hydra.run.dir=whole")
    assert train(*overrides, "target.give_up_samples=320", "hydra.run.dir=part") == 3
    whole, part = (read_run(tmp_path / name) for name in ("whole", "part"))
    assert (part[1]["status"], part[1]["steps"]) == ("exhausted", 5)
    assert [line["loss"] for line in part[0]] == [line["loss"] for line in whole[0][:5]]


def test_a_rerun_of_the_same_folder_is_refused_and_changes_nothing(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(*SHORT, "hydra.run.dir=run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert train(*SHORT, "hydra.run.dir=run", "seed=1") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before


def test_a_non_finite_loss_ends_the_run_as_diverged(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(*DIGITS, "optim.lr=1e30", "hydra.run.dir=run") == 4
    lines, summary = read_run(tmp_path / "run")
    assert summary["status"] == "diverged"
    assert len(lines) == summary["steps"] < 10
    assert (
        lines[-1]["loss"] is None
        or lines[-1]["grad_norm"] is None
        or lines[-1]["eval_loss"] is None
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_between_two_steps(
    number: signal.Signals, read_run: ReadRun, tmp_path: Path
) -> None:
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *DIGITS, "target.loss=null",
         "budget.samples=1e9", "hydra.run.dir=run"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_for_lines(tmp_path / "run" / "metrics.jsonl", 20)
        process.send_signal(number)
        _, errors = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in errors
    assert "no weights were saved; a run with checkpoint.every_samples=1e6" in errors
    lines, summary = read_run(tmp_path / "run")
    assert summary["status"] == "interrupted"
    assert lines[-1]["step"] == summary["steps"]


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    from largebatch.train.tasks.digits import Digits

    images, labels = load_digits(return_X_y=True)
    task = Digits()
    taken = task.train_batch(np.arange(task.num_train))
    rows = {(row.tobytes(), int(label)) for row, label in zip(images / 16, labels, strict=True)}
    assert task.num_train == 1437
    assert all(
        (row.double().numpy().tobytes(), int(label)) in rows
        for row, label in zip(*taken, strict=True)
    )


def test_a_kill_leaves_every_recorded_line_whole_and_no_summary(tmp_path: Path) -> None:
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *DIGITS, "target.loss=null",
         "budget.samples=1e9", "hydra.run.dir=run"],
        cwd=tmp_path,
    )  # fmt: skip
    path = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_for_lines(path, 20)
    finally:
        process.kill()
        process.wait()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert not (tmp_path / "run" / "summary.json").exists()


def test_an_error_in_a_users_task_is_recorded_and_shown_whole(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    (tmp_path / "broken_task.py").write_text(
        "from largebatch.train.tasks.digits import Digits\n"
        "class Broken(Digits):\n"
        "    calls = 0\n"
        "    def loss(self, model, batch):\n"
        "        self.calls += 1\n"
        "        if self.calls < 4:  # the first is a trial before the run's folder is made\n"
        "            return super().loss(model, batch)\n"
        "        raise KeyError('a bug of the user')\n"
    )
    with pytest.raises(KeyError, match="a bug of the user"):
        train("task=custom", "task._target_=broken_task.Broken", "model=digits_mlp",
              "hydra.run.dir=run")  # fmt: skip
    _, summary = read_run(tmp_path / "run")
    assert summary["status"] == "failed"
    assert "a bug of the user" in summary["error"]


def test_a_users_own_task_and_model_plug_in_from_outside_the_checkout(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    (tmp_path / "my_project.py").write_text(
        "import torch\n"
        "class Line:\n"
        "    num_train, num_eval, replacement = 512, 64, True\n"
        "    def __init__(self, slope):\n"
        "        self.slope = slope\n"
        "    def train_batch(self, indices):\n"
        "        x = torch.from_numpy(indices).float().unsqueeze(1) / 512\n"
        "        return x, self.slope * x\n"
        "    eval_batch = train_batch\n"
        "    def loss(self, model, batch):\n"
        "        x, y = batch\n"
        "        return ((model(x) - y) ** 2).mean()\n"
        "    def provenance(self):\n"
        "        return {'data': 'a line', 'data_hash': str(self.slope)}\n"
        "class Affine(torch.nn.Linear):\n"
        "    def __init__(self):\n"
        "        super().__init__(1, 1)\n"
    )
    code = train("task=custom", "task._target_=my_project.Line", "+task.slope=2.0",
                 "model=custom", "model._target_=my_project.Affine", "optim=sgd", "batch.size=32",
                 "optim.lr=0.2", "target.loss=1e-3", "hydra.run.dir=run")  # fmt: skip
    _, summary = read_run(tmp_path / "run")
    assert (code, summary["status"]) == (0, "reached")
    assert summary["provenance"]["data_hash"] == "2.0"
    assert summary["num_parameters"] == 2


def wait_for_lines(path: Path, count: int) -> None:
    until = time.monotonic() + 600
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < until, f"{path} did not come to {count} lines"
        time.sleep(0.05)


def test_exit_codes_say_how_a_run_ended() -> None:
    from largebatch.train.command import exit_code

    def code(status: str, target: float | None = 1.0, **more: int) -> int:
        return exit_code({"status": status, "target_loss": target, **more})

    assert [code("reached"), code("exhausted", None), code("exhausted")] == [0, 0, 3]
    assert [code("diverged"), code("failed")] == [4, 1]
    assert code("interrupted", signal=int(signal.SIGTERM)) == 143
    assert os.WEXITSTATUS(code("interrupted") << 8) == 130
