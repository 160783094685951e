"""The types of what is evaluated in the place of the weights that step. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from largebatch.common.errors import ConfigError
from largebatch.conf.specs import choice, count, real

AVERAGES = ("ema", "gpa", "schedule_free")


@dataclass
class AverageConfig:
    """The average of the weights that is evaluated; `train/weights/average.py` has the formulas."""

    kind: str | None = choice(None, *AVERAGES)
    decay: float = real(0.999, least=0.0)
    interpolation: float = real(0.9, least=0.0)

    def __post_init__(self) -> None:
        for name in ("decay", "interpolation"):
            value = getattr(self, name)
            if not value < 1:
                raise ConfigError(f"average.{name} must be in [0, 1), got {value:g}")


@dataclass
class OuterConfig:
    """Outer steps, each over `interval` inner ones; `train/weights/outer.py` has the formula."""

    kind: str | None = choice(None, "diloco")
    groups: int = count(1, least=1)
    interval: int = count(30, least=1)
    lr: float = real(0.7, above=0.0)
    momentum: float = real(0.9, least=0.0)
    nesterov: bool = True

    def __post_init__(self) -> None:
        if not self.momentum < 1:
            raise ConfigError(f"outer.momentum must be in [0, 1), got {self.momentum:g}")
        if self.kind is None and self.groups > 1:
            raise ConfigError(
                f"outer.groups={self.groups} splits the ranks for outer steps, and outer=none "
                "makes none: add outer=diloco, or leave outer.groups at 1"
            )

    def check_beside(self, average: str | None, sweeps: bool, optim: Mapping[str, Any]) -> None:
        """Refuse outer steps beside another average of the weights, in a sweep of rates, and for an
        optimizer that keeps the weights to itself.
        """
        if average is not None:
            raise ConfigError(
                f"average={average} and outer={self.kind} each say which weights are evaluated: "
                "leave one of them at none"
            )
        if sweeps:
            raise ConfigError(
                f"mode=lr_find sweeps the rate of each inner step, and outer={self.kind} takes "
                "the weights elsewhere between them: leave outer at none"
            )
        if optim.get("master_weights"):
            raise ConfigError(
                f"optim.master_weights=true steps a copy of the weights, which outer={self.kind} "
                "does not move: leave it at false, or outer at none"
            )

    def check_world(self, num_ranks: int) -> None:
        """Refuse a world that cannot be cut into groups of equal size."""
        if num_ranks % self.groups:
            parts = [str(k) for k in range(1, num_ranks + 1) if num_ranks % k == 0]
            shown = parts if len(parts) < 8 else [*parts[:3], "…", *parts[-3:]]
            raise ConfigError(
                f"outer.groups must divide the {num_ranks} rank(s), got {self.groups}: set it to "
                f"{'one of ' * (len(parts) > 1)}{', '.join(shown)}, or start a multiple of "
                f"{self.groups} ranks"
            )
