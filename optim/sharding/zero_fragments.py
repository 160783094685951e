"""The layout of tensors in the flat FP32 tensors of a DeepSpeed optimizer.

In ZeRO stages 1 and 2 all tensors of a parameter group lie end to end in one buffer; each rank has
an equal part of it in FP32. In stage 3 every tensor is cut into equal slices, one a rank, and a
rank's flat tensor holds its slices of the tensors of a sub-group. Here this is read from the
attributes that DeepSpeed keeps as of its version 0.19.8, checked over all ranks together, and
refused where it is not understood.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from largebatch.optim.base import Group
from largebatch.optim.sharding.messages import all_gather_json

Names = dict[Tensor, str]


@dataclass(frozen=True)
class Fragment:
    """What this rank's flat tensor holds of one tensor: one stretch, counted in elements."""

    tensor: int
    """Index into `Flat.names`."""
    tensor_start: int
    """Where the stretch begins in the tensor."""
    flat_start: int
    """Where it begins in the flat tensor."""
    length: int


@dataclass(frozen=True)
class Flat:
    """One flat FP32 tensor that DeepSpeed gives to the optimizer as a parameter."""

    tensor: Tensor
    group: Group
    """The parameter group that it is stepped in."""
    names: tuple[str, ...]
    """Of all tensors that it is made of, on whatever rank they lie."""
    shapes: tuple[torch.Size, ...]
    fragments: tuple[Fragment, ...]


def refusal(found: str) -> RuntimeError:
    version = getattr(sys.modules.get("deepspeed"), "__version__", "of unknown version")
    return RuntimeError(
        f"LARS and LAMB cannot be bound in this DeepSpeed {version} engine, found {found}; "
        "supported are ZeRO stages 0 to 3 as in DeepSpeed 0.19.8, data-parallel, with the "
        "optimizer's state in memory"
    )


def read_flats(zero: Any, names: Names) -> tuple[list[Flat], ProcessGroup]:
    """This rank's flat tensors in DeepSpeed's optimizer, and the ranks that have the others.

    Args:
        names: of the model's parameters.

    Raises:
        RuntimeError: on all ranks, if any of them finds what is not known here.
    """
    kind = type(zero).__name__
    if kind not in READERS:
        raise refusal(f"an optimizer wrapped in {kind}")
    if getattr(zero, "swap_optimizer", False):
        raise refusal("optimizer state offloaded to NVMe")
    if getattr(zero, "zenflow", False):
        raise refusal("ZenFlow")
    if getattr(zero, "torch_autocast_gradscaler", None) is not None:
        # Each rank, and each group, would decide for itself whether to skip a step.
        raise refusal("torch autocast to fp16, with a GradScaler")
    attribute, read = READERS[kind]
    groups = set(getattr(zero, attribute, ()))
    if len(groups) != 1 or not all(isinstance(group, ProcessGroup) for group in groups):
        raise refusal(f"{kind}.{attribute} with {len(groups)} process groups instead of one")
    ranks: ProcessGroup = groups.pop()

    flats = _agreed(lambda: read(zero, names, ranks), ranks)
    _require_reducible(flats, ranks)
    return flats, ranks


# One rank's view --------------------------------------------------------------------------------

Reader = Callable[[Any, Names, ProcessGroup], Iterator[Flat]]


def _read_partitions(
    attributes: tuple[str, str, str], zero: Any, names: Names, ranks: ProcessGroup
) -> Iterator[Flat]:
    """Stages 1 and 2; the attributes are the groups' tensors, their buffers and FP32 partitions.

    A tensor is a view of the buffer, so its place in it is read off its memory. DeepSpeed's own
    table of fragments (`_hp_mapping`) is not used: it has the tensors in the order of the group,
    which `round_robin_gradients` changes.
    """
    for group, params, buffer, flat in zip(
        zero.optimizer.param_groups,
        *(getattr(zero, attribute) for attribute in attributes),
        strict=True,
    ):
        size = flat.numel()
        if len(group["params"]) != 1 or group["params"][0] is not flat:
            raise ValueError("a parameter group that is not its one flat partition")
        if buffer.numel() != size * ranks.size():
            raise ValueError(f"{ranks.size()} partitions of {size} for {buffer.numel()} elements")
        fragments = []
        for tensor, param in enumerate(params):
            start = _place(param, buffer) - ranks.rank() * size  # of the tensor, in the partition
            first, end = max(start, 0), min(start + param.numel(), size)
            if first < end:
                fragments.append(Fragment(tensor, first - start, first, end - first))
        shapes = tuple(param.shape for param in params)
        yield Flat(flat, group, _names_of(params, names), shapes, tuple(fragments))


def _place(param: Tensor, buffer: Tensor) -> int:
    """The element of the buffer at which a tensor, a view of it, begins."""
    inside = param.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
    if not inside or not param.is_contiguous() or param.dtype != buffer.dtype:
        raise ValueError("a tensor that is no view of its group's flat buffer")
    return int(param.storage_offset() - buffer.storage_offset())


