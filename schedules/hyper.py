"""The hyperparameters that move with the batch size: `Hyper`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from largebatch.common.numbers import real_number
from largebatch.schedules.fields import Checked, count, real


@dataclass(frozen=True, kw_only=True)
class Hyper(Checked):
    """Hyperparameters tuned at one global batch size. None: the optimizer has no such
    hyperparameter.

    `lr` is the peak learning rate, `betas` and `ema_decay` (of an average of the weights) are decay
    rates per step. `weight_decay` is decoupled, as in torch's AdamW: weights shrink by
    lr * weight_decay a step.

    Raises:
        ValueError: a value out of range.
    """

    lr: float = real("lr", above=0.0)
    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float | None = real("eps", 1e-8, optional=True, least=0.0)
    weight_decay: float | None = real("weight_decay", 0.0, optional=True, least=0.0)
    ema_decay: float | None = None
    warmup_samples: int = count("warmup_samples", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.betas is not None:
            object.__setattr__(self, "betas", _betas(self.betas))
        if self.ema_decay is not None:
            object.__setattr__(self, "ema_decay", _decay_rate(self.ema_decay, "ema_decay"))

    @classmethod
    def of_group(cls, group: Mapping[str, Any], lr: float) -> "Hyper":
        """What an optimizer's parameter group, or its configuration, holds of these; None for what
        it has not, or has in another form (three betas, say).
        """
        betas = group.get("betas")
        pair = isinstance(betas, Sequence) and len(betas) == 2
        eps, weight_decay = (
            value if isinstance(value := group.get(name), float | int) else None
            for name in ("eps", "weight_decay")
        )
        return cls(
            lr=lr,
            betas=(betas[0], betas[1]) if betas and pair else None,
            eps=eps,
            weight_decay=weight_decay,
        )


def _betas(betas: Sequence[float]) -> tuple[float, float]:
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ValueError(f"betas must be two numbers, got {betas!r}")
    return _decay_rate(betas[0], "betas[0]"), _decay_rate(betas[1], "betas[1]")


def _decay_rate(value: object, name: str) -> float:
    rate = real_number(value, name, least=0.0, most=1.0)
    if rate == 1.0:
        raise ValueError(f"{name} must be below 1, got {value!r}")
    return rate
