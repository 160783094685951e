"""Metrics of a task beside its loss: sums and counts, added up over batches and ranks.

A task that has some has a method `metrics(model, batch)`, which evaluations call after `loss`:

    def metrics(self, model, batch):
        images, labels = batch
        return accuracy(model(images), labels)

A metric's value is its sum over its count, over the whole evaluation set. Both stay on the device
until then.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from largebatch.common.errors import ConfigError
from largebatch.train.tasks import Batch, Task

Number = Tensor | float | int
"""A scalar, of any type."""
Metrics = Mapping[str, tuple[Number, Number]]
"""Of each metric, its sum and what that is to be divided by."""

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


def accuracy(logits: Tensor, labels: Tensor) -> dict[str, tuple[Number, Number]]:
    """The share of labels that have the largest logit.

    Args:
        logits: of shape (..., classes).
        labels: classes, of shape (...).
    """
    return {"accuracy": ((logits.argmax(-1) == labels).sum(), labels.numel())}


def metrics_of(task: Task, model: nn.Module, batch: Batch) -> Metrics:
    """The task's metrics over `batch`; none where it has no method for them.

    Raises:
        ConfigError: it returns something else.
    """
    find = getattr(task, "metrics", None)
    if find is None:
        return {}
    found = find(model, batch)
    name = f"task: {type(task).__name__}.metrics"
    line = '`return {"accuracy": (right.sum(), len(right))}`'
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{name} must return a sum and a count by each metric's name, as in {line}, got a "
            f"{type(found).__name__}"
        )
    for key, pair in found.items():
        if not isinstance(key, str) or not _NAME.fullmatch(key) or key == "loss":
            raise ConfigError(
                f"{name} names a metric {key!r}: a name has letters, digits and _, and the loss is "
                "known already"
            )
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(_is_scalar, pair)):
            shown = ", ".join(map(_in_words, pair if isinstance(pair, tuple) else [pair]))
            raise ConfigError(
                f"{name} must give {key} as a sum and a count, two scalars, as in {line}, got "
                f"{shown}"
            )
    return found


def _is_scalar(value: Any) -> bool:
    return value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, int | float)


def _in_words(value: Any) -> str:
    shape = f" of shape {tuple(value.shape)}" if isinstance(value, Tensor) else ""
    return f"a {type(value).__name__}{shape}"


@contextmanager
def one_pass(model: nn.Module) -> Iterator[None]:
    """Within it a model that is called with the tensors of the call before, or equal views of them,
    gives what that gave, so that a loss and metrics of the same output take one forward pass.

    A model that is compiled or scripted as a whole is called each time.
    """
    is_plain = type(model).__call__ is nn.Module.__call__ and not hasattr(model, "_orig_mod")
    is_compiled = getattr(model, "_compiled_call_impl", None) is not None  # it would be again
    if is_compiled or not is_plain or isinstance(model, torch.jit.ScriptModule):
        yield
        return
    own, forward = vars(model).get("forward"), model.forward
    last: list[Any] = []

    def remembering(*args: Any, **keywords: Any) -> Any:
        given = [_content(value) for value in (*args, *keywords, *keywords.values())]
        if last and last[0] == given and last[1]._version == last[2]:  # nobody has written into it
            return last[1]
        last.clear()
        output = forward(*args, **keywords)
        if isinstance(output, Tensor) and not output.is_inference():
            last.extend((given, output, output._version, args, keywords))  # whose memory stays
        return output

    model.forward = remembering
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _content(value: Any) -> tuple[Any, ...]:
    """What tells a model's argument from others: of a tensor its memory, and whether that was
    written to.
    """
    if type(value) is not Tensor or value.is_inference():
        return (id(value),)
    return value.data_ptr(), value._version, value.shape, value.stride(), value.dtype


class MetricSums:
    """Sums and counts of metrics over batches, in double precision on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._totals: dict[str, Tensor] = {}

    def add(self, found: Metrics, counts: bool) -> None:
        """Add those of a batch; with `counts` false their names alone are taken."""
        for name, pair in found.items():
            if name not in self._totals:
                self._totals[name] = torch.zeros(2, dtype=torch.float64, device=self._device)
            if counts:
                for place, value in enumerate(pair):
                    self._totals[name][place] += value

    def means(self, world_size: int) -> dict[str, float]:
        """The metrics over the batches of all ranks, each of which has the same; waits for the
        device.
        """
        if not self._totals:
            return {}
        names = sorted(self._totals)
        totals = torch.stack([self._totals[name] for name in names])  # (metrics, 2)
        if world_size > 1:
            dist.all_reduce(totals)
        return {
            name: total / count if count else math.nan
            for name, (total, count) in zip(names, totals.tolist(), strict=True)
        }
