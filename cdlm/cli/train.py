"""`cdlm train`: arguments to a `RunConfig`, and the run."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from inspect import signature
from pathlib import Path
from typing import Any

from cdlm.core.errors import CdlmError
from cdlm.core.progress import to_stderr
from cdlm.data.sources import SOURCES
from cdlm.halting.update_map import FILE
from cdlm.masked.system import Masked
from cdlm.models import hub
from cdlm.models.lora import LoraSettings, is_adapter, share_of, trained_size
from cdlm.models.system import System
from cdlm.runs.config import (
    SYSTEMS,
    RunConfig,
    as_yaml,
    class_values,
    parse_run,
    print_help_of,
    read_run,
    run_arguments,
    run_parser,
    system_config,
)
from cdlm.training.options import TrainOptions

PROG = "cdlm train"
LORA = ("lora", "lora_alpha", "lora_dropout", "lora_modules")
"""Options of an adapter."""
OWN = ("out", "resume", "start", "text", "quiet", *LORA)
"""Options of the command that are no settings of the run."""
ALIASES = {"device": "training.accelerator"}
"""Short names that are not the last word of the setting."""
ABOUT = """
The group of a setting may be left out where no other setting has that name: --steps is --training.steps, --lr is
--training.lr, --width is --system.width, and --device is --training.accelerator. --batch-size and --batch_size are the
same. Settings of a system or a source: cdlm train --system.help Plaid, cdlm train --source.help Files."""


def run(argv: list[str]) -> None:
    """Train a model as the arguments say, or print the help.

    Raises:
        CdlmError: an argument is unknown or has a bad value, or the run fails; see `cdlm.runs.train`.
    """
    own, rest = _own(argv)
    if "-h" in rest or "--help" in rest:
        parser().print_help()
        return
    if any(".help" in word for word in rest):
        print_help_of(rest, PROG)
    if own.resume:
        read_run(own.resume)  # says what is wrong with the folder
    if bool(own.out) == bool(own.resume):
        raise CdlmError("train needs one run folder: --out DIR for a new run, or --resume DIR to continue one")
    if own.resume and own.start:
        raise CdlmError("--resume continues a run from its own checkpoint and --start begins a new one: give one")
    from cdlm.runs.train import train

    lora = _lora(own)
    config = parse_run([*_defaults(own), *rest])  # the defaults first, so that the command line wins
    out = own.out or own.resume
    system = train(config, out, resume=bool(own.resume), start=own.start, lora=lora, progress=not own.quiet)
    if system.adapter is not None and not own.quiet:
        _say_size(system, out)


def _lora(own: argparse.Namespace) -> LoraSettings | None:
    """The adapter that the arguments ask for.

    Raises:
        CdlmError: they ask for one that there cannot be, or for none and say how it is to be.
    """
    if own.lora is None:
        if given := next((name for name in LORA if getattr(own, name) is not None), None):
            raise CdlmError(f"--{given.replace('_', '-')} is of an adapter: say its rank, with --lora RANK")
        return None
    if own.resume:
        raise CdlmError("--resume continues a run with the adapter that it has: leave out --lora")
    modules = None if own.lora_modules is None else tuple(own.lora_modules)
    return LoraSettings(own.lora, own.lora_alpha, own.lora_dropout or 0.0, modules)


def _say_size(system: System, out: str) -> None:
    assert system.adapter is not None
    made = system.adapter.update_map(system.network)
    to_stderr(f"{out}: an adapter of {trained_size(system.network):,} numbers on {system.adapter.base}")
    if made is not None:
        to_stderr(f"{out}/{FILE}: {share_of(made, system.network)}")


def _defaults(own: argparse.Namespace) -> Iterator[str]:
    """What the run's settings are before the command line changes them."""
    if own.resume:
        yield from run_arguments(own.resume)
    if own.start:
        yield from ("--config", as_yaml(_settings_of(hub.locate(own.start))))
    if own.lora is not None:
        yield from ("--training.optimizer", "adamw")
    if own.text:
        yield from ("--source", "Files", "--source.paths", as_yaml(own.text))


