"""A run that was killed goes on as if it had not been: same order, batch sizes, rates, losses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest

Train = Callable[..., int]
Command = Callable[..., "subprocess.CompletedProcess[str]"]
Lines = list[dict[str, Any]]

RAMPED = (
    "task=bytes", "optim=lamb", "optim.lr=0.02", "scaling=adam_sde", "scaling.base_batch=256",
    "batch=stages", "batch.spec=0:64 3000:128 9000:256", "noise.small=auto", "lr=cosine",
    "lr.warmup_samples=1000", "target.loss=null", "budget.samples=30000", "evaluation.growth=1.5",
    "checkpoint.every_samples=1500", "resume=auto",
)  # fmt: skip

EXACT = ("step", "samples", "lr", "global_batch_size", "batch_change")


def read_lines(folder: Path) -> Lines:
    """The whole lines of a run that may still be writing."""
    path = folder / "metrics.jsonl"
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]


def count_lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def killed_after(num_lines: int, folder: Path, *overrides: str) -> int:
    """Start the run in `folder` and kill it once it has so many lines; returns how many it has."""
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *overrides, f"hydra.run.dir={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while count_lines(folder) < num_lines:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return count_lines(folder)


def trajectory(lines: Lines) -> Lines:
    """The lines without what a clock has measured."""
    clock = {"seconds", "samples_per_second", "tokens_per_second", "tflops_per_device", "mfu"}
    return [{key: line[key] for key in line.keys() - clock} for line in lines]


def largest_difference(one: Lines, other: Lines, field: str) -> float:
    pairs = [(a[field], b[field]) for a, b in zip(one, other, strict=True) if field in a]
    assert pairs
    return max(abs(a - b) / abs(a) for a, b in pairs)


def test_a_ramped_run_that_is_killed_again_and_again_in_other_worlds_is_the_undisturbed_one(
    train: Train, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    alone = "engine.micro_batch_size=32"
    before = killed_after(30, folder, *RAMPED, alone)
    middle = killed_after(110, folder, *RAMPED, "engine.nproc=2", "engine.micro_batch_size=32")
    assert before < middle < 200
    assert train(*RAMPED, "engine.micro_batch_size=64", f"hydra.run.dir={folder}") == 0
    assert train(*RAMPED, alone, "hydra.run.dir=undisturbed") == 0
    one, other = read_lines(tmp_path / "undisturbed"), read_lines(folder)
    assert len({line["data_parallel_size"] for line in other}) == 2
    assert [[line.get(key) for key in EXACT] for line in other] == [
        [line.get(key) for key in EXACT] for line in one
    ]
    assert largest_difference(one, other, "loss") < 1e-5
    assert largest_difference(one, other, "eval_loss") < 1e-5
    resumed = sorted(path.name for path in (folder / ".hydra").glob("resumed-*-overrides.yaml"))
    assert len(resumed) == 2


def test_what_a_ramp_has_decided_and_the_noise_scale_go_on(train: Train, tmp_path: Path) -> None:
    words = (
        "task=digits", "optim=sgd", "batch=loss_triggered", "batch.start=32",
        "batch.spec=2:64 1:128 0.5:256", "scaling=linear", "scaling.base_batch=32", "optim.lr=0.2",
        "noise.small=example", "target.loss=0.3", "budget.samples=4e4", "resume=auto",
        "checkpoint.every_samples=300", "checkpoint.keep=100", "evaluation.growth=1.2",
    )  # fmt: skip
    assert train(*words, "hydra.run.dir=whole") == 0
    whole = read_lines(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole" / "checkpoints").iterdir())
    assert len(checkpoints) > 8
    for checkpoint in checkpoints[:: len(checkpoints) // 4]:
        # As SIGKILL would have left the folder right after this checkpoint.
        folder = tmp_path / f"from-{checkpoint.name}"
        (folder / "checkpoints").mkdir(parents=True)
        checkpoint_copy = folder / "checkpoints" / checkpoint.name
        subprocess.run(["cp", "-r", str(checkpoint), str(checkpoint_copy)], check=True)
        for name in (".hydra", "metrics.jsonl"):
            subprocess.run(["cp", "-r", str(tmp_path / "whole" / name), str(folder)], check=True)
        assert train(*words, f"hydra.run.dir={folder}") == 0
        assert trajectory(read_lines(folder)) == trajectory(whole)


DROPOUT = """
from torch import nn
class Model(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.5), nn.Linear(32, 10))
"""


def test_random_numbers_of_a_step_are_those_of_the_undisturbed_run(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "dropping.py").write_text(DROPOUT)
    words = (
        "task=digits", "model=custom", "model._target_=dropping.Model", "optim=sgd",
        "target.loss=null", "batch.size=64", "evaluation.growth=100", "budget.samples=1280",
        "checkpoint.every_samples=640", "resume=auto",
    )  # fmt: skip
    assert train(*words, "hydra.run.dir=whole") == 0
    (tmp_path / "whole" / "summary.json").unlink()  # as if killed at its end
    last = sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1]
    subprocess.run(["rm", "-r", str(last)], check=True)
    before = [line["loss"] for line in read_lines(tmp_path / "whole")]
    assert train(*words, "hydra.run.dir=whole") == 0
    assert [line["loss"] for line in read_lines(tmp_path / "whole")] == before


TIED_BY_HAND = """
from torch import nn, tanh
from torch.nn.functional import linear
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 10)
    def forward(self, x):
        return self.last(tanh(linear(tanh(self.first(x)), self.first.weight)))
