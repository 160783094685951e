"""Every source sees the same gradients, in every world: squared norms, and so one noise scale."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gloo_ranks import Outcome, launch, one_thread, successful
from noise_ranks import CLASSES, SAMPLES, Job, net, samples, work
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from largebatch.schedules import BatchSplit, NoiseScale
from largebatch.train.noise.example_gradients import ExampleGradients
from largebatch.train.noise.small_gradients import MicroBatchGradients, RankGradients, squares


def each_gradient(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The gradient of every sample, (samples, …) for each parameter, by autograd."""

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, parameters, (x[None],)), y[None])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found: dict[str, Tensor] = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    return found


def true_squares(of: int) -> dict[str, float]:
    """The mean squared norm of gradients over `of` consecutive samples each, in FP64."""
    each = each_gradient(net(torch.float64), *samples(torch.float64))
    return {
        name: float(g.unflatten(0, (-1, of)).mean(1).flatten(1).square().sum(1).mean())
        for name, g in each.items()
    }


ALONE = [Job("micro_batch", 2), Job("micro_batch", 4), Job("micro_batch", 8), Job("example"),
         Job("example", 3), Job("micro_batch", 4, loss_scale=2.0**12),
         Job("example", 1, loss_scale=2.0**12)]  # fmt: skip
TOGETHER = {
    2: [Job("rank"), Job("rank", 3), Job("micro_batch"), Job("micro_batch", 4), Job("example", 2),
        Job("sharded"), Job("sharded", 3), Job("rank", 2, loss_scale=2.0**12)],
    4: [Job("rank"), Job("rank", 2), Job("micro_batch", 2), Job("example"), Job("sharded"),
        Job("sharded", 2, loss_scale=2.0**12)],
}  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, Job], list[Outcome]]:
    """What the ranks of each world have found in each job."""
    with one_thread():
        outcomes = {(1, job): [job()] for job in ALONE}
    for size, jobs in TOGETHER.items():
        ranks = launch(work, jobs, size, tmp_path_factory.mktemp("ranks"))
        outcomes |= {(size, job): [rank[str(job)] for rank in ranks] for job in jobs}
    return outcomes


CASES = [(1, job) for job in ALONE] + [(n, job) for n, jobs in TOGETHER.items() for job in jobs]


@pytest.mark.parametrize(("size", "job"), CASES, ids=map(str, CASES))
def test_a_source_sees_the_gradients_that_autograd_gives(
    size: int, job: Job, found: dict[tuple[int, Job], list[Outcome]]
) -> None:
    outcomes = successful(found[size, job])
    for outcome in outcomes:
        assert outcome["small_batch"] == (
            1 if job.source == "example" else
            SAMPLES // size // (job.accumulation if job.source == "micro_batch" else 1)
        )  # fmt: skip
        for kind, of in (("small", outcome["small_batch"]), ("big", SAMPLES)):
            true = true_squares(of)
            for name, value in zip(outcome["names"], outcome[kind].tolist(), strict=True):
                # A source of groups names the module, else the parameter.
                within = sum(
                    v for key, v in true.items() if key == name or key.startswith(f"{name}.")
                )
                assert value == pytest.approx(within, rel=2e-6)
            assert float(outcome[kind].sum()) == pytest.approx(sum(true.values()), rel=1e-6)
        assert torch.equal(outcome["small"], outcomes[0]["small"])


def test_rank_accumulation_and_example_paths_give_one_noise_scale(
    found: dict[tuple[int, Job], list[Outcome]],
) -> None:
    """tr Σ and ‖G‖² from small gradients of any one size are those of the batch at that size."""
    readings: dict[int, list[tuple[float, float]]] = {}
    for key in CASES:
        outcome = found[key][0]
        noise = NoiseScale(half_life_samples=1)
        noise.update(
            small_sq_norm=float(outcome["small"].sum()), big_sq_norm=float(outcome["big"].sum()),
            small_batch=outcome["small_batch"], big_batch=SAMPLES,
        )  # fmt: skip
        reading = noise.reading()
        readings.setdefault(outcome["small_batch"], []).append(
            (reading.grad_sq_norm, reading.trace)
        )
    assert {size: len(same) for size, same in readings.items()} == {12: 7, 6: 6, 3: 3, 1: 5}
    for same in readings.values():
        for reading in same:
            assert reading == pytest.approx(same[0], rel=1e-5)


class Sequences(nn.Module):
    """Symbols, (samples, places), some of them twice in a sample, and a padding symbol."""

    def __init__(self, width: int, norm: type[nn.Module], padding: int | None) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, width, padding_idx=padding)
        self.norm = norm(width)
        self.mix = nn.Linear(width, width)
        self.last = nn.Linear(width, CLASSES, bias=False)

    def forward(self, symbols: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.mix(self.norm(self.embedding(symbols)))).mean(1))
        return out


