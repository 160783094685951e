"""Where a run comes apart: by module and by tensor, with every step.

Three kinds of numbers (`record.sites`), in the order of the forward pass:

    activation_max/MODULE        max |x| over the outputs of modules with weights, and of blocks
    attention_logit_max/MODULE   max |q·k| / √d over what attention sees (the package's transformer)
    update_rms/TENSOR            root mean square of what a step has added to a tensor

They come with the step's other numbers: maxima by one more small collective, begun beside the first
one and waited for with it, so that the host waits for nothing. What they cost is a pass over each
output, the products Q Kᵀ once more, and a copy of the weights.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from largebatch.optim.sharding.layout import local
from largebatch.train.models.transformer import CausalMix

ACTIVATION: Final = "activation_max/"
LOGIT: Final = "attention_logit_max/"
UPDATE: Final = "update_rms/"

WINDOW: Final = 100
"""Steps of the medians."""
FEWEST: Final = 5
MULTIPLE: Final = 4.0
"""Of its median, above which a site counts as the place where a spike began."""


class NoSites:
    """What a run that watches no site does about them."""

    def maxima(self) -> dict[str, Tensor]:
        """The maxima of this rank's passes since the last call, to be the largest over ranks."""
        return {}

    def update(self, into: dict[str, Tensor]) -> AbstractContextManager[None]:
        """Put this rank's part of each tensor's squared update into `into`, to be added up."""
        return nullcontext()

    def take(self, line: dict[str, Any]) -> None:
        """Complete a record that came back, and let it count in the medians."""

    def blame(self) -> dict[str, Any]:
        """What the event of a spike says besides: the `site` where it began, if it is known."""
        return {}


class Sites(NoSites):
    """Hooks of one model, and the history of its sites on the host.

    Args:
        copies: ranks that hold the same piece of each tensor.
    """

    def __init__(self, model: nn.Module, copies: int) -> None:
        self._copies = copies
        self._maxima: dict[str, Tensor] = {}
        self._history: dict[str, deque[float]] = {}
        self._first: dict[str, Any] = {}
        self._params = dict(model.named_parameters())
        self._sizes = {name: param.numel() for name, param in self._params.items()}
        for name, module in watched(model):
            module.register_forward_hook(self._hook(name, module))

    def _hook(self, name: str, module: nn.Module) -> Callable[..., None]:
        if isinstance(module, CausalMix):
            key, value_of = LOGIT + name.rpartition(".")[0], _largest_logit
        else:
            key, value_of = ACTIVATION + name, _largest_output

        def hook(module: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            if module.training and isinstance(output, Tensor) and output.is_floating_point():
                with torch.no_grad():
                    # Collectives do not agree on what the larger of a NaN and a number is.
                    found = torch.nan_to_num(value_of(given, output), nan=math.inf, posinf=math.inf)
                    before = self._maxima.get(key)
                    self._maxima[key] = found if before is None else torch.maximum(before, found)

        return hook

    def maxima(self) -> dict[str, Tensor]:
        found, self._maxima = self._maxima, {}
        return found

    @contextmanager
    def update(self, into: dict[str, Tensor]) -> Iterator[None]:
        params = [local(param.detach()) for param in self._params.values()]
        before = [param.clone() for param in params]
        yield
        moved = torch._foreach_sub(params, before)
        squares = torch.stack([change.float().square().sum() for change in moved]) / self._copies
        into.update(zip((UPDATE + name for name in self._params), squares.unbind(), strict=True))

    def take(self, line: dict[str, Any]) -> None:
        self._first = {}
        for key, value in line.items():
            if key.startswith(UPDATE):
                size = self._sizes[key.removeprefix(UPDATE)]
                line[key] = math.sqrt(value / max(1, size))
            elif key.startswith((ACTIVATION, LOGIT)):
                known = self._history.setdefault(key, deque(maxlen=WINDOW))
                usual = median(known) if len(known) >= FEWEST else math.inf
                finite = math.isfinite(value)
                if not self._first and (not finite or value > MULTIPLE * usual):
                    self._first = {"site": key, "site_value": value, "site_median": usual}
                if finite:
                    known.append(value)

    def blame(self) -> dict[str, Any]:
        return self._first


def watched(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules with weights, blocks, and attention's products, in the model's order."""
    blocks = {block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m}
    return [
        (name, module)
        for name, module in model.named_modules()
        if module in blocks
        or isinstance(module, CausalMix)
        or any(True for _ in module.parameters(recurse=False))
    ]


def _largest_output(given: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.abs().amax().float()


def _largest_logit(given: tuple[Any, ...], output: Tensor) -> Tensor:
    queries, keys = given[0], given[1]  # (samples, heads or kv_heads, length, head_dim)
    shared = queries.shape[1] // keys.shape[1]
    length = queries.shape[2]
    to_come = torch.ones(length, length, dtype=torch.bool, device=queries.device).triu(1)
    largest = torch.zeros((), device=queries.device)
    for sample in range(queries.shape[0]):  # of one at a time: length² for each head
        keys_of = keys[sample].repeat_interleave(shared, 0)
        logits = (queries[sample] @ keys_of.transpose(-1, -2)).abs().float()
        largest = torch.maximum(largest, logits.masked_fill(to_come, 0.0).amax())
    return largest / math.sqrt(queries.shape[-1])
