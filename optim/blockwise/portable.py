"""State of a block's owner in a form that every rank can save and any world size can load.

At work a factor lies whole on one rank, the others hold an empty tensor in its place. In a state
dict it is a DTensor, cut by rows over the same ranks as its parameter, and so every rank has a
part of every factor: `torch.distributed.checkpoint` saves and reshards it like any other state. The
way there and back is one collective for each process group.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from largebatch.optim.blockwise.work_group import BlockedLayer
from largebatch.optim.sharding.layout import is_dtensor, local
from largebatch.optim.sharding.placement import mesh_placement
from largebatch.optim.sharding.redistribution import Redistribution
from largebatch.optim.sharding.rounds import whole

Key = tuple[Tensor, str]
States = Mapping[Tensor, Mapping[str, Any]]
Saved = dict[Tensor, dict[str, Any]]


class Portable:
    """The block states of layers that are spread over one process group.

    Args:
        entries: shape and owner of every block state, none of them 0-d.
    """

    def __init__(
        self, layers: Iterable[BlockedLayer], entries: Mapping[Key, tuple[tuple[int, ...], int]]
    ) -> None:
        by_param = {layer.param: layer for layer in layers}
        self.keys = [*entries]
        self._shapes = {key: shape for key, (shape, _) in entries.items()}
        self._meshes = {param: mesh_of(layer) for param, layer in by_param.items()}
        tensors = []
        for (param, _), (shape, owner) in entries.items():
            placement = mesh_placement(shape, *self._meshes[param], by_param[param].name)
            tensors.append(whole(placement, owner))
        wide = any(layer.dtype == torch.float64 for layer in by_param.values())
        first = next(iter(by_param.values()))
        self._redistribution = Redistribution(
            tensors, torch.float64 if wide else torch.float32, first.device
        )
        self._mine = [tensor.owners[0] == self._redistribution.me for tensor in tensors]

    def shard(self, states: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Return this rank's shards of all states, from the whole ones that it owns."""
        from torch.distributed.tensor import DTensor

        blocks = [
            {0: states[key]} if mine else {}
            for key, mine in zip(self.keys, self._mine, strict=True)
        ]
        pieces, _ = self._redistribution.to_holders(blocks)
        found: dict[Key, Tensor] = {}
        for index, part in self._redistribution.joined(pieces):
            key = self.keys[index]
            mesh, placements = self._meshes[key[0]]
            shape = torch.Size(self._shapes[key])
            found[key] = DTensor.from_local(
                part.to(states[key].dtype).clone(memory_format=torch.contiguous_format),
                mesh,
                placements,
                run_check=False,
                shape=shape,
                stride=torch.empty(shape, device="meta").stride(),
            )
        return found

    def gather(self, states: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """Return the whole states that this rank owns, and empty tensors for those of others.

        Takes shards, or whole tensors where every rank has them.
        """
        parts: list[Tensor | None] = []
        for key in self.keys:
            value = states[key]
            if is_dtensor(value):
                mesh, placements = self._meshes[key[0]]
                if value.placements != tuple(placements):
                    value = value.redistribute(mesh, placements)
                parts.append(local(value))
            else:
                parts.append(None)
        blocks, _ = self._redistribution.to_owners(parts)
        found: dict[Key, Tensor] = {}
        for key, mine, block in zip(self.keys, self._mine, blocks, strict=True):
            value = states[key]
            if not mine:
                found[key] = torch.empty(0, dtype=value.dtype, device=self._redistribution.device)
            else:
                found[key] = (block[0] if is_dtensor(value) else value).to(value.dtype).clone()
        return found


def sharded(portables: Iterable[Portable], states: States) -> Saved:
    """Return the states with owned entries sharded over the ranks. A collective of each group."""
    return _exchanged(portables, states, Portable.shard)


def gathered(portables: Iterable[Portable], states: States) -> Saved:
    """Return the states with owned entries whole on their owners. A collective of each group."""
    return _exchanged(portables, states, Portable.gather)


def _exchanged(
    portables: Iterable[Portable],
    states: States,
    exchange: Callable[[Portable, Mapping[Key, Tensor]], Mapping[Key, Tensor]],
) -> Saved:
    found: dict[Tensor, Any] = {**states}
    for portable in portables:
        found |= {param: {**states[param]} for param, _ in portable.keys}
        before = {(param, key): states[param][key] for param, key in portable.keys}
        for (param, key), value in exchange(portable, before).items():
            found[param][key] = value
    return found


def mesh_of(layer: BlockedLayer) -> tuple[Any, tuple[Any, ...]]:
    """Where a layer's block states lie in a state dict: like its parameter, but cut by rows."""
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Replicate, Shard

    param: Any = layer.param
    if not is_dtensor(param):
        assert layer.placement.group is not None
        return DeviceMesh.from_group(layer.placement.group, layer.device.type), (Shard(0),)
    placements = tuple(
        Replicate() if placement.is_replicate() else Shard(0) for placement in param.placements
    )
    return param.device_mesh, placements
