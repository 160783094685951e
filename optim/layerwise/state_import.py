"""State dicts of other libraries' optimizers, turned into those of LAMB and LARS.

What is known (per parameter; of the groups' options, only what bears on the state):

    into LAMB   torch Adam, AdamW        exp_avg, exp_avg_sq, step
                timm Lamb                exp_avg, exp_avg_sq; step in the group, a 0-d tensor
                apex FusedLAMB           exp_avg, exp_avg_sq; step in the group, an int
                apex FusedMixedPrecisionLamb: the same; step and lr in the group, on the device
                apex RefLAMB             m, v, step, w_norm, g_norm, trust_ratio
                DeepSpeed FusedLamb, IPEX Lamb: exp_avg, exp_avg_sq, step
                ColossalAI, jettify, cybertronai Lamb: and weight_norm, adam_norm, trust_ratio
                kozistr Lamb             the same; step in the group
    into LARS   torch SGD, apex LARC over it, timm Lars, kozistr LARS: momentum_buffer
                MAE and MoCo v3 LARS     mu

Two things no state dict tells, and nothing here can see. A LARS buffer holds gradients already
scaled by the trust ratio; that of a plain SGD, which has none, is larger by 1/ratio, often a
thousandfold, and right only for layers with `adapt=False`. And all optimizers named above keep lr
outside the buffer, so for a LARS with `lr_in_buffer` it is multiplied by the group's lr; a buffer
that has lr inside already, as in optax or TensorFlow, must not be given to such a LARS.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, StateDict

from largebatch.optim.base import Group

MOMENTS = ("exp_avg", "exp_avg_sq", "step")  # of LAMB
BUFFER = ("momentum_buffer",)  # of LARS
RENAMED = {"m": "exp_avg", "v": "exp_avg_sq", "mu": "momentum_buffer"}
RECOMPUTED = ("w_norm", "g_norm", "weight_norm", "adam_norm", "trust_ratio")
FROZEN = ("lamb_coeff_freeze", "scaling_coeff", "exp_avg_sq_fresh", "last_factor")  # 1-bit LAMB

# The options that mean the same everywhere; all others stay the optimizer's own.
SHARED = ("lr", "initial_lr", "betas", "eps", "weight_decay", "momentum", "nesterov")


def to_native(state_dict: StateDict, optimizer: Optimizer) -> StateDict:
    """The state dict as `optimizer`, a LAMB or a LARS, would have written it.

    Of another library's dict (the module lists them) come the moments or momentum, in FP32, the
    step counts, and of each group's options those in `SHARED` that the optimizer has; the groups
    must match the optimizer's in number and size. One of our own is returned as it is; group
    options that it does not have yet, written by an older version, are the optimizer's.

    The dict given is left as it was; its tensors are taken over where they need no change.
    Raises ValueError, saying what and where, for a dict that cannot be right: flat shards of one
    rank, a momentum where moments belong or the reverse, a missing or unknown entry, another shape,
    moments or a momentum that were gathered by another rule.
    """
    refuse_other_formats(state_dict, optimizer)
    groups, own_groups = state_dict["param_groups"], optimizer.param_groups
    if all(is_ours(group) for group in groups):
        if len(groups) != len(own_groups):
            return state_dict  # for torch to refuse, after the hooks that may still change it
        filled = [fill(group, own) for group, own in zip(groups, own_groups, strict=True)]
        return {**state_dict, "param_groups": filled}

    sizes, own_sizes = ([len(group["params"]) for group in each] for each in (groups, own_groups))
    if sizes != own_sizes:
        raise ValueError(
            f"the state dict has groups of {sizes} parameters and the optimizer of {own_sizes}: "
            "make the optimizer with the groups that the state dict was written with."
        )
    listed = {key for group in groups for key in group["params"]}
    stray = [key for key in state_dict["state"] if key not in listed]
    if stray:
        raise ValueError(
            f"the state dict holds state of {stray[0]!r}, which none of its groups has."
        )

    state: dict[Any, dict[str, Tensor]] = {}
    native_groups = [native_group(*pair) for pair in zip(groups, own_groups, strict=True)]
    for group, native, own in zip(groups, native_groups, own_groups, strict=True):
        refuse_other_rules(group, own)
        for key, param in zip(group["params"], own["params"], strict=True):
            entries = native_entries(state_dict["state"].get(key, {}), group)
            if entries:
                refuse_other_entries(entries, param, optimizer, f"state of parameter {key!r}")
                state[key] = converted(entries, param, native)
    return {**state_dict, "state": state, "param_groups": native_groups}


def is_ours(group: Group) -> bool:
    """Whether one of our optimizers wrote the group.

    Ours hold `adapt_undecayed`, or in their oldest form `adapt` and `maximize`. So may the groups
    of a torch optimizer that was given `adapt` by hand; those hold `differentiable` beside them.
    """
    oldest = {"adapt", "maximize"} <= group.keys() and "differentiable" not in group
    return oldest or "adapt_undecayed" in group


def fill(group: Group, own: Group) -> Group:
    """The group, with the optimizer's own options where it says nothing."""
    return {**{key: value for key, value in own.items() if key != "params"}, **group}


