"""A weight that is used without its module too has no curvature; nothing else is taken for one."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from largebatch.optim import KFAC

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by dynamo
SYMBOLS, WIDTH = 11, 12


class Language(nn.Module):
    """Next symbols from symbols, (samples, 5) to (samples, 5, SYMBOLS)."""

    def __init__(self, head: Callable[[nn.Embedding, Tensor], Tensor] | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(SYMBOLS, WIDTH)
        self.hidden = nn.Linear(WIDTH, WIDTH)
        self.by_hand = head
        if head is None:
            self.head = nn.Linear(WIDTH, SYMBOLS, bias=False)
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.hidden(self.embedding(x)))
        return self.head(h) if self.by_hand is None else self.by_hand(self.embedding, h)


def train(model: nn.Module, optimizer: KFAC, numbers: range, called: Any = None) -> None:
    for number in numbers:
        x = torch.randint(SYMBOLS, (8, 5), generator=torch.Generator().manual_seed(number))
        out = (model if called is None else called)(x)
        optimizer.zero_grad()
        cross_entropy(out.float().flatten(0, 1), x.flatten()).backward()
        optimizer.step()


def by_linear(embedding: nn.Embedding, h: Tensor) -> Tensor:
    return linear(h, embedding.weight)


def by_product(embedding: nn.Embedding, h: Tensor) -> Tensor:
    return h @ embedding.weight.T


def computed_again(embedding: nn.Embedding, h: Tensor) -> Tensor:
    return checkpoint(by_linear, embedding, h, use_reentrant=False)


def weights(model: nn.Module) -> list[Tensor]:
    return [param.detach() for param in model.parameters()]


@pytest.mark.parametrize("head", [by_linear, by_product, computed_again])
def test_a_head_tied_by_hand_is_stepped_as_one_tied_by_its_module(
    head: Callable[[nn.Embedding, Tensor], Tensor],
) -> None:
    tied = Language(None)
    train(tied, KFAC(tied, lr=0.05), range(3))
    model = Language(head)
    optimizer = KFAC(model, lr=0.05)
    with pytest.warns(UserWarning, match=r"leaves 'embedding\.weight' to its fallback") as said:
        train(model, optimizer, range(1))
    assert len([w for w in said if "fallback: the model uses it" in str(w.message)]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(1, 3))
    assert [*optimizer.layer_stats()] == ["hidden.weight"]
    for found, expected in zip(weights(model), weights(tied), strict=True):
        torch.testing.assert_close(found, expected)


def test_what_was_found_goes_on_with_the_state() -> None:
    model = Language(by_linear)
    optimizer = KFAC(model, lr=0.05)
    with pytest.warns(UserWarning, match="without its module"):
        train(model, optimizer, range(2))
    saved, begun = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model)
    train(model, optimizer, range(2, 4))
    resumed = KFAC(begun, lr=0.05)
    resumed.load_state_dict(saved)
    train(begun, resumed, range(2, 4))
    for found, expected in zip(weights(begun), weights(model), strict=True):
        assert torch.equal(found, expected)


class Rows(nn.Module):
    """Two layers on a sequence; between them whatever is asked for."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(SYMBOLS, WIDTH, padding_idx=0)
        self.first, self.conv = nn.Linear(WIDTH, WIDTH), nn.Conv1d(WIDTH, WIDTH, 1)
        self.last, self.way = nn.Linear(WIDTH, SYMBOLS), forward
        self.memory: Tensor | None = None

    def forward(self, x: Tensor) -> Any:
        return self.way(self, x)


def plain(m: Rows, x: Tensor) -> Tensor:
    h = torch.relu_(m.first(m.embedding(x)))  # in place: of a view
    return m.last(h + m.conv(h.mT).mT)


def linear_twice(m: Rows, x: Tensor) -> Tensor:
    return m.last(linear(torch.tanh(m.first(m.embedding(x))), m.first.weight, m.first.bias))


def bias_alone(m: Rows, x: Tensor) -> Tensor:
    return m.last(m.first(m.embedding(x)) + m.first.bias)


def convolution_twice(m: Rows, x: Tensor) -> Tensor:
    h = m.conv(m.embedding(x).mT)
    return m.last(conv1d(torch.tanh(h), m.conv.weight).mT)


def before_its_module(m: Rows, x: Tensor) -> Tensor:
    return m.last(m.first(torch.mm(m.embedding(x).flatten(0, 1), m.first.weight).view(8, 5, -1)))


def weight_as_data(m: Rows, x: Tensor) -> Tensor:
    return m.last(m.first(m.embedding(x)) * m.last(m.first.weight).mean())


def in_low_precision(m: Rows, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):  # which casts a weight once for all its uses
        return linear_twice(m, x)


