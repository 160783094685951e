"""`largebatch env pack|spread`: a Python environment on every node's own disk.

Tens of thousands of ranks that import from one file system ask it for hundreds of millions of
file names. So: pack the environment once, spread it over MPI.
"""

import argparse
import sys
from pathlib import Path
from typing import Final

from largebatch.launch.environments.archive import EnvError
from largebatch.records.outcomes import ExitCode


def main(arguments: list[str]) -> int:
    """Run `largebatch env ARGUMENTS`; returns 0, 1 (failed on some node), or 2 (refused)."""
    options = _parser().parse_args(arguments)
    try:
        return _pack(options) if options.command == "pack" else _spread(options)
    except EnvError as error:
        print(f"largebatch: {error}", file=sys.stderr)
        return ExitCode.REFUSED


def _pack(options: argparse.Namespace) -> int:
    from largebatch.launch.environments.pack import pack

    print(pack(options.python, options.output, with_site=options.with_site))
    return 0


def _spread(options: argparse.Namespace) -> int:
    if options.copper:
        print(COPPER_IN_WORDS, file=sys.stderr, flush=True)
        print(COPPER)
        return 0
    if options.archive is None:
        raise EnvError("env spread needs the ARCHIVE that env pack has made (or --copper)")
    from largebatch.launch.environments.spread import spread

    return spread(options.archive, options.to, options.timeout)


COPPER_IN_WORDS: Final = """\
Copper caches reads of one path on every node; for imports only, never for what a job writes. It is
mounted at /tmp/$USER/copper; files above 10 MB are not cached by default. Keep ranks and CCL
workers off its cores, 48-51. Prefix only the path of your own environment, not the module's:
"""

_PYTHON: Final = "python{}.{}".format(*sys.version_info)
# Without comments, which an interactive zsh takes for words of a command.
COPPER: Final = f"""\
module load copper
launch_copper.sh
export PYTHONPATH=/tmp/$USER/copper$VIRTUAL_ENV/lib/{_PYTHON}/site-packages
mpiexec -n $RANKS --ppn 12 python -m largebatch train
stop_copper.sh"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="largebatch env",
        description="A Python environment on every node's own disk.",
        epilog="exit codes: 0 done; 1 some node failed, and is named; 2 refused",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    pack = commands.add_parser("pack", help="a relocatable archive of a virtual environment")
    add = pack.add_argument
    add("output", type=Path, metavar="OUTPUT.tar.gz|.tar.zst", help="the archive, not there yet")
    add("--python", type=Path, default=Path(sys.prefix), metavar="PREFIX",
        help="the virtual environment (default: the one that runs this, %(default)s)")  # fmt: skip
    add("--with-site", action="store_true",
        help="also the packages that it sees in its base Python or module "
        "(--system-site-packages); without, these are read from where they are")  # fmt: skip

    spread = commands.add_parser("spread", help="under mpiexec: the archive onto every node")
    add = spread.add_argument
    add("archive", type=Path, nargs="?", metavar="ARCHIVE", help="of largebatch env pack")
    add("--to", type=Path, metavar="DIR",
        help="on each node (default: /tmp/$USER/NAME-HASH, a folder of this archive's own)",
    )  # fmt: skip
    add("--timeout", type=float, default=120.0, metavar="SECONDS",
        help="without progress, after which a rank is taken for lost (default: %(default)g)",
    )  # fmt: skip
    add("--copper", action="store_true", help="print how Copper does it on Aurora instead")
    return parser
