"""Run folders and recordings that version 0.1.0 wrote load with this code, and mean the same to the last digits.

See tests/golden/models/README.md for what was frozen. A changed base of the rotary positions, another scale of an input
or another order of random draws would leave every other test green and break every model that somebody has trained.
"""

import json
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import cdlm
from cdlm.core.types import Batch, Condition, HaltReason
from cdlm.halting.texts import parse_criterion
from cdlm.models.hub import read_tokenizer
from cdlm.recording.file import Recording, read_folder
from cdlm.runs.config import read_run
from cdlm.sampling.recordings import replayed

FOLDER = Path(__file__).parent / "golden" / "models"
CONTINUOUS = ("cdcd", "plaid", "plaid_released", "ssd", "langflow")
RECORDED = ("cdcd", "masked")
OTHERS = json.loads((FOLDER / "others.json").read_text())
THIN = slice(None, None, 9)
"""Tokens of the vocabulary whose logits are kept."""
every = pytest.mark.parametrize("name", [*CONTINUOUS, "masked"])
continuous = pytest.mark.parametrize("name", CONTINUOUS)


@cache
def loaded(name: str) -> Any:
    return cdlm.load(FOLDER / name)


@cache
def golden(name: str, file: str = "golden") -> dict[str, Tensor]:
    return load_file(FOLDER / name / f"{file}.safetensors")


