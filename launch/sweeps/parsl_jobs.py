"""A job of its own for each trial, submitted, watched and cancelled through Parsl's PBSProProvider,
SlurmProvider or LocalProvider.

The job runs the script that `largebatch submit` would write. It outlives the sweep: one that is
started again finds its jobs by their ids in the record, and submits none twice.
"""

import os
import re
import shlex
import shutil
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from parsl.jobs.states import JobState, JobStatus
from parsl.launchers import SimpleLauncher
from parsl.providers import LocalProvider, PBSProProvider, SlurmProvider
from parsl.providers.errors import SubmitException

from largebatch.common.errors import ConfigError
from largebatch.common.text import clock
from largebatch.conf.cluster_config import ClusterConfig, SubmitConfig
from largebatch.launch.jobs.binding import parse_cores
from largebatch.launch.jobs.cluster import check_queue, queue_of
from largebatch.launch.jobs.job import Job
from largebatch.launch.jobs.script import script
from largebatch.launch.sweeps.ground import Attempt, Ended
from largebatch.launch.sweeps.record import Record, Trial
from largebatch.launch.sweeps.settings import KEY, SweepSettings

POLL_SECONDS: Final = 30.0
"""Between two questions to the scheduler, where trials are looked at once a second."""

# Directives that Parsl writes itself, or gives to qsub.
_OF_PARSL: Final = (
    "#PBS -N", "#PBS -A", "#PBS -q", "#PBS -o", "#PBS -l select", "#PBS -l walltime",
    "#SBATCH --job-name", "#SBATCH --account", "#SBATCH --partition", "#SBATCH --nodes",
    "#SBATCH --ntasks-per-node", "#SBATCH --time", "#SBATCH --exclusive", "#SBATCH --output",
)  # fmt: skip


