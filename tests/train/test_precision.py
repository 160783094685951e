"""Sums of gradients are FP32 whatever a step computes in; an overflow of FP16 is no step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import Outcome, launch, successful
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.distributed.ranks import Ranks
from largebatch.optim import KFAC, LAMB, LARS, Muon, Shampoo
from largebatch.optim.sharding.layout import local
from largebatch.train.engines.ddp import DDP
from largebatch.train.engines.deepspeed import DeepSpeed
from largebatch.train.engines.fsdp import FSDP
from largebatch.train.engines.precision import LossScale, Precision
from largebatch.train.engines.update import GradientLimits, masked_step
from largebatch.train.models import MLP
from largebatch.train.tasks import Batch

CPU = torch.device("cpu")
ACCUMULATION, MICRO = 64, 4


class Regression:
    """Random inputs and targets; the gradient has a mean, so that its sum grows as it is made."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return (model(inputs).float() - targets).square().mean()


def batch() -> Batch:
    draw = torch.Generator().manual_seed(0)
    samples = ACCUMULATION * MICRO
    return (
        torch.randn(samples, 16, generator=draw).abs(),
        torch.randn(samples, 8, generator=draw) + 1,
    )


def make(engine: str, ranks: Ranks, precision: str, micro: int | None) -> Any:
    torch.manual_seed(0)
    make_engine = {"ddp": DDP, "fsdp": FSDP}[engine]
    return make_engine(MLP(16, 32, 8), ranks, CPU, micro, Precision(precision, CPU))


def gradient(engine: Any) -> Tensor:
    """The whole gradient, flat; on every rank."""
    found = []
    for param in engine.model.parameters():
        grad = param.grad.full_tensor() if hasattr(param.grad, "full_tensor") else param.grad
        found.append(grad.flatten())
        param.grad = None
    return torch.cat(found)


def accumulate(job: str) -> Outcome:
    """Relative errors of sums of the very same bf16 micro-gradients: the engine's, and bf16's."""
    engine_name, precision = job.split()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    ranks = Ranks("test", dist.get_rank(), dist.get_world_size())
    engine = make(engine_name, ranks, precision, MICRO)
    samples = ACCUMULATION * MICRO * ranks.size
    inputs, targets = batch()
    shift = float(ranks.rank)  # ranks see different samples
    mine = (inputs + shift, targets)
    engine.forward_backward(Regression(), mine, samples)
    summed = gradient(engine)

    exact = torch.zeros_like(summed, dtype=torch.float64)
    in_bf16 = torch.zeros_like(summed, dtype=torch.bfloat16)
    for start in range(0, ACCUMULATION * MICRO, MICRO):
        part = tuple(tensor[start : start + MICRO] for tensor in mine)
        engine.forward_backward(Regression(), part, samples)  # one micro-batch's share
        small = gradient(engine)
        exact += small.double()
        in_bf16 += small.bfloat16()
    error = (summed.double() - exact).norm() / exact.norm()
    of_bf16 = (in_bf16.double() - exact).norm() / exact.norm()
    return {"fp32": float(error), "bf16": float(of_bf16)}


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_of_bf16_are_added_up_in_fp32(world_size: int, tmp_path: Path) -> None:
    jobs = ["ddp bf16", "fsdp bf16", "ddp fp16"]
    found = launch(accumulate, jobs, world_size, tmp_path)
    for job in jobs:
        for outcome in successful([of_rank[job] for of_rank in found]):
            print(f"{job}: FP32 sums off by {outcome['fp32']:.1e}, bf16's {outcome['bf16']:.1e}")
            assert outcome["fp32"] < 1e-6  # 64 roundings of 6e-8, at random
            assert outcome["bf16"] > 1e-3  # and of 4e-3


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "fused AdamW": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "LARS": lambda params: LARS(params, lr=0.1, momentum=0.9),
    "LAMB": lambda params: LAMB(params, lr=0.01, weight_decay=0.1),
    "Muon": lambda params: Muon(params, lr=0.01),
    "Shampoo": lambda params: Shampoo(params, lr=0.01),
}


def snapshot(engine: Any, optimizer: Optimizer) -> list[Tensor]:
    """Weights and every tensor of the optimizer's state, copied."""
    held = [local(p.detach()) for p in engine.model.parameters()]
    for group in optimizer.param_groups:
        for param in group["params"]:
            values = optimizer.state.get(param, {}).values()
            held += [local(v) for v in values if isinstance(v, Tensor)]
    return [tensor.clone() for tensor in held]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_overflow_in_fp16_changes_nothing_and_halves_the_scale(name: str) -> None:
    engine = make("ddp", Ranks(), "fp16", None)
    scale = engine.precision.loss_scale
    optimizer = OPTIMIZERS[name](list(engine.model.named_parameters()))
    task, samples = Regression(), ACCUMULATION * MICRO

    def step() -> dict[str, Tensor]:
        engine.forward_backward(task, batch(), samples)
        own: dict[str, Tensor] = engine.update(optimizer, GradientLimits()).replicated
        return own

    scale.value = torch.tensor(2.0**8)
    assert float(step()["skipped"]) == 0.0
    before = snapshot(engine, optimizer)
    scale.value = torch.tensor(2.0**30)
    own = step()
    assert float(own["skipped"]) == 1.0
    assert not torch.isfinite(own["grad_norm"])
    assert float(scale.value) == 2.0**29
    after = snapshot(engine, optimizer)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    scale.value = torch.tensor(2.0**8)
    own = step()
    assert float(own["skipped"]) == 0.0
    moved = snapshot(engine, optimizer)
    assert any(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def test_fp16_gradients_are_those_of_the_loss_whatever_the_scale() -> None:
    """A power of two changes no digit, and what is recorded is the norm of the true gradient."""
    norms = []
    for scale in (2.0**4, 2.0**10):
        engine = make("ddp", Ranks(), "fp16", None)
        engine.precision.loss_scale.value = torch.tensor(scale)
        engine.forward_backward(Regression(), batch(), ACCUMULATION * MICRO)
        norms.append(gradient(engine).norm())
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-3, atol=0)
    plain = make("ddp", Ranks(), "fp32", None)
    plain.forward_backward(Regression(), batch(), ACCUMULATION * MICRO)
    torch.testing.assert_close(norms[0], gradient(plain).norm(), rtol=5e-3, atol=0)


