"""docs/variants.md names every variant and keyword; its first steps are ours and the sources'."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import variant_figures as figures
from optimizer_rows import take_steps
from torch.nn import Parameter
from variant_bundles import VALUES, VARIANTS, each_variant
from variant_layers import Array
from variant_scenario import to_numpy
from variant_threads import one_thread as one_thread

from largebatch.optim import LARS

pytestmark = pytest.mark.usefixtures("one_thread")

DOCS = Path(__file__).parents[2] / "docs" / "variants.md"


def first_steps(kind: type[torch.optim.Optimizer], variant: str) -> list[float]:
    """Our row of the table of docs/variants.md."""
    weight, grads = figures.first_weights_and_grads()
    lr, options, unit = figures.LAMB_LR, figures.ADAM, 1.0
    if kind is LARS:
        lr, options, unit = figures.LARS_LR, figures.SGD, figures.SGD["trust_coefficient"]
    param = Parameter(torch.tensor(weight))
    decay = figures.ALMOST_NO_DECAY
    optimizer = kind([param], lr=lr, variant=variant, weight_decay=decay, **options)

    def trajectory() -> Iterator[Array]:
        for grad in grads:
            take_steps(optimizer, [param], [[torch.tensor(grad)]])
            yield to_numpy(param)

    return [size / unit for size in figures.relative_steps(trajectory(), weight, lr)]


@each_variant
def test_the_first_steps_are_as_long_as_the_sources(
    kind: type[torch.optim.Optimizer], variant: str
) -> None:
    expected = figures.step_sizes(f"{kind.__name__} {variant}")
    assert first_steps(kind, variant) == pytest.approx(expected, rel=1e-9)


def documented_steps() -> dict[str, list[float]]:
    """The table of docs/variants.md under "What step 1 does", by the name of its row."""
    lines = DOCS.read_text().split("## What step 1 does")[1].splitlines()
    rows = [
        [cell.strip(" `") for cell in line.strip("| ").split("|")] for line in lines if "|" in line
    ]
    return {name: [float(size) for size in sizes] for name, *sizes in rows[2:]}


def test_the_documented_first_steps_are_the_computed_ones() -> None:
    computed = {name: figures.step_sizes(name) for name in figures.STEP_SIZES}
    assert computed.keys() == {f"{kind.__name__} {variant}" for kind, variant in VARIANTS}
    assert documented_steps() == {
        name: [round(size, 2) for size in sizes] for name, sizes in computed.items()
    }


def test_the_documentation_names_every_variant_and_every_keyword() -> None:
    text = DOCS.read_text()
    for values in VALUES.values():
        assert all(f"`{keyword}`" in text for keyword in values)
    for kind, variant in VARIANTS:
        assert f"| `{variant}` |" in text, f"{kind.__name__} {variant}"
