"""Files of tokens are read exactly, and refused by name where they are not what they should be."""

import gc
import json
import os
import re
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from token_writers import CODES, megatron, plain

from largebatch.train.data.megatron import check_index, open_index
from largebatch.train.data.token_files import find_files, open_tokens
from largebatch.train.data.windows import Windows

DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10, 11, 12, 13]], [[14, 15], [16], [17, 18]]]
STREAM = list(range(5, 19))


@pytest.mark.parametrize("dtype", CODES)
def test_a_megatron_dataset_is_read_as_it_was_written(dtype: str, tmp_path: Path) -> None:
    file = open_tokens(megatron(tmp_path / "set", DOCUMENTS, dtype))
    assert file.tokens.tolist() == STREAM
    assert file.tokens.dtype == np.dtype(dtype)
    assert file.index is not None
    assert file.index.lengths.tolist() == [3, 1, 5, 2, 1, 2]
    assert file.index.documents.tolist() == [0, 2, 3, 6]
    item = np.dtype(dtype).itemsize
    assert file.index.pointers.tolist() == [place * item for place in (0, 3, 4, 9, 11, 12)]
    check_index(file.index, 14 * item, whole=True)


@pytest.mark.parametrize(("letter", "dtype"), [("H", "uint16"), ("I", "uint32")])
def test_plain_tokens_are_read_as_they_were_written(
    letter: str, dtype: str, tmp_path: Path
) -> None:
    path = plain(tmp_path / "set.bin", [0, 1, 65_535, 258], letter)
    assert open_tokens(path, dtype).tokens.tolist() == [0, 1, 65_535, 258]
    (tmp_path / "set.json").write_text(
        json.dumps({"format": "largebatch tokens 1", "dtype": dtype, "tokens": 4})
    )
    for said in (None, "uint16", "uint32"):  # the file knows better
        assert open_tokens(path, said).tokens.tolist() == [0, 1, 65_535, 258]


def test_a_path_is_a_name_with_or_without_its_ending_a_pattern_or_a_list(tmp_path: Path) -> None:
    for name in ("b-2", "b-10", "a"):
        plain(tmp_path / f"{name}.bin", [1])
    (tmp_path / "a.idx").touch()

    def found(*paths: str) -> list[str]:
        spelled = [f"{tmp_path}/{path}" for path in paths]
        return [
            path.name
            for path in find_files(spelled if len(spelled) > 1 else spelled[0], "task.path")
        ]

    assert found("a") == found("a.bin") == found("a.idx") == ["a.bin"]
    assert found("b-*") == found("b-*.bin") == ["b-10.bin", "b-2.bin"]
    assert found("b-*", "a") == ["b-10.bin", "b-2.bin", "a.bin"]
    with pytest.raises(ValueError, match=r"task\.path=.*c is no file of tokens"):
        found("c")
    with pytest.raises(ValueError, match=r"task\.path=.*c\* is no file of tokens"):
        found("c*")


def header(code: int = 8, version: int = 1, sequences: int = 6, documents: int = 4) -> bytes:
    return b"MMIDIDX\0\0" + struct.pack("<QBQQ", version, code, sequences, documents)


def patched(at: int, content: bytes) -> Callable[[bytes], bytes]:
    return lambda whole: whole[:at] + content + whole[at + len(content) :]


