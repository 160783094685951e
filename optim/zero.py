"""LARS and LAMB inside DeepSpeed ZeRO and torch's ZeroRedundancyOptimizer.

DeepSpeed gives the optimizer flat FP32 tensors, each made of parts of many tensors, and the trust
ratio of such a flat tensor is that of no layer. It also steps the optimizer once for each of them,
with the others out of sight, so that no step sees all the gradients that a global clip is about.
`bind` finds out where the tensors lie and tells the optimizer: each layer then has a ratio of its
own, from norms that are summed over the ranks, and the clip takes the gradient norm that DeepSpeed
has computed.
"""

import sys
from collections.abc import Iterable
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from largebatch.optim.base import Group
from largebatch.optim.layerwise.optimizer import LayerwiseOptimizer
from largebatch.optim.sharding.layout import Layout, Name, Piece, Reduction, layout_of, split_sizes
from largebatch.optim.sharding.zero_fragments import Flat, read_flats, refusal


def bind(wrapper: Any) -> LayerwiseOptimizer:
    """Tell the LARS or LAMB inside `wrapper` where the layers lie, and return that optimizer.

    Call it on every rank before the first step: after `deepspeed.initialize`, or after the last
    parameter group was added to a `ZeroRedundancyOptimizer`. Calling it again does no harm, and
    loading a checkpoint undoes nothing. An engine without ZeRO needs it in bf16 and fp16: there
    DeepSpeed makes a step of its own, with weight decay, before the first one. `bind` undoes it.

    Args:
        wrapper: a DeepSpeed engine or a `ZeroRedundancyOptimizer`.

    Raises:
        TypeError: it is neither, or the optimizer in it is not one of this package.
        ValueError: a group's `norm_groups` do not fit its tensors, or `norm_dim` is not 0 in ZeRO.
        RuntimeError: an engine that lays its tensors out in a way not known here.
    """
    if _is_a(wrapper, "torch.distributed.optim.zero_redundancy_optimizer:ZeroRedundancyOptimizer"):
        return _bind_redundancy(wrapper)
    if _is_a(wrapper, "deepspeed.runtime.engine:DeepSpeedEngine"):
        return _bind_engine(wrapper)
    raise TypeError(
        "bind takes a DeepSpeed engine or a ZeroRedundancyOptimizer, got "
        f"{type(wrapper).__name__}; an optimizer that is in neither needs no binding"
    )


def _is_a(instance: object, path: str) -> bool:
    """isinstance for a class that need not be imported: who holds an instance has done so."""
    module, name = path.split(":")
    cls = getattr(sys.modules.get(module), name, None)
    return cls is not None and isinstance(instance, cls)


def _ours(optimizer: object, holder: str) -> LayerwiseOptimizer:
    if isinstance(optimizer, LayerwiseOptimizer):
        return optimizer
    raise TypeError(
        f"bind needs LARS or LAMB inside the {holder}, got {type(optimizer).__name__}; "
        "an elementwise optimizer needs no binding"
    )


def _whole(param: Tensor, name: Name, group: Group) -> Layout:
    """The layout of a parameter that this rank holds all of."""
    return layout_of(param, name, group.get("norm_groups"), group.get("norm_dim", 0))


# ZeroRedundancyOptimizer: whole tensors, each of them updated by one rank ------------------------


def _bind_redundancy(wrapper: Any) -> LayerwiseOptimizer:
    optimizer = _ours(wrapper.optim, "ZeroRedundancyOptimizer")

    # The optimizer within has a part of the parameters and would number them on each rank anew.
    names: dict[Tensor, Name] = {}
    for group in wrapper.param_groups:
        numbers = range(len(names), len(names) + len(group["params"]))
        names.update(zip(group["params"], group.get("param_names", numbers), strict=True))
    layouts = {
        param: _whole(param, names[param], group)
        for group in optimizer.param_groups
        for param in group["params"]
    }

    def clip_norm() -> Tensor:
        """Of all gradients, which every rank has, although it updates a part of the parameters."""
        return _norm(p.grad for group in wrapper.param_groups for p in group["params"])

    optimizer.bind_layouts(layouts, clip_norm=clip_norm)
    return optimizer


def _norm(grads: Iterable[Tensor | None]) -> Tensor:
    """‖g‖ of all gradients taken together, 0-d, in FP32 for bf16 and fp16 gradients too."""
    present = [grad for grad in grads if grad is not None]
    return torch.nn.utils.get_total_norm(
        [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in present]
    )