class Jobs:
    """Jobs of a scheduler; see `Ground`. Which nodes they get is the scheduler's business; Slurm's
    can be kept off those that are left out, PBS's cannot.

    Args:
        folder: of the sweep.

    Raises:
        ConfigError: a queue that does not take such jobs, or a scheduler that is not here.
    """

    outlives = True

    def __init__(
        self, cluster: ClusterConfig, settings: SweepSettings, record: Record, folder: Path
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
        self._scripts = folder / "parsl"
        self._running: dict[str, tuple[Attempt, str]] = {}
        self._next_poll, self._ended_ids = 0.0, set[str]()
        if settings.dry_run:
            return
        command = {"pbs": "qsub", "slurm": "sbatch", "none": "bash"}[cluster.scheduler]
        if shutil.which(command) is None:
            raise ConfigError(
                f"{command} is not here: begin the sweep on a login node of {cluster.name}, or "
                f"look at its jobs with {KEY}.dry_run=true"
            )
        self._scripts.mkdir(parents=True, exist_ok=True)
        self._provider = provider(cluster, self._scripts)

    def nodes(self) -> set[str]:
        return set()

    def room(self, avoid: frozenset[str]) -> tuple[str, ...] | None:
        del avoid
        return () if self._most is None or len(self._running) < self._most else None

    def begin(self, attempt: Attempt) -> None:
        text = trial_script(attempt, self._cluster)
        attempt.file("sh").write_text(text, encoding="utf-8")
        job = self._submit(self._provider, attempt)
        what = {
            name: value
            for name, value in self._provider.resources[job].items()
            if isinstance(value, str | int)
        }
        self._record.write("submitted", trial=attempt.trial.name, job=job, what=what)
        self._running[attempt.trial.name] = attempt, job

    def _submit(self, to: Any, attempt: Attempt) -> str:
        try:
            return str(to.submit(starts(attempt), self._cluster.node.ranks, _name(attempt)))
        except SubmitException as error:
            said = " ".join(str(error.stderr or error.message).split())
            raise ConfigError(
                f"the job of trial {attempt.trial.name} was not taken: {said}"
            ) from None

    def show(self, trial: Trial) -> str:
        """What would be submitted for the trial."""
        attempt = Attempt(trial, 1)
        with TemporaryDirectory() as folder:
            to = provider(self._cluster, Path(folder), dry_run=True)
            self._submit(to, attempt)
            (job,) = to.resources.values()
            submitted = Path(job["job_stdout_path"]).with_suffix("").read_text(encoding="utf-8")
        command = f"# {' '.join(to.commands[-1].split())}\n{submitted}"
        text = trial_script(attempt, self._cluster)
        own = f"# {attempt.file('sh')}:\n{text}"
        return (command + own).replace(folder, str(self._scripts))

    def adopt(self, attempt: Attempt, job: dict[str, Any]) -> bool:
        unknown = JobStatus(JobState.UNKNOWN)
        self._provider.resources[job["job"]] = job["what"] | {"status": unknown}
        self._running[attempt.trial.name] = attempt, job["job"]
        return True

    def ended(self) -> list[Ended]:
        ended = []
        asked = time.monotonic() >= self._next_poll
        over = self._over() if asked else set()
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

    def _over(self) -> set[str]:
        """Jobs that the scheduler says have ended, however they did."""
        ids = [job for _, job in self._running.values()]
        states = self._provider.status(ids)
        return {job for job, state in zip(ids, states, strict=True) if state.terminal}

    def is_dead(self, node: str) -> bool:
        del node
        return False

    def leave_out(self, nodes: set[str]) -> None:
        if isinstance(self._provider, SlurmProvider):
            self._provider.scheduler_options += f"#SBATCH --exclude={','.join(sorted(nodes))}\n"

    def is_spent(self) -> bool:
        return False

    def stop(self) -> None:
        """The jobs go on: the same command finds them again."""

    kill = close = stop


def trial_script(attempt: Attempt, cluster: ClusterConfig) -> str:
    """What `largebatch submit` would write for a run, with the trial's command."""
    trial, folder = attempt.trial, os.path.relpath(attempt.trial.folder)
    config = SubmitConfig(cluster, name=_name(attempt), folder=folder)
    told = [f"{KEY}.shape=jobs", *trial.words]
    job = Job(config, ["train", *trial.command], folder, told)
    text = script(job)
    own = f"  {job.python} -m largebatch\n  train\n"
    if trial.command[0] == "python":
        return text.replace(f"{own}  python\n", f"  {job.python}\n")
    return text.replace(own, "")


def starts(attempt: Attempt) -> str:
    """What the job runs: the trial's script, and a note of how it ended."""
    path, log, code = (shlex.quote(str(attempt.file(end))) for end in ("sh", "log", "code"))
    return (
        "unset LARGEBATCH_PARENT LARGEBATCH_RANKS\n"
        f"cd {shlex.quote(os.getcwd())}\n"
        f"bash {path} > {log} 2>&1\n"
        f"echo $? > {code}.part && mv {code}.part {code}\n"
    )


def _name(attempt: Attempt) -> str:
    return f"trial-{attempt.trial.number}"


def _code(attempt: Attempt) -> int | None:
    try:
        return int(attempt.file("code").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


class _Shown:
    """Of a provider: notes the scheduler's commands and runs none."""

    def __init__(self, **keys: Any) -> None:
        self.commands: list[str] = []
        super().__init__(**keys)

    def execute_wait(self, cmd: str, timeout: float | None = None) -> tuple[int, str, str]:
        del timeout
        self.commands.append(cmd)
        return 0, "Submitted batch job 0", ""


class _ShownPBS(_Shown, PBSProProvider):
    pass


class _ShownSlurm(_Shown, SlurmProvider):
    pass


def provider(cluster: ClusterConfig, scripts: Path, dry_run: bool = False) -> Any:
    """Parsl's for the cluster's scheduler, told what `largebatch submit` would tell it.

    Raises:
        ConfigError: a dry run without a scheduler.
    """
    text = script(Job(SubmitConfig(cluster, folder="."), ["train"], ".", []))
    directives = "\n".join(
        line
        for line in text.splitlines()
        if line.startswith(("#PBS ", "#SBATCH ")) and not line.startswith(_OF_PARSL)
    )
    keys: dict[str, Any] = {"nodes_per_block": cluster.nodes, "launcher": _AsItIs()}
    if cluster.scheduler == "none":
        if dry_run:
            raise ConfigError(
                f"{KEY}.dry_run shows jobs of PBS or Slurm, and {cluster.name} has neither"
            )
        made: Any = LocalProvider(**keys)  # type: ignore[no-untyped-call] # Parsl has no types
    else:
        keys |= {
            "account": cluster.account,
            "walltime": clock(cluster.walltime),
            "scheduler_options": directives,
            "cmd_timeout": 120,
        }
        if cluster.scheduler == "pbs":
            cores = sum(len(parse_cores(domain.cores)) for domain in cluster.node.domains)
            keys |= {"queue": cluster.queue, "cpus_per_node": cores or 1}
            made = (_ShownPBS if dry_run else PBSProProvider)(**keys)
        else:
            keys |= {"partition": cluster.queue, "exclusive": True}
            made = (_ShownSlurm if dry_run else SlurmProvider)(**keys)
    made.script_dir = str(scripts)
    return made


class _AsItIs(SimpleLauncher):
    """The script starts the ranks on all nodes itself, of which Parsl's launcher would warn."""

    def __call__(
        self, command: str, tasks_per_node: int, nodes_per_block: int, script_dir: str = ""
    ) -> str:
        return command
