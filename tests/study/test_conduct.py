"""Conducting a study in a folder: its records are its only memory, whatever cuts it off."""

import errno
import fcntl
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import forked
import pytest
from made_studies import ARGUMENTS, Killed, Simulate, Workers, make_protocol, records
from rich.console import Console

from largebatch.common.errors import ConfigError
from largebatch.common.progress import minutes
from largebatch.conf.sweep_config import StudyConfig
from largebatch.records.record import RunFolder
from largebatch.study.protocol.conduct import (
    conduct,
    in_rounds,
    make_room,
    owned,
    result_of,
)
from largebatch.study.protocol.identity import check_grid, check_identity
from largebatch.study.protocol.progress import StudyProgress
from largebatch.study.protocol.protocol import Protocol
from largebatch.study.protocol.search import Result, Setting


def best(protocol: Protocol) -> dict[tuple[str, int], tuple[Setting | None, float]]:
    """Where each search ended."""
    return {
        place: (search.chosen, search.best_steps) for place, search in protocol.searches.items()
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, simulate: Simulate) -> Path:
    """A study that nothing disturbed, to look at."""
    folder = tmp_path_factory.mktemp("undisturbed")
    conduct(make_protocol(), folder, ARGUMENTS, Workers(folder, simulate))
    return folder


@pytest.fixture
def whole(undisturbed: Path, tmp_path: Path) -> Path:
    """A copy of it, to go on in."""
    return Path(shutil.copytree(undisturbed, tmp_path / "whole"))


def test_a_study_runs_every_job_once_and_ends(tmp_path: Path, simulate: Simulate) -> None:
    protocol, workers = make_protocol(), Workers(tmp_path, simulate)
    count = conduct(protocol, tmp_path, ARGUMENTS, workers)
    assert protocol.done
    assert count == {"made": len(workers.launched), "found": 0}
    assert sorted(workers.launched) == sorted(records(tmp_path))
    assert len(set(workers.launched)) == len(workers.launched)
    assert "adamw/batch-128/linear-32/seed-0" in records(tmp_path)
    assert protocol.searches["hopeless", 64].missed


def test_a_launcher_that_takes_rounds_comes_to_the_same_end(
    undisturbed: Path, tmp_path: Path, simulate: Simulate
) -> None:
    folder = tmp_path / "rounds"
    workers = Workers(folder, simulate)
    count = conduct(make_protocol(), folder, ARGUMENTS, in_rounds(workers))
    assert count == {"made": len(workers.launched), "found": 0}
    assert records(folder) == records(undisturbed)


def test_finished_runs_are_not_run_again(whole: Path, simulate: Simulate) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("summary.json")}
    protocol, workers = make_protocol(), Workers(whole, simulate)
    count = conduct(protocol, whole, ARGUMENTS, workers)
    assert protocol.done
    assert count == {"made": 0, "found": len(before)}
    assert workers.launched == []
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("summary.json")} == before


@pytest.mark.parametrize("status", ["half-written", "interrupted", "failed"])
def test_a_run_that_was_cut_off_is_discarded_and_run_again(
    status: str, whole: Path, simulate: Simulate
) -> None:
    intact = records(whole)
    name = list(intact)[3]
    summary = whole / name / "summary.json"
    if status == "half-written":
        summary.unlink()
    else:
        summary.write_text(json.dumps(intact[name] | {"status": status, "steps_to_target": None}))
    (whole / name / "left-over").touch()
    workers = Workers(whole, simulate)
    count = conduct(make_protocol(), whole, ARGUMENTS, workers)
    assert workers.launched == [name]
    assert count == {"made": 1, "found": len(intact) - 1}
    assert records(whole) == intact
    assert not (whole / name / "left-over").exists()


