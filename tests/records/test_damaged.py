"""Whatever a file of a run's folder holds, its readers come to an end, in words that name it."""

import copy
import io
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from largebatch.distributed.rank_dump import where_it_stands
from largebatch.launch.diagnose import command as explain
from largebatch.launch.diagnose.nic.record import Recorder
from largebatch.launch.diagnose.nic.report import format_survey
from largebatch.launch.diagnose.nic.survey import read_survey
from largebatch.launch.diagnose.run_times import read_steps
from largebatch.launch.sweeps.record import SweepRecord, samples_of, summary_of
from largebatch.launch.watch import command as watch
from largebatch.launch.watch import flight_recorder
from largebatch.launch.watch.report import report as watch_report
from largebatch.records.checkpoints import listed
from largebatch.records.record import words_of
from largebatch.records.summary import has_ended
from largebatch.study import report
from largebatch.study.protocol.identity import check_identity
from largebatch.study.single_runs.history import names_of, read_history
from largebatch.study.single_runs.layers import read_layers
from largebatch.study.single_runs.noise import read_noise
from largebatch.train import command as train_command
from largebatch.train.checkpoints import command as checkpoint_command
from largebatch.train.checkpoints.resume import find_resumption

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = "watch/2026-01-01_00-00-00"
CALL = {
    "process_group": ["0", "default_pg"], "collective_seq_id": 2, "is_p2p": False,
    "profiling_name": "gloo:all_reduce", "state": "scheduled", "retired": False,
    "input_sizes": [[10]],
}  # fmt: skip
STILL = {
    "reason": "run stands still: no step", "heartbeat": {"step": 3}, "culprits": [1], "silent": [],
    "findings": [{"kind": "missing", "group": ["0", "default_pg", "gloo"], "number": 2,
                  "calls": [[["all_reduce", [[10]], False], [0]]], "missing": [1]}],
    "places": [{"ranks": [1], "lines": ["mine.py:3 in step"]}],
}  # fmt: skip


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with two real runs, the first with all that a run's folder may hold."""
    root = tmp_path_factory.mktemp("study")
    words = (
        "task=digits optim=lamb batch.size=64 budget.samples=640 target.loss=0.1 "
        "record.layers=true noise.small=auto checkpoint.every_samples=320 hydra.job.chdir=false"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setattr(sys, "argv", ["largebatch"])
        patch.setattr(sys, "path", list(sys.path))
        patch.setenv("HYDRA_FULL_ERROR", "1")
        assert train_command.main([*words.split(), "hydra.run.dir=run"]) in (0, 3)
        shutil.copytree(root / "run", root / "other")
        run = root / "run"
        event = {"time": time.time(), "step": 3, "samples": 9, "kind": "skip", "reason": "large"}
        (run / "events.jsonl").write_text(json.dumps(event) + "\n")
        (run / ANSWERS).mkdir(parents=True)
        (run / ANSWERS / "report.json").write_text(json.dumps(STILL))
        for rank in range(2):
            said = where_it_stands(rank, 2)
            said |= {"collectives": [CALL] * (rank == 0), "groups": {"0": {"range": [0, 2, 1]}}}
            (run / ANSWERS / f"rank-{rank}.json").write_text(json.dumps(said))
        (run / "nic").mkdir()
        (root / "counter").write_text("5@1.0")
        recorder = Recorder(run / "nic/nic-x1.jsonl", "x1", {"cxi0/a": root / "counter"}, 1.0)
        for _ in range(3):
            recorder.sample()
            time.sleep(0.002)
        recorder.close()
        begun = {"time": 1.0, "event": "begun", "trial": "0", "attempt": 1, "words": ["a=1"]}
        (run / "trials.jsonl").write_text(json.dumps(begun) + "\n")
        (run / "study.json").write_text(json.dumps({"config": {"a": 1}}))
        yield root


Files = dict[str, bytes]


@pytest.fixture(scope="module")
def files(study: Path) -> Files:
    """What the first run's folder holds."""
    run = study / "run"
    paths = [path for path in run.rglob("*") if path.is_file()]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(paths)}


