"""What a study tunes of an optimizer beside its learning rate: momentum, and more on request.

Each key has a grid of values that climbs walk. It is tuned at the batch size where a study starts
and at the largest; the sizes between try the values from the one to the other, and the smaller ones
take that of the start.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

_DECAYS: Final = (0.5, 0.75, 0.9, 0.95, 0.98)
"""1 - value falls by a factor 2 to 2.5 a step, two to a side of 0.9; an optimizer's own takes the
place of the nearest."""
_SECOND_DECAYS: Final = (0.9, 0.95, 0.98, 0.99, 0.995, 0.999)
_FACTORS: Final = (0.1, 0.3, 1.0, 3.0, 10.0)
_WEIGHT_DECAYS: Final = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)

_ACCUMULATING: Final = ("torch.optim.SGD", "largebatch.optim.LARS")
"""Their momentum sums gradients, so that steps grow as 1 / (1 - momentum); the others average."""


@dataclass(frozen=True)
class TunedKey:
    """One key of one optimizer.

    Attributes:
        name: `momentum` (an optimizer's momentum, or beta1), `beta2`, `damping`, `weight_decay`.
        grid: its values, ascending.
        start: the place of the optimizer's own value.
        shifts: for each value, how many grid points of the rate (factors sqrt(2)) keep the size of
            the steps.
        beta: the other of the two betas, where this is one of them.
    """

    name: str
    grid: tuple[float, ...]
    start: int
    shifts: tuple[int, ...]
    beta: float | None = None

    def override(self, value: float) -> str:
        """The value as Hydra's override."""
        if self.beta is None:
            return f"optim.{self.name}={value:g}"
        betas = (self.beta, value) if self.name == "beta2" else (value, self.beta)
        return f"optim.betas=[{betas[0]:g},{betas[1]:g}]"


def tuned_keys(optim: Mapping[str, Any], names: Sequence[str]) -> tuple[TunedKey, ...]:
    """The keys of `names` that an optimizer's configuration has, the rate aside."""
    found = (_KINDS[name](optim) for name in names if name != "lr")
    return tuple(key for key in found if key is not None)


def _momentum(optim: Mapping[str, Any]) -> TunedKey | None:
    own, betas = optim.get("momentum"), optim.get("betas")
    if isinstance(own, float | int):
        grid = _decays(own)
        sums = optim.get("_target_") in _ACCUMULATING
        shifts = tuple(_rate_shift(value, own) if sums else 0 for value in grid)
        return TunedKey("momentum", grid, grid.index(own), shifts)
    if _is_pair(betas):
        assert betas is not None
        grid = _decays(betas[0])
        return TunedKey("momentum", grid, grid.index(betas[0]), (0,) * len(grid), betas[1])
    return None


def _beta2(optim: Mapping[str, Any]) -> TunedKey | None:
    betas = optim.get("betas")
    if not _is_pair(betas):
        return None
    assert betas is not None
    grid = _with(betas[1], _SECOND_DECAYS)
    return TunedKey("beta2", grid, grid.index(betas[1]), (0,) * len(grid), betas[0])


def _damping(optim: Mapping[str, Any]) -> TunedKey | None:
    own = optim.get("damping")
    if not isinstance(own, float | int) or own <= 0:
        return None
    grid = tuple(own * factor for factor in _FACTORS)
    return TunedKey("damping", grid, _FACTORS.index(1.0), (0,) * len(grid))


def _weight_decay(optim: Mapping[str, Any]) -> TunedKey | None:
    own = optim.get("weight_decay")
    if not isinstance(own, float | int):
        return None
    grid = _with(own, _WEIGHT_DECAYS)
    return TunedKey("weight_decay", grid, grid.index(own), (0,) * len(grid))


_KINDS: Final = {
    "momentum": _momentum,
    "beta2": _beta2,
    "damping": _damping,
    "weight_decay": _weight_decay,
}


def _with(own: float, values: Sequence[float]) -> tuple[float, ...]:
    return tuple(sorted({float(own), *values}))


def _decays(own: float) -> tuple[float, ...]:
    """The values with an optimizer's own in place of the one whose 1 - value is nearest to it."""
    nearest = min(_DECAYS, key=lambda value: abs(math.log((1 - value) / (1 - own))))
    return tuple(sorted({*_DECAYS} - {nearest} | {float(own)}))


def _rate_shift(momentum: float, own: float) -> int:
    """Grid points of the rate, a factor sqrt(2) each, from the own momentum's to this one's."""
    return round(2 * math.log2((1 - momentum) / (1 - own)))


def _is_pair(betas: Any) -> bool:
    return isinstance(betas, Sequence) and len(betas) == 2
