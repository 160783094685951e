"""Muon with AdamW for the rest: each by its formula, and which part takes what."""

import copy
import math
import os
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import second_order_references as references
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_post_hook

from largebatch.optim import Mano, Muon, SOAPMuon, param_groups
from largebatch.train.models.cnn import CNN
from largebatch.train.models.mlp import ByteMLP
from largebatch.train.models.transformer import Transformer

Network = nn.Sequential


def model() -> Network:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, 9)
    )


def backward(network: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    symbols = torch.randint(0, 9, (8, 3), generator=generator)
    network.zero_grad()
    torch.autograd.backward(network(symbols).square().mean())


def named(network: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name.replace("0.", "embed_tokens."), p) for name, p in network.named_parameters()]


def equal(one: nn.Module, two: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


def parts(optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    """The names that each algorithm steps."""
    found: dict[str, list[str]] = {"muon": [], "adamw": []}
    for group in optimizer.param_groups:
        found[group["algorithm"]] += group["param_names"]
    return found


OPTIONS: dict[str, Any] = {
    "lr": 0.02, "weight_decay": 0.1, "decay": "decoupled", "mu": 0.9, "nesterov": True,
    "polynomials": [(3.4445, -4.7750, 2.0315)] * 5,
}  # fmt: skip
# A sequence made for [l, 1] takes what 1.01 as much may be to near 1, and all but its last step are
# of s / 1.01: Amsel et al. 2025, Algorithm 1.
EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
]
VARIATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "defaults": ({}, {}),
    "plain momentum": ({"nesterov": False}, {"nesterov": False}),
    "three steps": ({"ns_steps": 3}, {"polynomials": OPTIONS["polynomials"][:3]}),
    "polar express": (
        {"coefficients": "polar_express"},
        {
            "slack": 1.01,
            "polynomials": [(a / 1.01, b / 1.01**3, c / 1.01**5) for a, b, c in EXPRESS],
        },
    ),
}
RULES: dict[str, Callable[[int, int], float]] = {
    "match_rms": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral": lambda rows, columns: math.sqrt(rows / columns),
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
}
# A tensor, how its group is split, and its matrices as indices and shapes.
Cut = tuple[tuple[int, ...], dict[str, Any], list[tuple[Any, tuple[int, int]]]]
CUTS: dict[str, Cut] = {
    "matrix": ((6, 4), {}, [(..., (6, 4))]),
    "kernel": ((6, 3, 2, 2), {"algorithm": "muon"}, [(..., (6, 12))]),
    "qkv": (
        (9, 4), {"norm_groups": 3}, [(slice(3 * k, 3 * k + 3), (3, 4)) for k in range(3)],
    ),
    "columns": (
        (4, 7), {"norm_groups": (3, 4), "norm_dim": 1},
        [((slice(None), slice(0, 3)), (4, 3)), ((slice(None), slice(3, 7)), (4, 4))],
    ),
    "experts": ((3, 4, 5), {"norm_groups": 3}, [(k, (4, 5)) for k in range(3)]),
}  # fmt: skip


def made(
    weight: Tensor, group: dict[str, Any], **options: Any
) -> tuple[nn.Parameter, Callable[[Tensor], None]]:
    """A parameter beside another, and how it is stepped."""
    param = nn.Parameter(weight.clone())
    optimizer = Muon([("other", nn.Parameter(torch.ones(2, 2)))], **options)
    optimizer.add_param_group({"params": [("weight", param)], **group})

    def step(grad: Tensor) -> None:
        param.grad = grad.clone()
        optimizer.step()

    return param, step


def expected(
    weight: Tensor, grads: list[Tensor], cut: Cut, rule: str, options: dict[str, Any]
) -> np.ndarray[Any, Any]:
    """The paper's steps, for each matrix by itself."""
    whole = weight.numpy().copy()
    for index, shape in cut[2]:
        own = OPTIONS | options | {"scale": RULES[rule](*shape)}
        matrices = [grad.numpy()[index].reshape(shape) for grad in grads]
        first = weight.numpy()[index]
        stepped = references.run(references.MuonMatrix, first.reshape(shape), matrices, own)
        whole[index] = stepped.reshape(first.shape)
    return whole


