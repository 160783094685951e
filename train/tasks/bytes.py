"""Language modelling on the bytes of the Python standard library's own source: real text, no
download.

The text differs between Python versions, so its hash travels in every record; compare ratios
between versions, not steps.
"""

import hashlib
import os
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.schedules import whole_number
from largebatch.train.data.sampler import Indices, random_words
from largebatch.train.tasks import Batch

VOCABULARY: Final = 96
"""Newline, and the 95 printable ASCII characters; every other byte is read as '?'."""

_BLOCK: Final = 1024
_EVAL_EVERY: Final = 32
"""One block of 1,024 bytes in 32 is held out for evaluation; no training window touches it."""

_ALWAYS_EVAL: Final = 4096
"""Windows of the evaluation set that are drawn from any text, however short."""

_SKIPPED: Final = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def _source_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - _SKIPPED)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


@lru_cache(maxsize=2)
def _text(num_bytes: int) -> bytes:
    root = Path(sysconfig.get_path("stdlib"))
    parts, length = [], 0
    for path in _source_files(root):
        parts.append(path.read_bytes())
        length += len(parts[-1])
        if length >= num_bytes:
            return b"".join(parts)[:num_bytes]
    raise ValueError(
        f"task.num_bytes must be at most {length}, the size of this Python's library, "
        f"got {num_bytes}"
    )


def _symbols(text: bytes) -> npt.NDArray[np.uint8]:
    table = np.full(256, ord("?") - 31, np.uint8)
    table[32:127] = np.arange(1, VOCABULARY)
    table[ord("\n")] = 0
    return table[np.frombuffer(text, np.uint8)]


class Bytes:
    """Predict the next byte from the `context` bytes before it; the loss is in nats per byte.

    Training windows are drawn with replacement; the evaluation windows are the same `num_eval` for
    every seed.

    Raises:
        ValueError: a size that is no whole number, or more text than the library has.
    """

    replacement = True

    def __init__(self, num_bytes: int = 2_000_000, context: int = 8, num_eval: int = 4096) -> None:
        num_bytes = whole_number(num_bytes, "task.num_bytes", _BLOCK * _EVAL_EVERY)
        self.context = whole_number(context, "task.context", 1)
        self.num_eval = whole_number(num_eval, "task.num_eval", 1)
        if self.context >= _BLOCK:
            raise ValueError(f"task.context must be below {_BLOCK}, got {self.context}")
        text = _text(num_bytes)
        self._hash = hashlib.sha256(text).hexdigest()
        self._symbols = _symbols(text)
        blocks = np.arange(num_bytes // _BLOCK, dtype=np.int64)
        held_out = blocks % _EVAL_EVERY == _EVAL_EVERY - 1
        self._train_blocks, self._eval_blocks = blocks[~held_out], blocks[held_out]
        # A window of context + 1 bytes lies within one block.
        self._starts_per_block = _BLOCK - self.context
        self.num_train = len(self._train_blocks) * self._starts_per_block
        num_starts = len(self._eval_blocks) * self._starts_per_block
        if self.num_eval > max(num_starts, _ALWAYS_EVAL):
            raise ValueError(
                f"task.num_eval must be at most {max(num_starts, _ALWAYS_EVAL)}, the windows that "
                f"are held out of {num_bytes} bytes, got {self.num_eval}"
            )
        words = random_words(0, 0, np.arange(self.num_eval, dtype=np.int64))
        self._eval_windows = (words % np.uint64(num_starts)).astype(np.int64)

    def train_batch(self, indices: Indices) -> Batch:
        return self._windows(self._train_blocks, indices)

    def eval_batch(self, indices: Indices) -> Batch:
        return self._windows(self._eval_blocks, self._eval_windows[indices])

    def _windows(self, blocks: Indices, indices: Indices) -> Batch:
        block, offset = np.divmod(indices, self._starts_per_block)
        starts = blocks[block] * _BLOCK + offset
        windows = self._symbols[starts[:, None] + np.arange(self.context + 1)]
        symbols = torch.from_numpy(windows).long()  # (samples, context + 1)
        return symbols[:, :-1], symbols[:, -1]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        context, following = batch
        return cross_entropy(model(context), following)

    def provenance(self) -> Mapping[str, str]:
        source = f"standard library of Python {platform.python_version()}"
        return {"data": f"{len(self._symbols)} bytes of the {source}", "data_hash": self._hash}
