"""A job of a sweep is run as Hydra runs it, with fewer copies."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.core.utils import run_job as of_hydra
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

import largebatch.conf.resolvers  # noqa: F401 — registers them
from largebatch.launch.sweeps.run_job import run_job

WORDS = ["task=digits", "optim.lr=0.02", "hydra.job.num=3"]


class Told(Callbacks):
    """Keeps what callbacks are told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, Any]] = []

    def on_job_start(self, config: DictConfig, **more: Any) -> None:
        self.told.append(("start", OmegaConf.to_container(config)))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **more: Any) -> None:
        self.told.append(("end", job_return.status.name))


@pytest.fixture(autouse=True)
def hydra() -> Iterator[Any]:
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        yield GlobalHydra.instance().hydra


def job(hydra: Any, folder: Path, words: list[str]) -> DictConfig:
    # Within the user's own configuration and within Hydra's there are references to the other.
    own = ["+user.number=${hydra:job.num}", "hydra.sweep.subdir=${optim.lr}-${user.number}"]
    words = [*WORDS, f"hydra.sweep.dir={folder}", *own, *words]
    config: DictConfig = hydra.compose_config("train", words, RunMode.MULTIRUN)
    return config


def seen(hydra: Any, folder: Path, words: list[str], ours: bool) -> dict[str, str]:
    """All that a task and its callbacks see, with `folder` out of it."""
    found: dict[str, Any] = {}

    def task(config: DictConfig) -> float:
        found["config"] = OmegaConf.to_container(config, resolve=True)
        found["is_struct"] = OmegaConf.is_struct(config)
        found["settings"] = OmegaConf.to_container(HydraConfig.get(), resolve=False)
        found["folder"] = HydraConfig.get().runtime.output_dir
        found["there"], found["variable"] = os.getcwd(), os.environ.get("OF_JOB")
        config.seed = 99  # its own
        if config.budget.samples == 7:
            raise ArithmeticError("of the task")
        return 0.5

    context, config = HydraContext(hydra.config_loader, told := Told()), job(hydra, folder, words)
    before = OmegaConf.to_container(config.optim), HydraConfig.instance().cfg, os.getcwd()
    if ours:
        returned = run_job(context, task, config)
    else:
        returned = of_hydra(task, config, "hydra.sweep.dir", "hydra.sweep.subdir", context)
    assert returned.hydra_cfg is not None  # a copy that can be sent by itself
    assert returned.hydra_cfg.hydra._get_parent() is returned.hydra_cfg
    after = OmegaConf.to_container(config.optim), HydraConfig.instance().cfg, os.getcwd()
    assert after == before
    assert config.seed != 99
    found["told"] = told.told
    found["returned"] = returned.overrides, returned.working_dir, returned.status.name
    found["configured"] = list(map(OmegaConf.to_container, (returned.cfg, returned.hydra_cfg)))
    found["value"] = repr(returned._return_value)
    found["files"] = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    return {name: str(value).replace(str(folder), "FOLDER") for name, value in found.items()}


def test_what_is_returned_in_brief_leaves_out_how_the_job_was_configured(
    hydra: Any, tmp_path: Path
) -> None:
    context = HydraContext(hydra.config_loader, Callbacks())
    returned = run_job(context, lambda _: 0.5, job(hydra, tmp_path, []), brief=True)
    assert (returned.cfg, returned.hydra_cfg, returned.return_value) == (None, None, 0.5)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["hydra.job.chdir=true"],
        ["+hydra.job.env_set.OF_JOB=1"],
        ["hydra.output_subdir=kept"],
        ["budget.samples=7"],
    ],
    ids=lambda words: (words or ["plain"])[0],
)
def test_a_task_sees_what_it_sees_under_hydra(words: list[str], hydra: Any, tmp_path: Path) -> None:
    ours, theirs = (seen(hydra, tmp_path / name, words, name == "ours") for name in ("ours", "its"))
    assert ours == theirs
    assert ours["folder"] == "FOLDER/0.02-3"
    assert "'number': 3" in ours["config"]
    assert ("FAILED" if "budget.samples=7" in words else "COMPLETED") in ours["returned"]
    assert ours["variable"] == ("1" if "+hydra.job.env_set.OF_JOB=1" in words else "None")
