"""How `torch.distributed.checkpoint` is made to write later, a few large files, and to ask little.

Its own `save` plans with all ranks and writes at once. Here each rank plans for itself (`plan.py`),
or torch where that cannot be, and what it would have written waits in a `DeferredWriter`, staged or
not.
"""

import io
import os
import warnings
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.optim import Optimizer

from largebatch.distributed.ranks import Ranks
from largebatch.optim.blockwise.hyperball import RADIUS
from largebatch.optim.blockwise.work_group import DROPPED
from largebatch.optim.kronecker.state import ELSEWHERE, KroneckerState
from largebatch.optim.math.bias_correction import SUFFIX
from largebatch.optim.sharding.messages import broadcast_json
from largebatch.train.checkpoints.files import CheckedFile, Files, RankFiles
from largebatch.train.checkpoints.plan import NUM_WRITERS, SharedPlan, some_of
from largebatch.train.checkpoints.reading import PlainReader

T = TypeVar("T")

# Torch 2.10's own, at each save. For good, as writing has a thread and filters are the process's.
warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)

OPTIMIZER: Final = "optimizer"
"""Under which its state is, where all ranks share it."""

OUTER: Final = "outer"
"""The same of outer steps; a run that branches from one without begins theirs at zero."""

_BUFFER: Final = 1 << 20

COUNTED: Final = (SUFFIX, DROPPED, RADIUS)
"""Ends of the names of what optimizers count in their state, which older versions did not."""


def of_first(ranks: Ranks, act: Callable[[], T]) -> T:
    """What `act` returns on rank 0, which alone calls it, on every rank: so one rank asks the file
    system what all need to know. It returns what JSON holds.

    Raises:
        OSError, ValueError: it has raised that, on every rank.
    """
    answer: dict[str, Any] = {}
    if ranks.is_first:
        try:
            answer = {"value": act()}
        except OSError as error:
            name = error.filename and str(error.filename)
            known = error.errno is not None
            answer = {"system": [error.errno, error.strerror, name] if known else [str(error)]}
        except ValueError as error:
            answer = {"wrong": str(error)}
    if ranks.size > 1:
        answer = broadcast_json(answer)
    if "system" in answer:
        raise OSError(*answer["system"])
    if "wrong" in answer:
        raise ValueError(answer["wrong"])
    return cast(T, answer["value"])


class DeferredWriter(FileSystemWriter):
    """A writer of one file a rank: it plans with all ranks at once, and writes on request."""

    _plan: SavePlan
    _planner: "SharingPlanner"
    _metadata: Metadata

    def __init__(self, path: Path, staged: bool) -> None:
        super().__init__(path)
        self.fs: CheckedFileSystem = CheckedFileSystem()
        self._staged = staged

    def begin(self, plan: SharedPlan, planner: "SharingPlanner", is_first: bool) -> None:
        """Do as torch's own `save` would, by a plan that is there."""
        self.set_up_storage_writer(is_first)
        self.write_data(plan.own, planner)
        if plan.whole is not None:
            self.finish(replace(plan.whole), [])  # the plan's own stays as it is

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

    def write(self) -> RankFiles:
        """The work deferred by `write_data`."""
        if not self._plan.items:
            return RankFiles({}, [])
        results = super().write_data(self._plan, self._planner).value()
        self._planner.forget()
        return RankFiles(dict(self.fs.written), [_row(result) for result in results])

    def complete(self, results: Sequence[list[list[Any]]]) -> Files:
        """The work deferred by `finish`."""
        self.fs.written.clear()
        super().finish(self._metadata, [[_result(*row) for row in rows] for rows in results])
        return self.fs.written


def _row(result: WriteResult) -> list[Any]:
    """In values of JSON: ranks tell rank 0 nothing else."""
    index, place = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return [
        index.fqn, offset, index.index, result.size_in_bytes,
        place.relative_path, place.offset, place.length, place.transform_descriptors,
    ]  # fmt: skip


