"""A rehearsal accelerator: a device of its own, in plain Python, whose memory is the host's.

It is torch's PrivateUse1, so `torch.accelerator` finds it, and the loop and the optimizers take
the ways of a device. Its module has exactly the names of torch.xpu, or of torch.cuda. What it
cannot show: speed, kernels' own numerics, true concurrency of streams, `device.type == "xpu"`.

`install` holds for the process, for good: call it in one of its own. It rests on private parts of
torch 2.13 (`RIGHT_TORCH`).
"""

import sys
import types
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import rehearsal_copies as copies
import rehearsal_operators as operators
import torch
from rehearsal_copies import NAME, deliver, has_arrived, sent, wait
from rehearsal_log import is_beside, log, place

RIGHT_TORCH = torch.__version__.startswith("2.13.")
WHY_NOT = f"the rehearsal accelerator rests on private parts of torch 2.13, not {torch.__version__}"

_TITLE = "Rehearsal accelerator"


class Event:
    """Copies sent off before it was recorded have arrived when it has."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._upto = self._operators = 0
        self.device = torch.device(NAME, 0)

    def record(self, stream: Any = None) -> None:
        self._upto, self._operators = sent(), log.operators

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return has_arrived(self._upto)

    def synchronize(self) -> None:
        if self._operators == log.operators:  # nothing since: all that there is, is waited for
            wait("event, just recorded")
        else:
            if not is_beside():
                log.events["event", place()] += 1
            deliver(self._upto)

    def elapsed_time(self, other: "Event") -> float:
        return 1.0


class Stream:
    """Of a device that does everything at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = torch.device(NAME, 0)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record()
        return event

    def synchronize(self) -> None:
        wait("stream")

    def query(self) -> bool:
        return True


def _pass(*args: Any, **kwargs: Any) -> None: ...


_MEMORY: dict[str, Any] = {
    "mem_get_info": lambda device=None: (log.limit - log.allocated, log.limit),
    "memory_allocated": lambda device=None: log.allocated,
    "max_memory_allocated": lambda device=None: log.peak,
    "memory_reserved": lambda device=None: log.allocated,
    "max_memory_reserved": lambda device=None: log.peak,
    "reset_peak_memory_stats": lambda device=None: setattr(log, "peak", log.allocated),
    "empty_cache": _pass,
}
_generator = torch.default_generator  # the device has none of its own
_SERVED: dict[str, Any] = {
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "_initialized": True,
    "init": _pass,
    "_lazy_init": _pass,
    "_is_in_bad_fork": lambda: False,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": _pass,
    "device": lambda device=None: nullcontext(),
    "synchronize": lambda device=None: wait("synchronize"),
    "get_device_name": lambda device=None: _TITLE,
    "get_device_properties": lambda device=None: SimpleNamespace(
        name=_TITLE, total_memory=log.limit
    ),
    "is_bf16_supported": lambda *_: True,
    "manual_seed": _generator.manual_seed,
    "manual_seed_all": _generator.manual_seed,
    "seed": _generator.seed,
    "get_rng_state": lambda device=None: _generator.get_state(),
    "set_rng_state": lambda state, device=None: _generator.set_state(state),
    "current_stream": lambda device=None: Stream(),
    "stream": lambda stream: nullcontext(),
    "set_stream": _pass,
    "Stream": Stream,
    "Event": Event,
    **_MEMORY,
}
# What torch itself asks of a device that is not built in; torch.xpu has it elsewhere.
_FOR_TORCH = {"get_amp_supported_dtype": lambda: [torch.float16, torch.bfloat16, torch.float32]}


class Module(types.ModuleType):
    """Has the names of another device's module and no others."""

    def __init__(self, like: types.ModuleType) -> None:
        super().__init__(f"torch.{NAME}")
        self.__dict__["like"] = like

    def __getattr__(self, name: str) -> Any:
        asker = sys._getframe(1).f_globals.get("__name__", "")
        if name in _FOR_TORCH and asker.startswith("torch."):
            return _FOR_TORCH[name]
        like = self.__dict__["like"]
        if name.startswith("__") or not hasattr(like, name):
            raise AttributeError(f"module {like.__name__!r} has no attribute {name!r}")
        if name not in _SERVED:
            raise NotImplementedError(f"{like.__name__} has {name}, the rehearsal does not")
        return _SERVED[name]


class _AnyEvent(torch.Event):
    """torch.Event, also for this device."""

    def __new__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
        if device is not None and torch.device(device).type == NAME:
            return Event()
        return super().__new__(cls, device, *args, **kwargs)


_libraries: list[torch.library.Library] = []  # which end with their last reference


def install(like: str = "xpu") -> None:
    """Make the device known to torch in this process, once and for good.

    Args:
        like: "xpu" or "cuda": whose names its module has, and which operators it sends to the host.
    """
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if _libraries:
        return
    module = Module(getattr(torch, like))
    operators.hosted.update(operators.XPU_ON_THE_HOST if like == "xpu" else ())
    operators.checked.update(operators.CUDA_CHECKED if like == "cuda" else ())
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    rest = torch.library.Library("_", "IMPL")
    rest.fallback(operators.run, "PrivateUse1")
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    own = torch.library.Library("aten", "IMPL")
    kernels = {
        "_copy_from": copies.copy_from,
        "_to_copy": copies.to_copy,
        "empty_like": copies.empty_like,
        "is_pinned": lambda self, device=None: False,
        "record_stream": lambda self, stream: None,
        "resize_": copies.resize_,
        "set_.source_Storage_storage_offset": copies.set_,
    }
    for name, kernel in kernels.items():
        own.impl(name, kernel, "PrivateUse1")
    for name in operators.OF_DEVICES:
        op = getattr(torch.ops.aten, name).default
        own.impl(name, partial(operators.run, op), "PrivateUse1")
    for names, lower in ((operators.LOWER, True), (operators.FULL, False)):
        for name in names:
            own.impl(name, operators.casting(name, lower), "AutocastPrivateUse1")
    _libraries.extend([rest, own])
    torch.Event = _AnyEvent  # type: ignore[misc, assignment]
    torch.accelerator.synchronize = _SERVED["synchronize"]
    for name, value in _MEMORY.items():
        if hasattr(torch.accelerator, name):
            setattr(torch.accelerator, name, value)
    if hasattr(torch.accelerator, "get_memory_info"):
        torch.accelerator.get_memory_info = _MEMORY["mem_get_info"]
