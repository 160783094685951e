"""The outside world as the doctor sees it: one seam, and what one process reads through it.

`Host` is what a check could ask for. A test replays a recorded situation by giving other answers:
another environment, another root for /proc and /sys, another affinity, another clock.
"""

import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shutil
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from largebatch.launch.hosts import host_lines, node_name, short

if TYPE_CHECKING:
    from largebatch.distributed.ranks import Ranks

# HPE names a node by rack, chassis, slot, board and node: x4519c2s3b0n0. Aurora's racks begin with
# 4, those of Sunspot, its testbed, with 1; Polaris's, whose nodes have no tiles, with 3.
_NODE_OF_TILES: Final = re.compile(r"x[14]\d*c\d+s\d+b\d+n\d+")
_OF_INTEREST: Final = re.compile(
    r"(CCL|FI|ZE|ZEX|PALS|PMI|PMIX|PBS|SLURM|OMPI|MPICH|MPIR|DS|TORCH|ONEAPI|LARGEBATCH)_|"
    r"(.*BACKEND|DEEPSPEED.*|MASTER_ADDR|MASTER_PORT|USE_LIBUV|TMPDIR|PYTHONPATH|LD_PRELOAD|USER|"
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|OMP_NUM_THREADS|http_proxy|NO_PROXY)$"
)
DISTRIBUTIONS: Final = (
    "torch", "largebatch", "numpy", "mpi4py", "hydra-core", "hydra-joblib-launcher", "deepspeed",
    "intel-extension-for-pytorch", "oneccl-bind-pt", "oneccl",
)  # fmt: skip


def find_ranks() -> "Ranks":
    """This process among all, by its launcher. Needs omegaconf, which a bare install lacks."""
    from largebatch.distributed.ranks import find_ranks

    return find_ranks()


def affinity() -> frozenset[int]:
    """The logical CPUs that this process may run on."""
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else frozenset()


def nofile() -> tuple[int, int]:
    """Soft and hard limit of open files and sockets."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)


def torch_facts() -> dict[str, Any]:
    """What torch itself says; imports it, so this is asked for only where tiles are expected."""
    try:
        import torch
    except Exception as error:  # a broken torch raises anything, OSError for a missing library
        return {"error": f"{type(error).__name__}: {error}"}
    xpu = torch.xpu.is_available()
    return {"xpu": xpu, "devices": torch.xpu.device_count() if xpu else 0}


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that matter, from their metadata: nothing is imported."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def has_module(name: str) -> bool:
    """Whether `import name` would find something."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


@dataclass(frozen=True)
class Folder:
    """A folder that a run writes to, and what its file system has left for an unprivileged user."""

    path: str
    free_bytes: int = 0
    file_system: str = ""
    exists: bool = True
    writable: bool = True
    error: str = ""
    """Why it could not be looked at."""


def disk(path: Path) -> Folder:
    """`path`, or what holds for the nearest folder above it that exists."""
    there = path
    while not there.exists() and there != there.parent:
        there = there.parent
    free, writable = shutil.disk_usage(there).free, os.access(there, os.W_OK)
    return Folder(str(path), free, exists=there == path, writable=writable)


def addresses() -> dict[str, str]:
    """Network interface -> its IPv4 address."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an IPv4 address
                packed = struct.pack("256s", name.encode()[:15])
                answer = fcntl.ioctl(asked.fileno(), 0x8915, packed)  # SIOCGIFADDR
                found[name] = socket.inet_ntoa(answer[20:24])
    return found


def resolve(host: str) -> list[str]:
    """The IPv4 addresses of `host`; none where the name is unknown."""
    try:
        return sorted({str(row[4][0]) for row in socket.getaddrinfo(host, None, socket.AF_INET)})
    except OSError:
        return []


def can_listen(address: str, port: int = 0) -> bool:
    """Whether a server could listen now at this node's address ("": all of them) and port (0: any);
    an address that is an interface's second one counts.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


def reverse_seconds(address: str) -> float:
    """Seconds of a reverse lookup of an address, whether it has a name or not."""
    started = time.perf_counter()
    with suppress(OSError):
        socket.getnameinfo((address, 1), 0)
    return time.perf_counter() - started


