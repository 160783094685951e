"""The transformer is the one of its formulas, wherever and however it is made."""

import math
from pathlib import Path
from typing import Any

import gloo_ranks
import model_ranks
import pytest
import torch
from hydra import compose, initialize_config_module
from torch import Tensor

from largebatch.conf.build import build
from largebatch.conf.engine_config import EngineConfig
from largebatch.distributed.ranks import Ranks
from largebatch.train.build import prepare_model
from largebatch.train.engines.model_options import checkpoint_activations
from largebatch.train.models import HuggingFace, Transformer
from largebatch.train.models.transformer import rotate

SIZES = {"vocabulary": 40, "dim": 24, "depth": 2, "heads": 4, "hidden": 36, "max_length": 32}


def transformer(**more: Any) -> Transformer:
    torch.manual_seed(1)
    made = Transformer(**(SIZES | more))
    with torch.no_grad():  # weights that no symmetry hides behind
        for param in made.parameters():
            param.add_(torch.randn_like(param), alpha=0.3)
    return made


def tokens(length: int = 11) -> Tensor:
    return torch.randint(0, 40, (3, length), generator=torch.Generator().manual_seed(2))


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(x: Tensor, base: float) -> Tensor:
    """Rotary positions as complex numbers: x_i + i·x_{i + d/2}, times exp(i·m·base^(-2i/d))."""
    length, width = x.shape
    pairs = torch.complex(x[:, : width // 2], x[:, width // 2 :])
    turns = torch.tensor(
        [[m * base ** (-2 * i / width) for i in range(width // 2)] for m in range(length)],
        dtype=torch.float64,
    )
    pairs = pairs * torch.polar(torch.ones_like(turns), turns)
    return torch.cat((pairs.real, pairs.imag), 1)


def attention(x: Tensor, w: dict[str, Tensor], heads: int, kv_heads: int, base: float) -> Tensor:
    """softmax(Q Kᵀ / √d) V, head by head and place by place, over what is not to come."""
    length, width = x.shape[0], w["queries.weight"].shape[0] // heads
    out = []
    for head in range(heads):
        shared = head // (heads // kv_heads)
        rows = slice(head * width, (head + 1) * width)
        shared_rows = slice(shared * width, (shared + 1) * width)
        q, k = x @ w["queries.weight"][rows].T, x @ w["keys.weight"][shared_rows].T
        if "query_norm.weight" in w:
            q, k = (normed(y, w[f"{n}_norm.weight"], 1e-3) for n, y in (("query", q), ("key", k)))
        q, k = turned(q, base), turned(k, base)
        v = x @ w["values.weight"][shared_rows].T
        places = []
        for m in range(length):
            scores = (k[: m + 1] @ q[m]) / math.sqrt(width)
            places.append(scores.exp() / scores.exp().sum() @ v[: m + 1])
        out.append(torch.stack(places))
    return torch.cat(out, 1) @ w["output.weight"].T


def reference(model: Transformer, sequence: Tensor, base: float, eps: float) -> Tensor:
    """The logits of one sequence, in float64, from the papers' formulas."""
    weights = {name: param.detach().double() for name, param in model.state_dict().items()}

    def of(prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): p for n, p in weights.items() if n.startswith(prefix)}

    x = weights["embedding.weight"][sequence]
    for number in range(len(model.blocks)):
        block = of(f"blocks.{number}.")
        y = normed(x, block["attention_norm.weight"], eps)
        x = x + attention(y, of(f"blocks.{number}.attention."), model.heads, model.kv_heads, base)
        y = normed(x, block["mlp_norm.weight"], eps)
        gate = y @ block["mlp.gate.weight"].T
        hidden = gate / (1 + (-gate).exp()) * (y @ block["mlp.up.weight"].T)
        x = x + hidden @ block["mlp.down.weight"].T
    return normed(x, weights["norm.weight"], eps) @ weights["head.weight"].T


@pytest.mark.parametrize("kv_heads", [None, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_the_logits_are_those_of_the_formulas(kv_heads: int | None, tied: bool) -> None:
    model = transformer(
        kv_heads=kv_heads, tie_embeddings=tied, rotary_base=50.0, norm_eps=1e-3
    ).double()
    found = model(tokens())
    expected = torch.stack([reference(model, one, 50.0, 1e-3) for one in tokens()])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_norms_of_queries_and_keys_and_a_cap_are_those_of_the_formulas() -> None:
    model = transformer(qk_norm=True, kv_heads=2, norm_eps=1e-3, logit_softcap=2.0).double()
    expected = torch.stack([reference(model, one, 10_000.0, 1e-3) for one in tokens()])
    assert float(expected.abs().max()) > 2.0
    torch.testing.assert_close(
        model(tokens()), 2.0 * torch.tanh(expected / 2.0), rtol=1e-10, atol=1e-10
    )


def test_the_residual_stream_stays_in_fp32_where_weights_are_fewer_bits() -> None:
    model = transformer(fp32_residual=True).bfloat16()
    kept: list[torch.dtype] = []

    def keep(module: Any, given: Any, output: Tensor) -> None:
        kept.append(output.dtype)

    for block in model.blocks:
        block.register_forward_hook(keep)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(tokens())).all()
    assert kept == [torch.float32, torch.float32]


def test_the_logits_are_those_of_the_transformers_librarys_llama() -> None:
    ours = transformer(kv_heads=2)
    shape = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 2, "vocab_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    theirs = HuggingFace("llama", shape | heads)
    names = {
        "embedding": "model.embed_tokens",
        "norm": "model.norm",
        "head": "lm_head",
        "attention_norm": "input_layernorm",
        "mlp_norm": "post_attention_layernorm",
        "attention.queries": "self_attn.q_proj",
        "attention.keys": "self_attn.k_proj",
        "attention.values": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    renamed = {}
    for name, param in ours.state_dict().items():
        first, *inner = name.removesuffix(".weight").split(".")
        there = (
            names[first] if not inner else f"model.layers.{inner[0]}.{names['.'.join(inner[1:])]}"
        )
        renamed[f"model.{there}.weight"] = param
    theirs.load_state_dict(renamed)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-4, atol=1e-5)


def test_no_place_sees_what_is_to_come() -> None:
    model, changed = transformer(kv_heads=2), tokens()
    changed[:, 6:] = (changed[:, 6:] + 1) % 40
    before, after = model(tokens()), model(changed)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.isclose(before[:, 6], after[:, 6]).all(-1).any()


def test_a_rotated_score_depends_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 8, generator=generator, dtype=torch.float64)
    queries, keys = (rotate(x.expand(40, 8), 10_000.0) for x in (query, key))
    scores = queries @ keys.T
    for distance in (0, 1, 7, 30):
        diagonal = scores.diagonal(-distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores[30, 0] != pytest.approx(float(scores[0, 0]), rel=1e-3)


def test_rotations_are_exact_to_fp32_in_bf16() -> None:
    """A bf16 table has no place 1,001; a bf16 vector turned by an FP32 angle has."""
    x = torch.ones(1200, 2, dtype=torch.bfloat16)
    found = rotate(x, 10_000.0)[1001]
    exact = [math.cos(1001) - math.sin(1001), math.sin(1001) + math.cos(1001)]
    assert found.tolist() == pytest.approx(exact, rel=2**-8)


def test_initial_weights_are_smaller_by_depth_where_they_write_to_the_stream() -> None:
    torch.manual_seed(0)
    model = Transformer(vocabulary=500, dim=128, depth=8, heads=4, init_std=0.05)
    for name, param in model.named_parameters():
        if param.ndim == 1:
            assert torch.equal(param, torch.ones_like(param)), name
            continue
        writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
        expected = 0.05 / 4 if writes else 0.05  # √(2 · 8) = 4
        # A standard deviation of n draws is off by 1/√(2n) of it; five times that.
        assert float(param.detach().std()) == pytest.approx(
            expected, rel=5 / math.sqrt(2 * param.numel())
        )


@pytest.mark.parametrize("tied", [False, True])
def test_made_without_memory_it_is_the_same_model(tied: bool) -> None:
    torch.manual_seed(3)
    expected = Transformer(**SIZES, tie_embeddings=tied)  # type: ignore[arg-type]
    with torch.device("meta"):
        model = Transformer(**SIZES, tie_embeddings=tied)  # type: ignore[arg-type]
    assert not list(model.buffers())
    model.to_empty(device="cpu")
    torch.manual_seed(3)
    model.reset_parameters()
    assert (model.head.weight is model.embedding.weight) is tied
    for (name, found), (also, weight) in zip(
        model.named_parameters(), expected.named_parameters(), strict=True
    ):
        assert name == also
        assert torch.equal(found, weight)


@pytest.mark.parametrize("tied", [False, True])
def test_sharded_by_block_from_the_meta_device_and_checkpointed_the_gradient_is_the_same(
    tied: bool, tmp_path: Path
) -> None:
    expected = model_ranks.gradients_of(model_ranks.model(tied), model_ranks.tokens())
    ranks = gloo_ranks.launch(model_ranks.shard_from_meta, [tied], 2, tmp_path)
    found = gloo_ranks.successful([rank[str(tied)] for rank in ranks])
    logits = torch.cat([rank.pop("logits") for rank in found])
    torch.testing.assert_close(logits, expected.pop("logits"))
    assert found[0].keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[0][name], grad, msg=lambda text, n=name: f"{n}: {text}")


def test_checkpointed_blocks_give_the_same_gradient_to_the_bit() -> None:
    plain, checkpointed = model_ranks.model(False), model_ranks.model(False)
    checkpoint_activations(checkpointed)
    expected = model_ranks.gradients_of(plain, model_ranks.tokens())
    found = model_ranks.gradients_of(checkpointed, model_ranks.tokens())
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("device", "choice", "wanted"),
    [("xpu", None, True), ("xpu", False, False), ("cuda", None, False), ("cpu", True, True)],
)
def test_blocks_are_computed_again_where_attention_has_no_fused_backward_pass(
    device: str, choice: bool | None, wanted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    made = model_ranks.model(False)
    before = made.blocks[0].forward
    config = EngineConfig(activation_checkpointing=choice)
    prepare_model(config, made, torch.device(device), Ranks())
    assert (made.blocks[0].forward != before) == wanted
    told = capsys.readouterr().err
    assert ("engine.activation_checkpointing=false" in told) == (wanted and choice is None)


def test_compiled_it_is_one_graph_with_the_same_logits() -> None:
    model = transformer(kv_heads=2)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens()), model(tokens()))


def test_in_bf16_the_stream_and_the_norms_stay_fp32() -> None:
    model = transformer(kv_heads=2)
    seen: dict[str, torch.dtype] = {}
    for name in ("blocks.1", "blocks.1.mlp_norm", "blocks.1.mlp.gate"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, n=name: seen.update({n: output.dtype})
        )
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens())
    bf16, fp32 = torch.bfloat16, torch.float32
    assert seen == {"blocks.1": fp32, "blocks.1.mlp_norm": fp32, "blocks.1.mlp.gate": bf16}
    exact = model(tokens()).detach()
    assert float((logits.detach() - exact).norm() / exact.norm()) < 2**-5
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == fp32 for p in model.parameters())


