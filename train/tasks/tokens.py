"""Causal language modelling on files of tokens, from one source or from several by weight."""

import hashlib
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from largebatch.common.numbers import real_number
from largebatch.schedules import whole_number
from largebatch.train.data.mixture import Mixture, dealt, whole_weights
from largebatch.train.data.sampler import Indices, Sampler
from largebatch.train.data.token_files import PLAIN_DTYPES, TokenFile, find_files, open_tokens
from largebatch.train.data.windows import Span, Windows, read_spans
from largebatch.train.tasks import Batch

MOST_EVAL: Final = 256
"""Sequences of the evaluation set, where `num_eval` leaves it open."""

Paths = str | Sequence[str]


def loss_per_token(model: nn.Module, batch: Batch) -> Tensor:
    """The mean over samples and positions of -log p(token), in nats and FP32. Every sample has
    equally many, so it is the mean over samples too.
    """
    inputs, targets = batch  # (samples, length) each
    logits: Tensor = model(inputs)  # (samples, length, vocabulary)
    return cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class Tokens:
    """Predict each token of a sequence from those before it.

    Each source is shuffled anew every epoch of its own; from several, samples come by weight
    (`data/mixture.py`). The evaluation set is the same for every seed.

    Args:
        path: files of one source: a name, with or without `.bin`, a pattern, or a list of these.
        sources: in its place {NAME: {"path": …, "weight": …}, …}.
        vocabulary: what ids must be below; checked in all that is read.
        dtype: of plain files without a sidecar.
        eval_path: files of the evaluation set, as `path`.
        eval_fraction: without `eval_path`: what part at the end of each source is held out.
        num_eval: sequences of the evaluation set, from the sources by weight; None: as many as are
            held out, and at most 256.

    Raises:
        ValueError: a file that cannot be read as it should, or a value that does not fit.
    """

    replacement = False

    def __init__(
        self,
        path: Paths | None = None,
        sources: Mapping[str, Mapping[str, Any]] | None = None,
        sequence_length: int = 1024,
        vocabulary: int | None = None,
        dtype: str | None = None,
        eval_path: Paths | None = None,
        eval_fraction: float = 0.01,
        num_eval: int | None = None,
    ) -> None:
        length = whole_number(sequence_length, "task.sequence_length", 1)
        if dtype not in (None, *PLAIN_DTYPES):
            raise ValueError(f"task.dtype must be {' or '.join(PLAIN_DTYPES)}, got {dtype!r}")
        named = _sources(path, sources)
        files = {
            name: [open_tokens(file, dtype) for file in find_files(source, name)]
            for name, (source, _) in named.items()
        }
        held_out = {}
        if eval_path is not None:
            name = "task.eval_path"
            held_out[name] = [open_tokens(file, dtype) for file in find_files(eval_path, name)]
        self._vocabulary = _vocabulary(vocabulary, files | held_out)

        def cut(files: Mapping[str, Sequence[TokenFile]]) -> list[Span]:
            return [
                _span(name, Windows(of, length, self._vocabulary)) for name, of in files.items()
            ]

        self._weights = whole_weights([weight for _, weight in named.values()])
        self._train, self._eval = cut(files), cut(held_out)
        eval_weights = self._weights
        if eval_path is None:
            fraction = real_number(eval_fraction, "task.eval_fraction", above=0.0, most=0.5)
            self._train, self._eval = _held_out(self._train, fraction)
        else:
            eval_weights = (1,)
        self._sizes = tuple(span.size for span in self._train)
        self.num_train = sum(self._sizes)
        self._eval_rows = _eval_rows(self._eval, eval_weights, num_eval)
        self.num_eval = len(self._eval_rows)

    def sampler(self, seed: int) -> Sampler:
        """The order of the training samples."""
        return Mixture(self.num_train, seed, False, self._sizes, self._weights)

    def train_batch(self, indices: Indices) -> Batch:
        return _batch(self._train, indices)

    def eval_batch(self, indices: Indices) -> Batch:
        return _batch(self._eval, self._eval_rows[indices])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return loss_per_token(model, batch)

    def provenance(self) -> Mapping[str, str]:
        """`data_hash` covers what `TokenFile.fingerprint` says of each file, evaluation's
        included; not how they are cut and mixed, which the configuration says.
        """
        spans = [*self._train, *self._eval]
        files = {file.path: file for span in spans for file in span.windows.files}
        digest = hashlib.sha256("".join(file.fingerprint() for file in files.values()).encode())
        tokens = sum(len(file.tokens) for file in files.values())
        names = [*map(str, files)]
        more = f" and {len(names) - 3} more files" if len(names) > 3 else ""
        return {
            "data": f"{tokens} tokens in {', '.join(names[:3])}{more}",
            "data_hash": digest.hexdigest(),
        }


