"""Parameters, gradients and optimizer state sharded over ranks by FSDP2, or over groups of them.

With `replicas` groups (HSDP) each holds the whole model, sharded over its ranks: gathering stays
within a group, and gradients are then summed across the groups. On many nodes a group is a node,
by default.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from largebatch.distributed.groups import RankGroups
from largebatch.distributed.ranks import Ranks
from largebatch.optim.sharding.layout import local
from largebatch.train.engines.base import OfGradients
from largebatch.train.engines.initial_values import InitialValues
from largebatch.train.engines.model_options import blocks
from largebatch.train.engines.precision import Precision
from largebatch.train.noise.sharded_gradients import ShardedGradients
from largebatch.train.noise.small_gradients import SmallGradients


class FSDP(OfGradients):
    """FSDP2's `fully_shard` on each block of the model, and on what is left.

    Args:
        shard_nodes: neighbouring nodes that share one copy of the model; None: by `replicas`.
        replicas: groups of ranks that hold the whole model each; None: by `shard_nodes`. Where
            both are None: one node shares a copy, or all ranks do, where a node has one rank or
            nodes differ in their number.
        reshard_after_forward: let go of a block's gathered weights between its forward and its
            backward pass (ZeRO-3); false keeps them, for memory in place of a second gather.
        accumulate: where micro-batches are summed: "unsharded", whole gradients on every rank and
            one reduce-scatter a step, or "sharded", one for each micro-batch and the memory of a
            shard.
        values: of the parameters, where `model` is on the meta device.
        groups: of ranks, each of which holds the model and averages gradients for itself, sharded
            and replicated as a world of its own; None: all ranks are one.
    """

    def __init__(
        self,
        model: nn.Module,
        ranks: Ranks,
        device: torch.device,
        micro_batch_size: int | None = None,
        precision: Precision | None = None,
        groups: RankGroups | None = None,
        *,
        shard_nodes: int | None = None,
        replicas: int | None = None,
        reshard_after_forward: bool = True,
        accumulate: str = "unsharded",
        values: InitialValues | None = None,
    ) -> None:
        replicas = num_replicas(ranks if groups is None else groups.within, shard_nodes, replicas)
        if accumulate not in ("unsharded", "sharded"):
            raise ValueError(f"engine.accumulate must be unsharded or sharded, got {accumulate!r}")
        super().__init__(model, ranks, device, micro_batch_size, precision, groups)
        self._accumulates_shards = accumulate == "sharded"
        number = 1 if groups is None else groups.number
        over, self.across = meshes(ranks, device, replicas, number)
        shard(model, over, self.precision, reshard_after_forward)
        if values is not None:
            model.to_empty(device=device)
            values.play(keep_shard, device)
        self.gradient_copies = replicas * number

    def _synchronised(self, is_last: bool) -> AbstractContextManager[Any]:
        cast(FSDPModule, self.model).set_requires_gradient_sync(is_last or self._accumulates_shards)
        return nullcontext()

    def small_gradients(self, kind: str) -> SmallGradients:
        sources = {"rank": "unsharded", "micro_batch": "sharded"}
        if kind not in sources:
            raise ValueError(
                f"noise.small={kind} needs whole parameters, which engine=fsdp has not: use "
                "noise.small=rank, or micro_batch with engine.accumulate=sharded"
            )
        if kind == "micro_batch" and not self._accumulates_shards:
            raise ValueError(
                "noise.small=micro_batch sees gradients where they are reduced, and "
                "engine.accumulate=unsharded reduces them once a step: use engine.accumulate="
                "sharded, or noise.small=rank"
            )
        if self.data_parallel_size == self.gradient_copies:
            raise ValueError(
                "engine=fsdp reduces no gradient where each rank holds the whole model "
                f"(engine.replicas={self._within.size} of {self._within.size} ranks), and "
                "so shows none for the noise scale: use fewer replicas, or engine=ddp"
            )
        return ShardedGradients(self.model, synchronised_once=not self._accumulates_shards)


def num_replicas(ranks: Ranks, shard_nodes: int | None, replicas: int | None) -> int:
    """Groups of ranks that hold the whole model each."""
    if shard_nodes is not None and replicas is not None:
        raise ValueError(
            f"engine.shard_nodes={shard_nodes} and engine.replicas={replicas} say the same thing "
            "in two ways: set one of them, and the other to null"
        )
    if replicas is not None:
        if replicas < 1 or ranks.size % replicas:
            raise ValueError(
                f"engine.replicas must divide the {ranks.size} rank(s), got {replicas}: each "
                "group of ranks holds the whole model once"
            )
        return replicas
    nodes, more = divmod(ranks.size, ranks.local_size)
    if shard_nodes is None:
        return 1 if more or ranks.local_size == 1 else nodes
    if shard_nodes < 1 or more or nodes % shard_nodes:
        raise ValueError(
            f"engine.shard_nodes must divide the {nodes} node(s) of {ranks.local_size} rank(s) "
            f"each that {ranks.size} rank(s) are on, got {shard_nodes}: each group of nodes holds "
            "the whole model once"
        )
    return nodes // shard_nodes


def meshes(
    ranks: Ranks, device: torch.device, replicas: int, groups: int = 1
) -> tuple[DeviceMesh, dist.ProcessGroup | None]:
    """All ranks: in a row, or as `replicas` groups that hold the whole model each. Where ranks are
    in `groups` already: those of this one's, and the ranks of all that hold the same shard.
    """
    if device.type == "xpu":
        # xccl cannot split a group that is bound to a device (torch-xpu-ops issue 5385).
        dist.distributed_c10d._get_default_group().bound_device_id = None
    if groups == 1:
        if replicas == 1:
            return init_device_mesh(device.type, (ranks.size,), mesh_dim_names=("shard",)), None
        shape: tuple[int, ...] = (replicas, ranks.size // replicas)
        return init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard")), None
    shape = (groups, replicas, ranks.size // (groups * replicas))
    whole = init_device_mesh(device.type, shape, mesh_dim_names=("group", "replicate", "shard"))
    within = whole["shard"] if replicas == 1 else whole["replicate", "shard"]
    return within, whole.get_group("group")


def shard(
    model: nn.Module, over: DeviceMesh, precision: Precision, reshard_after_forward: bool
) -> None:
    """Shard each block, and the rest, in place; weights gathered in the precision computed in."""
    policy = MixedPrecisionPolicy()
    if precision.dtype != torch.float32:
        policy = MixedPrecisionPolicy(
            param_dtype=precision.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    for module in (*blocks(model), model):
        sharded = fully_shard(
            module, mesh=over, mp_policy=policy, reshard_after_forward=reshard_after_forward
        )
        # Not AVG, which oneCCL before 2022.0 divides twice in small messages (torch-xpu-ops 3020)
        # or refuses (2361).
        sharded.set_force_sum_reduction_for_comms(True)


def keep_shard(module: nn.Module, name: str, value: Tensor) -> None:
    """Copy this rank's part of a parameter's value into the parameter."""
    param: Any = module._parameters[name]
    shape, offset = compute_local_shape_and_global_offset(
        param.shape, param.device_mesh, param.placements
    )
    part = value[tuple(slice(at, at + size) for at, size in zip(offset, shape, strict=True))]
    local(param).copy_(part)
