"""Layers that are not tensors: several fused in one, or one weight under two names."""

from typing import Any

import pytest
import torch
from optimizer_rows import same_bits, take_steps
from torch import Tensor, nn
from torch.nn import Parameter
from variant_bundles import BUNDLES, each_variant
from variant_threads import one_thread as one_thread

pytestmark = pytest.mark.usefixtures("one_thread")


FUSED = {
    "a number": ((12, 5), {"norm_groups": 3}, (4, 4, 4), 0),
    "sizes": ((12, 5), {"norm_groups": (6, 2, 4)}, (6, 2, 4), 0),
    "another dimension": ((2, 9, 3), {"norm_groups": 3, "norm_dim": 1}, (3, 3, 3), 1),
    "the last dimension": ((2, 7), {"norm_groups": (5, 2), "norm_dim": -1}, (5, 2), 1),
}


@pytest.mark.parametrize("fused", FUSED.values(), ids=FUSED)
@each_variant
def test_the_layers_of_a_fused_tensor_step_as_separate_tensors_do(
    kind: type[torch.optim.Optimizer], variant: str, fused: Any
) -> None:
    shape, options, sizes, dim = fused
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(shape, generator=generator).split(sizes, dim) for _ in range(11)]
    weight, *grads = [
        [part * 10.0 ** (layer - 2) for layer, part in enumerate(layers)] for layers in parts
    ]

    def make_optimizer(params: list[tuple[str, Parameter]], **group: Any) -> Any:
        return kind([{"params": params, **group}], lr=0.05, weight_decay=0.1, variant=variant)

    separate = [Parameter(part) for part in weight]
    alone = make_optimizer([(f"qkv[{number}]", part) for number, part in enumerate(separate)])
    whole = Parameter(torch.cat(weight, dim))
    together = make_optimizer([("qkv", whole)], **options)
    unsplit = Parameter(torch.cat(weight, dim))
    one_ratio = make_optimizer([("qkv", unsplit)])
    for step_grads in grads:
        take_steps(alone, separate, [step_grads])
        take_steps(together, [whole], [[torch.cat(step_grads, dim)]])
        take_steps(one_ratio, [unsplit], [[torch.cat(step_grads, dim)]])
    for part, expected in zip(whole.detach().split(sizes, dim), separate, strict=True):
        torch.testing.assert_close(part, expected.detach(), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(whole, unsplit, rtol=1e-4)

    expected_stats = alone.layer_stats()
    assert together.layer_stats().keys() == expected_stats.keys()
    for name, stats in together.layer_stats().items():
        torch.testing.assert_close(stats, expected_stats[name], rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", BUNDLES)
@pytest.mark.parametrize(
    "options",
    [
        {"norm_groups": 5},
        {"norm_groups": (6, 5)},
        {"norm_groups": 0},
        {"norm_groups": (12, 0)},
        {"norm_groups": 2, "norm_dim": 2},
    ],
    ids=str,
)
def test_a_split_that_does_not_fit_the_tensor_is_refused(
    kind: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    group = {"params": [("qkv", Parameter(torch.ones(12, 5)))], **options}
    with pytest.raises(ValueError, match=r"norm_(groups|dim)"):
        kind([group], lr=0.1)


class Tied(nn.Module):
    """An embedding whose weight is also the output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.output = nn.Linear(4, 6, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.output(self.embedding(tokens))
        return logits


@each_variant
def test_a_tied_weight_is_one_layer_with_one_ratio(
    kind: type[torch.optim.Optimizer], variant: str
) -> None:
    torch.manual_seed(0)
    model = Tied()
    optimizer: Any = kind(model.named_parameters(), lr=0.1, weight_decay=0.1, variant=variant)
    alone = Parameter(model.embedding.weight.detach().clone())
    alone_optimizer: Any = kind([alone], lr=0.1, weight_decay=0.1, variant=variant)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.arange(6)), torch.arange(6)).backward()
        grad = model.embedding.weight.grad
        assert grad is not None
        take_steps(alone_optimizer, [alone], [[grad]])
        optimizer.step()
    assert list(optimizer.layer_stats()) == ["embedding.weight"]
    assert same_bits([model.output.weight], [alone])
