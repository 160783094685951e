"""Inverse roots of many symmetric positive definite matrices at once, by matrix products alone.

For devices without eigendecompositions. A stage takes A, of eigenvalues up to 1, to its square root
and that root's inverse: from Y = A, Z = I,

    P = aI + bG + cG²,  G = ZY,        Y ← YP,  Z ← PZ

are Y → A^(1/2) and Z → A^(-1/2) (Higham 2008, "Functions of Matrices", Theorem 6.9), by any
polynomials that take x = λ^(1/2) to 1 under x ← ax + bx³ + cx⁵: those of
`largebatch.optim.math.newton_schulz`, begun where the smallest eigenvalue asks for it. A further
stage with Y in the place of A has the fourth roots. With a ridge of 1e-5 that is 30 products for
A^(-1/2), 52 for A^(-1/4), and 33 or 35 for what is looked at besides: the largest eigenvalue, to
which the ridge is relative, whether the root holds, and the condition number.

Rounding grows with the condition number as in an eigendecomposition in FP32, and less: the
root A^(-1/4) of 1,024 eigenvalues from 1 to 1e-12 and a ridge of 1e-5 is wrong by 4e-4 of its norm,
where `eigh` leaves 2.5e-3.

What is found holds if Z and Y of every stage are each other's inverse, which an eigenvalue that has
not come to 1 spoils, and R^(p/2) A R^(p/2) is the identity. Where it does not, as where the ridge
is below what the dtype can tell, an eigendecomposition has to be made.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from largebatch.optim.math.matrix_roots import Root, full_precision, smallest_square
from largebatch.optim.math.newton_schulz import COEFFICIENTS, Polynomial

ORDERS = (1, 2, 4, 8)
"""p for which A^(-1/p) is had."""

SQUARINGS = 20
"""Of a matrix, for its largest eigenvalue: the error left is below 1 / 2^20 e by each other one."""
ABOUT = 10
"""For one that is only told."""

_POLYNOMIALS = COEFFICIENTS["polar_express"].polynomials


def _applied(polynomial: Polynomial, x: float) -> float:
    a, b, c = polynomial
    return a * x + b * x**3 + c * x**5


def _least_values() -> list[float]:
    """The smallest x that each polynomial is made for: where the one before has left it."""
    values = [1e-3]
    for polynomial in _POLYNOMIALS[:-1]:
        values.append(_applied(polynomial, values[-1]))
    return values


_LEAST = _least_values()


def polynomials(least: float) -> list[Polynomial]:
    """What takes all x from `least` > 0 to 1 to 1, up to rounding in FP64."""
    start = max((i for i, value in enumerate(_LEAST) if value <= least), default=0)
    chosen, x = [*_POLYNOMIALS[start:]], min(least, _LEAST[start])
    for polynomial in chosen:
        x = _applied(polynomial, x)
    while x < 1 - 1e-12:
        chosen.append(_POLYNOMIALS[-1])
        x = _applied(_POLYNOMIALS[-1], x)
    return chosen


@torch.no_grad()
def inverse_roots(matrices: Sequence[Tensor], p: int, ridge: float) -> tuple[list[Root], Tensor]:
    """(A + ridge · λ_max · I)^(-1/p) of symmetric positive semi-definite A, (n, n) each, and which
    of them hold, (count,) bool. As `inverse_root` in `largebatch.optim.math.matrix_roots`; nothing
    waits for the device.
    """
    unit = torch.stack([*matrices])
    with full_precision(unit.dtype):
        scale = unit.abs().amax(dim=(1, 2))
        scale = torch.where(scale > 0, scale, 1.0)
        unit /= _by_matrix(scale)
        largest = largest_eigenvalues(unit)
        finite = largest.isfinite()  # as is all of what it is made of
        empty = ~(largest * scale >= smallest_square(unit.dtype))
        unit /= _by_matrix(torch.where(empty, 1.0, largest) * (1 + ridge))
        unit.diagonal(dim1=1, dim2=2).add_(ridge / (1 + ridge))
        torch.where(_by_matrix(empty), _identity(unit), unit, out=unit)
        roots, holds = inverse_powers(unit, p, ridge / (1 + ridge))
        condition = torch.where(empty, 1.0, largest_eigenvalues(roots, ABOUT) ** p)
        # In two, as λ_max itself may overflow.
        roots *= _by_matrix((largest * (1 + ridge)) ** (-1 / p) * scale ** (-1 / p))
        torch.where(_by_matrix(empty), _identity(unit), roots, out=roots)
    # A factor that rounding has made indefinite: `inverse_root` takes eigenvalues below 0 for 0.
    holds &= condition <= 1.1 * (1 + 1 / ridge)
    holds &= finite & roots.isfinite().flatten(1).all(dim=1)
    found = [Root(root, each) for root, each in zip(roots, condition, strict=True)]
    return found, holds


def inverse_powers(matrices: Tensor, p: int, least: float) -> tuple[Tensor, Tensor]:
    """A^(-1/p), symmetric, of A (count, n, n) with eigenvalues from `least` to 1, p in `ORDERS`;
    and which hold, (count,) bool.

    Products are as precise as what is set: callers set `full_precision`.
    """
    y, residuals = matrices, []
    least = max(least, torch.finfo(matrices.dtype).eps)  # what is below does not hold in any case
    for _ in range(max(1, p.bit_length() - 1)):
        least = math.sqrt(least)
        y, z = _stage(y, least)
        residuals.append(_distance(z @ y))
    del y
    root = half = (z + z.mT) / 2
    if p == 1:
        root = half @ half
    for _ in range(p.bit_length() - 2):
        half = half @ half
    size = math.sqrt(matrices.shape[-1])
    residuals.append(_distance(half @ matrices @ half) / size)
    tolerance = 4 * torch.finfo(matrices.dtype).eps ** 0.25
    return (root + root.mT) / 2, torch.stack(residuals).amax(dim=0) <= tolerance


def _stage(matrices: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """A^(1/2) and A^(-1/2), where square roots of eigenvalues are from `least` to 1."""
    y, z = matrices, _identity(matrices)
    for number, (a, b, c) in enumerate(polynomials(least)):
        gram = z @ y if number else y
        step = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        del gram  # each is as much as all factors at work
        step.diagonal(dim1=1, dim2=2).add_(a)
        y = y @ step
        z = step @ z if number else step
    return y, z


def largest_eigenvalues(matrices: Tensor, squarings: int = SQUARINGS) -> Tensor:
    """Of symmetric positive semi-definite matrices (count, n, n): (count,). 0 of zeros."""
    power = matrices
    for number in range(squarings + 1):
        trace = power.diagonal(dim1=1, dim2=2).sum(dim=1)
        power = power / _by_matrix(torch.where(trace > 0, trace, 1.0))
        if number < squarings:
            power = power @ power
    return (matrices * power).sum(dim=(1, 2))  # the trace of a product


def _distance(matrices: Tensor) -> Tensor:
    """‖M - I‖ of each, whose diagonal it takes off."""
    matrices.diagonal(dim1=1, dim2=2).sub_(1)
    distances: Tensor = torch.linalg.vector_norm(matrices, dim=(1, 2))
    return distances


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).expand_as(like)


def _by_matrix(values: Tensor) -> Tensor:
    return values[:, None, None]
