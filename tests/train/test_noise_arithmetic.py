"""Squared norms of long tensors, in the metric too, and of one sample in several."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from largebatch.optim import LAMB
from largebatch.optim.math.tensors import CPU_STRETCH
from largebatch.train.noise.gradient_noise import metric_of
from largebatch.train.noise.small_gradients import squares, squares_of, trainable, weighted_squares

SIZES = (1, 1000, CPU_STRETCH, CPU_STRETCH + 1, 3 * CPU_STRETCH + 17)


def tensors(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    flat = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    transposed = torch.randn(300, 500, generator=generator).to(dtype).T
    assert transposed.numel() > CPU_STRETCH
    return [*flat, transposed]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_squares_of_any_length_keep_their_digits(dtype: torch.dtype) -> None:
    given = tensors(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    # Squares of the few digits of bf16 are rounded alike, and so not to either side.
    near = 1e-5 if dtype == torch.bfloat16 else 1e-6
    weights = [torch.linspace(0.5, 2, t.numel(), dtype=wide).view(t.shape) for t in given]
    found = zip(squares_of(given), weighted_squares(given, weights), strict=True)
    for tensor, weight, (square, weighted) in zip(given, weights, found, strict=True):
        true = tensor.double().square()
        assert square.dtype == weighted.dtype == wide
        assert float(square) == pytest.approx(float(true.sum()), rel=near)
        assert float(weighted) == pytest.approx(float((true * weight.double()).sum()), rel=near)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, LAMB])
def test_the_metric_of_a_long_parameter_is_that_of_its_moment(
    optimizer: Callable[..., torch.optim.Optimizer],
) -> None:
    torch.manual_seed(0)
    model = nn.Linear(400, 300)  # longer than a stretch, and a bias that is shorter
    made = optimizer(list(model.named_parameters()), lr=0.01, betas=(0.9, 0.95), eps=1e-3)
    layers = trainable(model)
    metric = metric_of(made, layers, {})
    assert metric == {}
    for step in (1, 2):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        made.step()
        before = metric
        metric = metric_of(made, layers, before)
        for name, (param,) in layers.items():
            moment = made.state[param]["exp_avg_sq"].double() / (1 - 0.95**step)
            torch.testing.assert_close(
                metric[name].double(), 1 / (moment.sqrt() + 1e-3), rtol=1e-5, atol=0
            )
            assert not before or metric[name] is before[name]  # its memory is taken over


def test_squares_add_up_within_a_layer_and_leave_out_what_has_no_gradient() -> None:
    one, two, none = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    one.grad, two.grad = torch.full((4,), 2.0), torch.full((4,), 3.0)
    layers = {"both": (one, two), "none": (none,), "two": (two, none)}
    assert squares(layers).tolist() == [16 + 36, 0, 36]
    assert squares({"none": (none,)}).tolist() == [0]
