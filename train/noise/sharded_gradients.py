"""Small gradients under FSDP2, where no rank holds a whole gradient but on its way out.

What goes into the reduce-scatter is the rank's own gradient of the parameters that one
`fully_shard` has put together: whole, and with all micro-batches whose synchronisation was put off
(`set_requires_gradient_sync`). It is the only place to measure it, so "per layer" means per such
group here.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from largebatch.schedules import BatchSplit
from largebatch.train.noise.small_gradients import PassingGradients

# Its name in torch from 2.13 on, and before.
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)

# Gradients of other dtypes are divided before the reduce-scatter, by a number of FSDP2's own.
_UNDIVIDED = (torch.float32, torch.bfloat16)


class ShardedGradients(PassingGradients):
    """Each rank's gradient under FSDP2, as it goes into the reduce-scatter.

    Layers are the groups of `fully_shard` by their module's name, "" for the model itself.

    Args:
        synchronised_once: a step has one reduce-scatter, whatever its micro-batches; else each
            micro-batch is one, and a small gradient is that of a micro-batch.

    Raises:
        ValueError: nothing of the model was given to `fully_shard`.
    """

    def __init__(self, model: nn.Module, synchronised_once: bool = True) -> None:
        groups = _groups(model)
        if not groups:
            raise ValueError("the model has no parameter sharded by fully_shard")
        super().__init__({name: params for name, (_, params) in groups.items()})
        self._once = synchronised_once
        self._modules = [module for module, _ in groups.values()]
        for name, (module, _) in groups.items():
            module.set_custom_reduce_scatter(_Watched(self, name))  # type: ignore[arg-type]

    def small_batch(self, split: BatchSplit) -> int:
        return split.per_rank if self._once else split.micro_batch_size

    def _each(self, split: BatchSplit) -> int:
        return 1 if self._once else split.gradient_accumulation_steps

    def remove(self) -> None:
        for module in self._modules:
            module.set_custom_reduce_scatter(_Watched(None, ""))  # type: ignore[arg-type]


class _Watched:
    """FSDP2's reduce-scatter, its input shown to a source."""

    def __init__(self, source: ShardedGradients | None, name: str) -> None:
        self._source, self._name = source, name

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        if self._source is not None:
            if input_tensor.dtype not in _UNDIVIDED:
                raise ValueError(
                    "the noise scale under FSDP2 needs gradients reduced in FP32 or bf16, got "
                    f"{input_tensor.dtype}: MixedPrecisionPolicy(reduce_dtype=torch.float32)"
                )
            # Padding, between ranks' parts, is zeros.
            self._source.see([input_tensor], [self._name])
        work: dist.Work | None = _reduce_scatter(
            output_tensor, input_tensor, op=op, group=group, async_op=async_op
        )
        return work


def _groups(model: nn.Module) -> Mapping[str, tuple[FSDPModule, list[nn.Parameter]]]:
    """Each module given to `fully_shard` that has sharded parameters of its own, and those."""
    owner: dict[nn.Parameter, str] = {}
    modules = {name: m for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    for name, module in modules.items():  # outer ones first: an inner one takes its own
        for param in module.parameters():  # type: ignore[attr-defined]
            if param.requires_grad and hasattr(param, "to_local"):
                owner[param] = name
    found: dict[str, tuple[FSDPModule, list[nn.Parameter]]] = {}
    for param, name in owner.items():
        found.setdefault(name, (modules[name], []))[1].append(param)
    return found
