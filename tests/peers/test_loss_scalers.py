"""Loss scalers, as torch, Lightning and accelerate use them, with every optimizer that masks."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from largebatch.optim import KFAC, LAMB, LARS, SOAP, Shampoo

Make = Callable[[nn.Module], torch.optim.Optimizer]

MAKES: dict[str, Make] = {
    "LARS": lambda model: LARS(model.parameters(), lr=0.5),
    "LAMB": lambda model: LAMB(model.parameters(), lr=0.01),
    "Shampoo": lambda model: Shampoo(model.parameters(), lr=0.01),
    "SOAP": lambda model: SOAP(model.parameters(), lr=0.01),
    "KFAC": lambda model: KFAC(model, lr=0.01),
}
each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)


@pytest.fixture(autouse=True)
def _accelerate_forgets() -> Iterator[None]:
    """accelerate keeps what it was told for the whole process."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def seeded() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def loss_of(model: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    loss: Tensor = model(inputs).square().mean()
    return loss


def weights_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def overflow(model: nn.Module) -> None:
    grad = next(model.parameters()).grad
    assert grad is not None
    grad[0, 0] = math.inf


@each
def test_gradients_can_be_unscaled_and_clipped_before_the_step(make: Make) -> None:
    """What frameworks ask before they clip; a scaler that steps gets another answer."""
    optimizer = make(seeded())
    assert not getattr(optimizer, "_step_supports_amp_scaling", False)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))

    class Probe(torch.amp.GradScaler):
        def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            return optimizer._step_supports_amp_scaling  # type: ignore[attr-defined]

    probe = Probe("cpu")
    probe.scale(torch.zeros(()))
    assert probe.step(optimizer)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)  # which wraps optimizer.step
    assert probe.step(optimizer)


@each
def test_a_step_that_accelerate_skips_moves_neither_weights_nor_schedule(make: Make) -> None:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.scheduler import AcceleratedScheduler

    Accelerator(cpu=True)
    model = seeded()
    optimizer, scaler = make(model), torch.amp.GradScaler("cpu", init_scale=4.0)
    before = optimizer.param_groups[0]["lr"]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    prepared = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    prepared_schedule = AcceleratedScheduler(schedule, prepared, split_batches=True)
    rates = []
    for step in range(3):
        prepared.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 1:
            overflow(model)
        weights = weights_of(model)
        prepared.step()
        prepared_schedule.step()
        same = all(map(torch.equal, weights, weights_of(model)))
        assert prepared.step_was_skipped == same == (step == 1)
        rates.append(optimizer.param_groups[0]["lr"] / before)
    assert rates == [0.5, 0.5, 0.25]


@each
@pytest.mark.parametrize("unscaled", [False, True], ids=["masked", "unscaled"])
def test_training_with_a_scaler_is_training_without_one(make: Make, unscaled: bool) -> None:
    """A loss scale that is a power of two costs no bit, and a skipped step leaves no trace."""
    plain, scaled = seeded(), seeded()
    optimizer, other = make(plain), make(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(5):
        other.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        if step == 2:
            overflow(scaled)
        if unscaled:
            scaler.unscale_(other)
        scaler.step(other)
        scaler.update()
        if step == 2:
            continue
        optimizer.zero_grad()
        loss_of(plain, step).backward()
        optimizer.step()
    for weight, wanted in zip(weights_of(scaled), weights_of(plain), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=0, atol=0)
