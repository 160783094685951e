"""`largebatch bench checkpoint`: what saving costs, beside the disk itself and torch.save.

The same bytes in each row of a round, and rounds one after another, on one file system: the floor
is one plain file a rank, written and flushed to disk. Started by torchrun or mpiexec, all ranks
save together, each its shard. What a large machine would need is projected from this, by division,
and says so.
"""

import argparse
import io
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn

from largebatch.benchmarks.harness import Record, add_options, check, device_named, run
from largebatch.conf.config import CheckpointConfig
from largebatch.distributed.ranks import Ranks, find_ranks, meet, process_group
from largebatch.optim.sharding.messages import broadcast_json
from largebatch.train.checkpoints.checkpoint import Checkpoints
from largebatch.train.checkpoints.tensors import DistributedTensors

PROJECTED_BYTES: Final = 17e12
"""A model of 10^12 parameters with its FP32 state: 17 TB, the checkpoint of the talk below."""

AGGREGATES: Final = {
    "1.4 TB/s, 512 nodes to 128 DAOS servers (ALCF, 2025)": 1.4e12,
    "0.65 TB/s, Aurora's Flare at its peak (ALCF user guide)": 0.65e12,
}
PROJECTED_RANKS: Final = 6144
"""512 nodes of 12 tiles."""

_FLOOR: Final = "plain file, fsync"
_PEER: Final = "torch.save, fsync"
_SYNC: Final = "save, mode=sync"
_ASYNC: Final = "save, mode=async, until on disk"
_STALL: Final = "save, mode=async, training waits"
_READ: Final = "plain read"
_LOAD: Final = "load"


def main(arguments: list[str]) -> int:
    """Measure, print, and write the record; returns the exit code."""
    parser = argparse.ArgumentParser(prog="largebatch bench checkpoint", description=__doc__)
    add_options(parser, 10.0)
    parser.add_argument(
        "--gigabytes", type=float, default=0.25, help="that a rank saves (default: %(default)s)"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="on the file system to measure (default: .)"
    )
    options = parser.parse_args(arguments)
    try:
        check(0 < options.gigabytes < 1e3, "--gigabytes", "> 0 and < 1000", options.gigabytes)
        check(options.folder.is_dir(), "--folder", "a folder that exists", options.folder)
        need = 5e9 * options.gigabytes
        free = shutil.disk_usage(options.folder).free
        size = f"{options.gigabytes} with {free / 1e9:.1f} GB free there"
        check(free > need, "--gigabytes", "at most a fifth of what is free in --folder", size)
        ranks = find_ranks()
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))

    def measure_all(device: torch.device, seconds: float) -> Record:
        with process_group(meet(ranks), ranks, device):
            return measure(ranks, device, seconds, options.gigabytes, options.folder)

    if not ranks.is_first:
        measure_all(device_named(options.device), options.seconds)
        return 0
    return run(parser, arguments, measure_all, show)


def measure(
    ranks: Ranks, device: torch.device, seconds: float, gigabytes: float, folder: Path
) -> Record:
    """Medians over rounds for `seconds`, two rounds at least."""
    made = tempfile.mkdtemp(prefix="checkpoint-", dir=folder) if ranks.is_first else ""
    here = Path(broadcast_json(made) if ranks.size > 1 else made)
    samples: dict[str, list[float]] = {}
    try:
        contest = Contest(ranks, device, int(gigabytes * 1e9), here)
        begun, number = time.perf_counter(), 0
        while number < 3 or contest.agrees(time.perf_counter() - begun < seconds):
            for name, value in contest.round(number).items():
                samples.setdefault(name, []).append(value)
            number += 1
    finally:
        if ranks.size > 1:
            dist.barrier()
        if ranks.is_first:
            shutil.rmtree(here)
    medians = {name: statistics.median(values[1:]) for name, values in samples.items()}  # warm
    total = contest.num_bytes * ranks.size
    return {
        "bytes": total,
        "ranks": ranks.size,
        "rounds": number - 1,
        "device": str(device),
        "torch": torch.__version__,
        "folder": str(folder.resolve()),
        "seconds": medians,
        "gigabytes_per_second": {name: total / 1e9 / value for name, value in medians.items()},
        "projection": projection(total, ranks.size, medians),
    }


