"""K-FAC watches training: what else goes through the model leaves nothing in its factors."""

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn.functional import cross_entropy, softplus
from torch.utils.checkpoint import checkpoint

from largebatch.optim import KFAC
from largebatch.optim.kronecker.factors import averages

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by dynamo
Data = tuple[Tensor, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def data(number: int) -> Data:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 6, generator=generator).double()
    return x, torch.randint(4, (16,), generator=generator)


class Seen:
    """What the layers' factors hold after some steps, and where the weights are."""

    def __init__(self, aside: Callable[[nn.Module, KFAC, Data], object], **options: Any) -> None:
        self.model = network()
        self.optimizer = KFAC(self.model, lr=0.05, relative_damping=False, **options)
        for number in range(3):
            x, y = data(number)
            self.optimizer.zero_grad()
            aside(self.model, self.optimizer, data(number + 50))
            cross_entropy(self.model(x), y).backward()
            self.optimizer.step()

    def tensors(self) -> list[Tensor]:
        found = [param.detach() for param in self.model.parameters()]
        for layer in self.optimizer._owned():
            state = self.optimizer.state[layer.weight]
            found += [*averages(layer, state), state["items"]]
        return found


def assert_same(one: list[Tensor], other: list[Tensor], rtol: float = 0.0) -> None:
    for found, expected in zip(one, other, strict=True):
        torch.testing.assert_close(found, expected, rtol=rtol, atol=0.0)


def adversarial(model: nn.Module, _: KFAC, batch: Data) -> None:
    x, y = batch[0].requires_grad_(), batch[1]
    grad(cross_entropy(model(x), y), x)


def saliency(model: nn.Module, _: KFAC, batch: Data) -> None:
    x = batch[0].requires_grad_()
    model(x)[:, 0].sum().backward(inputs=[x])


def of_a_frozen_model(model: nn.Module, _: KFAC, batch: Data) -> None:
    x = batch[0].requires_grad_()
    model.requires_grad_(False)
    model(x).sum().backward()
    model.requires_grad_(True)


def gradients_of_layers(model: nn.Module, _: KFAC, batch: Data) -> None:
    grad(cross_entropy(model(batch[0]), batch[1]), [*model.parameters()])


def penalty_of_a_pass_of_its_own(model: nn.Module, _: KFAC, batch: Data) -> None:
    x = batch[0].requires_grad_()
    (slope,) = grad(model(x).sum(), x, create_graph=True)
    (0.0 * slope.square().sum()).backward()


def of_each_example(model: nn.Module, _: KFAC, batch: Data) -> None:
    params = {name: param.detach() for name, param in model.named_parameters()}

    def loss(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(torch.func.functional_call(model, params, (x[None],)), y[None])

    torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, *batch)


def with_other_weights(model: nn.Module, _: KFAC, batch: Data) -> None:
    fast = {name: (2 * param.detach()).requires_grad_() for name, param in model.named_parameters()}
    cross_entropy(torch.func.functional_call(model, fast, (batch[0],)), batch[1]).backward()


def validation(model: nn.Module, _: KFAC, batch: Data) -> None:
    cross_entropy(model(batch[0]), batch[1])


def of_an_averaged_copy(model: nn.Module, _: KFAC, batch: Data) -> None:
    copy.deepcopy(model)(batch[0]).sum().backward()


def thrown_away_by_the_module(model: nn.Module, _: KFAC, batch: Data) -> None:
    """As a generator's pass through the discriminator ends."""
    model(batch[0]).sum().backward()
    model.zero_grad()


def zeroed_in_place(model: nn.Module, _: KFAC, batch: Data) -> None:
    model(batch[0]).sum().backward()
    model.zero_grad(set_to_none=False)


def thrown_away_by_hand(model: nn.Module, optimizer: KFAC, batch: Data) -> None:
    optimizer.items(5)
    model(batch[0]).sum().backward()
    for param in model.parameters():
        param.grad = None
    optimizer.items(16)


ASIDE = [
    *(adversarial, saliency, of_a_frozen_model, gradients_of_layers, penalty_of_a_pass_of_its_own),
    *(of_each_example, with_other_weights, validation, of_an_averaged_copy),
    *(thrown_away_by_the_module, zeroed_in_place, thrown_away_by_hand),
]


@pytest.fixture(scope="module")
def plain() -> Seen:
    return Seen(lambda *_: None)


@pytest.mark.parametrize("aside", ASIDE, ids=lambda aside: aside.__name__)
def test_passes_that_are_not_training_leave_nothing(
    aside: Callable[[nn.Module, KFAC, Data], object], plain: Seen
) -> None:
    seen = Seen(aside)
    if aside is penalty_of_a_pass_of_its_own:  # whose own gradient is zero, and stays in p.grad
        assert all(param.grad is not None for param in seen.model.parameters())
    assert_same(seen.tensors(), plain.tensors())


def step_of(losses: Callable[[nn.Module, Tensor, Tensor], Any]) -> list[Tensor]:
    """The factors and weights after a step whose backward passes `losses` makes."""
    seen = Seen(lambda *_: None)
    x, y = data(9)
    seen.optimizer.zero_grad()
    losses(seen.model, x, y)
    seen.optimizer.step()
    return seen.tensors()


