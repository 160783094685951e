"""Every operator of the rehearsal's device: the CPU's, on the same memory.

Devices that are mixed raise, as on an accelerator; what makes the host wait (a number read, a shape
that depends on numbers), and what XPU sends to the host, is counted.
"""

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from rehearsal_copies import (
    CPU,
    CPU_KEYS,
    NAME,
    deliver,
    give,
    is_here,
    to_device,
    to_host,
    view,
    wait,
)
from rehearsal_log import log, place
from torch import Tensor

# What XPU's operators of torch 2.10 hand to the host (torch-xpu-ops f00322c), by base name, and
# what is assumed to belong to it (geqrf and below).
_XPU_ON_THE_HOST_NAMES = """
    _linalg_eigh linalg_qr linalg_cholesky_ex cholesky cholesky_inverse _linalg_svd dot vdot
    geqrf linalg_eig linalg_householder_product linalg_lu_factor_ex _linalg_det triangular_solve
    linalg_lstsq
"""
XPU_ON_THE_HOST = frozenset(_XPU_ON_THE_HOST_NAMES.split())
# What CUDA's do on the device, and then read whether they have succeeded.
CUDA_CHECKED = frozenset(["_linalg_eigh", "_linalg_svd", "linalg_eig"])

# What torch composes of other operators, where a device has no kernel; XPU and CUDA have.
OF_DEVICES = ("silu_backward",)

_INDEXED = frozenset(["index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"])

hosted: set[str] = set()
"""Operators that this device sends to the host."""
checked: set[str] = set()
"""Operators after which the host waits for this device."""


@cache
def _traits(op: Any) -> SimpleNamespace:
    schema = op._schema
    returned = []
    for value in schema.returns:
        alias = value.alias_info
        if alias is None or not alias.is_write:
            returned.append(None)
            continue
        written = (a for a in schema.arguments if a.alias_info is not None)
        (name,) = [a.name for a in written if a.alias_info.before_set == alias.before_set]
        returned.append(name)
    base = schema.name.split("::")[1]
    tags = torch.Tag
    return SimpleNamespace(
        names=[argument.name for argument in schema.arguments],
        returned=returned,
        is_view=any(v.alias_info is not None and not v.alias_info.is_write for v in schema.returns),
        base=base,
        takes_scalars=tags.pointwise in op.tags or base.startswith("_foreach"),
        waits=tags.dynamic_output_shape in op.tags or tags.data_dependent_output in op.tags,
    )


class _Call:
    """One call of an operator, its tensors replaced by CPU tensors over the same memory."""

    def __init__(self, op: Any, traits: SimpleNamespace) -> None:
        self.op, self.traits = op, traits
        self.sources: dict[int, Tensor] = {}  # by address
        self.fresh: list[tuple[Tensor, Tensor]] = []  # `out`, to be sized by the operator

    def host(self, value: Any, written: bool = False) -> Any:
        if isinstance(value, Tensor):
            if is_here(value):
                return self._alias(value, written)
            if value.device.type == "cpu" and value.dim():
                self._foreign(value)
            return value
        if type(value) in (list, tuple):
            return type(value)(self.host(each) for each in value)
        return CPU if isinstance(value, torch.device) and value.type == NAME else value

    def _alias(self, value: Tensor, written: bool) -> Tensor:
        if written and value.numel() == 0:
            self.fresh.append((value, torch.empty(0, dtype=value.dtype)))
            return self.fresh[-1][1]
        self.sources[value.untyped_storage().data_ptr()] = value
        return to_host(value)

    def _foreign(self, value: Tensor) -> None:
        if self.traits.base not in _INDEXED:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {self.op} got one on "
                f"{NAME}:0 and one of shape {tuple(value.shape)} on cpu"
            )
        log.uploads["waiting upload", place()] += 1

    def back(self, value: Any, given: Any) -> Any:
        """A result on the device; `given` where the operator returns what it was given."""
        if given is not None:
            return given
        if isinstance(value, Tensor):
            own = None
            if value.numel():
                own = self.sources.get(value.untyped_storage().data_ptr())
            if own is None:
                return to_device(value)
            return view(own, value.size(), value.stride(), value.storage_offset())
        if isinstance(value, list | tuple):
            return type(value)(self.back(each, None) for each in value)
        return value


def run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Any operator, by torch's fallback of the device."""
    log.operators += 1
    traits = _traits(op)
    if traits.is_view:
        return op.redispatch(CPU_KEYS, *args, **kwargs)
    call = _Call(op, traits)
    written = traits.returned
    host_args = [call.host(v, n in written) for v, n in zip(args, traits.names, strict=False)]
    host_kwargs = {name: call.host(value, name in written) for name, value in kwargs.items()}
    if kwargs.get("pin_memory"):
        raise RuntimeError("only dense CPU tensors can be pinned")
    _count(traits, args)
    result = op(*host_args, **host_kwargs)
    for ours, sized in call.fresh:
        if sized.numel():
            give(ours, to_device(sized))
    if not written:
        return None
    if written == [None]:
        return call.back(result, None)
    given = dict(zip(traits.names, args, strict=False)) | kwargs
    if len(written) == 1:
        return call.back(result, given.get(written[0]))
    return tuple(call.back(v, given.get(n)) for v, n in zip(result, written, strict=True))


def _count(traits: SimpleNamespace, args: tuple[Any, ...]) -> None:
    base = traits.base.removesuffix("_out")
    if traits.waits or base in checked:
        wait(base)
    elif base in _INDEXED and any(i is not None and i.dtype is torch.bool for i in args[1]):
        wait(f"{base} by a mask")
    if base in hosted:
        log.hosted[base, place()] += 1
        deliver()


# Autocast: torch's lists, as far as models here use them ------------------------------------------

_LOWER_NAMES = """
    mm bmm addmm addbmm baddbmm addmv mv matmul linear conv1d conv2d conv3d
    conv_transpose2d.input scaled_dot_product_attention prelu
"""
LOWER = frozenset(_LOWER_NAMES.split())
_FULL_NAMES = """
    layer_norm native_layer_norm group_norm log_softmax.int softmax.int nll_loss
    cross_entropy_loss mse_loss exp log log2 log10 log1p expm1 rsqrt pow.Tensor_Scalar
    pow.Tensor_Tensor reciprocal sum sum.dim_IntList prod cumsum norm.Scalar norm.ScalarOpt_dim
    binary_cross_entropy_with_logits cosine_similarity smooth_l1_loss kl_div softplus
"""
FULL = frozenset(_FULL_NAMES.split())
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)


def casting(name: str, lower: bool) -> Callable[..., Any]:
    """An operator under autocast, in the lower precision or in FP32."""
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.aten, base), overload or "default")

    def cast(value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, Tensor):
            casts = is_here(value) and value.is_floating_point() and value.dtype != torch.float64
            return value.to(dtype) if casts else value
        return [cast(each, dtype) for each in value] if isinstance(value, list) else value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            dtype = torch.get_autocast_dtype(NAME) if lower else torch.float32
            named = {key: cast(value, dtype) for key, value in kwargs.items()}
            return op(*(cast(value, dtype) for value in args), **named)

    return kernel
