"""LAMB: Adam whose step is rescaled, layer by layer, to the size of the layer's weights.

You et al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes",
https://arxiv.org/abs/1904.00962v5, Algorithm 2. For a layer w with gradient g, at its step t:

    m ← β₁ m + (1 - β₁) g             v ← β₂ v + (1 - β₂) g²
    m̂ = m / (1 - β₁ᵗ)                 v̂ = v / (1 - β₂ᵗ)
    u = m̂ / (√v̂ + ε) + λ w            the update, weight decay included
    r = φ(‖w‖) / ‖u‖                  the trust ratio
    w ← w - lr · r · u

Where the paper leaves a choice, `variant="paper"` takes φ as the identity, adapts every layer, sets
r = 1 where ‖w‖ or ‖u‖ is 0, and clips nothing. The other variants are what libraries made of it:
bundles of keywords, no more, listed in `VARIANTS` and, with their sources, in docs/variants.md.
"""

import math
from collections.abc import Iterable, Iterator
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from largebatch.optim.base import Group
from largebatch.optim.layerwise import lamb_on_cpu
from largebatch.optim.layerwise.chunks import ChunkGroup, Way, descend, norms_of
from largebatch.optim.layerwise.cpu_step import CpuStep
from largebatch.optim.layerwise.optimizer import LayerwiseOptimizer
from largebatch.optim.layerwise.overflows import Overflows
from largebatch.optim.layerwise.step_inputs import SyncedStep
from largebatch.optim.layerwise.step_plan import StepPlan
from largebatch.optim.layerwise.steps_together import StepsTogether
from largebatch.optim.math.adam import chunk_directions, lr_correction
from largebatch.optim.math.bias_correction import rebased
from largebatch.optim.math.tensors import Tensors, average, float_of, scalar, write
from largebatch.optim.math.trust_ratio import UNBOUNDED, Bounds, trust_ratio
from largebatch.optim.options import require_bounds, require_one_of, resolved
from largebatch.optim.sharding.layout import Name, local

PAPER: dict[str, Any] = {
    "bias_correction": "moments",
    "eps_inside_sqrt": False,
    "decay": "update",
    "weight_norm_bounds": UNBOUNDED,
    "trust_bounds": UNBOUNDED,
    "max_grad_norm": math.inf,
    "adapt_undecayed": "always",
    "zero_norm": "one",
}

VARIANTS = MappingProxyType(
    {
        "paper": PAPER,
        "nvlamb": PAPER | {"max_grad_norm": 1.0},
        "apex": PAPER | {"max_grad_norm": 1.0, "adapt_undecayed": "never"},
        "timm": PAPER | {"max_grad_norm": 1.0, "adapt_undecayed": "never"},
        "lambc": PAPER | {"trust_bounds": (0.0, 1.0)},
        "deepspeed": PAPER | {"bias_correction": "lr", "trust_bounds": (0.01, 10.0)},
        "tfa": PAPER | {"adapt_undecayed": "unless_excluded"},
    }
)

# State, where betas have changed: what is added to `step` for the bias correction of m, and of v.
EXTRA_STEPS = tuple(f"{average}_extra_steps" for average in ("exp_avg", "exp_avg_sq"))

# Devices whose torch has one kernel for Adam's moments and direction together.
FUSED_DEVICES = ("cpu", "cuda", "xpu")


