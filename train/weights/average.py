"""An average of the weights beside training: what is evaluated, saved and exported in their place.

With z the weights that the optimizer steps and x their average, after each step

    ema             x ← d x + (1 - d) z
    gpa             the same, and gradients are taken at y = μ x + (1 - μ) z
                    (Defazio et al. 2025, "generalized primal averaging", arXiv:2512.17131)
    schedule_free   gradients at y too, and x ← (1 - c) x + c z with c = lr² / Σ lr²
                    (Defazio et al. 2024, "The Road Less Scheduled", arXiv:2405.15682, Algorithm 1)

x begins as the weights. Between steps the model holds y, which of ema is z. The average and z are
FP32 and lie as the weights do. A step that is masked leaves z, and is a step of the average all the
same. Weight decay is of z, where the optimizer has it. Buffers, such as the running statistics of
batch norm, are those of training.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from largebatch.conf.weights_config import AverageConfig
from largebatch.train.weights.tensors import locals_of, wide_copy

T = TypeVar("T")


class WeightAverage:
    """The average of a model's trainable weights.

    Attributes:
        decay: d at the batch in hand.
    """

    def __init__(self, config: AverageConfig, model: nn.Module) -> None:
        self.kind, self.base_decay, self.decay = config.kind, config.decay, config.decay
        self._interpolation = 0.0 if config.kind == "ema" else config.interpolation
        self._model = model
        # Tied ones under each of their names, as the model's own state has them.
        named = model.named_parameters(remove_duplicate=False)
        self._params = {name: param for name, param in named if param.requires_grad}
        self._average = {name: wide_copy(param) for name, param in self._params.items()}
        moves = self._interpolation > 0
        self._stepped = {name: wide_copy(p) for name, p in self._params.items()} if moves else {}
        self._weight = torch.zeros((), dtype=torch.float64)

    def tensors(self) -> dict[str, Any]:
        """What a checkpoint holds, and puts back in place: x as `weights`, z, and Σ lr²."""
        return {"weights": self._average, "stepped": self._stepped, "weight": self._weight}

    @contextmanager
    def step(self, lr: float) -> Iterator[None]:
        """Within it the optimizer steps z; before and after it the model holds y.

        Args:
            lr: the step's learning rate.
        """
        if self._stepped:
            with torch.no_grad():
                _write(self._params, self._stepped)
        yield
        with torch.no_grad():
            self._take(lr)

    def _take(self, lr: float) -> None:
        """Take what the optimizer has left into the average, and put y in its place."""
        share = 1 - self.decay
        if self.kind == "schedule_free":
            self._weight += lr**2
            share = lr**2 / float(self._weight) if lr > 0 else 0.0
        average, now = locals_of(self._average), locals_of(self._params)
        torch._foreach_lerp_(
            average,
            [each.to(torch.float32) if each.dtype.itemsize < 4 else each for each in now],
            share,
        )
        if self._stepped:
            _write(self._stepped, self._params)
            towards = torch._foreach_lerp(locals_of(self._stepped), average, self._interpolation)
            torch._foreach_copy_(now, towards)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the average for its weights."""
        kept = [each.clone() for each in locals_of(self._params)]
        with torch.no_grad():
            _write(self._params, self._average)
        self._reshard()
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(locals_of(self._params), kept)
            self._reshard()

    def settle(self) -> None:
        """Leave the average as the model's weights: training is over."""
        with torch.no_grad():
            _write(self._params, self._average)
        self._reshard()

    def evaluated(self, evaluate: Callable[[], T]) -> T:
        """What `evaluate` finds of the average."""
        with self.in_place():
            return evaluate()

    def _reshard(self) -> None:
        """Give up gathered weights: FSDP2 keeps the root's after a forward pass of no backward."""
        for module in self._model.modules():
            reshard = getattr(module, "reshard", None)
            if callable(reshard):
                reshard()


def _write(targets: dict[str, Any], values: dict[str, Any]) -> None:
    torch._foreach_copy_(locals_of(targets), locals_of(values))
