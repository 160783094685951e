"""The squared norm of every sample's gradient, without ever making it.

A linear layer's weight gradient for one sample is the outer product δ xᵀ of what came in and what
came back, so its squared norm is ‖x‖² ‖δ‖² (Goodfellow 2015, arXiv:1510.01799). Where a sample has
several places t (a sequence) the products add up, and the squared norm of their sum is
Σ_tt' (x_t·x_t')(δ_t·δ_t') (Gray et al. 2024, arXiv:2411.00999, use it for this noise scale). Norm
layers have as few weights as features, an embedding has x_t·x_t' = 1 for equal symbols and 0
otherwise.

One sample is the smallest batch there is, so this is the least noisy source. It sees nn.Linear,
nn.Embedding, nn.LayerNorm and nn.RMSNorm, and nothing of other layers.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from largebatch.schedules import BatchSplit
from largebatch.train.noise.small_gradients import SmallGradients, wide

Squares = dict[str, Tensor]
"""Squared norm of each sample's gradient by the module's own name of the parameter; (samples,)."""


class ExampleGradients(SmallGradients):
    """Every sample's gradient, of the layers for which it is nearly free.

    The first dimension of a layer's input is the sample. Parameters that several layers share are
    not seen: their gradient is a sum over the layers.

    Attributes:
        missed: parameters that are trained and not seen.

    Raises:
        ValueError: the model has no layer that is seen.
    """

    def __init__(self, model: nn.Module) -> None:
        found = dict(_seen_parameters(model))
        self.layers = {name: (param,) for name, (_, _, param) in found.items()}
        trained = dict(model.named_parameters())
        self.missed = [
            name for name, param in trained.items()
            if param.requires_grad and name not in self.layers
        ]  # fmt: skip
        if not found:
            raise ValueError(
                "the model has none of the layers whose gradients are known sample by sample "
                "(nn.Linear, nn.Embedding, nn.LayerNorm, nn.RMSNorm): use noise.small=micro_batch"
            )
        self._sums: dict[str, list[tuple[Tensor, int]]] = {name: [] for name in found}
        modules: dict[nn.Module, dict[str, str]] = {}
        for name, (module, own, _) in found.items():
            modules.setdefault(module, {})[own] = name
        self._handles = [
            module.register_forward_hook(self._hook(names)) for module, names in modules.items()
        ]

    def _hook(self, names: dict[str, str]) -> Callable[[nn.Module, Any, Tensor], None]:
        def on_forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if not (self.active and output.requires_grad):
                return
            came_in = inputs[0].detach()
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda came_back: self.see(module, names, came_in, came_back)
            )

        return on_forward

    @torch.no_grad()
    def see(
        self, module: nn.Module, names: Mapping[str, str], came_in: Tensor, came_back: Tensor
    ) -> None:
        """Take in what came into a layer in one pass and what came back, (samples, …) each.

        Args:
            names: of the module's parameters that are seen, by their own names.
        """
        for own, squares in _SQUARES[type(module)](module, came_in, wide(came_back)).items():
            if own in names:
                self._sums[names[own]].append((squares.sum(), len(squares)))

    def small_batch(self, split: BatchSplit) -> int:
        return 1

    def part(self, split: BatchSplit, loss_scale: float | Tensor = 1.0) -> Tensor:
        seen, self._sums = self._sums, {name: [] for name in self.layers}
        for name, sums in seen.items():
            passes, samples = len(sums), sum(length for _, length in sums)
            if passes not in (0, split.gradient_accumulation_steps) or (
                passes and samples != split.per_rank
            ):
                raise RuntimeError(
                    f"the noise scale expected {split.per_rank} samples in "
                    f"{split.gradient_accumulation_steps} backward pass(es) of layer {name!r}, saw "
                    f"{samples} in {passes}: it is used more than once in a pass, or the first "
                    "dimension of its input is not the sample; use noise.small=micro_batch"
                )
        totals = [total for sums in seen.values() for total, _ in sums]
        if not totals:
            raise RuntimeError("the noise scale saw no backward pass in this step")
        unused = [torch.zeros_like(totals[0])] * split.gradient_accumulation_steps
        each = [[total for total, _ in sums] or unused for sums in seen.values()]
        flat = torch.stack([total for of_layer in each for total in of_layer])
        whole = flat.view(len(each), -1).sum(1)
        # A sample's gradient goes by as its share of the rank's mean.
        factor = loss_scale / split.per_rank
        return whole / (split.global_batch_size * factor * factor)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def _seen_parameters(model: nn.Module) -> Iterator[tuple[str, tuple[nn.Module, str, nn.Parameter]]]:
    """Each parameter that is seen: its name, its module, its name there."""
    uses: dict[nn.Parameter, int] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            uses[param] = uses.get(param, 0) + 1
    for name, module in model.named_modules():
        if type(module) not in _SQUARES or _is_strange(module):
            continue
        for own, param in module.named_parameters(recurse=False):
            if param.requires_grad and uses[param] == 1:
                yield f"{name}.{own}" if name else own, (module, own, param)


def _is_strange(module: nn.Module) -> bool:
    """Whether an embedding does more than to look up."""
    return isinstance(module, nn.Embedding) and bool(
        module.sparse or module.scale_grad_by_freq or module.max_norm is not None
    )


def _of_linear(module: nn.Module, came_in: Tensor, came_back: Tensor) -> Squares:
    del module
    x, delta = _by_place(wide(came_in)), _by_place(came_back)  # (samples, places, features)
    if x.shape[1] == 1:
        of_delta = _squares(delta[:, 0])
        return {"weight": _squares(x[:, 0]) * of_delta, "bias": of_delta}
    return {"weight": _of_products(x, delta), "bias": _squares(delta.sum(1))}


def _of_products(x: Tensor, delta: Tensor) -> Tensor:
    """‖Σ_t δ_t x_tᵀ‖² of each sample, by the cheaper of two ways."""
    _, places, inputs = x.shape
    outputs = delta.shape[2]
    if places * (inputs + outputs) <= inputs * outputs:
        return ((x @ x.mT) * (delta @ delta.mT)).sum((1, 2))
    at_once = max(1, _MOST_AT_ONCE // (inputs * outputs))
    chunks = zip(torch.split(x, at_once), torch.split(delta, at_once), strict=True)
    return torch.cat([_squares((delta.mT @ x).flatten(1)) for x, delta in chunks])


def _squares(rows: Tensor) -> Tensor:
    """‖row‖² of each; unlike squares that are then added up, it writes no tensor of their size."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms * norms


