"""Whatever way tensors are spread, owners get their blocks whole, and holders their parts back."""

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from gloo_ranks import Outcome, launch, successful
from second_order_ranks import SHAPES, Case, blocks_of_two, carry
from torch import Tensor

from largebatch.optim.sharding.placement import Placement, whole_box
from largebatch.optim.sharding.redistribution import Redistribution
from largebatch.optim.sharding.rounds import MOST, whole

WORLDS = {
    4: ["fsdp", "columns", "replicated", "hsdp", "twice", "group"],
    2: ["fsdp", "group"],
    3: ["fsdp", "columns"],
    1: ["plain"],
}
CELLS = [(size, layout) for size, layouts in WORLDS.items() for layout in layouts]
each_cell = pytest.mark.parametrize(("size", "layout"), CELLS)

# As it is; in rounds of 5 elements; and by sums of bits from copy to copy.
WAYS = [(), (None, 5), (None, MOST, 0), (None, 5, 0)]
each_way = pytest.mark.parametrize("way", WAYS, ids=["", "rounds", "sums", "rounds of sums"])

Find = Callable[..., Sequence[Outcome]]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Find:
    """What the ranks have found. One launch per world size."""

    @functools.cache
    def launched(size: int) -> list[dict[str, Outcome]]:
        cases = [Case(layout, *way) for layout in WORLDS[size] for way in WAYS]
        cases += [Case(layout, missing=1) for layout in WORLDS[size] if size > 1]
        return launch(carry, cases, size, tmp_path_factory.mktemp("exchange"))

    def find(size: int, layout: str, *way: int | None) -> Sequence[Outcome]:
        return successful([rank[str(Case(layout, *way))] for rank in launched(size)])

    return find


def counted() -> list[Tensor]:
    """The tensors before they are spread."""
    numels = [torch.Size(shape).numel() for shape in SHAPES]
    flat = torch.arange(1, sum(numels) + 1).float().split(numels)
    return [part.view(shape) for part, shape in zip(flat, SHAPES, strict=True)]


def cut(tensor: Tensor, number: int) -> Tensor:
    """A block of two rows, in the tests' own way."""
    return tensor[2 * number : 2 * number + 2] if tensor.dim() else tensor


@each_way
@each_cell
def test_owners_get_whole_blocks(size: int, layout: str, way: tuple[int, ...], found: Find) -> None:
    for rank, outcome in enumerate(found(size, layout, *way)):
        for index, tensor in enumerate(counted()):
            owners = outcome["owners"][index]
            mine = {number for number, owner in enumerate(owners) if owner == rank}
            assert outcome["owned"][index] == mine
            for number, block in outcome["blocks"][index].items():
                assert torch.equal(block, cut(tensor, number))


@each_way
@each_cell
def test_holders_get_back_what_the_owners_made_of_their_parts(
    size: int, layout: str, way: tuple[int, ...], found: Find
) -> None:
    """To the bit, which for -0.0 is its sign."""
    for outcome in found(size, layout, *way):
        assert outcome["unchanged"]
        assert outcome["negative zeros"]
        for part, back in zip(outcome["parts"], outcome["back"], strict=True):
            assert torch.equal(back, 2 * part)


@each_cell
def test_sums_are_over_all_ranks_and_the_same_to_the_bit(
    size: int, layout: str, found: Find
) -> None:
    for outcome in found(size, layout):
        for sums in outcome["sums"]:
            assert torch.equal(sums, found(size, layout)[0]["sums"][0])
            expected = torch.tensor([size * (size + 1) / 2, size * 0.1])
            torch.testing.assert_close(sums, expected)


@each_cell
def test_one_round_each_way(size: int, layout: str, found: Find) -> None:
    """Beside the sums; none where every rank has the whole gradient, and of copies in parts one
    more within each copy. Scalars, which are on every rank, go a way of their own."""
    back = {"plain": 0, "group": 2, "replicated": 2, "hsdp": 4}.get(layout, 3)
    there = {"plain": 0, "group": 1, "replicated": 1}.get(layout, 2)
    for outcome in found(size, layout):
        for way, expected in (("to_owners", there), ("to_holders", back)):
            calls = outcome[way]["all_reduce"] + outcome[way]["all_to_all_single"]
            assert calls == (expected if size > 1 else 0)


@each_cell
def test_no_rank_has_more_than_a_round_in_hand(size: int, layout: str, found: Find) -> None:
    """The largest block, 2 rows of 3 by 4, aside; small groups send it to each of the others."""
    for outcome in [*found(size, layout, None, 5), *found(size, layout, None, 5, 0)]:
        assert outcome["to_owners"]["most"] <= 24
        assert outcome["to_holders"]["most"] <= 24 * max(1, size - 1)
    if layout in ("group", "replicated"):
        for outcome in found(size, layout, None, 5, 0):
            assert outcome["to_holders"]["most"] == 5
            assert outcome["to_holders"]["all_to_all_single"] == 0


@pytest.mark.parametrize(("size", "layout"), [cell for cell in CELLS if cell[0] > 1])
def test_a_rank_that_has_no_parts_counts_as_zeros(size: int, layout: str, found: Find) -> None:
    """All collectives have ended, or there would be no outcome; what is missing is 0."""
    whole_outcome, missing = found(size, layout), found(size, layout, 1)
    sharded = layout not in ("group", "replicated")
    for rank, (with_all, without) in enumerate(zip(whole_outcome, missing, strict=True)):
        for index in range(len(SHAPES)):
            for number, block in without["blocks"][index].items():
                reference = with_all["blocks"][index][number]
                assert torch.equal(block, torch.where(block == 0, 0, reference))
                if not sharded and rank == 1:
                    assert not block.any()
    zeros = sum(int((b == 0).sum()) for r in missing for own in r["blocks"] for b in own.values())
    held = sum(part.numel() for part in whole_outcome[1]["parts"])
    if layout in ("fsdp", "columns", "twice"):
        (owner,) = whole_outcome[0]["owners"][SHAPES.index(())]
        assert zeros == held - (owner != 1)  # every rank has the scalar, its owner too


def test_tensors_of_two_groups_do_not_share_an_exchange() -> None:
    class Group:
        def size(self) -> int:
            return 1

        def rank(self) -> int:
            return 0

    boxes = (whole_box((2,)),)
    tensors = [whole(Placement((2,), Group(), boxes, (0,)), 0) for _ in range(2)]
    with pytest.raises(ValueError, match="one process group"):
        Redistribution(tensors)


def test_blocks_cover_the_tensor() -> None:
    """The test's own blocks: an exchange of half a tensor would prove half as much."""
    for shape in SHAPES:
        assert sum(box.numel for box in blocks_of_two(shape)) == torch.Size(shape).numel()
