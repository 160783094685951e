"""`largebatch bench init`: what it takes many ranks to meet, as far as one machine can tell.

Three measurements, each beside a floor: connections to the store in which ranks meet, beside bare
TCP connections; process groups of real gloo ranks, beside the same ranks meeting in the store only;
and the bookkeeping of groups and meshes on one rank of up to 98,304, which torch's fake backend
shows, beside writing the ranks' numbers down.
"""

import argparse
import json
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, TCPStore

_WORKERS: Final = 2
_TILES: Final = 12
_OTHER_FILES: Final = 512
_PATIENCE: Final = timedelta(seconds=120)
Row = dict[str, Any]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; returns 0, or 2 for an option that cannot be."""
    options = _parser().parse_args(arguments)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = soft - _OTHER_FILES
    for name, numbers, highest in (
        ("--clients", options.clients, most),
        ("--ranks", options.ranks, 256),
        ("--fake", options.fake, 1_000_000),
    ):
        if not all(2 <= number <= highest for number in numbers):
            print(
                f"largebatch bench init: {name} takes 2 to {highest:,} here, got {numbers}"
                + (f" (ulimit -n is {soft:,})" if name == "--clients" else ""),
                file=sys.stderr,
            )
            return 2
    # A lookup that is not answered is given up after one second instead of 5 to 20.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")
    record: dict[str, Any] = {
        "reverse_lookup_seconds": reverse_lookups(),
        "store": [store_row(number) for number in options.clients],
        "gloo": [gloo_row(number) for number in options.ranks],
        "fake": fake_rows(options.fake),
    }
    print(tables(record))
    if options.json is not None:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def reverse_lookups(count: int = 20) -> list[float]:
    """Seconds of asking for the name of a client's address, as the store does for each client.

    Both ends do, and the store's in its only thread (seen with strace, torch 2.13).
    """
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        socket.getnameinfo(("::ffff:127.0.0.1", 1), 0)
        seconds.append(_since(started))
    return seconds


def store_row(num_clients: int) -> Row:
    """Seconds until `num_clients` have connected to one store, and until all have met in it.

    A meeting is what the start of a process group asks of the store at least: each writes its own
    key and adds to a counter, then all read a key that is written when the counter is full.
    """
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)

    def full() -> None:
        while server.add("count", 0) < num_clients:
            time.sleep(0.001)
        server.set("go", "go")

    connect, meet = _together(_connect_stores, num_clients, server.port, full)
    with socket.create_server(("127.0.0.1", 0), backlog=socket.SOMAXCONN) as listening:
        accepting = threading.Thread(target=_accept, args=(listening, num_clients), daemon=True)
        accepting.start()
        floor, _ = _together(_connect_sockets, num_clients, listening.getsockname()[1])
        accepting.join()
    return {
        "clients": num_clients,
        "connect_seconds": connect,
        "meet_seconds": meet,
        "bare_connect_seconds": floor,
    }


def _together(
    work: Callable[..., None],
    num_clients: int,
    port: int,
    meanwhile: Callable[[], None] | None = None,
) -> tuple[float, float]:
    """Let _WORKERS processes do it, from a common start; the seconds of their two parts."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["torch.distributed"])
    ends, workers = [], []
    for number in range(_WORKERS):
        own, other = context.Pipe()
        share = range(number, num_clients, _WORKERS)
        worker = context.Process(target=work, args=(other, share, port), daemon=True)
        worker.start()
        other.close()
        ends.append(own)
        workers.append(worker)
    seconds = []
    _hear(ends)  # all are there
    for part in range(2):
        started = time.perf_counter()
        for end in ends:
            end.send("go")
        if part == 1 and meanwhile is not None:
            meanwhile()
        _hear(ends)
        seconds.append(time.perf_counter() - started)
    for worker, end in zip(workers, ends, strict=True):
        worker.join()
        end.close()
    return seconds[0], seconds[1]


def _hear(ends: Sequence["Connection[Any, Any]"]) -> None:
    for end in ends:
        end.recv()


def _connect_stores(end: "Connection[Any, Any]", share: range, port: int) -> None:
    end.send("there")
    end.recv()
    stores = [
        TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
        for _ in share
    ]
    end.send("connected")
    end.recv()
    for rank, store in zip(share, stores, strict=True):
        store.set(f"rank{rank}", "here")
        store.add("count", 1)
    for store in stores:
        store.get("go")
    end.send("met")


def _connect_sockets(end: "Connection[Any, Any]", share: range, port: int) -> None:
    end.send("there")
    end.recv()
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in share]
    for one in sockets:
        one.sendall(b"x")
    end.send("connected")
    end.recv()
    for one in sockets:
        one.close()
    end.send("closed")


def _accept(listening: socket.socket, count: int) -> None:
    with ExitStack() as stack:
        accepted = [stack.enter_context(listening.accept()[0]) for _ in range(count)]
        for one in accepted:
            one.recv(1)


def gloo_row(num_ranks: int) -> Row:
    """Seconds of `init_process_group("gloo")` and a first barrier, by real ranks."""
    context = multiprocessing.get_context("forkserver")
    multiprocessing.set_forkserver_preload(["torch.distributed"])
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
    told = context.SimpleQueue()
    ranks = [
        context.Process(target=_gloo_rank, args=(rank, num_ranks, server.port, told), daemon=True)
        for rank in range(num_ranks)
    ]
    for rank in ranks:
        rank.start()
    slowest = [max(parts) for parts in zip(*(told.get() for _ in ranks), strict=True)]
    for rank in ranks:
        rank.join()
    return {
        "ranks": num_ranks,
        "group_seconds": slowest[1],
        "barrier_seconds": slowest[2],
        "store_meeting_seconds": slowest[0],
    }


