"""The factors are those of the Fisher matrix, taken apart example by example and label by label.

In FP64, so that what is compared is the algebra. `exact_fisher` asks autograd for the gradient of
every example and enumerates the labels, and knows nothing of layers or factors.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from kfac_networks import CASES, Case, deltas_of, only_layer, rows_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax

from largebatch.optim import KFAC
from largebatch.optim.kronecker.factors import averages
from largebatch.optim.kronecker.layers import Layer, find_layers

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
TIGHT = {"rtol": 1e-10, "atol": 1e-12}


def make(model: nn.Module, **options: object) -> KFAC:
    return KFAC(model, lr=0.0, **{"factor_decay": 0.0, **options})


def factors(optimizer: KFAC, layer: Layer) -> tuple[Tensor, Tensor]:
    return averages(layer, optimizer.state[layer.weight])


def kronecker(layer: Layer, factor_in: Tensor, factor_out: Tensor) -> Tensor:
    """G ⊗ A over a layer's only group, acting on the rows of its matrix one after another."""
    full_in = torch.diag_embed(factor_in) if layer.diagonal_in else factor_in
    return torch.kron(factor_out[0], full_in[0])


def exact_fisher(layer: Layer, examples: Iterator[tuple[float | Tensor, Tensor]]) -> Tensor:
    """Σ weight · vec(D) vec(D)ᵀ over losses and their weights, D the layer's gradient."""
    size = layer.outputs * layer.inputs
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for weight, loss in examples:
        gradients = torch.autograd.grad(loss, layer.params, retain_graph=True)
        flat = layer.matrices(gradients).reshape(-1)
        fisher += weight * torch.outer(flat, flat)
    return fisher


