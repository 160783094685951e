"""What a run aims at: an evaluation loss, or a metric of its task."""

import re
from typing import Final, NamedTuple

MIN, MAX = "min", "max"
DIRECTIONS: Final = (MIN, MAX)

_BETTER: Final = {
    MAX: "acc accuracy auc auroc auprc map bleu chrf correct correlation coverage dice f1 "
    "fscore iou mcc miou ndcg pearson precision psnr r2 recall reward rouge score "
    "sensitivity spearman specificity ssim top",
    MIN: "bits bpb bpc brier cer cost deviation distance divergence ece err error fid kl loss mae "
    "mape mse nats nll perplexity ppl regret rmse wer",
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
    found = {_WORDS.get(word) for word in re.findall(r"[a-z]+\d?", metric.lower())}
    found |= {_WORDS.get(word) for word in re.findall(r"[a-z]+", metric.lower())}
    known = found - {None}
    return known.pop() if len(known) == 1 else None
