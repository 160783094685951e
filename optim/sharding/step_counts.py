"""How many steps a parameter has had, known to the host without waiting for the device.

Which step it is decides when roots are taken. Whether a step was skipped (`found_inf`) is known to
the device only: the host reads it at the next step, when it has long arrived.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from largebatch.optim.sharding.layout import local


class Arriving:
    """A small tensor on its way to the host; the device is not waited for before `wait`."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.device.type != "cpu":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.Event(value.device)
            self._event.record()

    def wait(self) -> Tensor:
        """The tensor, on the host."""
        if self._event is not None:
            self._event.synchronize()
        return self._value


class StepCounts:
    def __init__(self) -> None:
        self._counts: dict[Tensor, int] = {}
        self._travelling: tuple[list[Tensor], Arriving] | None = None

    def settle(self) -> None:
        """Read whether the step before was skipped."""
        if self._travelling is None:
            return
        params, skipped = self._travelling
        self._travelling = None
        if not skipped.wait().tolist():
            self._advance(params)

    def of(self, param: Tensor, state: dict[str, Tensor]) -> int:
        """Steps so far. Waits for the device where they are not known: `read` does so for all."""
        if param not in self._counts:
            self._counts[param] = int(state["step"]) if "step" in state else 0
        return self._counts[param]

    def read(self, states: Iterable[tuple[Tensor, dict[str, Tensor]]]) -> None:
        """Read at once what is not known yet, as after a state is loaded: one wait for all."""
        unknown = {p: local(s["step"]) for p, s in states if p not in self._counts and "step" in s}
        by_device: dict[torch.device, list[Tensor]] = {}
        for param, step in unknown.items():
            by_device.setdefault(step.device, []).append(param)
        for params in by_device.values():
            steps = torch.stack([unknown[param].reshape(()) for param in params]).tolist()
            self._counts.update(zip(params, map(int, steps), strict=True))

    def begin(self, param: Tensor) -> None:
        """It has had none, and begins, perhaps anew."""
        self._counts[param] = 0

    def forget(self, param: Tensor) -> None:
        """Nothing is known of it."""
        self._counts.pop(param, None)

    def stepped(self, params: Iterable[Tensor], skip: Tensor | None) -> None:
        """These had a step now, unless `skip`, 0-d on the device, says otherwise."""
        if skip is None:
            self._advance(params)
            return
        self._travelling = ([*params], Arriving(skip))

    def _advance(self, params: Iterable[Tensor]) -> None:
        for param in params:
            self._counts[param] += 1
