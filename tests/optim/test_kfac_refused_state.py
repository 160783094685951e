"""A state that K-FAC refuses leaves it as it was."""

import copy

import pytest
import torch
from torch import nn

from largebatch.optim import KFAC


def test_what_was_there_before_a_refused_state_remains() -> None:
    torch.manual_seed(0)
    models = [nn.Linear(4, 3)]
    models.append(copy.deepcopy(models[0]))
    optimizers = [KFAC(model, lr=0.1) for model in models]

    def step(number: int) -> None:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(number))
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            torch.autograd.backward(model(x).square().mean())
            optimizer.step()

    step(0)
    state = copy.deepcopy(optimizers[0].state_dict())
    state["param_groups"][0]["lr"] = 9.0
    del state["state"][0]["step"]
    with pytest.raises(ValueError, match="step"):
        optimizers[0].load_state_dict(state)
    assert optimizers[0].param_groups[0]["lr"] == 0.1
    step(1)
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)
