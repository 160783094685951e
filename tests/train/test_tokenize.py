"""`largebatch data`: what it writes is what was read, whole or not at all."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest

from largebatch.train.data import documents, writer
from largebatch.train.data.command import main
from largebatch.train.data.token_files import open_tokens

TEXTS = ["Grüße, 世界!\n", "def f(x):\n    return x\n", "", "🜁" * 300, "the end"]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    lines = [json.dumps({"id": place, "text": text}) for place, text in enumerate(TEXTS)]
    path.write_text("\n".join(lines) + "\n\n")
    return path


@pytest.fixture
def tokenizer_json(tmp_path: Path) -> Path:
    """A byte-level BPE with merges, an end of document, and a cut and special tokens of its own."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<bos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 5, trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", bos)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def decoded(tokens: "np.typing.NDArray[Any]", separator: int) -> list[bytes]:
    """The documents of byte tokens."""
    ends = np.flatnonzero(tokens == separator)
    return [bytes(part[part < 256].astype(np.uint8)) for part in np.split(tokens, ends + 1)[:-1]]


def test_byte_tokens_of_json_lines_are_the_texts(jsonl: Path, tmp_path: Path) -> None:
    assert main(["tokenize", str(jsonl), "--output", str(tmp_path / "set"), "--append-eod"]) == 0
    file = open_tokens(tmp_path / "set.bin")
    assert file.tokens.dtype == np.uint16
    assert [text.decode() for text in decoded(file.tokens, 256)] == [text for text in TEXTS if text]
    told = dict(file.sidecar)
    assert len(told.pop("sha256")) == 64
    assert told == {
        "format": "largebatch tokens 1",
        "dtype": "uint16",
        "tokens": len(file.tokens),
        "documents": 4,
        "vocabulary": 257,
        "separator": 256,
        "tokenizer": "bytes",
    }
    assert sorted(path.name for path in tmp_path.glob("set*")) == ["set.bin", "set.json"]


def test_a_text_file_is_one_document_and_any_bytes_are_text(tmp_path: Path) -> None:
    one, other = tmp_path / "one.txt", tmp_path / "other"
    one.write_bytes(bytes(range(256)) * 3)
    other.write_bytes(b"second\n")
    output = tmp_path / "below" / "set"
    assert main(["tokenize", str(one), str(other), "--output", str(output)]) == 0
    file = open_tokens(tmp_path / "below" / "set.bin")
    assert bytes(file.tokens.astype(np.uint8)) == one.read_bytes() + b"second\n"
    assert file.sidecar["documents"] == 2
    assert file.sidecar["separator"] is None
    assert file.sidecar["vocabulary"] == 256


def parquet(path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"id": [*range(len(TEXTS))], "text": TEXTS}), path)


def arrow(path: Path, whole: bool) -> None:
    import pyarrow as pa

    table = pa.table({"text": TEXTS})
    make = pa.ipc.new_file if whole else pa.ipc.new_stream
    with make(path, table.schema) as writer:
        writer.write_table(table)


def zstd(content: bytes) -> bytes:
    import zstandard

    pack = zstandard.ZstdCompressor().compress
    half = len(content) // 2
    return bytes(pack(content[:half]) + pack(content[half:]))  # two frames, one after the other


def separated(separator: str) -> bytes:
    lines = io.StringIO()
    rows = csv.writer(lines, delimiter=separator)
    rows.writerows([("id", "text"), *enumerate(TEXTS)])
    return lines.getvalue().encode("utf-8-sig")


FORMS: dict[str, Callable[[Path, bytes], object]] = {
    "t.jsonl.gz": lambda path, lines: path.write_bytes(gzip.compress(lines)),
    "T.JSONL.GZ": lambda path, lines: path.write_bytes(gzip.compress(lines)),
    "t.JSONL": lambda path, lines: path.write_bytes(lines),
    "t.jsonl.bz2": lambda path, lines: path.write_bytes(bz2.compress(lines)),
    "t.ndjson.xz": lambda path, lines: path.write_bytes(lzma.compress(lines)),
    "t.jsonl.lzma": lambda path, lines: path.write_bytes(
        lzma.compress(lines, format=lzma.FORMAT_ALONE)
    ),
    "t.jsonl.zst": lambda path, lines: path.write_bytes(zstd(lines)),
    "compressed without a word.jsonl": lambda path, lines: path.write_bytes(zstd(lines)),
    "t.CSV": lambda path, lines: path.write_bytes(separated(",")),
    "t.tsv.gz": lambda path, lines: path.write_bytes(gzip.compress(separated("\t"))),
    "t.parquet": lambda path, lines: parquet(path),
    "parquet without a word": lambda path, lines: parquet(path),
    "t.arrow": lambda path, lines: arrow(path, whole=True),
    "data-00000-of-00001.arrow": lambda path, lines: arrow(path, whole=False),
}