@pytest.mark.parametrize(
    ("choice", "vocabulary", "dim", "depth", "hidden", "stated"),
    [
        ("transformer", 96, 128, 4, 384, 877_696),
        ("transformer_tiny", 96, 64, 2, 192, 119_104),
        ("transformer_350m", 32_000, 1024, 24, 2560, 354_993_152),
        ("transformer_3_5b", 32_000, 3200, 26, 8640, 3_426_473_600),
        ("transformer_7b", 32_000, 4096, 32, 11_008, 6_738_415_616),
    ],
)
def test_a_configured_size_has_the_parameters_that_it_states(
    choice: str, vocabulary: int, dim: int, depth: int, hidden: int, stated: int
) -> None:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        config = compose("train", [f"model={choice}", "task=digits"])
    with torch.device("meta"):
        model: Transformer = build(config.model, "model")
    counted = sum(param.numel() for param in model.parameters())
    of_block = 4 * dim**2 + 3 * dim * hidden + 2 * dim
    assert counted == depth * of_block + 2 * vocabulary * dim + dim == stated
    text = Path(__file__).parents[2].joinpath(f"conf/model/{choice}.yaml").read_text()
    assert f"{stated:,}" in text or f"{stated / 1e6:.2f} million" in text


def test_vocabulary_and_length_are_the_tasks_where_it_has_them() -> None:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        words = ["model=transformer_350m", "+task.vocabulary=777", "+task.sequence_length=99"]
        config = compose("train", words)
    assert (config.model.vocabulary, config.model.max_length) == (777, 99)


