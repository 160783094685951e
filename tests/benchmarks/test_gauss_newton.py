"""Layer-wise Gauss-Newton: its products, solves and steps are those of a dense matrix in float64.

The dense matrix comes from Jacobians by central differences of a forward pass in numpy.
"""

import csv
import math
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.special import erf
from torch import Tensor
from torch.nn.functional import cross_entropy

from largebatch.benchmarks.gauss_newton import command, training
from largebatch.benchmarks.gauss_newton.blocks import (
    Blocks,
    conjugate_gradients,
    gradients_of,
    layers_of,
)
from largebatch.benchmarks.gauss_newton.command import METHOD, SearchOfAll, Solver, configured
from largebatch.benchmarks.gauss_newton.training import (
    Asked,
    GaussNewton,
    check_loss,
    evaluated,
    run_to_target,
)
from largebatch.common.errors import ConfigError
from largebatch.conf.build import build
from largebatch.study.floor import read_floor
from largebatch.study.protocol.search import Result
from largebatch.train.models import ByteMLP
from largebatch.train.tasks.digits import Digits

Array = npt.NDArray[np.float64]

SHAPES = [[(7, 3)], [(5, 6), (5,)], [(7, 5), (7,)]]
"""Of a ByteMLP of two symbols out of seven, by layers."""


@pytest.fixture
def model() -> ByteMLP:
    torch.manual_seed(3)
    return ByteMLP(context=2, embedding=3, hidden=5, vocabulary=7).double()


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    symbols = torch.randint(7, (11, 3), generator=torch.Generator().manual_seed(5))
    return symbols[:, :-1], symbols[:, -1]


def logits_of(layers: list[Array], symbols: npt.NDArray[np.int64]) -> Array:
    """The forward pass of the model whose layers are these vectors; (samples, classes)."""
    tensors = [
        [part.reshape(shape) for part, shape in zip(np.split(vector, ends), shapes, strict=True)]
        for vector, shapes in zip(layers, SHAPES, strict=True)
        for ends in [np.cumsum([math.prod(shape) for shape in shapes])[:-1]]
    ]
    (embedding,), (first, first_bias), (second, second_bias) = tensors
    hidden = embedding[symbols].reshape(len(symbols), -1) @ first.T + first_bias
    hidden = hidden * 0.5 * (1 + erf(hidden / math.sqrt(2)))
    return np.asarray(hidden @ second.T + second_bias)


def weights_of(model: ByteMLP) -> list[Array]:
    return [
        np.concatenate([param.detach().numpy().ravel() for param in layer])
        for layer in layers_of(model)
    ]


def dense(layers: list[Array], place: int, symbols: npt.NDArray[np.int64]) -> Array:
    """G_l = mean of J_lᵀ (diag(p) - p pᵀ) J_l over the samples."""
    logits = logits_of(layers, symbols)
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    columns = []
    for entry in range(len(layers[place])):
        moved = [[*layers] for _ in range(2)]
        for sign, one in zip((1, -1), moved, strict=True):
            one[place] = layers[place].copy()
            one[place][entry] += sign * 1e-5
        columns.append((logits_of(moved[0], symbols) - logits_of(moved[1], symbols)) / 2e-5)
    jacobian = np.stack(columns, axis=2)  # (samples, classes, parameters)
    curved = chances[:, :, None] * jacobian
    curved -= chances[:, :, None] * np.sum(curved, axis=1, keepdims=True)
    return np.asarray(np.einsum("scp,scq->pq", jacobian, curved) / len(symbols))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_products_and_solves_are_those_of_the_dense_block(
    model: ByteMLP, batch: tuple[Tensor, Tensor], place: int
) -> None:
    blocks = Blocks(model, batch[0])
    matrix = dense(weights_of(model), place, batch[0].numpy())
    vector = torch.randn(len(matrix), dtype=torch.float64)
    assert blocks.product(place, vector).numpy() == pytest.approx(
        matrix @ vector.numpy(), rel=1e-6, abs=1e-9
    )
    signs = torch.sign(vector)
    trace = signs.numpy() @ matrix @ signs.numpy() / len(matrix)
    assert float(blocks.mean_curvature(place, signs)) == pytest.approx(trace, rel=1e-6)

    def damped(one: Tensor) -> Tensor:
        return blocks.product(place, one) + 0.01 * one

    gradient = gradients_of(model, *batch)[place]
    exact = np.linalg.solve(matrix + 0.01 * np.eye(len(matrix)), gradient.numpy())
    found = conjugate_gradients(damped, gradient, 1e-9, 200)
    assert found.vector.numpy() == pytest.approx(exact, rel=1e-5, abs=1e-8)
    early = conjugate_gradients(damped, gradient, 0.1, 200)
    left = gradient - damped(early.vector)
    assert 1e-4 < float(left.norm() / gradient.norm()) <= 0.1
    assert early.products < found.products
    assert conjugate_gradients(damped, gradient, 1e-9, 2).products == 2


