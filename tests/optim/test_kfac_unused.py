"""K-FAC's state is whole on every rank, also of layers that no step has used yet."""

from pathlib import Path

import kfac_unused_ranks
from gloo_ranks import launch, successful


def test_a_state_with_a_layer_that_was_never_used_can_be_loaded(tmp_path: Path) -> None:
    found = launch(kfac_unused_ranks.work, ["go on"], 2, tmp_path)
    assert [rank["same"] for rank in successful([rank["go on"] for rank in found])] == [True] * 2
