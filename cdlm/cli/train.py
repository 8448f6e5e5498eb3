"""`cdlm train`: the settings of a run come from the command line and from YAML files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cdlm import api
from cdlm.config import parse_run, read_run, run_parser
from cdlm.core.errors import CdlmError


def run(argv: list[str]) -> None:
    """Train as the arguments say."""
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    extras, rest = _extras(own).parse_known_args(argv)
    if "-h" in rest or "--help" in rest:
        parser().print_help()
        return
    if any(argument.endswith(".help") for argument in rest):
        run_parser("cdlm train").parse_args(rest)  # prints it and exits
    if extras.text:
        rest = ["--source", "Files", "--source.paths", json.dumps(extras.text), *rest]
    if extras.resume:
        read_run(extras.resume)
        rest = ["--config", str(Path(extras.resume) / "config.yaml"), *rest]  # first, so that the command line wins
    if bool(extras.out) == bool(extras.resume):
        raise CdlmError("train needs one run folder: --out DIR for a new run, or --resume DIR to continue one")
    config, text = parse_run(rest)
    api.train(config, Path(extras.out or extras.resume), text, bool(extras.resume), not extras.quiet)


def parser() -> argparse.ArgumentParser:
    """All settings."""
    return _extras(run_parser("cdlm train"))


def _extras(parser: Any) -> Any:
    parser.add_argument("--out", help="folder of a new run")
    parser.add_argument("--resume", help="folder of a run to continue")
    parser.add_argument("--text", nargs="+", help="shorthand for --source Files --source.paths: your own text files")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser
