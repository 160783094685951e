"""State that lies with the owners of blocks, and how it is saved and loaded.

A parameter's state is one flat dict: `step`; what lies like the parameter itself, such as a
momentum buffer; and for each of its blocks entries "block_3/factor_0", whole on the block's owner
and empty elsewhere. The keys are the same on every rank. In a state dict the latter are spread over
the ranks: see `largebatch.optim.blockwise.portable`.
"""

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from largebatch.optim.base import Group, ShardedOptimizer
from largebatch.optim.blockwise.blocks import Block
from largebatch.optim.blockwise.hyperball import RADIUS
from largebatch.optim.blockwise.portable import Portable, gathered, sharded
from largebatch.optim.blockwise.work_group import (
    AVERAGES,
    CUT,
    DROPPED,
    MATRICES,
    BlockedLayer,
    BlockWorkGroup,
    blocks_in,
    look_of,
    make_layer,
    new_entry,
    share_out,
    work_groups_of,
)
from largebatch.optim.loading import as_state
from largebatch.optim.math.bias_correction import SUFFIX, ages_of
from largebatch.optim.math.decompositions import Beside
from largebatch.optim.math.matrix_roots import TOLERATED_FAILURES, FailureReports, Failures
from largebatch.optim.math.tensors import compute_dtype
from largebatch.optim.sharding.layout import Name, is_dtensor, layout_of
from largebatch.optim.sharding.step_counts import StepCounts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BlockState = dict[str, Tensor]


