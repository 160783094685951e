"""A job of a sweep in this process, as Hydra's `run_job` makes it, with half of the copies.

That copies the settings thrice and all else once more, which is longer than many a job of a study
takes to be built. Here the job's configuration is its own already.
"""

import os
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

import hydra.core.utils as of_hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log, env_override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write


def run_job(
    context: HydraContext, task: TaskFunction, config: DictConfig, brief: bool = False
) -> JobReturn:
    """Call `task` in the folder of the job that `config` is of; what it raises is returned.

    Args:
        brief: what is returned says what the task returned, and not how it was configured.
    """
    if config.hydra.output_subdir is not None:  # and Hydra writes what it has composed
        return of_hydra.run_job(task, config, "hydra.sweep.dir", "hydra.sweep.subdir", context)
    here, holder = os.getcwd(), HydraConfig.instance()
    before = holder.cfg
    holder.set_config(config)  # from here on ${hydra:…} stands for something
    settings: Any = HydraConfig.get()
    folder = os.path.join(str(config.hydra.sweep.dir), str(config.hydra.sweep.subdir))
    for runtime in (config.hydra.runtime, settings.runtime):
        with read_write(runtime), open_dict(runtime):
            runtime.output_dir = os.path.abspath(folder)
    words: Any = OmegaConf.to_container(config.hydra.overrides.task)
    given, held = _without_settings(config), cast(DictConfig, holder.cfg)
    returned = JobReturn(words, given, held if brief else deepcopy(held))
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if settings.job.chdir:
            os.chdir(folder)
        returned.working_dir = folder if settings.job.chdir else here
        configure_log(settings.job_logging, settings.verbose)
        with env_override(settings.job.env_set):
            context.callbacks.on_job_start(config=config, task_function=task)
            try:
                returned.return_value = task(given)
                returned.status = JobStatus.COMPLETED
            except Exception as error:
                returned.status, returned.return_value = JobStatus.FAILED, error
        returned.task_name = JobRuntime.instance().get("name")
        context.callbacks.on_job_end(config=config, job_return=returned)
        if brief:
            returned.cfg = returned.hydra_cfg = None
        return returned
    finally:
        holder.cfg = before
        os.chdir(here)


def _without_settings(config: DictConfig) -> DictConfig:
    """A copy of what is the user's; Hydra's settings are two thirds of all."""
    content: dict[str, Any] = config.__dict__["_content"]
    config.__dict__["_content"] = {key: content[key] for key in content if key != "hydra"}
    try:
        return deepcopy(config)
    finally:
        config.__dict__["_content"] = content