@pytest.mark.parametrize("name", FORMS)
def test_files_are_read_as_what_they_hold(name: str, jsonl: Path, tmp_path: Path) -> None:
    FORMS[name](tmp_path / name, jsonl.read_bytes())
    for path, output in [(jsonl, "a"), (tmp_path / name, "b")]:
        words = ["--output", str(tmp_path / output), "--append-eod"]
        assert main(["tokenize", str(path), *words]) == 0
    assert (tmp_path / "a.bin").read_bytes() == (tmp_path / "b.bin").read_bytes()


@pytest.mark.parametrize("text", ["BZhang Wei\n", "PAR1 and PAR2\n", "[1]\n", "Obj\n"])
def test_a_text_that_begins_like_another_file_is_a_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert main(["tokenize", str(tmp_path / "a.txt"), "--output", str(tmp_path / "set")]) == 0
    assert bytes(open_tokens(tmp_path / "set.bin").tokens.astype(np.uint8)).decode() == text


def test_a_megatron_dataset_is_written_to_the_formats_description(
    jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_CHUNK", 3)  # the index is made in several pieces
    words = ["--output", str(tmp_path / "set"), "--format", "megatron", "--append-eod"]
    assert main(["tokenize", str(jsonl), *words]) == 0
    index = (tmp_path / "set.idx").read_bytes()
    lengths = [len(text.encode()) + 1 for text in TEXTS if text]
    begins = [2 * sum(lengths[:place]) for place in range(4)]
    assert index == b"".join(
        [
            b"MMIDIDX\0\0",
            struct.pack("<QBQQ", 1, 8, 4, 5),
            struct.pack("<4i", *lengths),
            struct.pack("<4q", *begins),
            struct.pack("<5q", 0, 1, 2, 3, 4),
        ]
    )
    expected = b"".join(text.encode() + b"\0" for text in TEXTS if text)  # 256 is no byte
    tokens = np.frombuffer((tmp_path / "set.bin").read_bytes(), "<u2")
    assert bytes(np.where(tokens == 256, 0, tokens).astype(np.uint8)) == expected
    assert open_tokens(tmp_path / "set.bin").index is not None


def test_a_tokenizer_json_gives_its_own_tokens_and_nothing_beside_them(
    jsonl: Path, tokenizer_json: Path, tmp_path: Path
) -> None:
    from tokenizers import Tokenizer

    words = ["--tokenizer", str(tokenizer_json), "--append-eod"]
    assert main(["tokenize", str(jsonl), "--output", str(tmp_path / "set"), *words]) == 0
    file = open_tokens(tmp_path / "set.bin")
    tokenizer = Tokenizer.from_file(str(tokenizer_json))
    end = tokenizer.token_to_id("<|endoftext|>")
    ends = np.flatnonzero(file.tokens == end)
    parts = [part[:-1] for part in np.split(file.tokens, ends + 1)[:-1]]
    assert [tokenizer.decode(part.tolist()) for part in parts] == [text for text in TEXTS if text]
    assert tokenizer.token_to_id("<bos>") not in file.tokens  # nor is anything cut or padded
    assert len(file.tokens) < sum(len(text.encode()) for text in TEXTS)  # and there are merges
    assert file.sidecar["vocabulary"] == tokenizer.get_vocab_size() == 300
    assert file.sidecar["separator"] == end
    assert file.sidecar["tokenizer"].startswith("tokenizer.json sha256:")


@pytest.mark.parametrize(
    ("vocabulary", "kind", "dtype"),
    [
        (65_536, "bin", "uint16"),
        (65_537, "bin", "uint32"),
        (65_536, "megatron", "uint16"),
        (65_537, "megatron", "int32"),
    ],
)
def test_the_type_is_the_smallest_that_holds_every_id(
    vocabulary: int, kind: str, dtype: str, tmp_path: Path
) -> None:
    assert writer.dtype_for(vocabulary, kind) == dtype
    with writer.TokenWriter(tmp_path / "set", kind, dtype) as drafts:
        drafts.append(np.array([0, vocabulary - 1]))
        drafts.end_document()
        drafts.finish()
    assert open_tokens(tmp_path / "set.bin").tokens.tolist() == [0, vocabulary - 1]


def test_a_long_text_comes_in_pieces_cut_at_lines_and_never_within_a_character(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_PIECE", 64)
    monkeypatch.setattr(documents, "_LONGEST_LINE", 32)
    lines = tmp_path / "lines.txt"
    lines.write_text("".join(f"line {number}\n" for number in range(100)))
    found = list(documents.pieces(lines, "text"))
    assert len(found) > 5
    assert b"".join(piece.text for piece in found) == lines.read_bytes()
    assert all(piece.text.endswith(b"\n") for piece in found)
    assert [piece.ends_document for piece in found] == [False] * (len(found) - 1) + [True]
    assert found[-1].bytes_read == lines.stat().st_size
    # No line ever ends: cut between characters of 1 to 4 bytes, wherever the limit falls.
    for shift in range(4):
        endless = tmp_path / "endless.txt"
        endless.write_text("x" * shift + "aß世🜁" * 200)
        found = list(documents.pieces(endless, "text"))
        assert len(found) > 5
        assert "".join(piece.text.decode() for piece in found) == endless.read_text()
    broken = tmp_path / "broken.txt"
    broken.write_bytes(b"\x80" * 1000)  # goes on for ever, and began nowhere
    assert b"".join(piece.text for piece in documents.pieces(broken, "text")) == b"\x80" * 1000


Refusal = tuple[Callable[[Path], list[str]], list[str]]


def wrote(name: str, content: bytes) -> Callable[[Path], list[str]]:
    def words(folder: Path) -> list[str]:
        (folder / name).write_bytes(content)
        return [str(folder / name)]

    return words


def wrote_in(folder: Path, name: str) -> Path:
    """A folder that holds such a file; returns it."""
    below = folder / "below"
    below.mkdir(exist_ok=True)
    (below / name).write_bytes(b"x")
    return below


REFUSED: dict[str, Refusal] = {
    "an input that is not there": (lambda folder: [str(folder / "nowhere.txt")], ["nowhere.txt"]),
    "nothing but an empty file": (wrote("a.txt", b""), ["no text"]),
    "a line that is no JSON": (
        wrote("a.jsonl", b'{"text": "x"}\n{"text": \n'),
        ["a.jsonl, line 2 is no JSON"],
    ),
    "a line without the key": (
        wrote("a.jsonl", b'{"content": "x", "id": 1}\n'),
        ["line 1 has no text 'text'", "content, id", "--key"],
    ),
    "a text that is a number": (wrote("a.jsonl", b'{"text": 3}\n'), ["line 1 has no text 'text'"]),
    "a list in place of lines": (
        wrote("a.json", b'\n [{"text": "x"},\n'),
        ["a.json begins as one JSON list", "jq -c"],
    ),
    "a line that is a list": (
        wrote("a.jsonl", b'{"text": "x"}\n[1]\n'),
        ["line 2", "list", "--key"],
    ),
    "half a character of UTF-16": (
        wrote("a.jsonl", b'{"text": "x"}\n{"text": "a\\ud83d"}\n'),
        ["a.jsonl, line 2", "\\ud83d", "U+FFFD"],
    ),
    "a column that is not there": (
        wrote("a.csv", b"id,content\n1,x\n"),
        ["a.csv has no column 'text' (it has id, content)", "--key"],
    ),
    "a Latin table": (wrote("a.csv", b"text\nx\nGr\xfc\n"), ["a.csv is not UTF-8", "line"]),
    "a cut zstd file": (
        lambda folder: wrote("a.txt.zst", zstd(b"x" * 999)[:-3])(folder),
        ["a.txt.zst", "zstd", "cut short"],
    ),
    "a cut xz file": (wrote("a.xz", lzma.compress(b"x" * 999)[:-9]), ["a.xz", "xz", "cut short"]),
    "what is no bzip2 file": (wrote("a.bz2", b"BZhxxxxx"), ["a.bz2", "bzip2", "BZhxxxxx"]),
    "what is no Parquet file": (wrote("a.parquet", b"xxxx"), ["a.parquet is no parquet file"]),
    "a cut Parquet file": (wrote("a.parquet", b"PAR1\x15\0"), ["a.parquet", "parquet"]),
    "a zip archive": (wrote("a.jsonl", b"PK\x03\x04xx"), ["a.jsonl is a zip archive", "unpack"]),
    "a compressed archive": (
        wrote("a.tar.gz", gzip.compress(b"x" * 257 + b"ustar" + b"\0" * 300)),
        ["a.tar.gz is a tar archive"],
    ),
    "a file of compress": (wrote("a.txt", b"\x1f\x9d\x90abc"), ["compressed by compress"]),
    "text in UTF-16": (wrote("a.txt", "one two".encode("utf-16")), ["UTF-16", "iconv"]),
    "a PDF": (wrote("a.txt", b"%PDF-1.7\n"), ["a.txt is a PDF"]),
    "a folder of Hugging Face's": (
        lambda folder: [str(wrote_in(folder, "data-00000-of-00001.arrow"))],
        ["is a folder", "*.arrow", "--key"],
    ),
    "a folder": (lambda folder: [str(wrote_in(folder, "a.txt"))], ["is a folder", "files"]),
    "a cut gzip file": (wrote("a.txt.gz", gzip.compress(b"x" * 999)[:-9]), ["a.txt.gz", "gzip"]),
    "what is no gzip file": (wrote("a.txt.gz", b"xxxxxxxx"), ["a.txt.gz", "gzip"]),
    "a tokenizer that is not there": (
        lambda folder: [*wrote("a.txt", b"x")(folder), "--tokenizer", "nowhere.json"],
        ["--tokenizer=nowhere.json", "no file"],
    ),
    "a tokenizer that is none": (
        lambda folder: [
            *wrote("a.txt", b"x")(folder),
            "--tokenizer",
            *wrote("t.json", b"{}")(folder),
        ],
        ["--tokenizer=", "t.json"],
    ),
    "an end that is not asked for": (
        lambda folder: [*wrote("a.txt", b"x")(folder), "--eod", "</s>"],
        ["--eod=</s> goes with --append-eod"],
    ),
    "a name for the end of bytes": (
        lambda folder: [*wrote("a.txt", b"x")(folder), "--append-eod", "--eod", "</s>"],
        ["--eod='</s>'", "bytes have none"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_tokenized_is_refused_and_leaves_nothing(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, told = REFUSED[case]
    arguments = words(tmp_path)
    before = sorted(tmp_path.iterdir())
    for kind in ("bin", "megatron"):
        output = ["--output", str(tmp_path / "set"), "--format", kind]
        assert main(["tokenize", *arguments, *output]) == 2
        error = capsys.readouterr().err
        assert error.startswith("largebatch: ")
        assert error.count("\n") == 1
        assert all(word in error for word in told), error
        assert sorted(tmp_path.iterdir()) == before


def test_bytes_that_are_no_text_are_refused_where_text_is_needed(
    tokenizer_json: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("one\ntwo\nGrüße\n".encode("latin-1"))
    words = ["tokenize", str(path), "--output", str(tmp_path / "set")]
    assert main([*words, "--tokenizer", str(tokenizer_json)]) == 2
    assert f"{path} is not UTF-8 in line 3" in capsys.readouterr().err
    assert main([*words, "--append-eod", "--tokenizer", str(tokenizer_json), "--eod", "<no>"]) == 2
    assert "no token '<no>' to end a document with" in capsys.readouterr().err
    assert main(words) == 0


@pytest.mark.parametrize("ending", [".bin", ".idx", ".json"])
def test_nothing_is_written_over(
    ending: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.txt").write_text("text")
    there = tmp_path / f"set{ending}"
    there.write_text("precious")
    assert main(["tokenize", str(tmp_path / "a.txt"), "--output", str(tmp_path / "set")]) == 2
    assert f"{there} is there already" in capsys.readouterr().err
    assert there.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", there.name]


def test_two_at_once_do_not_write_one_file(tmp_path: Path) -> None:
    with writer.TokenWriter(tmp_path / "set", "megatron", "uint16") as first:
        with pytest.raises(ValueError, match=r"another process is writing .*set\.bin"):
            writer.TokenWriter(tmp_path / "set", "bin", "uint16")
        first.append(np.array([1, 2]))
        first.end_document()
        (tmp_path / "set.json").write_text("somebody else's")
        with pytest.raises(ValueError, match=r"set\.json is there already"):
            first.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["set.json"]


def test_a_document_longer_than_an_index_counts_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "_LONGEST", 5)
    with writer.TokenWriter(tmp_path / "set", "megatron", "uint16") as drafts:
        drafts.append(np.arange(6))
        with pytest.raises(ValueError, match="6 tokens, and a Megatron index counts to 5"):
            drafts.end_document()


SLOW = """
import sys, time
import largebatch.train.data.command as command
whole = command.write
def slow(writer, *rest):
    whole(writer, *rest)
    writer._tokens.flush()
    time.sleep(0.05)
command.write = slow
sys.exit(command.main(sys.argv[1:]))
"""


@pytest.mark.parametrize(("how", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)])
def test_one_that_is_killed_half_way_leaves_no_file_of_the_final_name(
    how: signal.Signals, code: int, tmp_path: Path
) -> None:
    text = tmp_path / "long.txt"
    text.write_bytes(b"a line of text\n" * 6_000_000)  # 90 MB
    words = ["tokenize", str(text), "--output", str(tmp_path / "set"), "--format", "megatron"]
    process = forked.Popen([sys.executable, "-c", SLOW, *words], stderr=subprocess.PIPE, text=True)
    draft = tmp_path / "set.bin.part"
    try:
        while not draft.exists() or draft.stat().st_size < 10**6:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(how)
        assert process.wait(timeout=600) == code
    finally:
        process.kill()
        process.communicate()
    assert not [path for path in tmp_path.glob("set*") if path.suffix != ".part"]
    if how == signal.SIGKILL:
        assert draft.exists()
        # What is left stands in nobody's way, and is not taken for tokens.
        text.write_bytes(b"short\n")
        assert main(words) == 0
        assert open_tokens(tmp_path / "set.bin").tokens.tolist() == list(b"short\n")
    assert not list(tmp_path.glob("*.part"))


FLAT = """
import resource, sys
from largebatch.train.data.command import main
assert main(["tokenize", sys.argv[1], "--output", "small"]) == 0
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(["tokenize", sys.argv[2], "--output", "large", "--format", "megatron"]) == 0
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_stays_flat_over_a_text_thirty_times_as_long(tmp_path: Path) -> None:
    line = b"a line of text\n"
    (tmp_path / "small.txt").write_bytes(line * 500_000)  # 7.5 MB
    (tmp_path / "large.txt").write_bytes(line * 8_000_000)  # 120 MB; as tokens 240
    done = subprocess.run(
        [sys.executable, "-c", FLAT, "small.txt", "large.txt"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert int(done.stdout.splitlines()[-1]) < 20 * 1024  # KiB
    assert (tmp_path / "large.bin").stat().st_size == 2 * 15 * 8_000_000


def test_without_the_package_a_tokenizer_json_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    script = "import sys; sys.modules['tokenizers'] = None\nfrom largebatch.cli import main\n"
    done = forked.run(
        [sys.executable, "-c", script + "sys.exit(main(sys.argv[1:]))", "data", "tokenize",
         "a.txt", "--output", "set", "--tokenizer", "t.json"],
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "needs the package tokenizers: pip install 'largebatch[hf]'" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]


def test_info_tells_what_a_file_holds_and_checks_it_whole(
    jsonl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = str(tmp_path / "set")
    main(["tokenize", str(jsonl), "--output", prefix, "--format", "megatron", "--append-eod"])
    capsys.readouterr()
    assert main(["info", f"{prefix}.idx", "--check"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    tokens = sum(len(text.encode()) + 1 for text in TEXTS if text)
    for words in (
        "a Megatron dataset", f"tokens {tokens:,} of uint16", "sequences 4", "documents 4",
        "vocabulary 257", "separator 256", "tokenizer bytes", "Grüße, 世界!",
        "every id below 257; the largest 256",
    ):  # fmt: skip
        assert words in told
    content = bytearray((tmp_path / "set.bin").read_bytes())
    content[20] ^= 1  # the same size, another content
    (tmp_path / "set.bin").write_bytes(content)
    assert main(["info", prefix]) == 0
    assert main(["info", prefix, "--check"]) == 2
    assert "is not what was written" in capsys.readouterr().err
    content[20:22] = b"\x40\x01"
    (tmp_path / "set.bin").write_bytes(content)
    assert main(["info", prefix, "--check"]) == 2
    assert "holds the id 320, outside 0 … 256" in capsys.readouterr().err
