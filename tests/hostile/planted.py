"""A module that broken files name. Nothing may import it: a file is data."""


def run(*_: object) -> object:
    """What a file would have called."""
    return object()
