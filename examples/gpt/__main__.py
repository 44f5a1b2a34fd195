"""`python examples/gpt`: the folder above is where the package is found."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from gpt.cli import main

    sys.exit(main())