def _result(
    fqn: str, offset: list[int] | None, index: int | None, size_in_bytes: int, *place: Any
) -> WriteResult:
    return WriteResult(MetadataIndex(fqn, offset, index), size_in_bytes, _StorageInfo(*place))


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

    def __init__(self, ranks: Ranks, shares: bool = False) -> None:
        """Plan for this rank.

        Args:
            shares: it may be the only one of its group, and so writes what others may not hold.
        """
        super().__init__()
        self._writes_replicas = shares or ranks.rank in some_of(range(ranks.size), NUM_WRITERS)
        self._staged: dict[Any, Tensor | io.BytesIO] = {}
        self._arrived: torch.Event | None = None

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        if not self._writes_replicas:
            held = self.state_dict
            plan.items[:] = [i for i in plan.items if isinstance(held[i.index.fqn], DTensor)]
        return plan

    def stage(self, plan: SavePlan) -> None:
        """Copy to host memory what `plan` has this rank write.

        From a device copies set off for pinned memory, in the order of the device's work: what
        comes after may change the tensors, and only who writes waits for them.
        """
        device = None
        for item in plan.items:
            data = super().resolve_data(item)
            if isinstance(data, Tensor) and data.device.type == "cpu":
                data = data.detach().clone()
            elif isinstance(data, Tensor):
                device, data = data.device, data.detach()
                pinned = torch.empty_like(data, device="cpu", pin_memory=True)
                data = pinned.copy_(data, non_blocking=True)
            self._staged[item.index] = data
        if device is not None:
            self._arrived = torch.Event(device)
            self._arrived.record()

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        staged = self._staged.pop(write_item.index, None)
        return super().resolve_data(write_item) if staged is None else staged

    def forget(self) -> None:
        """Let go of the tensors: a save that has ended must not keep those of an earlier step."""
        self._staged.clear()
        self.state_dict = {}


class ToldReader(PlainReader):
    """A reader that is given the description of the whole: one rank reads it, not each."""

    def __init__(self, path: Path, ranks: Ranks) -> None:
        super().__init__(path)

        def read() -> str:
            return b64encode(self.read_bytes()).decode()

        self._described = self.describe(b64decode(of_first(ranks, read)))

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._described


def make_room(states: dict[str, Any], saved: Metadata, under: str = OPTIMIZER) -> None:
    """Give `states`, of parameters by name, zeros for what optimizers count only once it is there.

    A new optimizer has no such entries, and only what has a place is read.
    """
    for path in (saved.planner_data or {}).values():
        match path:
            case (top, "state", name, str(key)) if top == under and key.endswith(COUNTED):
                if name in states:
                    states[name].setdefault(key, torch.zeros(()))


def leave_out(
    model: nn.Module, optimizer: Optimizer, saved: Metadata, under: str = OPTIMIZER
) -> None:
    """Tell an optimizer which weights had no curvature, which it learns in its first pass: a new
    one would have their factors read.
    """
    if isinstance(optimizer, KroneckerState):
        paths = (saved.planner_data or {}).values()
        names = {path[2] for path in paths if path[:2] + path[3:] == (under, "state", ELSEWHERE)}
        optimizer.leave_out(param for name, param in model.named_parameters() if name in names)


class MomentsPlanner(DefaultLoadPlanner):
    """A flag that a checkpoint does not know keeps its value; a tensor that it has not is fatal,
    but for what optimizers count since a later version, which is 0 where no checkpoint says it, and
    for the momentum of outer steps, of which there were none.
    """

    def __init__(self) -> None:
        super().__init__(allow_partial_load=True)

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        there = self.metadata.state_dict_metadata
        missing = [
            name
            for name, value in self.state_dict.items()
            if isinstance(value, Tensor) and name not in there and not _may_lack(name)
        ]
        if missing:
            raise ValueError(f"it has no {', '.join(missing[:3])}{', …' * (len(missing) > 3)}")
        return super().create_local_plan()


def _may_lack(name: str) -> bool:
    return name.endswith(COUNTED) or name.startswith(f"{OUTER}.")


@contextmanager
def quiet() -> Iterator[None]:
    """Torch warns that a single process is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield
