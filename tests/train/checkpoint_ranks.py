"""What gloo ranks do with checkpoints: save, mutate, fail, load in another world."""

import json
import os
import resource
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gloo_ranks import Outcome
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from largebatch.conf.config import CheckpointConfig
from largebatch.distributed.ranks import Ranks
from largebatch.optim import LAMB, LARS
from largebatch.records.checkpoints import listed
from largebatch.train.checkpoints.checkpoint import CheckpointFailed, Checkpoints
from largebatch.train.checkpoints.files import File, RankFiles, crc32_of, problem
from largebatch.train.checkpoints.tensors import DistributedTensors, Writing

OPTIMIZERS: dict[str, Any] = {
    "LAMB": lambda params: LAMB(params, lr=0.01),
    "LARS": lambda params: LARS(params, lr=0.1, momentum=0.9),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=0.01),
}


def ranks_here() -> Ranks:
    if not dist.is_initialized():
        return Ranks()
    return Ranks("test", dist.get_rank(), dist.get_world_size())


class Network(nn.Sequential):
    """Sizes that no number of ranks divides."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(nn.Linear(7, 13), nn.LayerNorm(13), nn.GELU(), nn.Linear(13, 5))


class Trainee:
    """A network and an optimizer, replicated or sharded."""

    def __init__(self, optimizer: str, sharded: bool, seed: int) -> None:
        self.model = Network(seed)
        if sharded:
            fully_shard(self.model)
        self.optimizer = OPTIMIZERS[optimizer](list(self.model.named_parameters()))

    def step(self, number: int) -> None:
        """On a gradient that is the same in every world, whatever the engine."""
        generator = torch.Generator().manual_seed(number)
        for param in self.model.parameters():
            grad = torch.randn(param.shape, generator=generator)
            if isinstance(param, DTensor):
                from torch.distributed.tensor import distribute_tensor

                param.grad = distribute_tensor(grad, param.device_mesh, param.placements)
            else:
                param.grad = grad
        self.optimizer.step()
        self.optimizer.zero_grad()

    def tensors(self) -> DistributedTensors:
        return DistributedTensors(self.model, self.optimizer, ranks_here())

    def everything(self) -> dict[str, Tensor]:
        """Weights and moments, whole, by name."""
        found = {}
        for name, param in self.model.named_parameters():
            found[name] = whole(param)
            for key, value in self.optimizer.state[param].items():
                found[f"{name}.{key}"] = whole(value)
        return found


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def sign(checkpoint: Path) -> None:
    """Give a checkpoint the manifest of what is in it."""
    files = {
        path.name: list(File(path.stat().st_size, crc32_of(path)))
        for path in checkpoint.iterdir()
        if path.name != "manifest.json"
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"format": 1, "files": files}))


def state_after(samples: int) -> dict[str, Any]:
    return {"progress": {"samples": samples, "steps": samples // 64}}


# Jobs --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Save:
    """Three steps, a save, and a step right after it, before a byte is written."""

    folder: str
    optimizer: str
    sharded: bool
    mode: str = "async"
    staged: bool = True

    def do(self) -> Outcome:
        trainee = Trainee(self.optimizer, self.sharded, seed=0)
        for number in range(3):
            trainee.step(number)
        before = trainee.everything()
        tensors = HeldTensors(trainee, self.staged)
        config = CheckpointConfig(every_samples=64, mode=self.mode)
        checkpoints = Checkpoints(Path(self.folder), ranks_here(), tensors, config)
        if self.mode == "sync":
            tensors.go.set()
        decided = [64]
        checkpoints.save(state_after(192) | {"plan": {"decided": decided}})
        decided.append(128)
        trainee.step(3)  # its norms are summed over ranks, while the files wait to be written
        unnamed = not (Path(self.folder) / "checkpoints" / "samples-000000000000192").exists()
        tensors.go.set()
        checkpoints.wait()
        return {"before": before, "after": trainee.everything(), "unnamed": unnamed}


class HeldTensors(DistributedTensors):
    """Writes nothing before `go` is set."""

    def __init__(self, trainee: Trainee, staged: bool) -> None:
        super().__init__(trainee.model, trainee.optimizer, ranks_here())
        self.go, self._staged_here = threading.Event(), staged

    def begin_save(self, draft: Path, staged: bool) -> Any:
        return Held(super().begin_save(draft, staged and self._staged_here), self.go)


class Held:
    def __init__(self, writing: Writing, go: threading.Event) -> None:
        self._writing, self._go = writing, go
        self.complete = writing.complete

    def write(self) -> RankFiles:
        assert self._go.wait(30)
        return self._writing.write()


@dataclass(frozen=True)
class Load:
    """What is in a checkpoint, by an engine and an optimizer that began elsewhere."""

    folder: str
    optimizer: str
    sharded: bool

    def do(self) -> Outcome:
        trainee = Trainee(self.optimizer, self.sharded, seed=1)
        checkpoints = Checkpoints(
            Path(self.folder), ranks_here(), trainee.tensors(), CheckpointConfig()
        )
        state = checkpoints.load(Path(self.folder) / "checkpoints" / "samples-000000000000192")
        found = trainee.everything()
        trainee.step(3)
        return {"state": state, "before": found, "after": trainee.everything()}


@dataclass(frozen=True)
class FullDisk:
    """A save while rank 1 may write no more than 100 bytes to a file, and one when it may again."""

    folder: str
    mode: str
    required: bool = False

    def do(self) -> Outcome:
        trainee = Trainee("AdamW", sharded=True, seed=0)
        config = CheckpointConfig(every_samples=64, mode=self.mode, required=self.required)
        told: list[tuple[int, str]] = []
        tensors = LimitedTensors(trainee)
        checkpoints = Checkpoints(
            Path(self.folder),
            ranks_here(),
            tensors,
            config,
            failed=lambda samples, what: told.append((samples, what)),
        )
        trainee.step(0)
        first = trainee.everything()
        checkpoints.save(state_after(64))
        checkpoints.wait()
        trainee.step(1)
        raised = ""
        tensors.limited = dist.get_rank() == 1
        try:
            checkpoints.save(state_after(128))
            checkpoints.wait()
        except CheckpointFailed as error:
            raised = str(error)
        tensors.limited = False
        dist.barrier()
        names = sorted(os.listdir(Path(self.folder) / "checkpoints"))
        last, failures = checkpoints.last, list(checkpoints.failures)
        dist.barrier()
        checkpoints.save(state_after(192))
        checkpoints.wait()
        assert last is not None
        checkpoints.load(last)
        return {
            "names": names,
            "last": last.name,
            "failures": failures,
            "told": told,
            "raised": raised,
            "loaded_is_first": all(
                torch.equal(value, first[name]) for name, value in trainee.everything().items()
            ),
            "in the end": sorted(os.listdir(Path(self.folder) / "checkpoints")),
        }


class LimitedTensors(DistributedTensors):
    """Whose files may not grow beyond 100 bytes, by the kernel's word, while `limited`."""

    limited = False

    def __init__(self, trainee: Trainee) -> None:
        super().__init__(trainee.model, trainee.optimizer, ranks_here())

    def begin_save(self, draft: Path, staged: bool) -> Any:
        writing = super().begin_save(draft, staged)
        return Limited(writing) if self.limited else writing


