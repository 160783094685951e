"""Optimizers alone, in FP64, on the device and on the CPU: the same gradients, the same weights.

In FP32 two devices differ by the order of their sums, and an optimizer that divides by a small root
makes much of that: in FP64 what is left is what is computed. Blocks are square and full, because
any basis of a null space is as good as another: with one, a relative change of 1e-15 in the weights
moves SOAP's by 1e-3 on one and the same CPU.
"""

from typing import Any

import torch
from rehearsal_copies import NAME
from torch import Tensor, nn

from largebatch.optim import KFAC, LAMB, LARS, SOAP, Muon, Shampoo

STEPS = 8
BLOCKS: dict[str, Any] = {"block_size": 8, "precondition_interval": 4}
ROWS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "lamb": (LAMB, {"lr": 0.01}, STEPS),
    "lars": (LARS, {"lr": 1.0}, STEPS),
    "lars masked": (LARS, {"lr": 1.0}, STEPS),
    "muon": (Muon, {"lr": 0.01}, STEPS),
    "adamw": (torch.optim.AdamW, {"lr": 1e-3}, STEPS),
    "shampoo": (Shampoo, {"lr": 1e-3, **BLOCKS}, STEPS),
    "shampoo masked": (Shampoo, {"lr": 1e-3, **BLOCKS}, STEPS),
    "soap": (SOAP, {"lr": 1e-3, **BLOCKS}, 6),
    "kfac eigen": (KFAC, {"lr": 1e-2, "inverse_interval": 4}, STEPS),
    "kfac moved": (KFAC, {"lr": 1e-2, "inverse_interval": 4}, STEPS),
    "kfac masked": (KFAC, {"lr": 1e-2, "inverse_interval": 4}, STEPS),
    "kfac inverse": (KFAC, {"lr": 1e-2, "form": "factored_cholesky", "inverse_interval": 4}, STEPS),
    "kfac exact": (KFAC, {"lr": 1e-2, "form": "exact", "inverse_interval": 4}, STEPS),
}


def stepped(name: str, device: str) -> list[Tensor]:
    """The weights after all steps of a row.

    Masked, `found_inf` says that the third is none; moved, the optimizer was made on the CPU.
    """
    kind, options, steps = ROWS[name]
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Embedding(16, 16), nn.Linear(16, 24), nn.Tanh(), nn.LayerNorm(24)),
        *(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16)),
    ).to("cpu" if "moved" in name else device, torch.float64)
    takes_model = getattr(kind, "takes_model", False)
    optimizer = kind(model if takes_model else list(model.named_parameters()), **options)
    # With a device that is built in, `to` leaves every Parameter itself.
    torch.__future__.set_swap_module_params_on_conversion(True)
    model.to(device)
    torch.__future__.set_swap_module_params_on_conversion(False)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x, y = torch.randint(0, 16, (2, 64), generator=generator).to(device).unbind()
        nn.functional.cross_entropy(model(x), y).backward()
        if "masked" in name:
            optimizer.grad_scale = None
            optimizer.found_inf = torch.full((), float(step == 2), device=device)
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().cpu() for param in model.parameters()]


def largest_difference(name: str) -> float:
    ours, theirs = stepped(name, NAME), stepped(name, "cpu")
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
