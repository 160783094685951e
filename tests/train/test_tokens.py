"""The tasks over tokens: what a sample is, what is held out, what the loss is, what is read."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from token_writers import megatron, plain
from torch import nn

from largebatch.train.data.mixture import Mixture
from largebatch.train.data.sampler import Sampler
from largebatch.train.tasks import sampler_of
from largebatch.train.tasks.bytes import Bytes
from largebatch.train.tasks.digits import Digits
from largebatch.train.tasks.text import Text
from largebatch.train.tasks.tokens import Tokens

VOCABULARY = 5000


class Bigram(nn.Module):
    """Logits by the last token alone."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocabulary, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.table(tokens)


def counting(tmp_path: Path, name: str, first: int, count: int) -> str:
    """A file of the tokens first, first + 1, …, so that a token tells its place."""
    plain(tmp_path / f"{name}.bin", range(first, first + count))
    return str(tmp_path / name)


def all_of(task: Tokens, count: int | None = None, seed: int = 0) -> list[int]:
    """The targets of the first `count` samples of an order, or of one epoch."""
    indices = sampler_of(task, seed).take(0, task.num_train if count is None else count)
    return task.train_batch(indices)[1].flatten().tolist()


def test_an_epoch_trains_on_every_token_once_but_the_first_and_a_tail(tmp_path: Path) -> None:
    train, held_out = counting(tmp_path, "a", 0, 1004), counting(tmp_path, "b", 2000, 101)
    task = Tokens(train, None, 10, VOCABULARY, "uint16", eval_path=held_out)
    assert (task.num_train, task.num_eval) == (100, 10)
    order = sampler_of(task, 0)
    for epoch in range(3):
        inputs, targets = task.train_batch(order.take(100 * epoch, 100))
        assert inputs.shape == targets.shape == (100, 10)
        assert inputs.dtype == targets.dtype == torch.int64
        assert (inputs + 1 == targets).all()
        assert sorted(targets.flatten().tolist()) == list(range(1, 1001))
    _, targets = task.eval_batch(np.arange(10))
    assert sorted(targets.flatten().tolist()) == list(range(2001, 2101))


def test_documents_run_on_as_they_stand_in_the_file(tmp_path: Path) -> None:
    documents = [[[1, 2, 3, 0]], [[4, 5, 0]], [[6, 7, 8, 9, 10, 0]]]  # 0 separates them
    megatron(tmp_path / "set", documents, "int32")
    path = str(tmp_path / "set")
    task = Tokens(path, None, 4, 11, eval_path=path)
    inputs, targets = task.train_batch(np.arange(3))
    assert inputs.tolist() == [[1, 2, 3, 0], [4, 5, 0, 6], [7, 8, 9, 10]]
    assert targets.tolist() == [[2, 3, 0, 4], [5, 0, 6, 7], [8, 9, 10, 0]]


def test_the_end_of_each_source_is_held_out_and_never_trained_on(tmp_path: Path) -> None:
    sources = {
        "a": {"path": counting(tmp_path, "a", 0, 1001), "weight": 3},
        "b": {"path": counting(tmp_path, "b", 2000, 501), "weight": 1},
    }
    task = Tokens(None, sources, 10, VOCABULARY, "uint16", eval_fraction=0.2)
    assert task.num_train == 80 + 40
    trained = all_of(task, 4000)
    _, evaluated = task.eval_batch(np.arange(task.num_eval))
    assert set(trained) == set(range(1, 801)) | set(range(2001, 2401))
    assert not set(trained) & set(evaluated.flatten().tolist())
    # By weight, and none twice: 20 of a's 20, and with them 7 of b's 10.
    evaluated_on = evaluated[:, 0].tolist()
    assert len(set(evaluated_on)) == len(evaluated_on) == task.num_eval == 27
    assert sum(token < 2000 for token in evaluated_on) == 20
    assert set(evaluated.flatten().tolist()) <= set(range(801, 1001)) | set(range(2401, 2501))


