"""Tiles against the ranks of a node."""

from collections.abc import Iterator, Sequence

from largebatch.launch.doctor.checks_environment import hierarchy
from largebatch.launch.doctor.findings import Finding, error
from largebatch.launch.doctor.host import HostFacts


def check(facts: HostFacts) -> Iterator[Finding]:
    """ze-composite, devices-few: what one rank can tell."""
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
    """device-shared: what the ranks of one node tell together."""
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
