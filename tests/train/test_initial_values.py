"""A model that no rank holds whole begins with the bits of one that is built on the CPU."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_ranks import Cell
from gloo_ranks import launch, successful
from initial_ranks import LARGE, Asks, bits, losses, peak
from torch import Tensor, nn

from largebatch.conf.engine_config import EngineConfig
from largebatch.distributed.ranks import Ranks
from largebatch.train import build as builder
from largebatch.train.engines.initial_values import NotRecorded, record
from largebatch.train.models import CNN, Transformer

CPU = torch.device("cpu")


class Own(nn.Module):
    """A user's, with what is met: padding, encoder layers, buffers, a plain tensor, a tied head,
    values of an algorithm, and values that are drawn twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 16, padding_idx=0)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32) for _ in range(2))
        self.norm = nn.BatchNorm1d(16)
        self.register_buffer("angles", torch.arange(10).float().cos())
        self.noise = torch.randn(3)
        self.head = nn.Linear(16, 50)
        self.head.weight = self.embedding.weight
        self.basis = nn.Parameter(torch.empty(8, 8))
        nn.init.orthogonal_(self.basis)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.gate = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.apply(self._again)

    def _again(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear) and module.out_features == 32:
            nn.init.normal_(module.weight, 0.0, 0.02)
            nn.init.zeros_(module.bias)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "transformer": lambda: Transformer(50, 32, 2, 2),
    "tied": lambda: Transformer(50, 32, 2, 2, tie_embeddings=True),
    "cnn": lambda: CNN(3, 10),
    "own": Own,
}


@pytest.mark.parametrize("name", MODELS)
def test_values_played_back_are_to_the_bit_those_of_the_cpu(name: str) -> None:
    torch.manual_seed(0)
    expected = MODELS[name]()
    following = torch.get_rng_state()
    torch.manual_seed(0)
    model, values = record(MODELS[name])
    assert all(p.device.type == "meta" for p in model.parameters())
    torch.rand(7)  # what is drawn meanwhile changes nothing

    def put(module: nn.Module, name: str, value: Tensor) -> None:
        old = module._parameters[name]
        for other in model.modules():
            for key, param in other._parameters.items():
                if param is old:
                    other._parameters[key] = nn.Parameter(value.clone())

    values.play(put, CPU)
    found = model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.state_dict().items())
    assert found.keys() == expected.state_dict().keys()
    assert torch.equal(torch.get_rng_state(), following)
    if isinstance(expected, Own):
        assert torch.equal(model.noise, expected.noise)  # type: ignore[arg-type]
    largest = max(p.numel() * p.element_size() for p in expected.parameters())
    assert values.peak_bytes == largest


class Seeds(nn.Linear):
    def __init__(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            super().__init__(3, 3)


class Counts(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.kept = [self.weight.detach() + 1]


@pytest.mark.parametrize("make", [Asks, Seeds, Counts])
def test_what_cannot_be_played_back_is_known(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(NotRecorded):
        record(make)


def test_a_model_that_has_to_be_built_whole_is_and_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(builder, "MOST_TRIED", 0)
    config: Any = SimpleNamespace(
        engine=EngineConfig(_target_="largebatch.train.engines.fsdp.FSDP"),
        model={"_target_": "initial_ranks.Asks"},
    )
    model, values = builder.build_model(config, Ranks(), CPU)
    assert values is None
    assert next(model.parameters()).device == CPU
    told = capsys.readouterr().err
    assert told.startswith("largebatch: each rank builds the whole model before it is sharded (")
    assert told.count("\n") == 1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_shards_of_any_world_are_of_one_model_to_the_bit(world_size: int, tmp_path: Path) -> None:
    more = {
        1: [],
        2: [Cell("zero3", 1, "adamw")],
        4: [Cell("fsdp", 1, "adamw", ("engine.replicas=2",))],
    }
    cells = [Cell("fsdp", 1, "adamw"), *more[world_size]]
    found = launch(bits, cells, world_size, tmp_path)
    for cell in cells:
        for rank in successful([of_rank[str(cell)] for of_rank in found]):
            assert rank["filled"] == 1
            assert all(rank["same"].values()), (cell, rank["same"])
            assert rank["random"]
            copies = 2 if "engine.replicas=2" in cell.words else 1
            assert rank["held"] <= 1.1 * rank["whole"] * copies / world_size


@pytest.mark.matrix
def test_a_run_goes_on_from_shards_as_from_a_whole_model(tmp_path: Path) -> None:
    short = ("budget.samples=256", "engine.activation_checkpointing=true")
    cells = [Cell("fsdp", 1, "shampoo", short), Cell("zero3", 4, "lamb", short)]
    found = launch(losses, cells, 2, tmp_path)
    for cell in cells:
        first, _ = successful([of_rank[str(cell)] for of_rank in found])
        assert len(first["filled"]) == 4
        assert first["filled"] == first["built"]


def test_a_rank_takes_its_shard_and_little_more(tmp_path: Path) -> None:
    cell = Cell("fsdp", 1, "adamw", LARGE)
    found = launch(peak, [cell], 2, tmp_path)
    for rank in successful([of_rank[str(cell)] for of_rank in found]):
        print(f"{rank['taken'] / 2**20:.0f} MiB of {rank['weights'] / 2**20:.0f} MiB of weights")
        assert rank["weights"] / 2 < rank["taken"] < 0.8 * rank["weights"]
