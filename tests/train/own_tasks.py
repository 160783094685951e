"""Tasks as somebody new to it writes them: one that is right, and others that lack something."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.train.data.sampler import Indices
from largebatch.train.tasks import Batch

IMAGES = torch.randn(100, 64, generator=torch.Generator().manual_seed(0))


class Right:
    replacement = True
    num_train = 100
    num_eval = 10

    def train_batch(self, indices: Indices) -> Batch:
        rows = torch.from_numpy(indices) % 100
        return IMAGES[rows], rows % 10

    eval_batch = train_batch

    def loss(self, model: nn.Module, batch: Batch) -> Any:
        return cross_entropy(model(batch[0]), batch[1])

    def provenance(self) -> Mapping[str, str]:
        return {"data": "noise", "data_hash": "0"}


class Sorted(Right):
    """With metrics."""

    def metrics(self, model: nn.Module, batch: Batch) -> Any:
        right = model(batch[0]).argmax(1) == batch[1]
        return {"accuracy": (right.sum(), len(right)), "constant": (3.0 * len(right), len(right))}


class MetricOfEach(Right):
    def metrics(self, model: nn.Module, batch: Batch) -> Any:
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1], len(batch[1]))}


class MetricWithoutCount(Right):
    def metrics(self, model: nn.Module, batch: Batch) -> Any:
        return {"accuracy": (model(batch[0]).argmax(1) == batch[1]).float().mean()}


class MetricByNoName(Right):
    def metrics(self, model: nn.Module, batch: Batch) -> Any:
        return {"top 5": (1.0, 2)}


class MetricAlone(Right):
    def metrics(self, model: nn.Module, batch: Batch) -> Any:
        return 0.5


class LossOfOutputs(Right):
    def loss(self, outputs: Tensor) -> Any:  # type: ignore[override] # the mistake itself
        return outputs.mean()


class Overcounted(Right):
    num_train = 101

    def train_batch(self, indices: Indices) -> Batch:
        rows = torch.from_numpy(indices)
        return IMAGES[rows], rows % 10


class SummedLoss(Right):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="sum")


class Huge(Right):
    replacement = False
    num_train = 10**12


class TooLarge(Right):
    """A device runs out of memory in its steps, as XPU says it."""

    def loss(self, model: nn.Module, batch: Batch) -> Any:
        if model.training:
            raise RuntimeError(
                "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"
            )
        return super().loss(model, batch)


class NoLoss(Right):
    loss = None  # type: ignore[assignment]


class NoProvenance(Right):
    provenance = None  # type: ignore[assignment]


class OtherProvenance(Right):
    def provenance(self) -> Mapping[str, str]:
        return {"source": "noise"}


class Empty(Right):
    num_train = 0


class HalfASample(Right):
    num_eval = 0.5  # type: ignore[assignment]


class NoTuple(Right):
    def train_batch(self, indices: Indices) -> Any:
        return IMAGES[torch.from_numpy(indices)]


class LossOfEach(Right):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none")


class LossWithoutGradient(Right):
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1]).detach()


class LossInPython(Right):
    def loss(self, model: nn.Module, batch: Batch) -> float:
        return cross_entropy(model(batch[0]), batch[1]).item()


class ErrorInLoss(Right):
    calls = 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls < 4:  # in the middle of the run
            return cross_entropy(model(batch[0]), batch[1])
        return cross_entropy(model(batch[0]), batch[7])


class ErrorAtOnce(Right):
    def __init__(self, folder: str = "nowhere") -> None:
        self.files = {}[folder]  # type: ignore[var-annotated]
