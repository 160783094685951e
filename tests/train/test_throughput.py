"""A utilisation is what its formula and its peak say, and says which they were."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.train.data.sampler import Indices
from largebatch.train.models import MLP, HuggingFace, Transformer
from largebatch.train.reporting.flops import (
    FORMULAS,
    Flops,
    flops_of,
    megatron,
    megatron_recompute,
    palm,
)
from largebatch.train.reporting.throughput import PEAKS, Peak, Throughput, chosen, peaks_of
from largebatch.train.tasks import Batch
from largebatch.train.tasks.digits import Digits

MAX_1550 = "Intel(R) Data Center GPU Max 1550"


class Tokens:
    """Sequences for a language model, `passes` of them through it for one sample."""

    num_train = num_eval = 8
    replacement = True

    def __init__(self, length: int, passes: int = 1) -> None:
        self.length, self.passes = length, passes

    def train_batch(self, indices: Indices) -> Batch:
        return (torch.zeros(len(indices), self.length, dtype=torch.int64),)

    eval_batch = train_batch

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        (tokens,) = batch
        logits = [model(tokens) for _ in range(self.passes)]
        return cross_entropy(
            torch.cat(logits).flatten(0, 1), tokens.repeat(self.passes, 1).view(-1)
        )

    def provenance(self) -> Mapping[str, str]:
        return {}


def small(**more: object) -> Transformer:
    shape = {"vocabulary": 50, "dim": 24, "depth": 3, "heads": 4, "hidden": 40, "max_length": 64}
    return Transformer(**(shape | more))  # type: ignore[arg-type]


def test_the_formula_is_the_sum_of_the_products_by_hand() -> None:
    """Each of dim 24, width 40, 2 of 4 keys and values, 3 blocks, 50 symbols, 16 tokens."""
    projections = 24 * 24 + 24 * 12 + 24 * 12 + 24 * 24
    products = 3 * (projections + 3 * 24 * 40) + 24 * 50  # multiply-adds per token
    scores_and_mix = 3 * (2 * 4 * 6 * 16)  # 4 heads of width 6 over 16 places, twice
    # 2 for multiply and add, 3 for forward and twice as much backward.
    assert palm(small(kv_heads=2), 16) == 16 * 2 * 3 * (products + scores_and_mix)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_formula_is_what_torch_counts(kv_heads: int, tied: bool, passes: int) -> None:
    def make() -> Transformer:
        return small(kv_heads=kv_heads, tie_embeddings=tied)

    task = Tokens(16, passes)
    closed, counted = flops_of(make, task), flops_of(make, task, "counted")
    assert closed is not None
    assert counted is not None
    assert (closed.formula, counted.formula) == ("palm", "counted")
    assert closed.per_sample == counted.per_sample == passes * palm(make(), 16)


def test_megatrons_formula_is_palms_for_the_shape_that_it_assumes() -> None:
    """12h² weights a block: multi-head attention, and a SwiGLU of 8/3 h."""
    model = small(hidden=64)
    assert megatron(model, 16) == pytest.approx(palm(model, 16), rel=1e-14)
    assert megatron(small(hidden=40), 16) > palm(small(hidden=40), 16)


def test_recomputation_adds_a_forward_pass_of_the_blocks_and_not_of_the_output() -> None:
    model, length = small(hidden=64), 16
    of_output = 6 * length * 24 * 50
    of_blocks = palm(model, length) - of_output
    with_it = of_blocks * 4 / 3 + of_output
    assert megatron_recompute(model, length) == pytest.approx(with_it, rel=1e-14)


def test_any_model_is_counted() -> None:
    inputs, hidden, outputs = 64, 32, 10
    found = flops_of(lambda: MLP(inputs, hidden, outputs), Digits())
    # No gradient of the images is made, so the first layer has one backward product.
    assert found == Flops(2.0 * (2 * inputs * hidden + 3 * hidden * outputs), "counted")


def test_a_hugging_face_model_is_counted_as_ours_of_its_shape() -> None:
    shape = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}

    found = flops_of(lambda: HuggingFace("llama", shape | heads), Tokens(16))
    assert found == Flops(palm(small(kv_heads=2), 16), "counted")


class NotOnTheCPU(MLP):
    def forward(self, inputs: Tensor) -> Tensor:
        raise RuntimeError(f"no kernel for {inputs.device.type}\nsecond line")


def test_a_model_that_runs_nowhere_but_on_its_device_is_not_counted_and_not_refused() -> None:
    """A run is not ended by what only describes it, unless it was asked for."""
    with pytest.warns(
        UserWarning, match=r"not counted \(.* on the cpu device: no kernel for cpu\)$"
    ):
        assert flops_of(lambda: NotOnTheCPU(64, 32, 10), Digits()) is None
    with pytest.raises(ValueError, match=r"formula=counted needs .*no kernel for cpu.* at null"):
        flops_of(lambda: NotOnTheCPU(64, 32, 10), Digits(), "counted")


def test_a_large_model_is_given_no_memory_to_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("largebatch.train.reporting.flops._MOST_ON_CPU", 1000)
    with pytest.warns(UserWarning, match="no kernel for meta\\)$"):
        assert flops_of(lambda: NotOnTheCPU(64, 32, 10), Digits()) is None


class NotOnMeta(MLP):
    def forward(self, inputs: Tensor) -> Tensor:
        scale = float(inputs.abs().max())  # a value that a tensor without memory does not have
        logits: Tensor = super().forward(inputs / scale)
        return logits


def test_a_model_that_needs_values_is_counted_with_them() -> None:
    found = flops_of(lambda: NotOnMeta(64, 32, 10), Digits())
    assert found == flops_of(lambda: MLP(64, 32, 10), Digits())


@pytest.mark.parametrize("make", [lambda: MLP(64, 32, 10), lambda: NotOnMeta(64, 32, 10)])
def test_counting_gives_its_random_numbers_back(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    flops_of(make, Digits())
    assert torch.equal(torch.rand(4), expected)


def test_a_formula_for_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"formula=palm knows .*Transformer alone, got a MLP"):
        flops_of(lambda: MLP(64, 32, 10), Digits(), "palm")
    with pytest.raises(ValueError, match=rf"must be one of {', '.join(FORMULAS)}, got '6N'"):
        flops_of(lambda: MLP(64, 32, 10), Digits(), "6N")


def throughput(peak: Peak | None, flops: Flops | None = None) -> Throughput:
    return Throughput(flops or Flops(107e12, "palm"), 1, peak, steps_left_out=0)


@pytest.mark.parametrize(
    ("tflops", "percent"),
    [(240.5, 44.5), (298.2, 35.9), (340.8, 31.4), (256.0, 41.8), (207.0, 51.7)],
)
def test_one_run_of_107_tflops_a_tile_is_five_utilisations(tflops: float, percent: float) -> None:
    """The published run of 3,200 nodes, by each peak that somebody divides by."""
    peak = chosen(tflops, MAX_1550)
    assert peak in peaks_of(MAX_1550)
    line = throughput(peak).line(samples=1, seconds=1.0)
    assert line["tflops_per_device"] == pytest.approx(107.0)
    assert 100 * line["mfu"] == pytest.approx(percent, abs=0.05)


def test_the_summary_has_the_ratio_to_every_other_figure_and_its_source() -> None:
    first, *others = peaks_of(MAX_1550)
    measured = Throughput(Flops(107e12, "palm"), 1, first, tuple(others), steps_left_out=0)
    measured.line(1, 1.0)
    summary = measured.summary()
    assert (summary["peak_tflops"], summary["formula"]) == (298.2, "palm")
    assert "448" in summary["peak_source"]
    found = {row["peak_tflops"]: round(100 * row["mfu"], 1) for row in summary["other_peaks"]}
    assert found == {240.5: 44.5, 340.8: 31.4, 256.0: 41.8, 207.0: 51.7}
    assert all(row["peak_source"] for row in summary["other_peaks"])


def test_rates_are_of_all_devices_and_utilisation_of_one() -> None:
    measured = Throughput(Flops(3e12, "palm"), 4, Peak(100.0, "here"), steps_left_out=0)
    line = measured.line(samples=64, seconds=2.0)
    assert line == {"samples_per_second": 32.0, "tflops_per_device": 24.0, "mfu": 0.24}


def test_the_first_steps_are_left_out_and_the_rest_weighed_by_their_time() -> None:
    measured = Throughput(Flops(1e12, "palm"), 1, Peak(10.0, "here"), steps_left_out=2)
    assert measured.line(1, 100.0) == {"samples_per_second": 0.01}
    assert measured.summary()["steps_measured"] == 0
    assert "mfu" not in measured.summary()
    assert measured.line(1, 50.0) == {"samples_per_second": 0.02}
    assert measured.line(2, 1.0)["mfu"] == pytest.approx(0.2)
    assert measured.line(8, 1.0)["mfu"] == pytest.approx(0.8)
    summary = measured.summary()
    assert summary["samples_per_second"] == pytest.approx(10 / 2)  # not the mean of 2 and 8
    assert summary["mfu"] == pytest.approx(0.5)
    assert (summary["steps_left_out"], summary["steps_measured"]) == (2, 2)


def test_what_counts_recomputation_is_no_utilisation_of_the_model() -> None:
    line = throughput(Peak(214.0, "here"), Flops(107e12, "megatron_recompute", True)).line(1, 1.0)
    assert line.keys() == {"samples_per_second", "tflops_per_device", "hfu"}


def test_an_unknown_device_has_no_utilisation() -> None:
    assert chosen(None, "Intel(R) Xeon(R) Platinum") is None
    measured = throughput(chosen(None, "Intel(R) Xeon(R) Platinum"))
    assert measured.line(1, 1.0).keys() == {"samples_per_second", "tflops_per_device"}
    assert measured.summary().keys().isdisjoint({"mfu", "peak_tflops", "other_peaks"})


def test_without_a_count_there_are_samples() -> None:
    measured = Throughput(None, 2, Peak(1.0, "here"), steps_left_out=0)
    assert measured.line(4, 2.0) == {"samples_per_second": 2.0}
    assert "formula" not in measured.summary()


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        (MAX_1550, 298.2),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA GH200 120GB", 989.0),
        ("AMD Instinct MI250X", 191.5),
    ],
)
def test_a_device_is_known_by_what_torch_calls_it(name: str, tflops: float) -> None:
    peak = chosen(None, name)
    assert peak is not None
    assert peak.tflops == tflops


def test_every_peak_has_a_source() -> None:
    assert all(peak.source and peak.tflops > 0 for _, peaks in PEAKS for peak in peaks)


def test_a_given_peak_says_that_it_was_given() -> None:
    assert chosen(300, MAX_1550) == Peak(300.0, "given as throughput.peak_tflops")
    assert chosen("481", "anything") == Peak(481.0, "given as throughput.peak_tflops")
    with pytest.raises(ValueError, match=r"peak_tflops must be a number > 0, got 0"):
        chosen(0, MAX_1550)