def _gloo_rank(rank: int, size: int, port: int, told: Any) -> None:
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=_PATIENCE)
    _meet(store, "first", size)  # whoever starts late is not what is measured
    seconds, started = [], time.perf_counter()
    _meet(store, "floor", size)
    seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    group = PrefixStore("group", store)
    dist.init_process_group("gloo", store=group, rank=rank, world_size=size, timeout=_PATIENCE)
    seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    dist.barrier()
    seconds.append(time.perf_counter() - started)
    told.put(seconds)
    dist.barrier()
    dist.destroy_process_group()


def _meet(store: TCPStore, name: str, size: int) -> None:
    if store.add(f"{name}/count", 1) == size:
        store.set(f"{name}/go", "go")
    store.get(f"{name}/go")


def fake_rows(sizes: Sequence[int]) -> list[Row] | str:
    """What one rank of many spends on knowing about the others; why not, where torch has no fake
    backend (it is private to torch).
    """
    try:
        from torch.testing._internal.distributed.fake_pg import FakeStore
    except ImportError as error:
        return f"this torch has no fake backend ({error})"
    from torch.distributed.device_mesh import init_device_mesh

    rows = []
    for size in sizes:
        tiles = _TILES if size % _TILES == 0 else 1
        row: Row = {"ranks": size}
        started = time.perf_counter()
        dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
        row["group_seconds"] = _since(started)
        started = time.perf_counter()
        init_device_mesh("cpu", (size // tiles, tiles), mesh_dim_names=("node", "tile"))
        row["mesh_seconds"] = _since(started)
        started = time.perf_counter()
        dist.new_group(list(range(0, size, tiles)))
        row["subgroup_seconds"] = _since(started)
        dist.destroy_process_group()
        started = time.perf_counter()
        sum({rank: rank for rank in range(size)}.values())
        row["numbers_seconds"] = _since(started)
        row["microseconds_per_rank"] = 1e6 * (row["group_seconds"] + row["mesh_seconds"]) / size
        rows.append(row)
    return rows


def _since(started: float) -> float:
    return time.perf_counter() - started


def tables(record: dict[str, Any]) -> str:
    """The three tables, and below each what it does not say."""
    lines = ["One store, clients in two processes of this machine (milliseconds)"]
    lines.append(f"{'clients':>9} {'connect':>10} {'meet':>10} {'bare TCP':>10}")
    lines += [
        f"{row['clients']:>9,} {_ms(row['connect_seconds'])} "
        f"{_ms(row['meet_seconds'])} {_ms(row['bare_connect_seconds'])}"
        for row in record["store"]
    ]
    asked = record["reverse_lookup_seconds"]
    lines += [
        "In it: both ends ask for the name of the other's address, the store in its only thread.",
        f"One such lookup takes {statistics.median(asked) * 1e3:.2f} ms here, the slowest of "
        f"{len(asked)} took {max(asked) * 1e3:.0f} ms.",
        "Not in it: a network, clients of thousands of nodes that connect at one moment, and full",
        "queues of new connections (somaxconn). Two processes make all connections in turn, so it",
        "is the cost of each, not the time to expect.",
        "",
        "Process groups of real gloo ranks (milliseconds, the slowest rank)",
        f"{'ranks':>9} {'group':>10} {'barrier':>10} {'store only':>10}",
    ]
    lines += [
        f"{row['ranks']:>9,} {_ms(row['group_seconds'])} {_ms(row['barrier_seconds'])} "
        f"{_ms(row['store_meeting_seconds'])}"
        for row in record["gloo"]
    ]
    lines += [
        "Not in it: xccl or nccl, whose start is another; starting the processes; importing torch.",
        "gloo connects every rank with every other, and these share this machine's cores.",
        "",
        "Bookkeeping of one rank, on torch's fake backend (milliseconds)",
    ]
    if isinstance(record["fake"], str):
        return "\n".join([*lines, record["fake"]])
    lines.append(
        f"{'ranks':>9} {'group':>10} {'mesh':>10} {'subgroup':>10} {'numbers':>10} {'us/rank':>10}"
    )
    lines += [
        f"{row['ranks']:>9,} {_ms(row['group_seconds'])} {_ms(row['mesh_seconds'])} "
        f"{_ms(row['subgroup_seconds'])} {_ms(row['numbers_seconds'])} "
        f"{row['microseconds_per_rank']:>10.2f}"
        for row in record["fake"]
    ]
    lines += [
        "Not in it: any communication. It is what Python and torch do on every rank before the",
        "first byte is sent, for a mesh of nodes x 12 tiles: a floor for such a world's start.",
    ]
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:>10.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largebatch bench init",
        description="What it takes many ranks to meet, as far as one machine can tell.",
    )
    for name, default, what in (
        ("--clients", [16, 64, 256], "connections to the store in which ranks meet"),
        ("--ranks", [2, 4, 8, 16], "processes that make a gloo group"),
        ("--fake", [768, 3072, 12_288, 98_304], "ranks of groups and meshes without processes"),
    ):
        told = f"{what} (default: {' '.join(map(str, default))})"
        parser.add_argument(name, type=int, nargs="+", default=default, metavar="N", help=told)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record here")
    return parser
