"""What the linear rule's authors warn of (Goyal et al. 2017, arXiv:1706.02677, section 3), held."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from largebatch.distributed.ranks import Ranks
from largebatch.schedules import scale_lr
from largebatch.train.data.sampler import Sampler
from largebatch.train.engines.ddp import DDP
from largebatch.train.models import MLP
from largebatch.train.tasks.digits import Digits


def stepped(lr: float, loss_factor: float, **options: Any) -> Tensor:
    """Weights after one step of SGD on a loss times `loss_factor`."""
    weight = torch.nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=lr, **options)
    torch.autograd.backward(weight.pow(3).sum() * loss_factor)
    optimizer.step()
    return weight.detach()


def test_scaling_the_loss_is_not_scaling_the_learning_rate_where_weights_decay() -> None:
    lr = scale_lr(0.1, 256, 1024, "linear")
    torch.testing.assert_close(stepped(lr, 1.0), stepped(0.1, 4.0))
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    apart = stepped(0.1, 4.0, weight_decay=0.01) - stepped(lr, 1.0, weight_decay=0.01)
    torch.testing.assert_close(apart, (lr - 0.1) * 0.01 * weights)


def test_a_changed_learning_rate_needs_no_momentum_correction() -> None:
    # With the learning rate inside the momentum, v ← m (η'/η) v + η g; torch's stands outside.
    lrs = [0.1, 0.1, 0.4, 0.4, 0.05]
    grads = [torch.full((3,), float(value), dtype=torch.float64) for value in (1, -2, 3, 0.5, 1)]
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
    corrected, velocity, plain, plain_velocity = torch.zeros(4, 3, dtype=torch.float64)
    before = lrs[0]
    for lr, grad in zip(lrs, grads, strict=True):
        optimizer.param_groups[0]["lr"] = lr
        weight.grad = grad.clone()
        optimizer.step()
        velocity = 0.9 * (lr / before) * velocity + lr * grad
        plain_velocity = 0.9 * plain_velocity + lr * grad
        corrected, plain, before = corrected - velocity, plain - plain_velocity, lr
    torch.testing.assert_close(weight.detach(), corrected)
    assert not torch.allclose(weight.detach(), plain)


def test_the_gradient_is_the_mean_over_the_global_batch_however_uneven_its_parts() -> None:
    task = Digits()
    torch.manual_seed(0)
    engine = DDP(MLP(64, 8, 10), Ranks(), torch.device("cpu"), micro_batch_size=4)
    batch = task.train_batch(np.arange(10, dtype=np.int64))  # 4, 4 and 2
    engine.forward_backward(task, batch, 10)
    uneven = [p.grad.clone() for p in engine.model.parameters() if p.grad is not None]
    engine.model.zero_grad()
    torch.autograd.backward(task.loss(engine.model, batch))
    whole = [p.grad for p in engine.model.parameters() if p.grad is not None]
    assert uneven
    for part, mean in zip(uneven, whole, strict=True):
        torch.testing.assert_close(part, mean)


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_one_shuffle_of_all_samples_is_split_over_the_ranks(ranks: int) -> None:
    sampler, share = Sampler(96, 3, False), 16 // ranks
    taken = [
        index
        for step in range(6)
        for rank in range(ranks)
        for index in sampler.take(step * 16 + rank * share, share)
    ]
    assert sorted(taken) == list(range(96))
    assert taken == list(sampler.take(0, 96))