_MOST_AT_ONCE = 1 << 24


def _of_embedding(module: nn.Module, came_in: Tensor, came_back: Tensor) -> Squares:
    assert isinstance(module, nn.Embedding)
    symbols = came_in.reshape(len(came_in), -1)  # (samples, places)
    delta = came_back.reshape(*symbols.shape, -1)
    same = symbols[:, :, None] == symbols[:, None, :]
    if module.padding_idx is not None:
        same &= torch.ne(symbols, module.padding_idx)[:, :, None]
    # For each place the sum over those of its symbol, times what came back to it.
    return {"weight": (same.to(delta.dtype) @ delta).mul_(delta).sum((1, 2))}


def _of_norm(module: nn.Module, came_in: Tensor, came_back: Tensor) -> Squares:
    shape: Any = module.normalized_shape
    eps: Any = module.eps
    norm = functional.layer_norm if isinstance(module, nn.LayerNorm) else functional.rms_norm
    normal = norm(wide(came_in), shape, eps=eps)
    return {
        "weight": _squares(_by_place((came_back * normal).flatten(-len(shape))).sum(1)),
        "bias": _squares(_by_place(came_back.flatten(-len(shape))).sum(1)),
    }


def _by_place(tensor: Tensor) -> Tensor:
    """(samples, …, features) as (samples, places, features)."""
    return tensor.reshape(len(tensor), -1, tensor.shape[-1])


_SQUARES: dict[type[nn.Module], Callable[[nn.Module, Tensor, Tensor], Squares]] = {
    nn.Linear: _of_linear,
    nn.Embedding: _of_embedding,
    nn.LayerNorm: _of_norm,
    nn.RMSNorm: _of_norm,
}
