"""Inverse roots and eigenbases of symmetric positive semi-definite matrices, and what to do when
one fails.

They are what second-order optimizers ask of a factor, a running sum of matrices G Gᵀ. Such a
factor may be rank-deficient (few samples, few steps) or zero, and as ill-conditioned as FP32 can
hold. So:

- a ridge relative to the largest eigenvalue, (A + ridge · λ_max · I), bounds the condition number
  by 1 / ridge + 1 whatever the scale of the gradients. In FP32 eigenvalues are known to about
  1e-7 λ_max, so a ridge far below 1e-6 divides by rounding errors;
- matrices are scaled by their largest entry before they are decomposed, and eigenvalues by the
  largest before a ridge is added and a root taken: neither may underflow;
- a matrix whose largest eigenvalue is below 1e-36 (FP64: 1e-306) is zero, because the squares that
  it is made of have lost their digits;
- the root of a matrix of zeros is the identity: it knows of no direction that differs from others;
- eigendecompositions are in the matrix's own dtype, and once more in FP64 on the host where that
  raises or leaves a non-finite number;
- matrix products are FP32 to the last digit, whatever `torch.set_float32_matmul_precision` says:
  TF32 or bf16 passes would cost the small eigenvalues all their digits.

Asking whether a decomposition has succeeded waits for the device, if the matrix lies there: see
`largebatch.optim.math.decompositions`. Roots and bases are taken once in an interval of steps, and
nothing else here waits.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from largebatch.optim.math.tensors import is_finite
from largebatch.optim.options import require
from largebatch.optim.sharding.layout import Name
from largebatch.optim.sharding.redistribution import WorkGroup
from largebatch.optim.sharding.step_counts import Arriving

Result = TypeVar("Result")

DEFAULT_RIDGE = 1e-6
TOLERATED_FAILURES = 3


DIVERGES, ASKED, LEFT = range(3)
# What went wrong, by the number under which ranks tell each other.
REASONS = (
    "the decomposition of a factor does not converge, or a damped factor is not positive definite",
    "the decomposition of a factor was asked of non-finite numbers",
    "the decomposition of a factor has left non-finite numbers",
)


class RootError(ArithmeticError):
    """A matrix that has no decomposition, in FP64 either, or no root in its dtype."""

    def __init__(self, what: str, reason: int = DIVERGES) -> None:
        super().__init__(what)
        self.reason = reason
        """Index into `REASONS`."""


class Root(NamedTuple):
    matrix: Tensor
    """(A + ridge · λ_max · I)^(-1/p), symmetric, shape (n, n)."""
    condition: Tensor
    """λ_max / λ_min of the matrix that the root was taken of, ridge included; 0-d."""


class Refined(NamedTuple):
    basis: Tensor
    """Orthonormal columns, shape (n, n)."""
    order: Tensor
    """Column j has come from column order[j] of the basis before."""
    condition: Tensor
    """Largest by smallest eigenvalue, as far as a basis that still turns tells; 0-d."""


@contextmanager
def full_precision(dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """FP32 products of FP32 matrices, on every device, whatever is set globally.

    The setting is the process's: a thread that multiplies meanwhile gets full precision too. FP64
    has no other, and there nothing is set.
    """
    if dtype == torch.float64:
        yield
        return
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by backend, which torch then refuses to put into one word
        legacy = None
    mkldnn: Any = torch.backends.mkldnn  # whose `matmul` torch makes as it is imported
    backends: list[Any] = [torch.backends.cuda.matmul, mkldnn.matmul]
    before = [backend.fp32_precision for backend in backends]
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if legacy is not None:
            torch.set_float32_matmul_precision(legacy)
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and not below 0, and eigenvectors, the columns; in the matrix's dtype.

    Of `matrix`, shape (n, n), the lower triangle counts. All are 0 if the largest is below 1e-36.

    Raises:
        RootError: there is no finite decomposition.
    """
    largest = matrix.abs().amax()
    scale = torch.where(largest > 0, largest, 1.0)
    scaled = matrix / scale
    found = finite_eigen(scaled)
    if found is None:
        found = finite_eigen(scaled.to("cpu", torch.float64))
    if found is None:
        finite = bool(is_finite(matrix))
        what = "does not converge" if finite else "was asked of non-finite numbers"
        raise RootError(
            f"the eigendecomposition of a {tuple(matrix.shape)} matrix {what}",
            DIVERGES if finite else ASKED,
        )
    values, vectors = found
    values = values.to(matrix) * scale
    values = torch.where(values[-1] < smallest_square(matrix.dtype), 0.0, values)
    return values.clamp(min=0), vectors.to(matrix)


