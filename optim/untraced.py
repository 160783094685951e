"""Functions that torch.compile leaves as they are, and how a process does without torch._dynamo.

`torch._compile._disable_dynamo` is what torch marks its optimizers' methods with. The first call
of what it marks imports torch._dynamo, and with it torch.fx, torch.distributed.fsdp and sympy: some
800 files, and most of the time of `import torch`, for a process that may compile nothing.
"""

from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from torch._compile import _disable_dynamo
from torch.optim import Optimizer

_P = ParamSpec("_P")
_T = TypeVar("_T")

_OF_TORCH: Final = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")

_untraced: list[Callable[..., object]] = []


def untraced(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Mark a function that a compiled caller runs uncompiled."""
    _untraced.append(function)
    return _disable_dynamo(function)


def leave_out_dynamo() -> None:
    """Have such functions, and those of torch's Optimizer, called directly from now on.

    For a process that compiles nothing: compiled code would trace into them. The mark keeps what it
    calls in an attribute of the function, where this puts the function itself; without effect in a
    torch that keeps it elsewhere. The steps of torch's own optimizers import torch._dynamo anyway.
    """
    marked = (getattr(Optimizer, name) for name in _OF_TORCH)
    inner = (getattr(function, "__wrapped__", None) for function in marked)
    for function in (*_untraced, *inner):
        if function is not None:
            vars(function).setdefault("__dynamo_disable", function)