def _read_slices(zero: Any, names: Names, ranks: ProcessGroup) -> Iterator[Flat]:
    """Stage 3. A slice's padding is in no fragment: it holds whatever was in the memory."""
    sub_groups = zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
    for sub_group, (params, flat) in enumerate(sub_groups):
        fragments = []
        for tensor, param in enumerate(params):
            its_sub_group, flat_start, length = zero.grad_position[zero.get_param_id(param)]
            if its_sub_group != sub_group or length != param.ds_tensor.ds_numel:
                raise ValueError("a grad_position that is not that of the rank's slice")
            start = ranks.rank() * length
            held = min(length, param.ds_numel - start)
            if held > 0:
                fragments.append(Fragment(tensor, start, flat_start, held))
        group = zero.optimizer.param_groups[zero.sub_group_to_group_id[sub_group]]
        shapes = tuple(param.ds_shape for param in params)
        yield Flat(flat, group, _names_of(params, names), shapes, tuple(fragments))


def _names_of(params: list[Tensor], names: Names) -> tuple[str, ...]:
    if not all(param in names for param in params):
        raise ValueError("a parameter that is not one of the engine's module")
    return tuple(names[param] for param in params)


ZERO = ("bit16_groups", "bit16_groups_flat", "single_partition_of_fp32_groups")
BF16 = ("bf16_groups", "bf16_groups_flat", "fp32_groups_flat_partition")

# By class: where the process groups are kept, and what reads the flat tensors.
READERS: dict[str, tuple[str, Reader]] = {
    "DeepSpeedZeroOptimizer": ("real_dp_process_group", partial(_read_partitions, ZERO)),
    "BF16_Optimizer": ("real_dp_process_group", partial(_read_partitions, BF16)),
    "DeepSpeedZeroOptimizer_Stage3": ("sub_group_process_groups", _read_slices),
}


# All ranks together -----------------------------------------------------------------------------


def _agreed(read: Callable[[], Iterable[Flat]], ranks: ProcessGroup) -> list[Flat]:
    """This rank's flat tensors, if those of all ranks together hold every element exactly once."""
    flats: list[Flat] = []
    problem = None
    try:
        flats = list(read())
        problem = next(filter(None, map(_misfit, flats)), None)
    except Exception as error:  # of any kind: the other ranks wait for this one's report
        problem = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    own = [[astuple(fragment) for fragment in flat.fragments] for flat in flats]
    reports = [
        (found, [tuple(Fragment(*numbers) for numbers in one) for one in there])
        for found, there in all_gather_json((problem, own), ranks)
    ]

    for rank, (found, _) in enumerate(reports):
        if found is not None:
            raise refusal(f"{found} on rank {rank}")
    for index, flat in enumerate(flats):
        _require_complete(flat, [flats_there[index] for _, flats_there in reports])
    return flats


def _misfit(flat: Flat) -> str | None:
    """What is wrong with one rank's fragments: they overlap, or lie outside."""
    end = 0
    for fragment in sorted(flat.fragments, key=lambda fragment: fragment.flat_start):
        if fragment.flat_start < end:
            return f"{flat.names[fragment.tensor]} overlapping another tensor"
        end = fragment.flat_start + fragment.length
    return "tensors beyond the end of their flat one" if end > flat.tensor.numel() else None


def _require_complete(flat: Flat, fragments_of_ranks: list[tuple[Fragment, ...]]) -> None:
    """Refuse a tensor with an element in no rank's fragment, or in more than one."""
    starts, ends = defaultdict(list), defaultdict(list)
    for fragment in chain.from_iterable(fragments_of_ranks):
        starts[fragment.tensor].append(fragment.tensor_start)
        ends[fragment.tensor].append(fragment.tensor_start + fragment.length)
    for tensor, (name, shape) in enumerate(zip(flat.names, flat.shapes, strict=True)):
        # Stretches follow each other without gap or overlap where each begins as another ends.
        if sorted([*starts[tensor], shape.numel()]) != sorted([0, *ends[tensor]]):
            stretches = sorted(zip(starts[tensor], ends[tensor], strict=True))
            raise refusal(f"{name} of {shape.numel()} elements in the stretches {stretches}")


def _require_reducible(flats: list[Flat], ranks: ProcessGroup) -> None:
    """Refuse tensors on a device that the ranks cannot sum over, as state offloaded to the host."""
    devices = {flat.tensor.device.type for flat in flats}
    backends = dist.get_backend_config(ranks)  # such as cpu:gloo,cuda:nccl
    if not devices <= {backend.split(":")[0] for backend in backends.split(",")}:
        raise refusal(
            f"FP32 weights on {', '.join(sorted(devices))} with the process group {backends!r}, "
            "not one for both devices such as 'cpu:gloo,cuda:nccl',"
        )
