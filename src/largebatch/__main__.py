"""`python -m largebatch COMMAND` is `largebatch COMMAND`."""

import sys

from largebatch.cli import main

if __name__ == "__main__":
    sys.exit(main())
