"""A whole study through the command line: killed, resumed, interrupted, refused."""

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

SMALL = (
    "sweep", "study=digits", "study.optimizers=[sgd,lamb]", "study.batch_sizes=[32,64,128]",
    "study.start_batch=64", "study.rule_batches=[128]", "study.rules=[sqrt]", "target.loss=0.5",
    "study.search=[lr]", "study.report_seeds=[2,3]", "hydra.launcher.n_jobs=2",
)  # fmt: skip


def study(folder: Path, *more: str) -> "subprocess.Popen[str]":
    return forked.Popen(
        [sys.executable, "-m", "largebatch", *SMALL, f"hydra.sweep.dir={folder}", *more],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def summaries(folder: Path) -> dict[Path, int]:
    """Each finished run and when it was written."""
    return {
        path.relative_to(folder): path.stat().st_mtime_ns for path in folder.rglob("summary.json")
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A study that nothing disturbed, and what it printed."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    process = study(folder)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return folder, output


def test_a_study_ends_with_table_seconds_and_report(whole: tuple[Path, str]) -> None:
    folder, output = whole
    assert "study took " in output
    shares = re.search(
        r"(\d+) runs in .* of workers: (\d+)% training, (\d+)% evaluation, (\d+)% records, "
        r"(\d+)% waiting", output,
    )  # fmt: skip
    assert shares is not None
    assert f"({shares[1]} runs made)" in output
    assert 98 <= sum(int(share) for share in shares.groups()[1:]) <= 102
    assert shares[0] in (folder / "report.html").read_text()
    assert output.rstrip().endswith("report.html")
    for name in ("report.html", "curve.png", "learning_rate.png", "curve.csv", "fits.csv"):
        assert (folder / name).stat().st_size > 50
    rows = list(csv.DictReader((folder / "curve.csv").read_text().splitlines()))
    # Which stands first is the study's answer.
    assert sorted((row["optimizer"], int(row["batch_size"])) for row in rows) == [
        (name, size) for name in ("lamb", "sgd") for size in (32, 64, 128)
    ]
    assert all(row["missed"] == row["at_edge"] == "false" for row in rows)
    assert all(int(row["trials"]) >= 3 for row in rows)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.matrix
def test_a_study_cut_off_in_the_middle_goes_on_with_what_is_missing(
    number: signal.Signals, whole: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "study"
    process = study(folder)
    until = time.monotonic() + 120
    while len(summaries(folder)) < 12:
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    process.send_signal(number)
    process.communicate(timeout=600)
    assert process.returncode != 0
    before = summaries(folder)
    assert len(before) < len(summaries(whole[0]))
    again = study(folder)
    output, errors = again.communicate(timeout=600)
    assert again.returncode == 0, errors
    after = summaries(folder)
    assert after.keys() == summaries(whole[0]).keys()
    redone = {path for path, written in before.items() if after[path] != written}
    # Runs that the interrupt reached are on record as interrupted, and are the ones made again.
    assert len(redone) <= (2 if number == signal.SIGINT else 0)
    assert f"{len(before) - len(redone)} were there" in output
    for name in ("curve.csv", "fits.csv", "rules.csv"):
        assert (folder / name).read_text() == (whole[0] / name).read_text()


def test_a_finished_study_runs_nothing_again(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    before = summaries(folder)
    process = study(folder)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert "(0 runs made" in output
    assert summaries(folder) == before


def test_another_study_in_the_same_folder_is_refused(whole: tuple[Path, str]) -> None:
    folder, _ = whole
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    process = study(folder, "target.loss=0.4")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert "target.loss was 0.5, now 0.4" in errors
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("seed=1,2", "study.select_seeds"),
        ("target.loss=null", "target.loss"),
        ("study.start_batch=100", "study.start_batch"),
        ("study.optimizers=[sgd,lion]", "lion"),
        ("study.rules=[cubic]", "cubic"),
        ("study.batch_sizes=[]", "study.batch_sizes"),
    ],
)
def test_a_study_that_cannot_be_is_refused_in_one_sentence(
    override: str, named: str, tmp_path: Path
) -> None:
    process = study(tmp_path / "study", override)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 2
    assert errors.count("\n") == 1
    assert named in errors
    assert not list(tmp_path.rglob("summary.json"))


def test_an_ordinary_multirun_is_reported_too(tmp_path: Path) -> None:
    def largebatch(*words: str) -> str:
        done = forked.run(
            [sys.executable, "-m", "largebatch", *words],
            capture_output=True, text=True, timeout=600, cwd=tmp_path, env=os.environ,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    largebatch("sweep", "task=digits", "optim=adamw,lamb", "batch.size=64",
               "optim.lr=0.02,0.04", "target.loss=0.5", "hydra.sweep.dir=multi")  # fmt: skip
    assert len(list(tmp_path.glob("multi/*/summary.json"))) == 4
    output = largebatch("report", "multi")
    assert "adamw" in output
    assert "lamb" in output
    rows = list(csv.DictReader((tmp_path / "multi" / "curve.csv").read_text().splitlines()))
    assert [row["trials"] for row in rows] == ["2"] * 2
