"""All ranks raise the error of the rank that owns the failed layer.

A rank that stopped alone would leave the others waiting in a collective for their group's timeout.
So the owner continues with its last good roots and adds its failure to the sums that the ranks
reduce at that step anyway. At the beginning of the next step, when the sums have long arrived on
the host, every rank raises the same sentence.
"""

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.math.matrix_roots import REASONS, Failures
from largebatch.optim.sharding.layout import Name
from largebatch.optim.sharding.step_counts import Arriving
from largebatch.optim.sharding.work_group import WorkGroup


class FailureReports:
    """Failures for good of an optimizer's layers, which its ranks report to each other."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._received: list[tuple[list[Name], Arriving]] = []

    def own(self, work_group: WorkGroup[Any]) -> Tensor:
        """Count what has failed for good on this rank, by layer and then by reason, to be summed
        over the ranks; empty for a single rank.
        """
        device, dtype, names = work_group.device, work_group.dtype, work_group.names
        if work_group.group is None:
            return torch.empty(0, device=device, dtype=dtype)
        if not self._failures.exhausted:  # made there: a copy would wait for the device
            return torch.zeros(len(names) * len(REASONS), device=device, dtype=dtype)
        failed = Counter((layer, reason) for (layer, _), reason in self._failures.exhausted.items())
        self._failures.exhausted.clear()
        counts = [failed[str(name), reason] for name in names for reason in range(len(REASONS))]
        return torch.tensor(counts, device=device, dtype=dtype)

    def receive(self, work_group: WorkGroup[Any], counts: Tensor) -> None:
        """Keep the sums over all ranks, the same bits on each, for the next step."""
        if counts.numel():
            failed = (counts > 0).to(torch.int64)
            first = torch.stack([failed.argmax(), failed.amax()])  # and whether there is one
            self._received.append((work_group.names, Arriving(first)))

    def heed(self) -> None:
        """Raise what any rank has reported in the step before.

        Raises:
            RootError: a layer has failed for good, on whichever rank.
        """
        received, self._received = self._received, []
        for names, first in received:
            place, failed = first.wait().tolist()
            if failed:
                layer, reason = divmod(place, len(REASONS))
                raise self._failures.error(str(names[layer]), reason)