@dataclass(frozen=True)
class Host:
    """Everything that the doctor asks of the world outside."""

    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    root: Path = Path("/")
    """Above /proc and /sys."""
    node: Callable[[], str] = lambda: node_name()
    ranks: Callable[[], "Ranks"] = find_ranks
    affinity: Callable[[], frozenset[int]] = affinity
    num_cpus: Callable[[], int] = lambda: os.cpu_count() or 1
    nofile: Callable[[], tuple[int, int]] = nofile
    torch: Callable[[], dict[str, Any]] = torch_facts
    versions: Callable[[], dict[str, str | None]] = versions
    has_module: Callable[[str], bool] = has_module
    disk: Callable[[Path], Folder] = disk
    addresses: Callable[[], dict[str, str]] = addresses
    resolve: Callable[[str], list[str]] = resolve
    port_is_free: Callable[[int], bool] = lambda port: can_listen("", port)
    is_here: Callable[[str], bool] = can_listen
    reverse_seconds: Callable[[str], float] = reverse_seconds
    clock: Callable[[], float] = time.time

    def number(self, path: str) -> int | None:
        """The whole number in a file of /proc or /sys; None where there is none."""
        try:
            return int((self.root / path).read_text(encoding="ascii").split()[0])
        except (OSError, ValueError, IndexError):
            return None

    def mounts(self) -> list[tuple[str, str]]:
        """(mount point, file system type), as in /proc/mounts."""
        try:
            lines = (self.root / "proc/mounts").read_text(encoding="utf-8").splitlines()
        except OSError:
            return []
        return [(parts[1], parts[2]) for parts in map(str.split, lines) if len(parts) > 2]


def alone(host: Host) -> Host:
    """The same for a process that is one of its own, with whichever others it was started."""

    def one() -> "Ranks":
        from largebatch.distributed.ranks import Ranks

        return Ranks()

    launchers = ("PALS_", "PMI_", "PMIX_", "SLURM_", "OMPI_")
    kept = {k: v for k, v in host.environment.items() if not k.startswith(launchers)}
    return replace(host, environment=kept, ranks=one)


@dataclass(frozen=True)
class HostFacts:
    """What one process has read: plain values, so that they travel and can be written down."""

    node: str
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    launcher: str = "none"
    launcher_error: str = ""
    environment: dict[str, str] = field(default_factory=dict)
    expects_tiles: bool = False
    torch: dict[str, Any] = field(default_factory=dict)
    """Empty where torch was not asked: no tiles are expected."""
    versions: dict[str, str | None] = field(default_factory=dict)
    missing_modules: list[str] = field(default_factory=list)
    dead_modules: list[str] = field(default_factory=list)
    cores: list[int] = field(default_factory=list)
    num_cpus: int = 1
    nofile_soft: int = 0
    nofile_hard: int = 0
    somaxconn: int | None = None
    syn_backlog: int | None = None
    tmpdir: Folder = Folder("/tmp")
    run_folder: Folder = Folder(".")
    addresses: dict[str, str] = field(default_factory=dict)
    master: str = ""
    master_port: int = 0
    master_resolves: list[str] = field(default_factory=list)
    master_is_here: bool = True
    master_port_free: bool = True
    reverse_seconds: float = 0.0
    """Of a reverse lookup of the master's address, on rank 0."""
    nodes_expected: list[str] = field(default_factory=list)
    copper: bool = False
    clock_offset_seconds: float = 0.0
    """This node's clock minus rank 0's, where they have compared them."""

    @property
    def here(self) -> tuple[str, ...]:
        """This node, where there may be others."""
        return (self.node,) if self.size > 1 else ()


