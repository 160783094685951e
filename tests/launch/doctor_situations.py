"""Recorded situations, one file each in situations/, as the `Host` that every rank would see."""

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

from largebatch.distributed.ranks import Ranks
from largebatch.launch.doctor.checks_binding import cpu_list
from largebatch.launch.doctor.host import Folder, Host, HostFacts, collect

FOLDER = Path(__file__).with_name("situations")
MERGED = ("environment", "versions", "disk_of")


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read(name: str) -> dict[str, Any]:
    """The healthy situation with what `name` changes of it."""
    with (FOLDER / "healthy.toml").open("rb") as healthy:
        base = tomllib.load(healthy)
    with (FOLDER / f"{name}.toml").open("rb") as file:
        return changed(base, tomllib.load(file))


def changed(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    merged = {key: {**base.get(key, {}), **change[key]} for key in MERGED if key in change}
    return {**base, **change, **merged}


def facts_of(name: str, root: Path) -> list[HostFacts]:
    """What each rank of the situation reads, through its own `Host`."""
    situation = read(name)
    nodes, per_node = situation["nodes"], situation["per_node"]
    ranks = range(len(nodes) * per_node)
    present = situation.get("present", ranks)
    size = situation.get("size", len(present))
    return [facts_of_rank(situation, rank, size, root / f"{name}-{rank}") for rank in present]


def facts_of_rank(situation: dict[str, Any], rank: int, size: int, root: Path) -> HostFacts:
    per_node = situation["per_node"]
    node, local_rank = situation["nodes"][rank // per_node], rank % per_node
    for kind, whose in (("node", node), ("rank", str(rank))):
        situation = changed(situation, situation.get(kind, {}).get(whose, {}))
    write_proc(situation, root)
    environment = {
        key: value
        for key, value in situation["environment"].items()
        if key not in situation.get("unset", [])
    }
    alone = size == 1
    ranks = Ranks(
        "pals",
        0 if alone else rank,
        size,
        0 if alone else local_rank,
        1 if alone else per_node,
        situation["master"],
        2345,
    )

    def disk(path: Path) -> Folder:
        special = situation.get("disk_of", {}).get(str(path), {})
        found = situation["disk"] | special
        free = int(found["free_gib"] * 2**30)
        return Folder(str(path), free, exists=found["exists"], writable=found["writable"])

    host = Host(
        environment=environment,
        root=root,
        node=lambda: node,
        ranks=lambda: ranks,
        affinity=lambda: frozenset(cpu_list(situation["bind"].split(":")[local_rank])),
        num_cpus=lambda: situation["num_cpus"],
        nofile=lambda: tuple(situation["nofile"]),
        torch=lambda: situation["torch"],
        versions=lambda: situation["versions"],
        has_module=lambda name: (
            name in situation["dead"]
            or (name not in situation["missing"] and name != "oneccl_bindings_for_pytorch")
        ),
        disk=disk,
        addresses=lambda: situation["addresses"],
        resolve=lambda host: situation["resolves"],
        is_here=lambda address: situation["is_here"],
        reverse_seconds=lambda address: situation["reverse_seconds"],
        port_is_free=lambda port: situation["port_free"],
    )
    facts = collect(host, Path(situation["run_folder"]))
    return replace(facts, clock_offset_seconds=situation["clock_offset"])


def write_proc(situation: dict[str, Any], root: Path) -> None:
    """The files of /proc that are read, below a root of the situation's own."""
    files = {
        "proc/sys/net/core/somaxconn": str(situation["somaxconn"]),
        "proc/sys/net/ipv4/tcp_max_syn_backlog": str(situation["syn_backlog"]),
        "proc/mounts": "\n".join(f"none {line} rw 0 0" for line in situation["mounts"]),
    }
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n", encoding="utf-8")
