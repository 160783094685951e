"""How long the first steps of each variant are, by its oracle: the figures of docs/variants.md.

`python tests/optim/variant_figures.py` prints them.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import variant_lamb as lamb
import variant_lars as lars
from variant_layers import Array, Layer, Oracle, norm

NUM_VALUES = 10_000
FIRST_STEPS = (1, 2, 5, 10, 50)
# A decay too small to be seen in the numbers: apex and timm adapt no layer whose decay is 0.
ALMOST_NO_DECAY = 1e-12
LAMB_LR, LARS_LR = 1e-3, 1.0
ADAM: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-6}
SGD: dict[str, Any] = {"momentum": 0.9, "trust_coefficient": 1e-3}

STEP_SIZES: dict[str, Oracle] = {
    "LAMB paper": partial(lamb.lamb_paper, **ADAM),
    "LAMB nvlamb": partial(lamb.lamb_nvlamb, **ADAM),
    "LAMB apex": partial(lamb.lamb_apex, **ADAM),
    "LAMB timm": partial(lamb.lamb_timm, **ADAM),
    "LAMB lambc": partial(lamb.lamb_lambc, **ADAM),
    "LAMB deepspeed": partial(lamb.lamb_deepspeed, **ADAM),
    "LAMB tfa": partial(lamb.lamb_tfa, weight_decay_rate=ALMOST_NO_DECAY, **ADAM),
    "LARS paper": partial(lars.lars_paper, **SGD),
    "LARS larc": partial(lars.lars_larc, **SGD),
    "LARS joint": partial(lars.lars_joint, **SGD),
    "LARS lr_inside": partial(lars.lars_lr_inside, **SGD),
}


def first_weights_and_grads() -> tuple[Array, list[Array]]:
    """One layer and its gradients, all standard normal: what the figures of the docs start from."""
    rng = np.random.default_rng(0)
    weight, *grads = rng.standard_normal((1 + FIRST_STEPS[-1], NUM_VALUES))
    return weight, grads


def relative_steps(trajectory: Iterable[Array], start: Array, lr: float) -> list[float]:
    """‖step‖ / (lr ‖w‖) of the steps FIRST_STEPS, of one layer."""
    sizes, before = [], start
    for number, weight in enumerate(trajectory, start=1):
        if number in FIRST_STEPS:
            sizes.append(norm(weight - before) / (lr * norm(before)))
        before = weight
    return sizes


def step_sizes(name: str) -> list[float]:
    """A row of the table of docs/variants.md; for LARS in units of its trust coefficient."""
    weight, grads = first_weights_and_grads()
    is_lars = name.startswith("LARS")
    lr, unit = (LARS_LR, SGD["trust_coefficient"]) if is_lars else (LAMB_LR, 1.0)
    layers, steps = [Layer(weight, ALMOST_NO_DECAY)], [(lr, [grad]) for grad in grads]
    trajectory = (weights for (weights,) in STEP_SIZES[name](layers, steps))
    return [size / unit for size in relative_steps(trajectory, weight, lr)]


if __name__ == "__main__":
    print("variant".ljust(16), *(f"t={t}".rjust(6) for t in FIRST_STEPS))
    for row in STEP_SIZES:
        print(row.ljust(16), *(f"{size:6.2f}" for size in step_sizes(row)))
