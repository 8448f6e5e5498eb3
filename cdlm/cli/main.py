"""The command line: arguments in, one call, files out. Settings come from the signatures of the functions."""

from __future__ import annotations

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from cdlm.core.errors import CdlmError

HELP = """usage: cdlm COMMAND [settings]

  train        train a model on text, into a run folder
  sample       draw samples from a model, with adaptive halting
  replay       try halting rules on recorded runs, without the model
  calibrate    choose a rule's setting by the quality it may lose
  compare      draw quality over calls of halting rules: table and plot
  study        small experiments about halting: cdlm study NAME
  evaluate     measure samples beside real text, or the likelihood of text
  convert      published weights to a model folder and back: plaid, ssd, langflow
  train-judge  train a small autoregressive judge on a run's text

cdlm COMMAND --help lists the settings of a command."""


def main(argv: list[str] | None = None) -> None:
    """Run a command; bad input ends with one line on standard error and exit code 2."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        _dispatch(argv)
    except CdlmError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _dispatch(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP)
        return
    name, rest = argv[0], argv[1:]
    if name == "train":
        from cdlm.cli import train

        train.run(rest)
        return
    from transformers.utils.logging import disable_progress_bar

    from cdlm.cli import commands

    disable_progress_bar()  # its bars are about loading files, ours about samples
    if name == "study":
        _study(rest)
        return
    functions: dict[str, Callable[..., None]] = {
        "sample": commands.sample, "replay": commands.replay, "calibrate": commands.calibrate,
        "compare": commands.compare,
        "evaluate": commands.evaluate, "convert": commands.convert, "train-judge": commands.train_judge,
    }  # fmt: skip
    if name not in functions:
        raise CdlmError(f"there is no command {name!r}: use one of train, study, {', '.join(functions)}")
    functions[name](**_arguments(functions[name], f"cdlm {name}", rest))


def _study(argv: list[str]) -> None:
    from cdlm import studies

    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: cdlm study NAME [settings], NAME is one of {', '.join(studies.names())}")
        return
    if not argv:
        raise CdlmError(f"study needs a name: use one of {', '.join(studies.names())}")
    name, rest = argv[0], argv[1:]
    study, defaults = studies.find(name)
    print(study(**_settings(study, defaults, f"cdlm study {name}", rest)).run(name))


def _settings(kind: type[Any], defaults: Path, prog: str, argv: list[str]) -> dict[str, Any]:
    """What to build `kind` from: the defaults, over them a file given with --config, over that the command line."""
    from jsonargparse import ArgumentParser

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    own.add_argument("--config")
    given, rest = own.parse_known_args(argv)
    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False, default_config_files=[str(defaults)])
    parser.add_class_arguments(kind)
    parser.add_argument("--config", action="config", help="YAML file of these settings")
    first = ["--config", given.config] if given.config else []  # so that the command line wins
    values = _parsed(parser, prog, first + _lists(kind, _flags(kind, rest), leading=False))
    return {key: value for key, value in values.items() if key != "config"}


def _arguments(function: Callable[..., None], prog: str, argv: list[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False)
    parser.add_function_arguments(function, as_positional=True)
    return _parsed(parser, prog, _lists(function, _words(function, _flags(function, argv))))


def _parsed(parser: Any, prog: str, argv: list[str]) -> dict[str, Any]:
    from jsonargparse import ArgumentError

    try:
        return vars(parser.instantiate(parser.parse_args(argv)))
    except ArgumentError as error:
        raise CdlmError(f"{error.message or error} ({prog} --help lists the settings)") from error


def _flags(function: Callable[..., Any], argv: list[str]) -> list[str]:
    """`--flag` alone as `--flag=true`."""
    hints = get_type_hints(function)
    return [
        f"{word}=true"
        if word.startswith("--")
        and hints.get(word[2:].replace("-", "_")) is bool
        and following.lower() not in ("true", "false", "yes", "no")
        else word
        for word, following in zip(argv, [*argv, ""][1:], strict=True)
    ]


def _words(function: Callable[..., Any], argv: list[str]) -> list[str]:
    """A word beyond the required ones as the next parameter, if that is a file."""
    hints, parameters = get_type_hints(function), inspect.signature(function).parameters
    required = [name for name, parameter in parameters.items() if parameter.default is parameter.empty]
    after = list(parameters)[len(required)] if len(required) < len(parameters) else ""
    found, bare, wants_value = list[str](), 0, False
    for word in argv:
        if not word.startswith("--") and not wants_value:
            bare += 1
            if bare == len(required) + 1 and Path in get_args(hints.get(after)):
                word = f"--{after}={word}"
        found.append(word)
        wants_value = word.startswith("--") and "=" not in word
    return found


def _lists(function: Callable[..., Any], argv: list[str], leading: bool = True) -> list[str]:
    """`--name A B --name C` and a leading `A B`, of parameters that are lists, as the JSON that the parser reads."""
    hints = get_type_hints(function).items()
    kinds = (str, int, float)
    lists = {name: args[0] for name, hint in hints if (args := get_args(_required(hint))) and args[0] in kinds}
    first = next(iter(inspect.signature(function).parameters)) if leading else None
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    named: set[str] = set()
    current = first if first in lists else None
    for word in argv:
        name, given, value = word.removeprefix("--").partition("=")
        if word.startswith("--"):
            name = name.replace("-", "_")  # --max-loss is --max_loss
            word = f"--{name}{given}{value}"
            current = name if name in lists else None
            named.add(name)
            if current is None:
                rest.append(word)
            elif given:
                values.setdefault(current, []).append(value)
        elif current is not None:
            values.setdefault(current, []).append(word)
        else:
            rest.append(word)
    for name in lists.keys() & named - values.keys():
        raise CdlmError(f"--{name} needs at least one value")
    texts = {name: json.dumps([item if lists[name] is str else _number(item) for item in items])
             for name, items in values.items()}  # fmt: skip
    positional = [texts.pop(first)] if first in texts else []
    return positional + rest + [f"--{name}={text}" for name, text in texts.items()]


def _required(hint: Any) -> Any:
    """A list type without the `| None` of a parameter that may be left out; None for other types."""
    return next((part for part in (hint, *get_args(hint)) if get_origin(part) is list), None)


def _number(text: str) -> int | float | str:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        return text


def _fail(message: str, code: int) -> None:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # the processes of a parallel run all fail alike
        print("cdlm: " + " ".join(message.split()), file=sys.stderr)
    raise SystemExit(code)
