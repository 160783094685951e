"""What torch's own suite checks of an optimizer, written anew for the six of this library."""

import copy
import io
from typing import Any

import pytest
import torch
from six_optimizers import MAKES, Make, loss_of, moved, network, train, weights_of
from torch import nn
from torch.optim import lr_scheduler as schedules
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from largebatch.optim import LAMB, LARS, SOAP, Shampoo

each = pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
SCHEDULES = {
    "none": lambda optimizer: None,
    "step": lambda optimizer: schedules.StepLR(optimizer, gamma=0.9, step_size=10),
    "joined": lambda optimizer: schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 0.4, total_iters=4),
            schedules.ExponentialLR(optimizer, 0.99),
        ],
        milestones=[5],
    ),
    "plateau": schedules.ReduceLROnPlateau,
}


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(map(torch.equal, weights_of(one), weights_of(other)))


@each
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_loss_goes_down_under_torchs_schedules(make: Make, schedule: str) -> None:
    model = network()
    optimizer = make(model)
    made = SCHEDULES[schedule](optimizer)
    losses = []
    for step in range(25):
        losses += train(model, optimizer, step, step + 1)
        if isinstance(made, schedules.ReduceLROnPlateau):
            made.step(losses[-1])
        elif made is not None:
            made.step()
    assert losses[-1] < 0.9 * losses[0]


@each
@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
def test_a_rate_in_a_tensor_of_one_element_is_a_rate(make: Make, shape: tuple[int, ...]) -> None:
    one, other = network(), network()
    lr = make(one).param_groups[0]["lr"]
    train(one, make(one), 0, 4)
    train(other, make(other, lr=torch.full(shape, lr)), 0, 4)
    for weight, wanted in zip(weights_of(other), weights_of(one), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)


@each
def test_saved_state_is_loaded_with_weights_only_and_goes_on_alike(make: Make) -> None:
    model = network()
    optimizer = make(model)
    train(model, optimizer, 0, 4)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = network(seed=1)
    resumed.load_state_dict(weights)
    other = make(resumed)
    other.load_state_dict(state)
    train(model, optimizer, 4, 8)
    train(resumed, other, 4, 8)
    assert same(model, resumed)


@pytest.mark.parametrize("name", MAKES)
def test_an_option_that_an_older_state_dict_lacks_takes_its_default(name: str) -> None:
    model = network()
    optimizer = MAKES[name](model)
    train(model, optimizer, 0, 2)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        for option in [*group]:
            if option not in ("params", "param_names"):
                del group[option]
    optimizer.load_state_dict(state)
    train(model, optimizer, 2, 4)


@pytest.mark.parametrize("name", MAKES)
def test_every_hook_is_called_once_a_step_and_global_ones_outside(name: str) -> None:
    model, called = network(), []
    optimizer = MAKES[name](model)
    handles = [
        register_optimizer_step_pre_hook(lambda *_: called.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: called.append("global post")),
        optimizer.register_step_pre_hook(lambda *_: called.append("pre")),
        optimizer.register_step_post_hook(lambda *_: called.append("post")),
    ]
    try:
        train(model, optimizer, 0, 1)
    finally:
        for handle in handles:
            handle.remove()
    assert called == ["global pre", "pre", "post", "global post"]


@each
def test_a_step_without_gradients_changes_nothing_and_makes_no_state(make: Make) -> None:
    model = network()
    optimizer, before = make(model), network()
    optimizer.step()
    assert same(model, before)
    assert not any(optimizer.state.values())


@each
def test_it_can_be_printed_with_the_values_of_its_options(make: Make) -> None:
    optimizer = make(network())
    printed = repr(optimizer)
    assert printed.startswith(f"{type(optimizer).__name__} (")
    assert f"lr: {optimizer.param_groups[0]['lr']}" in printed


