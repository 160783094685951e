"""Trials on single devices, as many a node as it has: Parsl's HighThroughputExecutor.

One worker pool a node, a worker a device; Parsl pins each worker to its device and its cores. What
Parsl has not is a way to leave a node out: `OnlyOn` is its choice of the pools that get trials.

Under ZE_FLAT_DEVICE_HIERARCHY=FLAT the devices are called 0 to 11 [inferred: Parsl's page at ALCF
has the names of the other hierarchy, 0.0 to 5.1].
"""

import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Final

import parsl
from parsl.config import Config
from parsl.executors import HighThroughputExecutor
from parsl.executors.high_throughput.errors import ManagerLost, WorkerLost
from parsl.executors.high_throughput.executor import DEFAULT_LAUNCH_CMD
from parsl.executors.high_throughput.manager_record import ManagerRecord
from parsl.executors.high_throughput.manager_selector import ManagerSelector
from parsl.launchers import SimpleLauncher, WrappedLauncher
from parsl.launchers.base import Launcher
from parsl.providers import LocalProvider

from largebatch.common.errors import ConfigError
from largebatch.common.files import write_whole
from largebatch.conf.cluster_config import ClusterConfig
from largebatch.distributed.walltime import JOB_END
from largebatch.launch.jobs.binding import bind, pals_list
from largebatch.launch.sweeps.backend import Attempt, Backend, Ended
from largebatch.launch.sweeps.settings import KEY, SweepSettings
from largebatch.launch.sweeps.slices import one_a_node, start_script
from largebatch.launch.sweeps.tied import tied

START_SECONDS: Final = 300.0
"""For the first worker pool to come up."""
END_SECONDS: Final = 20.0
PROGRAMS: Final = Path(sys.executable).parent
"""Parsl's: of this environment, which need not be active."""


OF_A_LAUNCHER: Final = (
    "LARGEBATCH_PARENT", "LARGEBATCH_RANKS", "PALS_", "PMI_", "PMIX_", "OMPI_", "MPI_",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP",
)  # fmt: skip
"""Variables of whatever started the worker pools: a trial that saw them would take itself for one
rank of all pools."""


def run_trial(command: list[str], files: str, folder: str, at: str) -> tuple[int, str]:
    """In a worker: run the trial to its end, and tell its exit code and this node.

    It stops where the sweep's folder has a file `stop`, the word for all nodes, or `kill`.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(OF_A_LAUNCHER)}
    words = {"stop": signal.SIGTERM, "kill": signal.SIGKILL}
    Path(f"{files}.nodes").write_text(f"{short(platform.node())}\n", encoding="utf-8")
    with open(f"{files}.log", "wb") as output:
        process = subprocess.Popen(
            tied(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            cwd=at, env=own | {JOB_END: ""},
        )  # fmt: skip
    while process.poll() is None:
        for word in [word for word in words if os.path.exists(f"{folder}/{word}")]:
            process.send_signal(words.pop(word))
        time.sleep(0.2)
    return process.returncode, short(platform.node())


def short(node: str) -> str:
    """A node by its first name: PBS and the node itself differ in the rest."""
    return node.partition(".")[0]


class OnlyOn(ManagerSelector):
    """Worker pools on nodes that are not named in a file; it runs in Parsl's interchange."""

    def __init__(self, file: str) -> None:
        self._file = file

    def sort_managers(
        self, ready_managers: dict[bytes, ManagerRecord], manager_list: set[bytes]
    ) -> list[bytes]:
        try:
            with open(self._file, encoding="utf-8") as file:
                avoided = set(file.read().split())
        except FileNotFoundError:
            avoided = set()
        return [
            pool for pool in manager_list if short(ready_managers[pool]["hostname"]) not in avoided
        ]


