"""Master weights: low-precision weights follow FP32 ones and lose no small update."""

import io

import pytest
import torch
from optimizer_rows import same_bits, snapshot, take_steps
from torch import Tensor
from torch.nn import Parameter
from variant_bundles import each_variant
from variant_threads import one_thread as one_thread

from largebatch.optim import LAMB, LARS

pytestmark = pytest.mark.usefixtures("one_thread")


LOW_PRECISION = (torch.bfloat16, torch.float16)
SMALL_LR = {LAMB: 1e-4, LARS: 0.01}  # with LARS's η of 1e-3: steps of 1e-4 and less of a weight


def low_precision_layers(dtype: torch.dtype) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in ((40,), (6, 5))
    ]


def low_precision_grads(dtype: torch.dtype, num_steps: int) -> list[list[Tensor]]:
    """Gradients that mostly point one way: small steps that add up."""
    generator = torch.Generator().manual_seed(1)
    return [
        [(1 + torch.rand(shape, generator=generator)).to(dtype) for shape in ((40,), (6, 5))]
        for _ in range(num_steps)
    ]


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@each_variant
def test_master_weights_follow_fp32_and_lose_no_small_update(
    kind: type[torch.optim.Optimizer], variant: str, dtype: torch.dtype
) -> None:
    options = {"lr": SMALL_LR[kind], "weight_decay": 0.01, "variant": variant}
    params, start = low_precision_layers(dtype), low_precision_layers(dtype)
    twins = [Parameter(param.detach().float()) for param in params]
    optimizer = kind(params, master_weights=True, **options)
    twin_optimizer = kind(twins, **options)
    for step_grads in low_precision_grads(dtype, 60):
        take_steps(optimizer, params, [step_grads])
        take_steps(twin_optimizer, twins, [[grad.float() for grad in step_grads]])
        assert same_bits(params, [twin.to(dtype) for twin in twins])
    masters = [optimizer.state[param]["master_weight"] for param in params]
    assert same_bits(masters, twins)
    assert not same_bits(params, start)


def test_without_master_weights_such_updates_are_lost() -> None:
    params, start = low_precision_layers(torch.bfloat16), low_precision_layers(torch.bfloat16)
    take_steps(LAMB(params, lr=1e-4), params, low_precision_grads(torch.bfloat16, 60))
    still = [(param == old).double().mean() for param, old in zip(params, start, strict=True)]
    assert min(still) > 0.9


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@each_variant
def test_master_weights_survive_a_saved_state_dict(
    kind: type[torch.optim.Optimizer], variant: str, dtype: torch.dtype
) -> None:
    options = {"lr": SMALL_LR[kind], "variant": variant, "master_weights": True}
    grads = low_precision_grads(dtype, 40)
    params = low_precision_layers(dtype)
    optimizer = kind(params, **options)
    take_steps(optimizer, params, grads[:20])

    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "params": params}, file)
    file.seek(0)
    with torch.serialization.safe_globals([Parameter]):
        saved = torch.load(file, weights_only=True)
    resumed_params = [Parameter(param.detach().clone()) for param in saved["params"]]
    resumed = kind(resumed_params, **options)
    resumed.load_state_dict(saved["optimizer"])
    assert same_bits(snapshot(optimizer), snapshot(resumed))
    masters = [resumed.state[param]["master_weight"] for param in resumed_params]
    assert {master.dtype for master in masters} == {torch.float32}
    assert not same_bits(masters, [param.detach().float() for param in resumed_params])

    take_steps(optimizer, params, grads[20:])
    take_steps(resumed, resumed_params, grads[20:])
    assert same_bits(snapshot(optimizer), snapshot(resumed))
