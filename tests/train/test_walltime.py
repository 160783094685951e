"""A run knows when its job ends, saves in time, and goes on by the same command."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import team_ranks
from fixture_types import ReadRun, Train

from largebatch.distributed import walltime
from largebatch.distributed.addresses import free_port
from largebatch.distributed.walltime import JOB_END, end_of_job, find_stop, time_of_day

SLOW = """
import time
from largebatch.train.tasks.digits import Digits
class Slow(Digits):
    def train_batch(self, indices):
        time.sleep(0.02)
        return super().train_batch(indices)
"""
"""A task whose steps wait: until a run's end comes, others have the processor."""
LONG = [
    "task=digits", "task._target_=slow_digits.Slow", "optim=sgd", "target.loss=null",
    "budget.samples=4e6", "batch.size=64", "evaluation.growth=2",
    "checkpoint.every_samples=1e9", "resume=auto", "hydra.run.dir=run",
]  # fmt: skip


def saved(folder: Path) -> list[int]:
    names = [path.name for path in sorted((folder / "checkpoints").glob("samples-*"))]
    return [int(name.removeprefix("samples-")) for name in names]


def test_all_ranks_stop_and_save_at_one_step_and_go_on_by_the_same_command(
    read_run: ReadRun, tmp_path: Path
) -> None:
    (tmp_path / "slow_digits.py").write_text(SLOW)
    before = 0
    for _ in range(2):
        now = time.time() + 3
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        ranks = team_ranks.begin([meeting] * 2, ["train", *LONG, f"stop_at={now}"], tmp_path)
        for rank in ranks:
            rank.wait(100)
        said = (tmp_path / "said-0").read_text()
        assert [rank.returncode for rank in ranks] == [130, 0], said
        lines, summary = read_run(tmp_path / "run")
        assert (summary["status"], summary["data_parallel_size"]) == ("interrupted", 2)
        assert summary["reason"] == f"stop_at={time_of_day(now)} has come"
        assert summary["reason"] in said
        assert saved(tmp_path / "run")[-1] == summary["samples"] > before
        assert [line["step"] for line in lines] == list(range(1, summary["steps"] + 1))
        before = summary["samples"]


def test_a_run_saves_before_its_job_ends(
    train: Train, read_run: ReadRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_digits.py").write_text(SLOW)
    ends: list[float] = []

    def end_soon(walltime: int | None, environment: Mapping[str, str]) -> float:
        assert walltime is None
        assert environment is os.environ
        ends.append(time.time() + 4)
        return ends[-1]

    monkeypatch.setattr(walltime, "end_of_job", end_soon)
    assert train(*LONG) == 130
    assert time.time() < ends[-1] + 30  # on a busy machine
    _, summary = read_run(tmp_path / "run")
    assert summary["status"] == "interrupted"
    assert summary["reason"] == f"1 s before its job's end at {time_of_day(ends[-1])}"
    assert saved(tmp_path / "run") == [summary["samples"]]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("stop_at=tomorrow", "stop_at must be a date and a time of day, such as 2026-11-30T18:00"),
        ("stop_at=true", "got True"),
        ("stop_before_walltime=-1", "stop_before_walltime must be"),
    ],
)
def test_what_is_no_time_is_refused(
    word: str, sentence: str, train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(*LONG, word) == 2
    assert sentence in capsys.readouterr().err


def test_a_stop_is_some_seconds_before_the_end_and_never_as_a_job_begins() -> None:
    now = time.time()
    stop = find_stop(None, 300, {JOB_END: str(now + 3600)})
    assert stop is not None
    assert stop.at == pytest.approx(now + 3300, abs=1)
    late = find_stop(None, 300, {JOB_END: str(now + 400)})  # a start again, or a short job
    assert late is not None
    assert late.at == pytest.approx(now + 300, abs=1)
    first = find_stop(now + 60, 300, {JOB_END: str(now + 3600)})
    assert first is not None
    assert first.at == now + 60
    assert find_stop(None, 300, {}) is None
    assert find_stop(None, 300, {JOB_END: str(now - 1)}) is None  # of another job, left behind


def test_what_a_sweep_ends_in_time_does_not_look_itself() -> None:
    environment = {JOB_END: "", "PBS_WALLTIME": "3600", "SLURM_JOB_END_TIME": "5000"}
    assert end_of_job(None, environment) is None


def test_pbs_is_asked_when_a_job_of_ones_own_script_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {"stime": "Sun Nov 29 12:00:00 2026", "Resource_List": {"walltime": "01:30:05"}}
    told = tmp_path / "told"
    told.write_text(json.dumps({"Jobs": {"7.pbs": job}}))
    (tmp_path / "qstat").write_text(f'#!/bin/sh\n[ "$*" = "-f -F json 7.pbs" ] && cat {told}\n')
    (tmp_path / "qstat").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    begin = time.mktime((2026, 11, 29, 12, 0, 0, 0, 0, -1))
    assert end_of_job(None, {"PBS_JOBID": "7.pbs"}) == begin + 5405
    told.write_text("qstat: Unknown Job Id")
    assert end_of_job(None, {"PBS_JOBID": "7.pbs"}) is None
