"""What whole runs do about numbers that go wrong: skip the step, go back, or stop."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fixture_types import ReadRun, Train

# 1,437 images in 22 whole batches an epoch.
RUN = (
    "task=custom", "task._target_=guarded_tasks.Spoiled", "model=digits_mlp", "optim=lamb",
    "optim.lr=0.005", "batch.size=64", "budget.samples=3200", "target.loss=null",
    "evaluation.growth=100", "hydra.run.dir=run",
)  # fmt: skip
BAD_STEP = 16  # its batch holds position 1,001


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(*RUN, "+task.position=1001") == 4
    lines, summary = read_run(tmp_path / "run")
    assert summary["status"] == "diverged"
    assert lines[-1]["loss"] is None
    assert "not finite: 0.weight" in summary["reason"]
    (event,) = events(tmp_path / "run")
    assert (event["kind"], event["step"], event["samples"]) == ("stop", BAD_STEP, 64 * BAD_STEP)
    assert event["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_a_skipped_step_leaves_no_trace_but_its_samples(
    engine: str, optimizer: str, train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    """The run goes on as one that was never given the step: its losses until there and the batch
    after it, on the same weights, are those of other runs.
    """
    words = (*RUN[:3], *RUN[4:], f"optim={optimizer}", "guard.non_finite=skip", f"engine={engine}")
    assert train(*words, "+task.position=1001") == 0
    lines, summary = read_run(tmp_path / "run")
    assert summary["status"] == "exhausted"
    bad = [line for line in lines if line["skipped"]]
    # The image comes again in each epoch.
    places = [bad_position(epoch) for epoch in (0, 1, 2)]
    assert [line["step"] for line in bad] == [place // 64 + 1 for place in places if place < 3200]
    assert all(math.isfinite(line["loss"]) for line in lines if not line["skipped"])
    (first, *_) = events(tmp_path / "run")
    assert (first["kind"], first["step"]) == ("skip", BAD_STEP)


def bad_position(epoch: int) -> int:
    """Where the image that stands at position 1,001 stands in another epoch."""
    from largebatch.train.data.sampler import shuffled

    index = shuffled(1437, 0, 0)[1001]
    return 1437 * epoch + int(np.flatnonzero(shuffled(1437, 0, epoch) == index)[0])


def test_a_spike_is_skipped_before_it_does_harm(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    """Pixels of 100,000 in one image: all numbers stay finite, and no check for NaN sees them."""
    words = ("+task.position=1001", "+task.pixel=1e5", "guard.warmup_steps=5")
    assert train(*RUN, *words, "guard.grad_norm_multiple=20") == 0
    lines, _ = read_run(tmp_path / "run")
    (spike,) = [line for line in lines if line["step"] == BAD_STEP]
    assert spike["skipped"]
    assert math.isfinite(spike["grad_norm"])
    assert spike["grad_norm"] > spike["grad_norm_bound"]
    assert lines[BAD_STEP]["grad_norm"] < lines[BAD_STEP]["grad_norm_bound"]
    (event, *_) = events(tmp_path / "run")
    assert (event["kind"], event["step"], event["number"]) == ("skip", BAD_STEP, "grad_norm")
    assert event["bound"] == spike["grad_norm_bound"]


def test_rolling_back_goes_on_from_the_last_checkpoint_without_the_samples_since(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    words = ("guard.non_finite=rollback", "checkpoint.every_samples=512", "checkpoint.keep=9")
    # In an epoch of their own, so that the image does not come again.
    short = [word for word in RUN if not word.startswith("budget")]
    assert train(*short, *words, "budget.samples=1152", "+task.position=1001") == 0
    folder = tmp_path / "run"
    lines, summary = read_run(folder)
    assert (summary["status"], summary["samples"]) == ("exhausted", 1152)
    (event,) = events(folder)
    # Step 16 is judged before the checkpoint that is due with it, at 1,024 samples.
    assert (event["kind"], event["step"], event["to_samples"]) == ("rollback", BAD_STEP, 512)
    assert event["left_out"] == [512, 1024]
    assert [line["step"] for line in lines] == list(range(1, 19))
    gone = [json.loads(line) for line in (folder / "rolled_back.jsonl").read_text().splitlines()]
    assert [line["step"] for line in gone] == list(range(9, 17))
    assert gone[-1]["loss"] is None

    # The steps that were made again: the same weights, on the samples from 1,024 on.
    again = [line["loss"] for line in lines[8:]]
    assert again == pytest.approx(expected_losses(folder / "checkpoints", 1024, 10), rel=1e-5)


def expected_losses(checkpoints: Path, position: int, num_steps: int) -> list[float]:
    """By a plain loop of torch's, from the checkpoint after 512 samples on other samples."""
    import torch
    import torch.distributed.checkpoint as dcp
    from guarded_tasks import Spoiled
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    from largebatch.optim import LAMB, param_groups
    from largebatch.train.data.sampler import Sampler
    from largebatch.train.models import MLP

    model = MLP(64, 64, 10)
    optimizer = LAMB(param_groups(model), lr=0.005, betas=(0.9, 0.99))
    of_model, of_optimizer = get_state_dict(model, optimizer)
    state = {"model": of_model, "optimizer": of_optimizer}
    (checkpoint,) = checkpoints.glob("samples-*512")
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)
    task, losses = Spoiled(1001), []
    sampler = Sampler(task.num_train, 0, task.replacement)
    for step in range(num_steps):
        batch = task.train_batch(sampler.take(position + 64 * step, 64))
        loss = task.loss(model, batch)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(("remedy", "code"), [("rollback", 0), ("stop", 4)])
