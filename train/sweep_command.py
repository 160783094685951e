"""`largebatch sweep`: a Hydra multirun, or a whole study with `study=…`."""

from largebatch.train.command import run_command


def main(arguments: list[str]) -> int:
    """Run `largebatch sweep ARGUMENTS`; returns the exit code."""
    # Beside --multirun, Hydra takes no --cfg: for what is shown there.
    return run_command("sweep", ["hydra.mode=MULTIRUN", *arguments])
