"""`hydra/launcher=cores`: jobs of a sweep side by side in worker processes on this machine.

A worker makes one job after another, as what it imports takes longer than many a job. One that dies
takes its job along and nothing else: another is started in its place. All of them end with the
sweep's process, whatever ends it.
"""

import atexit
import gc
import os
import pickle
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Final

import cloudpickle
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, open_dict

import largebatch.conf.resolvers  # noqa: F401 — registers them, in workers too
from largebatch.common.errors import ConfigError, RunFailed
from largebatch.common.signals import on_stop_signal
from largebatch.common.text import one_line, say
from largebatch.distributed.ranks import die_with_parent
from largebatch.launch.sweeps.composition import composed
from largebatch.launch.sweeps.run_job import run_job

LOOK_SECONDS: Final = 0.2

# With the paths of this process: what it can import, a worker can.
_START: Final = (
    "import sys; sys.path[:] = {path!r}; "
    "from largebatch.launch.sweeps.workers import work; work({descriptor})"
)


@dataclass
class Sweep:
    """What all jobs of a sweep share."""

    context: HydraContext
    config: DictConfig
    task: TaskFunction
    brief: bool = False
    """Whether what a job returns need not say how it was configured."""

    def job(self, number: int, overrides: Sequence[str]) -> DictConfig:
        """Compose the configuration of one job."""
        config = composed(self.context, self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = f"{config.hydra.job.name}_{number}"
            config.hydra.job.num = number
        return config

    def run(self, number: int, overrides: Sequence[str]) -> JobReturn:
        """Run one job in this process, in its folder."""
        return run_job(self.context, self.task, self.job(number, overrides), self.brief)

    def folder(self, number: int, overrides: Sequence[str]) -> Path:
        config = self.job(number, overrides)
        return Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)