def problem(shape: tuple[int, ...], steps: int = 5) -> tuple[Tensor, list[Tensor]]:
    make = {"generator": torch.Generator().manual_seed(0), "dtype": torch.float64}
    return torch.randn(shape, **make), [torch.randn(shape, **make) for _ in range(steps)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_steps_are_those_of_the_paper_for_each_matrix(cut: Cut, rule: str) -> None:
    weight, grads = problem(cut[0])
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_precision": "fp32"}
    param, step = made(weight, cut[1], shape_rule=rule, **options)
    for grad in grads:
        step(grad)
    found = param.detach().numpy()
    assert np.abs(found - expected(weight, grads, cut, rule, {})).max() < 1e-12


@pytest.mark.parametrize(("ours", "theirs"), VARIATIONS.values(), ids=VARIATIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_variations_are_those_of_their_papers(
    ours: dict[str, Any], theirs: dict[str, Any], dtype: torch.dtype
) -> None:
    weight, grads = problem((6, 4))
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "ns_precision": "fp32"}
    param, step = made(weight.to(dtype), {}, **options, **ours)
    for grad in grads:
        step(grad.to(dtype))
    reference = expected(weight, grads, CUTS["matrix"], "match_rms", theirs)
    difference = np.abs(param.detach().double().numpy() - reference).max()
    assert difference < (1e-12 if dtype == torch.float64 else 1e-6)


def test_products_in_bf16_are_near_those_in_fp32() -> None:
    """To bf16's rounding of the steps, of 0.2 each times a rate of 0.02."""
    weight, grads = problem((6, 4))
    found = []
    for precision in ("bf16", "fp32"):
        param, step = made(weight.float(), {}, lr=0.02, ns_precision=precision)
        for grad in grads:
            step(grad.float())
        found.append(param.detach())
    assert float((found[0] - found[1]).abs().max()) < 0.05 * len(grads) * 0.02 * 0.2
    assert not torch.equal(*found)


@pytest.mark.parametrize("kind", [Muon, Mano, SOAPMuon])
@pytest.mark.parametrize("given", [lambda network: network, named], ids=["model", "names"])
def test_the_rest_is_torchs_adamw_with_a_rate_and_a_decay_of_its_own(
    given: Callable[[nn.Module], Any], kind: Any
) -> None:
    one, two = model(), model()
    optimizer = kind(
        given(one), lr=0.02, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-6,
        adamw_lr_ratio=0.25, adamw_weight_decay=0.3,
    )  # fmt: skip
    others = [two[0].weight, two[2].bias, two[4].weight, two[4].bias]
    adamw = torch.optim.AdamW(others, lr=0.02, weight_decay=0.3, betas=(0.9, 0.99), eps=1e-6)
    for step in range(4):
        two.load_state_dict({**two.state_dict(), "2.weight": one[2].weight.detach()})
        for network in (one, two):
            backward(network, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        adamw.param_groups[0]["lr"] = 0.25 * 0.02 / (1 + step)
        optimizer.step()
        adamw.step()
    for name in ("0.weight", "2.bias", "4.weight", "4.bias"):
        torch.testing.assert_close(one.get_parameter(name), two.get_parameter(name))
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.3]


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e12])
def test_gradients_of_any_size_make_finite_steps_that_do_not_know_it(scale: float) -> None:
    weight, grads = problem((6, 4))
    found = []
    for factor in (scale, 1.0):
        param, step = made(weight.float(), {}, lr=0.02)
        for grad in grads:
            step(grad.float() * factor)
        found.append(param.detach())
    if scale == 0:
        assert torch.equal(found[0], weight.float())
    else:
        torch.testing.assert_close(*found, atol=2e-4, rtol=0)


