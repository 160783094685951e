"""The six optimizers as torch's published checks take them: made for a small model."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.optim import KFAC, LAMB, LARS, SOAP, Muon, Shampoo

Make = Callable[..., torch.optim.Optimizer]


def of_params(cls: Any, lr: float, **options: Any) -> Make:
    """Of a model, or of `groups` in its place."""

    def make(model: nn.Module, groups: Any = None, **more: Any) -> torch.optim.Optimizer:
        given = model.named_parameters() if groups is None else groups
        made: torch.optim.Optimizer = cls(given, **{"lr": lr, **options, **more})
        return made

    return make


def kfac(model: nn.Module, groups: Any = None, **more: Any) -> torch.optim.Optimizer:
    return KFAC(model, **{"lr": 0.01, "params": groups, **more})


MAKES: dict[str, Make] = {
    "LARS": of_params(LARS, 0.5, trust_coefficient=0.02),
    "LAMB": of_params(LAMB, 0.02),
    "Shampoo": of_params(Shampoo, 0.01),
    "SOAP": of_params(SOAP, 0.01),
    "KFAC": kfac,
    "Muon": of_params(Muon, 0.03),
}


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))


def loss_of(model: nn.Module, step: int) -> Tensor:
    draw = torch.Generator().manual_seed(step)
    inputs = torch.randn(32, 6, generator=draw, dtype=torch.float32)
    return cross_entropy(model(inputs), inputs[:, :4].argmax(dim=1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, first: int, end: int) -> list[float]:
    losses = []
    for step in range(first, end):
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def weights_of(model: nn.Module) -> list[Tensor]:
    return [param.detach().clone() for param in model.parameters()]


def moved(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """By how much each parameter moves in one step of training."""
    before = weights_of(model)
    train(model, optimizer, step, step + 1)
    return {
        name: float((param.detach() - old).norm())
        for (name, param), old in zip(model.named_parameters(), before, strict=True)
    }
