"""What ranks hold of a model that is filled shard by shard, and what it takes on the way."""

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from engine_ranks import Cell, group_of_one, quiet, run_spec, work
from gloo_ranks import Outcome
from torch import nn
from torch.distributed.tensor import DTensor

from largebatch.conf.build import build
from largebatch.distributed.ranks import Ranks
from largebatch.train import build as builder
from largebatch.train.engines.fsdp import FSDP

CPU = torch.device("cpu")
LARGE = ("model.dim=384", "model.depth=12", "model.heads=8")


class Asks(nn.Linear):
    """A model whose constructor asks for values."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]


def this_rank() -> Ranks:
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # DeepSpeed's, of another launch
        os.environ.pop(key, None)
    group_of_one()
    rank, size = dist.get_rank(), dist.get_world_size()
    return Ranks("test", rank, size, rank, size)


def bits(cell: Cell) -> Outcome:
    """Whether the whole of what the ranks hold is the model built on the CPU, and what follows."""
    ranks = this_rank()
    with quiet(), tempfile.TemporaryDirectory() as temporary:
        spec = run_spec(cell, ranks.size, Path(temporary))
        torch.manual_seed(spec.config.seed)
        expected = build(spec.config.model, "model").state_dict()
        following = torch.get_rng_state()
        most, builder.MOST_TRIED = builder.MOST_TRIED, 0  # type: ignore[misc]
        filled: list[Any] = []
        kept = builder.record
        builder.record = lambda make: filled.append(kept(make)) or filled[-1]  # type: ignore
        try:
            made = builder.build_parts(spec, ranks, CPU)
        finally:
            builder.MOST_TRIED, builder.record = most, kept  # type: ignore[misc]
        found = {name: whole(param) for name, param in made.engine.model.named_parameters()}
    return {
        "filled": len(filled),
        "same": {name: torch.equal(value, expected[name]) for name, value in found.items()},
        "held": sum(held(param) for param in made.engine.model.parameters()),
        "whole": sum(value.numel() for value in expected.values()),
        "random": torch.equal(following, torch.get_rng_state()),
    }


def losses(cell: Cell) -> Outcome:
    """Of a run whose model is filled shard by shard, and of one whose model is built whole."""
    found = []
    for most in (0, builder.MOST_TRIED):
        kept, builder.MOST_TRIED = builder.MOST_TRIED, most  # type: ignore[misc]
        try:
            found.append(work(cell)["losses"])
        finally:
            builder.MOST_TRIED = kept  # type: ignore[misc]
    return {"filled": found[0], "built": found[1]}


def whole(param: Any) -> torch.Tensor:
    if isinstance(param, DTensor):
        return param.full_tensor().detach()
    if hasattr(param, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([param]):
            return param.detach().clone()
    return param.detach().clone()


def held(param: Any) -> int:
    if isinstance(param, DTensor):
        return param.to_local().numel()
    return param.ds_tensor.numel() if hasattr(param, "ds_id") else param.numel()


def peak(cell: Cell) -> Outcome:
    """Bytes that a rank takes at most while it makes its shard, and those of all weights."""
    ranks = this_rank()
    with tempfile.TemporaryDirectory() as temporary:
        config = run_spec(cell, ranks.size, Path(temporary)).config
    torch.manual_seed(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before = resident("VmRSS")
    model, values = builder.build_model(config, ranks, CPU)
    FSDP(model, ranks, CPU, values=values)
    taken = resident("VmHWM") - before
    return {"taken": taken, "weights": sum(p.numel() * 4 for p in model.parameters())}


def resident(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(what):
            return int(line.split()[1]) * 1024
    raise AssertionError(what)
