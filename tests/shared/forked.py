"""Commands of the project as processes of their own that start in a moment, not in seconds.

Most of a command's start is the import of torch and its like. One server a session has imported
them; each process is a fork of it, with its own arguments, environment, folder and streams. Where
imports themselves, what Python reads from its environment at its start, or how an interpreter is
taken down, are under test, use subprocess.
"""

import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from fcntl import LOCK_EX, flock
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, send_fds, socket
from typing import Any

SERVER = Path(__file__).parent / "forked_server.py"
CHILD = Path(__file__).parent / "forked_child.py"
FOLDER = "FORKED_SERVERS"
"""The variable that says where the sockets of this session's servers are."""

START_SECONDS = 600


def set_up() -> None:
    """Let this process and its children share servers, which end with it; none is started yet."""
    if FOLDER not in os.environ:
        os.environ[FOLDER] = tempfile.mkdtemp(prefix="forked-")
        os.environ[FOLDER + "_OF"] = str(os.getpid())
        stand_in = Path(os.environ[FOLDER]) / "python"
        stand_in.write_text(f"#!{sys.executable} -IS\n{CHILD.read_text()}")
        stand_in.chmod(0o755)


def stand_in() -> str:
    """What starts as Python does, as a fork: for what code under test starts by itself."""
    _address()
    return str(Path(os.environ[FOLDER]) / "python")


def launched(command: Sequence[str]) -> list[str]:
    """The same launcher's command, of torchrun or mpiexec, with forks for the Pythons in it."""
    launcher, *words = command
    if Path(launcher).name == "torchrun":  # which starts its ranks as it was started itself
        return [stand_in(), "-m", "torch.distributed.run", *words]
    return [launcher, *(stand_in() if word in ("python", sys.executable) else word
                        for word in words)]  # fmt: skip


def _address() -> str:
    """Where the server listens; it is started where there is none."""
    path = Path(os.environ[FOLDER]) / "server"
    with path.with_suffix(".lock").open("w") as lock:
        flock(lock, LOCK_EX)  # torch's import takes seconds, and several may want one
        if not path.exists():
            with path.with_suffix(".log").open("w") as log:
                server = subprocess.Popen(
                    [sys.executable, str(SERVER), str(path), os.environ[FOLDER + "_OF"]],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
                    env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=SERVER.parent,
                )  # fmt: skip
            deadline = time.monotonic() + START_SECONDS
            while not path.exists():
                well = server.poll() is None and time.monotonic() < deadline
                assert well, path.with_suffix(".log").read_text()
                time.sleep(0.02)
            server.returncode = 0  # it ends with the session; nobody waits for it
    return str(path)


class Popen(subprocess.Popen[Any]):
    """A `subprocess.Popen` of this Python, or of a call, as a fork of the server.

    The command is `[sys.executable, "-m", MODULE, …]`, `"-c", CODE` or a file, as for subprocess.
    What it starts by `sys.executable` is a fork too, but for `children=False`.
    """

    def __init__(
        self,
        command: Sequence[str] | partial[Any],
        *,
        children: bool = True,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        start_new_session: bool = False,
        **options: Any,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        told = [name for name in environment if name.startswith("PYTHON") and name != "PYTHONPATH"]
        assert not any(environment[name] != os.environ.get(name) for name in told), told
        if isinstance(command, partial):
            shown, words, call = [str(command)], None, pickle.dumps(command)
        else:
            shown, words, call = list(command), list(command[1:]), None
            assert command[0] == sys.executable, command[0]
        self._request = {
            "words": words,
            "call": call,
            "path": list(sys.path),
            "cwd": str(cwd or Path.cwd()),
            "env": environment,
            "session": start_new_session,
            "numbers": [0, 1, 2],
            "watched": False,
            "children": children,
        }
        super().__init__(shown, **options)

    def _execute_child(self, *arguments: Any) -> None:
        """Ask the server for a child, with the ends of the pipes that are the child's."""
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = arguments[10:16]
        message = pickle.dumps(self._request)
        streams = enumerate((p2cread, c2pwrite, errwrite))
        server = socket(AF_UNIX, SOCK_STREAM)
        server.connect(_address())
        send_fds(
            server,
            [len(message).to_bytes(8, "little")],
            [own if given == -1 else given for own, given in streams],
        )
        server.sendall(message)
        self._connection = Connection(server.detach())
        self.pid = int.from_bytes(self._connection.recv_bytes(), "little")
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        if self._connection.poll(0 if wait_flags & os.WNOHANG else None):
            status = int.from_bytes(self._connection.recv_bytes(), "little")
            self._connection.close()
            return self.pid, status
        return 0, 0

    def _internal_poll(self, *_: Any, **__: Any) -> int | None:
        if self.returncode is None and self._waitpid_lock.acquire(False):
            try:
                if self.returncode is None:
                    pid, status = self._try_wait(os.WNOHANG)
                    if pid == self.pid:
                        self._handle_exitstatus(status)
            finally:
                self._waitpid_lock.release()
        return self.returncode


def run(
    command: Sequence[str] | partial[Any],
    *,
    timeout: float = 600,
    check: bool = False,
    capture_output: bool = False,
    input: str | None = None,
    **options: Any,
) -> "subprocess.CompletedProcess[Any]":
    """`subprocess.run` of this Python, or of a call."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with Popen(command, **options) as process:
        try:
            output, said = process.communicate(input, timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, said)
    if check:
        done.check_returncode()
    return done


def all_ended(processes: Sequence[Popen]) -> int | None:
    """Wait until all have ended well, or one has not: return its place, the others killed."""
    running = dict(enumerate(processes))
    while running:
        wait([process._connection for process in running.values()])
        for place, process in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[place]
            if code:
                for other in running.values():
                    other.kill()
                    other.wait()
                return place
    return None
