"""Numbers, intervals and batch sizes in words, the same on the page and on the terminal."""

import math
from collections.abc import Sequence

from largebatch.study.statistics.intervals import Estimate

DASH = "-"


def three_digits(value: float) -> str:
    """Three significant digits, written in full: 23.3, 1,290 and 30,200.

    >>> [three_digits(value) for value in (0.00566, 23.31, 1287.2, 1e9)]
    ['0.00566', '23.3', '1,290', '1,000,000,000']
    """
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    if rounded >= 100:
        return f"{rounded:,.0f}" if rounded < 1e13 else f"{rounded:.3g}"
    return f"{rounded:g}"


def with_interval(estimate: Estimate | None) -> str:
    """A value and its interval: 1,110 (910 to 1,360); the value alone where there is none."""
    if estimate is None:
        return DASH
    found = interval(estimate)
    return three_digits(estimate.value) + (f" ({found})" if found else "")


def interval(estimate: Estimate | None) -> str:
    """The interval alone; empty where there is none."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return ""
    return f"{three_digits(estimate.low)} to {three_digits(estimate.high)}"


def times(value: float) -> str:
    """A factor: 1.05, 2.0 and 17.8.

    >>> times(1.049), times(17.83), times(256.0)
    ('1.05', '17.8', '256')
    """
    return f"{value:.2f}" if value < 10 else three_digits(value)


def span_of_times(values: Sequence[float]) -> str:
    """Where factors lie: 1.10 to 1.20, or 1.10."""
    low, high = times(min(values)), times(max(values))
    return low if low == high else f"{low} to {high}"


def in_a_row(words: Sequence[str]) -> str:
    """Words as a list in a sentence.

    >>> in_a_row(["a"]), in_a_row(["a", "b"]), in_a_row(["a", "b", "c"])
    ('a', 'a and b', 'a, b and c')
    """
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def at_sizes(some: Sequence[int], all_sizes: Sequence[int]) -> str:
    """Batch sizes in words, neighbours as a span.

    >>> sizes = [64, 128, 256, 512, 1024]
    >>> at_sizes([64, 128, 256, 1024], sizes), at_sizes([64, 128], sizes), at_sizes(sizes, sizes)
    ('from 64 to 256 and at 1,024', 'at 64 and 128', 'at every batch size')
    """
    if len(some) == len(all_sizes) > 1:
        return "at every batch size"
    spans: list[list[int]] = []
    for size in sorted(some):
        place = list(all_sizes).index(size)
        if spans and place == list(all_sizes).index(spans[-1][-1]) + 1:
            spans[-1].append(size)
        else:
            spans.append([size])
    single = [f"{size:,}" for span in spans if len(span) < 3 for size in span]
    words = [f"from {span[0]:,} to {span[-1]:,}" for span in spans if len(span) >= 3]
    return in_a_row([*words, *([f"at {in_a_row(single)}"] if single else [])])


def seeds_in_words(seeds: Sequence[int]) -> str:
    """Seeds, those in a row as a span.

    >>> seeds_in_words([2, 3, 4, 5, 6]), seeds_in_words([0, 1]), seeds_in_words([3])
    ('seeds 2 to 6', 'seeds 0 and 1', 'seed 3')
    """
    if len(seeds) == 1:
        return f"seed {seeds[0]}"
    if len(seeds) > 2 and seeds[-1] - seeds[0] == len(seeds) - 1:
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seeds {in_a_row([*map(str, seeds)])}"


def plural(count: int, what: str) -> str:
    """A count and what it is of: 1 run, 2,041 runs."""
    return f"{count:,} {what}" + "s" * (count != 1)


def short_hash(text: str) -> str:
    """A hash in running text: its first twelve digits."""
    is_hash = len(text) > 16 and all(letter in "0123456789abcdef" for letter in text.lower())
    return text[:12] + "…" if is_hash else text