# What is done to the .idx of DOCUMENTS as uint16 (lengths from byte 34, pointers from 58, documents
# from 106), and what the sentence must say beside its name.
WRONG_INDEX = {
    "another magic": (patched(0, b"TNTIDX\0\0\0"), ["MMIDIDX"]),
    "an empty file": (lambda whole: b"", ["MMIDIDX"]),
    "half a header": (lambda whole: whole[:20], ["cut short", "20", "34"]),
    "another version": (patched(9, b"\x02"), ["version 2"]),
    "values of float32": (patched(17, b"\x07"), ["float32", "code 7"]),
    "an unknown type": (patched(17, b"\x63"), ["unknown", "code 99"]),
    "a cut index": (lambda whole: whole[:-1], ["137", "138", "cut short"]),
    "a longer index": (lambda whole: whole + b"\0" * 6, ["144", "138"]),
    "a count that is absurd": (patched(18, b"\xff" * 8), ["18446744073709551615"]),
    "no sequences": (lambda whole: header(sequences=0, documents=0), ["no sequences"]),
    "documents that end early": (patched(130, b"\x05"), ["documents end at sequence 5", "6"]),
    "a first pointer that is not 0": (patched(58, b"\x02"), ["sequence 0", "byte 2"]),
    "a pointer out of range": (patched(66, struct.pack("<q", 10**9)), ["sequence 0", "1000000000"]),
    "a negative pointer": (patched(74, struct.pack("<q", -8)), ["sequence 1", "byte -8"]),
    "a gap": (patched(66, struct.pack("<q", 8)), ["sequence 0 has 3 tokens", "one after another"]),
    "a negative length": (patched(38, struct.pack("<i", -1)), ["sequence 1", "-1 tokens"]),
    "a last length that is more than the .bin holds": (
        patched(54, struct.pack("<i", 200)),
        ["ends at byte 424", "28"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_INDEX)
def test_a_wrong_index_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    spoil, told = WRONG_INDEX[case]
    path = megatron(tmp_path / "set", DOCUMENTS)
    index = path.with_suffix(".idx")
    index.write_bytes(spoil(index.read_bytes()))
    with pytest.raises(ValueError, match=re.escape(str(index))) as refusal:
        open_tokens(path)
    assert all(word in str(refusal.value) for word in told), str(refusal.value)


@pytest.mark.parametrize("change", [-2, -1, 2, 5000])
def test_a_bin_of_another_length_than_its_index_says_is_refused(
    change: int, tmp_path: Path
) -> None:
    path = megatron(tmp_path / "set", DOCUMENTS)
    content = path.read_bytes() + bytes(5000)
    path.write_bytes(content[: 28 + change])
    with pytest.raises(ValueError, match=f"ends at byte 28, and it holds {28 + change}"):
        open_tokens(path)


def test_a_long_index_is_checked_in_stretches_and_whole_where_that_is_asked(
    tmp_path: Path,
) -> None:
    count = 200_000
    (tmp_path / "set.bin").write_bytes(bytes(2 * count))
    pointers = 2 * np.arange(count, dtype="<i8")
    middle = 10_000  # in none of the 16 stretches
    spoiled = {"ends": count - 1, "middle": middle}
    for where, place in spoiled.items():
        changed = pointers.copy()
        changed[place] += 2
        (tmp_path / "set.idx").write_bytes(
            header(sequences=count, documents=2)
            + np.ones(count, "<i4").tobytes()
            + changed.tobytes()
            + np.array([0, count], "<i8").tobytes()
        )
        if where == "ends":
            with pytest.raises(ValueError, match="ends at byte 400002"):
                open_tokens(tmp_path / "set.bin")
        else:
            open_tokens(tmp_path / "set.bin")
            with pytest.raises(ValueError, match=f"sequence {place - 1} has 1 tokens"):
                check_index(open_index(tmp_path / "set.idx"), 2 * count, whole=True)


SIDECAR = {"format": "largebatch tokens 1", "dtype": "uint16", "tokens": 4}
WRONG_PLAIN = {
    "nothing that says what it holds": (b"12345678", None, None, ["task.dtype=uint16 or uint32"]),
    "an empty file": (b"", None, "uint16", ["is empty"]),
    "an odd size": (b"123", None, "uint16", ["3 bytes", "uint16", "cut short"]),
    "no whole number of four bytes": (b"123456", None, "uint32", ["6 bytes", "uint32"]),
    "fewer tokens than were written": (b"123456", SIDECAR, None, ["3 tokens", "set.json says 4"]),
    "a sidecar of a later format": (
        b"12345678",
        SIDECAR | {"format": "largebatch tokens 2"},
        None,
        ["set.json", "largebatch tokens 2"],
    ),
    "a sidecar of another type": (b"12345678", SIDECAR | {"dtype": "f4"}, None, ["'f4'"]),
    "an array of NumPy's": (b"\x93NUMPY\x01\x00", None, "uint16", ["NumPy"]),
    "a shard of llm.c's": (
        struct.pack("<4i", 20240520, 1, 100, 0),
        None,
        "uint16",
        ["llm.c", "header"],
    ),
    "something that is compressed": (b"\x1f\x8b\x08\x00", None, "uint16", ["gzip"]),
    "an index": (b"MMIDIDX\0\0" + bytes(25), None, "uint16", ["Megatron index"]),
}


@pytest.mark.parametrize("case", WRONG_PLAIN)
def test_a_wrong_plain_file_is_refused_by_its_name(case: str, tmp_path: Path) -> None:
    content, sidecar, dtype, told = WRONG_PLAIN[case]
    path = tmp_path / "set.bin"
    path.write_bytes(content)
    if sidecar is not None:
        (tmp_path / "set.json").write_text(json.dumps(sidecar))
    with pytest.raises(ValueError, match="set") as refusal:
        open_tokens(path, dtype)
    assert all(word in str(refusal.value) for word in told), str(refusal.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"model_type": "gpt2"}',
        '{"dtype": "uint32", "tokens": 7}',
        '{"text": "one"}\n{"text": "two"}\n',
        "[]",
        "\xff",
        '{"format": "largebatch tokens 1", "dtype": "uint32"' + " " * 70_000 + "}",
    ],
)
def test_somebody_elses_json_beside_the_tokens_says_nothing(text: str, tmp_path: Path) -> None:
    path = plain(tmp_path / "set.bin", [1, 2, 3])
    (tmp_path / "set.json").write_text(text, encoding="latin-1")
    assert open_tokens(path, "uint16").tokens.tolist() == [1, 2, 3]


