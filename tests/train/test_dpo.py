"""Preferences are learned as the paper's formulas say, and as well as they can be."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import dpo_tabular
import forked
import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from largebatch.train.models import Transformer
from largebatch.train.reporting.flops import flops_of, palm
from largebatch.train.tasks.dpo import DPO, log_probabilities
from largebatch.train.tasks.protein_pairs import (
    AMINO_ACIDS,
    HYDROPATHY,
    START,
    ProteinPairs,
)

LENGTH = 12
PAIRS = {"_target_": "largebatch.train.tasks.protein_pairs.ProteinPairs", "length": LENGTH}
SHAPE = {"vocabulary": 21, "dim": 32, "depth": 1, "heads": 4, "hidden": 64}
MODEL = {"_target_": "largebatch.train.models.Transformer"} | SHAPE


def dpo(**more: Any) -> DPO:
    given = {"num_train": 512, "num_eval": 64} | more.pop("pairs", {})
    keys = {"reference": MODEL, "seed": 5, "vocabulary": 21, "sequence_length": LENGTH}
    return DPO(**(keys | {"pairs": PAIRS | given} | more))


def initial(seed: int = 5) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(**SHAPE)  # type: ignore[arg-type]


def least_loss(margins: npt.NDArray[np.float64]) -> float:
    """The mean entropy of preferences between scores that differ so much, in nats."""
    sure = 1 / (1 + np.exp(-margins))
    return float(-(sure * np.log(sure) + (1 - sure) * np.log(1 - sure)).mean())


def moved(model: Transformer) -> Transformer:
    torch.manual_seed(99)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param), alpha=0.1)
    return model


def summed_log_probability(model: nn.Module, sequence: Tensor) -> float:
    """Of one sequence after its first token, one softmax after another."""
    total = 0.0
    for place in range(1, len(sequence)):
        scores = model(sequence[None, :place])[0, -1].detach().numpy()
        total += scores[sequence[place]] - math.log(np.exp(scores).sum())
    return total


def doubled(task: DPO, model: nn.Module) -> nn.Module:
    """Policy and reference in float64."""
    task.reference(torch.device("cpu")).double()
    return model.double()


def test_the_loss_is_equation_7() -> None:
    task = dpo(beta=0.3)
    model = doubled(task, moved(initial()))
    (pairs,) = task.train_batch(np.arange(6))
    frozen, losses, margins = initial().double(), [], []
    for preferred, other in pairs:
        ratio = [
            summed_log_probability(model, one) - summed_log_probability(frozen, one)
            for one in (preferred, other)
        ]
        margins.append(0.3 * ratio[0] - 0.3 * ratio[1])
        losses.append(-math.log(1 / (1 + math.exp(-margins[-1]))))
    assert max(map(abs, margins)) > 0.1  # the policy has left the reference
    assert task.margins(model, (pairs,)).tolist() == pytest.approx(margins, rel=1e-9, abs=1e-12)
    loss = float(task.loss(model, (pairs,)).detach())
    assert loss == pytest.approx(np.mean(losses), rel=1e-10)


def test_the_first_loss_is_ln_2_and_its_gradient_half_beta_of_the_likelihoods() -> None:
    """Section 4 of the paper: a weight of 1/2, log π(y_w) raised and log π(y_l) lowered."""
    task, model = dpo(beta=0.3), initial()
    doubled(task, model)
    batch = task.train_batch(np.arange(32))
    loss = task.loss(model, batch)
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-14)
    found = torch.autograd.grad(loss, list(model.parameters()))
    likelihoods = log_probabilities(model, batch[0].flatten(0, 1)).view(-1, 2)
    by_hand = -0.3 * 0.5 * (likelihoods[:, 0] - likelihoods[:, 1]).mean()
    expected = torch.autograd.grad(by_hand, list(model.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_any_split_of_the_batch_adds_up_to_the_loss_and_the_gradient_of_the_whole() -> None:
    task = dpo()
    model = doubled(task, moved(initial()))
    batch = task.train_batch(np.arange(24))

    def gradients(*parts: tuple[int, int]) -> list[Tensor]:
        losses = [
            task.loss(model, (batch[0][start:end],)) * (end - start) / 24 for start, end in parts
        ]
        total = torch.stack(losses).sum()
        return [total, *torch.autograd.grad(total, list(model.parameters()))]

    whole, split = gradients((0, 24)), gradients((0, 5), (5, 6), (6, 24))
    for one, other in zip(whole, split, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_the_reference_is_the_first_model_whatever_has_happened_since() -> None:
    """A function of configuration and seed: after training, on another rank, after a resumption."""
    expected = initial().state_dict()
    task = dpo()
    model = moved(initial())
    torch.rand(7)  # random numbers that the reference has to do without
    task.loss(model, task.train_batch(np.arange(4))).backward()  # type: ignore[no-untyped-call]
    reference = task.reference(torch.device("cpu"))
    for name, value in reference.state_dict().items():
        assert torch.equal(value, expected[name])
    assert not any(param.requires_grad for param in reference.parameters())
    assert not reference.training
    ours = {param.data_ptr() for param in model.parameters()}
    assert ours.isdisjoint(param.data_ptr() for param in reference.parameters())
    other = dpo(seed=6).reference(torch.device("cpu")).state_dict()
    assert not torch.equal(other["head.weight"], expected["head.weight"])


def test_making_the_reference_gives_its_random_numbers_back() -> None:
    task, model = dpo(), initial()
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    task.loss(model, task.train_batch(np.arange(4)))
    assert torch.equal(torch.rand(3), expected)


def test_arithmetic_is_counted_for_both_sequences_and_leaves_the_reference_alone() -> None:
    task = dpo()
    found = flops_of(initial, task)
    assert found is not None
    assert found.per_sample == 2 * palm(initial(), LENGTH)
    loss = task.loss(initial(), task.train_batch(np.arange(4)))
    assert float(loss.detach()) == pytest.approx(math.log(2), rel=1e-6)


def test_the_least_loss_is_that_of_the_reference_times_the_exponential_of_the_reward() -> None:
    """Over all sequences there are, with a policy that can be anything: at π ∝ π_ref exp(r/β), and
    Bradley & Terry's preferences of the reward r, the expected loss is as it must be and flat.
    """
    beta = 0.4
    task = DPO(
        {"_target_": "dpo_tabular.EveryPair"}, {"_target_": "dpo_tabular.Tabular"},
        seed=3, vocabulary=4, sequence_length=3, beta=beta,
    )  # fmt: skip
    rewards = np.random.default_rng(0).normal(size=len(dpo_tabular.SEQUENCES))
    started = np.insert(dpo_tabular.SEQUENCES, 0, dpo_tabular.LETTERS, axis=1)
    reference = task.reference(torch.device("cpu"))
    frozen = log_probabilities(reference, torch.from_numpy(started)).numpy()
    best = np.exp(frozen + rewards / beta)
    best /= best.sum()

    policy = dpo_tabular.Tabular()
    with torch.no_grad():
        for place, table in enumerate(policy.tables):
            # How probable every beginning is, of one letter more than the prefix.
            beginnings = best.reshape(3 ** (place + 1), -1).sum(1)
            table.copy_(torch.from_numpy(np.log(beginnings)).view(-1, 3))
    found = log_probabilities(policy, torch.from_numpy(started)).detach().exp()
    torch.testing.assert_close(found, torch.from_numpy(best), rtol=1e-12, atol=0)

    (pairs,) = task.train_batch(np.arange(task.num_train))
    (first, second) = np.array(task.pairs.ordered).T  # type: ignore[attr-defined]
    true = torch.from_numpy(rewards[first] - rewards[second])
    torch.testing.assert_close(task.margins(policy, (pairs,)).detach(), true)
    each = torch.stack([task.loss(policy, (pair[None],)) for pair in pairs])
    expected = (torch.sigmoid(true) * each).sum() / torch.sigmoid(true).sum()
    entropy = least_loss(true.numpy())
    assert float(expected.detach()) == pytest.approx(entropy, rel=1e-10)
    for grad in torch.autograd.grad(expected, list(policy.parameters())):
        assert float(grad.abs().max()) < 1e-12


def test_a_trained_policys_rewards_are_the_true_scores() -> None:
    """80 steps of 128 noisy preferences, then unseen pairs against the noiseless scores.

    A preference is wrong as often as Bradley & Terry make it; a policy that had learned to repeat
    its labels would be wrong as often. Half of that is asked, nine tenths of the loss that there is
    to be learned, and rewards in the true unit: a slope of 1.
    """
    steps, batch_size = 80, 128
    sizes = {"num_train": steps * batch_size, "num_eval": 2000, "hydropathy": 0.15, "sequon": 1.5}
    task, model = dpo(pairs=sizes), initial()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.01 * min(1, (step + 1) / 10) * (1 - step / steps)
        indices = np.arange(step * batch_size, (step + 1) * batch_size)
        loss = task.loss(model, task.train_batch(indices))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    (pairs,) = task.eval_batch(np.arange(task.num_eval))
    scores = ProteinPairs(LENGTH, hydropathy=0.15, sequon=1.5).score(pairs[..., 1:].numpy())
    true = scores[:, 0] - scores[:, 1]
    with torch.no_grad():
        learned = task.margins(model, (pairs,)).double().numpy()
    sure = 1 / (1 + np.exp(-true))
    label_errors = np.minimum(sure, 1 - sure).mean()
    assert 0.15 < label_errors < 0.25
    assert (np.sign(learned) != np.sign(true)).mean() < label_errors / 2
    # The loss in expectation over the preferences, so that their noise is no part of it.
    loss_now = (sure * np.logaddexp(0, -learned) + (1 - sure) * np.logaddexp(0, learned)).mean()
    to_learn = math.log(2) - least_loss(true)
    assert loss_now - least_loss(true) < to_learn / 10
    assert (learned * true).sum() / (true * true).sum() == pytest.approx(1.0, abs=0.15)


def test_a_score_is_the_hydropathy_of_its_residues_and_its_sequons() -> None:
    pairs = ProteinPairs(5, num_train=1, num_eval=1, hydropathy=0.5, sequon=10.0)
    sites = {"NASGG": 1, "NATGG": 1, "NPSGG": 0, "NAGGG": 0, "GGGNA": 0, "NNSTG": 2, "GGNGT": 1}
    letters = np.array([[AMINO_ACIDS.index(letter) for letter in word] for word in sites])
    by_hand = [
        10.0 * number + 0.5 * sum(HYDROPATHY[AMINO_ACIDS.index(letter)] for letter in word)
        for word, number in sites.items()
    ]
    assert pairs.score(letters).tolist() == pytest.approx(by_hand)
    assert HYDROPATHY[AMINO_ACIDS.index("I")] == 4.5  # the most and the least soluble
    assert HYDROPATHY[AMINO_ACIDS.index("R")] == -4.5


@pytest.fixture(scope="module")
def many() -> tuple[ProteinPairs, npt.NDArray[np.int64]]:
    pairs = ProteinPairs(LENGTH, num_train=20_000, num_eval=1000, hydropathy=0.1)
    return pairs, pairs.train_pairs(np.arange(20_000))


def test_preferences_are_drawn_as_bradley_and_terry_say(
    many: tuple[ProteinPairs, npt.NDArray[np.int64]],
) -> None:
    """In each range of score differences the better is preferred as often as it should be."""
    pairs, tokens = many
    scores = pairs.score(tokens[..., 1:])
    margins = scores[:, 0] - scores[:, 1]
    edges = np.quantile(np.abs(margins), np.linspace(0, 1, 11))
    for low, high in pairwise(edges):
        inside = (np.abs(margins) >= low) & (np.abs(margins) <= high)
        sure = 1 / (1 + np.exp(-np.abs(margins[inside])))
        deviation = math.sqrt((sure * (1 - sure)).sum())
        assert abs((margins[inside] > 0).sum() - sure.sum()) < 4 * deviation


def test_sequences_have_the_amino_acids_of_swiss_prot(
    many: tuple[ProteinPairs, npt.NDArray[np.int64]],
) -> None:
    _, tokens = many
    assert tokens.shape == (20_000, 2, 1 + LENGTH)
    assert (tokens[..., 0] == START).all()
    residues = tokens[..., 1:]
    shares = np.bincount(residues.ravel(), minlength=21) / residues.size
    assert shares[START] == 0
    for letter, share in {"L": 0.0965, "A": 0.0825, "W": 0.0110, "C": 0.0138}.items():
        # 480,000 draws: a deviation of 4e-4 for the most frequent; the shares sum to 99.97 %.
        assert shares[AMINO_ACIDS.index(letter)] == pytest.approx(share, abs=2e-3)
    assert len(np.unique(residues.reshape(-1, LENGTH), axis=0)) > 0.99 * 40_000


def test_held_out_pairs_are_others_and_the_same_for_every_size_of_evaluation(
    many: tuple[ProteinPairs, npt.NDArray[np.int64]],
) -> None:
    pairs, tokens = many
    held = pairs.eval_pairs(np.arange(1000))
    seen = {pair.tobytes() for pair in np.sort(tokens, axis=1)}
    assert not any(pair.tobytes() in seen for pair in np.sort(held, axis=1))
    fewer = ProteinPairs(LENGTH, num_train=20_000, num_eval=10, hydropathy=0.1)
    assert np.array_equal(fewer.eval_pairs(np.arange(10)), held[:10])
    assert fewer.provenance()["data_hash"] != pairs.provenance()["data_hash"]


def test_the_record_says_what_loss_the_scores_have() -> None:
    pairs = ProteinPairs(LENGTH, num_train=10, num_eval=40)
    losses = []
    for preferred, other in pairs.eval_pairs(np.arange(40))[..., 1:]:
        margin = float(pairs.score(preferred) - pairs.score(other))
        losses.append(-math.log(1 / (1 + math.exp(-margin))))
    assert f"a loss of {sum(losses) / 40:.4f} on those held out" in pairs.provenance()["data"]


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"beta": 0}, "task.beta must be a number > 0, got 0"),
        ({"vocabulary": 20}, "task.vocabulary must be 21 for these pairs, got 20"),
        ({"sequence_length": 11}, "task.sequence_length must be 12 for these pairs, got 11"),
        ({"pairs": {"length": 2}}, "task.pairs.length must be a whole number of at least 3"),
        ({"pairs": {"num_eval": 0}}, "task.pairs.num_eval must be a whole number of at least 1"),
        ({"pairs": {"motif": 1}}, "task.pairs: ProteinPairs does not take these keys"),
    ],
)
def test_what_cannot_be_is_refused(more: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dpo(**more)


def test_a_model_that_does_not_predict_every_token_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(21, 4), nn.Flatten(), nn.Linear(4 * LENGTH, 21))
    task = dpo()
    task.reference(torch.device("cpu"))
    with pytest.raises(ValueError, match=r"= \(6, 12, …\), got \(6, 21\): choose a language"):
        task.loss(model, task.train_batch(np.arange(3)))


SHORT = (
    "task=dpo", "task.sequence_length=8", "task.pairs.num_train=4096", "task.pairs.num_eval=64",
    "model.dim=16", "model.depth=1", "model.hidden=32", "optim.lr=0.01", "batch.size=64",
    "budget.samples=1600", "evaluation.growth=10", "seed=7", "target.loss=null",
)  # fmt: skip


def lines_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    texts = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(text) for text in texts if text.endswith("\n")]


def test_a_run_begins_at_its_reference_and_any_ranks_follow_its_trajectory(
    train: Callable[..., int], command: Callable[..., Any], tmp_path: Path
) -> None:
    assert train(*SHORT, "hydra.run.dir=one") == 0
    words = ["engine.nproc=2", "engine.micro_batch_size=16", "hydra.run.dir=two"]
    done = command("train", *SHORT, *words)
    assert done.returncode == 0, done.stderr
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    assert one[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert len(one) == len(two) == 25
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
    summary = json.loads((tmp_path / "one" / "summary.json").read_text())
    assert summary["eval_loss"] < 0.65  # a trajectory that stood still would agree too
    assert summary["provenance"]["data"].startswith("4096 preferences between synthetic proteins")


def test_a_run_that_was_killed_goes_on_with_the_same_reference(
    train: Callable[..., int], tmp_path: Path
) -> None:
    longer = (*SHORT, "budget.samples=3200")
    words = (*longer, "checkpoint.every_samples=512", "resume=auto")
    folder = tmp_path / "killed"
    process = forked.Popen(
        [sys.executable, "-m", "largebatch", "train", *words, f"hydra.run.dir={folder}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
    )
    try:
        while len(lines_of(folder)) < 10:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(lines_of(folder)) < 50
    assert train(*words, f"hydra.run.dir={folder}") == 0
    assert train(*longer, "hydra.run.dir=undisturbed") == 0
    found, expected = lines_of(folder), lines_of(tmp_path / "undisturbed")
    assert [line["loss"] for line in found] == [line["loss"] for line in expected]
