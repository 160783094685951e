"""`largebatch bench start`: what it times and counts is a command of its own."""

from pathlib import Path

import pytest

from largebatch.benchmarks.start import once


def test_a_command_is_timed_and_its_files_are_counted(tmp_path: Path) -> None:
    seconds, worked, modules, files = once(["report", "--help"], tmp_path)
    assert worked > 0
    assert seconds > 0
    assert 100 < modules < 600  # no torch
    assert files > modules / 4  # those of its own, and of the standard library


def test_a_command_that_fails_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"no-such-command ended with 2: .*no-such-command"):
        once(["no-such-command"], tmp_path)
