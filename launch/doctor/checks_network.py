"""Rank 0's address as the others will dial it."""

from collections.abc import Iterator
from typing import Final

from largebatch.launch.doctor.findings import Finding, error, warning
from largebatch.launch.doctor.host import HostFacts

_SLOW_START_SECONDS: Final = 30.0


def check(facts: HostFacts) -> Iterator[Finding]:
    """What rank 0 of several tells of its address."""
    if facts.size == 1 or facts.rank != 0:
        return
    if not facts.master_resolves:
        yield error(
            "master-unknown",
            f"the name {facts.master!r} has no address",
            "no rank can reach rank 0",
            "set MASTER_ADDR to a name of rank 0's node that all nodes know (Aurora: "
            "<node>.hsn.cm.aurora.alcf.anl.gov)",
        )
    else:
        yield from _interface(facts)
    if not facts.master_port_free:
        yield error(
            "port-taken",
            f"port {facts.master_port} of rank 0's node is taken",
            "rank 0 cannot listen there (EADDRINUSE); the others would talk to a stranger",
            "set MASTER_PORT to another, or end what holds it: often a run that was left over",
            (facts.node,),
        )
    start = facts.size * facts.reverse_seconds
    if start > _SLOW_START_SECONDS:
        yield warning(
            "lookup-slow",
            f"asking for the name of {facts.master_resolves[0]} takes "
            f"{facts.reverse_seconds * 1e3:,.0f} ms on rank 0's node",
            f"torch's store asks so for each of {facts.size:,} ranks that connect, one after the "
            f"other: the start takes {start:,.0f} s at least, and may time out",
            "have the nodes' addresses in /etc/hosts or in a name server that answers, or raise "
            "the time-out of the start",
        )


def _interface(facts: HostFacts) -> Iterator[Finding]:
    holds = [name for name, held in facts.addresses.items() if held in facts.master_resolves]
    fast = sorted(name for name in facts.addresses if name.startswith("hsn"))
    address = f"MASTER_ADDR={facts.master} ({', '.join(facts.master_resolves)})"
    one_node = facts.size == facts.local_size
    if all(address.startswith("127.") for address in facts.master_resolves):
        if not one_node:
            yield error(
                "master-loopback",
                f"{address} is each node's own loopback",
                "ranks of other nodes call themselves, and wait until they time out",
                "set MASTER_ADDR to rank 0's name on the high-speed network",
            )
    elif not facts.master_is_here:
        yield error(
            "master-elsewhere",
            f"{address} is no address of rank 0's node {facts.node}",
            "rank 0 listens where nobody calls",
            "set MASTER_ADDR to the node of rank 0, which is the hostfile's first",
        )
    elif fast and holds and not one_node and not any(name.startswith("hsn") for name in holds):
        yield warning(
            "master-slow-network",
            f"{address} is on {', '.join(holds)}, and there is {', '.join(fast)}",
            "all ranks meet over the management network: slow at many nodes, and it may be closed",
            "set MASTER_ADDR to <node>.hsn.cm.aurora.alcf.anl.gov (the suffix differs by machine)",
        )
