"""Digits with samples that spoil the gradient: by where they stand in the order of the run."""

import torch
from torch import Tensor, nn

from largebatch.train.data.sampler import Indices, Sampler
from largebatch.train.tasks import Batch
from largebatch.train.tasks.digits import Digits


class Spoiled(Digits):
    """The images at `position` of the order of `seed` have pixels of `pixel`, or are NaN.

    With replacement off every image stands at one position of the first epoch.
    """

    def __init__(self, position: int, pixel: float | None = None, seed: int = 0) -> None:
        super().__init__()
        index = int(Sampler(self.num_train, seed, self.replacement).take(position, 1)[0])
        self._spoiled = index
        self._pixel = float("nan") if pixel is None else pixel

    def train_batch(self, indices: Indices) -> Batch:
        images, labels = super().train_batch(indices)
        images = images.clone()
        images[torch.from_numpy(indices == self._spoiled)] = self._pixel
        return images, labels

    def eval_batch(self, indices: Indices) -> Batch:
        return super().train_batch(indices)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return super().loss(model, (images, labels))
