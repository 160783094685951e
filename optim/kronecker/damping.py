"""Damped inverses of Kronecker factors: what (A ⊗ G + λ)⁻¹ is taken to be.

    factored    (A + s_A)⁻¹ ⊗ (G + s_G)⁻¹    s_A = π √λ, s_G = √λ / π, π² = mean eig A / mean eig G
    exact       (A ⊗ G + λ)⁻¹                in the eigenbases of A and G

Factored damping with π from the traces is that of Martens, Grosse 2015, section 6.3. The forms
"factored_eigen" and "factored_cholesky" compute the same preconditioner by eigenvectors and by
Cholesky factors; "exact" is another, that of George et al. 2018 without their rescaling, and of
libraries that call it "eigen".

λ is the damping itself, or relative: the damping times mean eig A · mean eig G, the mean eigenvalue
of A ⊗ G. Relative, s_A is √damping · mean eig A and s_G is √damping · mean eig G, and the
preconditioner does not change its shape when gradients shrink.

However small λ is, s_A is at least `ridge` times the norm ‖A‖_F, hence times the largest eigenvalue
of A, and s_G likewise; for "exact" λ is at least `ridge` times the largest product of eigenvalues.
Below that, eigenvalues are rounding. A factor that is zero, of a layer without samples, has the
identity as its inverse.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from largebatch.optim.math.matrix_roots import (
    ASKED,
    LEFT,
    RootError,
    full_precision,
    of_eigen,
    smallest_square,
    symmetric_eigen,
)
from largebatch.optim.math.root_products import ABOUT, inverse_powers, largest_eigenvalues
from largebatch.optim.math.tensors import is_finite

FORMS = ("factored_eigen", "factored_cholesky", "exact")
FORMER_FORMS = {"eigen": "factored_eigen", "inverse": "factored_cholesky"}
"""By the names that older state dicts have for them."""


@dataclass(frozen=True)
class Damping:
    value: float | Tensor
    relative: bool
    ridge: float


def split(
    damping: Damping, factor_in: Tensor, factor_out: Tensor, diagonal: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """s_A, s_G and λ of each group, shape (groups,)."""
    mean_in, mean_out = (  # eigenvalues
        (factor if kept else factor.diagonal(dim1=1, dim2=2)).mean(dim=1)
        for factor, kept in zip((factor_in, factor_out), diagonal, strict=True)
    )
    if damping.relative:
        root = damping.value**0.5
        shift_in, shift_out = root * mean_in, root * mean_out
        total = damping.value * mean_in * mean_out
    else:
        least = smallest_square(mean_in.dtype)
        both = (mean_in >= least) & (mean_out >= least)
        pi = torch.where(both, mean_in.sqrt() / mean_out.sqrt(), 1.0)
        shift_in, shift_out = pi * damping.value**0.5, damping.value**0.5 / pi
        total = torch.zeros_like(mean_in) + damping.value
    floor_in, floor_out = (damping.ridge * _norm(factor) for factor in (factor_in, factor_out))
    return torch.maximum(shift_in, floor_in), torch.maximum(shift_out, floor_out), total


def _norm(factor: Tensor) -> Tensor:
    """‖F‖_F of each group's factor, whose squares may neither underflow nor overflow."""
    dims = [*range(1, factor.dim())]
    largest = factor.abs().amax(dim=dims, keepdim=True)
    scaled = factor / torch.where(largest > 0, largest, 1.0)
    norms: Tensor = torch.linalg.vector_norm(scaled, dim=dims) * largest.reshape(-1)
    return norms


Roots = dict[str, Tensor]
"""What a step needs of a layer's factors, by name, as it is kept in the state."""


