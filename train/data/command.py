"""`largebatch data`: files of tokens, made from text and looked into."""

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from rich.progress import Progress

from largebatch.common.progress import progress_bar
from largebatch.common.text import say
from largebatch.records.outcomes import ExitCode
from largebatch.train.data.documents import TextPiece, check_file, pieces
from largebatch.train.data.megatron import check_index
from largebatch.train.data.token_files import TokenFile, find_files, open_tokens
from largebatch.train.data.tokenizer import Tokenizer, find_tokenizer
from largebatch.train.data.writer import FORMATS, TokenWriter, dtype_for

_AT_ONCE: Final = 1024
_BYTES_AT_ONCE: Final = 1 << 22
_CHUNK: Final = 1 << 22


def main(arguments: list[str]) -> int:
    """Run `largebatch data ARGUMENTS`; returns the exit code."""
    options = parser().parse_args(arguments)
    try:
        if options.action == "tokenize":
            print(tokenize(options))
        else:
            with progress_bar() as progress:
                text = describe(options.path, options.dtype, options.check, progress)
            print(text)
    except (ValueError, OSError) as error:
        say(error)
        return ExitCode.REFUSED
    except KeyboardInterrupt:
        say("interrupted; nothing is written")
        return ExitCode.INTERRUPTED
    return 0


def parser() -> argparse.ArgumentParser:
    described = argparse.ArgumentParser(
        prog="largebatch data", description=__doc__, epilog="exit codes: 0 done; 2 refused"
    )
    actions = described.add_subparsers(dest="action", required=True)
    make = actions.add_parser(
        "tokenize",
        help="token files from text or JSON lines",
        description="Write PREFIX.bin, and PREFIX.json with what it holds, for task=tokens. A text "
        "file is one document; of .jsonl, .ndjson and .json files every line is one, of .csv, "
        ".tsv, .parquet and .arrow files every row. Text, lines and separated values may be "
        "compressed by gzip, bzip2, xz or zstd. No special tokens are added but what --append-eod "
        "adds. A long text is encoded in pieces of about 1 MiB cut at line ends: a tokenizer that "
        "joins across lines gives other tokens there.",
    )
    make.add_argument("inputs", nargs="+", type=Path, metavar="INPUT")
    make.add_argument("--output", required=True, type=Path, metavar="PREFIX")
    make.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="bytes|FILE.json|NAME",
        help="bytes (the default), a tokenizer.json, its folder, or a name on the Hugging Face hub",
    )
    make.add_argument(
        "--format",
        default="bin",
        choices=FORMATS,
        help="plain tokens (the default), or Megatron's .bin and .idx",
    )
    make.add_argument(
        "--append-eod", action="store_true", help="end each document with a token: 256 of bytes"
    )
    make.add_argument("--eod", metavar="TOKEN", help="that token, where it has no usual name")
    make.add_argument(
        "--key", default="text", help="of the text in a JSON line, or the column's name (text)"
    )
    look = actions.add_parser(
        "info",
        help="what a file of tokens holds",
        description="What a file of tokens holds: how many, their type, and how it begins.",
    )
    look.add_argument("path", type=Path, metavar="PATH", help="FILE.bin, FILE.idx or PREFIX")
    look.add_argument("--dtype", help="of plain tokens without a .json: uint16 or uint32")
    look.add_argument(
        "--check", action="store_true", help="read all of it: every id, the whole index, its hash"
    )
    return described


def tokenize(options: argparse.Namespace) -> str:
    """Write the files that `options` describe; returns what to say of them."""
    for path in options.inputs:
        check_file(path)
    if options.eod is not None and not options.append_eod:
        raise ValueError(f"--eod={options.eod} goes with --append-eod")
    tokenizer = find_tokenizer(options.tokenizer)
    separator = tokenizer.separator(options.eod) if options.append_eod else None
    dtype = dtype_for(tokenizer.vocabulary, options.format)
    prefix = options.output
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    sizes = [path.stat().st_size for path in options.inputs]
    with progress_bar() as progress, TokenWriter(prefix, options.format, dtype) as writer:
        shown = progress.add_task("", total=sum(sizes))
        for path, before in zip(options.inputs, np.cumsum([0, *sizes[:-1]]), strict=True):
            for group in grouped(pieces(path, options.key)):
                write(writer, tokenizer, group, separator, path)
                text = f"{writer.num_tokens:,} tokens, {writer.num_documents:,} documents"
                done = int(before) + group[-1].bytes_read
                progress.update(shown, completed=done, description=text)
        sidecar = writer.finish(
            vocabulary=tokenizer.vocabulary, separator=separator, tokenizer=tokenizer.name
        )
    return (
        f"{writer.path('.bin')}: {sidecar['tokens']:,} tokens of {sidecar['documents']:,} "
        f"documents, {dtype}; train with task=tokens task.path={prefix} "
        f"task.vocabulary={tokenizer.vocabulary}"
    )


def grouped(found: Iterator[TextPiece]) -> Iterator[list[TextPiece]]:
    """As many at a time as keep the cores of a tokenizer busy."""
    group: list[TextPiece] = []
    size = 0
    for piece in found:
        group.append(piece)
        size += len(piece.text)
        if len(group) == _AT_ONCE or size >= _BYTES_AT_ONCE:
            yield group
            group, size = [], 0
    if group:
        yield group


def where(error: UnicodeDecodeError, group: Sequence[TextPiece]) -> str:
    """In which line of its file a piece is no UTF-8."""
    for piece in group:
        if piece.text == error.object and piece.line is not None:
            return f" in line {piece.line + piece.text[: error.start].count(10)}"
    return ""


def write(
    writer: TokenWriter,
    tokenizer: Tokenizer,
    group: Sequence[TextPiece],
    separator: int | None,
    path: Path,
) -> None:
    try:
        encoded = tokenizer.encode([piece.text for piece in group])
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8{where(error, group)} ({error}): convert it, or use "
            "--tokenizer=bytes"
        ) from error
    for piece, ids in zip(group, encoded, strict=True):
        writer.append(ids)
        if piece.ends_document:
            if separator is not None:
                writer.append(np.array([separator]))
            writer.end_document()


def describe(path: Path, dtype: str | None, check: bool, progress: Progress) -> str:
    """A few lines on the tokens at `path`; with `check` all are read, and the whole of an index."""
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
        first = tokens.tokens[:72]
        return repr(bytes(first[first < 256].astype(np.uint8)).decode(errors="replace"))
    return " ".join(str(token) for token in tokens.tokens[:16])


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
