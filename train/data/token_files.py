"""Files of tokens, opened through a memory map: plain ones and Megatron's.

A plain PREFIX.bin is token ids and nothing else, little-endian. What they are stands beside it in
PREFIX.json, the sidecar that `largebatch data tokenize` writes, or is said by the caller.
"""

import glob
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from largebatch.train.data.mapping import FileMap
from largebatch.train.data.megatron import MAGIC, Index, check_index, open_index
from largebatch.train.data.sampler import Indices

_FAMILY: Final = "largebatch tokens "
FORMAT: Final = f"{_FAMILY}1"
_LARGEST_SIDECAR: Final = 1 << 16
PLAIN_DTYPES: Final = ("uint16", "uint32")

_FOREIGN: Final = {
    MAGIC: "a Megatron index: give its .bin, or the name without an ending",
    b"\x93NUMPY": "an array of NumPy's with a header: write it as plain tokens, array.tofile(…)",
    (20240520).to_bytes(4, "little"): "a file of llm.c with a header of 1,024 bytes: cut that off",
    b"\x1f\x8b\x08": "compressed by gzip: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
}
"""What other kinds of file begin with, which would else be read as tokens."""

_STRETCH: Final = 4096
_STRETCHES: Final = 64


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens.

    Attributes:
        path: of the .bin.
        tokens: the map of the whole file, shape (number of tokens,).
        mapping: what it is a view of.
        sidecar: what PREFIX.json says; empty where there is none.
        index: of a Megatron dataset.
    """

    path: Path
    tokens: npt.NDArray[Any]
    mapping: FileMap
    sidecar: Mapping[str, Any]
    index: Index | None

    def read(self, starts: Indices, count: int) -> Indices:
        """`count` tokens from each of `starts`; shape (len(starts), count)."""
        item = self.tokens.itemsize
        self.mapping.announce(starts * item, count * item)
        found: Indices = self.tokens[starts[:, None] + np.arange(count)].astype(np.int64)
        return found

    def fingerprint(self) -> str:
        """SHA-256 over size, type and 64 evenly spaced stretches of 4 KiB, which is all of a file
        of up to 256 KiB; and over what the sidecar says, where there is one: `data tokenize` puts a
        SHA-256 of the whole there.
        """
        content = self.tokens.view(np.uint8)
        identity = [len(content), self.tokens.dtype.str, self.sidecar.get("sha256")]
        digest = hashlib.sha256(json.dumps(identity).encode())
        last = max(len(content) - _STRETCH, 0)
        starts = sorted({last * part // (_STRETCHES - 1) for part in range(_STRETCHES)})
        if len(content) <= _STRETCH * _STRETCHES:
            starts = list(range(0, len(content), _STRETCH))
        for start in starts:
            digest.update(content[start : start + _STRETCH].tobytes())
        return digest.hexdigest()


def find_files(path: str | Sequence[str], name: str) -> list[Path]:
    """The .bin files that `path` means: a file, its name without an ending, a pattern, or a list
    of these. A pattern's are in the order of their names.

    Args:
        name: of the key, for the refusal.
    """
    if isinstance(path, Sequence) and not isinstance(path, str):
        if not path:
            raise ValueError(f"{name} must name at least one file, got an empty list")
        return [file for one in path for file in find_files(one, name)]
    path = str(path)  # 2024 is a number in YAML
    if glob.has_magic(path) and not Path(path).exists():
        pattern = path.removesuffix(".idx").removesuffix(".bin") + ".bin"
        found = [Path(file) for file in sorted(glob.glob(pattern))]
    else:
        found = [bin_of(Path(path))]
        found = [file for file in found if file.is_file()]
    if not found:
        raise ValueError(
            f"{name}={path} is no file of tokens, and neither is {path}.bin: largebatch data "
            "tokenize makes them"
        )
    return found


def bin_of(path: Path) -> Path:
    """The .bin that `path` means: itself, or beside an index, or PREFIX.bin."""
    if path.suffix == ".idx":
        return path.with_suffix(".bin")
    if path.suffix == ".bin" or path.is_file():
        return path
    return path.with_name(path.name + ".bin")


def open_tokens(path: Path, dtype: str | None = None) -> TokenFile:
    """The tokens of the .bin at `path`: Megatron's where an index lies beside it, else plain.

    Args:
        dtype: of plain tokens without a sidecar; others say themselves what they are.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not there, or is no file")
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty")
    sidecar, index = _sidecar(path), None
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        index = open_index(path.with_suffix(".idx"))
        check_index(index, size)
        kind = index.dtype
    else:
        kind = _plain_dtype(path, sidecar, dtype)
    item = np.dtype(kind).itemsize
    if size % item:
        raise ValueError(
            f"{path} holds {size} bytes, which are no whole number of tokens of {kind}: it is cut "
            "short, or of another type"
        )
    stated = sidecar.get("tokens", size // item)
    if stated != size // item:
        raise ValueError(
            f"{path} holds {size // item} tokens, and {sidecar_of(path)} says {stated}: it is cut "
            "short, or another file's"
        )
    mapping = FileMap(path)
    tokens = mapping.array(np.dtype(kind).newbyteorder("<"))
    return TokenFile(path, tokens, mapping, sidecar, index)


def sidecar_of(path: Path) -> Path:
    """Where what the tokens of `path` are is said: PREFIX.json beside PREFIX.bin."""
    return path.with_name(path.name.removesuffix(".bin") + ".json")


def _sidecar(path: Path) -> Mapping[str, Any]:
    """What our sidecar says. Somebody else's JSON of that name, such as the text that the tokens
    were made from, says nothing here.
    """
    beside = sidecar_of(path)
    if not beside.is_file() or beside.stat().st_size > _LARGEST_SIDECAR:
        return {}
    try:
        content = json.loads(beside.read_bytes())
    except ValueError:
        return {}
    if not isinstance(content, dict) or not str(content.get("format")).startswith(_FAMILY):
        return {}
    if content["format"] != FORMAT:
        raise ValueError(
            f"{beside} has the format {content['format']!r}, and only {FORMAT!r} is known: it was "
            "written by a later version; with the file moved away, task.dtype says what it says"
        )
    return content


def _plain_dtype(path: Path, sidecar: Mapping[str, Any], dtype: str | None) -> str:
    if "dtype" not in sidecar:
        with path.open("rb") as file:
            head = file.read(16)
        for begins, what in _FOREIGN.items():
            if head.startswith(begins):
                raise ValueError(f"{path} is no file of plain tokens, but {what}")
    kind = sidecar.get("dtype", dtype)
    if kind is None:
        raise ValueError(
            f"nothing says what {path} holds: there is neither {path.with_suffix('.idx').name} nor "
            f"{sidecar_of(path).name} beside it; give task.dtype={' or '.join(PLAIN_DTYPES)}"
        )
    if kind not in PLAIN_DTYPES:
        said = f"{sidecar_of(path)} says" if "dtype" in sidecar else "task.dtype is"
        raise ValueError(
            f"plain tokens are of {' or '.join(PLAIN_DTYPES)}; of {path} {said} {kind!r}"
        )
    return str(kind)
