"""How a step's gradient comes about on all ranks. An engine holds no policy: a few verbs."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.train.example_gradients import ExampleGradients
from largebatch.train.ranks import Ranks
from largebatch.train.small_gradients import MicroBatchGradients, RankGradients, SmallGradients
from largebatch.train.tasks import Batch, Task, to_device


class Engine(Protocol):
    """What the loop asks of an engine."""

    model: nn.Module
    """The bare model, its parameters named as the user named them."""
    data_parallel_size: int
    device: torch.device

    def micro_batch_size(self, global_batch_size: int) -> int:
        """Samples in one backward pass on one rank."""

    def forward_backward(self, task: Task, batch: Batch, global_batch_size: int) -> Tensor:
        """Leave the gradient of the global batch's mean loss in `p.grad`.

        Args:
            batch: this rank's samples, global_batch_size / data_parallel_size of them.

        Returns:
            This rank's part of the global mean loss: the parts of all ranks add up to it.
        """

    def sum_over_ranks(self, values: Tensor) -> "dist.Work | None":
        """Begin adding up `values` in place over all ranks; wait on the result before reading."""

    def as_first_rank(self, values: list[float]) -> list[float]:
        """Rank 0's `values`, on every rank; waits for the device."""

    def small_gradients(self, kind: str) -> SmallGradients:
        """The seam at which gradients of a "rank", "micro_batch" or "example" can be measured.

        Raises:
            ValueError: there is none here.
        """


class DDP:
    """Replicated parameters, one gradient all-reduce a step, whatever the micro-batches."""

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        micro_batch_size: int | None = None,
    ) -> None:
        self.model = model.to(device)
        self.data_parallel_size = ranks.size
        self.device = device
        self._micro_batch_size = micro_batch_size
        self._replica: nn.Module = self.model
        if ranks.size > 1:
            self._replica = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def micro_batch_size(self, global_batch_size: int) -> int:
        return self._micro_batch_size or global_batch_size // self.data_parallel_size

    def forward_backward(self, task: Task, batch: Batch, global_batch_size: int) -> Tensor:
        part = torch.zeros((), device=self.device)
        for micro_batch, is_last in self._micro_batches(batch, global_batch_size):
            with nullcontext() if is_last else self._unsynchronised():
                share = micro_batch[0].shape[0] / global_batch_size
                loss = task.loss(self._replica, to_device(micro_batch, self.device))
                # DDP averages over ranks: times their number, the shares add up to the global mean.
                torch.autograd.backward(loss * (share * self.data_parallel_size))
            part += loss.detach() * share
        return part

    def _micro_batches(self, batch: Batch, global_batch_size: int) -> Iterator[tuple[Batch, bool]]:
        size, length = self.micro_batch_size(global_batch_size), batch[0].shape[0]
        for start in range(0, length, size):
            yield tuple(tensor[start : start + size] for tensor in batch), start + size >= length

    def _unsynchronised(self) -> "nullcontext[None]":
        if isinstance(self._replica, DistributedDataParallel):
            return self._replica.no_sync()  # type: ignore[return-value]
        return nullcontext()

    def sum_over_ranks(self, values: Tensor) -> "dist.Work | None":
        if self.data_parallel_size == 1:
            return None
        work: dist.Work | None = dist.all_reduce(values, async_op=True)
        return work

    def as_first_rank(self, values: list[float]) -> list[float]:
        if self.data_parallel_size == 1:
            return values
        told = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.broadcast(told, 0)
        return told.tolist()

    def small_gradients(self, kind: str) -> SmallGradients:
        if kind == "example":
            return ExampleGradients(self.model)
        if kind == "micro_batch":
            return MicroBatchGradients(self.model)
        assert kind == "rank"
        if not isinstance(self._replica, DistributedDataParallel):
            raise ValueError(
                "noise.small=rank needs at least 2 ranks, got 1: use noise.small=micro_batch or "
                "example"
            )
        return RankGradients(self._replica)
