"""A decoder-only transformer language model of today's common shape.

RMSNorm before every part (Zhang & Sennrich 2019, arXiv:1910.07467), rotary positions (Su et al.
2021, arXiv:2104.09864), SwiGLU (Shazeer 2020, arXiv:2002.05202), queries that share keys and values
in groups (Ainslie et al. 2023, arXiv:2305.13245), no biases: the shape of LLaMA (Touvron et al.
2023, arXiv:2302.13971). Queries, keys and values have a matrix each, because a layer-wise optimizer
would see a fused one as one layer.

There are no buffers: the model can be made on the meta device, given memory by `to_empty` and
values by `reset_parameters`, and sharded, checkpointed or compiled block by block (`blocks`).
"""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from largebatch.common.numbers import real_number, whole_number

_WIDTHS_OF = 64
"""A SwiGLU width that is not given is a multiple of it, as matrix units like it."""


MOST_BLOCKS = 10_000
"""Each takes a millisecond to make; the deepest that have been published have 1,000."""


class PromotingRMSNorm(nn.RMSNorm):
    """torch's, for inputs and weights of different precision too: the wider one counts."""

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.weight
        if x.dtype != weight.dtype:  # else torch's warns
            dtype = torch.promote_types(x.dtype, weight.dtype)
            x, weight = x.to(dtype), weight.to(dtype)
        return rms_norm(x, self.normalized_shape, weight, self.eps)