def decomposed(
    form: str, damping: Damping, factor_in: Tensor, factor_out: Tensor, diagonal: tuple[bool, bool]
) -> Roots:
    """The damped inverses of a layer's factors, or what stands for them.

    Returns:
        "condition": the condition number of A ⊗ G as damped, in the 2-norm for "factored_eigen"
        and "exact", in the 1-norm for "factored_cholesky", the worst of the groups, 0-d. For a
        factored form "inverse_in" and "inverse_out", else bases (none of a diagonal), eigenvalues
        and "shift", λ.

    Raises:
        RootError: a factor has no decomposition, in FP64 neither, or its dtype does not hold it.
    """
    factors = {"in": factor_in, "out": factor_out}
    shift_in, shift_out, total = split(damping, factor_in, factor_out, diagonal)
    roots: Roots = {}
    if form == "exact":
        for (side, factor), kept in zip(factors.items(), diagonal, strict=True):
            eigenvalues, basis = (factor, None) if kept else _eigen(factor)
            roots[f"eigenvalues_{side}"] = eigenvalues
            if basis is not None:
                roots[f"basis_{side}"] = basis
        roots["shift"] = torch.maximum(total, damping.ridge * _largest_product(roots))
        denominators = _denominators(roots)
        _require_finite(1 / denominators)
        extremes = denominators.amax(dim=(1, 2)) / denominators.amin(dim=(1, 2))
        return roots | {"condition": extremes.max()}
    conditions = []
    for (side, factor), kept, shift in zip(
        factors.items(), diagonal, (shift_in, shift_out), strict=True
    ):
        inverse, condition, _ = _inverse(form, factor, kept, shift)
        _require_finite(inverse)
        _require_finite(condition)  # not, where the damping has overflown
        roots[f"inverse_{side}"] = inverse
        conditions.append(condition)
    return roots | {"condition": (conditions[0] * conditions[1]).max()}


def inverses_by_products(
    form: str, damping: Damping, factor_in: Tensor, factor_out: Tensor, diagonal: tuple[bool, bool]
) -> tuple[Roots, Tensor]:
    """As `decomposed` does for a factored form, by matrix products and without waiting.

    Returns:
        The inverses, with the "condition" of each group, (groups,), and whether both of a group's
        hold, (groups,) bool. Of many layers alike at once, as if they were groups of one.
    """
    *shifts, _ = split(damping, factor_in, factor_out, diagonal)
    roots: Roots = {}
    condition, hold = torch.ones_like(shifts[0]), torch.ones_like(shifts[0], dtype=torch.bool)
    for side, factor, kept, shift in zip(
        ("in", "out"), (factor_in, factor_out), diagonal, shifts, strict=True
    ):
        inverse, its, holds = _inverse(form, factor, kept, shift, damping.ridge)
        roots[f"inverse_{side}"] = inverse
        condition, hold = condition * its, hold & holds & inverse.isfinite().flatten(1).all(dim=1)
    return roots | {"condition": condition}, hold


@full_precision()
def precondition(roots: Roots, gradient: Tensor) -> Tensor:
    """(A ⊗ G + λ)⁻¹ on gradients laid out as matrices, (groups, out, in)."""
    if "shift" not in roots:
        inverse_in, inverse_out = roots["inverse_in"], roots["inverse_out"]  # both symmetric
        is_diagonal = inverse_out.dim() == 2
        half = inverse_out.unsqueeze(2) * gradient if is_diagonal else inverse_out @ gradient
        return half * inverse_in.unsqueeze(1) if inverse_in.dim() == 2 else half @ inverse_in
    basis_in, basis_out = roots.get("basis_in"), roots.get("basis_out")
    rotated = gradient if basis_out is None else basis_out.mT @ gradient
    rotated = rotated if basis_in is None else rotated @ basis_in
    rotated = rotated / _denominators(roots)
    rotated = rotated if basis_in is None else rotated @ basis_in.mT
    return rotated if basis_out is None else basis_out @ rotated


def _largest_product(roots: Roots) -> Tensor:
    return roots["eigenvalues_in"].amax(dim=1) * roots["eigenvalues_out"].amax(dim=1)


