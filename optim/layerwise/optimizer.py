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
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from largebatch.optim.base import Group, ShardedOptimizer
from largebatch.optim.layerwise.chunks import ChunkGroup, Way, norms_of
from largebatch.optim.layerwise.cpu_blocks import Scratch
from largebatch.optim.layerwise.cpu_step import CpuStep, locals_of
from largebatch.optim.layerwise.layer_stats import LayerStats, adapting_ratios
from largebatch.optim.layerwise.state_import import to_native
from largebatch.optim.layerwise.step_inputs import SyncedStep
from largebatch.optim.layerwise.step_plan import StepPlan, Wave, build_step_plan, key_of
from largebatch.optim.layerwise.unbound import Unbound, refuse_redundancy
from largebatch.optim.loading import as_kept, as_state, laid_out_as
from largebatch.optim.math.tensors import (
    Tensors,
    compute_dtype,
    float_of,
    gradients_of,
    in_dtype,
    on_device,
    root,
)
from largebatch.optim.math.trust_ratio import ADAPT_UNDECAYED
from largebatch.optim.options import require, require_one_of
from largebatch.optim.sharding.layout import Layout, Name, layout_of, local

NO_STATE: dict[str, Any] = {}


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
        self._last_plan: tuple[Any, StepPlan | None] = None, None
        self._scratch = Scratch()

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
        self._forget_plans()

    # The phases of a step -----------------------------------------------------------------------

    def _plan(self) -> StepPlan:
        """What there is to do. A sparse gradient is refused before anything has changed."""
        params = [param for group in self.param_groups for param in group["params"]]
        grads = [param.grad for param in params]
        if not {grad.layout for grad in grads if grad is not None} <= {torch.strided}:
            self._refuse_sparse()
        key = key_of(self.param_groups, params, grads, self._has_cpu_way)
        last_key, known = self._last_plan
        if last_key != key:  # hashing is dearer than comparing
            known = self._plans.get(key)
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
            known = build_step_plan(self.param_groups, layouts, self._has_cpu_way)
            known.flats = self._unbound.flats(self.param_groups, self._bound)
            if self._clip_norm is None:
                refuse_redundancy(self, self._max_grad_norm())
            self._plans[key] = known
        self._last_plan = key, known
        self._unbound.refuse_flats(type(self).__name__, known.flats)
        return known

    def _has_cpu_way(self, group: Group) -> bool:
        """Whether a CPU has kernels for such options."""
        return True

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
        gradients = gradients_of([param for _, param in plan.params])
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        flag = self._own_found_inf(plan.device)
        max_norm = self._max_grad_norm()
        divisor = None if grad_scale is None else on_device(grad_scale, plan.device).float()
        norms: list[Tensor] | None = None
        if max_norm < math.inf and self._clip_norm is not None:
            norm = on_device(self._clip_norm(), plan.device)
        elif max_norm < math.inf:
            norms = [self._norms(chunks, gradients) for chunks in plan.all_groups.groups]
            norm = plan.complete(plan.squares(plan.all_groups, norms), flag).sum().sqrt()
            norm = norm if divisor is None else norm / divisor
        elif flag is not None and plan.reductions:
            none = torch.zeros(len(plan.names), 0, dtype=plan.dtype, device=plan.device)
            plan.complete(none, flag)
        if max_norm < math.inf:
            clip = torch.clamp(norm / max_norm, min=1.0)
            divisor = clip if divisor is None else divisor * clip
        skip = None if flag is None else flag != 0
        if skip is not None and plan.on_cpu:
            is_skipped = float_of(skip) != 0
            return SyncedStep(gradients, norms, divisor, None, is_skipped)
        return SyncedStep(gradients, norms, divisor, skip)

    def _norms(self, chunks: ChunkGroup, gradients: list[Tensor]) -> Tensor:
        """The norm of each chunk of the gradients."""
        if chunks.way is Way.GENERAL:
            return norms_of(chunks, in_dtype(chunks.cut(gradients), chunks.dtype))
        return CpuStep(gradients, self._scratch).norms(chunks, gradients)

    def _on_cpu(self, plan: StepPlan, synced: SyncedStep, states: list[dict[str, Any]]) -> CpuStep:
        """What the ways of a CPU work on; after the state is made."""
        if not plan.on_cpu:
            return CpuStep([], self._scratch)
        params = locals_of([param for _, param in plan.params])
        weights = params
        if any(group["master_weights"] for group in self.param_groups):
            rows = zip(plan.params, states, params, strict=True)
            weights = [
                local(state.get("master_weight", param)) if group["master_weights"] else param
                for (group, _), state, param in rows
            ]
        divisor = 1.0 if synced.divisor is None else float_of(synced.divisor)
        multiplier = 1 / divisor if divisor else math.inf
        norms = zip(plan.all_groups.groups, synced.norms or (), strict=False)
        return CpuStep(
            synced.gradients, self._scratch, params, weights, states, multiplier,
            {id(chunks): norm for chunks, norm in norms},
        )  # fmt: skip

    def _gradients(self, chunks: ChunkGroup, synced: SyncedStep) -> Tensors:
        """The chunks' gradients to descend along, in the group's dtype; not to be written to."""
        grads: Tensors = in_dtype(chunks.cut(synced.gradients), chunks.dtype)
        if synced.divisor is not None:
            grads = torch._foreach_div(grads, synced.divisor.to(chunks.device, chunks.dtype))
        return torch._foreach_neg(grads) if chunks.group["maximize"] else grads

    def _weights(self, chunks: ChunkGroup) -> list[Tensor]:
        """The chunks' weights in the chunk group's dtype.

        The parameters themselves where they have that dtype, else their FP32 master copies, else
        copies of the moment.
        """
        held = (
            [self.state[chunk.param].get("master_weight", chunk.param) for chunk in chunks.members]
            if chunks.group["master_weights"]
            else [chunk.param for chunk in chunks.members]
        )
        return in_dtype(chunks.cut_each(held), chunks.dtype)

    def _params_of(self, chunks: ChunkGroup) -> list[Tensor]:
        return chunks.cut_each([chunk.param for chunk in chunks.members])

    def _state_of(self, chunks: ChunkGroup, key: str) -> list[Tensor]:
        """The chunks of a state that is shaped like the parameters."""
        return chunks.cut_each([self.state[chunk.param][key] for chunk in chunks.members])

    def _make_state(self, plan: StepPlan) -> list[dict[str, Any]]:
        """Make what state is missing, as at a parameter's first gradient, on every rank alike;
        return the states by place in the plan.
        """
        keys = {id(group): self._state_keys(group) for group in self.param_groups}
        states = []
        for group, param in plan.params:
            has_any = keys[id(group)] or group["master_weights"]
            held = self.state[param] if has_any else self.state.get(param, NO_STATE)
            for key in keys[id(group)]:
                if key not in held:
                    held[key] = torch.zeros_like(param, dtype=compute_dtype(param))
            dtype = compute_dtype(param) if group["master_weights"] else param.dtype
            if param.dtype != dtype and "master_weight" not in held:
                held["master_weight"] = param.detach().to(dtype)
            states.append(held)
        return states

    def _state_keys(self, group: Group) -> tuple[str, ...]:
        """The state tensors that are shaped like the parameter, zeros at first."""
        return self._known_state

    def _walk(
        self,
        plan: StepPlan,
        first: Callable[[ChunkGroup], tuple[Tensor, Tensor]],
        second: Callable[[ChunkGroup, Tensor], None],
    ) -> None:
        """Make both passes over all chunks; keep the numbers behind `layer_stats`.

        Args:
            first: gives ‖w‖ and ‖u‖ of the chunks of a group.
            second: moves the weights of the group by its chunks' trust ratios, in its dtype.
        """
        whole: list[tuple[Tensor, ...]] = []
        of_layers: tuple[Tensor, ...] | None = None
        for wave in plan.waves:
            norms = [first(chunks) for chunks in wave.groups]
            if wave.is_whole:
                chunks, found = wave.groups[0], [each.to(plan.dtype) for each in norms[0]]
                ratio = self._ratio(chunks.group, *found)
                whole.append((*found, ratio))
                second(chunks, ratio.to(chunks.dtype))
                continue
            of_layers = self._of_layers(plan, wave, norms)
            for chunks in wave.groups:
                second(chunks, chunks.of_layers(of_layers[2]))
        if whole:
            of_layers = plan.with_whole(whole, of_layers)
        if of_layers is not None:
            self._note(plan, of_layers)

    def _of_layers(
        self, plan: StepPlan, wave: Wave, norms: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """‖w‖, ‖u‖ and the trust ratio of every layer, from the norms of a wave's chunks.

        This is the step's last collective.
        """
        weight, update = ([pair[k] for pair in norms] for k in (0, 1))
        sums = torch.stack([plan.squares(wave, weight), plan.squares(wave, update)], dim=1)
        weight_norm, update_norm = root(plan.complete(sums)).unbind(dim=1)
        ratios = [
            self._ratio(group, weight_norm[layers], update_norm[layers])
            for group, layers in plan.groups
        ]
        return weight_norm, update_norm, torch.cat(ratios) if len(ratios) > 1 else ratios[0]

    def _note(self, plan: StepPlan, of_layers: tuple[Tensor, ...]) -> None:
        """Keep the numbers of a step for `layer_stats`."""
        shown = [each.to(plan.stats_dtype) for each in of_layers]
        adapts = [False] * len(plan.names)
        for group, layers in plan.groups:
            adapts[layers] = [self._adapts(group)] * len(adapts[layers])
        stats = LayerStats(plan.names, plan.moved, adapts, *shown)
        # Wrappers that bind layouts may show the parameters part by part, a step for each.
        self._stats = {**self._stats, tuple(plan.names): stats} if self._bound else {None: stats}

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
        else their index over all groups; the layers of a split one are "name[0]", "name[1]", …
        Values are 0-d tensors on the device, void after a step masked by `found_inf`; `adapts`, a
        bool on the host, is False where the ratio is 1 by choice, as in a group of `adapt=False`.
        """
        return {name: layer for stats in self._stats.values() for name, layer in stats.by_layer()}

    def adapting_layers(self) -> set[Name]:
        """Return the keys of `layer_stats` whose layers adapt, without asking the device."""
        return {name for stats in self._stats.values() for name in stats.adapting()}

    def adapting_ratios(self) -> Tensor | None:
        """Return their trust ratios in one vector on the device; None where there are none."""
        return adapting_ratios(self._stats.values())

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
