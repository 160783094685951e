"""`python sweep_tied.py PID SIGNAL COMMAND …` becomes COMMAND, which gets the signal when PID, the
process that started it, is gone: nothing of a sweep that was killed trains on for long.

Linux only: the kernel keeps watch (prctl(2), PR_SET_PDEATHSIG), through execve.
"""

import ctypes
import os
import signal
import sys
from typing import Final

PR_SET_PDEATHSIG: Final = 1


def tied(command: list[str], number: int = signal.SIGTERM) -> list[str]:
    """The command, tied to this process."""
    # As a file, without site packages: it is there in a moment.
    return [sys.executable, "-IS", __file__, str(os.getpid()), str(int(number)), *command]


if __name__ == "__main__":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(sys.argv[2]))
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)  # it ended before the call above
    if os.getpgrp() != os.getpid():
        os.setsid()  # Ctrl-C is the sweep's, which passes it on
    os.execvp(sys.argv[3], sys.argv[3:])