class Limited:
    def __init__(self, writing: Writing) -> None:
        self._writing = writing
        self.complete = writing.complete

    def write(self) -> RankFiles:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            return self._writing.write()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@dataclass(frozen=True)
class SmallDisk:
    """A save while the disk is full, of which `filler` takes what there is, and one when there is
    room again.
    """

    folder: str
    limited: bool
    """No disk that can be filled: the kernel's limit of file sizes stands for it."""

    def do(self) -> Outcome:
        run = Path(self.folder)
        trainee = Trainee("AdamW", sharded=False, seed=0)
        config = CheckpointConfig(every_samples=64, keep=9, mode="async")
        checkpoints = Checkpoints(run, Ranks(), trainee.tensors(), config)
        trainee.step(0)
        checkpoints.save(state_after(64))
        checkpoints.wait()
        first = trainee.everything()
        trainee.step(1)
        with self.full(run):
            checkpoints.save(state_after(128))
            checkpoints.wait()
        names = sorted(os.listdir(run / "checkpoints"))
        last = checkpoints.last
        assert last is not None
        checkpoints.load(last)
        again = trainee.everything()
        checkpoints.save(state_after(192))
        checkpoints.wait()
        return {
            "names": names,
            "last": [last.name],
            "failures": list(checkpoints.failures),
            "loaded_is_first": all(torch.equal(value, first[n]) for n, value in again.items()),
            "whole in the end": [p.name for p in listed(run) if problem(p, "full") is None],
        }

    @contextmanager
    def full(self, run: Path) -> Iterator[None]:
        if self.limited:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
            yield
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            return
        with (run / "filler").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        yield
        (run / "filler").unlink()


