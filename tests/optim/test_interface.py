"""Options, refusals, statistics and imports."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from optimizer_rows import OUR_ROWS, Row, make_grads, make_layers, same_bits, take_steps
from torch import nn

import largebatch.optim
from largebatch.optim import LAMB, LARS

each_of_ours = pytest.mark.parametrize("row", OUR_ROWS, ids=lambda row: row.name)
nan = float("nan")


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (LAMB, {"lr": -1.0}, r"lr must be in \[0, inf\), got -1.0"),
        (LAMB, {"lr": nan}, r"lr must be in \[0, inf\), got nan"),
        (LAMB, {"lr": math.inf}, r"lr must be in \[0, inf\), got inf"),
        (
            LAMB,
            {"lr": torch.ones(2)},
            r"a float or a tensor of one element, got shape \(2,\)",
        ),
        (LAMB, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \(0.9, 1.0\)"),
        (LAMB, {"betas": (nan, 0.9)}, r"betas must be two numbers in \[0, 1\)"),
        (LAMB, {"betas": (0.9,)}, r"betas must be two numbers in \[0, 1\)"),
        (LAMB, {"eps": -1e-6}, r"eps must be in \[0, inf\), got -1e-06"),
        (LAMB, {"eps": nan}, r"eps must be in \[0, inf\), got nan"),
        (LAMB, {"weight_decay": -0.1}, r"weight_decay must be in \[0, inf\), got -0.1"),
        (LAMB, {"maximize": "no"}, "maximize must be True or False, got no"),
        (LAMB, {"variant": "larc"}, r"variant must be one of paper, .*timm.*, got 'larc'"),
        (LARS, {"lr": nan}, r"lr must be in \[0, inf\), got nan"),
        (LARS, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (LARS, {"momentum": nan}, r"momentum must be in \[0, 1\), got nan"),
        (LARS, {"weight_decay": nan}, r"weight_decay must be in \[0, inf\), got nan"),
        (LARS, {"trust_coefficient": 0.0}, "trust_coefficient must be > 0, got 0.0"),
        (LARS, {"trust_coefficient": nan}, "trust_coefficient must be > 0, got nan"),
        (LARS, {"eps": -1.0}, r"eps must be in \[0, inf\), got -1.0"),
        (LARS, {"nesterov": 1}, "nesterov must be True or False, got 1"),
        (LARS, {"nesterov": True, "momentum": 0.0}, r"in \(0, 1\) with nesterov, got 0.0"),
        (LARS, {"variant": "apex"}, r"variant must be one of paper, larc, .*, got 'apex'"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value_and_the_range(
    optimizer: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        optimizer(make_layers(), **{"lr": 0.1, **options})


@each_of_ours
@pytest.mark.parametrize("bad", [{"lr": nan}, {"weight_decay": -1.0}, {"adapt": "no"}])
def test_a_bad_group_is_refused_and_leaves_the_optimizer_as_it_was(
    row: Row, bad: dict[str, Any]
) -> None:
    params = make_layers()
    with pytest.raises(ValueError, match=next(iter(bad))):
        row.make([{"params": params, **bad}])
    optimizer = row.make(params[:3])
    with pytest.raises(ValueError, match=next(iter(bad))):
        optimizer.add_param_group({"params": params[3:], **bad})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": params[3:]})


@each_of_ours
def test_a_complex_parameter_is_refused_by_name(row: Row) -> None:
    phases = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    with pytest.raises(
        ValueError, match=r"takes real parameters, got torch\.complex64 .* 'phases'"
    ):
        row.make([("weight", make_layers()[2]), ("phases", phases)])
    optimizer = row.make(make_layers())
    with pytest.raises(ValueError, match=r"takes real parameters, got torch\.complex64 .* 6"):
        optimizer.add_param_group({"params": [phases]})


@each_of_ours
def test_a_sparse_gradient_is_refused_by_name_before_anything_changes(row: Row) -> None:
    model = nn.ModuleDict({"first": nn.Linear(2, 2), "table": nn.Embedding(4, 2, sparse=True)})
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = row.make(model.named_parameters())
    model["first"](model["table"](torch.tensor([1, 3]))).sum().backward()
    with pytest.raises(RuntimeError, match=r"needs dense gradients, got .* 'table\.weight'"):
        optimizer.step()
    assert same_bits(list(model.parameters()), before)
    assert not optimizer.state


@each_of_ours
def test_layer_stats_are_the_norms_and_ratio_of_the_last_step(row: Row) -> None:
    params, (grads,) = make_layers(), make_grads(1)
    names = [f"layer{index}" for index in range(len(params))]
    norms = [param.detach().norm() for param in params]
    optimizer = row.make(zip(names, params, strict=True))
    assert optimizer.layer_stats() == {}
    take_steps(optimizer, params, [grads])
    stats = optimizer.layer_stats()
    assert list(stats) == names
    for layer, grad, weight_norm in zip(stats.values(), grads, norms, strict=True):
        dropped = [] if row.optimizer is LARS else ["dropped_elements"]
        assert list(layer) == ["weight_norm", "update_norm", "trust_ratio", *dropped]
        assert all(value.dim() == 0 for value in layer.values())
        torch.testing.assert_close(layer["weight_norm"], weight_norm)
        update_norm, decay = layer["update_norm"], row.options["weight_decay"]
        if row.optimizer is LARS:
            torch.testing.assert_close(update_norm, grad.norm())
            denominator = update_norm + decay * weight_norm + row.options["eps"]
            ratio = row.options["trust_coefficient"] * weight_norm / denominator
        else:
            ratio = weight_norm / update_norm
        expected = ratio if weight_norm > 0 else torch.tensor(1.0)
        torch.testing.assert_close(layer["trust_ratio"], expected)


@each_of_ours
def test_layer_stats_of_unnamed_parameters_are_keyed_by_index_over_all_groups(row: Row) -> None:
    params, (grads,) = make_layers(), make_grads(1)
    optimizer = row.make([{"params": params[:2]}, {"params": params[2:], "adapt": False}])
    params[1].grad, params[2].grad, params[5].grad = grads[1], grads[2], grads[5]
    optimizer.step()
    stats = optimizer.layer_stats()
    assert list(stats) == [1, 2, 5]
    assert stats[1]["trust_ratio"] != 1
    assert stats[2]["trust_ratio"] == stats[5]["trust_ratio"] == 1


def test_state_keys_are_the_ones_others_read() -> None:
    params, grads = make_layers(), make_grads(1)
    optimizers = [
        (LAMB(params), ["exp_avg", "exp_avg_sq", "step"]),
        (LARS(params, lr=0.1), ["momentum_buffer"]),
    ]
    for optimizer, keys in optimizers:
        take_steps(optimizer, params, grads)
        assert all(sorted(optimizer.state[param]) == keys for param in params)
    without_momentum = LARS(params, lr=0.1, momentum=0.0)
    take_steps(without_momentum, params, grads)
    assert not without_momentum.state


def test_an_int_step_of_another_optimizers_checkpoint_is_accepted() -> None:
    params, grads = make_layers(), make_grads(2)
    optimizer = LAMB(params)
    take_steps(optimizer, params, grads[:1])
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state["step"] = 1
    optimizer.load_state_dict(saved)
    take_steps(optimizer, params, grads[1:])
    assert all(state["step"].item() == 2 for state in optimizer.state.values())


def test_the_import_loads_torch_and_nothing_of_the_training_side() -> None:
    code = "import sys, largebatch.optim; print(*sys.modules)"
    source = str(Path(__file__).parents[2] / "src")
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": source},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(result.stdout.split())
    assert {"torch", "largebatch.optim.lamb"} <= loaded
    unwanted = {"hydra", "omegaconf", "wandb", "matplotlib", "rich", "joblib", "sklearn"}
    assert not unwanted & loaded
    ours = {name for name in loaded if name.startswith("largebatch.")}
    assert all(name.startswith("largebatch.optim") for name in ours)


def test_the_public_names_are_listed() -> None:
    assert set(largebatch.optim.__all__) >= {"LAMB", "LARS"}


@pytest.mark.parametrize("option", ["capturable", "differentiable", "foreach", "fused"])
@pytest.mark.parametrize("optimizer", [LAMB, LARS])
def test_switches_of_torch_that_do_not_exist_here_raise_at_construction(
    optimizer: type[torch.optim.Optimizer], option: str
) -> None:
    with pytest.raises(TypeError, match=option):
        optimizer(make_layers(), lr=0.1, **{option: True})


@pytest.mark.parametrize("optimizer", [LAMB, LARS])
def test_step_hooks_run_around_the_step(optimizer: type[torch.optim.Optimizer]) -> None:
    params, grads, seen = make_layers(), make_grads(1), []
    ours = optimizer(params, lr=0.1)
    start = params[3].detach().clone()
    ours.register_step_pre_hook(lambda *_: seen.append(torch.equal(params[3], start)))
    ours.register_step_post_hook(lambda *_: seen.append(torch.equal(params[3], start)))
    take_steps(ours, params, grads)
    assert seen == [True, False]
