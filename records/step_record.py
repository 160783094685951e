"""A line of `metrics.jsonl` by type. Trust ratios and noise scales of single layers come on top."""

from typing import Any, TypedDict


class StepRecord(TypedDict, total=False):
    """One step: what the host planned of it, then what came back from the device."""

    step: int
    samples: int
    """Seen after the step."""
    tokens: int
    lr: float
    global_batch_size: int
    micro_batch_size: int
    gradient_accumulation_steps: int
    data_parallel_size: int
    step_seconds: float
    batch_change: dict[str, Any]
    """The batch size `from` which it changed, and each hyperparameter that moved with it."""
    loss: float
    eval_loss: float
    grad_norm: float
    grad_norm_clipped: float
    grad_norm_bound: float
    skipped: bool
    overflow: bool
    """Skipped as FP16 overflowed, which the loss scale mends by itself."""
    loss_scale: float
    interrupted: float
    """Ranks that have a stop signal; above 0 all stop."""
    save_is_due: float
    """Above 0: a checkpoint is due by time."""
