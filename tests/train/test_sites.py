"""`record.sites`: maxima and updates are those of the modules and tensors, over all ranks."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fixture_types import ReadRun, Train
from torch import nn

from largebatch.train.models import Transformer
from largebatch.train.reporting.sites import Sites

TINY: dict[str, Any] = {
    "vocabulary": 11,
    "dim": 16,
    "depth": 2,
    "heads": 4,
    "kv_heads": 2,
    "hidden": 24,
}


def passed(model: nn.Module, tokens: torch.Tensor) -> dict[str, float]:
    sites = Sites(model, copies=1)
    for part in torch.chunk(tokens, 3):  # as micro-batches
        model(part)
    return {name: value.item() for name, value in sites.maxima().items()}


def test_maxima_are_those_of_the_outputs_over_all_micro_batches() -> None:
    torch.manual_seed(0)
    model = Transformer(**TINY, init_std=0.5)
    tokens = torch.randint(0, 11, (6, 9))
    found = passed(model, tokens)
    with torch.no_grad():
        embedded = model.embedding(tokens)
        block: Any = model.blocks[0]
        mixed = block.attention_norm(embedded)
        queries, keys = (
            part(mixed).unflatten(-1, (-1, 4)).transpose(1, 2)
            for part in (block.attention.queries, block.attention.keys)
        )
    assert found["activation_max/embedding"] == pytest.approx(embedded.abs().max().item())
    assert found["activation_max/head"] == pytest.approx(model(tokens).abs().max().item())
    # Turning keeps a pair's length, not a product: a bound from above, met from below by place 0.
    bound = (queries.norm(dim=-1).amax() * keys.norm(dim=-1).amax() / 2).item()
    shared = keys.repeat_interleave(2, 1)
    same_place = ((queries * shared).sum(-1).abs().amax() / 2).item()
    assert same_place - 1e-5 <= found["attention_logit_max/blocks.0.attention"] <= bound + 1e-5
    assert [name for name in found if name.startswith("attention")] == [
        "attention_logit_max/blocks.0.attention", "attention_logit_max/blocks.1.attention",
    ]  # fmt: skip


def test_evaluations_do_not_count() -> None:
    model = Transformer(**TINY)
    sites = Sites(model, copies=1)
    model.eval()
    model(torch.zeros(1, 3, dtype=torch.int64))
    assert sites.maxima() == {}


def test_what_is_no_number_is_the_largest() -> None:
    model = Transformer(**TINY)
    broken: Any = model.blocks[1]
    with torch.no_grad():
        broken.mlp.up.weight[0, 0] = math.nan
    found = passed(model, torch.zeros(2, 3, dtype=torch.int64))
    assert math.isinf(found["activation_max/blocks.1.mlp.up"])
    assert math.isfinite(found["activation_max/blocks.1.mlp.gate"])


def test_the_first_site_of_a_spike_is_the_first_along_the_pass() -> None:
    sites = Sites(Transformer(**TINY), copies=1)
    usual = {"activation_max/a": 1.0, "attention_logit_max/b": 2.0, "activation_max/c": 3.0}
    for _ in range(6):
        sites.take(dict(usual))
        assert sites.blame() == {}
    sites.take(usual | {"attention_logit_max/b": 20.0, "activation_max/c": 90.0})
    assert sites.blame() == {
        "site": "attention_logit_max/b", "site_value": 20.0, "site_median": 2.0,
    }  # fmt: skip
    sites.take(dict(usual))
    assert sites.blame() == {}


SHORT = ("task=text", "task.sequence_length=8", "task.num_bytes=20000", "task.num_eval=8",
         "target.loss=null", "model.dim=32", "model.depth=1", "batch.size=8", "optim.lr=0.01",
         "budget.samples=16", "record.sites=true")  # fmt: skip


def test_ranks_and_micro_batches_record_the_same_sites(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(*SHORT, "hydra.run.dir=one") == 0
    one = read_run(tmp_path / "one")[0]
    keys = [key for key in one[0] if "/" in key]
    assert len(keys) == len({*keys}) == 13 + 1 + 12
    for engine in ("ddp", "fsdp"):
        words = (f"engine={engine}", "engine.nproc=2", "engine.micro_batch_size=2")
        assert train(*SHORT, *words, f"hydra.run.dir={engine}") == 0
        other = read_run(tmp_path / engine)[0]
        assert [key for key in other[0] if "/" in key] == keys
        for a, b in zip(one, other, strict=True):
            for key in keys:
                assert b[key] == pytest.approx(a[key], rel=1e-3), key


def test_an_update_is_the_step_of_the_optimizer(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(*SHORT, "optim=adamw", "optim.eps=1e-30", "hydra.run.dir=run") == 0
    first: dict[str, Any] = read_run(tmp_path / "run")[0][0]
    # Adam's first step is lr wherever there is a gradient, and every symbol's row has not one.
    assert first["update_rms/blocks.0.mlp.up.weight"] == pytest.approx(0.01, rel=1e-3)
    assert 0 < first["update_rms/embedding.weight"] < 0.01


@pytest.mark.parametrize("pixel", ["null", "1e4"], ids=["NaN", "large"])
def test_a_spike_names_its_first_site(pixel: str, train: Train, tmp_path: Path) -> None:
    words = ("task=custom", "task._target_=guarded_tasks.Spoiled", "model=digits_mlp",
             "+task.position=650", f"+task.pixel={pixel}", "batch.size=64",
             "budget.samples=768", "target.loss=null",
             "guard.non_finite=skip", "guard.grad_norm_multiple=10", "guard.warmup_steps=5",
             "record.sites=true", "hydra.run.dir=run")  # fmt: skip
    assert train(*words) in (0, 3)
    lines = (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    (event,) = (event for line in lines if (event := json.loads(line))["kind"] == "skip")
    assert event["step"] == 11
    assert event["site"] == "activation_max/0"


def test_what_cannot_be_watched_is_refused(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*SHORT, "engine.compile=true") == 2
    assert "record.sites=true looks into modules" in capsys.readouterr().err
