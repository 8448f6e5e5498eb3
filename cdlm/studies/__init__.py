"""Studies: small experiments about halting. A study is a module, and beside it the YAML file of its settings."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from cdlm.core.errors import CdlmError
from cdlm.studies.study import Study

_HERE = Path(__file__).parent


def names() -> list[str]:
    """Every study: one for each YAML file of this folder."""
    return sorted(file.stem for file in _HERE.glob("*.yaml"))


def find(name: str) -> tuple[type[Study], Path]:
    """A study's class, whose fields are its settings, and the YAML file with their defaults."""
    if name not in names():
        raise CdlmError(f"there is no study {name!r}: use one of {', '.join(names())}")
    return import_module(f"cdlm.studies.{name.replace('-', '_')}").STUDY, _HERE / f"{name}.yaml"


def make(name: str, **settings: Any) -> Study:
    """A study with its defaults, some of them replaced."""
    study, defaults = find(name)
    return study(**{**yaml.safe_load(defaults.read_text(encoding="utf-8")), **settings})
