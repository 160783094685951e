"""NVLAMB with the settings of its published reference test, to 33 million weights."""

from typing import Any

import pytest
import torch
from optimizer_rows import take_steps
from torch.nn import Parameter
from variant_lamb import lamb_nvlamb
from variant_layers import Layer
from variant_scenario import relative_error, to_numpy

from largebatch.optim import LAMB

PUBLISHED_SETTINGS = [
    {"lr": 0.01, "betas": (0.6, 0.9), "eps": eps, "weight_decay": weight_decay}
    for eps in (1e-8, 3e-6)
    for weight_decay in (0.0, 0.01)
] + [{"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}]


@pytest.mark.parametrize(
    ("shape", "num_steps", "settings"),
    [
        (shape, num_steps, settings)
        for shape, num_steps in (((1,), 7), ((18_011,), 7))
        for settings in PUBLISHED_SETTINGS
    ]
    # Of matrices what decays and what does not; make matrix takes all settings.
    + [
        pytest.param((4096, 1024), 4, settings, marks=() if here else pytest.mark.matrix)
        for settings, here in zip(
            PUBLISHED_SETTINGS, (True, False, False, False, True), strict=True
        )
    ]
    # 33 million weights: FP32 norms that are summed carelessly are off by a thousandth here.
    + [
        pytest.param((32_320, 1024), 2, PUBLISHED_SETTINGS[0], marks=pytest.mark.matrix),
        pytest.param((32_320, 1024), 2, PUBLISHED_SETTINGS[3], marks=pytest.mark.matrix),
    ],
    ids=str,
)
def test_nvlamb_with_the_settings_of_its_published_test(
    shape: tuple[int, ...], num_steps: int, settings: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(9876)
    param = Parameter(torch.rand(shape, generator=generator))
    grads = [torch.rand(shape, generator=generator) for _ in range(num_steps)]
    start = to_numpy(param)
    expected = lamb_nvlamb(
        [Layer(start, settings["weight_decay"])],
        ((settings["lr"], [to_numpy(grad)]) for grad in grads),
        betas=settings["betas"],
        eps=settings["eps"],
    )
    optimizer = LAMB([param], variant="nvlamb", **settings)
    for grad, (weight,) in zip(grads, expected, strict=True):
        take_steps(optimizer, [param], [[grad]])
        assert relative_error(param, weight, start) < 1e-6
