"""What `hydra/launcher=parsl` is told: `hydra.launcher.KEY=VALUE`. Imports no Parsl, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from largebatch.conf.cluster_config import ClusterConfig, clock, seconds
from largebatch.conf.config import ConfigError

SHAPES: Final = ("devices", "nodes", "jobs")


@dataclass
class SweepSettings:
    """Where the trials of a sweep run, and what happens when one fails.

    Attributes:
        shape: devices: a trial on each device of every node (Parsl's HighThroughputExecutor);
            nodes: each on `nodes_per_trial` nodes of this allocation, by an mpiexec or srun of its
            own; jobs: each is a job of its own, submitted through Parsl's PBSProProvider or
            SlurmProvider.
        cluster: a choice of conf/cluster, as of `largebatch submit`; it knows launcher, cores and,
            for jobs, scheduler, modules and settings.
        overrides: of that choice, each quoted: ['cluster.node.cores_per_rank=8'].
        queue, account: with jobs, theirs.
        hostfile: the allocation's nodes, a line each. None: LARGEBATCH_HOSTFILE, PBS_NODEFILE,
            Slurm's list, or this machine.
        ranks_per_node: None: the cluster's (12 on Aurora), or 1.
        workers_per_node: with devices, trials at a time on a node. None: the cluster's ranks, or
            all cores of this machine.
        max_jobs: with jobs, so many queued or running at a time. None: as many as the queue holds
            of a user.
        retries: times that a failed trial is begun again, on other nodes where there are any.
        walltime: of this job, HH:MM:SS or seconds from now; None: what PBS or Slurm says. With
            jobs, of each of them.
        stop_before_walltime: seconds before it at which running trials are told to stop.
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


KEY: Final = "hydra.launcher"

_LEAST: Final = {
    "nodes_per_trial": 1, "ranks_per_node": 1, "workers_per_node": 1, "max_jobs": 1,
    "lost_seconds": 1, "retries": 0, "stop_before_walltime": 0,
}  # fmt: skip


def checked(values: Mapping[str, Any]) -> SweepSettings:
    """The values as settings.

    Raises:
        ConfigError: naming the key and what it takes.
    """
    settings = SweepSettings(**values)
    if settings.shape not in SHAPES:
        raise ConfigError(f"{KEY}.shape must be one of {', '.join(SHAPES)}, got {settings.shape!r}")
    for name, least in _LEAST.items():
        value = getattr(settings, name)
        if value is not None:
            setattr(settings, name, _count(value, f"{KEY}.{name}", least))
    for name in ("walltime", "trial_seconds"):
        if getattr(settings, name) is not None:
            setattr(settings, name, seconds(getattr(settings, name), f"{KEY}.{name}"))
    stop = settings.stop_before_walltime
    if settings.shape != "jobs" and settings.walltime is not None and settings.walltime <= stop:
        raise ConfigError(
            f"{KEY}.walltime must be longer than the {stop} s of {KEY}.stop_before_walltime, got "
            f"{settings.walltime} s"
        )
    if not settings.command:
        raise ConfigError(f"{KEY}.command must name a program and its words, got []")
    if not settings.poll_seconds > 0:
        raise ConfigError(f"{KEY}.poll_seconds must be above 0, got {settings.poll_seconds}")
    if settings.shape == "devices" and settings.nodes_per_trial != 1:
        raise ConfigError(
            f"{KEY}.shape=devices puts a trial on one device, got {KEY}.nodes_per_trial="
            f"{settings.nodes_per_trial}: use {KEY}.shape=nodes"
        )
    if settings.shape == "jobs" and settings.cluster is None:
        raise ConfigError(
            f"{KEY}.shape=jobs submits to a scheduler: name it with {KEY}.cluster=aurora, polaris, "
            "slurm, local or one of yours"
        )
    if settings.dry_run and settings.shape != "jobs":
        raise ConfigError(f"{KEY}.dry_run shows jobs: use it with {KEY}.shape=jobs")
    return settings


def _count(value: Any, name: str, least: int) -> int:
    try:
        if int(value) >= least and int(value) == float(value):
            return int(value)
    except (TypeError, ValueError):
        pass
    raise ConfigError(f"{name} must be a whole number from {least}, got {value!r}")


def cluster_of(settings: SweepSettings, config_dir: str | None = None) -> ClusterConfig | None:
    """The cluster, its ranks a node as the settings say; None where none is named.

    Args:
        config_dir: where clusters of the user's are.

    Raises:
        ConfigError: an unknown cluster or key, an impossible value.
    """
    if settings.cluster is None:
        if settings.overrides:
            raise ConfigError(f"{KEY}.overrides are of a cluster: name it with {KEY}.cluster=…")
        return None
    from hydra.core.global_hydra import GlobalHydra

    from largebatch.launch.submit import composed

    words = [f"cluster={settings.cluster}"]
    if settings.shape != "jobs":  # what only a scheduler is told
        words += ["cluster.queue=null", "cluster.account=null", "cluster.walltime=null"]
    else:
        for name in ("queue", "account"):
            if getattr(settings, name) is not None:
                words.append(f"cluster.{name}={getattr(settings, name)}")
        if settings.walltime is not None:
            words.append(f"cluster.walltime={clock(settings.walltime)}")
    words += [f"cluster.nodes={settings.nodes_per_trial}", *settings.overrides]
    if settings.ranks_per_node is not None:
        words.append(f"cluster.node.ranks={settings.ranks_per_node}")
    # Hydra has one composition at a time: that of the sweep is set aside.
    hydra = GlobalHydra.instance()
    of_the_sweep, hydra.hydra = hydra.hydra, None
    try:
        return composed(words, config_dir).cluster
    finally:
        hydra.hydra = of_the_sweep
