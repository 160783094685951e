"""What only all ranks together show: they differ, or they are not all there."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from largebatch.launch.doctor.findings import Finding
from largebatch.launch.doctor.host import HostFacts
from largebatch.launch.hosts import places

_SKEW_SECONDS: Final = 1.0


def check(world: Sequence[HostFacts]) -> Iterator[Finding]:
    """versions-differ, sizes-differ, ranks-uneven, clock-skew."""
    for name in sorted({name for facts in world for name in facts.versions}):
        yield from _differ(world, name)
    sizes = Counter(facts.size for facts in world)
    if len(sizes) > 1:
        yield Finding(
            "sizes-differ",
            "error",
            "ranks disagree on the size of the world: "
            + ", ".join(f"{size:,} ({count:,} ranks)" for size, count in sizes.most_common()),
            "they wait for ranks that will not come",
            "start them with one command, and unset WORLD_SIZE and RANK in the shell before it",
        )
    per_node = Counter(facts.node for facts in world)
    usual = Counter(per_node.values()).most_common(1)[0][0]
    odd = tuple(node for node, count in per_node.items() if count != usual)
    if odd:
        yield Finding(
            "ranks-uneven",
            "warning",
            f"{places(odd)} has {per_node[odd[0]]} ranks, most nodes have {usual}",
            "collectives by node (topo) assume the same number on each",
            "-n must be nodes x --ppn; look for a hostfile that names a node twice",
            odd,
        )
    for facts in {facts.node: facts for facts in world}.values():
        if abs(facts.clock_offset_seconds) > _SKEW_SECONDS:
            yield Finding(
                "clock-skew",
                "warning",
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
    yield Finding(
        "versions-differ",
        "error",
        f"{name} is {others} where most ranks have {usual}",
        "the ranks run different programs: wrong results at best",
        "spread the environment anew (largebatch env spread), and look for a PYTHONPATH or a "
        "module that is set on some nodes only",
        odd,
    )
