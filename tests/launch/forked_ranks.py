"""Ranks of a command of the project's, forked from a process that has imported once for all.

python forked_ranks.py SIZE COMMAND WORDS…
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence

from largebatch.train.addresses import free_port

IMPORTED = [
    *("largebatch.train.run", "largebatch.train.command", "largebatch.train.display"),
    *("largebatch.train.tasks.digits", "largebatch.train.checkpoint", "torch._dynamo"),
]


class Ranks:
    """As many processes, of which a launcher keeps all or none: the first that fails ends them."""

    def __init__(self, size: int, words: Sequence[str], environment: Mapping[str, str]) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        for name in IMPORTED:
            importlib.import_module(name)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        world = meeting | {"WORLD_SIZE": str(size), "LARGEBATCH_RANKS": str(size)}
        self.code = 0
        self.pids: list[int] = []
        for rank in range(size):
            self.pids.append(os.fork())
            if self.pids[-1] == 0:
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                _be_rank(rank, words, environment | world | own)
        self._alive = set(self.pids)

    def poll(self) -> int | None:
        """The exit code, as of a shell; None while there are ranks."""
        for pid in [*self._alive]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._alive.remove(pid)
                code = os.waitstatus_to_exitcode(status)
                if code and not self.code:
                    self.code = 128 - code if code < 0 else code
                    self.kill()
        return None if self._alive else self.code

    def wait(self) -> int:
        while (code := self.poll()) is None:
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        for pid in self._alive:
            os.kill(pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _be_rank(rank: int, words: Sequence[str], environment: Mapping[str, str]) -> None:
    code = 1
    try:
        os.environ.update(environment)
        if rank:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        from largebatch.cli import main

        sys.argv = ["largebatch", *words]
        code = main(list(words))
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    sys.exit(Ranks(int(sys.argv[1]), sys.argv[2:], os.environ).wait())
