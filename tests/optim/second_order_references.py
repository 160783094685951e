"""Shampoo, SOAP and Muon as their papers write them, for one tensor, in numpy and FP64.

Blocks, where there are any, are given as slices; everything but the norms of the grafting is then
done for each block alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Slices = tuple[slice, ...]


def unfold(tensor: Array, dim: int) -> Array:
    """The matrix whose rows are the tensor's slices along `dim`."""
    return np.moveaxis(tensor, dim, 0).reshape(tensor.shape[dim], -1)


def along(tensor: Array, matrix: Array, dim: int) -> Array:
    """Every fibre of the tensor along `dim` multiplied by the matrix from the left."""
    product = matrix @ unfold(tensor, dim)
    rest = np.delete(tensor.shape, dim)
    return np.moveaxis(product.reshape(matrix.shape[0], *rest), 0, dim)


def inverse_root(factor: Array, exponent: float, ridge: float) -> Array:
    """(A + ridge · λ_max · I)^(-exponent)."""
    values, vectors = np.linalg.eigh(factor)
    largest = values[-1]
    if largest <= 0:
        return np.eye(len(factor))
    ridged = np.maximum(values, 0) + ridge * largest
    return vectors @ np.diag(ridged**-exponent) @ vectors.T


def is_due(t: int, interval: int) -> bool:
    """Once in an interval, and within the first one at steps 1, 2, 4, 8 and so on."""
    return (t - 1) % interval == 0 or (t < interval and t in (1, 2, 4, 8, 16))


class Beside:
    """Factors of one refresh until the next, if `refresh` is "beside"; those of the first interval
    are taken at once."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.late = options.get("refresh") == "beside"
        self.interval = options["precondition_interval"]
        self.asked: list[Array] = []

    def due(self, factors: list[Array], t: int) -> list[Array]:
        before, self.asked = self.asked, [*factors]
        return before if self.late and t - 1 >= self.interval else factors


class ShampooBlock:
    """Gupta et al. 2018, Algorithm 2, with running averages and a grafted method."""

    def __init__(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.o = options
        self.factors = [np.zeros((n, n)) for n in shape]
        self.roots = [np.eye(n) for n in shape]
        self.dims = [int(np.argmin(shape))] if options.get("sides") == "one" else range(len(shape))
        self.beside = Beside(options)
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

    def step(self, g: Array) -> tuple[Array, Array]:
        """The preconditioned direction and the grafted method's own step."""
        o, self.t = self.o, self.t + 1
        (beta1, beta2), t = o["betas"], self.t
        beta = beta2 if o["factor_beta"] is None else o["factor_beta"]
        for dim in self.dims:
            new = unfold(g, dim) @ unfold(g, dim).T
            old = self.factors[dim]
            self.factors[dim] = old + new if beta == 1 else beta * old + (1 - beta) * new
        if is_due(t, o["precondition_interval"]):
            correction = 1.0 if beta == 1 else 1 - beta**t
            exponent = o["exponent"] or 1 / (2 * len(self.dims))
            due = self.beside.due([factor / correction for factor in self.factors], t)
            for dim in self.dims:
                self.roots[dim] = inverse_root(due[dim], exponent, o["ridge"])
        self.m = beta1 * self.m + (1 - beta1) * g
        mean = self.m / (1 - beta1**t)
        own = self.grafted(g, mean, beta2)
        if t < o["start_preconditioning_step"]:
            return own, own
        direction = mean
        for dim in self.dims:
            direction = along(direction, self.roots[dim], dim)
        return direction, direction if o["grafting"] == "none" else own

    def grafted(self, g: Array, mean: Array, beta2: float) -> Array:
        grafting, eps = self.o["grafting"], self.o["eps"]
        if grafting == "adagrad":
            self.v = self.v + g * g
        else:
            self.v = beta2 * self.v + (1 - beta2) * g * g
        if grafting == "adam":
            return mean / (np.sqrt(self.v / (1 - beta2**self.t)) + eps)
        if grafting in ("rmsprop", "adagrad"):
            return mean / (np.sqrt(self.v) + eps)
        return mean