class Worker:
    """A process that runs jobs, tied to this one; `job` is the place among the batch of the one it
    runs, None where it is idle.
    """

    def __init__(self, num_workers: int) -> None:
        self.job: int | None = None
        self.connection, theirs = Pipe()
        threads = {"OMP_NUM_THREADS": str(max(1, num_cores() // num_workers))}
        start = _START.format(path=sys.path, descriptor=theirs.fileno())
        self.process = subprocess.Popen(
            [sys.executable, "-c", start], pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
            env=threads | os.environ | {"LARGEBATCH_PARENT": str(os.getpid())},
            start_new_session=True,  # Ctrl-C is the sweep's, which passes it on
        )  # fmt: skip
        theirs.close()

    def begin(self, job: int, message: bytes) -> None:
        self.job = job
        with suppress(OSError):  # it has just died, as `ended` finds
            self.connection.send_bytes(message)

    def ended(self) -> JobReturn | KeyboardInterrupt | int | None:
        """The result of its job, the exit code of a worker that died, or None as yet."""
        try:
            if self.connection.poll():
                found: JobReturn | KeyboardInterrupt = pickle.loads(self.connection.recv_bytes())
                return found
        except (EOFError, OSError):
            return self.process.wait()
        return self.process.poll()

    def close(self) -> None:
        """End it, its job too."""
        self.connection.close()
        self.process.kill()
        self.process.wait()


class Workers:
    """At most `num_workers` of them, kept from one batch of jobs to the next."""

    def __init__(self, num_workers: int) -> None:
        self._num = num_workers
        self._all: list[Worker] = []
        self._signals: list[int] = []
        atexit.register(self.close)

    def launch(
        self,
        sweep: Sweep,
        jobs: Sequence[Sequence[str]],
        first: int,
        more: Callable[[int], Sequence[Sequence[str]]] = lambda place: (),
    ) -> list[JobReturn]:
        """Run the jobs; return their results, in their order. KeyboardInterrupt where a signal
        ended the sweep, after its running jobs.

        Args:
            more: takes the place of a job that has succeeded, and returns jobs to run after all.
        """
        shared = cloudpickle.dumps((sweep, Singleton.get_state()))
        jobs = list(jobs)
        waiting = deque(enumerate(jobs))
        returns: dict[int, JobReturn] = {}
        interrupted = False
        with on_stop_signal(self._signals.append):
            while waiting or self._busy():
                if self._signals:
                    # A second one is for those that did not heed the first.
                    number = signal.SIGKILL if interrupted else self._signals[0]
                    self._signals.clear()
                    interrupted = True
                    for worker in self._busy():
                        worker.process.send_signal(number)
                while waiting and not interrupted and (idle := self._idle()) is not None:
                    job, overrides = waiting.popleft()
                    idle.begin(job, pickle.dumps((shared, first + job, list(overrides))))
                busy = self._busy()
                if interrupted and not busy:
                    break
                wait([worker.connection for worker in busy], LOOK_SECONDS)
                for worker in busy:
                    ended, place = worker.ended(), worker.job
                    if ended is None or place is None:
                        continue
                    worker.job = None
                    if isinstance(ended, KeyboardInterrupt):
                        self._signals += [] if interrupted else [signal.SIGTERM]
                        waiting.append((place, jobs[place]))
                        continue
                    if isinstance(ended, int):
                        self._drop(worker)
                        if not interrupted:
                            returns[place] = _died(sweep, first + place, jobs[place], ended)
                        continue
                    returns[place] = ended
                    if ended.status == JobStatus.COMPLETED and not interrupted:
                        new = list(enumerate(more(place), len(jobs)))
                        jobs += [overrides for _, overrides in new]
                        waiting += new
        if len(returns) < len(jobs):
            self.close()
            raise KeyboardInterrupt
        return [returns[job] for job in range(len(jobs))]

    def _busy(self) -> list[Worker]:
        return [worker for worker in self._all if worker.job is not None]

    def _idle(self) -> Worker | None:
        for worker in list(self._all):
            if worker.job is None:
                if worker.process.poll() is None:
                    return worker
                self._drop(worker)
        if len(self._all) == self._num:
            return None
        self._all.append(Worker(self._num))
        return self._all[-1]

    def _drop(self, worker: Worker) -> None:
        self._all.remove(worker)
        worker.close()

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._all):
            self._drop(worker)


def num_workers(n_jobs: int) -> int:
    """How many workers `n_jobs` asks for: -1 a core each, -2 one core less, …; none is refused."""
    asked = n_jobs if n_jobs > 0 else num_cores() + 1 + n_jobs
    if n_jobs == 0 or asked < 1:
        raise ConfigError(
            f"hydra.launcher.n_jobs must be > 0, or below it down to {-num_cores()} (-1: a core "
            f"each), got {n_jobs}"
        )
    return asked


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _died(sweep: Sweep, number: int, overrides: Sequence[str], code: int) -> JobReturn:
    """Tell of a job whose process is gone, and return it as failed."""
    why = f"its process ended with exit code {code}"
    if code < 0:
        why = f"its process was killed by {signal.Signals(-code).name}"
        why += " (out of memory, as a rule)" if -code == signal.SIGKILL else ""
    folder = sweep.folder(number, overrides)
    error = RunFailed(os.path.relpath(folder), why)
    print(f"largebatch: {error}", file=sys.stderr, flush=True)
    returned = JobReturn(overrides=list(overrides), working_dir=str(folder))
    returned.status, returned.return_value = JobStatus.FAILED, error
    return returned


def work(descriptor: int) -> None:
    """Run the jobs that come in, in a worker, until there are no more to come."""
    os.set_inheritable(descriptor, False)
    die_with_parent()
    connection = Connection(descriptor)
    is_first = True
    while True:
        try:
            shared, number, overrides = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            return
        connection.send_bytes(_pickled(_run(shared, number, overrides)))
        if (
            is_first
        ):  # what it has imported and composed stays: looked through, it costs 10 ms a job
            gc.collect()
            gc.freeze()
            is_first = False


_sweeps: Final[dict[bytes, Sweep]] = {}


def _run(shared: bytes, number: int, overrides: Sequence[str]) -> JobReturn | KeyboardInterrupt:
    try:
        # One object for all jobs of a sweep: what it has composed stays with it, and Hydra looks
        # for its plugins once.
        if shared not in _sweeps:
            setup_globals()
            sweep, singletons = pickle.loads(shared)
            Singleton.set_state(singletons)
            _sweeps[shared] = sweep
        return _sweeps[shared].run(number, overrides)
    except KeyboardInterrupt as error:
        return error
    # Of a configuration, an import, or the task's own sys.exit; the task says what else fails.
    except BaseException as error:
        say(f"{' '.join(overrides)}: {type(error).__name__}: {one_line(error)}")
        return _failed(overrides, error)


def _failed(overrides: Sequence[str], error: BaseException) -> JobReturn:
    failed = JobReturn(overrides=list(overrides))
    failed.status, failed.return_value = JobStatus.FAILED, error
    return failed


def _pickled(returned: JobReturn | KeyboardInterrupt) -> bytes:
    try:
        text: bytes = cloudpickle.dumps(returned)
        pickle.loads(text)  # some errors can be pickled, and not be read back
    except Exception as error:
        assert isinstance(returned, JobReturn)
        said = returned._return_value if returned.status == JobStatus.FAILED else error
        text = cloudpickle.dumps(
            _failed(returned.overrides or [], RuntimeError(f"{type(said).__name__}: {said}"))
        )
    return text
