"""Lets all tests, and the processes they spawn, import the modules in shared/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "shared"))
