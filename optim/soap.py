"""SOAP: Adam in the eigenbasis of Shampoo's Kronecker factors.

Vyas et al. 2024, "SOAP: Improving and Stabilizing Shampoo using Adam",
https://arxiv.org/abs/2409.11321, Algorithm 3. For a block of order k with gradient G, at step t,
with an orthonormal basis Q_i of every dimension:

    m ← β₁ m + (1 - β₁) G                       in the coordinates of the weights
    G', m'  = G, m in the basis: multiplied by Q_iᵀ along every dimension i
    v ← β₂ v + (1 - β₂) G'²                     in the coordinates of the basis
    d' = m̂' / (√v̂ + ε),  d = d' back in the coordinates of the weights: multiplied by Q_i
    w ← w - lr · (d + λ w)
    L_i ← β L_i + (1 - β) G_(i) G_(i)ᵀ          G_(i) is G unfolded along dimension i
    Q_i ← the Q of L_i Q_i                      once an interval, Algorithm 4

The basis that a step is taken in has not seen its gradient, as in the paper: in a basis of its own
a gradient is diagonal up to rounding, and Adam would scale the rounding up to steps of full length.

With `factors="kl"` (Lin et al. 2025, https://arxiv.org/abs/2509.03378) L_i is what makes the
Kronecker product of all factors nearest, in Kullback-Leibler divergence, to the gradients' second
moment: each factor sees the gradient whitened by the others. For a matrix, with n columns,

    L ← β L + (1 - β) / n · G Q_R Λ_R⁻¹ Q_Rᵀ Gᵀ,  Λ_R = diag(Q_Rᵀ R Q_R)

and R likewise. Λ is without the bias of R's start at 0, and at least 1e-5 of its largest. The first
gradient meets no factor and is whitened by nothing: it gives each factor the k-th part of its own
scale, so that a loss scale changes nothing.

For large batches: KL factors and `precondition_interval=1`, β₁ 0.9, β₂ and β 0.95 (Khona et al.
2026, https://arxiv.org/abs/2607.20548), in conf/optim/kl_soap.yaml. With `update_rms` every layer's
step has that root mean square, 0.2 for AdamW's and Muon's.

Where we differ, and what is left open there:

- The first step has no basis yet. The paper's code skips it; here it is Adam's, in the coordinates
  of the weights. After it the basis is an eigendecomposition, thereafter a QR step at a time; and v
  is what it would be had the first gradient been seen in that basis.
- When a QR step puts the columns of a basis into another order, v is put into that order too, as in
  the paper's code. That the columns turn is left to v's running average to follow. To turn v with
  them, as variances of uncorrelated coordinates (v multiplied by (Q_oldᵀ Q_new)² elementwise), is
  no better: coordinates are correlated, and what leaks from large eigenvalues into small ones holds
  those back for as long as v remembers (36 steps in place of 32 to 1.95 nats on the first text of
  task=bytes at a batch of 16,384). m lies in the coordinates of the weights and needs nothing of
  the kind.
- √v̂ + ε, as in Adam and in the paper's code; its text has √(v + ε).

In the null space of a rank-deficient factor every basis is as good as another, and which one it is
depends on rounding: trajectories of the same run diverge, as they do under another order of
summation. One step from a common state does not.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import (
    BlockAtWork,
    BlockTask,
    advance_factor,
    factor_beta,
    in_basis,
    out_of_basis,
)
from largebatch.optim.blockwise.blocks import Block
from largebatch.optim.blockwise.optimizer import SecondOrderOptimizer
from largebatch.optim.blockwise.refresh import Ask, asked_shapes, refreshed
from largebatch.optim.blockwise.step_stats import BlockDirection, square
from largebatch.optim.math.adam import adam_direction, corrected
from largebatch.optim.math.decompositions import Decomposition, Outcome
from largebatch.optim.math.matrix_roots import (
    Refined,
    eigenbasis,
    refined_basis,
    smallest_square,
)
from largebatch.optim.options import require, require_one_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# In units of the last digit of the largest √v̂: ten times what products with bases leave where a
# gradient has nothing. In FP32 1.2e-4, far below what Shampoo's ridge of 1e-5 λ_max holds back.
NOISE = 1000

# Of a factor's largest eigenvalue: the least that whitens, as Shampoo's ridge.
KL_FLOOR = 1e-5


class SOAP(SecondOrderOptimizer):
    """SOAP (Vyas et al. 2024); the module says the formula.

    `lr` is a float or a 0-d tensor, read from the group at each step; `betas` are β₁ and β₂;
    `weight_decay` is λ. The keywords:

    - `factor_beta`: β; None: β₂.
    - `precondition_interval`: steps from QR to QR of a basis, in other steps for other blocks. In
      the first interval once in steps 2 to 3, 4 to 7, 8 to 15, and so on. 1 is for large batches
      that make spikes: a basis that lags behind far steps fits their gradients badly.
    - `refresh`: "in_step", or "beside": bases are made on the host beside the steps, and come into
      use an interval late (`largebatch.optim.blockwise.refresh`), for devices without
      decompositions.
    - `factors`: "shampoo", or "kl".
    - `update_rms`: the root mean square of every layer's step; None: as it comes.
    - `hyperball`: keep a tensor's norm, and step by a fraction of it: lr is the angle
      (`largebatch.optim.blockwise.hyperball`). Needs λ = 0.
    - `sides`: "both", or "one": the shorter dimension of a tensor alone has factors.
    - `decay`: "decoupled", or "l2", λ w added to the gradient.
    - `block_size`: the longest side of a factor; `merge_dims`: see
    `largebatch.optim.blockwise.blocks`.
    - `max_preconditioner_dim`: a longer dimension has no factor, as in the authors' code: an
      embedding is preconditioned along its features only, and what is longer in all dimensions
      is stepped by AdamW. None: all have factors; 1,024 tokens' take 1,024 / features times the
      memory of their weights, twice.
    - `tolerated_failures`: bases in a row that may fail, the last good one in their place, before
      the step raises; `failures.total` counts them by layer.
    - `process_group`: plain parameters' work and state are shared out over its ranks, whose
      gradients must be the same; saving and loading state is then a collective. DTensors need none.

    Tensors with less than two dimensions longer than 1, and groups with `precondition=False`, are
    stepped by AdamW with `betas` and `eps`.

    Raises ValueError for an option out of range or a parameter it cannot treat, and RuntimeError at
    `step` for a sparse gradient; `RootError` at `step` after too many failures.

    >>> matrix = torch.nn.Parameter(torch.ones(2, 2))
    >>> optimizer = SOAP([matrix], lr=0.1)
    >>> for _ in range(2):  # as Adam; then in the eigenbasis
    ...     matrix.grad = torch.full((2, 2), 0.3)
    ...     optimizer.step()
    ...     print(optimizer.layer_stats()[0]["update_norm"].round(decimals=3))
    tensor(2.)
    tensor(1.)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        factor_beta: float | None = None,
        precondition_interval: int = 10,
        refresh: str = "in_step",
        factors: str = "shampoo",
        update_rms: float | None = None,
        hyperball: bool = False,
        sides: str = "both",
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
            "precondition_interval": precondition_interval,
            "refresh": refresh,
            "factors": factors,
            "update_rms": update_rms,
            "hyperball": hyperball,
            "sides": sides,
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
        beta = options["factor_beta"]
        require(beta is None or 0 <= beta < 1, "factor_beta", "in [0, 1) or None", beta)
        require_one_of(options, "factors", ("shampoo", "kl"))
        rms = options["update_rms"]
        require(rms is None or 0 < rms < math.inf, "update_rms", "> 0 or None", rms)

    def _block_shapes(self, group: Group, block: Block) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"condition": (len(block.shape),)}
        for dim in block.dims:
            n = block.shape[dim]
            shapes |= {f"factor_{dim}": (n, n), f"basis_{dim}": (n, n)}
        shapes |= asked_shapes(group, block)
        return shapes | {"exp_avg": block.shape, "exp_avg_sq": block.shape}

    def _work_on(self, block: BlockAtWork) -> BlockTask:
        """One step of Adam in the basis; then the factors take the gradient in, and the basis the
        factors where it is due."""
        direction = self._direction(block)
        if block.group["factors"] == "kl":
            for dim, factor in kl_factors(block).items():  # all from the factors before
                block.put(f"factor_{dim}", factor)
        else:
            for dim in block.dims:
                advance_factor(block, dim)
        if block.step == 1 or block.is_due(first=1):
            by_dim, use = partial(factor_of, block), partial(self._turn_bases, block)
            yield from refreshed(block, 1, by_dim, basis_of(block), use)
        rms = block.group["update_rms"]
        if rms is None:
            return BlockDirection(direction)
        return BlockDirection(direction, direction.new_full((), rms**2 * direction.numel()))

    def _direction(self, block: BlockAtWork) -> Tensor:
        group, grad, state = block.group, block.grad, block.state
        beta1, beta2 = group["betas"]
        bases = {dim: state[f"basis_{dim}"] for dim in block.dims}
        mean = block.put("exp_avg", state["exp_avg"].lerp(grad, 1 - beta1))
        turned = in_basis(grad, bases)
        squares = block.put("exp_avg_sq", state["exp_avg_sq"].lerp(turned * turned, 1 - beta2))
        squares = corrected(squares, beta2, block.ages["exp_avg_sq"])
        mean = corrected(in_basis(mean, bases), beta1, block.ages["exp_avg"])
        return out_of_basis(adam_direction(mean, squares, group["eps"], root_above_rounding), bases)

    def _turn_bases(self, block: BlockAtWork, outcomes: Sequence[Outcome[Refined]]) -> None:
        """New bases, and v as it belongs to them; one that fails leaves the last good one."""
        bases, condition = {}, block.state["condition"].clone()
        squares = block.state["exp_avg_sq"]
        for dim, outcome in zip(block.dims, outcomes, strict=True):
            basis, found = block.state[f"basis_{dim}"], block.attempt(outcome, dim)
            if found is not None:
                basis = block.put(f"basis_{dim}", found.basis)
                squares = squares.index_select(dim, found.order)
                most = 1 / torch.finfo(condition.dtype).eps  # in FP64 more is seen beside the steps
                condition[dim] = found.condition.clamp(max=most)
            bases[dim] = basis
        if block.step == 1:
            squares = in_basis(block.grad, bases).square_().mul_(1 - block.group["betas"][1])
        block.put("exp_avg_sq", squares)
        block.put("condition", condition)


