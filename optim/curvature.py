"""What the backward passes of a step say of a model's curvature, gathered by hooks on its layers.

For a layer with input rows a and gradients δ = ∂L/∂s of an item's loss L by the layer's output rows
s (`largebatch.optim.curvature_layers` says what the rows are), the Kronecker factors are

    A = (1 / P) Σ aaᵀ over all P positions        G = (1 / N) Σ δδᵀ over all positions

with N the number of items, that is, of terms in the mean that the loss is: samples, or tokens. With
one position per item, as in a network without weight sharing, A ⊗ G is the K-FAC approximation of
the Fisher matrix's block (Martens, Grosse 2015, https://arxiv.org/abs/1503.05671); for convolutions
it is KFC's (Grosse, Martens 2016, https://arxiv.org/abs/1602.01407, with the average over positions
in A and the sum in G, which their product does not see); for sequences it is that of "expand"
(Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636).

**Their scale.** A backward pass does not see δ. Whoever wrote the loop scaled the losses of the
passes, by 1 / accumulation or by a share of the batch, such that `p.grad` at the step is that of
the mean over all N items. R ranks that average their gradients divide by R afterwards; so on each
of them a pass sees

    δ̃ = (R / N) δ · c         c: the loss scale of mixed precision, 1 without

whatever the passes, their number and their sizes; and neither N nor R nor c is known in the pass.
So Σ δ̃δ̃ᵀ is kept as it comes, with the number of items beside it, and at the step, when both have
been added up over the ranks,

    G = (N / R²c²) Σ δ̃δ̃ᵀ      A = (1 / P) Σ aaᵀ

which is the same for every split of the same N items over passes and ranks, and for a batch
repeated any number of times. Where ranks do not hold equally many items, `loss` has to be scaled so
that its average over ranks is the mean over all items, for the gradient's sake as well.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from largebatch.optim.curvature_layers import Layer, input_sum, output_sum
from largebatch.optim.layout import is_dtensor
from largebatch.optim.roots import full_precision
from largebatch.optim.tensors import scalar


@dataclass
class Sums:
    """What a layer has seen on this rank since the last step."""

    inputs: Tensor
    """Σ aaᵀ, shape `layer.shape_in`."""
    outputs: Tensor
    """Σ δ̃δ̃ᵀ, shape `layer.shape_out`."""
    positions: Tensor
    """P, 0-d."""


@dataclass(frozen=True)
class Pending:
    """A forward pass through a layer, whose backward pass may come."""

    layer: Layer
    x: Tensor
    """What `output_sum` needs of the input."""
    inputs: Tensor
    positions: Tensor | int
    items: int


class Curvature:
    """Watches a model's layers.

    Args:
        sampled: take the gradients from `backward` alone, and not from the passes of training.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], sampled: bool) -> None:
        self._sampled = sampled
        self.active = True
        """Whether passes are taken note of."""
        self._told: int | None = None
        self._forget()
        self._handles = [
            layer.module.register_forward_hook(Hook(self, layer), with_kwargs=True)
            for layer in layers
        ]
        self._handles.append(model.register_forward_hook(Hook(self, None), with_kwargs=True))

    def _forget(self) -> None:
        self._sums: dict[Layer, Sums] = {}
        self._by_layer: dict[Layer, int] = {}
        self._by_model = 0
        self._open: list[tuple[GradientEdge, Pending | int]] = []

    def close(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._forget()

    # What passes do -----------------------------------------------------------------------------

    def see_forward(self, layer: Layer, x: Tensor, output: Tensor) -> None:
        """Sum up the input now, not when the gradient comes: so no activation is kept for it."""
        if not (self.active and torch.is_grad_enabled() and output.requires_grad):
            return
        if is_dtensor(x) or is_dtensor(output) or not layer.fits(x, output):
            raise RuntimeError(
                f"K-FAC needs to see whole rows of layer {layer.name!r}, which is tensor-parallel: "
                "shard its parameters by fully_shard alone, or freeze it"
            )
        with exactly(x.device):
            inputs, positions = input_sum(layer, x.detach())
        indices = x.detach() if isinstance(layer.module, nn.Embedding) else x.new_empty(0)
        items = len(output) if output.dim() > layer.sample_dims else 1
        self._await(output, Pending(layer, indices, inputs, positions, items))

    def see_output(self, output: Any) -> None:
        """Take note of how many samples the model was given, by what comes out of it."""
        if self.active and torch.is_grad_enabled():
            tensor = _first_differentiable(output)
            if tensor is not None:
                self._await(tensor, len(tensor))

    def _await(self, output: Tensor, pending: Pending | int) -> None:
        if self._sampled:
            self._open.append((get_gradient_edge(output), pending))
        else:
            hook: Callable[[Tensor], None] = partial(self._arrive, pending)
            output.register_hook(hook)  # type: ignore[no-untyped-call]

    def _arrive(self, pending: Pending | int, grad: Tensor) -> None:
        if isinstance(pending, int):
            self._by_model += pending
            return
        layer = pending.layer
        with exactly(grad.device):
            outputs = output_sum(layer, pending.x, grad.detach())
            positions = scalar(pending.positions, outputs)
            if layer in self._sums:
                sums = self._sums[layer]
                sums.inputs += pending.inputs
                sums.outputs += outputs
                sums.positions += positions
            else:
                inputs = pending.inputs.clone()  # a second pass over the same graph adds to it
                self._sums[layer] = Sums(inputs, outputs, positions.clone())
        self._by_layer[layer] = self._by_layer.get(layer, 0) + pending.items

    def backward(self, loss: Tensor) -> None:
        """Gradients by the layers' outputs alone: none arrives at a parameter, or at DDP."""
        if not self.active:
            return
        edges = [edge for edge, _ in self._open]
        if not edges:
            raise RuntimeError("the model has not been called with gradients since the last step")
        grads = torch.autograd.grad(loss, edges, retain_graph=True, allow_unused=True)
        for grad, (_, pending) in zip(grads, self._open, strict=True):
            if grad is not None:
                self._arrive(pending, grad)

    # What the step asks -------------------------------------------------------------------------

    def tell(self, items: int) -> None:
        self._told = (self._told or 0) + items

    def drop(self) -> None:
        """Forget the passes whose gradients are thrown away."""
        if self._sums and not self._sampled:
            self._told = None
            self._forget()

    def take(self) -> tuple[dict[Layer, Sums], int]:
        """The sums and the number of items since the last time, on this rank."""
        if self._open and not self._sums:
            raise RuntimeError(
                "fisher='true' takes the curvature from fisher_backward, which has not been called "
                "since the last step: call it after the forward pass, or choose fisher='empirical'"
            )
        items = self._told or self._by_model or max(self._by_layer.values(), default=0)
        sums = self._sums
        self._told = None
        self._forget()
        return sums, items


class Hook:
    """A forward hook that keeps neither the curvature alive nor goes along with a copied model."""

    def __init__(self, curvature: Curvature | None, layer: Layer | None) -> None:
        self._curvature = None if curvature is None else weakref.ref(curvature)
        self._layer = layer

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any
    ) -> None:
        curvature = None if self._curvature is None else self._curvature()
        if curvature is None:
            return
        if self._layer is None:
            curvature.see_output(output)
        else:
            curvature.see_forward(self._layer, args[0] if args else kwargs["input"], output)

    def __reduce__(self) -> tuple[type["Hook"], tuple[None, None]]:
        return Hook, (None, None)


def _first_differentiable(output: Any) -> Tensor | None:
    """The first tensor with a leading dimension and a gradient, within lists and mappings too."""
    if isinstance(output, Tensor):
        return output if output.dim() and output.requires_grad else None
    if isinstance(output, Mapping):
        output = output.values()
    elif not isinstance(output, list | tuple):
        return None
    found = (_first_differentiable(part) for part in output)
    return next((tensor for tensor in found if tensor is not None), None)


@contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """No gradients, no autocast, and no matrix product of less than FP32's precision."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision():
        yield
