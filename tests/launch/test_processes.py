"""A command with all that it starts leaves this process as it was."""

import sys

import forked


def test_a_command_that_was_watched_leaves_no_zombie_and_adopts_nothing_later() -> None:
    code = """
import ctypes, os, psutil
from largebatch.launch.processes import ProcessGroupJob
with ProcessGroupJob(["sh", "-c", "(sleep 0.3 &); sleep 0.1"]) as job:
    while job.exit_code(0.05) is None or job.processes():
        pass
assert psutil.Process().children() == [], psutil.Process().children()
found = ctypes.c_int(7)
ctypes.CDLL(None).prctl(37, ctypes.byref(found), 0, 0, 0)
assert found.value == 0, found.value
"""
    done = forked.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
