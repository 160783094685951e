"""Writing files of tokens: whole under their final names, or not at all.

Tokens go to PREFIX.bin.part (and PREFIX.idx.part), and get their names once all is on disk, the
.bin last. What a killed run leaves is a .part, which the next one writes over.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any, Final, Self

import numpy as np
import numpy.typing as npt

from largebatch.common.files import lock_or_warn, write_whole
from largebatch.train.data.megatron import DTYPES, HEADER, MAGIC
from largebatch.train.data.token_files import FORMAT

FORMATS: Final = ("bin", "megatron")

_CHUNK: Final = 1 << 18
_LONGEST: Final = 2**31 - 1


def dtype_for(vocabulary: int, kind: str) -> str:
    """The smallest type that holds every id: Megatron's index has no code for uint32."""
    if vocabulary <= 1 << 16:
        return "uint16"
    return "int32" if kind == "megatron" else "uint32"


class TokenWriter:
    """Takes tokens and the ends of documents; `finish` makes files of them.

    Args:
        kind: "bin" or "megatron".
    """

    def __init__(self, prefix: Path, kind: str, dtype: str) -> None:
        assert kind in FORMATS
        self._item = np.dtype(dtype)
        self._prefix, self._megatron = prefix, kind == "megatron"
        self.num_tokens = self.num_documents = self._in_document = 0
        self._digest = hashlib.sha256()
        self._check_free()
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._tokens = self._draft(".bin")
        self._index: IO[bytes] | None = None
        if self._megatron:
            self._index = self._draft(".idx")
            self._index.write(bytes(HEADER.size))  # known at the end; the lengths follow it

    def path(self, ending: str) -> Path:
        return self._prefix.with_name(self._prefix.name + ending)

    def _check_free(self) -> None:
        for ending in (".bin", ".idx", ".json"):
            if self.path(ending).exists():
                raise ValueError(
                    f"{self.path(ending)} is there already, and is not written over: choose "
                    "another --output, or move it away"
                )

    def _draft(self, ending: str) -> IO[bytes]:
        path = self.path(f"{ending}.part")
        file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        try:
            if not lock_or_warn(file.fileno(), path):
                raise ValueError(f"another process is writing {self.path(ending)}")
            # One that has just finished may have given this very file its final name.
            self._check_free()
        except BaseException:
            file.close()
            raise
        file.truncate(0)
        return file

    def append(self, tokens: npt.NDArray[Any]) -> None:
        """The next tokens of the document; each must be below the vocabulary of `dtype_for`."""
        content = tokens.astype(self._item.newbyteorder("<")).tobytes()
        self._tokens.write(content)
        self._digest.update(content)
        self._in_document += len(tokens)
        self.num_tokens += len(tokens)

    def end_document(self) -> None:
        """What follows is another one."""
        if self._index is not None:
            if self._in_document > _LONGEST:
                raise ValueError(
                    f"a document has {self._in_document} tokens, and a Megatron index counts to "
                    f"{_LONGEST}: use --format=bin, or cut the text into several files"
                )
            self._index.write(self._in_document.to_bytes(4, "little"))
        self.num_documents += 1
        self._in_document = 0

    def finish(self, **more: Any) -> dict[str, Any]:
        """Give the files their names; returns what the sidecar says, `more` included."""
        if not self.num_tokens:
            raise ValueError("the inputs hold no text: nothing is written")
        if self._index is not None:
            self._finish_index(self._index)
        sidecar = {
            "format": FORMAT,
            "dtype": self._item.name,
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "sha256": self._digest.hexdigest(),
        } | more
        self._check_free()
        for file in (self._tokens, self._index):
            if file is not None:
                file.flush()
                os.fsync(file.fileno())
        write_whole(self.path(".json"), json.dumps(sidecar, indent=1) + "\n")
        if self._index is not None:
            self.path(".idx.part").rename(self.path(".idx"))
        self.path(".bin.part").rename(self.path(".bin"))
        return sidecar

    def _finish_index(self, file: IO[bytes]) -> None:
        """After the lengths: where each sequence and each document begins; then the header."""
        count, pointer = self.num_documents, 0
        for start in range(0, count, _CHUNK):
            file.seek(HEADER.size + 4 * start)
            content = file.read(4 * min(_CHUNK, count - start))
            lengths = np.frombuffer(content, "<i4").astype(np.int64) * self._item.itemsize
            ends = pointer + np.cumsum(lengths)
            file.seek(0, os.SEEK_END)
            file.write((ends - lengths).astype("<i8").tobytes())
            pointer = int(ends[-1])
        for start in range(0, count + 1, _CHUNK):
            file.write(np.arange(start, min(start + _CHUNK, count + 1), dtype="<i8").tobytes())
        file.seek(0)
        code = {name: code for code, name in DTYPES.items()}[self._item.name]
        file.write(HEADER.pack(MAGIC, 1, code, count, count + 1))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        # Removed while still locked: nobody else's draft can stand there.
        for ending in (".bin.part", ".idx.part") if self._megatron else (".bin.part",):
            self.path(ending).unlink(missing_ok=True)
        self._tokens.close()
        if self._index is not None:
            self._index.close()
