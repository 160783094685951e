"""All checks of what has been read: pure functions from `HostFacts` to findings."""

from collections.abc import Iterable, Sequence
from typing import Any, Final

from largebatch.launch.doctor import (
    checks_binding,
    checks_devices,
    checks_environment,
    checks_machine,
    checks_network,
    checks_software,
    checks_world,
)
from largebatch.launch.doctor.findings import Finding, merged
from largebatch.launch.doctor.host import HostFacts

TOGETHER: Final = (
    "node",
    "rank",
    "size",
    "local_rank",
    "local_size",
    "expects_tiles",
    "torch",
    "versions",
    "cores",
    "num_cpus",
    "copper",
)


def of_one(facts: HostFacts) -> list[Finding]:
    """What one process tells by itself."""
    found: list[Finding] = []
    for room in (
        checks_machine,
        checks_software,
        checks_environment,
        checks_devices,
        checks_network,
    ):
        found += room.check(facts)
    return found


def together(world: Sequence[HostFacts]) -> list[Finding]:
    """What the ranks of a node show beside one another, and all ranks. Reads `TOGETHER` only."""
    found: list[Finding] = []
    for ranks in by_node(world).values():
        found += checks_devices.check_node(ranks)
        found += checks_binding.check_node(ranks)
    return [*found, *checks_world.check(world)]


def of_all(world: Sequence[HostFacts]) -> list[Finding]:
    """All of it, as one list in which nothing is said twice."""
    return merged([*(finding for facts in world for finding in of_one(facts)), *together(world)])


def by_node(world: Iterable[HostFacts]) -> dict[str, list[HostFacts]]:
    """The ranks of each node, nodes in the order of their first rank."""
    nodes: dict[str, list[HostFacts]] = {}
    for facts in world:
        nodes.setdefault(facts.node, []).append(facts)
    return nodes


def thin(facts: HostFacts) -> dict[str, Any]:
    """What `together` needs of a rank, as small as it goes: rank 0 reads 98,304 of these.

    Local rank 0 reports its node's environment; the others only what is their own.
    """
    row = {name: getattr(facts, name) for name in TOGETHER}
    row["versions"] = {name: version for name, version in facts.versions.items() if version}
    row["environment"] = {
        name: value
        for name, value in facts.environment.items()
        if facts.local_rank == 0 or name.startswith(("ZE_", "ZEX_"))
    }
    return row
