"""The ways one small model is spread over ranks in these tests, and how it becomes whole again."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel


class Network(nn.Module):
    """Eight numbers in, one out; its tensors are awkward to shard over 2, 3 and 4 ranks."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)  # its bias begins as zeros: ‖w‖ = 0
        self.qkv = nn.Linear(8, 21, bias=False)  # three layers fused; their seams are inside shards
        self.up = nn.Linear(8, 10)  # uneven shards
        self.down = nn.Linear(10, 7)
        self.kv = nn.Parameter(torch.randn(7, 10) / 3)  # two layers side by side, 4 and 6 columns
        self.head = nn.Linear(10, 1)  # one row: empty shards on all ranks but the first
        self.temperature = nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.randn(7), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(5))  # never gets a gradient
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)  # (batch, 8)
        q, k, v = self.qkv(h).chunk(3, dim=-1)  # (batch, 7) each
        h = self.down(torch.tanh(self.up(h))) + q * torch.sigmoid(k) + v
        h = torch.tanh((h * self.frozen) @ self.kv)  # (batch, 10)
        return self.head(h) * self.temperature


@dataclass(frozen=True)
class Layout:
    """How a model is spread over ranks."""

    name: str
    world_sizes: tuple[int, ...]
    spread: Callable[[nn.Module], nn.Module]
    """Spreads a model in place and returns the module to call. The model keeps its names."""
    reductions: int
    """Process groups over which an optimizer's norms have to be summed or averaged."""
    tensor_parallel: int = 1
    """Ranks that see the same samples."""
    redundancy: bool = False
    """The optimizer is wrapped in torch's ZeroRedundancyOptimizer."""
    ignores: bool = False
    """Plain tensors among the sharded ones, whose gradients the user has to average."""

    def share(self) -> slice:
        """This rank's part of a batch."""
        if not dist.is_initialized():
            return slice(None)
        size = dist.get_world_size() // self.tensor_parallel
        return slice(dist.get_rank() // self.tensor_parallel, None, size)


@functools.cache
def mesh_of(sizes: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def everyone() -> DeviceMesh:
    return mesh_of((dist.get_world_size(),), ("dp",))


def alone(model: nn.Module) -> nn.Module:
    return model


def replicated(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def sharded(model: nn.Module) -> nn.Module:
    """One layer by itself, the rest together: each part has its own collectives, each way."""
    first = next(child for child in model.children() if isinstance(child, nn.Linear))
    fully_shard(first, mesh=everyone())
    return fully_shard(model, mesh=everyone())


def sharded_but_vectors(model: nn.Module) -> nn.Module:
    vectors = {param for param in model.parameters() if param.dim() == 1}
    return fully_shard(model, mesh=everyone(), ignored_params=vectors)


def sharded_by_columns(model: Network) -> nn.Module:
    """`kv` along dimension 1, within whose shards its seam lies; FSDP2 wants even shards there."""
    return fully_shard(
        model,
        mesh=everyone(),
        shard_placement_fn=lambda param: Shard(1) if param is model.kv else None,
    )


def hybrid(model: nn.Module) -> nn.Module:
    return fully_shard(model, mesh=mesh_of((2, 2), ("replicate", "shard")))


def sharded_on_two_meshes(model: nn.Module) -> nn.Module:
    for child in model.children():
        if isinstance(child, nn.Linear):
            hybrid(child)
    return fully_shard(model, mesh=everyone())


def parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """The linear layers that come in pairs: the first split by rows, the second by columns."""
    pairs = [("up", "down")] if isinstance(model, Network) else model.pairs
    plan = {}
    for first, second in pairs:
        plan |= {first: ColwiseParallel(), second: RowwiseParallel()}
    return parallelize_module(model, mesh, plan)


def tensor_parallel(model: nn.Module) -> nn.Module:
    return parallel(model, mesh_of((dist.get_world_size(),), ("tp",)))


def sharded_tensor_parallel(model: nn.Module) -> nn.Module:
    mesh = mesh_of((2, 2), ("dp", "tp"))
    return fully_shard(parallel(model, mesh["tp"]), mesh=mesh["dp"])


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("one-process", (1,), alone, 0),
        Layout("DDP", (2, 4), replicated, 0),
        Layout("ZeRO-redundancy", (2, 3), replicated, 0, redundancy=True),
        Layout("FSDP2", (2, 3, 4), sharded, 1),
        Layout("FSDP2+ignored", (2, 3), sharded_but_vectors, 1, ignores=True),
        Layout("FSDP2-columns", (2,), sharded_by_columns, 1),
        Layout("HSDP", (4,), hybrid, 2),
        Layout("FSDP2+HSDP", (4,), sharded_on_two_meshes, 3),
        Layout("TP", (2,), tensor_parallel, 1, tensor_parallel=2),
        Layout("FSDP2+TP", (4,), sharded_tensor_parallel, 2, tensor_parallel=2),
    )
}


def like(param: Tensor, whole_tensor: Tensor) -> Tensor:
    """A tensor that every rank has, spread like the parameter and in its dtype."""
    whole_tensor = whole_tensor.to(param.dtype, copy=True)
    if not isinstance(param, DTensor):
        return whole_tensor
    return distribute_tensor(whole_tensor, param.device_mesh, param.placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """The opposite of `like`: a collective for a sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_key(tensor: Tensor) -> tuple[int, ...]:
    """Which shard this rank holds: ranks with equal keys hold copies of the same elements."""
    if not isinstance(tensor, DTensor):
        return ()
    here = tensor.device_mesh.get_coordinate()
    return tuple(
        position
        for position, placement in zip(here, tensor.placements, strict=True)
        if not placement.is_replicate()
    )
