"""A layer's running averages and their damped inverses, in the state of its weight.

Only the rank that works on a layer has them; the others hold empty tensors in their place. Those
of a layer's groups lie one below the other: a factor is (groups · n, n), a diagonal (groups · n,).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from largebatch.optim.kronecker.damping import Damping, Roots, decomposed, inverses_by_products
from largebatch.optim.kronecker.layers import FactorSums, Layer
from largebatch.optim.math.decompositions import ByProducts, Decomposition
from largebatch.optim.math.tensors import is_finite, write

State = Mapping[str, Tensor]

FACTORS = ("factor_in", "factor_out")
ROOTS = (
    *("inverse_in", "inverse_out"),  # of the factored forms
    *("basis_in", "basis_out", "eigenvalues_in", "eigenvalues_out", "shift"),  # of "exact"
)
ASKED = ("asked_in", "asked_out", "asked_damping")
"""What the inverses were asked of that are made beside the steps."""
SCALARS = ("factor_weight", "items", "condition", "dropped_updates")
FACTOR_STATE = frozenset((*FACTORS, *ROOTS, *ASKED, *SCALARS))


class Form(NamedTuple):
    """What decides which state a layer has: its `form`, and whether `refresh` is "beside"."""

    name: str
    beside: bool = False


def state_shapes(layer: Layer, form: Form) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a layer's state, none of it 0-d."""
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(SCALARS, (1,))
    for side, (groups, *sizes) in (("in", layer.shape_in), ("out", layer.shape_out)):
        factor = (groups * sizes[0], *sizes[1:])
        shapes[f"factor_{side}"] = factor
        if form.beside:
            shapes[f"asked_{side}"] = factor
        if form.name != "exact":
            shapes[f"inverse_{side}"] = factor
            continue
        shapes[f"eigenvalues_{side}"] = factor[:1]
        if len(sizes) == 2:
            shapes[f"basis_{side}"] = factor
    if form.beside:
        shapes["asked_damping"] = (1,)
    return shapes if form.name != "exact" else shapes | {"shift": (layer.groups,)}


def make_factor_state(layer: Layer, form: Form, device: torch.device) -> dict[str, Tensor]:
    """Make the state of a layer without samples: zeros, and the identity as preconditioner."""
    made: dict[str, Tensor] = {}
    for name, shape in state_shapes(layer, form).items():
        made[name] = torch.zeros(shape, dtype=layer.dtype, device=device)
        if name == "condition":
            made[name].fill_(1)
        elif name.startswith(("inverse_", "basis_")):
            in_groups(layer, made[name]).add_(_identity(made[name]))
    return made


def _identity(like: Tensor) -> Tensor:
    """For each group of a matrix, or of a diagonal."""
    if like.dim() == 1:
        return torch.ones_like(like[:1])
    return torch.eye(like.shape[1], dtype=like.dtype, device=like.device)


def average(
    layer: Layer,
    state: State,
    sums: FactorSums,
    items: Tensor,
    scale: Tensor,
    decay: float,
    skip: Tensor | None,
) -> None:
    """F ← d F + (1 - d) F̂ for both factors, d the decay, where the layer has seen anything.

    The sum of the weights is kept beside them: F divided by it is the average whatever d was. Sums
    that are not finite, as of gradients whose squares overflow, are dropped and counted.

    Args:
        items: N, 0-d.
        scale: of Σ δ̃δ̃ᵀ, N / R²c².
    """
    idle = ~(sums.positions > 0)
    idle = idle if skip is None else idle | skip
    positions, scale = (value.to(layer.dtype) for value in (sums.positions, scale))
    found = ((sums.inputs, 1 / positions), (sums.outputs, scale))
    finite = torch.stack([is_finite(_diagonal(each) * by) for each, by in found]).all()
    dropped = state["dropped_updates"]
    write([dropped], [dropped + 1], idle | finite)
    idle = idle | ~finite
    weight, seen = state["factor_weight"], state["items"]
    kept = torch.where(idle, 1.0, torch.full_like(weight, decay))
    for key, (each, by) in zip(FACTORS, found, strict=True):
        # In place and by few passes: factors are the most that there is of a layer.
        share, factor = torch.where(idle, 0.0, (1 - decay) * by), in_groups(layer, state[key])
        into = factor if skip is None else factor.clone()
        into.mul_(kept).addcmul_(torch.where(idle, 0.0, each), share)
        if skip is not None:
            write([factor], [into], idle)
    write([weight, seen], [decay * weight + (1 - decay), seen + items], idle)