def smallest_square(dtype: torch.dtype) -> float:
    """Below it a sum of squares is zero: 1e-36 in FP32, where 1e-38 is the last with all digits."""
    return 100 * torch.finfo(dtype).tiny


def finite_eigen(matrix: Tensor) -> tuple[Tensor, Tensor] | None:
    """Eigenvalues and eigenvectors; None where they are not to be had."""
    try:
        with full_precision(matrix.dtype):
            values, vectors = torch.linalg.eigh(matrix)
    except LinAlgError:
        return None
    finite = is_finite(values) & is_finite(vectors)
    return (values, vectors) if bool(finite) else None


def inverse_root(matrix: Tensor, p: float, ridge: float = DEFAULT_RIDGE) -> Root:
    """(A + ridge · λ_max · I)^(-1/p) of a symmetric positive semi-definite A, shape (n, n).

    The identity where A is 0.

    Raises:
        ValueError: p or ridge is not > 0.
        RootError: as for `symmetric_eigen`; a root with numbers that its dtype does not hold.
    """
    require(p > 0, "p", "> 0", p)
    require(ridge > 0, "ridge", "> 0", ridge)
    values, vectors = symmetric_eigen(matrix)
    largest = values[-1]
    empty = largest == 0
    relative = torch.where(empty, 1.0, values / torch.where(empty, 1.0, largest) + ridge)
    scale = torch.where(empty, 1.0, largest) ** (-1 / p)
    root = of_eigen(relative ** (-1 / p) * scale, vectors)
    if not bool(is_finite(root)):
        what = f"the root of a {tuple(matrix.shape)} matrix has left non-finite numbers"
        raise RootError(what, LEFT)
    return Root(root, relative[-1] / relative[0])


def of_eigen(values: Tensor, vectors: Tensor) -> Tensor:
    """V diag(values) Vᵀ, symmetric to the last bit."""
    with full_precision(vectors.dtype):
        product: Tensor = (vectors * values) @ vectors.T
    return (product + product.T) / 2


def eigenbasis(matrix: Tensor) -> Refined:
    """Orthonormal eigenvectors, the columns, that of the largest eigenvalue first.

    Raises:
        RootError: as for `symmetric_eigen`.
    """
    values, vectors = symmetric_eigen(matrix)
    order = torch.arange(len(values), device=values.device)
    return Refined(vectors.flip(1), order, _condition(values))


def _condition(values: Tensor) -> Tensor:
    """Largest by smallest, which is known to a digit of the largest; 1 where all are 0."""
    largest = values.amax()
    smallest = values.amin().clamp(min=torch.finfo(values.dtype).eps * largest)
    return torch.where(smallest > 0, largest / smallest, 1.0)


def refined_basis(matrix: Tensor, basis: Tensor) -> Refined:
    """One step of orthogonal iteration from an approximate eigenbasis: the Q of A · basis.

    The basis's columns are first put in the order of their Rayleigh quotients diag(basisᵀ A basis),
    the largest first, because QR keeps the direction of early columns (Vyas et al. 2024, SOAP,
    Algorithm 4, https://arxiv.org/abs/2409.11321). A column of the result points to the side of the
    one it has come from: LAPACK's choice of sign would turn columns around at random. A matrix of
    zeros leaves the basis as it is.

    Raises:
        RootError: a non-finite result.
    """
    largest = matrix.abs().amax()
    empty = largest < smallest_square(matrix.dtype)  # nothing to refine it by
    with full_precision(matrix.dtype):
        power = (matrix / torch.where(empty, 1.0, largest)) @ basis
        order = (basis * power).sum(dim=0).argsort(descending=True, stable=True)
        refined: Tensor
        refined, triangle = torch.linalg.qr(power[:, order])
    values = triangle.diagonal().abs()
    refined *= torch.where(triangle.diagonal() < 0, -1, 1).to(refined)
    refined = torch.where(empty, basis, refined)
    order = torch.where(empty, torch.arange(len(order), device=order.device), order)
    if not bool(is_finite(refined)):
        finite = bool(is_finite(matrix))
        what = f"QR of a {tuple(matrix.shape)} matrix has left non-finite numbers"
        raise RootError(what, LEFT if finite else ASKED)
    return Refined(refined, order, torch.where(empty, 1.0, _condition(values)))


