"""Checkpoints from before an optimizer counted something load, and nothing else may be missing."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from largebatch.train.checkpoints.torch_format import MomentsPlanner, quiet


@pytest.mark.parametrize("name", ["exp_avg_extra_steps", "factor_extra_steps", "dropped_elements"])
def test_a_count_that_a_checkpoint_lacks_keeps_its_zero(name: str, tmp_path: Path) -> None:
    with quiet():
        dcp.save({"state.w.step": torch.tensor(7.0)}, checkpoint_id=tmp_path)
        loaded = {"state.w.step": torch.zeros(()), f"state.w.{name}": torch.zeros(())}
        dcp.load(loaded, checkpoint_id=tmp_path, planner=MomentsPlanner())
        assert [float(value) for value in loaded.values()] == [7.0, 0.0]
        loaded["state.w.exp_avg"] = torch.zeros(3)
        with pytest.raises(CheckpointException, match=r"it has no state\.w\.exp_avg"):
            dcp.load(loaded, checkpoint_id=tmp_path, planner=MomentsPlanner())