@pytest.mark.parametrize(
    ("dies_at", "interrupts"),
    [(0, True), (1, False), (2, True), (7, False), (20, True), (41, False)],
)
def test_a_study_cut_off_anywhere_comes_to_the_same_end(
    dies_at: int, interrupts: bool, undisturbed: Path, tmp_path: Path, simulate: Simulate
) -> None:
    folder = tmp_path / "cut off"
    first = Workers(folder, simulate, dies_at, interrupts)
    with pytest.raises(Killed):
        conduct(make_protocol(), folder, ARGUMENTS, first)
    second = Workers(folder, simulate)
    count = conduct(make_protocol(), folder, ARGUMENTS, second)
    assert records(folder) == records(undisturbed)
    assert count == {"made": len(second.launched), "found": dies_at}
    assert set(first.launched[:-1]).isdisjoint(second.launched)
    assert first.launched[-1] in second.launched


@pytest.mark.parametrize(
    ("words", "checkpoint", "stays"),
    [
        (["seed=1", "study=bytes", "hydra.sweep.dir=elsewhere"], True, True),
        (["seed=1", "study=bytes"], False, False),
        (["seed=2", "study=bytes"], True, False),
    ],
    ids=["goes-on", "no-checkpoint", "another"],
)
def test_a_run_that_was_cut_off_goes_on_from_its_checkpoint(
    words: list[str], checkpoint: bool, stays: bool, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with RunFolder(run, {"overrides.yaml": "- study=bytes\n- seed=1\n"}) as record:
        record.write({"step": 1})
    if checkpoint:
        (run / "checkpoints" / "samples-64").mkdir(parents=True)
    make_room(run, words)
    assert run.exists() is stays


def test_a_study_cut_off_again_and_again_comes_to_the_same_end(
    undisturbed: Path, tmp_path: Path, simulate: Simulate
) -> None:
    folder, num_conducts, finished = tmp_path / "cut off", 0, False
    while not finished:
        workers = Workers(folder, simulate, dies_at=2, interrupts=num_conducts % 2 == 0)
        with suppress(Killed):
            conduct(make_protocol(), folder, ARGUMENTS, workers)
            finished = True
        num_conducts += 1
    assert num_conducts > 10
    assert records(folder) == records(undisturbed)


def test_a_run_that_leaves_no_record_ends_the_study(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match=r"batch-64/lr-0\.016/seed-0 did not end"):
        conduct(make_protocol(), tmp_path, ARGUMENTS, in_rounds(lambda jobs: None))


def test_more_optimizers_and_batch_sizes_find_the_runs_that_are_there(
    whole: Path, tmp_path: Path, simulate: Simulate
) -> None:
    before = records(whole)
    larger = {"optimizers": ["sgd", "adamw", "hopeless"], "batch_sizes": [32, 64, 128, 256]}
    protocol, workers = make_protocol(**larger), Workers(whole, simulate)
    count = conduct(protocol, whole, ARGUMENTS, workers)
    assert count["found"] == len(before)
    assert set(workers.launched).isdisjoint(before)
    fresh = tmp_path / "fresh"
    conduct(make_protocol(**larger), fresh, ARGUMENTS, Workers(fresh, simulate))
    assert records(whole) == records(fresh)


@pytest.mark.parametrize("chance", [0, 1, 8, 13])
def test_seeds_that_join_later_decide_as_if_asked_for_at_once(chance: int, tmp_path: Path) -> None:
    """Runs that were cut are made again where they matter."""

    def simulate(optimizer: str, batch_size: int, lr: float, seed: int, give_up: int) -> Result:
        noise = random.Random(f"{chance} {batch_size} {lr:.4g} {seed}").uniform(1.0, 1.6)
        steps = (30 + 3200 / batch_size) * (1 + 0.2 * math.log2(lr / 0.02) ** 2) * noise
        return Result(steps, 2.19) if steps <= give_up else Result(None, 2.5)

    grown, fresh = tmp_path / "grown", tmp_path / "fresh"
    study: dict[str, Any] = {"optimizers": ["adamw"]}
    conduct(make_protocol(**study), grown, ARGUMENTS, Workers(grown, simulate))
    study |= {"select_seeds": [0, 1], "report_seeds": [2, 3, 4]}
    protocols = {folder: make_protocol(**study) for folder in (grown, fresh)}
    for folder, protocol in protocols.items():
        conduct(protocol, folder, ARGUMENTS, Workers(folder, simulate))
    assert best(protocols[grown]) == best(protocols[fresh])
    after = records(grown)
    for name, summary in records(fresh).items():
        if "linear" in name:
            assert after[name]["base_lr"] == summary["base_lr"]


IDENTITY = {
    "config": {"target": {"loss": 2.2}, "task": {"context": 8}},
    "optim=sgd": {"lr": 0.45, "momentum": 0.9},
}


def test_the_same_study_may_come_back_to_its_folder(tmp_path: Path) -> None:
    check_identity(tmp_path, IDENTITY)
    check_identity(tmp_path, IDENTITY)
    assert json.loads((tmp_path / "study.json").read_text()) == IDENTITY


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            {"config": {"target": {"loss": 2.1}, "task": {"context": 8}}},
            "config.target.loss was 2.2, now 2.1",
        ),
        (
            {"config": {"target": {"loss": 2.2}, "task": {}}},
            "config.task.context was 8, now None",
        ),
        (
            {"optim=sgd": {"lr": 0.45, "momentum": 0.9, "nesterov": True}},
            "optim=sgd.nesterov was None, now True",
        ),
    ],
)
def test_a_changed_study_is_refused_with_the_key_that_changed(
    change: dict[str, Any], difference: str, tmp_path: Path
) -> None:
    check_identity(tmp_path, IDENTITY)
    with pytest.raises(ConfigError, match=re.escape(f": {difference};")) as refusal:
        check_identity(tmp_path, IDENTITY | change)
    assert str(tmp_path) in str(refusal.value)
    assert "hydra.sweep.dir=" in str(refusal.value)
    assert json.loads((tmp_path / "study.json").read_text()) == IDENTITY


