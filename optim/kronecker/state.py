"""The state of an optimizer that watches a model's layers: made, saved, loaded and copied.

Factors and inverses that only a layer's owner has are sharded DTensors in a state dict, as in
`largebatch.optim.blockwise.portable`, and can be loaded at any world size.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from largebatch.optim.base import Group, ShardedOptimizer
from largebatch.optim.blockwise.portable import Key, Portable, States, gathered, sharded
from largebatch.optim.blockwise.work_group import DROPPED, BlockedLayer
from largebatch.optim.kronecker.damping import FORMER_FORMS
from largebatch.optim.kronecker.factors import Form, make_factor_state, state_shapes
from largebatch.optim.kronecker.layers import Layer
from largebatch.optim.kronecker.work_group import KroneckerWorkGroup
from largebatch.optim.loading import as_kept, as_state
from largebatch.optim.math.decompositions import Beside
from largebatch.optim.math.tensors import compute_dtype, write
from largebatch.optim.sharding.layout import Name, local
from largebatch.optim.sharding.refresh_schedule import RefreshSchedule

ELSEWHERE = "used_elsewhere"


class KroneckerState(ShardedOptimizer):
    """An optimizer with factors in the state of its layers' weights."""

    _OWN: ClassVar[tuple[str, ...]] = ()
    """What a copy has beside groups and state."""
    _elsewhere: frozenset[Tensor]
    """Weights that the model uses without their modules too, which have no curvature."""
    _seen: list[Any]
    """By which `_find` knows what has changed."""
    _names: dict[Tensor, Name]
    _group_of: dict[Tensor, Group]
    _work_groups: list[KroneckerWorkGroup]
    _schedule: RefreshSchedule[Layer]
    _options: dict[str, Any]
    _beside: Beside

    def _begin(self) -> None:
        """Watch the model, with the groups and state that there are."""
        raise NotImplementedError

    def _find(self) -> None:
        """Find the layers of the present parameters."""
        raise NotImplementedError

    def _share(self) -> None:
        """Assign the layers to their ranks."""
        raise NotImplementedError

    def _restore_schedule(self) -> None:
        """Restore the schedule from the state's count of steps."""
        raise NotImplementedError

    def _keys(self, param: Tensor, group: Group) -> tuple[str, ...]:
        """The state tensors that are shaped like the parameter."""
        raise NotImplementedError

    # What a step makes --------------------------------------------------------------------------

    def _count_step(self, skip: Tensor | None) -> None:
        """Make what state is missing, and advance the step of every parameter with a gradient."""
        for work_group in self._work_groups:
            for layer in work_group.layers:
                state = self.state.get(layer.weight, {})
                if (
                    work_group.size > 1 or layer.weight.grad is not None
                ) and "factor_in" not in state:
                    self.state[layer.weight].update(self._new_factor_state(work_group, layer))
                    self._make_state(layer.weight)  # whole, for it may be saved without a gradient
        moved = [param for _, param in self._moved()]
        self._schedule.counts.read((p, self.state[p]) for p in moved if p in self.state)
        for param in moved:
            state = self._make_state(param)
            self._schedule.counts.of(param, state)  # before it is advanced
            write([state["step"]], [state["step"] + 1], skip)

    def _make_state(self, param: Tensor) -> dict[str, Tensor]:
        """The parameter's state, with zeros for what of its own shape is missing."""
        state: dict[str, Tensor] = self.state[param]
        for key in self._keys(param, self._group_of[param]):
            if key not in state:
                state[key] = torch.zeros_like(param, dtype=compute_dtype(param))
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=local(param).device)
            self._schedule.counts.begin(param)
        if DROPPED not in state:
            state[DROPPED] = torch.zeros_like(state["step"])
        if param in self._elsewhere and ELSEWHERE not in state:
            state[ELSEWHERE] = torch.ones_like(state["step"])  # for a run resumed from here
        return state

    def _new_factor_state(self, work_group: KroneckerWorkGroup, layer: Layer) -> dict[str, Tensor]:
        form = self._forms()[layer]
        if layer in work_group.owned:
            return make_factor_state(layer, form, work_group.device)
        empty = torch.empty(0, dtype=layer.dtype, device=work_group.device)
        return {name: empty.clone() for name in state_shapes(layer, form)}

    def _forms(self) -> dict[Layer, Form]:
        """Of the layers that are shared out and still in a group."""
        layers = (layer for work_group in self._work_groups for layer in work_group.layers)
        known = (layer for layer in layers if layer.weight in self._group_of)
        beside = self._options["refresh"] == "beside"
        return {layer: Form(self._group_of[layer.weight]["form"], beside) for layer in known}

    def _moved(self) -> Iterator[tuple[Group, Tensor]]:
        return ((g, param) for param, g in self._group_of.items() if param.grad is not None)

    def _has_factors(self, layer: Layer) -> bool:
        return "factor_in" in self.state.get(layer.weight, {})

    # What is saved ------------------------------------------------------------------------------

    def state_dict(self) -> StateDict:
        """As torch's. Where ranks share the work, all of them have to call it, and to load it.

        What lies on the rank that works on a layer is then a DTensor: any world size can load it.
        """
        self._find()
        self._share()

        def states() -> Mapping[Tensor, dict[str, Any]]:
            found = {p: dict(self.state[p]) for p in self._names if p in self.state}
            return sharded(self._portables(found), found)

        return self._state_dict_of(states)

    def load_state_dict(self, state_dict: StateDict) -> None:
        """As of all these optimizers; and all ranks that share the work have to call it."""
        try:
            super().load_state_dict(state_dict)
        except Exception:
            self._seen = []  # for the hooks are those of what has not been loaded
            raise

    def _take_up(self, found: Mapping[Tensor, dict[str, Any]]) -> None:
        self.leave_out(param for param in found if ELSEWHERE in found[param])
        self._find()
        self._share()
        self.state.update(self._ready(found))
        self._beside.forget()
        self._restore_schedule()

    def leave_out(self, params: Iterable[Tensor]) -> None:
        """Leave weights to the fallback from the next step, or look at the state, on.

        For a state that is read in place: whose entries have ELSEWHERE had no curvature.
        """
        self._elsewhere, self._seen = self._elsewhere.union(params), []

    def _portables(self, states: States) -> Iterator[Portable]:
        """Yield what is saved and loaded of the layers of each work group."""
        forms = self._forms()
        for work_group in self._work_groups:
            held = [
                layer for layer in work_group.layers if "factor_in" in states.get(layer.weight, {})
            ]
            if work_group.group is None or not held:
                continue
            entries: dict[Key, tuple[tuple[int, ...], int]] = {
                (layer.weight, key): (shape, work_group.owners[layer])
                for layer in held
                for key, shape in state_shapes(layer, forms[layer]).items()
            }
            placements = work_group.placements
            blocked = [BlockedLayer(x.weight, x.name, placements[x.weight], ()) for x in held]
            yield Portable(blocked, entries)

    def _ready(self, found: Mapping[Tensor, dict[str, Any]]) -> dict[Tensor, dict[str, Any]]:
        """Return loaded state as `step` expects it, or refuse what does not fit."""
        forms, layers = self._forms(), {layer.weight: layer for layer in self._forms()}
        ready = {}
        for param, state in found.items():
            keys = {"step", DROPPED, *self._keys(param, self._group_of[param])}
            layer = layers.get(param)  # type: ignore[call-overload] # by identity
            form = None if layer is None else forms[layer]
            ready[param] = checked(param, self._names[param], state, keys, layer, form)
        return gathered(self._portables(ready), ready)

    def __getstate__(self) -> dict[str, Any]:
        if any(work_group.group is not None for work_group in self._work_groups):
            raise TypeError(
                "KFAC shares its work with other ranks and cannot be copied or pickled: build one "
                "for the other model and give it this one's state_dict()"
            )
        state: dict[str, Any] = super().__getstate__()
        return {**state, "own": {name: self.__dict__[name] for name in self._OWN}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("own", None)
        super().__setstate__(state)
        for group in self.param_groups:
            group["form"] = FORMER_FORMS.get(group["form"], group["form"])
        if own is not None:  # a copy; else groups and state alone are loaded
            self.__dict__.update(own)
            self._begin()


def checked(
    param: Tensor,
    name: Name,
    found: Mapping[str, Any],
    keys: set[str],
    layer: Layer | None,
    form: Form | None,
) -> dict[str, Any]:
    """Return a parameter's loaded state in the dtype and on the device that `step` expects.

    Args:
        keys: what there has to be, apart from the layer's own.

    Raises:
        ValueError: an entry that is missing or of another shape; one that is unknown is kept.
    """
    shapes = {} if layer is None or form is None else state_shapes(layer, form)
    zeros = {"dropped_updates": torch.zeros(1)} if layer is not None else {}
    found = {DROPPED: torch.zeros(()), **zeros, **found}  # of before these were counted
    if (keys | shapes.keys()) - found.keys():
        wrong = sorted(found.keys() ^ (keys | shapes.keys()))
        raise ValueError(
            f"state of parameter {name!r} must have the entries that its options make, got or "
            f"lacks {', '.join(wrong[:4])}: was it saved by another optimizer, or with another "
            "form, refresh, graft, rule or fallback?"
        )
    ready = {}
    for key, value in found.items():
        if key not in shapes:
            known = key in keys and key != DROPPED
            ready[key] = as_state(key, value, name, param) if known else as_kept(value, param)
            continue
        assert layer is not None
        if tuple(value.shape) != shapes[key]:
            raise ValueError(
                f"state {key!r} of parameter {name!r} must have the shape {shapes[key]}, got "
                f"{tuple(value.shape)}: was it saved with another max_factor_size?"
            )
        ready[key] = value.to(local(param).device, layer.dtype, copy=True)
    return ready