def test_the_evaluation_set_is_no_more_than_256_and_the_same_for_every_seed(
    tmp_path: Path,
) -> None:
    path = counting(tmp_path, "a", 0, 4001)
    task = Tokens(path, None, 2, VOCABULARY, "uint16", eval_fraction=0.5)
    assert task.num_eval == 256
    fewer = Tokens(path, None, 2, VOCABULARY, "uint16", eval_fraction=0.5, num_eval=20)
    assert fewer.num_eval == 20
    some = np.arange(20)
    assert task.eval_batch(some)[0].tolist() == fewer.eval_batch(some)[0].tolist()
    for more in (1001, 10**12):
        with pytest.raises(ValueError, match=rf"task\.num_eval must be at most 1000.*got {more}"):
            Tokens(path, None, 2, VOCABULARY, "uint16", eval_fraction=0.5, num_eval=more)


def test_several_files_are_one_source_and_several_sources_have_their_weights(
    tmp_path: Path,
) -> None:
    a, b = counting(tmp_path, "a", 0, 101), counting(tmp_path, "b", 200, 101)
    c = counting(tmp_path, "c", 1000, 51)
    sources = {"two": {"path": [a, b], "weight": 0.75}, "one": {"path": c, "weight": "0.25"}}
    task = Tokens(None, sources, 10, VOCABULARY, "uint16", eval_path=c)
    assert task.num_train == 25
    firsts = np.array(all_of(task, 800)[::10])
    of_one = firsts > 1000
    for start, end in [(0, 4), (0, 40), (13, 413), (100, 800)]:
        assert abs(of_one[start:end].sum() - (end - start) / 4) <= 2
    # The two files are one source: an epoch of it holds each window once.
    of_two = firsts[~of_one]
    assert sorted(of_two[:20].tolist()) == [*range(1, 101, 10), *range(201, 301, 10)]
    assert sorted(firsts[of_one][:5].tolist()) == list(range(1001, 1051, 10))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_order_is_one_however_ranks_share_it_and_wherever_it_goes_on(
    ranks: int, tmp_path: Path
) -> None:
    sources = {
        "a": {"path": counting(tmp_path, "a", 0, 501), "weight": 2},
        "b": {"path": counting(tmp_path, "b", 2000, 301), "weight": 1},
    }
    whole = all_of(Tokens(None, sources, 10, VOCABULARY, "uint16"), 96, seed=5)
    task = Tokens(None, sources, 10, VOCABULARY, "uint16")  # as a run that goes on would make it
    share, found = 16 // ranks, []
    for position in range(32, 96, 16):
        for rank in range(ranks):
            indices = sampler_of(task, 5).take(position + rank * share, share)
            found += task.train_batch(indices)[1].flatten().tolist()
    assert found == whole[32 * 10 :]


def test_a_task_without_an_order_of_its_own_keeps_the_one_it_had() -> None:
    assert sampler_of(Digits(), 3) == Sampler(1437, 3, False)
    words = Bytes(num_bytes=40_000)
    assert sampler_of(words, 3) == Sampler(words.num_train, 3, True)


def test_the_loss_is_the_mean_over_tokens_in_fp32(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 50, 2001)
    plain(tmp_path / "a.bin", tokens.tolist())
    task = Tokens(str(tmp_path / "a"), None, 20, 50, "uint16")
    torch.manual_seed(0)
    model = Bigram(50)
    inputs, targets = batch = task.train_batch(np.arange(30))
    table = model.table.weight.detach().double()
    expected = 0.0
    for before, after in zip(inputs.flatten().tolist(), targets.flatten().tolist(), strict=True):
        row = [math.exp(value) for value in table[before].tolist()]
        expected -= math.log(row[after] / sum(row)) / 600
    assert task.loss(model, batch).item() == pytest.approx(expected, rel=1e-6)
    lowered = task.loss(model.bfloat16(), batch)
    assert lowered.dtype == torch.float32
    # The mean over a batch is the mean of its halves: all samples have equally many tokens.
    model.float()
    halves = [tuple(part[cut] for part in batch) for cut in (slice(0, 15), slice(15, 30))]
    together = sum(task.loss(model, half).item() for half in halves) / 2
    assert together == pytest.approx(task.loss(model, batch).item(), rel=1e-6)