def near(found: Tensor, expected: Tensor) -> None:
    """A changed base of the rotary positions moves logits by 0.02 and more."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def prediction(name: str) -> tuple[Tensor, Tensor]:
    arrays = golden(name)
    z, clean = arrays["z"].float(), arrays["clean"].float()
    x0 = arrays["x0"].float() if "x0" in arrays else torch.zeros_like(z)
    with torch.no_grad():
        return loaded(name).denoise(z, arrays["t"], Condition(clean, arrays["noised"], x0, arrays["valid"]))


@continuous
def test_the_network_says_what_it_said(name: str) -> None:
    arrays, (logits, x0) = golden(name), prediction(name)
    valid = arrays["valid"]
    near(logits[valid][:, THIN], arrays["logits"][valid])
    near((x0[..., THIN] if name == "ssd" else x0)[valid], arrays["x0_out"][valid])


def test_the_masked_network_says_what_it_said() -> None:
    arrays = golden("masked")
    with torch.no_grad():
        logits = loaded("masked").logits(arrays["tokens"], arrays["valid"])
    near(logits[arrays["valid"]][:, THIN], arrays["logits"][arrays["valid"]])


@every
def test_noise_levels_and_the_loss_are_what_they_were(name: str) -> None:
    model, arrays = loaded(name), golden(name)
    tokens, u = arrays["tokens"], torch.tensor([0.25, 0.75], dtype=torch.float64)
    target = arrays.get("noised")
    if target is None:  # the masked places, under some other token
        target = (tokens == model.constants.mask_id) & arrays["valid"]
        tokens = torch.where(tokens == model.constants.mask_id, 100, tokens)
    with torch.no_grad():
        levels = model.levels(torch.linspace(0, 1, 9, dtype=torch.float64)).double()
        loss = model(Batch(tokens, arrays["valid"], target, torch.Generator().manual_seed(17), u))
    torch.testing.assert_close(levels, arrays["levels"], rtol=1e-6, atol=0)
    if "prior_std" in arrays:
        assert model.prior_std == pytest.approx(arrays["prior_std"].item(), rel=1e-6)
    near(loss.nats, arrays["loss_nats"])
    torch.testing.assert_close(loss.total.double(), arrays["loss_total"], rtol=1e-5, atol=1e-5)


@every
def test_samples_are_the_samples_of_then(name: str) -> None:
    arrays, steps = golden(name), None if name == "masked" else 6
    samples = cdlm.generate(loaded(name), n=3, seed=5, steps=steps)
    assert samples.tokens.tolist() == arrays["sample_tokens"].tolist()
    assert samples.nfe.tolist() == arrays["sample_nfe"].tolist()
    prompted = cdlm.generate(loaded(name), prompts=["Anna [3] the [4]."], n=2, seed=7, steps=steps)
    assert prompted.tokens.tolist() == arrays["prompted_tokens"].tolist()
    assert prompted.given.tolist() == arrays["prompted_given"].tolist()


@pytest.mark.parametrize("name", RECORDED)
def test_the_calibrated_rule_is_found_and_halts_where_it_did(name: str) -> None:
    arrays = golden(name, "golden_auto")
    samples = cdlm.generate(loaded(name), n=8, steps=8, seed=5, halt="auto")
    assert samples.tokens.tolist() == arrays["tokens"].tolist()
    assert samples.nfe.tolist() == arrays["nfe"].tolist()


@every
def test_the_configuration_of_the_run_is_read(name: str) -> None:
    config = read_run(FOLDER / name)
    assert (config.length, config.vocab_size, config.training.steps > 0) == (16, 270, True)
    built = {"system": name.partition("_")[0], "vocab": 270, **asdict(config.system)}
    assert built.items() <= loaded(name).config.items()


@pytest.mark.parametrize("name", OTHERS)
def test_every_setting_and_tensor_of_an_older_model_has_a_place(name: str, tmp_path: Path) -> None:
    """Their weights are not kept, so any will do."""
    there = OTHERS[name]
    (tmp_path / "config.json").write_text(json.dumps(there["config"]))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((FOLDER / "cdcd" / file).read_bytes())
    source = torch.Generator().manual_seed(0)
    weights = {
        tensor: (0.1 * torch.randn(shape, generator=source)).to(getattr(torch, kind))
        for tensor, (kind, *shape) in there["tensors"].items()
    }
    save_file(weights, tmp_path / "model.safetensors")
    model: Any = cdlm.load(tmp_path)
    arrived = sorted(float(value.double().sum()) for value in model.state_dict().values())
    assert arrived == sorted(float(value.double().sum()) for value in weights.values())


def recordings() -> dict[str, tuple[Recording, Path]]:
    """Every recording, with the folder that it lies in."""
    folders = [FOLDER / "recordings" / name for name in RECORDED]
    return {stem: (one, folder) for folder in folders for stem, one in read_folder(folder).items()}


def rules() -> list[tuple[str, int, str]]:
    """(recording, number of the rule, rule), rules as one writes them today and of the types that they declare."""
    today = {"AfterStep": "FromStep", "Prophet(2)": "Prophet(2.0)"}
    found = []
    for stem, (_, folder) in recordings().items():
        with safe_open(folder.with_suffix(".golden.safetensors"), "pt") as file:
            header = {int(key.removeprefix("rule-")): rule for key, rule in file.metadata().items()}
        for number, rule in sorted(header.items()):
            for old, new in today.items():
                rule = rule.replace(old, new)
            found.append((stem, number, rule))
    return found


@pytest.mark.parametrize(("stem", "number", "rule"), rules())
def test_old_recordings_replay_as_they_did(stem: str, number: int, rule: str) -> None:
    recording, folder = recordings()[stem]
    everything = load_file(folder.with_suffix(".golden.safetensors"))
    samples = replayed(recording, parse_criterion(rule), read_tokenizer(folder))
    halted = [reason is HaltReason.CRITERION for reason in samples.reason]
    for what, found in {**vars(samples), "halted": halted}.items():
        expected = everything.get(f"{stem}.rule-{number}.{what}")
        if expected is not None:
            assert np.array_equal(np.array(found), expected.numpy()), what
    assert sum(key.startswith(f"{stem}.rule-{number}.") for key in everything) == 6


def test_a_recording_is_still_of_its_model() -> None:
    for recording, folder in recordings().values():
        model = loaded(folder.name)
        assert model.has_weights(recording.weights)
        assert model.name == recording.model == folder.name
