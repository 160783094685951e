"""`largebatch sweep`: a Hydra multirun, or a whole study with `study=…`."""

import sys

from largebatch.conf.errors import ConfigError
from largebatch.train.command import INTERRUPTED, REFUSED, job, run_hydra


def main(arguments: list[str]) -> int:
    """Run `largebatch sweep ARGUMENTS`; returns the exit code."""
    try:
        run_hydra(job, "sweep", ["--multirun", *arguments])
    except ConfigError as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("largebatch: interrupted; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    return 0
