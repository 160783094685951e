"""LeNet-5 (LeCun et al. 1998, https://doi.org/10.1109/5.726791) for images of 28x28 pixels.

Where this differs: GELU, plain averages in place of trained subsampling, every map of the second
convolution sees all of the first, and a linear layer in place of radial basis functions.
"""

from collections import OrderedDict

from torch import nn

from largebatch.schedules import whole_number


class LeNet(nn.Sequential):
    """Images of shape (samples, channels, 28, 28) → logits, (samples, classes)."""

    def __init__(self, channels: int = 1, classes: int = 10) -> None:
        channels = whole_number(channels, "model.channels", 1)
        classes = whole_number(classes, "model.classes", 2)
        features = nn.Sequential(
            *(nn.Conv2d(channels, 6, 5, padding=2), nn.GELU(), nn.AvgPool2d(2)),  # (6, 14, 14)
            *(nn.Conv2d(6, 16, 5), nn.GELU(), nn.AvgPool2d(2)),  # (16, 5, 5)
            nn.Flatten(),
        )
        head = nn.Sequential(
            *(nn.Linear(400, 120), nn.GELU(), nn.Linear(120, 84), nn.GELU()),
            nn.Linear(84, classes),
        )
        super().__init__(OrderedDict(features=features, head=head))
