"""Megatron-LM's indexed datasets: PREFIX.bin holds tokens and nothing else, PREFIX.idx says what
they are.

An index is, little-endian and without padding: the magic `MMIDIDX\\0\\0`; a version, u64, 1; the
code of the tokens' type, u8; the numbers of sequences, u64, and of document indices, u64; each
sequence's length in tokens, i32; each sequence's first byte in the .bin, i64; the sequence each
document begins with, i64, and at the end the number of sequences. (What IndexedDataset of
megatron/core/datasets writes. Multimodal sets append a byte a sequence, and are refused.)
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from largebatch.train.data.mapping import FileMap

MAGIC: Final = b"MMIDIDX\0\0"
HEADER: Final = struct.Struct("<9sQBQQ")
DTYPES: Final = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
FLOATS: Final = {6: "float64", 7: "float32"}

_STRETCH: Final = 4096
_STRETCHES: Final = 16


@dataclass(frozen=True)
class Index:
    """An index file, its arrays left where they are.

    Attributes:
        lengths: tokens of each sequence, int32.
        pointers: first byte of each sequence in the .bin, int64.
        documents: first sequence of each document, then the number of sequences, int64.
    """

    path: Path
    dtype: str
    lengths: npt.NDArray[np.int32]
    pointers: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    mapping: FileMap


def open_index(path: Path) -> Index:
    """The index at `path`, its counts checked against its size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if not head.startswith(MAGIC):
        raise ValueError(
            f"{path} is no index of a Megatron dataset: it begins with {head[:9]!r}, not with "
            f"{MAGIC!r}"
        )
    if len(head) < HEADER.size:
        raise ValueError(
            f"{path} is cut short: it holds {size} bytes, and its header alone {HEADER.size}"
        )
    _, version, code, num_sequences, num_documents = HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{path} is a Megatron index of version {version}; only 1 is known")
    if code not in DTYPES:
        kind = FLOATS.get(code, "an unknown type")
        raise ValueError(
            f"{path} is an index over values of {kind} (code {code}), and tokens are of "
            f"{', '.join(DTYPES.values())}"
        )
    implied = HEADER.size + 12 * num_sequences + 8 * num_documents
    if size != implied:
        raise ValueError(
            f"{path} holds {size} bytes, and its counts ({num_sequences} sequences, "
            f"{num_documents} document indices) make {implied}: it is cut short, or not a dataset "
            "of text"
        )
    if num_sequences == 0 or num_documents == 0:
        raise ValueError(f"{path} is an index of no sequences")

    mapping = FileMap(path)

    def array(kind: str, count: int, offset: int) -> npt.NDArray[Any]:
        return mapping.array(kind, count, offset)

    lengths = array("<i4", num_sequences, HEADER.size)
    pointers = array("<i8", num_sequences, HEADER.size + 4 * num_sequences)
    documents = array("<i8", num_documents, HEADER.size + 12 * num_sequences)
    if documents[-1] != num_sequences:
        raise ValueError(
            f"{path} contradicts itself: its documents end at sequence {documents[-1]}, and it "
            f"has {num_sequences}"
        )
    return Index(path, DTYPES[code], lengths, pointers, documents, mapping)


def check_index(index: Index, num_bytes: int, whole: bool = False) -> None:
    """Refuse an index whose sequences do not fill the .bin of `num_bytes` one after another.

    Checked are the ends and 16 stretches of 4,096 sequences, which is every one of an index of up
    to 65,536: an index of a trillion tokens takes gigabytes, and every rank opens it. `whole` reads
    it all.
    """
    item = np.dtype(index.dtype).itemsize
    num_sequences = len(index.lengths)
    end = int(index.pointers[-1]) + int(index.lengths[-1]) * item
    if end != num_bytes:
        raise ValueError(
            f"{index.path} says that the .bin beside it ends at byte {end}, and it holds "
            f"{num_bytes}: one of the two is cut short or another dataset's"
        )
    if index.pointers[0] != 0:
        raise ValueError(
            f"{index.path} is inconsistent: sequence 0 begins at byte {index.pointers[0]}, not at 0"
        )
    if whole:
        index.mapping.announce_all()
    if whole or num_sequences <= _STRETCH * _STRETCHES:
        starts = np.arange(0, num_sequences, _STRETCH)
    else:
        starts = np.linspace(0, num_sequences - _STRETCH, _STRETCHES).astype(np.int64)
    for start in starts:
        lengths = index.lengths[start : start + _STRETCH].astype(np.int64)
        pointers = index.pointers[start : start + _STRETCH + 1]
        wanted = int(pointers[0]) + np.cumsum(lengths)[: len(pointers) - 1] * item
        wrong = np.flatnonzero((lengths[: len(wanted)] < 0) | (wanted != pointers[1:]))
        if len(wrong):
            sequence = int(start + wrong[0])
            raise ValueError(
                f"{index.path} is inconsistent: sequence {sequence} has {lengths[wrong[0]]} tokens "
                f"from byte {index.pointers[sequence]}, and sequence {sequence + 1} begins at byte "
                f"{index.pointers[sequence + 1]}; only datasets whose sequences lie one after "
                "another are read"
            )
