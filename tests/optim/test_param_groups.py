"""Parameter groups by selectors, by rows, and what optimizers make of them."""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from torch import Tensor, nn

from largebatch.optim import LAMB, LARS
from largebatch.optim.groups import param_groups


class GatedRMSNorm(nn.Module):  # somebody's own
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


class PlaneNorm2d(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1, 4, 1, 1))


class NormLinear(nn.Module):  # a normalisation and a matrix in one module
    def __init__(self) -> None:
        super().__init__()
        self.norm_weight = nn.Parameter(torch.ones(4))
        self.weight = nn.Parameter(torch.randn(4, 4))


class NormalNoise(nn.Module):  # Normal, not a norm
    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.ones(4))


class Scale(nn.LayerNorm):
    """Says Norm only in a base's name."""


class SplitTableEmbedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 4))


class Zoo(nn.Module):
    """Every kind of parameter that a word decides on."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 1)
        self.lstm = nn.LSTM(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)
        self.layer = nn.LayerNorm(4)
        self.planes = nn.LayerNorm((4, 3, 3))
        self.group = nn.GroupNorm(2, 4)
        self.batch = nn.BatchNorm2d(4)
        self.instance = nn.InstanceNorm1d(4, affine=True)
        self.rms = nn.RMSNorm((4, 4))
        self.gated = GatedRMSNorm()
        self.plane = PlaneNorm2d()
        self.fused = NormLinear()
        self.noise = NormalNoise()
        self.renamed = Scale(4)
        self.embedding = nn.Embedding(5, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.table = SplitTableEmbedding()
        self.bias_net = nn.Linear(4, 4, bias=False)
        self.unbiased = nn.Parameter(torch.ones(4, 2))


# What of the zoo the words pick; the parameters not named here, none does.
KINDS = {
    "temperature": "vector",
    "linear.bias": "bias vector",
    "conv.bias": "bias vector",
    "lstm.bias_ih_l0": "bias vector",
    "lstm.bias_hh_l0": "bias vector",
    "attention.in_proj_bias": "bias vector",
    "attention.bias_k": "bias",  # (1, 1, 4)
    "attention.bias_v": "bias",
    "attention.out_proj.bias": "bias vector",
    "layer.weight": "norm vector",
    "layer.bias": "norm bias vector",
    "planes.weight": "norm",  # (4, 3, 3)
    "planes.bias": "norm bias",
    "group.weight": "norm vector",
    "group.bias": "norm bias vector",
    "batch.weight": "norm vector",
    "batch.bias": "norm bias vector",
    "instance.weight": "norm vector",
    "instance.bias": "norm bias vector",
    "rms.weight": "norm",  # (4, 4)
    "gated.scale": "norm vector",
    "plane.gain": "norm",  # (1, 4, 1, 1)
    "fused.norm_weight": "norm vector",
    "noise.spread": "vector",
    "renamed.weight": "norm vector",
    "renamed.bias": "norm bias vector",
    "embedding.weight": "embedding",
    "bag.weight": "embedding",
    "table.table": "embedding",
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 5, bias=False)  # registered before the table that it shares
        self.embedding = nn.Embedding(5, 4)
        self.embedding.weight = self.head.weight
        self.body = nn.Linear(4, 4)
        self.again = self.body
        self.shift = self.body.bias
        self.gate = self.gate_too = nn.Parameter(torch.ones(4))  # twice in one module


def names(group: dict[str, Any]) -> list[str]:
    return [name for name, _ in group["params"]]


def with_option(groups: list[dict[str, Any]], option: str, value: object) -> list[str]:
    return [name for group in groups for name in names(group) if group.get(option) == value]


def described(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**group, "params": names(group)} for group in groups]


def block(bias: bool = True) -> nn.Sequential:
    """Parameters 0.weight (6, 4), 0.bias, 1.weight, 1.bias and 2.weight (3, 6)."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6, bias), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))


# The words -----------------------------------------------------------------------------------