def test_several_backward_passes_of_one_graph_are_the_pass_of_their_sum() -> None:
    def at_once(model: nn.Module, x: Tensor, y: Tensor) -> None:
        out = model(x)
        (cross_entropy(out, y) + out.square().mean()).backward()

    def apart(model: nn.Module, x: Tensor, y: Tensor) -> None:
        out = model(x)
        (0.25 * cross_entropy(out, y)).backward(retain_graph=True)
        out.square().mean().backward(retain_graph=True)
        grad(out.sum(), [*model.parameters()], retain_graph=True)  # between them, of no account
        (0.75 * cross_entropy(out, y)).backward()

    assert_same(step_of(apart), step_of(at_once), rtol=1e-9)


def test_a_penalty_on_the_training_pass_itself_counts_it_once() -> None:
    def penalised(model: nn.Module, x: Tensor, y: Tensor, weight: float = 0.0) -> None:
        loss = cross_entropy(model(x.requires_grad_()), y)
        (slope,) = grad(loss, x, create_graph=True)
        (loss + weight * slope.square().sum()).backward()

    def plain_loss(model: nn.Module, x: Tensor, y: Tensor) -> None:
        cross_entropy(model(x), y).backward()

    assert_same(step_of(penalised), step_of(plain_loss))


def test_accumulated_passes_count_whatever_is_done_between_them() -> None:
    def halves(model: nn.Module, x: Tensor, y: Tensor) -> None:
        for part in (slice(0, 8), slice(8, 16)):
            (cross_entropy(model(x[part]), y[part]) / 2).backward()
            saliency(model, None, data(7))  # type: ignore[arg-type] # it needs none
            for param in model.parameters():
                param.grad.mul_(1.0)  # as clipping writes to it

    def whole(model: nn.Module, x: Tensor, y: Tensor) -> None:
        cross_entropy(model(x), y).backward()

    assert_same(step_of(halves), step_of(whole), rtol=1e-9)


def test_a_discriminator_trained_in_turns_with_its_generator_sees_its_own_passes() -> None:
    """The usual loop: the generator's loss goes through the discriminator's weights as well."""

    def train(generator_steps: bool) -> list[Tensor]:
        critic = network()
        optimizer = KFAC(critic, lr=0.05)
        for number in range(3):
            real, fake = data(number)[0], data(number + 20)[0]
            critic.zero_grad()
            softplus(-critic(real)).mean().backward()
            softplus(critic(fake)).mean().backward()
            optimizer.step()
            if generator_steps:
                softplus(-critic(fake.requires_grad_())).mean().backward()
        return [param.detach() for param in critic.parameters()]

    assert_same(train(True), train(False))


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.inner, self.reentrant = network(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_that_is_computed_again_as_a_whole_counts_its_samples_once(reentrant: bool) -> None:
    found = []
    for model in (Checkpointed(None), Checkpointed(reentrant)):
        optimizer = KFAC(model, lr=0.05)
        x, y = data(0)
        cross_entropy(model(x.requires_grad_()), y).backward()
        optimizer.step()
        state = optimizer.state[model.inner[0].weight]
        found.append([state["items"], state["factor_out"], model.inner[0].weight.detach()])
    assert_same(*found)


# The model and the optimizer --------------------------------------------------------------------


@pytest.mark.parametrize("order", ["before", "after", "in place", "afterwards called before"])
def test_a_compiled_model_is_watched_all_the_same(order: str, plain: Seen) -> None:
    torch._dynamo.reset()
    model = network()
    called: Any = model
    if order in ("before", "afterwards called before"):
        called = torch.compile(model, backend="eager")
    if order == "afterwards called before":
        called(data(0)[0])
    optimizer = KFAC(called, lr=0.05, relative_damping=False)
    if order == "after":
        called = torch.compile(model, backend="eager")
    if order == "in place":
        model.compile(backend="eager")
    for number in range(3):
        x, y = data(number)
        optimizer.zero_grad()
        cross_entropy(called(x), y).backward()
        optimizer.step()
    found = [param.detach() for param in model.parameters()]
    assert_same(found, plain.tensors()[: len(found)], rtol=1e-9)
    assert [*optimizer.layer_stats()] == ["0.weight", "2.weight"]


def test_a_compiled_training_step_is_the_plain_one(plain: Seen) -> None:
    torch._dynamo.reset()
    model = network()
    optimizer = KFAC(model, lr=0.05, relative_damping=False)

    @torch.compile(backend="eager")
    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()

    for number in range(3):
        step(*data(number))
    found = [param.detach() for param in model.parameters()]
    assert_same(found, plain.tensors()[: len(found)], rtol=1e-9)


def test_hooks_go_with_the_optimizer_and_a_model_can_be_scripted_then() -> None:
    model = network()
    optimizer = KFAC(model, lr=0.05)
    model(data(0)[0]).sum().backward()
    optimizer.step()
    hooked = [*model.modules()]
    assert any(module._forward_hooks for module in hooked)
    del optimizer
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in hooked)
    x = data(1)[0]
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
