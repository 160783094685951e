"""Work shared out with a copy of this process: in order, and what fails is told."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from largebatch.benchmarks.report import write_runs
from largebatch.study.forks import made, may_fork

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


def place_and_process(place: int) -> tuple[int, int]:
    return place, os.getpid()


def in_a_fresh_process(script: str, *words: str, **variables: str) -> str:
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout


@needs_fork
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4])
def test_what_calls_return_is_in_their_order_and_every_second_is_made_elsewhere(count: int) -> None:
    here = os.getpid()
    found = made([partial(place_and_process, place) for place in range(count)], forked=True)
    assert [place for place, _ in found] == [*range(count)]
    assert all((process == here) == (place % 2 == 0) for place, process in found)
    alone = made([partial(place_and_process, place) for place in range(count)], forked=False)
    assert alone == [(place, here) for place in range(count)]


@needs_fork
def test_what_a_copy_fails_at_is_done_again_and_told_here() -> None:
    here = os.getpid()

    def only_here() -> int:
        if os.getpid() != here:
            raise OSError("of the copy")
        return 1

    def never() -> int:
        raise ValueError("no such picture")

    assert made([lambda: 0, only_here], forked=True) == [0, 1]
    told: list[list[Callable[[], int]]] = [[lambda: 0, never], [never, lambda: 0]]
    for calls in told:
        with pytest.raises(ValueError, match="no such picture"):
            made(calls, forked=True)


MAY = """
import threading
from largebatch.study.forks import may_fork
import numpy
numpy.ones((300, 300)) @ numpy.ones((300, 300))
print(may_fork())
threading.Thread(target=threading.Event().wait, daemon=True).start()
print(may_fork())
"""


def test_a_process_with_threads_or_with_torch_makes_no_copy() -> None:
    assert "torch" in sys.modules
    assert not may_fork()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    assert in_a_fresh_process(MAY).split() == [str(cores > 1), "False"]


REPORT = """
import sys
from largebatch.study import forks
forks.may_fork = lambda: sys.argv[1] == "True"
import largebatch.study.report as report
report.may_fork = forks.may_fork
made = report.made
report.made = lambda calls, forked: print("forked", forked) or made(calls, forked=forked)
sys.exit(report.main(sys.argv[2:]))
"""


@needs_fork
@pytest.mark.drawn
def test_a_report_is_the_same_whoever_draws_its_pictures(tmp_path: Path) -> None:
    write_runs(tmp_path / "runs", 72)
    for forked in ("True", "False"):
        words = [str(tmp_path / "runs"), "--out", str(tmp_path / forked)]
        # With as many threads in numpy as it likes: they are no hindrance.
        told = in_a_fresh_process(REPORT, forked, *words, OMP_NUM_THREADS="2")
        assert f"forked {forked}" in told
    alone, shared = (
        {
            path.name: path.read_bytes().replace(forked.encode(), b"")
            for path in (tmp_path / forked).iterdir()
        }
        for forked in ("False", "True")
    )
    assert len([name for name in alone if name.endswith((".png", ".svg"))]) >= 6
    assert alone == shared
