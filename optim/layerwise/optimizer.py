"""The base of LARS and LAMB apart from their formulas.

A step is a list of phases that each optimizer writes out for itself: see what there is to do, agree
on what all ranks must decide alike, take the norms of every layer, and the trust ratios from them,
move the weights. Here are the phases that do not depend on the formula, and the promises that hold
for every optimizer:

- a layer's norm is that of the whole layer, however it is spread over ranks, and all norms of a
  step travel in one collective for each process group (two where the gradients are clipped);
- no host synchronisation: norms, ratios, step counters and the decision to skip stay on the device;
- `p.grad` is left as it was found;
- arithmetic and state are FP32 for bf16 and fp16 parameters, also after `load_state_dict`; the new
  weight is rounded once, when it is written;
- torch's `grad_scale` / `found_inf` protocol (`torch.amp.GradScaler` sets both attributes): a step
  with a non-zero `found_inf` on any rank changes neither parameters nor state, not by one bit.

What composes with what, in this order: unscale, agree on `found_inf`, clip by the global norm,
[the optimizer's update and its norm], φ and the ratio, its bounds, the rule for zero norms,
`adapt=False`; `largebatch.optim.math.trust_ratio` has the last four.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from largebatch.optim.base import Group, ShardedOptimizer
from largebatch.optim.layerwise.state_import import to_native
from largebatch.optim.layerwise.step_plan import ChunkGroup, StepPlan, build_step_plan, norms_of
from largebatch.optim.layerwise.unbound import Unbound, refuse_redundancy
from largebatch.optim.loading import as_kept, as_state, laid_out_as
from largebatch.optim.math.tensors import (
    Tensors,
    compute_dtype,
    gradient_of,
    in_dtype,
    on_device,
    root,
)
from largebatch.optim.math.trust_ratio import ADAPT_UNDECAYED
from largebatch.optim.options import require, require_one_of
from largebatch.optim.sharding.layout import Layout, Name, layout_of, local


@dataclass(frozen=True)
class SyncedStep:
    """Inputs of a step that all ranks decide alike, before any moment is touched."""

    gradients: Mapping[Tensor, Tensor]
    """The local part of each parameter's gradient, as it is, placed like the parameter."""
    divisor: Tensor | None
    """0-d: what every gradient is divided by, loss scale and clip together."""
    skip: Tensor | None
    """0-d bool: where true, nothing may change."""


@dataclass(frozen=True)
class LayerStats:
    """The layers' norms and ratios of a step, vectors over `names`."""

    names: list[Name]
    moved: list[int]
    adapts: list[bool]
    """Whether a layer has a trust ratio, or 1 by choice."""
    weight_norm: Tensor
    update_norm: Tensor
    trust_ratio: Tensor

    def adapting(self) -> Iterator[Name]:
        return (self.names[layer] for layer in self.moved if self.adapts[layer])

    def by_layer(self) -> Iterator[tuple[Name, dict[str, Tensor]]]:
        keys = ("weight_norm", "update_norm", "trust_ratio")
        values = [*zip(*(getattr(self, key).unbind() for key in keys), strict=True)]
        for layer in self.moved:
            stats = dict(zip(keys, values[layer], strict=True))
            yield self.names[layer], stats | {"adapts": torch.tensor(self.adapts[layer])}


