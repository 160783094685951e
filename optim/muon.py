"""Muon for the hidden matrices, AdamW for everything else, as one optimizer.

Jordan et al. 2024, "Muon", https://kellerjordan.github.io/posts/muon/. For a hidden matrix of
(rows, columns) with gradient G:

    M ← μ M + (1 - μ) G
    U = the orthogonal factor of μ M + (1 - μ) G, or of M without `nesterov`
    W ← W - lr · (s U + λ W)

U comes from a few steps of Newton-Schulz (`largebatch.optim.math.newton_schulz`), which do not see
the scale of G: M is an average in place of the author's sum, the direction is the same. The shape
rule s makes one learning rate serve all shapes:

    "match_rms"   0.2 √max(rows, columns)    elements move as far as AdamW's, so that both share one
                                             rate: Liu et al. 2025, https://arxiv.org/abs/2502.16982
    "spectral"    √(rows / columns)          outputs change alike, whatever the width: Pethick et
                                             al. 2025, https://arxiv.org/abs/2502.07529
    "original"    √max(1, rows / columns)    Jordan's

The matrices of a tensor are worked on by owners among the ranks, as in
`largebatch.optim.blockwise.optimizer`: one exchange each way for each process group, whatever the
number of matrices; and an owner takes its matrices of one shape together.

Where we differ: state and everything but Newton-Schulz itself are FP32 at least, and a matrix is
scaled to norm 1 in FP32, before it is rounded to bf16.
"""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import BlockAtWork
from largebatch.optim.blockwise.blocks import Block, matrices_of
from largebatch.optim.blockwise.hidden_matrices import ADAMW, SPLIT, Given, OfHiddenMatrices
from largebatch.optim.blockwise.step_stats import BlockDirection
from largebatch.optim.math.newton_schulz import COEFFICIENTS, NewtonSchulz
from largebatch.optim.math.tensors import averaged_momentum
from largebatch.optim.options import require, require_one_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

SHAPE_RULES = ("match_rms", "spectral", "original")
PRECISIONS = ("bf16", "fp32")


def shape_scale(rule: str, rows: int, columns: int) -> float:
    """Return s of a shape rule, what the orthogonal factor of a matrix is multiplied by."""
    if rule == "match_rms":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / columns
    return math.sqrt(ratio if rule == "spectral" else max(1, ratio))


def check_orthogonal(options: Group) -> None:
    """Refuse options of Newton-Schulz, or a shape rule, that there are not."""
    require_one_of(options, "shape_rule", SHAPE_RULES)
    require_one_of(options, "coefficients", tuple(COEFFICIENTS))
    require_one_of(options, "ns_precision", PRECISIONS)
    steps = options["ns_steps"]
    whole = isinstance(steps, int) and 1 <= steps < 100
    require(whole, "ns_steps", "a whole number, 1 to 99", steps)


