"""Models for the bundled tasks: plain torch.nn.Modules, by their own names in `_target_`."""

from largebatch.train.models.cnn import CNN
from largebatch.train.models.hugging_face import HuggingFace
from largebatch.train.models.mlp import MLP, ByteMLP, ImageMLP
from largebatch.train.models.parameter_vector import ParameterVector
from largebatch.train.models.transformer import Transformer

__all__ = ["CNN", "MLP", "ByteMLP", "HuggingFace", "ImageMLP", "ParameterVector", "Transformer"]