def test_windows_share_a_token_and_make_every_other_a_target_once(tmp_path: Path) -> None:
    files = [
        open_tokens(plain(tmp_path / "a.bin", list(range(0, 22))), "uint16"),
        open_tokens(plain(tmp_path / "b.bin", [100, 101]), "uint16"),  # too short for a window
        open_tokens(megatron(tmp_path / "c", [[list(range(200, 211))]])),
    ]
    windows = Windows(files, length=5, vocabulary=300)
    assert len(windows) == 4 + 0 + 2
    read = windows.read(np.arange(6))
    assert read[0].tolist() == [0, 1, 2, 3, 4, 5]
    assert read[:, 1:].ravel().tolist() == [*range(1, 21), *range(201, 211)]
    assert read[:, 0].tolist() == [0, 5, 10, 15, 200, 205]
    some = windows.read(np.array([5, 0, 5]))
    assert some.tolist() == read[[5, 0, 5]].tolist()


@pytest.mark.parametrize(("token", "shown"), [(60_000, "60000"), (-3, "-3")])
def test_an_id_outside_the_vocabulary_is_refused_with_its_place(
    token: int, shown: str, tmp_path: Path
) -> None:
    tokens = [1] * 40
    tokens[27] = token
    path = megatron(tmp_path / "set", [[tokens]], "int32")
    windows = Windows([open_tokens(path)], length=5, vocabulary=50_257)
    windows.read(np.array([0, 1, 2, 3, 4, 6]))
    expected = f"{path} holds the token {shown} at place 27 (read as int32), and task.vocabulary"
    with pytest.raises(ValueError, match=re.escape(expected)):
        windows.read(np.array([2, 5]))


def test_the_fingerprint_is_of_the_content_and_of_nothing_else(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 1000, 500_000).astype("<u2")
    prints = {}
    for name, change in {"a": None, "b": None, "first": 0, "last": -1}.items():
        changed = tokens.copy()
        if change is not None:
            changed[change] += 1
        changed.tofile(tmp_path / f"{name}.bin")
        prints[name] = open_tokens(tmp_path / f"{name}.bin", "uint16").fingerprint()
    assert prints["a"] == prints["b"]
    assert len({prints["a"], prints["first"], prints["last"]}) == 3
    # A short file is covered wholly.
    for place in range(0, 1000, 99):
        changed = tokens[:1000].copy()
        changed[place] += 1
        changed.tofile(tmp_path / "short.bin")
        prints[str(place)] = open_tokens(tmp_path / "short.bin", "uint16").fingerprint()
    assert len(set(prints.values())) == 3 + 11


def test_more_files_are_read_than_a_process_may_open(tmp_path: Path) -> None:
    """Of both kinds, an index beside every other one: a map keeps no file open."""
    files = [plain(tmp_path / f"plain-{place}.bin", [place, 1, 2]) for place in range(40)]
    files += [megatron(tmp_path / f"set-{place}", [[[place, 1, 2]]]) for place in range(40)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (held + 30, hard))
    try:
        opened = [open_tokens(file, "uint16") for file in files]
        assert [int(file.tokens[0]) for file in opened] == 2 * [*range(40)]
        assert len(os.listdir("/proc/self/fd")) == held
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_file_that_is_replaced_stays_what_it_was_and_cannot_be_written_to(tmp_path: Path) -> None:
    path = plain(tmp_path / "a.bin", [1, 2, 3])
    tokens = open_tokens(path, "uint16").tokens  # the map lives as long as this view of it
    gc.collect()
    plain(tmp_path / "b.bin", [7, 8, 9]).replace(path)
    assert tokens.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        tokens[0] = 5
