"""Data parallelism does not change the update."""

import socket
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from optimizer_ranks import train, train_as_rank
from optimizer_rows import ROWS, Row, same_bits
from torch import Tensor

WORLD_SIZE = 2


@pytest.fixture(scope="module")
def weights_of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Tensor]]]:
    """For each rank, the weights at the end of training by row."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        forked.Popen(partial(train_as_rank, rank, WORLD_SIZE, port, str(folder)))
        for rank in range(WORLD_SIZE)
    ]
    assert forked.all_ended(ranks) is None
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(WORLD_SIZE)]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_two_ranks_equal_one_rank_with_double_batch(
    row: Row, weights_of_ranks: list[dict[str, list[Tensor]]]
) -> None:
    first, second = (weights[row.name] for weights in weights_of_ranks)
    assert same_bits(first, second)
    torch.testing.assert_close(first, train(row), rtol=1e-10, atol=1e-12)
