"""Bad values of settings: each odd text at each setting of each command."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from hostile.trials import Trial

from cdlm.cli.commands import COMMANDS
from cdlm.cli.main import function_of, main, parser_of

WHOLE = {
    "a huge number": "1" + 23 * "0", "a number of 5,000 digits": 5000 * "9", "minus one": "-1", "not a number": "nan",
    "infinity": "inf", "a word": "x", "a fraction": "1.5", "a power": "1e400", "hexadecimal": "0x10", "nothing": "",
    "a list": "1,2", "two": "1 2", "NUL": "1\0",
}  # fmt: skip
REAL = {kind: text for kind, text in WHOLE.items() if kind not in ("a huge number", "a fraction")}
CALLS = {
    "a word": "Evil", "half a character": "\ud800", "NUL": "a\0b", "very long": 100_000 * "x", "a tag": "<b>x</b>",
    "control characters": "\x1b[2J\x07", "brackets": 10_000 * "(", "code": "__import__('os').system('id')",
    "1,000 &": " & ".join(1000 * ["Evil(2)"]), "a power": "Patience(10**23)", "a lambda": "lambda: 0",
    "a huge argument": "Patience(100000000000000000000000)", "no argument": "Patience()", "a list": "[1, 2]",
    "a keyword": "Patience(nope=1)", "itself": "Patience(Patience(1))", "a format": "{0.__class__}",
    "a bad number": "Patience(-1)", "a truth": "Patience(True)", "two": "Patience(1), Patience(2)", "a line": "a\nb",
}  # fmt: skip
PATHS = {
    "nothing": "", "NUL": "a\0b", "a long name": 300 * "n", "half a character": "\ud800",
    "a process": "/proc/nobody/x.jsonl",
}  # fmt: skip
FREE = {"prompt", "run", "name", "names", "models", "run_dir", "judge", "source", "tokenizer", "text", "texts"}
"""Settings that take any text, or the name of what may be on the Hub."""
RIGHT = {
    ("guidance", "minus one"), ("seed", "a huge number"), ("max_change", "a power"), ("halt", "two"),
}  # fmt: skip
"""Odd values that are right."""


def odd(hint: Any) -> Mapping[str, str]:
    """Bad values of a setting of this type."""
    if get_origin(hint) in (Union, types.UnionType):
        parts = [part for part in get_args(hint) if part is not types.NoneType]
        return CALLS if str in parts else odd(parts[0])
    if get_origin(hint) in (list, tuple, Sequence):
        return odd(get_args(hint)[0])
    if get_origin(hint) is Literal or hint is bool:
        return CALLS
    kinds: dict[Any, Mapping[str, str]] = {int: WHOLE, float: REAL, Path: PATHS, str: CALLS}
    return kinds[hint]


def settings_trials(base: Mapping[str, Sequence[str]]) -> Iterator[Trial]:
    """Trials of all settings of the commands.

    Args:
        base: for each command, arguments with which it works and is quick.
    """
    for command in COMMANDS:
        if command.own or command.name not in base:
            continue
        for name, parameter in parser_of(command, function_of(command)).members.items():
            for kind, text in odd(parameter.hint).items():
                if name in FREE or parameter.positional or (name, kind) in RIGHT:
                    continue
                argv = [command.name, *base[command.name], f"--{name.replace('_', '-')}={text}"]
                yield Trial(kind, f"{command.name} --{name}", lambda argv=argv: main(argv))
