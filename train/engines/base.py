"""How a step's gradient comes about on all ranks. An engine holds no policy: a few verbs.

All give the same trajectory for one global batch, up to rounding.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from largebatch.distributed.groups import RankGroups
from largebatch.distributed.ranks import Ranks
from largebatch.optim.sharding.layout import local
from largebatch.train.engines.precision import Precision
from largebatch.train.engines.update import GradientLimits, StepMetrics, Update
from largebatch.train.noise.small_gradients import SmallGradients
from largebatch.train.tasks import Batch, Task, loss_of, to_device
from largebatch.train.tasks.metrics import Metrics, metrics_of, one_pass

if TYPE_CHECKING:
    from largebatch.train.checkpoints.tensors import CheckpointTensors


class Works:
    """Collectives under way, to be waited for together."""

    def __init__(self, works: "list[dist.Work]") -> None:
        self._works = works

    def wait(self) -> None:
        for work in self._works:
            work.wait()


class Engine(ABC):
    """What a run asks of an engine, and what engines share: one rank's micro-batches, and talk
    between ranks.
    """

    model: nn.Module
    """The bare model, its parameters named as the user named them."""
    gradient_copies: int
    """Ranks that hold the same piece of the gradient: all of them where it is replicated. Of groups
    with a gradient of their own each: of all, so that sums over ranks are means over groups."""
    across: "dist.ProcessGroup | None" = None
    """Where ranks are in groups: those over which sums of what each holds of the weights are a
    multiple of the sum over groups."""
    can_skip = True
    """Whether a step can be masked by its own gradient."""

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        micro_batch_size: int | None,
        precision: Precision | None,
        groups: RankGroups | None = None,
    ) -> None:
        self.model = model
        self.groups = groups
        self.data_parallel_size = ranks.size
        self.device = device
        self.precision = precision or Precision("fp32", device)
        self.gradient_copies = ranks.size
        self._ranks = ranks
        self._within = ranks if groups is None else groups.within
        self._micro_batch_size = micro_batch_size
        self._replica = model

    @cached_property
    def flags(self) -> tuple[Tensor, ...]:
        """0 and 1, to travel with a step's metrics; not to be written to."""
        return torch.tensor([0.0, 1.0], device=self.device).unbind()

    def attach(self, optimizer: Optimizer, clip_norm: float | None) -> Optimizer:
        """Take the optimizer in, once; returns the one whose groups hold from now on.

        Raises:
            ValueError: it cannot be used here, or its gradients not be clipped.
        """
        del clip_norm  # `update` takes it at every step
        return optimizer

    def micro_batch_size(self, global_batch_size: int) -> int:
        """Samples in one backward pass on one rank."""
        return self._micro_batch_size or global_batch_size // self.data_parallel_size

    def set_micro_batch_size(self, micro_batch_size: int) -> None:
        """From now on."""
        self._micro_batch_size = micro_batch_size

    def evaluate(self, task: Task, batch: Batch) -> tuple[Tensor, Metrics]:
        """The mean loss over `batch` and the task's metrics, on the device, in the run's
        precision.
        """
        batch = to_device(batch, self.device)
        passes = nullcontext if getattr(task, "metrics", None) is None else one_pass
        with self.precision.autocast(), passes(self.model):
            return loss_of(task, self.model, batch), metrics_of(task, self.model, batch)

    def forward_backward(self, task: Task, batch: Batch, global_batch_size: int) -> Tensor:
        """Make the gradient of the global batch's mean loss, for `update` to use; of groups each
        makes that of its own part of the batch.

        Args:
            batch: this rank's samples, global_batch_size / data_parallel_size of them.

        Returns:
            This rank's part of the global mean loss: the parts of all ranks add up to it.
        """
        part: Tensor | None = None
        for micro_batch, is_last in self._micro_batches(batch, global_batch_size):
            share = micro_batch[0].shape[0] / global_batch_size
            with self._synchronised(is_last):
                with self.precision.autocast():
                    loss = loss_of(task, self._replica, to_device(micro_batch, self.device))
                # Engines average over ranks: times their number, the shares add up to the global
                # mean, or to that of a group.
                factor = share * self.data_parallel_size
                self._backward(loss if factor == 1.0 else loss * factor)
            mine = (loss.detach() if share == 1.0 else loss.detach() * share).float()
            part = mine if part is None else part.add_(mine)
        assert part is not None, "a rank takes one micro-batch at least"
        return part

    def _micro_batches(self, batch: Batch, global_batch_size: int) -> Iterator[tuple[Batch, bool]]:
        size, length = self.micro_batch_size(global_batch_size), batch[0].shape[0]
        if size >= length:
            yield batch, True
            return
        for start in range(0, length, size):
            yield tuple(tensor[start : start + size] for tensor in batch), start + size >= length

    @abstractmethod
    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        """Within it a backward pass sums over ranks where it is the last of its step."""

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss)

    @abstractmethod
    def update(self, optimizer: Optimizer, limits: GradientLimits) -> StepMetrics:
        """One optimizer step within `limits`; the gradients are gone afterwards."""

    @abstractmethod
    def discard(self, optimizer: Optimizer) -> None:
        """Throw away the gradient that was made: there is no update."""

    @abstractmethod
    def non_finite(self, steps_ago: int) -> list[str]:
        """Parameters whose gradient was not finite in the last step (0) or the one before, on any
        rank; empty where it is not known. Every rank calls it; waits for the device.
        """

    def sum_over_ranks(self, values: Tensor) -> "dist.Work | None":
        """Begin adding up `values` in place over all ranks; wait on the result before reading."""
        if self.data_parallel_size == 1:
            return None
        work: dist.Work | None = dist.all_reduce(values, async_op=True)
        return work

    def over_ranks(self, metrics: StepMetrics) -> "tuple[tuple[str, ...], Tensor, Works | None]":
        """Begin bringing a step's metrics together over all ranks: their names, the packed values,
        and the collectives to wait for before they are read; None where there are none.
        """
        if self.groups is not None:
            metrics = metrics.over_groups(self.data_parallel_size)
        values = metrics.reduced | metrics.replicated | metrics.maxima
        packed = torch.stack([*values.values()])
        if self.data_parallel_size == 1:
            return tuple(values), packed, None
        works = [self.sum_over_ranks(packed[: len(metrics.reduced)])]
        if metrics.maxima:
            largest = packed[-len(metrics.maxima) :]
            works.append(dist.all_reduce(largest, dist.ReduceOp.MAX, async_op=True))
        begun = [work for work in works if work is not None]
        return tuple(values), packed, Works(begun) if begun else None

    def as_first_rank(self, values: list[float]) -> list[float]:
        """Rank 0's `values`, on every rank; waits for the device."""
        if self.data_parallel_size == 1:
            return values
        packed = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(packed, 0)
        return packed.tolist()

    @abstractmethod
    def small_gradients(self, kind: str) -> SmallGradients:
        """The gradient source for a "rank", "micro_batch" or "example".

        Raises:
            ValueError: there is none here.
        """

    @abstractmethod
    def tensors(self, optimizer: Optimizer) -> "CheckpointTensors":
        """Model and optimizer, as checkpoints hold them."""


