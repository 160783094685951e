"""scikit-learn's bundled handwritten digits: small enough to see every effect in seconds.

The evaluation is the loss over the whole training set (an optimization target, with no question of
generalization in it), as in steps-to-target studies of small sets.
"""

import hashlib
from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.train.data.sampler import Indices, shuffled
from largebatch.train.tasks import Batch
from largebatch.train.tasks.metrics import Metrics, accuracy


@cache  # a process of a study makes many runs, of a tenth of a second each
def _read() -> tuple[np.ndarray, np.ndarray]:
    """Pixels (1797, 64) and labels as `sklearn.datasets.load_digits` gives them, whose import takes
    longer than a short run.
    """
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    table = np.loadtxt(Path(found.origin).parent / "datasets/data/digits.csv.gz", delimiter=",")
    return np.ascontiguousarray(table[:, :-1]), table[:, -1].astype(np.int64)


class Digits:
    """1,437 of the 1,797 images of 8x8 pixels, shuffled anew each epoch; the loss is in nats."""

    replacement = False

    def __init__(self) -> None:
        images, labels = _read()
        rows = shuffled(len(labels), 0, 0)[: len(labels) * 4 // 5]
        self._hash = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
        self._images = torch.from_numpy(images[rows].astype(np.float32) / 16.0)  # (rows, 64)
        self._labels = torch.from_numpy(labels[rows].astype(np.int64))
        self.num_train = self.num_eval = len(rows)

    def train_batch(self, indices: Indices) -> Batch:
        rows = torch.from_numpy(indices)
        return self._images[rows], self._labels[rows]

    eval_batch = train_batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(model(images), labels)

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        images, labels = batch
        return accuracy(model(images), labels)

    def provenance(self) -> Mapping[str, str]:
        return {"data": "scikit-learn's digits, 1,437 training rows", "data_hash": self._hash}
