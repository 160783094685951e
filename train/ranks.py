"""Which launcher started this process, its rank and device, and the process group. Imports no loop.

A run on several ranks is started in one of three ways: torchrun, an MPI launcher (mpiexec), or
`engine.nproc`, where rank 0 starts the others itself and hands them torchrun's variables.
"""

import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store

# Launchers that MPI can be asked about: their own variables name a rank, not all of them a size.
_MPI_MARKERS: Final = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "PALS_RANKID")


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


@cache
def find_ranks() -> Ranks:
    """This process's ranks, found once: asking MPI is a collective call."""
    return ranks_from(os.environ)


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """From torchrun's variables where they are, else from MPI where its launcher left a mark.

    Raises:
        RuntimeError: an MPI launcher without mpi4py, or with an mpi4py that sees a world of 1 while
            the launcher says otherwise.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return Ranks(
            launcher=environment.get("LARGEBATCH_LAUNCHER", "torchrun"),
            rank=int(environment["RANK"]),
            size=int(environment["WORLD_SIZE"]),
            local_rank=int(environment.get("LOCAL_RANK", environment["RANK"])),
            local_size=int(environment.get("LOCAL_WORLD_SIZE", environment["WORLD_SIZE"])),
            master_addr=environment.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(environment.get("MASTER_PORT", "0")),
        )
    if any(marker in environment for marker in _MPI_MARKERS):
        return _ask_mpi(environment)
    return Ranks()


def _ask_mpi(environment: Mapping[str, str]) -> Ranks:
    try:
        from mpi4py import MPI
    except ImportError as error:
        raise RuntimeError(
            f"started by an MPI launcher, but mpi4py does not load ({error}): "
            "pip install 'largebatch[mpi]', or start with torchrun or engine.nproc"
        ) from None
    world = MPI.COMM_WORLD
    rank, size = world.Get_rank(), world.Get_size()
    said = int(environment.get("PMI_SIZE", environment.get("OMPI_COMM_WORLD_SIZE", size)))
    if said != size:
        raise RuntimeError(
            f"the launcher started {said} ranks, but mpi4py sees {size}: its MPI library is not "
            "the launcher's; install an mpi4py built for it, or start with torchrun"
        )
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    local_rank, local_size = node.Get_rank(), node.Get_size()
    one_node = local_size == size
    master = ("127.0.0.1" if one_node else socket.gethostname(), free_port()) if rank == 0 else None
    addr, port = world.bcast(master)
    return Ranks("mpi", rank, size, local_rank, local_size, addr, port)


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def started_ranks(nproc: int) -> Iterator[Ranks]:
    """This process as rank 0 of `nproc`, the others started on this node for as long as it lasts.

    They run `python -m largebatch train` and take the configuration from rank 0.
    """
    port = free_port()
    others = []
    for rank in range(1, nproc):
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(nproc),
            "LOCAL_WORLD_SIZE": str(nproc),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "LARGEBATCH_LAUNCHER": "nproc",
            "LARGEBATCH_PARENT": str(os.getpid()),
        }
        # Their standard output would interleave with rank 0's; errors still show.
        others.append(
            subprocess.Popen(
                [sys.executable, "-m", "largebatch", "train"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        )
    try:
        yield Ranks("nproc", 0, nproc, 0, nproc, "127.0.0.1", port)
        for other in others:
            other.wait(timeout=60)
    finally:
        for other in others:
            other.kill()
            other.wait()


def die_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """End this process when the one that started it is gone, SIGKILL included.

    `LARGEBATCH_PARENT` names the process id to watch; without it this does nothing. An orphan that
    trained on would write into a folder that a restarted study owns.
    """
    if "LARGEBATCH_PARENT" not in environment:
        return
    parent = int(environment["LARGEBATCH_PARENT"])
    if parent == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def pick_device(name: str | None, ranks: Ranks) -> "torch.device":
    """The device called `name`, or the accelerator where there is one, else the CPU.

    Raises:
        ValueError: a device that this torch does not have.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = name or (accelerator.type if accelerator is not None else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if accelerator is None or accelerator.type != kind:
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise ValueError(f"engine.device must be one of {here} here, got {kind!r}")
    # Before the process group: xccl and nccl bind to the current device.
    torch.accelerator.set_device_index(ranks.local_rank)
    return torch.device(kind, ranks.local_rank)


def set_threads(ranks: Ranks) -> None:
    """Share the cores among the ranks of this node, unless OMP_NUM_THREADS has decided."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and ranks.local_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_size))


def meet(ranks: Ranks) -> "Store | None":
    """The store in which all ranks meet before they know anything else; None for one rank."""
    if ranks.size == 1:
        return None
    from torch.distributed.rendezvous import rendezvous

    # torchrun's agent may keep the store itself; env:// knows.
    address = f"tcp://{ranks.master_addr}:{ranks.master_port}"
    url = "env://" if ranks.launcher == "torchrun" else address
    store: Store = next(iter(rendezvous(url, ranks.rank, ranks.size)))[0]
    return store


def tell(store: "Store | None", ranks: Ranks, value: Any) -> Any:
    """Rank 0's `value` on every rank, before there is a process group to ask."""
    if store is None:
        return value
    if ranks.is_first:
        store.set("largebatch/told", pickle.dumps(value))  # type: ignore[arg-type] # takes bytes
        return value
    return pickle.loads(store.get("largebatch/told"))


@contextmanager
def process_group(store: "Store | None", ranks: Ranks, device: "torch.device") -> Iterator[None]:
    """The default process group over all ranks: gloo, nccl or xccl by the device. None for one
    rank.
    """
    if store is None:
        yield
        return
    import torch.distributed as dist
    from torch._C._distributed_c10d import PrefixStore

    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=PrefixStore("largebatch/group", store),
        rank=ranks.rank,
        world_size=ranks.size,
        device_id=None if device.type == "cpu" else device,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
