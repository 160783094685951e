"""A script of a user's on several ranks: two runs of their own model, one after the other."""

import os
import sys

import torch
from own_tasks import Sorted
from torch import nn

from largebatch.optim.sharding.layout import local
from largebatch.train import fit

for turn in range(2):
    torch.manual_seed(int(os.environ["RANK"]))
    result = fit(
        nn.Linear(64, 10), Sorted(), optimizer="lamb", batch_size=16, samples=64, lr=0.01,
        folder=f"run-{turn}", progress=False, overrides=sys.argv[1:],
    )  # fmt: skip
    total = sum(float(local(param).double().sum()) for param in result.model.parameters())
    print(f"{result.steps} {result.eval_loss!r} {result.metrics['accuracy']!r} {total!r}")
