"""What a command reads: each file of a model once, and a model once for all live rules."""

from __future__ import annotations

import ast
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from evaluation_toys import random_judge
from tokenizers import Tokenizer

import cdlm
from cdlm import api
from cdlm.cli.main import main
from cdlm.models import hub

MODELS = Path(__file__).parent / "golden/models"
CODE = Path(cdlm.__file__).parent


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of the files of a model that are read, by kind."""
    found: Counter[str] = Counter()

    def counted(owner: Any, name: str, what: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            found[what] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    # model.safetensors is opened once by name, to see whether it may be read
    counted(safetensors.torch, "safe_open", "weights")
    counted(Tokenizer, "from_file", "tokenizer")
    real = Path.open

    def open_(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self.name in ("config.json", "model.safetensors", "halting.json"):
            found[self.name] += 1
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)
    return found


@pytest.mark.parametrize("model", ["cdcd", "masked"])
def test_sampling_reads_each_file_of_a_model_once(
    model: str, opened: Counter[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["sample", str(MODELS / model), "--n", "2", "--steps", "3", "--out", str(tmp_path / "samples.jsonl")])
    assert opened == {"config.json": 1, "model.safetensors": 1, "weights": 1, "tokenizer": 1}


def test_a_recording_reads_them_once_too(opened: Counter[str], tmp_path: Path) -> None:
    main(["sample", str(MODELS / "cdcd"), "--n", "2", "--steps", "3", "--record", str(tmp_path / "r"), "--quiet"])
    assert opened == {"config.json": 1, "model.safetensors": 1, "weights": 1, "tokenizer": 1}


def test_a_comparison_with_live_rules_loads_a_model_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    loads = []
    real = hub.read
    monkeypatch.setattr(hub, "read", lambda *args: loads.append(args[0].name) or real(*args))
    monkeypatch.setattr(api, "open_judge", lambda *args, **kwargs: random_judge())
    folder = tmp_path / "cdcd"
    shutil.copytree(MODELS / "cdcd", folder)
    main(["compare", str(folder), "--steps", "4", "--n", "6", "--live", "4", "--fewer", "2", "--rules", "JoT(3.0)",
          "FixedSteps(3)", "--measure", "nats", "--out", str(tmp_path / "out"), "--quiet"])  # fmt: skip
    assert loads == ["cdcd"]


FAMILIES = {
    "EmbeddingDiffusion", "MaskedDiffusion", "MaskedModel", "CachedModel", "ForeignModel", "Denoiser", "Diffusion",
    "Unmasking", "DiffusionLoop", "UnmaskingLoop", "ContinuousConfig", "Masked", "CausalModel", "AutoregressiveModel",
    "LeftToRight", "LeftToRightLoop", "Autoregressive",
}  # fmt: skip


def test_nothing_above_the_families_asks_which_family_a_model_has() -> None:
    asked = []
    for file in sorted(CODE.rglob("*.py")):
        place = file.relative_to(CODE)
        if place.parts[0] in ("continuous", "masked", "autoregressive"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kinds]):
                    names = {name.id for name in ast.walk(kinds) if isinstance(name, ast.Name)}
                    asked += [f"{place}:{node.lineno}"] if names & FAMILIES else []
                case ast.Compare(comparators=[ast.Constant(value="continuous" | "masked" | "autoregressive")]):
                    asked.append(f"{place}:{node.lineno}")
    assert asked == []
