"""The base of all optimizers: torch's protocols of scalers, compilers, groups and state."""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Final, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import GradScaler
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from largebatch.optim.loading import in_own_order, of_no_parameter
from largebatch.optim.math.tensors import compute_dtype, gradient_of, on_device, scalar
from largebatch.optim.options import require
from largebatch.optim.sharding.layout import Name

Group = dict[str, Any]
"""A parameter group, as torch's optimizers have them."""


_P = ParamSpec("_P")
_T = TypeVar("_T")

_UNTRACED_OF_TORCH: Final = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")

_untraced: list[Callable[..., object]] = []


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Mark a function that a compiled caller runs uncompiled, as torch marks its optimizers'
    methods.
    """
    _untraced.append(function)
    return _disable_dynamo(function)


@contextmanager
def without_dynamo() -> Iterator[None]:
    """Have such functions called directly within it, where nothing is compiled.

    The first call of what is marked imports torch._dynamo, and with it torch.distributed.fsdp and
    sympy: some 800 files, and most of the time of `import torch`. The mark keeps what it calls in
    an attribute of the function, where this puts the function itself; without effect in a torch
    that keeps it elsewhere. Compiled code would trace into them; and the steps of torch's own
    optimizers import torch._dynamo all the same.
    """
    marked = (getattr(Optimizer, name) for name in _UNTRACED_OF_TORCH)
    inner = (getattr(function, "__wrapped__", None) for function in marked)
    new = [
        function
        for function in (*_untraced, *inner)
        if function is not None and "__dynamo_disable" not in vars(function)
    ]
    for function in new:
        vars(function)["__dynamo_disable"] = function
    try:
        yield
    finally:
        for function in new:
            vars(function).pop("__dynamo_disable", None)


class GroupedOptimizer(Optimizer):
    """Base of all optimizers: the frame of a step; groups that may come late and without names, or
    lack an option.
    """

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # Not compiled, whoever compiles: plans, owners and step counts are looked up by a parameter's
    # identity, which a graph would hold fixed from its first call on.
    @untraced
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient; returns the closure's loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():  # for its backward pass
                loss = closure()
        self._make_step()
        return loss

    def _make_step(self) -> None:
        """Update every parameter that has a gradient."""
        raise NotImplementedError

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch; one without names takes some where the others have names."""
        self._give_names(param_group)
        super().add_param_group(param_group)

    def _give_names(self, group: Group) -> None:
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
        """Name a parameter that came without a name, given its index over all groups."""
        return f"param_{index}"

    def _params(self) -> Iterator[Tensor]:
        return (param for group in self.param_groups for param in group["params"])

    def _named_params(self) -> Iterator[tuple[Group, Name, nn.Parameter]]:
        """Yield each parameter with its group and its name, or its index where unnamed."""
        first = 0
        for group in self.param_groups:
            params, names = group["params"], group.get("param_names", ())
            if len(names) != len(params):  # a wrapper has put others in the place of the named
                names = range(first, first + len(params))
            yield from ((group, *named) for named in zip(names, params, strict=True))
            first += len(params)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse options (the defaults, or one group's) out of range; subclasses add their own."""
        lr = options["lr"]
        if isinstance(lr, Tensor):  # its value may lie on a device and is not looked at
            accepted = "a float or a tensor of one element"
            require(lr.numel() == 1, "lr", accepted, f"shape {tuple(lr.shape)}")
        else:
            require(0 <= lr < math.inf, "lr", "in [0, inf)", lr)
        if "betas" in options:
            betas = options["betas"]
            pair = isinstance(betas, tuple | list) and len(betas) == 2
            in_range = pair and all(0 <= beta < 1 for beta in betas)
            require(in_range, "betas", "two numbers in [0, 1)", betas)
        if "momentum" in options:
            require(0 <= options["momentum"] < 1, "momentum", "in [0, 1)", options["momentum"])
        for name in ("eps", "weight_decay"):
            if name in options:
                require(0 <= options[name] < math.inf, name, "in [0, inf)", options[name])

    def _refuse_sparse(self) -> None:
        """Refuse a sparse gradient."""
        for _, name, param in self._named_params():
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} needs dense gradients, got a {param.grad.layout} "
                    f"gradient for parameter {name!r}."
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore groups and state; an option that was not yet known then takes its default."""
        super().__setstate__(state)
        # torch puts it there, for optimizers that know it.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            group.pop("differentiable", None)
            for name, value in self.defaults.items():
                group.setdefault(name, value)


class ShardedOptimizer(GroupedOptimizer):
    """Base of optimizers of parameters that may be sharded, whose `step` is masked on the device.

    With `found_inf` set, as torch.amp.GradScaler does, `step` skips without asking the host. State
    is kept and loaded in FP32 at least.
    """

    # On the class, because deepcopy and pickle keep an optimizer's groups and state only.
    _scale_of_scaler: Tensor | None = None

    _needs: ClassVar[str] = "to know layers"
    """What a flat shard, which says nothing of its parameters, does not allow."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._check_options(defaults)
        refuse_what_only_has_parameters(type(self).__name__, params)
        super().__init__(params, defaults)

    # Groups -------------------------------------------------------------------------------------

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch; a group that is refused leaves the optimizer as it was.

        Raises:
            ValueError: an option out of range, a parameter that cannot be treated.
        """
        super().add_param_group(param_group)
        try:
            group = self.param_groups[-1]
            self._check_options(group)
            for owner, name, param in self._named_params():
                if owner is group:
                    self._check_param(group, name, param)
            self._check_groups()
        except Exception:
            self.param_groups.pop()
            raise

    def _check_param(self, group: Group, name: Name, param: Tensor) -> None:
        """Refuse a parameter that cannot be treated."""
        if param.is_complex():
            raise ValueError(
                f"{type(self).__name__} takes real parameters, got {param.dtype} for parameter "
                f"{name!r}: hold its real and imaginary part as two parameters."
            )
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"{type(self).__name__} needs {self._needs}, and parameter {name!r} is a flat "
                "shard of FullyShardedDataParallel (FSDP1), which does not say what it holds: wrap "
                "the model with torch.distributed.fsdp.fully_shard (FSDP2)."
            )

    def _check_groups(self) -> None:
        """Refuse options that differ between groups and may not."""

    # Loss scales and skipped steps --------------------------------------------------------------

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
        """Return what a GradScaler has multiplied this step's losses by, 0-d; None: no scaler.

        Known whether or not `scaler.unscale_` was called before. To be asked once, in `step`.
        """
        scale, self._scale_of_scaler = self._scale_of_scaler, None
        return scale

    def _own_found_inf(self, device: torch.device) -> Tensor | None:
        """Return this rank's `found_inf`, 0-d FP32, to be summed over ranks; None: not set."""
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        return None if found_inf is None else on_device(found_inf, device).float().clone()

    def _unscaled_gradient(self, param: Tensor) -> Tensor:
        """Return the local part of a gradient without the loss scale, FP32 or wider."""
        gradient = gradient_of(param).to(compute_dtype(param))
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        return gradient if grad_scale is None else gradient / scalar(grad_scale, gradient)

    # Saving and loading -------------------------------------------------------------------------

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load as torch does, hooks included, but keep the state in FP32.

        `torch.optim.Optimizer` casts every floating-point state to its parameter's dtype, which
        would round the moments of a bf16 parameter to bf16. So torch is handed the groups alone.

        Raises:
            ValueError: a state that does not fit these parameters or options; what was there before
                remains.
        """
        loaded: dict[int, dict[str, Any]] = {}
        ids: list[int] = []

        def take_state(_: Optimizer, final: StateDict) -> StateDict:  # after the user's pre-hooks
            final = self._translated(in_own_order(final, self.param_groups))
            loaded.update(final["state"])
            ids.extend(index for group in final["param_groups"] for index in group["params"])
            return {**final, "state": of_no_parameter(final)}

        def put_state(_: Optimizer) -> None:  # before the user's post-hooks
            numbered = zip(self._params(), ids, strict=True)
            self._take_up({param: loaded[index] for param, index in numbered if index in loaded})

        hooks = (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        )
        before = self.__dict__.copy()
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self.__dict__.update(before)  # groups and state, which torch has replaced
            raise
        finally:
            for hook in hooks:
                hook.remove()

    def _state_dict_of(self, states: Callable[[], Mapping[Tensor, dict[str, Any]]]) -> StateDict:
        """Return torch's state dict with these states of parameters in the place of its own."""

        def put(_: Optimizer, packed: StateDict) -> StateDict:  # before the user's post-hooks
            saved = states()
            ids = (index for group in packed["param_groups"] for index in group["params"])
            numbered = zip(self._params(), ids, strict=True)
            ours = {index: saved[param] for param, index in numbered if param in saved}
            return {**packed, "state": {**packed["state"], **ours}}

        hook = self.register_state_dict_post_hook(put, prepend=True)
        try:
            return super().state_dict()
        finally:
            hook.remove()

    def _translated(self, state_dict: StateDict) -> StateDict:
        """Return the state dict as this optimizer would have written it."""
        return state_dict

    def _take_up(self, found: Mapping[Tensor, dict[str, Any]]) -> None:
        """Put loaded state in place, or refuse what does not fit; groups are loaded already."""
        raise NotImplementedError


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