def test_the_curvature_of_fp16_is_that_of_fp32_whatever_the_scale() -> None:
    """K-FAC sees gradients on their way, multiplied by the scale: its factors are of true ones."""
    factors = []
    for precision, scale in (("fp32", 1.0), ("fp16", 2.0**4), ("fp16", 2.0**10)):
        engine = make("ddp", Ranks(), precision, 64)
        if engine.precision.loss_scale is not None:
            engine.precision.loss_scale.value = torch.tensor(scale)
        optimizer = KFAC(engine.model, lr=0.01)
        engine.forward_backward(Regression(), batch(), ACCUMULATION * MICRO)
        engine.update(optimizer, GradientLimits())
        states = [state for state in optimizer.state.values() if "factor_out" in state]
        factors.append(torch.cat([state["factor_out"].flatten() for state in states]))
    exact, *others = factors
    for other in others:
        assert float((other - exact).norm() / exact.norm()) < 5e-3


def products_under_deepspeed(stage: int) -> Outcome:
    """Of which dtype they are where DeepSpeed finds itself within an autocast, as it does on CUDA
    alone: torch tells of CUDA's where it is asked of none by name.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    seen = []

    class Watching(Regression):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            seen.append(str(model(batch[0]).dtype))
            return super().loss(model, batch)

    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *kind: asked(*(kind or ("cpu",)))  # type: ignore[assignment]
    engine = DeepSpeed(MLP(16, 32, 8), Ranks(), CPU, 64, Precision("bf16", CPU), stage=stage)
    engine.attach(LAMB(list(engine.model.named_parameters()), lr=0.01), None)
    engine.forward_backward(Watching(), batch(), ACCUMULATION * MICRO)
    engine.evaluate(Watching(), batch())
    return {"dtypes": seen}


def test_deepspeed_computes_in_the_precision_it_is_called_in(tmp_path: Path) -> None:
    (found,) = launch(products_under_deepspeed, [1, 3], 1, tmp_path)
    for stage in ("1", "3"):
        (outcome,) = successful([found[stage]])
        assert set(outcome["dtypes"]) == {"torch.bfloat16"}


def test_the_scale_grows_after_an_interval_without_overflow() -> None:
    scale = LossScale(CPU, interval=3)
    good, bad = torch.tensor(0.0), torch.tensor(1.0)
    seen = []
    for overflowed in (good, good, good, good, bad, good, good, good):
        scale.update(overflowed)
        seen.append(float(scale.value) / LossScale.FIRST)
    assert seen == [1, 1, 2, 2, 1, 1, 1, 2]
    other = LossScale(CPU, interval=3)
    other.load_state_dict(scale.state_dict())
    assert float(other.value) == float(scale.value)


def test_an_optimizer_that_cannot_be_masked_is_asked_only_when_it_may_step() -> None:
    asked = []

    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            asked.append(True)

    optimizer = Counting([nn.Parameter(torch.ones(1))], lr=1.0)
    masked_step(optimizer, torch.tensor(1.0))
    assert asked == []
    masked_step(optimizer, torch.tensor(0.0))
    assert asked == [True]


@pytest.mark.parametrize("limit", [0.01, 1e9])
def test_the_gradient_is_clipped_to_its_norm_before_the_step(limit: float) -> None:
    engine = make("ddp", Ranks(), "fp32", 32)
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=1.0)
    before = torch.cat([p.detach().flatten().clone() for p in engine.model.parameters()])
    engine.forward_backward(Regression(), batch(), ACCUMULATION * MICRO)
    norm = engine.update(optimizer, GradientLimits(clip_norm=limit)).replicated["grad_norm"]
    after = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    expected = min(float(norm), limit)
    assert float((after - before).norm()) == pytest.approx(expected, rel=1e-4)


def test_a_step_above_the_limit_changes_nothing_and_one_below_it_does() -> None:
    engine = make("ddp", Ranks(), "fp32", None)
    optimizer = LAMB(list(engine.model.named_parameters()), lr=0.1)
    for limit, skipped in ((1e-6, 1.0), (1e6, 0.0)):
        before = snapshot(engine, optimizer)
        engine.forward_backward(Regression(), batch(), ACCUMULATION * MICRO)
        numbers = engine.update(optimizer, GradientLimits(skip_above=limit))
        assert float(numbers.replicated["skipped"]) == skipped
        weights = snapshot(engine, optimizer)[:4]
        same = [torch.equal(a, b) for a, b in zip(before, weights, strict=False)]
        assert all(same) == bool(skipped)


def test_parameters_whose_gradient_is_not_finite_are_named() -> None:
    engine = make("ddp", Ranks(), "fp32", None)
    optimizer = LAMB(list(engine.model.named_parameters()), lr=0.1)
    for spoiled in (None, "2.weight"):
        engine.forward_backward(Regression(), batch(), ACCUMULATION * MICRO)
        for name, param in engine.model.named_parameters():
            if name == spoiled:
                param.grad[0, 0] = torch.nan
        engine.update(optimizer, GradientLimits(skip_above=1e9))
    assert engine.non_finite(0) == ["2.weight"]
    assert engine.non_finite(1) == []
