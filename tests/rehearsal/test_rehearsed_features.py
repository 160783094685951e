"""The features of a run on the rehearsal's device, with each optimizer."""

import math
from collections.abc import Callable, Sequence

import pytest
import rehearsal_cells as cells
from rehearsal_runs import Outcome, rehearse
from rehearsal_waits import MARKS, REFRESH, at, each, ended, largest_difference, steady, table

pytestmark = MARKS

# Beside what a refresh needs: whether the step counts. K-FAC asks at a refresh.
ASKED = {"kfac": ("optim/kfac.py",)}


# Each kind of state once, and of what finds sizes and rates each kind of step.
RESUMED = ("lamb", "muon", "shampoo", "soap", "kfac")
FINDING = ("lamb", "shampoo", "kfac")


def each_with(feature: str, here: Sequence[str]) -> pytest.MarkDecorator:
    """The names of the runs of all optimizers with a feature."""
    names = [[f"{name} {feature}" for name in each] for each in (cells.OPTIMIZERS, here)]
    return each("run", *names)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, wanted: set[str]) -> dict[str, Outcome]:
    """The runs, in one process; those that others go on from among them."""
    begun = {f"{name.split()[0]} fp16" for name in wanted if name.endswith(" resumed")}
    runs = [run for run in cells.featured() if run.name in wanted | begun]
    (outcomes,) = rehearse(runs, tmp_path_factory.mktemp("features"))
    return outcomes


@pytest.mark.parametrize(
    "run", [f"{name} {kind}" for kind in ("fp16", "bf16") for name in cells.OPTIMIZERS]
)
def test_precision_clip_guard_noise_and_saving_beside_training_add_no_wait(
    found: dict[str, Outcome], run: str
) -> None:
    """In fp16 on the transformer, saving beside training; in bf16 on bytes, saving in step."""
    outcome = ended(found, run)
    name, precision = run.split()
    allowed = ((REFRESH,) if name in cells.SECOND_ORDER else ()) + ASKED.get(name, ())
    assert steady(outcome)
    for step in steady(outcome):
        assert all(at(line, allowed) for _, line in step.waits), step.waits
        assert max(step.waits.values(), default=0) <= 1
        assert not step.hosted
        assert not [kind for kind, _ in step.uploads if kind == "waiting upload"]
    assert any(not step.waits for step in steady(outcome))
    saving = [line for step in outcome["steps"] for _, line in step.waits]
    assert (precision == "bf16") == any(at(line, "train/checkpoint") for line in saving)
    assert outcome["lines"][-1]["noise_scale"] is not None


def test_the_table_of_waits(
    found: dict[str, Outcome], record_property: Callable[[str, object], None]
) -> None:
    names = [f"{name} {precision}" for precision in ("fp16", "bf16") for name in cells.OPTIMIZERS]
    rows = {name: ended(found, name) for name in names if name in found}
    record_property("table", table("with clip, guard, noise and checkpoints", rows))


@each_with("resumed", RESUMED)
def test_a_resumed_run_is_the_undisturbed_one(found: dict[str, Outcome], run: str) -> None:
    """In fp16, saved beside training: copies that had not arrived would be NaN here."""
    whole, resumed = ended(found, f"{run.split()[0]} fp16"), ended(found, run)
    assert largest_difference(whole, resumed) == 0
    losses = [[line["loss"] for line in run["lines"]] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(resumed["steps"]) == cells.STEPS // 2 + 1  # torch makes the state by a step


@each_with("found", FINDING)
def test_the_micro_batch_fits_the_memory(found: dict[str, Outcome], run: str) -> None:
    outcome, name = ended(found, run), run.split()[0]
    size = outcome["summary"]["micro_batch_size"]
    assert 1 <= size < cells.FINDER_BATCH
    assert outcome["peak"] < cells.MEMORY[name]


@each_with("found", FINDING)
def test_the_learning_rate_is_found(found: dict[str, Outcome], run: str) -> None:
    outcome, name = ended(found, run), run.split()[0]
    assert len(outcome["steps"]) > 5
    for step in steady(outcome):
        assert all(at(line, REFRESH) for _, line in step.waits), step.waits
        assert name in cells.SECOND_ORDER or not step.waits


@pytest.mark.parametrize("run", [f"{name} bf16" for name in cells.OPTIMIZERS])
def test_bytes_in_bf16(found: dict[str, Outcome], run: str) -> None:
    lines = ended(found, run)["lines"]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("name", ["skip", "rollback"])
def test_a_step_that_is_not_finite_is_none(found: dict[str, Outcome], name: str) -> None:
    outcome = ended(found, name)
    assert (name == "skip") == any(line.get("skipped") for line in outcome["lines"])
    assert all(bool(weight.isfinite().all()) for weight in outcome["weights"])
    losses = [line["loss"] for line in outcome["lines"] if not line.get("skipped")]
    assert all(math.isfinite(loss) for loss in losses)