def factor_of(block: BlockAtWork, dim: int) -> Tensor:
    """A dimension's factor: for a basis its bias does not matter."""
    return block.state[f"factor_{dim}"]


def basis_of(block: BlockAtWork) -> Ask[Refined]:
    """How the next basis of a dimension is asked for."""
    take = first_basis if block.step == 1 else refined_basis

    def ask(factor: Callable[[], Tensor], dim: int) -> Decomposition[Refined]:
        def pair() -> list[Tensor]:
            return [factor(), block.state[f"basis_{dim}"]]

        return Decomposition(take, pair, block.grad.device)

    return ask


def root_above_rounding(squares: Tensor) -> Tensor:
    """Return √v̂, but not below what rounding leaves of the largest in the block."""
    root = squares.sqrt()
    return root.clamp_(min=NOISE * torch.finfo(root.dtype).eps * root.amax())


def kl_factors(block: BlockAtWork) -> dict[int, Tensor]:
    """Return each dimension's next factor, from the gradient whitened by the other factors.

    Each is as many products again as the gradient's way into the basis.
    """
    grad, dims, beta = block.grad, block.dims, factor_beta(block.group)
    weight = 1 - beta ** (block.ages["factor"] - 1)  # of the gradients before this one
    whitening: dict[int, Tensor] = {}
    empty = torch.zeros((), dtype=torch.bool, device=grad.device)
    for dim in dims:
        factor, basis = block.state[f"factor_{dim}"], block.state[f"basis_{dim}"]
        values = (basis * (factor @ basis)).sum(dim=0)
        values = values / weight if weight > 0 else values
        largest = values.amax()
        nothing = largest < smallest_square(values.dtype)
        values = torch.where(nothing, 1.0, values.clamp(min=KL_FLOOR * largest))
        whitening[dim], empty = basis * values.rsqrt(), empty | nothing
    size = square(grad) / grad.numel()
    unseen = empty & (size > 0)
    gauge = torch.where(unseen, torch.where(unseen, size, 1.0) ** (1 / len(dims) - 1), 1.0)
    found = {}
    for dim in dims:
        others = {other: matrix for other, matrix in whitening.items() if other != dim}
        unfolded = in_basis(grad, others).movedim(dim, 0).flatten(1)
        new = (unfolded @ unfolded.T) * (gauge / unfolded.shape[1])
        found[dim] = block.state[f"factor_{dim}"].lerp(new, 1 - beta)
    return found


def first_basis(factor: Tensor, basis: Tensor) -> Refined:
    """An eigenbasis in place of `basis`."""
    return eigenbasis(factor)