@dataclass(frozen=True)
class Opens:
    """What each rank asks the file system for, in a save and in a load."""

    folder: str

    def do(self) -> Outcome:
        trainee = Trainee("AdamW", sharded=True, seed=0)
        trainee.step(0)
        checkpoints = Checkpoints(
            Path(self.folder), ranks_here(), trainee.tensors(), CheckpointConfig(every_samples=64)
        )
        with watched(self.folder) as saving:
            checkpoints.save(state_after(64))
        dist.barrier()
        path = Path(self.folder) / "checkpoints" / "samples-000000000000064"
        with watched(self.folder) as loading:
            checkpoints.load(path)
        return {"saving": saving, "loading": loading, "files": sorted(os.listdir(path))}


_watching: list[tuple[str, list[tuple[str, str]]]] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watching and event in ("open", "os.listdir", "os.scandir", "os.mkdir", "os.rename"):
        folder, seen = _watching[-1]
        if str(arguments[0]).startswith(folder):
            seen.append((event, str(arguments[0]).rpartition("/")[2]))


class watched:
    """Within it, what this process asks of a folder, as Python's audit hooks see it."""

    installed = False

    def __init__(self, folder: str) -> None:
        self.folder: str = folder
        self.seen: list[tuple[str, str]] = []

    def __enter__(self) -> list[tuple[str, str]]:
        if not watched.installed:
            sys.addaudithook(_audit)
            watched.installed = True
        _watching.append((self.folder, self.seen))
        return self.seen

    def __exit__(self, *error: object) -> None:
        _watching.pop()


@dataclass(frozen=True)
class Missing:
    """A checkpoint of SGD's, loaded by SGD with a flag more, and by AdamW."""

    folder: str

    def do(self) -> Outcome:
        plain = Trainee("AdamW", sharded=False, seed=0)
        plain.optimizer = torch.optim.SGD(plain.model.parameters(), lr=0.1, momentum=0.9)
        plain.step(0)
        config = CheckpointConfig(every_samples=64)
        Checkpoints(Path(self.folder), ranks_here(), plain.tensors(), config).save(state_after(64))
        path = Path(self.folder) / "checkpoints" / "samples-000000000000064"
        flagged = Trainee("AdamW", sharded=False, seed=1)
        flagged.optimizer = torch.optim.SGD(flagged.model.parameters(), lr=0.1, momentum=0.9)
        flagged.optimizer.param_groups[0]["flag_of_a_later_version"] = "default"
        Checkpoints(Path(self.folder), ranks_here(), flagged.tensors(), config).load(path)
        same = all(
            torch.equal(value, flagged.everything()[name])
            for name, value in plain.everything().items()
        )
        refusal = ""
        try:
            other = Trainee("AdamW", sharded=False, seed=1)
            Checkpoints(Path(self.folder), ranks_here(), other.tensors(), config).load(path)
        except ValueError as error:
            refusal = str(error)
        flag = flagged.optimizer.param_groups[0]["flag_of_a_later_version"]
        return {"same": same, "flag": flag, "refusal": refusal}


Job = Save | Load | FullDisk | SmallDisk | Opens | Missing


def work(job: Job) -> Outcome:
    if dist.is_initialized():
        dist.barrier()
    return job.do()


def emptied(folder: Path) -> str:
    """A folder of a job's own."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return str(folder)
