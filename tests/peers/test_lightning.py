"""Lightning with every optimizer and precision, and with its own clipping."""

import math
import warnings
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from six_optimizers import MAKES, Make, network, weights_of
from torch import Tensor
from torch.nn.functional import cross_entropy

pytestmark = pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed")


@pytest.fixture(scope="module")
def module_class() -> Any:
    """The class of a small network; its second batch overflows where told to."""
    from lightning import LightningModule  # two seconds, which not every worker has to spend

    class Module(LightningModule):
        def __init__(self, make: Make, overflows: bool) -> None:
            super().__init__()
            self.net, self.make, self.overflows = network(), make, overflows
            self.before: list[Tensor] = []
            self.moved: list[bool] = []

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            loss: Tensor = cross_entropy(self.net(batch).float(), batch[:, :4].argmax(dim=1))
            return loss * math.inf if self.overflows and index == 1 else loss

        def on_train_batch_start(self, batch: Tensor, index: int) -> None:
            self.before = weights_of(self.net)

        def on_train_batch_end(self, outputs: Any, batch: Tensor, index: int) -> None:
            same = map(torch.equal, self.before, weights_of(self.net))
            self.moved.append(not all(same))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.make(self.net)

    return Module


def precision_of(name: str) -> dict[str, Any]:
    """Lightning takes bf16 where FP16 is asked for on a CPU, unless it is given the plugin."""
    if name != "16-mixed":
        return {"precision": name}
    from lightning.pytorch.plugins import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES)
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_lightning_trains_and_clips(make: Make, precision: str, module_class: Any) -> None:
    from lightning import Trainer

    batches = [torch.randn(8, 6, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    module = module_class(make, overflows=precision == "16-mixed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=1,
            gradient_clip_val=0.5,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            **precision_of(precision),
        )
        trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert module.moved == [True, precision != "16-mixed", True]
    assert all(torch.isfinite(weight).all() for weight in weights_of(module.net))
