"""Whatever a file holds, its reader names file and field in one sentence, and does not wait."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from largebatch.common.text import printable, shown
from largebatch.records import Fields, RecordError, find_fields, last_fields, read_fields
from largebatch.records import fields as checks
from largebatch.records.reading import MOST_LINE_BYTES, read_lines


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": ' * 200_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "is not valid JSON"),
        (b"null", "must hold an object, got None"),
        (b"[1]", "must hold an object, got [1]"),
    ],
)
def test_what_is_no_object_is_said_with_the_file(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(RecordError) as refusal:
        read_fields(path)
    assert str(refusal.value).startswith(f"{path} ")
    assert said in str(refusal.value)
    problems: list[str] = []
    assert find_fields(path, problems) is None
    assert problems == [str(refusal.value)]


def test_what_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "circle").symlink_to("circle")
    for name in ("pipe", "folder", "device", "circle"):
        problems: list[str] = []
        assert find_fields(tmp_path / name, problems) is None
        assert [*read_lines(tmp_path / name, problems)] == []
        assert last_fields(tmp_path / name, problems) is None
        assert len(problems) == 3
        assert all(name in problem for problem in problems)
    assert find_fields(tmp_path / "absent", problems := []) is None
    assert last_fields(tmp_path / "absent", problems) is None
    assert [*read_lines(tmp_path / "absent", problems)] == problems == []


BAD: list[tuple[checks.Check[Any], list[Any]]] = [
    (checks.whole(), [-1, 1.0, True, "1", None, [], 10**400, 2**63]),
    (checks.whole(1, 9), [0, 10]),
    (checks.number, [None, "1", True, [], 10**400, float("inf"), float("nan")]),
    (checks.number_or_none, ["1", True, [], 10**400]),
    (checks.positive, [0, -1, float("inf"), float("nan"), None, True, "x"]),
    (checks.moment, [None, -1, 1e300, [], "now", float("nan"), True, 10**400]),
    (checks.text, [None, "", 3, []]),
    (checks.one_of("a", "b"), ["c", None, [], {}]),
    (checks.flag, [0, 1, None, "true"]),
    (checks.mapping, [None, [], "x"]),
    (checks.listing, [None, {}, "x"]),
    (checks.list_of(checks.whole()), [None, ["x"], [1, -1]]),
    (checks.optional(checks.whole()), ["x", -1]),
]


@pytest.mark.parametrize(("check", "values"), BAD)
def test_a_wrong_value_is_said_with_file_field_and_value(
    check: checks.Check[Any], values: list[Any]
) -> None:
    for value in values:
        record = Fields({"key": value}, "a.json")
        with pytest.raises(RecordError, match=r"^a\.json: key must be .+, got .+$"):
            record.take("key", check)
        assert record.find("key", check) is None
        assert len(record.problems) == (value is not None)
    with pytest.raises(RecordError, match=r"^a\.json: the key key is missing$"):
        Fields({}, "a.json").take("key", check)


def test_objects_within_are_named_by_their_place() -> None:
    record = Fields({"a": {"b": {"c": -1}}, "d": [{"e": "x"}, 5], "f": 3}, "a.json")
    assert record.inside("a").inside("b").find("c", checks.whole()) is None
    assert [entry.find("e", checks.whole()) for entry in record.each("d")] == [None]
    assert record.find_inside("f").find("g", checks.whole()) is None
    assert record.problems == [
        "a.json: a: b: c must be a whole number >= 0, got -1",
        "a.json: d[0]: e must be a whole number >= 0, got 'x'",
        "a.json: d[1] must be an object, got 5",
        "a.json: f must be an object, got 3",
    ]


def test_lines_that_hold_no_object_are_noted_once_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    good = [{"step": step} for step in range(3)]
    lines = [json.dumps(line) for line in good]
    path.write_text("\n".join([lines[0], "5", "null", "[1]", lines[1], "{", lines[2]]) + '\n{"s')
    problems: list[str] = []
    assert [line.values for _, line in read_lines(path, problems)] == good
    assert problems == [f"{path}:2 must hold an object, got 5, and 3 more such"]
    last = last_fields(path, problems)
    assert last is not None
    assert last.values == good[-1]


def test_a_line_without_end_is_passed_by_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"step": 1}\n' + b'{"a": "' + b"x" * (2 * MOST_LINE_BYTES + 5) + b'"}\n')
        file.write(b'{"step": 2}\n')
    problems: list[str] = []
    found = [(number, line.values) for number, line in read_lines(path, problems)]
    assert found == [(1, {"step": 1}), (3, {"step": 2})]
    assert len(problems) == 1
    assert f"{path}:2" in problems[0]


def test_the_last_line_is_read_from_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(20_000)))
    last = last_fields(path, [])
    assert last is not None
    assert last.take("step", checks.whole()) == 19_999
    path.write_text(json.dumps({"step": 1, "more": "x" * 100_000}) + "\n")
    last = last_fields(path, [])
    assert last is not None
    assert last.take("step", checks.whole()) == 1


def test_text_has_no_effect_on_a_terminal() -> None:
    assert printable("données, 数据 = 5 %") == "données, 数据 = 5 %"
    assert printable("\x1b]0;x\x07\r\n\u202e\ud800\x9b") == r"\x1b]0;x\x07\r\n\u202e\ud800\x9b"
    assert checks.text("a\x1b[2J") == r"a\x1b[2J"
    assert len(shown("x" * 1000)) == 80
    assert shown(10**9999) == "a int too large to show"