HEADED = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}


def hugging_face(name: str, **options: Any) -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    config = getattr(transformers, f"{name}Config")(vocab_size=32, num_hidden_layers=1, **options)
    built: nn.Module = getattr(transformers, HEADED[name])(config)
    return built


LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2,
         "num_key_value_heads": 2}  # fmt: skip
GPT_2 = {"n_embd": 16, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}

# A model, and the matrices and kernels that are no hidden ones.
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "bytes": (lambda: ByteMLP(9, 3, 4, 6), {"embedding.weight", "mlp.2.weight"}),
    "cnn": (lambda: CNN(1, 10, (16, 16)), {"head.weight"}),
    "transformer": (
        lambda: Transformer(vocabulary=11, depth=1, dim=8, heads=2),
        {"embedding.weight", "head.weight"},
    ),
    "tied transformer": (
        lambda: Transformer(
            vocabulary=11, depth=1, dim=8, heads=2, tie_embeddings=True
        ),
        {"embedding.weight"},
    ),
    "llama": (
        lambda: hugging_face("Llama", tie_word_embeddings=False, **LLAMA),
        {"model.embed_tokens.weight", "lm_head.weight"},
    ),
    "tied llama": (
        lambda: hugging_face("Llama", tie_word_embeddings=True, **LLAMA),
        {"model.embed_tokens.weight"},
    ),
    "gpt2": (
        lambda: hugging_face("GPT2", **GPT_2), {"transformer.wte.weight", "transformer.wpe.weight"}
    ),
}  # fmt: skip


@pytest.mark.parametrize(("build", "left_out"), MODELS.values(), ids=MODELS)
def test_embeddings_and_the_head_are_adamws(
    build: Callable[[], nn.Module], left_out: set[str]
) -> None:
    network = build()
    matrices = {name for name, p in network.named_parameters() if p.dim() >= 2}
    assert left_out < matrices
    assert {*parts(Muon(network))["muon"]} == matrices - left_out
    if all(p.dim() <= 2 for p in network.parameters()):
        assert {*parts(Muon(network.named_parameters()))["muon"]} == matrices - left_out


def test_a_stack_of_matrices_is_no_kernel() -> None:
    network = model()
    network.experts = nn.Parameter(torch.ones(2, 3, 4))
    assert "experts" in parts(Muon(network))["adamw"]
    with pytest.raises(ValueError, match=r"whether 'experts', of 3 dimensions, .* give the model"):
        Muon(network.named_parameters())
    taken = parts(Muon(network.named_parameters(), adamw=("expert*",)))
    assert "experts" in taken["adamw"]


def test_a_stack_that_its_group_splits_is_muons() -> None:
    network = model()
    network.experts = nn.Parameter(torch.ones(2, 3, 4))
    groups = param_groups(network, norm_groups={"experts": 2})
    assert "experts" in parts(Muon(network, groups=groups))["muon"]
    assert "experts" in parts(Muon(groups))["muon"]
    assert "experts" in parts(Muon(network, groups=groups, adamw="expert*"))["adamw"]
    with pytest.raises(
        ValueError, match=r"norm_groups must divide dimension 0 .*'experts'.* got 3"
    ):
        Muon(network, groups=param_groups(network, norm_groups={"experts": 3}))


@pytest.mark.parametrize("optimizer", [Muon, SOAPMuon, Mano])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_pattern_that_matches_no_parameter_is_refused(
    optimizer: type[Muon | SOAPMuon | Mano], by_name: bool
) -> None:
    network = model()
    given = network.named_parameters() if by_name else network
    some = ", ".join([name for name, _ in network.named_parameters()][:3])
    message = f"adamw: 'haed' matches none of the 5 parameters ({some}, …): it is of the whole"
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer(given, adamw=["*", "haed"])


