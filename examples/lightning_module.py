"""LAMB in Lightning, which clips: `python examples/lightning_module.py`.

With PRECISION=bf16-mixed or 16-mixed too. In FP32 it ends where examples/plain_pytorch.py does.
"""

import os

import lightning
import torch
from torch import nn

from largebatch.optim import create

NUM_STEPS, BATCH_SIZE = 60, 2048
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def batch(step):
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ DIRECTIONS).argmax(dim=1)


class Classifier(lightning.LightningModule):
    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self):
        return create(self.model, "lamb", lr=0.02, weight_decay=0.01)


torch.manual_seed(0)
module, precision = Classifier(), os.environ.get("PRECISION", "32-true")
module.model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
trainer = lightning.Trainer(max_epochs=1, gradient_clip_val=0.1, precision=precision, **QUIET)
trainer.fit(module, torch.utils.data.DataLoader(range(NUM_STEPS), None, collate_fn=batch))
print(f"loss {module.training_step(batch(NUM_STEPS), 0):.6f}")
for name, stats in trainer.optimizers[0].layer_stats().items():
    print(f"{name:8} trust ratio {stats['trust_ratio']:.4f}")
