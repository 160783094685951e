"""The text of `task=bytes` as a language model reads it: every byte of a sequence is predicted from
those before it in it.
"""

import torch
from torch import Tensor, nn

from largebatch.train.data.sampler import Indices
from largebatch.train.tasks import Batch
from largebatch.train.tasks.bytes import Bytes
from largebatch.train.tasks.tokens import loss_per_token


class Text(Bytes):
    """Sequences of `sequence_length` bytes, 96 symbols; the loss is in nats per byte.

    Drawn and held out as in `Bytes`: training sequences with replacement, from any place of the
    text; the evaluation sequences are the same `num_eval` for every seed.

    Raises:
        ConfigError: a package that the text comes from is not installed.
        ValueError: a size that is no whole number, or more text than there is.
    """

    _context_key = "task.sequence_length"

    def __init__(
        self, num_bytes: int = 16_000_000, sequence_length: int = 128, num_eval: int = 256
    ) -> None:
        super().__init__(num_bytes, sequence_length, num_eval)

    def train_batch(self, indices: Indices) -> Batch:
        return _shifted(super().train_batch(indices))

    def eval_batch(self, indices: Indices) -> Batch:
        return _shifted(super().eval_batch(indices))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss_per_token(model, batch)


def _shifted(batch: Batch) -> Batch:
    """The context, and what follows each of its bytes; (samples, length) both."""
    context, following = batch
    return context, torch.cat([context[:, 1:], following[:, None]], dim=1)
