"""How tensors of the rehearsal's device lie in the host's memory, and how copies travel.

A tensor of the device is a plain `torch.Tensor` with a storage of its own, around the memory of a
CPU tensor, which DLPack keeps alive. A copy to pinned memory arrives only when an event or a wait
says so, and is NaN until then: a number that is read too early fails the test.
"""

import ctypes
import threading
import weakref
from typing import Any

import torch
from rehearsal_log import is_beside, log, place
from torch import Tensor

NAME = "rehearsal"
CPU = torch.device("cpu")
CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
aten = torch.ops.aten

_DLPACK_EXTENSION = 12  # kDLExtDev, which torch reads as PrivateUse1
_DEVICE_TYPE = 8  # its offset in a DLTensor

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]

_lock = threading.RLock()
_travelling: list[tuple[Tensor, Tensor]] = []
_sent = _arrived = 0  # copies to pinned memory, in order
_pinned: dict[int, Tensor] = {}  # by address; kept for good, so that none is used twice


def is_here(tensor: Tensor) -> bool:
    return tensor.device.type == NAME


def sent() -> int:
    return _sent


def has_arrived(upto: int) -> bool:
    return upto <= _arrived


def deliver(upto: int | None = None) -> None:
    """The copies sent off so far, or the first so many, have arrived."""
    global _arrived
    with _lock:
        while _arrived < (_sent if upto is None else upto):
            target, source = _travelling.pop(0)
            target.copy_(source)
            _arrived += 1


def wait(kind: str) -> None:
    """The host waits for all that the device has to do."""
    if not is_beside():
        log.waits[kind, place()] += 1
    deliver()


def to_device(result: Tensor) -> Tensor:
    """A tensor of the device around the memory of a CPU tensor."""
    size, stride, offset = result.size(), result.stride(), result.storage_offset()
    storage = result.untyped_storage()
    num_bytes = storage.nbytes()
    if log.allocated + num_bytes > log.limit:
        raise torch.OutOfMemoryError(f"rehearsal: {num_bytes} bytes more than {log.limit}")
    log.allocated += num_bytes
    log.peak = max(log.peak, log.allocated)
    weakref.finalize(storage, _freed, num_bytes).atexit = False
    flat = torch.empty(0, dtype=result.dtype)
    flat = flat.set_(storage, 0, (num_bytes // result.itemsize,), (1,))
    capsule = torch._C._to_dlpack(flat)
    where = _pointer(capsule, b"dltensor") + _DEVICE_TYPE
    ctypes.c_int32.from_address(where).value = _DLPACK_EXTENSION
    made: Tensor = torch._C._from_dlpack(capsule)
    if made.size() == size and offset == 0 and stride == (1,):
        return made
    return view(made, size, stride, offset)


def _freed(num_bytes: int) -> None:
    log.allocated -= num_bytes


def view(tensor: Tensor, size: Any, stride: Any, offset: int) -> Tensor:
    viewed: Tensor = aten.as_strided.default.redispatch(CPU_KEYS, tensor, size, stride, offset)
    return viewed


def to_host(tensor: Tensor) -> Tensor:
    """A CPU tensor over the memory of one of the device."""
    storage = tensor.untyped_storage()
    alias = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), CPU, storage.nbytes())
    host = torch.empty(0, dtype=tensor.dtype)
    host.set_(alias, tensor.storage_offset(), tensor.size(), tensor.stride())
    return torch._conj(host) if tensor.is_conj() else host


def set_(tensor: Tensor, source: Any, offset: Any = 0, size: Any = (), stride: Any = ()) -> Tensor:
    kernel = aten.set_.source_Storage_storage_offset
    kernel.redispatch(CPU_KEYS, tensor, source, offset, size, stride)
    return tensor


def give(tensor: Tensor, other: Tensor) -> None:
    """`tensor` takes the storage and the shape of `other`."""
    set_(tensor, other.untyped_storage(), other.storage_offset(), other.size(), other.stride())


def resize_(self: Tensor, size: Any, *, memory_format: Any = None) -> Tensor:
    count = torch.Size(size).numel()
    if (self.storage_offset() + count) * self.itemsize > self.untyped_storage().nbytes():
        larger = torch.empty(count, dtype=self.dtype)
        old = to_host(self).reshape(-1)
        larger[: old.numel()].copy_(old)
        give(self, to_device(larger.view(size)))
    else:
        aten.resize_.default.redispatch(CPU_KEYS, self, size, memory_format=memory_format)
    return self


def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    global _sent
    if is_here(source) and is_here(target):
        to_host(target).copy_(to_host(source))
    elif not is_here(source):
        log.uploads["upload" if non_blocking else "waiting upload", place()] += 1
        if not non_blocking:
            deliver()
        to_host(target).copy_(source)
    elif non_blocking and target.untyped_storage().data_ptr() in _pinned:
        arriving = to_host(source).to(target.dtype, copy=True)
        with _lock:
            target.fill_(float("nan") if target.dtype.is_floating_point else 1)
            _travelling.append((target, arriving))
            _sent += 1
    else:
        wait("copy to the host")
        target.copy_(to_host(source))
    return target


def empty_like(
    self: Tensor,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    memory_format: Any = None,
) -> Tensor:
    device = self.device if device is None else device
    kept = memory_format or torch.preserve_format
    there = CPU if device.type == NAME else device
    shaped = torch.empty_like(
        to_host(self), dtype=dtype, layout=layout, device=there, memory_format=kept
    )
    if device.type != NAME:
        return pinned(shaped) if pin_memory else shaped
    if pin_memory:
        raise RuntimeError("Only dense CPU tensors can be pinned")
    return to_device(shaped)


def pinned(tensor: Tensor) -> Tensor:
    """Its memory counts as pinned from now on."""
    _pinned[tensor.untyped_storage().data_ptr()] = tensor
    return tensor


def to_copy(
    self: Tensor,
    *,
    dtype: Any = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: Any = None,
    non_blocking: bool = False,
    memory_format: Any = None,
) -> Tensor:
    # As CUDA's and XPU's: what goes to the host without blocking arrives in pinned memory.
    if device is not None and device.type == "cpu":
        pin = bool(pin_memory) or non_blocking
        made = empty_like(
            self, dtype=dtype, device=device, pin_memory=pin, memory_format=memory_format
        )
        return copy_from(self, made, non_blocking)
    kept = memory_format or torch.preserve_format
    made = torch.empty_like(self, dtype=dtype, device=device or self.device, memory_format=kept)
    return copy_from(self, made, non_blocking)