def test_shared_keys_and_values_are_fewer_parameters() -> None:
    whole, shared = (sum(p.numel() for p in transformer(kv_heads=kv).parameters()) for kv in (4, 1))
    assert whole - shared == 2 * 2 * 24 * 18  # blocks, keys and values, dim, 3 of 4 heads of 6


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"heads": 5}, "model.dim must be a multiple of twice model.heads = 5"),
        ({"heads": 8}, "model.dim must be a multiple of twice model.heads = 8"),
        ({"kv_heads": 3}, "model.kv_heads must divide model.heads = 4, got 3"),
        ({"kv_heads": 8}, "model.kv_heads must divide model.heads = 4, got 8"),
        ({"depth": 0}, "model.depth must be a whole number of at least 1 .*, got 0"),
        ({"vocabulary": 1}, "model.vocabulary must be a whole number of at least 2 .*, got 1"),
        ({"norm_eps": 0}, "model.norm_eps must be a number > 0, got 0"),
        ({"init_std": -1}, "model.init_std must be a number > 0, got -1"),
        ({"rotary_base": 1}, "model.rotary_base must be a number > 1, got 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Transformer(**(SIZES | more))


def test_a_longer_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match=r"at most model.max_length = 32 tokens long, got 33"):
        transformer()(tokens(33))