def collect(host: Host, run_folder: Path = Path()) -> HostFacts:
    """Read everything once. Imports torch only where tiles are expected, MPI only where started by
    an MPI launcher (then this is a collective call).
    """
    environment = {k: v for k, v in host.environment.items() if _OF_INTEREST.match(k)}
    node = host.node()
    place: dict[str, Any] = {}
    missing = [name for name in ("numpy", "torch", *MODULES) if not host.has_module(name)]
    try:
        ranks = host.ranks()
    except ModuleNotFoundError:
        pass  # it is among the missing ones
    except Exception as error:  # the sentence is for the user, whatever its type
        place["launcher_error"] = str(error)
    else:
        named = ("rank", "size", "local_rank", "local_size", "launcher", "master_port")
        place = {name: getattr(ranks, name) for name in named} | {"master": ranks.master_addr}
        if ranks.launcher in ("pals", "mpi") and not host.has_module("mpi4py"):
            missing.append("mpi4py")
        if ranks.rank == 0 and ranks.size > 1:
            place |= collect_master(ranks, host)
    tiles = expects_tiles(environment, node)
    soft, hard = host.nofile()
    mounts, tmpdir = host.mounts(), Path(environment.get("TMPDIR") or tempfile.gettempdir())
    return HostFacts(
        node=node,
        environment=environment,
        expects_tiles=tiles,
        torch=host.torch() if tiles else {},
        versions=host.versions() | {"oneCCL (CCL_ROOT)": ccl_version(environment)},
        missing_modules=missing,
        dead_modules=[name for name in DEAD_MODULES if host.has_module(name)],
        cores=sorted(host.affinity()),
        num_cpus=host.num_cpus(),
        nofile_soft=soft,
        nofile_hard=hard,
        somaxconn=host.number("proc/sys/net/core/somaxconn"),
        syn_backlog=host.number("proc/sys/net/ipv4/tcp_max_syn_backlog"),
        tmpdir=collect_folder(tmpdir, host, mounts),
        run_folder=collect_folder(run_folder.absolute(), host, mounts),
        nodes_expected=nodes_of(environment),
        copper=any("/copper" in point and kind.startswith("fuse") for point, kind in mounts),
        **place,
    )


def collect_master(ranks: "Ranks", host: Host) -> dict[str, Any]:
    """Rank 0's address and port, on rank 0."""
    resolved = host.resolve(ranks.master_addr)
    return {
        "addresses": host.addresses(),
        "master_resolves": resolved,
        "master_is_here": any(map(host.is_here, resolved)),
        "reverse_seconds": host.reverse_seconds(resolved[0]) if resolved else 0.0,
        # torchrun's agent holds the port already.
        "master_port_free": ranks.launcher == "torchrun"
        or ranks.listener is not None  # taken by rank 0 itself
        or host.port_is_free(ranks.master_port),
    }


# What `largebatch train` imports beside torch and numpy.
MODULES: Final = ("hydra", "omegaconf")
DEAD_MODULES: Final = ("oneccl_bindings_for_pytorch",)


def expects_tiles(environment: Mapping[str, str], node: str) -> bool:
    """Whether something says that this process should see XPU tiles."""
    if any(name.startswith(("ZE_", "ZEX_")) for name in environment):
        return True
    return "PBS_JOBID" in environment and _NODE_OF_TILES.match(node) is not None


def ccl_version(environment: Mapping[str, str]) -> str | None:
    """oneCCL's version as far as the path of its module names it (…/ccl/2021.17)."""
    found = re.findall(r"\d{4}\.\d+(?:\.\d+)*", environment.get("CCL_ROOT", ""))
    return found[-1] if found else None


def nodes_of(environment: Mapping[str, str]) -> list[str]:
    """The allocation's nodes by their short names, in the order of its hostfile."""
    try:
        return [short(line) for line in host_lines(Path(environment["PBS_NODEFILE"]))]
    except (KeyError, ValueError):  # no hostfile is named, or it names no node
        return []


def collect_folder(path: Path, host: Host, mounts: list[tuple[str, str]]) -> Folder:
    """A folder's state and the type of its file system."""
    held = [row for row in mounts if path.is_relative_to(row[0])]
    file_system = max(held, key=lambda row: len(row[0]))[1] if held else ""
    try:
        return replace(host.disk(path), file_system=file_system)
    except OSError as error:
        what = error.strerror or str(error)
        return Folder(str(path), 0, file_system, exists=False, writable=False, error=what)
