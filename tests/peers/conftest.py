"""Lets the tests import this folder's six_optimizers.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
