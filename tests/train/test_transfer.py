"""Rates of a small model on a larger one: groups, initial values, and the coordinate check."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from torch import nn

from largebatch.common.errors import ConfigError
from largebatch.conf.build import build
from largebatch.conf.config import TrainConfig, typed
from largebatch.schedules import Constant, ConstantBatch, Plan
from largebatch.train.build import build_optimizer
from largebatch.train.hyperparameter_scaler import HyperparameterScaler
from largebatch.train.models import Transformer
from largebatch.train.transfer.coordinates import ALONE, Coordinates, ShortRun, slope, widened

Coord = Callable[..., tuple[int, str, str]]

TEXT = ("task=text", "task.sequence_length=32", "task.num_bytes=200_000")
WIDE = (*TEXT, "model.dim=64", "scaling.base_width=16")


def composed(*words: str) -> TrainConfig:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        return typed(compose("train", list(words)))


def built(*words: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    config = composed(*words)
    model = build(config.model, "model", nn.Module)
    return model, build_optimizer(config, model, ALONE)


def group_of(optimizer: torch.optim.Optimizer, model: nn.Module, name: str) -> dict[str, Any]:
    param = dict(model.named_parameters())[name]
    return next(g for g in optimizer.param_groups if any(p is param for p in g["params"]))


HIDDEN, HEAD, EMBEDDING = "blocks.1.mlp.down.weight", "head.weight", "embedding.weight"


@pytest.mark.parametrize(
    ("optim", "hidden", "head"),
    [
        (("adamw",), 1 / 4, 1.0),
        (("lamb",), 1 / 2, 1.0),
        (("lamb", "optim.groups.no_adapt=[mlp,head]"), 1 / 4, 1.0),
        (("lamb", "scaling.step=relative"), 1.0, 1.0),
        (("lars",), 1 / 2, 1.0),
        (("lars", "optim.groups.no_adapt=[mlp,head]"), 1.0, 4.0),
        (("sgd",), 1.0, 4.0),
        (("muon", "optim.shape_rule=spectral"), 1.0, 1.0),
        (("muon",), 1 / 2, 1.0),
        (("soap_muon",), 1 / 2, 1.0),
        (("muon", "optim.hyperball=true"), 1.0, 1.0),
        (("shampoo", "optim.hyperball=true"), 1 / 2, 1.0),
        (("shampoo", "optim.grafting=none"), 1.0, 2.0),
        (("shampoo",), 1 / 4, 1.0),
        (("soap",), 1 / 4, 1.0),
        (("kfac",), 1 / 4, 1.0),
        (("mano",), 1 / 4, 1.0),
        (("kfac", "optim.graft=none", "scaling.step=spectral"), 1.0, 4.0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_each_group_has_the_factor_of_its_tensors(
    optim: tuple[str, ...], hidden: float, head: float
) -> None:
    model, optimizer = built(*WIDE, f"optim={optim[0]}", *optim[1:])
    for name, factor in ((HIDDEN, hidden), (HEAD, head), ("norm.weight", None)):
        found = group_of(optimizer, model, name).get("lr_factor", 1.0)
        if factor is not None:
            assert found == pytest.approx(factor), name
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in model.parameters()}
    assert len(held) == len({id(p) for p in held})


def test_weight_decay_and_eps_move_with_the_rate() -> None:
    model, optimizer = built(*WIDE, "optim.weight_decay=0.1", "optim.eps=1e-8")
    hidden, vector = (group_of(optimizer, model, name) for name in (HIDDEN, "norm.weight"))
    assert (hidden["weight_decay"], hidden["eps"]) == pytest.approx((0.4, 2.5e-9))
    assert (vector["weight_decay"], vector["eps"]) == pytest.approx((0.0, 2.5e-9))
    assert group_of(optimizer, model, EMBEDDING)["weight_decay"] == 0.1


def test_decay_beside_lamb_s_step_moves_against_its_rate() -> None:
    decays = []
    for decay in ("update", "decoupled"):
        words = ("optim=lamb", "optim.weight_decay=0.1", f"+optim.decay={decay}")
        model, optimizer = built(*WIDE, *words)
        decays.append(group_of(optimizer, model, HIDDEN)["weight_decay"])
    # Half the rate; within the step, times weights of half the size over an unchanged direction.
    assert decays == pytest.approx([0.4, 0.2])


def test_vectors_of_lars_go_by_sgd_s_rule() -> None:
    model, optimizer = built(*WIDE, "optim=lars")
    assert group_of(optimizer, model, "norm.weight")["lr_factor"] == 4.0


def test_adamw_s_own_decay_stays_beside_muon_s() -> None:
    words = ("optim=muon", "optim.weight_decay=0.1", "optim.adamw_weight_decay=0.3")
    model, optimizer = built(*WIDE, *words)
    assert group_of(optimizer, model, HIDDEN)["weight_decay"] == pytest.approx(0.2)
    assert group_of(optimizer, model, HEAD)["weight_decay"] == pytest.approx(0.3)


def test_a_tied_matrix_is_an_embedding() -> None:
    model, optimizer = built(*WIDE, "model.tie_embeddings=true")
    assert group_of(optimizer, model, EMBEDDING).get("lr_factor", 1.0) == 1.0


def test_a_model_as_it_was_tuned_has_the_groups_it_had() -> None:
    tuned = [len(built(*TEXT, *more)[1].param_groups) for more in ((), ("scaling.base_width=64",))]
    assert tuned == [2, 2]


def test_another_model_goes_by_the_shapes_of_the_tuned_one() -> None:
    model, optimizer = built("model.hidden=512", "scaling.base_model={hidden: 128}")
    factors = {
        name: group_of(optimizer, model, name).get("lr_factor", 1.0)
        for name, _ in model.named_parameters()
    }
    assert factors == {
        "embedding.weight": 1.0, "mlp.0.weight": 1.0, "mlp.0.bias": 1.0,
        "mlp.2.weight": 1 / 4, "mlp.2.bias": 1.0,
    }  # fmt: skip


def test_the_loop_gives_each_group_its_share_of_the_rate() -> None:
    params = [
        {"params": [nn.Parameter(torch.ones(2))], **more} for more in ({}, {"lr_factor": 0.5})
    ]
    optimizer = torch.optim.AdamW(params, lr=9.0)
    plan = Plan(ramp=ConstantBatch(size=1), curve=Constant(), budget_samples=1, base_lr=1.0,
                base_batch=1)  # fmt: skip
    scaler = HyperparameterScaler(plan, optimizer)
    scaler.set_lr(0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.2, 0.1]


def test_initial_values_and_logits_are_those_of_the_parametrisation() -> None:
    sizes: dict[str, Any] = {"vocabulary": 40, "depth": 4, "hidden": 512}
    wide = Transformer(dim=256, heads=8, base_dim=64, base_depth=2, **sizes)
    std = {name: param.std().item() for name, param in wide.named_parameters()}
    assert std["embedding.weight"] == pytest.approx(0.02, rel=0.1)
    assert std["head.weight"] == pytest.approx(0.02, rel=0.1)
    assert std["blocks.0.mlp.up.weight"] == pytest.approx(0.01, rel=0.1)
    assert std["blocks.0.mlp.down.weight"] == pytest.approx(0.01 / math.sqrt(4), rel=0.1)

    plain = Transformer(dim=256, heads=8, **sizes)
    plain.load_state_dict(wide.state_dict())
    with torch.no_grad():  # linear in the head and in what writes to the residual stream
        plain.head.weight.mul_(64 / 256)
        for name, param in plain.named_parameters():
            if name.endswith(("attention.output.weight", "mlp.down.weight")):
                param.mul_(2 / 4)
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.allclose(wide(tokens), plain(tokens), atol=1e-6)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scaling.base_width=64",), "the model is a ByteMLP: give scaling.base_model"),
        ((*TEXT, "scaling.base_model={dim: 32}"), "give scaling.base_width, its model.dim"),
        (("scaling.base_model={context: 4}", "scaling.base_depth=2"), "leave one at null"),
        (("scaling.base_model={wide: 4}",), "scaling.base_model"),
        (("scaling.step=adam",), "set scaling.base_width"),
        (("scaling.step=sign",), "scaling.step must be null or one of adam"),
        ((*WIDE, "model.base_dim=32"), "leave both to scaling.base_width"),
        ((*WIDE, "optim=kfac", "optim.graft=none"), "say by scaling.step"),
        (("scaling.base_width=0",), "scaling.base_width must be a whole number of at least 1"),
    ],
)
def test_what_cannot_be_known_is_refused_in_a_sentence(words: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        built(*words)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_heads_stay_as_large_as_they_are_at_another_width() -> None:
    config = composed(*TEXT, "model.kv_heads=2")
    model = widened(config, "dim", 256).model
    assert (model["heads"], model["kv_heads"], model["hidden"]) == (16, 8, 4 * 192)
    with pytest.raises(ConfigError, match="multiples of 16"):
        widened(config, "dim", 72)
    with pytest.raises(ConfigError, match="--key must be a whole number among the keys of model"):
        widened(config, "hiden", 72)


def test_a_slope_is_the_power_of_width() -> None:
    assert slope([1, 2, 4], [3.0, 3.0, 3.0]) == pytest.approx(0.0)
    assert slope([1, 2, 4], [1.0, 4.0, 16.0]) == pytest.approx(2.0)
    assert math.isnan(slope([1, 2], [1.0, math.inf]))


@pytest.mark.parametrize(
    ("optim", "least", "most"),
    [
        ("adamw", 1, 4), ("lamb", 1, 4), ("lars", 1, 4), ("soap", 1, 4), ("kl_soap", 1, 8),
        ("shampoo", 1, 12), ("muon", 20, 128), ("soap_muon", 20, 128),
    ],
)  # fmt: skip
def test_steps_have_few_directions_or_many_as_the_rules_take_them(
    optim: str, least: float, most: float
) -> None:
    config = composed(*TEXT, f"optim={optim}", "model.dim=128", "scaling.base_width=64")
    run = ShortRun(config, build(config.task, "task"), samples=16)
    matrices = [p for n, p in run.model.named_parameters() if "blocks" in n and p.dim() == 2]
    for _ in range(3):
        before = [p.detach().clone() for p in matrices]
        run.step()
    steps = [p.detach() - old for p, old in zip(matrices, before, strict=True)]
    stable_ranks = [(step.norm() / torch.linalg.matrix_norm(step, 2)) ** 2 for step in steps]
    assert least <= torch.stack(stable_ranks).log().mean().exp() <= most


@pytest.fixture
def coord(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Coord:
    """`largebatch coord` in this process, in a folder of its own: exit code, output, errors."""
    from largebatch.train.transfer import command

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["largebatch"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        capsys.readouterr()
        code = command.main(list(words))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


QUICK = ("--widths=32,64,128", "--steps=3", "--seeds=2", "optim.lr=0.004")


def test_mup_passes_and_the_standard_parametrisation_drifts(coord: Coord, tmp_path: Path) -> None:
    code, out, _ = coord(*QUICK, "scaling.base_width=32")
    assert code == 0, out
    assert "all 24 layers change alike" in out
    assert (tmp_path / "coord.png").stat().st_size > 10_000
    assert not (tmp_path / "runs").exists()
    code, out, _ = coord(*QUICK, "--json", "--no-picture")
    assert code == 1
    layers = json.loads(out)["layers"]
    assert layers["head"]["drifts"]
    assert layers["head"]["slope"] > 0.3


@pytest.mark.parametrize("optim", ["lamb", "lars"])
def test_layers_change_alike_where_steps_are_a_share_of_the_weights(
    coord: Coord, optim: str
) -> None:
    words = (*QUICK[:-1], "--no-picture", "--json", f"optim={optim}", "scaling.base_width=32")
    code, out, _ = coord(*words)
    assert code == 0, out
    code, out, _ = coord(*words, "scaling.step=relative")
    assert code == 1
    layers = json.loads(out)["layers"]
    assert layers["blocks.0.mlp.down"]["slope"] > 0.4


@pytest.mark.parametrize(
    ("first", "num_blocks"), [("head", 0), ("head", 40), ("decoder." + "deep." * 40 + "head", 40)],
    ids=["one", "many", "long"],
)  # fmt: skip
def test_names_of_layers_that_drift_stay_within_the_picture(first: str, num_blocks: int) -> None:
    from largebatch.train.transfer.picture import MOST_LINES, draw

    names = [first] + [
        f"transformer.blocks.{block}.self_attention.{part}_projection"
        for block in range(num_blocks)
        for part in ("query", "key", "value")
    ]
    sizes = ((32, 1.0), (64, 2.0), (128, 4.0), (256, 8.0))
    found = [
        Coordinates(width, dict.fromkeys(names, 1 + size), dict.fromkeys(names, size))
        for width, size in sizes
    ]
    figure = draw(found, 0.1, f"optim={'a_choice_of_ones_own_' * num_blocks}, one rate for all")
    figure.draw_without_rendering()
    box, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert min(box.x0, box.y0) >= 0
    assert box.x1 <= width
    assert box.y1 <= height
    shown = figure.get_supxlabel()
    assert shown.startswith("drifting:")
    assert shown.replace("\n", " ").split()[1][:4] == names[0][:4]
    assert shown.count("\n") < MOST_LINES
    assert ("and 1" in shown.replace("\n", " ")) is (num_blocks > 0)  # of 121, over 100 more


def test_a_check_that_cannot_be_made_is_refused(coord: Coord) -> None:
    for words, said in (
        (("--widths=64",), "--widths must be two or more, got 64"),
        (("--key=width", *QUICK), "--key must be a whole number among the keys of model"),
    ):
        code, _, errors = coord(*words)
        assert code == 2
        assert said in errors
        assert errors.count("\n") == 1