class OfGradients(Engine):
    """Engines that leave the gradient in `p.grad`, on the way to one of torch's own optimizers."""

    @cached_property
    def _update(self) -> Update:
        if self.groups is None:
            add_up = dist.all_reduce if self.data_parallel_size > 1 else None
            return Update(self.gradient_copies, add_up, self.precision.loss_scale)
        within = partial(dist.all_reduce, group=self.groups.own) if self._within.size > 1 else None
        number = self.groups.number
        return Update(self.gradient_copies, within, self.precision.loss_scale, number)

    def forward_backward(self, task: Task, batch: Batch, global_batch_size: int) -> Tensor:
        part = super().forward_backward(task, batch, global_batch_size)
        if self.precision.loss_scale is not None:
            grads = [local(p.grad) for p in self.model.parameters() if p.grad is not None]
            torch._foreach_mul_(grads, 1 / self.precision.loss_scale.value)
        return part

    def _backward(self, loss: Tensor) -> None:
        scale = self.precision.loss_scale
        torch.autograd.backward(loss if scale is None else loss * scale.value)

    def update(self, optimizer: Optimizer, limits: GradientLimits) -> StepMetrics:
        return self._update(optimizer, limits)

    def discard(self, optimizer: Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)  # K-FAC's curvature too

    def non_finite(self, steps_ago: int) -> list[str]:
        params, squares = self._update.squares(steps_ago)
        squares = squares.clone()
        if self.data_parallel_size > 1:
            dist.all_reduce(squares)
        names: dict[Tensor, str] = {param: name for name, param in self.model.named_parameters()}
        finite = dict(zip(params, torch.isfinite(squares).tolist(), strict=True))
        return [name for param, name in names.items() if not finite.get(param, True)]

    def tensors(self, optimizer: Optimizer) -> "CheckpointTensors":
        from largebatch.train.checkpoints.tensors import DistributedTensors

        return DistributedTensors(self.model, optimizer, self._ranks, self.groups)
