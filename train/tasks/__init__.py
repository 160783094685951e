"""What is learned: data, loss and evaluation set behind one small protocol."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from largebatch.train.sampler import Indices, Sampler

Batch = tuple[Tensor, ...]
"""Tensors whose first dimension is the sample."""


class Task(Protocol):
    """What the loop asks of a task; any class with these members is one.

    One with a method `sampler(seed) -> Sampler` besides brings the order of its training samples
    (weighted sources, say); else `num_train`, `replacement` and the seed decide it.
    """

    num_train: int
    """Number of training samples."""
    num_eval: int
    """Number of evaluation samples."""
    replacement: bool
    """Whether training samples are drawn with replacement."""

    def train_batch(self, indices: Indices) -> Batch:
        """The training samples at `indices`, on the CPU."""

    def eval_batch(self, indices: Indices) -> Batch:
        """The evaluation samples at `indices`, on the CPU."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean loss over the samples of `batch`, a scalar."""

    def provenance(self) -> Mapping[str, str]:
        """What the data is: `data` in words, `data_hash` over its content."""


def sampler_of(task: Task, seed: int) -> Sampler:
    """In which order `task` is trained on."""
    own: Callable[[int], Sampler] | None = getattr(task, "sampler", None)
    return Sampler(task.num_train, seed, task.replacement) if own is None else own(seed)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)
