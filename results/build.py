"""Builds the tables of results and the pages that show them: `python results/build.py --help`."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the cdlm of this checkout, whatever is installed
    from rebuild.cli import main

    main()