"""


@pytest.mark.filterwarnings("ignore:KFAC")
def test_kfac_goes_on_where_a_pass_has_told_it_of_a_weight_tied_by_hand(
    train: Train, tmp_path: Path
) -> None:
    """Before its first pass an optimizer would have that weight's factors read too."""
    (tmp_path / "tied.py").write_text(TIED_BY_HAND)
    words = (
        "task=digits", "model=custom", "model._target_=tied.Model", "optim=kfac",
        "target.loss=null", "batch.size=64", "evaluation.growth=100", "budget.samples=1280",
        "checkpoint.every_samples=640", "resume=auto",
    )  # fmt: skip
    assert train(*words, "hydra.run.dir=whole") == 0
    (tmp_path / "whole" / "summary.json").unlink()  # as if killed at its end
    shutil.rmtree(sorted((tmp_path / "whole" / "checkpoints").iterdir())[-1])
    before = [line["loss"] for line in read_lines(tmp_path / "whole")]
    assert train(*words, "hydra.run.dir=whole") == 0
    assert [line["loss"] for line in read_lines(tmp_path / "whole")] == before


SMALL = (
    "task=digits", "optim=sgd", "batch.size=64", "target.loss=null", "budget.samples=1280",
    "evaluation.growth=100", "hydra.run.dir=run",
)  # fmt: skip