@pytest.mark.parametrize("width", [3, 40])  # products of places, or of features: either way
@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("padding", [None, 0])
def test_sequences_are_seen_sample_by_sample(
    width: int, norm: type[nn.Module], padding: int | None
) -> None:
    torch.manual_seed(3)
    model = Sequences(width, norm, padding).double()
    x, y = torch.randint(0, 6, (10, 9)), torch.randint(0, CLASSES, (10,))
    each = each_gradient(model, x, y)
    source = ExampleGradients(model)
    assert source.missed == []
    torch.autograd.backward(cross_entropy(model(x), y))
    for name, value in zip(source.layers, source.part(BatchSplit(10)).tolist(), strict=True):
        true = float(each[name].flatten(1).square().sum(1).mean())
        assert value == pytest.approx(true, rel=1e-10), name


def test_evaluations_and_frozen_or_shared_layers_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.Conv1d(1, 1, 3), nn.Linear(5, 5), nn.Linear(5, 5))
    model[3].weight = model[2].weight
    model[2].bias.requires_grad = False
    source = ExampleGradients(model)
    assert [*source.layers] == ["0.weight", "0.bias", "3.bias"]
    assert source.missed == ["1.weight", "1.bias", "2.weight"]
    x = torch.randn(4, 7)

    def forward() -> Tensor:
        return model[3](model[2](model[1](model[0](x)[:, None])[:, 0])).square().mean()  # type: ignore[no-any-return]

    with torch.no_grad():
        forward()
    torch.autograd.backward(forward())
    assert torch.isfinite(source.part(BatchSplit(4))).all()


def test_tied_weights_are_one_layer_with_one_gradient() -> None:
    torch.manual_seed(0)
    one, two = nn.Linear(5, 5), nn.Linear(5, 5)
    two.weight = one.weight
    model = nn.Sequential(one, nn.Tanh(), two).double()
    source = MicroBatchGradients(model)
    x = torch.randn(6, 5, dtype=torch.float64)
    for half in (x[:3], x[3:]):
        torch.autograd.backward(model(half).square().mean() / 2)
    small = dict(zip(source.layers, source.part(BatchSplit(6, 1, 2)), strict=True))
    gradients = []
    for half in (x[:3], x[3:]):
        model.zero_grad()
        torch.autograd.backward(model(half).square().mean())
        gradients.append(one.weight.grad.square().sum())  # type: ignore[union-attr]
    assert float(small["0.weight"]) == pytest.approx(float(sum(gradients)) / 2, rel=1e-12)


def test_squares_of_half_precision_are_fp32() -> None:
    """4,096 equal bf16 elements: a bf16 norm would be off by 1e-3, fp16 squares would overflow."""
    for dtype, value in ((torch.bfloat16, 0.1), (torch.float16, 3e4)):
        layer = nn.Linear(64, 64, bias=False).to(dtype)
        source = MicroBatchGradients(layer)
        layer.weight.grad = None
        torch.autograd.backward(layer.weight, torch.full((64, 64), value, dtype=dtype))
        true = 4096 * float(torch.tensor(value, dtype=dtype)) ** 2
        assert float(source.part(BatchSplit(2))) == pytest.approx(true, rel=2e-5)
        assert float(squares(source.layers)) == pytest.approx(true, rel=2e-5)


def test_the_gradients_are_left_as_they_are() -> None:
    def gradients(source: Callable[[nn.Module], object]) -> list[Tensor]:
        model = net()
        kept = source(model)
        x, y = samples()
        torch.autograd.backward(cross_entropy(model(x), y))
        del kept
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients(lambda model: None)
    for source in (MicroBatchGradients, ExampleGradients):
        for one, other in zip(plain, gradients(source), strict=True):
            assert torch.equal(one, other)


def test_a_source_that_is_read_at_the_wrong_time_says_so() -> None:
    model = net()
    x, y = samples()
    micro, example = MicroBatchGradients(model), ExampleGradients(model)
    for source in (micro, example):
        with pytest.raises(RuntimeError, match=r"not at all|no backward pass"):
            source.part(BatchSplit(SAMPLES))
    torch.autograd.backward(cross_entropy(model(x), y))
    torch.autograd.backward(cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match=r"each gradient 1 time\(s\) in this step, and saw them"):
        micro.part(BatchSplit(SAMPLES))
    with pytest.raises(RuntimeError, match="saw 48 in 2: it is used more than once in a pass"):
        example.part(BatchSplit(SAMPLES))
    with pytest.raises(ValueError, match="none of the layers whose gradients are known"):
        ExampleGradients(nn.Conv1d(1, 1, 3))


def test_ranks_of_one_have_nothing_to_average(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        replica = nn.parallel.DistributedDataParallel(net())
        with pytest.raises(ValueError, match="from 2 ranks on, got 1"):
            RankGradients(replica)
    finally:
        torch.distributed.destroy_process_group()
