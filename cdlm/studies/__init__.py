"""Studies: small experiments about halting. A study is a module, and beside it the YAML file of its settings."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from cdlm.core.errors import CdlmError
from cdlm.studies.study import Study

STUDIES = (
    "accuracy", "ladder", "more-steps", "norm-causality", "norms", "patience-sweep", "stitching", "t-max",
    "zero-switch",
)  # fmt: skip
"""Every study by its name. The module of `my-study` is `my_study.py`, and `my-study.yaml` has its defaults."""


def names() -> list[str]:
    """Every study."""
    return list(STUDIES)


def find(name: str) -> tuple[type[Study], Path]:
    """A study's class, whose fields are its settings, and the YAML file with their defaults."""
    if name not in STUDIES:
        raise CdlmError(f"there is no study {name!r}: use one of {', '.join(STUDIES)}")
    module = import_module(f"cdlm.studies.{name.replace('-', '_')}")
    return module.STUDY, Path(__file__).parent / f"{name}.yaml"


def make(name: str, **settings: Any) -> Study:
    """A study with its defaults, some of them replaced."""
    study, defaults = find(name)
    return study(**{**yaml.safe_load(defaults.read_text(encoding="utf-8")), **settings})
