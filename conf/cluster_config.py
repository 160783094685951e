"""The types of a cluster and of a job on it. A cluster is one YAML in conf/cluster/, and no code.

Hydra composes, one merge into `SubmitConfig` refuses an unknown key and an impossible value before
anything is written or submitted. Imports no torch.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Final

from omegaconf import MISSING, DictConfig

from largebatch.common.errors import ConfigError
from largebatch.conf.specs import count, typed_as

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "scheduler": ("pbs", "slurm", "none"),
    "launcher": ("pals", "srun", "mpich", "torchrun"),
    "environment": ("venv", "spread", "copper"),
    "collectives": ("oneccl", "nccl", "none"),
    "preflight": (None, "fast", "full"),
}

_PLAIN: Final = re.compile(r"[\w.][\w.@+:/=,-]*", re.ASCII)
"""Words of a job's directives and of commands in its script, which are written as they are."""
_PLAIN_NAMES: Final = (
    "queue", "account", "place", "daos_filesystem", "hsn_suffix", "filesystems", "modules",
)  # fmt: skip
_LINES: Final = ("directives", "setup", "shell_options")
"""Written as they are, a line each."""

# oneCCL's all-reduce between nodes. `2d` cannot be one, and topo is what it is between (oneCCL's
# documentation of its environment variables).
ALGORITHMS = ("direct", "rabenseifner", "nreduce", "ring", "double_tree", "recursive_doubling")


def seconds(value: Any, name: str) -> int:
    """A wall time in seconds, from HH:MM:SS or from seconds."""
    if isinstance(value, int) and value > 0:
        return value
    found = re.fullmatch(r"(\d+):([0-5]\d):([0-5]\d)", str(value))
    hours, minutes, rest = map(int, found.groups()) if found else (0, 0, 0)
    total = 3600 * hours + 60 * minutes + rest
    if total == 0:
        raise ConfigError(f"{name} must be HH:MM:SS, such as 00:30:00, got {value!r}")
    return total


@dataclass
class QueueConfig:
    """What a queue takes. `walltime` holds, for jobs of up to N nodes, the longest time."""

    walltime: dict[int, Any] = MISSING
    min_nodes: int = count(1, least=1)
    min_walltime: Any = "00:00:01"
    jobs_per_user: int | None = count(None, least=1)
    """Queued and running; None: not limited, or not known."""
    note: str = ""

    def __post_init__(self) -> None:
        self.min_walltime = seconds(self.min_walltime, "min_walltime")
        self.walltime = {
            int(nodes): seconds(longest, "walltime")
            for nodes, longest in sorted(self.walltime.items())
        }

    @property
    def max_nodes(self) -> int:
        return max(self.walltime)

    def longest(self, nodes: int) -> int:
        """Seconds that a job of `nodes` nodes may take."""
        most = min(limit for limit in self.walltime if nodes <= limit)
        longest: int = self.walltime[most]
        return longest


@dataclass
class DomainConfig:
    """Cores that are near one another, and the devices that are near to them."""

    cores: str = MISSING
    devices: list[int] = field(default_factory=list)


@dataclass
class NodeConfig:
    """A node's cores, and who is to use which; launch/jobs/binding.py makes the ranks' lists of it.

    Cores are written as people write them: `0,52` or `42-47,94-99`.
    """

    ranks: int = count(1, least=1)
    """Ranks a node: one a device."""
    domains: list[DomainConfig] = field(default_factory=list)
    """None: ranks are not bound."""
    cores_per_rank: int | None = count(None, least=1)
    """None: as many as there are for all."""
    rank_cores: str = ""
    """Cores that ranks may have, taken in order. Empty: every core of the domains."""
    reserved: str = ""
    """The operating system's."""
    ccl_workers: str | None = None
    """A core for each rank's oneCCL worker. None: oneCCL chooses, among `ccl_choice`."""
    ccl_choice: str = ""
    copper: str = ""
    daos: str = ""
    bind: str | None = None
    """Cores of each rank, as 4-7:8-11:…, in place of those that are computed."""

    @property
    def num_devices(self) -> int:
        return sum(len(domain.devices) for domain in self.domains)


@dataclass
class SettingsConfig:
    """Environment variables that belong together, exported in jobs of `from_nodes` nodes or more.

    `because` says of each variable why, and who has confirmed it; `source` of all together. A value
    is a word of the shell's: `$NAME` is expanded; null leaves the variable alone.
    """

    source: str = ""
    from_nodes: int = count(1, least=1)
    export: dict[str, Any] = field(default_factory=dict)
    because: dict[str, str] = field(default_factory=dict)
    unset: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        strange = [
            name
            for name in [*self.export, *self.unset]
            if not re.fullmatch(r"[A-Za-z_]\w*", str(name), re.ASCII)
        ]
        if strange:
            raise ConfigError(
                f"cluster.settings export and unset variables by name, got {strange[0]!r}"
            )