def test_new_optimizers_join_a_study_and_those_that_are_left_out_stay(tmp_path: Path) -> None:
    check_identity(tmp_path, IDENTITY)
    lamb = {"config": IDENTITY["config"], "optim=lamb": {"lr": 0.02}}
    check_identity(tmp_path, lamb)
    assert json.loads((tmp_path / "study.json").read_text()) == IDENTITY | lamb
    with pytest.raises(ConfigError, match=r"optim=sgd\.lr was 0\.45, now 0\.5"):
        check_identity(tmp_path, IDENTITY | {"optim=sgd": {"lr": 0.5, "momentum": 0.9}})


GRID: dict[str, Any] = {"optimizers": ["adamw"], "batch_sizes": [64, 128], "start_batch": 64}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizers": ["adamw", "lamb"], "batch_sizes": [64, 128, 256], "report_seeds": [1, 2]},
        {"rules": ["sqrt"], "rule_batches": [128]},
        {"batch_sizes": [64], "join": True},
        {"search": ["lr", "momentum"], "join": True},
    ],
)
def test_a_study_may_grow_in_its_folder_or_join_on_purpose(
    change: dict[str, Any], tmp_path: Path
) -> None:
    check_identity(tmp_path, IDENTITY)
    check_grid(tmp_path, StudyConfig(**GRID))
    check_grid(tmp_path, StudyConfig(**GRID | change))
    noted = json.loads((tmp_path / "study.json").read_text())
    assert noted["study"]["batch_sizes"] == (GRID | change)["batch_sizes"]
    assert noted["config"] == IDENTITY["config"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_sizes": [64, 256]}, r"batch_sizes=\[64, 128\], and this one has \[64, 256\]"),
        ({"start_batch": 128}, r"study\.start_batch=64, and this one has 128"),
        ({"optimizers": ["lamb"]}, r"study\.optimizers"),
        ({"search": ["lr", "momentum"]}, r"study\.search"),
    ],
)
def test_a_study_of_another_grid_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    check_identity(tmp_path, IDENTITY)
    check_grid(tmp_path, StudyConfig(**GRID))
    with pytest.raises(ConfigError, match=named) as refusal:
        check_grid(tmp_path, StudyConfig(**GRID | change))
    assert "study.join=true" in str(refusal.value)
    assert json.loads((tmp_path / "study.json").read_text())["study"]["start_batch"] == 64


