"""A job of its own for each trial, of PBS, Slurm or this machine.

The job runs the script that `largebatch submit` would write. It outlives the sweep: one that is
started again finds its jobs by their ids in the record, and submits none twice.
"""

import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from largebatch.common.errors import ConfigError
from largebatch.conf.cluster_config import ClusterConfig, SubmitConfig
from largebatch.launch.jobs.cluster import Scheduler, check_queue, queue_of
from largebatch.launch.jobs.job import Job
from largebatch.launch.jobs.script import directives_lines, script
from largebatch.launch.sweeps.backend import Attempt, Backend, Ended
from largebatch.launch.sweeps.record import SweepRecord, Trial
from largebatch.launch.sweeps.settings import KEY, SweepSettings
from largebatch.records.heartbeat import process_start

POLL_SECONDS: Final = 30.0
"""Between two questions to the scheduler, where trials are looked at once a second."""


class LocalJobs:
    """Jobs of this machine, each at once, with the two methods of `Scheduler`.

    An id is a process and when it was started, as process ids are used again.
    """

    def __init__(self) -> None:
        self._started: list[subprocess.Popen[bytes]] = []

    def submit(self, script: Path, options: Sequence[str] = ()) -> str:
        process = subprocess.Popen(
            ["bash", str(script)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        self._started.append(process)
        return _local_id(process.pid)

    def ended(self, ids: Iterable[str]) -> set[str]:
        self._started = [process for process in self._started if process.poll() is None]
        return {job for job in ids if job != _local_id(int(job.partition(".")[0]))}


def _local_id(pid: int) -> str:
    return f"{pid}.{process_start(pid)}"


class Jobs(Backend):
    """Jobs of a scheduler, which outlive the sweep; ConfigError for a queue that does not take such
    jobs, or a scheduler that is not here.

    The scheduler chooses their nodes: Slurm's can be kept off those left out, PBS's cannot.
    """

    outlives = True

    def __init__(
        self, cluster: ClusterConfig, settings: SweepSettings, record: SweepRecord, folder: Path
    ) -> None:
        check_queue(cluster)
        if re.search(r"[\s'\"\\$]", str(folder)):
            raise ConfigError(
                f"hydra.sweep.dir must be a plain path with {KEY}.shape=jobs, without spaces and "
                f"quotes, got {str(folder)!r}"
            )
        self._cluster, self._record, self._settings = cluster, record, settings
        self._most = settings.max_jobs
        if self._most is None and (queue := queue_of(cluster)) is not None:
            self._most = queue.jobs_per_user
        self._options, self._left_out = list[str](), set[str]()
        self._running: dict[str, tuple[Attempt, str]] = {}
        self._next_poll, self._ended_ids = 0.0, set[str]()
        self._command = {"pbs": "qsub", "slurm": "sbatch", "none": "bash"}[cluster.scheduler]
        if settings.dry_run:
            return
        if shutil.which(self._command) is None:
            raise ConfigError(
                f"{self._command} is not here: begin the sweep on a login node of {cluster.name}, "
                f"or look at its jobs with {KEY}.dry_run=true"
            )
        self._scheduler = LocalJobs() if cluster.scheduler == "none" else Scheduler(cluster)

    def room(self, avoid: frozenset[str]) -> tuple[str, ...] | None:
        del avoid
        return () if self._most is None or len(self._running) < self._most else None

    def begin(self, attempt: Attempt) -> None:
        trial, path = attempt.trial, attempt.file("job")
        attempt.file("sh").write_text(trial_script(attempt, self._cluster), encoding="utf-8")
        path.write_text(job_script(attempt, self._cluster), encoding="utf-8")
        try:
            job = self._scheduler.submit(path, options=self._options)
        except ConfigError as error:
            raise ConfigError(f"the job of trial {trial.name} was not taken: {error}") from None
        self._record.write("submitted", trial=trial.name, job=job)
        self._running[trial.name] = attempt, job

    def show(self, trial: Trial) -> str:
        """The command, the job's script and the trial's, as they would be submitted."""
        if self._cluster.scheduler == "none":
            raise ConfigError(
                f"{KEY}.dry_run shows jobs of PBS or Slurm, and {self._cluster.name} has neither"
            )
        attempt = Attempt(trial, 1)
        return (
            f"# {self._command} {attempt.file('job')}\n{job_script(attempt, self._cluster)}"
            f"# {attempt.file('sh')}:\n{trial_script(attempt, self._cluster)}"
        )

    def adopt(self, attempt: Attempt, job: dict[str, Any]) -> bool:
        self._running[attempt.trial.name] = attempt, job["job"]
        return True

    def ended(self) -> list[Ended]:
        ended = []
        asked = time.monotonic() >= self._next_poll
        ids = [job for _, job in self._running.values()]
        over = self._scheduler.ended(ids) if asked else set()
        for name, (attempt, job) in list(self._running.items()):
            code = _code(attempt)
            # A job that is over is given until the next look to show its exit code.
            if code is None and not (job in over and job in self._ended_ids):
                continue
            del self._running[name]
            nodes = attempt.trial.folder / f"nodes.{job}"
            if nodes.exists():
                attempt.nodes = tuple(nodes.read_text(encoding="utf-8").split())
            ended.append(Ended(attempt, code))
        if asked:
            self._ended_ids = over
            self._next_poll = time.monotonic() + POLL_SECONDS * self._settings.poll_seconds
        return ended

    def leave_out(self, nodes: set[str]) -> None:
        if self._cluster.scheduler == "slurm":
            self._left_out |= nodes
            self._options = [f"--exclude={','.join(sorted(self._left_out))}"]

    def stop(self) -> None:
        """The jobs go on: the same command finds them again."""

    kill = close = stop


def trial_script(attempt: Attempt, cluster: ClusterConfig) -> str:
    """What `largebatch submit` would write for a run, with the trial's command."""
    return script(_job(attempt, cluster))


def job_script(attempt: Attempt, cluster: ClusterConfig) -> str:
    """What is submitted: the trial's script, with its output and its exit code in files."""
    path, log, code = (shlex.quote(str(attempt.file(end))) for end in ("sh", "log", "code"))
    lines = (
        "#!/bin/bash",
        *directives_lines(_job(attempt, cluster)),
        "unset LARGEBATCH_PARENT LARGEBATCH_RANKS",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        f"bash {path} > {log} 2>&1",
        f"echo $? > {code}.part && mv {code}.part {code}",
    )
    return "\n".join(lines) + "\n"


def _job(attempt: Attempt, cluster: ClusterConfig) -> Job:
    trial, folder = attempt.trial, os.path.relpath(attempt.trial.folder)
    config = SubmitConfig(cluster, name=f"trial-{trial.number}", folder=folder)
    asked = [f"{KEY}.shape=jobs", *trial.words]
    return Job(config, ["train", *trial.words], folder, asked, program=trial.command)


def _code(attempt: Attempt) -> int | None:
    try:
        return int(attempt.file("code").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
