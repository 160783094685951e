"""K-FAC: gradients preconditioned by the curvature of each layer, in Kronecker factors.

Martens, Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature",
https://arxiv.org/abs/1503.05671. For a layer whose gradient is the matrix D, with the factors A of
its inputs and G of its outputs' gradients (`largebatch.optim.kronecker.statistics` says which, and
why their scale depends neither on the batch size nor on how a batch is split):

    A ← running average of A        G ← running average of G         bias-corrected
    U = (G + s_G)⁻¹ D (A + s_A)⁻¹   new inverses once an interval  (`kronecker.damping`)
    U ← r U                         grafting: r gives U the norm of another rule's step, or is 1
    U ← k U                         KL clip: k = min(1, √(κ / lr² Σ ⟨U, D⟩)), over all layers
    w ← w - lr · rule(U) - lr λ w   a first-order rule on U as on a gradient  (`kronecker.rules`)

Parameters without such curvature (norms, biases on their own, tied ones, other modules) are moved
by another first-order rule on their gradient: AdamW, unless said otherwise.

Where this differs from the paper: factors of a running average with bias correction; decoupled
weight decay; no automatic choice of damping, learning rate and momentum from the quadratic model,
which costs further passes; no block-tridiagonal form.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from largebatch.optim.base import Group
from largebatch.optim.blockwise.work_group import DROPPED
from largebatch.optim.kronecker.damping import Damping
from largebatch.optim.kronecker.factors import ask_of, average, new_roots, roots_of
from largebatch.optim.kronecker.layers import Layer
from largebatch.optim.kronecker.optimizer import KroneckerOptimizer
from largebatch.optim.kronecker.rules import RULES, Rule, rule_of
from largebatch.optim.kronecker.work_group import KroneckerWorkGroup, LayerSums, Move, stats_of
from largebatch.optim.math.adam import WITH_SQUARES, corrected, grafted_step, next_squares
from largebatch.optim.math.decompositions import Decomposition, decompose
from largebatch.optim.math.matrix_roots import TOLERATED_FAILURES
from largebatch.optim.math.tensors import compute_dtype, root, scalar, without_too_large, write
from largebatch.optim.options import require
from largebatch.optim.sharding.layout import Name, local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class KFAC(KroneckerOptimizer):
    """Kronecker-factored approximate curvature (Martens, Grosse 2015); the module says the formula.

    It works in a plain loop: mean loss, `loss.backward()`, `step()`. The model's passes are watched
    by hooks, so it is to be called as a module, and sharded before the optimizer is made. Losses
    are scaled such that `p.grad` at the step is that of the mean over all items of the step, as
    `loss / accumulation` and the averages of DDP and FSDP2 make it. Items are samples, counted by
    the leading dimension of what the model returns; where the mean is over something else, tokens
    or what a mask leaves of them, say `items(number)` for each pass.

    `lr` is a float or a 0-d tensor, read from the group at each step, as are the options that are
    not of the whole optimizer. In any group:

    - `betas`, `eps`: of the rules "average" and "adam", and of grafting to Adam.
    - `weight_decay`: λ, decoupled: w ← w - lr λ w beside the step.
    - `momentum`, `nesterov`: of the rule "sgd". OneCycleLR and CyclicLR cycle `betas[0]`, which
      "sgd" does not read: give them `cycle_momentum=False`, or cycle `momentum` yourself.
    - `damping`: λ of the Kronecker factors; `relative_damping`: times their mean eigenvalues, so
      that it means the same whatever the scale of gradients. `final_damping`: where it is after
      `damping_items` items, moving geometrically; None: it stays. `ridge`: the least damping,
      relative to the largest eigenvalue.
    - `form`: "factored_cholesky", by Cholesky factors; "factored_eigen", the same by eigenvectors,
      which take four times as long; "exact", damping the product of the factors (see
      `kronecker.damping`).
    - `factor_decay`: what remains of the running averages at an update of them.
    - `graft`: whose step gives the preconditioned gradient of a layer its norm (`math.adam`),
      with moments of its own; or "none".
    - `kl_clip`: κ, or None. Over the layers of all groups, and the same in all.

    Of the whole optimizer:

    - `rule`: what moves the weights along preconditioned gradients, and `fallback` along those of
      other parameters: a name in `kronecker.rules.RULES` or a `Rule` of your own.
    - `fallback_lr_ratio`: the learning rate of `fallback` relative to `lr`.
    - `fisher`: "empirical", from the gradients of training, or "true", from labels sampled from the
      model, for which `fisher_backward` is to be called in every step.
    - `factor_interval`, `inverse_interval`: steps between updates of the averages, and of a layer's
      inverses; layers take turns within the interval, and more often in the first steps.
    - `refresh`: "in_step", or "beside": inverses are made on the host beside the steps, and come
      into use an interval late, but for those of the first interval; where a step is
      not to wait for them.
    - `max_factor_size`: of a larger factor the diagonal is kept.
    - `tolerated_failures`: decompositions of one layer that may fail in a row; it keeps the last
      good one meanwhile. `failures.total` counts them.
    - `params`: parameter groups, as of `largebatch.optim.param_groups`; None: one of all.
    - `process_group`: whose ranks average the gradients of parameters that are plain tensors, as
      DDP does; that of a model wrapped in DDP is known, as are the meshes of DTensors.

    State of a parameter: `step` and what its rule keeps; `graft_exp_avg`, `graft_exp_avg_sq`; how
    many elements of its gradients were above 1.8e16, whose squares FP32 cannot add up, and counted
    as 0, `dropped_elements` (of this rank's part). Of a layer's weight, on the rank that works on
    it: `factor_in`, `factor_out`, `factor_weight`, `items`, what the form makes of them,
    `condition`, and `dropped_updates`, of the averages by sums that were not finite.

    Raises ValueError for an option out of range or a parameter it cannot treat, RuntimeError at
    `step` for a sparse gradient, and RootError for a layer that keeps failing.

    >>> model = torch.nn.Linear(2, 1, bias=False)
    >>> before = torch.nn.init.zeros_(model.weight).detach().clone()
    >>> optimizer = KFAC(model, lr=0.1, damping=1e-6, graft="none")
    >>> (model(torch.tensor([[1.0, 0.0], [0.0, 10.0]])) - 1).square().mean().backward()
    >>> optimizer.step()
    >>> moved = (model.weight - before) * torch.tensor([1.0, 10.0])
    >>> bool(torch.isclose(*moved[0], rtol=0.1))  # as far for either feature, whatever its unit
    True
    """

    _OWN = (*KroneckerOptimizer._OWN, "_rule", "_fallback", "_fallback_lr_ratio")

    def __init__(
        self,
        model: nn.Module,
        lr: float | Tensor,
        betas: tuple[float, float] = (0.5, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        damping: float = 0.03,
        relative_damping: bool = True,
        final_damping: float | None = None,
        damping_items: float | None = None,
        ridge: float = 1e-6,
        form: str = "factored_cholesky",
        factor_decay: float = 0.95,
        graft: str = "adam",
        kl_clip: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
        rule: str | Rule = "average",
        fallback: str | Rule = "adam",
        fallback_lr_ratio: float = 1.0,
        fisher: str = "empirical",
        factor_interval: int = 1,
        inverse_interval: int = 10,
        refresh: str = "in_step",
        max_factor_size: int = 4096,
        tolerated_failures: int = TOLERATED_FAILURES,
        maximize: bool = False,
        params: ParamsT | None = None,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "damping": damping,
            "relative_damping": relative_damping,
            "final_damping": final_damping,
            "damping_items": damping_items,
            "ridge": ridge,
            "form": form,
            "factor_decay": factor_decay,
            "graft": graft,
            "kl_clip": kl_clip,
            "momentum": momentum,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        options = {
            "fisher": fisher,
            "factor_interval": factor_interval,
            "inverse_interval": inverse_interval,
            "refresh": refresh,
            "max_factor_size": max_factor_size,
        }
        require(0 <= fallback_lr_ratio < math.inf, "fallback_lr_ratio", ">= 0", fallback_lr_ratio)
        self._rule, self._fallback = rule_of("rule", rule), rule_of("fallback", fallback)
        self._fallback_lr_ratio = fallback_lr_ratio
        super().__init__(model, params, defaults, options, tolerated_failures, process_group)

    def _essentials(self) -> dict[str, Any]:
        ours = {"rule": self._rule, "fallback": self._fallback}
        known = {id(rule): name for name, rule in RULES.items()}
        names = {option: known.get(id(rule), rule) for option, rule in ours.items()}
        return {**names, "fallback_lr_ratio": self._fallback_lr_ratio}

    def layer_stats(self) -> dict[Name, dict[str, Tensor]]:
        """Numbers of the layers with curvature in the last step, by the name of their weight.

        0-d tensors on the device: `weight_norm` before the step and `update_norm`, of U as it goes
        to the rule, over weight and bias; `trust_ratio`, what grafting and KL clip have multiplied
        it by; `cosine`, of its angle with the plain gradient; `condition_number`, of A ⊗ G as
        damped when it was last decomposed. After a step masked by `found_inf` they are void.
        """
        return dict(self._stats)

    def _make_step(self) -> None:
        self._find()
        self._share()
        self._agree_on_uses()
        self._reports.heed()
        self._refuse_sparse()
        self._say_once()
        self._stats = {}
        takes_factors = self._schedule.begin()
        skip = self._agreed_skip()
        self._count_step(skip)
        self._update_factors(takes_factors, skip)
        self._refresh_roots(skip)
        moves = [self._precondition(work_group, skip) for work_group in self._work_groups]
        clip = self._kl_clip(moves)
        for move in moves:
            self._move_layers(move, clip, skip)
        self._move_others(skip)
        moved = [param for _, param in self._moved()]
        self._statistics.active = self._schedule.end(moved, skip)

    # The phases of a step -----------------------------------------------------------------------

    def _keys(self, param: Tensor, group: Group) -> tuple[str, ...]:
        """The state tensors that are shaped like the parameter."""
        if param not in self._preconditioned:
            return self._fallback.keys
        return (*self._rule.keys, *graft_keys(group))

    def _update_factors(self, now: bool, skip: Tensor | None) -> None:
        """Take in what the passes since the last step have left, or throw it away."""
        sums, items = self._statistics.take()
        loss_scale = self._take_loss_scale()
        if not now:
            return
        for work_group in self._work_groups:
            total, num_items = work_group.add_up(sums, items)
            divisor = work_group.size * scalar(loss_scale, num_items)
            scale = num_items / divisor.square()
            for layer in work_group.owned:
                if layer in total and self._has_factors(layer):
                    state, group = self.state[layer.weight], self._group_of[layer.weight]
                    decay = group["factor_decay"]
                    average(layer, state, total[layer], num_items, scale, decay, skip)

    def _refresh_roots(self, skip: Tensor | None) -> None:
        """New inverses for the layers whose turn it is.

        A decomposition waits for the device in any case, so here alone `skip` is looked at: a layer
        whose turn falls on a skipped step has it in the next.
        """
        due = self._schedule.due(layer for layer in self._owned() if self._has_factors(layer))
        if not due or (skip is not None and bool(skip)):
            return
        beside = self._options["refresh"] == "beside"
        late = [layer for layer in due if beside and not self._schedule.is_young(layer)]
        now = [layer for layer in due if layer not in late]
        asked = [self._asked_roots(layer) for layer in now]
        outcomes = dict(zip(now, decompose(asked), strict=True))
        for layer in late:
            kept = [self._asked_roots(layer, of_asked=True)]
            (outcomes[layer],) = self._beside.take(layer.weight, kept)
        for layer in due:
            alone = self._placements[layer.weight].group is None  # else all raise, at the next step
            found = self.failures.attempt(outcomes[layer], layer.name, raises=alone)
            self.state[layer.weight].update(found or {})
            if beside:
                self._ask_beside(layer, is_young=layer in now)
            self._schedule.mark_refreshed(layer)

    def _ask_beside(self, layer: Layer, is_young: bool) -> None:
        """Keep what the next inverses are of, and have them made beside the steps."""
        ask_of(layer, self.state[layer.weight], self._damping(layer).value)
        if is_young:  # so the next may be, too
            self._beside.forget(layer.weight)
        else:
            self._beside.begin(layer.weight, [self._asked_roots(layer, of_asked=True)])

    def _asked_roots(
        self, layer: Layer, *, of_asked: bool = False
    ) -> Decomposition[dict[str, Tensor]]:
        state, form = self.state[layer.weight], self._group_of[layer.weight]["form"]
        return new_roots(layer, form, self._damping(layer), state, of_asked=of_asked)

    def _damping(self, layer: Layer) -> Damping:
        state, group = self.state[layer.weight], self._group_of[layer.weight]
        value, final = group["damping"], group["final_damping"]
        if final is not None:
            value = value * (final / value) ** (state["items"] / group["damping_items"]).clamp(
                max=1
            )
        return Damping(value, group["relative_damping"], group["ridge"])

    def _precondition(self, work_group: KroneckerWorkGroup, skip: Tensor | None) -> Move:
        """U of a work group's layers, as far as it lies here, and the norms over all ranks."""
        gradients: dict[Tensor, Tensor | None] = {
            param: self._gradient(param, skip) for param in work_group.params
        }
        numbers = LayerSums(work_group.layers, work_group.dtype, work_group.device)
        for layer in work_group.layers:
            for param in layer.params:
                weight, gradient = local(param).to(work_group.dtype), gradients[param]
                numbers.add(layer, "weight", weight.square().sum() / work_group.copies[param])
                if gradient is not None and self._group_of[param]["graft"] != "none":
                    step = self._graft(param, gradient, skip)
                    numbers.add(layer, "grafted", step.square().sum() / work_group.copies[param])
        roots = {}
        for layer in work_group.owned:
            if self._has_factors(layer):
                state = self.state[layer.weight]
                roots[layer] = roots_of(layer, state)
                numbers.add(layer, "condition", state["condition"][0])
        failed = self._reports.own(work_group)
        parts, failed = work_group.precondition(gradients, roots, numbers, failed)
        self._reports.receive(work_group, failed)
        ratios = {}
        for layer in work_group.layers:
            found = numbers.of(layer)
            grafts = self._group_of[layer.weight]["graft"] != "none"
            ratio = root(found["grafted"]) / root(found["update"]) if grafts else found["scale"]
            ratios[layer] = torch.where(found["update"] > 0, ratio, 1.0)
        return Move(parts, numbers, ratios)

    def _gradient(self, param: Tensor, skip: Tensor | None) -> Tensor | None:
        """The local part of the gradient to descend along, unscaled, FP32 or wider.

        Without elements whose squares overflow, which are counted.
        """
        if param.grad is None:
            return None
        gradient, dropped = without_too_large(self._unscaled_gradient(param))
        total = self.state[param][DROPPED]
        write([total], [total + dropped], skip)
        return -gradient if self._group_of[param]["maximize"] else gradient

    def _graft(self, param: Tensor, gradient: Tensor, skip: Tensor | None) -> Tensor:
        """The grafted rule's own step, on the gradient itself."""
        state, group = self.state[param], self._group_of[param]
        grafting, (beta1, beta2) = group["graft"], group["betas"]
        step = self._schedule.counts.of(param, state) + 1
        before = [local(state[key]) for key in graft_keys(group)]
        after = [before[0].lerp(gradient, 1 - beta1)]
        if grafting in WITH_SQUARES:
            after.append(next_squares(grafting, before[1], gradient, beta2))
        squares = after[1] if len(after) > 1 else None
        mean = corrected(after[0], beta1, step)
        grafted = grafted_step(grafting, mean, squares, step, beta2, group["eps"])
        write(before, after, skip)
        return grafted

    def _kl_clip(self, moves: Sequence[Move]) -> Tensor | None:
        """k = min(1, √(κ / lr² Σ ⟨U, D⟩)), over all layers."""
        limit = self.param_groups[0]["kl_clip"]
        if limit is None or not moves:
            return None
        total = torch.zeros_like(moves[0].numbers.table[0, 0])
        for move in moves:
            for layer, ratio in move.ratios.items():
                product = move.numbers.of(layer)["product"] * ratio
                lr = scalar(self._group_of[layer.weight]["lr"], product)
                total += (product * lr.square()).to(total)
        return torch.where(total > limit, root(limit / total), 1.0)

    def _move_layers(self, move: Move, clip: Tensor | None, skip: Tensor | None) -> None:
        factors: dict[Tensor, Tensor] = {}
        for layer, ratio in move.ratios.items():
            factor = ratio if clip is None else ratio * clip.to(ratio)
            factors |= dict.fromkeys(layer.params, factor)
            if layer.weight.grad is not None:
                self._stats[self._names[layer.weight]] = stats_of(move.numbers.of(layer), factor)
        for param, part in move.parts:
            if param.grad is not None:
                update = part.to(compute_dtype(param))
                self._descend(param, update * factors[param].to(update), self._rule, 1.0, skip)

    def _move_others(self, skip: Tensor | None) -> None:
        for _, param in self._moved():
            if param not in self._preconditioned:
                gradient = self._gradient(param, skip)
                assert gradient is not None
                self._descend(param, gradient, self._fallback, self._fallback_lr_ratio, skip)

    def _descend(
        self, param: Tensor, gradient: Tensor, rule: Rule, lr_ratio: float, skip: Tensor | None
    ) -> None:
        """One step of a rule along a gradient, and of weight decay."""
        state, group = self.state[param], self._group_of[param]
        own = {key: local(state[key]) for key in rule.keys}
        step = self._schedule.counts.of(param, state) + 1
        direction, after = rule.advance(gradient, own, group, step)
        lr = scalar(group["lr"], direction) * lr_ratio
        weight = local(param).to(direction.dtype)
        moved = weight - lr * direction
        if group["weight_decay"]:
            moved -= lr * group["weight_decay"] * weight
        write([*own.values(), local(param)], [*(after[key] for key in own), moved], skip)


def graft_keys(group: Group) -> tuple[str, ...]:
    """The state that grafting takes, shaped like the parameter."""
    if group["graft"] == "none":
        return ()
    squares = ("graft_exp_avg_sq",) if group["graft"] in WITH_SQUARES else ()
    return ("graft_exp_avg", *squares)