def test_the_variant_is_printed_also_of_a_copy() -> None:
    optimizer = LAMB(network().parameters(), variant="nvlamb")
    for one in (optimizer, copy.deepcopy(optimizer)):
        assert repr(one).startswith("LAMB (variant: nvlamb\n")
    assert repr(LARS(network().parameters(), lr=1.0)).startswith("LARS (variant: paper\n")


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_state_of_others_is_kept_beside_its_parameter_and_beside_none(name: str) -> None:
    """As wrappers such as Lookahead leave it there."""
    model = network()
    optimizer = MAKES[name](model)
    train(model, optimizer, 0, 1)
    slow = torch.arange(3.0, dtype=torch.float64)
    optimizer.state[model[0].weight] |= {"slow": slow, "note": "mine"}
    optimizer.state["lookahead"] = {"k": 5}
    other = MAKES[name](model)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    kept = other.state[model[0].weight]
    assert torch.equal(kept["slow"], slow)
    assert kept["note"] == "mine"
    assert other.state["lookahead"] == {"k": 5}
    train(model, other, 1, 2)


@pytest.mark.parametrize("name", ["LARS", "LAMB", "Shampoo", "SOAP", "KFAC"])
def test_names_decide_which_state_is_whose(name: str) -> None:
    model, twin = network(), network()
    ours = [*model.named_parameters()]
    groups = [{"params": ours[:2], "lr": 0.03}, {"params": ours[2:], "lr": 0.02}]
    optimizer = MAKES[name](model, groups)
    train(model, optimizer, 0, 3)
    twin.load_state_dict(model.state_dict())
    theirs = [(f"module.{n}", p) for n, p in twin.named_parameters()]
    turned = [{"params": theirs[:1:-1]}, {"params": theirs[1::-1]}]
    other = MAKES[name](twin, turned)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["lr"] for group in other.param_groups] == [0.02, 0.03]
    assert other.param_groups[0]["param_names"] == ["module.2.bias", "module.2.weight"]
    train(model, optimizer, 3, 6)
    train(twin, other, 3, 6)
    for weight, wanted in zip(weights_of(twin), weights_of(model), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)


def test_names_in_another_group_or_order_than_saved_are_refused_by_name() -> None:
    params = [*network().named_parameters()]
    saved = LAMB([{"params": params[:2]}, {"params": params[2:]}]).state_dict()
    mixed = LAMB([{"params": params[::2]}, {"params": params[1::2]}])
    with pytest.raises(ValueError, match=r"no group of the state dict has .*0\.weight"):
        mixed.load_state_dict(saved)
    renamed = [("other", params[1][1]), params[0], *params[2:]]
    with pytest.raises(ValueError, match=r"parameter .0\.weight. in another place"):
        LAMB([{"params": renamed[:2]}, {"params": renamed[2:]}]).load_state_dict(saved)


# Groups, read at each step ---------------------------------------------------------------------


def two_groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": [*model[0].parameters()]}, {"params": [*model[2].parameters()]}]


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
def test_groups_that_are_edited_are_read_as_they_are(name: str) -> None:
    model = network()
    optimizer = MAKES[name](model, two_groups(model))
    train(model, optimizer, 0, 2)
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 0.0
    went = moved(model, optimizer, 2)
    assert went["2.weight"] == 0
    assert went["0.weight"] > 0
    optimizer.param_groups[1] = dict(optimizer.param_groups[1]) | {"lr": 0.0}  # another dictionary
    assert not any(moved(model, optimizer, 3).values())
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
    old, new = model[2].weight, nn.Parameter(model[2].weight.detach().clone())
    model[2].weight = new
    for group in optimizer.param_groups:
        group["params"] = [new if param is old else param for param in group["params"]]
    assert moved(model, optimizer, 4)["2.weight"] > 0
    del optimizer.param_groups[1]
    went = moved(model, optimizer, 5)
    assert went["0.weight"] == went["0.bias"] == 0
    assert went["2.weight"] > 0


@pytest.mark.parametrize("name", ["LARS", "LAMB", "Shampoo", "SOAP", "KFAC"])
def test_a_group_without_names_is_taken_where_others_have_names(name: str) -> None:
    """As Lightning's BackboneFinetuning adds it."""
    model = network()
    optimizer = MAKES[name](model, [{"params": [*model[2].named_parameters()]}])
    train(model, optimizer, 0, 1)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.02})
    assert all(moved(model, optimizer, 1).values())
    other = MAKES[name](model, [{"params": [*model[2].named_parameters()]}])
    other.add_param_group({"params": [*model[0].parameters()]})
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[1]["lr"] == 0.02


