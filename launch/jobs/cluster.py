"""A cluster's queues and its scheduler's commands: what may be submitted, and submitting it."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from largebatch.common.errors import ConfigError
from largebatch.common.text import clock
from largebatch.conf.cluster_config import ClusterConfig, QueueConfig


def check_queue(cluster: ClusterConfig) -> None:
    """Refuse what the queue would refuse, or never start, with the limit and what fits."""
    if cluster.scheduler == "none":
        if cluster.chain > 1 or cluster.spares:
            raise ConfigError(
                f"cluster.chain and cluster.spares need a scheduler, which {cluster.name} has not: "
                "leave them at 1 and 0"
            )
        return
    needed = {"pbs": ("queue", "account", "walltime"), "slurm": ("walltime",)}[cluster.scheduler]
    missing = [f"cluster.{name}" for name in needed if getattr(cluster, name) is None]
    if missing:
        raise ConfigError(f"{' and '.join(missing)} must be given, as KEY=VALUE")
    if (queue := queue_of(cluster)) is None:
        return
    assert cluster.queues is not None
    nodes = cluster.nodes + cluster.spares
    if not queue.min_nodes <= nodes <= queue.max_nodes:
        fit = [
            name
            for name, other in cluster.queues.items()
            if other.min_nodes <= nodes <= other.max_nodes
        ]
        raise ConfigError(
            f"queue {cluster.queue} takes {queue.min_nodes} to {queue.max_nodes} nodes, got "
            f"{nodes}{' with the spares' * (cluster.spares > 0)}; "
            + (f"{', '.join(fit)} would take them" if fit else "no queue here takes them")
            + _as_of(cluster)
        )
    longest = queue.longest(nodes)
    if not queue.min_walltime <= cluster.walltime <= longest:
        raise ConfigError(
            f"queue {cluster.queue} gives a job of {nodes} nodes {clock(queue.min_walltime)} to "
            f"{clock(longest)}, got cluster.walltime={clock(cluster.walltime)}: ask for less, and "
            f"go on in a further job with cluster.chain{_as_of(cluster)}"
        )
    if queue.jobs_per_user is not None and cluster.chain > queue.jobs_per_user:
        raise ConfigError(
            f"queue {cluster.queue} holds {queue.jobs_per_user} of your jobs, and cluster.chain="
            f"{cluster.chain} would put {cluster.chain} into it: take another queue, or submit one "
            "job after the other with the same folder of the run and resume=auto"
        )


def queue_of(cluster: ClusterConfig) -> QueueConfig | None:
    """What is known of the job's queue."""
    return None if cluster.queues is None else cluster.queues.get(str(cluster.queue))


def _as_of(cluster: ClusterConfig) -> str:
    return f" (so {cluster.known}; cluster.queues=null checks no limits)" if cluster.known else ""


_SHARED_NODES: Final = 255
"""The most nodes whose ranks may all import from one file system. ALCF: its nodes may crash from
1,000 on."""


def doubts(cluster: ClusterConfig) -> Iterator[str]:
    """What may keep a job from running, or not: sentences for the user."""
    if cluster.scheduler != "none" and cluster.queues is not None and queue_of(cluster) is None:
        ask = ["qstat", "-Q"] if cluster.scheduler == "pbs" else ["sinfo", "-ho", "%R"]
        shown = [line.split()[0] for line in _said(ask) if re.match(r"\w", line)]
        yield (
            f"cluster.queue={cluster.queue} is none of {', '.join(cluster.queues)}"
            f"{f' ({cluster.known})' * bool(cluster.known)}, so its limits are not checked; "
            + _shows(" ".join(ask), [name for name in shown if name != "Queue"])
        )
    for module in cluster.modules:
        name = module.partition("/")[0]
        ask = ["bash", "-c", f"module -t avail {name}"]
        shown = [re.sub(r"\(.*", "", line) for line in _said(ask) if line.startswith(f"{name}/")]
        known = shown or [*cluster.known_modules]
        if module not in known and (known or "/" not in module):
            table = "; ".join(f"{name}: {holds}" for name, holds in cluster.known_modules.items())
            yield (
                f"cluster.modules names {module}"
                f"{', which may load nothing, or another version later' * ('/' not in module)}: "
                + _shows(f"module avail {name}", shown)
                + f" (known, {cluster.known}: {table})" * bool(table)
            )
    venv = str(cluster.venv)
    if cluster.environment == "venv" and cluster.nodes > _SHARED_NODES and venv[:5] != "/tmp/":
        copper = ", or cluster.environment=copper" * bool(cluster.node.copper)
        yield (
            f"{cluster.num_ranks:,} ranks read the environment's files from one file system "
            f"({cluster.venv or 'this environment'}), which may not bear it: give each node its "
            "own (largebatch env pack env.tar.gz, then cluster.environment=spread "
            f"cluster.archive=env.tar.gz{copper})"
        )


def _said(command: Sequence[str]) -> list[str]:
    """The lines that a command prints; none where it is not here."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]  # Lmod uses the second


def _shows(command: str, names: Sequence[str]) -> str:
    return f"`{command}` shows " + (", ".join(names) or "which there are on a login node")


class Scheduler:
    """The commands of PBS or Slurm on a login node; ConfigError where they are not here."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster, self._pbs = cluster, cluster.scheduler == "pbs"
        self._command = "qsub" if self._pbs else "sbatch"
        if shutil.which(self._command) is None:
            raise ConfigError(
                f"{self._command} is not here: submit from a login node of {cluster.name}, or look "
                "at the script with --dry-run"
            )

    def check_room(self) -> None:
        """Refuse one job more than the queue holds of a user."""
        queue, name = queue_of(self._cluster), self._cluster.queue
        most = None if queue is None else queue.jobs_per_user
        if most is None:
            return
        there = self._own_jobs("-q" if self._pbs else "--partition", str(name))
        if there is None:
            return  # then the scheduler refuses it itself
        if len(there) + self._cluster.chain > most:
            raise ConfigError(
                f"queue {name} holds {most} of your jobs, and has {len(there)} of them already "
                f"({', '.join(there)}): wait, or take another queue"
            )

    def _own_jobs(self, *options: str) -> list[str] | None:
        """This user's jobs that have not ended; None where the scheduler does not answer."""
        user = getpass.getuser()
        if self._pbs:
            ask = ["qselect", "-u", user]
        else:
            ask = ["squeue", "--noheader", "--format=%i", f"--user={user}"]
        try:
            done = subprocess.run([*ask, *options], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.split() if done.returncode == 0 else None

    def ended(self, ids: Iterable[str]) -> set[str]:
        """Those of the jobs that have ended; none where the scheduler does not answer."""
        there = self._own_jobs()
        return set() if there is None else set(ids) - set(there)

    def submit(self, script: Path, after: str | None = None, options: Sequence[str] = ()) -> str:
        """Submit a job, which starts when that of the id `after` has ended, however; return its
        id. ConfigError with the scheduler's own words.
        """
        options = [*options, *([] if self._pbs else ["--parsable"])]
        if after is not None:
            depend = f"depend=afterany:{after}"
            options = [*options, *(["-W", depend] if self._pbs else [f"--dependency={depend[7:]}"])]
        done = subprocess.run(
            [self._command, *options, str(script)], capture_output=True, text=True, timeout=120
        )
        if done.returncode != 0:
            said = " ".join((done.stderr or done.stdout).split())
            raise ConfigError(f"{self._command} refused {script}: {said}")
        return done.stdout.split()[-1].partition(";")[0]
