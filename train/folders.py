"""What Hydra makes before a run is known to be one, and what is to be told of a sweep's folder."""

from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

again: list[str] = []
"""Of the sweep under way, if any: what to add to its command, so that it goes on in its folder."""


class Folders(Callback):
    """Removes the folders that Hydra made for a run which was refused; never one that was there."""

    def on_run_start(self, config: DictConfig, **more: Any) -> None:
        folder = Path(str(OmegaConf.select(config, "hydra.run.dir"))).absolute()
        self._new = [path for path in (folder, *folder.parents) if not path.exists()]

    def on_run_end(self, config: DictConfig, **more: Any) -> None:
        for path in self._new:
            try:
                path.rmdir()
            except OSError:  # in use
                return

    def on_multirun_start(self, config: DictConfig, **more: Any) -> None:
        as_given = str(config.hydra.sweep._get_node("dir")._value())
        again.append(f" with hydra.sweep.dir={config.hydra.sweep.dir}" if "${" in as_given else "")
