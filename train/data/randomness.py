"""The random numbers of a step, such as dropout's: a function of (seed, position, rank).

A resumed run draws what the undisturbed one would have drawn, and no generator's state is saved.
"""

import torch

from largebatch.train.data.sampler import random_word

# Beside the streams of the samples' order, which count epochs.
_FIRST_STREAM = 1 << 40


def seed_step(device: torch.device, seed: int, position: int, rank: int) -> None:
    """Seed torch's generators, of the CPU and of `device`, for the step at `position`."""
    # A signed 64-bit number holds it.
    value = random_word(seed, _FIRST_STREAM + rank, position) >> 1
    torch.default_generator.manual_seed(value)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(value)
