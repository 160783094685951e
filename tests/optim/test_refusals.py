"""Options, groups, parameters and gradients that are refused, and what an import loads."""

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from contract_rows import CONTRACT, MASKED, ContractRow
from optimizer_rows import make_layers, same_bits
from torch import nn

import largebatch.optim
from largebatch.optim import KFAC, LAMB, LARS

each_of_ours = pytest.mark.parametrize("row", MASKED, ids=lambda row: row.name)
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
        (KFAC, {"lr": -1.0}, r"lr must be in \[0, inf\), got -1.0"),
        (KFAC, {"lr": torch.ones(2)}, r"a float or a tensor of one element, got shape \(2,\)"),
        (KFAC, {"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\)"),
        (KFAC, {"damping": nan}, r"damping must be in \[0, inf\), got nan"),
        (KFAC, {"ridge": -1.0}, r"ridge must be in \[0, inf\), got -1.0"),
        (KFAC, {"final_damping": 1e-3}, "go together, got final_damping alone"),
        (KFAC, {"damping_items": 1e3}, "go together, got damping_items alone"),
        (
            KFAC,
            {"final_damping": 1.0, "damping_items": 9, "damping": 0},
            "damping must be > 0 where",
        ),
        (KFAC, {"kl_clip": 0.0}, r"kl_clip must be in \(0, inf\) or None, got 0.0"),
        (KFAC, {"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        (KFAC, {"factor_decay": 1.0}, r"factor_decay must be in \[0, 1\), got 1.0"),
        (KFAC, {"form": "svd"}, "form must be one of 'factored_eigen', .*, 'exact', got 'svd'"),
        (KFAC, {"graft": "lamb"}, "graft must be one of .*'none', got 'lamb'"),
        (
            KFAC,
            {"rule": "lion"},
            "rule must be a Rule or one of sgd, average, adam, plain, got 'lion'",
        ),
        (KFAC, {"fallback": "lion"}, "fallback must be a Rule or one of .* got 'lion'"),
        (KFAC, {"fallback_lr_ratio": nan}, "fallback_lr_ratio must be >= 0, got nan"),
        (KFAC, {"fisher": "exact"}, "fisher must be one of 'empirical', 'true', got 'exact'"),
        (KFAC, {"factor_interval": 0}, "factor_interval must be a whole number >= 1, got 0"),
        (KFAC, {"inverse_interval": 2.5}, "inverse_interval must be a whole number >= 1, got 2.5"),
        (KFAC, {"max_factor_size": True}, "max_factor_size must be a whole number >= 1, got True"),
        (KFAC, {"tolerated_failures": -1}, "tolerated_failures must be >= 0, got -1"),
        (KFAC, {"relative_damping": 1}, "relative_damping must be one of False, True, got 1"),
    ],
)
def test_an_option_out_of_range_is_refused_with_its_value_and_the_range(
    optimizer: Any, options: dict[str, Any], message: str
) -> None:
    given = nn.Linear(2, 2) if optimizer is KFAC else make_layers()
    with pytest.raises(ValueError, match=message):
        optimizer(given, **{"lr": 0.1, **options})


@each_of_ours
def test_a_bad_group_is_refused_and_leaves_the_optimizer_as_it_was(row: ContractRow) -> None:
    for bad in ({"lr": nan}, {"weight_decay": -1.0}, *row.bad):
        (option,) = bad
        optimizer, others = row.partly()
        before = len(optimizer.param_groups)
        with pytest.raises(ValueError, match=option):
            optimizer.add_param_group({"params": others, **bad})
        assert len(optimizer.param_groups) == before
        optimizer.add_param_group({"params": others})
        if not row.watches:
            with pytest.raises(ValueError, match=option):
                row.make([{"params": make_layers(), **bad}])


@each_of_ours
def test_a_complex_parameter_is_refused_by_name(row: ContractRow) -> None:
    phases = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    message = r"takes real parameters, got torch\.complex64"
    if not row.watches:
        with pytest.raises(ValueError, match=rf"{message} .* 'phases'"):
            row.make([("weight", make_layers()[2]), ("phases", phases)])
        with pytest.raises(ValueError, match=rf"{message} .*[ _]6\b"):
            row.make(make_layers()).add_param_group({"params": [phases]})
    optimizer = row.of_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=rf"{type(optimizer).__name__} {message} .* 'param_2'"):
        optimizer.add_param_group({"params": [phases]})


@each_of_ours
def test_a_flat_shard_of_fsdp1_is_refused_by_name(row: ContractRow) -> None:
    model = nn.Linear(2, 2)
    model.weight._fsdp_flattened = True
    with pytest.raises(ValueError, match=r"needs .*'weight' is a flat shard .*FSDP1"):
        row.of_model(model)


@each_of_ours
def test_a_sparse_gradient_is_refused_by_name_before_anything_changes(row: ContractRow) -> None:
    model = nn.Sequential(nn.Embedding(4, 2, sparse=True), nn.Linear(2, 2))
    optimizer = row.of_model(model)
    before = [param.detach().clone() for param in model.parameters()]
    model(torch.tensor([1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match=r"needs dense gradients, got .* '0\.weight'"):
        optimizer.step()
    assert same_bits(list(model.parameters()), before)
    assert not optimizer.state


@pytest.mark.parametrize("option", ["capturable", "differentiable", "foreach", "fused"])
@pytest.mark.parametrize(
    "row", [row for row in CONTRACT if "torch" not in row.name], ids=lambda row: row.name
)
def test_switches_of_torch_that_do_not_exist_here_raise_at_construction(
    row: ContractRow, option: str
) -> None:
    with pytest.raises(TypeError, match=option):
        row.start(**{option: True})


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
    classes = {"KFAC", "LAMB", "LARS", "SOAP", "Mano", "Muon", "SOAPMuon", "Shampoo"}
    assert set(largebatch.optim.__all__) == classes | {"create", "names", "param_groups"}
