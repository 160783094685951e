"""Step counts of many parameters in one tensor."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor


class StepsTogether:
    """Lays the entries `step` of states out in one tensor on the host, of which they are views.

    Attributes:
        flat: FP32, in the order of the states last laid out.
    """

    def __init__(self) -> None:
        self.flat = torch.zeros(0, dtype=torch.float32)
        self._views: tuple[Tensor, ...] = ()

    def lay_out(self, states: Sequence[dict[str, Any]]) -> Tensor:
        """Return `flat` of these states; a state without the entry gets one of 0."""
        steps = [state.get("step") for state in states]
        if len(steps) != len(self._views) or not all(map(is_, steps, self._views)):
            self.flat = torch.zeros(len(steps), dtype=torch.float32)
            self._views = self.flat.unbind()
            for state, step, view in zip(states, steps, self._views, strict=True):
                if step is not None:
                    view.copy_(step.reshape(()))
                state["step"] = view
        return self.flat
