"""Runs of every engine on gloo ranks, cells as data: what a rank does, and the cells there are."""

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_ranks import Outcome
from hydra import compose, initialize_config_module

from largebatch.conf.config import typed
from largebatch.distributed.ranks import Ranks
from largebatch.distributed.team import Team
from largebatch.train.run import run
from largebatch.train.run_spec import RunSpec, make_plan

STEPS, BATCH_SIZE = 12, 64
# Rates at which the losses fall without a jump, and a ridge that keeps roots of nearly singular
# statistics from blowing rounding up: differences then stay what rounding makes them. Every root is
# taken several times.
OPTIMIZERS = {
    "adamw": ["optim.lr=0.004"],
    "lamb": ["optim.lr=0.01"],
    "shampoo": ["optim.lr=0.004", "optim.ridge=1e-4", "optim.precondition_interval=4"],
}
ENGINES = {
    "ddp": ["engine=ddp"],
    "fsdp": ["engine=fsdp"],
    "hsdp": ["engine=fsdp", "engine.replicas=2"],
    "zero1": ["engine=deepspeed", "engine.stage=1"],
    "zero2": ["engine=deepspeed", "engine.stage=2"],
    "zero3": ["engine=deepspeed", "engine.stage=3"],
}


@dataclass(frozen=True)
class Cell:
    engine: str
    accumulation: int
    optimizer: str
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f" {' '.join(self.words)}" if self.words else ""
        return f"{self.engine} x{self.accumulation} {self.optimizer}{more}"

    def overrides(self, world_size: int) -> list[str]:
        micro = BATCH_SIZE // (world_size * self.accumulation)
        return [
            "task=text", "task.num_bytes=65536", "task.sequence_length=16", "task.num_eval=16",
            "model.dim=32", "model.depth=2", "model.heads=2", "target.loss=null",
            f"batch.size={BATCH_SIZE}", f"budget.samples={STEPS * BATCH_SIZE}",
            "evaluation.growth=10", f"optim={self.optimizer}",
            *OPTIMIZERS[self.optimizer], *ENGINES[self.engine],
            f"engine.micro_batch_size={micro}", *self.words,
        ]  # fmt: skip


def applies(cell: Cell, world_size: int) -> bool:
    """ZeRO flattens the matrices that Shampoo needs; two replicas need two ranks."""
    if cell.optimizer == "shampoo" and cell.engine.startswith("zero"):
        return False
    return cell.engine != "hsdp" or world_size > 1


def cells(world_size: int) -> list[Cell]:
    every = (
        Cell(engine, accumulation, optimizer)
        for engine in ENGINES
        for accumulation in (1, 4)
        for optimizer in OPTIMIZERS
    )
    return [cell for cell in every if applies(cell, world_size)]


def work(cell: Cell) -> Outcome:
    """The losses of a run, as rank 0 has recorded them; nothing on the other ranks."""
    for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):  # DeepSpeed's, of another launch
        os.environ.pop(key, None)
    group_of_one()
    with quiet(), tempfile.TemporaryDirectory() as temporary:
        ranks = Ranks("test", dist.get_rank(), dist.get_world_size())
        folder = Path(temporary)
        summary = run(run_spec(cell, ranks.size, folder), Team(ranks), torch.device("cpu"))
        told = lines(folder) if ranks.is_first else []
        return {"status": summary["status"], "losses": [line["loss"] for line in told],
                "lines": json.dumps(told)}  # fmt: skip


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run_spec(cell: Cell, world_size: int, folder: Path) -> RunSpec:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        config = typed(compose("train", cell.overrides(world_size)))
    names = (cell.optimizer, "text", "transformer")
    return RunSpec(config, make_plan(config), folder, *names, noise_source=config.noise.small)


def group_of_one() -> None:
    """A process group where the launch made none; for good, as DeepSpeed remembers its first."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


@contextmanager
def quiet() -> Iterator[None]:
    """Without DeepSpeed's remarks, and torch's on how DeepSpeed calls it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def figures(found: list[dict[str, Outcome]], expected: list[float], cell: Any) -> float:
    """The largest relative difference of a cell's losses."""
    taken = found[0][str(cell)]["losses"]
    assert len(taken) == len(expected) == STEPS
    return max(abs(a - b) / abs(b) for a, b in zip(taken, expected, strict=True))
