"""What is noted of a layer and of a model's passes between two steps."""

from dataclasses import dataclass

from torch import Tensor
from torch.autograd.graph import Node

from largebatch.optim.curvature_layers import Layer


@dataclass
class Sums:
    """What a layer has seen on this rank since the last step."""

    inputs: Tensor
    """Σ aaᵀ, shape `layer.shape_in`."""
    outputs: Tensor
    """Σ δ̃δ̃ᵀ, shape `layer.shape_out`."""
    positions: Tensor
    """P, 0-d."""


@dataclass
class ModelCall:
    """One call of the model."""

    items: int = 0
    """Samples that it returned something for."""
    reached: int = -1
    """The backward pass that has come to what it returned last."""
    interval: int = -1
    """Between which steps its items were counted."""


@dataclass
class ForwardRecord:
    """A forward pass through a layer, whose backward pass may come."""

    layer: Layer
    x: Tensor
    """What `output_sum` needs of the input."""
    inputs: Tensor
    positions: Tensor | int
    items: int
    leaf: Node
    """Adds gradients to the weight that was used."""
    call: ModelCall | None
    """That it was a part of; None: the layer was called on its own, or computed again."""
    interval: int = -1
    """Between which steps it was counted."""
    grad: Tensor | None = None
    """δ̃ of the passes of a graph that is kept for more of them."""
    in_penalty: bool = False
    """Whether its gradient was taken such that it can be differentiated."""
    is_last: bool = False
    """Whether what it returned is what the model returned."""
