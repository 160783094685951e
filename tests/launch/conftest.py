"""Lets the tests, and the processes they spawn, import this folder's modules."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Parsl starts programs of its own by their names: those of this environment, activated or not.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
