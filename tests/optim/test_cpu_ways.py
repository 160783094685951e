"""What a CPU does with small and large layers is what is done with them anywhere."""

import math
from typing import Any

import pytest
import torch
from contract_rows import set_amp
from optimizer_rows import snapshot
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from largebatch.optim import LAMB, LARS
from largebatch.optim.layerwise import chunks, cpu_blocks

Options = dict[str, Any]

# Some of a length, one of its own, one of several rows and blocks and a rest, one of a fused pair.
SHAPES = ((7,), (5, 3), (3, 5), (), (70, 40), (15,), (4, 6))
STEPS = 5

LAMB_CASES: dict[str, Options] = {
    "plain": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1},
    "l2": {"weight_decay": 0.1, "decay": "gradient"},
    "decoupled": {"weight_decay": 0.1, "decay": "decoupled", "lr": torch.tensor(0.02)},
    "clip": {"weight_decay": 0.1, "max_grad_norm": 0.5},
    "lr corrected": {"bias_correction": "lr", "trust_bounds": (0.01, 10.0)},
    "uncorrected": {"bias_correction": "none", "maximize": True},
}
LARS_CASES: dict[str, Options] = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "clip": {"weight_decay": 0.1, "max_grad_norm": 0.5, "maximize": True},
    "nesterov": {"weight_decay": 0.1, "nesterov": True},
    "joint": {"weight_decay": 0.1, "denominator": "joint", "maximize": True},
    "inside": {"weight_decay": 0.1, "lr_in_buffer": True, "lr": torch.tensor(0.02)},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.1, "clip_to_lr": True},
}
CASES = [
    *((LAMB, name) for name in LAMB_CASES),
    *((LARS, name) for name in LARS_CASES),
]
each_case = pytest.mark.parametrize(("kind", "name"), CASES, ids=str)


def options_of(kind: Any, name: str) -> Options:
    return {"lr": 0.02, **(LAMB_CASES if kind is LAMB else LARS_CASES)[name]}


def stepped(kind: Any, options: Options, dtype: torch.dtype, amp: bool = True) -> list[Tensor]:
    """Weights and state after some steps, in which parameters begin, rest and are masked."""
    generator = torch.Generator().manual_seed(0)

    def drawn(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    params = [Parameter(drawn(shape)) for shape in SHAPES]
    split = {"params": params[6:], "norm_groups": 2}
    optimizer = kind([{"params": params[:6]}, split], **options)
    for step in range(STEPS):
        for place, param in enumerate(params):
            param.grad = None if step == 1 and place % 3 == 0 else 4 * drawn(tuple(param.shape))
        if amp:
            set_amp(optimizer, found_inf=float(step == 2), grad_scale=4.0)
        if kind is LAMB and step == 3:
            optimizer.param_groups[0]["betas"] = (0.8, 0.95)
        optimizer.step()
    return snapshot(optimizer)


@pytest.fixture(params=["packed", "streamed", "streamed, nothing kept"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_blocks, "BLOCK_OF_THREAD", 320)
    if request.param != "packed":
        monkeypatch.setattr(chunks, "PACKED_AT_MOST", 0)
    if "nothing" in request.param:
        monkeypatch.setattr(cpu_blocks, "KEPT", 0)
    return str(request.param)


@each_case
def test_packing_and_streaming_are_the_general_way(
    kind: Any, name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(kind, name)
    ours = stepped(kind, options, torch.float64)
    monkeypatch.setattr(kind, "_has_cpu_way", lambda self, group: False)
    theirs = stepped(kind, options, torch.float64)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("kind", [LAMB, LARS])
@pytest.mark.parametrize("master_weights", [False, True])
def test_narrow_parameters_too(
    kind: Any, master_weights: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"lr": 0.02, "weight_decay": 0.1, "master_weights": master_weights}
    ours = stepped(kind, options, torch.bfloat16)
    monkeypatch.setattr(kind, "_has_cpu_way", lambda self, group: False)
    theirs = stepped(kind, options, torch.bfloat16)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)
    wide = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.dtype == torch.float32]
    assert len(wide) == len(ours) - len(SHAPES)
    if master_weights:  # nothing has been rounded on the way
        torch.testing.assert_close(*zip(*wide, strict=True), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [LAMB, LARS])
def test_norms_beyond_fp32_are_finite(kind: Any, way: str) -> None:
    param = Parameter(1e25 * torch.ones(70, 40))
    param.grad = 1e30 * torch.ones(70, 40)
    optimizer = kind([param], lr=0.5, weight_decay=0.1)
    optimizer.step()
    (stats,) = optimizer.layer_stats().values()
    assert stats["weight_norm"].item() == pytest.approx(1e25 * math.sqrt(2800), rel=1e-5)
    update = 1e24 if kind is LAMB else 1e30
    assert stats["update_norm"].item() == pytest.approx(update * math.sqrt(2800), rel=1e-5)
    assert torch.isfinite(param).all()


class Largest(TorchDispatchMode):
    """Sees the largest tensor that an operator has made, in elements of memory."""

    numel = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if torch.is_tensor(x)]
        made = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in given}
        for x in torch.utils._pytree.tree_leaves(made):
            if torch.is_tensor(x) and x.untyped_storage().data_ptr() not in known:
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return made


@pytest.mark.parametrize("kind", [LAMB, LARS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_working_memory_is_bounded_whatever_a_layers_size(
    kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_blocks, "BLOCK_OF_THREAD", 1 << 14)
    monkeypatch.setattr(cpu_blocks, "KEPT", 1 << 16)
    numel = (1 << 19) + 3
    params = [Parameter(torch.ones(numel, dtype=dtype)) for _ in range(2)]
    optimizer = kind(params, lr=0.01, weight_decay=0.1, max_grad_norm=1.0)
    with Largest() as largest:
        for step in range(2):
            for param in params:
                param.grad = torch.ones_like(param)
            if step:  # the state is there
                largest.numel = 0
            optimizer.step()
    assert 0 < largest.numel <= max(1 << 16, (1 << 14) * torch.get_num_threads())


@pytest.mark.parametrize("trust_coefficient", [1e-3, 1e-6, 1e-9])
def test_a_small_ratio_keeps_its_digits(trust_coefficient: float) -> None:
    """Beside the kernel's own way to scale what goes into the buffer, which is 1 - (1 - ratio)."""
    torch.manual_seed(0)
    numel = chunks.PACKED_AT_MOST + 5
    param, grad = Parameter(torch.randn(numel)), torch.randn(numel)
    before, param.grad = param.detach().double(), grad.clone()
    optimizer = LARS([param], lr=1.0, trust_coefficient=trust_coefficient)
    optimizer.step()
    ratio = trust_coefficient * before.norm() / grad.double().norm()
    buffer = optimizer.state[param]["momentum_buffer"].double()
    torch.testing.assert_close(buffer, ratio * grad.double(), rtol=1e-6, atol=0)


def test_an_update_that_cancels_has_the_right_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "PACKED_AT_MOST", 0)
    param = Parameter(torch.linspace(0.9, 1.1, 2000))
    param.grad = -torch.ones_like(param)  # a direction of -1
    optimizer = LAMB([param], lr=0.0, weight_decay=1.0, eps=0.0)
    optimizer.step()
    (stats,) = optimizer.layer_stats().values()
    expected = (param.detach().double() - 1).norm()
    torch.testing.assert_close(stats["update_norm"].double(), expected, rtol=1e-4, atol=0)
