"""What every optimizer here needs of torch's protocols: loss scalers, compilers, loaded options."""

import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer

P = ParamSpec("P")
T = TypeVar("T")


def uncompiled(step: Callable[P, T]) -> Callable[P, T]:
    """Keep a step out of torch.compile's graphs, whoever compiles: it runs as it always does.

    Plans, owners and step counts are looked up by a parameter's identity, which a graph would hold
    fixed from its first call on. Written above `torch.no_grad()`.
    """
    return _disable_dynamo(step)


class MaskedOptimizer(Optimizer):
    """Base of optimizers whose `step` can be masked on the device.

    With `found_inf` set, as torch.amp.GradScaler does, `step` skips without asking the host.
    """

    # On the class, because deepcopy and pickle keep an optimizer's groups and state only.
    _scale_of_scaler: Tensor | None = None

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler that is about to step may leave unscaling and skipping to `step`.

        True for `GradScaler.step` alone. Others read the attribute to learn whether gradients can
        be unscaled and clipped before the step, as Lightning does, and they can. Where somebody has
        put a step of their own in the place of ours to see whether it is called, as accelerate
        does, a step that is to be skipped must not be called: the scaler then asks the host.
        """
        caller = sys._getframe(1)
        scaler = caller.f_locals.get("self")
        if caller.f_code.co_name != "step" or not isinstance(scaler, GradScaler):
            return False
        self._scale_of_scaler = scaler._get_scale_async()
        replaced = self.__dict__.get("step")
        return replaced is None or hasattr(replaced, "_wrapped_by_lr_sched")

    def _take_scale_of_scaler(self) -> Tensor | None:
        """What a GradScaler has multiplied the losses of this step by, 0-d; None: no scaler.

        Known whether or not `scaler.unscale_` was called before. To be asked once, in `step`.
        """
        scale, self._scale_of_scaler = self._scale_of_scaler, None
        return scale

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore groups and state; an option that was not yet known then takes its default."""
        super().__setstate__(state)
        # torch puts it there, for optimizers that know it.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            group.pop("differentiable", None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)
