"""`largebatch plan` tells, quickly and without torch, what `largebatch train` then does."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Train = Callable[..., int]
ReadRun = Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]]
PlanCommand = Callable[..., tuple[int, str, str]]


@pytest.fixture
def plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> PlanCommand:
    """`largebatch plan` in this process, in a folder of its own: exit code, output, errors."""
    from largebatch.train.plan import command as plan_command

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["largebatch"])
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
        capsys.readouterr()
        code = plan_command.main(list(words))
        shown = capsys.readouterr()
        return code, shown.out, shown.err

    return run


def described(plan: PlanCommand, *words: str) -> dict[str, Any]:
    code, output, errors = plan("--json", "--no-picture", *words)
    assert (code, errors) == (0, "")
    result: dict[str, Any] = json.loads(output)
    return result


RUNS = {
    "rampup": [
        "batch=rampup", "batch.start=16", "batch.increment=16", "batch.ramp_samples=640",
        "batch.size=64", "scaling=adam_sde", "scaling.base_batch=16", "lr=wsd",
        "lr.warmup_samples=200",
    ],
    "stages": [
        "batch=stages", "batch.spec=0:32 1K:64", "batch.unit=tokens", "scaling=half_life",
        "budget.tokens_per_sample=2", "budget.tokens=3000",
    ],
    "seesaw": ["batch=seesaw", "batch.start=16", "batch.size=64"],
    "constant": ["batch.size=64", "engine.micro_batch_size=16", "lr=step"],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_run_does_what_its_plan_said(
    name: str, plan: PlanCommand, train: Train, read_run: ReadRun, tmp_path: Path
) -> None:
    words = ["task=digits", "optim=adamw", "optim.weight_decay=0.01", "optim.lr=0.001",
             "target.loss=null", "budget.samples=1500", *RUNS[name]]  # fmt: skip
    said = described(plan, *words)
    assert train(*words, "hydra.run.dir=run") == 0
    lines, summary = read_run(tmp_path / "run")
    totals = said["totals"]
    assert (totals["steps"], totals["samples"]) == (summary["steps"], summary["samples"])
    assert totals["tokens"] == totals["samples"] * (2 if name == "stages" else 1)
    done = 0
    for stage in said["stages"]:
        own = lines[stage["step"] : stage["step"] + stage["num_steps"]]
        assert stage["step"] == done
        assert stage["samples"] == own[0]["samples"] - own[0]["global_batch_size"]
        assert (stage["lr"], stage["last_lr"]) == (own[0]["lr"], own[-1]["lr"])
        assert {line["global_batch_size"] for line in own} == {stage["batch_size"]}
        for key in ("micro_batch_size", "gradient_accumulation_steps"):
            assert {line[key] for line in own} == {stage[key]}
        for key, value in own[0].get("batch_change", {}).items():
            assert key == "from" or stage[key] == value
        done += stage["num_steps"]
    assert done == len(lines)


def test_the_worked_example_of_megatron(plan: PlanCommand) -> None:
    stages = described(
        plan, "batch=rampup", "batch.start=16", "batch.increment=8", "batch.ramp_samples=300000",
        "batch.size=1024", "budget.samples=1e6",
    )["stages"]  # fmt: skip
    begins = [(stage["samples"], stage["step"], stage["batch_size"]) for stage in stages]
    assert begins[:4] == [(0, 0, 16), (2384, 149, 24), (4784, 249, 32), (7152, 323, 40)]
    assert begins[-1] == (300_096, 1319, 1024)


def test_lengths_in_tokens_are_samples_times_the_tokens_of_a_sample(plan: PlanCommand) -> None:
    shared = ["scaling=sqrt", "scaling.base_batch=768"]
    tokens = described(
        plan, *shared, "batch=stages", "batch.spec=0:768 250B:1536", "batch.unit=tokens",
        "budget.tokens=1T", "budget.tokens_per_sample=4096", "lr=wsd", "lr.warmup_tokens=8B",
        "lr.decay_tokens=100B",
    )  # fmt: skip
    samples = described(
        plan, *shared, "batch=stages", f"batch.spec=0:768 {250 * 10**9 // 4096}:1536",
        f"budget.samples={10**12 // 4096}", "lr=wsd", f"lr.warmup_samples={8 * 10**9 // 4096}",
        f"lr.decay_samples={100 * 10**9 // 4096}",
    )  # fmt: skip
    for said, per in ((tokens, 4096), (samples, 1)):
        for stage in said["stages"]:
            assert stage.pop("tokens") == stage["samples"] * per
    assert tokens["stages"] == samples["stages"]
    assert tokens["totals"]["tokens"] == 4096 * samples["totals"]["samples"] >= 10**12


def test_the_stages_are_printed_and_drawn_and_nothing_else_is_left(
    plan: PlanCommand, tmp_path: Path
) -> None:
    code, output, errors = plan("batch=geometric", "scaling=adam_sde", "hydra.run.dir=elsewhere")
    assert (code, errors) == (0, "")
    lines = output.splitlines()
    assert lines[0].split() == ["samples", "step", "batch", "micro", "x", "accum", "steps", "lr",
                                "to", "betas", "eps"]  # fmt: skip
    assert [line.split()[2] for line in lines[1:6]] == ["64", "128", "256", "512", "1,024"]
    assert lines[6] == ""
    assert "% fewer steps than the 62,500 of a constant 64" in lines[7]
    assert lines[-1] == "picture: plan.png"
    assert [path.name for path in tmp_path.iterdir()] == ["plan.png"]
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_picture_goes_where_it_is_wanted(
    plan: PlanCommand, tmp_path: Path, suffix: str
) -> None:
    code, output, _ = plan("--json", "--picture", f"my.{suffix}", "batch=rampup")
    assert code == 0
    assert json.loads(output)["totals"]["samples"] >= 4_000_000
    assert [path.name for path in tmp_path.iterdir()] == [f"my.{suffix}"]


def test_the_picture_shows_batch_rate_and_steps_as_the_steps_take_them() -> None:
    from largebatch.schedules import WSD, Plan, StagedBatch
    from largebatch.train.plan.picture import draw

    plan = Plan(
        ramp=StagedBatch(spec="0:10 1000:40 5000:160"), curve=WSD(warmup_samples=300),
        budget_samples=10_000, base_lr=0.1, base_batch=10, rule="sqrt",
    )  # fmt: skip
    points = {point.samples: point for point in plan}
    batch, rate, steps = draw(plan, "title").axes
    assert list(batch.lines[0].get_xdata()) == [0, 1000, 5000, 10_120]  # type: ignore[arg-type]
    assert list(batch.lines[0].get_ydata()) == [10, 40, 160, 160]  # type: ignore[arg-type]
    drawn = dict(zip(*rate.lines[0].get_data(), strict=True))
    assert {0, 5000, 10_120 - 160} <= drawn.keys()
    assert all(lr == points[place].lr for place, lr in drawn.items() if place < 10_120)
    assert list(steps.lines[0].get_ydata()) == [0, 100, 200, len(points)]  # type: ignore[arg-type]
    assert {text.get_text() for text in steps.texts} == {
        f"{len(points)} steps", "1,000 at a constant 10",
    }  # fmt: skip


def test_a_ramp_that_is_over_early_is_drawn_by_itself_too() -> None:
    from largebatch.schedules import WSD, Plan, StagedBatch
    from largebatch.train.plan.picture import draw

    plan = Plan(
        ramp=StagedBatch(spec="0:10 400:20 800:40"), curve=WSD(warmup_samples=100),
        budget_samples=20_000, base_lr=0.1, base_batch=10,
    )  # fmt: skip
    panels: Any = draw(plan, "title").axes
    ramp, whole, rate, _, steps, _ = panels
    assert ramp.get_xlim() == (0, 1000)
    assert whole.get_xlim() == (0, 20_000)
    assert max(rate.lines[0].get_xdata()) == 1000
    assert steps.get_ylim()[1] == pytest.approx(108)  # of a constant 10, and room above


def test_more_stages_than_fit_are_counted(plan: PlanCommand) -> None:
    words = ["batch=rampup", "batch.start=16", "batch.increment=8", "batch.size=1024"]
    left_out = len(described(plan, *words)["stages"]) - 40
    _, output, _ = plan("--no-picture", *words)
    lines = output.splitlines()
    assert left_out > 70
    assert lines[21] == f"… {left_out} more stages; --json has them all …"
    assert len(lines) == 1 + 20 + 1 + 20 + 2


def test_lengths_in_steps_are_samples_where_all_steps_are_alike(plan: PlanCommand) -> None:
    shared = ("batch.size=64", "lr=step")
    steps = described(
        plan, *shared, "budget.steps=100", "lr.warmup_steps=10", "lr.drop_steps=[50,75]"
    )
    samples = described(
        plan, *shared, "budget.samples=6400", "lr.warmup_samples=640", "lr.drop_samples=[3200,4800]"
    )
    assert steps["stages"] == samples["stages"]
    assert steps["totals"] == samples["totals"]


def test_what_is_decided_during_the_run_is_said_to_be(plan: PlanCommand) -> None:
    assert described(plan, "batch=loss_triggered")["decided_during_the_run"] is True
    _, output, _ = plan("--no-picture", "batch=loss_triggered")
    assert "later batch sizes are decided during the run" in output


def test_a_split_over_more_ranks_than_there_are_is_planned(plan: PlanCommand) -> None:
    words = ["batch=geometric", "batch.start=192", "batch.size=768", "engine.micro_batch_size=8"]
    said = described(plan, "--ranks", "24", *words)
    assert [stage["gradient_accumulation_steps"] for stage in said["stages"]] == [1, 2, 4]
    assert said["data_parallel_size"] == 24


def test_the_plan_has_the_rates_of_the_run_s_length(plan: PlanCommand) -> None:
    words = ["scaling=adam_sde", "scaling.base_batch=256", "batch.size=1024", "optim=adamw",
             "optim.lr=0.01", "optim.betas=[0.9,0.99]", "budget.samples=4e6"]  # fmt: skip
    longer = ["scaling.base_samples=1e6", "scaling.duration_exponent=0.5"]
    (stage,) = described(plan, *words, *longer)["stages"]
    assert stage["lr"] == pytest.approx(0.01)  # root of kappa 4 over a run 4 times as long
    assert stage["betas"] == pytest.approx([0.9, 0.99])
    (alike,) = described(plan, *words)["stages"]
    assert alike["betas"] == pytest.approx([0.6, 0.96])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["batch=rampup", "--ranks", "48"], ["64", "48", "48 or 96", "128 (96 or 144)"]),
        (["batch=seesaw", "lr=constant"], ["batch=seesaw", "lr=cosine"]),
        (["batch=rampup", "budget.steps=100"], ["budget.samples", "100 x 256 = 25,600"]),
        (["batch=rampup", "lr=cosine", "lr.warmup_steps=9"], ["lr.warmup_samples", "9 x 256"]),
        (["budget.steps=9", "budget.tokens=9"], ["budget.tokens=9", "budget.steps=9", "one"]),
        (["budget.epochs=3"], ["budget.epochs", "num_train"]),
        (["batch=smith", "lr=cosine"], ["batch=smith", "lr=step"]),
        (["batch=stages", "batch.spec=64"], ["batch.spec", "64"]),
        (["batch=stages", "batch.spec=0:64 1B:128"], ["1000000000", "4000000", "budget.samples"]),
        (["batch=stages", "batch.unit=steps"], ["batch.unit", "tokens", "steps"]),
        (["scaling=surge"], ["scaling.noise_scale"]),
        (["scaling=adam_sde", "batch.size=4096"], ["beta1", "2559", "half_life"]),
        (["scaling.duration_exponent=0.5"], ["duration_exponent=0.5", "scaling.base_samples"]),
        (["scaling=sqrt", "scaling.hold=per_epoch"], ["scaling.hold", "per_sample", "per_epoch"]),
        (["scaling=sqrt", "+scaling.exponent=1"], ["scaling.exponent", "sqrt"]),
        (["scaling=custom"], ["scaling.function"]),
        (["scaling=custom", "scaling.function=no.such_rule"], ["scaling.function", "no"]),
        (["lr=wsd", "lr.decay_samples=5e6"], ["lr.decay_samples", "5000000", "4000000"]),
        (["study=bytes"], ["study"]),
        (["batch.sized=64"], ["sized"]),
        (["--picture", "no/such/folder/plan.png"], ["--picture", "no/such/folder"]),
        (["--picture", "plan.doc"], ["--picture", "doc"]),
        (["--ranks", "0"], ["--ranks", "0"]),
        (["--ranks", "many"], ["--ranks", "many"]),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(
    words: list[str], named: list[str], plan: PlanCommand
) -> None:
    code, output, errors = plan(*words)
    assert code == 2
    assert errors.startswith("largebatch: ")
    assert errors.count("\n") == 1
    assert all(word in errors for word in named), errors
    assert "Traceback" not in output


def test_a_rule_of_ones_own_is_found_beside_the_command(plan: PlanCommand, tmp_path: Path) -> None:
    (tmp_path / "plan_rules.py").write_text(
        "from dataclasses import replace\n"
        "def cube_root(hyper, base_batch, batch, *, exponent=1):\n"
        "    return replace(hyper, lr=hyper.lr * (batch / base_batch) ** (exponent / 3))\n"
    )
    words = ["scaling=custom", "scaling.function=plan_rules.cube_root", "batch.size=2048"]
    for more, factor in (([], 2.0), (["+scaling.exponent=2"], 4.0)):
        (stage,) = described(plan, *words, *more)["stages"]
        assert stage["lr"] == pytest.approx(0.016 * factor)


DOCS = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text(encoding="utf-8")


def test_the_documented_command_and_code_work(plan: PlanCommand) -> None:
    (command,) = re.findall(r"```sh\nlargebatch plan (.*?)```", DOCS, re.DOTALL)
    code, output, errors = plan(*shlex.split(command.replace("\\\n", "")))
    assert (code, errors) == (0, "")
    assert "1,000,023,785,472 tokens" in output
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL):
        exec(block, names)
    assert names["steps"] == names["plan"].totals().steps


def test_every_choice_is_documented() -> None:
    conf = Path(__file__).parents[2] / "conf"
    for group in ("batch", "lr", "scaling"):
        for path in (conf / group).glob("*.yaml"):
            assert f"`{path.stem}`" in DOCS or f" {path.stem}" in DOCS, path


SCRIPT = """
import sys
from largebatch.cli import main
assert main(["plan", *sys.argv[1:]]) == 0
print([name for name in ("torch", "sklearn", "scipy", "wandb") if name in sys.modules])
"""


def test_a_plan_of_a_trillion_samples_walks_through_no_steps_and_loads_no_torch(
    tmp_path: Path,
) -> None:
    """A walk through its 4e8 steps would not end before the time-out."""
    words = ["batch=stages", "batch.spec=0:768 250B:1536 500B:3072", "budget.samples=1T"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], cwd=tmp_path, env=os.environ,
        capture_output=True, text=True, timeout=600, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_micro_batch_that_is_found_on_the_device_is_planned_whole(plan: PlanCommand) -> None:
    auto = described(plan, "batch.size=64", "engine.micro_batch_size=auto", "--ranks", "2")
    whole = described(plan, "batch.size=64", "--ranks", "2")
    assert auto["stages"] == whole["stages"]
