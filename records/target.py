"""What a run aims at: an evaluation loss, or a metric of its task."""

import re
from typing import Final, NamedTuple

MIN, MAX = "min", "max"
DIRECTIONS: Final = (MIN, MAX)

_UNBOUNDED: Final = (
    "bits bpb bpc cost deviation distance divergence fid kl loss mae mape mse nats nll perplexity "
    "ppl regret rmse"
)
"""Not shares of anything: they may fall by orders of magnitude."""
_BETTER: Final = {
    MAX: "acc accuracy auc auroc auprc map bleu chrf correct correlation coverage dice f1 "
    "fscore iou mcc miou ndcg pearson precision psnr r2 recall reward rouge score "
    "sensitivity spearman specificity ssim top",
    MIN: f"brier cer ece err error wer {_UNBOUNDED}",
}
_WORDS: Final = {word: direction for direction, words in _BETTER.items() for word in words.split()}


class Target(NamedTuple):
    """A number that an evaluation is to reach.

    Attributes:
        metric: `loss`, or the name of a metric.
        direction: `min` where less is better, `max` where more is.
    """

    metric: str
    value: float
    direction: str = MIN

    def is_met(self, found: float) -> bool:
        """Whether `found` reaches the value; what is no number does not."""
        return found >= self.value if self.direction == MAX else found <= self.value

    def __str__(self) -> str:
        return f"{self.metric} {self.value:g}"


def direction_of(metric: str) -> str | None:
    """Which way a metric of this name is better; None where its words do not tell.

    >>> direction_of("accuracy"), direction_of("top5"), direction_of("word_error")
    ('max', 'max', 'min')
    """
    known = {_WORDS.get(word) for word in _words_of(metric)} - {None}
    return known.pop() if len(known) == 1 else None


def is_unbounded(metric: str) -> bool:
    """Whether a metric of this name is a loss or a distance, and no share, rate or score.

    >>> is_unbounded("perplexity"), is_unbounded("accuracy"), is_unbounded("word_error")
    (True, False, False)
    """
    return direction_of(metric) == MIN and not _words_of(metric).isdisjoint(_UNBOUNDED.split())


def _words_of(metric: str) -> set[str]:
    """The words of its name, with a digit behind them and without: top5 and top."""
    name = metric.lower()
    return {*re.findall(r"[a-z]+\d?", name), *re.findall(r"[a-z]+", name)}