def stepped(make_second: Callable[[Muon, Network], tuple[Muon, Network]]) -> bool:
    """Whether two steps before and two after `make_second` are four steps of one optimizer."""
    one = model()
    first = Muon(one, lr=0.02)
    for step in range(2):
        backward(one, step)
        first.step()
    second, two = make_second(first, one)
    for network, optimizer in ((one, first), (two, second)):
        for step in range(2, 4):
            backward(network, step)
            optimizer.step()
    assert one[0].weight is not two[0].weight
    return equal(one, two)


def test_a_state_is_continued_to_the_bit() -> None:
    def loaded(first: Muon, one: Network) -> tuple[Muon, Network]:
        two = copy.deepcopy(one)
        second = Muon(two, lr=1.0)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        return second, two

    assert stepped(loaded)


@pytest.mark.parametrize(
    "again",
    [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_steps(again: Callable[[Any], Any]) -> None:
    assert stepped(lambda first, one: again((first, one)))


def test_a_saved_group_without_an_option_takes_that_of_the_new_one() -> None:
    for option in ("algorithm", "momentum", "ns_steps", "betas", "nesterov", "shape_rule"):
        first, network = Muon(model()), model()
        state = first.state_dict()
        for group in state["param_groups"]:
            del group[option]
        second = Muon(network, momentum=0.5, betas=(0.5, 0.5))
        before = [group[option] for group in second.param_groups]
        second.load_state_dict(state)
        backward(network, 0)
        second.step()
        assert [group[option] for group in second.param_groups] == before


def test_groups_are_read_at_each_step() -> None:
    network = model()
    optimizer = Muon(network, lr=0.1)

    def moved(step: int) -> list[bool]:
        before = [param.detach().clone() for param in network.parameters()]
        backward(network, step)
        optimizer.step()
        return [not torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True)]

    assert moved(0) == [True] * 5
    optimizer.param_groups.reverse()
    optimizer.param_groups[0]["lr"] = 0.0  # AdamW's, now the first
    assert moved(1) == [False, True, False, False, False]
    # A parameter in another's place has no state, and what it has is made.
    old, network[2].weight = network[2].weight, nn.Parameter(network[2].weight.detach().clone())
    for group in optimizer.param_groups:
        group["params"] = [network[2].weight if p is old else p for p in group["params"]]
    assert moved(2)[1]
    del optimizer.param_groups[1]
    assert moved(3) == [False] * 5


@pytest.mark.parametrize("given", [lambda network: network, named], ids=["model", "names"])
def test_a_group_without_names_is_added_to_groups_with_names(
    given: Callable[[nn.Module], Any],
) -> None:
    """As a callback does that unfreezes a backbone."""
    optimizer = Muon(given(model()))
    late = nn.Linear(3, 2)
    optimizer.add_param_group({"params": [*late.parameters()], "lr": 0.5})
    assert [(group["algorithm"], group["lr"]) for group in optimizer.param_groups[2:]] == [
        ("muon", 0.5), ("adamw", 0.5),
    ]  # fmt: skip
    before = [param.detach().clone() for param in late.parameters()]
    torch.autograd.backward(late(torch.ones(4, 3)).square().mean())
    optimizer.step()
    moved = [torch.equal(p, q) for p, q in zip(late.parameters(), before, strict=True)]
    assert moved == [False, False]


@pytest.fixture
def calls() -> Iterator[list[str]]:
    seen: list[str] = []
    handle = register_optimizer_step_post_hook(lambda opt, *_: seen.append(type(opt).__name__))
    yield seen
    handle.remove()


def test_one_step_is_one_step_for_global_hooks(calls: list[str]) -> None:
    network = model()
    backward(network, 0)
    Muon(network).step()
    assert calls == ["Muon"]


@pytest.mark.parametrize(
    "schedule",
    [
        lambda optimizer: OneCycleLR(optimizer, max_lr=0.1, total_steps=10),
        lambda optimizer: CyclicLR(optimizer, 0.01, 0.1, step_size_up=2),
    ],
    ids=["one cycle", "cyclic"],
)
def test_schedulers_that_cycle_momentum_take_it(schedule: Callable[[Muon], Any]) -> None:
    network = model()
    optimizer = Muon(network)
    scheduler = schedule(optimizer)
    before = optimizer.param_groups[0]["lr"]
    for step in range(2):
        backward(network, step)
        optimizer.step()
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] > before


