"""Muon with AdamW for the rest is, part by part, what torch's own two optimizers do."""

import copy

import pytest
import torch
from torch import nn

from largebatch.optim import Muon


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 6), nn.Linear(6, 9))


def backward(network: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    symbols = torch.randint(0, 9, (8, 3), generator=generator)
    network.zero_grad()
    torch.autograd.backward(network(symbols).square().mean())


def named(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("0.", "embedding."), p) for name, p in network.named_parameters()]


def test_each_part_is_torchs_own() -> None:
    one, two = model(), model()
    joined = Muon(named(one), lr=0.02, weight_decay=0.1, betas=(0.9, 0.99), momentum=0.9)
    muon = torch.optim.Muon(
        [two[2].weight, two[3].weight], lr=0.02, weight_decay=0.1, momentum=0.9,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
    adamw = torch.optim.AdamW(
        [two[0].weight, two[2].bias, two[3].bias], lr=0.02, weight_decay=0.1, betas=(0.9, 0.99)
    )
    for step in range(4):
        for network in (one, two):
            backward(network, step)
        for group in (*joined.param_groups, *muon.param_groups, *adamw.param_groups):
            group["lr"] = 0.02 / (1 + step)
        joined.step()
        muon.step()
        adamw.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_state_is_continued_to_the_bit() -> None:
    one = model()
    first = Muon(named(one), lr=0.02)
    for step in range(2):
        backward(one, step)
        first.step()
    two = copy.deepcopy(one)
    second = Muon(named(two), lr=1.0)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for network, optimizer in ((one, first), (two, second)):
        for step in range(2, 4):
            backward(network, step)
            optimizer.step()
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q)


def test_what_it_cannot_take_is_refused() -> None:
    network = model()
    with pytest.raises(ValueError, match="params must be named_parameters"):
        Muon(network.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with at least one matrix for Muon"):
        Muon(named(network), adamw=("*",))
    optimizer = Muon(named(network))
    with pytest.raises(ValueError, match="given to the constructor"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, 2))]})