def _denominators(roots: Roots) -> Tensor:
    """The eigenvalues of A ⊗ G + λ, (groups, out, in); 1 where there is nothing to divide by."""
    products = roots["eigenvalues_out"].unsqueeze(2) * roots["eigenvalues_in"].unsqueeze(1)
    damped = products + roots["shift"].reshape(-1, 1, 1)
    largest = _largest_product(roots)
    empty = largest < smallest_square(largest.dtype)
    return torch.where(empty.reshape(-1, 1, 1), 1.0, damped)


def _inverse(
    form: str, factor: Tensor, diagonal: bool, shift: Tensor, least: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(factor + shift)⁻¹, the condition number and whether they hold, of each group.

    By factors scaled by their largest entry; one whose largest is below 1e-36 is zero.

    Args:
        least: of shift / ‖factor‖_F, to invert by matrix products; else by decompositions.
    """
    dims = [*range(1, factor.dim())]
    largest = factor.abs().amax(dim=dims, keepdim=True)
    empty = largest < smallest_square(factor.dtype)
    scale = torch.where(empty, 1.0, largest)
    shift = torch.where(empty, 1.0, shift.reshape(scale.shape) / scale).reshape(-1, 1)
    scaled = torch.where(empty, 0.0, factor / scale)
    hold = torch.ones_like(shift[:, 0], dtype=torch.bool)
    if diagonal:
        damped = scaled + shift
        inverse, condition = 1 / damped, damped.amax(dim=1) / damped.amin(dim=1)
    elif least is None:
        inverse, condition = _decomposed_inverse(form, scaled, shift)
    else:
        inverse, condition, hold = _inverse_by_products(form, scaled, shift, least)
    return inverse / scale, condition, hold


def _require_finite(inverse: Tensor) -> None:
    if not bool(is_finite(inverse)):
        raise RootError("a damped inverse has left non-finite numbers", LEFT)


def _decomposed_inverse(form: str, factor: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    if form == "factored_eigen":
        eigenvalues, basis = _eigen(factor)
        damped = eigenvalues + shift
        inverse = torch.stack([*map(of_eigen, 1 / damped, basis)])
        return inverse, damped.amax(dim=1) / damped.amin(dim=1)
    damped = _shifted(factor, shift)
    inverse = _cholesky_inverse(damped)
    return inverse, _norm_1(damped) * _norm_1(inverse)


def _inverse_by_products(
    form: str, factor: Tensor, shift: Tensor, least: float
) -> tuple[Tensor, Tensor, Tensor]:
    damped = _shifted(factor, shift)
    bound = torch.linalg.vector_norm(damped, dim=(1, 2), keepdim=True)
    least = least / (1 + least * factor.shape[1] ** 0.5)
    with full_precision(factor.dtype):
        inverse, hold = inverse_powers(damped / bound, 1, least)
        inverse = inverse / bound
        if form == "factored_eigen":
            norms = [largest_eigenvalues(each, ABOUT) for each in (damped, inverse)]
        else:
            norms = [_norm_1(each) for each in (damped, inverse)]
    return inverse, norms[0] * norms[1], hold


def _shifted(factor: Tensor, shift: Tensor) -> Tensor:
    return factor + torch.diag_embed(shift.expand(factor.shape[:2]))


def _norm_1(matrices: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.matrix_norm(matrices, ord=1)
    return norms


def _cholesky_inverse(matrices: Tensor) -> Tensor:
    for dtype in dict.fromkeys((matrices.dtype, torch.float64)):
        lower, info = torch.linalg.cholesky_ex(matrices.to(dtype))
        if info.any():  # of a factor with a zero on its diagonal the inverse would raise
            continue
        inverse = torch.cholesky_inverse(lower)
        if is_finite(inverse):
            return inverse.to(matrices.dtype)
    what = f"a {tuple(matrices.shape[1:])} matrix, damped, is not"
    if is_finite(matrices):
        raise RootError(f"{what} positive definite")
    raise RootError(f"{what} finite", ASKED)


def _eigen(factors: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (groups, n) and eigenvectors (groups, n, n)."""
    values, vectors = zip(*map(symmetric_eigen, factors), strict=True)
    return torch.stack(values), torch.stack(vectors)