def test_a_compiled_step_is_the_step() -> None:
    one, two = model(), model()
    plain, compiled = Muon(one), Muon(two)
    step_compiled = torch.compile(compiled.step, backend="eager")
    for step in range(3):
        for network in (one, two):
            backward(network, step)
        plain.step()
        step_compiled()
    assert equal(one, two)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr": -1.0}, r"lr must be in \[0, inf\), got -1"),
        ({"lr": torch.ones(2)}, r"lr must be a float or a tensor of one element"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1"),
        ({"betas": (0.9, 1.5)}, r"betas must be two numbers in \[0, 1\)"),
        ({"eps": -1.0}, r"eps must be in \[0, inf\), got -1"),
        ({"ns_steps": 5.0}, r"ns_steps must be a whole number, 1 to 99, got 5.0"),
        ({"shape_rule": "mine"}, r"shape_rule must be one of 'match_rms', 'spectral', 'original'"),
        ({"coefficients": "mine"}, r"coefficients must be one of 'jordan', 'polar_express'"),
        ({"ns_precision": "fp16"}, r"ns_precision must be one of 'bf16', 'fp32', got 'fp16'"),
        ({"adamw_lr_ratio": -1.0}, r"adamw_lr_ratio must be in \[0, inf\), got -1"),
    ],
)
def test_options_are_checked_whatever_the_parameters(
    options: dict[str, Any], sentence: str
) -> None:
    matrix = [("weight", nn.Parameter(torch.ones(2, 2)))]
    with pytest.raises(ValueError, match=sentence):
        Muon(matrix, **options)
    optimizer = Muon(matrix)
    late = {"params": [nn.Parameter(torch.ones(2, 2))], **options}
    with pytest.raises(ValueError, match=sentence):
        optimizer.add_param_group(late)
    assert len(optimizer.param_groups) == 1


def test_a_rate_in_a_tensor_is_taken() -> None:
    networks = [model(), model(), model()]
    for network, lr in zip(networks, (0.25, torch.tensor(0.25), torch.tensor([0.25])), strict=True):
        backward(network, 0)
        Muon(network, lr=lr).step()
    assert equal(networks[0], networks[1])
    assert equal(networks[0], networks[2])


def test_what_it_cannot_take_is_refused() -> None:
    network = model()
    with pytest.raises(ValueError, match=r"params must be the model, or named_parameters\(\)"):
        Muon(network.parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with at least one hidden matrix for Muon"):
        Muon(network, adamw=("*",))
    with pytest.raises(ValueError, match="Muon takes real parameters"):
        Muon([("weight", nn.Parameter(torch.ones(2, 2, dtype=torch.complex64)))])
    with pytest.raises(ValueError, match=r"adamw_weight_decay must be in \[0, inf\) or None"):
        Muon(network, adamw_weight_decay=-1.0)
    with pytest.raises(ValueError, match="of two dimensions or more, got 1"):
        Muon(network).add_param_group({"params": nn.Parameter(torch.ones(2)), "algorithm": "muon"})
    sparse: Tensor = nn.Parameter(torch.ones(2, 2))
    sparse.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(RuntimeError, match="dense gradients"):
        Muon([("weight", sparse)]).step()


def test_groups_may_hold_generators() -> None:
    network = model()
    optimizer = Muon([{"params": network.named_parameters(), "lr": 0.5}])
    assert sum(len(names) for names in parts(optimizer).values()) == 5
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_a_refused_group_leaves_nothing_of_it() -> None:
    network = model()
    optimizer = Muon(network)
    late = [nn.Parameter(torch.ones(2, 2)), network[2].bias]  # the second is there already
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": late})
    assert len(optimizer.param_groups) == 2