def native_group(group: Group, own: Group) -> Group:
    """The optimizer's own options with the shared ones of a foreign group."""
    shared = {
        key: as_option(key, group[key], own)
        for key in SHARED
        if group.get(key) is not None and (key in own or key == "initial_lr")
    }
    return fill({**shared, "params": group["params"]}, own)


def as_option(key: str, value: Any, own: Group) -> Any:
    """A shared option in the type that ours have it in: apex keeps lr in a device tensor."""
    if key == "betas":
        return tuple(float(beta) for beta in value)
    if key == "nesterov":
        return bool(value)
    if key == "lr" and isinstance(own["lr"], Tensor):
        return torch.as_tensor(value, dtype=own["lr"].dtype, device=own["lr"].device).reshape(())
    return float(value)


def native_entries(foreign: Mapping[str, Any], group: Group) -> dict[str, Any]:
    """One parameter's entries under our names, without what the next step computes anew."""
    entries = {
        RENAMED.get(key, key): value
        for key, value in foreign.items()
        if key not in RECOMPUTED and value is not None  # torch SGD without momentum keeps a None
    }
    if entries and "step" in group:
        entries.setdefault("step", group["step"])
    return entries


def converted(entries: Mapping[str, Any], param: Tensor, group: Group) -> dict[str, Tensor]:
    """FP32 (FP64 for FP64 parameters), and for each parameter a step count of its own."""
    dtype = torch.promote_types(param.dtype, torch.float32)
    native = {key: value.to(dtype) for key, value in entries.items() if key != "step"}
    if "exp_avg" in entries:
        step = torch.as_tensor(entries["step"], dtype=torch.float32)
        native["step"] = step.reshape(()).clone()
    elif group.get("lr_in_buffer"):
        native["momentum_buffer"] = native["momentum_buffer"] * float(group["lr"])
    return native


# What is refused -----------------------------------------------------------------------------


def refuse_other_formats(state_dict: StateDict, optimizer: Optimizer) -> None:
    """No state dict of torch's form, or that of the other of our two optimizers."""
    keys = [str(key) for key in state_dict]
    if {"fp32_m", "fp32_v"} <= state_dict.keys():  # apex DistributedFusedLAMB
        raise ValueError(
            f"the state dict holds one rank's flat shards ({', '.join(keys)}), which do not say "
            "where a parameter begins: save it from an optimizer that keeps state by parameter."
        )
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"an optimizer's state dict has 'state' and 'param_groups', got {keys}: if a wrapper "
            "wrote it, pass the dict of the optimizer inside."
        )
    takes, other = ("betas", "momentum") if is_lamb(optimizer) else ("momentum", "betas")
    for group in state_dict["param_groups"]:
        if other in group and takes not in group:
            raise ValueError(
                f"{type(optimizer).__name__} has {takes!r} in its groups, the state dict "
                f"{other!r}: load it into {'LARS' if is_lamb(optimizer) else 'LAMB'}."
            )


def is_lamb(optimizer: Optimizer) -> bool:
    return "betas" in optimizer.defaults


def refuse_other_rules(group: Group, own: Group) -> None:
    """Options under which the moments or the momentum were gathered otherwise than ours are."""
    reasons = {
        "grad_averaging=False sums gradients into exp_avg without the factor 1 - β₁": (
            not group.get("grad_averaging", True)
        ),
        "dampening scales what enters the momentum_buffer": group.get("dampening", 0) != 0,
        "this LARS (IPEX) keeps the trust ratio out of its momentum_buffer": "lars" in group,
        f"maximize={group.get('maximize')}, the optimizer's is {own.get('maximize')}": (
            group.get("maximize", own.get("maximize")) != own.get("maximize")
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"the state dict cannot be continued: {reason}.")


def refuse_other_entries(
    entries: Mapping[str, Any], param: Tensor, optimizer: Optimizer, where: str
) -> None:
    """Entries that the optimizer does not know, lacks, or has in another shape."""
    name, wanted = type(optimizer).__name__, MOMENTS if is_lamb(optimizer) else BUFFER
    unknown = [key for key in entries if key not in (*wanted, "step")]
    if any(key in FROZEN for key in unknown):
        raise ValueError(
            f"{where}: 1-bit LAMB's moments belong to its frozen coefficients "
            f"({', '.join(unknown)}), which {name} does not have: start afresh."
        )
    missing = [key for key in wanted if key not in entries]
    if unknown or missing:
        raise ValueError(
            f"{where}: {name} needs {', '.join(wanted)} and knows nothing else, "
            f"got {', '.join(entries)}."
        )
    for key, value in entries.items():
        if key == "step":
            continue
        shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if shape != tuple(param.shape):
            raise ValueError(
                f"{where}: {key} has shape {shape}, the parameter {tuple(param.shape)}; a rank's "
                "own shard must be gathered first."
            )
