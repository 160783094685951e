"""A command with all that it starts on this machine: begun, passed signals, ended for good."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TYPE_CHECKING, Final, Self

from largebatch.common.errors import ConfigError
from largebatch.common.signals import on_stop_signal

if TYPE_CHECKING:  # a bare install has no psutil
    import psutil

ECHO_SECONDS: Final = 1.0

_PR_SET_CHILD_SUBREAPER: Final = 36
_PR_GET_CHILD_SUBREAPER: Final = 37
_ENDED: Final = ("zombie", "dead")


class ProcessGroupJob:
    """A command and its descendants, also those whose parents are gone; a context around it.

    Signals to this process go to the command alone: mpiexec and torchrun pass them on to their
    ranks, and a rank that gets two leaves without its checkpoint. `signal` is the first of
    `STOP_SIGNALS` that was received. ConfigError on entry, where the command cannot be started.

    `environment` are variables of the command's beside this process's. `listen` is given its output
    and error, each with where it belongs, to pass on; None: the command has this process's own.
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
        self._before: set[psutil.Process] = set()
        self._context = ExitStack()

    def __enter__(self) -> Self:
        if sys.platform == "linux":
            self._context.enter_context(adopting())
        self._before = descendants()
        self._context.enter_context(on_stop_signal(self._pass_on))
        # A group of its own, so that Ctrl-C reaches it once, from here. It is in the background
        # then, and would be stopped where it reads from the terminal.
        try:
            process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, process_group=0, env=self._environment,
                stdout=subprocess.PIPE if self._listen else None,
                stderr=subprocess.PIPE if self._listen else None,
            )  # fmt: skip
        except OSError as error:
            self._context.close()
            what = error.strerror or str(error)
            raise ConfigError(f"{self.command[0]} cannot be started: {what}") from error
        self._process = process
        if self._listen and process.stdout and process.stderr:
            self._listen([(process.stdout, 1), (process.stderr, 2)])
        if self.signal is not None:  # received meanwhile
            process.send_signal(self.signal)
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        self._bury()
        self._context.close()

    def _pass_on(self, number: int) -> None:
        now = time.monotonic()
        if number == self.signal and now - self._noted < ECHO_SECONDS:
            return  # once from the batch system, and once from the script that passes it on
        self.signal, self._noted = self.signal or number, now
        if self._process is not None:
            self._process.send_signal(number)

    def exit_code(self, seconds: float) -> int | None:
        """Wait for the command; return its exit code as a shell has it, or None while it runs."""
        assert self._process is not None
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return 128 - code if code < 0 else code

    def processes(self) -> "set[psutil.Process]":
        """Running processes of the job on this machine."""
        return descendants() - self._before

    def end(self, grace: float) -> None:
        """SIGTERM to the command; after `grace` seconds SIGKILL to what is left.

        Those without children go first: a launcher that loses a rank clears up on other machines.
        """
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        if not self._gone(grace):
            kill(process for process in self.processes() if not descendants(process))
            self._gone(5.0)
        self.kill()

    def kill(self) -> list[int]:
        """SIGKILL to all of the job; return the ids that remain: processes in a device driver."""
        kill(self.processes())
        self._gone(10.0)
        return sorted(process.pid for process in self.processes())

    def _bury(self) -> None:
        """Take the exit codes of what this process has adopted, which else stays as a zombie."""
        import psutil

        known = {process.pid for process in self._before}
        known |= set() if self._process is None else {self._process.pid}
        for process in psutil.Process().children():
            if process.pid not in known and not is_running(process):
                with suppress(ChildProcessError):
                    os.waitpid(process.pid, os.WNOHANG)

    def _gone(self, seconds: float) -> bool:
        """Wait until nothing of the job runs; False where it takes longer than `seconds`."""
        until = time.monotonic() + seconds
        while self.exit_code(0.0) is None or self.processes():
            if time.monotonic() > until:
                return False
            time.sleep(0.05)
        return True


@contextmanager
def adopting() -> Iterator[None]:
    """Find descendants still whose own parent is gone: they become this process's, on Linux."""
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        prctl(_PR_SET_CHILD_SUBREAPER, before.value, 0, 0, 0)


def is_running(process: "psutil.Process") -> bool:
    """Whether a process of this machine has not ended; False for a zombie."""
    return process.is_running() and _status(process) not in _ENDED


def is_stopped(process: "psutil.Process") -> bool:
    """Whether a process of this machine is stopped, by SIGSTOP or a debugger."""
    return _status(process) in ("stopped", "tracing-stop")


def _status(process: "psutil.Process") -> str:
    import psutil

    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return "dead"


def kill(processes: "Iterable[psutil.Process]") -> None:
    """SIGKILL to those that run; never to another process that has got the id of one."""
    import psutil

    for process in processes:
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.kill()


def descendants(process: "psutil.Process | None" = None) -> "set[psutil.Process]":
    """Running processes below one, or below this process."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        found = (process or psutil.Process()).children(recursive=True)
        return set(filter(is_running, found))
    return set()
