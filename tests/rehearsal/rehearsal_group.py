"""Collectives of the rehearsal's device: gloo's, over the same memory, as a backend of its own.

As xccl's it takes no tensor of the CPU; and it refuses to average, as oneCCL 2021.17 does in some
of its ways (and does it wrong in others).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rehearsal_copies import NAME, deliver, is_here, to_host
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

BACKEND = "rehearsed"

_COLLECTIVES_NAMES = """
    allreduce allreduce_coalesced broadcast allgather _allgather_base
    allgather_into_tensor_coalesced reduce_scatter _reduce_scatter_base
    reduce_scatter_tensor_coalesced alltoall_base alltoall reduce gather scatter send recv
    barrier all_gather_single reduce_scatter_single all_to_all_single
"""
_COLLECTIVES = frozenset(_COLLECTIVES_NAMES.split())
_IN_GLOO = {
    "all_gather_single": "_allgather_base",
    "reduce_scatter_single": "_reduce_scatter_base",
    "all_to_all_single": "alltoall_base",
}
# Of several tensors at once, which gloo has not: into each, of each.
_ONE_BY_ONE = {
    "allgather_into_tensor_coalesced": "_allgather_base",
    "reduce_scatter_tensor_coalesced": "_reduce_scatter_base",
}


class Group(dist.ProcessGroup):
    supports_splitting = False

    def __init__(self, store: Any, rank: int, size: int, timeout: Any) -> None:
        super().__init__(rank, size)
        self._store = store
        self._gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._name = self._description = ""

    def getBackendName(self) -> str:
        return BACKEND

    def getGroupName(self) -> str:
        return self._name

    def setGroupName(self, name: str) -> None:
        self._name = name

    def getGroupDesc(self) -> str:
        return self._description

    def setGroupDesc(self, description: str) -> None:
        self._description = description

    _set_group_name, _set_group_desc = setGroupName, setGroupDesc
    group_name, group_desc = property(getGroupName), property(getGroupDesc)

    def get_group_store(self) -> Any:
        return self._store

    def _get_backend(self, device: Any) -> "Group":
        if torch.device(device).type != NAME:
            raise RuntimeError(f"No backend type associated with device type {device}")
        return self


def _collective(name: str) -> Callable[..., Any]:
    def call(self: Group, *args: Any, **kwargs: Any) -> Any:
        tensors: list[Tensor] = []

        def host(value: Any) -> Any:
            if isinstance(value, Tensor):
                if not is_here(value):
                    kind = value.device.type
                    raise RuntimeError(f"No backend type associated with device type {kind}")
                tensors.append(value)
                return to_host(value)
            if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
                return [host(each) for each in value]
            return value

        mapped = [host(value) for value in args]
        named = {key: host(value) for key, value in kwargs.items()}
        for option in [*args, *kwargs.values()]:
            if getattr(option, "reduceOp", None) == dist.ReduceOp.AVG:
                raise RuntimeError(
                    f"average operation is not supported (oneCCL 2021.17), in {name}"
                )
        if name in _ONE_BY_ONE:
            into, of, *others = mapped
            one = getattr(self._gloo, _ONE_BY_ONE[name])
            works = [one(*pair, *others, **named) for pair in zip(into, of, strict=True)]
        else:
            works = [getattr(self._gloo, _IN_GLOO.get(name, name))(*mapped, **named)]
        for work in works:
            if work is not None:
                work.wait()
        if name == "barrier":
            deliver()
        future: Future[Any] = Future()  # of no device, which would want a pool of streams
        future.set_result(tensors)
        return _create_work_from_future(future)

    return call


for _name in _COLLECTIVES:
    setattr(Group, _name, _collective(_name))


def install() -> None:
    """Make the backend known, after the device."""
    dist.Backend.register_backend(BACKEND, Group, devices=[NAME])
    _prepare_fsdp()


def _prepare_fsdp() -> None:
    """What FSDP2 asks of a built-in device and this one cannot do: to move a tensor within its
    Parameter, and storage that changes its size (it stays: use after free is not seen)."""
    from torch.distributed.fsdp._fully_shard import _fsdp_init

    def move(params: Any, buffers: Any, device: Any) -> None:
        for tensor in [*params, *buffers]:
            if tensor.device.type not in (device.type, "meta"):
                moved = tensor.detach().to(device)
                if isinstance(tensor, torch.nn.Parameter):
                    moved = torch.nn.Parameter(moved, tensor.requires_grad)
                torch.utils.swap_tensors(tensor, moved)

    _fsdp_init._move_states_to_device = move
    resize = torch.UntypedStorage.resize_

    def resize_(self: Any, size: int) -> Any:
        return self if self.device.type == NAME else resize(self, size)

    torch.UntypedStorage.resize_ = resize_  # type: ignore[method-assign]