@pytest.mark.parametrize("word", ["bias", "norm", "embedding", "vector"])
def test_a_word_picks_its_kind_of_parameter_and_no_other(word: str) -> None:
    zoo = Zoo()
    groups = param_groups(zoo, no_decay=(word,), no_adapt=())
    expected = [name for name, _ in zoo.named_parameters() if word in KINDS.get(name, "").split()]
    assert with_option(groups, "weight_decay", 0.0) == expected
    assert KINDS.keys() <= dict(zoo.named_parameters()).keys()


def test_biases_and_norms_neither_decay_nor_adapt_unless_asked_otherwise() -> None:
    model = block()
    assert described(param_groups(model, 0.1)) == [
        {"params": ["0.weight", "2.weight"], "weight_decay": 0.1},
        {"params": ["0.bias", "1.weight", "1.bias"], "weight_decay": 0.0, "adapt": False},
    ]
    assert described(param_groups(model, 0.1, no_adapt=())) == [
        {"params": ["0.weight", "2.weight"], "weight_decay": 0.1},
        {"params": ["0.bias", "1.weight", "1.bias"], "weight_decay": 0.0},
    ]
    assert described(param_groups(model, 0.1, no_decay=(), no_adapt="norm")) == [
        {"params": ["0.weight", "0.bias", "2.weight"], "weight_decay": 0.1},
        {"params": ["1.weight", "1.bias"], "weight_decay": 0.1, "adapt": False},
    ]


def test_without_a_decay_given_that_of_the_optimizer_holds() -> None:
    optimizer = LAMB(param_groups(block()), lr=0.1, weight_decay=0.07)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.07, 0.0]
    optimizer = LAMB(param_groups(block(), 0.03), lr=0.1, weight_decay=0.07)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.03, 0.0]


def test_the_usual_exclusions_need_not_exist() -> None:
    model = nn.Linear(3, 3, bias=False)
    assert described(param_groups(model, 0.1)) == [{"params": ["weight"], "weight_decay": 0.1}]


# Tied, frozen, named -------------------------------------------------------------------------


def test_a_tied_parameter_is_listed_once_and_is_picked_by_each_of_its_names_and_owners() -> None:
    model = Tied()
    (everything,) = param_groups(model, no_decay=(), no_adapt=())
    assert names(everything) == [name for name, _ in model.named_parameters()]
    for selector in ("embedding", r"^head\.", r"^embedding\."):
        groups = param_groups(model, no_decay=selector, no_adapt=())
        assert with_option(groups, "weight_decay", 0.0) == ["head.weight"]
    groups = param_groups(model, no_decay="again", no_adapt=())
    assert with_option(groups, "weight_decay", 0.0) == ["shift", "body.weight"]
    groups = param_groups(model, no_decay="^gate_too$", no_adapt="bias")
    assert with_option(groups, "weight_decay", 0.0) == ["gate"]
    assert with_option(groups, "adapt", False) == ["shift"]


def test_a_frozen_parameter_is_left_out_and_still_counts_as_a_match() -> None:
    model = block()
    model[1].requires_grad_(False)
    assert described(param_groups(model, no_decay=("norm",), no_adapt=("bias",))) == [
        {"params": ["0.weight", "2.weight"]},
        {"params": ["0.bias"], "adapt": False},
    ]
    groups = param_groups(model, rows=[("^1", {"lr": 0.1}), ("^[02]", {})])
    assert described(groups) == [{"params": ["0.weight", "0.bias", "2.weight"]}]
    assert described(param_groups(model, rows=[("^[02]", {})])) == described(groups)
    assert param_groups(model.requires_grad_(False)) == []


