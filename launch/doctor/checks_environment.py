"""Environment variables that contradict one another, or are known to hurt."""

from collections.abc import Iterator, Mapping
from typing import Final

from largebatch.launch.doctor.findings import Finding, error, warning
from largebatch.launch.doctor.host import HostFacts

# A world from which start-up limits begin to tell.
_LARGE_WORLD: Final = 1000


def check(facts: HostFacts) -> Iterator[Finding]:
    """What one process's environment tells."""
    environment = facts.environment
    yield from _transport(environment)
    yield from _launcher(facts)
    yield from _large(facts)
    if environment.get("CCL_BCAST") == "double_tree":
        yield warning(
            "ccl-bcast",
            "CCL_BCAST=double_tree",
            "this broadcast failed under DistributedDataParallel on Aurora (closed 2025-10-13); "
            "ALCF's extended set still names it",
            "unset CCL_BCAST unless a full preflight passes with it",
        )
    monitor = environment.get("FI_MR_CACHE_MONITOR")
    if monitor not in (None, "userfaultfd", "disabled"):
        yield warning(
            "fi-monitor",
            f"FI_MR_CACHE_MONITOR={monitor}",
            "neither of the two documented values; a memory-registration cache that misses a free "
            "sends stale memory, which shows as wrong values",
            "set it to userfaultfd (ALCF's minimal set) or disabled",
        )
    mask = environment.get("ZE_AFFINITY_MASK")
    if mask is not None and hierarchy(environment) == "FLAT":
        yield warning(
            "ze-mask",
            f"ZE_AFFINITY_MASK={mask} while ZE_FLAT_DEVICE_HIERARCHY is FLAT",
            "the mask renumbers the tiles under every rank, so a rank's local number is no longer "
            "its tile; frameworks on Aurora choose with torch.xpu.set_device(local_rank)",
            "unset ZE_AFFINITY_MASK, and do not use gpu_tile_compact.sh or --gpu-bind",
        )


def hierarchy(environment: Mapping[str, str]) -> str:
    """How Level Zero counts devices: FLAT (tiles) by default."""
    return environment.get("ZE_FLAT_DEVICE_HIERARCHY", "FLAT").upper()


def _transport(environment: Mapping[str, str]) -> Iterator[Finding]:
    if environment.get("CCL_ATL_TRANSPORT") == "ofi":
        for name, value in sorted(environment.items()):
            if name.startswith("CCL_ALLREDUCE") and "direct" in value:
                yield error(
                    "ccl-direct-on-ofi",
                    f"{name}={value} with CCL_ATL_TRANSPORT=ofi",
                    "`direct` is MPI_Iallreduce and exists on the mpi transport only",
                    "set CCL_ATL_TRANSPORT=mpi, or name another algorithm (rabenseifner, ring)",
                )
        if environment.get("CCL_KVS_MODE") == "mpi":
            yield error(
                "ccl-kvs-on-ofi",
                "CCL_KVS_MODE=mpi with CCL_ATL_TRANSPORT=ofi",
                "oneCCL exchanges addresses over MPI only where it also sends over MPI",
                "set CCL_ATL_TRANSPORT=mpi, or unset CCL_KVS_MODE",
            )
    scaleout = environment.get("CCL_ALLREDUCE_SCALEOUT", "")
    if "2d" in [rule.split(":")[0] for rule in scaleout.split(";")]:
        yield error(
            "ccl-2d-scaleout",
            f"CCL_ALLREDUCE_SCALEOUT={scaleout}",
            "2d is hierarchical itself and cannot be the part between nodes of topo",
            "name ring, rabenseifner or direct",
        )


def _launcher(facts: HostFacts) -> Iterator[Finding]:
    environment = facts.environment
    launcher = environment.get("CCL_PROCESS_LAUNCHER")
    if launcher == "none" and not {"CCL_LOCAL_RANK", "CCL_LOCAL_SIZE"} <= environment.keys():
        yield error(
            "ccl-launcher",
            "CCL_PROCESS_LAUNCHER=none without CCL_LOCAL_RANK and CCL_LOCAL_SIZE",
            "oneCCL does not know which ranks share a node, and stops",
            "set both for each rank, or CCL_PROCESS_LAUNCHER=pmix under mpiexec --pmi=pmix",
        )
    elif launcher in (None, "hydra") and "PALS_RANKID" in environment and facts.expects_tiles:
        yield warning(
            "ccl-launcher",
            f"CCL_PROCESS_LAUNCHER={launcher or '(unset, which means hydra)'} under PALS",
            "oneCCL looks for the ranks of a node with another launcher's variables",
            "export CCL_PROCESS_LAUNCHER=pmix (ALCF's minimal set)",
        )


def _large(facts: HostFacts) -> Iterator[Finding]:
    environment = facts.environment
    if facts.size >= _LARGE_WORLD and environment.get("USE_LIBUV") == "0":
        yield warning(
            "libuv-off",
            f"USE_LIBUV=0 with {facts.size:,} ranks",
            "the older store needed over 30 minutes and timed out at 96,000 ranks, where libuv's "
            "took 100 s (PyTorch's tutorial on the TCPStore backend)",
            "unset USE_LIBUV",
        )
    timeout = environment.get("CCL_KVS_CONNECTION_TIMEOUT", "120")
    if facts.size >= _LARGE_WORLD and facts.expects_tiles and _below(timeout, 600):
        yield warning(
            "ccl-kvs-timeout",
            f"CCL_KVS_CONNECTION_TIMEOUT is {timeout} s with {facts.size:,} ranks",
            "oneCCL gives up while ranks are still starting",
            "export CCL_KVS_CONNECTION_TIMEOUT=600 (ALCF's extended set)",
        )


def _below(text: str, bound: int) -> bool:
    try:
        return float(text) < bound
    except ValueError:
        return True
