"""Who this process is among all: rank, size and local rank, from whatever started it.

The nearest launcher counts, in this order:

1. torchrun, or `engine.nproc`: RANK and WORLD_SIZE.
2. PALS (mpiexec on Aurora and Polaris): PALS_RANKID and PALS_LOCAL_RANKID. It sets no variable that
   holds the size, so MPI is asked; without mpi4py the size is that of PMI_SIZE, WORLD_SIZE,
   LARGEBATCH_RANKS or lines of PBS_NODEFILE x PALS_LOCAL_SIZE.
3. mpiexec of MPICH, Intel MPI or Open MPI: PMI_RANK, PMIX_RANK, OMPI_COMM_WORLD_RANK; MPI is asked.
4. srun: SLURM_PROCID with SLURM_STEP_NUM_TASKS.
5. none: one rank. A batch or interactive job alone is no launcher: PBS_JOBID, and the SLURM_PROCID
   that Slurm gives a batch script, say nothing about a plain `python` in it.

A world of one that a launcher's mark speaks against is refused: ranks that do not see one another
would train as many runs, over one another. Whoever knows the size beforehand (a script that
`largebatch submit` writes) says it in LARGEBATCH_RANKS, and every rank holds the world against it.
"""

import os
import re
import socket
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from largebatch.common.errors import ConfigError, RanksRefused
from largebatch.common.text import first_line
from largebatch.distributed.addresses import check_is_here, listen

_MPI_MARKERS: Final = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")

# Slurm's last: under an mpiexec that srun has started it counts that one's proxies.
_SIZES: Final = (
    "LARGEBATCH_RANKS",
    "PMI_SIZE",
    "OMPI_COMM_WORLD_SIZE",
    "WORLD_SIZE",
    "SLURM_STEP_NUM_TASKS",
)


@dataclass(frozen=True)
class Ranks:
    """This process among all. `local_*` count within its node."""

    launcher: str = "none"
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    listener: socket.socket | None = field(default=None, compare=False, repr=False)
    """On rank 0, where it has already taken the port that all meet at."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def on_one_node(self) -> bool:
        return self.local_size == self.size


_MARKS: Final = {
    "torchrun": ("RANK", "WORLD_SIZE"),
    "pals": ("PALS_RANKID",),
    "mpi": _MPI_MARKERS,
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
}


def marks_of(launcher: str, environment: Mapping[str, str] = os.environ) -> list[str]:
    """The variables that say that `launcher` has started this process."""
    return [name for name in _MARKS.get(launcher, ()) if name in environment]


def launcher_of(environment: Mapping[str, str]) -> str:
    """torchrun, nproc, pals, mpi, slurm or none, by the marks that it left."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return environment.get("LARGEBATCH_LAUNCHER", "torchrun")
    if "PALS_RANKID" in environment:
        return "pals"
    if any(marker in environment for marker in _MPI_MARKERS):
        return "mpi"
    if "SLURM_PROCID" in environment and "SLURM_STEP_NUM_TASKS" in environment:
        return "slurm"
    return "none"


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """This process's ranks by the nearest launcher; under MPI's a collective call.

    Raises:
        ConfigError: a world that contradicts the launcher's marks or LARGEBATCH_RANKS, or a master
            address that is not this node's.
    """
    launcher = launcher_of(environment)
    if launcher in ("pals", "mpi"):
        return _from_mpi(launcher, environment)
    if launcher == "slurm":
        ranks = _from_slurm(environment)
    elif launcher == "none":
        ranks = Ranks()
    else:
        ranks = _from_torchrun(launcher, environment)
    _check_promise(ranks.size, launcher, environment)
    return ranks


def whole(
    environment: Mapping[str, str], name: str, default: int | None = None, most: int = 2**31
) -> int:
    """A variable that holds a whole number."""
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.strip().isdecimal() or int(text) > most:
        got = "it is missing" if text is None else f"got {text!r}"
        raise ConfigError(
            f"the environment variable {name} must be a whole number from 0 to {most:,}, {got}: a "
            "launcher sets it; to begin alone, unset it and its like "
            f"({', '.join(marks_of(launcher_of(environment), environment)) or name})"
        )
    return int(text)