def test_a_step_is_the_rate_times_the_best_length_of_the_damped_solutions(
    model: ByteMLP, batch: tuple[Tensor, Tensor]
) -> None:
    before = weights_of(model)
    grads = [gradient.numpy() for gradient in gradients_of(model, *batch)]
    generator = torch.Generator().manual_seed(0)
    directions = []
    for place, grad in enumerate(grads):
        matrix = dense(before, place, batch[0][:8].numpy())
        signs = torch.randint(2, (len(grad),), generator=generator).numpy() * 2.0 - 1
        damping = 0.3 * (signs @ matrix @ signs) / len(grad)
        directions.append(np.linalg.solve(matrix + damping * np.eye(len(grad)), grad))

    def loss(power: int) -> float:
        moved = [w - 2 ** (power / 2) * d for w, d in zip(before, directions, strict=True)]
        logits = torch.from_numpy(logits_of(moved, batch[0].numpy()))
        return float(cross_entropy(logits, batch[1]))

    best = min(range(-10, 3), key=loss)
    assert -10 < best < 2
    method = GaussNewton(model, 0.3, tolerance=1e-9, most_products=200, curvature_samples=8)
    method.step(*batch, lr=0.25)
    for after, weight, direction in zip(weights_of(model), before, directions, strict=True):
        assert after == pytest.approx(weight - 0.25 * 2 ** (best / 2) * direction, abs=1e-5)


def asked(**changes: Any) -> Asked:
    known: dict[str, Any] = {
        "batch_size": 256, "lr": 0.7, "damping": 0.3, "seed": 2, "most_steps": 20,
        "tolerance": 0.1, "most_products": 10, "curvature_samples": 256,
    }  # fmt: skip
    return Asked(**known | changes)


def test_a_run_ends_where_its_evaluations_cross_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config, _ = configured(["study=digits", "evaluation.growth=1.5"])
    losses: list[float] = []

    def noted(task: Any, model: Any) -> Any:
        found = evaluated(task, model)
        losses.append(found.loss)
        return found

    monkeypatch.setattr(training, "evaluated", noted)
    task = build(config.task, "task")
    found = run_to_target(config, task, asked())
    # After steps 1, 2, 3, 5, 8 and 12: the crossing lies between the last two, log steps by loss.
    steps = [1, 2, 3, 5, 8, 12][: len(losses)]
    assert len(steps) == len(losses) >= 4
    assert losses[-1] <= 0.1 < min(losses[:-1])
    share = (losses[-2] - 0.1) / (losses[-2] - losses[-1])
    assert found.steps == pytest.approx(steps[-2] * (steps[-1] / steps[-2]) ** share)
    assert run_to_target(config, task, asked(most_steps=2)) == Result(None, losses[1])


class AtOnce(Executor):
    """Makes each run as it is asked for."""

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(fn(*args, **kwargs))
        return done


def test_the_search_is_the_studys_and_its_file_is_what_the_report_and_it_itself_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asks: list[Asked] = []

    def needed(config: Any, setting: Asked) -> Result:
        asks.append(setting)
        best = 0.5 * math.sqrt(setting.batch_size / 4096)
        off = abs(math.log2(setting.lr / best)) + abs(math.log10(setting.damping / 0.9))
        steps = (4 + 20_000 / setting.batch_size) * (1 + off) * (1 + setting.seed / 100)
        return Result(steps if steps <= setting.most_steps else None, 2.2)

    def search(path: Path, products: int = 10) -> SearchOfAll:
        found = SearchOfAll(config, task, Solver(0.1, products, 256), path)
        found.run(AtOnce())
        return found

    monkeypatch.setattr(command, "made", needed)
    config, task = configured(["study=second_order", "study.batch_sizes=[1024,4096,16384]"])
    path = tmp_path / "of" / "oracle.csv"
    told = list(search(path).told())
    assert [line.split()[0] for line in told] == ["1,024", "4,096", "16,384"]
    assert "lr 0.5, damping 0.9" in told[1]
    floor = read_floor(path)
    assert (floor.name, floor.task, floor.target) == (METHOD, "bytes", "loss 2.3")
    assert [point.batch_size for point in floor.points] == [1024, 4096, 16384]
    steps = floor.points[1].steps
    assert steps is not None
    mean = math.prod(1 + seed / 100 for seed in range(2, 7)) ** 0.2
    assert steps.value == pytest.approx((4 + 20_000 / 4096) * mean, rel=1e-4)
    with path.open(encoding="utf-8") as file:
        chosen = [row for row in csv.DictReader(file) if row["chosen"] == "true"]
    assert sorted({row["seed"] for row in chosen}) == ["2", "3", "4", "5", "6"]

    kept, made = path.read_text(encoding="utf-8"), len(asks)
    lines = kept.splitlines(keepends=True)
    path.write_text("".join(lines[:-5]), encoding="utf-8")
    assert list(search(path).told()) == told
    assert path.read_text(encoding="utf-8") == kept
    assert len(asks) == made + 5  # what was lost, and no other
    with pytest.raises(ValueError, match="another study, model or solver"):
        search(path, products=11)


def test_other_losses_are_refused(model: ByteMLP, capsys: pytest.CaptureFixture[str]) -> None:
    class Scaled(Digits):
        def loss(self, model: Any, batch: Any) -> Tensor:
            return 2 * super().loss(model, batch)

    digits = torch.nn.Linear(64, 10)
    check_loss(Digits(), digits)
    with pytest.raises(ConfigError, match="is not the mean cross-entropy"):
        check_loss(Scaled(), digits)
    with pytest.raises(ConfigError, match="a label a sample"):
        check_loss(Digits(), torch.nn.Unflatten(1, (8, 8)))
    assert command.main(["study=bytes_decay"]) == 2
    assert "study=second_order" in capsys.readouterr().err
    assert command.main(["study=second_order", "--products", "0"]) == 2
    assert "--products" in capsys.readouterr().err
