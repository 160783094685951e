"""Shampoo: gradients preconditioned by the roots of their Kronecker factors, one per dimension.

Gupta, Koren, Singer 2018, "Shampoo: Preconditioned Stochastic Tensor Optimization",
https://arxiv.org/abs/1802.09568, Algorithm 2; with the running averages, blocks and grafting of
Anil et al. 2020, https://arxiv.org/abs/2002.09018. For a block of order k with gradient G, at its
step t:

    L_i ← β L_i + (1 - β) G_(i) G_(i)ᵀ       for every dimension i, G_(i) G unfolded along it
    m ← β₁ m + (1 - β₁) G,  m̂ = m / (1 - β₁ᵗ)
    R_i = (L_i / (1 - βᵗ) + ridge · λ_max · I)^(-e),  e = 1 / (2k), k the number of factors
    d = m̂ multiplied by R_i along every dimension i
    u = (‖a‖ / ‖d‖) d                         a the step of the grafted method
    w ← w - lr · (u + λ w)

Where we differ: the ridge is relative to each factor's largest eigenvalue λ_max, not an absolute
εI that the sums start from; the norms of the grafting are over the whole tensor, not over a block.
A step's roots are of factors that contain its own gradient, as in the paper.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import (
    BlockAtWork,
    BlockTask,
    advance_factor,
    factor_beta,
    in_basis,
)
from largebatch.optim.blockwise.blocks import Block
from largebatch.optim.blockwise.optimizer import Here, SecondOrderOptimizer
from largebatch.optim.blockwise.refresh import Ask, asked_shapes, refreshed
from largebatch.optim.blockwise.step_stats import BlockDirection, square
from largebatch.optim.blockwise.work_group import BlockedLayer
from largebatch.optim.math.adam import (
    GRAFTINGS,
    WITH_SQUARES,
    corrected,
    grafted_step,
    next_squares,
)
from largebatch.optim.math.decompositions import ByProducts, Decomposition, Outcome
from largebatch.optim.math.matrix_roots import Root, inverse_root
from largebatch.optim.math.root_products import ORDERS, inverse_roots
from largebatch.optim.math.tensors import write
from largebatch.optim.options import require, require_one_of
from largebatch.optim.sharding.layout import local

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Shampoo(SecondOrderOptimizer):
    """Shampoo with grafting (Gupta et al. 2018, Anil et al. 2020); the module says the formula.

    `lr` is a float or a 0-d tensor, read from the group at each step; `betas` are β₁ and β₂, the
    latter that of the grafted method; `weight_decay` is λ. The keywords:

    - `factor_beta`: β; None: β₂; 1: plain sums, L_i ← L_i + G_(i) G_(i)ᵀ, as in the 2018 paper.
    - `grafting`: whose step length is taken: "adam", "rmsprop", "adagrad", "sgd" (that of m̂), or
      "none", u = d.
    - `exponent`: e in place of 1 / (2k): with one factor -1/2, with two -1/4 each.
    - `ridge`: relative to λ_max. From about 1e-7 downwards FP32 has no digits left for it; upwards
      of 1e-3 steps come close to the plain gradient's.
    - `precondition_interval`: steps from root to root of a factor. The factors of different blocks
      have different steps of the interval, so that no step has much more to do than others but the
      first. In the first interval factors are young, and roots are taken more often: once in steps
      2 to 3, 4 to 7, 8 to 15, and so on.
    - `refresh`: "in_step", or "beside": roots are made on the host beside the steps, and come into
      use an interval late (`largebatch.optim.blockwise.refresh`), where a step is not
      to wait for them.
    - `start_preconditioning_step`: until then the grafted method's own step is taken. Where it is
      not below the interval, the first roots are spread over the interval before it.
    - `momentum`, `nesterov`: of the steps u, as in torch's SGD: b ← μ b + u, and b, or u + μ b. It
      averages what β₁ has averaged before; schedulers that cycle a momentum move β₁, not μ.
    - `sides`: "both", or "one": the shorter dimension of a tensor alone has factors, with e = 1/2,
      and the other is not cut (Xie et al. 2025, https://arxiv.org/abs/2503.10537; An et al. 2025,
      https://arxiv.org/abs/2503.20762).
    - `hyperball`: keep a tensor's norm, and step by a fraction of it: lr is the angle
      (`largebatch.optim.blockwise.hyperball`). Needs λ = 0 and `momentum` 0.
    - `decay`: "decoupled", or "l2", λ w added to the gradient.
    - `block_size`: the longest side of a factor; `merge_dims`: see
    `largebatch.optim.blockwise.blocks`.
    - `max_preconditioner_dim`: a longer dimension has no factor, as in the code of SOAP's authors:
      an embedding is preconditioned along its features only, and what is longer in all dimensions
      is stepped by AdamW. None: all have factors; 1,024 tokens' take 1,024 / features times the
      memory of their weights, twice.
    - `tolerated_failures`: roots in a row that may fail, the last good one in their place, before
      the step raises; `failures.total` counts them by layer.
    - `process_group`: plain parameters' work and factors are shared out over its ranks, whose
      gradients must be the same; saving and loading state is then a collective. DTensors need none.

    Tensors with less than two dimensions longer than 1, and groups with `precondition=False`, are
    stepped by AdamW with `betas` and `eps`.

    Raises ValueError for an option out of range or a parameter it cannot treat, and RuntimeError at
    `step` for a sparse gradient; `RootError` at `step` after too many failures.

    >>> matrix = torch.nn.Parameter(torch.ones(2, 2))
    >>> optimizer = Shampoo([matrix], lr=0.1, grafting="none")
    >>> matrix.grad = torch.tensor([[2.0, 0.0], [0.0, 0.5]])
    >>> optimizer.step()
    >>> (1 - matrix.data).round(decimals=4)  # equal singular values, unlike the gradient's
    tensor([[0.1000, 0.0000],
            [0.0000, 0.1000]])
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        factor_beta: float | None = None,
        grafting: str = "adam",
        exponent: float | None = None,
        ridge: float = 1e-5,
        precondition_interval: int = 10,
        refresh: str = "in_step",
        start_preconditioning_step: int = 1,
        momentum: float = 0.0,
        nesterov: bool = False,
        sides: str = "both",
        hyperball: bool = False,
        decay: str = "decoupled",
        block_size: int = 1024,
        merge_dims: bool = True,
        max_preconditioner_dim: int | None = 10_000,
        maximize: bool = False,
        tolerated_failures: int = 3,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "factor_beta": factor_beta,
            "grafting": grafting,
            "exponent": exponent,
            "ridge": ridge,
            "precondition_interval": precondition_interval,
            "refresh": refresh,
            "start_preconditioning_step": start_preconditioning_step,
            "momentum": momentum,
            "nesterov": nesterov,
            "sides": sides,
            "hyperball": hyperball,
            "decay": decay,
            "block_size": block_size,
            "merge_dims": merge_dims,
            "max_preconditioner_dim": max_preconditioner_dim,
            "maximize": maximize,
            "precondition": True,
        }
        super().__init__(params, defaults, process_group, tolerated_failures)

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        beta, exponent = options["factor_beta"], options["exponent"]
        require(beta is None or 0 <= beta <= 1, "factor_beta", "in [0, 1] or None", beta)
        require(exponent is None or 0 < exponent < math.inf, "exponent", "> 0 or None", exponent)
        require(0 < options["ridge"] < 1, "ridge", "in (0, 1)", options["ridge"])
        start = options["start_preconditioning_step"]
        whole = isinstance(start, int) and start >= 1
        require(whole, "start_preconditioning_step", "a whole number >= 1", start)
        require_one_of(options, "grafting", GRAFTINGS)
        require_one_of(options, "nesterov", (False, True))
        if options["hyperball"]:
            momentum = options["momentum"]
            require(momentum == 0, "momentum", "0 with hyperball: β₁ averages", momentum)
        if options["nesterov"]:
            require(options["momentum"] > 0, "momentum", "> 0 with nesterov", options["momentum"])

    def _block_shapes(self, group: Group, block: Block) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"condition": (len(block.shape),)}
        for dim in block.dims:
            n = block.shape[dim]
            shapes |= {f"factor_{dim}": (n, n), f"root_{dim}": (n, n)}
        shapes |= asked_shapes(group, block)
        shapes["exp_avg"] = block.shape
        if group["grafting"] in WITH_SQUARES:
            shapes["grad_sq"] = block.shape
        return shapes

    def _work_on(self, block: BlockAtWork) -> BlockTask:
        """Advance factors, roots when they are due, m, and the grafted method, in this order."""
        group, grad, step = block.group, block.grad, block.step
        (beta1, beta2), start = group["betas"], group["start_preconditioning_step"]
        for dim in block.dims:
            advance_factor(block, dim)
        if block.is_due(start):
            factor, use = partial(corrected_factor, block), partial(self._take_roots, block)
            yield from refreshed(block, start, factor, root_of(block), use)
        mean = block.put("exp_avg", block.state["exp_avg"].lerp(grad, 1 - beta1))
        mean = corrected(mean, beta1, block.ages["exp_avg"])
        squares, grafting = None, group["grafting"]
        if grafting in WITH_SQUARES:
            squares = next_squares(grafting, block.state["grad_sq"], grad, beta2)
            block.put("grad_sq", squares)
        age = block.ages["exp_avg_sq"]
        own = grafted_step(grafting, mean, squares, age, beta2, group["eps"])
        if step < start:
            return BlockDirection(own)
        roots = {dim: block.state[f"root_{dim}"] for dim in block.dims}
        direction = in_basis(mean, roots)  # which are symmetric
        return BlockDirection(direction, None if grafting == "none" else square(own))

    def _take_roots(self, block: BlockAtWork, outcomes: Sequence[Outcome[Root]]) -> None:
        """New roots of the factors; one that fails leaves the last good one."""
        condition = block.state["condition"].clone()
        for dim, outcome in zip(block.dims, outcomes, strict=True):
            root = block.attempt(outcome, dim)
            if root is not None:
                block.put(f"root_{dim}", root.matrix)
                condition[dim] = root.condition
        block.put("condition", condition)

    def _uses_momentum(self, group: Group) -> bool:
        return bool(group["momentum"] > 0)

    def _with_momentum(
        self, layer: BlockedLayer, group: Group, step: Tensor, here: Here, skip: Tensor | None
    ) -> Tensor:
        buffer = here(local(self.state[layer.param]["momentum_buffer"]))
        moved = buffer * group["momentum"] + step
        write([buffer], [moved], skip)
        return step.add(moved, alpha=group["momentum"]) if group["nesterov"] else moved


def corrected_factor(block: BlockAtWork, dim: int) -> Tensor:
    """A dimension's factor without the bias of its start at 0."""
    beta = factor_beta(block.group)
    correction = 1.0 if beta == 1 else 1 - beta ** block.ages["factor"]
    return block.state[f"factor_{dim}"] / correction


def root_of(block: BlockAtWork) -> Ask[Root]:
    """How the root of a dimension's factor is asked for."""
    exponent = block.group["exponent"] or 1 / (2 * len(block.dims))
    p, ridge = 1 / exponent, block.group["ridge"]
    take = partial(inverse_root, p=p, ridge=ridge)

    def by_products(several: Sequence[Sequence[Tensor]]) -> tuple[list[Root], Tensor]:
        return inverse_roots([factor for (factor,) in several], int(p), ridge)

    def ask(factor: Callable[[], Tensor], dim: int) -> Decomposition[Root]:
        kind = "root", p, ridge, block.grad.shape[dim], block.grad.dtype
        way = ByProducts(kind, by_products) if p in ORDERS else None
        return Decomposition(take, lambda: [factor()], block.grad.device, way)

    return ask
