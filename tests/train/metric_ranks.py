"""An evaluation on gloo ranks: what one finds there."""

import torch
import torch.distributed as dist
from gloo_ranks import Outcome
from torch import Tensor, nn

from largebatch.distributed.ranks import Ranks
from largebatch.train.engines.ddp import DDP
from largebatch.train.evaluation import evaluate
from largebatch.train.models import MLP
from largebatch.train.tasks import Batch
from largebatch.train.tasks.digits import Digits
from largebatch.train.tasks.metrics import Metrics, accuracy


class ByParity(Digits):
    """Metrics that a rank may have no sample of, of floating point and counted on the device."""

    def metrics(self, model: nn.Module, batch: Batch) -> Metrics:
        logits, even = model(batch[0]), batch[1] % 2 == 0
        margins = logits.max(1).values - logits.min(1).values
        right: Tensor = (logits.argmax(1) == batch[1]) & even
        more = {"even": (right.sum(), even.sum()), "margin": (margins.sum(), len(margins))}
        return accuracy(logits, batch[1]) | more


def work(most: int) -> Outcome:
    """The evaluation by batches of at most so many samples, on as many ranks as there are."""
    there = dist.is_initialized()
    ranks = Ranks("test", dist.get_rank(), dist.get_world_size()) if there else Ranks()
    torch.manual_seed(0)
    engine = DDP(MLP(64, 8, 10), ranks, torch.device("cpu"))
    found = evaluate(ByParity(), engine, ranks, most)
    return {"loss": found.loss, **found.metrics}
