"""Tokens of one call that depend on each other: the layer of ADJUST, its training and its policy."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import TINY
from masked_toys import MASK, VOCAB, Scripted, decoded
from setups import unmasking
from toys import masked_with_tokenizer

from cdlm.cli import main as cli
from cdlm.core.errors import CdlmError
from cdlm.masked.checkpoints.model import open_checkpoint
from cdlm.masked.joint import (
    ABOUT,
    Fitter,
    LayerFitting,
    Refined,
    SamplerLayer,
    read_layer,
    trajectories,
    write_layer,
)
from cdlm.masked.sampler import Unmasking
from cdlm.masked.system import Masked, MaskedDiffusion
from cdlm.policies import parse_policy
from cdlm.policies.adjust import Adjust
from cdlm.policies.llada import LLaDA
from cdlm.sampling.requests import canvases
from cdlm.sampling.texts import Special

WORDS, LENGTH = 6, 4
PROMPTS = [[1, 2], [3], [], [4, None, 0]]
EXACT = Unmasking(LLaDA(remasking="random"), temperature=1.0)
"""One token a call, in any order, drawn: what the model says of whole texts."""


def network(seed: int = 0, spread: float = 1.0) -> MaskedDiffusion:
    torch.manual_seed(seed)
    model = Masked(width=32, depth=2, heads=2, dim=16).build(WORDS + 1, Special(WORDS)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + spread * torch.rand_like(weight))
        model.get_parameter("network.output.weight").mul_(40)
    return model.requires_grad_(False)


def layer_of(model: Any, seed: int = 1) -> SamplerLayer:
    """A layer with a gate, which changes what is said."""
    layer = SamplerLayer(model, torch.Generator().manual_seed(seed)).requires_grad_(False)
    layer.gate.fill_(1.0)
    layer.mix.mul_(20)
    return layer


def written(folder: Path, model: Any, layer: SamplerLayer) -> str:
    folder.mkdir(exist_ok=True)
    write_layer(folder, layer, model.need_fingerprint(), LayerFitting(), {})
    return str(folder)


def test_the_parts_of_a_model_are_the_model() -> None:
    model, tokens = network(), torch.randint(0, WORDS + 1, (3, 7))
    for valid in (None, torch.arange(7).expand(3, 7) >= torch.tensor([[0], [2], [3]])):
        hidden = model.hidden(tokens, valid)
        torch.testing.assert_close(model.read(hidden.flatten(0, 1)).unflatten(0, (3, 7)), model.logits(tokens, valid))
        caught: list[torch.Tensor] = []
        hook = model.get_submodule("network.blocks.1").register_forward_pre_hook(
            lambda _, inputs: caught.append(inputs[0])  # noqa: B023
        )
        model.logits(tokens, valid)
        hook.remove()
        torch.testing.assert_close(model.through(model.last_block(), caught[0], valid), hidden)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_the_parts_of_a_foreign_model_are_the_model(family: str, padded: bool, dtype: Any) -> None:
    model = open_checkpoint(TINY[family], dtype=dtype)
    tokens = torch.randint(0, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(9).expand(3, 9) >= torch.tensor([[0], [2], [5]]) if padded else None
    real = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    hidden, places = model.hidden(tokens, valid), real.flatten().nonzero().squeeze(1)
    assert torch.equal(model.read(hidden.flatten(0, 1)[places]), model.logits(tokens, valid, places))
    decoder: Any = model.network.get_decoder()
    caught: list[torch.Tensor] = []
    hook = decoder.layers[-1].register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    model.logits(tokens, valid)
    hook.remove()
    torch.testing.assert_close(model.through(model.last_block(), caught[0], valid)[real], hidden[real])
    said = Refined(model, SamplerLayer(model, torch.Generator().manual_seed(0)))(hidden, tokens, valid, places)
    assert torch.equal(said, model.logits(tokens, valid, places))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_layer_for_a_foreign_model_is_trained_and_used(tmp_path: Path, family: str, dtype: Any) -> None:
    model = open_checkpoint(TINY[family], dtype=dtype)
    requests = canvases([[5, 6, 7], [8]], 6, 10)
    texts = trajectories(model, Unmasking(LLaDA(), temperature=1.0), requests, 20, 0)
    layer, report = Fitter(model, LayerFitting(tokens=3, updates=30, rows=8, lr=3e-3)).fit(texts)
    assert all(with_layer < alone for alone, with_layer in report["kl"].values())
    path = written(tmp_path / "layer", model, layer)
    rows = decoded(model, unmasking(Adjust(path, 3), temperature=1.0), canvases([[5, 6, 7], [8]], 6), 2)
    assert [row.nfe for row in rows.values()] == [2, 2]


def test_an_untrained_layer_changes_nothing() -> None:
    model, tokens = network(), torch.randint(0, WORDS + 1, (3, 7))
    hidden, places = model.hidden(tokens), torch.arange(21)
    said = Refined(model, SamplerLayer(model, torch.Generator().manual_seed(0)))(hidden, tokens, None, places)
    assert torch.equal(said, model.read(hidden.flatten(0, 1)))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_token_a_call_is_the_sampler_without_a_layer(tmp_path: Path, temperature: float) -> None:
    model = network()
    path = written(tmp_path / "layer", model, layer_of(model))
    for policy, plain in ((Adjust(path, 1), LLaDA()), (Adjust(path, 1, order="random"), LLaDA(remasking="random"))):
        rows, others = (
            decoded(model, unmasking(one, temperature=temperature), canvases(PROMPTS, 6, 2), 4)
            for one in (policy, plain)
        )
        assert {i: row.result for i, row in rows.items()} == {i: row.result for i, row in others.items()}


@pytest.mark.parametrize(
    "policy", [{"tokens": 3}, {"tokens": 2, "order": "random"}, {"tokens": 4, "block": 3}], ids=str
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_batch_is_its_rows_alone(tmp_path: Path, policy: dict[str, Any], temperature: float) -> None:
    model = network()
    one = Adjust(written(tmp_path / "layer", model, layer_of(model)), **policy)
    requests = canvases(PROMPTS, 6, 2)
    together = decoded(model, unmasking(one, temperature=temperature), requests, 8)
    for request in requests:
        row = decoded(model, unmasking(one, temperature=temperature), [request], 1)[request.index]
        assert row.canvases == together[request.index].canvases


def test_calls_and_passes_are_counted(tmp_path: Path) -> None:
    from cdlm.api import decode

    model = network()
    path = written(tmp_path / "layer", model, layer_of(model))
    samples = decode(model, [[1], [2, 3]], 7, policy=Adjust(path, 3))
    assert samples.nfe.tolist() == [3, 3]  # 3 + 3 + 1
    assert [row["layer_passes"] for row in samples.rows()] == [4, 4]


def test_a_comparison_says_that_passes_are_not_among_its_calls(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    masked_with_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--policy=Adjust('layer')", "--rules=Full()", f"--recordings={tmp_path}", f"--out={tmp_path / 'table'}"]
    with pytest.raises(SystemExit):  # there are no recordings
        cli.main(["compare", str(tmp_path / "model"), "--device=cpu", *words])
    assert "layer passes are not among them" in capsys.readouterr().err


def test_a_layer_is_trained_on_texts_of_one_token_a_call_whatever_the_model_recommends(tmp_path: Path) -> None:
    model = tmp_path / "model"
    masked_with_tokenizer().save_pretrained(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"sampling": {"policy": "Threshold(0.0)"}}))
    words = ["--n", "16", "--updates", "1", "--device", "cpu"]
    cli.main(["train-sampler", str(model), str(tmp_path / "layer"), *words])  # texts of one call are refused
    with pytest.raises(SystemExit):
        cli.main(["train-sampler", str(model), str(tmp_path / "other"), *words, "--policy", "Threshold(0.0)"])


def joint(rows: Any) -> Counter[tuple[int, ...]]:
    return Counter(row.tokens for row in rows.values())


def total_variation(one: Counter[Any], other: Counter[Any]) -> float:
    return sum(abs(one[k] / one.total() - other[k] / other.total()) for k in one | other) / 2


def test_a_trained_layer_is_nearer_to_the_joint_than_a_product_of_marginals(tmp_path: Path) -> None:
    """A chain in which each token is that before it, or the next: the neighbours of one call depend on each other."""
    torch.manual_seed(0)
    model = Masked(width=32, depth=2, heads=2, dim=16).build(WORDS + 1, Special(WORDS)).train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    noise = torch.Generator().manual_seed(0)

    def batch(n: int) -> torch.Tensor:
        first = torch.randint(0, WORDS, (n, 1), generator=noise)
        return (first + torch.randint(0, 2, (n, LENGTH), generator=noise).cumsum(1)) % WORDS

    for _ in range(400):
        tokens = batch(48)
        hidden = torch.rand(48, LENGTH, generator=noise) < torch.rand(48, 1, generator=noise).clamp(min=0.2)
        logits = model.logits(tokens.masked_fill(hidden, WORDS))
        loss = torch.nn.functional.cross_entropy(logits[hidden], tokens[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model = model.eval().requires_grad_(False)
    fitting = LayerFitting(tokens=LENGTH, updates=300, rows=32, lr=5e-3)
    texts = trajectories(model, EXACT, canvases([[]], LENGTH, 200), 64, 0)
    layer, report = Fitter(model, fitting).fit(texts)
    for alone, with_layer in report["kl"].values():
        assert with_layer < 0.8 * alone
    path = written(tmp_path / "layer", model, layer)
    many = canvases([[]], LENGTH, 1000)
    exact = joint(decoded(model, unmasking(EXACT.policy, temperature=1.0), many, 250))
    again = joint(decoded(model, unmasking(EXACT.policy, temperature=1.0, seed=1), many, 250))
    adjusted = joint(decoded(model, unmasking(Adjust(path, LENGTH, order="random"), temperature=1.0), many, 250))
    product = joint(decoded(model, unmasking(LLaDA(1, remasking="random"), temperature=1.0), many, 250))
    floor = total_variation(exact, again)
    assert total_variation(exact, adjusted) - floor < 0.6 * (total_variation(exact, product) - floor)


def test_a_layer_is_for_its_model(tmp_path: Path) -> None:
    model = network()
    path = written(tmp_path / "layer", model, layer_of(model))
    read = read_layer(Path(path), model)
    for name, value in layer_of(model).state_dict().items():
        assert torch.equal(read.layer.state_dict()[name], value)
    with pytest.raises(CdlmError, match="trained for other weights than these"):
        read_layer(Path(path), network(seed=1))
    with pytest.raises(CdlmError, match="plain function"):
        decoded(Scripted(lambda tokens: torch.zeros(*tokens.shape, VOCAB)), unmasking(Adjust(path)), canvases([[]], 4))
    with pytest.raises(CdlmError, match=f"has no {ABOUT}: train a sampler layer"):
        Unmasking(Adjust(str(tmp_path))).policy.refiner(model)
    with pytest.raises(CdlmError, match="knows no guidance"):
        decoded(model, unmasking(Adjust(path), cfg_scale=1.0), canvases([[]], 4), 1)
    broken = layer_of(model)
    broken.gate.fill_(3e38)  # a number, from which none comes
    with pytest.raises(CdlmError, match="gave logits that are not numbers"):
        decoded(model, unmasking(Adjust(written(tmp_path / "layer", model, broken))), canvases([[]], 4), 1)
    (tmp_path / "layer" / "sampler_layer.safetensors").write_bytes(b"nothing")
    with pytest.raises(CdlmError, match="train it again"):
        read_layer(Path(path), model)


def test_a_policy_is_written_and_read() -> None:
    policy = Adjust("runs/layer", 8, order="random")
    assert parse_policy(repr(policy)) == policy
    assert [one.tokens for one in Adjust.sweep(path="x", order="random") if isinstance(one, Adjust)][:3] == [1, 2, 3]
    with pytest.raises(CdlmError, match="tokens >= 1"):
        replace(policy, tokens=0)


def test_nothing_is_learned_from_texts_of_one_token() -> None:
    model = network()
    texts = trajectories(model, EXACT, canvases([[1, 2]], 1, 16), 16, 0)
    assert MASK > WORDS
    with pytest.raises(CdlmError, match="2 tokens or more"):
        Fitter(model, LayerFitting()).fit(texts)