def test_every_trainable_parameter_is_in_one_group_in_the_models_order() -> None:
    zoo = Zoo()
    zoo.lstm.requires_grad_(False)
    groups = param_groups(zoo, no_decay=("vector", "embedding"), no_adapt=("bias", "conv"))
    trainable = [(name, param) for name, param in zoo.named_parameters() if param.requires_grad]
    order = {param: place for place, (_, param) in enumerate(trainable)}
    places = [[order[param] for _, param in group["params"]] for group in groups]
    assert all(group == sorted(group) for group in places)
    assert [group[0] for group in places] == sorted(group[0] for group in places)
    assert sorted(place for group in places for place in group) == list(range(len(trainable)))
    pairs = dict(pair for group in groups for pair in group["params"])
    assert all(pairs[name] is param for name, param in trainable)


def test_named_parameters_will_do_where_no_word_asks_for_modules() -> None:
    model = block()
    pairs = list(model.named_parameters())
    options = {"no_decay": ("bias", "vector"), "no_adapt": (r"^2\.",)}
    assert described(param_groups(iter(pairs), 0.1, **options)) == described(
        param_groups(model, 0.1, **options)
    )
    with pytest.raises(ValueError, match=r"no_decay: 'norm' is decided from the modules"):
        param_groups(pairs)
    with pytest.raises(ValueError, match=r"no_adapt: 'embedding' is decided from the modules"):
        param_groups(pairs, no_decay=(), no_adapt=("embedding",))
    with pytest.raises(ValueError, match=r"\(name, parameter\) pairs .* got a Parameter among"):
        param_groups(model.parameters())


# Patterns and refusals -----------------------------------------------------------------------