def _check_promise(size: int, launcher: str, environment: Mapping[str, str]) -> None:
    if "LARGEBATCH_RANKS" in environment and whole(environment, "LARGEBATCH_RANKS") != size:
        raise ConfigError(
            f"LARGEBATCH_RANKS={environment['LARGEBATCH_RANKS']} ranks were to be started, but "
            f"this process ({socket.gethostname()}, launcher: {launcher}) sees {size}: start it "
            "with the job's mpiexec, srun or torchrun, or unset LARGEBATCH_RANKS"
        )


def _from_torchrun(launcher: str, environment: Mapping[str, str]) -> Ranks:
    rank, size = whole(environment, "RANK"), whole(environment, "WORLD_SIZE")
    if rank >= size:
        raise ConfigError(
            f"RANK must be less than WORLD_SIZE, got RANK={rank} WORLD_SIZE={size}: torchrun sets "
            "them; to begin alone, unset RANK and WORLD_SIZE"
        )
    port = whole(environment, "MASTER_PORT", 0, most=65_535)
    if size > 1 and port == 0:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={size} are in the environment, and no MASTER_PORT to meet "
            "at: start with torchrun or engine.nproc; to begin alone, unset RANK and WORLD_SIZE"
        )
    return Ranks(
        launcher=launcher,
        rank=rank,
        size=size,
        local_rank=whole(environment, "LOCAL_RANK", rank),
        local_size=whole(environment, "LOCAL_WORLD_SIZE", size),
        master_addr=environment.get("MASTER_ADDR") or "127.0.0.1",
        master_port=port,
    )


def _from_mpi(launcher: str, environment: Mapping[str, str]) -> Ranks:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        if launcher == "pals" and "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
            ranks = _from_pals_alone(environment)
        elif "SLURM_STEP_NUM_TASKS" in environment:
            ranks = _from_slurm(environment)
        else:
            raise ConfigError(
                f"started by an MPI launcher, but mpi4py does not load ({first_line(error)}): "
                "pip install 'largebatch[mpi]', or start with torchrun or engine.nproc"
            ) from None
        _check_promise(ranks.size, launcher, environment)
        return ranks
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    local_rank, local_size = 0, 1
    if launcher == "mpi":  # before anything that one rank alone may be refused for
        node = world.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, local_size = node.Get_rank(), node.Get_size()

    def check() -> tuple[str, socket.socket] | None:
        nonlocal local_rank, local_size
        _check_size(size, environment)
        if launcher == "pals":
            if rank != whole(environment, "PALS_RANKID"):
                raise ConfigError(
                    f"PALS started this process as rank {environment['PALS_RANKID']}, but mpi4py "
                    f"says {rank}: its MPI library is not the launcher's; install an mpi4py built "
                    "for it"
                )
            local_rank, local_size = _pals_local(environment)
        _check_promise(size, launcher, environment)
        return _master(environment, one_node=local_size == size) if rank == 0 else None

    found = _agreed(world, MPI, check)
    master = found and f"{found[0]} {found[1].getsockname()[1]}"
    addr, _, port = _from_rank(world, MPI, master or "", 0).partition(" ")
    return Ranks(launcher, rank, size, local_rank, local_size, addr, int(port), found and found[1])


T = TypeVar("T")


def _agreed(world: Any, mpi: Any, check: Callable[[], T]) -> T:
    """What `check` returns, once it has on every rank; one that is refused ends all."""
    own: ConfigError | None = None
    try:
        found = check()
    except ConfigError as error:
        own = error
    first = array("q", [world.size if own is None else world.rank])
    world.Allreduce(mpi.IN_PLACE, [first, mpi.INT64_T], op=mpi.MIN)
    if first[0] == world.size:
        return found
    where = f"rank {first[0]} on {socket.gethostname()}: " if first[0] > 0 else ""
    text = _from_rank(world, mpi, f"{where}{own}", first[0])
    if first[0] == world.rank:
        raise ConfigError(text) from own
    raise RanksRefused(text)


def _from_rank(world: Any, mpi: Any, text: str, root: int) -> str:
    """The text of rank `root`, on every rank."""
    data = bytearray(text.encode())
    length = array("q", [len(data)])
    world.Bcast([length, mpi.INT64_T], root=root)
    data = data if world.rank == root else bytearray(length[0])
    world.Bcast([data, mpi.BYTE], root=root)
    return data.decode()


