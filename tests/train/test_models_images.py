"""Image models: the shapes that they say, and a sample's answer that depends on no other sample."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from largebatch.train.models import CNN, ImageMLP, LeNet


def images(channels: int, size: int, samples: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(samples, channels, size, size, generator=generator)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CNN(channels=1, classes=7, widths=(16, 32)),
        lambda: ImageMLP(channels=1, size=12, classes=7),
    ],
)
def test_an_images_answer_is_its_own(make: Callable[[], nn.Module]) -> None:
    """No statistics of a batch: so a global batch may be split in any way."""
    torch.manual_seed(0)
    model, batch = make().double(), images(1, 12).double()
    together = model(batch)
    assert together.shape == (6, 7)
    alone = torch.cat([model(image[None]) for image in batch])
    torch.testing.assert_close(alone, together, rtol=1e-12, atol=1e-12)


def test_the_cnn_is_its_stages_by_hand() -> None:
    torch.manual_seed(0)
    model, batch = CNN(channels=3, classes=4, widths=(16,)).double(), images(3, 7).double()
    weights = model.state_dict()
    x = batch
    for convolution, norm, stride in ((0, 1, 1), (3, 4, 2)):
        weight = weights[f"stages.0.{convolution}.weight"]
        # Every place's neighbourhood of 3x3, zeros beyond the edge, as one row.
        rows = nn.functional.unfold(x, 3, padding=1, stride=stride)
        size = math.ceil(x.shape[-1] / stride)
        x = (weight.flatten(1) @ rows).unflatten(2, (size, size))
        flat = x.flatten(1)  # 16 channels are one group
        mean, variance = flat.mean(1), flat.var(1, correction=0)
        x = (x - mean[:, None, None, None]) / (variance + 1e-5).sqrt()[:, None, None, None]
        x = x * weights[f"stages.0.{norm}.weight"][:, None, None]
        x = x + weights[f"stages.0.{norm}.bias"][:, None, None]
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert x.shape[-1] == 4  # 7 places, halved and rounded up
    expected = x.flatten(2).mean(2) @ weights["head.weight"].T + weights["head.bias"]
    torch.testing.assert_close(model(batch), expected, rtol=1e-10, atol=1e-10)


def test_the_default_cnn_has_the_parameters_that_its_file_states() -> None:
    model = CNN(channels=3, classes=10)
    products = 9 * (3 * 32 + 32 * 32 + 32 * 64 + 64 * 64 + 64 * 128 + 128 * 128)
    norms = 2 * 2 * (32 + 64 + 128)
    counted = sum(param.numel() for param in model.parameters())
    assert counted == products + norms + 128 * 10 + 10
    assert round(counted / 1e6, 2) == 0.29


def test_lenet_is_its_layers_by_hand() -> None:
    torch.manual_seed(0)
    model, x = LeNet(channels=2, classes=7).double(), images(2, 28, samples=3).double()
    assert sum(param.numel() for param in LeNet().parameters()) == 61_706
    weights = iter(model.state_dict().values())
    for padding in (2, 0):
        weight, bias = next(weights), next(weights)
        rows = nn.functional.unfold(x, 5, padding=padding)  # (samples, 25 · inputs, places)
        size = math.isqrt(rows.shape[-1])
        x = (weight.flatten(1) @ rows + bias[:, None]).unflatten(2, (size, size))
        x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        x = x.unflatten(3, (-1, 2)).mean(4).unflatten(2, (-1, 2)).mean(3)
    x = x.flatten(1)
    for place in range(3):
        x = x @ next(weights).T + next(weights)
        if place < 2:
            x = x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    assert x.shape == (3, 7)
    torch.testing.assert_close(model(images(2, 28, samples=3).double()), x, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("widths", [(), (20,), (16, 40)])
def test_widths_that_make_no_groups_are_refused(widths: Any) -> None:
    with pytest.raises(ValueError, match=r"model.widths must name at least one stage, each a mult"):
        CNN(channels=3, classes=10, widths=widths)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: CNN(0, 10), "model.channels"),
        (lambda: CNN(3, 1), "model.classes"),
        (lambda: LeNet(0), "model.channels"),
        (lambda: LeNet(1, 1), "model.classes"),
        (lambda: ImageMLP(3, 0, 10), "model.size"),
        (lambda: ImageMLP(3, 8, 10, hidden=0), "model.hidden"),
    ],
)
def test_a_size_of_nothing_is_refused(make: Callable[[], nn.Module], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least"):
        make()
