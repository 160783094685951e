"""Messages from all ranks to rank 0, and from it to all, where collectives may not work.

Everything goes through torch's TCP store, which needs no process group: a rank writes, rank 0
reads, and a rank that has not written by the deadline is known by its number.
"""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final

from largebatch.common.errors import ConfigError
from largebatch.common.text import first_line

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

    from largebatch.distributed.ranks import Ranks

_POLL_SECONDS: Final = 0.02
_AT_ONCE: Final = 1024


class Unreachable(RuntimeError):
    """This rank cannot reach the store on rank 0's node; the message is for the user."""


@dataclass
class StoreMailbox:
    """One rank's side.

    Each rank writes once on a topic, or once a turn: then rank 0 has to collect a turn's messages
    before the next turn, whose messages replace them.

    Attributes:
        prefix: of the keys in the store.
    """

    ranks: "Ranks"
    store: "Store"
    prefix: str

    @classmethod
    def connect(cls, ranks: "Ranks", timeout_seconds: float) -> "StoreMailbox":
        """Connect to the store at rank 0's address. Rank 0 does not wait for the others.

        Raises:
            Unreachable: no store there in time; on rank 0: its port is taken.
        """
        from torch.distributed import DistError

        from largebatch.distributed.ranks import allow_sockets, open_store

        allow_sockets(ranks.size)  # the check `nofile-low` reports where that is too little
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
        # torchrun's agent keeps one store over its restarts.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return cls(ranks, store, f"largebatch/doctor/{attempt}")

    def reconnect(self) -> "StoreMailbox":
        """Open a second connection: the first is in use while another thread waits on it."""
        from torch._C._distributed_c10d import TCPStore

        store = TCPStore(
            self.ranks.master_addr,
            self.ranks.master_port,
            is_master=False,
            timeout=timedelta(seconds=10),
            wait_for_workers=False,
        )
        return StoreMailbox(self.ranks, store, self.prefix)

    def group_store(self) -> "Store":
        """The store for a process group, with a prefix: the run's group will use the same store."""
        from torch._C._distributed_c10d import PrefixStore

        return PrefixStore(self._key("group"), self.store)

    def _key(self, topic: str, whose: int | str = "") -> str:
        return f"{self.prefix}/{topic}/{whose}"

    def post(self, topic: str, value: Any, turn: int = 0) -> None:
        """Write this rank's message on `topic`, anything that JSON holds."""
        self.store.set(self._key(topic, self.ranks.rank), json.dumps(value))
        self.count(f"{topic}/count/{turn}")

    def count(self, name: str, more: int = 1) -> int:
        """Add to a counter that all ranks share; return its value."""
        return int(self.store.add(self._key(name), more))

    def num_posted(self, topic: str, turn: int = 0) -> int:
        """Number of ranks that have written on `topic`."""
        return self.count(f"{topic}/count/{turn}", 0)

    def collect(
        self,
        topic: str,
        seconds: float = math.inf,
        enough: Callable[[], bool] = lambda: False,
        turn: int = 0,
    ) -> dict[int, Any]:
        """Messages on `topic` by rank: of all ranks, or of those that have written in time."""
        size = self.ranks.size
        deadline = time.monotonic() + seconds
        # Polled: a wait within the store would keep this process's other threads out of it.
        while (
            (count := self.num_posted(topic, turn)) < size
            and time.monotonic() < deadline
            and not enough()
        ):
            time.sleep(_POLL_SECONDS)
        everyone = list(range(size))
        if count < size:
            everyone = [rank for rank in everyone if self.store.check([self._key(topic, rank)])]
        found: dict[int, Any] = {}
        for first in range(0, len(everyone), _AT_ONCE):
            some = everyone[first : first + _AT_ONCE]
            keys = [self._key(topic, rank) for rank in some]
            if self.store.has_extended_api():  # type: ignore[attr-defined] # torch's stubs lack it
                values = self.store.multi_get(keys)
            else:
                values = [self.store.get(key) for key in keys]
            found |= {rank: json.loads(value) for rank, value in zip(some, values, strict=True)}
        return found

    def announce(self, topic: str, value: Any, turn: int = 0) -> None:
        """Write rank 0's message to all ranks."""
        self.store.set(self._key(topic, f"word/{turn}"), json.dumps(value))

    def hear(self, topic: str, seconds: float, turn: int = 0) -> Any:
        """Wait for rank 0's message on `topic`.

        Raises:
            Unreachable: none in time, or rank 0 is gone.
        """
        from torch.distributed import DistError

        key = self._key(topic, f"word/{turn}")
        try:
            self.store.wait([key], timedelta(seconds=seconds))
            return json.loads(self.store.get(key))
        except (DistError, RuntimeError) as error:
            raise Unreachable(
                f"rank {self.ranks.rank} has heard nothing from rank 0 at {self.ranks.master_addr}:"
                f"{self.ranks.master_port} on {topic!r} for {seconds:g} s ({first_line(error)})"
            ) from error
