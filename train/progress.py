"""Where a run stands, and what of it a ramp may decide on."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.records.names import EVALUATED
from largebatch.records.target import MAX, Target


@dataclass(frozen=True)
class Evaluated:
    """What an evaluation has found, the same on every rank.

    Attributes:
        loss: the mean over the evaluation set.
        metrics: of the task, by name.
    """

    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)

    def value(self, metric: str) -> float:
        """The loss, or the metric of this name.

        Raises:
            ConfigError: the task has no such metric.
        """
        if metric == "loss":
            return self.loss
        if metric not in self.metrics:
            had = f"has {', '.join(self.metrics)}" if self.metrics else "has no metrics"
            raise ConfigError(
                f"target.metric={metric} is none of the task's, which {had}: aim at one that its "
                "method metrics(model, batch) returns, or at target.loss"
            )
        return self.metrics[metric]

    def fields(self) -> dict[str, float]:
        """What a record line says of it."""
        found = {"loss": self.loss} | dict(self.metrics)
        return {f"{EVALUATED}{name}": value for name, value in found.items()}


@dataclass
class RunProgress:
    """Where a run stands, and how it ended."""

    status: str = "exhausted"
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    running_loss: float | None = None
    """Training losses, each new one weighing 0.2 of the average, and more in the first steps."""
    eval_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the task, when it was evaluated last."""
    eval_steps: int | None = None
    """Where it was evaluated; None where evaluations have been passed over since."""
    crossed_at: float | None = None
    """The step at which the evaluation loss, or the metric, crossed the target, interpolated."""
    reason: str | None = None
    """Why it ended, where the guard has ended it."""
    left_out: int = 0
    """Samples of the order that were left out, by rolling back: what comes stands so much later."""
    evaluation_seconds: float = 0.0
    should_stop: bool = False
    """Whether no step is to follow: the run ends, or has to roll back."""

    def end(self, status: str, reason: str | None = None) -> None:
        """Note how the run ends; no step follows."""
        self.status, self.should_stop = status, True
        if reason is not None:
            self.reason = reason

    def take_loss(self, loss: float) -> None:
        """Take in the training loss of a step."""
        self.loss = loss
        if math.isfinite(loss):
            before = loss if self.running_loss is None else self.running_loss
            # An average over a tenth of the steps or less: it would lag behind a fast fall.
            weight = min(1.0, max(0.2, 10 / max(1, self.steps)))
            self.running_loss = before + weight * (loss - before)

    def take_evaluation(self, found: Evaluated, target: Target | None, seconds: float) -> None:
        """Take in an evaluation, made now in so many seconds."""
        self.evaluation_seconds += seconds
        if target is not None and target.is_met(value := found.value(target.metric)):
            metrics: Mapping[str, float | None] = {"loss": self.eval_loss, **self.metrics}
            sign, before = -1.0 if target.direction == MAX else 1.0, metrics.get(target.metric)
            before = None if before is None else sign * before
            self.crossed_at = crossing(
                self.eval_steps, before, self.steps, sign * value, sign * target.value
            )
        self.eval_loss, self.metrics = found.loss, dict(found.metrics)
        self.eval_steps = self.steps

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = asdict(self)
        del kept["should_stop"]
        return kept


def crossing(
    steps_before: int | None, loss_before: float | None, steps: int, loss: float, target: float
) -> float:
    """Interpolate where the loss crossed `target`, the logarithm of the steps against the loss.

    Counted as the first evaluation at or below the target, a crossing is late by half the gap
    between two evaluations on average.

    >>> round(crossing(90, 2.3, 100, 2.1, 2.2), 2)
    94.87
    """
    if steps_before is None or loss_before is None or not loss <= target < loss_before < math.inf:
        return float(steps)
    share = (loss_before - target) / (loss_before - loss)
    return math.exp(math.log(steps_before) + share * math.log(steps / steps_before))


def of_trunk(state: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What a branch takes over of its trunk's state: all but how that ended, and what its ramp and
    its noise scale had come to.

    Args:
        own: the state of the branch before its first step.
    """
    ended = {"status": "exhausted", "reason": None, "crossed_at": None}
    progress = state["progress"] | ended
    due_at = state["evaluation_due_at"]
    return {
        **state,
        "progress": progress,
        "plan": own["plan"],
        "noise": {"scales": {}, "samples": progress["samples"]},
        "evaluation_due_at": own["evaluation_due_at"] if due_at is None else due_at,
    }


# What a ramp may decide on.
RAMP_SIGNALS = frozenset(
    {
        "batch_size",
        "eval_loss",
        "grad_sq_norm",
        "grad_trace",
        "loss",
        "lr",
        "noise_resolved",
        "noise_samples",
        "noise_scale",
        "noise_scale_error",
        "step_seconds",
    }
)