def _settings_of(start: Path) -> dict[str, Any]:
    """What a run takes over from the model that it starts from."""
    if hub.is_foreign(start):
        return {"system": class_values(Masked())}
    if is_adapter(start):
        raise CdlmError(f"{start} holds an adapter: merge it into its base with cdlm merge, and start from the result")
    config = hub.read_config(start)
    return {"length": config["length"], "system": class_values(system_config(config["model"]))}


def _own(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments that are not settings of the run, and the others, each by the full path of its setting."""
    parser = _add_own(argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False))
    try:
        own, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise CdlmError(f"{error} ({PROG} --help lists the settings)") from error
    return own, [_full(word) for word in rest]


def _add_own(parser: Any) -> Any:
    parser.add_argument("--out", help="folder of a new run")
    parser.add_argument("--resume", help="folder of a run to continue; steps, learning rates and intervals may change")
    parser.add_argument(
        "--start",
        help="run folder or Hub id of a trained model to begin with (fine-tuning): its weights, system, length and"
        " tokenizer, with new text and new --training settings",
    )
    parser.add_argument(
        "--lora", type=int, metavar="RANK", help="train an adapter of this rank beside the weights of --start, by AdamW"
    )
    parser.add_argument("--lora-alpha", type=float, help="scale of the adapter, by default twice its rank")
    parser.add_argument("--lora-dropout", type=float, help="dropout of what enters the adapter, by default 0")
    parser.add_argument(
        "--lora-modules",
        nargs="+",
        metavar="NAME",
        help="layers to adapt, by default those of queries, keys and values",
    )
    parser.add_argument("--text", nargs="+", help="shorthand for --source Files --source.paths: your own text files")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


def parser() -> Any:
    """All settings, for the help and for completion."""
    made = _add_own(run_parser(PROG))
    made.epilog = ABOUT
    for action in made._actions:  # as in all other commands; `_full` reads both
        action.option_strings = [option.replace("_", "-") for option in action.option_strings]
        if isinstance(action.metavar, str):  # jsonargparse takes back the blank before one of them by a backspace
            action.metavar = action.metavar.lstrip("\b")
    return made


def _full(word: str) -> str:
    """An option with the full path of its setting; other words as they are.

    Raises:
        CdlmError: there is no such option; names the nearest one.
    """
    if not word.startswith("--") or word == "--help":
        return word
    name, equals, value = word[2:].partition("=")
    name = name.replace("-", "_")
    paths = _paths()
    path = paths.get(name, name)
    if path.split(".")[-1] != "help" and path.replace("init_args.", "").rstrip("+") not in paths.values():
        raise _unknown(name, paths | {own: own for own in OWN})
    return f"--{path}{equals}{value}"


def _paths() -> dict[str, str]:
    """The full path of a setting by all names that it has, the full one too."""
    groups = {"source": [*SOURCES.values()], "system": [*SYSTEMS.values()], "training": [TrainOptions]}
    settings = {group: [n for kind in kinds for n in signature(kind).parameters] for group, kinds in groups.items()}
    top = [*signature(RunConfig).parameters, "config", "print_config", "source.class_path", "system.class_path"]
    full = [*top, *(f"{group}.{name}" for group, names in settings.items() for name in names)]
    short = {name: f"{group}.{name}" for group in ("system", "training") for name in settings[group]}
    return short | ALIASES | {name: name for name in full}


def _unknown(name: str, paths: dict[str, str]) -> CdlmError:
    close = [near for text in (name, name.split(".")[-1]) for near in difflib.get_close_matches(text, paths, 1, 0.6)]
    path = paths[close[0]] if close else ""
    hint = f": did you mean --{close[0]}{'' if path == close[0] else f' (--{path})'}?" if close else ""
    return CdlmError(f"there is no option --{name}{hint} ({PROG} --help lists all)")