# DeepSpeed --------------------------------------------------------------------------------------


def _bind_engine(engine: Any) -> LayerwiseOptimizer:
    if engine.mpu is not None:
        raise refusal("model parallelism (mpu)")
    if engine.has_moe_layers:
        raise refusal("mixture-of-experts layers")
    zero = engine.optimizer
    if isinstance(zero, LayerwiseOptimizer):  # no ZeRO, FP32: it has the model's own parameters
        return zero
    optimizer = _ours(getattr(zero, "optimizer", zero), "DeepSpeed engine")
    for group in optimizer.param_groups:  # DeepSpeed has put others in place of those named there
        group.pop("param_names", None)
    names = {param: name for name, param in engine.module.named_parameters()}
    if type(zero).__name__ == "FP16_UnfusedOptimizer":  # no ZeRO: FP32 copies of whole tensors
        if engine.global_steps == 0:
            # When it was built it made a step, with zero gradients but with weight decay.
            zero.refresh_fp32_params()
            optimizer.state.clear()
        layouts = {
            copy: _whole(copy, names[param], group)
            for group, params in zip(optimizer.param_groups, zero.fp16_groups, strict=True)
            for copy, param in zip(group["params"], params, strict=True)
        }
        optimizer.bind_layouts(layouts)
        return optimizer

    flats, ranks = read_flats(zero, names)
    layouts = {flat.tensor: _layout(flat, ranks) for flat in flats}
    optimizer.bind_layouts(layouts, clip_norm=partial(_received_norm, zero))
    return optimizer


def _layout(flat: Flat, ranks: ProcessGroup) -> Layout:
    """Cut the fragments into layers: one of each tensor, or several where it has norm_groups."""
    layers: list[str] = []
    spans = []  # for each tensor: its layers, with the elements at which they begin and end
    for name, shape in zip(flat.names, flat.shapes, strict=True):
        parts = _parts(name, shape, flat.group)
        edges = pairwise(accumulate((length for _, length in parts), initial=0))
        spans.append([(len(layers) + part, *edge) for part, edge in enumerate(edges)])
        layers += [part for part, _ in parts]

    pieces = []
    for fragment in flat.fragments:
        fragment_end = fragment.tensor_start + fragment.length
        for layer, start, end in spans[fragment.tensor]:
            first, stop = max(start, fragment.tensor_start), min(end, fragment_end)
            if first < stop:
                place = fragment.flat_start + first - fragment.tensor_start
                pieces.append(Piece(layer, place, stop - first))
    reductions = (Reduction(ranks),) if ranks.size() > 1 else ()
    return Layout(tuple(layers), tuple(pieces), reductions)


def _parts(name: str, shape: torch.Size, group: Group) -> list[tuple[str, int]]:
    """The layers of a tensor in the order of its elements: name and number of elements of each."""
    norm_groups, norm_dim = group.get("norm_groups"), group.get("norm_dim", 0)
    if norm_groups is None:
        return [(name, shape.numel())]
    sizes = split_sizes(shape, name, norm_groups, norm_dim)
    if norm_dim % len(shape) != 0:
        raise ValueError(
            f"norm_dim must be 0 in ZeRO, got {norm_dim} for parameter {name!r}: DeepSpeed lays "
            "tensors out flat, where rows lie together and columns do not; use FSDP2, or hold the "
            "tensor transposed"
        )
    row = shape[1:].numel()
    return [(f"{name}[{part}]", size * row) for part, size in enumerate(sizes)]


def _received_norm(zero: Any) -> Tensor:
    """‖g‖ over all groups and ranks, 0-d, of the gradients as DeepSpeed gives them to `step`.

    They are unscaled, and clipped where `gradient_clipping` is set; the norm that DeepSpeed keeps
    is from before that clip.
    """
    norm = zero._global_grad_norm
    if norm is None:
        raise RuntimeError(
            "max_grad_norm needs the gradient norm, which DeepSpeed was set not to take: set "
            "zero_optimization.compute_grad_norm to true, or max_grad_norm to inf"
        )
    norm = torch.as_tensor(norm, dtype=torch.float32)
    if zero.clip_grad > 0:
        norm = norm / torch.clamp((norm + 1e-6) / zero.clip_grad, min=1.0)
    return norm
