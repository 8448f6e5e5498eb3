"""Versions agree wherever they stand: of the package, and of what it asks for."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
NAME = re.compile(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)$")


def pins(file: str) -> dict[str, tuple[int, ...]]:
    """Exact versions of a file of constraints, by normalised names."""
    lines = (line for line in (ROOT / file).read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    return {name.lower().replace("_", "-"): numbers(version) for name, version in (line.split("==") for line in lines)}


def numbers(version: str) -> tuple[int, ...]:
    """3.0.0 is 3.0 and 3: zeros at the end say nothing."""
    return tuple(int(part) for part in re.sub(r"(\.0)+$", "", version).split(".") if part.isdigit())


def bounds(requirements: list[str]) -> dict[str, tuple[int, ...]]:
    """Lower bounds, by names; each requirement has one, and nothing else."""
    found = [NAME.match(requirement) for requirement in requirements]
    assert all(found), requirements
    return {match[1].lower(): numbers(match[2]) for match in found if match}


def test_every_lower_bound_is_a_version_that_is_tested() -> None:
    lora = PROJECT["optional-dependencies"]["lora"]
    asked = bounds(PROJECT["dependencies"] + lora)
    torch = asked.pop("torch")
    assert pins("constraints-lowest.txt") == asked
    assert pins("constraints.txt")["torch"] >= torch


def test_no_exact_version_is_below_its_bound() -> None:
    exact = pins("constraints.txt")
    assert {name: low for name, low in bounds(PROJECT["dependencies"]).items() if exact[name] < low} == {}


def test_the_citation_names_the_version() -> None:
    assert f"\nversion: {PROJECT['version']}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