class Muon(OfHiddenMatrices):
    """Muon for the hidden matrices and kernels, AdamW for the rest; the module says the formula.

    `params` is the model, whose modules tell embeddings and the output head (the model's own
    `get_output_embeddings()`, else its last linear layer that is in no block of an nn.ModuleList);
    or (name, parameter) pairs, or groups of them. `lr` is a float or a 0-d tensor, read from the
    group at each step; `weight_decay` is λ, `momentum` μ. The keywords:

    - `ns_steps`, `coefficients`: of Newton-Schulz: "jordan" or "polar_express".
    - `ns_precision`: what its products are taken in: "bf16", or "fp32" (FP64 for FP64 parameters).
    - `shape_rule`: s: "match_rms", "spectral" or "original".
    - `hyperball`: keep a tensor's norm, and step by a fraction of it: lr is the angle, and s has
      nothing to say (`largebatch.optim.blockwise.hyperball`). Needs λ = 0.
    - `betas`, `eps`: of AdamW.
    - `adamw_lr_ratio`: AdamW's learning rate relative to `lr`.
    - `adamw_weight_decay`: AdamW's weight decay, in groups that have none of their own; None: λ.
    - `adamw`: patterns (`fnmatch`) of names that AdamW takes too. With names alone these beside the
      usual ones (`hidden_matrices.NAMES`), and the last matrix where it has as many rows as an
      embedding.
    - `groups`: beside a model, groups of its parameters, as of `param_groups`; None: one.
    - `process_group`: plain parameters' work and state are shared out over its ranks, whose
      gradients must be the same; saving and loading state is then a collective. DTensors need none.

    Each group says by `algorithm` ("muon" or "adamw") what steps it; a group without it is split by
    what its parameters are. `norm_groups` and `norm_dim` split a group's tensors into matrices of
    their own, as of `param_groups`: queries, keys and values, heads, experts.

    Raises ValueError for parameters without names, no hidden matrix, an option out of range, a
    pattern that matches nothing, a tensor of three or more dimensions with neither a module nor
    `norm_groups`; RuntimeError at `step` for a sparse gradient.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10))
    >>> for group in Muon(model, lr=0.01).param_groups:
    ...     print(group["algorithm"], group["param_names"])
    muon ['1.weight']
    adamw ['0.weight', '1.bias', '2.weight', '2.bias']
    """

    algorithm = "muon"

    _cut: ClassVar[tuple[str, ...]] = ("algorithm", "norm_groups", "norm_dim")

    def __init__(
        self,
        params: Given,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        *,
        ns_steps: int = 5,
        coefficients: str = "jordan",
        ns_precision: str = "bf16",
        shape_rule: str = "match_rms",
        hyperball: bool = False,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        adamw_lr_ratio: float = 1.0,
        adamw_weight_decay: float | None = None,
        adamw: str | Sequence[str] = (),
        groups: Iterable[dict[str, Any]] | None = None,
        maximize: bool = False,
        process_group: "ProcessGroup | None" = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "ns_precision": ns_precision,
            "shape_rule": shape_rule,
            "betas": tuple(betas),
            "eps": eps,
            "hyperball": hyperball,
            "adamw_lr_ratio": adamw_lr_ratio,
            "maximize": maximize,
            **SPLIT,
        }
        taken = self._read(params, defaults, groups, adamw, adamw_weight_decay)
        super().__init__(taken, defaults, process_group, tolerated_failures=0)
        self._require_matrix()

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options(options)
        require_one_of(options, "nesterov", (True, False))
        check_orthogonal(options)

    def blocks_in(self, group: Group, shape: Sequence[int]) -> tuple[Block, ...]:
        if group["algorithm"] == ADAMW:
            return ()
        return matrices_of(shape, group["norm_groups"], group["norm_dim"])

    def _block_shapes(self, group: Group, block: Block) -> dict[str, tuple[int, ...]]:
        return {"momentum": block.shape}

    def _averages(self, has_blocks: bool, group: Group) -> tuple[str, ...]:
        return () if has_blocks else super()._averages(has_blocks, group)

    def _work_on_all(self, blocks: Sequence[BlockAtWork]) -> list[BlockDirection]:
        """Advance M of each matrix, and orthogonalise all of them."""
        updates = []
        for block in blocks:
            mean, group = block.state["momentum"], block.group
            momentum, nesterov = group["momentum"], group["nesterov"]
            update = averaged_momentum(block.grad, mean, momentum, nesterov, block.skip)
            updates.append(update if nesterov else update.clone())
        return orthogonal_directions(blocks, updates)


def orthogonal_directions(
    blocks: Sequence[BlockAtWork], updates: Sequence[Tensor]
) -> list[BlockDirection]:
    """Return s U of each block's update, by the options of its group; those alike together.

    Args:
        updates: written over.
    """
    matrices = [update.flatten(1) for update in updates]
    alike: dict[NewtonSchulz, list[Tensor]] = {}
    for block, matrix in zip(blocks, matrices, strict=True):
        alike.setdefault(method_of(block.group, matrix), []).append(matrix)
    for method, some in alike.items():
        method(some)
    pairs = zip(matrices, updates, strict=True)
    return [BlockDirection(matrix.reshape(update.shape)) for matrix, update in pairs]


def method_of(group: Group, matrix: Tensor) -> NewtonSchulz:
    return NewtonSchulz(
        group["ns_steps"],
        group["coefficients"],
        group["ns_precision"] == "bf16",
        shape_scale(group["shape_rule"], *matrix.shape),
    )
