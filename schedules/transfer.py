"""How rates tuned on one model move to a wider or deeper one, tensor by tensor: `factors`.

A wide network learns as a narrow one does where each matrix W, and each step of it, has a spectral
norm of √(fan_out / fan_in) (Yang, Simon, Bernstein 2023, arXiv:2310.17813), which is µP. What a
step's norm is at the learning rate 1 is a matter of the optimizer's direction, one of `STEPS`:

    "adam"         elements of one size, in few directions: √(fan_out · fan_in), so Θ(1 / fan_in)
    "relative"     a share of the weights' own norm, in many directions, as of Muon on spheres: Θ(1)
    "relative_adam"       the same in Adam's few directions, as of LAMB: Θ(1 / √fan_in)
    "relative_gradient"   the same in a gradient's, as of LARS: Θ(1 / √fan_in)
    "spectral"     √(fan_out / fan_in), as of Muon with that shape rule: Θ(1)
    "orthogonal"   1, as of Shampoo: Θ(√(fan_out / fan_in))
    "match_rms"    √max(fan_out, fan_in), as of Muon with that rule
    "original"     √max(1, fan_out / fan_in), as of Muon with that rule
    "gradient"     √(fan_in / fan_out), as of SGD: Θ(fan_out / fan_in)

Published: those of AdamW, Shampoo and Muon are the table of Gupta et al. 2026 (arXiv:2602.20937);
that of SGD is Yang, Simon, Bernstein's. That table has Θ(1) for LAMB too, as if its steps were in
many directions: "relative" asks for it.

Derived here: a grafted step, or SOAP's, K-FAC's and Mano's, is as long as that of the method it is
measured by, and goes by its rule. LAMB's direction is Adam's, at the weights' length of √fan_out
(of variance 1 / fan_in), and all of that is in few directions; LARS's is a gradient's. On spheres
Shampoo's and SOAP's are in few, too.

Measured: docs/schedules.md, with the commands. Steps of LAMB, LARS and SOAP have stable ranks of
about 2 at every width, as Adam's, and Muon's rise with it; outputs drift with width under Θ(1) for
LAMB and LARS, and stay under 1 / √fan_in.

Depth: with every residual branch times base_depth / depth, rates stay, and eps in the branches
takes the same factor (CompleteP, Dey et al. 2025, arXiv:2505.01618; taken over by Complete(d)P,
Mlodozeniec et al. 2025, arXiv:2512.22382). Steps that grow with the gradient take its inverse.

The batch is the affair of `scaling`: its factors and these multiply.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final


@dataclass(frozen=True)
class Fans:
    """A tensor as what it maps from and to.

    Attributes:
        fan_in: 1 for an embedding, which takes one of its rows, and for a vector.
    """

    fan_out: float
    fan_in: float


@dataclass(frozen=True)
class Placed:
    """A tensor of a model, and the same one in the model that was tuned.

    Attributes:
        multiplier: of its outputs, over that in the model that was tuned.
        branch: the factor of the residual branch that it is in, over that in the other model.
    """

    here: Fans
    base: Fans
    multiplier: float = 1.0
    branch: float = 1.0

    @property
    def gradient(self) -> float:
        """The size of its gradient's elements, over that in the other model."""
        return self.branch * self.multiplier * self.base.fan_out / self.here.fan_out


@dataclass(frozen=True)
class Factors:
    """On a tensor's learning rate, decoupled weight decay and eps; 1 leaves them."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def _rate(step: str, fans: Fans) -> float:
    """The learning rate, but for a constant, that makes a step √(fan_out / fan_in) long."""
    ratio = fans.fan_out / fans.fan_in
    return {
        "adam": 1 / fans.fan_in,
        "relative": 1.0,
        "relative_adam": 1 / fans.fan_in,  # over the size of the weights, which `factors` knows
        "relative_gradient": 1 / fans.fan_in,
        "spectral": 1.0,
        "orthogonal": math.sqrt(ratio),
        "match_rms": math.sqrt(ratio / max(fans.fan_out, fans.fan_in)),
        "original": math.sqrt(ratio / max(1.0, ratio)),
        "gradient": ratio,
    }[step]


STEPS: Final = (
    "adam", "relative", "relative_adam", "relative_gradient", "spectral", "orthogonal", "match_rms",
    "original", "gradient",
)  # fmt: skip


def factors(step: str, tensor: Placed) -> Factors:
    """What a tensor's rates, tuned on the base model, are to be multiplied by.

    What weights shrink by in a step stays: lr · weight_decay or, of a "relative" step that decay is
    part of, that times the norm of the weights over that of the direction.

    Args:
        step: one of `STEPS`.

    Raises:
        ValueError: it is none of them.
    """
    if step not in STEPS:
        raise ValueError(f"scaling.step must be one of {', '.join(STEPS)}, got {step!r}")
    lr = _rate(step, tensor.here) / _rate(step, tensor.base)
    if step.startswith("relative"):
        # Weights fall as the root of the fan that is summed over, unless a multiplier does it.
        wider = 1.0 if tensor.multiplier != 1.0 else tensor.here.fan_in / tensor.base.fan_in
        smaller = math.sqrt(wider)
        if step != "relative":
            lr *= smaller / tensor.multiplier
        if step == "relative_gradient":
            return Factors(lr, smaller / lr * tensor.gradient)
        return Factors(lr, smaller / lr, tensor.gradient)
    if step == "gradient":  # which a multiplier scales too, as the way back does
        return Factors(*_held(lr / (tensor.multiplier**2 * tensor.branch)))
    return Factors(*_held(lr / tensor.multiplier), tensor.gradient)


def _held(lr: float) -> tuple[float, float]:
    return lr, 1 / lr


_BY_NAME: Final = {
    "Adam": "adam",
    "AdamW": "adam",
    "NAdam": "adam",
    "RAdam": "adam",
    "RMSprop": "adam",
    "SGD": "gradient",
    "LARS": "relative_gradient",
    "LAMB": "relative_adam",
    "SOAP": "adam",
    "Mano": "adam",
}
_GRAFTED: Final = {"adam": "adam", "rmsprop": "adam", "adagrad": "adam", "sgd": "gradient"}


def step_of(optimizer: str, options: Mapping[str, Any]) -> str:
    """Which of `STEPS` the matrices of an optimizer are moved by; its other tensors go by "adam".

    Args:
        optimizer: the name of its class.
        options: its keywords, defaults included.

    Raises:
        ValueError: an optimizer, or a form of it, without a rule.
    """
    is_orthogonal = optimizer in ("Muon", "SOAPMuon")
    if options.get("hyperball"):
        return "relative" if is_orthogonal else "relative_adam"
    if is_orthogonal:
        return str(options["shape_rule"])
    if optimizer == "Shampoo" and options["grafting"] == "none":
        return "orthogonal"
    grafted = options.get("grafting") or options.get("graft")
    if optimizer in ("Shampoo", "KFAC") and grafted in _GRAFTED:
        return _GRAFTED[grafted]
    if optimizer in _BY_NAME:
        return _BY_NAME[optimizer]
    form = f" with graft={grafted}" if optimizer == "KFAC" else ""
    raise ValueError(
        f"no rule is known for how the rates of {optimizer}{form} move with width: say by "
        f"scaling.step how its steps grow, as one of {', '.join(STEPS)}"
    )
