"""What a checkpoint holds of model and optimizer, and who writes it.

Saving has two parts. `begin_save` is called on every rank and may talk to the others; when it
returns, training may go on, where it was asked to stage. `Writing.write` then puts the files of
this rank on disk. It makes no collective, so it may run in any thread: MPI over device memory
allows collectives in one thread only (pmodels/mpich issue 7880), and a second group for the
background, of gloo, would connect every rank with every other.
"""

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar, cast

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import (
    FileSystem,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from largebatch.train.checkpoint_files import CheckedFile, File, Files, write_file
from largebatch.train.ranks import Ranks

T = TypeVar("T")

REPLICA_WRITERS: Final = 32
"""Ranks that share what all of them hold alike: every rank reads their files when it resumes."""

_BUFFER: Final = 1 << 20


class Part(NamedTuple):
    """What one rank has written."""

    files: Files
    results: Any = None
    """For rank 0, which describes the whole; can be pickled."""


class Writing(Protocol):
    """A save that has begun."""

    def write(self) -> Part:
        """Put this rank's files on disk.

        Raises:
            OSError: the disk is full, or gone.
        """

    def finish(self, results: Sequence[Any]) -> Files:
        """On rank 0, with every rank's results: write what describes the whole; returns its files.

        Raises:
            OSError: the disk is full, or gone.
        """


class Tensors(Protocol):
    """Model and optimizer, as checkpoints hold them."""

    def describe(self) -> dict[str, Any]:
        """`kind`, `world`, and what else decides who can load it: it goes into state.json."""

    def begin_save(self, draft: Path, staged: bool) -> Writing:
        """Begin to save into the folder `draft`; every rank calls it.

        Args:
            staged: copy to host memory now, so that what is written is the state at this call.
        """

    def load(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        """Set model and optimizer to what they were; every rank calls it.

        Args:
            saved: what `describe` said when it was saved.

        Raises:
            ValueError: it does not fit the model, the optimizer or the engine.
        """


def fits(saved: dict[str, Any], kind: str) -> None:
    """Refuse what another kind of engine has saved.

    Raises:
        ValueError: naming the way out.
    """
    engines = {"dcp": "engine=ddp or fsdp", "deepspeed": "engine=deepspeed"}
    before = saved.get("kind", "dcp")
    if before != kind:
        raise ValueError(
            f"the checkpoint was saved by {engines.get(before, before)}, whose format "
            f"{engines[kind]} does not read: go on with {engines.get(before, before)}, or begin a "
            "run of its own from the weights that `largebatch checkpoint export` writes"
        )


def of_first(ranks: Ranks, act: Callable[[], T]) -> T:
    """What `act` returns on rank 0, which alone calls it, on every rank: so one rank asks the file
    system what all need to know.

    Raises:
        OSError, ValueError: it has raised that, on every rank.
    """
    told: list[Any] = [None]
    if ranks.is_first:
        try:
            told = [act()]
        except (OSError, ValueError) as error:
            told = [error]
    if ranks.size > 1:
        dist.broadcast_object_list(told, 0)
    (result,) = told
    if isinstance(result, Exception):
        raise result
    return cast(T, result)


# torch.distributed.checkpoint --------------------------------------------------------------------


class DistributedTensors:
    """By `torch.distributed.checkpoint`, keyed by names in the model: replicated tensors and
    sharded ones, and read in a world of any size.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, ranks: Ranks) -> None:
        self._model, self._optimizer, self._ranks = model, optimizer, ranks

    def describe(self) -> dict[str, Any]:
        return {"kind": "dcp", "world": self._ranks.size}

    def begin_save(self, draft: Path, staged: bool) -> "PlannedWriting":
        writer = DeferredWriter(draft, staged)
        with quiet():
            state_dict_saver.save(
                self._tensors(),
                storage_writer=writer,
                planner=SharingPlanner(self._ranks),
                no_dist=self._ranks.size == 1,
            )
        return PlannedWriting(writer)

    def load(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        fits(saved, "dcp")
        tensors = self._tensors()
        alone = self._ranks.size == 1
        try:
            with quiet():
                reader = ToldReader(checkpoint, self._ranks)
                state_dict_loader.load(
                    tensors, storage_reader=reader, planner=MomentsPlanner(), no_dist=alone
                )
        except CheckpointException as error:  # the same on all ranks
            cause, _ = next(iter(error.failures.values()))
            raise ValueError(f"{checkpoint} does not fit this run: {cause}") from error
        with quiet():
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=tensors["model"],
                optim_state_dict=tensors["optimizer"],
            )

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, "optimizer": optimizer}


class DeferredWriter(FileSystemWriter):
    """A writer of one file a rank: it plans with all ranks at once, and writes when it is told."""

    _plan: SavePlan
    _planner: "SharingPlanner"
    _metadata: Metadata

    def __init__(self, path: Path, staged: bool) -> None:
        super().__init__(path)
        self.fs: CheckedFileSystem = CheckedFileSystem()
        self._staged = staged

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan  # the folder is there: a thousand ranks need not ask for it

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> "Future[list[WriteResult]]":
        assert isinstance(planner, SharingPlanner)
        self._plan, self._planner = plan, planner
        if self._staged:
            planner.stage(plan)
        nothing: Future[list[WriteResult]] = Future()
        nothing.set_result([])
        return nothing

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        self._metadata = metadata

    def write_planned(self) -> Part:
        """What `write_data` was told to do."""
        if not self._plan.items:
            return Part({}, [])
        results = super().write_data(self._plan, self._planner).value()
        self._planner.forget()
        return Part(dict(self.fs.written), results)

    def describe_whole(self, results: Sequence[list[WriteResult]]) -> Files:
        """What `finish` was told to do."""
        self.fs.written.clear()
        super().finish(self._metadata, list(results))
        return self.fs.written


class PlannedWriting:
    """A `DeferredWriter` that has planned."""

    def __init__(self, writer: DeferredWriter) -> None:
        self._writer = writer

    def write(self) -> Part:
        return self._writer.write_planned()

    def finish(self, results: Sequence[Any]) -> Files:
        return self._writer.describe_whole(results)


class CheckedFileSystem(FileSystem):
    """Files whose sizes and CRCs are known when they are closed."""

    def __init__(self) -> None:
        self.written: Files = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb"
        file = CheckedFile(Path(path))
        try:
            with io.BufferedWriter(file, _BUFFER) as stream:
                yield stream
        except Exception:
            if file.error is not None:  # it may have come through C++, and lost its number
                raise file.error from None
            raise
        self.written[Path(path).name] = file.written

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class SharingPlanner(DefaultSavePlanner):
    """Shares what all ranks hold among a few of them, and holds staged copies of what this rank
    writes: no more than its share of the checkpoint in host memory.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        stride = -(-ranks.size // REPLICA_WRITERS)
        self._writes_replicas = ranks.rank % stride == 0
        self._staged: dict[Any, Tensor | io.BytesIO] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if not self._writes_replicas:
            plan.items[:] = [i for i in plan.items if isinstance(self._object(i), DTensor)]
        return plan

    def _object(self, item: WriteItem) -> Any:
        return self.state_dict[item.index.fqn]

    def stage(self, plan: SavePlan) -> None:
        """Copy to host memory what `plan` has this rank write."""
        for item in plan.items:
            data = super().resolve_data(item)
            if isinstance(data, Tensor):
                data = data.detach().to("cpu", copy=True)
            self._staged[item.index] = data

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        staged = self._staged.pop(write_item.index, None)
        return super().resolve_data(write_item) if staged is None else staged

    def forget(self) -> None:
        """Let go of the tensors: a save that has ended must not keep those of an earlier step."""
        self._staged.clear()
        self.state_dict = {}


class ToldReader(FileSystemReader):
    """A reader that has been told what describes the whole: one rank reads it, not each."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        super().__init__(path)

        def read() -> Metadata:
            try:
                return FileSystemReader(path).read_metadata()
            except Exception as error:  # unpickling raises whatever the bytes say
                raise ValueError(f"{path} cannot be read: {error}") from error

        self._told = of_first(ranks, read)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._told


class MomentsPlanner(DefaultLoadPlanner):
    """A flag that a checkpoint does not know keeps its value; a tensor that it has not is fatal."""

    def __init__(self) -> None:
        super().__init__(allow_partial_load=True)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        there = self.metadata.state_dict_metadata
        missing = [
            name
            for name, value in self.state_dict.items()
            if isinstance(value, Tensor) and name not in there
        ]
        if missing:
            raise ValueError(f"it has no {', '.join(missing[:3])}{', …' * (len(missing) > 3)}")
        return super().create_local_plan()


@contextmanager
def quiet() -> Iterator[None]:
    """Torch warns that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


# DeepSpeed ---------------------------------------------------------------------------------------


class DeepSpeedTensors:
    """By DeepSpeed, in its own format: shards that only a world of the same size reads, unless
    `largebatch checkpoint universal` has converted them.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "deepspeed",
            "world": dist.get_world_size(),
            "zero_stage": int(self._engine.zero_optimization_stage()),
        }

    def begin_save(self, draft: Path, staged: bool) -> "BytesWriting":
        """Serialised to host memory either way: DeepSpeed waits for all ranks while it saves, and a
        rank whose disk is full must not leave them waiting.
        """
        from largebatch.train.checkpoint_deepspeed import kept_in_memory

        del staged
        with kept_in_memory(self._engine) as files:
            self._engine.save_checkpoint(str(draft.parent), tag=draft.name, save_latest=False)
        return BytesWriting(draft, files)

    def load(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        from largebatch.train.checkpoint_deepspeed import check_loadable, load_universal

        fits(saved, "deepspeed")
        universal = check_loadable(checkpoint, saved, self.describe())
        if universal is not None:
            load_universal(self._engine, universal)
            return
        path, _ = self._engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
        if path is None:
            raise ValueError(f"DeepSpeed found nothing to load in {checkpoint}")


class BytesWriting:
    """Files that are in memory already."""

    def __init__(self, draft: Path, files: dict[str, memoryview]) -> None:
        self._draft, self._files = draft, files

    def write(self) -> Part:
        written: dict[str, File] = {}
        while self._files:
            name, data = self._files.popitem()
            written[name] = write_file(self._draft / name, data)
        return Part(written)

    def finish(self, results: Sequence[Any]) -> Files:
        del results
        return {}
