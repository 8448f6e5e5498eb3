"""`cdlm lm-eval run`: the harness's own command line, with the models of this toolkit."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.parsing import nearest

WORDS = ("run", "ls", "validate")
"""Its commands."""
HELP = """usage: cdlm lm-eval run --model_args pretrained=RUN[,name=value,...] --tasks TASK [TASK ...] [settings]

lm-evaluation-harness with models of this toolkit. The settings are the harness's own: cdlm lm-eval run --help lists
them, cdlm lm-eval ls tasks its tasks. Two differ: --model is cdlm, and --batch_size is the model's own if it is not
given. docs/lm-eval.md has the names of model_args, and the settings of published tables.
"""


def run(argv: list[str]) -> None:
    """Do what the arguments say, with the harness.

    Raises:
        CdlmError: the harness is not installed, or refuses something.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if argv[0] not in WORDS:
        raise CdlmError(f"lm-eval has no command {shown(argv[0])}{nearest(argv[0], WORDS)}: use {', '.join(WORDS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    harness, settings = understood(argv)
    with _several_processes(), _one_line():
        harness.execute(settings)


def parser() -> argparse.ArgumentParser:
    """The commands, for completion."""
    made = argparse.ArgumentParser(prog="cdlm lm-eval")
    made.add_argument("command", choices=WORDS)
    return made


def understood(argv: list[str]) -> tuple[Any, argparse.Namespace]:
    """The harness's command line, and the arguments as it reads them.

    Raises:
        CdlmError: it refuses them, or `model_args` are not ours.
    """
    harness = _harness(argv)
    settings = _parsed(harness, argv)
    if argv[0] == "run":
        _settle(settings)
    return harness, settings


def _harness(argv: list[str]) -> Any:
    """The harness's command line; it knows our models once the adapter is imported."""
    if argv[0] == "run":
        import cdlm.lm_eval.adapter  # noqa: F401
    try:
        from lm_eval._cli import HarnessCLI
        from lm_eval.utils import setup_logging
    except ImportError as error:
        raise CdlmError(
            f"lm-evaluation-harness is not installed ({first_line(error)}): pip install 'cdlm[lm-eval]'"
        ) from error
    setup_logging()
    return HarnessCLI()


def _parsed(harness: Any, argv: list[str]) -> argparse.Namespace:
    """The arguments as the harness reads them, from `sys.argv` alone."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["cdlm lm-eval", *argv]
    try:
        with redirect_stderr(said):
            return harness.parse_args()
    except SystemExit as left:
        if not left.code:
            raise
        raise CdlmError(f"{_last_line(said.getvalue())} (cdlm lm-eval {argv[0]} --help lists the settings)") from left
    finally:
        sys.argv = before


def _last_line(said: str) -> str:
    """What argparse complains of, without its name and the usage before it."""
    line = (said.strip().splitlines() or ["the harness refuses the arguments"])[-1]
    return line.partition(": error: ")[2] or line


def _settle(settings: argparse.Namespace) -> None:
    """Fill in what is ours, and refuse what cannot be."""
    from cdlm.lm_eval.adapter import NO_CACHE
    from cdlm.lm_eval.arguments import read_arguments

    if settings.model not in (None, "cdlm"):
        raise CdlmError(f"cdlm lm-eval runs models of this toolkit, --model cdlm, got {shown(settings.model)}")
    settings.model = "cdlm"
    if settings.use_cache is not None:
        raise CdlmError(NO_CACHE)
    if settings.config is None:
        read_arguments(settings.model_args or {})  # before the tasks are loaded
        if not hasattr(settings, "batch_size"):
            settings.batch_size = "auto"


@contextmanager
def _several_processes() -> Iterator[None]:
    """Under `torchrun` the processes find each other, each on its own device; the harness deals the requests."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    import torch

    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def _one_line() -> Iterator[None]:
    """What the harness and its libraries raise of bad input, as one line. LMEVAL_LOG_LEVEL=DEBUG shows where it was."""
    try:
        yield
    except (CdlmError, RuntimeError, MemoryError, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get("LMEVAL_LOG_LEVEL") == "DEBUG" or _is_ours(error):
            raise
        raise CdlmError(
            f"the harness ended with {type(error).__name__}: {first_line(error)}; LMEVAL_LOG_LEVEL=DEBUG shows where"
        ) from error


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised in this toolkit, where it is a fault."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return place is not None and str(place.tb_frame.f_globals.get("__name__", "")).startswith("cdlm.")
