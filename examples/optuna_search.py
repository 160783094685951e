"""Optuna looks for LAMB's learning rate and β₁: `python examples/optuna_search.py`."""

import optuna
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from largebatch.optim import create

NUM_STEPS, BATCH_SIZE = 30, 1024
DIRECTIONS = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))


def batch(step):
    points = torch.randn(BATCH_SIZE, 64, generator=torch.Generator().manual_seed(step + 1))
    return points, (points @ DIRECTIONS).argmax(dim=1)


def loss_after_training(trial):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.LayerNorm(256), nn.GELU(), nn.Linear(256, 10))
    betas = trial.suggest_float("beta1", 0.5, 0.95), 0.99
    optimizer = create(model, "lamb", lr=trial.suggest_float("lr", 1e-3, 1, log=True), betas=betas)
    for step in range(NUM_STEPS):
        points, labels = batch(step)
        optimizer.zero_grad()
        cross_entropy(model(points), labels).backward()
        optimizer.step()
    return cross_entropy(model(batch(NUM_STEPS)[0]), batch(NUM_STEPS)[1]).item()


optuna.logging.set_verbosity(optuna.logging.WARNING)
study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
study.optimize(loss_after_training, n_trials=20)
print(f"loss {study.best_value:.6f} at {study.best_params}")
