"""Weights & Biases."""

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from largebatch.common.errors import ConfigError
from largebatch.common.text import missing, say
from largebatch.train.trackers.base import Labels, sectioned
from largebatch.train.trackers.study import rows_of

_HOST: Final = "https://api.wandb.ai"


class Wandb:
    """Weights & Biases, in the run's folder; the axis is samples.

    WANDB_MODE decides whether it is online; without it a login does, by WANDB_API_KEY or netrc. A
    resumed run continues the first one's W&B run, by its id. At the end a line says where it is, or
    how to upload it.

    Args:
        folder: the run's folder.
        config: the resolved configuration.
        labels: what the run is called and grouped by.
        project: where runs are filed.
        group: in place of the sweep's or study's name.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], labels: Labels, project: str,
        group: str | None = None,
    ) -> None:  # fmt: skip
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"logger=wandb needs the package {missing(error)}: pip install "
                "'largebatch[train]', or use logger=jsonl"
            ) from error

        known = folder / "wandb" / "run_id"
        first = known.read_text(encoding="utf-8").strip() if known.exists() else None
        self._folder = folder
        self._run = wandb.init(
            project=project,
            group=group or labels.group,
            name=labels.name,
            job_type="train",
            tags=[labels.optimizer, labels.task],
            dir=folder,
            config=labels.flat() | {"config": dict(config)},
            mode=_mode(),
            id=first,
            resume="allow",
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("samples", hidden=True)
        for section in ("train", "eval", "optim", "noise"):
            self._run.define_metric(f"{section}/*", step_metric="samples")
        if first is None:
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(f"{self._run.id}\n", encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        self._run.log(sectioned(line) | {"samples": line["samples"]}, step=line["step"])

    def finish(self, summary: Mapping[str, Any]) -> None:
        told = {key: value for key, value in summary.items() if key != "config"}
        self._run.summary.update(told)
        url, stored = self._run.url, Path(self._run.dir).parent
        self._run.finish(exit_code=int(summary["status"] == "failed"))
        say(f"W&B: {url}" if url else f"W&B: upload it by `wandb sync {os.path.relpath(stored)}`")

    @staticmethod
    def log_study(
        folder: Path, group: str, pictures: Mapping[str, Path], tables: Mapping[str, Path],
        project: str,
    ) -> None:  # fmt: skip
        """One run of the job type `study`, in the group of the study's runs; a study that is made
        again continues it.
        """
        import wandb

        known = folder / "wandb" / "study_id"
        first = known.read_text(encoding="utf-8").strip() if known.exists() else None
        run = wandb.init(
            project=project, group=group, name=f"{group}: the study", job_type="study", dir=folder,
            mode=_mode(), id=first, resume="allow", settings=wandb.Settings(silent=True),
        )  # fmt: skip
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(f"{run.id}\n", encoding="utf-8")
        found: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in pictures.items()}
        for name, path in tables.items():
            columns, rows = rows_of(path)
            found[f"tables/{name}"] = wandb.Table(columns=[*columns], data=rows)
        run.log(found)
        run.finish()


def _mode() -> Any:
    """As WANDB_MODE says, without it online where there is a login.

    wandb itself reads the variable once in a process.
    """
    return os.environ.get("WANDB_MODE") or ("online" if has_login() else "offline")


def has_login() -> bool:
    """Say whether wandb would find a login, by its variable or in netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", _HOST)).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
