"""What benchmarks of whole training steps train: the bundled byte model, and a small decoder."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from largebatch.train.data.sampler import Indices
from largebatch.train.models import ByteMLP
from largebatch.train.tasks import Batch, Task
from largebatch.train.tasks.bytes import Bytes


@dataclass(frozen=True)
class Bytewise:
    """The bundled byte model on its task."""

    batch_size: int
    """Global, in samples."""

    @property
    def name(self) -> str:
        return f"byte MLP, batch {self.batch_size}"

    def model(self) -> nn.Module:
        return ByteMLP(context=8)

    def task(self) -> Task:
        return _bytes()


@dataclass(frozen=True)
class Decoding:
    """A decoder on sequences of `places` symbols, drawn at random: only time counts."""

    batch_size: int = 16
    places: int = 128
    width: int = 384
    num_blocks: int = 6
    vocabulary: int = 1024

    @property
    def name(self) -> str:
        return f"decoder, batch {self.batch_size} x {self.places}"

    def model(self) -> nn.Module:
        return Decoder(self.width, self.num_blocks, self.vocabulary)

    def task(self) -> Task:
        return Symbols(self.places, self.vocabulary)


Workload = Bytewise | Decoding
"""What a step learns, with what model, from how much."""


def describe(workload: Workload) -> dict[str, str | int]:
    """Name and number of parameters, for a record."""
    num_parameters = sum(param.numel() for param in workload.model().parameters())
    return {"name": workload.name, "num_parameters": num_parameters}


@cache
def _bytes() -> Bytes:
    return Bytes()


class Symbols:
    """Predict each symbol of a sequence from those before it."""

    num_train, num_eval, replacement = 256, 1, True

    def __init__(self, places: int, vocabulary: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._symbols = torch.randint(vocabulary, (self.num_train, places + 1), generator=generator)

    def train_batch(self, indices: Indices) -> Batch:
        return (self._symbols[torch.from_numpy(indices)],)

    eval_batch = train_batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        (symbols,) = batch
        logits = model(symbols[:, :-1])
        return cross_entropy(logits.flatten(0, 1), symbols[:, 1:].flatten())

    def provenance(self) -> dict[str, str]:
        return {}


class Decoder(nn.Module):
    """Pre-norm blocks between an embedding and a head of its own; input (samples, places)."""

    def __init__(self, width: int, num_blocks: int, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(WorkloadBlock(width) for _ in range(num_blocks))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, symbols: Tensor) -> Tensor:
        x = self.embedding(symbols)  # (samples, places, width)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


class WorkloadBlock(nn.Module):
    """Causal attention, then a hidden layer four times as wide."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // 64)
        self.before_mix, self.before_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.mixed = nn.Linear(width, width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:  # (samples, places, width)
        joint = self.queries_keys_values(self.before_mix(x)).unflatten(2, (3, self.heads, -1))
        queries, keys, values = joint.permute(2, 0, 3, 1, 4).unbind()  # (samples, heads, places, …)
        mixed = scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.mixed(mixed.transpose(1, 2).flatten(2))
        out: Tensor = x + self.hidden(self.before_hidden(x))
        return out
