"""`largebatch train task=tokens`: one trajectory on one process and on two ranks, in the mixture's
order.
"""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from token_writers import megatron, plain

ReadRun = Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]]

VOCABULARY, LENGTH, BATCH, STEPS = 64, 16, 16, 12


SOURCES = {
    "web": {"path": "web", "weight": 0.75},
    "code": {"path": "code-*", "weight": 0.25},
}
WORDS = [
    "train", "task=tokens", "task.dtype=uint16", "task.eval_fraction=0.1", "seed=3",
    "task.sources={web:{path:web,weight:0.75},code:{path:'code-*',weight:0.25}}",
    f"task.vocabulary={VOCABULARY}", f"task.sequence_length={LENGTH}",
    "model=transformer", "model.dim=16", "model.depth=1", "model.heads=2",
    "optim=sgd", "optim.lr=0.1", "optim.momentum=0", "optim.nesterov=false",
    f"batch.size={BATCH}", "evaluation.growth=2", f"budget.tokens={LENGTH * BATCH * STEPS}",
]  # fmt: skip


def test_two_ranks_train_on_tokens_as_one_process_does_and_in_the_order_of_the_task(
    command: Callable[..., Any],
    read_run: ReadRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A Megatron dataset and two plain files, by weight."""
    import torch

    from largebatch.train.models import Transformer
    from largebatch.train.tasks.tokens import Tokens

    tokens = np.random.default_rng(0).zipf(1.5, 6000) % VOCABULARY
    megatron(tmp_path / "web", [[tokens[:1500].tolist()], [tokens[1500:3000].tolist()]], "int32")
    plain(tmp_path / "code-0.bin", tokens[3000:5000].tolist())
    plain(tmp_path / "code-1.bin", tokens[5000:].tolist())
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "-m"]
    runs = {}
    for name, launcher, micro in [("one", [], 4), ("two", torchrun, 8)]:
        more = [f"engine.micro_batch_size={micro}", f"hydra.run.dir={name}"]
        done = command(*WORDS, *more, launcher=launcher, OMP_NUM_THREADS="1")
        assert done.returncode == 0, done.stderr
        runs[name] = read_run(tmp_path / name)
    (one, summary), (two, other) = runs.values()
    assert (summary["data_parallel_size"], other["data_parallel_size"]) == (1, 2)
    assert len(one) == len(two) == STEPS
    for field, least in [("loss", STEPS), ("eval_loss", 4)]:
        pairs = [(a[field], b[field]) for a, b in zip(one, two, strict=True) if field in a]
        assert len(pairs) >= least
        assert max(abs(a - b) / a for a, b in pairs) <= 1e-5
    assert one[-1]["tokens"] == LENGTH * BATCH * STEPS

    # Step by step by hand, over the samples that the mixture has at each position.
    monkeypatch.chdir(tmp_path)
    task = Tokens(None, SOURCES, LENGTH, VOCABULARY, "uint16", eval_fraction=0.1)
    torch.manual_seed(3)
    model = Transformer(VOCABULARY, dim=16, depth=1, heads=2, max_length=LENGTH)
    for step, line in enumerate(one):
        samples = task.sampler(3).take(step * BATCH, BATCH)
        if step == 0:  # 12 of the first 16 are of the heavier source
            assert (samples < 168).sum() == 12
        inputs, targets = task.train_batch(samples)
        log_p = model(inputs).log_softmax(-1)
        loss = -log_p.gather(-1, targets[..., None]).mean()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter -= line["lr"] * parameter.grad
    assert summary["provenance"]["data_hash"] == task.provenance()["data_hash"]


def test_text_trains_a_transformer_on_the_bundled_corpus(
    train: Callable[..., int], read_run: ReadRun, tmp_path: Path
) -> None:
    words = ["task.num_bytes=4e4", "task.num_eval=8", "task.sequence_length=16", "target.loss=null"]
    more = ["optim=sgd", "optim.lr=1e-6", "batch.size=8", "budget.tokens=512"]
    assert train("task=text", *words, *more, "hydra.run.dir=run") == 0
    lines, summary = read_run(tmp_path / "run")
    assert [line["tokens"] for line in lines] == [128, 256, 384, 512]
    # Untrained, it holds all 96 symbols for about equally likely.
    assert all(abs(line["loss"] - math.log(96)) < 0.3 for line in lines)
    assert abs(summary["eval_loss"] - math.log(96)) < 0.3
