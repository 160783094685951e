"""Digits with moods, for sweeps whose runs do not all come to a good end."""

import os
import signal
import time
from pathlib import Path

from largebatch.train.data.sampler import Indices
from largebatch.train.tasks import Batch
from largebatch.train.tasks.digits import Digits


class Moody(Digits):
    """Its process is killed, or it breaks, at the first whole batch of a run; slow for as long as
    there is a file `gate`.
    """

    def __init__(self, mood: str = "calm", gate: str = "gate") -> None:
        super().__init__()
        self._mood, self._gate = mood, Path(gate)

    def train_batch(self, indices: Indices) -> Batch:
        trains = len(indices) > 32  # less is looked at before the run
        if trains and self._mood == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if trains and self._mood == "breaks":
            raise RuntimeError("the data is gone")
        if self._gate.exists():
            time.sleep(0.3)
        return super().train_batch(indices)