def test_without_a_checkpoint_a_run_begins_again(train: Train, tmp_path: Path) -> None:
    assert train(*SMALL, "resume=auto") == 0
    lines = read_lines(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "samp')  # killed while it wrote
    assert train(*SMALL, "resume=auto") == 0
    again = read_lines(tmp_path / "run")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_a_half_written_checkpoint_is_not_there(train: Train, tmp_path: Path) -> None:
    saving = (*SMALL, "checkpoint.every_samples=320", "resume=auto", "checkpoint.keep=9")
    assert train(*saving) == 0
    lines = read_lines(tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    *_, before, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    last.rename(last.with_name(f".{last.name}"))
    assert train(*saving) == 0
    again = read_lines(tmp_path / "run")
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert {before.name, last.name} <= set(names)
    assert not [name for name in names if name.startswith(".")]


def test_only_the_last_checkpoints_are_kept(train: Train, tmp_path: Path) -> None:
    assert train(*SMALL, "checkpoint.every_samples=128", "checkpoint.keep=3") == 0
    names = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert names == [f"samples-{samples:015d}" for samples in (1024, 1152, 1280)]


def test_an_interrupted_run_saves_and_goes_on(tmp_path: Path, command: Command) -> None:
    words = (
        "task=bytes", "optim=sgd", "target.loss=null", "budget.samples=60000", "batch.size=64",
        "evaluation.growth=2", "checkpoint.every_samples=1e6", "resume=auto",
    )  # fmt: skip
    folder = tmp_path / "run"
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *words, f"hydra.run.dir={folder}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while count_lines(folder) < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 143
    assert "/run resume=auto resumes from here" in errors
    seen = json.loads((folder / "summary.json").read_text())["samples"]
    assert [path.name for path in (folder / "checkpoints").iterdir()] == [f"samples-{seen:015d}"]
    done = command("train", *words, f"hydra.run.dir={folder}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["samples"]) == ("exhausted", 60032)
    steps = [line["step"] for line in read_lines(folder)]
    assert steps == list(range(1, 939))


def test_a_run_killed_before_it_could_say_that_it_had_ended_ends_again(
    train: Train, tmp_path: Path
) -> None:
    words = (*SMALL, "target.loss=0.9", "optim.lr=0.3", "evaluation.growth=1",
             "checkpoint.every_samples=1e6", "resume=auto")  # fmt: skip
    assert train(*words) == 0
    path = tmp_path / "run" / "summary.json"
    before = json.loads(path.read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    path.unlink()
    (tmp_path / "run" / "checkpoints" / ".samples-000000000000001").mkdir()  # half deleted
    assert train(*words) == 0
    after = json.loads(path.read_text())
    for key in ("status", "steps_to_target", "samples_to_target", "steps", "samples", "eval_loss"):
        assert after[key] == before[key]
    assert after["status"] == "reached"
    assert after["seconds"] >= json.loads(lines.splitlines()[-1])["seconds"]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_a_run_killed_before_its_configuration_was_written_begins(
    train: Train, tmp_path: Path
) -> None:
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").touch()
    assert train(*SMALL, "resume=auto") == 0
    assert len(read_lines(tmp_path / "run")) == 20
    assert (tmp_path / "run" / ".hydra" / "config.yaml").exists()


SIGNALLING = """
import os, signal
from largebatch.train.data.sampler import Sampler
from largebatch.train.tasks.digits import Digits
class Task(Digits):
    _left = 0
    def sampler(self, seed):  # asked for when the run begins: what is tried before does not count
        self._left = int(os.environ.pop("SIGNAL_AT", "0"))
        return Sampler(self.num_train, seed, self.replacement)
    def train_batch(self, indices):
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().train_batch(indices)
"""


@pytest.mark.parametrize("stop", [1, 7, 19])
def test_an_interruption_leaves_no_boundary_out(
    stop: int, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every step is a boundary here, at which the ramp decides."""
    (tmp_path / "signalling.py").write_text(SIGNALLING)
    words = (
        "task=custom", "task._target_=signalling.Task", "model=digits_mlp", "optim=sgd",
        "optim.lr=0.2", "batch=loss_triggered", "batch.start=32", "batch.spec=2.2:64 1.6:128",
        "evaluation.growth=1", "target.loss=null", "budget.samples=1500", "resume=auto",
        "checkpoint.every_samples=1e6",
    )  # fmt: skip
    assert train(*words, "hydra.run.dir=whole") == 0
    monkeypatch.setenv("SIGNAL_AT", str(stop))
    assert train(*words, "hydra.run.dir=run") == 143
    assert train(*words, "hydra.run.dir=run") == 0
    whole, again = read_lines(tmp_path / "whole"), read_lines(tmp_path / "run")
    assert {line["global_batch_size"] for line in whole} == {32, 64, 128}
    assert trajectory(again) == trajectory(whole)


def test_a_sweep_that_goes_on_passes_by_what_has_ended(command: Command, tmp_path: Path) -> None:
    words = ("task=digits", "optim=sgd", "batch.size=64,128", "target.loss=null", "resume=auto",
             "budget.samples=1280", "evaluation.growth=100", "hydra.sweep.dir=many",
             "hydra.launcher.n_jobs=1")  # fmt: skip
    assert command("sweep", *words).returncode == 0
    one, other = (tmp_path / "many" / name / "summary.json" for name in "01")
    kept = one.read_bytes()
    other.unlink()
    done = command("sweep", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert one.read_bytes() == kept
    assert json.loads(other.read_text())["status"] == "exhausted"


def test_a_run_that_fails_says_how_far_it_came(train: Train, tmp_path: Path) -> None:
    broken = SIGNALLING.replace("os.kill(os.getpid(), signal.SIGTERM)", "raise OSError('gone')")
    (tmp_path / "breaking.py").write_text(broken)
    os.environ["SIGNAL_AT"] = "5"
    words = ("task=custom", "task._target_=breaking.Task", "model=digits_mlp", "optim=sgd",
             "batch.size=64", "hydra.run.dir=run")  # fmt: skip
    with pytest.raises(OSError, match="gone"):
        train(*words)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["steps"], summary["samples"]) == ("failed", 4, 256)
    assert summary["error"] == "OSError: gone"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "holds a run that has ended (exhausted): there is nothing to resume"),
        (("optim.lr=0.5",), "was made with optim.lr=0.16 (now 0.5): resume it with the same"),
        (("resume=now",), "which continues the run in hydra.run.dir, got 'now'"),
        (("checkpoint.every_samples=0",), "checkpoint.every_samples must be a whole number of at"),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    words: tuple[str, ...], sentence: str, train: Train, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert train(*SMALL, "optim.lr=0.16") == 0
    if words:
        (tmp_path / "run" / "summary.json").unlink()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train(*SMALL, "optim.lr=0.16", "resume=auto", *words) == 2
    assert sentence in capsys.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_second_process_in_a_runs_folder_is_refused(
    train: Train, command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("task=digits", "optim=sgd", "target.loss=null", "budget.samples=1e9", "resume=auto")
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *words, f"hydra.run.dir={tmp_path / 'run'}"],
        stdout=subprocess.DEVNULL,
    )
    try:
        while count_lines(tmp_path / "run") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        assert train(*words, "hydra.run.dir=run") == 2
        assert "another process is at work on the run in" in capsys.readouterr().err
        ranks = command("train", *words, "engine.nproc=2", "hydra.run.dir=run")
        assert ranks.returncode == 2
        assert len(ranks.stderr.splitlines()) == 1  # the other rank goes without a word
        begin = len(read_lines(tmp_path / "run"))
        time.sleep(0.2)
        assert len(read_lines(tmp_path / "run")) > begin
    finally:
        process.kill()
        process.wait()
