"""Words of the shell: text that a script is to keep as it is."""

import shlex
from typing import Any


def comment(text: str) -> str:
    """In one line, as a line's end is a comment's."""
    return f"# {' '.join(text.split())}"


def word(text: str) -> str:
    """One word of the shell, as it stands; a comma in an array looks like a mistake, unquoted."""
    found = shlex.quote(text)
    return f"'{text}'" if found == text and "," in text else found


def quoted(value: Any) -> str:
    """A word of the shell in which `$NAME` is expanded and nothing else happens."""
    text = str(value)
    for mark in ("\\", '"', "`"):
        text = text.replace(mark, "\\" + mark)
    return f'"{text}"'