def _sources(
    path: Paths | None, sources: Mapping[str, Mapping[str, Any]] | None
) -> dict[str, tuple[Paths, Fraction]]:
    """Path and weight of each source, by the key that named it."""
    if (path is None) == (sources is None):
        raise ValueError(
            "one of task.path and task.sources must be given, and not both: task.path=PREFIX, or "
            "'task.sources={NAME: {path: PREFIX, weight: 1}, …}'"
        )
    if path is not None:
        return {"task.path": (path, Fraction(1))}
    if not isinstance(sources, Mapping) or not sources:
        raise ValueError(
            f"task.sources must be {{NAME: {{path: PREFIX, weight: 1}}, …}}, got {sources!r}"
        )
    found = {}
    for name, source in sources.items():
        key = f"task.sources.{name}"
        if not isinstance(source, Mapping) or set(source) != {"path", "weight"}:
            raise ValueError(f"{key} must be {{path: PREFIX, weight: 1}}, got {source!r}")
        real_number(source["weight"], f"{key}.weight", above=0.0)
        found[key] = (source["path"], Fraction(str(source["weight"])))
    return found


def _vocabulary(vocabulary: int | None, files: Mapping[str, Sequence[TokenFile]]) -> int:
    limits = {
        file.path: int(file.sidecar["vocabulary"])
        for of in files.values()
        for file in of
        if "vocabulary" in file.sidecar
    }
    if vocabulary is None:
        known = f" ({max(limits.values())} for these files)" if limits else ""
        raise ValueError(
            f"task.vocabulary must be given{known}: the number of ids of the tokenizer, for the "
            "model has a row for each; a multiple of 64 is faster on most devices"
        )
    vocabulary = whole_number(vocabulary, "task.vocabulary", 2)
    for path, least in limits.items():
        if least > vocabulary:
            raise ValueError(
                f"task.vocabulary must be at least {least}, that of the tokenizer of {path}, got "
                f"{vocabulary}"
            )
    return vocabulary


def _span(name: str, windows: Windows) -> Span:
    if not len(windows):
        tokens = max(len(file.tokens) for file in windows.files)
        raise ValueError(
            f"{name} has no file that fills a sequence: task.sequence_length={windows.length} "
            f"needs {windows.length + 1} tokens, and the longest has {tokens}"
        )
    windows.probe()
    return Span(windows, 0, len(windows))


def _held_out(spans: Sequence[Span], fraction: float) -> tuple[list[Span], list[Span]]:
    """Each source without its last part, and the parts; at least one window each."""
    train, held_out = [], []
    for windows, size in ((span.windows, span.size) for span in spans):
        part = max(1, round(size * fraction))
        if size < 2:
            raise ValueError(
                f"{windows.files[0].path} fills one sequence of {windows.length} tokens, and one "
                "must be held out: lower task.sequence_length or give task.eval_path"
            )
        train.append(Span(windows, 0, size - part))
        held_out.append(Span(windows, size - part, part))
    return train, held_out


def _eval_rows(spans: Sequence[Span], weights: tuple[int, ...], num_eval: int | None) -> Indices:
    """The evaluation set, as indices into `spans`: by weight, and none twice."""
    wanted = MOST_EVAL if num_eval is None else whole_number(num_eval, "task.num_eval", 1)
    sizes = tuple(span.size for span in spans)
    sources, draws = dealt(0, min(wanted, sum(sizes) + 1), weights)
    spent = np.flatnonzero(draws >= np.array(sizes)[sources])
    if len(spent) and num_eval is not None:
        raise ValueError(
            f"task.num_eval must be at most {spent[0]}, what is held out in the sources' "
            f"proportions, got {wanted}: raise task.eval_fraction, or give a longer task.eval_path"
        )
    count = int(spent[0]) if len(spent) else wanted
    return Mixture(sum(sizes), 0, False, sizes, weights).take(0, count)


def _batch(spans: Sequence[Span], indices: Indices) -> Batch:
    tokens = torch.from_numpy(read_spans(spans, indices))  # (samples, length + 1)
    return tokens[:, :-1], tokens[:, 1:]
