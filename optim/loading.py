"""Which loaded state belongs to which parameter: what all optimizers ask before they take it up."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from largebatch.optim.math.tensors import compute_dtype
from largebatch.optim.sharding.layout import Name, is_dtensor, local

Groups = Sequence[dict[str, Any]]

# What DistributedDataParallel and torch.compile write into the names of a model's parameters.
WRAPPED = re.compile(r"(^|(?<=\.))(module|_orig_mod)\.")


def in_own_order(state_dict: StateDict, own: Groups) -> StateDict:
    """The state dict with its groups, and the parameters in them, in the optimizer's own order.

    Names decide where both sides have them, `param_names` in every group, and they are the same
    ones; where some differ the order decides, as in torch, if it agrees with the names in common.

    Raises:
        ValueError: names that are in other groups, or in another order beside unknown ones.
    """
    saved = state_dict["param_groups"]
    names_there, names_here = names_of(saved), names_of(own)
    if names_there is None or names_here is None:
        return state_dict
    if names_there == names_here:
        return with_names(state_dict, saved, own)
    flat_there = [name for names in names_there for name in names]
    flat_here = [name for names in names_here for name in names]
    there, here = set(flat_there), set(flat_here)
    if len(there) < len(flat_there) or len(here) < len(flat_here):
        return state_dict  # names that are no names
    if there != here:
        at = {name: number for number, name in enumerate(flat_there)}
        for number, name in enumerate(flat_here):
            if at.get(name, number) != number:
                raise ValueError(
                    f"the state dict has parameter {name!r} in another place, and not the same "
                    f"parameters as the optimizer: {some(there - here)} there, {some(here - there)}"
                    " here; make the optimizer with the parameters that the state dict was "
                    "written with."
                )
        return with_names(state_dict, saved, own)

    group_of = {frozenset(names): place for place, names in enumerate(names_there)}
    ordered = []
    for names in names_here:
        place = group_of.get(frozenset(names))
        if place is None:
            raise ValueError(
                f"no group of the state dict has the parameters of the group {some(set(names))}: "
                "make the optimizer with the groups that the state dict was written with."
            )
        ids = dict(zip(names_there[place], saved[place]["params"], strict=True))
        ordered.append({**saved[place], "params": [ids[name] for name in names]})
    return with_names(state_dict, ordered, own)


def with_names(state_dict: StateDict, groups: Groups, own: Groups) -> StateDict:
    """The state dict with these groups under the optimizer's own names for their parameters."""
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        return state_dict  # for torch to refuse
    named = [
        {**group, "param_names": [*ours["param_names"]]}
        for group, ours in zip(groups, own, strict=True)
    ]
    return {**state_dict, "param_groups": named}


def of_no_parameter(state_dict: StateDict) -> dict[Any, Any]:
    """State under keys that are no parameters, as wrappers keep it: torch carries it along."""
    known = {index for group in state_dict["param_groups"] for index in group["params"]}
    return {key: value for key, value in state_dict["state"].items() if key not in known}


def names_of(groups: Groups) -> list[list[str]] | None:
    """Each group's names, without what wrappers write into them; None where one has none."""
    found = [group.get("param_names") for group in groups]
    if not all(
        names is not None and len(names) == len(group["params"])
        for names, group in zip(found, groups, strict=True)
    ):
        return None
    return [[WRAPPED.sub("", str(name)) for name in names or ()] for names in found]


def some(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return f"{shown}{', …' if len(names) > 3 else ''}" or "none"


# One parameter's entries ---------------------------------------------------------------------


def as_state(key: str, value: Any, name: Name, param: Tensor) -> Any:
    """A loaded state entry in the dtype, on the device and in the layout that `step` expects."""
    if key == "step":
        return torch.as_tensor(value, dtype=torch.float32, device=local(param).device)
    if isinstance(value, Tensor) and value.is_floating_point():
        if value.shape != param.shape or is_dtensor(value) != is_dtensor(param):
            raise ValueError(
                f"state {key!r} of parameter {name!r} must be a {type(param.data).__name__} of "
                f"shape {tuple(param.shape)}, got a {type(value).__name__} of shape "
                f"{tuple(value.shape)}: load sharded checkpoints by torch.distributed.checkpoint"
            )
        return laid_out_as(param, value.to(param.device, compute_dtype(param)))
    return value


def as_kept(value: Any, param: Tensor) -> Any:
    """An entry that the optimizer does not know, such as a wrapper's own, beside its parameter."""
    return value.to(local(param).device) if isinstance(value, Tensor) else value


def laid_out_as(param: Tensor, value: Tensor) -> Tensor:
    """A tensor of the parameter's shape with its strides: itself, where it has them."""
    if is_dtensor(value) or value.stride() == param.stride():
        return value
    return torch.empty_like(param, dtype=value.dtype).copy_(value)
