"""Lets the tests, and the processes they spawn, find this folder's modules and programs."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Stand-ins are begun by `env python`, MPI ranks by `mpiexec`: those of this environment, active or
# not.
os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
