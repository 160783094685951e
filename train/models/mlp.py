"""Small multilayer perceptrons. GELU throughout: a ReLU's kink turns the rounding of another
micro-batch split into loss differences of 1e-3 within 100 steps."""

from torch import Tensor, nn

from largebatch.schedules import whole_number


class MLP(nn.Sequential):
    """inputs → hidden → outputs; input of shape (samples, inputs)."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        inputs = whole_number(inputs, "model.inputs", 1)
        hidden = whole_number(hidden, "model.hidden", 1)
        outputs = whole_number(outputs, "model.outputs", 1)
        super().__init__(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class ByteMLP(nn.Module):
    """Embed `context` symbols, join them, one hidden layer; input of shape (samples, context)."""

    def __init__(
        self, context: int, embedding: int = 16, hidden: int = 128, vocabulary: int = 96
    ) -> None:
        super().__init__()
        context = whole_number(context, "model.context", 1)
        embedding = whole_number(embedding, "model.embedding", 1)
        vocabulary = whole_number(vocabulary, "model.vocabulary", 1)
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.mlp = MLP(context * embedding, hidden, vocabulary)

    def forward(self, symbols: Tensor) -> Tensor:
        logits: Tensor = self.mlp(self.embedding(symbols).flatten(1))  # (samples, vocabulary)
        return logits


class ImageMLP(nn.Sequential):
    """Images of shape (samples, channels, size, size) → logits, (samples, classes)."""

    def __init__(self, channels: int, size: int, classes: int, hidden: int = 256) -> None:
        pixels = (
            whole_number(channels, "model.channels", 1) * whole_number(size, "model.size", 1) ** 2
        )
        classes = whole_number(classes, "model.classes", 2)
        super().__init__(nn.Flatten(), MLP(pixels, hidden, classes))
