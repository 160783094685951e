"""A job, and how text stays text in the words of its script."""

import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from largebatch.conf.cluster_config import ClusterConfig, SubmitConfig
from largebatch.launch.jobs.binding import Binding, bind

Lines = Iterator[str]
"""Of a script."""

_MARKS: Final = re.compile(
    # What a shell sees between double quotes, but for the $ of a plain $NAME or ${NAME}.
    r"""[\\"`]|\$(?!(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\}))"""
)


@dataclass(frozen=True)
class Job:
    """All that a script is written from: the words of `largebatch train|sweep …`, or the `program`
    that runs in their place, whose "python" is the job's; the folder of the run's record; and
    the words by which the user asked for the job.
    """

    config: SubmitConfig
    words: Sequence[str]
    record: str
    request: Sequence[str]
    program: Sequence[str] | None = None

    @property
    def cluster(self) -> ClusterConfig:
        return self.config.cluster

    @property
    def on_ranks(self) -> bool:
        """One process a rank; a sweep is one process, whose launcher starts the trials."""
        return self.words[0] == "train"

    @property
    def python(self) -> str:
        """The job's own, or the one that runs this, whose environment need not be active."""
        cluster = self.cluster
        if cluster.venv or cluster.modules or cluster.setup or cluster.environment == "spread":
            return "python"
        return word(sys.executable)

    @property
    def command(self) -> Lines:
        """The words of the command, some a line."""
        if self.program is None:
            yield f"{self.python} -m largebatch"
            yield from map(word, self.words)
        else:
            yield from (self.python if text == "python" else word(text) for text in self.program)

    @property
    def binding(self) -> Binding | None:
        cluster = self.cluster
        return bind(
            cluster.node,
            oneccl=cluster.collectives == "oneccl",
            copper=cluster.environment == "copper",
            daos=cluster.daos is not None,
        )


def comment(text: str) -> str:
    """In one line, as a line's end is a comment's."""
    return f"# {' '.join(text.split())}"


def word(text: str) -> str:
    """One word of the shell, as it stands; a comma in an array looks like a mistake, unquoted."""
    found = shlex.quote(text)
    return f"'{text}'" if found == text and "," in text else found


def quoted(value: Any) -> str:
    """A word of the shell in which `$NAME` is expanded and nothing else happens."""
    return f'"{_MARKS.sub(lambda mark: chr(92) + mark[0], str(value))}"'
