"""How ranks tell rank 0 what they have found while the collectives themselves are in doubt.

Everything goes through torch's TCP store, which needs no process group: a rank writes, rank 0
reads, and whoever has not written by the deadline is missing by name.
"""

import json
import os
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from largebatch.common.errors import ConfigError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

    from largebatch.distributed.ranks import Ranks

_POLL_SECONDS: Final = 0.02
_AT_ONCE: Final = 1024


class Unreachable(Exception):
    """This rank cannot reach the store on rank 0's node; the message is for the user."""


@dataclass
class Meeting:
    """One rank's side. Topics are written once by each rank."""

    ranks: "Ranks"
    store: "TCPStore"

    @classmethod
    def of(cls, ranks: "Ranks", timeout_seconds: float) -> "Meeting":
        """Meet at rank 0's address. Rank 0 does not wait for the others.

        Raises:
            Unreachable: no store there before the time is over; on rank 0: its port is taken.
        """
        from torch.distributed import DistError

        from largebatch.distributed.ranks import open_store

        allow_sockets(ranks.size)
        try:
            # The run that follows in this process meets in the same store.
            store = open_store(ranks, timedelta(seconds=timeout_seconds))
        except (ConfigError, DistError, RuntimeError, ValueError) as error:
            here = f"{ranks.master_addr}:{ranks.master_port}"
            raise Unreachable(
                f"rank 0 cannot listen at {here} ({first_line(error)})"
                if ranks.is_first
                else f"rank {ranks.rank} finds no rank 0 at {here} within {timeout_seconds:g} s "
                f"({first_line(error)})"
            ) from error
        return cls(ranks, store)

    def again(self) -> "Meeting":
        """A second connection: the first is taken while another thread waits on it."""
        from torch._C._distributed_c10d import TCPStore

        store = TCPStore(
            self.ranks.master_addr,
            self.ranks.master_port,
            is_master=False,
            timeout=timedelta(seconds=10),
            wait_for_workers=False,
        )
        return Meeting(self.ranks, store)

    def own_store(self) -> "Store":
        """The store under a name of its own: the run's own group will write to the same one."""
        from torch._C._distributed_c10d import PrefixStore

        return PrefixStore(_key("group", ""), self.store)

    def post(self, topic: str, value: Any) -> None:
        """Write `value` (anything that JSON holds) as this rank's word on `topic`."""
        self.store.set(_key(topic, self.ranks.rank), json.dumps(value))
        self.count(f"{topic}/count")

    def count(self, name: str, more: int = 1) -> int:
        """Add to a counter that all ranks share; returns its sum so far."""
        return int(self.store.add(_key(name, ""), more))

    def collect(
        self, topic: str, seconds: float, enough: Callable[[], bool] = lambda: False
    ) -> dict[int, Any]:
        """What the ranks have written on `topic`, by rank: all of them, or those in time."""
        size = self.ranks.size
        deadline = time.monotonic() + seconds
        while (
            (count := self.count(f"{topic}/count", 0)) < size
            and time.monotonic() < deadline
            and not enough()
        ):
            time.sleep(_POLL_SECONDS)
        everyone = list(range(size))
        if count < size:
            everyone = [rank for rank in everyone if self.store.check([_key(topic, rank)])]
        found: dict[int, Any] = {}
        for first in range(0, len(everyone), _AT_ONCE):
            some = everyone[first : first + _AT_ONCE]
            values = self.store.multi_get([_key(topic, rank) for rank in some])
            found |= {rank: json.loads(value) for rank, value in zip(some, values, strict=True)}
        return found

    def announce(self, topic: str, value: Any) -> None:
        """Rank 0's word to all."""
        self.store.set(_key(topic, "word"), json.dumps(value))

    def hear(self, topic: str, seconds: float) -> Any:
        """Rank 0's word on `topic`.

        Raises:
            Unreachable: it has not come in time, or rank 0 is gone.
        """
        from torch.distributed import DistError

        try:
            self.store.wait([_key(topic, "word")], timedelta(seconds=seconds))
            return json.loads(self.store.get(_key(topic, "word")))
        except (DistError, RuntimeError) as error:
            raise Unreachable(
                f"rank {self.ranks.rank} has heard nothing from rank 0 at {self.ranks.master_addr}:"
                f"{self.ranks.master_port} on {topic!r} for {seconds:g} s ({first_line(error)})"
            ) from error


def allow_sockets(size: int) -> None:
    """As many open files as `size` ranks need, or as many as this process may have; `nofile-low`
    has said it where that is too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * size + 256  # a rank that hangs connects a second time
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def first_line(error: BaseException) -> str:
    """An exception's message, without the stack that torch adds."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _key(topic: str, whose: int | str) -> str:
    # torchrun's agent keeps one store over its restarts.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return f"largebatch/doctor/{attempt}/{topic}/{whose}"
