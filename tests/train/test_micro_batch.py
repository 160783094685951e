"""The largest micro-batch that fits, found from two small ones and tried before it is given."""

from pathlib import Path

import pytest
import torch
from fixture_types import Train
from gloo_ranks import launch, successful
from micro_batch_ranks import Noting, first_step, memory, of_unequal_devices
from torch import Tensor, nn

from largebatch.common.memory import ran_out
from largebatch.distributed.ranks import Ranks
from largebatch.train.engines.ddp import DDP
from largebatch.train.engines.micro_batch import (
    candidates,
    find_micro_batch_size,
    largest_that_fits,
)
from largebatch.train.models import MLP
from largebatch.train.tasks import Batch


def test_candidates_divide_every_share_of_every_batch_size() -> None:
    assert candidates([512], 2) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    assert candidates([96, 144], 4) == [1, 2, 3, 4, 6, 12]
    assert candidates([7], 7) == [1]


class Device:
    """So many bytes for the model, and so many more for each sample; notes what was tried."""

    def __init__(self, model: int, per_sample: int, jump_at: int = 10**9) -> None:
        self.model, self.per_sample, self.jump_at = model, per_sample, jump_at
        self.tried: list[int] = []

    def peak_bytes(self, size: int) -> int:
        self.tried.append(size)
        return self.model + self.per_sample * size + (1000 if size >= self.jump_at else 0)


SIZES = [1, 2, 4, 8, 16, 32, 64]


@pytest.mark.parametrize(
    ("limit", "fits"), [(99, None), (110, 1), (259, 8), (260, 16), (420, 32), (10**6, 64)]
)
def test_the_largest_that_fits_is_found_without_running_out(limit: int, fits: int | None) -> None:
    device = Device(model=100, per_sample=10)
    assert largest_that_fits(SIZES, device.peak_bytes, limit) == fits
    # Nothing was tried that is believed not to fit, but for the two that are measured.
    assert all(size <= max(fits or 0, 2) for size in device.tried)
    assert len(device.tried) <= 3


def test_memory_that_grows_faster_than_it_seemed_is_noticed() -> None:
    device = Device(model=100, per_sample=10, jump_at=16)
    assert largest_that_fits(SIZES, device.peak_bytes, 10**3) == 8
    assert device.tried == [1, 2, 64, 32, 16, 8]


def test_on_a_cpu_it_is_refused_with_the_way_out(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("task=digits", "engine.micro_batch_size=auto", "hydra.run.dir=run") == 2
    assert "on a CPU give a number" in capsys.readouterr().err


def test_ranks_try_alike_and_agree_where_one_device_has_less_room(tmp_path: Path) -> None:
    """Else one would begin a pass, and its all-reduce, that the other does not make."""
    found = launch(of_unequal_devices, ["unequal"], 2, tmp_path)
    one, other = successful([of_rank["unequal"] for of_rank in found])
    assert one == other == {"found": 16, "tried": [1, 2, 16]}


def test_nothing_of_the_search_is_left_in_the_first_step(tmp_path: Path) -> None:
    """Neither in K-FAC's factors nor in what DeepSpeed adds up, of which ZeRO 3 adds up most."""
    ways = ["kfac", "0", "1", "3"]
    (found,) = launch(first_step, ways, 1, tmp_path)
    for way in ways:
        (outcome,) = successful([found[way]])
        assert outcome["after"] == pytest.approx(outcome["without"], rel=1e-6), way


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("XPU out of memory. Tried to allocate 64.00 GiB."), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), True),
        *(
            (RuntimeError(f"level_zero backend failed with error: 39 ({name})"), True)
            for name in (
                "UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY",
                "UR_RESULT_ERROR_OUT_OF_HOST_MEMORY",
                "UR_RESULT_ERROR_OUT_OF_RESOURCES",
                "UR_RESULT_ERROR_DEVICE_LOST",
            )
        ),
        (
            RuntimeError("Native API returns: -5 (PI_ERROR_OUT_OF_RESOURCES)"),
            True,
        ),
        (RuntimeError("Native API returns: 20 (UR_RESULT_ERROR_UNKNOWN)"), False),
        (RuntimeError("Expected all tensors to be on the same device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_has_run_out_of_memory_is_known_by_type_and_by_word(
    error: Exception, is_memory: bool
) -> None:
    assert ran_out(error) == is_memory


class Full(Noting):
    """A device that runs out at the second size that is tried."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if len(batch[0]) > 1:
            raise RuntimeError("level_zero backend failed: 20 (UR_RESULT_ERROR_DEVICE_LOST)")
        return super().loss(model, batch)


def test_memory_that_runs_out_in_the_search_is_told_with_a_way_out() -> None:
    engine = DDP(MLP(16, 32, 8), Ranks(), torch.device("cpu"))
    device = memory(2**30)
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"auto: 2 samples do not fit the 1\.0 GiB.*DEVICE_LOST"):
        find_micro_batch_size(engine, optimizer, Full(device), Ranks(), [64], device)  # type: ignore[arg-type] # it is never evaluated


class Steep(Noting):
    """A device that runs out at more than four samples, which no smaller pass foretells."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        if len(batch[0]) > 4:
            raise torch.OutOfMemoryError("out of memory")
        return super().loss(model, batch)


def test_one_rank_takes_a_smaller_size_where_the_believed_one_runs_out() -> None:
    engine = DDP(MLP(16, 32, 8), Ranks(), torch.device("cpu"))
    device = memory(2**30)
    optimizer = torch.optim.SGD(engine.model.parameters(), lr=0.1)
    found = find_micro_batch_size(engine, optimizer, Steep(device), Ranks(), [64], device)  # type: ignore[arg-type] # it is never evaluated
    assert found == 4
    assert all(param.grad is None for param in engine.model.parameters())
