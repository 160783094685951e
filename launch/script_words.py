"""Words of the shell: text that a script is to keep as it is."""

import re
import shlex
from typing import Any, Final

_MARKS: Final = re.compile(
    # What a shell sees between double quotes, but for the $ of a plain $NAME or ${NAME}.
    r"""[\\"`]|\$(?!(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*\}))"""
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
