"""What is learned: data, loss and evaluation set behind one small protocol."""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from largebatch.common.errors import ConfigError
from largebatch.common.text import one_line
from largebatch.train.data.sampler import MOST_SAMPLES, Indices, Sampler

Batch = tuple[Tensor, ...]
"""Tensors whose first dimension is the sample."""


class Task(Protocol):
    """What the loop asks of a task; any class with these members is one.

    One with a method `sampler(seed) -> Sampler` besides brings the order of its training samples
    (weighted sources, say); else `num_train`, `replacement` and the seed decide it. One with a
    method `metrics(model, batch)` is evaluated by what that returns too: by name a sum over the
    batch and the number to divide it by (`train/tasks/metrics.py`).
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
_TO_WRITE_BESIDE: Final = {
    "metrics": "def metrics(self, model, batch): return accuracy(model(batch[0]), batch[1])",
    "sampler": "def sampler(self, seed): return Sampler(self.num_train, seed, False)",
}
"""Members that a task may have."""


def check_task(task: Any, name: str = "task") -> Mapping[str, str]:
    """Refuse what is no `Task`; returns its provenance.

    Asks it for its first and last training and evaluation samples.

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
    _check_signatures(task, f"{name}: {kind}")
    for member in ("num_train", "num_eval"):
        count = getattr(task, member)
        is_count = isinstance(count, int | np.integer) and not isinstance(count, bool)
        if not is_count or not 1 <= count <= MOST_SAMPLES:
            raise ConfigError(
                f"{name}: {kind}.{member} must be a whole number of at least 1 and at most 2^62, "
                f"the number of its samples, got {count!r}"
            )
    for part in ("train", "eval"):
        _check_batches(task, part, f"{name}: {kind}")
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


def _check_signatures(task: Any, name: str) -> None:
    """Refuse methods that do not take what they are called with."""
    for member, line in (_TO_WRITE | _TO_WRITE_BESIDE).items():
        method = getattr(task, member, None)
        if method is None or not line.startswith("def "):
            continue
        if not callable(method):
            raise ConfigError(f"{name}.{member} must be a method, `{line}`, got {method!r}")
        takes = line[line.index("(") + 1 : line.index(")")].split(", ")[1:]
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):  # some of Python's own have none
            continue
        try:
            signature.bind(*takes)
        except TypeError as error:
            raise ConfigError(
                f"{name}.{member} must take ({', '.join(takes)}) after self, as in `{line}`, and "
                f"takes {signature}"
            ) from error


def _check_batches(task: Any, part: str, name: str) -> None:
    """Of one sample, and of the first and the last."""
    take, count = getattr(task, f"{part}_batch"), int(getattr(task, f"num_{part}"))
    _check_batch(take(np.zeros(1, np.int64)), 1, f"{name}.{part}_batch")
    if count == 1:
        return
    try:
        ends = take(np.array([0, count - 1], np.int64))
    except LookupError as error:
        raise ConfigError(
            f"{name}.{part}_batch has no sample {count - 1} ({one_line(error)}), and {name}.num_"
            f"{part} says there are {count}, from 0 on: write `{_TO_WRITE[f'num_{part}']}`"
        ) from error
    _check_batch(ends, 2, f"{name}.{part}_batch")


def _check_batch(batch: Any, size: int, name: str) -> None:
    of_tensors = isinstance(batch, tuple) and all(isinstance(part, Tensor) for part in batch)
    if of_tensors and batch and all(part.ndim and part.shape[0] == size for part in batch):
        return
    parts = batch if isinstance(batch, tuple | list) else [batch]
    shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
    raise ConfigError(
        f"{name} must return a tuple of tensors whose first dimension is the sample, here {size}: "
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


def check_mean(task: Task, model: nn.Module, batch: Batch, loss: Tensor) -> None:
    """Refuse a loss that is a sum over the samples of `batch`: of each twice it is twice as large.

    Args:
        loss: of the batch.
    """
    with torch.no_grad():
        twice = loss_of(task, model, tuple(torch.cat([part, part]) for part in batch))
    if loss.item() and math.isclose(twice.item(), 2 * loss.item(), rel_tol=1e-5):
        raise ConfigError(
            f"task: {type(task).__name__}.loss returns a sum, twice as large for every sample "
            "taken twice: it must be the mean over the batch's samples, as in "
            "`return losses.mean()`"
        )


def sampler_of(task: Task, seed: int) -> Sampler:
    """In which order `task` is trained on."""
    own: Callable[[int], Sampler] | None = getattr(task, "sampler", None)
    return Sampler(task.num_train, seed, task.replacement) if own is None else own(seed)


def to_device(batch: Batch, device: torch.device) -> Batch:
    return tuple(tensor.to(device, non_blocking=True) for tensor in batch)