class LayerwiseOptimizer(ShardedOptimizer):
    """Base of the layer-wise optimizers: their groups, their state, and the phases they share.

    They load state of the same algorithm in another library too (`layerwise.state_import`).
    """

    # On the class too, because deepcopy and pickle keep an optimizer's groups and state only.
    _stats: Mapping[Any, LayerStats] = MappingProxyType({})
    _clip_norm: Callable[[], Tensor] | None = None

    variant = "paper"

    _known_state: ClassVar[tuple[str, ...]] = ()
    """All state that is shaped like its parameter, whatever the options."""

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        defaults = {"adapt": True, "norm_groups": None, "norm_dim": 0, **defaults}
        self._bound: dict[Tensor, Layout] = {}
        self._unbound = Unbound()
        self._forget_plans()
        super().__init__(params, defaults)

    def _forget_plans(self) -> None:
        self._plans: dict[Any, StepPlan] = {}
        self._scratch_kept: dict[torch.dtype, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "variant": self.variant}

    def __repr__(self) -> str:
        """As torch's, with the variant that the options were made from."""
        name = type(self).__name__
        return super().__repr__().replace(f"{name} (", f"{name} (variant: {self.variant}", 1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_bound", {})  # none comes with a copy
        self.__dict__.setdefault("_unbound", Unbound())
        self._forget_plans()

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        for switch in ("adapt", "maximize", "master_weights"):
            require(isinstance(options[switch], bool), switch, "True or False", options[switch])
        require(options["max_grad_norm"] > 0, "max_grad_norm", "> 0", options["max_grad_norm"])
        require_one_of(options, "adapt_undecayed", ADAPT_UNDECAYED)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch.

        In it, `adapt=False` fixes its layers' trust ratios at 1; `norm_groups=N`, or a tuple of
        sizes, splits each of its tensors along `norm_dim` into layers of their own.

        Raises:
            ValueError: an option out of range, a split that does not fit, a parameter whose layers
                cannot be known.
        """
        super().add_param_group(param_group)
        self._unbound.give(self.param_groups[-1]["params"])

    def _check_param(self, group: Group, name: Name, param: Tensor) -> None:
        super()._check_param(group, name, param)
        layout_of(param, name, group["norm_groups"], group["norm_dim"])

    def _check_groups(self) -> None:
        self._max_grad_norm()

    def _max_grad_norm(self) -> float:
        """The bound of the global norm, which all groups have to share."""
        values = {float(group["max_grad_norm"]) for group in self.param_groups}
        if len(values) > 1:
            raise ValueError(
                "max_grad_norm bounds the norm over all parameter groups and must be the same in "
                f"each, got {sorted(values)}"
            )
        return values.pop()

    def bind_layouts(
        self, layouts: Mapping[Tensor, Layout], clip_norm: Callable[[], Tensor] | None = None
    ) -> None:
        """Say where the layers lie in parameters that do not show it, such as flat buffers.

        Args:
            clip_norm: the global gradient norm, 0-d, of unscaled gradients and before any clipping,
                for those who cannot see all of them in one step; taken in place of the optimizer's
                own.
        """
        self._bound.update(layouts)
        self._clip_norm = clip_norm
        self._plans.clear()

    # The phases of a step -----------------------------------------------------------------------

    def _plan(self) -> StepPlan:
        """What there is to do. A sparse gradient is refused before anything has changed."""
        self._refuse_sparse()
        key: list[Any] = []
        for group in self.param_groups:
            key.append((id(group), group["norm_groups"], group["norm_dim"]))
            for param in group["params"]:
                key.append((id(param), param.grad is None, param.dtype, param.device, param.shape))
                key.append(param.stride())  # of all: what lies in order decides how it is cut
        known = self._plans.get(tuple(key))
        if known is None:
            # Plans made for other strides go with the state's; and those of gradients that come
            # and go in ever new patterns.
            if self._follow_strides() or len(self._plans) >= 64:
                self._plans.clear()
            layouts: dict[Tensor, Layout] = {
                param: self._bound.get(param)
                or layout_of(param, name, group["norm_groups"], group["norm_dim"])
                for group, name, param in self._named_params()
            }
            known = build_step_plan(self.param_groups, layouts)
            known.flats = self._unbound.flats(self.param_groups, self._bound)
            if self._clip_norm is None:
                refuse_redundancy(self, self._max_grad_norm())
            self._plans[tuple(key)] = known
        self._unbound.refuse_flats(type(self).__name__, known.flats)
        return known

    def _follow_strides(self) -> bool:
        """Lay state out as its parameter is now, which may have become channels-last or have got
        another tensor for its data; whether there was any to lay out.
        """
        moved = False
        for group in self.param_groups:
            for param in group["params"]:
                for key, value in self.state.get(param, {}).items():
                    if isinstance(value, Tensor) and value.shape == param.shape:
                        followed = laid_out_as(param, value)
                        moved |= followed is not value
                        self.state[param][key] = followed
        return moved

    def _sync(self, plan: StepPlan) -> SyncedStep:
        """Whether to skip, and what to divide the gradients by: the same on every rank."""
        # Of all parameters, held here or not: placing a gradient may be a collective.
        gradients = {param: gradient_of(param) for _, param in plan.params}
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        flag = self._own_found_inf(plan.device)
        max_norm = self._max_grad_norm()
        divisor = None if grad_scale is None else on_device(grad_scale, plan.device).float()
        if max_norm < math.inf and self._clip_norm is not None:
            norm = on_device(self._clip_norm(), plan.device)
        elif max_norm < math.inf:
            norms: list[Tensor] = []
            for chunks in plan.chunk_groups:
                norms += norms_of(chunks, chunks.cut(gradients.__getitem__))
            squares = plan.squares(norms)
            norm = plan.complete(squares, flag).sum().sqrt()
            norm = norm if divisor is None else norm / divisor
        elif flag is not None and plan.reductions:
            none = torch.zeros(len(plan.names), 0, dtype=plan.dtype, device=plan.device)
            plan.complete(none, flag)
        if max_norm < math.inf:
            clip = torch.clamp(norm / max_norm, min=1.0)
            divisor = clip if divisor is None else divisor * clip
        return SyncedStep(gradients, divisor, None if flag is None else flag != 0)

    def _gradients(self, chunks: ChunkGroup, synced: SyncedStep) -> Tensors:
        """The chunks' gradients to descend along, in the group's dtype; not to be written to."""
        grads: Tensors = in_dtype(chunks.cut(synced.gradients.__getitem__), chunks.dtype)
        if synced.divisor is not None:
            grads = torch._foreach_div(grads, synced.divisor.to(chunks.device, chunks.dtype))
        return torch._foreach_neg(grads) if chunks.group["maximize"] else grads

    def _weights(self, chunks: ChunkGroup) -> list[Tensor]:
        """The chunks' weights in the chunk group's dtype.

        The parameters themselves where they have that dtype, else their FP32 master copies, else
        copies of the moment.
        """
        if not chunks.group["master_weights"]:
            return in_dtype(chunks.cut(local), chunks.dtype)
        tensors = chunks.cut(lambda param: local(self.state[param].get("master_weight", param)))
        return in_dtype(tensors, chunks.dtype)

    def _state_of(self, chunks: ChunkGroup, key: str) -> list[Tensor]:
        """The chunks of a state that is shaped like the parameters."""
        return chunks.cut(lambda param: local(self.state[param][key]))

    def _make_state(self, plan: StepPlan) -> None:
        """Make what state is missing, as at a parameter's first gradient; on every rank alike."""
        for group, param in plan.params:
            dtype, held = compute_dtype(param), self.state.get(param, {})
            for key in self._state_keys(group):
                if key not in held:
                    self.state[param][key] = torch.zeros_like(param, dtype=dtype)
            if group["master_weights"] and "master_weight" not in held and param.dtype != dtype:
                self.state[param]["master_weight"] = param.detach().to(dtype)

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        """The state tensors that are shaped like the parameter, zeros at first."""
        return self._known_state

    def _scratch(self, chunks: ChunkGroup) -> Tensor:
        """Working memory with an element for each of the chunks', not to be shared with others.

        On a CPU it is kept from step to step, because fresh pages cost more than the arithmetic on
        them; elsewhere the allocator keeps them, and lends them out between steps.
        """
        if chunks.device.type != "cpu":
            return torch.empty(chunks.numel, dtype=chunks.dtype, device=chunks.device)
        end, scratch = chunks.start + chunks.numel, self._scratch_kept.get(chunks.dtype)
        if scratch is None or scratch.numel() < end:
            chunk_groups = self._plan().chunk_groups
            need = max(c.start + c.numel for c in chunk_groups if c.dtype == chunks.dtype)
            scratch = self._scratch_kept[chunks.dtype] = torch.empty(need, dtype=chunks.dtype)
        return scratch[chunks.start : end]

    def _trust_ratios(self, plan: StepPlan, weight_norms: Tensors, update_norms: Tensors) -> Tensor:
        """The trust ratio of every layer, shape (layers,), from the norms of all chunks in order.

        This is the step's last collective, and the numbers behind `layer_stats`.
        """
        sums = torch.stack([plan.squares([*weight_norms]), plan.squares([*update_norms])], dim=1)
        weight_norm, update_norm = root(plan.complete(sums)).unbind(dim=1)
        ratios = [
            self._ratio(group, weight_norm[layers], update_norm[layers])
            for group, layers in plan.groups
        ]
        ratio = torch.cat(ratios) if len(ratios) > 1 else ratios[0]
        shown = [each.to(plan.stats_dtype) for each in (weight_norm, update_norm, ratio)]
        adapts = [False] * len(plan.names)
        for group, layers in plan.groups:
            adapts[layers] = [self._adapts(group)] * len(adapts[layers])
        stats = LayerStats(plan.names, plan.moved, adapts, *shown)
        # Wrappers that bind layouts may show the parameters part by part, a step for each.
        self._stats = {**self._stats, tuple(plan.names): stats} if self._bound else {None: stats}
        return ratio

    def _ratio(self, group: Group, weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        """The trust ratios of a group's layers, shape (layers,), from their norms."""
        raise NotImplementedError

    def _adapts(self, group: Group) -> bool:
        """Whether the layers of a group have a trust ratio, or 1."""
        rule, decays = group["adapt_undecayed"], group["weight_decay"] != 0
        if not group["adapt"] or (rule == "never" and not decays):
            return False
        return not (rule == "unless_excluded" and not decays and self.defaults["weight_decay"] != 0)

    # What users call ----------------------------------------------------------------------------

    def layer_stats(self) -> dict[Name, dict[str, Tensor]]:
        """‖w‖ before the step, ‖u‖ and the trust ratio of every layer moved by the last step.

        Keys are the parameters' names where the optimizer was given `model.named_parameters()`,
        else their index over all groups; the layers of a split one are called "name[0]", "name[1]",
        and so on. Values are 0-d tensors on the device; when to read them on the host is the
        caller's choice. `adapts`, a bool on the host, is False where the ratio is 1 by choice:
        `adapt=False`, or a variant that leaves out what does not decay. After a step masked by
        `found_inf` they are void.
        """
        return {name: layer for stats in self._stats.values() for name, layer in stats.by_layer()}

    def adapting_layers(self) -> set[Name]:
        """Return the keys of `layer_stats` whose layers have a trust ratio, without a question to
        the device.
        """
        return {name for stats in self._stats.values() for name in stats.adapting()}

    def _translated(self, state_dict: StateDict) -> StateDict:
        return to_native(state_dict, self)

    def _take_up(self, found: Mapping[Tensor, dict[str, Any]]) -> None:
        known = ("step", "master_weight", *self._known_state)
        ready: dict[Tensor, dict[str, Any]] = {
            param: {
                key: as_state(key, value, name, param) if key in known else as_kept(value, param)
                for key, value in found[param].items()
            }
            for _, name, param in self._named_params()
            if param in found
        }
        self.state.update(ready)
