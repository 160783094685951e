"""SOAP-Muon's steps are SOAP's, orthogonalised."""

from typing import Any

import numpy as np
import pytest
import second_order_references as references
import torch
from torch import nn
from torch.nn import Parameter

from largebatch.optim import SOAPMuon

OPTIONS: dict[str, Any] = {
    "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "factor_beta": None,
    "precondition_interval": 1, "decay": "decoupled", "scale": 0.2 * np.sqrt(5),
    "polynomials": [(3.4445, -4.7750, 2.0315)] * 5,
}  # fmt: skip


@pytest.mark.parametrize("factors", ["shampoo", "kl"])
def test_steps_are_those_of_the_formula(factors: str) -> None:
    generator = torch.Generator().manual_seed(0)
    make = {"generator": generator, "dtype": torch.float64}
    weight, scale = torch.randn(5, 4, **make), torch.logspace(0, -1, 4, dtype=torch.float64)
    grads = [torch.randn(5, 4, **make) * scale for _ in range(6)]
    param = Parameter(weight.clone())
    optimizer = SOAPMuon(
        [("layer", param)], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, factors=factors,
        ns_precision="fp32",
    )  # fmt: skip
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    arrays = [grad.numpy() for grad in grads]
    options = OPTIONS | {"factors": factors}
    expected = references.run(references.SOAPMuonMatrix, weight.numpy(), arrays, options)
    assert np.abs(param.detach().numpy() - expected).max() < 1e-9


def test_matrices_are_whole_and_long_sides_have_no_factor() -> None:
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 7), nn.Linear(7, 9))
    optimizer = SOAPMuon(model, max_preconditioner_dim=5, ns_precision="fp32")
    model(torch.arange(9)).square().mean().backward()
    optimizer.step()
    state = optimizer.state[model[1].weight]
    assert {key for key in state if key.startswith("block_")} == {
        f"block_0/{name}" for name in ("condition", "factor_1", "basis_1", "exp_avg", "exp_avg_sq")
    }
    assert [group["algorithm"] for group in optimizer.param_groups] == ["soap_muon", "adamw"]
    assert "block_0/exp_avg" not in optimizer.state[model[0].weight]
