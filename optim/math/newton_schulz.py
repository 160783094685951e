"""Newton-Schulz: the orthogonal factor of a matrix, by products of matrices alone.

X → aX + b(XXᵀ)X + c(XXᵀ)²X takes each singular value x of X to p(x) = ax + bx³ + cx⁵ and leaves
the singular vectors: a few such steps bring all of them near 1, from X of norm 1. Two sequences of
polynomials:

- "jordan": 3.4445, -4.7750, 2.0315 at every step (Jordan et al. 2024,
  https://kellerjordan.github.io/posts/muon/): fast, and then between 0.7 and 1.2 for good;
- "polar_express": the best polynomial at each step for singular values from 0.001 to 1 (Amsel et
  al. 2025, https://arxiv.org/abs/2505.16932, Algorithm 1), which converges.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

Polynomial = tuple[float, float, float]

LEAST_NORM: Final = 1e-7
"""Of a matrix: what is smaller is not lifted to length 1, and zeros stay zeros."""

BATCH: Final = 1 << 26
"""Elements that are orthogonalised at once, about."""


@dataclass(frozen=True)
class Sequenced:
    """The polynomials of successive steps, the last of which goes on."""

    polynomials: tuple[Polynomial, ...]
    slack: float = 1.0
    """The matrix is scaled to a norm of 1 / slack, so that rounding takes no singular value above
    what the first polynomial is made for."""

    def of(self, steps: int) -> Iterator[Polynomial]:
        return islice(chain(self.polynomials, repeat(self.polynomials[-1])), steps)


def _safe(polynomials: Sequence[Polynomial], factor: float) -> tuple[Polynomial, ...]:
    """Return p(x / factor) for all but the last, which may then take values up to `factor`."""
    *early, last = polynomials
    return (*((a / factor, b / factor**3, c / factor**5) for a, b, c in early), last)


COEFFICIENTS: Final[Mapping[str, Sequenced]] = MappingProxyType(
    {
        "jordan": Sequenced(((3.4445, -4.7750, 2.0315),)),
        "polar_express": Sequenced(
            _safe(
                (
                    (8.28721201814563, -23.595886519098837, 17.300387312530933),
                    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
                    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
                    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
                    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
                    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
                    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
                    (1.875, -1.25, 0.375),
                ),
                1.01,
            ),
            slack=1.01,
        ),
    }
)


@dataclass(frozen=True)
class NewtonSchulz:
    """How matrices are orthogonalised.

    Attributes:
        steps: of the iteration.
        coefficients: one of `COEFFICIENTS`.
        bf16: whether products are taken in bf16, or in the matrices' own dtype.
    """

    steps: int = 5
    coefficients: str = "jordan"
    bf16: bool = True

    def __call__(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """Return near each matrix, (rows, columns), the orthogonal one, in its own dtype.

        Those of one shape, or of its transpose, go together in batches. Nothing waits for a device.
        """
        alike: dict[tuple[object, ...], list[int]] = {}
        for index, matrix in enumerate(matrices):
            key = (*sorted(matrix.shape), matrix.dtype, matrix.device)
            alike.setdefault(key, []).append(index)
        found: dict[int, Tensor] = {}
        for indices in alike.values():
            size = max(1, BATCH // max(1, matrices[indices[0]].numel()))
            for start in range(0, len(indices), size):
                some = indices[start : start + size]
                batch = self.of_batch(torch.stack([_wide(matrices[index]) for index in some]))
                for index, wide in zip(some, batch.unbind(), strict=True):
                    found[index] = wide if _is_wide(matrices[index]) else wide.T
        return [found[index] for index in range(len(matrices))]

    def of_batch(self, batch: Tensor) -> Tensor:
        """The same of a batch, (count, rows, columns) with no more rows than columns."""
        known = COEFFICIENTS[self.coefficients]
        norm = torch.linalg.vector_norm(batch, dim=(1, 2), keepdim=True)
        x = batch / (known.slack * norm).clamp(min=LEAST_NORM)
        x = x.bfloat16() if self.bf16 else x
        for a, b, c in known.of(self.steps):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        found: Tensor = x.to(batch.dtype)
        return found


def _is_wide(matrix: Tensor) -> bool:
    return matrix.size(0) <= matrix.size(1)


def _wide(matrix: Tensor) -> Tensor:
    return matrix if _is_wide(matrix) else matrix.T
