"""What a checkpoint holds of model and optimizer, and who writes it.

Saving has two parts. `begin_save` is called on every rank and may talk to the others; when it
returns, training may continue, where it was asked to stage. `Writing.write` then puts the files of
this rank on disk. It makes no collective, so it may run in any thread: MPI over device memory
allows collectives in one thread only (pmodels/mpich issue 7880), and a second group for the
background, of gloo, would connect every rank with every other.
"""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from largebatch.distributed.groups import RankGroups
from largebatch.distributed.ranks import Ranks
from largebatch.optim.sharding.messages import first_words
from largebatch.train.checkpoints.files import File, Files, RankFiles, write_file
from largebatch.train.checkpoints.plan import SharedPlan, agreed_plan
from largebatch.train.checkpoints.reading import refusal, weights_only
from largebatch.train.checkpoints.torch_format import (
    OPTIMIZER,
    DeferredWriter,
    MomentsPlanner,
    SharingPlanner,
    ToldReader,
    leave_out,
    make_room,
    quiet,
)


class Writing(Protocol):
    """A save that has begun."""

    def write(self) -> RankFiles:
        """Put this rank's files on disk, or raise OSError: it is full, or gone."""

    def complete(self, results: Sequence[Any]) -> Files:
        """On rank 0, with every rank's results: write what describes the whole, as `write`; returns
        its files.
        """


class CheckpointTensors(Protocol):
    """Model and optimizer, as checkpoints hold them."""

    def describe(self) -> dict[str, Any]:
        """`kind`, `world`, and what else decides who can load it: it goes into state.json."""

    def hold(self, name: str, tensors: dict[str, Any]) -> None:
        """Save these too, under a name, and load them in place."""

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
    """Refuse what another kind of engine has saved."""
    engines = {"dcp": "engine=ddp or fsdp", "deepspeed": "engine=deepspeed"}
    before = saved.get("kind", "dcp")
    if before != kind:
        raise ValueError(
            f"the checkpoint was saved by {engines.get(before, before)}, whose format "
            f"{engines[kind]} does not read: go on with {engines.get(before, before)}, or begin a "
            "run of its own from the weights that `largebatch checkpoint export` writes"
        )


def fits_groups(checkpoint: Path, saved: dict[str, Any], number: int) -> None:
    """Refuse the optimizer states of another number of groups of ranks."""
    before = saved.get("groups", 1)
    if before != number:
        raise ValueError(
            f"{checkpoint} holds the optimizer's state of {before} group(s) of ranks, and there "
            f"are {number} now: set outer.groups={before}, or begin a run of its own from the "
            "weights that `largebatch checkpoint export` writes"
        )


# torch.distributed.checkpoint --------------------------------------------------------------------


class DistributedTensors:
    """By `torch.distributed.checkpoint`, keyed by names in the model: replicated tensors and
    sharded ones, and read in a world of any size. Of groups of ranks, whose weights are the same
    when they are saved, each has its own state of the optimizer under a name of its own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        ranks: Ranks,
        groups: RankGroups | None = None,
    ) -> None:
        self._model, self._optimizer, self._ranks = model, optimizer, ranks
        self._groups = groups
        self._key = OPTIMIZER if groups is None else f"{OPTIMIZER}_{groups.index}"
        self._plan: SharedPlan | None = None
        self._held: dict[str, Any] = {}

    def hold(self, name: str, tensors: dict[str, Any]) -> None:
        self._held[name] = tensors

    def describe(self) -> dict[str, Any]:
        said = {"kind": "dcp", "world": self._ranks.size}
        return said if self._groups is None else said | {"groups": self._groups.number}

    def begin_save(self, draft: Path, staged: bool) -> DeferredWriter:
        shares = self._groups is not None and self._groups.within.is_first
        writer, planner = DeferredWriter(draft, staged), SharingPlanner(self._ranks, shares)
        tensors = self._tensors()
        planner.set_up_planner(tensors, is_coordinator=self._ranks.is_first)
        state, paths = planner.state_dict, planner.mappings
        self._plan = agreed_plan(state, paths, self._ranks, self._plan)
        if self._plan is not None:
            writer.begin(self._plan, planner, self._ranks.is_first)
            return writer
        with quiet():
            alone = self._ranks.size == 1
            state_dict_saver.save(tensors, storage_writer=writer, planner=planner, no_dist=alone)
        return writer

    def load(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        fits(saved, "dcp")
        fits_groups(checkpoint, saved, 1 if self._groups is None else self._groups.number)
        problem, failure = "", None
        try:
            with quiet(), weights_only(checkpoint):
                reader = ToldReader(checkpoint, self._ranks)
                leave_out(self._model, self._optimizer, reader.read_metadata(), self._key)
                tensors = self._tensors()
                make_room(tensors[self._key]["state"], reader.read_metadata(), self._key)
                # What a rank reads concerns no other: with `no_dist` none is asked.
                state_dict_loader.load(
                    tensors, storage_reader=reader, planner=MomentsPlanner(), no_dist=True
                )
        except CheckpointException as error:
            failure = error
            cause, _ = next(iter(error.failures.values()))
            problem = f"{checkpoint} does not fit this run: {cause}"
            if isinstance(cause, UnpicklingError):
                problem = f"{checkpoint} is not read: {refusal(cause)}"
        if self._ranks.size > 1:
            problem = first_words(problem)
        if problem:
            raise ValueError(problem) from failure
        with quiet():
            set_state_dict(
                self._model,
                self._optimizer,
                model_state_dict=tensors["model"],
                optim_state_dict=tensors[self._key],
            )

    def _tensors(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self._model, self._optimizer)
        return {"model": model, self._key: optimizer, **self._held}


# DeepSpeed ---------------------------------------------------------------------------------------


class DeepSpeedTensors:
    """By DeepSpeed, in its own format: shards that only a world of the same size reads, unless
    `largebatch checkpoint universal` has converted them.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def hold(self, name: str, tensors: dict[str, Any]) -> None:
        raise NotImplementedError  # what needs it is refused with the engine

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
        from largebatch.train.checkpoints.deepspeed import kept_in_memory

        del staged
        with kept_in_memory(self._engine) as files:
            self._engine.save_checkpoint(str(draft.parent), tag=draft.name, save_latest=False)
        return BytesWriting(draft, files)

    def load(self, checkpoint: Path, saved: dict[str, Any]) -> None:
        from largebatch.train.checkpoints.deepspeed import check_loadable, load_own, load_universal

        fits(saved, "deepspeed")
        universal = check_loadable(checkpoint, saved, self.describe())
        if universal is None:
            load_own(self._engine, checkpoint)
        else:
            load_universal(self._engine, universal)


class BytesWriting:
    """Files that are in memory already."""

    def __init__(self, draft: Path, files: dict[str, memoryview]) -> None:
        self._draft, self._files = draft, files

    def write(self) -> RankFiles:
        written: dict[str, File] = {}
        while self._files:
            name, data = self._files.popitem()
            written[name] = write_file(self._draft / name, data)
        return RankFiles(written)

    def complete(self, results: Sequence[Any]) -> Files:
        del results
        return {}
