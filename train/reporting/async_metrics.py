"""A step's numbers, brought to the host without stopping the device for them."""

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Work(Protocol):
    def wait(self) -> Any: ...


class _Travelling(NamedTuple):
    line: dict[str, Any]
    names: tuple[str, ...]
    host: Tensor
    work: Work | None
    arrived: torch.Event | None


class AsyncMetrics:
    """One small packed tensor a step, read one step late: `push` hands out the step before."""

    def __init__(self) -> None:
        self._travelling: _Travelling | None = None

    def push(
        self, line: dict[str, Any], names: tuple[str, ...], packed: Tensor, work: Work | None
    ) -> dict[str, Any] | None:
        """Send off the numbers of a step, beside what the host knows of it already (`line`): a
        vector on the device, with the field of each value in `names`, and the collective that it
        waits for, if any. Returns the line of the step before, complete.
        """
        before = self.flush()
        arrived = None
        if packed.device.type != "cpu":
            if work is not None:
                work.wait()  # orders the device's stream after the collective; the host continues
                work = None
            on_device = packed
            packed = torch.empty_like(on_device, device="cpu", pin_memory=True)
            packed.copy_(on_device, non_blocking=True)
            arrived = torch.Event(on_device.device)
            arrived.record()
        self._travelling = _Travelling(line, names, packed, work, arrived)
        return before

    def annotate(self, **known: Any) -> None:
        """Add what the host has learned of the step under way."""
        assert self._travelling is not None
        self._travelling.line.update(known)

    def flush(self) -> dict[str, Any] | None:
        """The line under way, complete; None where there is none."""
        if self._travelling is None:
            return None
        line, names, host, work, arrived = self._travelling
        self._travelling = None
        if work is not None:
            work.wait()
        if arrived is not None:
            arrived.synchronize()
        line.update(zip(names, host.tolist(), strict=True))
        return line
