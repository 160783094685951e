"""A task of the user's own: what it lacks is said with the line to write, and an error in it shows
the user's own lines.
"""

import json
import os
from pathlib import Path

import pytest
from fixture_types import Train

RUN = ("task=custom", "model=digits_mlp", "batch.size=16", "budget.samples=48", "hydra.run.dir=run")


@pytest.mark.parametrize(
    ("target", "named"),
    [
        ("own_tasks.NoLoss", ["NoLoss", "method loss", "def loss(self, model, batch)"]),
        ("own_tasks.NoProvenance", ["NoProvenance", "def provenance(self)"]),
        ("own_tasks.OtherProvenance", ["data_hash", "{'source': 'noise'}"]),
        ("own_tasks.Empty", ["Empty.num_train", "at least 1", "got 0"]),
        ("own_tasks.HalfASample", ["HalfASample.num_eval", "0.5"]),
        ("own_tasks.NoTuple", ["NoTuple.train_batch", "tuple of tensors", "return images,"]),
        ("own_tasks.LossOfEach", ["LossOfEach.loss", "scalar", "(32,)", ".mean()"]),
        ("own_tasks.LossWithoutGradient", ["LossWithoutGradient.loss", "gradient", ".detach()"]),
        ("own_tasks.LossInPython", ["LossInPython.loss", "scalar", "float"]),
        ("own_tasks.SummedLoss", ["SummedLoss.loss", "sum", "mean"]),
        ("own_tasks.LossOfOutputs", ["LossOfOutputs.loss", "(model, batch)", "(outputs"]),
        ("own_tasks.Overcounted", ["Overcounted.num_train", "no sample 100", "there are 101"]),
        ("own_tasks.MetricOfEach", ["MetricOfEach.metrics", "accuracy", "scalars", "(32,)"]),
        ("own_tasks.MetricWithoutCount", ["MetricWithoutCount.metrics", "sum and a count"]),
        ("own_tasks.MetricByNoName", ["MetricByNoName.metrics", "'top 5'", "letters"]),
        ("own_tasks.MetricAlone", ["MetricAlone.metrics", "accuracy", "float"]),
        ("own_tasks.Righ", ["own_tasks has no Righ", "did you mean own_tasks.Right?"]),
        ("own_task.Right", ["no module own_task", "install it"]),
        ("Right", ["task._target_", "my_project.MyTask", "'Right'"]),
    ],
)
def test_a_task_that_is_none_is_refused_in_a_sentence(
    target: str, named: list[str], train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*RUN, f"task._target_={target}") == 2
    told = capsys.readouterr().err
    assert told.startswith("largebatch: ")
    assert told.count("\n") == 1
    assert all(word in told for word in named), told


def test_a_dotted_name_is_a_task_or_model_by_itself(train: Train, tmp_path: Path) -> None:
    words = ("task=own_tasks.Right", "model=torch.nn.Linear", "model.in_features=64",
             "model.out_features=10")  # fmt: skip
    assert train(*words, *RUN[2:]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["task"], summary["model"]) == ("own_tasks.Right", "torch.nn.Linear")
    assert summary["num_parameters"] == 650


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["task._target_=own_tasks.ErrorInLoss"], "cross_entropy(model(batch[0]), batch[7])"),
        (["task._target_=own_tasks.ErrorAtOnce"], "self.files = {}[folder]"),
    ],
)
def test_an_error_in_the_users_code_shows_their_lines(
    words: list[str],
    line: str,
    train: Train,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("LARGEBATCH_FULL_ERROR", "0")
    assert train(*RUN, *words) == 1
    told = capsys.readouterr().err
    assert line in told
    assert told.count("File ") == 1
    assert "Error executing job" not in told  # Hydra's, with words that nobody typed
    assert "own_tasks.py" in told
    assert "Error: " in told
    assert told.rstrip().endswith("HYDRA_FULL_ERROR=1")
    assert (tmp_path / "run" / "summary.json").exists() == ("ErrorInLoss" in words[0])
    if "ErrorInLoss" in words[0]:
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert (summary["status"], summary["error"]) == (
            "failed",
            "IndexError: tuple index out of range",
        )
    monkeypatch.setenv("LARGEBATCH_FULL_ERROR", "1")
    with pytest.raises(LookupError):
        train(*RUN[:-1], *words, "hydra.run.dir=again")


def test_a_command_leaves_the_environment_as_it_was(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LARGEBATCH_FULL_ERROR", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    before = dict(os.environ)
    assert train(*RUN, "task._target_=own_tasks.Huge") == 0
    assert dict(os.environ) == before


def test_a_trillion_samples_have_an_order_without_a_list(train: Train) -> None:
    assert train(*RUN, "task._target_=own_tasks.Huge") == 0


def test_an_order_without_a_list_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sample once an epoch, epochs and seeds unlike each other, however it is cut."""
    import numpy as np

    from largebatch.train.data import sampler

    monkeypatch.setattr(sampler, "MOST_LISTED", 10)
    order = sampler.Sampler(1000, 3, replacement=False)
    first, second = order.take(0, 1000), order.take(1000, 1000)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(1000))
    assert (first == second).mean() < 0.02
    assert (first == sampler.Sampler(1000, 4, replacement=False).take(0, 1000)).mean() < 0.02
    pieces = [order.take(start, count) for start, count in ((0, 7), (7, 1001), (1008, 992))]
    assert np.array_equal(np.concatenate(pieces), np.concatenate([first, second]))


def test_a_step_that_memory_is_not_enough_for_says_what_to_lower(
    train: Train, tmp_path: Path
) -> None:
    with pytest.raises(MemoryError, match=r"DEVICE_MEMORY.*lower engine.micro_batch_size, now 16"):
        train(*RUN, "task._target_=own_tasks.TooLarge", "target.loss=null")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "lower engine.micro_batch_size, now 16" in summary["error"]
