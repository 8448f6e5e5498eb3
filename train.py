"""Train a model: the same as `cdlm train`."""

import sys

from cdlm.cli.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
