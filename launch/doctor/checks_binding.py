"""Which tiles and cores the ranks of a node have, beside one another and oneCCL's workers.

An Aurora node has cores 0-51 and 52-103, and their hyperthreads 104 higher. The system keeps 0 and
52; Copper, where it is started, 48-51; oneCCL's workers by default the last 12 of each socket.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from largebatch.common.text import spell_cores
from largebatch.launch.doctor.checks_environment import hierarchy
from largebatch.launch.doctor.findings import Finding, error, warning
from largebatch.launch.doctor.host import HostFacts

_AURORA_CPUS: Final = 208
_CORES: Final = 104
_SOCKET: Final = 52
_RESERVED: Final = frozenset({0, 52})
_COPPER: Final = frozenset(range(48, 52))
_DEFAULT_WORKERS: Final = frozenset(range(40, 52)) | frozenset(range(92, 104))
SAFE_LIST: Final = (
    "--cpu-bind list:4-7:8-11:12-15:16-19:20-23:24-27:56-59:60-63:64-67:68-71:72-75:76-79"
)
SAFE_WORKERS: Final = "CCL_WORKER_AFFINITY=42,43,44,45,46,47,94,95,96,97,98,99"


def check(facts: HostFacts) -> Iterator[Finding]:
    """What one rank tells of its tiles."""
    devices = facts.torch.get("devices", 0)
    if not facts.torch.get("xpu"):
        return
    if hierarchy(facts.environment) == "COMPOSITE" and facts.local_size > devices:
        yield error(
            "ze-composite",
            f"ZE_FLAT_DEVICE_HIERARCHY=COMPOSITE shows {devices} devices to {facts.local_size} "
            "ranks of a node",
            "each device is a whole GPU of two tiles: ranks with a higher number have none",
            "export ZE_FLAT_DEVICE_HIERARCHY=FLAT (one device a tile, 12 on Aurora), or start "
            f"{devices} ranks a node",
        )
    elif facts.local_size > devices and "ZEX_NUMBER_OF_CCS" not in facts.environment:
        mask = facts.environment.get("ZE_AFFINITY_MASK")
        yield error(
            "devices-few",
            f"{facts.local_size} ranks on this node, {devices} tiles to be seen"
            + (f" (ZE_AFFINITY_MASK={mask})" if mask else ""),
            "torch.xpu.set_device(local_rank) fails on the ranks with a higher number",
            f"start {devices} ranks a node (--ppn {devices}); unset ZE_AFFINITY_MASK; leave the "
            "node out if others show more",
            (facts.node,),
        )


def check_node(ranks: Sequence[HostFacts]) -> Iterator[Finding]:
    """What the ranks of one node tell together."""
    yield from _tiles(ranks)
    node = ranks[0].node
    cores = {facts.rank: physical(facts) for facts in ranks if facts.cores}
    if len(cores) > 1 and all(len(held) == _all(ranks[0]) for held in cores.values()):
        if ranks[0].expects_tiles:
            yield warning(
                "cores-unbound",
                f"every rank of a node may run on all {_all(ranks[0])} cores",
                "the ranks, their dataloaders and oneCCL's workers move about and displace one "
                "another",
                f"mpiexec {SAFE_LIST}, with {SAFE_WORKERS}",
            )
        return
    yield from _overlap(cores, node)
    if ranks[0].num_cpus == _AURORA_CPUS:
        yield from _aurora(ranks, cores)


def physical(facts: HostFacts) -> frozenset[int]:
    """The cores under the logical CPUs of a rank: a hyperthread is its core."""
    if facts.num_cpus != _AURORA_CPUS:
        return frozenset(facts.cores)
    return frozenset(cpu % _CORES for cpu in facts.cores)


def _all(facts: HostFacts) -> int:
    return _CORES if facts.num_cpus == _AURORA_CPUS else facts.num_cpus


def _overlap(cores: dict[int, frozenset[int]], node: str) -> Iterator[Finding]:
    owner: dict[int, int] = {}
    for rank, held in cores.items():
        shared = sorted(core for core in held if core in owner)
        if shared:
            yield warning(
                "cores-overlap",
                f"ranks {owner[shared[0]]} and {rank} share the cores {spell_cores(shared)}",
                "they take turns on them, and all ranks wait for these two at every collective",
                f"give each rank its own cores: mpiexec {SAFE_LIST}",
                (node,),
            )
            return  # the first names the mistake; the others follow from it
        owner |= dict.fromkeys(held, rank)


def _aurora(ranks: Sequence[HostFacts], cores: dict[int, frozenset[int]]) -> Iterator[Finding]:
    taken = frozenset[int]().union(*cores.values())
    if taken & _RESERVED:
        yield warning(
            "cores-reserved",
            f"ranks run on the cores {spell_cores(taken & _RESERVED)}",
            "the system keeps 0 and 52 for itself since March 2025: a rank there is late",
            f"mpiexec {SAFE_LIST}",
        )
    for rank, held in cores.items():
        if min(held) < _SOCKET <= max(held):
            yield warning(
                "cores-two-sockets",
                f"rank {rank} has cores of both sockets ({spell_cores(held)})",
                "half of its memory is the other socket's; --cpu-bind depth with --depth=8 does "
                "this to rank 6",
                f"mpiexec {SAFE_LIST}",
            )
            break
    workers = worker_cores(ranks[0])
    if taken & workers:
        given = ranks[0].environment.get("CCL_WORKER_AFFINITY", "unset: the last 12 of each socket")
        yield warning(
            "cores-ccl",
            f"ranks and oneCCL's workers share the cores {spell_cores(taken & workers)} "
            f"(CCL_WORKER_AFFINITY is {given})",
            "a rank that computes holds up the worker that would move its gradients",
            f"mpiexec {SAFE_LIST}, with {SAFE_WORKERS}",
        )
    busy = (taken | workers if "CCL_WORKER_AFFINITY" in ranks[0].environment else taken) & _COPPER
    if ranks[0].copper and busy:
        yield warning(
            "cores-copper",
            f"Copper is mounted, and the cores {spell_cores(busy)} that it runs on have other work",
            "imports through Copper are slow, and so is the rank or worker beside it",
            f"leave 48-51 free: mpiexec {SAFE_LIST}, with {SAFE_WORKERS}",
        )


def worker_cores(facts: HostFacts) -> frozenset[int]:
    """Where oneCCL's workers of this node run; none where nothing asks for tiles."""
    if not facts.expects_tiles:
        return frozenset()
    workers = facts.environment.get("CCL_WORKER_AFFINITY", "auto")
    if workers == "auto":
        return _DEFAULT_WORKERS
    return frozenset(cpu % _CORES for cpu in cpu_list(workers))


