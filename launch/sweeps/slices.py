"""Trials on slices of an allocation: each on its own few nodes, by its own mpiexec or srun.

Not by Parsl's MPIExecutor: that hands out nodes itself, two at least, and has no way to leave
one out. A slice is a host file, and the trial's folder keeps the script that started it.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

from largebatch.common.errors import ConfigError
from largebatch.conf.cluster_config import ClusterConfig, SubmitConfig
from largebatch.distributed.walltime import JOB_END
from largebatch.launch.jobs.job import Job
from largebatch.launch.jobs.script import cores_lines, launcher_lines, master_lines, variables_lines
from largebatch.launch.sweeps.backend import Attempt, Backend, Ended
from largebatch.launch.sweeps.tied import tied

PROBE_SECONDS: Final = 30.0


class Slices(Backend):
    """The allocation's nodes in slices of `nodes_per_trial`; ConfigError where there are fewer."""

    def __init__(
        self, cluster: ClusterConfig, nodes: Sequence[str], nodes_per_trial: int, folder: Path
    ) -> None:
        if len(nodes) < nodes_per_trial:
            raise ConfigError(
                f"hydra.launcher.nodes_per_trial must be at most {len(nodes)}, the nodes that are "
                f"here, got {nodes_per_trial}"
            )
        if cluster.launcher == "torchrun" and set(nodes) != {_here()}:
            raise ConfigError(
                "hydra.launcher.cluster has launcher torchrun, which starts ranks on this machine "
                f"alone, and there are {', '.join(nodes[:3])}: use mpich, pals or srun"
            )
        self._cluster = replace(cluster, nodes=nodes_per_trial)
        # srun kills its tasks on SIGTERM, and hands SIGUSR2 on; an mpiexec hands SIGTERM on.
        self._stop = signal.SIGUSR2 if cluster.launcher == "srun" else signal.SIGTERM
        self._size, self._folder = nodes_per_trial, folder
        self._free, self._usable = list(nodes), set(nodes)
        self._running: dict[str, tuple[Attempt, subprocess.Popen[bytes]]] = {}

    def nodes(self) -> set[str]:
        return set(self._usable)

    def room(self, avoid: frozenset[str]) -> tuple[str, ...] | None:
        fit = [node for node in self._free if node not in avoid]
        wanted_elsewhere = self._usable - avoid
        if len(wanted_elsewhere) < self._size:  # there are too few others
            fit = sorted(self._free, key=lambda node: node in avoid)
        return tuple(fit[: self._size]) if len(fit) >= self._size else None

    def begin(self, attempt: Attempt) -> None:
        for node in attempt.nodes:
            self._free.remove(node)
        hostfile = attempt.file("nodes")
        hostfile.write_text("".join(f"{node}\n" for node in attempt.nodes), encoding="utf-8")
        script = attempt.file("sh")
        command = attempt.trial.command
        script.write_text(
            start_script(self._cluster, hostfile, shlex.join(command)), encoding="utf-8"
        )
        environment = {k: v for k, v in os.environ.items() if k != "LARGEBATCH_PARENT"}
        environment[JOB_END] = ""  # the sweep stops its trials in time
        with attempt.file("log").open("wb") as log:
            process = subprocess.Popen(
                tied(["bash", str(script)], self._stop), stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
        self._running[attempt.trial.name] = attempt, process

    def ended(self) -> list[Ended]:
        ended = []
        for name, (attempt, process) in list(self._running.items()):
            if process.poll() is not None:
                del self._running[name]
                self._give_back([node for node in attempt.nodes if node in self._usable])
                ended.append(Ended(attempt, process.returncode))
        return ended

    def _give_back(self, nodes: Sequence[str]) -> None:
        """Each into another of the next slices, so that a bad node is not always with the same."""
        for place, node in enumerate(nodes):
            self._free.insert(min(place * self._size, len(self._free)), node)

    def is_dead(self, node: str) -> bool:
        hostfile = self._folder / f"probe.{os.getpid()}.nodes"
        hostfile.write_text(f"{node}\n", encoding="utf-8")
        text = start_script(one_a_node(self._cluster, 1), hostfile, "true")
        try:
            done = subprocess.run(
                tied(["bash", "-c", text]), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, timeout=PROBE_SECONDS, start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return True
        finally:
            hostfile.unlink()
        return done.returncode != 0

    def leave_out(self, nodes: set[str]) -> None:
        self._usable -= nodes
        self._free = [node for node in self._free if node not in nodes]

    def is_spent(self) -> bool:
        return len(self._usable) < self._size and not self._running

    def stop(self) -> None:
        for _, process in self._running.values():
            process.send_signal(self._stop)

    def kill(self) -> None:
        for _, process in self._running.values():
            os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.stop()
        deadline = time.monotonic() + 5.0
        for _, process in self._running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._running.clear()


def start_script(cluster: ClusterConfig, hostfile: Path, command: str) -> str:
    """Bash that becomes the launcher of `command` (words of the shell's) on the nodes of a file."""
    job = Job(SubmitConfig(cluster, folder="."), ["train"], "", [])
    elsewhere = hostfile.read_text(encoding="utf-8").split() != [_here()]
    lines = [
        "#!/bin/bash",
        f"hostfile={shlex.quote(str(hostfile))}",
        *variables_lines(job),
        "",
        "unset MASTER_ADDR MASTER_PORT  # of the whole job, if any",
        *master_lines(job),
        *cores_lines(job),
        "",
        "launch=(",
        *(f"  {line}" for line in launcher_lines(job)),
        # MPICH's has no host file for a single node.
        *['  -f "$hostfile"'] * (cluster.launcher == "mpich" and cluster.nodes == 1 and elsewhere),
        ")",
        f"export LARGEBATCH_RANKS={cluster.num_ranks}",
        f'exec "${{launch[@]}}" {command}',
    ]
    return "\n".join(lines) + "\n"


def one_a_node(cluster: ClusterConfig, nodes: int) -> ClusterConfig:
    """The cluster with one process a node, on whichever cores."""
    node = replace(cluster.node, ranks=1, domains=[], bind=None, cores_per_rank=None)
    return replace(cluster, node=node, nodes=nodes)


def _here() -> str:
    return os.uname().nodename


def nodes_here(hostfile: str | None) -> list[str]:
    """The allocation's nodes, each once: from the file, from what PBS or Slurm says, or this
    machine alone. ConfigError for a file that is not there, or holds none.
    """
    named = hostfile or os.environ.get("LARGEBATCH_HOSTFILE") or os.environ.get("PBS_NODEFILE")
    if named is not None:
        try:
            nodes = list(dict.fromkeys(Path(named).read_text(encoding="utf-8").split()))
        except OSError as error:
            raise ConfigError(f"hydra.launcher.hostfile={named}: {error.strerror}") from error
        if not nodes:
            raise ConfigError(f"hydra.launcher.hostfile={named} names no node")
        return nodes
    if "SLURM_JOB_NODELIST" in os.environ:
        ask = ["scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()
    return [_here()]
