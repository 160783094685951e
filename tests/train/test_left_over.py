"""What a shell, a launcher or a file system may lack or have left over."""

import errno
import fcntl
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

from largebatch.common.errors import ConfigError
from largebatch.common.files import write_whole
from largebatch.distributed.launchers import ranks_from
from largebatch.records.heartbeat import Heartbeat
from largebatch.train.lr_find.results import COLUMNS, append
from largebatch.train.reporting.reporter import Events


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "", "WORLD_SIZE": ""},
        {"RANK": "0", "WORLD_SIZE": "two"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
        {"RANK": "0", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "70000"},
        {"SLURM_PROCID": "", "SLURM_STEP_NUM_TASKS": "1"},
        {"LARGEBATCH_RANKS": "many"},
    ],
    ids=str,
)
def test_variables_that_say_nothing_are_refused_with_the_way_out(
    environment: dict[str, str],
) -> None:
    with pytest.raises(ConfigError, match="unset"):
        ranks_from(environment)


CHILD = """
import sys, time
from largebatch.distributed.ranks import die_with_parent
die_with_parent()
print("up", flush=True)
time.sleep(1.5)
open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize(
    "mark",
    ["RANK=0 WORLD_SIZE=1", "PMI_RANK=0 PMI_SIZE=1", "SLURM_PROCID=0 SLURM_STEP_NUM_TASKS=1"],
)
def test_one_rank_outlives_the_shell_that_began_it(mark: str, tmp_path: Path) -> None:
    end = tmp_path / "end"
    (tmp_path / "child.py").write_text(CHILD)
    shell = (
        f"{mark} nohup {sys.executable} child.py {end} > said 2>&1 & until [ -s said ]; do :; done"
    )
    subprocess.run(["bash", "-c", shell], cwd=tmp_path, timeout=600, check=True)
    deadline = time.monotonic() + 600
    while not end.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_findings_are_kept_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    for number in range(2):
        append(tmp_path / "lr_find.csv", dict.fromkeys(COLUMNS, number))
    assert len((tmp_path / "lr_find.csv").read_text().splitlines()) == 3
    assert capsys.readouterr().err.count("has no locks") == 1


def test_a_full_disk_ends_neither_heartbeat_nor_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Heartbeat(tmp_path, 1) as heartbeat:
            resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
            heartbeat.enter("save")
            Events(tmp_path).write("stop", step=1, samples=8, reason="a full disk")
            with pytest.raises(OSError, match="large"):
                write_whole(tmp_path / "summary.json", "{}" * 80)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert "a full disk" in capsys.readouterr().err
    assert not list(tmp_path.glob(".*"))  # drafts


FULL = """
import resource, signal, sys
import largebatch.train.run
from largebatch.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), most))
sys.exit(main(["train", "task=digits", "optim=sgd", "batch.size=64", "budget.samples=1280",
               "target.loss=null", "hydra.run.dir=run"]))
"""


@pytest.mark.parametrize(
    ("most_bytes", "code", "word"),
    [
        (300, 2, "the run's folder cannot be written: "),
        (5000, 1, "the record in {folder}/run could not be completed: "),
    ],
    ids=["from the start", "in the middle"],
)
def test_a_disk_that_is_full_is_told_and_costs_the_record_alone(
    most_bytes: int, code: int, word: str, tmp_path: Path
) -> None:
    done = forked.run(
        [sys.executable, "-c", FULL, str(most_bytes)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == code
    assert f"largebatch: {word.format(folder=tmp_path)}[Errno 27]" in done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert all(line.endswith("\n") for line in lines[:-1])
    if code == 1:
        assert "failed after 20 steps" in done.stdout  # it has trained to its end
        assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 20
