"""A command with all that it starts on this machine: begun, passed signals, ended for good."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Final, NamedTuple, Self

from largebatch.common.errors import ConfigError

PASSED_ON: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2, signal.SIGXCPU)
"""Those by which a batch system, or a user, ends a run between two steps."""

ECHO_SECONDS: Final = 1.0

_PR_SET_CHILD_SUBREAPER: Final = 36


class Process(NamedTuple):
    """A process for good: ids are used again, not with the same time of start."""

    pid: int
    started: int
    """In the kernel's ticks."""


class Job:
    """A command and its descendants, also those whose parents are gone; a context around it.

    Signals to this process go to the command alone: mpiexec and torchrun pass them on to their
    ranks, and a rank that gets two leaves without its checkpoint.

    Args:
        environment: variables of the command's, beside this process's.
        listen: is given the command's output and error, each with where it belongs, to pass on;
            None: the command has this process's own.

    Attributes:
        signal: the first of `PASSED_ON` that came.

    Raises:
        ConfigError: on entry, where the command cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        listen: Callable[[Iterable[tuple[IO[bytes], int]]], None] | None = None,
    ) -> None:
        self.command = list(command)
        self._environment, self._listen = os.environ | (environment or {}), listen
        self.signal: int | None = None
        self._noted = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._before: set[Process] = set()
        self._handlers: dict[int, signal._HANDLER] = {}

    def __enter__(self) -> Self:
        _adopt_orphans()
        self._before = descendants(os.getpid())
        for number in PASSED_ON:
            self._handlers[number] = signal.signal(number, self._pass_on)
        # A group of its own, so that Ctrl-C reaches it once, from here. It is in the background
        # then, and would be stopped where it reads from the terminal.
        try:
            process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, process_group=0, env=self._environment,
                stdout=subprocess.PIPE if self._listen else None,
                stderr=subprocess.PIPE if self._listen else None,
            )  # fmt: skip
        except OSError as error:
            self._restore()
            what = error.strerror or str(error)
            raise ConfigError(f"{self.command[0]} cannot be started: {what}") from error
        self._process = process
        if self._listen and process.stdout and process.stderr:
            self._listen([(process.stdout, 1), (process.stderr, 2)])
        if self.signal is not None:  # it came meanwhile
            process.send_signal(self.signal)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        del frame
        now = time.monotonic()
        if number == self.signal and now - self._noted < ECHO_SECONDS:
            return  # once from the batch system, and once from the script that passes it on
        self.signal, self._noted = self.signal or number, now
        if self._process is not None:
            self._process.send_signal(number)

    def exit_code(self, seconds: float) -> int | None:
        """The command's exit code as a shell has it, waiting so long; None while it runs."""
        assert self._process is not None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code < 0 else code

    def processes(self) -> set[Process]:
        """All of the job that run on this machine."""
        return descendants(os.getpid()) - self._before

    def end(self, grace: float) -> None:
        """SIGTERM to the command; after `grace` seconds SIGKILL to what is left.

        Those without children go first: a launcher that loses a rank clears up on other machines.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        if not self._gone(grace):
            parents = set(running().values())
            kill(process for process in self.processes() if process.pid not in parents)
            self._gone(5.0)
        self.kill()

    def kill(self) -> list[int]:
        """SIGKILL to all of the job; returns who is left, such as one that waits for a device."""
        kill(self.processes())
        self._gone(10.0)
        return sorted(process.pid for process in self.processes())

    def _gone(self, seconds: float) -> bool:
        """Wait until nothing of the job runs; False where it takes longer than that."""
        until = time.monotonic() + seconds
        while self.exit_code(0.0) is None or self.processes():
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


def is_stopped(process: Process) -> bool:
    """Whether a process of this machine is stopped, by SIGSTOP or a debugger."""
    fields = _stat(process.pid)
    return fields is not None and int(fields[19]) == process.started and fields[0] in "Tt"


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL to those that still are who they were."""
    still = running()
    for process in processes:
        if process in still:
            try:
                os.kill(process.pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue


def descendants(pid: int) -> set[Process]:
    """What runs below a process; nothing where there is no /proc."""
    children: dict[int, set[Process]] = {}
    for process, parent in running().items():
        children.setdefault(parent, set()).add(process)
    found: set[Process] = set()
    level = children.get(pid, set())
    while level:
        found |= level
        level = {child for process in level for child in children.get(process.pid, ())} - found
    return found


def running() -> dict[Process, int]:
    """The processes of this machine that are no zombies, with their parents."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat(int(folder.name))
        if fields is not None and fields[0] not in "ZX":
            found[Process(int(folder.name), int(fields[19]))] = int(fields[1])
    return found


def _stat(pid: int) -> list[str] | None:
    """A process's state, parent, …: the fields after its name; None where it is gone."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The second field, a name in parentheses, may hold anything.
    return stat.rpartition(")")[2].split()


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own is gone (Linux), to find them still."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