@pytest.mark.parametrize(
    ("way", "name"),
    [
        *((way, "first") for way in (linear_twice, bias_alone, before_its_module, weight_as_data)),
        *((convolution_twice, "conv"), (in_low_precision, "first")),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_weight_used_beside_its_module_has_no_curvature(
    way: Callable[[Rows, Tensor], Tensor], name: str
) -> None:
    model = Rows(way)
    optimizer = KFAC(model, lr=0.01)
    with pytest.warns(UserWarning, match=rf"leaves '{name}\.weight' to its fallback: the model"):
        train(model, optimizer, range(2))
    assert {f"{name}.weight"} == {"first.weight", "conv.weight", "last.weight"} & {
        name for name, p in model.named_parameters() if "used_elsewhere" in optimizer.state[p]
    }
    assert f"{name}.weight" not in optimizer.layer_stats()
    assert "last.weight" in optimizer.layer_stats()
    assert "exp_avg_sq" in optimizer.state[model.get_parameter(f"{name}.weight")]


def test_a_compiled_model_is_looked_through_as_well() -> None:
    torch._dynamo.reset()
    model = Language(by_linear)
    optimizer = KFAC(model, lr=0.05)
    with pytest.warns(UserWarning, match=r"leaves 'embedding\.weight' to its fallback"):
        train(model, optimizer, range(2), torch.compile(model, backend="aot_eager"))
    assert [*optimizer.layer_stats()] == ["hidden.weight"]


# What is no such use ----------------------------------------------------------------------------


def twice_by_the_module(m: Rows, x: Tensor) -> Tensor:
    return m.last(m.first(torch.tanh(m.first(m.embedding(x)))))


def segments(reentrant: bool) -> Callable[[Rows, Tensor], Tensor]:
    def way(m: Rows, x: Tensor) -> Tensor:
        h = m.embedding(x)
        return m.last(
            checkpoint(lambda h: m.first(torch.tanh(m.first(h))), h, use_reentrant=reentrant)
        )

    return way


def with_memory(m: Rows, x: Tensor) -> Tensor:
    """The state of the call before is a part of the graph, as in truncated backpropagation."""
    h = m.first(m.embedding(x) + (0 if m.memory is None else m.memory))
    m.memory = h
    return m.last(h)


def autocast_plain(m: Rows, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return twice_by_the_module(m, x)


ORDINARY = [
    *(plain, twice_by_the_module, segments(True), segments(False), with_memory, autocast_plain),
]


def once(model: Rows, x: Tensor) -> Tensor:
    return cross_entropy(model(x).float().flatten(0, 1), x.flatten())


def accumulated(model: Rows, x: Tensor) -> Tensor:
    return once(model, x[:4]) + once(model, x[4:])


def with_penalties(model: Rows, x: Tensor) -> Tensor:
    penalty = model.last.weight.square().sum() + model.first.bias.square().sum()
    norms = model.embedding.weight[1:].norm(dim=1).mean() + model.first.weight.abs().sum()
    return once(model, x) + 0.01 * penalty + 0.01 * norms


@pytest.mark.parametrize("loss", [once, accumulated, with_penalties])
@pytest.mark.parametrize("way", ORDINARY, ids=lambda way: getattr(way, "__name__", "way"))
def test_ordinary_models_keep_all_their_curvature(
    way: Callable[[Rows, Tensor], Tensor], loss: Callable[[Rows, Tensor], Tensor]
) -> None:
    assert_is_all_curved(Rows(way), loss)


def test_an_ordinary_compiled_model_keeps_all_its_curvature() -> None:
    torch._dynamo.reset()
    model = Rows(plain)
    assert_is_all_curved(model, once, torch.compile(model, backend="aot_eager"))


def assert_is_all_curved(
    model: Rows, loss: Callable[[Any, Tensor], Tensor], called: Any = None
) -> None:
    optimizer, way = KFAC(model, lr=0.01), model.way
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="KFAC")
        for number in range(2):
            x = torch.randint(SYMBOLS, (8, 5), generator=torch.Generator().manual_seed(number))
            optimizer.zero_grad()
            loss(model if called is None else called, x).backward(retain_graph=way is with_memory)
            optimizer.step()
            if way is with_memory and model.memory is not None:
                model.memory = model.memory.detach()
    expected = {"embedding.weight", "first.weight", "last.weight"}
    assert {*optimizer.layer_stats()} == expected | ({"conv.weight"} if way is plain else set())


def test_a_view_written_to_in_place_is_watched_as_one_that_is_not() -> None:
    found = []
    for inplace in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=inplace), nn.Linear(6, 3)).double()
        optimizer = KFAC(model, lr=0.1)
        out = model(torch.linspace(-1, 1, 40).double().reshape(2, 5, 4))
        (out.mul_(2.0) if inplace else out * 2.0).square().mean().backward()
        optimizer.step()
        state = optimizer.state[model[0].weight]
        found.append([state["factor_out"], state["factor_in"], state["items"], *weights(model)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
