"""An optimizer by its name is that of `optim=NAME`; where its class differs, the YAML says so."""

import ast
import inspect
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import get_class
from omegaconf import OmegaConf
from torch import nn

import largebatch.optim
from largebatch.conf.config import ScalingConfig
from largebatch.distributed.ranks import Ranks
from largebatch.optim import LAMB, SOAP, Muon, create, names
from largebatch.optim.factory import NAMED
from largebatch.optim.lamb import VARIANTS as LAMB_VARIANTS
from largebatch.optim.lars import VARIANTS as LARS_VARIANTS
from largebatch.train.build import build_optimizer

CHOICES = {p.stem: p for p in (Path(__file__).parents[2] / "conf" / "optim").glob("*.yaml")}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4))


def read(name: str) -> dict[str, Any]:
    node: Any = OmegaConf.to_container(OmegaConf.load(CHOICES[name]))
    return {key: float(v) if key == "eps" and v is not None else v for key, v in node.items()}


def test_the_names_are_those_of_the_configuration() -> None:
    assert names() == sorted(CHOICES)


@pytest.mark.parametrize("name", CHOICES)
def test_a_name_makes_what_the_loop_makes(name: str) -> None:
    node = read(name)
    node["weight_decay"] = decay = 0.0 if node.get("hyperball") else 0.1  # which refuses it
    config: Any = SimpleNamespace(optim=node, scaling=ScalingConfig())
    looped = build_optimizer(config, network(), Ranks())
    made = create(network(), name, lr=node["lr"], weight_decay=decay)
    assert type(made) is type(looped)
    # The loop clips before torch's fused kernels; other people's may not be able to.
    assert made.defaults | {"fused": None} == looped.defaults | {"fused": None}
    for ours, theirs in zip(made.param_groups, looped.param_groups, strict=True):
        varying = {"params": None, "fused": None}
        assert ours | varying == theirs | varying


@pytest.mark.parametrize("name", CHOICES)
def test_where_the_yaml_has_another_default_than_the_class_it_says_so(name: str) -> None:
    node, lines = read(name), CHOICES[name].read_text(encoding="utf-8").splitlines()
    kind = get_class(node["_target_"])
    taken = inspect.signature(kind).parameters
    for key in node.keys() - {"_target_", "_partial_"}:
        (line,) = (line for line in lines if line.startswith(f"{key}:"))
        said = re.search(rf"# {kind.__name__}\(\): (\([^)]*\)|[^ ,;]+)[,;] \w+", line)
        default = taken[key].default
        if default == (tuple(node[key]) if isinstance(node[key], list) else node[key]):
            assert said is None, line
            continue
        assert said is not None, line
        if key == "lr" and not isinstance(default, float):
            assert said[1] == "none", line
        else:
            assert ast.literal_eval(said[1]) == default, line


BUNDLES = {"lamb": LAMB_VARIANTS, "lars": LARS_VARIANTS}
VARIANTS = [(name, variant) for name, bundles in BUNDLES.items() for variant in bundles]


@pytest.mark.parametrize(("name", "variant"), [*((name, None) for name in CHOICES), *VARIANTS])
def test_the_yaml_changes_of_a_variant_only_what_it_says(name: str, variant: str | None) -> None:
    """`optim=NAME optim.variant=V` is the class's own V but for what the YAML says of its class."""
    asked = {} if variant is None else {"variant": variant}
    node = read(name) | asked
    config: Any = SimpleNamespace(optim=node, scaling=ScalingConfig())
    looped = build_optimizer(config, network(), Ranks()).defaults
    kind, model = get_class(node["_target_"]), network()
    takes_model = getattr(kind, "takes_model", False)
    own = kind(model if takes_model else model.parameters(), lr=node["lr"], **asked).defaults
    lines = CHOICES[name].read_text(encoding="utf-8").splitlines()
    said = {line.partition(":")[0] for line in lines if f"# {kind.__name__}():" in line}
    assert own.keys() == looped.keys()
    assert {key for key in own if own[key] != looped[key]} <= said
    if variant is not None:  # of whose bundle nothing may be said otherwise
        bundle = BUNDLES[name][variant]
        assert {key: looped[key] for key in bundle} == bundle


def test_no_default_of_a_name_repeats_its_class_s() -> None:
    for kind, defaults in NAMED.values():
        taken = inspect.signature(kind).parameters
        assert [key for key, value in defaults.items() if value == taken[key].default] == []


def test_groups_and_options_are_the_caller_s() -> None:
    model = network()
    lamb = create(model, "lamb", lr=0.1, no_adapt=(), norm_groups={"^0": 2}, betas=(0.5, 0.6))
    assert isinstance(lamb, LAMB)
    assert [group["adapt"] for group in lamb.param_groups] == [True] * len(lamb.param_groups)
    assert lamb.param_groups[0]["betas"] == (0.5, 0.6)
    soap = create(model, "soap", lr=0.1, precondition="^2.weight")
    assert isinstance(soap, SOAP)
    chosen = [group["param_names"] for group in soap.param_groups if group["precondition"]]
    assert chosen == [["2.weight"]]
    muon = create(model, "muon", lr=0.1, weight_decay=0.1, adamw_weight_decay=0.2)
    assert isinstance(muon, Muon)
    decays = {group["algorithm"]: group["weight_decay"] for group in muon.param_groups[:2]}
    assert decays == {"muon": 0.1, "adamw": 0.2}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("lam", r"one of adamw, .*, soap_muon, got 'lam': did you mean 'lamb'\?"),
        ("LAMB", r"got 'LAMB': did you mean 'lamb'\?"),
        ("zzz", r"got 'zzz'$"),
    ],
)
def test_a_name_that_is_none_is_refused_with_those_there_are(name: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        create(network(), name, lr=0.1)


def test_what_is_listed_of_the_package_is_what_users_need() -> None:
    listed = dir(largebatch.optim)
    assert listed == sorted(largebatch.optim.__all__)
    modules = [name for name in listed if inspect.ismodule(getattr(largebatch.optim, name))]
    assert modules == []
