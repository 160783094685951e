"""What every optimizer here needs of torch's protocols: scalers, compilers, groups, state."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, ParamsT

P = ParamSpec("P")
T = TypeVar("T")

Group = dict[str, Any]
"""A parameter group, as torch's optimizers have them."""


def uncompiled(step: Callable[P, T]) -> Callable[P, T]:
    """Keep a step out of torch.compile's graphs, whoever compiles: it runs as it always does.

    Plans, owners and step counts are looked up by a parameter's identity, which a graph would hold
    fixed from its first call on. Written above `torch.no_grad()`.
    """
    return _disable_dynamo(step)


class GroupedOptimizer(Optimizer):
    """Base of all optimizers: groups that may come late and without names, or lack an option."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; one without names takes some where the others have names."""
        self._give_names(param_group)
        super().add_param_group(param_group)

    def _give_names(self, group: dict[str, Any]) -> None:
        if not any("param_names" in known for known in self.param_groups):
            return
        params = group.get("params", ())
        if "param_names" in group or not isinstance(params, Tensor | list | tuple | Iterator):
            return
        params = [params] if isinstance(params, Tensor) else list(params)
        if not any(isinstance(param, tuple) for param in params):
            first = sum(len(group["params"]) for group in self.param_groups)
            params = [(self._name_of_new(p, i), p) for i, p in enumerate(params, first)]
        group["params"] = params

    def _name_of_new(self, param: Tensor, index: int) -> str:
        """The name of a parameter that came without one, by its index over all groups."""
        return f"param_{index}"

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore groups and state; an option that was not yet known then takes its default."""
        super().__setstate__(state)
        # torch puts it there, for optimizers that know it.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            group.pop("differentiable", None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)


class MaskedOptimizer(GroupedOptimizer):
    """Base of optimizers whose `step` can be masked on the device.

    With `found_inf` set, as torch.amp.GradScaler does, `step` skips without asking the host.
    """

    # On the class, because deepcopy and pickle keep an optimizer's groups and state only.
    _scale_of_scaler: Tensor | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        refuse_what_only_has_parameters(type(self).__name__, params)
        super().__init__(params, defaults)

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


def refuse_what_only_has_parameters(name: str, params: object) -> None:
    """Refuse a model, or a method that was not called, in the place of its parameters."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"{name} takes a model's parameters, got the {type(params).__name__} itself: write "
            f"{name}(model.parameters(), …), or {name}(param_groups(model), …) to leave biases and "
            "norms out of decay and adaptation."
        )
    if callable(params):
        called = getattr(params, "__name__", "parameters")
        raise TypeError(
            f"{name} takes parameters, got the method {called!r}: call it, {name}("
            f"model.{called}(), …)."
        )


def refuse_param(optimizer: str, needs: str, name: object, param: Tensor) -> None:
    """Refuse a parameter that cannot be treated; `needs`: for what a flat shard does not do."""
    if param.is_complex():
        raise ValueError(
            f"{optimizer} takes real parameters, got {param.dtype} for parameter {name!r}: hold "
            "its real and imaginary part as two parameters."
        )
    if getattr(param, "_fsdp_flattened", False):
        raise ValueError(
            f"{optimizer} needs {needs}, and parameter {name!r} is a flat shard of "
            "FullyShardedDataParallel (FSDP1), which does not say what it holds: wrap the model "
            "with torch.distributed.fsdp.fully_shard (FSDP2)."
        )


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """The closure's loss; its backward pass needs gradients although the step does not."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
