"""A stream from one rank to all, over a tree of point-to-point messages.

Each rank passes a chunk on to its two children while the next one arrives, so that the time is
about that of twice the stream plus a chunk for each level of the tree, and memory holds a few
chunks. Every wait has an end: who does not answer is known by its rank.

MPI is called from the main thread only, and polled: a broadcast of MPI's own could not be given up.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Final

_TAG: Final = 77
_AHEAD: Final = 4
"""Chunks that may be on their way to a child."""


class Lost(Exception):
    """A rank of the tree has not answered in time."""

    def __init__(self, rank: int, what: str) -> None:
        super().__init__(what)
        self.rank = rank


def parent_of(rank: int) -> int | None:
    """In the tree whose root is rank 0 and where rank r has the children 2r + 1 and 2r + 2."""
    return None if rank == 0 else (rank - 1) // 2


def children_of(rank: int, size: int) -> list[int]:
    return [child for child in (2 * rank + 1, 2 * rank + 2) if child < size]


def stream(
    comm: Any,
    chunks: Iterator[bytes],
    chunk_bytes: int,
    take: Callable[[bytes], None],
    patience_seconds: float,
) -> int:
    """Every chunk to `take` on every rank, in order; returns the number of bytes.

    Args:
        comm: an mpi4py communicator; rank 0 gives `chunks`, each of at most `chunk_bytes` and none
            of them empty.
        take: may take its time: a slow rank slows those above it down, and loses nothing.

    Raises:
        Lost: a neighbour in the tree has neither sent nor taken anything for that long.
    """
    parent = parent_of(comm.rank)
    children = children_of(comm.rank, comm.size)
    waiting: dict[int, deque[Any]] = {child: deque() for child in children}
    arriving = chunks if parent is None else _from(comm, parent, chunk_bytes, patience_seconds)
    num_bytes = 0
    for chunk in arriving:
        _pass_on(comm, chunk, waiting, patience_seconds)
        num_bytes += len(chunk)
        take(chunk)
    _pass_on(comm, b"", waiting, patience_seconds)  # the end
    for child, sent in waiting.items():
        for request, _ in sent:
            wait(request, child, "taken what was sent to it", patience_seconds)
    return num_bytes


def _from(comm: Any, parent: int, chunk_bytes: int, patience_seconds: float) -> Iterator[bytes]:
    """The parent's chunks; the next is asked for before one is worked on."""
    from mpi4py import MPI

    buffers = [bytearray(chunk_bytes), bytearray(chunk_bytes)]
    request = comm.Irecv([buffers[0], MPI.BYTE], source=parent, tag=_TAG)
    turn = 0
    while True:
        status = MPI.Status()
        wait(request, parent, "sent anything", patience_seconds, status)
        length = status.Get_count(MPI.BYTE)
        if length == 0:
            return
        chunk = bytes(memoryview(buffers[turn])[:length])
        turn = 1 - turn
        request = comm.Irecv([buffers[turn], MPI.BYTE], source=parent, tag=_TAG)
        yield chunk


def _pass_on(
    comm: Any, chunk: bytes, waiting: dict[int, "deque[Any]"], patience_seconds: float
) -> None:
    from mpi4py import MPI

    for child, sent in waiting.items():
        # The chunk is kept beside its request: MPI reads it until it is sent.
        sent.append((comm.Isend([chunk, MPI.BYTE], dest=child, tag=_TAG), chunk))
        while len(sent) > _AHEAD:
            wait(sent[0][0], child, "taken what was sent to it", patience_seconds)
            sent.popleft()


def wait(request: Any, rank: int, what: str, patience_seconds: float, status: Any = None) -> None:
    """Until MPI has done it.

    Raises:
        Lost: `rank` has not `what` for that long.
    """
    deadline = time.monotonic() + patience_seconds
    pause = 0.0
    while not request.Test(status):
        if time.monotonic() > deadline:
            raise Lost(rank, f"has not {what} for {patience_seconds:g} s")
        time.sleep(pause)
        pause = min(0.005, pause + 0.0001)
