"""A save under way: every rank writes its files, rank 0 hears of all, one outcome holds for all.

Ranks tell each other through the store in which they met, a message each: no collective, so that a
rank whose disk is full leaves nobody waiting, and so that it may happen while training continues.
"""

import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any, Final

from torch.distributed.distributed_c10d import _get_default_store

from largebatch.distributed.ranks import Ranks
from largebatch.train.checkpoints.files import File, RankFiles
from largebatch.train.checkpoints.tensors import Writing

_numbers = count()
"""Of the saves of this process; ranks save together, so it is the same on all."""

_POLL_SECONDS: Final = 0.02
_KEYS_AT_ONCE: Final = 1024


class Saving:
    """One save, on one rank. It fails on all ranks or on none.

    Args:
        writing: what this rank has to write.
        publish: on rank 0, takes all parts and makes of them a checkpoint under its name.
        discard: on rank 0, removes what there is of one that failed.
        background: in a thread, while the caller continues.
    """

    def __init__(
        self,
        ranks: Ranks,
        writing: Writing,
        publish: Callable[[list[RankFiles]], None],
        discard: Callable[[], None],
        background: bool,
    ) -> None:
        self._writing, self._publish, self._discard = writing, publish, discard
        self._post = Post(ranks)
        self._thread: threading.Thread | None = None
        self.seconds = 0.0
        """From the beginning of the writing to the end of this rank's part in it."""
        if background:
            self._thread = threading.Thread(target=self._work, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._work()

    def join(self, seconds: float) -> None:
        """Wait for this rank's part, and on rank 0 for the whole, no longer than `seconds`."""
        if self._thread is not None:
            self._thread.join(seconds)

    def wait(self) -> str:
        """What went wrong, the same on every rank; empty where nothing did. Every rank calls it."""
        if self._thread is not None:
            self._thread.join()
        return self._post.outcome()

    def _work(self) -> None:
        begun = time.perf_counter()
        self._post.send(self._written())
        if self._post.ranks.is_first:
            self._post.announce(self._published(self._post.collect()))
        self.seconds = time.perf_counter() - begun

    def _written(self) -> RankFiles | str:
        try:
            return self._writing.write()
        except Exception as error:
            return f"{_reason(error)} (rank {self._post.ranks.rank} on {socket.gethostname()})"

    def _published(self, parts: list[RankFiles | str]) -> str:
        whole = [part for part in parts if isinstance(part, RankFiles)]
        failed = [part for part in parts if isinstance(part, str)]
        try:
            if not failed:
                self._publish(whole)
                return ""
            reason = (
                failed[0] if len(failed) == 1 else f"{failed[0]}, and on {len(failed) - 1} more"
            )
        except Exception as error:
            reason = f"{_reason(error)} (rank 0 on {socket.gethostname()})"
        try:
            self._discard()
        except OSError as error:
            reason += f"; what there is of it could not be removed: {error}"
        return reason


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def _part(answer: Any) -> RankFiles | str:
    """From JSON, which knows lists alone."""
    if isinstance(answer, str):
        return answer
    files, results = answer
    return RankFiles({name: File(*file) for name, file in files.items()}, results)


class Post:
    """What ranks tell each other in one save: a part to rank 0 from each, an outcome from it."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self._number = next(_numbers)
        self._store = _get_default_store() if ranks.size > 1 else None
        self._own: list[Any] = []
        self._outcome = ""

    def _key(self, name: str) -> str:
        return f"largebatch/checkpoint/{name}/{self._number}"

    @staticmethod
    def _part_of(rank: int) -> str:
        """The same in each save: a rank begins one when rank 0 has read its part in the last."""
        return f"largebatch/checkpoint/part/{rank}"

    def send(self, part: RankFiles | str) -> None:
        """This rank's part, or why there is none."""
        if self.ranks.is_first:
            self._own.append(part)
        else:
            assert self._store is not None
            self._store.set(self._part_of(self.ranks.rank), json.dumps(part))
            self._store.add(self._key("count"), 1)

    def collect(self) -> list[RankFiles | str]:
        """On rank 0: every rank's, in their order, once all are there."""
        parts = list(self._own)
        if self._store is None:
            return parts
        # Asked for again and again: to wait within the store would keep this process's other
        # thread out of it.
        while self._store.add(self._key("count"), 0) < self.ranks.size - 1:
            time.sleep(_POLL_SECONDS)
        keys = [self._part_of(rank) for rank in range(1, self.ranks.size)]
        if self._store.has_extended_api():  # type: ignore[attr-defined] # many in one message
            for start in range(0, len(keys), _KEYS_AT_ONCE):
                found = self._store.multi_get(keys[start : start + _KEYS_AT_ONCE])
                parts += [_part(json.loads(data)) for data in found]
        else:
            parts += [_part(json.loads(self._store.get(key))) for key in keys]
        return parts

    def announce(self, outcome: str) -> None:
        """On rank 0: how it went."""
        self._outcome = outcome
        if self._store is not None:
            self._store.set(self._key("outcome"), f"-{outcome}")

    def outcome(self) -> str:
        """How it went, once rank 0 has said so."""
        if self.ranks.is_first:
            return self._outcome
        assert self._store is not None
        # No rank asks again and again: the store tells them. Nothing else of this process needs it
        # now, and rank 0 answers, or is gone, and the store with it.
        self._store.wait([self._key("outcome")], timedelta(days=1))
        return self._store.get(self._key("outcome")).decode()[1:]
