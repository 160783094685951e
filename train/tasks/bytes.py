"""Language modelling on bytes of text that is there wherever this trains: sources of the packages
that training needs (`package_text.py`).
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.schedules import whole_number
from largebatch.train.data.sampler import Indices, random_words
from largebatch.train.tasks import Batch
from largebatch.train.tasks.package_text import package_text, package_versions

VOCABULARY: Final = 96
"""Newline, and the 95 printable ASCII characters; every other byte is read as '?'."""

Symbols = npt.NDArray[np.uint8]


@lru_cache(maxsize=4)  # a study makes its task for each run
def _symbols(text: bytes) -> Symbols:
    table = np.full(256, ord("?") - 31, np.uint8)
    table[32:127] = np.arange(1, VOCABULARY)
    table[ord("\n")] = 0
    symbols = table[np.frombuffer(text, np.uint8)]
    symbols.setflags(write=False)
    return symbols


class Bytes:
    """Predict the next byte from the `context` bytes before it; the loss is in nats per byte.

    Training windows are drawn with replacement from the first `num_bytes` of the training text. The
    evaluation windows lie in files that are no part of it, and are the same `num_eval` for every
    seed and `num_bytes`.

    Raises:
        ConfigError: a package that the text comes from is not installed.
        ValueError: a size that is no whole number, or more text than there is.
    """

    replacement = True
    _context_key = "task.context"

    def __init__(self, num_bytes: int = 2_000_000, context: int = 8, num_eval: int = 4096) -> None:
        num_bytes = whole_number(num_bytes, "task.num_bytes", 2)
        self.context = whole_number(context, self._context_key, 1)
        self.num_eval = whole_number(num_eval, "task.num_eval", 1)
        text = package_text(num_bytes)
        self._hash = text.hash
        self._train, self._held_out = _symbols(text.train), _symbols(text.held_out)
        shorter = min(len(self._train), len(self._held_out))
        if self.context >= shorter:
            raise ValueError(
                f"{self._context_key} must be below {shorter}, the bytes of the training or "
                f"the held-out text, got {self.context}"
            )
        self.num_train = len(self._train) - self.context
        num_starts = len(self._held_out) - self.context
        if self.num_eval > num_starts:
            raise ValueError(
                f"task.num_eval must be at most {num_starts}, the windows that are held out, got "
                f"{self.num_eval}"
            )
        words = random_words(0, 0, np.arange(self.num_eval, dtype=np.int64))
        self._eval_starts = (words % np.uint64(num_starts)).astype(np.int64)

    def train_batch(self, indices: Indices) -> Batch:
        return self._windows(self._train, indices)

    def eval_batch(self, indices: Indices) -> Batch:
        return self._windows(self._held_out, self._eval_starts[indices])

    def _windows(self, text: Symbols, starts: Indices) -> Batch:
        windows = text[starts[:, None] + np.arange(self.context + 1)]
        symbols = torch.from_numpy(windows).long()  # (samples, context + 1)
        return symbols[:, :-1], symbols[:, -1]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        context, following = batch
        return cross_entropy(model(context), following)

    def provenance(self) -> Mapping[str, str]:
        words = f"{len(self._train)} bytes of the sources of {package_versions()}"
        return {"data": words, "data_hash": self._hash}
