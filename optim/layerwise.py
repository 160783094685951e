"""What every layer-wise optimizer needs around its formula.

A step is a list of phases that each optimizer writes out for itself: collect the layers, form
their updates, take all norms at once and the trust ratios from them, move the weights. Here are the
phases that do not depend on the formula, and the promises that hold for every optimizer:

- no host synchronisation: norms, ratios, step counters and the decision to skip stay on the device;
- `p.grad` is left as it was found;
- arithmetic and state are FP32 for bf16 and fp16 parameters, also after `load_state_dict`; the new
  weight is rounded once, when it is written;
- torch's `grad_scale` / `found_inf` protocol (`torch.amp.GradScaler` sets both attributes): a step
  with a non-zero `found_inf` changes neither parameters nor state, not by one bit.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT, StateDict

from largebatch.optim.trust_ratio import Tensors, stacked_norms

Name = str | int


@dataclass(frozen=True)
class Bucket:
    """The layers of one parameter group that have a gradient and share a device and a dtype.

    All lists run in the same order, one entry a layer. `weights` and `grads` are FP32 (FP64 for
    FP64 parameters) and read-only: where nothing had to be converted they are the parameter and its
    `.grad` themselves. Gradients are unscaled, and negated where the group maximises.
    """

    group: dict[str, Any]
    names: list[Name]
    params: list[Tensor]
    weights: list[Tensor]
    grads: Tensors
    lr: float | Tensor  # a tensor lies on the layers' device
    skip: Tensor | None  # 0-d bool on the layers' device: where true, nothing may change


class LayerwiseOptimizer(Optimizer):
    """Base of the layer-wise optimizers: their groups, their state, and the phases they share."""

    # Read by torch.amp.GradScaler: `step` unscales and skips by itself, without asking the host.
    _step_supports_amp_scaling = True

    # Per bucket of the last step: names, ‖w‖, ‖u‖ and ratio, the last three of shape (layers,).
    # Empty on the class too, because deepcopy and pickle keep an optimizer's groups and state only.
    _last_step: tuple[tuple[list[Name], Tensor, Tensor, Tensor], ...] = ()

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        defaults = {**defaults, "adapt": True}
        self._check_options(defaults)
        super().__init__(params, defaults)

    def _check_options(self, options: dict[str, Any]) -> None:
        """Refuse options (the defaults, or one group's) out of range; subclasses add their own."""
        lr, weight_decay = options["lr"], options["weight_decay"]
        if isinstance(lr, Tensor):  # its value may lie on a device and is not looked at
            require(lr.dim() == 0, "lr", "a float or a 0-d tensor", f"shape {tuple(lr.shape)}")
        else:
            require(0 <= lr < math.inf, "lr", "in [0, inf)", lr)
        require(0 <= weight_decay < math.inf, "weight_decay", "in [0, inf)", weight_decay)
        for switch in ("adapt", "maximize"):
            require(isinstance(options[switch], bool), switch, "True or False", options[switch])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch. `adapt=False` in it fixes its layers' trust ratio at 1."""
        super().add_param_group(param_group)
        try:
            self._check_options(self.param_groups[-1])
            self._refuse_complex()
        except ValueError:
            self.param_groups.pop()
            raise

    def _refuse_complex(self) -> None:
        for group, names in self._named_groups():
            for name, param in zip(names, group["params"], strict=True):
                if param.is_complex():
                    raise ValueError(
                        f"{type(self).__name__} takes real parameters, got {param.dtype} for "
                        f"parameter {name!r}: hold its real and imaginary part as two parameters."
                    )

    def _named_groups(self) -> Iterator[tuple[dict[str, Any], list[Name]]]:
        """Each group with its parameters' names, or their index over all groups where unnamed."""
        first = 0
        for group in self.param_groups:
            end = first + len(group["params"])
            yield group, list(group.get("param_names", range(first, end)))
            first = end

    # The phases of a step -----------------------------------------------------------------------

    def _collect(self) -> list[Bucket]:
        """The layers that have a gradient. A sparse one is refused before anything has changed."""
        buckets = []
        for group, names in self._named_groups():
            alike = defaultdict(list)
            for name, param in zip(names, group["params"], strict=True):
                if param.grad is None:
                    continue
                if param.grad.layout != torch.strided:
                    raise RuntimeError(
                        f"{type(self).__name__} needs dense gradients, got a "
                        f"{param.grad.layout} gradient for parameter {name!r}."
                    )
                alike[param.device, param.dtype].append((name, param))
            buckets += [self._bucket(group, layers) for layers in alike.values()]
        return buckets

    def _bucket(self, group: dict[str, Any], layers: list[tuple[Name, Tensor]]) -> Bucket:
        names, params = [name for name, _ in layers], [param for _, param in layers]
        device, dtype = params[0].device, state_dtype(params[0])
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)

        grads: Tensors = [param.grad.to(dtype) for param in params if param.grad is not None]
        if grad_scale is not None:
            grads = torch._foreach_div(grads, on_device(grad_scale, device))
        if group["maximize"]:
            grads = torch._foreach_neg(grads)
        lr = group["lr"]
        return Bucket(
            group=group,
            names=names,
            params=params,
            weights=[param.to(dtype) for param in params],
            grads=grads,
            lr=on_device(lr, device) if isinstance(lr, Tensor) else lr,
            skip=None if found_inf is None else on_device(found_inf, device) != 0,
        )

    def _state_of(self, bucket: Bucket, key: str) -> list[Tensor]:
        """State tensors shaped like the weights, zeros at first use."""
        for param in bucket.params:
            if key not in self.state[param]:
                self.state[param][key] = torch.zeros_like(param, dtype=state_dtype(param))
        return [self.state[param][key] for param in bucket.params]

    def _steps_of(self, bucket: Bucket) -> list[Tensor]:
        """Number of updates each layer has had so far: 0-d FP32 tensors on the layer's device."""
        for param in bucket.params:
            if "step" not in self.state[param]:
                self.state[param]["step"] = torch.zeros(
                    (), dtype=torch.float32, device=param.device
                )
        return [self.state[param]["step"] for param in bucket.params]

    def _trust_ratios(
        self,
        buckets: list[Bucket],
        updates: list[Tensors],
        ratio_of: Callable[[dict[str, Any], Tensor, Tensor], Tensor],
    ) -> list[Tensor]:
        """`ratio_of(group, ‖w‖, ‖u‖)` for each bucket, shape (layers,); all norms taken at once."""
        self._last_step = tuple(
            (
                bucket.names,
                weight_norm,
                update_norm,
                ratio_of(bucket.group, weight_norm, update_norm),
            )
            for bucket, (weight_norm, update_norm) in zip(
                buckets, norms_of(buckets, updates), strict=True
            )
        )
        return [ratio for *_, ratio in self._last_step]

    # What users call ----------------------------------------------------------------------------

    def layer_stats(self) -> dict[Name, dict[str, Tensor]]:
        """‖w‖ before the step, ‖u‖ and the trust ratio of every layer moved by the last step.

        Keys are the parameters' names where the optimizer was given `model.named_parameters()`,
        else their index over all groups. Values are 0-d tensors on the layer's device; when to read
        them on the host is the caller's choice. After a step masked by `found_inf` they are void.
        """
        keys = ("weight_norm", "update_norm", "trust_ratio")
        return {
            name: dict(zip(keys, values, strict=True))
            for names, *vectors in self._last_step
            for name, *values in zip(names, *vectors, strict=True)
        }

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load as torch does, hooks included, but keep the state in FP32.

        `torch.optim.Optimizer` casts every floating-point state to its parameter's dtype, which
        would round the moments of a bf16 parameter to bf16. So torch is handed the groups alone.
        """
        loaded: StateDict = {}

        def take_state(_: Optimizer, final: StateDict) -> StateDict:  # after the user's pre-hooks
            loaded.update(final)
            return {**final, "state": {}}

        def put_state(_: Optimizer) -> None:  # before the user's post-hooks
            ids = [index for group in loaded["param_groups"] for index in group["params"]]
            params = [param for group in self.param_groups for param in group["params"]]
            for index, param in zip(ids, params, strict=True):
                if index in loaded["state"]:
                    entries = loaded["state"][index].items()
                    self.state[param] = {k: as_state(k, value, param) for k, value in entries}

        hooks = (
            self.register_load_state_dict_pre_hook(take_state),
            self.register_load_state_dict_post_hook(put_state, prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()


def require(holds: bool, name: str, accepted: str, value: object) -> None:
    """Refuse an option. Write `holds` so that NaN fails it: `0 <= x`, not `not x < 0`."""
    if not holds:
        raise ValueError(f"{name} must be {accepted}, got {value}")


def evaluate(closure: Callable[[], float] | None) -> float | None:
    """The closure's loss; its backward pass needs gradients although the step does not."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def norms_of(buckets: list[Bucket], updates: list[Tensors]) -> list[tuple[Tensor, Tensor]]:
    """(‖w‖, ‖u‖) for each bucket, two vectors of shape (layers,), cut from one stacked vector."""
    if not buckets:
        return []
    weights = [weight for bucket in buckets for weight in bucket.weights]
    norms = stacked_norms([*weights, *(update for part in updates for update in part)])
    sizes = [len(bucket.params) for bucket in buckets]
    halves = [torch.split(half, sizes) for half in torch.chunk(norms, 2)]
    return [
        (weight_norm.to(bucket.weights[0]), update_norm.to(bucket.weights[0]))
        for bucket, weight_norm, update_norm in zip(buckets, *halves, strict=True)
    ]


