"""A job of a sweep composed from one composed before is the one that Hydra composes anew."""

from typing import Any

import pytest
from hydra import initialize_config_module
from hydra._internal.callbacks import Callbacks
from hydra.conf import HydraConf
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, OmegaConf

from largebatch.launch.sweeps import composition
from largebatch.launch.sweeps.composition import composed

JOB = ["study=bytes", "optim=adamw", "batch.size=128", "optim.lr=0.02", "scaling=none", "seed=3",
       "target.give_up_samples=4096", "hydra.sweep.subdir=adamw/seed-3"]  # fmt: skip


@pytest.fixture
def sweep() -> Any:
    """A context and the configuration of a sweep."""
    with initialize_config_module("largebatch.conf", version_base="1.3"):
        hydra = GlobalHydra.instance().hydra
        assert hydra is not None
        config = hydra.compose_config("train", ["study=bytes"], RunMode.MULTIRUN)
        HydraConfig.instance().set_config(config)
        yield HydraContext(hydra.config_loader, Callbacks()), config


def plain(config: DictConfig) -> Any:
    found: Any = OmegaConf.to_container(config)
    del found["hydra"]["job"]["override_dirname"]
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"optim.lr=0.02": "optim.lr=0.3", "seed=3": "seed=11"},
        {"optim.lr=0.02": "optim.betas=[0.5,0.95]"},
        {"optim=adamw": "optim=lamb"},
        {"scaling=none": "scaling=sqrt"},
        {"batch.size=128": "batch.size=64"},
        {"seed=3": "+task.note=1"},
        {"seed=3": "hydra.job.name=other"},
        {"seed=3": "~target.loss"},
    ],
)
def test_a_job_is_composed_as_hydra_composes_it(changes: dict[str, str], sweep: Any) -> None:
    context, config = sweep
    for words in (JOB, [changes.get(word, word) for word in JOB], JOB):
        anew = context.config_loader.load_sweep_config(config, words)
        assert plain(composed(context, config, words)) == plain(anew)


def test_jobs_that_differ_in_values_are_composed_once(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, config = sweep
    monkeypatch.setattr(composition, "_composed", {})
    loads: list[int] = []
    load = context.config_loader.load_sweep_config
    monkeypatch.setattr(
        context.config_loader, "load_sweep_config",
        lambda *arguments: loads.append(1) or load(*arguments),
    )  # fmt: skip
    for seed in range(5):
        job = composed(context, config, [*JOB[:-1], f"hydra.sweep.subdir=s{seed}", f"seed={seed}"])
        assert (job.seed, job.hydra.sweep.subdir) == (seed, f"s{seed}")
        job.seed = 99  # what becomes of one job's configuration is nothing to the next
    assert len(loads) == 1


def test_a_job_keeps_classes_whose_names_stand_for_others(
    sweep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, config = sweep
    monkeypatch.setattr(composition, "_composed", {})
    load = context.config_loader.load_sweep_config
    anew = load(config, JOB)

    def load_and_import_again(*arguments: Any) -> Any:  # as Hydra does with its plugins
        found = load(*arguments)
        monkeypatch.setattr("hydra.conf.HydraConf", type("HydraConf", (), {}))
        return found

    monkeypatch.setattr(context.config_loader, "load_sweep_config", load_and_import_again)
    job = composed(context, config, JOB)
    assert plain(job) == plain(anew)
    assert OmegaConf.get_type(job, "hydra") is HydraConf


def test_a_key_that_there_is_not_is_refused_in_hydras_words(sweep: Any) -> None:
    context, config = sweep
    with pytest.raises(ConfigCompositionException, match=r"target\.los"):
        composed(context, config, [*JOB, "target.los=2"])


def test_a_job_without_a_folder_of_its_own_is_composed_by_hydra(sweep: Any) -> None:
    context, config = sweep
    words = ["optim=lamb", "seed=4"]
    anew = context.config_loader.load_sweep_config(config, words)
    job = composed(context, config, words)
    assert OmegaConf.to_container(job) == OmegaConf.to_container(anew)
    assert job.hydra.job.override_dirname == "optim=lamb,seed=4"
