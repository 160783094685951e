"""The noisy quadratic model as a task: the one whose steps to a loss are known without training.

Zhang et al. 2019 (https://arxiv.org/abs/1907.04164): L(θ) = ½ Σ h_i θ_i² with h_i = i^-power, and
gradients h_i θ_i + ξ_i whose noise has covariance H / B over a batch of B. A sample n is a row of
random signs s_n, of which ξ = √h s_n, and its loss ½ Σ h_i θ_i² + Σ √h_i s_ni θ_i: the square
½ Σ h_i (θ_i + s_ni / √h_i)² less what does not depend on θ, so that training losses are unbiased
too. The evaluation is L itself, without noise. `largebatch.study.nqm` has the expected loss after
each step.

Deviations: signs in place of normal numbers, of the same covariance to the last digit, which is all
that expected losses depend on, and 64 of them come from one word. By default power is ½ and not 1,
and the target lies higher: then 500 modes share the loss and not 30, and a single run reaches the
target within a few percent of the step at which the expected loss does.
"""

import hashlib
from collections.abc import Mapping
from typing import Final

import numpy as np
import torch
from torch import Tensor, nn

from largebatch.common.numbers import real_number
from largebatch.schedules import whole_number
from largebatch.train.data.sampler import Indices, random_words
from largebatch.train.tasks import Batch

MOST_DIMENSIONS: Final = 2**20

_NUM_TRAIN: Final = 2**40
"""None is ever seen twice, but for one in billions."""

_NOISE_STREAM: Final = 1 << 43  # beside those of the samples' order, of steps and of mixtures


class NoisyQuadratic:
    """`dimension` curvatures from 1 down to dimension^-power; samples drawn with replacement.

    Raises:
        ValueError: a value out of range.
    """

    replacement = True
    num_train = _NUM_TRAIN
    num_eval = 1

    def __init__(self, dimension: int = 1024, power: float = 0.5) -> None:
        self.dimension = whole_number(dimension, "task.dimension", 1)
        if self.dimension > MOST_DIMENSIONS:
            raise ValueError(
                f"task.dimension must be at most {MOST_DIMENSIONS}, got {self.dimension}"
            )
        self.power = real_number(power, "task.power", least=0.0, most=4.0)
        modes = np.arange(1, self.dimension + 1, dtype=np.float64)
        self._curvature = torch.from_numpy((modes**-self.power).astype(np.float32))

    def train_batch(self, indices: Indices) -> Batch:
        num_words = -(-self.dimension // 64)
        places = indices[:, None] * num_words + np.arange(num_words)
        words = random_words(0, _NOISE_STREAM, places.ravel())
        bits = np.unpackbits(words.astype("<u8").view(np.uint8)).reshape(len(indices), -1)
        signs = 2 * bits[:, : self.dimension].view(np.int8) - 1
        return (torch.from_numpy(signs),)  # (samples, dimension), int8

    def eval_batch(self, indices: Indices) -> Batch:
        return (torch.zeros(len(indices), self.dimension, dtype=torch.int8),)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        (signs,) = batch
        theta: Tensor = model(signs)
        h = self._curvature = self._curvature.to(theta.device)  # copied there once
        noise = h.sqrt() * signs.to(theta.dtype).mean(0)
        return torch.sum((0.5 * h * theta + noise) * theta)

    def provenance(self) -> Mapping[str, str]:
        (signs,) = self.train_batch(np.arange(4, dtype=np.int64))
        content = self._curvature.cpu().numpy().astype("<f4").tobytes() + signs.numpy().tobytes()
        return {
            "data": f"noisy quadratic of {self.dimension} curvatures i^-{self.power:g}",
            "data_hash": hashlib.sha256(content).hexdigest(),
        }
