"""From text to token ids: bytes as they are, or what a `tokenizer.json` of Hugging Face's says."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

SEPARATORS: Final = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")
"""What the end of a document is called in vocabularies, tried in this order."""


class Tokenizer(Protocol):
    name: str
    """As the sidecar carries it."""
    vocabulary: int
    """Every id is below it."""

    def encode(self, pieces: Sequence[bytes]) -> list[Ids]:
        """The ids of each piece, nothing added.

        Raises:
            UnicodeDecodeError: a piece is no UTF-8, and has to be.
        """

    def separator(self, token: str | None) -> int:
        """The id that ends a document: of `token`, or of the usual name."""


class ByteTokenizer:
    """The 256 values of a byte; 256 ends a document."""

    name = "bytes"
    vocabulary = 256

    def encode(self, pieces: Sequence[bytes]) -> list[Ids]:
        return [np.frombuffer(piece, np.uint8).astype(np.int64) for piece in pieces]

    def separator(self, token: str | None) -> int:
        if token is not None:
            raise ValueError(
                f"--eod={token!r} names a token of a vocabulary, and bytes have none: leave it out"
            )
        self.vocabulary = 257
        return 256


class JsonTokenizer:
    """A `tokenizers.Tokenizer`, without the special tokens, the cut and the padding of its own."""

    def __init__(self, tokenizer: Any, name: str) -> None:
        # A file may carry the cut of the model it was made for: 512 tokens a document, the rest
        # dropped silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self.name = name
        self._tokenizer = tokenizer
        self._ids: dict[str, int] = tokenizer.get_vocab(with_added_tokens=True)
        # Ids may have gaps: the number of entries is no bound.
        self.vocabulary = max(self._ids.values()) + 1

    def encode(self, pieces: Sequence[bytes]) -> list[Ids]:
        texts = [piece.decode() for piece in pieces]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def separator(self, token: str | None) -> int:
        for name in SEPARATORS if token is None else (token,):
            if name in self._ids:
                return self._ids[name]
        wanted = f"no token {token!r}" if token else f"none of {', '.join(SEPARATORS)}"
        raise ValueError(
            f"{self.name} has {wanted} to end a document with: name one of its tokens with "
            "--eod=TOKEN, or leave out --append-eod"
        )


def find_tokenizer(name: str) -> Tokenizer:
    """`bytes`, a tokenizer.json, a folder that holds one, or a name on the Hugging Face hub."""
    if name == "bytes":
        return ByteTokenizer()
    try:
        from tokenizers import Tokenizer as Json
    except ModuleNotFoundError as error:
        raise ValueError(
            f"--tokenizer={name} needs the package tokenizers: pip install 'largebatch[hf]', or "
            "use --tokenizer=bytes"
        ) from error
    path = Path(name, "tokenizer.json") if Path(name).is_dir() else Path(name)
    if not path.is_file() and (path.suffix == ".json" or Path(name).is_dir()):
        raise ValueError(f"--tokenizer={name}: there is no file {path}")
    try:
        if path.is_file():
            content = path.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            return JsonTokenizer(Json.from_str(content.decode()), f"{path.name} sha256:{digest}")
        return JsonTokenizer(Json.from_pretrained(name), name)
    except Exception as error:  # the package raises bare Exception
        raise ValueError(
            f"--tokenizer={name} is neither bytes nor a tokenizer.json nor one that the Hugging "
            f"Face hub gives out here ({str(error).splitlines()[0] if str(error) else error!r})"
        ) from error
