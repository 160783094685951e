"""Where a run stands, and what of it a ramp may decide on."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class RunProgress:
    """Where a run stands, and how it ended."""

    status: str = "exhausted"
    steps: int = 0
    samples: int = 0
    loss: float | None = None
    eval_loss: float | None = None
    reason: str | None = None
    """Why it ended, where the guard has ended it."""
    left_out: int = 0
    """Samples of the order that were left out, by rolling back: what comes stands so much later."""
    should_stop: bool = False
    """Whether no step is to follow: the run ends, or has to roll back."""

    def end(self, status: str, reason: str | None = None) -> None:
        """Note how the run ends; no step follows."""
        self.status, self.should_stop = status, True
        if reason is not None:
            self.reason = reason

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        kept = asdict(self)
        del kept["should_stop"]
        return kept


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
