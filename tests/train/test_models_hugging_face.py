"""Models of the transformers library: causal, FP32, and as their configuration says."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from largebatch.common.errors import ConfigError
from largebatch.train.engines.initial_values import record
from largebatch.train.engines.model_options import blocks
from largebatch.train.models import HuggingFace

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4}
WINDOWED = LLAMA | {"sliding_window": 3}
BLOOM = {"hidden_size": 32, "n_layer": 3, "n_head": 4}
SMALL: dict[str, dict[str, Any]] = {
    "llama": LLAMA, "qwen3": LLAMA, "gpt2": GPT2, "bert": BERT, "mistral": WINDOWED, "bloom": BLOOM,
}  # fmt: skip


def small(name: str, **more: Any) -> HuggingFace:
    torch.manual_seed(0)
    return HuggingFace(name, SMALL[name] | {"vocab_size": 60} | more)


def tokens(length: int = 9) -> Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", SMALL)
def test_any_type_is_a_causal_model_in_training_mode(name: str) -> None:
    """No dropout: two passes agree. And no place sees what is to come, not even in BERT."""
    model, changed = small(name).train(), tokens()
    changed[:, 5:] = 3 + (changed[:, 5:] - 2) % 57
    before, after = model(tokens()), model(changed)
    assert before.shape == (2, 9, 60)
    assert torch.equal(before, model(tokens()))
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5], after[:, 5])
    assert len(blocks(model)) == 3  # what engines shard, checkpoint and compile


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_attention_without_a_mask_is_the_librarys_with_one(name: str) -> None:
    model = small(name)
    found = model(tokens())
    model.model.set_attn_implementation("eager")
    torch.testing.assert_close(found, model(tokens()))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert"])
def test_a_pass_reads_no_value_on_the_host(name: str) -> None:
    """Where a tensor has no memory, there is nothing to read."""
    with torch.device("meta"):
        logits = small(name)(tokens().to("meta"))
    assert logits.shape == (2, 9, 60)


def test_a_window_stays_a_window() -> None:
    """Three layers that see three places each, their own among them, reach back six."""
    model, changed = small("mistral"), tokens()
    changed[:, 0] = 3 + (changed[:, 0] - 2) % 57
    before, after = model(tokens()), model(changed)
    assert not torch.isclose(before[:, 6], after[:, 6]).all(-1).any()
    assert torch.equal(before[:, 7:], after[:, 7:])


def test_dropout_is_the_configurations_where_it_is_asked_for() -> None:
    torch.manual_seed(0)
    model = HuggingFace("gpt2", GPT2 | {"vocab_size": 60}, dropout=None).train()
    assert not torch.equal(model(tokens()), model(tokens()))


def test_the_default_is_gpt2_of_its_published_size() -> None:
    with torch.device("meta"):
        model = HuggingFace("gpt2", {"vocab_size": 50_257})
    per_block = 12 * 768**2 + 13 * 768
    places, symbols = 1024 * 768, 50_257 * 768  # symbols are tied to the output
    counted = sum(param.numel() for param in model.parameters())
    assert counted == 12 * per_block + places + symbols + 2 * 768 == 124_439_808


@pytest.mark.parametrize("form", ["folder", "file"])
def test_a_configuration_can_be_a_file(form: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    config = LLAMA | {"model_type": "llama", "vocab_size": 60, "dtype": "bfloat16"}
    path.write_text(json.dumps(config))
    model = HuggingFace(str(path if form == "file" else tmp_path), {"num_hidden_layers": 2})
    assert len(blocks(model)) == 2
    assert {param.dtype for param in model.parameters()} == {torch.float32}
    assert model(tokens()).shape == (2, 9, 60)


def test_what_follows_from_an_override_follows() -> None:
    """A llama's head width is its hidden size over its heads, not that of the default sizes."""
    queries = small("llama").model.model.layers[0].self_attn.q_proj.weight
    assert queries.shape == (32, 32)


def test_an_unknown_configuration_is_refused_and_nothing_is_fetched(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.config must be a model type .*; 'no/such' is no"):
        HuggingFace("no/such")
    with pytest.raises(ValueError, match="has none that can be read"):
        HuggingFace(str(tmp_path))


def test_an_override_that_is_no_key_is_refused_with_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"a gpt2 configuration has no 'depth'; it has .*n_layer"):
        HuggingFace("gpt2", {"depth": 3})


def test_an_override_of_a_wrong_type_is_refused() -> None:
    with pytest.raises(ValueError, match="n_layer"):
        HuggingFace("gpt2", {"n_layer": "three"})


def test_a_longer_sequence_than_there_are_places_is_refused() -> None:
    model = small("gpt2", n_positions=8)
    with pytest.raises(ValueError, match=r"at most 8 tokens long.*, got 9"):
        model(tokens())


def test_without_the_library_the_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"pip install 'largebatch\[hf\]'"):
        HuggingFace("gpt2")


@pytest.mark.parametrize("name", SMALL)
def test_filled_one_tensor_at_a_time_it_is_the_same_model_to_the_bit(name: str) -> None:
    expected = small(name)
    torch.manual_seed(0)
    model, values = record(lambda: small(name))
    found: dict[Any, Tensor] = {}
    values.play(lambda module, key, value: found.update({(module, key): value.clone()}),
                torch.device("cpu"))  # fmt: skip
    for path, module in model.named_modules():
        for key, _ in module.named_parameters(recurse=False):
            whole = expected.get_submodule(path).get_parameter(key)
            tied = (module, key) not in found
            assert tied or torch.equal(found[module, key], whole), (path, key)
    assert len(found) == len(list(expected.parameters()))
    for one, other in zip(model.buffers(), expected.buffers(), strict=True):
        assert torch.equal(one, other)
