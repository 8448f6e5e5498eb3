"""Judges in GGUF files: the same numbers as the model that was written, and one line where a file cannot be read."""

import hashlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from cdlm.core.errors import CdlmError
from cdlm.evaluation.judge import Judge
from cdlm.evaluation.metrics.ar_nll import ar_nll
from rebuild.tiny_gguf import tiny_llama, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of gguf's own


@pytest.fixture(autouse=True, scope="module")
def installed() -> None:
    pytest.importorskip("gguf", reason="gguf is optional")
    pytest.importorskip("accelerate", reason="accelerate is optional")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny-model.gguf")


def test_a_gguf_file_is_the_model_that_was_written(file: Path) -> None:
    judge, text = Judge.load(file), "a dog sees the sea."
    (line,) = judge.encode([text])
    assert (len(line.ids), line.starts) == (len(text), list(range(len(text))))
    ids = torch.tensor([line.ids])
    with torch.no_grad():
        logits = tiny_llama()(ids).logits[0, :-1]
    expected = functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    assert ar_nll(judge, [text]).text_nats[0] == pytest.approx(expected, rel=1e-4)


def test_its_name_and_its_hash_stand_beside_its_numbers(file: Path) -> None:
    found = Judge.load(file).describe()
    assert (found["name"], found["quantisation"]) == ("tiny-model", "ALL_F32")
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert (found["dtype"], found["context"], found["vocabulary"]) == ("float32", 64, 258)


def test_nothing_is_printed_while_a_file_is_read(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Judge.load(file)
    assert "GGUF" not in capfd.readouterr().err


def refused(path: Path) -> str:
    with pytest.raises(CdlmError) as caught:
        Judge.load(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_cannot_be_read_are_refused_in_one_line(file: Path, tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path / "missing.gguf")
    assert "that transformers can read" in refused(write_gguf(tmp_path / "other.gguf", "abacus"))
    for name, content in (
        ("empty", b""), ("text", b"a text"), ("half", file.read_bytes()[: file.stat().st_size // 2]),
        ("head", file.read_bytes()[:40]),
    ):  # fmt: skip
        (tmp_path / f"{name}.gguf").write_bytes(content)
        assert "expected a GGUF file of a causal language model" in refused(tmp_path / f"{name}.gguf")


def test_without_the_package_the_error_says_how_to_install_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'cdlm[gguf]'" in refused(file)


def test_a_tokenizer_without_offsets_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: object())
    assert "a tokenizer without character offsets (object)" in refused(file)


def test_reading_a_file_leaves_the_random_state(file: Path) -> None:
    before = np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_rng_state().tolist()
    Judge.load(file)
    assert before == (np.random.get_state(legacy=False)["state"]["key"].tolist(), torch.get_rng_state().tolist())
