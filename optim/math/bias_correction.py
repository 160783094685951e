"""Adam's bias correction where β has changed on the way, as a batch ramp changes it.

After t steps a running average x ← β x + (1 - β) g holds a total weight of 1 - βᵗ, and m̂ is m by
that. Where β has changed the weight is another: 1 - Π βₛ over all steps s. It is that of as many
steps as the new β would have needed, t' = t · log β_old / log β_new, no whole number; and so the
formulas stay as they are, with t' in the place of t. What is kept of it is t' - t: zero as long as
β is what it was, and for state that was saved without it.
"""

import ctypes
import math
from collections.abc import Mapping, MutableMapping
from typing import TypeVar

from torch import Tensor

Steps = TypeVar("Steps", float, Tensor)

# Of the state entries that keep t' - t, 0-d each, by the average: "exp_avg_extra_steps".
SUFFIX = "_extra_steps"

# For β = 0: its average has all the weight after one step, 1 - 1e-30.
SMALLEST = math.log(1e-30)


def log_beta(beta: float) -> float:
    return max(math.log(beta), SMALLEST) if beta > 0 else SMALLEST


def rebased(steps: Steps, old: float, new: float) -> Steps:
    """Return the number of steps of β `new` that give an average the weight of `steps` of β `old`.

    Args:
        old, new: in [0, 1).
    """
    return steps if old == new else steps * (log_beta(old) / log_beta(new))


def ages_of(
    state: Mapping[str, Tensor],
    history: MutableMapping[str, tuple[float, float]],
    betas: Mapping[str, float],
    step: int,
) -> dict[str, float]:
    """Return t' of a parameter's running averages, those with an entry of `SUFFIX`, at its step.

    Where a β has changed, brings state and history up to date; both say the same weights after it.

    Args:
        history: the β that each average had last and its t' - t, as the host knows them.
        betas: the β of each average now.
    """
    ages = {}
    for name, beta in betas.items():
        key = name + SUFFIX
        if key not in state:
            continue
        if name not in history:  # waits for the device once, where state was put there by hand
            history[name] = beta, float(state[key])
        last, extra = history[name]
        if beta != last:
            extra = as_fp32(rebased(step - 1 + extra, last, beta) - (step - 1))
            state[key].fill_(extra)
            history[name] = beta, extra
        ages[name] = step + extra
    return ages


def as_fp32(value: float) -> float:
    """Round as saving does, so that a resumed run equals one that was never stopped."""
    return ctypes.c_float(value).value
