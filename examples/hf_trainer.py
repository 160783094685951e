"""LAMB in the Hugging Face Trainer: `python examples/hf_trainer.py`.

`torchrun --nproc-per-node 2 examples/hf_trainer.py` comes to the same. GPT-2 learns to count on.
"""

import os
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers import get_linear_schedule_with_warmup as linear_with_warmup

from largebatch.optim import create

NUM_STEPS, BATCH_SIZE = 100, 128 // int(os.environ.get("WORLD_SIZE", "1"))
SMALL = {"vocab_size": 64, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 2}
PLAIN = {"resid_pdrop": 0, "embd_pdrop": 0, "attn_pdrop": 0, "bos_token_id": 0, "eos_token_id": 0}


def sequences(num, draw):
    first = torch.randint(64, (num, 1), generator=draw)
    tokens = (first + torch.randint(1, 5, (num, 1), generator=draw) * torch.arange(16)) % 64
    return [{"input_ids": row, "labels": row} for row in tokens]


set_seed(0)
model = GPT2LMHeadModel(GPT2Config(**SMALL, **PLAIN))
fused = {r"c_attn\.weight$": {"sizes": 3, "dim": 1}}  # queries, keys, values: three layers
optimizer = create(model, "lamb", lr=0.04, weight_decay=0.01, norm_groups=fused)
quiet = {"save_strategy": "no", "report_to": "none", "use_cpu": True, "max_steps": NUM_STEPS}
with tempfile.TemporaryDirectory() as folder:
    words = TrainingArguments(folder, per_device_train_batch_size=BATCH_SIZE, **quiet)
    data = sequences(NUM_STEPS * 128 + 256, torch.Generator().manual_seed(1))
    optimizers = optimizer, linear_with_warmup(optimizer, 10, NUM_STEPS)
    trainer = Trainer(model, words, train_dataset=data[256:], optimizers=optimizers)
    trainer.train()
    loss = trainer.evaluate(data[:256])["eval_loss"]
if trainer.is_world_process_zero():  # one of four strides is to be guessed: ln(4) / 15 at best
    print(f"eval loss {loss:.6f}, at best 0.092420")
