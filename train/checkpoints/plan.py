"""Who writes what of a checkpoint: a plan that each rank makes for itself, and makes once.

`torch.distributed.checkpoint` has every rank send a plan to rank 0 at every save: from tens of
thousands of ranks many gigabytes of pickles, and a minute's work. But shapes, meshes and placements
are the same on all ranks, so that each can work out its own part, and rank 0 the whole. That they
are the same is not trusted: ranks agree on a digest of them, by an all-reduce of two numbers.
Where they are not, torch plans as it always does.

What all ranks hold alike is shared among `NUM_WRITERS` ranks, and of shards that have copies so
many copies are written from as make that many ranks. The other ranks plan nothing.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.planner_helpers import _create_write_items
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement
from torch.nn import Parameter

from largebatch.distributed.ranks import Ranks
from largebatch.optim.sharding.messages import all_have
from largebatch.optim.sharding.placement import Box, boxes_over, whole_box

NUM_WRITERS: Final = 32
"""Ranks that share what all of them hold alike: every rank reads their files when it resumes."""

Paths = Mapping[str, Sequence[Any]]
"""Where in the nested state each value is, by its flat name."""


@dataclass(frozen=True)
class SharedPlan:
    """A plan of all ranks, as one of them needs it."""

    digest: str
    """Of what it was made from, the same on all ranks."""
    own: SavePlan
    """What this rank writes."""
    whole: Metadata | None
    """What describes the checkpoint, on rank 0."""


def agreed_plan(
    state: Mapping[str, Any], paths: Paths, ranks: Ranks, before: SharedPlan | None
) -> SharedPlan | None:
    """A plan that all ranks have, or on every rank None; every rank calls it.

    Args:
        state: flat, as `torch.distributed.checkpoint` flattens it.
        before: of the last save; it holds as long as nothing has another shape or place.
    """
    digest = digest_of(state, paths, ranks)
    if before is not None and before.digest == digest:
        plan: SharedPlan | None = before
    else:
        plan = plan_of(digest, state, paths, ranks)
    own = f"rank {ranks.rank} has none" if plan is None else digest
    return plan if ranks.size == 1 or all_have(own) else None


def digest_of(state: Mapping[str, Any], paths: Paths, ranks: Ranks) -> str:
    """A digest of names, shapes, meshes and placements."""
    meshes: dict[int, list[Any]] = {}

    def look(value: Any) -> list[Any]:
        if not isinstance(value, Tensor):
            return []
        said = [str(value.dtype), list(value.shape), value.requires_grad]
        if isinstance(value, DTensor):
            mesh = value.device_mesh
            if id(mesh) not in meshes:
                order = blake2b(str(mesh.mesh.tolist()).encode(), digest_size=16).hexdigest()
                meshes[id(mesh)] = [list(mesh.mesh.shape), order]
            said += [str(value.placements), *meshes[id(mesh)]]
        return said

    described = [[name, list(map(str, paths[name])), look(value)] for name, value in state.items()]
    return blake2b(json.dumps([ranks.size, described]).encode(), digest_size=16).hexdigest()


def plan_of(digest: str, state: Mapping[str, Any], paths: Paths, ranks: Ranks) -> SharedPlan | None:
    """The plan of this rank; None where it cannot say what the others hold."""
    if not all(is_known(value, ranks) for value in state.values()):
        return None
    items: list[WriteItem] = []
    whole: dict[str, Any] = {}
    parts = {name: parts_of(value, ranks.size) for name, value in state.items()}
    if any(ranks.rank in may for shards in parts.values() for _, may in shards):  # 0 may always
        loads = [0] * ranks.size
        for name, value in state.items():
            for box, may in parts[name]:
                writer = min(may, key=loads.__getitem__)  # who has least to write so far
                loads[writer] += box.numel * getattr(value, "itemsize", 1)
                if writer == ranks.rank:
                    items += _create_write_items(name, value)
            if ranks.is_first:
                whole[name] = described(value, [box for box, _ in parts[name]])
    own = SavePlan(items, storage_data=_StoragePrefix(f"__{ranks.rank}_"))
    known = Metadata(whole, planner_data=dict(paths)) if ranks.is_first else None
    return SharedPlan(digest, own, known)


def is_known(value: Any, ranks: Ranks) -> bool:
    """Whether where all of it lies follows from what this rank sees of it."""
    if isinstance(value, DTensor):
        mesh = value.device_mesh
        if mesh.size() != ranks.size or any(p.is_partial() for p in value.placements):
            return False
        box = boxes_over(tuple(value.shape), mesh, value.placements)[0][ranks.rank]
        (item,) = _create_write_items("", value)
        chunk = item.tensor_data.chunk  # type: ignore[union-attr]
        there = tuple(chunk.offsets), tuple(chunk.sizes)
        local = tuple(value.to_local().shape)
        return box.size == local and (box.numel == 0 or there == (box.start, box.size))
    return not isinstance(value, Tensor) or type(value) in (Tensor, Parameter)


TensorPart = tuple[Box, Sequence[int]]
"""Part of a tensor, and the ranks that may write it."""


def parts_of(value: Any, size: int) -> Sequence[TensorPart]:
    """The parts in which a value is written by `size` ranks."""
    if isinstance(value, DTensor):
        return shards_of(tuple(value.shape), value.device_mesh, value.placements)
    shape = value.shape if isinstance(value, Tensor) else ()
    return [(whole_box(shape), some_of(range(size), NUM_WRITERS))]


@lru_cache(maxsize=256)  # many tensors are alike, and there may be thousands of ranks
def shards_of(
    shape: tuple[int, ...], mesh: DeviceMesh, placements: tuple[Placement, ...]
) -> Sequence[TensorPart]:
    """Of as many copies as have `NUM_WRITERS` ranks together; empty shards of others are none."""
    boxes, copies = boxes_over(shape, mesh, placements)
    every = sorted(set(copies))
    chosen = set(some_of(every, -(-NUM_WRITERS * len(every) // len(copies))))
    holders: dict[Box, list[int]] = {}
    for rank, (box, copy) in enumerate(zip(boxes, copies, strict=True)):
        if copy in chosen and (box.numel or 0 in shape):
            holders.setdefault(box, []).append(rank)
    return [*holders.items()]


def some_of(things: Sequence[int], at_most: int) -> Sequence[int]:
    """Some of them, spread evenly, the first among them."""
    return things[:: -(-len(things) // at_most)]


def described(value: Any, boxes: Sequence[Box]) -> TensorStorageMetadata | BytesStorageMetadata:
    if not isinstance(value, Tensor):
        return BytesStorageMetadata()
    held = value.to_local() if isinstance(value, DTensor) else value
    chunks = [ChunkStorageMetadata(torch.Size(b.start), torch.Size(b.size)) for b in boxes]
    return TensorStorageMetadata(TensorProperties.create_from_tensor(held), value.size(), chunks)
