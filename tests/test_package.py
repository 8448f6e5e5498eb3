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


USED_LATER = (
    "transformers", "scipy", "pandas", "matplotlib", "lightning", "sklearn", "datasets", "pyarrow", "torchdiffeq",
    "sacrebleu", "huggingface_hub", "torch._dynamo", "torch._inductor", "torch.distributed.tensor", "sympy",
)  # fmt: skip
"""What helps, and models without memory for their weights, do not need."""
PROGRAM = f"""
import sys
from contextlib import suppress
import cdlm.api
from cdlm.cli.main import main
for command in ("train", "sample", "evaluate", "compare"):
    with suppress(SystemExit):
        main([command, "--help"])
    print(command, *sorted(set({USED_LATER}) & set(sys.modules)), sep=":", file=sys.stderr)
from cdlm.core.tensors import without_memory
from cdlm.runs.config import SYSTEMS
from cdlm.sampling.texts import Special
own = {{"elf": {{"encoder": "nowhere", "encoder_dim": 8, "encoder_hash": "of nothing"}}}}
for name, system in SYSTEMS.items():
    with without_memory():
        made = system(width=16, depth=1, heads=2, **own.get(name, {{}})).build(300, Special(299, 2))
    assert {{weight.device.type for weight in made.parameters()}} == {{"meta"}}
print("systems", *sorted(set({USED_LATER}) & set(sys.modules)), sep=":", file=sys.stderr)
"""


def test_helps_and_outlines_of_models_import_no_more_than_they_need() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False)
    assert done.stderr.split() == ["train", "sample", "evaluate", "compare", "systems"], done.stderr
    assert done.stdout.count("--batch-size") >= 4