def _from_pals_alone(environment: Mapping[str, str]) -> Ranks:
    """Without MPI: the size is not PALS's to say, and the master has to be known beforehand."""
    rank, (local_rank, local_size) = whole(environment, "PALS_RANKID"), _pals_local(environment)
    size = said_size(environment)
    if size is None or rank >= size:
        raise ConfigError(
            f"rank {rank} of PALS finds no size of the world (got {size}): pip install "
            "'largebatch[mpi]', or export LARGEBATCH_RANKS with the number of ranks"
        )
    addr, port = environment["MASTER_ADDR"], whole(environment, "MASTER_PORT", most=65_535)
    if rank == 0:
        check_is_here(addr)
    return Ranks("pals", rank, size, local_rank, local_size, addr, port)


def _pals_local(environment: Mapping[str, str]) -> tuple[int, int]:
    return whole(environment, "PALS_LOCAL_RANKID"), whole(environment, "PALS_LOCAL_SIZE")


def _check_size(size: int, environment: Mapping[str, str]) -> None:
    """Hold what MPI sees against what the launcher's variables say.

    A world of one needs a proof, that of more than one only no contradiction: a job may well use
    fewer nodes than its PBS_NODEFILE has.
    """
    said = said_size(environment, exact=size != 1)
    if said is None and size == 1 and "PALS_RANKID" in environment:
        said = "an unknown number of"
    if said is not None and said != size:
        alone = "; if one rank is meant: run without mpiexec, or export LARGEBATCH_RANKS=1"
        raise ConfigError(
            f"the launcher started {said} ranks, but mpi4py sees {size}: its MPI library is not "
            "the launcher's; install an mpi4py built for it, or start with torchrun"
            + alone
            * (size == 1)
        )


def said_size(environment: Mapping[str, str], exact: bool = False) -> Any:
    """The size of the world by the environment; None where nothing says it.

    Args:
        exact: leave out what is only an upper bound, nodes x ranks on this node.
    """
    for name in _SIZES:
        if name in environment:
            return whole(environment, name)
    nodefile = Path(environment.get("PBS_NODEFILE", ""))
    if exact or "PALS_LOCAL_SIZE" not in environment or not nodefile.is_file():
        return None
    nodes = set(nodefile.read_text(encoding="utf-8").split())
    return len(nodes) * whole(environment, "PALS_LOCAL_SIZE")


def _from_slurm(environment: Mapping[str, str]) -> Ranks:
    """srun says all but the master's port, which has to be exported before it."""
    rank, size = whole(environment, "SLURM_PROCID"), whole(environment, "SLURM_STEP_NUM_TASKS")
    local_rank = whole(environment, "SLURM_LOCALID")
    # "2(x3),1": two tasks on each of three nodes, one on the fourth.
    counts = [
        int(tasks)
        for tasks, times in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", str(size))
        )
        for _ in range(int(times or 1))
    ]
    local_size = counts[whole(environment, "SLURM_NODEID", 0)]
    if size == 1:
        return Ranks("slurm", rank, size, local_rank, local_size)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"srun started {size} ranks, which cannot meet without {' and '.join(missing)}: export "
            "them before srun (largebatch submit cluster=slurm does), the address that of the "
            'first node: $(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    addr, port = environment["MASTER_ADDR"], whole(environment, "MASTER_PORT", most=65_535)
    if rank == 0:
        check_is_here(addr)
    return Ranks("slurm", rank, size, local_rank, local_size, addr, port)


def _master(environment: Mapping[str, str], one_node: bool) -> tuple[str, socket.socket]:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT where exported, else this node. The port is
    taken from now on.

    On several nodes this node goes by its name on the high-speed network, where the site has one:
    the suffix in LARGEBATCH_HSN_SUFFIX.
    """
    host = socket.gethostname()
    suffix = environment.get("LARGEBATCH_HSN_SUFFIX")
    on_network = f"{host.split('.')[0]}.{suffix}" if suffix else host
    addr = environment.get("MASTER_ADDR") or ("127.0.0.1" if one_node else on_network)
    port = whole(environment, "MASTER_PORT", 0, 65_535) if environment.get("MASTER_PORT") else 0
    return addr, listen(addr, port, one_node)
