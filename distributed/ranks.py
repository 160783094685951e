"""The ranks of this run: starting them, ending them, their device and their process group. Imports
no loop.

A run on several ranks is started by a launcher (distributed/launchers.py: which, and who this
process is among all), or by `engine.nproc`, where rank 0 starts the others itself and hands them
torchrun's variables.
"""

import importlib
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from typing import TYPE_CHECKING, Final
from weakref import WeakValueDictionary

from largebatch.common.errors import ConfigError
from largebatch.common.text import first_line
from largebatch.distributed.addresses import answered, listen
from largebatch.distributed.addresses import free_port as free_port
from largebatch.distributed.launchers import Ranks as Ranks
from largebatch.distributed.launchers import launcher_of, ranks_from, said_size, whole

if TYPE_CHECKING:
    import torch
    from torch._C._distributed_c10d import Store, TCPStore

# With one of these a launcher shows a rank some of its node's devices.
_MASKS: Final = ("ZE_AFFINITY_MASK", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")

# Open files of a rank beside its sockets to the others: libraries, data, logs.
_OTHER_FILES: Final = 256


@cache
def find_ranks() -> Ranks:
    """This process's ranks, found once: asking MPI is a collective call."""
    return ranks_from(os.environ)


@contextmanager
def started_ranks(
    nproc: int, died: Callable[[int, str], None] = lambda rank, how: None
) -> Iterator[Ranks]:
    """This process as rank 0 of `nproc`, the others started on this node for as long as it lasts.

    They run `python -m largebatch train` and take the configuration from rank 0.

    Args:
        died: takes the rank of one that has ended with another code than 0, and how; called in a
            thread of its own, once for each.
    """
    listener = listen("127.0.0.1", 0, one_node=True)
    port = listener.getsockname()[1]
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
            # What this process can import, they can, wherever hydra.job.chdir has led it.
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        environment.pop("LARGEBATCH_RANKS", None)
        # Their standard output would interleave with rank 0's; errors still show.
        others.append(
            subprocess.Popen(
                [sys.executable, "-m", "largebatch", "train"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        )
    ended = threading.Event()

    def look() -> None:
        living = dict(enumerate(others, start=1))
        while living and not ended.wait(0.1):
            for rank in [rank for rank, process in living.items() if process.poll() is not None]:
                code = living.pop(rank).returncode
                if code != 0 and not ended.is_set():
                    died(rank, how_it_ended(code))

    watcher = threading.Thread(target=look, name="started-ranks", daemon=True)
    watcher.start()
    try:
        yield Ranks("nproc", 0, nproc, 0, nproc, "127.0.0.1", port, listener)
        for other in others:
            other.wait(timeout=60)
    finally:
        ended.set()
        for other in others:
            other.kill()
            other.wait()
        watcher.join()
        listener.close()


def how_it_ended(code: int) -> str:
    """In words, from what `Popen.returncode` says."""
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "a signal without a name"
    memory = ", as the system does when memory runs out" * (-code == signal.SIGKILL)
    return f"was killed by signal {-code} ({name}){memory}"


def die_with_parent(environment: Mapping[str, str] = os.environ) -> None:
    """End this process when the one that started it is gone, SIGKILL included.

    That is the process that `LARGEBATCH_PARENT` names, and for a rank of several the one above it:
    torchrun's agent, mpiexec's proxy, Slurm's step daemon. An orphan that trained on would hold its
    device, and write into a folder that a restarted run owns. One rank alone is nobody's: variables
    of a launcher that are left over in a shell must not end a run with that shell.
    """
    parent = _parent(environment)
    if parent is None or parent == os.getpid():
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def _parent(environment: Mapping[str, str]) -> int | None:
    launcher, above = launcher_of(environment), os.getppid()
    named = environment.get("LARGEBATCH_PARENT")
    if launcher in ("none", "nproc") or named == str(above):
        return None if named is None else int(named)
    # LARGEBATCH_PARENT, if any, is that of the launcher.
    size = whole(environment, "WORLD_SIZE") if launcher == "torchrun" else said_size(environment)
    return None if size == 1 else above


def pick_device(name: str | None, ranks: Ranks, ipex: bool = False) -> "torch.device":
    """The device called `name`, or the accelerator where there is one, else the CPU; made current.

    Args:
        ipex: import Intel Extension for PyTorch first, from a module that has it: torch does
            without since 2.8, but some models may be slower then (ALCF, PyTorch page, 2026-08).

    Raises:
        ValueError: a device that this torch does not have, or more ranks on this node than devices.
        ConfigError: `ipex` where it does not load.
    """
    if ipex:
        _load_ipex()
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = name or (accelerator.type if accelerator is not None else "cpu")
    if kind == "cpu":
        return torch.device("cpu")
    if accelerator is None or accelerator.type != kind:
        here = "cpu" if accelerator is None else f"cpu, {accelerator.type}"
        raise ValueError(f"engine.device must be one of {here} here, got {kind!r}")
    count, index = torch.accelerator.device_count(), ranks.local_rank
    if count == 1 and any(mask in os.environ for mask in _MASKS):
        index = 0  # the launcher shows each rank its own alone
    if index >= count:
        raise ValueError(
            f"local rank {ranks.local_rank} has no {kind} device of its own: this node shows "
            f"{count}; start no more ranks a node than that, or use engine.device=cpu (on Aurora "
            "each tile is one with ZE_FLAT_DEVICE_HIERARCHY=FLAT and no ZE_AFFINITY_MASK)"
        )
    # Before the process group: xccl and nccl bind to the current device.
    torch.accelerator.set_device_index(index)
    return torch.device(kind, index)


def _load_ipex() -> None:
    try:
        importlib.import_module("intel_extension_for_pytorch")
    except ImportError as error:
        raise ConfigError(
            f"engine.ipex=true, but intel_extension_for_pytorch does not load ({error}): leave it "
            "at false, as torch does without it, or load a module that has it"
        ) from error


def set_threads(ranks: Ranks) -> None:
    """Share the cores among the ranks of this node, unless OMP_NUM_THREADS has decided."""
    import torch

    if "OMP_NUM_THREADS" not in os.environ and ranks.local_size > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks.local_size))


_servers: "WeakValueDictionary[tuple[str, int], TCPStore]" = WeakValueDictionary()
"""Of this process, by address: what meets again in it (a preflight, then the run) shares one."""

_lasting: "dict[tuple[str, int], TCPStore]" = {}
"""By address, where ranks meet more than once: a rank may come to the next meeting before rank 0
does, and the server has to outlast the one before."""

MEETING: Final = timedelta(minutes=30)
"""How long ranks wait for one another before there is a run."""


def meet(ranks: Ranks, timeout: timedelta = MEETING, name: str = "") -> "Store | None":
    """The store in which all ranks meet before they know anything else; None for one rank. Rank 0
    does not wait for the others here.

    Args:
        name: of this meeting, where the ranks meet more than once.

    Raises:
        ConfigError: rank 0's address is not of its node, its port is taken, there is no rank 0 in
            time, or this process may not open as many files as it needs sockets.
    """
    if ranks.size == 1:
        return None
    from torch._C._distributed_c10d import PrefixStore
    from torch.distributed import DistError

    if lacking := allow_sockets(ranks.size):
        raise ConfigError(lacking)
    try:
        store = open_store(ranks, timeout)
    except DistError as error:
        raise ConfigError(
            f"rank {ranks.rank} finds no rank 0 at {ranks.master_addr}:{ranks.master_port} "
            f"({first_line(error)})"
        ) from error
    # torchrun's agent keeps one store through all restarts, with the words of those that failed.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if name:
        _lasting.setdefault((ranks.master_addr, ranks.master_port), store)
    return PrefixStore(f"largebatch/attempt-{attempt}{name and f'/{name}'}", store)


def open_store(ranks: Ranks, timeout: timedelta) -> "TCPStore":
    """A store on rank 0's node that listens at the master address alone, or that of torchrun's
    agent, which listens at every address.

    Raises:
        ConfigError: on rank 0, the address is not of its node or the port is taken.
        DistError: no store there before the time is over.
    """
    from torch._C._distributed_c10d import TCPStore

    address = ranks.master_addr, ranks.master_port
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = ranks.is_first and not (agent and ranks.launcher == "torchrun")
    if not serves or address in _servers:
        join = partial(TCPStore, *address, timeout=timeout, wait_for_workers=False)
        # Where MPI or rank 0 itself hands the port out, it listens long before it serves.
        early = ranks.launcher == "nproc" or "mpi4py.MPI" in sys.modules
        return join() if early else answered(join, address)
    listener = ranks.listener
    if listener is None or listener.fileno() < 0:
        listener = listen(*address, ranks.on_one_node)
    server = TCPStore(
        *address,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    _servers[address] = server
    return server


def allow_sockets(size: int) -> str | None:
    """Let this process open the files that `size` ranks need, or as many as it may: rank 0 keeps
    the store, to which each connects twice, gloo is a full mesh. What a job's script asked of the
    system need not have reached its ranks. Returns what is lacking, and the way out.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * size + _OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return None
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed == needed:
        return None
    return (
        f"{size} ranks need {needed} open files, and this process may open {hard}: "
        f"`ulimit -n {needed}` before the launcher, or `mpiexec --rlimit NOFILE`, or fewer ranks"
    )


@contextmanager
def process_group(
    store: "Store | None",
    ranks: Ranks,
    device: "torch.device",
    *,
    timeout_seconds: float | None = None,
    always: bool = False,
) -> Iterator[None]:
    """The default process group over all ranks: gloo, nccl or xccl by the device.

    Args:
        timeout_seconds: of a collective; None: torch's own. gloo and nccl keep it. xccl does not
            end a collective that hangs (no abort), so that a watcher has to.
        always: also for one rank, which needs none itself; FSDP2 and DeepSpeed ask for one.
    """
    if store is None and not always:
        yield
        return
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore, PrefixStore

    if ranks.master_addr == "127.0.0.1":
        # Gloo would listen at the address of the host's name, where others come in.
        names = [name for _, name in socket.if_nameindex()]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if "lo" in names else "lo0")
    dist.init_process_group(
        dist.get_default_backend_for_device(device),
        store=PrefixStore("group", store or HashStore()),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=None if timeout_seconds is None else timedelta(seconds=timeout_seconds),
        # A group that is bound connects at once, which keeps FSDP2 from a deadlock on xccl.
        device_id=None if device.type == "cpu" else device,
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
