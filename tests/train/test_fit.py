"""Training from Python: the run of the command line, and nothing left behind."""

import doctest
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from fixture_types import ReadRun, Train
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from own_tasks import ErrorInLoss, LossOfEach, Right, Sorted
from torch import nn

from largebatch.common.errors import ConfigError
from largebatch.distributed.ranks import free_port
from largebatch.train import fit
from largebatch.train.models import MLP
from largebatch.train.tasks.digits import Digits

DIGITS: dict[str, Any] = {"batch_size": 128, "samples": 1280, "lr": 0.01, "progress": False}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MLP(64, 64, 10)


def test_it_is_the_run_of_the_command_line(train: Train, read_run: ReadRun, tmp_path: Path) -> None:
    words = ("task=digits", "optim=lamb", "optim.lr=0.01", "lr=cosine", "batch.size=128")
    assert train(*words, "target.loss=null", "budget.samples=1280", "hydra.run.dir=told") == 0
    told, summary = read_run(tmp_path / "told")
    mine = model(summary["seed"])
    result = fit(
        mine, Digits(), optimizer="lamb", overrides=["lr=cosine", "noise.small=micro_batch",
        "engine.micro_batch_size=64"], folder="mine", **DIGITS,
    )  # fmt: skip
    lines, own = read_run(tmp_path / "mine")
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in told])
    assert lines[0]["loss"] == told[0]["loss"]
    assert result.model is mine
    assert (result.folder, result.steps, result.samples) == (tmp_path / "mine", 10, 1280)
    assert (result.status, result.reached, result.steps_to_target) == ("exhausted", False, None)
    assert (result.loss, result.eval_loss) == (lines[-1]["loss"], lines[-1]["eval_loss"])
    assert result.metrics == own["metrics"]
    assert (own["task"], own["model"]) == (
        "largebatch.train.tasks.digits.Digits", "largebatch.train.models.mlp.MLP",
    )  # fmt: skip
    task = Digits()
    with torch.no_grad():
        assert float(task.loss(mine, (task._images, task._labels))) == pytest.approx(
            result.eval_loss, rel=1e-6
        )
    assert not any(param._backward_hooks for param in mine.parameters())
    assert (tmp_path / "mine" / ".hydra" / "overrides.yaml").exists()


def test_it_leaves_nothing_behind(tmp_path: Path) -> None:
    variables, path, threads = dict(os.environ), list(sys.path), torch.get_num_threads()
    with initialize_config_module("largebatch.conf", version_base="1.2", job_name="theirs"):
        around, settings = GlobalHydra.instance(), HydraConfig.instance().cfg
        kept = around.hydra
        first = fit(MLP(64, 8, 10), "digits", optimizer="sgd", target=1.0, progress=False)
        again = fit(first.model, "digits", target={"accuracy": 0.9}, progress=False)
        assert (GlobalHydra.instance(), around.hydra) == (around, kept)
        assert HydraConfig.instance().cfg is settings
    assert (first.reached, again.reached) == (True, True)
    assert first.summary["optimizer"] == "sgd"
    assert again.metrics["accuracy"] >= 0.9
    assert again.steps_to_target == again.steps
    assert first.folder.parent == again.folder.parent == tmp_path / "runs"
    assert first.folder != again.folder
    assert (dict(os.environ), sys.path) == (variables, path)
    assert torch.get_num_threads() == threads
    assert not torch.distributed.is_initialized()


def test_random_numbers_are_the_callers(tmp_path: Path) -> None:
    start = MLP(64, 8, 10)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    fit(start, Right(), batch_size=16, samples=32, progress=False)
    assert torch.rand(1) == expected


def test_its_example_is_true() -> None:
    found = doctest.testmod(importlib.import_module("largebatch.train.api.fit"))
    assert (found.attempted, found.failed) == (5, 0)


def test_an_average_is_what_the_model_is_left_with() -> None:
    task, mine = Digits(), model()
    result = fit(mine, task, overrides=["average=ema", "average.decay=0.9"], **DIGITS)
    with torch.no_grad():
        loss = float(task.loss(mine, (task._images, task._labels)))
    assert loss == pytest.approx(result.eval_loss, rel=1e-6)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ({"model": object()}, ["model must be a torch.nn.Module"]),
        ({"task": Digits}, ["write Digits(…)"]),
        ({"task": LossOfEach()}, ["LossOfEach.loss", "scalar"]),
        ({"task": "digit"}, ["task must be one of", "'digit'"]),
        ({"optimizer": "lion"}, ["optim must be one of", "'lion'"]),
        ({"target": {"shine": 1.0}}, ["target.direction"]),
        ({"target": {"recall": 1.0}}, ["target.metric=recall", "accuracy"]),
        ({"target": "0.1"}, ["target must be a loss"]),
        ({"batch_size": 0}, ["batch.size"]),
        ({"overrides": ["optim.lrr=1"]}, ["did you mean optim.lr?"]),
        ({"overrides": ["engine.nproc=2"]}, ["torchrun"]),
        ({"overrides": ["study=digits"]}, ["largebatch sweep"]),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_no_folder(
    words: dict[str, Any], named: list[str], tmp_path: Path
) -> None:
    given = {"model": MLP(64, 8, 10), "task": "digits"} | words
    with pytest.raises(ConfigError) as refusal:
        fit(given.pop("model"), given.pop("task"), progress=False, **given)
    assert all(word in str(refusal.value) for word in named), refusal.value
    assert "\n" not in str(refusal.value)
    assert not [*tmp_path.iterdir()]


def test_an_error_of_the_users_own_is_their_error(tmp_path: Path) -> None:
    with pytest.raises(IndexError):
        fit(MLP(64, 8, 10), ErrorInLoss(), batch_size=16, samples=96, folder="run", progress=False)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_process_group_of_the_callers_is_not_taken_over() -> None:
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        with pytest.raises(ConfigError, match="destroy_process_group"):
            fit(MLP(64, 8, 10), "digits")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_ranks_train_as_one_and_twice(engine: str, tmp_path: Path) -> None:
    """Each rank begins with weights of its own: rank 0's are taken."""
    alone = fit(
        _linear(), Sorted(), optimizer="lamb", batch_size=16, samples=64, lr=0.01, folder="alone",
        progress=False,
    )  # fmt: skip
    script = Path(__file__).parent / "fit_ranks.py"
    port, ranks = str(free_port()), []
    for rank in ("0", "1"):
        variables = {
            "RANK": rank,
            "LOCAL_RANK": rank,
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(script.parent), *filter(None, sys.path)]),
        }
        ranks.append(
            forked.Popen(
                [sys.executable, str(script), f"engine={engine}"], cwd=tmp_path,
                env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                text=True,
            )
        )  # fmt: skip
    told = [rank.communicate(timeout=600) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    said = [line.split() for output, _ in told for line in output.splitlines()]
    lines = [words for words in said if words[0] != "[Gloo]"]  # which torch 2.10 writes there
    assert len(lines) == 4
    for steps, loss, accuracy, total in lines:
        assert int(steps) == alone.steps
        assert float(loss) == pytest.approx(alone.eval_loss, rel=1e-6)
        assert float(accuracy) == alone.metrics["accuracy"]
        expected = float(sum(p.double().sum() for p in alone.model.parameters()).detach())
        if engine == "ddp":  # else it is of a shard
            assert float(total) == pytest.approx(expected, rel=1e-4)
    for turn in range(2):
        summary = json.loads((tmp_path / f"run-{turn}" / "summary.json").read_text())
        assert summary["data_parallel_size"] == 2


def _linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(64, 10)
