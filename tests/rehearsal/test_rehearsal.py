"""Runs on the rehearsal's device: as on the CPU, and the host waits for it where it has to only."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import rehearsal_cells as cells
from rehearsal_device import RIGHT_TORCH, WHY_NOT
from rehearsal_runs import Outcome, Run, Step, rehearse
from rehearsal_steps import ROWS

# A process makes many runs; on a machine that is busy with others it may take minutes.
pytestmark = [pytest.mark.skipif(not RIGHT_TORCH, reason=WHY_NOT), pytest.mark.timeout(600)]

READINGS, REFRESH = "train/readings.py", "optim/decompositions.py"
# One transfer to the host for all factors of a kind of number, whatever number of them.
PER_REFRESH = {"shampoo": 1, "soap": 1, "kfac": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rehearsal")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Outcome]:
    """All runs, in one process."""
    (outcomes,) = rehearse([*cells.plain(), *cells.featured()], folder)
    return outcomes


@pytest.fixture(scope="module")
def differences(folder: Path) -> dict[str, float]:
    """Between an optimizer's weights on the device and on the CPU."""
    (outcomes,) = rehearse([], folder, steps=[*ROWS])
    apart: dict[str, float] = outcomes["steps"]
    return apart


def ended(found: dict[str, Outcome], name: str, code: int = 0) -> Outcome:
    outcome = found[name]
    assert "error" not in outcome, outcome["error"]
    assert outcome["code"] == code, outcome.get("summary")
    return outcome


def steady(outcome: Outcome) -> list[Step]:
    """All steps but the first, and but those before which a line was read at once: for an
    evaluation or a save, at which the run stands still in any case."""
    steps: list[Step] = outcome["steps"][1:]
    return [step for step in steps if not any(at(line, READINGS) for _, line in step.waits)]


def at(line: str, files: str | tuple[str, ...]) -> bool:
    return line.startswith(files)


def refreshes(step: Step) -> int:
    return sum(count for (_, line), count in step.waits.items() if at(line, REFRESH))


def largest_difference(one: Outcome, other: Outcome) -> float:
    pairs = zip(one["weights"], other["weights"], strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


# Waits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", cells.OPTIMIZERS)
def test_a_steady_step_waits_for_nothing_but_what_a_refresh_needs(
    found: dict[str, Outcome], name: str
) -> None:
    outcome = ended(found, name)
    assert outcome["summary"]["provenance"]["device"] == "Rehearsal accelerator"
    assert len(outcome["steps"]) == cells.STEPS
    assert len(steady(outcome)) == cells.STEPS - 2  # an evaluation after the first step
    for step in steady(outcome):
        assert all(at(line, REFRESH) for _, line in step.waits), step.waits
        assert refreshes(step) <= PER_REFRESH.get(name, 0)
        assert not [kind for kind, _ in step.uploads if kind == "waiting upload"]
        assert not step.hosted, "XPU would do it on the host, without a word"
    assert outcome["steps"][0].waits.total() <= PER_REFRESH.get(name, 0)
    with_refresh = [step for step in steady(outcome) if refreshes(step)]
    assert bool(with_refresh) == (name in cells.SECOND_ORDER)
    assert len(with_refresh) < len(steady(outcome))


@pytest.mark.parametrize("name", ["lamb fp16", "whole", "kfac bf16"])
def test_precision_clip_guard_noise_and_saving_beside_training_add_no_wait(
    found: dict[str, Outcome], name: str
) -> None:
    """K-FAC asks at a refresh whether the step counts."""
    outcome = ended(found, name)
    asked = (REFRESH, "optim/kfac.py") if name.startswith("kfac") else (REFRESH,)
    for step in steady(outcome):
        assert name != "lamb fp16" or not step.waits
        assert all(at(line, asked) for _, line in step.waits), step.waits
        assert not step.hosted
        assert not [kind for kind, _ in step.uploads if kind == "waiting upload"]
    if "bf16" not in name:  # which saves in step, and waits
        saving = [line for step in outcome["steps"] for _, line in step.waits]
        assert not [line for line in saving if at(line, "train/checkpoint")]


def test_the_table_of_waits(
    found: dict[str, Outcome], record_property: Callable[[str, object], None]
) -> None:
    """Printed at the end of the tests, and by `make rehearse`."""
    head = ("", "steady step", "step with a refresh", "events a step", "first step")
    rows = [head]
    for name in (*cells.OPTIMIZERS, "lamb fp16", "kfac bf16", "whole"):
        outcome = ended(found, name)
        steps = steady(outcome)
        waits: dict[bool, list[int]] = {False: [], True: []}
        for step in steps:
            waits[bool(refreshes(step))].append(step.waits.total())
        events = max(step.events.total() for step in steps)
        first = outcome["steps"][0]
        uploads = sum(n for (kind, _), n in first.uploads.items() if kind == "waiting upload")
        words = [str(max(waits[due])) if waits[due] else "-" for due in (False, True)]
        title = "shampoo fp16" if name == "whole" else name
        begins = f"{first.waits.total()}, {uploads} uploads"
        rows.append((title, *words, str(events), begins))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join(f"{t:<{w}}" for t, w in zip(row, widths, strict=True)) for row in rows]
    record_property("table", "\n".join(["host waits on the rehearsal accelerator:", *lines]))


