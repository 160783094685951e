"""Description of a file of tokens."""

import hashlib
from pathlib import Path
from typing import Final

import numpy as np
from rich.progress import Progress

from largebatch.train.data.megatron import check_index
from largebatch.train.data.token_files import TokenFile, find_files, open_tokens

_SHOWN: Final = 16
_BYTES_SHOWN: Final = 72
_CHUNK: Final = 1 << 22


def describe(path: Path, dtype: str | None, check: bool, progress: Progress) -> str:
    """A few lines on the tokens at `path`.

    Args:
        check: read them all, and the whole of an index.
    """
    (file,) = find_files(str(path), "PATH")
    tokens = open_tokens(file, dtype)
    kind = "plain tokens" if tokens.index is None else "a Megatron dataset"
    rows = {
        "tokens": f"{len(tokens.tokens):,} of {tokens.tokens.dtype.name}, "
        f"{tokens.tokens.nbytes:,} bytes"
    }
    if tokens.index is not None:
        rows["sequences"] = f"{len(tokens.index.lengths):,}"
        rows["documents"] = f"{len(tokens.index.documents) - 1:,}"
    elif "documents" in tokens.sidecar:
        rows["documents"] = f"{tokens.sidecar['documents']:,}"
    for key in ("vocabulary", "separator", "tokenizer", "sha256"):
        if tokens.sidecar.get(key) is not None:
            rows[key] = str(tokens.sidecar[key])
    rows["begins"] = beginning(tokens)
    if check:
        rows["checked"] = checked(tokens, progress)
    width = max(len(key) for key in rows)
    return "\n".join(
        [f"{file}: {kind}", *(f"  {key:{width}}  {value}" for key, value in rows.items())]
    )


def beginning(tokens: TokenFile) -> str:
    """The first tokens: the text that they are where they are bytes, else their ids."""
    if tokens.sidecar.get("tokenizer") == "bytes":
        first = tokens.tokens[:_BYTES_SHOWN]
        return repr(bytes(first[first < 256].astype(np.uint8)).decode(errors="replace"))
    return " ".join(str(token) for token in tokens.tokens[:_SHOWN])


def checked(tokens: TokenFile, progress: Progress) -> str:
    """Read everything; returns what was found."""
    if tokens.index is not None:
        check_index(tokens.index, tokens.tokens.nbytes, whole=True)
    tokens.mapping.announce_all()
    digest, largest, smallest = hashlib.sha256(), 0, 0
    shown = progress.add_task("", total=len(tokens.tokens))
    for start in range(0, len(tokens.tokens), _CHUNK):
        chunk = tokens.tokens[start : start + _CHUNK]
        digest.update(chunk.tobytes())
        largest, smallest = max(largest, int(chunk.max())), min(smallest, int(chunk.min()))
        progress_text = f"{start + len(chunk):,} tokens, the largest id {largest:,}"
        progress.update(shown, completed=start + len(chunk), description=progress_text)
    vocabulary = tokens.sidecar.get("vocabulary", largest + 1)
    if smallest < 0 or largest >= vocabulary:
        strange = smallest if smallest < 0 else largest
        raise ValueError(f"{tokens.path} holds the id {strange}, outside 0 … {vocabulary - 1}")
    if tokens.sidecar.get("sha256", digest.hexdigest()) != digest.hexdigest():
        raise ValueError(
            f"{tokens.path} is not what was written: its SHA-256 is {digest.hexdigest()}, and was "
            f"{tokens.sidecar['sha256']}"
        )
    return f"every id below {vocabulary:,}; the largest {largest:,}; SHA-256 {digest.hexdigest()}"
