"""Newton-Schulz: the orthogonal factor of a matrix, by products of matrices alone.

X → aX + b(XXᵀ)X + c(XXᵀ)²X takes each singular value x of X to p(x) = ax + bx³ + cx⁵ and leaves
the singular vectors: a few such steps bring all of them near 1, from X of norm 1. Two sequences of
polynomials:

- "jordan": 3.4445, -4.7750, 2.0315 at every step (Jordan et al. 2024,
  https://kellerjordan.github.io/posts/muon/): fast, and then between 0.7 and 1.2 for good;
- "polar_express": the best polynomial at each step for singular values from 0.001 to 1 (Amsel et
  al. 2025, https://arxiv.org/abs/2505.16932, Algorithm 1), which converges.

Where X is long, two steps are taken at once. With G = XXᵀ a step is X ← PX, P = aI + bG + cG², and
then G ← PGP; all of these commute and are of the short side, so that X ← P₂P₁X meets the long one
twice in place of four times. Two things keep it as precise as step by step:

- Not more than two, for X knows nothing of what G is rounded by: it may make small eigenvalues
  negative, and grows by a² a step. The next two begin with the G of their X. In bf16 that takes
  singular values up to 5% too far, which Jordan's polynomial bears for the few steps that it is
  meant for. After three at once, or by polynomials made for values up to 1, they explode.
- P₂P₁ is d (I + V), d the power of two near its diagonal, by which nothing is rounded: a matrix
  near I, or near dI, would be rounded by the largest of its elements.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby, islice, repeat
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
    most_by_twos: int = 0
    """Steps that are few enough to be taken two at once in bf16."""

    def of(self, steps: int) -> Iterator[Polynomial]:
        return islice(chain(self.polynomials, repeat(self.polynomials[-1])), steps)


def _safe(polynomials: Sequence[Polynomial], factor: float) -> tuple[Polynomial, ...]:
    """Return p(x / factor) for all but the last, which may then take values up to `factor`."""
    *early, last = polynomials
    return (*((a / factor, b / factor**3, c / factor**5) for a, b, c in early), last)


COEFFICIENTS: Final[Mapping[str, Sequenced]] = MappingProxyType(
    {
        "jordan": Sequenced(((3.4445, -4.7750, 2.0315),), most_by_twos=6),
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
        length: what the orthogonal matrix is multiplied by.
    """

    steps: int = 5
    coefficients: str = "jordan"
    bf16: bool = True
    length: float = 1.0

    def __call__(self, matrices: Sequence[Tensor]) -> None:
        """Put the orthogonal matrix near it in the place of each, (rows, columns).

        Those of one shape, or of its transpose, go together in batches. Nothing waits for a device.
        """
        alike: dict[tuple[object, ...], list[Tensor]] = {}
        for matrix in sorted(matrices, key=_is_wide):
            key = (*sorted(matrix.shape), matrix.dtype, matrix.device)
            alike.setdefault(key, []).append(matrix)
        for some in alike.values():
            size = max(1, BATCH // max(1, some[0].numel()))
            for start in range(0, len(some), size):
                self.of_batch(some[start : start + size])

    def of_batch(self, matrices: Sequence[Tensor]) -> None:
        """The same of matrices of one shape, and after them of its transpose."""
        known = COEFFICIENTS[self.coefficients]
        shapes = groupby(matrices, key=lambda matrix: matrix.shape)
        xs = [self._units([*some], known.slack) for _, some in shapes]  # which stay as they lie
        sizes, short, long = [len(x) for x in xs], min(xs[0].shape[1:]), max(xs[0].shape[1:])
        gram = xs[0].new_empty(len(matrices), short, short)
        # Two steps at once take 2 long + 5 short products, one by one 4 long + 2 short.
        may = not self.bf16 or self.steps <= known.most_by_twos
        at_once = 2 if may and 2 * long > 3 * short else 1
        polynomials = [*known.of(self.steps)]
        for start in range(0, self.steps, at_once):
            for x, of_x in zip(xs, torch.split(gram, sizes), strict=True):
                torch.bmm(*((x, x.mT) if _is_wide(x) else (x.mT, x)), out=of_x)
            v, beta, d = _product(gram, polynomials[start : start + at_once])
            alpha = self.length if start + at_once >= self.steps else 1.0
            pairs = zip(torch.split(v, sizes), xs, strict=True)
            xs = [_times(of_x, x, beta, alpha) for of_x, x in pairs]
            if d is not None:
                for of_x, x in zip(torch.split(d, sizes), xs, strict=True):
                    x.mul_(of_x)
        for matrix, orthogonal in zip(matrices, chain.from_iterable(xs), strict=True):
            matrix.copy_(orthogonal)

    def _units(self, matrices: Sequence[Tensor], slack: float) -> Tensor:
        """Return matrices of one shape in a batch, each of norm 1 / slack."""
        first = matrices[0]
        dtype = torch.bfloat16 if self.bf16 else first.dtype
        units = first.new_empty((len(matrices), *first.shape), dtype=dtype)
        norms = slack * torch.stack(torch._foreach_norm([*matrices]))
        for unit, matrix, norm in zip(units, matrices, norms.clamp_(min=LEAST_NORM), strict=True):
            torch.div(matrix, norm, out=unit)
        return units


def _product(
    gram: Tensor, polynomials: Sequence[Polynomial]
) -> tuple[Tensor, float, Tensor | None]:
    """Return V, β and d, (count, 1, 1): the steps' P₂P₁ is d (β I + V); one P is β I + V."""
    (a, b, c), *more = polynomials
    v = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    if not more:
        return v, a, None
    half = torch.baddbmm(gram, v, gram, beta=a)
    gram = torch.baddbmm(half, half, v, beta=a)
    d = _centre(v, a)
    ((a, b, c),) = more
    w = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
    d = d * _centre(w, a)
    return (v + w).baddbmm_(w, v), 1.0, d


def _centre(v: Tensor, a: float) -> Tensor:
    """Return d, (count, 1, 1), and make of V that in d (I + V) = aI + V."""
    diagonal = v.diagonal(dim1=1, dim2=2)
    mean = a + diagonal.mean(dim=1, keepdim=True, dtype=torch.promote_types(v.dtype, torch.float32))
    d = mean.log2().round_().exp2_()
    diagonal.sub_(d - a)
    scale = d.to(v.dtype)[..., None]
    v.div_(scale)
    return scale


def _times(v: Tensor, x: Tensor, beta: float, alpha: float) -> Tensor:
    """alpha (beta I + V) X of a symmetric V, along the short side."""
    pair = (v, x) if _is_wide(x) else (x, v)
    return torch.baddbmm(x, *pair, beta=alpha * beta, alpha=alpha)


def _is_wide(matrix: Tensor) -> bool:
    return matrix.size(-2) <= matrix.size(-1)
