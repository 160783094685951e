"""Which layers have Kronecker-factored curvature, and what their rows are.

A layer is seen as matrices, one for each of its groups: weights W of shape (groups, out, in), where
a bias is one more column of W that meets an input of 1. Its input becomes rows a, its output's
gradient rows δ, one for each position at which the matrices are applied:

    Linear      every vector along the leading dimensions of the input is a position; so for
                transformers' Conv1D, a linear layer whose weight is transposed
    Conv1d/2d   every place of the kernel is one, its row the patch under the kernel, as padded
    Embedding   every index that is not `padding_idx` is one, its row 1 at the index, 0 elsewhere

Everything else, and a parameter that appears in two places of the model, has no such curvature.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn import functional

# Rows over which a product is summed in one go.
STRETCH = 256

# Elements of a convolution's patches that are laid out at a time.
PATCH_ELEMENTS = 1 << 25


@dataclass(frozen=True, eq=False)
class Layer:
    """A module whose weight and bias are preconditioned together, as matrices (groups, out, in)."""

    name: str
    """Of its weight, as the model names it."""
    module: nn.Module
    weight: nn.Parameter
    bias: nn.Parameter | None
    groups: int
    outputs: int
    """Rows of each group's matrix."""
    inputs: int
    """Columns of each group's matrix, that of the bias included."""
    diagonal_in: bool
    """Of the input's factor only the diagonal is kept: exact for indices, else it is too large."""
    diagonal_out: bool

    @property
    def params(self) -> list[nn.Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    @property
    def shape_in(self) -> tuple[int, ...]:
        return (self.groups, self.inputs) if self.diagonal_in else (self.groups, *[self.inputs] * 2)

    @property
    def shape_out(self) -> tuple[int, ...]:
        sizes = [self.outputs] if self.diagonal_out else [self.outputs] * 2
        return (self.groups, *sizes)

    @property
    def sample_dims(self) -> int:
        """Dimensions of what it returns for one sample at one position."""
        return self.weight.dim() - 1 if isinstance(self.module, nn.Conv1d | nn.Conv2d) else 1

    @property
    def dtype(self) -> torch.dtype:
        """Of statistics and of arithmetic."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    def fits(self, x: Tensor, output: Tensor) -> bool:
        """Whether they are of the whole layer: tensor parallelism cuts rows into parts."""
        if isinstance(self.module, nn.Embedding):
            return output.shape[-1] == self.outputs
        conv = isinstance(self.module, nn.Conv1d | nn.Conv2d)
        channels = 1 - self.weight.dim() if conv else -1
        features = self.weight.shape[0 if is_transposed(self.module) else 1]
        given = x.shape[channels] == features * self.groups
        return given and output.shape[channels] == self.groups * self.outputs

    def matrices(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors shaped like `params` as matrices (groups, out, in), in `dtype`."""
        weight, *biases = (tensor.to(self.dtype) for tensor in tensors)
        weight = weight.t() if is_transposed(self.module) else weight
        rows = weight.reshape(self.groups, self.outputs, -1)
        columns = [bias.reshape(self.groups, self.outputs, 1) for bias in biases]
        return torch.cat([rows, *columns], dim=2)

    def tensors(self, matrices: Tensor) -> list[Tensor]:
        """The opposite of `matrices`."""
        rows = matrices if self.bias is None else matrices[..., :-1]
        columns = is_transposed(self.module)
        weight = rows[0].t() if columns else rows.reshape(self.weight.shape)
        if self.bias is None:
            return [weight]
        return [weight, matrices[..., -1].reshape(self.bias.shape)]


def find_layers(
    model: nn.Module,
    max_factor_size: int,
    is_trained: Callable[[nn.Parameter], bool] = lambda param: param.requires_grad,
) -> list[Layer]:
    """The layers of a model that have curvature, in the order of its modules.

    Args:
        max_factor_size: a factor with more rows is kept as its diagonal.
        is_trained: a layer whose weight is not has no curvature, a bias that is not is none of it.
    """
    within_attention = {
        id(part)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for part in module.modules()  # it takes their weights without calling them
    }
    places: dict[int, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            places[id(param)] = places.get(id(param), 0) + 1
    layers = []
    for prefix, module in model.named_modules():
        if id(module) in within_attention or not _has_curvature(module):
            continue
        name = f"{prefix}.weight" if prefix else "weight"
        layer = _layer(name, module, max_factor_size, is_trained)
        if layer is not None and all(places[id(param)] == 1 for param in layer.params):
            layers.append(layer)
    return layers


def without_bias(layer: Layer) -> Layer:
    """The layer's weight alone."""
    if layer.bias is None:
        return layer
    return replace(layer, bias=None, inputs=layer.inputs - 1)


def _has_curvature(module: nn.Module) -> bool:
    """By what it computes, so that a subclass that computes something else has none."""
    forward = type(module).forward
    if is_conv1d_of_transformers(module):
        return True
    if isinstance(module, nn.Embedding):
        plain = forward is nn.Embedding.forward
        return plain and not (module.scale_grad_by_freq or module.sparse)
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return forward in (nn.Conv1d.forward, nn.Conv2d.forward)
    return isinstance(module, nn.Linear) and forward is nn.Linear.forward


def is_conv1d_of_transformers(module: nn.Module) -> bool:
    """Whether it is the linear layer of GPT-2, whose weight is (in, out); known by name."""
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D")


def is_transposed(module: nn.Module) -> bool:
    """Whether its weight is (in, out)."""
    return isinstance(module, nn.Embedding) or is_conv1d_of_transformers(module)


def signature(layer: Layer) -> tuple[Any, ...]:
    """What tells it from others: two of one signature are the same."""
    values = (getattr(layer, field.name) for field in fields(layer))
    return tuple(id(v) if isinstance(v, nn.Module | Tensor) else v for v in values)


def _layer(
    name: str, module: nn.Module, max_factor_size: int, is_trained: Callable[[nn.Parameter], bool]
) -> Layer | None:
    # Not the attribute: a parametrised weight is computed, and no parameter.
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or not is_trained(weight):
        return None
    if bias is not None and not is_trained(bias):
        bias = None
    embeds, columns = isinstance(module, nn.Embedding), is_transposed(module)
    groups = module.groups if isinstance(module, nn.Conv1d | nn.Conv2d) else 1
    outputs = weight.shape[1] if columns else weight.shape[0] // groups
    inputs = weight.shape[0] if columns else weight[0].numel()
    inputs += bias is not None
    return Layer(
        name=name,
        module=module,
        weight=weight,
        bias=bias,
        groups=groups,
        outputs=outputs,
        inputs=inputs,
        diagonal_in=embeds or inputs > max_factor_size,
        diagonal_out=outputs > max_factor_size,
    )


# Sums over positions ------------------------------------------------------------------------


def input_sum(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor | int]:
    """Σ aaᵀ over the positions of an input, shape `layer.shape_in`, and how many there are."""
    module = layer.module
    if isinstance(module, nn.Embedding):
        indices = x.reshape(-1).long()
        ones = torch.ones(indices.shape, dtype=layer.dtype, device=x.device)
        # Not by bincount, which makes the host wait; whole numbers add up alike in any order.
        counts = torch.zeros(layer.inputs, dtype=layer.dtype, device=x.device)
        counts.scatter_add_(0, indices, ones)
        if module.padding_idx is None:
            return counts.unsqueeze(0), x.numel()
        counts[module.padding_idx] = 0.0
        return counts.unsqueeze(0), counts.sum()
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        rows = x.reshape(1, -1, x.shape[-1]).to(layer.dtype)
        return _gram(_with_ones(layer, rows), layer.diagonal_in), rows.shape[1]
    x = x.reshape(-1, *x.shape[-1 - len(module.kernel_size) :]).to(layer.dtype)
    total, positions = x.new_zeros(layer.shape_in), 0
    growth = math.prod(module.kernel_size) / math.prod(module.stride)  # of patches over images
    samples = max(1, int(PATCH_ELEMENTS / (1 + growth * x[:1].numel())))
    for part in torch.split(x, samples):
        rows = patches(module, part)
        total += _gram(_with_ones(layer, rows), layer.diagonal_in)
        positions += rows.shape[1]
    return total, positions


def output_sum(layer: Layer, x: Tensor, grad: Tensor) -> Tensor:
    """Σ δδᵀ over the positions of an output's gradient, shape `layer.shape_out`.

    Args:
        x: the indices that an embedding was given; other layers do not need their input.
    """
    module = layer.module
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        images = grad.reshape(-1, *grad.shape[-1 - len(module.kernel_size) :]).flatten(2)
        rows = images.reshape(len(images), layer.groups, layer.outputs, -1)  # places come last
        rows = rows.permute(1, 0, 3, 2).reshape(layer.groups, -1, layer.outputs)
    else:
        rows = grad.reshape(1, -1, layer.outputs)
    rows = rows.to(layer.dtype)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        rows = rows * (x.reshape(1, -1, 1) != module.padding_idx)
    return _gram(rows, layer.diagonal_out)


def patches(module: nn.Conv1d | nn.Conv2d, x: Tensor) -> Tensor:
    """What lies under the kernel at each of its places, (groups, positions, in / groups · kernel).

    In the order of a flattened `module.weight[0]`: channel, then the places of the kernel.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, _pads(module), mode=mode)
    flat = isinstance(module, nn.Conv1d)
    if flat:
        x = x.unsqueeze(2)  # an image one pixel high
    before = (1,) if flat else ()
    columns = functional.unfold(
        x,
        kernel_size=(*before, *module.kernel_size),
        dilation=(*before, *module.dilation),
        stride=(*before, *module.stride),
    )  # (n, in · kernel, places)
    size = columns.shape[1] // module.groups
    columns = columns.reshape(len(x), module.groups, size, -1).permute(1, 0, 3, 2)
    return columns.reshape(module.groups, -1, size)


def _pads(module: nn.Conv1d | nn.Conv2d) -> list[int]:
    """As `functional.pad` takes them: before and after, the last dimension first."""
    pads: list[int] = []
    for dim in reversed(range(len(module.kernel_size))):
        if module.padding == "same":
            total = module.dilation[dim] * (module.kernel_size[dim] - 1)
            pads += [total // 2, total - total // 2]
        else:
            size = 0 if module.padding == "valid" else int(module.padding[dim])
            pads += [size, size]
    return pads


def _with_ones(layer: Layer, rows: Tensor) -> Tensor:
    """With the input of 1 that a bias meets."""
    return rows if layer.bias is None else functional.pad(rows, (0, 1), value=1.0)


def _gram(rows: Tensor, diagonal: bool) -> Tensor:
    """Σ rᵀr over the rows of each group, or its diagonal.

    In stretches whose sums are then added up: over many rows one product after another loses
    digits, and takes those that a repeated batch repeats.
    """
    if diagonal:
        return rows.square().sum(dim=1)
    groups, count, size = rows.shape
    stretch = max(STRETCH, size)  # so that the sums take no more memory than the rows
    whole = count - count % stretch
    total = rows[:, whole:].mT @ rows[:, whole:]
    if whole:
        parts = rows[:, :whole].reshape(groups, -1, stretch, size)
        total = total + (parts.mT @ parts).sum(dim=1)
    return total


@dataclass
class FactorSums:
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
    """The last backward pass that reached its output."""
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
