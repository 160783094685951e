"""How a run may end: its status in `summary.json`, and the exit code of its command."""

from enum import IntEnum
from typing import Final


class ExitCode(IntEnum):
    """Exit codes of `largebatch`; `meaning` is what help texts say of each."""

    meaning: str

    DONE = 0, "reached the target, or spent the budget of a run that has none"
    FAILED = 1, "failed, or a check found something wrong"
    REFUSED = 2, "refused before it started"
    MISSED = 3, "spent its budget without reaching the target"
    DIVERGED = 4, "diverged"
    HUNG = 124, "hung, and watch ended it"
    INTERRUPTED = 130, "interrupted by SIGINT, or stopped before the end of its job"

    def __new__(cls, code: int, meaning: str) -> "ExitCode":
        member = int.__new__(cls, code)
        member._value_ = code
        member.meaning = meaning
        return member


STATUS_CODES: Final = {
    "reached": ExitCode.DONE,
    "exhausted": ExitCode.DONE,
    "diverged": ExitCode.DIVERGED,
    "interrupted": ExitCode.INTERRUPTED,
    "failed": ExitCode.FAILED,
}
"""Without a signal, and where an exhausted run had no target to miss."""
STATUSES: Final = tuple(STATUS_CODES)
UNFINISHED: Final = ("interrupted", "failed")
"""After these a run may be resumed."""

FINAL_CODES: Final = (ExitCode.DONE, ExitCode.REFUSED, ExitCode.MISSED, ExitCode.DIVERGED)
"""After these a restart has nothing to add."""


def exit_code_help() -> str:
    """The codes with their meanings, one a line."""
    lines = [f"  {code:<3d} {code.meaning}" for code in ExitCode]
    signals = "  128 + N interrupted by signal N (143 SIGTERM, 140 SIGUSR2, 152 SIGXCPU)"
    return "\n".join(("exit codes:", *lines, signals))
