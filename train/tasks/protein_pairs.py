"""Preferences between protein-like sequences whose right answer is known.

Sequences of the 20 amino acids in the proportions of Swiss-Prot; a score of each, and of two of
them one preferred as Bradley & Terry (1952) draw it: the first with probability
1 / (1 + exp(score of the second - score of the first)). So it is known what a policy should learn,
and how well it can be learned.
"""

import hashlib
import math
from collections.abc import Mapping
from typing import Final

import numpy as np
import numpy.typing as npt

from largebatch.common.numbers import real_number
from largebatch.schedules import whole_number
from largebatch.train.data.sampler import Indices, random_words

AMINO_ACIDS: Final = "ARNDCQEGHILKMFPSTWYV"
START: Final = len(AMINO_ACIDS)
"""The token before every sequence."""

# Per cent of residues, UniProtKB/Swiss-Prot release statistics.
_FREQUENCIES: Final = (
    8.25, 5.53, 4.06, 5.46, 1.38, 3.93, 6.72, 7.07, 2.27, 5.91,
    9.65, 5.80, 2.41, 3.86, 4.74, 6.65, 5.36, 1.10, 2.92, 6.86,
)  # fmt: skip

# Kyte & Doolittle 1982, J. Mol. Biol. 157:105, table 2.
HYDROPATHY: Final = (
    1.8, -4.5, -3.5, -3.5, 2.5, -3.5, -3.5, -0.4, -3.2, 4.5,
    3.8, -3.9, 1.9, 2.8, -1.6, -0.8, -0.7, -0.9, -1.3, 4.2,
)  # fmt: skip

_WORDS_SEED: Final = 20
_PREFERENCES: Final = 1
"""The stream of random words that preferences are drawn from; residues are from stream 0."""

Residues = npt.NDArray[np.int64]
"""Numbers of amino acids, in the order of `AMINO_ACIDS`; (…, length)."""


class ProteinPairs:
    """Pairs of sequences, the preferred one first; the same pairs for every seed.

    Args:
        hydropathy: what each residue adds to the score, times its hydropathy.
        sequon: what each N-glycosylation site adds: asparagine, any residue but proline, serine or
            threonine. It takes three places in order, so no sum over residues explains it.

    Raises:
        ValueError: a number out of its range.
    """

    vocabulary = START + 1

    def __init__(
        self,
        length: int,
        num_train: int = 65_536,
        num_eval: int = 1024,
        hydropathy: float = 0.07,
        sequon: float = 1.0,
    ) -> None:
        self.length = whole_number(length, "task.pairs.length", 3)
        self.num_train = whole_number(num_train, "task.pairs.num_train", 1)
        self.num_eval = whole_number(num_eval, "task.pairs.num_eval", 1)
        self._hydropathy = real_number(hydropathy, "task.pairs.hydropathy")
        self._sequon = real_number(sequon, "task.pairs.sequon")

    def _pairs(self, numbers: Indices) -> Residues:
        """The pairs of these numbers, each a function of its number: (pairs, 2, 1 + length)."""
        both = 2 * self.length
        upto = np.cumsum(_FREQUENCIES)
        words = _uniform(0, numbers[:, None] * both + np.arange(both))
        drawn = np.searchsorted(upto / upto[-1], words, side="right")
        # A word just below 2^64 rounds to 1, beyond the last residue.
        pairs = np.minimum(drawn, START - 1).reshape(-1, 2, self.length).astype(np.int64)
        first, second = self.score(pairs).T
        second_wins = _uniform(_PREFERENCES, numbers) >= 1.0 / (1.0 + np.exp(second - first))
        pairs[second_wins] = pairs[second_wins, ::-1]
        return np.insert(pairs, 0, START, axis=-1)

    def score(self, sequences: Residues) -> npt.NDArray[np.float64]:
        """Of each sequence, (…,)."""
        is_n, is_p, is_s, is_t = (sequences == AMINO_ACIDS.index(letter) for letter in "NPST")
        site = is_n[..., :-2] & ~is_p[..., 1:-1] & (is_s | is_t)[..., 2:]
        water = np.asarray(HYDROPATHY)[sequences].sum(-1)
        scores: npt.NDArray[np.float64] = self._hydropathy * water + self._sequon * site.sum(-1)
        return scores

    def train_pairs(self, indices: Indices) -> Residues:
        """Training pairs, the preferred first, start tokens before both: (pairs, 2, 1 + length)."""
        return self._pairs(indices)

    def eval_pairs(self, indices: Indices) -> Residues:
        """As `train_pairs`, of the held-out pairs, whose numbers come after."""
        return self._pairs(self.num_train + indices)

    def provenance(self) -> Mapping[str, str]:
        """With the loss on the held-out pairs, the first 65,536 at most, of a policy that knows the
        scores. The hash is of them too: all pairs are made by the same rule.
        """
        held_out = self.eval_pairs(np.arange(min(self.num_eval, 1 << 16), dtype=np.int64))
        preferred, other = self.score(held_out[..., 1:]).T
        known = np.logaddexp(0.0, other - preferred).mean()
        words = (
            f"{self.num_train} preferences between synthetic proteins of {self.length} residues, "
            f"whose scores have a loss of {known:.4f} on those held out"
        )
        return {"data": words, "data_hash": hashlib.sha256(held_out.tobytes()).hexdigest()}


def _uniform(stream: int, places: Indices) -> npt.NDArray[np.float64]:
    return random_words(_WORDS_SEED, stream, places) / math.ldexp(1.0, 64)
