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

import random
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from largebatch.conf.errors import ConfigError

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

    @property
    def is_first(self) -> bool:
        return self.rank == 0


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
        ranks = _from_mpi(launcher, environment)
    elif launcher == "slurm":
        ranks = _from_slurm(environment)
    elif launcher == "none":
        ranks = Ranks()
    else:
        ranks = Ranks(
            launcher=launcher,
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            local_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(environment.get("MASTER_PORT", "0")),
        )
    promised = environment.get("LARGEBATCH_RANKS")
    if promised is not None and int(promised) != ranks.size:
        raise ConfigError(
            f"LARGEBATCH_RANKS={promised} ranks were to be started, but this process "
            f"({socket.gethostname()}, launcher: {launcher}) sees {ranks.size}: start it with the "
            "job's mpiexec, srun or torchrun, or unset LARGEBATCH_RANKS"
        )
    return ranks


def _from_mpi(launcher: str, environment: Mapping[str, str]) -> Ranks:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it finds no MPI library
        if launcher == "pals" and "MASTER_ADDR" in environment and "MASTER_PORT" in environment:
            return _from_pals_alone(environment)
        if "SLURM_STEP_NUM_TASKS" in environment:
            return _from_slurm(environment)
        raise ConfigError(
            f"started by an MPI launcher, but mpi4py does not load ({_first_line(error)}): "
            "pip install 'largebatch[mpi]', or start with torchrun or engine.nproc"
        ) from None
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    _check_size(size, environment)
    if launcher == "pals":
        _check_rank(rank, environment)
        local_rank, local_size = _pals_local(environment)
    else:
        node = world.Split_type(MPI.COMM_TYPE_SHARED)
        local_rank, local_size = node.Get_rank(), node.Get_size()
    # Rank 0's failure is told, so that the others do not wait for it.
    master: Any = _master(environment, one_node=local_size == size) if rank == 0 else None
    master = world.bcast(master)
    if isinstance(master, ConfigError):
        raise master
    return Ranks(launcher, rank, size, local_rank, local_size, *master)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _from_pals_alone(environment: Mapping[str, str]) -> Ranks:
    """Without MPI: the size is not PALS's to say, and the master has to be known beforehand.

    Raises:
        ConfigError: nothing says the size.
    """
    rank, (local_rank, local_size) = int(environment["PALS_RANKID"]), _pals_local(environment)
    size = _said_size(environment)
    if size is None or rank >= size:
        raise ConfigError(
            f"rank {rank} of PALS finds no size of the world (got {size}): pip install "
            "'largebatch[mpi]', or export LARGEBATCH_RANKS with the number of ranks"
        )
    addr, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank == 0:
        check_is_here(addr)
    return Ranks("pals", rank, size, local_rank, local_size, addr, port)


def _pals_local(environment: Mapping[str, str]) -> tuple[int, int]:
    return int(environment["PALS_LOCAL_RANKID"]), int(environment["PALS_LOCAL_SIZE"])


def _check_rank(rank: int, environment: Mapping[str, str]) -> None:
    if rank != int(environment["PALS_RANKID"]):
        raise ConfigError(
            f"PALS started this process as rank {environment['PALS_RANKID']}, but mpi4py says "
            f"{rank}: its MPI library is not the launcher's; install an mpi4py built for it"
        )


def _check_size(size: int, environment: Mapping[str, str]) -> None:
    """Hold what MPI sees against what the launcher's variables say.

    A world of one needs a proof, that of more than one only no contradiction: a job may well use
    fewer nodes than its PBS_NODEFILE has.
    """
    said = _said_size(environment, exact=size != 1)
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


def _said_size(environment: Mapping[str, str], exact: bool = False) -> Any:
    """The size of the world by the environment; None where nothing says it.

    Args:
        exact: leave out what is only an upper bound, nodes x ranks on this node.
    """
    for name in _SIZES:
        if name in environment:
            return int(environment[name])
    nodefile = Path(environment.get("PBS_NODEFILE", ""))
    if exact or "PALS_LOCAL_SIZE" not in environment or not nodefile.is_file():
        return None
    nodes = set(nodefile.read_text(encoding="utf-8").split())
    return len(nodes) * int(environment["PALS_LOCAL_SIZE"])


def _from_slurm(environment: Mapping[str, str]) -> Ranks:
    """srun says all but the master's port, which has to be exported before it.

    Raises:
        ConfigError: several ranks without MASTER_ADDR and MASTER_PORT.
    """
    rank, size = int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"])
    local_rank = int(environment["SLURM_LOCALID"])
    # "2(x3),1": two tasks on each of three nodes, one on the fourth.
    counts = [
        int(tasks)
        for tasks, times in re.findall(
            r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", str(size))
        )
        for _ in range(int(times or 1))
    ]
    local_size = counts[int(environment.get("SLURM_NODEID", "0"))]
    if size == 1:
        return Ranks("slurm", rank, size, local_rank, local_size)
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        raise ConfigError(
            f"srun started {size} ranks, which cannot meet without {' and '.join(missing)}: export "
            "them before srun (largebatch submit cluster=slurm does), the address that of the "
            'first node: $(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)'
        )
    addr, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    if rank == 0:
        check_is_here(addr)
    return Ranks("slurm", rank, size, local_rank, local_size, addr, port)


def _master(environment: Mapping[str, str], one_node: bool) -> tuple[str, int] | ConfigError:
    """Where the ranks meet: MASTER_ADDR and MASTER_PORT where exported, else this node.

    On several nodes this node goes by its name on the high-speed network, where the site has one:
    the suffix in LARGEBATCH_HSN_SUFFIX.
    """
    host = socket.gethostname()
    suffix = environment.get("LARGEBATCH_HSN_SUFFIX")
    on_network = f"{host.split('.')[0]}.{suffix}" if suffix else host
    addr = environment.get("MASTER_ADDR") or ("127.0.0.1" if one_node else on_network)
    try:
        check_is_here(addr)
    except ConfigError as error:
        return error
    return addr, int(environment.get("MASTER_PORT") or free_port())


def check_is_here(addr: str) -> None:
    """Refuse, on rank 0, an address at which the others would not find it.

    Raises:
        ConfigError: naming the address and this node.
    """
    way_out = (
        "MASTER_ADDR must be a name of rank 0's node; the suffix of the high-speed network is "
        "LARGEBATCH_HSN_SUFFIX, or cluster.hsn_suffix of largebatch submit"
    )
    try:
        found = socket.getaddrinfo(addr, None, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"the master address {addr} does not resolve on {socket.gethostname()} "
            f"({error.strerror}): {way_out}"
        ) from error
    for family, kind, protocol, _, address in found:
        with socket.socket(family, kind, protocol) as probe:
            try:
                probe.bind((address[0], 0))
            except OSError:
                continue
            return
    raise ConfigError(f"the master address {addr} is not of {socket.gethostname()}: {way_out}")


# Below those that systems hand out for outgoing connections (32768 and up on Linux).
_PORTS: Final = range(20_000, 32_768)


def free_port() -> int:
    """A TCP port that is free, and that no outgoing connection is given before the store takes it,
    which may be seconds later: MPI opens some meanwhile.
    """
    # Not the generator that a user may have seeded: all runs would try the same ports.
    for port in (*random.SystemRandom().sample(_PORTS, 100), 0):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found: int = probe.getsockname()[1]
            return found
    raise OSError("no TCP port is free")