class Failures:
    """Counts what failed, and says when it is enough.

    Where one rank works for others, none may stop alone, or the others wait for it: they then tell
    each other (`FailureReports`) which layer's failures are `exhausted`, and why.

    Attributes:
        tolerated: failures in a row of one matrix that are passed over.
        total: all failures so far, by the layer's name.
        exhausted: the index into `REASONS`, by layer and part, of those that failed too often where
            `attempt` was not to raise.
    """

    def __init__(self, tolerated: int = TOLERATED_FAILURES) -> None:
        require(tolerated >= 0, "tolerated_failures", ">= 0", tolerated)
        self.tolerated = tolerated
        self.total: Counter[str] = Counter()
        self.exhausted: dict[tuple[str, object], int] = {}
        self._in_a_row: Counter[tuple[str, object]] = Counter()

    def attempt(
        self,
        compute: Callable[[], Result],
        layer: str,
        part: object = None,
        *,
        raises: bool = True,
    ) -> Result | None:
        """What `compute` returns; None where it fails, and the caller keeps what it had.

        Args:
            layer: the layer's name, for the count and the message.
            part: tells the matrices of a layer apart.
            raises: whether to raise after too many failures, or note them in `exhausted`.

        Raises:
            RootError: more than `tolerated` failures in a row.
        """
        key = layer, part
        try:
            result = compute()
        except RootError as error:
            self.total[layer] += 1
            self._in_a_row[key] += 1
            if self._in_a_row[key] > self.tolerated:
                if raises:
                    raise self.error(layer, error.reason) from error
                self.exhausted[key] = error.reason
            return None
        self._in_a_row.pop(key, None)
        self.exhausted.pop(key, None)
        return result

    def error(self, layer: str, reason: int) -> RootError:
        """The same on every rank."""
        return RootError(
            f"layer {layer!r}: {REASONS[reason]}, {self.tolerated + 1} times in a row. "
            "Look for non-finite gradients, or lower the learning rate; a larger ridge "
            "helps where the numbers are finite.",
            reason,
        )


class FailureReports:
    """Failures for good of an optimizer's layers: all ranks raise the error of the owning rank.

    A rank that stopped alone would leave the others waiting in a collective for their group's
    timeout. So the owner continues with its last good roots and adds its failure to the sums that
    the ranks reduce at that step anyway. At the beginning of the next step, when the sums have long
    arrived on the host, every rank raises the same sentence.
    """

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._received: list[tuple[list[Name], Arriving]] = []

    def own(self, work_group: WorkGroup[Any]) -> Tensor:
        """Count what has failed for good on this rank, by layer and then by reason, to be summed
        over the ranks; empty for a single rank.
        """
        device, dtype, names = work_group.device, work_group.dtype, work_group.names
        if work_group.group is None:
            return torch.empty(0, device=device, dtype=dtype)
        if not self._failures.exhausted:  # made there: a copy would wait for the device
            return torch.zeros(len(names) * len(REASONS), device=device, dtype=dtype)
        failed = Counter((layer, reason) for (layer, _), reason in self._failures.exhausted.items())
        self._failures.exhausted.clear()
        counts = [failed[str(name), reason] for name in names for reason in range(len(REASONS))]
        return torch.tensor(counts, device=device, dtype=dtype)

    def receive(self, work_group: WorkGroup[Any], counts: Tensor) -> None:
        """Keep the sums over all ranks, the same bits on each, for the next step."""
        if counts.numel():
            failed = (counts > 0).to(torch.int64)
            first = torch.stack([failed.argmax(), failed.amax()])  # and whether there is one
            self._received.append((work_group.names, Arriving(first)))

    def heed(self) -> None:
        """Raise what any rank has reported in the step before.

        Raises:
            RootError: a layer has failed for good, on whichever rank.
        """
        received, self._received = self._received, []
        for names, first in received:
            place, failed = first.wait().tolist()
            if failed:
                layer, reason = divmod(place, len(REASONS))
                raise self._failures.error(str(names[layer]), reason)
