"""The base of K-FAC apart from its formula: a model's layers, their ranks, groups, and state.

Promises as in `largebatch.optim.layerwise.optimizer`. The host waits for the device where a layer
is decomposed, and nowhere else.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from largebatch.optim.base import Group
from largebatch.optim.blockwise.portable import gathered, sharded
from largebatch.optim.kronecker.coverage import (
    coverage,
    say_coverage,
    warn_of_blind,
    warn_of_uses_elsewhere,
)
from largebatch.optim.kronecker.damping import FORMS
from largebatch.optim.kronecker.factors import FACTOR_STATE
from largebatch.optim.kronecker.layers import Layer, find_layers, signature, without_bias
from largebatch.optim.kronecker.state import KroneckerState
from largebatch.optim.kronecker.statistics import FactorStatistics
from largebatch.optim.kronecker.work_group import KroneckerWorkGroup, make_work_groups
from largebatch.optim.math.adam import GRAFTINGS
from largebatch.optim.math.decompositions import REFRESHES, Beside
from largebatch.optim.math.matrix_roots import FailureReports, Failures
from largebatch.optim.options import require, require_one_of
from largebatch.optim.sharding.layout import Name, is_dtensor, local
from largebatch.optim.sharding.placement import Placement, placement_of
from largebatch.optim.sharding.refresh_schedule import RefreshSchedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KroneckerOptimizer(KroneckerState):
    """Base of optimizers that watch a model's layers.

    Args:
        params: parameter groups; None: one of all parameters.
        defaults: the options of a group.
        options: those of the whole optimizer: `fisher`, `refresh`, `factor_interval`,
            `inverse_interval`, `max_factor_size`.
    """

    takes_model: ClassVar[bool] = True
    _OWN: ClassVar[tuple[str, ...]] = (
        *("_model", "_options", "_process_group", "_elsewhere", "loss_scale", "failures"),
    )
    _statistics: FactorStatistics

    def __init__(
        self,
        model: nn.Module,
        params: ParamsT | None,
        defaults: Group,
        options: Mapping[str, Any],
        tolerated_failures: int,
        process_group: "ProcessGroup | None",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"KFAC takes the model, whose layers it watches, got {type(model).__name__}: write "
                "KFAC(model, lr=…), or KFAC(model, lr=…, params=…) for some of its parameters"
            )
        require_one_of(options, "fisher", ("empirical", "true"))
        require_one_of(options, "refresh", REFRESHES)
        for name in ("factor_interval", "inverse_interval", "max_factor_size"):
            count = options[name]
            whole = isinstance(count, int) and not isinstance(count, bool)
            require(whole and count >= 1, name, "a whole number >= 1", count)
        model, averaging = unwrapped(model)
        self._model, self._options = model, dict(options)
        self._process_group = process_group or averaging
        self.loss_scale: float | Tensor = 1.0
        """c, for whoever scales losses by other means than GradScaler, which is asked."""
        self.failures = Failures(tolerated_failures)
        self._elsewhere = frozenset()
        super().__init__(list(model.named_parameters()) if params is None else params, defaults)
        self._begin()

    def _begin(self) -> None:
        """Watch the model; what has been here before is in groups and state."""
        self._stats: dict[Name, dict[str, Tensor]] = {}
        self._reports = FailureReports(self.failures)
        self._beside = Beside()
        self._unsaid = True
        self._layers: list[Layer] = []
        self._work_groups: list[KroneckerWorkGroup] = []
        self._seen = []
        self._shared: list[tuple[Any, ...]] | None = None
        self._statistics = FactorStatistics(
            self._model, self._find, self._options["fisher"] == "true"
        )
        self._find()
        self._share()

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch, with options of its own; its layers are watched from now on."""
        super().add_param_group(param_group)
        if hasattr(self, "_statistics"):
            self._find()
            self._share()

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        for name in ("damping", "ridge"):
            require(0 <= options[name] < math.inf, name, "in [0, inf)", options[name])
        for name in ("final_damping", "damping_items", "kl_clip"):
            value = options[name]
            require(value is None or 0 < value < math.inf, name, "in (0, inf) or None", value)
        if (options["final_damping"] is None) != (options["damping_items"] is None):
            given = "final_damping" if options["damping_items"] is None else "damping_items"
            raise ValueError(f"final_damping and damping_items go together, got {given} alone")
        if options["final_damping"] is not None:
            accepted = "> 0 where final_damping is given"
            require(options["damping"] > 0, "damping", accepted, options["damping"])
        factor_decay = options["factor_decay"]
        require(0 <= factor_decay < 1, "factor_decay", "in [0, 1)", factor_decay)
        for name in ("relative_damping", "nesterov", "maximize"):
            require_one_of(options, name, (False, True))
        require_one_of(options, "form", FORMS)
        require_one_of(options, "graft", GRAFTINGS)

    def _check_groups(self) -> None:
        clips = {group["kl_clip"] for group in self.param_groups}
        require(len(clips) == 1, "kl_clip", "the same in every group", sorted(map(str, clips)))

    def _name_of_new(self, param: Tensor, index: int) -> str:
        names = {id(known): name for name, known in self._model.named_parameters()}
        return names.get(id(param)) or super()._name_of_new(param, index)

    def _find(self) -> None:
        """Find the layers and hook into them, if groups or parameters have changed.

        Called before a forward pass and a step; no communication.
        """
        seen = [
            (id(group), id(p), name, p.device, p.dtype, p.requires_grad)
            for group, name, p in self._named_params()
        ]
        if seen == self._seen:
            return
        self._seen = seen
        for group in self.param_groups:
            for option, value in self.defaults.items():
                group.setdefault(option, value)
        self._names: dict[Tensor, Name] = {p: name for _, name, p in self._named_params()}
        self._group_of = {param: group for group in self.param_groups for param in group["params"]}
        self._placements: dict[Tensor, Placement] = {
            param: placement_of(param, name, self._process_group)
            for param, name in self._names.items()
        }
        groups = (placement.group for placement in self._placements.values())
        self._ranks = [*dict.fromkeys(group for group in groups if group is not None)]
        known = {signature(layer): layer for layer in self._layers}
        found = find_layers(self._model, self._options["max_factor_size"], self._is_trained)
        found = [layer if self._together(layer) else without_bias(layer) for layer in found]
        layers = [
            layer
            for layer in found
            if self._together(layer) and layer.weight not in self._elsewhere
        ]
        self._layers = [known.get(signature(layer), layer) for layer in layers]
        self._preconditioned = {param for layer in self._layers for param in layer.params}
        self._refuse_alone(self._layers)
        self._statistics.watch(self._layers)

    def _is_trained(self, param: Tensor) -> bool:
        """Or has been: what is frozen for a while keeps its curvature."""
        return param.requires_grad or "step" in self.state.get(param, {})

    def _together(self, layer: Layer) -> bool:
        """Whether all of it is the optimizer's, and spread over the same ranks."""
        known = all(param in self._placements for param in layer.params)
        return known and len({id(self._placements[param].group) for param in layer.params}) == 1

    def _share(self) -> None:
        """Assign the layers to their ranks, again where anything has changed.

        An owner's state moves with the work. A collective, if anything has changed.
        """
        shared = [
            (layer, local(layer.weight).device, layer.dtype, self._placements[layer.weight].group)
            for layer in self._layers
        ]
        if shared == self._shared:
            return
        forms, copied = self._forms(), self._shared is None  # or new, with no state to speak of
        interval = self._options["inverse_interval"]
        known = {layer.weight for layer in self._layers if copied or layer in forms}
        found = {param: state for param, state in self.state.items() if param in known}
        found = sharded(self._portables(found), found)
        self._work_groups, self._shared = (
            make_work_groups(self._layers, self._placements, interval),
            shared,
        )
        self.state.update(gathered(self._portables(found), found))
        for param in self._names.keys() - known:  # what has no curvature, or another kind of it
            for key in self.state.get(param, {}).keys() & FACTOR_STATE:
                del self.state[param][key]
        slots = {layer: slot for each in self._work_groups for layer, slot in each.slots.items()}
        self._schedule = RefreshSchedule(slots, interval, self._options["factor_interval"])
        self._restore_schedule()

    def _agree_on_uses(self) -> None:
        """Leave weights to the fallback that passes on any rank have used without their modules.

        A collective of each work group, at the first step after passes through layers that are new.
        """
        if not self._statistics.looks:
            return
        found = (self._statistics.elsewhere or set()) & self._statistics.passes
        looked, used = self._statistics.looked(), []
        for work_group in self._work_groups:
            flags = [looked, *(layer in found for layer in work_group.layers)]
            if work_group.group is not None:
                found_anywhere = torch.tensor(flags, dtype=torch.float32, device=work_group.device)
                dist.all_reduce(found_anywhere, dist.ReduceOp.MAX, group=work_group.group)
                flags = [flag > 0 for flag in found_anywhere.tolist()]
            looked = looked or flags[0]
            used += [
                layer
                for layer, is_used in zip(work_group.layers, flags[1:], strict=True)
                if is_used
            ]
        self._statistics.looks = not looked
        if used:
            self.leave_out(layer.weight for layer in used)
            for layer in used:
                for param in layer.params:  # as a checkpoint of before this was looked for has it
                    self.state.pop(param, None)
            self._find()
            self._share()
            warn_of_uses_elsewhere(used)

    def _refuse_alone(self, layers: Iterable[Layer]) -> None:
        """Refuse plain layers on several ranks where no process group was given."""
        if self._process_group is not None or not dist.is_initialized():
            return
        plain = [layer.name for layer in layers if not is_dtensor(layer.weight)]
        if plain and dist.get_world_size() > 1:
            raise ValueError(
                f"process_group must be given on {dist.get_world_size()} ranks, because the "
                f"curvature of layer {plain[0]!r} is an average over those that average its "
                "gradients, as the gradients are: torch.distributed.group.WORLD with DDP, a group "
                "of this rank alone for a model of its own"
            )

    def _restore_schedule(self) -> None:
        """Restore the schedule from the state's count of steps, which waits for the device."""
        steps = [state["step"] for state in self.state.values() if "step" in state]
        decomposed = [layer for layer in self._layers if self._has_factors(layer)]
        self._schedule.restore(max(steps, default=None, key=float), decomposed)
        self._statistics.active = self._schedule.begin()

    def _owned(self) -> Iterator[Layer]:
        return (layer for work_group in self._work_groups for layer in work_group.owned)

    # What users call ----------------------------------------------------------------------------

    def items(self, number: int) -> None:
        """Set the number of items that the loss of a pass is the mean over, on this rank.

        Needed where they are not the samples: tokens, or what a mask leaves of them. With losses
        scaled such that the gradient is of the mean over all items, `number` is this pass's own.
        """
        require(number >= 0, "number", ">= 0", number)
        self._statistics.tell(number)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's; the curvature of gradients that no step has used goes with them."""
        super().zero_grad(set_to_none)
        self._statistics.drop()

    def fisher_backward(self, loss: Tensor) -> None:
        """For `fisher="true"`: take the curvature from this loss, whose labels are samples.

        Between the model's forward pass and the backward pass of training. `loss` is the training
        loss, scaled alike, with labels sampled from the model's own prediction:

            logits = model(x)
            labels = torch.distributions.Categorical(logits=logits.detach()).sample()
            optimizer.fisher_backward(cross_entropy(logits, labels))
            cross_entropy(logits, y).backward()

        It costs a backward pass through activations; no gradient of a parameter is computed.

        Raises:
            RuntimeError: the optimizer takes the empirical Fisher, or has not seen a forward pass.
        """
        if self._options["fisher"] != "true":
            raise RuntimeError("fisher_backward needs fisher='true', got 'empirical'")
        self._statistics.backward(loss)

    # The phases of a step that do not depend on the formula -------------------------------------

    def _agreed_skip(self) -> Tensor | None:
        """Return whether `found_inf` is set on any rank, 0-d bool; None: not set."""
        flag = self._own_found_inf(local(next(iter(self._names))).device)
        if flag is None:
            return None
        for group in self._ranks:
            dist.all_reduce(flag, group=group)
        return flag != 0

    def _take_loss_scale(self) -> float | Tensor:
        """Return the factor of this step's losses, whether or not gradients are unscaled by now."""
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        scale = self._take_scale_of_scaler()
        scale = scale if grad_scale is None else grad_scale
        return self.loss_scale if scale is None else scale

    def _say_once(self) -> None:
        """Say how much of the model has curvature and which layers go unseen: at the first step.

        Not at one with a learning rate of 0, by which torch makes the state that a checkpoint is
        loaded into: before it there were no passes.
        """
        rates = [group["lr"] for group in self.param_groups]
        still = not any(isinstance(rate, Tensor) or rate for rate in rates)  # read, it might wait
        if self._unsaid and self._statistics.active and not still:  # so that the passes were seen
            self._unsaid = False
            say_coverage(self._names, self._layers)
            moved = [layer for layer in self._layers if layer.weight.grad is not None]
            warn_of_blind([layer for layer in moved if layer not in self._statistics.passes])

    def __repr__(self) -> str:
        options = {**self._options, **self._essentials()}
        said = ", ".join(f"{name}={value!r}" for name, value in options.items())
        return f"{super().__repr__()}\n{said}\n{coverage(self._names, self._layers)[0]}"

    def _essentials(self) -> dict[str, Any]:
        """Options of the whole optimizer, beside those that every subclass has."""
        return {}


def unwrapped(model: nn.Module) -> tuple[nn.Module, "ProcessGroup | None"]:
    """What DDP and torch.compile have wrapped, and the ranks that DDP averages over."""
    process_group = None
    while True:
        inner = getattr(model, "_orig_mod", None)  # of torch.compile
        if isinstance(model, nn.parallel.DistributedDataParallel):
            process_group, inner = model.process_group, model.module
        if not isinstance(inner, nn.Module):
            return model, process_group
        model = inner
