"""When the roots, bases and inverses of a layer are refreshed: once in an interval of steps.

Each layer or block has its own slot of the interval, so that no step has much more to do than
others. While running averages are young they change fast: in the first interval everything is
refreshed at growing distances, 1, 2, 4, 8, … steps.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor

from largebatch.optim.sharding.step_counts import StepCounts

Item = TypeVar("Item", bound=Hashable)


def is_due(step: int, first: int, interval: int, slot: int) -> bool:
    """Return whether a block is refreshed at step `step`, from 1.

    It is first needed at step `first`. Where that is in the first interval, factors are young: all
    blocks are refreshed at `first`, and once more within steps 2 to 3 from there, 4 to 7, 8 to 15,
    and so on up to the interval's length. Otherwise the first refreshes have been distributed over
    the interval before `first`.
    """
    age = step - first + 1
    if first < interval and age < interval:
        phase = 1 << (age.bit_length() - 1) if age > 0 else 0  # begins and lasts so
        return age > 0 and age == phase + slot * phase // interval
    return step > first - interval and (step - 1 - slot) % interval == 0


class RefreshSchedule(Generic[Item]):
    """Refreshes every layer once in `interval` steps, in its slot, and at steps 0, 1, 2, 4, 8, …
    until the interval is reached.

    Steps are those that have changed something: one that `found_inf` has masked does not count, of
    which the host learns at the next.

    Args:
        slots: of the layers, by their cost.
        factor_interval: steps from one update of the averages to the next.
    """

    def __init__(self, slots: Mapping[Item, int], interval: int, factor_interval: int) -> None:
        self._slots, self._interval = slots, interval
        self._factor_interval = factor_interval
        self._anchor = torch.empty(0)  # under which the steps are counted, whoever has them
        self._next: dict[Item, int] = {}
        self.counts = StepCounts()

    @property
    def steps(self) -> int:
        """Steps so far, as known after the last `begin`."""
        return self.counts.of(self._anchor, {})

    def begin(self) -> bool:
        """Begin a step; return whether it takes in what was watched."""
        self.counts.settle()
        return self.steps % self._factor_interval == 0

    def end(self, params: Iterable[Tensor], skip: Tensor | None) -> bool:
        """End a step; return whether to watch the next passes: where it is not known, yes."""
        self.counts.stepped([self._anchor, *params], skip)
        return skip is not None or self.steps % self._factor_interval == 0

    def due(self, items: Iterable[Item]) -> list[Item]:
        return [item for item in items if self.steps >= self._next.get(item, 0)]

    def is_young(self, item: Item) -> bool:
        """Whether the layer's factors are still changing fast, or have never been looked at."""
        return item not in self._next or self.steps < self._interval

    def mark_refreshed(self, item: Item) -> None:
        """Note that the layer has been refreshed in this step."""
        self._next[item] = self._from(item, self.steps + 1)

    def restore(self, steps: Tensor | None, refreshed: Iterable[Item]) -> None:
        """Resume after `steps` steps in which these layers have been refreshed; None: no steps."""
        self.counts = StepCounts()
        now = self.counts.of(self._anchor, {} if steps is None else {"step": steps})
        self._next = {item: self._from(item, now) for item in refreshed}

    def _from(self, item: Item, step: int) -> int:
        """Return the first refresh at `step` or later, counted from 0."""
        doubled = 1 << (step - 1).bit_length() if step > 0 else 0
        if doubled < self._interval:
            return doubled
        return step + (self._slots[item] - step) % self._interval
