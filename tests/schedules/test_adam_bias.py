"""How much too far torch's Adam steps after its betas have changed, as docs/schedules.md says."""

import math
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).resolve().parents[2] / "docs" / "schedules.md"


def longest(beta2: float, kappa: int, at: int) -> float:
    """The largest factor on a step of torch's AdamW, of the 60 after `at`, where beta2 becomes
    beta2^kappa: the root of the weight that its correction assumes over the one its average has.
    """
    torch.manual_seed(0)
    weight, worst = 0.0, 1.0
    param = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = torch.optim.AdamW([param], lr=1.0, betas=(0.9, beta2), weight_decay=0.0, eps=1e-12)
    for step in range(1, at + 61):
        if step == at + 1:
            optimizer.param_groups[0]["betas"] = (0.9, beta2**kappa)
        current = optimizer.param_groups[0]["betas"][1]
        weight = current * weight + (1 - current)
        param.grad = torch.ones_like(param)
        optimizer.step()
        # Of equal gradients the average is its weight.
        assert optimizer.state[param]["exp_avg_sq"][0] == pytest.approx(weight, rel=1e-9)
        worst = max(worst, math.sqrt((1 - current**step) / weight))
    return worst


@pytest.mark.parametrize(
    ("beta2", "kappa", "at", "said"),
    [
        (0.999, 2, 10, "1.35 (κ = 2)"),
        (0.999, 8, 10, "2.17 (κ = 8)"),
        (0.999, 2, 200, "1.35 or 2.06 at step 200"),
        (0.999, 8, 200, "2.06 at step 200"),
        (0.999, 2, 1000, "1.17 or 1.25 at step 1,000"),
        (0.999, 8, 1000, "1.25 at step 1,000"),
        (0.95, 8, 10, "1.28 at step 10"),
        (0.95, 8, 50, "1.03 at step 50"),
    ],
)
def test_the_docs_say_how_far_torchs_adam_steps_too_far(
    beta2: float, kappa: int, at: int, said: str
) -> None:
    assert said in DOCS.read_text(encoding="utf-8")
    assert float(said.split()[0]) == pytest.approx(longest(beta2, kappa, at), abs=0.006)