@dataclass
class ClusterConfig:
    """A cluster, and what is asked of it for one job."""

    name: str = MISSING
    scheduler: str = "pbs"
    launcher: str = "pals"
    launcher_options: list[str] = field(default_factory=list)
    shell_options: str = "-l"
    directives: list[str] = field(default_factory=list)
    """Further directives of the scheduler, as they are."""

    nodes: int = count(1, least=1)
    spares: int = count(0)
    queue: str | None = None
    account: str | None = None
    walltime: Any = None
    chain: int = count(1, least=1)
    queues: dict[str, QueueConfig] | None = None
    """None: none is checked."""
    filesystems: list[str] = field(default_factory=list)
    place: str | None = None

    known: str = ""
    """Where `queues` and `known_modules` are from, with the date: both change."""
    modules: list[str] = field(default_factory=list)
    known_modules: dict[str, str] = field(default_factory=dict)
    """Modules with their versions, and what they hold."""
    setup: list[str] = field(default_factory=list)
    environment: str = "venv"
    venv: str | None = None
    archive: str | None = None
    daos: str | None = None
    daos_filesystem: str = "daos_user_fs"
    daos_caching: bool = True
    daos_intercept: bool = False

    node: NodeConfig = field(default_factory=NodeConfig)
    hsn_suffix: str | None = None
    master_port: int | None = count(None, least=1)
    open_files: int = count(65536, least=1)
    collectives: str = "none"
    allreduce: str = "default"
    settings: dict[str, SettingsConfig] = field(default_factory=dict)
    rank_logs_from_nodes: int = count(2, least=1)
    preflight: str | None = None
    watch_timeout: int | None = count(None, least=1)
    restarts: int = count(0)

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choice or "null" for choice in choices)
                raise ConfigError(
                    f"cluster.{name} must be one of {known}, got {getattr(self, name)!r}"
                )
        if self.walltime is not None:
            self.walltime = seconds(self.walltime, "cluster.walltime")
        self._check_words()
        self._check_allreduce()
        self._check_environment()
        if self.launcher == "torchrun" and self.nodes + self.spares > 1:
            raise ConfigError(
                f"cluster.launcher=torchrun starts ranks on one node, got cluster.nodes="
                f"{self.nodes}: use mpich, pals or srun"
            )

    def _check_words(self) -> None:
        """Nothing that is written into the script as it is may be more than it should."""
        for name in _PLAIN_NAMES:
            value = getattr(self, name)
            for word in value if isinstance(value, list) else [value]:
                if word is not None and not _PLAIN.fullmatch(word):
                    raise ConfigError(
                        f"cluster.{name} must be a plain name (letters, digits and . _ - @ + : / = "
                        f",), got {word!r}"
                    )
        for name in _LINES:
            value = getattr(self, name)
            for line in value if isinstance(value, list) else [value]:
                if not line.isprintable():
                    raise ConfigError(f"cluster.{name} must be lines of text, got {line!r}")

    def _check_allreduce(self) -> None:
        if self.allreduce == "default":
            return
        if self.collectives != "oneccl":
            raise ConfigError(
                f"cluster.allreduce chooses among oneCCL's algorithms, and {self.name} has "
                f"cluster.collectives={self.collectives}: leave it at default"
            )
        by_size = all(
            re.fullmatch(rf"({'|'.join(ALGORITHMS)})(:\d+-(\d+|max))?", part)
            for part in self.allreduce.split(";")
        )
        if not by_size:
            raise ConfigError(
                f"cluster.allreduce must be default, one of {', '.join(ALGORITHMS)}, or such by "
                f"bytes ('direct:0-1048576;rabenseifner:1048577-max'), got {self.allreduce!r}"
            )
        transport = self.exported.get("CCL_ATL_TRANSPORT", "mpi")
        if "direct" in self.allreduce and transport != "mpi":
            raise ConfigError(
                "cluster.allreduce=direct is MPI's own all-reduce: it needs CCL_ATL_TRANSPORT=mpi, "
                f"got {transport!r}"
            )

    def _check_environment(self) -> None:
        if self.environment == "spread" and self.archive is None:
            raise ConfigError(
                "cluster.environment=spread unpacks an archive on every node: name it with "
                "cluster.archive=…"
            )
        if self.environment == "spread" and self.launcher == "torchrun":
            raise ConfigError(
                "cluster.environment=spread goes over MPI, got cluster.launcher=torchrun: use venv"
            )
        if self.daos is not None and not re.fullmatch(r"[\w.]+[\w.-]*:[\w.-]+", self.daos):
            raise ConfigError(f"cluster.daos must be POOL:CONTAINER, got {self.daos!r}")
        if self.daos_intercept and (self.daos is None or self.launcher != "pals"):
            raise ConfigError(
                "cluster.daos_intercept=true is of a DAOS container under PALS: name it with "
                f"cluster.daos=POOL:CONTAINER, got cluster.launcher={self.launcher}"
            )
        if self.environment == "copper" and self.venv is None:
            raise ConfigError(
                "cluster.environment=copper reads the environment through Copper: name it with "
                "cluster.venv=…"
            )

    @property
    def num_ranks(self) -> int:
        return self.nodes * self.node.ranks

    @property
    def active_settings(self) -> dict[str, SettingsConfig]:
        """Those for a job of this size."""
        return {
            name: group for name, group in self.settings.items() if self.nodes >= group.from_nodes
        }

    @property
    def exported(self) -> dict[str, Any]:
        """Every variable that is exported."""
        return {
            name: value
            for group in self.active_settings.values()
            for name, value in group.export.items()
            if value is not None
        }


@dataclass
class SubmitConfig:
    """Options of `largebatch submit`."""

    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    name: str = "largebatch"
    folder: str = MISSING
    """Of the job: its script, its output, its logs, and the run's record if that has no other."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z][\w.-]{0,14}", self.name, re.ASCII):
            raise ConfigError(
                "name must be a letter and up to 14 letters, digits, dots, dashes or underscores, "
                f"as PBS takes it, got {self.name!r}"
            )
        if not re.fullmatch(r"[\w./~+=@,:%][\w./~+=@,:%-]*", self.folder):
            raise ConfigError(
                "folder must have no spaces and no signs of the shell (letters, digits and "
                f". / _ - ~ + = @ , : %), got {self.folder!r}"
            )


def typed_submit(config: DictConfig) -> SubmitConfig:
    """The composed configuration as a `SubmitConfig`."""
    return typed_as(SubmitConfig, config)
