import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_toys import LENGTH, byte_tokenizer, packed_rows, random_judge, sentences
from safetensors.torch import load_file, save_file

from cdlm.core.errors import CdlmError
from cdlm.evaluation.judge import Judge
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.evaluation.small_judge import JudgeSize, cached_judge, train_judge

TEXTS = ["the cat sees", "", "a", "Grüße, 世界!", "a dog likes old books.", "x" * 90]


def briefly(seed: int = 0, steps: int = 3) -> Judge:
    rows = packed_rows(sentences(50, seed=1))
    return train_judge(rows, byte_tokenizer(), size=JudgeSize(16, 1, 2), length=LENGTH, steps=steps, seed=seed)


def test_training_is_decided_by_the_seed_and_leaves_the_global_state_alone():
    before = torch.get_rng_state()
    first, second, other = briefly(), briefly(), briefly(seed=1)
    assert torch.equal(before, torch.get_rng_state())
    pairs = list(zip(first.model.parameters(), second.model.parameters(), other.model.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)
    assert not first.model.training


def test_training_lowers_the_loss_and_reports_every_step():
    seen = []
    train_judge(
        packed_rows(sentences(50, seed=1)), byte_tokenizer(),
        size=JudgeSize(16, 1, 2), length=LENGTH, steps=30, seed=0,
        progress=lambda step, loss: seen.append((step, loss)),
    )  # fmt: skip
    assert [step for step, _ in seen] == list(range(1, 31))
    assert seen[-1][1] < seen[0][1] - 1


def test_training_says_what_is_wrong():
    rows = packed_rows(sentences(50, seed=1))
    two = iter([next(rows), next(rows)])
    with pytest.raises(CdlmError, match="expected 5 batches to train a judge, got 2"):
        train_judge(two, byte_tokenizer(), size=JudgeSize(16), length=LENGTH, steps=5, seed=0)
    with pytest.raises(CdlmError, match="rows of at most 8 tokens"):
        train_judge(packed_rows(sentences(50, seed=1)), byte_tokenizer(), size=JudgeSize(16), length=8, steps=5, seed=0)
    with pytest.raises(CdlmError, match="heads"):
        JudgeSize(width=15)
    with pytest.raises(CdlmError, match="at least 1 step and a length of at least 2"):
        train_judge(two, byte_tokenizer(), length=LENGTH, steps=0, seed=0)


def test_a_saved_judge_gives_equal_numbers(tmp_path):
    judge = random_judge()
    judge.save(tmp_path / "judge")
    back = Judge.load(tmp_path / "judge")
    np.testing.assert_array_equal(ar_nll(judge, TEXTS).text_nats, ar_nll(back, TEXTS).text_nats)
    assert back.describe() == judge.describe()
    assert back.name == "random"
    assert back.context == LENGTH
    assert not list(tmp_path.rglob("*.bin"))
    assert [p.name for p in tmp_path.iterdir()] == ["judge"]


def test_the_dtype_is_what_was_asked_for(tmp_path):
    judge = random_judge()
    torch.nn.Module.to(judge.model, torch.bfloat16)
    judge.save(tmp_path / "judge")
    assert Judge.load(tmp_path / "judge").describe()["dtype"] == "float32"
    assert Judge.load(tmp_path / "judge", dtype=torch.bfloat16).describe()["dtype"] == "bfloat16"


def test_saving_replaces_a_judge_but_nothing_else(tmp_path):
    random_judge(seed=1).save(tmp_path / "judge")
    random_judge(seed=2).save(tmp_path / "judge")
    expected = ar_nll(random_judge(seed=2), TEXTS).text_nats
    np.testing.assert_array_equal(ar_nll(Judge.load(tmp_path / "judge"), TEXTS).text_nats, expected)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(CdlmError, match="choose another folder"):
        random_judge().save(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_failed_save_keeps_the_old_judge(tmp_path, monkeypatch):
    judge = random_judge(seed=1)
    judge.save(tmp_path / "judge")
    broken = random_judge(seed=2)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(type(broken.tokenizer), "save_pretrained", fail)
    with pytest.raises(CdlmError, match="disk full"):
        broken.save(tmp_path / "judge")
    assert [p.name for p in tmp_path.iterdir()] == ["judge"]
    np.testing.assert_array_equal(
        ar_nll(Judge.load(tmp_path / "judge"), TEXTS).text_nats, ar_nll(judge, TEXTS).text_nats
    )


def test_a_judge_that_is_not_there_is_explained(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CdlmError, match="train-judge") as caught:
        Judge.load(tmp_path / "empty")
    assert "\n" not in str(caught.value)


def test_without_network_a_name_is_explained_at_once(monkeypatch):
    calls = []

    def unreachable(*arguments, **_):
        calls.append(arguments)
        raise RuntimeError("no network")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(CdlmError, match="hf download nobody/nothing --local-dir FOLDER") as caught:
        Judge.load("nobody/nothing")
    assert "\n" not in str(caught.value)
    assert len(calls) == 1


def test_a_damaged_or_incomplete_judge_is_refused(tmp_path):
    judge = random_judge()
    judge.save(tmp_path / "judge")
    weights = tmp_path / "judge" / "model.safetensors"
    tensors = load_file(weights)
    del tensors["transformer.ln_f.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(CdlmError, match=r"without transformer\.ln_f\.weight"):
        Judge.load(tmp_path / "judge")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CdlmError, match="truncated or damaged"):
        Judge.load(tmp_path / "judge")


def change(**settings) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))

    return break_it