A = {"path": "a", "weight": 1}
WRONG = {
    "neither a path nor sources": ({}, ["task.path", "task.sources"]),
    "both": ({"path": "a", "sources": {"x": A}}, ["not both"]),
    "an empty list": ({"path": []}, ["task.path", "empty list"]),
    "sources that are a list": ({"sources": ["a"]}, ["task.sources must be", "['a']"]),
    "no sources": ({"sources": {}}, ["task.sources must be"]),
    "a source without a weight": (
        {"sources": {"x": {"path": "a"}}},
        ["task.sources.x must be {path: PREFIX, weight: 1}"],
    ),
    "a weight that is no number": (
        {"sources": {"x": A | {"weight": "much"}}},
        ["task.sources.x.weight", "much", "> 0"],
    ),
    "a weight of 0": ({"sources": {"x": A | {"weight": 0}}}, ["task.sources.x.weight", "> 0"]),
    "a file that is not there": ({"path": "nowhere"}, ["task.path=nowhere", "nowhere.bin"]),
    "a number for a path": ({"path": 2024}, ["task.path=2024", "2024.bin"]),
    "a source that is not there": (
        {"sources": {"x": A | {"path": "nowhere"}}},
        ["task.sources.x=nowhere"],
    ),
    "an evaluation file that is not there": (
        {"path": "a", "eval_path": "nowhere"},
        ["task.eval_path=nowhere"],
    ),
    "half a token": ({"path": "a", "sequence_length": 0.5}, ["task.sequence_length", "0.5"]),
    "a sequence longer than the file": (
        {"path": "a", "sequence_length": 1000},
        ["task.path", "1001 tokens", "the longest has 1000"],
    ),
    "a file of one sequence with nothing to hold out": (
        {"path": "a", "sequence_length": 700},
        ["a.bin", "held out", "task.eval_path"],
    ),
    "no vocabulary": ({"path": "a", "vocabulary": None}, ["task.vocabulary must be given: "]),
    "no vocabulary where the file knows": (
        {"path": "known", "vocabulary": None},
        ["task.vocabulary must be given (257"],
    ),
    "a vocabulary below the tokenizer's": (
        {"path": "known", "vocabulary": 256},
        ["at least 257", "known.bin", "got 256"],
    ),
    "tokens outside the vocabulary": (
        {"path": "a", "vocabulary": 990},
        ["a.bin", "990 at place 990", "task.vocabulary is 990"],
    ),
    "no type": ({"path": "a", "dtype": None}, ["a.bin", "task.dtype=uint16"]),
    "an unknown type": ({"path": "a", "dtype": "float32"}, ["task.dtype", "float32"]),
    "all of it held out": ({"path": "a", "eval_fraction": 1.0}, ["task.eval_fraction", "<= 0.5"]),
    "nothing held out": ({"path": "a", "eval_fraction": 0}, ["task.eval_fraction", "> 0"]),
    "a broken Megatron dataset": ({"path": "broken"}, ["broken.idx", "cut short"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_trained_on_is_refused_in_a_sentence(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain(Path("a.bin"), range(1000))
    plain(Path("known.bin"), [1] * 1000)
    known = {"format": "largebatch tokens 1", "dtype": "uint16", "tokens": 1000, "vocabulary": 257}
    Path("known.json").write_text(json.dumps(known))
    megatron(Path("broken"), [[[1] * 500], [[2] * 500]])
    index = Path("broken.idx").read_bytes()
    Path("broken.idx").write_bytes(index[:50] + b"\x09" + index[51:])
    change, told = WRONG[case]
    keywords = {"sequence_length": 10, "vocabulary": VOCABULARY, "dtype": "uint16"}
    if "known" in str(change) or "broken" in str(change):
        keywords["dtype"] = None
    with pytest.raises(ValueError, match=r"task|bin|idx") as refusal:
        Tokens(**(keywords | change))
    assert all(word in str(refusal.value) for word in told), str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_hash_is_that_of_the_data_and_not_of_its_name(tmp_path: Path) -> None:
    def hashed(name: str, last: int) -> str:
        path = plain(tmp_path / f"{name}.bin", [*range(500), last])
        return Tokens(str(path), None, 10, VOCABULARY, "uint16").provenance()["data_hash"]

    assert hashed("a", 7) == hashed("b", 7) != hashed("c", 8)
    assert len(hashed("a", 7)) == 64


# A file of 2**33 tokens, 16 GiB, none of which is on the disk but where it is written to; samples
# of 16 tokens, so that an array with a number for each would take 4 GiB.
HUGE = """
import json, resource, sys
from pathlib import Path
import numpy as np
from largebatch.train.tasks import sampler_of
from largebatch.train.tasks.tokens import Tokens

def mapped():
    rows = Path("/proc/self/smaps").read_text().splitlines()
    at = next(i for i, row in enumerate(rows) if row.endswith("huge.bin"))
    return next(int(row.split()[1]) for row in rows[at:] if row.startswith("Rss:"))

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
task = Tokens("huge", None, 16, 7, "uint16", eval_fraction=0.25)
order = sampler_of(task, 0)
seen = set()
for step in range(10):
    indices = order.take(step * 32, 32)
    seen.update(indices.tolist())
    task.train_batch(indices)
task.eval_batch(np.arange(task.num_eval))
task.provenance()
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([task.num_train, len(seen), min(seen), max(seen), after - before, mapped()]))
"""


def test_a_rank_reads_its_samples_of_a_huge_file_and_holds_no_list_of_them(tmp_path: Path) -> None:
    with (tmp_path / "huge.bin").open("wb") as file:
        file.truncate(2**34)
    done = subprocess.run(
        [sys.executable, "-c", HUGE],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    num_train, distinct, least, most, grown_kib, mapped_kib = json.loads(done.stdout)
    windows = (2**33 - 1) // 16
    assert num_train == windows - round(windows * 0.25)
    assert distinct == 320
    assert least < num_train / 20 < num_train * 0.95 < most  # from all over the file
    # 320 samples, 256 of the evaluation, 64 stretches and 3 probes: a page or two each.
    assert mapped_kib <= 2 * 4 * (320 + 256 + 64 + 3)
    assert grown_kib < 150 * 1024


def test_text_predicts_each_byte_of_the_sequences_that_bytes_draws() -> None:
    text = Text(num_bytes=40_000, sequence_length=32, num_eval=16)
    words = Bytes(num_bytes=40_000, context=32, num_eval=16)
    indices = np.array([0, 5, 991, 992, 20_000])
    inputs, targets = text.train_batch(indices)
    context, following = words.train_batch(indices)
    assert inputs.tolist() == context.tolist()
    assert targets[:, :-1].tolist() == context[:, 1:].tolist()
    assert targets[:, -1].tolist() == following.tolist()
    assert (text.num_train, text.num_eval) == (words.num_train, 16)
    assert [part.shape for part in text.eval_batch(np.arange(16))] == [(16, 32), (16, 32)]
    assert text.provenance()["data_hash"] == words.provenance()["data_hash"]
    model = Bigram(96)
    assert text.loss(model, (inputs, targets)).shape == ()


def test_a_mixture_is_what_the_loop_asks_of_an_order(tmp_path: Path) -> None:
    task = Tokens(counting(tmp_path, "a", 0, 101), None, 10, VOCABULARY, "uint16")
    order = sampler_of(task, 9)
    assert isinstance(order, Mixture)
    assert isinstance(order, Sampler)
    assert (order.seed, order.num_samples, order.replacement) == (9, task.num_train, False)
