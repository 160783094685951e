"""What a run's record says of the noise scale, and what it refuses to say."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.optim import LAMB, Shampoo
from largebatch.schedules import BatchSplit, NoiseScale
from largebatch.train.noise.gradient_noise import GradientNoise
from largebatch.train.noise.small_gradients import MicroBatchGradients

Train = Callable[..., int]
ReadRun = Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]]

RUN = (
    "task=digits", "optim=adamw", "optim.lr=0.003", "batch.size=64", "target.loss=null",
    "budget.samples=1280", "evaluation.growth=100", "hydra.run.dir=run",
)  # fmt: skip


def test_the_record_averages_what_every_step_measured(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    """One line a step; the averages are recomputed here from a second run of the same steps."""
    measured = ("noise.small=micro_batch", "engine.micro_batch_size=16")
    assert train(*RUN, *measured, "noise.half_life_samples=1") == 0
    single, _ = read_run(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "single")
    assert train(*RUN, *measured, "noise.half_life_samples=300") == 0
    lines, _ = read_run(tmp_path / "run")
    noise = NoiseScale(half_life_samples=300)
    for line, alone in zip(lines, single, strict=True):
        # With a half-life of one sample a reading is that of the step, in FP64 arithmetic.
        small = alone["grad_sq_norm"] + alone["grad_trace"] / 16
        big = alone["grad_sq_norm"] + alone["grad_trace"] / 64
        assert big == pytest.approx(line["grad_norm"] ** 2, rel=1e-6)
        noise.update(small_sq_norm=small, big_sq_norm=big, small_batch=16, big_batch=64)
        reading = noise.reading()
        assert line["grad_trace"] == pytest.approx(reading.trace, rel=1e-6)
        assert line["grad_sq_norm"] == pytest.approx(reading.grad_sq_norm, rel=1e-6)
        assert line["noise_resolved"] == reading.resolved
        if reading.grad_sq_norm > 0:
            assert line["noise_scale"] == pytest.approx(reading.noise_scale, rel=1e-5)
    assert lines[0]["noise_scale_error"] is None  # infinite after one step
    assert lines[-1]["noise_resolved"]


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    twin = copy.deepcopy(model)
    return torch.autograd.grad(cross_entropy(twin(x), y), [*twin.parameters()])


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, LAMB])
def test_the_preconditioned_scale_is_that_of_gradients_in_the_metric(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    made = optimizer(list(model.named_parameters()), lr=0.01, betas=(0.9, 0.95), eps=1e-3)
    noise = GradientNoise(MicroBatchGradients(model), 1, optimizer=made)
    x, y = torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))
    split = BatchSplit(12, 1, 3)
    for step in range(3):
        noise.begin(step)
        for part in range(3):
            chosen = slice(4 * part, 4 * part + 4)
            torch.autograd.backward(cross_entropy(model(x[chosen]), y[chosen]) / 3)
        numbers = noise.parts(split)
        assert ("noise/small_preconditioned" in numbers) == (step > 0)
        if step:
            root = [
                ((made.state[p]["exp_avg_sq"] / (1 - 0.95**step)).sqrt() + 1e-3).sqrt()
                for p in model.parameters()
            ]
            each = [gradients(model, x[4 * n : 4 * n + 4], y[4 * n : 4 * n + 4]) for n in range(3)]
            weighted = torch.stack(
                [torch.cat([(g / r).flatten() for g, r in zip(one, root, strict=True)])
                 for one in each]
            )  # fmt: skip
            q, whole = weighted.square().sum(1).mean(), weighted.mean(0).square().sum()
            told = [float(numbers[f"noise/{kind}_preconditioned"]) for kind in ("small", "big")]
            assert told == pytest.approx(
                [float(q), float(whole)], rel=1e-6
            )  # the step counter is FP32
        made.step()
        made.zero_grad()


def test_every_third_step_is_measured_and_older_ones_fade_as_fast(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    words = ("noise.small=example", "noise.every=3", "noise.half_life_samples=500")
    assert train(*RUN, *words) == 0
    lines, _ = read_run(tmp_path / "run")
    assert [line["step"] for line in lines if "noise_scale" in line] == [*range(1, 21, 3)]
    assert {key for key in lines[1] if "noise" in key} == set()
    (tmp_path / "run").rename(tmp_path / "sparse")
    assert train(*RUN, "noise.small=example", "noise.half_life_samples=1") == 0
    noise, seen = NoiseScale(half_life_samples=500), 0
    alone, _ = read_run(tmp_path / "run")
    for line, single in zip(lines[::3], alone[::3], strict=True):
        noise.update(
            small_sq_norm=single["grad_sq_norm"] + single["grad_trace"],
            big_sq_norm=single["grad_sq_norm"] + single["grad_trace"] / 64,
            small_batch=1, big_batch=64, samples=line["samples"] - seen,
        )  # fmt: skip
        seen = line["samples"]
        assert line["grad_trace"] == pytest.approx(noise.reading().trace, rel=1e-6)


def test_ranks_decide_alike_and_as_one_process_does(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    """A ramp on the noise scale of micro-batches: the same stages however they are spread."""
    words = (
        "task=digits", "optim=adamw", "optim.lr=0.003", "batch=sqrt_noise", "batch.start=32",
        "batch.size=256", "batch.exchange_rate=2000", "batch.votes=2", "noise.small=micro_batch",
        "engine.micro_batch_size=8", "target.loss=null", "budget.samples=6000", "scaling=sqrt",
        "scaling.base_batch=32", "evaluation.growth=1.1",
    )  # fmt: skip
    assert train(*words, "hydra.run.dir=one") == 0
    assert train(*words, "engine.nproc=2", "hydra.run.dir=two") == 0
    one, two = (read_run(tmp_path / name)[0] for name in ("one", "two"))
    sizes = [(line["samples"], line["global_batch_size"], line["lr"]) for line in one]
    assert [(line["samples"], line["global_batch_size"], line["lr"]) for line in two] == sizes
    assert {size for _, size, _ in sizes} >= {32, 64, 128}
    for a, b in zip(one[4:], two[4:], strict=True):
        for field in ("loss", "grad_trace", "grad_sq_norm"):
            assert b[field] == pytest.approx(a[field], rel=1e-4)


def test_an_optimizer_without_second_moments_of_its_matrices_is_refused() -> None:
    model = nn.Linear(3, 2)
    optimizer = Shampoo(model.named_parameters(), lr=0.01)
    noise = GradientNoise(MicroBatchGradients(model), 1, optimizer=optimizer)
    noise.begin(0)
    torch.autograd.backward(model(torch.ones(2, 3)).square().mean())
    optimizer.step()
    with pytest.raises(ValueError, match="Shampoo keeps none of 'weight': leave it at false"):
        noise.begin(1)


def test_a_ramp_hears_the_last_reading_at_boundaries_that_were_not_measured(
    train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    assert train(
        "task=digits", "optim=adamw", "optim.lr=0.003", "batch=sqrt_noise", "batch.start=32",
        "batch.size=256", "batch.exchange_rate=2000", "batch.votes=2", "noise.every=8",
        "target.loss=null", "budget.samples=6000", "evaluation.growth=1.05", "hydra.run.dir=run",
    ) == 0  # fmt: skip
    lines, _ = read_run(tmp_path / "run")
    assert {line["global_batch_size"] for line in lines} >= {32, 64}


def test_a_parameter_without_second_moment_is_left_out_of_the_metric() -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    optimizer = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    noise = GradientNoise(MicroBatchGradients(model), 1, optimizer=optimizer)
    for step in range(3):
        noise.begin(step)
        optimizer.zero_grad()
        for _ in range(2):  # the second layer is first used in the last step
            used = model if step == 2 else [model[0]]
            loss = sum(layer(torch.randn(4, 3)).square().mean() for layer in used)
            torch.autograd.backward(loss / 2)
        numbers = noise.parts(BatchSplit(8, 1, 2))
        if step:
            first = sum(
                (p.grad.square() / ((s["exp_avg_sq"] / (1 - 0.999**step)).sqrt() + 1e-8)).sum()
                for p in model[0].parameters()
                if (s := optimizer.state[p]) and p.grad is not None
            )
            assert float(numbers["noise/big_preconditioned"]) == pytest.approx(float(first), 1e-4)
            assert torch.isfinite(numbers["noise/small_preconditioned"])
        optimizer.step()


def test_layers_are_told_by_name_and_add_up_to_the_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    noise = GradientNoise(MicroBatchGradients(model), 100, by_layer=True)
    x, y = torch.randn(12, 4), torch.randint(0, 3, (12,))
    noise.begin(0)
    for half in (slice(0, 6), slice(6, 12)):
        torch.autograd.backward(cross_entropy(model(x[half]), y[half]) / 2)
    numbers = noise.parts(BatchSplit(12, 1, 2))
    halves = [gradients(model, x[:6], y[:6]), gradients(model, x[6:], y[6:])]
    for place, name in enumerate(dict(model.named_parameters())):
        one, other = (half[place] for half in halves)
        small = (one.square().sum() + other.square().sum()) / 2
        assert float(numbers[f"noise/small/{name}"]) == pytest.approx(float(small), rel=1e-5)
        big = ((one + other) / 2).square().sum()
        assert float(numbers[f"noise/big/{name}"]) == pytest.approx(float(big), rel=1e-5)
    for kind in ("noise/small", "noise/big"):
        layers = [float(value) for key, value in numbers.items() if key.startswith(f"{kind}/")]
        assert sum(layers) == pytest.approx(float(numbers[kind]), rel=1e-6)


def test_a_step_that_is_not_finite_leaves_the_averages_as_they_were() -> None:
    noise = GradientNoise(MicroBatchGradients(nn.Linear(2, 2)), 100)
    line = {"global_batch_size": 8, "data_parallel_size": 1, "gradient_accumulation_steps": 4,
            "samples": 8}  # fmt: skip
    noise.take(line | {"noise/small": 3.0, "noise/big": 2.0})
    before = noise.state_dict()
    for bad in ({"noise/small": math.inf}, {"noise/big": math.nan}):
        told = line | {"noise/small": 3.0, "noise/big": 2.0} | bad
        noise.take(told)
        assert told == line
    assert noise.state_dict() == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("noise.small=half",), "noise.small must be null or one of auto, rank, micro_ba"),
        (("noise.half_life_samples=0",), "noise.half_life_samples must be a whole number of at"),
        (("noise.small=rank",), "noise.small=rank sees one gradient in a ba"),
        (("noise.small=micro_batch",), "noise.small=micro_batch sees one gradient in a ba"),
        (("noise.small=micro_batch", "engine.micro_batch_size=32", "noise.preconditioned=true",
          "optim=sgd"), "noise.preconditioned needs the second moment of an optimizer suc"),
        (("noise.small=micro_batch", "engine.micro_batch_size=32", "noise.preconditioned=true",
          "optim=kfac"), "noise.preconditioned needs the second moment of an optimizer suc"),
        (("noise.small=example", "noise.preconditioned=true"), "needs whole gradients to go by"),
        (("batch=sqrt_noise", "batch.size=1024", "noise.small=null"), "the ramp follows the n"),
        (("noise.small=auto", "model=custom", "model._target_=convolving.Model"),
         "noise.small=auto finds no engine.micro_batch_size that cuts the smallest batch, and"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_refused(
    words: tuple[str, ...], sentence: str, train: Train, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "convolving.py").write_text(
        "from torch import nn\n"
        "class Model(nn.Sequential):\n"
        "    def __init__(self):\n"
        "        super().__init__(nn.Unflatten(1, (1, 64)), nn.Conv1d(1, 1, 3), nn.Flatten(),\n"
        "                         nn.Linear(62, 10))\n"
    )
    assert train(*RUN, *words) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_step_that_was_skipped_says_nothing_of_the_noise() -> None:
    noise = GradientNoise(MicroBatchGradients(nn.Linear(2, 1)), 100)
    line = {
        "global_batch_size": 8, "data_parallel_size": 1, "gradient_accumulation_steps": 2,
        "samples": 8, "noise/small": 5.0, "noise/big": 3.0,
    }  # fmt: skip
    noise.take(dict(line))
    known = noise.state_dict()
    spike = line | {"samples": 16, "noise/small": 5e9, "noise/big": 3e9, "skipped": True}
    noise.take(spike)
    assert noise.state_dict() == known
    assert not any(key.startswith("noise") for key in spike)
