"""LAMB in the Hugging Face Trainer: `python examples/hf_trainer.py`.

`torchrun --nproc-per-node 2 examples/hf_trainer.py` comes to the same. A small GPT-2, initialised
at random, learns to count on in steps of 1 to 4.
"""

import math
import os
import tempfile
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers import get_linear_schedule_with_warmup as linear_with_warmup

from largebatch.optim import LAMB, param_groups

NUM_STEPS, GLOBAL_BATCH_SIZE, VOCABULARY, LENGTH = 100, 128, 64, 16
MODEL = {"vocab_size": VOCABULARY, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 2}
PLAIN = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}
BATCH_SIZE = GLOBAL_BATCH_SIZE // int(os.environ.get("WORLD_SIZE", "1"))


def sequences(num: int, seed: int) -> Any:
    draw = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCABULARY, (num, 1), generator=draw)
    stride = torch.randint(1, 5, (num, 1), generator=draw)
    tokens = (first + stride * torch.arange(LENGTH)) % VOCABULARY  # (num, LENGTH)
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(folder: str) -> None:
    set_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**MODEL, **PLAIN))
    # GPT-2 keeps queries, keys and values side by side in one weight: three layers.
    fused = {r"c_attn\.weight$": {"sizes": 3, "dim": 1}}
    optimizer = LAMB(param_groups(model, weight_decay=0.01, norm_groups=fused), lr=0.04)
    batches = {"per_device_train_batch_size": BATCH_SIZE, "max_steps": NUM_STEPS}
    quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True}
    trainer = Trainer(
        model,
        TrainingArguments(folder, **batches, **quiet),
        train_dataset=sequences(NUM_STEPS * GLOBAL_BATCH_SIZE, seed=1),
        eval_dataset=sequences(256, seed=2),
        optimizers=(optimizer, linear_with_warmup(optimizer, 10, NUM_STEPS)),
    )
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    if trainer.is_world_process_zero():
        # Only a sequence's second token has to be guessed, one of four.
        print(f"eval loss {loss:.6f}, at best {math.log(4) / (LENGTH - 1):.6f}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        train(folder)
