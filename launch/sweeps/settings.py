"""Settings of `hydra/launcher=parsl`: `hydra.launcher.KEY=VALUE`.

Hydra reads it at every start, so it imports nothing.
"""

from dataclasses import dataclass, field
from typing import Any, Final

KEY: Final = "hydra.launcher"
SHAPES: Final = ("devices", "nodes", "jobs")


@dataclass
class SweepSettings:
    """Where the trials of a sweep run, and what happens when one fails.

    Attributes:
        shape: devices: a trial on each device of every node (Parsl's HighThroughputExecutor);
            nodes: each on `nodes_per_trial` nodes of this allocation, by an mpiexec or srun of its
            own; jobs: each is a job of its own, of PBS, Slurm or this machine.
        cluster: a choice of conf/cluster, as of `largebatch submit`; it knows launcher, cores and,
            for jobs, scheduler, modules and settings.
        overrides: of that choice, each quoted: ['cluster.node.cores_per_rank=8'].
        queue, account: with jobs, theirs.
        hostfile: the allocation's nodes, a line each. None: LARGEBATCH_HOSTFILE, PBS_NODEFILE,
            Slurm's list, or this machine.
        ranks_per_node: None: the cluster's (12 on Aurora), or 1.
        workers_per_node: with devices, trials at a time on a node. None: the cluster's ranks, or
            all cores of this machine.
        max_jobs: with jobs, the most queued or running at a time. None: as many as the queue holds
            of a user.
        retries: times that a failed trial is begun again, on other nodes where there are any.
        walltime: of this job, HH:MM:SS or seconds from now; None: what PBS or Slurm says. With
            jobs, of each of them.
        stop_before_walltime: seconds before it at which running trials get SIGTERM.
        trial_seconds: none is begun that would not end by then. None: as the longest so far.
        dry_run: with jobs, print what would be submitted, and submit nothing.
        command: what a trial's overrides are given to. It must leave a summary.json.
        lost_seconds: with devices, of a node's silence after which it is taken for dead.
        poll_seconds: between two looks at the trials.
    """

    shape: str = "devices"
    cluster: str | None = None
    overrides: list[str] = field(default_factory=list)
    queue: str | None = None
    account: str | None = None
    hostfile: str | None = None
    nodes_per_trial: Any = 1
    ranks_per_node: Any = None
    workers_per_node: Any = None
    max_jobs: Any = None
    retries: Any = 2
    walltime: Any = None
    stop_before_walltime: Any = 300
    trial_seconds: Any = None
    lost_seconds: Any = 60
    dry_run: bool = False
    command: list[str] = field(default_factory=lambda: ["python", "-m", "largebatch", "train"])
    poll_seconds: float = 1.0