def restore(study: Path, files: Files) -> None:
    """Take back what has been damaged, and what readers have written."""
    run = study / "run"
    for path in run.rglob("*"):
        if not path.is_dir() and str(path.relative_to(run)) not in files:
            path.unlink()
    for name, content in files.items():
        if not (run / name).is_file():
            (run / name).unlink(missing_ok=True)
        elif (run / name).read_bytes() == content:
            continue
        (run / name).write_bytes(content)


def of_run(read: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda study: read(study / "run")


def resume(run: Path) -> None:
    config = (run.parent / "other" / ".hydra" / "config.yaml").read_text()
    found = find_resumption(run, config, 1)
    if found is not None:
        found.release()


def trials(run: Path) -> None:
    SweepRecord(run).close()


def networks(run: Path) -> None:
    survey, steps = read_survey(run, []), read_steps(run, [])
    if survey is not None:
        print("\n".join(format_survey(survey, steps)))


READERS: dict[str, Callable[[Path], Any]] = {
    "explain": lambda study: explain.main([str(study / "run")]),
    "explain --json": lambda study: explain.main([str(study / "run"), "--json"]),
    "watch": lambda study: watch.main([str(study / "run"), "--now", "--wait", "0.01"]),
    "answers": of_run(lambda run: print(watch_report(run / ANSWERS, "asked", None))),
    "flight": of_run(lambda run: flight_recorder.main([*map(str, (run / ANSWERS).glob("rank*"))])),
    "network": of_run(networks),
    "study": lambda study: print("\n".join(report.read_study(study).problems)),
    "layers": of_run(lambda run: read_layers(run, [])),
    "noise": of_run(lambda run: read_noise(run, [])),
    "run": of_run(lambda run: names_of([read_history(run, []), read_history(run, [])])),
    "checkpoints": of_run(lambda run: checkpoint_command.main(["ls", str(run)])),
    "bytes": of_run(lambda run: checkpoint_command.main(["verify", str(run)])),
    "ended": of_run(has_ended),
    "trial": of_run(summary_of),
    "interrupted": of_run(samples_of),
    "trials": of_run(trials),
    "identity": of_run(lambda run: check_identity(run, {"config": {"a": 1}})),
    "resume": of_run(resume),
    "words": of_run(words_of),
}


def said_by(name: str, study: Path) -> str:
    """What a reader says, in words or as a refusal; anything else that it raises is a fault."""
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        try:
            READERS[name](study)
        except (ValueError, FileNotFoundError) as error:
            raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
            if not raised_in.startswith(str(ROOT)):  # numpy's, say: no sentence of ours
                raise
            print(error)
    text = out.getvalue()
    assert "Traceback" not in text
    assert all(line.isprintable() for line in text.split("\n")), text
    return text


GARBAGE = [
    b"", b"\n", b"{", b"null\n", b"5\n", b"[]\n", b"{}\n", b"[1]\nnull\n", b"\x00\xff\xfe",
    b'"x"\n', b"[" * 100_000, b'{"a":' * 100_000, b'{"a": 1' + b"0" * 5000 + b"}\n",
    b'{"a": 1}' * 2, b"a: &a [1]\nb: *a\n", b"!!python/object/apply:os.getcwd []\n",
    b"${oc.env:HOME}\n", b"a: ${a}\n",
]  # fmt: skip
VALUES: list[Any] = [
    None, True, -1, 0, 0.5, 1e300, -1e300, 10**400, 2**63, math.nan, math.inf, "", "x", "²", "-1",
    "\x1b[2J\x07", "\u202e", "a\nb", "\ud800", "$x$", "=1+1", "a" * 10_000, [], {}, [[]], [None],
    [1, 2, 3], {"a": 1}, [{}], "../..", "\0",
]  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON value anything can be put."""
    inside = value.items() if isinstance(value, dict) else ()
    inside = enumerate(value[:3]) if isinstance(value, list) else inside
    return [at] * bool(at) + [place for key, held in inside for place in places(held, (*at, key))]


def damaged(content: bytes, lines: bool, draw: Any) -> bytes:
    """Another content: garbage, a part, or one value of its JSON exchanged or gone."""
    kind = draw(st.sampled_from(["value"] * 6 + ["garbage", "cut"]))
    if kind == "garbage":
        return draw(st.sampled_from(GARBAGE))  # type: ignore[no-any-return]
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    texts = content.decode().splitlines() if lines else [content.decode()]
    which = draw(st.integers(0, len(texts) - 1))
    try:
        held = json.loads(texts[which])
    except ValueError:  # a YAML file
        words = content.decode().split(": ")
        words[draw(st.integers(0, len(words) - 1))] = str(draw(st.sampled_from(VALUES)))
        return ": ".join(words).encode(errors="surrogatepass")
    place = draw(st.sampled_from(places(held)))
    at = held
    for key in place[:-1]:
        at = at[key]
    if draw(st.booleans()) or not isinstance(at, dict):
        at[place[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    else:
        del at[place[-1]]
    texts[which] = json.dumps(held)
    return "\n".join(texts).encode() + b"\n"


READ_BY = {
    "summary.json": ["explain", "study", "ended", "trial", "interrupted", "resume"],
    "metrics.jsonl": ["explain", "explain --json", "layers", "noise", "network", "resume"],
    "events.jsonl": ["explain", "explain --json"],
    "heartbeat.json": ["explain", "explain --json", "watch", "network"],
    "owner.json": ["explain", "resume"],
    "trials.jsonl": ["trials"],
    "study.json": ["identity"],
    "report.json": ["explain"],
    "rank": ["answers", "flight", "explain"],
    "nic": ["explain", "network"],
    "checkpoints": ["checkpoints", "bytes", "resume"],
    ".hydra": ["resume", "words", "study", "explain"],
}


@settings(derandomize=True, deadline=None, max_examples=120, database=None)
@given(data=st.data())
def test_a_damaged_file_takes_no_reader_down(
    study: Path, files: Files, data: st.DataObject
) -> None:
    kinds = (".json", ".jsonl", ".yaml")
    name = data.draw(st.sampled_from([name for name in files if name.endswith(kinds)]))
    changed = damaged(files[name], name.endswith(".jsonl"), data.draw)
    (study / "run" / name).write_bytes(changed)
    try:
        for reader in next((found for key, found in READ_BY.items() if key in name), ["explain"]):
            said_by(reader, study)
    finally:
        restore(study, files)


@pytest.mark.parametrize("reader", READERS)
def test_a_whole_folder_is_read_without_a_complaint(reader: str, study: Path) -> None:
    assert not re.search(r"must|damaged|cannot be read|left out", said_by(reader, study))


FIELDS = [
    ("heartbeat.json", "time", [1e300, [], "x", -1], ["explain", "watch"]),
    ("heartbeat.json", "step", [10**400, "x", 1.5], ["explain", "watch"]),
    ("heartbeat.json", "pid", ["x", -1, 10**400], ["explain", "watch"]),
    ("heartbeat.json", "world_size", [0, 10**12, "x"], ["explain", "watch"]),
    ("heartbeat.json", "state", ["x", 3], ["explain", "watch"]),
    ("metrics.jsonl", "step", [10**400, "x", [], -1], ["explain"]),
    ("metrics.jsonl", "seconds", [1e300, "x", {}], ["explain"]),
    ("events.jsonl", "time", [1e300, "x", []], ["explain"]),
    ("events.jsonl", "reason", [5, [], {}], ["explain"]),
    ("summary.json", "status", ["done", 5, []], ["explain", "study", "ended", "resume"]),
    ("summary.json", "steps", [10**400, "x", -1], ["explain", "study"]),
    ("summary.json", "lr", [0, "x", 1e300, []], ["study"]),
    ("summary.json", "optimizer", [None, 5, {}], ["study"]),
    (f"{ANSWERS}/report.json", "culprits", [["x"], 5, [10**400]], ["explain"]),
    (f"{ANSWERS}/rank-0.json", "rank", ["x", -1, 10**12], ["answers"]),
    (f"{ANSWERS}/rank-0.json", "size", ["x", 0, 10**12], ["answers"]),
]


@pytest.mark.parametrize(
    ("name", "field", "values", "readers"), FIELDS, ids=[f"{row[0]}-{row[1]}" for row in FIELDS]
)
def test_a_wrong_value_is_named_with_its_file_and_the_rest_is_shown(
    study: Path, files: Files, name: str, field: str, values: list[Any], readers: list[str]
) -> None:
    path = study / "run" / name
    content = files[name].decode()
    first, end, rest = content.partition("\n") if name.endswith("l") else (content, "", "")
    try:
        for value in values:
            path.write_text(json.dumps(json.loads(first) | {field: value}) + end + rest)
            for reader in readers:
                text = said_by(reader, study)
                assert re.search(rf"{re.escape(name)}(:1)?: {field} must be ", text), text
            if "study" in readers:
                found = report.read_study(study)
                assert [run.folder.name for run in found.runs] == ["other"]
    finally:
        restore(study, files)


ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGED = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
LISTED = "".join("- " + line.partition(": ")[2] + "\n" for line in ALIASES.splitlines())


@pytest.mark.parametrize(
    "content", [ALIASES, MERGED, LISTED, "a: " + "{a: " * 10**5, "- " * 10**4, "#" * (2 << 20)],
    ids=["aliases", "merged", "listed", "maps", "lists", "long"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml"])
def test_a_configuration_that_stands_for_more_than_it_holds_is_refused(
    name: str, content: str, study: Path, files: Files
) -> None:
    (study / "run" / ".hydra" / name).write_text(content)
    try:
        text = said_by({"config.yaml": "resume", "overrides.yaml": "words"}[name], study)
        assert re.search(rf"{name} (is damaged|has over 1 MiB).*restore it", text)
    finally:
        restore(study, files)


def test_what_is_no_file_is_named_and_not_waited_for(study: Path, files: Files) -> None:
    run = study / "run"
    for name in ("summary.json", "metrics.jsonl", "heartbeat.json", "events.jsonl"):
        (run / name).unlink()
        os.mkfifo(run / name)
        try:
            assert f"{name} is no file" in said_by("explain", study)
        finally:
            restore(study, files)


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints"])
def test_a_run_is_refused_where_a_file_and_a_folder_have_changed_places(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["largebatch"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    run = tmp_path / "run"
    run.mkdir()
    if name == "checkpoints":
        (run / name).touch()
    else:
        (run / name).mkdir()
        (run / ".hydra").mkdir()
        (run / ".hydra" / "config.yaml").touch()
    assert train_command.main(["task=digits", "hydra.run.dir=run", "resume=auto"]) == 2
    assert f"{name} cannot be used: " in capsys.readouterr().err.splitlines()[-1]


def test_what_is_no_folder_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    assert "is no folder" in said_by("explain", tmp_path)


def test_a_checkpoints_folder_may_have_any_name(study: Path) -> None:
    folder = study / "run" / "checkpoints"
    for name in ("samples-²", "samples-", "samples--1", "samples-1\x1b[2J", "samples-" + "9" * 200):
        (folder / name).mkdir()
        try:
            said_by("checkpoints", study)
            said_by("resume", study)
            assert len(listed(study / "run")) == 2
        finally:
            (folder / name).rmdir()