class Contest:
    """A model with AdamW's state, `num_bytes` of it on this rank, and ways to save and load it."""

    def __init__(self, ranks: Ranks, device: torch.device, num_bytes: int, here: Path) -> None:
        self._ranks, self._here, self._device = ranks, here, device
        width = 1024
        rows = max(1, num_bytes // (3 * 4 * width * 8))  # 8 matrices, w, m and v in FP32
        self.model = nn.Sequential(
            *(nn.Linear(width, rows * ranks.size, bias=False) for _ in range(8))
        ).to(device)
        if ranks.size > 1:
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for param in self.model.parameters():
            param.grad = torch.ones_like(param)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._local = [
            getattr(t, "to_local", lambda t=t: t)().detach()
            for p in self.model.parameters()
            for t in (p, self.optimizer.state[p]["exp_avg"], self.optimizer.state[p]["exp_avg_sq"])
        ]
        self.num_bytes = sum(t.numel() * t.element_size() for t in self._local)
        tensors = DistributedTensors(self.model, self.optimizer, ranks)
        self._of_mode = {
            mode: Checkpoints(
                here, ranks, tensors, CheckpointConfig(every_samples=1, mode=mode, required=True)
            )
            for mode in ("sync", "async")
        }

    def round(self, number: int) -> dict[str, float]:
        """Seconds of each way, the slowest rank's, by name."""
        plain, peer = (self._here / f"{name}-{self._ranks.rank}" for name in ("plain", "torch"))
        for path in (plain, peer):  # as each checkpoint is a new file
            path.unlink(missing_ok=True)
        found = {_FLOOR: self._timed(lambda: write_plain(plain, self._local))}
        found[_PEER] = self._timed(lambda: save_torch(peer, self._local))
        found[_SYNC] = self._timed(lambda: self._save("sync", 2 * number))
        found[_STALL] = self._timed(lambda: self._save("async", 2 * number + 1))
        wait = self._of_mode["async"].wait
        found[_ASYNC] = found[_STALL] + self._timed(wait, settled=False)
        last = self._of_mode["async"].last
        assert last is not None
        forget([plain, *(last.iterdir() if self._ranks.is_first else ())])
        found[_READ] = self._timed(lambda: read_plain(plain))
        found[_LOAD] = self._timed(lambda: self._load(last))
        return found

    def _save(self, mode: str, samples: int) -> None:
        self._of_mode[mode].save({"progress": {"samples": samples, "steps": samples}})

    def _load(self, checkpoint: Path) -> None:
        self._of_mode["sync"].load(checkpoint)

    def _timed(self, act: Callable[[], object], settled: bool = True) -> float:
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        if settled:
            os.sync()  # what the row before has left to write is not this one's
        if self._ranks.size > 1:
            dist.barrier()
        begun = time.perf_counter()
        act()
        return self._largest(time.perf_counter() - begun)

    def _largest(self, value: float) -> float:
        if self._ranks.size == 1:
            return value
        largest = torch.tensor([value], device=self._device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return float(largest)

    def agrees(self, goes_on: bool) -> bool:
        """Whether any rank has time for another round."""
        return self._largest(float(goes_on)) > 0


def write_plain(path: Path, tensors: Sequence[torch.Tensor]) -> None:
    with path.open("wb", buffering=0) as file:
        for tensor in tensors:
            values: Any = tensor.cpu().numpy()
            view = memoryview(values).cast("B")
            while view:
                view = view[file.write(view) :]
        os.fsync(file.fileno())


def save_torch(path: Path, tensors: Sequence[torch.Tensor]) -> None:
    with path.open("wb") as file:
        torch.save(list(tensors), file)
        file.flush()
        os.fsync(file.fileno())


def read_plain(path: Path) -> None:
    buffer = memoryview(bytearray(io.DEFAULT_BUFFER_SIZE * 2048))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def forget(paths: Sequence[Path]) -> None:
    """Ask the system to keep nothing of files in memory: a resumed job finds nothing there."""
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def projection(total: int, size: int, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """What `PROJECTED_BYTES` would take. No more than divisions: where all ranks together reach an
    aggregate bandwidth, and where each has to itself what a rank had here.
    """
    here, share = total / seconds[_SYNC], PROJECTED_BYTES / PROJECTED_RANKS
    own, staging = total / size / seconds[_SYNC], total / size / seconds[_STALL]
    each = f"each of {PROJECTED_RANKS} ranks"
    staged = f"{staging / 1e9:.2f} GB/s of staging on {each}"
    rows = [("saving", name, PROJECTED_BYTES / rate) for name, rate in AGGREGATES.items()]
    rows += [
        ("saving", f"{here / 1e9:.2f} GB/s, as measured here", PROJECTED_BYTES / here),
        ("saving", f"{own / 1e9:.2f} GB/s for {each}", share / own),
        ("training waits, mode=async", staged, share / staging),
    ]
    return [{"of": of, "at": at, "seconds": needed} for of, at, needed in rows]


def show(record: Record, console: Console) -> None:
    table = Table(
        title=f"{record['bytes'] / 1e9:.3g} GB on {record['ranks']} rank(s), median of "
        f"{record['rounds']} round(s)"
    )
    for column in ("", "seconds", "GB/s", "of the floor"):
        table.add_column(column, justify="left" if not column else "right")
    for name, seconds in record["seconds"].items():
        floor = record["seconds"][_READ if name in (_READ, _LOAD) else _FLOOR]
        rate = record["gigabytes_per_second"][name]
        table.add_row(name, f"{seconds:.3f}", f"{rate:.2f}", f"{seconds / floor:.2f}x")
    console.print(table)
    table = Table(title=f"Projected, not measured: {PROJECTED_BYTES / 1e12:g} TB")
    for column in ("", "at", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    for row in record["projection"]:
        table.add_row(row["of"], row["at"], f"{row['seconds']:.1f}")
    console.print(table)