def weigh(how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        weights["transformer.h.0.mlp.c_fc.weight"] = how(weights["transformer.h.0.mlp.c_fc.weight"])
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return break_it


ODD = {
    "more layers than tensors": (change(n_layer=10**6), "has n_layer 1000000, and the weights are"),
    "no layer": (change(n_layer=0), "expected a layer or more"),
    "fewer layers": (change(n_layer=1), "more layers in the weights than in config.json"),
    "as many labels": (change(num_labels=10**9), "has num_labels"),
    "wide": (change(n_embd=2**20), "other shapes than config.json asks for"),
    "long": (change(n_positions=2**20), "other shapes than config.json asks for"),
    "code for attention": (change(attn_implementation="kernels-community/flash"), "expected eager or sdpa"),
    "more code for attention": (change(_attn_implementation="flash_attention_2"), "expected eager or sdpa"),
    "quantised": (change(quantization_config={"load_in_4bit": True}), "take the unquantised model"),
    "code of the author": (change(model_type="evil", auto_map={"AutoConfig": "evil.Evil"}), "expected a causal"),
    "type that is none": (change(dtype="evil"), "no attribute 'evil'"),
    "text for a number": (change(n_embd="16"), "expected int"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "merge the two"),
    "name of a number": (
        lambda folder: (folder / "judge.json").write_text('{"name": 5}'),
        "got whole number in 'name'",
    ),
    "whole numbers": (weigh(lambda w: w.int()), "is int32, expected floats"),
    "no numbers": (weigh(lambda w: w / 0), "values that are no numbers"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_folder_that_is_no_judge_is_refused_before_anything_is_fetched(case, tmp_path, monkeypatch):
    random_judge().save(tmp_path / "judge")
    break_it, message = ODD[case]
    break_it(tmp_path / "judge")
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("something is fetched"))
    with pytest.raises(CdlmError) as caught:
        Judge.load(tmp_path / "judge")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_code_of_the_author_is_not_run(tmp_path, monkeypatch):
    judge = random_judge()
    judge.save(tmp_path / "judge")
    change(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})(tmp_path / "judge")
    for name in ("evil.py", "modeling_evil.py"):
        (tmp_path / "judge" / name).write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path / "judge")
    np.testing.assert_array_equal(
        ar_nll(Judge.load(tmp_path / "judge"), TEXTS).text_nats, ar_nll(judge, TEXTS).text_nats
    )


def test_a_broken_judge_in_the_cache_says_what_to_delete(tmp_path):
    cached_judge("key", tmp_path, briefly)
    (folder,) = tmp_path.iterdir()
    weigh(lambda w: w / 0)(folder)
    with pytest.raises(CdlmError, match=f"delete {folder}"):
        cached_judge("key", tmp_path, briefly)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused():
    with pytest.raises(CdlmError, match="at most 100 tokens"):
        random_judge(vocab_size=100)


def test_a_judge_without_safetensors_is_refused(tmp_path):
    judge = random_judge()
    judge.save(tmp_path / "judge")
    (tmp_path / "judge" / "model.safetensors").unlink()
    torch.save(judge.model.state_dict(), tmp_path / "judge" / "pytorch_model.bin")
    with pytest.raises(CdlmError, match="safetensors"):
        Judge.load(tmp_path / "judge")


def test_the_cache_trains_once_for_a_key(tmp_path):
    calls = []

    def train() -> Judge:
        calls.append(1)
        return briefly()

    first, second = (cached_judge("e2e, seed 0", tmp_path, train) for _ in range(2))
    assert len(calls) == 1
    np.testing.assert_array_equal(ar_nll(first, TEXTS).text_nats, ar_nll(second, TEXTS).text_nats)
    cached_judge("e2e, seed 1", tmp_path, train)
    assert len(calls) == 2
    assert len(list(tmp_path.iterdir())) == 2
