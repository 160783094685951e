"""JSON messages between the ranks of a process group.

Torch's own collectives of objects unpickle what comes in, so that whoever can write to a rank's
socket runs code in it.
"""

import json
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def broadcast_json(value: Any = None, source: int = 0) -> Any:
    """Return one rank's `value` on every rank of the default group: anything that JSON holds."""
    data = _tensor(value, None)
    length = torch.tensor([len(data)], device=data.device)
    dist.broadcast(length, source)
    if dist.get_rank() != source:
        data = torch.empty(int(length), dtype=torch.uint8, device=data.device)
    dist.broadcast(data, source)
    return _value(data)


def first_words(words: str) -> str:
    """Return on every rank the first rank's words that are not empty; over the default group."""
    silent = dist.get_world_size()
    first = torch.tensor([dist.get_rank() if words else silent], device=_device(None))
    dist.all_reduce(first, dist.ReduceOp.MIN)
    return "" if int(first) == silent else str(broadcast_json(words, int(first)))


def all_gather_json(value: Any, group: ProcessGroup) -> list[Any]:
    """Return the `value` of each rank of `group`, on every rank of it."""
    data = _tensor(value, group)
    lengths = torch.zeros(group.size(), dtype=torch.int64, device=data.device)
    lengths[group.rank()] = len(data)
    dist.all_reduce(lengths, group=group)
    most = int(lengths.max())
    padded = torch.zeros(most, dtype=torch.uint8, device=data.device)
    padded[: len(data)] = data
    found = [torch.empty_like(padded) for _ in range(group.size())]
    dist.all_gather(found, padded, group=group)
    return [_value(one[:length]) for one, length in zip(found, lengths.tolist(), strict=True)]


def all_have(words: str) -> bool:
    """Whether all ranks of the default group say the same words; an all-reduce of two numbers."""
    number = int.from_bytes(blake2b(words.encode(), digest_size=7).digest())
    # The greatest, and the least with its sign turned.
    extremes = torch.tensor([number, -number], device=_device(None))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    most, least = extremes.tolist()
    return bool(most == -least)


def _tensor(value: Any, group: ProcessGroup | None) -> Tensor:
    """As bytes, on the device whose tensors the group takes."""
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return text.to(_device(group))


def _device(group: ProcessGroup | None) -> torch.device:
    if "cpu" in dist.get_backend_config(group):
        return torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator()
    assert accelerator is not None
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _value(data: Tensor) -> Any:
    return json.loads(data.cpu().numpy().tobytes())
