"""Draw samples: the same as `cdlm sample`."""

import sys

from cdlm.cli.main import main

if __name__ == "__main__":
    main(["sample", *sys.argv[1:]])
