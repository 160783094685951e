"""Hydra's published tests of launchers, on this project's; and tasks of others."""

from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import BatchedSweeperTestSuite, LauncherTestSuite
from hydra.test_utils.test_utils import TSweepRunner

# After each of Hydra's tests, what has registered with Hydra meanwhile is forgotten, and a module
# does so once: for the tests of other files, those of the launcher are imported before.
import largebatch.launch.sweeps.workers  # noqa: F401


def test_hydra_finds_the_launchers() -> None:
    names = {launcher.__name__ for launcher in Plugins.instance().discover(Launcher)}
    assert {"CoresLauncher", "ParslLauncher"} <= names


# They look for a job's log in its working directory. Whether that is the job's folder is otherwise
# up to the version of Hydra that whatever ran before in this process has asked to be like.
IN_ITS_FOLDER = "hydra.job.chdir=true"


@pytest.mark.parametrize(
    ("launcher_name", "overrides"), [("cores", [IN_ITS_FOLDER, "hydra.launcher.n_jobs=1"])]
)
class TestCores(LauncherTestSuite):
    pass


@pytest.mark.parametrize(
    ("launcher_name", "overrides"),
    [("cores", [IN_ITS_FOLDER, "hydra.launcher.n_jobs=2", "hydra.sweeper.max_batch_size=2"])],
)
class TestBatchesOnCores(BatchedSweeperTestSuite):
    pass


def test_parsl_names_the_task_that_it_would_not_run(
    hydra_sweep_runner: TSweepRunner, tmpdir: Path
) -> None:
    sweep = hydra_sweep_runner(
        calling_file=None, calling_module="hydra.test_utils.a_module", task_function=lambda _: 1,
        config_path="configs", config_name="compose.yaml",
        overrides=["hydra/launcher=parsl"], temp_dir=tmpdir,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"hydra\.launcher\.command") as refusal, sweep:
        pass
    assert "SweepTaskFunction" in str(refusal.value)
    assert not any(Path(tmpdir).iterdir())
