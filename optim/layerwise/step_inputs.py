"""What a layer-wise step starts from."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SyncedStep:
    """Inputs of a step that all ranks decide alike, before any moment is touched."""

    gradients: list[Tensor]
    """The local part of each parameter's gradient, as it is, placed like the parameter; by place in
    the plan."""
    norms: list[Tensor] | None
    """Of these, a vector for each chunk group, where the clip has taken them."""
    divisor: Tensor | None
    """0-d: what every gradient is divided by, loss scale and clip together."""
    skip: Tensor | None
    """0-d bool: where true, nothing may change; None where the host knows."""
    is_skipped: bool = False
    """Whether the host knows that nothing may change."""
