"""Run trials of bad input, each in a process of its own, and print a table of what came of them:

OMP_NUM_THREADS=1 PYTHONPATH=tests:. python -X dev -m hostile [--seed S] [--count N] [GROUP ...]
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence

COLUMNS = (
    "group",
    "tried",
    "clear lines",
    "rightly accepted",
    "tracebacks",
    "silent nonsense",
    "refused unclearly",
    "hangs",
)
SLOW = 10.0
"""Seconds after which a trial is named, though it ended well."""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(prog="hostile", description="Trials of bad input.")
    parser.add_argument(
        "groups", nargs="*", metavar="GROUP", help="rules, texts, calls, settings, interfaces, files; by default all"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    parser.add_argument("--count", type=int, help="trials of each group, at most; by default all, and of files 624")
    parser.add_argument("--limit", type=float, default=30.0, help="seconds that a trial may take")
    return parser.parse_args(argv)


def tried(group: str, seed: int, count: int | None, limit: float) -> Counter[str]:
    """Run a group, and print each bad result in one line.

    Returns:
        how many results there are, by column.
    """
    from hostile.groups import GROUPS
    from hostile.trials import attempts

    found = Counter[str]()
    for result in attempts(GROUPS[group](seed, count), limit):
        found.update(("tried", result.column))
        if result.bad:
            print(f"{group}: {' '.join(str(result).split())}", flush=True)
        elif result.seconds > SLOW:
            print(f"{group}: {result.seconds:.0f} s: {result.trial.place}, {result.trial.kind}", flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 1 if anything is to be mended."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the library is imported
    from hostile.groups import GROUPS

    asked = arguments(argv)
    if unknown := set(asked.groups) - set(GROUPS):
        print(f"there is no group {min(unknown)!r}: choose of {', '.join(GROUPS)}", file=sys.stderr)
        return 2
    counts = {group: tried(group, asked.seed, asked.count, asked.limit) for group in asked.groups or GROUPS}
    total = sum(counts.values(), Counter[str]())
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name, row in [*counts.items(), ("all", total)]:
        print(f"| {' | '.join([name, *(f'{row[column]:,}' for column in COLUMNS[1:])])} |")
    return int(total["tried"] > total["clear lines"] + total["rightly accepted"])


if __name__ == "__main__":
    sys.exit(main())
