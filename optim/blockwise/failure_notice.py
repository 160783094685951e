"""All ranks raise the error of the rank that owns the failed layer.

A rank that stopped alone would leave the others waiting in a collective for their group's timeout.
So the owner continues with its last good roots and adds its failure to the sums that the ranks
reduce at that step anyway. At the beginning of the next step, when the sums have long arrived on
the host, every rank raises the same sentence.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.math.matrix_roots import REASONS, Failures
from largebatch.optim.sharding.layout import Name
from largebatch.optim.sharding.step_counts import Arriving
from largebatch.optim.sharding.work_group import WorkGroup


def counts_of(failures: Failures, layers: Sequence[Name]) -> list[float]:
    """Count the matrices that have failed for good on this rank, by layer and then by reason, to be
    summed over the ranks."""
    counts = Counter((layer, reason) for (layer, _), reason in failures.exhausted.items())
    return [float(counts[str(name), reason]) for name in layers for reason in range(len(REASONS))]


class FailureNotice:
    """The failures of all ranks of one process group at a step.

    Args:
        counts: the sum of `counts_of` over the ranks, the same bits on each.
    """

    def __init__(self, failures: Failures, layers: Sequence[Name], counts: Tensor) -> None:
        self._failures, self._layers = failures, layers
        self._first = Arriving(first_failure(counts))

    def check(self) -> None:
        """Raise what was reported.

        Raises:
            RootError: a layer has failed for good, on whichever rank.
        """
        place, failed = self._first.wait().tolist()
        if failed:
            layer, reason = divmod(int(place), len(REASONS))
            raise self._failures.error(str(self._layers[layer]), reason)


def first_failure(counts: Tensor) -> Tensor:
    """Return the index of the first count above 0, and whether there is one; shape (2,)."""
    failed = (counts > 0).to(torch.int64)
    return torch.stack([failed.argmax(), failed.amax()])


class FailureReports:
    """Failures for good of an optimizer's layers, which its ranks report to each other."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._notices: list[FailureNotice] = []

    def own(self, work_group: WorkGroup[Any]) -> Tensor:
        """Return this rank's failures, to be summed over the ranks; empty for a single rank."""
        device, dtype, names = work_group.device, work_group.dtype, work_group.names
        if work_group.group is None:
            return torch.empty(0, device=device, dtype=dtype)
        if not self._failures.exhausted:  # made there: a copy would wait for the device
            return torch.zeros(len(names) * len(REASONS), device=device, dtype=dtype)
        counts = torch.tensor(counts_of(self._failures, names), device=device, dtype=dtype)
        self._failures.exhausted.clear()
        return counts

    def receive(self, work_group: WorkGroup[Any], counts: Tensor) -> None:
        """Keep the sums over all ranks for the next step."""
        if counts.numel():
            self._notices.append(FailureNotice(self._failures, work_group.names, counts))

    def heed(self) -> None:
        """Raise what any rank has reported in the step before.

        Raises:
            RootError: a layer has failed for good, on whichever rank.
        """
        notices, self._notices = self._notices, []
        for notice in notices:
            notice.check()