def test_of_two_studies_in_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "study"
    with owned(folder):
        with (
            pytest.raises(ConfigError, match="another study is running in ") as refusal,
            owned(folder),
        ):
            raise AssertionError("two studies own one folder")
        assert str(folder) in str(refusal.value)
        with owned(tmp_path / "another"):
            pass
    with owned(folder):
        pass


def test_a_study_needs_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with owned(tmp_path):
        assert "has no locks" in capsys.readouterr().err


def test_the_ownership_dies_with_its_process(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path\n"
        "from largebatch.study.protocol.conduct import owned\n"
        "with owned(Path(sys.argv[1])): print('mine', flush=True); time.sleep(60)"
    )
    with forked.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "mine\n"
        with pytest.raises(ConfigError, match="another study"), owned(tmp_path):
            pass
        owner.kill()
        owner.wait()
    with owned(tmp_path):
        pass


@pytest.fixture
def fractions(tmp_path: Path, simulate: Simulate) -> tuple[list[float], str]:
    """The progress of a study after every run, and the lines it has printed."""
    protocol, workers, output = (
        make_protocol(select_seeds=[0, 1]),
        Workers(tmp_path, simulate),
        io.StringIO(),
    )
    console = Console(file=output, width=80)
    progress = StudyProgress(protocol, tmp_path, console)
    seen = [progress.fraction()]

    def watch() -> None:
        seen.append(progress.fraction())
        progress.show()

    workers.watch = watch
    with progress:
        while jobs := protocol.ask():
            progress.launched(jobs)
            with progress.watching():
                workers([[*ARGUMENTS, *job.overrides] for job in jobs])
            for job in jobs:
                protocol.tell(job, result_of(tmp_path, job))
                progress.ended(job)
                watch()
    return seen, output.getvalue()


def test_progress_grows_from_nothing_to_all(fractions: tuple[list[float], str]) -> None:
    seen, _ = fractions
    assert (seen[0], seen[-1]) == (0.0, 1.0)
    assert seen == sorted(seen)
    assert len(set(seen)) > 20
    assert all(fraction < 1.0 for fraction in seen[:-1])


def test_progress_is_a_line_a_tenth_where_there_is_no_terminal(
    fractions: tuple[list[float], str],
) -> None:
    seen, printed = fractions
    lines = [
        re.fullmatch(r" *(\d+)% · (\d+) runs · \d+:\d\d gone( · about \d+:\d\d left)?", line)
        for line in printed.splitlines()
    ]
    percents = [int(line[1]) for line in lines if line]
    assert len(percents) == len(lines)
    assert 5 <= len(percents) <= 10
    assert len({percent // 10 for percent in percents}) == len(percents)
    assert percents == sorted(percents)
    assert percents[-1] == 100
    runs = [int(line[2]) for line in lines if line]
    assert runs == sorted(runs)
    assert 20 < runs[-1] <= len(seen)


def test_a_study_that_finds_all_its_runs_says_so_too(
    whole: Path, simulate: Simulate, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    conduct(make_protocol(), whole, ARGUMENTS, Workers(whole, simulate))
    output, errors = capsys.readouterr()
    assert output == ""
    assert errors.splitlines()[-1].startswith("100% · 0 runs · 0:00 gone")


def test_progress_is_a_bar_on_a_terminal(tmp_path: Path, simulate: Simulate) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=80)
    protocol = make_protocol()
    with StudyProgress(protocol, tmp_path, console) as progress:
        for job in protocol.ask():
            protocol.tell(job, Result(30, 2.0))
        progress.show()
    assert re.search(r"\d+% · 0 runs · 0:0\d gone", output.getvalue())
    assert "\x1b[?25h" in output.getvalue()  # the cursor is shown again


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (187, "3:07"), (6000, "1:40:00")]
)
def test_times_are_minutes_and_seconds(seconds: float, text: str) -> None:
    assert minutes(seconds) == text
