"""LAMB in Lightning: `python examples/lightning_module.py`.

Lightning clips the gradients here, also with precision="bf16-mixed" or "16-mixed". It prints what
examples/plain_pytorch.py prints.
"""

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

from largebatch.optim import LAMB, param_groups

NUM_STEPS, BATCH_SIZE = 60, 2048


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """Whole batches: points, and which of ten fixed directions each of them follows most."""

    def __len__(self) -> int:
        return NUM_STEPS

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        directions = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
        draw = torch.Generator().manual_seed(step + 1)
        points = torch.randn(BATCH_SIZE, 64, generator=draw)
        return points, (points @ directions).argmax(dim=1)


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10)
        )

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return LAMB(param_groups(self.model, weight_decay=0.01), lr=0.02)


if __name__ == "__main__":
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, max_epochs=1, gradient_clip_val=0.1, **quiet
    )
    module = Classifier()
    trainer.fit(module, DataLoader(Batches(), batch_size=None))
    points, labels = Batches()[NUM_STEPS]  # not seen before
    with torch.no_grad():
        print(f"loss {cross_entropy(module.model(points), labels):.6f}")
    for name, stats in trainer.optimizers[0].layer_stats().items():
        print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
