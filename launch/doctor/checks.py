"""All checks of what has been read: pure functions from `HostFacts` to findings."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from largebatch.launch.doctor import (
    checks_binding,
    checks_environment,
    checks_machine,
    checks_network,
    checks_software,
)
from largebatch.launch.doctor.findings import Finding, error, merged, warning
from largebatch.launch.doctor.host import HostFacts
from largebatch.launch.hosts import places

TOGETHER: Final = (
    "node", "rank", "size", "local_rank", "local_size", "expects_tiles", "torch", "versions",
    "cores", "num_cpus", "copper",
)  # fmt: skip
_OF_ONE: Final = (
    checks_machine, checks_software, checks_environment, checks_binding, checks_network,
)  # fmt: skip
_SKEW_SECONDS: Final = 1.0


def of_one(facts: HostFacts) -> list[Finding]:
    """What one process tells by itself."""
    return [finding for checks in _OF_ONE for finding in checks.check(facts)]


def together(world: Sequence[HostFacts]) -> list[Finding]:
    """What the ranks of a node show beside one another, and all ranks. Reads `TOGETHER` only."""
    found: list[Finding] = []
    for ranks in by_node(world).values():
        found += checks_binding.check_node(ranks)
    return [*found, *_of_world(world)]


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


def _of_world(world: Sequence[HostFacts]) -> Iterator[Finding]:
    """What only all ranks together show: they differ, or they are not all there."""
    for name in sorted({name for facts in world for name in facts.versions}):
        yield from _differ(world, name)
    sizes = Counter(facts.size for facts in world)
    if len(sizes) > 1:
        yield error(
            "sizes-differ",
            "ranks disagree on the size of the world: "
            + ", ".join(f"{size:,} ({count:,} ranks)" for size, count in sizes.most_common()),
            "they wait for ranks that will not come",
            "start them with one command, and unset WORLD_SIZE and RANK in the shell before it",
        )
    per_node = Counter(facts.node for facts in world)
    usual = Counter(per_node.values()).most_common(1)[0][0]
    odd = tuple(node for node, count in per_node.items() if count != usual)
    if odd:
        yield warning(
            "ranks-uneven",
            f"{places(odd)} has {per_node[odd[0]]} ranks, most nodes have {usual}",
            "collectives by node (topo) assume the same number on each",
            "-n must be nodes x --ppn; look for a hostfile that names a node twice",
            odd,
        )
    for facts in {facts.node: facts for facts in world}.values():
        if abs(facts.clock_offset_seconds) > _SKEW_SECONDS:
            yield warning(
                "clock-skew",
                f"the clock is {facts.clock_offset_seconds:+.1f} s from rank 0's",
                "heartbeats and logs of this node are misread: a watcher may take it for dead",
                "tell the site, or leave the node out",
                (facts.node,),
            )


def _differ(world: Sequence[HostFacts], name: str) -> Iterator[Finding]:
    held = Counter(facts.versions.get(name) for facts in world)
    if len(held) == 1:
        return
    usual = held.most_common(1)[0][0]
    odd = tuple(dict.fromkeys(facts.node for facts in world if facts.versions.get(name) != usual))
    others = ", ".join(str(version) for version in held if version != usual)
    yield error(
        "versions-differ",
        f"{name} is {others} where most ranks have {usual}",
        "the ranks run different programs: wrong results at best",
        "spread the environment anew (largebatch env spread), and look for a PYTHONPATH or a "
        "module that is set on some nodes only",
        odd,
    )