def cpu_list(text: str) -> list[int]:
    """The numbers in a list such as 1,4-7; parts that are none are passed by."""
    found: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and (last or first).isdigit():
            found += range(int(first), int(last or first) + 1)
    return found


def _tiles(ranks: Sequence[HostFacts]) -> Iterator[Finding]:
    if any("ZEX_NUMBER_OF_CCS" in facts.environment for facts in ranks):
        return  # several ranks a tile are meant
    users: dict[str, list[int]] = {}
    for facts in ranks:
        if facts.torch.get("xpu"):
            users.setdefault(tile(facts), []).append(facts.rank)
    for name, sharing in users.items():
        if len(sharing) > 1:
            yield error(
                "device-shared",
                f"ranks {', '.join(map(str, sharing))} are all on tile {name}",
                "they share its memory and time, and a collective over them may not start",
                "give each rank its own: unset ZE_AFFINITY_MASK under FLAT, and check that local "
                "ranks count from 0 on every node",
                (ranks[0].node,),
            )


def tile(facts: HostFacts) -> str:
    """The tile that this rank will take, by its number among all of the node."""
    shown = [part for part in facts.environment.get("ZE_AFFINITY_MASK", "").split(",") if part]
    # A mask of one tile for each rank: torch counts what it shows, from 0.
    index = facts.local_rank if facts.torch.get("devices", 0) > facts.local_rank else 0
    return shown[index] if index < len(shown) else str(index)
