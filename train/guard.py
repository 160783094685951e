"""What becomes of a run whose numbers go wrong: skip the step, go back, or stop. No torch.

Two kinds of trouble. A loss or gradient norm that is *not finite*; and a *spike*, all of it finite,
which no check for NaN sees: a 30B model's gradient norm went 0.39, 2.41, 89.9, …, 1e5 at a flat
loss. A spike is a gradient norm above a multiple of its trailing median (20 caught that blow-up,
and healthy runs stay below it but for their first 19 steps), or a loss far above its own median.

And a run may be *lost* without either: an evaluation loss of 2e7 that was 4 at the start, and
thousands of steps until something is infinite. One that stays above a multiple of its first loss
for a tenth of the budget is stopped.

Numbers come a step or two late. So what is to be *skipped* is decided on the device, in its own
step, against `threshold()`; the guard hears of it from the record. Rolling back and stopping are
decided from the records.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Final

from largebatch.common.robust import MAD_TO_SIGMA
from largebatch.conf.config import GuardConfig
from largebatch.records.step_record import StepRecord

FEWEST: Final = 5
"""Values before a median says anything."""

LOST_SHARE: Final = 0.1
"""Of the budget, for which a run has to stay above its bound to be lost."""

LOST_EVALUATIONS: Final = 10
"""In a row, as many at least: a short run is not lost by its warm-up."""

LEAST_START: Final = 1.0
"""A first loss below it counts as it: one that begins at 0, as a divergence from the first weights
does, may well rise to a multiple of what rounding made of it."""

_LEAST_DEVIATION: Final = 0.01
"""Of the median loss, where the losses hardly vary: a loss of full batches has a MAD near 0."""


@dataclass(frozen=True)
class GuardAction:
    """What is to be done about the step that ended at `samples`.

    Attributes:
        kind: "skip" (the device has done it), "rollback" or "stop".
        reason: a sentence's half, for people.
        number: which number of the record, "loss" or "grad_norm".
        bound: what `value` should have stayed at or below; inf where it should have been finite.
    """

    kind: str
    reason: str
    step: int
    samples: int
    number: str
    value: float
    bound: float


@dataclass
class Guard:
    """Judges a run's complete records, each once and in order.

    A gradient norm is a spike above `grad_norm_multiple` times the median of the last `window`
    norms. A loss is one above

        median + loss_deviations * max(1.4826 * MAD, 0.01 * |median|)

    of the last `window` losses, MAD being the median of |loss - median| (1.4826 MAD estimates a
    standard deviation, and no outlier moves it). Steps until `warmup_steps` are never spikes, but
    fill the medians; what was skipped does not.

    A run is lost where its evaluation losses have been above `eval_loss_multiple` times its first
    training loss (and at least 1) for a tenth of its budget and ten evaluations, without one below.

    More than `most_events` skips and rollbacks within `window` lines stop the run: it does not
    recover.
    """

    config: GuardConfig
    _norms: deque[float] = field(init=False)
    _losses: deque[float] = field(init=False)
    _step: int = 0
    _lines: int = 0
    _events: list[int] = field(default_factory=list)  # lines taken at each
    _start: float | None = None
    """The first loss."""
    _lost: list[int] = field(default_factory=list)
    """Samples at each evaluation since the last one that was below the bound."""

    def __post_init__(self) -> None:
        self._norms = deque(maxlen=self.config.window)
        self._losses = deque(maxlen=self.config.window)

    @property
    def skips_non_finite(self) -> bool:
        """Whether the device is to mask a step whose gradient norm is not finite."""
        return self.config.non_finite == "skip"

    @property
    def skips(self) -> bool:
        """Whether it may ask the device to mask a step."""
        watches = self.config.grad_norm_multiple is not None
        return self.skips_non_finite or (self.config.spike == "skip" and watches)

    def threshold(self) -> float:
        """The gradient norm above which the device is to mask the next step; inf: none is.

        What is not finite needs a comparison of its own: inf is not above inf, nor NaN above any.
        """
        return self._norm_bound() if self.config.spike == "skip" else math.inf

    def take(self, record: StepRecord) -> GuardAction | None:
        """Judge a complete record; None where nothing is wrong with it.

        Args:
            record: `step`, `samples`, `loss` and `grad_norm`; `skipped`, true where the device has
                masked the step; `grad_norm_bound`, the threshold it was then compared with.
        """
        self._lines += 1
        if self._start is None and math.isfinite(record["loss"]):
            self._start = record["loss"]
        action = self._not_finite(record) or self._spike(record)
        self._step = record["step"]
        if action is None:
            self._norms.append(record["grad_norm"])
            self._losses.append(record["loss"])
            return None
        return self._counted(action)

    def take_evaluation(
        self, eval_loss: float, step: int, samples: int, budget_samples: int
    ) -> GuardAction | None:
        """Judge an evaluation loss; an action to stop where the run is lost."""
        multiple = self.config.eval_loss_multiple
        if multiple is None or self._start is None:
            return None
        bound = multiple * max(self._start, LEAST_START)
        if eval_loss <= bound:
            self._lost = []
            return None
        self._lost.append(samples)
        since = samples - self._lost[0]
        if len(self._lost) < LOST_EVALUATIONS or since < LOST_SHARE * budget_samples:
            return None
        reason = (
            f"eval_loss {eval_loss:.4g} has been above its bound {bound:.4g} for {since} samples "
            f"(guard.eval_loss_multiple={multiple:g} times the first loss, {self._start:.4g})"
        )
        return GuardAction("stop", reason, step, samples, "eval_loss", eval_loss, bound)

    def _not_finite(self, record: StepRecord) -> GuardAction | None:
        broken = [(name, value) for name, value in _watched(record) if not math.isfinite(value)]
        if not broken:
            return None
        (name, value), kind = broken[0], self.config.non_finite
        reason = f"{name} is {value}"
        if kind == "skip" and not record.get("skipped"):
            # As of a loss whose gradient is finite.
            kind, reason = "stop", f"{reason} and the step is made: too late to skip it"
        return GuardAction(kind, reason, record["step"], record["samples"], name, value, math.inf)

    def _spike(self, record: StepRecord) -> GuardAction | None:
        skips = self.config.spike == "skip"
        bounds = {
            "grad_norm": record.get("grad_norm_bound", self._norm_bound()),
            "loss": self._loss_bound(),
        }
        for name, value in _watched(record):
            bound = bounds[name]
            if record.get("skipped") and name == "grad_norm" if skips else value > bound:
                reason = f"{name} {value:.4g} is above its bound {bound:.4g}"
                step, samples = record["step"], record["samples"]
                return GuardAction(self.config.spike, reason, step, samples, name, value, bound)
        return None

    def _norm_bound(self) -> float:
        if self.config.grad_norm_multiple is None or self._knows_little:
            return math.inf
        bound: float = self.config.grad_norm_multiple * median(self._norms)
        return bound or math.inf  # of norms that are all 0

    def _loss_bound(self) -> float:
        if self.config.loss_deviations is None or self._knows_little:
            return math.inf
        middle: float = median(self._losses)
        spread = MAD_TO_SIGMA * median(abs(loss - middle) for loss in self._losses)
        deviation = max(spread, _LEAST_DEVIATION * abs(middle))
        return middle + float(self.config.loss_deviations) * deviation

    @property
    def _knows_little(self) -> bool:
        return self._step < self.config.warmup_steps or len(self._norms) < FEWEST

    def _counted(self, action: GuardAction) -> GuardAction:
        """The action, or an end to the run where there were too many."""
        since = self._lines - self.config.window
        self._events = [at for at in self._events if at > since] + [self._lines]
        if action.kind == "stop" or len(self._events) <= self.config.most_events:
            return action
        reason = (
            f"{action.reason}: event {len(self._events)} within {self.config.window} steps, and "
            f"guard.most_events={self.config.most_events}"
        )
        return replace(action, kind="stop", reason=reason)

    def state_dict(self) -> dict[str, Any]:
        """In plain numbers."""
        return {
            "norms": list(self._norms),
            "losses": list(self._losses),
            "step": self._step,
            "lines": self._lines,
            "events": list(self._events),
            "start": self._start,
            "lost": list(self._lost),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        self.rewind(state)
        self._lines, self._events = state["lines"], list(state["events"])

    def rewind(self, state: Mapping[str, Any]) -> None:
        """Forget what came after a `state_dict`, as the run goes back to its checkpoint.

        The events stay: they are what ends a run that goes back again and again.
        """
        self._norms = deque(state["norms"], self.config.window)
        self._losses = deque(state["losses"], self.config.window)
        self._step = state["step"]
        self._start, self._lost = state.get("start"), list(state.get("lost", []))


def _watched(record: StepRecord) -> list[tuple[str, float]]:
    return [("grad_norm", record["grad_norm"]), ("loss", record["loss"])]
