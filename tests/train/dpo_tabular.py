"""A policy that can be anything, and every pair there is: its optimum is known to the digit."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LETTERS, LENGTH = 3, 3
SEQUENCES = np.array(list(product(range(LETTERS), repeat=LENGTH)))  # all 27 of them


class Tabular(nn.Module):
    """Logits of their own after every prefix; a start token stands before the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ParameterList(
            nn.Parameter(torch.randn(LETTERS**length, LETTERS, dtype=torch.float64))
            for length in range(LENGTH)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        prefix = torch.zeros(len(tokens), dtype=torch.int64)
        logits = []
        for place, table in enumerate(self.tables):
            if place:
                prefix = prefix * LETTERS + tokens[:, place]
            logits.append(table[prefix])
        return torch.stack(logits, 1)


class EveryPair:
    """Each ordered pair of two sequences: the first is the preferred one."""

    length, vocabulary = LENGTH, LETTERS + 1

    def __init__(self) -> None:
        number = len(SEQUENCES)
        self.ordered = [(a, b) for a in range(number) for b in range(number) if a != b]
        self.num_train = self.num_eval = len(self.ordered)

    def train_pairs(self, indices: Any) -> Any:
        chosen = SEQUENCES[np.array(self.ordered)[indices]]
        return np.concatenate((np.full((*chosen.shape[:2], 1), LETTERS), chosen), -1)

    eval_pairs = train_pairs

    def provenance(self) -> Mapping[str, str]:
        return {"data": "every pair", "data_hash": "none"}
