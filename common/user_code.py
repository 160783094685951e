"""What is shown of an error within a user's own task, model, optimizer or schedule."""

import os
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final

_PACKAGE: Final = "largebatch"
_LIBRARIES: Final = tuple(
    str(Path(path).resolve())
    for name in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")
    if (path := sysconfig.get_path(name))
)


_HYDRAS: Final = "HYDRA_FULL_ERROR"
_ASKED: Final = "LARGEBATCH_FULL_ERROR"


def errors_left_alone() -> dict[str, str]:
    """Variables that keep Hydra from wording errors, in this process and those that it starts, and
    that say whether the user wants whole traces.
    """
    return {_ASKED: os.environ.get(_ASKED, os.environ.get(_HYDRAS, "0")), _HYDRAS: "1"}


def of_user(error: BaseException) -> str | None:
    """The frames of the user's own files and the error itself, a few lines; None for an error in
    which they have no part, or where the whole is asked for by HYDRA_FULL_ERROR=1, as in all Hydra
    programs.
    """
    if os.environ.get(_ASKED, os.environ.get(_HYDRAS)) == "1":
        return None
    frames = [*_frames(error.__traceback__)]
    if not frames and not (isinstance(error, SyntaxError) and _is_users(error.filename)):
        return None
    shown = "".join(traceback.StackSummary.from_list(frames).format())
    what = "".join(traceback.format_exception_only(error)).rstrip()
    return (
        f"{shown}{what}\n{_PACKAGE}: an error in code of yours, above; the whole trace: "
        "HYDRA_FULL_ERROR=1"
    )


def _frames(trace: TracebackType | None) -> Iterator[traceback.FrameSummary]:
    for (frame, line), summary in zip(
        traceback.walk_tb(trace), traceback.extract_tb(trace), strict=True
    ):
        del line
        package = str(frame.f_globals.get("__package__") or frame.f_globals.get("__name__"))
        if package.partition(".")[0] != _PACKAGE and _is_users(summary.filename):
            yield summary


def _is_users(file: str | None) -> bool:
    if file is None or file.startswith("<"):
        return False
    return not str(Path(file).resolve()).startswith(_LIBRARIES)
