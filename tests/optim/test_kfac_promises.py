"""What K-FAC promises beside its formula and the contract of all optimizers."""

import copy
import gc
import pickle
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from contract_rows import NoHostSync
from kfac_ranks import FACTORS, Cell, Model, Run, data
from optimizer_rows import same_bits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from largebatch.optim import KFAC, param_groups
from largebatch.optim.kronecker.factors import averages
from largebatch.optim.kronecker.work_group import cost
from largebatch.optim.math.matrix_roots import RootError


def run_of(row: str, dtype: torch.dtype = torch.float32, **options: Any) -> Run:
    return Run(Cell("one-process", 1, row, dtype), options)


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert same_bits([one[name]], [other[name]]), name


def test_a_loss_scale_of_other_means_is_given_by_attribute() -> None:
    scaled, plain = run_of("defaults"), run_of("defaults")
    for number in range(3):
        scaled.optimizer.loss_scale = 2.0**14
        x, y = data(number)
        (cross_entropy(scaled.model(x), y) * scaled.optimizer.loss_scale).backward()
        for param in scaled.model.parameters():
            param.grad /= scaled.optimizer.loss_scale
        scaled.optimizer.step()
        scaled.optimizer.zero_grad()
        plain.train(number, number + 1)
    assert_same_bits(scaled.tensors(), plain.tensors())  # by powers of two


@pytest.mark.parametrize("row", ["defaults", "eigen", "exact", "diagonal"])
def test_the_host_waits_for_the_device_where_a_layer_is_decomposed_only(row: str) -> None:
    run = run_of(row, inverse_interval=16, factor_interval=1, lr=torch.tensor(0.02))
    run.train(0, 9)  # with the turns of the first steps
    slots = {slot for each in run.optimizer._work_groups for slot in each.slots.values()}
    without = 0
    for number in range(9, 25):
        if number % 16 in slots:
            run.train(number, number + 1)
            continue
        without += 1
        with NoHostSync():
            run.backward(*data(number))
            run.optimizer.step()
            run.optimizer.layer_stats()
    assert 0 < without < 16


def test_layers_take_turns_in_an_interval_by_their_cost() -> None:
    """After the first steps every layer has one turn in an interval, no step much more work."""
    interval = 5
    run = run_of("defaults", inverse_interval=interval)
    layers = [*run.optimizer._owned()]
    turns: dict[str, list[int]] = {layer.name: [] for layer in layers}
    for number in range(4 * interval):
        states = [run.optimizer.state.get(layer.weight, {}) for layer in layers]
        before = [state.get("inverse_in", torch.zeros(1)).clone() for state in states]
        run.train(number, number + 1)
        for layer, old in zip(layers, before, strict=True):
            if not torch.equal(old, run.optimizer.state[layer.weight]["inverse_in"]):
                turns[layer.name].append(number)
    for numbers in turns.values():
        assert numbers[:4] == [0, 1, 2, 4]
        assert {later - number for number, later in pairwise(numbers[4:])} == {interval}
        assert numbers[4] - numbers[3] <= interval
    costs = {layer.name: cost(layer) for layer in layers}
    loads = [
        sum(costs[name] for name, numbers in turns.items() if number in numbers)
        for number in range(2 * interval, 3 * interval)
    ]
    assert sum(loads) == sum(costs.values())
    assert max(loads) <= sum(loads) / interval + max(costs.values())
    assert min(loads) > 0


def test_without_a_gradient_a_parameter_is_left_alone_and_has_no_state() -> None:
    run = run_of("defaults")
    before = run.tensors()
    run.optimizer.step()
    assert_same_bits(before, run.tensors())
    run.backward(*data(0))
    run.model.conv.weight.grad = run.model.conv.bias.grad = run.model.norm.bias.grad = None
    run.optimizer.step()
    after = run.tensors()
    idle = {"conv.weight", "conv.bias", "norm.bias"}
    for name in before:
        assert torch.equal(before[name], after[name]) == (name in idle), name
    assert not any(name.split("/")[0] in idle for name in after.keys() - before.keys())


def test_a_failed_decomposition_keeps_the_last_good_one_and_at_last_names_the_layer() -> None:
    run = run_of("defaults", inverse_interval=1, tolerated_failures=2)
    run.train(0, 2)
    state = run.optimizer.state[run.model.head.weight]
    good = state["inverse_in"].clone(), state["inverse_out"].clone()
    state["factor_out"].fill_(float("nan"))
    for number in (2, 3):
        run.train(number, number + 1)
        assert torch.equal(state["inverse_in"], good[0])
        assert torch.equal(state["inverse_out"], good[1])
    assert run.optimizer.failures.total == {"head.weight": 2}
    with pytest.raises(RootError, match=r"layer 'head\.weight': .*non-finite.* 3 times in a row"):
        run.train(4, 5)