@pytest.mark.parametrize("name", ["LARS", "LAMB", "Shampoo", "SOAP"])
def test_a_model_in_the_place_of_its_parameters_is_refused_in_a_sentence(name: str) -> None:
    model = network()
    cls = {"LARS": LARS, "LAMB": LAMB, "Shampoo": Shampoo, "SOAP": SOAP}[name]
    with pytest.raises(TypeError, match=rf"got the Sequential itself: write {name}\(model.param"):
        cls(model, lr=0.1)
    with pytest.raises(TypeError, match=r"got the method 'named_parameters': call it"):
        cls(model.named_parameters, lr=0.1)
    with pytest.raises(TypeError, match="LARS has no default learning rate, because"):
        LARS(model.parameters())


# Layout, dtype, compilers ----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["LARS", "LAMB"])
@pytest.mark.parametrize("begins", [torch.contiguous_format, torch.channels_last], ids=str)
def test_strides_may_change_between_steps(name: str, begins: torch.memory_format) -> None:
    other = {torch.contiguous_format: torch.channels_last}.get(begins, torch.contiguous_format)
    ends = []
    for convert in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 4))
        model.to(memory_format=begins)
        optimizer = MAKES[name](model)
        for step in range(8):
            if convert and step in (3, 6):
                model.to(memory_format=other if step == 3 else begins)
            inputs = torch.randn(16, 3, 3, 3, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            model(inputs).square().mean().backward()
            optimizer.step()
        ends.append(weights_of(model))
    for weight, wanted in zip(*ends, strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["LAMB", "Shampoo", "SOAP", "KFAC"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_steps_are_counted_in_fp32_whatever_the_default_dtype(name: str, dtype: Any) -> None:
    model = network()
    try:
        torch.set_default_dtype(dtype)
        optimizer = MAKES[name](model)
        train(model, optimizer, 0, 2)
        steps = {state["step"].dtype for state in optimizer.state.values()}
    finally:
        torch.set_default_dtype(torch.float32)
    assert steps == {torch.float32}


@each
@pytest.mark.filterwarnings("ignore")  # of torch's own frames, as it traces them
def test_a_compiled_step_is_the_step(make: Make) -> None:
    torch._dynamo.reset()
    plain, compiled = network(), network()
    optimizer, other = make(plain), make(compiled)
    step = torch.compile(lambda: other.step(), backend="eager")

    def whole(number: int) -> None:
        other.zero_grad()
        loss_of(compiled, number).backward()
        other.step()

    whole_compiled = torch.compile(whole, backend="eager")
    for number in range(6):
        train(plain, optimizer, number, number + 1)
        if number == 5:
            whole_compiled(number)
            break
        other.zero_grad()
        loss_of(compiled, number).backward()
        step()
    for weight, wanted in zip(weights_of(compiled), weights_of(plain), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-5, atol=1e-7)


# Against torch's ------------------------------------------------------------------------------

ADAM = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
SGD = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
EQUALS = {
    "LAMB": (LAMB, ADAM, {"adapt": False}, torch.optim.AdamW),
    "LARS": (LARS, SGD, {"adapt": False}, torch.optim.SGD),
    "Shampoo": (Shampoo, ADAM, {"precondition": False}, torch.optim.AdamW),
    "SOAP": (SOAP, ADAM, {"precondition": False}, torch.optim.AdamW),
}


@pytest.mark.parametrize("name", EQUALS)
def test_without_preconditioning_it_is_torchs_to_the_last_digits(name: str) -> None:
    cls, options, group, theirs = EQUALS[name]
    models = [network().double(), network().double()]
    ours = cls([{"params": [*models[0].parameters()], **group}], **options)
    theirs_made = theirs(models[1].parameters(), **options)
    for step in range(20):
        for model, optimizer in zip(models, (ours, theirs_made), strict=True):
            draw = torch.Generator().manual_seed(step)
            optimizer.zero_grad()
            inputs = torch.randn(32, 6, generator=draw, dtype=torch.float64)
            model(inputs).square().mean().backward()
            optimizer.step()
    for weight, wanted in zip(weights_of(models[0]), weights_of(models[1]), strict=True):
        torch.testing.assert_close(weight, wanted, rtol=1e-13, atol=1e-15)
