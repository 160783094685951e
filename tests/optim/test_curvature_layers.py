"""The rows of every kind of layer: what they are, and which modules have them."""

import pytest
import torch
from kfac_networks import CASES, Case, deltas_of, only_layer, rows_of
from torch import nn
from torch.nn.utils import parametrizations

from largebatch.optim.kronecker import layers as curvature_layers
from largebatch.optim.kronecker.layers import find_layers, input_sum, output_sum

# torch's own, of uneven padding.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
each_case = pytest.mark.parametrize("case", CASES, ids=str)


@each_case
@pytest.mark.parametrize("max_factor_size", [100, 1])
def test_the_sums_are_those_of_every_positions_row(case: Case, max_factor_size: int) -> None:
    module, x = case.layer()
    layer = only_layer(module, max_factor_size)
    grad = torch.randn_like(module(x))
    inputs, positions = input_sum(layer, x)
    outputs = output_sum(layer, x, grad)

    rows, deltas = rows_of(layer, x), deltas_of(layer, x, grad)
    assert int(positions) == rows.shape[1] == deltas.shape[1]
    for found, vectors, diagonal in (
        (inputs, rows, layer.diagonal_in),
        (outputs, deltas, layer.diagonal_out),
    ):
        expected = torch.einsum("gpi,gpj->gij", vectors, vectors)
        if diagonal:
            expected = expected.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert layer.diagonal_out == (max_factor_size < layer.outputs)


@each_case
def test_rows_and_gradients_multiply_to_the_gradient_of_the_matrices(case: Case) -> None:
    """What makes A ⊗ G the curvature of these very parameters: D = Σ δ aᵀ."""
    module, x = case.layer()
    layer = only_layer(module)
    output = module(x)
    grad = torch.randn_like(output)
    gradients = torch.autograd.grad(output, layer.params, grad)
    found = layer.matrices(gradients)
    assert found.shape == (layer.groups, layer.outputs, layer.inputs)
    expected = deltas_of(layer, x, grad).mT @ rows_of(layer, x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for tensor, gradient in zip(layer.tensors(found), gradients, strict=True):
        assert torch.equal(tensor, gradient)


def test_patches_are_summed_in_parts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in CASES if case.name == "conv2d with everything")
    module, x = case.layer()
    layer = only_layer(module)
    whole, positions = input_sum(layer, x)
    monkeypatch.setattr(curvature_layers, "PATCH_ELEMENTS", 1)
    parts, positions_of_parts = input_sum(layer, x)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    assert positions == positions_of_parts


@pytest.mark.parametrize("case", [case for case in CASES if "conv" in case.name], ids=str)
def test_an_input_without_a_batch_is_a_batch_of_one(case: Case) -> None:
    module, x = case.layer()
    layer, grad = only_layer(module), torch.randn_like(module(x[:1]))
    assert torch.equal(input_sum(layer, x[0])[0], input_sum(layer, x[:1])[0])
    assert torch.equal(output_sum(layer, x[0], grad[0]), output_sum(layer, x[:1], grad))


class Doubled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    pass


def tied() -> nn.Module:
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    return model


def frozen(*names: str) -> nn.Module:
    model = nn.Linear(3, 4)
    for name in names:
        getattr(model, name).requires_grad_(False)
    return model


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Renamed(3, 4), ["weight"]),
        (Doubled(3, 4), []),
        (frozen("weight"), []),
        (frozen("bias"), ["weight"]),
        (tied(), []),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.PReLU()), ["0.weight"]),
        (nn.ModuleList([layer := nn.Linear(2, 2), layer]), ["0.weight"]),
        (nn.Embedding(5, 3, scale_grad_by_freq=True), []),
        (nn.Embedding(5, 3, sparse=True), []),
        (nn.ConvTranspose2d(2, 3, 2), []),
        (nn.Conv3d(2, 3, 2), []),
        (nn.Bilinear(2, 3, 4), []),
        (parametrizations.weight_norm(nn.Linear(3, 4)), []),
        (nn.TransformerEncoderLayer(8, 2), ["linear1.weight", "linear2.weight"]),
    ],
    ids=lambda value: "" if isinstance(value, list) else type(value).__name__,
)
def test_modules_have_curvature_by_what_they_compute(model: nn.Module, found: list[str]) -> None:
    assert [layer.name for layer in find_layers(model, 100)] == found


def test_a_frozen_bias_is_no_column() -> None:
    assert only_layer(frozen("bias")).inputs == 3
    assert only_layer(frozen()).inputs == 4