def network(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(*modules).double()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_factors_are_the_averages_of_every_examples_rows(case: Case) -> None:
    """A over positions, G over items: the empirical Fisher, each example on its own."""
    module, x = case.layer()
    layer, readout = only_layer(module), {}

    def losses() -> Tensor:
        """Of every example, with a gradient that differs in all of them."""
        output = module(x)
        if not readout:
            readout["weights"] = torch.randn_like(output)
        return (output.sin() * readout["weights"]).flatten(1).sum(dim=1)

    optimizer = make(module)
    losses().mean().backward()
    optimizer.step()
    factor_in, factor_out = factors(optimizer, layer)

    output = module(x)
    deltas = []
    for index in range(len(x)):
        (grad,) = torch.autograd.grad(
            (output.sin() * readout["weights"])[index].sum(), output, retain_graph=True
        )
        deltas.append(deltas_of(layer, x, grad))
    rows = rows_of(layer, x)
    expected_in = torch.einsum("gpi,gpj->gij", rows, rows) / rows.shape[1]
    if layer.diagonal_in:
        expected_in = expected_in.diagonal(dim1=1, dim2=2)
    expected_out = sum(delta.mT @ delta for delta in deltas) / len(x)
    torch.testing.assert_close(factor_in, expected_in, **TIGHT)
    torch.testing.assert_close(factor_out, expected_out, **TIGHT)


def test_of_one_example_the_empirical_fisher_is_the_product_of_the_factors() -> None:
    torch.manual_seed(0)
    model = network(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    x, label = torch.randn(1, 3, dtype=torch.float64), torch.tensor([2])
    optimizer = make(model)
    cross_entropy(model(x), label).backward()
    optimizer.step()
    for layer in find_layers(model, 100):
        fisher = exact_fisher(layer, iter([(1.0, cross_entropy(model(x), label))]))
        torch.testing.assert_close(kronecker(layer, *factors(optimizer, layer)), fisher, **TIGHT)


def test_where_inputs_and_gradients_are_independent_it_is_the_product_of_the_factors() -> None:
    """Every input meets every gradient once: K-FAC's assumption holds to the letter."""
    module, examples = independent(nn.Linear(3, 2).double())
    layer, optimizer = only_layer(module), make(module)
    examples().mean().backward()
    optimizer.step()
    losses = examples()
    fisher = exact_fisher(layer, ((1 / len(losses), loss) for loss in losses))
    torch.testing.assert_close(kronecker(layer, *factors(optimizer, layer)), fisher, **TIGHT)


def independent(module: nn.Module) -> tuple[nn.Module, Callable[[], Tensor]]:
    """A layer, and losses of all pairs of 7 inputs and 5 gradients by its output."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    deltas = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    return module, lambda: (module(inputs.repeat_interleave(5, dim=0)) * deltas.repeat(7, 1)).sum(
        dim=1
    )


def test_of_a_deep_linear_network_the_true_fisher_is_the_product_of_the_factors() -> None:
    """With a squared loss its gradients by outputs do not depend on the inputs."""
    torch.manual_seed(0)
    model = network(nn.Linear(3, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 2))
    x = torch.randn(6, 3, dtype=torch.float64)
    # Labels of unit covariance around the prediction, enumerated: ±√2 along each of 2 outputs.
    errors = 2**0.5 * torch.tensor([[1, 0], [-1, 0], [0, 1], [0, -1]], dtype=torch.float64)

    def losses() -> Tensor:
        """½‖y - f‖² of every input with every label, (24,)."""
        output = model(x.repeat_interleave(4, dim=0))
        return 0.5 * (output.detach() + errors.repeat(6, 1) - output).square().sum(dim=1)

    optimizer = make(model, fisher="true")
    optimizer.fisher_backward(losses().mean())
    losses().mean().backward()
    optimizer.step()
    for layer in find_layers(model, 100):
        fisher = exact_fisher(layer, ((1 / 24, loss) for loss in losses()))
        torch.testing.assert_close(kronecker(layer, *factors(optimizer, layer)), fisher, **TIGHT)


def test_the_true_fishers_factors_are_sums_over_all_labels_by_their_probability() -> None:
    """A classifier, its labels enumerated: √p on a loss is p on its square."""
    torch.manual_seed(0)
    model = network(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
    x, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 3, 0, 1])
    optimizer = make(model, fisher="true")
    logits = model(x)
    surprise, weights = -log_softmax(logits, dim=1), logits.detach().softmax(dim=1).sqrt()
    for label in range(4):
        optimizer.fisher_backward((weights * surprise)[:, label].mean())
    optimizer.items(len(x))
    assert all(param.grad is None for param in model.parameters())
    cross_entropy(logits, labels).backward()
    optimizer.step()

    hidden = model[:2](x)
    outputs = {}
    for index, layer in enumerate(find_layers(model, 100)):
        expected = torch.zeros(layer.outputs, layer.outputs, dtype=torch.float64)
        for example in range(len(x)):
            # δ of the first layer by the chain rule, of the last p - onehot.
            p = logits[example].detach().softmax(dim=0)
            for label in range(4):
                delta = p - nn.functional.one_hot(torch.tensor(label), 4)
                if index == 0:
                    delta = (delta @ model[2].weight.detach()) * (1 - hidden[example] ** 2)
                expected += p[label] * torch.outer(delta, delta).detach() / len(x)
        outputs[layer.name] = (factors(optimizer, layer)[1][0], expected)
    for found, expected in outputs.values():
        torch.testing.assert_close(found, expected, **TIGHT)


def test_sampled_labels_come_to_the_true_fisher_and_leave_gradients_alone() -> None:
    torch.manual_seed(0)
    model = network(nn.Linear(3, 2))
    x = torch.randn(20_000, 3, dtype=torch.float64)
    optimizer = make(model, fisher="true")
    logits = model(x)
    labels = torch.distributions.Categorical(logits=logits.detach()).sample()
    optimizer.fisher_backward(cross_entropy(logits, labels))
    assert all(param.grad is None for param in model.parameters())
    loss = cross_entropy(logits, torch.zeros(len(x), dtype=torch.long))
    expected = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    loss.backward()
    for param, grad in zip(model.parameters(), expected, strict=True):
        assert torch.equal(param.grad, grad)
    optimizer.step()
    p = logits.detach().softmax(dim=1)
    exact = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(dim=0)
    found = factors(optimizer, only_layer(model))[1][0]
    # A mean of 20,000 numbers of variance below 1/16.
    torch.testing.assert_close(found, exact, rtol=0, atol=5 * 0.25 / 20_000**0.5)


def test_what_the_fisher_is_taken_from_is_asked_for_by_name() -> None:
    model = network(nn.Linear(3, 2))
    x = torch.ones(4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="fisher_backward needs fisher='true', got 'empirical'"):
        make(model).fisher_backward(model(x).sum())
    optimizer = make(model, fisher="true")
    with pytest.raises(RuntimeError, match="not been called with gradients since the last step"):
        optimizer.fisher_backward(torch.zeros(()))
    model(x).sum().backward()
    with pytest.raises(RuntimeError, match="fisher_backward, which has not been called"):
        optimizer.step()