@pytest.mark.parametrize("form", ["factored_cholesky", "factored_eigen"])
def test_what_fails_in_fp32_is_decomposed_in_fp64(form: str) -> None:
    run, expected = run_of("defaults", form=form), run_of("defaults", form=form)
    expected.train(0, 1)
    name = {"factored_cholesky": "cholesky_ex", "factored_eigen": "eigh"}[form]
    real, refused = getattr(torch.linalg, name), []

    def only_fp64(matrix: Tensor, **options: Any) -> Any:
        if matrix.dtype == torch.float64:
            return real(matrix, **options)
        refused.append(matrix)
        if form == "factored_eigen":
            raise torch.linalg.LinAlgError("did not converge")
        return torch.zeros_like(matrix), torch.ones(len(matrix), dtype=torch.int32)

    with mock.patch.object(torch.linalg, name, only_fp64):
        run.train(0, 1)
    assert len(refused) > 0
    assert not run.optimizer.failures.total
    for param, other in zip(run.model.parameters(), expected.model.parameters(), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-3, atol=1e-5)


def test_factors_do_not_see_the_global_matmul_precision_or_autocast() -> None:
    runs = [run_of("defaults"), run_of("defaults")]
    runs[0].train(0, 2)
    torch.set_float32_matmul_precision("medium")
    try:
        runs[1].train(0, 2)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_same_bits(*(run.tensors() for run in runs))
    layer = nn.Linear(3, 3, bias=False)
    optimizer = KFAC(layer, lr=0.0, factor_decay=0.0)
    x = torch.randn(8, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x).float().square().mean().backward()
    optimizer.step()
    (found,) = optimizer._owned()
    factor_in, _ = averages(found, optimizer.state[layer.weight])
    torch.testing.assert_close(factor_in[0], x.T @ x / 8, rtol=1e-6, atol=1e-6)


# Items ------------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """A label for every token of (samples, tokens, 4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_masked_tokens_are_no_items_whatever_the_passes() -> None:
    """The mean is over the tokens that count: G is Σ δδᵀ over their number, as if alone."""
    torch.manual_seed(1)
    x, y = torch.randn(6, 4, 4).double(), torch.randint(0, 3, (6, 4))
    counts = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]] * 3, dtype=torch.bool)
    kept = int(counts.sum())
    factors = []
    for sizes in ((6,), (2, 4), (1, 2, 3)):
        model = Tagger().double()
        optimizer = KFAC(model, lr=0.0)
        parts = zip(x.split(sizes), y.split(sizes), counts.split(sizes), strict=True)
        for part_x, part_y, part_counts in parts:
            loss = cross_entropy(model(part_x)[part_counts], part_y[part_counts], reduction="sum")
            (loss / kept).backward()
            optimizer.items(int(part_counts.sum()))
        optimizer.step()
        layers = list(optimizer._owned())
        factors.append([averages(layer, optimizer.state[layer.weight]) for layer in layers])
    model = Tagger().double()
    optimizer = KFAC(model, lr=0.0)
    cross_entropy(model(x[counts]), y[counts]).backward()
    optimizer.step()
    alone = [averages(layer, optimizer.state[layer.weight]) for layer in optimizer._owned()]
    for found in factors:
        for (_, factor_out), (_, expected) in zip(found, alone, strict=True):
            torch.testing.assert_close(factor_out, expected, rtol=1e-10, atol=1e-14)


def test_samples_are_counted_by_what_the_model_returns_else_by_the_layers_themselves() -> None:
    """A layer on flattened tokens has more rows than there are samples."""

    class Flattening(Tagger):
        def forward(self, x: Tensor) -> dict[str, Any]:  # type: ignore[override]
            h = super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])
            return {"count": 3, "logits": [h.mean(dim=1)]}

    x, found = torch.randn(6, 4, 4), []
    for call in (lambda m: m(x)["logits"][0], lambda m: m.forward(x)["logits"][0]):
        model = Flattening()
        optimizer = KFAC(model, lr=0.0)
        call(model).square().sum(dim=1).mean().backward()
        optimizer.step()
        found.append(averages(next(optimizer._owned()), optimizer.state[model.first.weight])[1])
    torch.testing.assert_close(4 * found[0], found[1])  # 6 samples or 24 rows


def test_passes_without_gradients_or_backward_leave_no_trace() -> None:
    run, other = run_of("defaults"), run_of("defaults")
    run.train(0, 2)
    other.train(0, 1)
    x, _ = data(7)
    with torch.no_grad():
        other.model(x)
    other.model(x)  # never differentiated
    copy.deepcopy(other.model)(x).sum().backward()  # nor is it this model
    pickle.loads(pickle.dumps(other.model))(x).sum().backward()
    other.train(1, 2)
    assert_same_bits(run.tensors(), other.tensors())


