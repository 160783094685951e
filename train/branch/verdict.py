"""Which of a checkpoint's branches hold: their smoothed losses against those of smaller batches.

Merrill et al. 2025 (arXiv:2505.23971, section 3.1): branches at batch k B with the rate times √k
under Adam, k under SGD, keep the optimizer's state and train on for a window (2e9 tokens there);
the critical batch size is the largest whose smoothed loss is at most 0.01 above that of every
smaller one. Deviation: the smoothed loss is the mean over the last quarter of the window, which
holds the same samples for every branch, in place of an exponential average over steps; so the
difference, block by block of the same samples, has an interval.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from largebatch.common.errors import ConfigError
from largebatch.records.columns import Columns, read_columns
from largebatch.records.fields import Check, number_or_none
from largebatch.records.names import METRICS, SUMMARY
from largebatch.records.reading import read_fields
from largebatch.records.summary import status

_T_95: Final = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t within which 95 of 100 lie, from 1 degree of freedom on (Fisher's table)."""
MOST_BLOCKS: Final = len(_T_95) + 1


@dataclass(frozen=True)
class Branch:
    """One branch over its window.

    Attributes:
        samples: seen after each step, (steps,); `losses` are the steps' training losses.
        loss: the smoothed one; infinite where it diverged.
        over: that less the least of the smaller batches, with the ends of its 95% interval; None of
            the baseline.
        over_batch: the smaller batch that has it.
    """

    multiple: int
    batch_size: int
    lr: float
    samples: Sequence[float]
    losses: Sequence[float]
    loss: float
    over: tuple[float, float, float] | None = None
    over_batch: int | None = None

    def holds(self, tolerance: float) -> bool:
        """Whether the smoothed loss is within the tolerance of that of every smaller batch."""
        return self.over is None or self.over[0] <= tolerance

    def is_sure(self, tolerance: float) -> bool:
        """Whether all of the interval lies to one side of the tolerance."""
        if self.over is None or math.isinf(self.over[0]):
            return True
        return not self.over[1] <= tolerance < self.over[2]


@dataclass(frozen=True)
class BranchVerdict:
    """What the branches of a checkpoint say.

    Attributes:
        critical: the largest batch size that holds, all smaller ones holding too.
        next_size: the next that was tried, which does not; None: all hold.
        noise: the noise scale at the checkpoint, its standard error, and whether it is resolved;
            None: not measured.
    """

    samples: int
    window: int
    rule: str
    tolerance: float
    branches: Sequence[Branch]
    critical: int
    next_size: int | None
    noise: tuple[float, float, bool] | None


def judge(
    folder: Path, samples: int, window: int, sizes: Sequence[tuple[int, int]], share: float
) -> list[Branch]:
    """Read the branches below `folder` and compare them.

    Args:
        sizes: of each its multiple and batch size, the baseline first.
        share: of the window, at its end, over which losses are averaged.

    Raises:
        ConfigError: one has not ended, or the baseline has diverged.
    """
    read = [_read(folder, multiple, size, samples, window, share) for multiple, size in sizes]
    base, largest = read[0], sizes[-1][1]
    if math.isinf(base.loss):
        raise ConfigError(
            f"{folder}/batch-{base.batch_size} has diverged, so that there is nothing to compare "
            "with: branch from an earlier checkpoint"
        )
    since, until = samples + window * (1 - share), samples + window
    found = [base]
    for place, one in enumerate(read[1:], 1):
        least = min(read[:place], key=lambda smaller: smaller.loss)
        found.append(_compared(one, least, since, until, largest))
    return found


def verdict_of(
    branches: Sequence[Branch], samples: int, window: int, rule: str, tolerance: float,
    noise: tuple[float, float, bool] | None,
) -> BranchVerdict:  # fmt: skip
    """The largest batch that holds."""
    holding = 0
    while holding < len(branches) and branches[holding].holds(tolerance):
        holding += 1
    failed = branches[holding].batch_size if holding < len(branches) else None
    critical = branches[holding - 1].batch_size
    return BranchVerdict(samples, window, rule, tolerance, branches, critical, failed, noise)


def read_noise(run: Path) -> tuple[float, float, bool] | None:
    """The last reading of a run's noise scale, its standard error, and whether it is resolved."""
    columns = _columns(run, "noise_scale", "noise_scale_error")
    if not columns.get("noise_scale"):
        return None
    scale, error = columns["noise_scale"][-1], columns["noise_scale_error"][-1]
    return scale, error, scale > 0 and error < scale / 2


def _read(
    folder: Path, multiple: int, size: int, samples: int, window: int, share: float
) -> Branch:
    run = folder / f"batch-{size}"
    try:
        ended = read_fields(run / SUMMARY).take("status", status)
    except FileNotFoundError as error:
        raise ConfigError(f"{run} has not ended: give the same command again") from error
    columns = _columns(run, "samples", "loss", "lr")
    seen, losses = [*columns["samples"]], [*columns["loss"]]
    last = [
        loss for at, loss in zip(seen, losses, strict=True) if at > samples + window * (1 - share)
    ]
    diverged = ended != "exhausted" or not last or not all(map(math.isfinite, last))
    loss = math.inf if diverged else statistics.fmean(last)
    return Branch(multiple, size, columns["lr"][0], seen, losses, loss)


def _columns(run: Path, *names: str) -> Columns:
    def wanted(key: str) -> Check[Any] | None:
        return number_or_none if key in names else None

    return read_columns(run / METRICS, wanted, [])


def _compared(branch: Branch, base: Branch, since: float, until: int, largest: int) -> Branch:
    """With the difference to another, block by block of the largest batch's samples."""
    over = (math.inf, math.inf, math.inf)
    if math.isfinite(branch.loss):
        count = max(1, min(MOST_BLOCKS, round((until - since) / largest)))
        width = (until - since) / count
        blocks = [
            _mean(branch, since + width * place, since + width * (place + 1))
            - _mean(base, since + width * place, since + width * (place + 1))
            for place in range(count)
        ]
        middle, reach = branch.loss - base.loss, math.inf
        if count > 1:
            reach = _T_95[count - 2] * statistics.stdev(blocks) / math.sqrt(count)
        over = (middle, middle - reach, middle + reach)
    return Branch(
        branch.multiple, branch.batch_size, branch.lr, branch.samples, branch.losses, branch.loss,
        over, base.batch_size,
    )  # fmt: skip


def _mean(branch: Branch, since: float, until: float) -> float:
    """The mean loss of the steps that begin within a block."""
    found = [
        loss
        for at, loss in zip(branch.samples, branch.losses, strict=True)
        if since <= at - branch.batch_size < until
    ]
    return statistics.fmean(found or [branch.loss])
