"""The package as a whole: every module imports, and the light part stays light."""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "cdlm"
HEAVY = ("transformers", "lightning", "matplotlib", "datasets")


def module_names(folder: Path, prefix: str) -> Iterator[str]:
    """Dotted names of the modules under `folder`, found without importing any of them."""
    for found in pkgutil.iter_modules([str(folder)], prefix):
        if found.name.endswith(".__main__"):
            continue
        yield found.name
        if found.ispkg:
            yield from module_names(folder / found.name.rpartition(".")[2], f"{found.name}.")


@pytest.mark.parametrize("name", ["cdlm", *module_names(PACKAGE, "cdlm.")])
def test_every_module_imports(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


@pytest.mark.parametrize("module", ["cdlm", "cdlm.halting"])
def test_importing_the_core_loads_no_heavy_library(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
