"""MLflow."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from largebatch.common.errors import ConfigError
from largebatch.common.mappings import flattened
from largebatch.common.text import missing
from largebatch.records.names import SUMMARY
from largebatch.train.trackers.base import Labels, sectioned

_STATUS: Final = {"failed": "FAILED", "diverged": "FAILED", "interrupted": "KILLED"}
_LONGEST: Final = 6000
"""Characters of a parameter that MLflow keeps."""


class MLflow:
    """MLflow, in the store that MLFLOW_TRACKING_URI names, without it where MLflow itself keeps
    runs. Samples are its steps. A resumed run continues the first one's.

    Args as of `Wandb`; `experiment` is where runs are filed.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], labels: Labels, experiment: str,
        group: str | None = None,
    ) -> None:  # fmt: skip
        try:
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"logger=mlflow needs the package {missing(error)}: pip install "
                "'largebatch[trackers]', or use logger=jsonl"
            ) from error

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self._metric, self._folder = Metric, folder
        self._client = MlflowClient()
        known = folder / "mlflow_run_id"
        if known.exists():
            self._id = known.read_text(encoding="utf-8").strip()
            self._client.update_run(self._id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(experiment)
        place = self._client.create_experiment(experiment) if found is None else found.experiment_id
        group = group or labels.group
        tags = {"group": group} if group else {}
        run = self._client.create_run(place, run_name=labels.name, tags=tags)
        self._id = run.info.run_id
        params = labels.flat() | flattened(config)
        self._client.log_batch(
            self._id, params=[Param(key, str(value)[:_LONGEST]) for key, value in params.items()]
        )
        folder.mkdir(parents=True, exist_ok=True)
        known.write_text(f"{self._id}\n", encoding="utf-8")

    def log(self, line: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(key, value, now, line["samples"]) for key, value in sectioned(line).items()
        ]
        self._client.log_batch(self._id, metrics=metrics, synchronous=False)

    def finish(self, summary: Mapping[str, Any]) -> None:
        if (self._folder / SUMMARY).exists():
            self._client.log_artifact(self._id, os.fspath(self._folder / SUMMARY))
        self._client.set_terminated(self._id, _STATUS.get(summary["status"], "FINISHED"))

    @staticmethod
    def log_study(
        folder: Path, group: str, pictures: Mapping[str, Path], tables: Mapping[str, Path],
        experiment: str,
    ) -> None:  # fmt: skip
        """One run named after the study, tagged as its runs are, with the files as artifacts; a
        study that is made again continues it.
        """
        from mlflow import MlflowClient

        client, known = MlflowClient(), folder / "mlflow_study_id"
        if known.exists():
            made = known.read_text(encoding="utf-8").strip()
        else:
            found = client.get_experiment_by_name(experiment)
            place = client.create_experiment(experiment) if found is None else found.experiment_id
            tags = {"group": group, "kind": "study"}
            made = client.create_run(place, run_name=f"{group}: the study", tags=tags).info.run_id
            known.write_text(f"{made}\n", encoding="utf-8")
        for path in (*pictures.values(), *tables.values()):
            client.log_artifact(made, os.fspath(path))
        client.set_terminated(made, "FINISHED")
