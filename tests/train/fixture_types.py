"""What the fixtures of conftest.py are, by type."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., "subprocess.CompletedProcess[str]"]
Train = Callable[..., int]
ReadRun = Callable[[Path], tuple[list[dict[str, Any]], dict[str, Any]]]
