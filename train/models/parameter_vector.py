"""A model that is nothing but its parameters: what is minimized is the task's."""

import torch
from torch import Tensor, nn

from largebatch.schedules import whole_number


class ParameterVector(nn.Module):
    """θ ~ N(0, I) of shape (dimension,); it returns θ, whatever samples it is given."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.empty(whole_number(dimension, "model.dimension", 1)))
        nn.init.normal_(self.theta)

    def forward(self, samples: Tensor) -> Tensor:
        return self.theta.clone()  # a sharded one's memory is gone after the forward pass
