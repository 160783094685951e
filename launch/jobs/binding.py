"""Which cores each rank of a node gets, and the proof that nobody else uses them.

A rank shares its node with others that want cores: the operating system, oneCCL's worker threads,
Copper, DAOS. Two of them on one core slow every step of every rank, and nothing says so. Here each
gets its own, computed from the node's topology (conf/cluster/*.yaml), and a list that overlaps is
refused by the cores that two have.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from largebatch.common.errors import ConfigError
from largebatch.common.text import spell_cores
from largebatch.conf.cluster_config import DomainConfig, NodeConfig


@dataclass(frozen=True)
class Binding:
    """`ranks[i]` are the cores of local rank i; `workers[i]` that of its oneCCL worker, if ours to
    choose; `owners` everybody's by name.
    """

    ranks: tuple[tuple[int, ...], ...]
    workers: tuple[int, ...]
    owners: Mapping[str, tuple[int, ...]]

    @property
    def cores_per_rank(self) -> int:
        return min(map(len, self.ranks))


def bind(
    node: NodeConfig, *, oneccl: bool = False, copper: bool = False, daos: bool = False
) -> Binding | None:
    """The cores of a node shared out among its ranks and who runs beside them; None where its
    topology is not given. ConfigError for cores that two would have, the node has not, or too few.
    """
    if not node.domains:
        return None
    domains = [parse_cores(domain.cores) for domain in node.domains]
    homes = _homes(node.domains, node.ranks)
    helpers = _helpers(node, homes, domains, oneccl, copper, daos)
    if node.bind is None:
        taken = {core for cores in helpers.values() for core in cores}
        ranks = _shared_out(node, homes, domains, taken)
    else:
        ranks = _given(node)
    owners = {f"rank {rank}": cores for rank, cores in enumerate(ranks)} | helpers
    prove_disjoint(owners, [core for cores in domains for core in cores])
    workers = helpers.get(WORKERS, ()) if node.ccl_workers is not None else ()
    return Binding(ranks, workers, owners)


WORKERS = "oneCCL's workers"


def _homes(domains: Sequence[DomainConfig], ranks: int) -> list[int]:
    """The domain of each local rank: that of its device, which is the one of its number."""
    devices = {device: home for home, domain in enumerate(domains) for device in domain.devices}
    if not devices:
        return [rank * len(domains) // ranks for rank in range(ranks)]
    if ranks > len(devices):
        raise ConfigError(
            f"cluster.node.ranks must be at most {len(devices)}, a device each, got {ranks}"
        )
    return [devices[rank] for rank in range(ranks)]


def _helpers(
    node: NodeConfig,
    homes: Sequence[int],
    domains: Sequence[Sequence[int]],
    oneccl: bool,
    copper: bool,
    daos: bool,
) -> dict[str, tuple[int, ...]]:
    """The cores of everybody but the ranks."""
    helpers = {"the operating system": parse_cores(node.reserved)}
    if oneccl and node.ccl_workers is not None:
        helpers[WORKERS] = _workers(parse_cores(node.ccl_workers), homes, domains)
    elif oneccl:
        helpers["oneCCL's own choice"] = parse_cores(node.ccl_choice)
    if copper:
        helpers["Copper"] = parse_cores(node.copper)
    if daos:
        helpers["DAOS"] = parse_cores(node.daos)
    return {name: cores for name, cores in helpers.items() if cores}


def _workers(
    cores: Sequence[int], homes: Sequence[int], domains: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """A core for the worker of each rank, in the rank's domain."""
    left = [[core for core in cores if core in domain] for domain in domains]
    workers = []
    for rank, home in enumerate(homes):
        if not left[home]:
            raise ConfigError(
                f"cluster.node.ccl_workers={spell_cores(cores)} has no core for the oneCCL worker "
                f"of rank {rank} near its device (cores {spell_cores(domains[home])}): name "
                f"{homes.count(home)} there, or null to let oneCCL choose"
            )
        workers.append(left[home].pop(0))
    return tuple(workers)


def _shared_out(
    node: NodeConfig,
    homes: Sequence[int],
    domains: Sequence[Sequence[int]],
    taken: set[int],
) -> tuple[tuple[int, ...], ...]:
    """Cores for each rank from those of its domain that nobody has taken."""
    allowed = set(parse_cores(node.rank_cores)) if node.rank_cores else None
    free = [
        [core for core in cores if core not in taken and (allowed is None or core in allowed)]
        for cores in domains
    ]
    each = min(len(free[home]) // homes.count(home) for home in set(homes))
    wanted = each if node.cores_per_rank is None else node.cores_per_rank
    if wanted > each or each == 0:
        fullest = min(set(homes), key=lambda home: len(free[home]) // homes.count(home))
        raise ConfigError(
            f"cluster.node.cores_per_rank must be at most {each} for "
            f"{homes.count(fullest)} ranks on cores {spell_cores(free[fullest])}, which the "
            f"system and the helpers leave them, got {wanted}"
        )
    ranks = []
    for rank, home in enumerate(homes):
        place = homes[:rank].count(home) * wanted
        ranks.append(tuple(free[home][place : place + wanted]))
    return tuple(ranks)


def _given(node: NodeConfig) -> tuple[tuple[int, ...], ...]:
    assert node.bind is not None
    ranks = tuple(parse_cores(cores) for cores in node.bind.removeprefix("list:").split(":"))
    if len(ranks) != node.ranks:
        raise ConfigError(
            f"cluster.node.bind must have a list of cores for each of {node.ranks} ranks, "
            f"separated by colons, got {len(ranks)}"
        )
    return ranks


def prove_disjoint(owners: Mapping[str, Sequence[int]], cores: Iterable[int]) -> None:
    """Refuse a core that is not the node's, or that two of its owners have."""
    node, has = set(cores), dict[int, str]()
    shared: dict[tuple[str, str], list[int]] = {}
    for owner, theirs in owners.items():
        strange = sorted(set(theirs) - node)
        if strange:
            raise ConfigError(
                f"{owner} has core {spell_cores(strange)}, and the node has {spell_cores(node)}"
            )
        for core in theirs:
            if core in has:
                shared.setdefault((has[core], owner), []).append(core)
            has[core] = owner
    if shared:
        clashes = "; ".join(
            f"{one} and {other} both have core {spell_cores(both)}"
            for (one, other), both in shared.items()
        )
        raise ConfigError(f"{clashes}: change cluster.node so that each has its own")


def parse_cores(text: str) -> tuple[int, ...]:
    """`0,52` or `42-47,94-99` as numbers, in their order; ConfigError for anything else."""
    cores: list[int] = []
    for part in str(text).split(",") if str(text) else []:
        found = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if first > last:
            raise ConfigError(f"cores are written as 0,52 or 42-47,94-99, got {text!r}")
        cores.extend(range(first, last + 1))
    return tuple(cores)


def pals_list(binding: Binding) -> str:
    """As PALS's mpiexec takes it: --cpu-bind list:4-7:8-11:…"""
    return "list:" + ":".join(map(spell_cores, binding.ranks))


def slurm_mask(binding: Binding) -> str:
    """As srun takes it: --cpu-bind=mask_cpu:0xf0,0xf00,…"""
    return "mask_cpu:" + ",".join(hex(sum(1 << core for core in cores)) for cores in binding.ranks)
