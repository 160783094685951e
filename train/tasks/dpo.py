"""Direct preference optimisation: a policy learns from preferences between pairs of sequences.

Rafailov et al. 2023, arXiv:2305.18290, equation 7: with y_w preferred to y_l,

    loss = -log sigmoid(β log π(y_w)/π_ref(y_w) - β log π(y_l)/π_ref(y_l)),

the mean over pairs. β log π/π_ref is the policy's implicit reward; where preferences follow
Bradley & Terry with a reward r, the least loss is that of π ∝ π_ref exp(r/β), whatever the pairs.

The reference is the model as it was before its first step. It is made anew from the configuration
and the seed, as the model was: so it is the same on every rank and after every resumption, holds no
gradient, and belongs to no engine, optimizer or checkpoint. Every rank has it whole.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid

from largebatch.common.numbers import real_number
from largebatch.conf.build import build
from largebatch.train.data.sampler import Indices
from largebatch.train.tasks import Batch


class Pairs(Protocol):
    """Where preferences come from."""

    num_train: int
    num_eval: int
    length: int
    """Tokens of a sequence that are predicted."""
    vocabulary: int

    def train_pairs(self, indices: Indices) -> Any:
        """int64 tokens, (pairs, 2, 1 + length), the preferred sequence first; the first token of a
        sequence is given and not predicted.
        """

    def eval_pairs(self, indices: Indices) -> Any:
        """As `train_pairs`, of held-out pairs."""

    def provenance(self) -> Mapping[str, str]:
        """As a task's."""


class DPO:
    """Learn preferences; the loss is in nats per pair, and ln 2 before the first step.

    Args:
        pairs: configuration of the `Pairs`.
        reference: configuration of the model that π_ref is: the run's own.
        seed: that the model is made with: the run's own.
        beta: how dear it is to leave the reference.
        vocabulary, sequence_length: what models are to be made for.

    Raises:
        ValueError: a number out of its range, or pairs of other sequences.
    """

    replacement = False

    def __init__(
        self,
        pairs: Mapping[str, Any],
        reference: Mapping[str, Any],
        seed: int,
        vocabulary: int,
        sequence_length: int,
        beta: float = 0.1,
    ) -> None:
        if not isinstance(pairs, Mapping) or not isinstance(reference, Mapping):
            raise ValueError(
                "task._recursive_ must be false: the task makes pairs and reference itself"
            )
        self.pairs: Pairs = build(pairs, "task.pairs")
        self.beta = real_number(beta, "task.beta", above=0.0)
        for key, value, needed in (
            ("vocabulary", vocabulary, self.pairs.vocabulary),
            ("sequence_length", sequence_length, self.pairs.length),
        ):
            if value != needed:
                raise ValueError(f"task.{key} must be {needed} for these pairs, got {value}")
        self.num_train, self.num_eval = self.pairs.num_train, self.pairs.num_eval
        self._reference, self._seed = reference, seed
        self._made: dict[torch.device, nn.Module] = {}

    def train_batch(self, indices: Indices) -> Batch:
        return (torch.from_numpy(self.pairs.train_pairs(indices)),)

    def eval_batch(self, indices: Indices) -> Batch:
        return (torch.from_numpy(self.pairs.eval_pairs(indices)),)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return -logsigmoid(self.margins(model, batch)).mean()

    def margins(self, model: nn.Module, batch: Batch) -> Tensor:
        """Implicit reward of each pair's preferred sequence minus that of the other; (pairs,)."""
        (pairs,) = batch
        sequences = pairs.flatten(0, 1)  # (2 · pairs, 1 + length): one pass for both
        with torch.no_grad():
            frozen = log_probabilities(self.reference(pairs.device), sequences)
        rewards = self.beta * (log_probabilities(model, sequences) - frozen)
        preferred, other = rewards.view(-1, 2).unbind(1)
        return preferred - other

    def reference(self, device: torch.device) -> nn.Module:
        """The model as it was before its first step, frozen, on `device`."""
        if device not in self._made:
            made_on = device if device.type == "meta" else torch.device("cpu")
            # On the CPU, where a run makes its model: other devices draw other numbers.
            with torch.random.fork_rng(devices=[]), made_on:
                torch.manual_seed(self._seed)
                model: nn.Module = build(self._reference, "task.reference")
            self._made[device] = model.requires_grad_(False).eval().to(device)
        return self._made[device]

    def provenance(self) -> Mapping[str, str]:
        return self.pairs.provenance()


def log_probabilities(model: nn.Module, sequences: Tensor) -> Tensor:
    """log π of each sequence's tokens after its first, (sequences,)."""
    logits, following = model(sequences[:, :-1]), sequences[:, 1:]
    if logits.shape[:-1] != following.shape:
        raise ValueError(
            "the model must give logits of shape (sequences, length, vocabulary) = "
            f"({', '.join(map(str, following.shape))}, …), got {tuple(logits.shape)}: choose a "
            "language model, such as model=transformer"
        )
    each = cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
    return -each.view_as(following).sum(1)