class Attention(nn.Module):
    """Causal attention; each of `kv_heads` keys and values serves heads / kv_heads queries.

    Args:
        norm_eps: of an RMSNorm over each head's query and key, before they are turned; None:
            without.
    """

    def __init__(
        self, dim: int, heads: int, kv_heads: int, rotary_base: float, norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.head_dim, self.rotary_base = dim // heads, rotary_base
        self.queries = nn.Linear(dim, heads * self.head_dim, bias=False)
        self.keys = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.values = nn.Linear(dim, kv_heads * self.head_dim, bias=False)
        self.output = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.mix = CausalMix()
        self.query_norm, self.key_norm = (
            nn.Identity() if norm_eps is None else PromotingRMSNorm(self.head_dim, eps=norm_eps)
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:  # (samples, length, dim)
        queries, keys, values = (
            part(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.queries, self.keys, self.values)
        )  # (samples, heads or kv_heads, length, head_dim)
        mixed = self.mix(
            rotate(self.query_norm(queries), self.rotary_base),
            rotate(self.key_norm(keys), self.rotary_base),
            values,
        )
        projected: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return projected


def rotate(x: Tensor, base: float) -> Tensor:
    """Turn each pair (x_i, x_{i + d/2}) at place m by the angle m · base^(-2i/d).

    The angles are made anew in every block and in FP32: a table passed in would be cast to bf16
    with the block's other inputs by FSDP2, and 8 bits cannot tell place 1,000 from 1,001.

    Args:
        x: (…, length, d).
    """
    length, width = x.shape[-2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.arange(0, width, 2, dtype=dtype, device=x.device)
    places = torch.arange(length, dtype=dtype, device=x.device)
    angles = places[:, None] * base ** (-pairs / width)  # (length, d / 2)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.to(dtype).chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).type_as(x)


class CausalMix(nn.Module):
    """softmax(Q Kᵀ / √d) V over what is not to come: a module, so that hooks see Q and K."""

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return scaled_dot_product_attention(
            queries, keys, values, is_causal=True, enable_gqa=keys.shape[1] != queries.shape[1]
        )


class SwiGLU(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        projected: Tensor = self.down(silu(self.gate(x)) * self.up(x))
        return projected


class TransformerBlock(nn.Module):
    """Attention and SwiGLU, each added to what it read."""

    def __init__(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        hidden: int,
        rotary_base: float,
        norm_eps: float,
        branch: float = 1.0,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.branch = branch
        self.attention_norm = PromotingRMSNorm(dim, eps=norm_eps)
        eps = norm_eps if qk_norm else None
        self.attention = Attention(dim, heads, kv_heads, rotary_base, eps)
        self.mlp_norm = PromotingRMSNorm(dim, eps=norm_eps)
        self.mlp = SwiGLU(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self._add(x, self.attention(self.attention_norm(x)))
        return self._add(x, self.mlp(self.mlp_norm(x)))

    def _add(self, x: Tensor, written: Tensor) -> Tensor:
        """The residual stream after a branch."""
        return x + written if self.branch == 1.0 else torch.add(x, written, alpha=self.branch)


def usual_hidden(dim: int) -> int:
    """The width of a SwiGLU that is not given: 8/3 of `dim`, rounded up."""
    return -(-8 * dim // (3 * _WIDTHS_OF)) * _WIDTHS_OF


class Transformer(nn.Module):
    """Tokens of shape (samples, length), int64 → logits of shape (samples, length, vocabulary).

    Args:
        hidden: width of the SwiGLU; None: 8/3 of `dim`, rounded up to a multiple of 64.
        kv_heads: keys and values per block, a divisor of `heads`; None: as many as heads.
        max_length: longer sequences are refused.
        tie_embeddings: the output matrix is the embedding.
        init_std: of every matrix; those that write to the residual stream are smaller by
            √(2 · depth), so that its variance does not grow with depth (GPT-2).
        base_dim: the `dim` that rates and `init_std` were tuned at, which makes it µP: hidden
            matrices begin smaller by √(dim / base_dim), logits are taken times base_dim / dim. For
            heads that grow in number, not in size. None: neither.
        base_depth: the same of `depth`: what is added to the residual stream is taken times
            base_depth / depth, and begins as at that depth (arXiv:2505.01618). None: neither.
        qk_norm: take an RMSNorm of each head's queries and keys, so that attention's logits are
            bounded (Henry et al. 2020, arXiv:2010.04245; Dehghani et al. 2023, arXiv:2302.05442).
        logit_softcap: hold logits within ± it, by c · tanh(z / c) (Gemma 2, arXiv:2408.00118);
            None: they are free.
        fp32_residual: keep the residual stream in FP32 under any precision. Without, it is that
            where weights are whole (autocast), and the precision of the products under engine=fsdp.

    Raises:
        ValueError: sizes that do not fit each other, or a longer sequence.
    """

    def __init__(
        self,
        vocabulary: int,
        dim: int,
        depth: int,
        heads: int,
        kv_heads: int | None = None,
        hidden: int | None = None,
        max_length: int = 2048,
        rotary_base: float = 10_000.0,
        tie_embeddings: bool = False,
        norm_eps: float = 1e-5,
        init_std: float = 0.02,
        base_dim: int | None = None,
        base_depth: int | None = None,
        qk_norm: bool = False,
        logit_softcap: float | None = None,
        fp32_residual: bool = False,
    ) -> None:
        super().__init__()
        self.vocabulary = whole_number(vocabulary, "model.vocabulary", 2)
        self.dim = whole_number(dim, "model.dim", 2)
        self.heads = whole_number(heads, "model.heads", 1)
        self.kv_heads = self.heads if kv_heads is None else whole_number(kv_heads, _KV_HEADS, 1)
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"model.dim must be a multiple of twice model.heads = {self.heads} (rotary "
                f"positions turn pairs), got {self.dim}"
            )
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{_KV_HEADS} must divide model.heads = {self.heads}, got {self.kv_heads}"
            )
        width = usual_hidden(self.dim) if hidden is None else hidden
        self.hidden = whole_number(width, "model.hidden", 1)
        self.max_length = whole_number(max_length, "model.max_length", 1)
        self.init_std = real_number(init_std, "model.init_std", above=0.0)
        rotary_base = real_number(rotary_base, "model.rotary_base", above=1.0)
        norm_eps = real_number(norm_eps, "model.norm_eps", above=0.0)
        self.tie_embeddings = tie_embeddings
        depth = whole_number(depth, "model.depth", 1)
        if depth > MOST_BLOCKS:
            raise ValueError(f"model.depth must be at most {MOST_BLOCKS} blocks, got {depth}")
        self.base_dim = self.dim if base_dim is None else whole_number(base_dim, _BASE_DIM, 1)
        base = depth if base_depth is None else whole_number(base_depth, "model.base_depth", 1)
        self.base_depth = base
        if logit_softcap is not None:
            logit_softcap = real_number(logit_softcap, "model.logit_softcap", above=0.0)
        self.logit_softcap, self.fp32_residual = logit_softcap, fp32_residual
        device = torch.get_default_device()
        with torch.device("meta"):  # torch's own initial values are neither drawn nor kept
            self.embedding = nn.Embedding(self.vocabulary, self.dim)
            self.blocks = nn.ModuleList(
                TransformerBlock(
                    self.dim,
                    self.heads,
                    self.kv_heads,
                    self.hidden,
                    rotary_base,
                    norm_eps,
                    branch=self.base_depth / depth,
                    qk_norm=qk_norm,
                )
                for _ in range(depth)
            )
            self.norm = PromotingRMSNorm(self.dim, eps=norm_eps)
            self.head = nn.Linear(self.dim, self.vocabulary, bias=False)
        for module in self.modules():
            for name, bare in list(module.named_parameters(recurse=False)):
                module._parameters[name] = nn.Parameter(torch.empty_like(bare, device=device))
        self._tie()
        self.reset_parameters()

    def _tie(self) -> None:
        if self.tie_embeddings:
            self.head.weight = self.embedding.weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch's is not annotated
        self._tie()  # to_empty gives each module a tensor of its own
        return self

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the initial weights, as the constructor does."""
        std = self.init_std * math.sqrt(self.base_dim / self.dim)
        small = std / math.sqrt(2 * self.base_depth)
        for name, param in self.named_parameters():
            if name.endswith("norm.weight"):
                param.fill_(1.0)
            elif not name.startswith("blocks."):
                param.normal_(0.0, self.init_std)
            else:
                writes = name.endswith(("attention.output.weight", "mlp.down.weight"))
                param.normal_(0.0, small if writes else std)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.shape[-1] > self.max_length:
            raise ValueError(
                f"sequences must be at most model.max_length = {self.max_length} tokens long, got "
                f"{tokens.shape[-1]}: shorten them or raise model.max_length"
            )
        x = self.embedding(tokens)  # (samples, length, dim)
        if self.fp32_residual:  # what is added to it is promoted
            x = x.to(torch.promote_types(x.dtype, torch.float32))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.base_dim != self.dim:
            x = x * (self.base_dim / self.dim)
        logits: Tensor = self.head(x)
        if self.logit_softcap is not None:
            logits = torch.tanh(logits / self.logit_softcap) * self.logit_softcap
        return logits


_KV_HEADS, _BASE_DIM = "model.kv_heads", "model.base_dim"