class SOAPBlock:
    """Vyas et al. 2024, Algorithm 3; the first step is Adam's, as the module says."""

    def __init__(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.o = options
        self.factors = [np.zeros((n, n)) for n in shape]
        self.bases = [np.eye(n) for n in shape]
        self.beside = Beside(options)
        self.m, self.v, self.t = np.zeros(shape), np.zeros(shape), 0

    def rotated(self, tensor: Array) -> Array:
        for dim, basis in enumerate(self.bases):
            tensor = along(tensor, basis.T, dim)
        return tensor

    def back(self, tensor: Array) -> Array:
        for dim, basis in enumerate(self.bases):
            tensor = along(tensor, basis, dim)
        return tensor

    def step(self, g: Array) -> tuple[Array, Array]:
        o, self.t = self.o, self.t + 1
        (beta1, beta2), t = o["betas"], self.t
        beta = beta2 if o["factor_beta"] is None else o["factor_beta"]
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * self.rotated(g) ** 2
        m_hat, v_hat = self.rotated(self.m) / (1 - beta1**t), self.v / (1 - beta2**t)
        direction = self.back(m_hat / (np.sqrt(v_hat) + o["eps"]))
        kl = o.get("factors") == "kl"
        news = (
            self.kl_terms(g, beta) if kl else [unfold(g, d) @ unfold(g, d).T for d in range(g.ndim)]
        )
        for dim, new in enumerate(news):
            self.factors[dim] = beta * self.factors[dim] + (1 - beta) * new
        if t == 1:
            self.bases = [np.linalg.eigh(factor)[1][:, ::-1] for factor in self.factors]
            self.v = (1 - beta2) * self.rotated(g) ** 2
            self.beside.due(self.factors, t)
        elif is_due(t, o["precondition_interval"]):
            for dim, factor in enumerate(self.beside.due(self.factors, t)):
                basis = self.bases[dim]
                order = np.argsort(-np.diag(basis.T @ factor @ basis), kind="stable")
                q, r = np.linalg.qr(factor @ basis[:, order])
                self.bases[dim] = q * np.where(np.diag(r) < 0, -1, 1)
                self.v = np.take(self.v, order, axis=dim)
        if o.get("update_rms"):
            return direction, np.full_like(g, o["update_rms"])
        return direction, direction

    def kl_terms(self, g: Array, beta: float) -> list[Array]:
        """Lin et al. 2025, the expectation of G S⁻¹ Gᵀ / d for each factor, S the other's."""
        inverses = []
        for factor, basis in zip(self.factors, self.bases, strict=True):
            if self.t == 1:
                inverses.append(np.eye(len(factor)))
                continue
            values = np.diag(basis.T @ factor @ basis) / (1 - beta ** (self.t - 1))
            values = np.maximum(values, 1e-5 * values.max())
            inverses.append(basis @ np.diag(1 / values) @ basis.T)
        first = np.mean(g**2) ** (1 / g.ndim - 1) if self.t == 1 else 1.0
        terms = []
        for dim in range(g.ndim):
            whitened = g
            for other, inverse in enumerate(inverses):
                whitened = whitened if other == dim else along(whitened, inverse, other)
            terms.append(first * unfold(whitened, dim) @ unfold(g, dim).T * g.shape[dim] / g.size)
        return terms


class SOAPMuonMatrix(SOAPBlock):
    """Vyas et al.: SOAP's direction, orthogonalised."""

    def step(self, g: Array) -> tuple[Array, Array]:
        u = self.o["scale"] * orthogonal(super().step(g)[0], self.o)
        return u, u


class ManoMatrix:
    """Gu, Xie 2026, Algorithm 1, with its sum of gradients and weights that it moves itself."""

    def __init__(self, weight: Array, options: dict[str, Any]) -> None:
        self.o, self.w, self.m, self.t = options, weight.copy(), np.zeros_like(weight), 0

    def step(self, g: Array) -> None:
        o, k = self.o, self.t % 2
        self.t += 1
        self.m = o["mu"] * self.m + g
        u = g + o["mu"] * self.m if o["nesterov"] else self.m
        unit = self.w / np.sqrt(np.sum(self.w**2, axis=k, keepdims=True))
        v = u - unit * np.sum(u * unit, axis=k, keepdims=True)
        v = v / np.sqrt(np.sum(v**2, axis=k, keepdims=True))
        self.w = self.w - o["lr"] * (0.2 * np.sqrt(g.shape[k]) * v + o["weight_decay"] * self.w)


def on_sphere(w: Array, u: Array, radius: float, lr: float) -> Array:
    """Wen et al. 2026, in two halves: to the sphere, then a step as long as at right angles."""
    turned = w / np.linalg.norm(w) - lr * u / np.linalg.norm(u)
    return radius * turned / np.sqrt(1 + lr**2)


class MuonMatrix:
    """Jordan et al. 2024, with their sum of gradients; Newton-Schulz on the singular values."""

    def __init__(self, shape: tuple[int, ...], options: dict[str, Any]) -> None:
        self.o, self.m = options, np.zeros(shape)

    def step(self, g: Array) -> tuple[Array, Array]:
        o, mu = self.o, self.o["mu"]
        self.m = mu * self.m + g
        u = o["scale"] * orthogonal(g + mu * self.m if o["nesterov"] else self.m, o)
        return u, u


def orthogonal(matrix: Array, options: dict[str, Any]) -> Array:
    """Each singular value s of X / ‖X‖ becomes p(p(… p(s)))."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.sqrt(np.sum(values**2)) / options.get("slack", 1.0)
    for a, b, c in options["polynomials"]:
        values = a * values + b * values**3 + c * values**5
    return left @ np.diag(values) @ right


def run(
    block_of: Callable[[tuple[int, ...], dict[str, Any]], Any],
    weight: Array,
    grads: Sequence[Array],
    options: dict[str, Any],
    blocks: Sequence[Slices] | None = None,
) -> Array:
    """The weight after all the steps."""
    o, w = options, weight.copy()
    blocks = blocks or [tuple(slice(None) for _ in w.shape)]
    workers = [block_of(w[block].shape, o) for block in blocks]
    buffer = np.zeros_like(w)
    for raw in grads:
        g = raw + o["weight_decay"] * w if o["decay"] == "l2" else raw
        direction, own = np.zeros_like(w), np.zeros_like(w)
        for block, worker in zip(blocks, workers, strict=True):
            direction[block], own[block] = worker.step(g[block])
        length = np.linalg.norm(direction)
        u = direction * (np.linalg.norm(own) / length if length > 0 else 1.0)
        momentum = o.get("momentum", 0.0)
        if momentum:
            buffer = momentum * buffer + u
            u = u + momentum * buffer if o["nesterov"] else buffer
        decay = o["weight_decay"] if o["decay"] == "decoupled" else 0.0
        w = w - o["lr"] * (u + decay * w)
    return w