def _diagonal(sums: Tensor) -> Tensor:
    """Of sums of squares, whose elements are no larger than that."""
    return sums if sums.dim() == 2 else sums.diagonal(dim1=1, dim2=2)


def averages(layer: Layer, state: State) -> tuple[Tensor, Tensor]:
    """A and G of each group, bias-corrected; zeros before the first samples."""
    weight = state["factor_weight"]
    factor = torch.where(weight > 0, 1 / weight, 0.0)
    factor_in, factor_out = (in_groups(layer, state[key] * factor) for key in FACTORS)
    return factor_in, factor_out


def new_roots(
    layer: Layer, form: str, damping: Damping, state: State, *, of_asked: bool = False
) -> Decomposition[dict[str, Tensor]]:
    """Return the decomposition of the averages, shaped as in the state; see `decomposed`.

    Args:
        of_asked: of the averages, and by the damping, that `ask_of` has kept.
    """
    diagonal, value = (layer.diagonal_in, layer.diagonal_out), damping.value

    def compute(factor_in: Tensor, factor_out: Tensor, *values: Tensor) -> dict[str, Tensor]:
        with_value = replace(damping, value=values[0]) if values else damping
        roots = decomposed(form, with_value, factor_in, factor_out, diagonal)
        return {
            name: value.reshape(-1) if value.dim() < 2 else value.flatten(0, 1)
            for name, value in roots.items()
        }

    device = state["factor_in"].device
    if of_asked:
        return Decomposition(compute, lambda: asked(layer, state), device)
    values = (value,) if isinstance(value, Tensor) else ()
    way = None if form == "exact" else _by_products(layer, form, damping)
    return Decomposition(compute, lambda: (*averages(layer, state), *values), device, way)


def _by_products(layer: Layer, form: str, damping: Damping) -> ByProducts:
    """How the inverses of layers of one shape are made together."""
    diagonal, value = (layer.diagonal_in, layer.diagonal_out), damping.value

    def compute(several: Sequence[Sequence[Tensor]]) -> tuple[list[Roots], Tensor]:
        factor_in, factor_out = (torch.cat([own[side] for own in several]) for side in (0, 1))
        with_value = damping
        if isinstance(value, Tensor):  # of each layer what it has seen has made of it
            values = torch.cat([own[2].reshape(1).expand(layer.groups) for own in several])
            with_value = replace(damping, value=values)
        roots, hold = inverses_by_products(form, with_value, factor_in, factor_out, diagonal)
        found = []
        for number in range(len(several)):
            groups = slice(number * layer.groups, (number + 1) * layer.groups)
            # In storages of their own: one that is kept must not keep the others.
            own = {name: each[groups].clone() for name, each in roots.items()}
            condition = own.pop("condition").amax().reshape(1)
            found.append(
                {name: each.flatten(0, 1) for name, each in own.items()} | {"condition": condition}
            )
        return found, hold.view(len(several), -1).all(dim=1)

    same = None if isinstance(value, Tensor) else value
    shapes = layer.shape_in, layer.shape_out, diagonal, layer.dtype
    return ByProducts(("damped", form, same, damping.relative, damping.ridge, *shapes), compute)


def ask_of(layer: Layer, state: State, value: float | Tensor) -> None:
    """Keep the averages, and the damping with them, for inverses that are made beside the steps."""
    for side, factor in zip(ASKED[:2], averages(layer, state), strict=True):
        in_groups(layer, state[side]).copy_(factor)
    if isinstance(value, Tensor):
        state["asked_damping"].copy_(value)
    else:
        state["asked_damping"].fill_(value)


def asked(layer: Layer, state: State) -> list[Tensor]:
    """Return what `ask_of` has kept: A and G of each group, and the damping."""
    factor_in, factor_out, value = (state[key] for key in ASKED)
    return [in_groups(layer, factor_in), in_groups(layer, factor_out), value]


def roots_of(layer: Layer, state: State) -> Roots:
    """Return the entries of the state that `precondition` needs."""
    return {
        key: state[key] if key == "shift" else in_groups(layer, state[key])
        for key in ROOTS
        if key in state
    }


def in_groups(layer: Layer, tensor: Tensor) -> Tensor:
    """(groups · n, …) as (groups, n, …), a view."""
    return tensor.view(layer.groups, -1, *tensor.shape[1:])
