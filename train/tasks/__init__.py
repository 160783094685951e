"""What is learned: data, loss and evaluation set behind one small protocol."""

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from largebatch.common.errors import ConfigError
from largebatch.train.data.sampler import MOST_SAMPLES, Indices, Sampler

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
        """What the data is: `data` in words, `data_hash` over its content and nothing else. A run
        is resumed only where the hash is what it was.
        """


_TO_WRITE: Final = {
    "num_train": "self.num_train = len(self.images)",
    "num_eval": "self.num_eval = len(self.eval_images)",
    "replacement": "replacement = False  # True: samples are drawn with replacement",
    "train_batch": "def train_batch(self, indices): return self.images[torch.from_numpy(indices)],",
    "eval_batch": "def eval_batch(self, indices): return self.images[torch.from_numpy(indices)],",
    "loss": "def loss(self, model, batch): return cross_entropy(model(batch[0]), batch[1])",
    "provenance": 'def provenance(self): return {"data": "my images", "data_hash": "1"}',
}
"""Members of a task, and what their definition looks like."""


def check_task(task: Any, name: str = "task") -> Mapping[str, str]:
    """Refuse what is no `Task`; returns its provenance.

    Asks it for one training sample and one evaluation sample.

    Raises:
        ConfigError: naming the member, and the line to write.
    """
    kind = type(task).__name__
    for member, line in _TO_WRITE.items():
        value = getattr(task, member, None)
        is_method = line.startswith("def ")
        if value is None or (is_method and not callable(value)):
            what = "method" if is_method else "attribute"
            raise ConfigError(f"{name}: {kind} has no {what} {member}: write `{line}`")
    for member in ("num_train", "num_eval"):
        count = getattr(task, member)
        is_count = isinstance(count, int | np.integer) and not isinstance(count, bool)
        if not is_count or not 1 <= count <= MOST_SAMPLES:
            raise ConfigError(
                f"{name}: {kind}.{member} must be a whole number of at least 1 and at most 2^62, "
                f"the number of its samples, got {count!r}"
            )
    for member in ("train_batch", "eval_batch"):
        _check_batch(getattr(task, member)(np.zeros(1, np.int64)), f"{name}: {kind}.{member}")
    provenance = task.provenance()
    keys = ("data", "data_hash")
    if not isinstance(provenance, Mapping) or not all(
        isinstance(provenance.get(key), str) for key in keys
    ):
        raise ConfigError(
            f"{name}: {kind}.provenance must return the strings data and data_hash, as in "
            f"`{_TO_WRITE['provenance']}`, got {provenance!r}"
        )
    return dict(provenance)


def _check_batch(batch: Any, name: str) -> None:
    """Of one sample."""
    of_tensors = isinstance(batch, tuple) and all(isinstance(part, Tensor) for part in batch)
    if of_tensors and batch and all(part.ndim and part.shape[0] == 1 for part in batch):
        return
    parts = batch if isinstance(batch, tuple | list) else [batch]
    shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    raise ConfigError(
        f"{name} must return a tuple of tensors whose first dimension is the sample, here 1: "
        f"`return images, labels`, or `return images,` of one, got a {type(batch).__name__} of "
        f"{', '.join(map(str, shapes)) or 'nothing'}"
    )


def loss_of(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """The task's loss, a scalar of floating point.

    Raises:
        ConfigError: it is something else.
    """
    loss = task.loss(model, batch)
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.is_floating_point():
        if loss.requires_grad or not torch.is_grad_enabled():
            return loss
        raise ConfigError(
            f"task: {type(task).__name__}.loss returns a number without a gradient: it must be "
            "computed from model(…), without .item(), .detach() or torch.no_grad()"
        )
    got = f"of shape {tuple(loss.shape)} and {loss.dtype}" if isinstance(loss, Tensor) else ""
    raise ConfigError(
        f"task: {type(task).__name__}.loss must return the mean over the batch's samples, a scalar "
        f"tensor of floating point, as in `return losses.mean()`, got a {type(loss).__name__} {got}"
    )


def sampler_of(task: Task, seed: int) -> Sampler:
    """In which order `task` is trained on."""
    own: Callable[[int], Sampler] | None = getattr(task, "sampler", None)
    return Sampler(task.num_train, seed, task.replacement) if own is None else own(seed)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)
