"""The settings of a sweep, checked, and the cluster that they name. Imports no Parsl, no torch."""

from collections.abc import Mapping
from typing import Any, Final

from largebatch.common.errors import ConfigError
from largebatch.common.text import clock
from largebatch.conf.cluster_config import ClusterConfig, seconds
from largebatch.launch.sweeps.settings import KEY, SHAPES, SweepSettings

_LEAST: Final = {
    "nodes_per_trial": 1, "ranks_per_node": 1, "workers_per_node": 1, "max_jobs": 1,
    "lost_seconds": 1, "retries": 0, "stop_before_walltime": 0,
}  # fmt: skip


def checked(values: Mapping[str, Any]) -> SweepSettings:
    """The values as settings; ConfigError names the key that is wrong and what it takes."""
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
    """The cluster, of conf/ or a folder of the user's, its ranks a node as the settings say; None
    where none is named. ConfigError for an unknown cluster or key, an impossible value.
    """
    if settings.cluster is None:
        if settings.overrides:
            raise ConfigError(f"{KEY}.overrides are of a cluster: name it with {KEY}.cluster=…")
        return None
    from hydra.core.global_hydra import GlobalHydra

    from largebatch.launch.jobs.submit import composed

    words = [f"cluster={settings.cluster}"]
    if settings.shape != "jobs":  # for a scheduler only
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
