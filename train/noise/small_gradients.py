"""Squared norms of small gradients, taken where they exist: before they are averaged away.

The noise scale (`largebatch.schedules.NoiseScale`) needs the mean squared norm of the gradients of
small batches beside that of their mean over the whole batch, which is in `p.grad` after the
backward passes. A gradient source is a place where small gradients go by:

- `RankGradients`: each rank's, micro-batches accumulated, in DDP's communication hook;
- `ShardedGradients`: the same under FSDP2, by groups of `fully_shard`, in its reduce-scatter;
- `MicroBatchGradients`: every micro-batch's, where autograd hands it to its parameter;
- `ExampleGradients` (`example_gradients.py`): every sample's, from activations.

All read FP32 squares of gradients before averaging, clipping and weight decay. Its numbers are
this rank's part of the mean over all small gradients: the parts of all ranks add up to it, and
travel with any other sum. Parameters must not move within a step; the loss is a mean over samples,
weighted so that `p.grad` becomes the gradient of the global batch's mean loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from largebatch.optim.math.tensors import CPU_STRETCH, norm_in_stretches
from largebatch.optim.sharding.layout import local
from largebatch.schedules import BatchSplit

Layers = Mapping[str, Sequence[nn.Parameter]]
"""What norms are taken of, by name: each parameter, or the parameters of a module."""


class SmallGradients(ABC):
    """A gradient source, made once a model before its first backward pass.

    Attributes:
        layers: what it sees.
        active: whether it looks; it is the same through all passes of a step.
    """

    layers: Layers
    active: bool = True

    @abstractmethod
    def small_batch(self, split: BatchSplit) -> int:
        """Samples in one small gradient."""

    @abstractmethod
    def part(self, split: BatchSplit, loss_scale: float | Tensor = 1.0) -> Tensor:
        """This rank's part of the mean ‖g‖² of the step's small gradients; shape (layers,), FP32.

        To be called once a step, after its backward passes.

        Args:
            loss_scale: what the loss was multiplied with against underflow.

        Raises:
            RuntimeError: other backward passes went by than `split` says.
        """

    @abstractmethod
    def remove(self) -> None:
        """Look no more."""


class PassingGradients(SmallGradients):
    """A source by which whole gradients go: their squares stay on the device until the step's end.

    Attributes:
        metric: where set, P of each parameter, by name and in its shape: `weighted_part` then
            gives ‖√P g‖² = Σ P g² beside ‖g‖². It must stay as it is from the first backward pass
            of a step to the last.
    """

    metric: Mapping[str, Tensor] | None = None

    def __init__(self, layers: Layers) -> None:
        self.layers = layers
        self._seen: dict[str, list[Tensor]] = {name: [] for name in layers}
        self._weighted: list[Tensor] = []

    def see(self, gradients: Sequence[Tensor], names: Sequence[str]) -> None:
        """Take in gradients as they go by; they are left as they are."""
        if not self.active:
            return
        gradients = [gradient.detach() for gradient in gradients]
        for name, square in zip(names, squares_of(gradients), strict=True):
            self._seen[name].append(square)
        if self.metric is not None:
            pairs = [(g, n) for g, n in zip(gradients, names, strict=True) if n in self.metric]
            if pairs:
                weights = [self.metric[name] for _, name in pairs]
                self._weighted += weighted_squares([gradient for gradient, _ in pairs], weights)

    @abstractmethod
    def _each(self, split: BatchSplit) -> int:
        """How often every gradient goes by in a step, on one rank."""

    def part(self, split: BatchSplit, loss_scale: float | Tensor = 1.0) -> Tensor:
        seen, self._seen = self._seen, {name: [] for name in self.layers}
        each = self._each(split)
        counts = {len(squares) for squares in seen.values()} - {0}
        if counts != {each}:
            raise RuntimeError(
                f"the noise scale expected each gradient {each} time(s) in this step, and saw them "
                f"{sorted(counts) or 'not at all'}: read it once a step, after the backward "
                "passes, and say into how many the step is cut"
            )
        first = next(squares[0] for squares in seen.values() if squares)
        unused = [torch.zeros_like(first)] * each
        flat = torch.stack([square for squares in seen.values() for square in squares or unused])
        whole = flat if each == 1 else flat.view(len(seen), each).sum(1)
        return whole / self._divisor(split, loss_scale)

    def weighted_part(self, split: BatchSplit, loss_scale: float | Tensor = 1.0) -> Tensor:
        """As `part` in the metric, all layers added up; 0-d."""
        seen, self._weighted = self._weighted, []
        return torch.stack(seen).sum() / self._divisor(split, loss_scale)

    def _divisor(self, split: BatchSplit, loss_scale: float | Tensor) -> float | Tensor:
        each = self._each(split)
        factor = 1 / each * loss_scale  # of what goes by, against a small batch's mean
        return split.data_parallel_size * each * factor * factor


class RankGradients(PassingGradients):
    """Each rank's gradient under DDP, as it goes into the all-reduce; DDP takes one such hook.

    Raises:
        ValueError: there is one rank only, which averages nothing.
    """

    def __init__(self, replica: DistributedDataParallel) -> None:
        if dist.get_world_size(replica.process_group) < 2:
            raise ValueError("the gradients of ranks differ from their mean from 2 ranks on, got 1")
        super().__init__(trainable(replica.module))
        names: dict[Tensor, str] = {param: name for name, (param,) in self.layers.items()}

        def hook(group: dist.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            self.see(bucket.gradients(), [names[param] for param in bucket.parameters()])
            return allreduce_hook(group, bucket)

        replica.register_comm_hook(replica.process_group, hook)

    def small_batch(self, split: BatchSplit) -> int:
        return split.per_rank

    def _each(self, split: BatchSplit) -> int:
        return 1

    def remove(self) -> None:
        self.active = False  # the hook itself is DDP's for life


class MicroBatchGradients(PassingGradients):
    """The gradient of every micro-batch on every rank, as autograd adds it to `p.grad`.

    For parameters that are whole on each rank: in one process, and under DDP.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(trainable(model))
        hooks = ((param, self._hook(name)) for name, (param,) in self.layers.items())
        self._handles = [
            param.register_hook(hook)  # type: ignore[no-untyped-call]
            for param, hook in hooks
        ]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        return lambda gradient: self.see([gradient], [name])

    def small_batch(self, split: BatchSplit) -> int:
        return split.micro_batch_size

    def _each(self, split: BatchSplit) -> int:
        return split.gradient_accumulation_steps

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def trainable(model: nn.Module) -> Layers:
    """Each parameter that gets a gradient as a layer of its own, a tied one once."""
    return {name: (param,) for name, param in model.named_parameters() if param.requires_grad}


