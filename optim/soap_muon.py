"""SOAP-Muon: SOAP's direction, orthogonalised, for the hidden matrices; AdamW for everything else.

Vyas et al., "Improving SOAP using iterative whitening and Muon",
https://nikhilvyas.github.io/SOAP_Muon.pdf. For a hidden matrix of (rows, columns):

    d = the direction of SOAP (`largebatch.optim.soap`, the basis and m, v, L and R as there)
    U = the orthogonal factor of d (`largebatch.optim.math.newton_schulz`)
    W ← W - lr · (s U + λ W)               s the shape rule of `largebatch.optim.muon`

SOAP whitens the gradient by what it has seen of it so far, and Newton-Schulz whitens what is left.
By default bases are refined at every step, as in the fewest steps to a loss at a fixed batch (2026,
https://github.com/KellerJordan/modded-nanogpt, Track 3).

Where we differ: a matrix is not cut into blocks, and a dimension above `max_preconditioner_dim` has
no factor; hidden matrices are found as Muon finds them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import BlockAtWork
from largebatch.optim.blockwise.blocks import Block, matrices_of
from largebatch.optim.blockwise.hidden_matrices import ADAMW, SPLIT, Given, OfHiddenMatrices
from largebatch.optim.blockwise.step_stats import BlockDirection
from largebatch.optim.muon import check_orthogonal, orthogonal_directions
from largebatch.optim.soap import SOAP

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

UNCUT = {"precondition": True, "merge_dims": True, "block_size": 1, "sides": "both"}
"""Options of SOAP that whole matrices do not have."""


class SOAPMuon(OfHiddenMatrices, SOAP):
    """SOAP-Muon for the hidden matrices, AdamW for the rest; the module says the formula.

    `params`, `adamw`, `groups`, `adamw_lr_ratio`, `adamw_weight_decay`, and a group's `algorithm`
    ("soap_muon" or "adamw"), `norm_groups` and `norm_dim` are as for `Muon`; so are `ns_steps`,
    `coefficients`, `ns_precision` and `shape_rule`. `factor_beta`, `factors`, `hyperball`,
    `precondition_interval`, `refresh`, `tolerated_failures` and `process_group` are as for `SOAP`.
    `betas` and `eps` are of both algorithms.

    - `max_preconditioner_dim`: a longer dimension has no factor; None: all have.

    Raises as `Muon` and `SOAP` do.

    >>> matrix = torch.nn.Parameter(torch.zeros(2, 2))
    >>> optimizer = SOAPMuon([("matrix", matrix)], lr=1.0, ns_precision="fp32", ns_steps=9,
    ...                      coefficients="polar_express")
    >>> for grad in ([[3.0, 1.0], [0.0, 1.0]], [[2.0, 0.0], [1.0, 1.0]]):
    ...     matrix.grad = torch.tensor(grad)
    ...     optimizer.step()
    >>> optimizer.layer_stats()["matrix"]["update_norm"].round(decimals=3)  # 0.2 √2 · √2
    tensor(0.4000)
    """

    algorithm = "soap_muon"

    _cut: ClassVar[tuple[str, ...]] = (
        "algorithm",
        "norm_groups",
        "norm_dim",
        "max_preconditioner_dim",
    )

    def __init__(
        self,
        params: Given,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        factor_beta: float | None = None,
        factors: str = "shampoo",
        precondition_interval: int = 1,
        refresh: str = "in_step",
        max_preconditioner_dim: int | None = 4096,
        ns_steps: int = 5,
        coefficients: str = "jordan",
        ns_precision: str = "bf16",
        shape_rule: str = "match_rms",
        hyperball: bool = False,
        adamw_lr_ratio: float = 1.0,
        adamw_weight_decay: float | None = None,
        adamw: str | Sequence[str] = (),
        groups: Iterable[dict[str, Any]] | None = None,
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
            "factors": factors,
            "update_rms": None,
            "precondition_interval": precondition_interval,
            "refresh": refresh,
            "max_preconditioner_dim": max_preconditioner_dim,
            "ns_steps": ns_steps,
            "coefficients": coefficients,
            "ns_precision": ns_precision,
            "shape_rule": shape_rule,
            "hyperball": hyperball,
            "adamw_lr_ratio": adamw_lr_ratio,
            "maximize": maximize,
            **SPLIT,
        }
        taken = self._read(params, defaults, groups, adamw, adamw_weight_decay)
        # SOAP's own constructor makes its own options.
        super(SOAP, self).__init__(taken, defaults, process_group, tolerated_failures)
        self._require_matrix()

    def _check_options(self, options: dict[str, Any]) -> None:
        super()._check_options({**UNCUT, **options})
        check_orthogonal(options)

    def blocks_in(self, group: Group, shape: Sequence[int]) -> tuple[Block, ...]:
        if group["algorithm"] == ADAMW:
            return ()
        longest = group["max_preconditioner_dim"] or max(shape, default=0)
        return tuple(
            replace(block, dims=tuple(d for d, n in enumerate(block.shape) if n <= longest))
            for block in matrices_of(shape, group["norm_groups"], group["norm_dim"])
        )

    def _work_on_all(self, blocks: Sequence[BlockAtWork]) -> list[BlockDirection]:
        """SOAP's directions, and all of them orthogonalised."""
        found = super()._work_on_all(blocks)
        return orthogonal_directions(blocks, [each.direction for each in found])
