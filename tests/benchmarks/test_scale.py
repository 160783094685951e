"""What one rank of 38,400 has in hand is bounded, and the benchmark says what it counts."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from largebatch.benchmarks.scale import command as scale
from largebatch.benchmarks.scale.steps import (
    EXCHANGES,
    as_rank,
    exchanged,
    matrices,
    nested,
    norms_reduced,
    parameters,
    planned,
    takes_meta,
)
from largebatch.distributed.ranks import Ranks
from largebatch.train.checkpoints.plan import digest_of, plan_of
from largebatch.train.checkpoints.torch_format import SharingPlanner

SMALL = matrices(num_blocks=2, width=96, hidden=256)

counted = pytest.mark.skipif(not takes_meta(), reason="this torch's collectives take data alone")


def num_bytes(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(4 * rows * columns for rows, columns in shapes.values())


@counted
def test_the_exchange_of_7b_parameters_over_38400_ranks_is_small() -> None:
    """6,272 blocks of up to 1024 by 1024; to each by itself the share would be 161 GB."""
    shapes = dict(matrices())
    found = exchanged("Shampoo", shapes, "ddp", 38_400)
    assert found.owners == 6272
    assert found.largest_share == 4 << 20
    sums = 4 * 6 * len(shapes)
    assert found.memory <= 2 * found.largest_share + sums
    # A round each two blocks, and the sums; every byte goes once into a collective.
    assert found.collectives == {"allreduce": 6272 // 2 + 1}
    assert found.sent == num_bytes(shapes) + sums


@counted
@pytest.mark.parametrize("layout", ["ddp", "hsdp"])
@pytest.mark.parametrize("optimizer", EXCHANGES)
def test_what_a_rank_has_in_hand_does_not_grow_with_the_world(optimizer: str, layout: str) -> None:
    shapes = dict(matrices(num_blocks=2))
    small, large = (exchanged(optimizer, shapes, layout, size) for size in (96, 2304))
    assert large.memory <= small.memory
    assert sum(large.collectives.values()) <= 8 * sum(small.collectives.values())
    # Within a node there are few to send to, and of 24 copies each has its own.
    assert max((ranks for _, ranks in large.partners), default=0) < 12
    # What an owner sends: Muon's has whole matrices, and here the largest share of them.
    share = large.largest_share if optimizer == "Muon" else 0
    assert large.sent <= 1.2 * num_bytes(shapes) * (1 if layout == "ddp" else 2 / 12) + share


@counted
def test_norms_of_layers_are_one_sum_for_each_group() -> None:
    assert norms_reduced(SMALL, "ddp", 384).collectives == {}
    found = norms_reduced(SMALL, "hsdp", 384)
    assert found.collectives == {"allreduce": 2}
    assert found.sent < 100 * len(SMALL)


@pytest.mark.parametrize("layout", ["ddp", "hsdp"])
def test_only_writers_plan_a_checkpoint(layout: str) -> None:
    """Together they write each element once; ranks that write nothing have nothing to say."""
    size = 480
    with as_rank(0, size):
        state = SharingPlanner(Ranks(rank=0, size=size))
        state.set_up_planner(nested(parameters(SMALL, layout, size)), is_coordinator=True)
        tensors, paths = state.state_dict, state.mappings
        digest = digest_of(tensors, paths, Ranks(rank=0, size=size))
        # The ranks whose shards are like those that this process has.
        same = range(size) if layout == "ddp" else range(0, size, 12)
        plans = {rank: plan_of(digest, tensors, paths, Ranks("", rank, size)) for rank in same}
    written = [
        (item.index.fqn, tuple(item.index.offset or ()))
        for plan in plans.values()
        if plan is not None
        for item in plan.own.items
    ]
    # Beside shards there are numbers, which other ranks may write, of whose shards none is here.
    wanted = [t for t in tensors.values() if layout == "ddp" or isinstance(t, DTensor)]
    shards = [key for key in written if layout == "ddp" or isinstance(tensors[key[0]], DTensor)]
    assert len(shards) == len(set(shards)) == len(wanted)
    assert None not in plans.values()
    assert sum(bool(plan and plan.own.items) for plan in plans.values()) <= 35
    assert [rank for rank, plan in plans.items() if plan and plan.whole] == [0]
    whole = plans[0].whole if plans[0] else None
    assert whole is not None
    for name, described in whole.state_dict_metadata.items():
        if hasattr(described, "chunks"):
            covered = sum(chunk.sizes.numel() for chunk in described.chunks)
            assert covered == described.size.numel(), name


def test_planning_a_checkpoint_takes_no_longer_in_a_larger_world() -> None:
    small, large = (planned(SMALL, "ddp", size) for size in (384, 38_400))
    assert (small["writers"], large["writers"]) == (32, 32)
    assert large["agreed_bytes"] == 16
    assert large["torch_bytes"] > 1000


@counted
def test_the_table_says_what_is_counted_measured_and_modelled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale, "matrices", lambda: SMALL)
    file = tmp_path / "record.json"
    assert scale.main(["--ranks", "24,240", "--json", str(file)]) == 0
    assert not dist.is_initialized()
    record = json.loads(file.read_text())
    assert len(record["exchanges"]) == 2 * 2 * (len(EXCHANGES) + 1)
    assert {row["ranks"] for row in record["plans"]} == {24, 240}
    for row in record["exchanges"]:
        assert row["to_each_bytes"] == (row["ranks"] - 1) * row["largest_share"]
    printed = capsys.readouterr().out
    for word in ("counted:", "measured:", "modelled:", "both assumed", "Shampoo"):
        assert word in printed


@pytest.mark.parametrize("ranks", ["13", "12", "24,x", "1200000"])
def test_what_cannot_be_is_refused(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scale.main(["--ranks", ranks]) == 2
    assert "--ranks must be multiples of 12, from 24 to a million" in capsys.readouterr().err


def test_a_torch_that_cannot_count_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scale, "takes_meta", lambda: False)
    assert scale.main(["--ranks", "24"]) == 2
    assert f"as those of 2.13 do, got {torch.__version__}" in capsys.readouterr().err
