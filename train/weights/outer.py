"""Outer steps over rounds of inner ones: DiLoCo (Douillard et al. 2023, arXiv:2311.08105,
Algorithm 1); with Muon inside it is MuLoCo (Thérien et al. 2025, arXiv:2505.23725).

The ranks are K groups. Each begins a round with the weights θ, steps its own θ_k H times on its own
share of the batches, and then all take one step of Nesterov's SGD on how far they have come:

    Δ = θ - mean_k θ_k
    b ← μ b + Δ,  θ ← θ - lr (Δ + μ b)      (without nesterov: θ ← θ - lr b)
    θ_k ← θ on every group

b begins at zero, as in torch. A group's optimizer keeps its state from round to round. K = 1 steps
Δ = θ - θ_1 and asks no other rank, K > 1 costs one all-reduce of the weights a round.

θ and b are FP32, or FP64 as the weights are, and lie as the weights do. Where we differ: rounds are
counted in steps of the whole run, so that the last may be shorter; buffers, of which the paper does
not speak, become their mean over the groups.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.conf.weights_config import OuterConfig
from largebatch.train.weights.tensors import locals_of, wide_copy

_BYTES_AT_ONCE: Final = 1 << 28
"""Of an all-reduce: what it takes beside a copy of the weights."""


class OuterSteps:
    """Outer steps of a model's trainable weights.

    Args:
        across: the ranks over which the sum of what each holds is a multiple of that over groups;
            None: there is one group.
        met: called after each step with several groups: brings together what else has parted.
    """

    def __init__(
        self,
        config: OuterConfig,
        model: nn.Module,
        across: dist.ProcessGroup | None = None,
        met: Callable[[], None] = lambda: None,
    ) -> None:
        self._config, self._across, self._met = config, across, met
        named = model.named_parameters()  # a tied one is stepped once
        self._params = {name: param for name, param in named if param.requires_grad}
        self._buffers = [each for each in model.buffers() if each.is_floating_point()]
        self._weights = {name: wide_copy(param) for name, param in self._params.items()}
        self._momentum = {name: torch.zeros_like(each) for name, each in self._weights.items()}

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds beside model and optimizer, and puts back in place: b. θ is the
        model's weights, as runs are saved when the groups have met.
        """
        return {"momentum": self._momentum}

    def begin(self) -> None:
        """Take the model's weights, which are those of all groups, as θ."""
        with torch.no_grad():
            torch._foreach_copy_(locals_of(self._weights), locals_of(self._params))

    def is_due(self, steps: int) -> bool:
        """Whether a round ends after so many inner steps of the run."""
        return steps % self._config.interval == 0

    @torch.no_grad()
    def step(self) -> None:
        """Make an outer step; every rank calls it. All groups begin the next round alike."""
        weights, params = locals_of(self._weights), locals_of(self._params)
        wide = [now.to(kept.dtype) for now, kept in zip(params, weights, strict=True)]
        come = torch._foreach_sub(weights, wide)
        if self._across is not None:
            self._average([*come, *self._buffers])
        momentum, mu = locals_of(self._momentum), self._config.momentum
        torch._foreach_mul_(momentum, mu)
        torch._foreach_add_(momentum, come)
        if self._config.nesterov:
            torch._foreach_add_(come, momentum, alpha=mu)
        step = come if self._config.nesterov else momentum
        torch._foreach_add_(weights, step, alpha=-self._config.lr)
        torch._foreach_copy_(params, weights)
        if self._across is not None:
            self._met()

    def _average(self, tensors: Sequence[Tensor]) -> None:
        """Make of each tensor its mean over the groups, in place."""
        for some in _parcels(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in some])
            dist.all_reduce(flat, group=self._across)
            flat /= dist.get_world_size(self._across)
            parts = torch.split(flat, [tensor.numel() for tensor in some])
            for tensor, mean in zip(some, parts, strict=True):
                tensor.copy_(mean.view_as(tensor))


def _parcels(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In order, of one dtype each and of no more bytes than go at once, but for single tensors."""
    parcel: list[Tensor] = []
    held = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if parcel and (tensor.dtype != parcel[0].dtype or held + size > _BYTES_AT_ONCE):
            yield parcel
            parcel, held = [], 0
        parcel.append(tensor)
        held += size
    if parcel:
        yield parcel