class LAMB(LayerwiseOptimizer):
    """Layer-wise adaptive moments (You et al. 2020, Algorithm 2); the module says the formula.

    `lr` is a float or a tensor of one element, read at each step; `betas` are β₁ and β₂;
    `weight_decay` is λ. The keywords, where None stands for what the variant says:

    - `bias_correction`: "moments", m̂ and v̂; "lr", raw m and v in u, and lr·√(1 - β₂ᵗ)/(1 - β₁ᵗ)
      after the trust ratio; or "none".
    - `eps_inside_sqrt`: √(v̂ + ε) instead of √v̂ + ε.
    - `decay`: "update", λw in u and its norm; "gradient", λw added to the clipped gradient, before
      the moments; "decoupled", w ← w - lr λ w beside the step, outside of u and its norm.
    - `weight_norm_bounds`: φ(z) = min(max(z, lowest), highest).
    - `trust_bounds`: (lowest, highest) of r.
    - `max_grad_norm`: g ← g / max(1, ‖g‖ / max_grad_norm), first of all, the norm over all groups.
    - `adapt_undecayed`: which groups with weight_decay 0 have a trust ratio: "always", "never", or
      "unless_excluded" from a decay that is the `weight_decay` the optimizer was built with.
    - `zero_norm`: "one", r = 1 where ‖w‖ or ‖u‖ is 0; "phi", where φ(‖w‖) or ‖u‖ is.
    - `master_weights`: keep an FP32 copy of parameters of a narrower dtype in the state, so that
      steps too small for them are not lost. A weight set from outside afterwards is not seen.

    A group may carry `adapt=False` (r = 1, which makes it AdamW), `norm_groups` and `norm_dim`.
    State of a parameter: `exp_avg` (m), `exp_avg_sq` (v), `step` (t), `master_weight`; where betas
    have changed, `exp_avg_extra_steps` and `exp_avg_sq_extra_steps`, so that the bias correction
    counts the weight that the moments hold.

    Raises ValueError for an option out of range or a parameter it cannot treat, and RuntimeError at
    `step` for a sparse gradient.

    >>> layer = torch.nn.Parameter(torch.tensor([3.0, 4.0, 0.0, 0.0]))
    >>> optimizer = LAMB([("layer", layer)], lr=0.1, weight_decay=0.0)
    >>> layer.grad = torch.tensor([0.1, 0.2, 0.3, 0.4])
    >>> optimizer.step()
    >>> layer.data, optimizer.layer_stats()["layer"]["trust_ratio"]
    (tensor([ 2.7500,  3.7500, -0.2500, -0.2500]), tensor(2.5000))
    """

    _known_state = ("exp_avg", "exp_avg_sq")

    _followed: tuple[StepPlan | None, list[tuple[float, ...]]]

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        *,
        variant: str = "paper",
        bias_correction: str | None = None,
        eps_inside_sqrt: bool | None = None,
        decay: str | None = None,
        weight_norm_bounds: Bounds | None = None,
        trust_bounds: Bounds | None = None,
        max_grad_norm: float | None = None,
        adapt_undecayed: str | None = None,
        zero_norm: str | None = None,
        maximize: bool = False,
        master_weights: bool = False,
    ) -> None:
        given = {
            "bias_correction": bias_correction,
            "eps_inside_sqrt": eps_inside_sqrt,
            "decay": decay,
            "weight_norm_bounds": weight_norm_bounds,
            "trust_bounds": trust_bounds,
            "max_grad_norm": max_grad_norm,
            "adapt_undecayed": adapt_undecayed,
            "zero_norm": zero_norm,
        }
        options = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "master_weights": master_weights,
        }
        self.variant = variant
        super().__init__(params, options | resolved(VARIANTS, variant, given))

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        require_one_of(options, "bias_correction", ("moments", "lr", "none"))
        require_one_of(options, "eps_inside_sqrt", (False, True))
        require_one_of(options, "decay", ("update", "gradient", "decoupled"))
        require_one_of(options, "zero_norm", ("one", "phi"))
        require_bounds(options, "weight_norm_bounds")
        require_bounds(options, "trust_bounds")

    def _has_cpu_way(self, group: Group) -> bool:
        return not group["eps_inside_sqrt"]

    def _make_step(self) -> None:
        plan = self._plan()
        synced = self._sync(plan)
        states = self._make_state(plan)
        self._follow_betas_of(plan)
        self._advance_steps(plan, synced, states)
        if synced.is_skipped:
            return
        on_cpu = self._on_cpu(plan, synced, states)
        ages = self._ages_on_cpu(plan, on_cpu)
        updates: dict[int, Tensors] = {}

        def first(chunks: ChunkGroup) -> tuple[Tensor, Tensor]:
            if chunks.way is not Way.GENERAL:
                return lamb_on_cpu.advance(chunks, on_cpu, chunks.of_places(ages))
            weights = self._weights(chunks)
            update = updates[id(chunks)] = self._update(chunks, weights, synced)
            return norms_of(chunks, weights), norms_of(chunks, update)

        def second(chunks: ChunkGroup, ratio: Tensor) -> None:
            lr = scalar(chunks.group["lr"], ratio)
            scale = lr * ratio * self._late_correction(chunks, ratio)
            if chunks.way is not Way.GENERAL:
                rate = float_of(lr)
                lamb_on_cpu.descend(chunks, on_cpu, chunks.of_places(ages), scale, rate)
            else:
                self._descend(chunks, updates.pop(id(chunks)), scale, lr, synced.skip)

        self._walk(plan, first, second)
        self._overflows.restart(plan, self.state, synced.skip)

    def _update(self, chunks: ChunkGroup, weights: Tensors, synced: SyncedStep) -> Tensors:
        """Advance t, m and v by one gradient, and return u."""
        group = chunks.group
        grads = self._gradients(chunks, synced)
        if group["decay"] == "gradient" and group["weight_decay"]:
            grads = torch._foreach_add(grads, weights, alpha=group["weight_decay"])
        ages = self._ages(chunks)
        exp_avg = self._state_of(chunks, "exp_avg")
        exp_avg_sq = self._state_of(chunks, "exp_avg_sq")
        if group["bias_correction"] != "moments":
            done = [torch.full_like(ages[0][0], math.inf)] * len(chunks.members)  # 1 - βᵗ is then 1
            ages = done, done
        fused = chunks.contiguous and chunks.device.type in FUSED_DEVICES
        # The kernel takes one t for both moments.
        if fused and ages[0] is ages[1] and not group["eps_inside_sqrt"]:
            update = self._fused_direction(chunks, grads, exp_avg, exp_avg_sq, ages[0], synced.skip)
        else:
            beta1, beta2 = group["betas"]
            average(exp_avg, grads, beta1, synced.skip)
            average(exp_avg_sq, torch._foreach_mul(grads, grads), beta2, synced.skip)
            update = chunk_directions(exp_avg, exp_avg_sq, ages, group)
        if group["decay"] == "update" and group["weight_decay"]:
            torch._foreach_add_(update, weights, alpha=group["weight_decay"])
        return update

    def _ages(self, chunks: ChunkGroup) -> tuple[Tensors, Tensors]:
        """The t of m and of v in the bias corrections, for each chunk; one list where they agree.

        They are `step`, and where betas have changed on the way, as many steps as the new ones
        would have needed for the weight that the moments hold.
        """
        states = [self.state[chunk.param] for chunk in chunks.members]
        steps = [state["step"] for state in states]
        if not any(EXTRA_STEPS[0] in state for state in states):
            return steps, steps
        return tuple(
            [
                step + state[key].to(step.device) if key in state else step
                for step, state in zip(steps, states, strict=True)
            ]
            for key in EXTRA_STEPS
        )  # type: ignore[return-value] # two of them

    def _ages_on_cpu(self, plan: StepPlan, on_cpu: CpuStep) -> list[lamb_on_cpu.Ages]:
        """As `_ages`, by place, where all parameters are on the host."""
        if not plan.on_cpu:
            return []
        return lamb_on_cpu.ages_of(self._steps.flat.tolist(), on_cpu.states, EXTRA_STEPS)

    def _follow_betas_of(self, plan: StepPlan) -> None:
        """Follow the betas of a step's parameters, unless all are those of the step before."""
        betas = [tuple(group["betas"]) for group in self.param_groups]
        plan_before, betas_before = self._followed
        if plan_before is not plan or betas_before != betas:
            self._follow_betas(plan.params)
            self._followed = plan, betas

    def _follow_betas(self, params: Iterable[tuple[Group, Tensor]]) -> None:
        """Note in the state by how much betas that have changed make it older or younger."""
        for group, param in params:
            betas, state = tuple(group["betas"]), self.state.get(param, {})
            last = self._last_betas.get(param, betas)
            self._last_betas[param] = betas
            if last == betas or "step" not in state:
                continue
            for key, old, new in zip(EXTRA_STEPS, last, betas, strict=True):
                step: Tensor = state["step"]
                taken = step + state[key].to(step.device) if key in state else step
                state[key] = rebased(taken, old, new) - step

    def _all_params(self) -> Iterator[tuple[Group, Tensor]]:
        return ((group, param) for group in self.param_groups for param in group["params"])

    def _forget_plans(self) -> None:
        super()._forget_plans()
        self._last_betas: dict[Tensor, tuple[float, ...]] = {}
        self._overflows = Overflows()
        self._followed = None, []
        self._steps = StepsTogether()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow_betas(self._all_params())

    def __getstate__(self) -> dict[str, Any]:
        self._follow_betas(self._all_params())
        return super().__getstate__()

    def state_dict(self) -> StateDict:
        """As torch's; betas that were changed since the last step are taken up before."""
        self._follow_betas(self._all_params())
        return super().state_dict()

    def layer_stats(self) -> dict[Name, dict[str, Tensor]]:
        """As of all; and `dropped_elements`: how many of the layer's elements on this rank have
        begun anew since the optimizer was made or loaded, because their second moment had become
        infinite.
        """
        stats = super().layer_stats()
        ratios = [layer["trust_ratio"] for layer in stats.values()]
        none = [torch.zeros_like(ratio, dtype=torch.float32) for ratio in ratios[:1]]
        for name, layer in stats.items():
            layer["dropped_elements"] = self._overflows.dropped.get(name, *none)
        return stats

    def _advance_steps(
        self, plan: StepPlan, synced: SyncedStep, states: list[dict[str, Any]]
    ) -> None:
        """Advance t, the updates that a parameter has had: 0-d, FP32, on its device.

        On a CPU, where a call costs more than the addition, all of them lie in one tensor.
        """
        if plan.on_cpu and not synced.is_skipped:
            self._steps.lay_out(states).add_(1)
            return
        steps = []
        for (_, param), state in zip(plan.params, states, strict=True):
            device = local(param).device
            if "step" not in state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            elif state["step"].device != device:  # as ZeroRedundancyOptimizer loads it
                state["step"] = state["step"].to(device)
            steps.append(state["step"])
        if not steps or synced.is_skipped:
            return
        if synced.skip is None:
            torch._foreach_add_(steps, 1)
        else:
            write(steps, torch._foreach_add(steps, 1), synced.skip)

    def _fused_direction(
        self,
        chunks: ChunkGroup,
        grads: Tensors,
        exp_avg: Tensors,
        exp_avg_sq: Tensors,
        step: Tensors,
        skip: Tensor | None,
    ) -> Tensors:
        """Advance m and v and return m̂ / (√v̂ + ε), by torch's one kernel for all of AdamW.

        From a weight of 0 and with a learning rate of -1, AdamW goes to the direction itself.
        """
        flat = torch.zeros(chunks.numel, dtype=chunks.dtype, device=chunks.device)
        parts = torch.split(flat, [chunk.numel for chunk in chunks.members])
        direction = [part.view(avg.shape) for part, avg in zip(parts, exp_avg, strict=True)]
        beta1, beta2 = chunks.group["betas"]
        torch._fused_adamw_(
            direction,
            grads,
            exp_avg,
            exp_avg_sq,
            [],
            step,
            lr=-1.0,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=chunks.group["eps"],
            amsgrad=False,
            maximize=False,
            found_inf=None if skip is None else skip.to(chunks.device).float(),
        )
        return direction

    def _ratio(self, group: Group, weight_norm: Tensor, update_norm: Tensor) -> Tensor:
        """r = φ(‖w‖) / ‖u‖, bounded."""
        return trust_ratio(
            weight_norm,
            update_norm,
            weight_norm_bounds=group["weight_norm_bounds"],
            trust_bounds=group["trust_bounds"],
            zero_after_phi=group["zero_norm"] == "phi",
            adapt=self._adapts(group),
        )

    def _late_correction(self, chunks: ChunkGroup, ratio: Tensor) -> float | Tensor:
        """The bias correction of each chunk that comes after the ratio, or 1."""
        if chunks.group["bias_correction"] != "lr":
            return 1.0
        ages = [torch.stack([*age]).to(chunks.dtype) for age in self._ages(chunks)]
        return lr_correction(ages[0], ages[1], chunks.group["betas"])

    def _descend(
        self, chunks: ChunkGroup, update: Tensors, scale: Tensor, lr: Tensor, skip: Tensor | None
    ) -> None:
        """w ← w - lr · r · u."""
        group, weights = chunks.group, self._weights(chunks)
        if group["decay"] == "decoupled" and group["weight_decay"]:
            # Of the old weight, and within the one step, so that it is skipped and rounded with it.
            update = torch._foreach_mul(update, scale.unbind())
            decay = torch._foreach_mul(weights, lr * group["weight_decay"])
            torch._foreach_add_(update, decay)
            scale = torch.ones_like(scale)
        descend(chunks, weights, self._params_of(chunks), update, scale, skip)