def squares_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """‖tensor‖² of each, 0-d and FP32 whatever their dtype (FP64 for FP64)."""
    if tensors[0].device.type == "cpu":
        return [_square(_flat(tensor)) for tensor in tensors]
    dtype = torch.promote_types(tensors[0].dtype, torch.float32)
    norms = torch._foreach_norm(list(tensors), 2, dtype=dtype)
    return torch._foreach_mul(norms, norms)


def weighted_squares(tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """Σ weight · tensor² of each, 0-d; the weights are FP32 or wider."""
    if tensors[0].device.type == "cpu":
        pairs = zip(tensors, weights, strict=True)
        return [_weighted_square(_flat(tensor), _flat(weight)) for tensor, weight in pairs]
    wider = [wide(tensor) for tensor in tensors]
    products = torch._foreach_mul(wider, list(weights))
    torch._foreach_mul_(products, wider)
    return [product.sum() for product in products]  # XPU takes a dot to the host


def _square(flat: Tensor) -> Tensor:
    """On a CPU, which adds up in sequence: a long sum in one go would lose digits."""
    if flat.numel() <= CPU_STRETCH:
        return torch.dot(flat, flat)  # the least work that there is for a call
    norm = norm_in_stretches(flat, flat.dtype)
    return norm * norm


def _weighted_square(flat: Tensor, weight: Tensor) -> Tensor:
    """The same in stretches, whose products stay in the cache."""
    if flat.numel() <= CPU_STRETCH:
        return torch.dot(flat, flat * weight)
    product = torch.empty(CPU_STRETCH, dtype=weight.dtype)
    sums = []
    for part, by in zip(
        torch.split(flat, CPU_STRETCH), torch.split(weight, CPU_STRETCH), strict=True
    ):
        into = product[: part.numel()]
        sums.append(torch.dot(part, torch.mul(part, by, out=into)))
    return torch.stack(sums).sum()


def _flat(tensor: Tensor) -> Tensor:
    tensor = wide(tensor)
    return tensor if tensor.ndim == 1 else tensor.reshape(-1)


def wide(tensor: Tensor) -> Tensor:
    """As FP32, or as FP64 where it is that."""
    if tensor.dtype == torch.float32:
        return tensor
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def squares(layers: Layers) -> Tensor:
    """‖p.grad‖² of each layer, of what this rank holds of it; shape (layers,), FP32."""
    held = [
        [local(param.grad) for param in params if param.grad is not None]
        for params in layers.values()
    ]
    grads = [grad for of_layer in held for grad in of_layer]
    if not grads:
        return torch.zeros(len(held), device=next(iter(layers.values()))[0].device)
    flat = torch.stack([*squares_of(grads)])
    counts = [len(of_layer) for of_layer in held]
    if max(counts) == min(counts) == 1:
        return flat
    return torch.stack([of_layer.sum() for of_layer in torch.split(flat, counts)])
