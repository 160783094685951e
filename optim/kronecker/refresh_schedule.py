"""When the layers of a rank have their turn to be decomposed, and when passes are watched."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from largebatch.optim.kronecker.layers import Layer
from largebatch.optim.sharding.step_counts import StepCounts


class RefreshSchedule:
    """Every layer has a turn once in `interval` steps, in its phase of them.

    While averages are young they change fast: until the interval is reached, all layers have turns
    after 0, 1, 2, 4, 8, … steps.

    Steps are those that have changed something: one that `found_inf` has masked does not count, of
    which the host learns at the next.

    Args:
        phases: of the layers, by their cost, so that no step has much more to do than others.
    """

    def __init__(self, phases: Mapping[Layer, int], interval: int, factor_interval: int) -> None:
        self._phases, self._interval = phases, interval
        self._factor_interval = factor_interval
        self._anchor = torch.empty(0)  # under which the steps are counted, whoever has them
        self._schedule: dict[Layer, int] = {}
        self.counts = StepCounts()

    @property
    def steps(self) -> int:
        """Steps so far, as known after the last `begin`."""
        return self.counts.of(self._anchor, {})

    def begin(self) -> bool:
        """A step begins; returns whether it takes in what was watched."""
        self.counts.settle()
        return self.steps % self._factor_interval == 0

    def end(self, params: Iterable[Tensor], skip: Tensor | None) -> bool:
        """A step ends; returns whether to watch the next passes: where it is not known, yes."""
        self.counts.stepped([self._anchor, *params], skip)
        return skip is not None or self.steps % self._factor_interval == 0

    def due(self, layers: Iterable[Layer]) -> list[Layer]:
        return [layer for layer in layers if self.steps >= self._schedule.get(layer, 0)]

    def mark_refreshed(self, layer: Layer) -> None:
        """The layer has had its turn in this step."""
        self._schedule[layer] = self._from(layer, self.steps + 1)

    def restore(self, steps: Tensor | None, layers: Iterable[Layer]) -> None:
        """After so many steps, of which layers have had their turns; None: of none."""
        self.counts = StepCounts()
        now = self.counts.of(self._anchor, {} if steps is None else {"step": steps})
        self._schedule = {layer: self._from(layer, now) for layer in layers}

    def _from(self, layer: Layer, step: int) -> int:
        """The first turn at `step` or later, counted from 0."""
        doubled = 1 << (step - 1).bit_length() if step > 0 else 0
        if doubled < self._interval:
            return doubled
        return step + (self._phases[layer] - step) % self._interval
