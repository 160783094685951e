"""What commands show on a terminal of 80 columns, and what in a pipe: no word is cut."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

import forked
import pytest

COLUMNS = 80
RUN = ("task=digits", "batch.size=64", "budget.samples=640", "target.loss=null")
FOLDER = "runs/of_a_name_that_is_not_short/and_deeper"


def on_terminal(folder: Path, *words: str) -> list[str]:
    """What a command shows, line by line, each as it was before the next drew over it."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, COLUMNS))
    told = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
    kept = {name: value for name, value in os.environ.items() if name not in told}
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", *words], cwd=folder, env=kept | {"TERM": "xterm"},
        stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # EIO: the last of the other ends is closed
            break
        if not part:
            break
        shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert process.wait(timeout=600) == 0, text
    return re.split(r"[\r\n]+", text)


def in_a_pipe(folder: Path, *words: str) -> list[str]:
    done = forked.run(
        [sys.executable, "-m", "largebatch", *words], cwd=folder, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return str(done.stdout).splitlines()


def test_the_lines_of_a_run_are_broken_between_words_on_a_terminal_and_whole_in_a_pipe(
    tmp_path: Path,
) -> None:
    words = ("train", *RUN, f"hydra.run.dir={FOLDER}")
    shown = on_terminal(tmp_path / "terminal", *words)
    whole = in_a_pipe(tmp_path / "pipe", *words)
    assert max(map(len, shown)) <= COLUMNS
    begins = re.compile(rf"digits · .+ · adamw · batch 64 · 640 samples · .+ · {FOLDER}")
    ends = re.compile(
        r"budget spent after 10 steps · 640 samples · \d+\.\d s of training · "
        rf"evaluation loss \d+\.\d+ · accuracy \d\.\d+ · {FOLDER}"
    )
    for line in (begins, ends):
        assert any(map(line.fullmatch, whole)), whole
        assert line.search(" ".join(" ".join(shown).split())), shown
    bars = [line for line in shown if re.search(r"\d+% · .*loss \d", line)]
    assert bars
    field = r"(\d+%|\S+ of \S+ samples|\S+( k)? samples/s|(lr|loss|eval|accuracy) \S+|\S+ left)"
    assert all(re.fullmatch(rf"\S+ +{field}( · {field})*", bar.rstrip()) for bar in bars), bars


def test_a_sweep_s_line_is_one_on_a_terminal_and_has_all_fields_in_a_pipe(tmp_path: Path) -> None:
    words = ("sweep", *RUN, "seed=0,1", "hydra.launcher.n_jobs=1", "hydra.sweep.dir=s")
    shown = on_terminal(tmp_path / "terminal", *words)
    whole = in_a_pipe(tmp_path / "pipe", *words)
    assert max(map(len, shown)) <= COLUMNS
    for seed in (0, 1):
        begins = f"{seed + 1} of 2 · seed={seed} → budget spent after 10 steps"
        loss = r" · evaluation loss \d+\.\d+"
        assert any(re.fullmatch(rf"{begins}{loss} · s/{seed}", line) for line in shown), shown
        full = rf"{begins} · 640 samples · .+ s of training{loss} · accuracy .+ · s/{seed}"
        assert any(re.fullmatch(full, line) for line in whole), whole


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path) -> None:
    for name in ("terminal", "pipe"):
        (tmp_path / name).mkdir()
