"""Causal language models of the transformers library, by their configuration, with fresh weights.

Nothing is downloaded: on tens of thousands of ranks that would be an attack.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.common.errors import ConfigError
from largebatch.common.numbers import real_number
from largebatch.common.text import one_line


class HuggingFace(nn.Module):
    """Tokens of shape (samples, length), int64 → logits of shape (samples, length, vocabulary).

    Weights are FP32 whatever the configuration says: lower precision is the engine's to choose.

    Args:
        config: a model type that the library knows (its default sizes), a path to a config.json or
            to its folder, or the name of a hub model whose configuration is in the local cache.
        overrides: keys of that configuration, which has to have them.
        dropout: in the place of each of its dropouts; None: leave them.

    Raises:
        ConfigError: the library is not installed.
        ValueError: a configuration that there is not, or a key that it does not have.
    """

    def __init__(
        self,
        config: str,
        overrides: Mapping[str, Any] | None = None,
        dropout: float | None = 0.0,
    ) -> None:
        super().__init__()
        found = _configuration(config, dict(overrides or {}))
        if dropout is not None:
            rate = real_number(dropout, "model.dropout", least=0.0, most=1.0)
            for key, value in found.to_dict().items():
                if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                    setattr(found, key, rate)
        from transformers import AttentionInterface, AutoModelForCausalLM

        found.use_cache = False
        if hasattr(found, "is_decoder"):
            found.is_decoder = True  # BERT and its like would see the tokens to come
        try:
            self.model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call] # published without types
                found, dtype=torch.float32
            )
        except ValueError as error:
            raise ValueError(f"model.config={config}: {one_line(error)}") from error
        if _is_plainly_causal(self.model):
            AttentionInterface.register(_CAUSAL, _attend)
            self.model.set_attn_implementation(_CAUSAL)
        self.max_length: int | None = getattr(found, "max_position_embeddings", None)

    def forward(self, tokens: Tensor) -> Tensor:
        if self.max_length is not None and tokens.shape[-1] > self.max_length:
            raise ValueError(
                f"sequences must be at most {self.max_length} tokens long, this configuration's "
                f"max_position_embeddings, got {tokens.shape[-1]}"
            )
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


_CAUSAL = "largebatch_causal"


def _is_plainly_causal(model: Any) -> bool:
    """Whether every layer sees all that went before, by an attention that can be exchanged."""
    config = model.config
    windows = [getattr(config, key, None) for key in ("sliding_window", "attention_chunk_size")]
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    exchangeable = bool(getattr(model, "_supports_attention_backend", False))
    return exchangeable and windows == [None, None] and layers == {"full_attention"}


def _attend(module: nn.Module, *args: Any, **more: Any) -> Any:
    """Torch's attention, causal by its flag and without a mask.

    To make a mask the library looks in every pass for several sequences in one: the host would wait
    for the device, and without memory (the meta device) there is nothing to look at.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, *args, **more)


def _configuration(config: str, overrides: dict[str, Any]) -> Any:
    try:
        from transformers import CONFIG_MAPPING, AutoConfig
    except ImportError as error:
        raise ConfigError(
            "model=hugging_face needs the transformers library: pip install 'largebatch[hf]'"
        ) from error
    make: Callable[..., Any] = (
        partial(AutoConfig.for_model, config)
        if config in CONFIG_MAPPING
        else partial(AutoConfig.from_pretrained, config, local_files_only=True)
    )
    try:
        known = make()
    except (OSError, ValueError) as error:
        where = "has none that can be read" if Path(config).exists() else "is no path"
        raise ValueError(
            f"model.config must be a model type (gpt2, llama, …), a config.json or its folder, or "
            f"a hub model in the local cache; {config!r} {where}: {one_line(error)}"
        ) from error
    for key in overrides:
        if not hasattr(known, key):
            raise ValueError(
                f"model.overrides: a {known.model_type} configuration has no {key!r}; it has "
                f"{', '.join(sorted(known.to_dict()))}"
            )
    try:
        return make(**overrides)  # made anew: some values follow from others
    except Exception as error:  # a wrong type has an error class of its own in each version
        raise ValueError(f"model.overrides: {one_line(error)}") from error
