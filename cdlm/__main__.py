"""`python -m cdlm` is `cdlm`."""

from cdlm.cli.main import main

if __name__ == "__main__":
    main()
