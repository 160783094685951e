"""A save under way: every rank writes its files, rank 0 hears of all, one outcome holds for all.

Ranks tell each other through the store in which they met, a message each: no collective, so that a
rank whose disk is full leaves nobody waiting, and so that it may happen while training continues.
"""

import socket
import threading
from collections.abc import Callable
from itertools import count
from typing import Any, Final

from torch.distributed.distributed_c10d import _get_default_store

from largebatch.distributed.mailbox import StoreMailbox
from largebatch.distributed.ranks import Ranks
from largebatch.train.checkpoints.files import File, RankFiles
from largebatch.train.checkpoints.tensors import Writing

_numbers = count()
"""Of the saves of this process; ranks save together, so it is the same on all."""

_DAY_SECONDS: Final = 86_400.0


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
        self._ranks, self._turn = ranks, next(_numbers)
        self._mailbox: StoreMailbox | None = None
        if ranks.size > 1:
            self._mailbox = StoreMailbox(ranks, _get_default_store(), "largebatch/checkpoint")
        self._outcome = ""
        self._thread: threading.Thread | None = None
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
        if self._mailbox is None or self._ranks.is_first:
            return self._outcome
        # A wait, not a poll: nothing else of this process needs the store now, and rank 0 answers,
        # or is gone, and the store with it.
        return str(self._mailbox.hear("outcome", _DAY_SECONDS, self._turn))

    def _work(self) -> None:
        part = self._written()
        if self._mailbox is None:
            self._outcome = self._published([part])
            return
        self._mailbox.post("part", part, self._turn)
        if self._ranks.is_first:
            parts = self._mailbox.collect("part", turn=self._turn).values()
            self._outcome = self._published([_part(part) for part in parts])
            self._mailbox.announce("outcome", self._outcome, self._turn)

    def _written(self) -> RankFiles | str:
        try:
            return self._writing.write()
        except Exception as error:
            return f"{_reason(error)} (rank {self._ranks.rank} on {socket.gethostname()})"

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
