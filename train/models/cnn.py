"""A small convolutional network for images.

Group normalisation (Wu & He 2018, arXiv:1803.08494), never batch normalisation: the statistics of a
micro-batch would make the trajectory depend on how the global batch is split.
"""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from largebatch.schedules import whole_number

_GROUP = 16
"""Channels of one group, the paper's best fixed number (its table 3)."""


class CNN(nn.Module):
    """Images of shape (samples, channels, height, width) → logits, (samples, classes).

    Args:
        widths: channels of each stage: two 3x3 convolutions; the second halves the image.
    """

    def __init__(self, channels: int, classes: int, widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        inputs = [whole_number(channels, "model.channels", 1)]
        inputs += [whole_number(width, "model.widths", 1) for width in widths]
        if len(inputs) == 1 or any(width % _GROUP for width in inputs[1:]):
            raise ValueError(
                f"model.widths must name at least one stage, each a multiple of {_GROUP}, got "
                f"{list(widths)}"
            )
        self.stages = nn.Sequential(*(_stage(before, width) for before, width in pairwise(inputs)))
        self.head = nn.Linear(inputs[-1], whole_number(classes, "model.classes", 2))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stages(images).mean((2, 3))  # (samples, widths[-1])
        logits: Tensor = self.head(features)
        return logits


def _stage(before: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        *_convolution(before, width, stride=1), *_convolution(width, width, stride=2)
    )


def _convolution(before: int, width: int, stride: int) -> tuple[nn.Module, ...]:
    # The normalisation has a bias, so the convolution needs none.
    return (
        nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(width // _GROUP, width),
        nn.GELU(),
    )
