"""A study of the final loss at given budgets: what it asks, from what, and what it decides."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from made_studies import ARGUMENTS, Killed, Workers, records

from largebatch.common.errors import ConfigError
from largebatch.conf.sweep_config import StudyConfig
from largebatch.records.record import RunFolder
from largebatch.study.protocol.conduct import conduct
from largebatch.study.protocol.identity import check_grid, check_identity
from largebatch.study.protocol.loss_protocol import LossProtocol
from largebatch.study.protocol.questions import question_of
from largebatch.study.protocol.status import read_status

WSD = {"_target_": "largebatch.schedules.WSD", "decay_fraction": 0.2, "warmup_samples": 0}
STUDY = {
    "protocol": "loss_at_budget", "budgets": [10_000, 40_000], "optimizers": ["adamw"],
    "batch_sizes": [64, 256], "start_batch": 64, "select_seeds": [0, 1], "report_seeds": [2, 3],
}  # fmt: skip


def make(**study: Any) -> LossProtocol:
    found = question_of(StudyConfig(**STUDY | study), {"adamw": {"lr": 0.01}}, 1, WSD)
    assert isinstance(found, LossProtocol)
    return found


def final_loss(lr: float, batch_size: int, budget: int, seed: int) -> float:
    """Least at 0.02 at batch 64 and twice that at 256; the smaller budget wants twice the rate."""
    best = 0.02 * (batch_size / 64) ** 0.5 * (40_000 / budget) ** 0.5
    octaves = math.log2(lr / best)
    if octaves > 2.9:
        return math.inf
    return 2.0 + 0.1 * octaves**2 + 10_000 / budget + 0.001 * seed


class LossWorkers(Workers):
    """As `Workers`, with runs that end at a budget; each trunk must be there before its branch."""

    def _run(self, job: dict[str, str]) -> None:
        name = job["hydra.sweep.subdir"]
        self.launched.append(name)
        lr, batch_size, seed = float(job["optim.lr"]), int(job["batch.size"]), int(job["seed"])
        budget, until = int(job["budget.samples"]), job.get("target.give_up_samples")
        if "branch_from" in job:
            trunk = job["branch_from"].replace("${hydra:sweep.dir}", str(self.folder))
            assert (Path(trunk) / "summary.json").exists()
        loss = final_loss(lr, batch_size, budget, seed)
        summary = {
            "status": "diverged" if loss == math.inf else "exhausted",
            "steps_to_target": None,
            "eval_loss": 3.0 if until else loss,
            "base_lr": lr,
            "give_up_samples": until and int(until),
        }
        with RunFolder(self.folder / name, {"config.yaml": "seed: 0\n"}) as record:
            record.write({"step": 1})
            if len(self.launched) - 1 == self.dies_at:
                raise Killed
            record.close(summary)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    conduct(make(), folder, ARGUMENTS, LossWorkers(folder, lambda *given: None))
    return folder


def test_each_budget_has_its_best_rate_from_branches_of_one_trunk(whole: Path) -> None:
    points = json.loads((whole / "study.json").read_text())["decisions"]["points"]
    chosen = {(one["batch_size"], one["budget"]): one["chosen"]["lr"] for one in points}
    assert chosen == {
        (64, 10_000): 0.04, (256, 10_000): 0.08, (64, 40_000): 0.02, (256, 40_000): 0.04,
    }  # fmt: skip
    assert not any(one["open_below"] or one["open_above"] for one in points)
    for one in points:
        folder = whole / f"adamw/batch-{one['batch_size']}/lr-{one['chosen']['lr']:.4g}"
        for seed in (0, 2, 3):
            assert (folder / f"seed-{seed}" / f"decay-{one['budget']}" / "summary.json").exists()
    runs = records(whole)
    trunks = [name for name in runs if "/trunk-" in name]
    # The longer trunk goes on from the shorter one, which serves the smaller budget too.
    assert {name.rpartition("/")[2] for name in trunks} == {"trunk-8000", "trunk-32000"}
    for name in trunks:
        if name.endswith("trunk-32000"):
            assert name.replace("32000", "8000") in runs


def test_a_trunk_that_diverges_has_no_branches(tmp_path: Path) -> None:
    study = STUDY | {"batch_sizes": [64], "report_seeds": [2]}
    protocol = question_of(StudyConfig(**study), {"adamw": {"lr": 0.64}}, 1, WSD)
    conduct(protocol, tmp_path, ARGUMENTS, LossWorkers(tmp_path, lambda *given: None))
    runs = records(tmp_path)
    # The start is beyond what any budget takes: the climb looks on both sides for one that ends.
    assert [name for name in runs if "lr-0.64/" in name] == [
        "adamw/batch-64/lr-0.64/seed-0/trunk-8000"
    ]
    assert runs["adamw/batch-64/lr-0.64/seed-0/trunk-8000"]["status"] == "diverged"
    chosen = {place[2]: point.chosen for place, point in protocol.decisions().points.items()}
    assert chosen == {10_000: {"lr": 0.04}, 40_000: {"lr": 0.02}}


@pytest.mark.parametrize("dies_at", [0, 2, 30])
def test_a_study_cut_off_anywhere_comes_to_the_same_end(
    dies_at: int, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cut off"
    with pytest.raises(Killed):
        conduct(make(), folder, ARGUMENTS, LossWorkers(folder, lambda *given: None, dies_at))
    second = LossWorkers(folder, lambda *given: None)
    count = conduct(make(), folder, ARGUMENTS, second)
    assert records(folder) == records(whole)
    assert count == {"made": len(second.launched), "found": dies_at}


def test_a_study_may_grow_by_a_budget_between_and_keeps_its_runs(
    whole: Path, tmp_path: Path
) -> None:
    grown, folder = {"budgets": [10_000, 20_000, 40_000]}, tmp_path / "grown"
    shutil.copytree(whole, folder)
    workers = LossWorkers(folder, lambda *given: None)
    conduct(make(**grown), folder, ARGUMENTS, workers)
    assert records(whole).items() <= records(folder).items()
    ends = [name.rpartition("/")[2] for name in workers.launched]
    assert {*ends} == {"decay-20000", "trunk-16000", "trunk-8000"}
    assert ends.count("trunk-8000") < ends.count("trunk-16000")  # of rates tried for it alone
    config = {"config": {"budget": {"samples": 1e6, "tokens": None}, "lr": WSD}}
    check_identity(tmp_path, config | {"optim=adamw": {"lr": 0.01}})
    for study in (STUDY, STUDY | grown):
        check_grid(tmp_path, StudyConfig(**study))
    with pytest.raises(ConfigError, match=r"study\.budgets=\[10000, 20000, 40000\]"):
        check_grid(tmp_path, StudyConfig(**STUDY))


def test_how_far_it_is_is_told_from_the_folder(tmp_path: Path) -> None:
    config = {"config": {"budget": {"samples": 1e6, "tokens": None}, "lr": WSD}}
    check_identity(tmp_path, config | {"optim=adamw": {"lr": 0.01}})
    check_grid(tmp_path, StudyConfig(**STUDY))
    with pytest.raises(Killed):
        conduct(make(), tmp_path, ARGUMENTS, LossWorkers(tmp_path, lambda *given: None, 20))
    status = read_status(tmp_path)
    (row,) = status.rows
    assert (status.done, row.points, row.running) == (20, 4, 1)
    assert 0 < status.fraction < 1


@pytest.mark.parametrize(
    ("study", "curve", "named"),
    [
        ({"budgets": []}, WSD, r"needs study\.budgets"),
        ({"protocol": "steps_to_target"}, WSD, r"study\.budgets are of study\.protocol="),
        ({"rules": ["sqrt"]}, WSD, r"study\.rules are compared by steps"),
        ({"budgets": [1_000]}, WSD, "the decay to 1,000 samples begins at 800 and takes 200"),
        ({"budgets": [10_000, 10_200]}, WSD, "decay to 10,200"),
        ({}, {"_target_": "largebatch.schedules.Cosine"}, "lr=wsd knows, got lr._target_="),
        ({}, WSD | {"decay_fraction": 1.5}, r"lr\.decay_fraction"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    study: dict[str, Any], curve: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        question_of(StudyConfig(**STUDY | study), {"adamw": {"lr": 0.01}}, 1, curve)
