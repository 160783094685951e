"""How many steps a parameter has had, known to the host without waiting for the device.

Which step it is decides when roots are taken. Whether a step was skipped (`found_inf`) is known to
the device only: the host reads it at the next step, when it has long arrived.
"""

from collections.abc import Iterable

import torch
from torch import Tensor


class StepCounts:
    def __init__(self) -> None:
        self._counts: dict[Tensor, int] = {}
        self._travelling: tuple[list[Tensor], Tensor, torch.Event | None] | None = None

    def settle(self) -> None:
        """Read whether the step before was skipped."""
        if self._travelling is None:
            return
        params, skipped, arrived = self._travelling
        self._travelling = None
        if arrived is not None:
            arrived.synchronize()
        if not skipped.tolist():
            self._advance(params)

    def of(self, param: Tensor, state: dict[str, Tensor]) -> int:
        """Steps so far. Waits for the device once after a state is loaded."""
        if param not in self._counts:
            self._counts[param] = int(state["step"]) if "step" in state else 0
        return self._counts[param]

    def stepped(self, params: Iterable[Tensor], skip: Tensor | None) -> None:
        """These had a step now, unless `skip`, 0-d on the device, says otherwise."""
        if skip is None:
            self._advance(params)
            return
        skipped, arrived = skip, None
        if skip.device.type != "cpu":
            skipped = torch.empty_like(skip, device="cpu", pin_memory=True)
            skipped.copy_(skip, non_blocking=True)
            arrived = torch.Event(skip.device)
            arrived.record()
        self._travelling = ([*params], skipped, arrived)

    def _advance(self, params: Iterable[Tensor]) -> None:
        for param in params:
            self._counts[param] += 1
