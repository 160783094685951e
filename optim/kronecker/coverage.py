"""What K-FAC says, once: how much of a model has curvature, and which layers it does not see."""

import logging
import warnings
from collections.abc import Collection, Mapping

from torch import Tensor

from largebatch.optim.kronecker.layers import Layer
from largebatch.optim.sharding.layout import Name

log = logging.getLogger("largebatch.optim.kfac")


def coverage(names: Mapping[Tensor, Name], layers: Collection[Layer]) -> tuple[str, float]:
    """A sentence on the weights (two dimensions and more) that are trained, and what part of their
    elements has curvature."""
    curved = {layer.weight for layer in layers}
    weights = {p: name for p, name in names.items() if p.dim() > 1 and p.requires_grad}
    without = [repr(name) for param, name in weights.items() if param not in curved]
    total = sum(param.numel() for param in weights)
    part = sum(p.numel() for p in weights if p in curved) / max(total, 1)
    sentence = (
        f"KFAC has curvature for {len(weights) - len(without)} of {len(weights)} weights, "
        f"{part:.0%} of their elements"
    )
    if without:
        sentence += f"; its fallback moves {first_three(without)}"
    return sentence, part if weights else 1.0


def say_coverage(names: Mapping[Tensor, Name], layers: Collection[Layer]) -> None:
    """Log it; warn where less than half has curvature."""
    sentence, part = coverage(names, layers)
    if part < 0.5:
        warnings.warn(
            f"{sentence}: only Linear, Conv1d, Conv2d, Embedding and transformers' Conv1D have "
            "curvature, and what is used in two places has none",
            stacklevel=4,
        )
    else:
        log.info(sentence)


def warn_of_blind(layers: Collection[Layer]) -> None:
    """Warn of layers that have gradients and that no forward pass was seen through."""
    if layers:
        names = first_three([repr(layer.name) for layer in layers])
        warnings.warn(
            f"KFAC has seen no pass through {names}, which have gradients, and does not "
            "precondition them: call the layers as modules, and the model that KFAC was given (a "
            "copy, or a model compiled and called before, is not watched)",
            stacklevel=4,
        )


def warn_of_uses_elsewhere(layers: Collection[Layer]) -> None:
    """Warn of layers that lose their curvature because their weights are used without them too."""
    names = first_three([repr(layer.name) for layer in layers])
    warnings.warn(
        f"KFAC leaves {names} to its fallback: the model uses it without its "
        "module too, as in functional.linear(x, embedding.weight), so that its gradient is of all "
        "uses and its curvature would be of the module's alone",
        stacklevel=4,
    )


def first_three(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}"