class _Here(LocalProvider):
    """Parsl's, which gives the path of its scripts to a shell as it is: a link to them will do."""

    @property
    def script_dir(self) -> str | None:
        return self._script_dir

    @script_dir.setter
    def script_dir(self, folder: str | None) -> None:
        self._script_dir = folder
        if folder is not None and not is_plain(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
            link = Path(mkdtemp(prefix="largebatch-")) / "scripts"
            link.symlink_to(folder)
            self._script_dir = str(link)


def is_plain(path: str) -> bool:
    """Say whether a shell, and Parsl, take the path for what it is without quotes."""
    return re.fullmatch(r"[\w./+:@-]+", path, re.ASCII) is not None


class Devices(Backend):
    """Every device of the allocation's nodes; ConfigError for cores that two workers would have."""

    def __init__(
        self,
        cluster: ClusterConfig | None,
        settings: SweepSettings,
        nodes: Sequence[str],
        folder: Path,
    ) -> None:
        # A sweep that was killed may have left workers: theirs is another folder, and they stop.
        earlier = sorted(path for path in (folder / "parsl").glob("[0-9]*") if path.is_dir())
        for left in earlier:
            (left / "stop").touch()
        self._folder = folder / "parsl" / f"{len(earlier):03}"
        self._folder.mkdir(parents=True)
        self._avoid_file = self._folder / "avoided_nodes"
        node = None if cluster is None else cluster.node
        self._per_node: int = settings.workers_per_node or (
            (os.cpu_count() or 1) if node is None else node.ranks
        )
        has_devices = node is not None and node.num_devices > 0
        binding = None
        if cluster is not None and cluster.node.domains:
            wanted = replace(cluster.node, ranks=self._per_node)
            binding = bind(wanted, copper=cluster.environment == "copper", daos=bool(cluster.daos))
        # Trials share a node's cores, unless the user has decided.
        cores = binding.cores_per_rank if binding else (os.cpu_count() or 1) // self._per_node
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores)))
        self._all = {short(node) for node in nodes}
        self._out: set[str] = set()
        self._lost: set[str] = set()
        self._avoided: frozenset[str] = frozenset()
        self._running: dict[str, tuple[Attempt, Future[tuple[int, str]]]] = {}
        executor = HighThroughputExecutor(
            label="devices",
            max_workers_per_node=self._per_node,
            cores_per_worker=1e-6,  # as many workers as devices, however many cores there are
            available_accelerators=[*map(str, range(self._per_node))] if has_devices else [],
            cpu_affinity="none" if binding is None else pals_list(binding),
            prefetch_capacity=0,
            heartbeat_period=max(1, settings.lost_seconds // 4),
            heartbeat_threshold=settings.lost_seconds,
            launch_cmd=_pool_command(self._folder / "000" / "devices"),
            interchange_launch_cmd=tied([str(PROGRAMS / "interchange.py")]),
            manager_selector=OnlyOn(str(self._avoid_file)),
            provider=_Here(  # type: ignore[no-untyped-call] # Parsl has no types
                nodes_per_block=len(nodes), init_blocks=1, max_blocks=1, min_blocks=1,
                launcher=self._launcher(cluster, nodes, self._folder),
            ),
        )  # fmt: skip
        self._executor = executor
        config = Config(
            executors=[executor], run_dir=str(self._folder), strategy="none", retries=0,
            initialize_logging=False, strategy_period=0.5, exit_mode="skip",
        )  # fmt: skip
        self._kernel = parsl.DataFlowKernel(config)
        self._run = parsl.python_app(run_trial, data_flow_kernel=self._kernel)
        self._wait_for_a_pool()

    @staticmethod
    def _launcher(cluster: ClusterConfig | None, nodes: Sequence[str], folder: Path) -> Launcher:
        """What starts a worker pool on every node."""
        if list(nodes) == [os.uname().nodename]:
            return SimpleLauncher()
        if cluster is None:
            raise ConfigError(
                f"{len(nodes)} nodes need an mpiexec or srun to start workers on them: name yours "
                f"with {KEY}.cluster=aurora, polaris, slurm or one of yours"
            )
        hostfile = folder / "nodes"
        hostfile.write_text("".join(f"{node}\n" for node in nodes), encoding="utf-8")
        script = folder / "pools.sh"
        text = start_script(one_a_node(cluster, len(nodes)), hostfile, '"$@"')
        script.write_text(text, encoding="utf-8")
        return WrappedLauncher(prepend=f"bash {shlex.quote(str(script))}")

    def _wait_for_a_pool(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._executor.connected_managers():
            broken = self._executor.bad_state_is_set
            if broken or time.monotonic() > deadline:
                self.close()
                raise ConfigError(
                    f"no worker pool of Parsl's came up on {len(self._all)} node(s): see "
                    f"{self._folder}/000/submit_scripts"
                )
            time.sleep(0.1)

    def nodes(self) -> set[str]:
        return self._all - self._out - self._lost

    def _num_pools(self) -> int:
        return sum(bool(pool["active"]) for pool in self._executor.connected_managers())

    def room(self, avoid: frozenset[str]) -> tuple[str, ...] | None:
        running = [attempt for attempt, _ in self._running.values()]
        for attempt in running:
            _learn_node(attempt)
        avoid |= self._out
        if avoid != self._avoided:
            # What was begun may not have arrived yet: it goes by what held then.
            if not all(attempt.nodes for attempt in running):
                return None
            write_whole(self._avoid_file, "\n".join(sorted(avoid)), durable=False)
            self._avoided = avoid
        elsewhere = sum(not avoid.intersection(attempt.nodes) for attempt in running)
        # A pool does not say which node is its own.
        usable = self._num_pools() - len(avoid & self._all - self._lost)
        return () if elsewhere < usable * self._per_node else None

    def begin(self, attempt: Attempt) -> None:
        files = str(attempt.file("log")).removesuffix(".log")
        future = self._run(list(attempt.trial.command), files, str(self._folder), os.getcwd())
        self._running[attempt.trial.name] = attempt, future

    def ended(self) -> list[Ended]:
        ended = []
        for name, (attempt, future) in list(self._running.items()):
            if not future.done():
                continue
            del self._running[name]
            error, code = future.exception(), None
            _learn_node(attempt)
            if error is None:
                code, node = future.result()
                attempt.nodes = (node,)
            elif isinstance(error, ManagerLost | WorkerLost):
                attempt.nodes = (short(error.hostname),)
                if isinstance(error, ManagerLost):
                    self._lost.update(attempt.nodes)
            ended.append(Ended(attempt, code))
        return ended

    def is_dead(self, node: str) -> bool:
        return node in self._lost

    def leave_out(self, nodes: set[str]) -> None:
        self._out |= nodes

    def is_spent(self) -> bool:
        return self._executor.bad_state_is_set or not (self.nodes() and self._num_pools())

    def stop(self) -> None:
        (self._folder / "stop").touch()

    def kill(self) -> None:
        (self._folder / "kill").touch()

    def close(self) -> None:
        self.stop()
        futures = [future for _, future in self._running.values()]
        if wait(futures, END_SECONDS).not_done:
            self.kill()
            wait(futures, 2.0)
        self._running.clear()
        self._kernel.cleanup()


def _pool_command(logs: Path) -> str:
    """Parsl's command of a worker pool, its paths quoted, which Parsl formats twice."""

    def quoted(path: Path) -> str:
        return shlex.quote(str(path)).replace("{", "{{{{").replace("}", "}}}}")

    command = DEFAULT_LAUNCH_CMD.replace("{logdir}", quoted(logs))
    command = command.replace("{cert_dir}", quoted(logs / "certificates"))
    return f"{quoted(PROGRAMS)}/{command}"


def _learn_node(attempt: Attempt) -> None:
    """Which node a trial runs on is known once a worker has taken it."""
    if not attempt.nodes:
        try:
            attempt.nodes = tuple(attempt.file("nodes").read_text(encoding="utf-8").split())
        except FileNotFoundError:
            return
