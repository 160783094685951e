"""The Gauss-Newton blocks of a batch's mean cross-entropy, a block a layer, by products alone.

G_l = 1/B Σ J_lᵀ H J_l over the samples, where J_l is the Jacobian of a sample's logits by the
parameters of layer l and H = diag(p) - p pᵀ the Hessian of its loss by the logits. No entry of G_l
is ever held. J_lᵀ u is a backward pass; it is linear in u, so that its own gradient by u, along v,
is J_l v.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Layer = list[nn.Parameter]


def layers_of(model: nn.Module) -> list[Layer]:
    """The trained parameters, by the module that has them: a weight goes with its bias."""
    known: set[nn.Parameter] = set()
    layers = []
    for module in model.modules():
        own = [p for p in module.parameters(recurse=False) if p.requires_grad and p not in known]
        known.update(own)
        if own:
            layers.append(own)
    return layers


def gradients_of(model: nn.Module, inputs: Tensor, labels: Tensor) -> list[Tensor]:
    """The gradient of the batch's mean cross-entropy by each layer, a vector each: the layer's
    parameters laid end to end.

    Args:
        labels: of each sample its class; shape (samples,).
    """
    layers = layers_of(model)
    loss = cross_entropy(model(inputs), labels)
    grads = torch.autograd.grad(loss, [param for layer in layers for param in layer])
    return [flat(part) for part in by_layer(grads, layers)]


class Blocks:
    """The Gauss-Newton blocks of a batch, at the weights that the model has now; labels have no
    part in them.
    """

    def __init__(self, model: nn.Module, inputs: Tensor) -> None:
        self.layers = layers_of(model)
        self._logits: Tensor = model(inputs)  # (samples, classes)
        self._chances = self._logits.detach().softmax(1)
        self._cotangent = torch.zeros_like(self._logits, requires_grad=True)
        params = [param for layer in self.layers for param in layer]
        pulled = torch.autograd.grad(self._logits, params, self._cotangent, create_graph=True)
        self._pulled = by_layer(pulled, self.layers)

    def product(self, place: int, vector: Tensor) -> Tensor:
        """G_l v, for the layer at a place of `layers`; v is as long as its parameters together."""
        layer = self.layers[place]
        (pushed,) = torch.autograd.grad(
            self._pulled[place], self._cotangent, parts(vector, layer), retain_graph=True
        )
        chances = self._chances
        curved = chances * (pushed - (chances * pushed).sum(1, keepdim=True)) / len(pushed)
        return flat(torch.autograd.grad(self._logits, layer, curved, retain_graph=True))

    def mean_curvature(self, place: int, signs: Tensor) -> Tensor:
        """The mean of a block's eigenvalues, estimated from a vector of random signs."""
        return signs @ self.product(place, signs) / len(signs)


def by_layer(tensors: tuple[Tensor, ...], layers: list[Layer]) -> list[tuple[Tensor, ...]]:
    """Tensors of all parameters, by layers."""
    rest: Iterator[Tensor] = iter(tensors)
    return [tuple(next(rest) for _ in layer) for layer in layers]


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    """Tensors laid end to end."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def parts(vector: Tensor, layer: Layer) -> list[Tensor]:
    """What of a layer's vector belongs to each of its parameters."""
    sizes = [param.numel() for param in layer]
    return [
        part.view_as(param) for part, param in zip(torch.split(vector, sizes), layer, strict=True)
    ]


class Solution(NamedTuple):
    """A solution, and the products that it took."""

    vector: Tensor
    products: int


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], right: Tensor, tolerance: float, most: int
) -> Solution:
    """Solve A x = `right` for a positive definite A, from x = 0.

    Args:
        product: A v.
        tolerance: ends where the residual is so many times as long as `right`, or shorter.
        most: products.
    """
    found, residual = torch.zeros_like(right), right.clone()
    direction, square = residual.clone(), residual @ residual
    enough = tolerance**2 * square
    for done in range(most):
        if square <= enough:
            return Solution(found, done)
        image = product(direction)
        length = square / (direction @ image)
        found.add_(length * direction)
        residual.sub_(length * image)
        before, square = square, residual @ residual
        direction = residual + (square / before) * direction
    return Solution(found, most)
