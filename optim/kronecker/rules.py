"""First-order rules: what makes a step of a gradient, or of a preconditioned one.

A rule is two things: the names of its state tensors, shaped like the parameter and zeros at first,
and a function from gradient and state to direction and new state. At the parameter's step t:

    sgd       b ← μ b + g                  direction b, or g + μ b with Nesterov momentum
    average   m ← β₁ m + (1 - β₁) g        direction m / (1 - β₁ᵗ)
    adam      m as above, v ← β₂ v + (1 - β₂) g²
              direction m̂ / (√v̂ + ε), m̂ = m / (1 - β₁ᵗ), v̂ = v / (1 - β₂ᵗ)
    plain     direction g
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from largebatch.optim.math.adam import adam_direction, corrected
from largebatch.optim.math.tensors import root
from largebatch.optim.options import require

State = Mapping[str, Tensor]
Group = Mapping[str, Any]
Advanced = tuple[Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Rule:
    """A first-order rule; your own is one more of these."""

    keys: tuple[str, ...]
    """The state's tensors that are shaped like the parameter."""
    advance: Callable[[Tensor, State, Group, int], Advanced]
    """From g, the state before, the group's options and t to the direction and the state after.

    t is 1 at the parameter's first step. The arguments are not to be written to.
    """


def sgd(grad: Tensor, state: State, group: Group, step: int) -> Advanced:
    buffer = state["momentum_buffer"] * group["momentum"] + grad
    direction = grad + group["momentum"] * buffer if group["nesterov"] else buffer
    return direction, {"momentum_buffer": buffer}


def average(grad: Tensor, state: State, group: Group, step: int) -> Advanced:
    beta1, _ = group["betas"]
    exp_avg = state["exp_avg"].lerp(grad, 1 - beta1)
    return corrected(exp_avg, beta1, step), {"exp_avg": exp_avg}


def adam(grad: Tensor, state: State, group: Group, step: int) -> Advanced:
    beta1, beta2 = group["betas"]
    exp_avg = state["exp_avg"].lerp(grad, 1 - beta1)
    exp_avg_sq = state["exp_avg_sq"].lerp(grad.square(), 1 - beta2)
    mean, squares = corrected(exp_avg, beta1, step), corrected(exp_avg_sq, beta2, step)
    direction = adam_direction(mean, squares, group["eps"], root)
    return direction, {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def plain(grad: Tensor, state: State, group: Group, step: int) -> Advanced:
    return grad, {}


RULES: Mapping[str, Rule] = {
    "sgd": Rule(("momentum_buffer",), sgd),
    "average": Rule(("exp_avg",), average),
    "adam": Rule(("exp_avg", "exp_avg_sq"), adam),
    "plain": Rule((), plain),
}


def rule_of(name: str, rule: str | Rule) -> Rule:
    """The rule that an option means."""
    if isinstance(rule, Rule):
        return rule
    require(rule in RULES, name, f"a Rule or one of {', '.join(RULES)}", repr(rule))
    return RULES[rule]