def test_a_pattern_is_searched_for_anywhere_in_the_name() -> None:
    model = nn.ModuleDict({"head": nn.Linear(2, 2), "ahead": nn.Linear(2, 2)})
    groups = param_groups(model, no_decay="head.weight", no_adapt=r"^head\.weight$")
    assert with_option(groups, "weight_decay", 0.0) == ["head.weight", "ahead.weight"]
    assert with_option(groups, "adapt", False) == ["head.weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"no_decay": ("bias", "nrom")}, "no_decay: 'nrom' matches none of the 5 parameters (0.w"),
        ({"no_adapt": "embedding"}, "no_adapt: 'embedding' matches none of the 5 parameters"),
        ({"no_decay": "a("}, "no_decay: 'a(' is neither one of the words bias, norm, embedding an"),
        ({"norm_groups": {"qkv": 3}}, "norm_groups: 'qkv' matches none of the 2 parameters"),
        ({"norm_groups": {"bias": 3}}, "norm_groups: 'bias' matches none of the 2 parameters (0."),
        (
            {"norm_groups": {"weight": 3, "^0": 2}},
            "norm_groups: earlier selectors take every parameter that '^0' matches",
        ),
        ({"norm_groups": {"^0": {"dim": 1}}}, "norm_groups['^0'] must be a number of parts, their"),
        ({"norm_groups": {"^0": {"sizes": 2, "din": 1}}}, "norm_groups['^0'] must be a number of"),
        ({"rows": [("weight", {})]}, "rows: no row matches parameter '0.bias'; a last row"),
        ({"rows": [("", {}), ("qkv", {})]}, "rows: 'qkv' matches none of the 5 parameters"),
        ({"rows": [("", {}), ("^0", {})]}, "rows: earlier selectors take every parameter that '^"),
        ({"rows": [("", {})], "no_decay": ()}, "rows decide alone, got no_decay beside them"),
        ({"rows": [("", {})], "precondition": ()}, "rows decide alone, got precondition beside"),
        ({"precondition": "qkv"}, "precondition: 'qkv' matches none of the 5 parameters"),
        (
            {"rows": [("", {})], "no_adapt": "norm", "norm_groups": {"^0": 2}},
            "rows decide alone, got no_adapt and norm_groups beside them",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        param_groups(block(), **options)


# Fused tensors and rows ----------------------------------------------------------------------


def test_fused_tensors_get_the_options_that_split_them_where_they_adapt() -> None:
    model = block()
    assert described(param_groups(model, norm_groups={r"^0\.": (4, 2), "": 3})) == [
        {"params": ["0.weight"], "norm_groups": (4, 2)},
        {"params": ["0.bias", "1.weight", "1.bias"], "weight_decay": 0.0, "adapt": False},
        {"params": ["2.weight"], "norm_groups": 3},
    ]
    spec = {r"^2\.": {"sizes": [2, 4], "dim": 1}, r"^0\.weight": {"sizes": 2}}
    groups = param_groups(model, no_decay=(), no_adapt=(), norm_groups=spec)
    assert described(groups) == [
        {"params": ["0.weight"], "norm_groups": 2},
        {"params": ["0.bias", "1.weight", "1.bias"]},
        {"params": ["2.weight"], "norm_groups": (2, 4), "norm_dim": 1},
    ]


def test_each_parameter_goes_into_the_group_of_the_first_row_that_matches_it() -> None:
    rows = [
        (r"^0\.weight", {"lr": 0.5, "norm_groups": 2}),
        ("norm", {"weight_decay": 0.0}),
        ("bias", {"weight_decay": 0.0}),
        ("", {"adapt": False}),
    ]
    before = copy.deepcopy(rows)
    assert described(param_groups(block(), 0.1, rows=rows)) == [
        {"params": ["0.weight"], "weight_decay": 0.1, "lr": 0.5, "norm_groups": 2},
        {"params": ["0.bias"], "weight_decay": 0.0},  # apart from the norms: a row is a group
        {"params": ["1.weight", "1.bias"], "weight_decay": 0.0},
        {"params": ["2.weight"], "weight_decay": 0.1, "adapt": False},
    ]
    LAMB(param_groups(block(), 0.1, rows=[(s, {**o, "lr": 0.1}) for s, o in rows[1:]]))
    assert rows == before


# What optimizers make of them ----------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def test_no_decay_and_no_adaptation_reach_the_parameters_and_only_them() -> None:
    model = block()
    optimizer = LAMB(param_groups(model, no_decay="bias", no_adapt="norm"), lr=0.1)
    train(model, optimizer, steps=1)
    found = optimizer.layer_stats()
    ratios = {name: stats["trust_ratio"] for name, stats in found.items()}
    assert {name for name, ratio in ratios.items() if ratio == 1} == {"1.weight", "1.bias"}
    assert {name for name, stats in found.items() if not stats["adapts"]} == {"1.weight", "1.bias"}
    assert optimizer.adapting_layers() == found.keys() - {"1.weight", "1.bias"}
    together = optimizer.adapting_ratios()
    assert together is not None
    adapting = [float(ratios[name]) for name in found if name in optimizer.adapting_layers()]
    assert together.tolist() == adapting
    decayed = {
        name: group["weight_decay"] != 0
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    assert [name for name, decays in decayed.items() if not decays] == ["0.bias", "1.bias"]


def test_only_what_is_selected_is_preconditioned() -> None:
    groups = param_groups(block(), precondition="^0")
    options = {
        name: group.get("precondition", True) for group in groups for name, _ in group["params"]
    }
    assert {name for name, wanted in options.items() if wanted} == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    "make",
    [
        lambda params: torch.optim.AdamW(params, lr=0.1),
        lambda params: torch.optim.AdamW(params, lr=0.1, foreach=True),
        lambda params: torch.optim.Adam(params, lr=0.1, fused=True),
        lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1),
    ],
)
def test_torchs_optimizers_take_the_groups_and_pass_over_adapt(
    make: Callable[[Any], torch.optim.Optimizer],
) -> None:
    ours, theirs = block(), block()
    decayed = [theirs[0].weight, theirs[2].weight]
    others = [theirs[0].bias, theirs[1].weight, theirs[1].bias]
    optimizer = make(param_groups(ours))
    expected = train(theirs, make([{"params": decayed}, {"params": others, "weight_decay": 0.0}]))
    assert all(map(torch.equal, train(ours, optimizer), expected))
    assert optimizer.param_groups[1]["adapt"] is False
    assert optimizer.param_groups[1]["param_names"] == ["0.bias", "1.weight", "1.bias"]
    resumed = make(param_groups(ours))
    resumed.load_state_dict(optimizer.state_dict())
    resumed.add_param_group({"params": [("late", nn.Parameter(torch.ones(2)))]})


@pytest.mark.parametrize("make", [LAMB, LARS])
def test_one_layer_of_the_groups_steps_as_it_does_alone(make: Any) -> None:
    whole, alone = block(), block()
    optimizer = make(param_groups(whole, 0.1), lr=0.1)
    single = make([alone[2].weight], lr=0.1, weight_decay=0.1)
    torch.manual_seed(1)
    for model in (whole, alone):
        model(torch.randn(8, 4, generator=torch.Generator().manual_seed(2))).sum().backward()
    optimizer.step()
    single.step()
    assert torch.equal(whole[2].weight, alone[2].weight)


# Sharded models ------------------------------------------------------------------------------


def test_shapes_are_those_of_a_tensor_that_zero_3_has_partitioned() -> None:
    model = block()
    whole = described(param_groups(model, no_decay="vector"))
    for param in model.parameters():  # as deepspeed.zero.Init leaves them
        param.ds_shape, param.data = param.shape, torch.empty(0)
    assert described(param_groups(model, no_decay="vector")) == whole
    assert [group["params"] for group in whole] == [
        ["0.weight", "2.weight"],
        ["0.bias", "1.weight", "1.bias"],
    ]


FSDP2 = """
import json, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from largebatch.optim.groups import param_groups

torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=sys.argv[1], rank=int(sys.argv[2]), world_size=2)
model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3, bias=False))
for layer in model:
    fully_shard(layer)
fully_shard(model)
groups = param_groups(model, 0.1, no_decay=("norm", "vector"), norm_groups={"^0": 2})
assert all(isinstance(param, DTensor) for group in groups for _, param in group["params"])
for group in groups:
    group["params"] = [name for name, _ in group["params"]]
if dist.get_rank() == 1:
    print(json.dumps(groups))
dist.destroy_process_group()
"""


def test_a_model_sharded_by_fsdp2_on_two_ranks_gives_the_same_groups(tmp_path: Path) -> None:
    first, second = (
        forked.Popen(
            [sys.executable, "-c", FSDP2, f"file://{tmp_path / 'store'}", rank],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in "01"
    )  # fmt: skip
    printed, said = second.communicate(timeout=600)
    assert second.returncode == 0, said
    lines = first.communicate(timeout=600)[0].splitlines()
    assert [line for line in lines if not line.startswith("[Gloo]")] == []  # torch 2.10's own
    plain = param_groups(block(), 0.1, no_decay=("norm", "vector"), norm_groups={"^0": 2})
    assert json.loads(printed.splitlines()[-1]) == described(plain)


# What has fewer than two dimensions, by default ----------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.tensor(0.1))
        self.body = nn.Linear(4, 4)
        self.gamma = nn.Parameter(torch.full((4,), 1e-5))
        self.log_decay = nn.Parameter(torch.zeros(2, 4))


def test_scalars_and_vectors_neither_decay_nor_adapt_unless_asked_to() -> None:
    groups = param_groups(Gated(), 0.05)
    small = ["gate", "body.bias", "gamma"]
    assert sorted(with_option(groups, "adapt", False)) == sorted(small)
    assert sorted(with_option(groups, "weight_decay", 0.0)) == sorted(small)
    adapting = param_groups(Gated(), 0.05, no_adapt="bias", no_decay="bias")
    assert with_option(adapting, "adapt", False) == ["body.bias"]


def test_a_gate_can_change_its_sign_and_a_small_scale_grow_under_lamb() -> None:
    torch.manual_seed(0)
    model = Gated()
    optimizer = LAMB(param_groups(model, 0.01), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        ((model.gate + 1) ** 2 + (model.gamma - 0.5).square().sum()).backward()
        optimizer.step()
    assert model.gate < -0.5
    assert model.gamma.min() > 0.3