class Checkpointed(nn.Module):
    """Its middle may be computed again in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.middle = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.reentrant is None:
            return self.last(self.middle(h))
        return self.last(checkpoint(self.middle, h, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_pass_that_is_computed_again_counts_once(reentrant: bool) -> None:
    factors = []
    for model in (Checkpointed(None), Checkpointed(reentrant)):
        optimizer = KFAC(model, lr=0.1)
        torch.manual_seed(1)
        model(torch.randn(8, 4)).square().sum(dim=1).mean().backward()
        optimizer.step()
        layers = optimizer._owned()
        factors += [[averages(layer, optimizer.state[layer.weight]) for layer in layers]]
    assert len(factors[0]) == 4
    for plain, again in zip(*factors, strict=True):
        assert same_bits(plain, again)


def test_gradients_that_are_thrown_away_take_their_curvature_with_them() -> None:
    run, other = run_of("defaults"), run_of("defaults")
    run.backward(*data(5))
    run.optimizer.items(3)
    run.optimizer.zero_grad()
    for one in (run, other):
        one.train(0, 2)
    assert_same_bits(run.tensors(), other.tensors())


def test_the_true_fishers_pass_is_free_where_factors_are_not_updated() -> None:
    run = run_of("defaults", fisher="true", factor_interval=2)
    x, y = data(0)
    seen = []
    for _ in range(4):
        logits = run.model(x)
        run.optimizer.fisher_backward(cross_entropy(logits, y.flip(0)))
        cross_entropy(logits, y).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        seen.append(run.optimizer.state[run.model.head.weight]["items"].item())
    assert seen == [16, 16, 32, 32]


def test_a_model_outlives_its_optimizer_unwatched() -> None:
    model = Model(torch.float32)
    optimizer = KFAC(model, lr=0.1)
    del optimizer
    gc.collect()
    x, y = data(0)
    with mock.patch("largebatch.optim.kronecker.statistics.input_sum") as watched:
        cross_entropy(model(x), y).backward()
    assert not watched.called


# Groups, and what is refused --------------------------------------------------------------------


def test_parameter_groups_have_options_of_their_own() -> None:
    run = run_of("defaults")
    groups = param_groups(run.model, weight_decay=0.1)
    assert len(groups) > 1
    optimizer = KFAC(run.model, lr=0.1, params=groups)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    only_head = KFAC(run.model, lr=0.1, params=run.model.head.named_parameters())
    assert [layer.name for layer in only_head._owned()] == ["head.weight"]
    only_head.add_param_group({"params": [("conv.weight", run.model.conv.weight)], "damping": 1.0})
    assert [layer.name for layer in only_head._owned()] == ["conv.weight", "head.weight"]
    assert all(layer.bias is None for layer in only_head._owned())
    before = run.model.conv.bias.clone()
    x, y = data(0)
    cross_entropy(run.model(x), y).backward()
    only_head.step()
    assert torch.equal(run.model.conv.bias, before)
    assert {*only_head.layer_stats()} == {"conv.weight", "weight"}


def test_a_state_dict_with_the_former_name_of_a_form_loads() -> None:
    model = nn.Linear(2, 2)
    state = KFAC(model, lr=0.1).state_dict()
    state["param_groups"][0]["form"] = "inverse"
    optimizer = KFAC(model, lr=0.1)
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["form"] == "factored_cholesky"


def test_a_state_of_other_options_is_refused() -> None:
    run = run_of("defaults")
    run.train(0, 1)
    saved = run.optimizer.state_dict()
    other = run_of("defaults", graft="none", rule="sgd")
    with pytest.raises(ValueError, match=r"state of parameter .* got or lacks .*exp_avg"):
        other.optimizer.load_state_dict(
            {**saved, "param_groups": other.optimizer.state_dict()["param_groups"]}
        )
    smaller = run_of("defaults", max_factor_size=5)
    with pytest.raises(ValueError, match=r"must have the shape \(.*max_factor_size"):
        smaller.optimizer.load_state_dict(saved)
    assert all(key in saved["state"][0] for key in FACTORS)


def test_the_state_of_many_layers_is_small_in_names() -> None:
    run = run_of("defaults")
    run.train(0, 1)
    found = {name: {*run.optimizer.state[param]} for name, param in run.model.named_parameters()}
    graft = {"graft_exp_avg", "graft_exp_avg_sq"}
    layer = {"factor_in", "factor_out", "factor_weight", "items", "condition", "dropped_updates"}
    inverses, every = {"inverse_in", "inverse_out"}, {"step", "exp_avg", "dropped_elements"}
    assert found["norm.weight"] == every | {"exp_avg_sq"}
    assert found["conv.bias"] == every | graft
    assert found["conv.weight"] == every | graft | layer | inverses