def descend(bucket: Bucket, steps: Tensors) -> None:
    """w ← w - step, in the weights' FP32, rounded to the parameter's dtype once."""
    if bucket.skip is None:
        torch._foreach_sub_(bucket.params, steps)
    else:
        write(bucket.params, torch._foreach_sub(bucket.weights, steps), bucket.skip)


def write(targets: Tensors, values: Tensors, skip: Tensor | None) -> None:
    """targets ← values, rounded to the targets' dtype; where `skip`, they keep their very bits."""
    if skip is None:
        torch._foreach_copy_(targets, values)
        return
    for target, value in zip(targets, values, strict=True):
        # A choice, not arithmetic: values may be NaN, and 0 * NaN is NaN.
        torch.where(skip, target, value.to(target.dtype), out=target)


def state_dtype(param: Tensor) -> torch.dtype:
    """FP32, or the parameter's own dtype where that is wider."""
    return torch.promote_types(param.dtype, torch.float32)


def on_device(scalar: Tensor, device: torch.device) -> Tensor:
    """A one-element tensor as a 0-d one on `device`, without waiting for the copy."""
    return scalar.to(device, non_blocking=True).reshape(())


def as_state(key: str, value: Any, param: Tensor) -> Any:
    """A loaded state entry in the dtype and on the device that `step` expects of it."""
    if key == "step":  # a number in the checkpoints of some other optimizers
        return torch.as_tensor(value, dtype=torch.float32, device=param.device)
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(param.device, state_dtype(param))
    return value
