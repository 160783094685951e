"""Puts the factors of `schedules/transfer.py` onto an optimizer's groups, as `scaling` asks.

The package's transformer says itself how its tensors grow: all but its vocabulary with `dim`. Of
another model the one that was tuned is made on the meta device, and shapes are compared by name.
"""

import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from hydra.utils import get_object
from torch import Tensor, nn

from largebatch.common.errors import ConfigError, refusing
from largebatch.conf.build import build
from largebatch.conf.config import TrainConfig
from largebatch.optim.blockwise.hidden_matrices import OfHiddenMatrices, left_to_adamw
from largebatch.optim.groups import EMBEDDING, ParamEntry, find_parameters, is_called
from largebatch.schedules.transfer import Factors, Fans, Placed, factors, step_of
from largebatch.train.models import Transformer

Groups = list[dict[str, Any]]

_UNADAPTED: Final = {"relative_adam": "adam", "relative_gradient": "gradient"}
"""What LAMB's and LARS's steps are without a trust ratio."""


def transferred(groups: Groups, model: nn.Module, config: TrainConfig) -> Groups:
    """The groups cut so that each has one factor, its rates brought to this model's size.

    A group gets `lr_factor`, which the loop multiplies its learning rate by, and `weight_decay` and
    `eps` of its own, as far as they are not 1, or what the optimizer has.

    Raises:
        ConfigError: the sizes of the tuned model are not known, or a rule for the optimizer.
    """
    scaling = config.scaling
    if not scaling.across_sizes and scaling.base_model is None:
        if scaling.step is not None:
            raise ConfigError(
                f"scaling.step={scaling.step} says how rates move with a model's size, and the "
                "size that they were tuned at is not given: set scaling.base_width"
            )
        return groups
    steps = steps_of(config.optim, model, scaling.step)
    placed = placed_in(model, config)
    options = options_of(config.optim)
    return [cut for group in groups for cut in _cut(group, steps, placed, options)]


