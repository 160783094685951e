"""`mode=lr_find`: the learning rate swept from low to high within one run, at the batch size that
the configured ramp ends at.

A learning-rate range test (Smith, 1506.01186) on a log axis. Training is cumulative, one step a
learning rate. A learning rate is judged by the loss that its step leaves, which is that of the next
line (others set a learning rate against the loss before its step, one point further up); one step
more than there are learning rates so shows the loss of the last. Imports no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Final

from largebatch.conf.config import TargetConfig, TrainConfig
from largebatch.conf.sweep_config import FEWEST_POINTS, LRFindConfig
from largebatch.records.step_record import StepRecord
from largebatch.records.summary import SummaryRecord
from largebatch.schedules import AdaptiveRamp, ConstantBatch, GeometricSweep, Hyper, Plan

AROUND: Final = 2
"""Losses on either side that the smoothed one is the median of."""

FRACTION: Final = 10.0
"""The suggestion is the blow-up's learning rate over it, as ALCF's large-batch runs chose it."""


def sweep_plan(plan: Plan, mode: LRFindConfig) -> Plan:
    """The sweep at the batch size that `plan` ends at, with its betas, eps and decay there."""
    size = target_batch_size(plan)
    alone = Hyper(lr=plan.base_lr, betas=None, eps=None, weight_decay=None)
    peak = plan.rescale(alone, size).lr
    curve = GeometricSweep(
        first=mode.low / peak, last=mode.high / peak, sweep_samples=(mode.points - 1) * size
    )
    return replace(
        plan, ramp=ConstantBatch(size=size), curve=curve, budget_samples=(mode.points + 1) * size,
        # What `plan` makes of it, whose length and trade count, not the sweep's.
        rule=lambda hyper, base_batch, batch: plan.rescale(hyper, batch),
        hold=None, base_samples=None, duration_exponent=0.0,
    )  # fmt: skip


def target_batch_size(plan: Plan) -> int:
    """The batch size that the plan ends at; of a ramp that the run decides, its largest."""
    if isinstance(plan.ramp, AdaptiveRamp):
        return max(plan.ramp.sizes())
    return plan.final_batch_size


def as_sweep(config: TrainConfig, sweep: Plan) -> TrainConfig:
    """The configuration of the sweep itself: its length, and no target."""
    budget = replace(config.budget, samples=sweep.budget_samples)
    return replace(config, budget=budget, target=TargetConfig())


class NothingFound(Exception):
    """The sweep names no learning rate; the message is one sentence with the way out."""


@dataclass(frozen=True)
class Found:
    """What a sweep says of the smoothed loss."""

    lr_suggested: float
    lr_at_minimum: float
    lr_at_blow_up: float
    loss_at_minimum: float


class LRFinder:
    """Takes each record of a sweep, in step order; true once the loss has blown up. The same on
    every rank, as losses are.

    Attributes:
        lrs: of the steps so far.
        losses: before each of these steps; `losses[i + 1]` is what the step at `lrs[i]` left.
    """

    def __init__(self, mode: LRFindConfig) -> None:
        self.mode = mode
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self._least = math.inf

    def __call__(self, record: StepRecord) -> bool:
        self.lrs.append(record["lr"])
        # A loss without a gradient is as good as none.
        self.losses.append(record["loss"] if math.isfinite(record["grad_norm"]) else math.nan)
        newest = len(self.losses) - 1 - AROUND  # with neighbours on both sides
        if newest < 0:
            return False
        loss = smoothed(self.losses, newest)
        self._least = min(self._least, loss)
        return loss > float(self.mode.blow_up) * self._least

    def outcome(self, status: str) -> SummaryRecord:
        """What the summary says of a sweep that ended with `status`."""
        if status == "interrupted":
            return {}
        try:
            found = find(self.lrs, self.losses, self.mode)
        except NothingFound as failure:
            return {"status": "failed", "error": str(failure)}
        return {"status": "exhausted", "lr_find": asdict(self.mode) | asdict(found)}


def smoothed(losses: Sequence[float], place: int) -> float:
    """The median of the loss at `place` and up to `AROUND` on either side; a loss that is not
    finite counts as infinite.

    A median of neighbours on both sides follows a rise without lag and ignores a single spike.
    """
    near = losses[max(0, place - AROUND) : place + AROUND + 1]
    return median(loss if math.isfinite(loss) else math.inf for loss in near)


def find(lrs: Sequence[float], losses: Sequence[float], mode: LRFindConfig) -> Found:
    """What the sweep says.

    Args:
        lrs: of each step.
        losses: before each step: one learning rate was not yet judged.

    Raises:
        NothingFound: no blow-up, one too early, or no learning rate at which the loss fell.
    """
    if not losses or not math.isfinite(losses[0]):
        raise NothingFound(
            "the loss or its gradient is not finite before the first update, which no learning "
            "rate mends: look at the model, the task and their data"
        )
    smooth = [smoothed(losses, place) for place in range(len(losses))]
    if min(smooth) <= 0.0:
        raise NothingFound(
            f"the loss fell to {min(smooth):.4g}, and {mode.blow_up:g} times that is no blow-up: "
            "mode=lr_find needs a loss above 0, so add a constant to it"
        )
    place = _blow_up(smooth, losses, mode.blow_up)
    if place is None:
        raise NothingFound(
            f"the loss has not blown up to {mode.blow_up:g} times its least at learning rates up "
            f"to {lrs[-2]:.4g}: raise mode.high, or lower mode.blow_up"
        )
    least = min(range(place), key=smooth.__getitem__)
    at_blow_up, judged = lrs[place - 1], place - 1
    if judged < FEWEST_POINTS:
        raise NothingFound(
            f"the loss blew up at a learning rate of {at_blow_up:.4g}, after {judged} of the "
            f"{FEWEST_POINTS} that are needed before: lower mode.low, or raise mode.points"
        )
    if least == 0:
        raise NothingFound(
            f"the loss only rose from {losses[0]:.4g} until it blew up at a learning rate of "
            f"{at_blow_up:.4g}: lower mode.low"
        )
    return Found(at_blow_up / FRACTION, lrs[least - 1], at_blow_up, smooth[least])


def _blow_up(smooth: Sequence[float], losses: Sequence[float], times: float) -> int | None:
    """The first place with a loss that is not finite, or a smoothed one of more than `times` the
    least before it.
    """
    least = smooth[0]
    for place in range(1, len(losses)):
        if not math.isfinite(losses[place]) or smooth[place] > times * least:
            return place
        least = min(least, smooth[place])
    return None
