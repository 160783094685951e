"""Digits with moods, for sweeps whose runs do not all come to a good end."""

import os
import signal
import time
from pathlib import Path

from largebatch.train.sampler import Indices
from largebatch.train.tasks import Batch
from largebatch.train.tasks.digits import Digits


class Moody(Digits):
    """Its process is killed, or it breaks; slow for as long as there is a file `gate`."""

    def __init__(self, mood: str = "calm", gate: str = "gate") -> None:
        super().__init__()
        self._mood, self._gate = mood, Path(gate)

    def train_batch(self, indices: Indices) -> Batch:
        if len(indices) > 1 and self._mood == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if len(indices) > 1 and self._mood == "breaks":
            raise RuntimeError("the data is gone")
        if self._gate.exists():
            time.sleep(0.3)
        return super().train_batch(indices)