class OwnedState(ShardedOptimizer):
    """An optimizer whose parameters have blocks, with owners among the ranks that share them."""

    _needs = "whole matrices"

    _cut: ClassVar[tuple[str, ...]] = CUT
    """The options of a group that say which blocks its parameters have."""

    # On the class too, because pickle keeps an optimizer's groups and state only.
    _process_group: "ProcessGroup | None" = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        process_group: "ProcessGroup | None",
        tolerated_failures: int,
    ) -> None:
        self._process_group = process_group
        self._begin(tolerated_failures)
        super().__init__(params, defaults)

    def _begin(self, tolerated_failures: int = TOLERATED_FAILURES) -> None:
        self.failures = Failures(tolerated_failures)
        self._reports = FailureReports(self.failures)
        self._layers: dict[Tensor, BlockedLayer] = {}
        self._group_of: dict[Tensor, Group] = {}
        self._known_work_groups: tuple[Any, list[BlockWorkGroup]] = ((), [])
        self._counts = StepCounts()
        self._beside = Beside()
        self._history: dict[Tensor, dict[str, tuple[float, float]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        shared = any(layer.placement.group is not None for layer in self._layers.values())
        if shared or self._process_group is not None:
            raise ValueError(
                f"{type(self).__name__} cannot be copied or pickled where ranks share its work, "
                "because each has other parts of its state: save state_dict(), load it into another"
            )
        self._count_in_new_betas()
        state: dict[str, Any] = super().__getstate__()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        failures: Failures | None = self.__dict__.get("failures")
        self._begin(TOLERATED_FAILURES if failures is None else failures.tolerated)

    # What a subclass says ------------------------------------------------------------------------

    def blocks_in(self, group: Group, shape: Sequence[int]) -> tuple[Block, ...]:
        """Return the blocks of a tensor of this shape in a group."""
        return blocks_in(group, shape)

    def _averages(self, has_blocks: bool, group: Group) -> tuple[str, ...]:
        """The running averages of a parameter that are corrected for their bias."""
        return AVERAGES if has_blocks else AVERAGES[:2]

    def _block_shapes(self, group: Group, block: Block) -> dict[str, tuple[int, ...]]:
        """The shapes of the state of a block, by name; none of them 0-d."""
        raise NotImplementedError

    def _elementwise_keys(self, has_blocks: bool, group: Group) -> tuple[str, ...]:
        """The state tensors that lie like the parameter."""
        raise NotImplementedError

    def _betas(self, group: Group) -> dict[str, float]:
        """β of each of `AVERAGES`; 0 for a sum, which needs no correction."""
        raise NotImplementedError

    # Who has what --------------------------------------------------------------------------------

    def _check_param(self, group: Group, name: Name, param: Tensor) -> None:
        super()._check_param(group, name, param)
        layout_of(param, name)  # which refuses ranks that hold summands

    def _work_groups(self) -> list[BlockWorkGroup]:
        """Return all parameters that may have a gradient; rebuilt where they have changed."""
        key: list[Any] = []
        self._group_of = {p: group for group in self.param_groups for p in group["params"]}
        for group, name, param in self._named_params():
            is_live = param.requires_grad or param.grad is not None
            key.append((id(param), name, look_of(param, group, self._cut), is_live))
        if self._known_work_groups[0] == key:
            return self._known_work_groups[1]
        layers = {param: self._layer_of(param, name) for _, name, param in self._named_params()}
        share_out(layers.values(), self._group_of)
        # One that has left the groups may come back to its state, and so to its owners.
        left = {p: layer for p, layer in self._layers.items() if p not in layers}
        self._layers = layers | {p: layer for p, layer in left.items() if p in self.state}
        live = {param for param, entry in zip(layers, key, strict=True) if entry[-1]}
        work_groups = work_groups_of(layer for param, layer in layers.items() if param in live)
        self._known_work_groups = key, work_groups
        return work_groups

    def _layer_of(self, param: Tensor, name: Name) -> BlockedLayer:
        """Return a parameter's layer, a new one where the parameter is cut otherwise now."""
        group, known = self._group_of[param], self._layers.get(param)
        seen = look_of(param, group, self._cut)
        if known is not None and known.seen == seen:
            known.name = name
            return known
        blocks = self.blocks_in(group, param.shape)
        layer = make_layer(param, name, blocks, self._process_group, seen)
        if known is None:
            return layer
        if known.blocks == layer.blocks and known.placement == layer.placement:
            layer.owners, layer.slots = known.owners, known.slots
        elif self.state.pop(param, None):
            self._counts.forget(param)
            warnings.warn(
                f"parameter {name!r} is cut into other blocks than before, because its shape, its "
                f"placement or one of {', '.join(self._cut)} has changed: its state begins anew.",
                stacklevel=4,
            )
        return layer

    def _states(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return ((param, self.state[param]) for param in self._params() if param in self.state)

    def _make_state(self, layer: BlockedLayer, group: Group) -> None:
        """Make what state is missing, as at a parameter's first gradient; on every rank alike."""
        state = self.state[layer.param]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=layer.device)
            layer.state_names = ()
            self._counts.begin(layer.param)
            self._history[layer.param] = {n: (b, 0.0) for n, b in self._betas(group).items()}
        for key in self._scalar_keys(layer):
            if key not in state:
                state[key] = torch.zeros((), dtype=torch.float32, device=layer.device)
        for key in self._elementwise_keys(bool(layer.blocks), group):
            if key not in state:
                state[key] = torch.zeros_like(layer.param, dtype=layer.dtype)
        if not layer.state_names:
            self._make_block_states(layer, group)

    def _make_block_states(self, layer: BlockedLayer, group: Group) -> None:
        state, me = self.state[layer.param], layer.placement.me
        for number, (block, owner) in enumerate(zip(layer.blocks, layer.owners, strict=True)):
            shapes = self._block_shapes(group, block)
            layer.state_names = tuple(shapes)
            if all(f"block_{number}/{name}" in state for name in shapes):
                continue
            for name, shape in shapes.items():
                value = new_entry(name, shape if owner == me else (0,), layer)
                state.setdefault(f"block_{number}/{name}", value)

    def _scalar_keys(self, layer: BlockedLayer) -> tuple[str, ...]:
        """0-d entries, zeros at first, and zeros where a checkpoint has none."""
        group = self._group_of[layer.param]
        averages = self._averages(bool(layer.blocks), group)
        radius = (RADIUS,) if layer.blocks and group.get("hyperball") else ()
        return (*(average + SUFFIX for average in averages), *radius, DROPPED)

    def _ages_of(self, layer: BlockedLayer, step: int) -> dict[str, float]:
        """The t of each running average for its bias correction, at the parameter's step `step`."""
        param, betas = layer.param, self._betas(self._group_of[layer.param])
        return ages_of(self.state[param], self._history.setdefault(param, {}), betas, step)

    def _count_in_new_betas(self) -> None:
        """Before state is saved: β may have been set for the next step, and is saved with it."""
        self._work_groups()
        self._counts.settle()
        self._counts.read(self._states())
        for param in self._params():
            if "step" in self.state.get(param, {}):
                self._ages_of(self._layers[param], self._counts.of(param, self.state[param]) + 1)

    def _block_state(self, layer: BlockedLayer, number: int) -> BlockState:
        state = self.state[layer.param]
        return {name: state[f"block_{number}/{name}"] for name in layer.state_names}

    # To and from state dicts ----------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """As torch's. Where blocks have owners among several ranks, all of them have to call it.

        What lies whole on its owner is then a DTensor, cut by rows: any world size can load it.
        """
        self._count_in_new_betas()
        state, known = self.state, self._group_of
        # Torch has no number for a parameter that has left the groups.
        here = {k: v for k, v in state.items() if k in known or not isinstance(k, Tensor)}
        self.state = defaultdict(dict, here)
        try:
            return self._state_dict_of(
                lambda: sharded(self._portables(self.state), dict(self._states()))
            )
        finally:
            self.state = state

    def _take_up(self, found: Mapping[Tensor, dict[str, Any]]) -> None:
        self.state.update(self._ready(found))
        self._beside.forget()

    def _ready(self, by_param: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """Return the loaded state of each parameter as `step` expects it, by the loaded options;
        refuse a tensor that is missing or of another shape.
        """
        self._work_groups()
        ready: dict[Tensor, dict[str, Any]] = {}
        for param, found in by_param.items():
            layer = self._layers[param]
            group = self._group_of[param]
            shapes, scalars = self._shapes_of(layer), self._scalar_keys(layer)
            keys = ("step", *shapes, *self._elementwise_keys(bool(layer.blocks), group))
            missing = [key for key in keys if key not in found]
            if missing:
                raise ValueError(
                    f"state of parameter {layer.name!r} must have an entry {missing[0]!r}, got "
                    f"{', '.join(found) or 'none'}: was it saved by another optimizer, or with "
                    f"another grafting, {', '.join(self._cut)} (None in older versions)?"
                )
            for key, shape in shapes.items():
                if tuple(found[key].shape) != shape:
                    raise ValueError(
                        f"state {key!r} of parameter {layer.name!r} must have the shape {shape}, "
                        f"got {tuple(found[key].shape)}"
                    )
            ready[param] = {
                key: found[key].to(layer.device, layer.dtype)
                if key in shapes
                else as_state(key, found[key], layer.name, param)
                for key in keys
            }
            for key in scalars:
                value = torch.as_tensor(found.get(key, 0.0), dtype=torch.float32)
                ready[param][key] = value.to(layer.device)
            self._history[param] = {
                name: (beta, float(ready[param][name + SUFFIX]))
                for name, beta in self._betas(group).items()
                if name + SUFFIX in scalars
            }
            for key, value in found.items():  # what a wrapper keeps beside ours
                if key not in ready[param] and not key.startswith("block_"):
                    kept = isinstance(value, Tensor) and not is_dtensor(value)
                    ready[param][key] = value.to(layer.device) if kept else value
        return gathered(self._portables(ready), ready)

    def _portables(self, state: Mapping[Tensor, Any]) -> Iterator[Portable]:
        """For each process group the block states of the layers that have any."""
        by_group: dict[Any, list[BlockedLayer]] = {}
        for param in self._params():
            layer = self._layers[param]
            if layer.placement.group is not None and layer.blocks and param in state:
                by_group.setdefault(layer.placement.group, []).append(layer)
        for layers in by_group.values():
            entries = {
                (layer.param, key): (shape, layer.owners[int(key[6 : key.index("/")])])
                for layer in layers
                for key, shape in self._shapes_of(layer).items()
            }
            yield Portable(layers, entries)

    def _shapes_of(self, layer: BlockedLayer) -> dict[str, tuple[int, ...]]:
        """The shapes of a layer's block states, by their keys in its state."""
        group = self._group_of[layer.param]
        return {
            f"block_{number}/{name}": shape
            for number, block in enumerate(layer.blocks)
            for name, shape in self._block_shapes(group, block).items()
        }

    def __repr__(self) -> str:
        """As torch's, and how much memory the state takes once each parameter has had a gradient,
        over all ranks that share it; known from shapes.
        """
        weights = state = matrices = 0
        partly: list[str] = []
        for group, name, param in self._named_params():
            blocks, itemsize = self.blocks_in(group, param.shape), compute_dtype(param).itemsize
            shapes = [self._block_shapes(group, block) for block in blocks]
            entries = [(key, math.prod(shape)) for each in shapes for key, shape in each.items()]
            like_param = param.numel() * len(self._elementwise_keys(bool(blocks), group))
            weights += param.numel() * param.element_size()
            state += (sum(numel for _, numel in entries) + like_param) * itemsize
            matrices += sum(n for key, n in entries if key.startswith(MATRICES)) * itemsize
            is_whole = group.get("sides", "both") == "both"
            if blocks and is_whole and 0 < len(blocks[0].dims) < len(blocks[0].shape):
                partly.append(f"{name} {tuple(param.shape)}")
        text = (
            f"{super().__repr__()}\n"
            f"State of all parameters, over all ranks that share it: {state / 1e6:.3g} MB for "
            f"{weights / 1e6:.3g} MB of them; factors and what is made of them: "
            f"{matrices / 1e6:.3g} MB"
        )
        return text + (f"\nNo factor along a long dimension: {', '.join(partly)}" if partly else "")
