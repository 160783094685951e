"""Kronecker factors: G_(i) G_(i)ᵀ of every dimension i, with G_(i) a gradient unfolded along it.

Products are as precise as what is set globally: callers set `matrix_roots.full_precision`.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from largebatch.optim.base import Group
from largebatch.optim.blockwise.block_work import BlockAtWork


def factor_beta(group: Group) -> float:
    """β of the running averages; 1 for plain sums."""
    beta: float | None = group["factor_beta"]
    return group["betas"][1] if beta is None else beta


def next_factor(block: BlockAtWork, dim: int) -> Tensor:
    """A dimension's factor with this step's gradient, a new tensor."""
    beta, factor, new = (
        factor_beta(block.group),
        block.state[f"factor_{dim}"],
        outer(block.grad, dim),
    )
    return factor + new if beta == 1 else factor.lerp(new, 1 - beta)


def outer(grad: Tensor, dim: int) -> Tensor:
    """G_(i) G_(i)ᵀ, shape (n_i, n_i)."""
    unfolded = grad.movedim(dim, 0).flatten(1)
    product: Tensor = unfolded @ unfolded.T
    return product


def in_basis(tensor: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
    """The tensor multiplied along dimensions by the transposes of their matrices.

    For orthonormal columns that is the tensor in their coordinates.
    """
    for dim in range(tensor.dim()):
        # The first dimension is worked on and becomes the last: after all, they are in order.
        if dim in matrices:
            tensor = torch.tensordot(tensor, matrices[dim], dims=([0], [0]))
        else:
            tensor = tensor.movedim(0, -1)
    return tensor


def out_of_basis(tensor: Tensor, matrices: Mapping[int, Tensor]) -> Tensor:
    """The tensor multiplied along dimensions by their matrices: the way back of `in_basis`."""
    return in_basis(tensor, {dim: matrix.T for dim, matrix in matrices.items()})
