"""The configuration of a run in Python, composed by Hydra and without a trace of it."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from hydra.version import VersionBase
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from largebatch.common.errors import ConfigError, format_config_error


def composed_run(words: Sequence[str]) -> tuple[DictConfig, DictConfig]:
    """The configuration that `largebatch train WORDS` would have, and Hydra's settings for it. An
    application of Hydra's that this is called in keeps its own.

    Raises:
        ConfigError: a word that Hydra cannot read, or a key that there is not.
    """
    around, base = GlobalHydra.instance(), VersionBase.instance()
    hydra, version = around.hydra, base.getbase()
    around.hydra = None
    try:
        with initialize_config_module("largebatch.conf", version_base="1.3"):
            config = compose("train", list(words), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(format_config_error(error)) from error
    finally:
        GlobalHydra.set_instance(around)
        around.hydra, base.version_base = hydra, version
    settings = config.hydra
    with open_dict(config):
        settings.mode = RunMode.RUN
        settings.runtime.cwd = os.getcwd()
        settings.runtime.output_dir = str(Path(settings.run.dir).absolute())
        del config["hydra"]
    return config, settings


@contextmanager
def undisturbed() -> Iterator[None]:
    """Give back what a run sets for its whole process: random numbers, threads, paths, variables
    of the environment.
    """
    threads, path, names = torch.get_num_threads(), sys.path[:], {*os.environ}
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    kind = "cuda" if accelerator is None else accelerator.type
    devices = [] if accelerator is None else [torch.accelerator.current_device_index()]
    with torch.random.fork_rng(devices, device_type=kind):
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            sys.path[:] = path
            for name in {*os.environ} - names:
                del os.environ[name]