# Arithmetic ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_run_has_the_weights_of_the_cpu(found: dict[str, Outcome], name: str) -> None:
    """In FP32. The others' arithmetic makes much of the order of sums: they follow in FP64."""
    one, other = ended(found, name), ended(found, f"{name} cpu")
    assert largest_difference(one, other) < 1e-6
    assert one["lines"][-1]["loss"] == pytest.approx(other["lines"][-1]["loss"], abs=1e-6)


@pytest.mark.parametrize("name", [*ROWS])
def test_an_optimizer_has_the_weights_of_the_cpu_in_fp64(
    differences: dict[str, float], name: str
) -> None:
    assert differences[name] < 1e-12


# Features -----------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_undisturbed_one(found: dict[str, Outcome]) -> None:
    """Shampoo in fp16, saved beside training: copies that had not arrived would be NaN here."""
    whole, resumed = ended(found, "whole"), ended(found, "resumed")
    assert largest_difference(whole, resumed) == 0
    losses = [[line["loss"] for line in run["lines"]] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(resumed["steps"]) == cells.STEPS // 2 + 1  # torch makes the state by a step


def test_the_micro_batch_fits_the_memory(found: dict[str, Outcome]) -> None:
    outcome = ended(found, "auto")
    size = outcome["summary"]["micro_batch_size"]
    assert 1 <= size < 64
    assert outcome["peak"] < cells.MEMORY


def test_the_learning_rate_is_found(found: dict[str, Outcome]) -> None:
    outcome = ended(found, "lr_find", code=outcome_of_a_sweep(found))
    assert len(outcome["steps"]) > 3
    for step in steady(outcome):
        assert not step.waits


def outcome_of_a_sweep(found: dict[str, Outcome]) -> int:
    code: int = found["lr_find"].get("code", 0)
    assert code in (0, 3)  # a sweep of few points need not have blown up
    return code


def test_bytes_in_bf16(found: dict[str, Outcome]) -> None:
    lines = ended(found, "bytes")["lines"]
    assert lines[-1]["loss"] < lines[0]["loss"]


@pytest.mark.parametrize("name", ["skip", "rollback"])
def test_a_step_that_is_not_finite_is_none(found: dict[str, Outcome], name: str) -> None:
    outcome = ended(found, name)
    assert (name == "skip") == any(line.get("skipped") for line in outcome["lines"])
    assert all(bool(weight.isfinite().all()) for weight in outcome["weights"])
    losses = [line["loss"] for line in outcome["lines"] if not line.get("skipped")]
    assert all(math.isfinite(loss) for loss in losses)


# Names, ranks -------------------------------------------------------------------------------------


def test_with_the_names_of_torch_cuda(folder: Path) -> None:
    """There decompositions are the device's own; each reads whether it has succeeded."""
    runs = [run for run in cells.plain() if run.name in ("lamb", "soap")]
    (found,) = rehearse(runs, folder / "cuda", like="cuda")
    for step in steady(ended(found, "lamb")):
        assert not step.waits
    lines: set[Any] = {line for step in steady(ended(found, "soap")) for _, line in step.waits}
    assert lines
    assert all(line.startswith("optim/roots.py") for line in lines)


@pytest.mark.parametrize("run", cells.on_two_ranks(), ids=lambda run: run.name)
def test_two_ranks_reduce_by_sums(folder: Path, run: Run) -> None:
    """Averaging is refused, as by oneCCL 2021.17; what lies on the CPU is refused too."""
    ranks = rehearse([run], folder, world_size=2)
    ours = [ended(found, run.name) for found in ranks]
    if run.name.startswith("ddp"):
        assert largest_difference(*ours) == 0
    assert not any(step.hosted for outcome in ours for step in outcome["steps"])
