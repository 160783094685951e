"""Assignment of work by cost: blocks to ranks, or to the steps of an interval.

A pure function of the costs: every rank computes the same answer without asking the others.
"""

import heapq
from collections import Counter
from collections.abc import Sequence

from largebatch.optim.options import require

# Bins looked at where many have equally little: thousands of ranks need no more.
TIES = 64


def assign(
    costs: Sequence[float],
    num_bins: int,
    *,
    given: Sequence[int] = (),
    rounds: Sequence[int] | None = None,
) -> list[int]:
    """Return the bin of every item, such that the heaviest bin is light.

    Longest processing time first: by falling cost, and by index among equals, each item goes to
    the bin that has least so far. What is guaranteed:

    - no bin is heavier than the mean of all plus the heaviest item, nor than 4/3 of the best
      possible (Graham 1969, https://doi.org/10.1137/0117039, Theorem 2);
    - with one bin more the heaviest bin is never heavier: a larger world never waits longer;
    - `given` items stay where they are when others are added. Between numbers of bins items move
      freely: what they carry has to be able to move.

    The first two hold without `given`.

    Args:
        costs: >= 0, of every item.
        given: bins of the first len(given) items, settled before.
        rounds: when each item is worked on; among bins with equally little, an item goes to the one
            that has fewest in the item's own round, so that no bin's work falls into one round.

    Raises:
        ValueError: no bins, a cost that is negative or NaN.
    """
    require(num_bins >= 1, "num_bins", ">= 1", num_bins)
    for cost in costs:
        require(cost >= 0, "costs", ">= 0", cost)
    when = [0] * len(costs) if rounds is None else rounds
    bins = [*given, *[-1] * (len(costs) - len(given))]
    loads = [0.0] * num_bins
    in_round: Counter[tuple[int, int]] = Counter()

    def put(item: int, chosen: int) -> None:
        bins[item] = chosen
        loads[chosen] += costs[item]
        in_round[chosen, when[item]] += 1

    for item, chosen in enumerate(given):
        put(item, chosen)
    heap = [(load, number) for number, load in enumerate(loads)]
    heapq.heapify(heap)
    for item in sorted(range(len(given), len(costs)), key=lambda item: (-costs[item], item)):
        lightest = lightest_of(heap, 1 if rounds is None else TIES)
        chosen = min(lightest, key=lambda number: (in_round[number, when[item]], number))
        put(item, chosen)
        for number in lightest:
            heapq.heappush(heap, (loads[number], number))
    return bins


def lightest_of(heap: list[tuple[float, int]], at_most: int) -> list[int]:
    """Pop the bins with the equally smallest load off the heap, `at_most` of them."""
    load, number = heapq.heappop(heap)
    lightest = [number]
    while heap and heap[0][0] == load and len(lightest) < at_most:
        lightest.append(heapq.heappop(heap)[1])
    return lightest
