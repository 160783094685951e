"""What cannot be run is refused before torch is even imported, in one sentence."""

import json
import subprocess
import sys

import pytest

# The overrides, and what the sentence must name: the key or value, and the way out.
WRONG = {
    "steps without a target": (
        ["objective=steps", "target.loss=null"],
        ["objective=steps", "target.loss", "objective=loss"],
    ),
    "near no target": (
        ["evaluation.within=0.3", "target.loss=null"],
        ["evaluation.within=0.3", "target.loss"],
    ),
    "a metric without a value": (["target.metric=accuracy"], ["target.value"]),
    "a value of no metric": (["target.value=0.9"], ["target.value=0.9", "target.metric"]),
    "a metric of no known direction": (
        ["target.metric=shine", "target.value=1"],
        ["target.metric=shine", "target.direction=max"],
    ),
    "a loss that is to rise": (
        ["target.metric=loss", "target.value=1", "target.direction=max"],
        ["target.metric=loss"],
    ),
    "a metric by its own key": (["target.accuracy=0.9"], ["target.metric=accuracy"]),
    "evaluations by steps": (["evaluation.every=10"], ["evaluation.every", "evaluation.growth"]),
    "a run to resume": (["resume=runs/mine"], ["resume", "auto", "hydra.run.dir", "runs/mine"]),
    "words apart": (["optim.lr", "=", "0.1"], ["'optim.lr' is not KEY=VALUE", "without spaces"]),
    "an unknown key": (["optim.lrr=0.1"], ["optim.lrr", "did you mean optim.lr?"]),
    "an unknown group": (["optm=lamb"], ["optm", "did you mean optim?"]),
    "an added unknown key": (["+colour=blue"], ["colour"]),
    "an unknown choice": (["optim=lion"], ["optim", "'lion'", "lamb"]),
    "an unknown study": (["study=mine"], ["study must be one of autoencoder, bytes", "'mine'"]),
    "a number for a group": (["batch=512"], ["batch=512", "batch.size=512"]),
    "a number for a section": (["budget=1e5"], ["budget", "100000", "budget.samples"]),
    "a word for a count": (["budget.samples=many"], ["budget.samples", "many"]),
    "half a sample": (["batch.size=0.5"], ["batch.size", "0.5"]),
    "a negative learning rate": (["optim.lr=-0.1"], ["optim.lr", "-0.1", "> 0"]),
    "a word for a learning rate": (["optim.lr=fast"], ["optim.lr", "fast"]),
    "an unknown rule": (["scaling.rule=cubic"], ["scaling.rule", "cubic", "sqrt"]),
    "a warm-up longer than the run": (
        ["lr.warmup_samples=1e6", "budget.samples=1e5"],
        ["lr.warmup_samples", "1000000", "budget.samples", "100000"],
    ),
    "a ramp that ends past the budget": (
        ["batch=rampup", "batch.ramp_samples=1e6", "budget.samples=1e5"],
        ["batch.ramp_samples", "1000000", "budget.samples"],
    ),
    "a ramp whose steps do not add up": (
        ["batch=rampup", "batch.start=64", "batch.increment=50", "batch.size=256"],
        ["batch.increment", "50", "192"],
    ),
    "a batch that ranks do not divide": (
        ["engine.nproc=3", "batch.size=256"],
        ["256", "3", "255", "258"],
    ),
    "a batch that micro-batches do not divide": (
        ["engine.micro_batch_size=48", "batch.size=256"],
        ["256", "48", "240", "288"],
    ),
    "a key that the curve does not have": (["+lr.colour=blue"], ["lr", "colour"]),
    "a target that cannot be imported": (["batch._target_=no.such.Thing"], ["batch", "no"]),
    "a task without its class": (["task=custom"], ["task._target_"]),
    "a study as a single run": (["study=bytes"], ["largebatch sweep"]),
    "a negative seed": (["seed=-1"], ["seed", "-1"]),
    "broken grammar": (["optim.lr=[1"], ["[1"]),
}

# These are found by the optimizer or the device itself, so torch is there.
WRONG_LATE = {
    "a value that the optimizer refuses": (
        ["optim=lamb", "optim.betas=[0.9,1.5]"],
        ["betas", "1.5"],
    ),
    "a key that the optimizer does not take": (["+optim.colour=blue"], ["optim", "colour"]),
    "a device that is not there": (["engine.device=tpu"], ["engine.device", "tpu", "cpu"]),
}

# All commands in one process, whose imports take longest, each in a folder of its own.
SCRIPT = """
import contextlib, io, json, os, sys
from largebatch.cli import main
found = {}
for what, overrides in json.load(sys.stdin).items():
    os.makedirs(what)
    os.chdir(what)
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = main(["train", *overrides, "hydra.run.dir=run"])
    found[what] = code, told.getvalue(), "torch" in sys.modules, os.path.exists("run/metrics.jsonl")
    os.chdir("..")
print(json.dumps(found))
"""

Found = dict[str, tuple[int, str, bool, bool]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Of each command the exit code, what was told, whether torch was imported, and a record made;
    those that need torch come last.
    """
    commands = {what: words for what, (words, _) in (WRONG | WRONG_LATE).items()}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], cwd=tmp_path_factory.mktemp("refused"),
        input=json.dumps(commands), capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


def told_in(found: Found, what: str, named: list[str]) -> bool:
    """Whether torch was imported for the sentence, which names what it must."""
    code, told, torch_imported, record_made = found[what]
    assert code == 2
    assert told.count("\n") == 1, told
    assert told.startswith("largebatch: ")
    assert all(word in told for word in named), told
    assert not record_made
    return torch_imported


@pytest.mark.parametrize("what", WRONG)
def test_is_refused_in_one_sentence_without_torch(what: str, found: Found) -> None:
    assert not told_in(found, what, WRONG[what][1])


@pytest.mark.parametrize("what", WRONG_LATE)
def test_is_refused_in_one_sentence(what: str, found: Found) -> None:
    told_in(found, what, WRONG_LATE[what][1])
