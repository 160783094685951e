"""Files of tokens for the tests, written from the formats' descriptions alone."""

import struct
from collections.abc import Sequence
from pathlib import Path

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint16": 8}
LETTERS = {"uint8": "B", "int8": "b", "int16": "h", "int32": "i", "int64": "q", "uint16": "H"}


def megatron(
    prefix: Path, documents: Sequence[Sequence[Sequence[int]]], dtype: str = "uint16"
) -> Path:
    """A Megatron dataset of documents, each of some sequences; returns its .bin."""
    letter = LETTERS[dtype]
    size = struct.calcsize(f"<{letter}")
    sequences = [sequence for document in documents for sequence in document]
    with Path(f"{prefix}.bin").open("wb") as file:
        for sequence in sequences:
            file.write(struct.pack(f"<{len(sequence)}{letter}", *sequence))
    lengths = [len(sequence) for sequence in sequences]
    pointers, begins = [], [0]
    for place in range(len(lengths)):
        pointers.append(sum(lengths[:place]) * size)
    for document in documents:
        begins.append(begins[-1] + len(document))
    with Path(f"{prefix}.idx").open("wb") as file:
        file.write(b"MMIDIDX\x00\x00")
        file.write(struct.pack("<Q", 1))
        file.write(struct.pack("<B", CODES[dtype]))
        file.write(struct.pack("<Q", len(sequences)))
        file.write(struct.pack("<Q", len(begins)))
        file.write(struct.pack(f"<{len(lengths)}i", *lengths))
        file.write(struct.pack(f"<{len(pointers)}q", *pointers))
        file.write(struct.pack(f"<{len(begins)}q", *begins))
    return Path(f"{prefix}.bin")


def plain(path: Path, tokens: Sequence[int], letter: str = "H") -> Path:
    """Tokens and nothing else."""
    path.write_bytes(struct.pack(f"<{len(tokens)}{letter}", *tokens))
    return path