def _cut(
    group: dict[str, Any],
    steps: Mapping[Tensor, str],
    placed: Mapping[Tensor, Placed],
    options: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """One group as several, in its order, tensors of one factor together."""
    found: dict[tuple[Factors, str], list[Any]] = {}
    for name, param in group["params"]:
        step = steps[param]
        if group.get("adapt") is False:
            step = _UNADAPTED.get(step, step)
        found.setdefault((factors(step, placed[param]), step), []).append((name, param))
    for (by, step), params in found.items():
        decay = options.get("weight_decay")
        if step == "adam" and options.get("adamw_weight_decay") is not None:
            decay = options["adamw_weight_decay"]
        decay = group.get("weight_decay", decay)
        more = {"lr_factor": by.lr} if by.lr != 1.0 else {}
        decoupled = options.get("decay") == "decoupled"  # LAMB's, beside its step
        for key, value, factor in (
            ("weight_decay", decay, 1 / by.lr if decoupled else by.weight_decay),
            ("eps", options.get("eps"), by.eps),
        ):
            if isinstance(value, int | float) and value and factor != 1.0:
                more[key] = value * factor
        yield {**group, **more, "params": params}


def options_of(node: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of an optimizer's configuration, defaults included."""
    parameters = inspect.signature(get_object(str(node["_target_"]))).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return defaults | dict(node)


def steps_of(node: Mapping[str, Any], model: nn.Module, step: str | None) -> dict[Tensor, str]:
    """How the optimizer's steps of each tensor grow with it.

    Args:
        step: what `scaling.step` says of its matrices; None: as is known of the optimizer.
    """
    optimizer, options = get_object(str(node["_target_"])), options_of(node)
    with refusing():
        own = step or step_of(optimizer.__name__, options)
    of_matrices = isinstance(optimizer, type) and issubclass(optimizer, OfHiddenMatrices)
    by_adamw = left_to_adamw(model, options.get("adamw") or ()) if of_matrices else set()

    def step_of_entry(entry: ParamEntry) -> str:
        if entry.param in by_adamw:
            return "adam"
        # What has no two sides is stepped by Adam, where the optimizer is one of matrices.
        return "adam" if own == "orthogonal" and entry.param.dim() < 2 else own

    return {entry.param: step_of_entry(entry) for entry in find_parameters(model)}


def placed_in(model: nn.Module, config: TrainConfig) -> dict[Tensor, Placed]:
    """Each tensor of the model beside the same one in the model that was tuned.

    Raises:
        ConfigError: that one's sizes are not known.
    """
    scaling = config.scaling
    if scaling.base_model is not None:
        if isinstance(model, Transformer):
            raise ConfigError(
                "scaling.base_model is for other models than the package's transformer: give "
                "scaling.base_width, its model.dim, and scaling.base_depth"
            )
        return _beside(model, config)
    if not isinstance(model, Transformer):
        raise ConfigError(
            f"scaling.base_width={scaling.base_width} and scaling.base_depth={scaling.base_depth} "
            f"are of the package's transformer, which says how it grows, and the model is a "
            f"{type(model).__name__}: give scaling.base_model, the keys in which the tuned one "
            "differed, as in scaling.base_model='{hidden: 128}'"
        )
    width, depth = scaling.base_width or model.dim, scaling.base_depth or len(model.blocks)
    if (model.base_dim, model.base_depth) != (width, depth):
        raise ConfigError(
            f"model.base_dim={model.base_dim} and model.base_depth={model.base_depth} are what the "
            f"model begins with, and the rates are of {width} and {depth}: leave both to "
            "scaling.base_width and scaling.base_depth"
        )
    wider, branch = model.dim / width, depth / len(model.blocks)

    def place(entry: ParamEntry) -> Placed:
        fans = fans_of(entry)
        inside = entry.names[0].startswith("blocks.")
        is_head = entry.names == ["head.weight"]  # a tied one is an embedding
        base = Fans(
            fans.fan_out / (1 if is_head else wider),
            fans.fan_in / (1 if fans.fan_in == 1 else wider),
        )
        return Placed(fans, base, 1 / wider if is_head else 1.0, branch if inside else 1.0)

    return {entry.param: place(entry) for entry in find_parameters(model)}


def _beside(model: nn.Module, config: TrainConfig) -> dict[Tensor, Placed]:
    """The same of any model, the tuned one made on the meta device."""
    changed = dict(config.scaling.base_model or {})
    with torch.device("meta"):
        base = build(config.model | changed, "scaling.base_model", nn.Module)
    tuned = {name: entry for entry in find_parameters(base) for name in entry.names}
    found: dict[Tensor, Placed] = {}
    for entry in find_parameters(model):
        same = tuned.get(entry.names[0])
        if same is None or same.param.dim() != len(shape_of(entry.param)):
            raise ConfigError(
                f"scaling.base_model={changed} makes a model without {entry.names[0]!r} as it is "
                "here: change keys of widths only"
            )
        found[entry.param] = Placed(fans_of(entry), fans_of(same))
    return found


def fans_of(entry: ParamEntry) -> Fans:
    """A tensor as what it maps from and to; kernels take their window with the channels."""
    shape = shape_of(entry.param)
    if len(shape) < 2:
        return Fans(float(shape.numel()), 1.0)
    if any(is_called(EMBEDDING, module) for module in entry.modules):
        return Fans(float(shape[1]), 1.0)
    rows, columns = float(shape[0]), float(shape[1:].numel())
    if any(type(module).__name__ == "Conv1D" for module in entry.modules):  # transformers' own
        rows, columns = columns, rows
    return Fans(rows, columns)


def shape_of(param: Tensor) -> torch.Size:
    """The shape of the whole tensor; ZeRO-3 leaves an empty one."""
    return torch.Size(getattr(param, "ds_shape", param.shape))
