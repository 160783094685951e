"""Images and their classes, from files of your own."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.common.numbers import real_number
from largebatch.schedules import whole_number
from largebatch.train.data.sampler import Indices
from largebatch.train.tasks import Batch
from largebatch.train.tasks.image_sources import ImageFolder, ImageSource, open_source
from largebatch.train.tasks.metrics import Metrics, accuracy

_FOR_STATISTICS = 2048
"""Training images that mean and standard deviation are taken from where none are given."""


class Images:
    """Classify images of one size; the loss is in nats per image.

    Every epoch is a fresh shuffle of the training images. With `flip` the set is twice as large:
    each image, and its mirror image. So what is mirrored is a function of the seed and the position
    in the run, as the order is, and an epoch is two passes. There is no other augmentation.

    Args:
        path: an .npz file with `images`, uint8 of shape (N, size, size[, channels]), and `labels`,
            (N,); or a folder of class folders (read as needed; needs Pillow).
        held_out: share of the images kept for evaluation, chosen by a hash: of its pixels in an
            .npz, so that copies fall on one side; of its name in a folder.
        eval_path: images for evaluation, in place of a share of the others.
        mean, std: of each channel, of pixels between 0 and 1; None: as the training images have
            them.

    Raises:
        ValueError: a file, array or number that is not as said, by its name.
    """

    replacement = False

    def __init__(
        self,
        path: str | None,
        classes: int,
        channels: int,
        size: int,
        held_out: float = 0.1,
        eval_path: str | None = None,
        flip: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        shape = (
            whole_number(classes, "task.classes", 2),
            whole_number(channels, "task.channels", 1),
            whole_number(size, "task.size", 1),
        )
        if path is None:
            raise ValueError(
                "task.path must be given: an .npz file with the arrays images and labels, or a "
                "folder of class folders"
            )
        self._train = open_source(Path(path), "task.path", *shape)
        self._rows = np.arange(len(self._train.labels), dtype=np.int64)
        if eval_path is None:
            self._eval: ImageSource = self._train
            self._rows, self._eval_rows = _split(self._train, held_out)
        else:
            self._eval = open_source(Path(eval_path), "task.eval_path", *shape)
            _check_same_classes(self._train, self._eval)
            self._eval_rows = np.arange(len(self._eval.labels), dtype=np.int64)
        self.classes = shape[0]
        self.num_train = len(self._rows) * (2 if flip else 1)
        self.num_eval = len(self._eval_rows)
        self._mean, self._std = self._normalisation(mean, std, shape[1])

    def _normalisation(
        self, mean: Sequence[float] | None, std: Sequence[float] | None, channels: int
    ) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, (channels, 1, 1)."""
        if (mean is None) != (std is None):
            raise ValueError("task.mean and task.std must be given both or neither")
        if mean is None or std is None:
            step = max(1, len(self._rows) // _FOR_STATISTICS)
            pixels = self._train.read(self._rows[::step][:_FOR_STATISTICS]) / 255.0
            mean, std = pixels.mean((0, 1, 2)).tolist(), pixels.std((0, 1, 2)).tolist()
            # An even channel has no deviation, and nothing in it to scale.
            std = [value or 1.0 for value in std]
        for name, values in (("task.mean", mean), ("task.std", std)):
            if len(values) != channels:
                raise ValueError(
                    f"{name} must have task.channels={channels} numbers, got {list(values)}"
                )
        means = [real_number(value, "task.mean") for value in mean]
        deviations = [real_number(value, "task.std", above=0.0) for value in std]
        return torch.tensor(means).view(-1, 1, 1), torch.tensor(deviations).view(-1, 1, 1)

    def train_batch(self, indices: Indices) -> Batch:
        which = indices % len(self._rows)
        images, labels = self._batch(self._train, self._rows[which])
        mirrored = torch.from_numpy(indices >= len(self._rows))[:, None, None, None]
        return torch.where(mirrored, images.flip(3), images), labels

    def eval_batch(self, indices: Indices) -> Batch:
        return self._batch(self._eval, self._eval_rows[indices])

    def _batch(self, source: ImageSource, rows: Indices) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(source.read(rows)).permute(0, 3, 1, 2)
        images = ((pixels.float() / 255.0 - self._mean) / self._std).contiguous()
        return images, torch.from_numpy(source.labels[rows])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        logits = model(images)
        if logits.shape != (len(labels), self.classes):
            raise ValueError(
                "the model must give logits of shape (samples, task.classes) = "
                f"({len(labels)}, {self.classes}), got {tuple(logits.shape)}: choose an image "
                "model, model=cnn or model=image_mlp"
            )
        return cross_entropy(logits, labels)

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        images, labels = batch
        return accuracy(model(images), labels)

    def provenance(self) -> Mapping[str, str]:
        if self._eval is self._train:
            words = f"{self._train.words}, {self.num_eval} of them held out"
            return {"data": words, "data_hash": self._train.hash}
        both = hashlib.sha256(f"{self._train.hash} {self._eval.hash}".encode())
        words = f"{self._train.words}; evaluation: {self._eval.words}"
        return {"data": words, "data_hash": both.hexdigest()}


def _split(source: ImageSource, held_out: float) -> tuple[Indices, Indices]:
    """Rows for training and for evaluation."""
    share = real_number(held_out, "task.held_out", above=0.0, most=1.0)
    digests = [hashlib.blake2b(key, digest_size=8).digest() for key in source.identities()]
    places = np.array([int.from_bytes(digest, "big") for digest in digests], np.float64)
    is_held_out = places < share * 2.0**64
    train, held = np.flatnonzero(~is_held_out), np.flatnonzero(is_held_out)
    if not (len(train) and len(held)):
        raise ValueError(
            f"task.held_out={held_out} leaves {len(train)} images for training and {len(held)} for "
            "evaluation, and there must be some of both: change it, or give task.eval_path"
        )
    return train.astype(np.int64), held.astype(np.int64)


def _check_same_classes(train: ImageSource, held: ImageSource) -> None:
    if (
        isinstance(train, ImageFolder)
        and isinstance(held, ImageFolder)
        and train.classes != held.classes
    ):
        strange = sorted(set(train.classes) ^ set(held.classes))
        raise ValueError(
            "task.path and task.eval_path must have the same class folders, and these are in one "
            f"alone: {', '.join(strange[:5])}"
        )