def test_a_bad_step_is_judged_before_its_weights_are_evaluated(
    remedy: str, code: int, train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    """With an evaluation after every step: one of NaN weights would end the run as diverged."""
    words = (f"guard.non_finite={remedy}", "checkpoint.every_samples=512", "budget.samples=1152")
    short = [word for word in RUN if not word.startswith(("budget", "evaluation"))]
    assert train(*short, *words, "evaluation.growth=1", "+task.position=1001") == code
    lines, summary = read_run(tmp_path / "run")
    (event,) = events(tmp_path / "run")
    assert (event["kind"], event["step"], event["number"]) == (remedy, BAD_STEP, "grad_norm")
    assert event["parameters"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert math.isfinite(summary["eval_loss"])
    assert len(lines) == (18 if remedy == "rollback" else BAD_STEP)
    assert all(line["eval_loss"] is not None for line in lines if "eval_loss" in line)


def test_a_run_with_nothing_to_go_back_to_ends(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    words = ("guard.non_finite=rollback", "checkpoint.every_samples=4096")
    assert train(*RUN, *words, "+task.position=1001") == 4
    _, summary = read_run(tmp_path / "run")
    assert "no checkpoint to go back to" in summary["reason"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["guard.non_finite=rollback"], "checkpoint.every_samples"),
        (["guard.non_finite=perhaps"], "guard.non_finite must be one of"),
        (["guard.non_finite=skip", "engine=deepspeed"], "engine=deepspeed steps whatever"),
    ],
)
def test_a_guard_that_cannot_do_what_it_is_asked_is_refused(
    words: list[str], told: str, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*RUN, "+task.position=1001", *words) == 2
    assert told in capsys.readouterr().err


def test_a_run_that_cannot_come_back_ends_long_before_its_budget(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    """SGD at a rate at which all stays finite for its whole length."""
    words = [word for word in RUN if not word.startswith(("task", "optim", "evaluation", "budget"))]
    sgd = ("task=digits", "optim=sgd", "optim.lr=1e5", "optim.momentum=0", "optim.nesterov=false")
    assert train(*words, *sgd, "clip_norm=1", "budget.samples=1280") == 4
    lines, summary = read_run(tmp_path / "run")
    assert summary["status"] == "diverged"
    assert "guard.eval_loss_multiple=100" in summary["reason"]
    assert summary["samples"] <= 1280 / 2
    assert all(math.isfinite(line["loss"]) for line in lines)
    (event,) = events(tmp_path / "run")
    assert (event["kind"], event["number"]) == ("stop", "eval_loss")
    assert event["samples"] == summary["samples"]
