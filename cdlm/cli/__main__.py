"""`python -m cdlm.cli` is `cdlm`."""

from cdlm.cli.main import main

if __name__ == "__main__":
    main()
