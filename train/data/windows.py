"""Sequences of one length, cut from files of tokens.

Documents are packed: a file is read as one stream, with whatever separates its documents as it
stands there, and window i holds tokens i·length … (i + 1)·length, both included. Neighbours share a
token, the last target of one being the first input of the next, so that every token of a file but
its first, and a tail shorter than `length`, is a target exactly once. No window spans two files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from largebatch.train.data.sampler import Indices
from largebatch.train.data.token_files import TokenFile


@dataclass(frozen=True)
class Windows:
    """The windows of some files, one file's after another's.

    Attributes:
        length: targets of a window, which holds a token more.
        vocabulary: what the ids must be below.
    """

    files: Sequence[TokenFile]
    length: int
    vocabulary: int

    @cached_property
    def ends(self) -> Indices:
        """Where each file's windows end among all."""
        counts = [max(len(file.tokens) - 1, 0) // self.length for file in self.files]
        return np.cumsum(counts, dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, indices: Indices) -> npt.NDArray[np.int64]:
        """The tokens of windows `indices`; shape (count, length + 1). Reads those alone."""
        found = np.empty((len(indices), self.length + 1), np.int64)
        file_of = np.searchsorted(self.ends, indices, side="right")
        for number in np.unique(file_of):
            here = file_of == number
            first = self.ends[number - 1] if number else 0
            starts = (indices[here] - first) * self.length
            tokens = self.files[number].read(starts, self.length + 1)
            self._check(self.files[number], tokens, starts)
            found[here] = tokens
        return found

    def _check(self, file: TokenFile, tokens: npt.NDArray[np.int64], starts: Indices) -> None:
        strange = (tokens < 0) | (tokens >= self.vocabulary)
        if strange.any():
            sample, place = np.argwhere(strange)[0]
            token, place = tokens[sample, place], starts[sample] + place
            kind = file.tokens.dtype.name
            raise ValueError(
                f"{file.path} holds the token {token} at place {place} "
                f"(read as {kind}), and task.vocabulary is {self.vocabulary}: ids must be from 0 "
                f"to {self.vocabulary - 1}; raise it, or see whether the file is what it should be"
            )

    def probe(self) -> None:
        """Read the first, the middle and the last window of each file, as `read` does."""
        first = 0
        for end in self.ends.tolist():
            if end > first:
                self.read(np.array([first, (first + end) // 2, end - 1]))
            first = end


@dataclass(frozen=True)
class Span:
    """`size` windows of a source, from window `first` on."""

    windows: Windows
    first: int
    size: int


def read_spans(spans: Sequence[Span], indices: Indices) -> npt.NDArray[np.int64]:
    """The tokens at `indices` of the spans' windows, one span's after another's; shape
    (count, length + 1).
    """
    found = np.empty((len(indices), spans[0].windows.length + 1), np.int64)
    begin = 0
    for span in spans:
        here = (begin <= indices) & (indices < begin + span.size)
        if here.any():
            found[here] = span.windows.read(indices[here] - begin + span.first)
        begin += span.size
    return found
