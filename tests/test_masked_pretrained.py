"""Foreign checkpoints: the logits of the official code, strict loading, refusals, and the cache of keys and values."""

import json
import shutil
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import GOLDEN, TINY, copy_of, edit, random_checkpoint, write_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from cdlm.core.errors import CdlmError
from cdlm.core.trees import join, take
from cdlm.masked.checkpoints.family import Settings
from cdlm.masked.checkpoints.model import FAMILIES, ForeignModel, open_checkpoint
from cdlm.masked.model import Constants
from cdlm.masked.sampler import Unmasking
from cdlm.policies.confidence import Threshold
from cdlm.policies.dream import Dream
from cdlm.policies.llada import LLaDA

ATOL = 1e-5
CASES = ["full", "left_pad", "right_pad", "long", "single", "all_mask"]
REFUSE = json.loads((GOLDEN / "configs_to_refuse.json").read_text())
REAL = json.loads((GOLDEN / "configs_real.json").read_text())
both = pytest.mark.parametrize("family", ["llada", "Dream"])

MODELS = {family: open_checkpoint(folder) for family, folder in TINY.items()}
ARRAYS = {family: load_file(folder / "arrays.safetensors") for family, folder in TINY.items()}


def case(family: str, name: str) -> tuple[Tensor, Tensor | None]:
    """Tokens and which of them are real."""
    mask = ARRAYS[family].get(f"{name}.attention_mask")
    return ARRAYS[family][f"{name}.input_ids"], None if mask is None else mask.bool()


def close(one: Tensor, two: Tensor, atol: float = ATOL) -> None:
    torch.testing.assert_close(one, two, atol=atol, rtol=0)


def refused(folder: Path, **options: Any) -> str:
    """What is said of a folder that cannot be opened."""
    with pytest.raises(CdlmError) as caught:
        open_checkpoint(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- the official logits ---


@both
@pytest.mark.parametrize("name", CASES)
def test_the_official_logits(family: str, name: str) -> None:
    tokens, valid = case(family, name)
    logits, official = MODELS[family].logits(tokens, valid), ARRAYS[family][f"{name}.logits"]
    assert logits.isfinite().all()
    # Dream's official mask also hides padded queries, whose logits nobody needs.
    compared = torch.ones_like(tokens, dtype=torch.bool) if valid is None or family == "llada" else valid
    close(logits[compared], official[compared])


@both
@pytest.mark.parametrize("name", ["left_pad", "right_pad"])
def test_padding_changes_no_real_position(family: str, name: str) -> None:
    tokens, valid = case(family, name)
    assert valid is not None
    logits = MODELS[family].logits(tokens, valid)
    for row, real in enumerate(valid):
        close(logits[row, real], MODELS[family].logits(tokens[row, real][None])[0])


@pytest.mark.parametrize("name", ["left_pad", "right_pad"])
def test_dream_counts_positions_over_real_tokens(name: str) -> None:
    tokens, valid = case("Dream", name)
    seen = []
    hook = (
        MODELS["Dream"]
        .network.get_decoder()
        .register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True)
    )
    MODELS["Dream"].logits(tokens, valid)
    hook.remove()
    assert torch.equal(seen[0], ARRAYS["Dream"][f"{name}.position_ids"])


@both
def test_a_row_of_padding_alone_is_finite(family: str) -> None:
    tokens, _ = case(family, "full")
    valid = torch.ones_like(tokens, dtype=torch.bool)
    valid[1] = False
    assert MODELS[family].logits(tokens, valid).isfinite().all()
    close(MODELS[family].logits(tokens, valid)[0], ARRAYS[family]["full.logits"][0])


@both
def test_rows_do_not_see_each_other(family: str) -> None:
    tokens, _ = case(family, "full")
    logits = MODELS[family].logits(tokens)
    for row in range(len(tokens)):
        close(MODELS[family].logits(tokens[row : row + 1]), logits[row : row + 1])


@both
def test_it_is_for_inference(family: str) -> None:
    model = MODELS[family]
    assert not model.network.training
    assert not model.logits(case(family, "single")[0]).requires_grad
    assert not any(weight.requires_grad for weight in model.network.parameters())


# --- precision ---


def rms(one: Tensor, two: Tensor) -> float:
    return float((one - two.float()).square().mean().sqrt())


@both
@pytest.mark.parametrize("name", ["full", "long"])
def test_bfloat16(family: str, name: str) -> None:
    """The official logits up to the rounding of the CPU's kernels; the spread is 2."""
    model = open_checkpoint(TINY[family], dtype="bf16")
    assert {weight.dtype for weight in model.network.parameters()} == {torch.bfloat16}
    logits = model.logits(case(family, name)[0])
    assert logits.dtype == torch.float32
    assert rms(logits, ARRAYS[family][f"{name}.logits_bfloat16"]) < 0.06


def first_keys(model: ForeignModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Keys of the first layer as cached, and as rotated in float64 here."""
    embedded = model.network.get_input_embeddings()(tokens)
    layer = model.network.get_submodule("model.layers.0")
    plain = layer.get_submodule("self_attn.k_proj")(layer.get_submodule("input_layernorm")(embedded))
    plain = plain.view(*tokens.shape, -1, 16).transpose(1, 2).double()
    frequencies = 5e5 ** -(torch.arange(8, dtype=torch.float64) / 8)
    turn = torch.polar(torch.ones(()).double(), torch.arange(tokens.shape[1])[:, None] * frequencies)
    turned = torch.complex(*plain.chunk(2, -1)) * turn
    return model.fill(tokens)[1][0][0], torch.cat([turned.real, turned.imag], -1)


def test_llada_rotates_in_float32_unless_told_otherwise(tmp_path: Path) -> None:
    """In bfloat16 its keys are the exact ones, rounded once; without `rope_full_precision` they are rounded often."""
    tokens = case("llada", "long")[0]
    copy_of("llada", tmp_path, rope_full_precision=False)
    once, often = (open_checkpoint(folder, dtype="bf16") for folder in (TINY["llada"], tmp_path))
    wrong = [
        (keys != exact.to(keys.dtype)).double().mean() for keys, exact in (first_keys(m, tokens) for m in (once, often))
    ]
    assert wrong[0] < 0.001
    assert wrong[1] > 0.2
    close(open_checkpoint(tmp_path).logits(tokens), ARRAYS["llada"]["long.logits"])


@both
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_by_default_the_precision_of_the_files(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    random_checkpoint(tmp_path, family, dtype=stored)
    model = open_checkpoint(tmp_path)
    assert {weight.dtype for weight in model.network.parameters()} == {stored}
    assert model.logits(torch.tensor([[1, 2, 126]])).dtype == torch.float32
    exact = open_checkpoint(tmp_path, dtype="fp32").logits(torch.tensor([[1, 2, 126]]))
    close(model.logits(torch.tensor([[1, 2, 126]])), exact, atol=0.1)


@both
def test_the_angles_keep_float32(family: str) -> None:
    exact = MODELS[family].network.get_buffer("model.rotary_emb.inv_freq")
    for dtype in ("bf16", "fp32"):
        frequencies = open_checkpoint(TINY[family], dtype=dtype).to("cpu").network.get_buffer(
            "model.rotary_emb.inv_freq"
        )  # fmt: skip
        assert frequencies.dtype == torch.float32
        assert torch.equal(frequencies, exact)


@both
def test_a_model_in_float64_answers_in_float64(family: str) -> None:
    model = open_checkpoint(TINY[family])
    tokens = case(family, "full")[0]
    double = ForeignModel(model.network.double(), model.constants, length=model.length).logits(tokens)
    assert double.dtype == torch.float64
    close(double.float(), ARRAYS[family]["full.logits"], atol=1e-4)


# --- what is read ---


def test_the_facts_of_a_model() -> None:
    llada, dream = MODELS["llada"], MODELS["Dream"]
    assert llada.constants == Constants(mask_id=126, eos_id=120)
    assert dream.constants == Constants(mask_id=126, eos_id=120, shift=True)
    for model, folder in ((llada, TINY["llada"]), (dream, TINY["Dream"])):
        assert (model.vocab, model.length, model.tokenizer, model.folder) == (128, 64, None, folder)
        assert model.device == torch.device("cpu")


@pytest.mark.parametrize("name", ["llada_8b", "dream_7b"])
def test_the_released_configurations(name: str) -> None:
    """Built without memory, and counted."""
    real = REAL[name]
    settings = Settings(Path("config.json"), real["config"])
    family = FAMILIES[real["config"]["model_type"]]
    network = family.network(settings)
    for field, value in (real.get("llama") or real.get("qwen2")).items():
        assert getattr(network.config, field) == value, field
    assert len(network.state_dict()) == real["tensors"]
    assert sum(weight.numel() for weight in network.parameters()) == real["parameters"]
    assert all(weight.is_meta for weight in network.parameters())
    released = {"llada_8b": Constants(126336, 126081, 126348), "dream_7b": Constants(151666, 151643, 151645, True)}
    assert family.constants(settings, network.config.vocab_size) == released[name]


def test_constants_of_the_released_vocabulary_need_no_fields() -> None:
    values = {name: value for name, value in REAL["llada_8b"]["config"].items() if not name.endswith("token_id")}
    settings = Settings(Path("config.json"), values)
    assert FAMILIES["llada"].constants(settings, 126464) == Constants(126336, 126081, 126348)
    with pytest.raises(CdlmError, match="mask_token_id is absent, expected one of the 128 tokens"):
        FAMILIES["llada"].constants(settings, 128)


@pytest.mark.parametrize("accepted", REFUSE["accept"], ids=lambda item: json.dumps(item["override"]))
def test_accepted_configurations(accepted: dict[str, Any], tmp_path: Path) -> None:
    family = {"llada": "llada", "dream": "Dream"}[accepted["family"]]
    model = open_checkpoint(random_checkpoint(tmp_path, family, accepted["override"]))
    for field, value in accepted["implies"].items():
        assert getattr(model.network.config, field) == value
    assert model.logits(torch.tensor([[1, 126]])).shape == (1, 2, model.vocab)


MORE: dict[str, list[dict[str, Any]]] = {
    "llada": [
        {"block_type": ...}, {"rope": None}, {"rope_scaling": {"type": "yarn"}}, {"quantization_config": {"bits": 4}},
        {"d_model": ...}, {"n_layers": 0}, {"n_heads": 2.0}, {"n_heads": 3}, {"n_kv_heads": 3},
        {"rms_norm_eps": "1e-5"},
        {"rope_theta": None}, {"max_sequence_length": True}, {"mlp_hidden_size": None, "mlp_ratio": None},
        {"n_layers": 10**6}, {"d_model": 2**20, "n_heads": 2}, {"d_model": 2**40}, {"rms_norm_eps": 1e300},
        {"weight_tying": "no"}, {"rope_full_precision": 1}, {"mask_token_id": 128},
        {"mask_token_id": "<mask>"}, {"eos_token_id": -1}, {"eos_token_id": 126},
    ],
    "Dream": [
        {"hidden_act": "gelu"}, {"use_mrope": True}, {"rope_parameters": {"rope_type": "yarn"}}, {"rope_theta": ...},
        {"hidden_size": 60}, {"num_hidden_layers": 10**6}, {"hidden_size": 2**30},
        {"num_key_value_heads": 3}, {"vocab_size": ...}, {"eos_token_id": [120, 121]},
        {"mask_token_id": None}, {"quantization_config": {"bits": 4}},
    ],
}  # fmt: skip
REFUSED = [("llada", o) for o in REFUSE["llada"] + MORE["llada"]] + [
    ("Dream", o) for o in REFUSE["dream"] + MORE["Dream"]
]


@pytest.mark.parametrize(("family", "override"), REFUSED, ids=str)
def test_refused_configurations(family: str, override: dict[str, Any], tmp_path: Path) -> None:
    said = refused(copy_of(family, tmp_path, **override))
    assert any(name in said for name in override), said


@pytest.mark.parametrize("kind", [..., None, "llama", "LLaDA", "dream", "llada2_moe", 3, ["llada"]])
def test_unknown_architectures(kind: object, tmp_path: Path) -> None:
    said = refused(copy_of("llada", tmp_path, model_type=kind))
    assert "expected one of llada, Dream" in said


# --- strict loading ---


def test_shards_are_the_same_model() -> None:
    sharded = open_checkpoint(GOLDEN / "llada_tiny_sharded")
    tokens, valid = case("llada", "left_pad")
    assert torch.equal(sharded.logits(tokens, valid), MODELS["llada"].logits(tokens, valid))


@both
def test_a_tied_head_is_the_table(family: str, tmp_path: Path) -> None:
    """And a head that stands in the file all the same is ignored, as in the official code."""
    tie = {"llada": "weight_tying", "Dream": "tie_word_embeddings"}[family]
    head = FAMILIES[family].official("lm_head.weight")
    table = FAMILIES[family].official("model.embed_tokens.weight")
    tied = random_checkpoint(tmp_path / "tied", family, {tie: True})
    weights = load_file(tied / "model.safetensors")
    assert head not in weights
    untied = shutil.copytree(tied, tmp_path / "untied")
    edit(untied / "config.json", **{tie: False})
    save_file(weights | {head: weights[table].clone()}, untied / "model.safetensors")
    tokens = case(family, "full")[0]
    model = open_checkpoint(tied).to("cpu")
    expected = model.logits(tokens)  # before the file is written over, from which the model may still be mapped
    assert torch.equal(expected, open_checkpoint(untied).logits(tokens))
    assert model.network.get_parameter("lm_head.weight") is model.network.get_parameter("model.embed_tokens.weight")
    save_file(weights | {head: torch.zeros_like(weights[table])}, tied / "model.safetensors")
    assert torch.equal(open_checkpoint(tied).logits(tokens), expected)


Weights = dict[str, Tensor]
GATE = {"llada": "model.transformer.blocks.1.ff_proj.weight", "Dream": "model.layers.1.mlp.gate_proj.weight"}
BROKEN: dict[str, Callable[[Weights, str], object]] = {
    "removed": lambda weights, name: weights.pop(name),
    "renamed": lambda weights, name: weights.update({name + "s": weights.pop(name)}),
    "extra": lambda weights, name: weights.update({name + ".extra": torch.zeros(1)}),
    "misshapen": lambda weights, name: weights.update({name: weights[name].T.contiguous()}),
    "quantised": lambda weights, name: weights.update({name: weights[name].to(torch.int8)}),
    "truths": lambda weights, name: weights.update({name: weights[name] > 0}),
    "eight bits": lambda weights, name: weights.update({name: weights[name].to(torch.float8_e4m3fn)}),
    "no numbers": lambda weights, name: weights[name][-1, -1:].fill_(torch.nan),
}


@both
@pytest.mark.parametrize("fault", BROKEN)
def test_a_wrong_tensor_is_named(family: str, fault: str, tmp_path: Path) -> None:
    weights = load_file(copy_of(family, tmp_path) / "model.safetensors")
    BROKEN[fault](weights, GATE[family])
    save_file(weights, tmp_path / "model.safetensors")
    assert GATE[family] in refused(tmp_path)


@both
def test_names_of_the_architecture_are_not_those_of_llada(family: str, tmp_path: Path) -> None:
    """LLaDA's tensors under Llama's names are not in the official format; Dream's names are Qwen2's."""
    weights = load_file(copy_of(family, tmp_path) / "model.safetensors")
    native = {FAMILIES[family].official(name): name for name in MODELS[family].network.state_dict()}
    save_file({native[name]: value for name, value in weights.items()}, tmp_path / "model.safetensors")
    if family == "Dream":
        assert open_checkpoint(tmp_path).vocab == 128
    else:
        assert "model.transformer" in refused(tmp_path)


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:1000])


SHARD, INDEX = "model-00002-of-00003.safetensors", "model.safetensors.index.json"
FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "no config.json"),
    "broken config": (lambda f: truncate(f / "config.json"), "not valid JSON"),
    "config of a list": (lambda f: (f / "config.json").write_text("[]"), "not a JSON object"),
    "no weights": (lambda f: (f / INDEX).unlink(), "neither model.safetensors nor"),
    "missing shard": (lambda f: (f / SHARD).unlink(), SHARD),
    "truncated shard": (lambda f: truncate(f / SHARD), "damaged"),
    "broken index": (lambda f: truncate(f / INDEX), "not valid JSON"),
    "index without map": (lambda f: edit(f / INDEX, weight_map=...), "no index of weights"),
    "index of a list": (lambda f: edit(f / INDEX, weight_map=[1]), "no index of weights"),
    "index that leaves": (lambda f: edit(f / INDEX, weight_map={"a": "../b.safetensors"}), "expected files beside it"),
    "tensors in two shards": (lambda f: shutil.copy(f / SHARD, f / SHARD.replace("2-", "3-")), "has tensor"),
    "index without a shard": (lambda f: edit(f / INDEX, weight_map={"a": SHARD}), "misses tensor"),
}


@pytest.mark.parametrize("fault", FILES)
def test_a_broken_folder_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "llada_tiny_sharded", tmp_path / "model")
    break_it, message = FILES[fault]
    if fault == "broken config":
        (tmp_path / "model" / "config.json").write_text('{"model_type": "llada",')
    else:
        break_it(tmp_path / "model")
    assert message in refused(tmp_path / "model")


# --- nothing foreign is run, nothing is asked ---


@both
def test_no_network_no_foreign_code_no_draw(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    write_tokenizer(copy_of(family, tmp_path), family)
    for name in ("configuration", "modeling", "tokenization"):
        (tmp_path / f"{name}_{family.lower()}.py").write_text("raise SystemExit('foreign code')\n")
    monkeypatch.setattr(socket.socket, "connect", forbidden)
    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr("builtins.input", forbidden)
    before, modules = torch.random.get_rng_state(), set(sys.modules)
    assert open_checkpoint(tmp_path).tokenizer is not None
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not [name for name in set(sys.modules) - modules if "transformers_modules" in name]


def test_a_device_that_is_not_there() -> None:
    assert "use cpu" in refused(TINY["llada"], device="cuda:99")
    with pytest.raises(CdlmError, match="use cpu"):
        MODELS["llada"].to("abacus")


def test_a_precision_that_is_none() -> None:
    options: dict[str, Any] = {"dtype": "fp8"}
    with pytest.raises(Exception, match="fp32"):  # the type checks of these tests speak first
        open_checkpoint(TINY["llada"], **options)


def test_a_device_map_needs_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert "needs the package accelerate" in refused(TINY["llada"], device_map="auto")


@both
def test_a_device_map(family: str) -> None:
    pytest.importorskip("accelerate")
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    tokens, valid = case(family, "left_pad")
    maps: list[str | dict[str, int | str]] = ["auto", dict.fromkeys(parts, "cpu")]
    for device_map in maps:
        spread = open_checkpoint(TINY[family], device_map=device_map)
        assert torch.equal(spread.fill(tokens, valid)[0], MODELS[family].logits(tokens, valid))
    assert "device_map" in refused(TINY[family], device_map="sideways")
    assert "does not give any device" in refused(TINY[family], device_map={"lm_head": "cpu"})


# --- tokenizers ---


@both
def test_a_tokenizer_without_foreign_code(family: str, tmp_path: Path) -> None:
    write_tokenizer(copy_of(family, tmp_path), family)
    tokenizer = open_checkpoint(tmp_path).tokenizer
    assert tokenizer is not None
    assert (tokenizer.mask_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (126, 120, 120)
    ids = tokenizer(f"the cat sat{tokenizer.mask_token}").input_ids
    assert ids[-1] == 126
    assert max(ids[:-1]) < 120
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the cat sat"
    chat = tokenizer.apply_chat_template([{"role": "on", "content": "the mat"}], tokenize=False)
    start, end = "<|start_header_id|>", "<|end_header_id|>"
    llada, dream = f"{start}on{end}the mat<|eot_id|>{start}assistant{end}", "<|im_start|>on the mat<|im_end|>"
    assert chat == (llada if family == "llada" else dream)


@both
def test_a_cast_of_the_weights_is_refused(family: str) -> None:
    model = open_checkpoint(TINY[family])
    for refused_cast in (
        model.half,
        model.bfloat16,
        model.float,
        model.double,
    ):
        with pytest.raises(CdlmError, match=r'choose the precision where the model is loaded, .*precision="bf16"'):
            refused_cast()
    assert model.to("cpu") is model


def test_dreams_tokenizer_in_one_file(tmp_path: Path) -> None:
    write_tokenizer(copy_of("Dream", tmp_path), "Dream")
    tokenizer = open_checkpoint(tmp_path).tokenizer
    assert tokenizer is not None
    tokenizer.save_pretrained(tmp_path)
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).unlink(missing_ok=True)
    again = open_checkpoint(tmp_path).tokenizer
    assert again is not None
    text = "the dog sat<|mask|> by the door."
    assert again(text).input_ids == tokenizer(text).input_ids


TOKENIZER_FAULTS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no end": ("llada", lambda f: edit(f / "tokenizer_config.json", eos_token=...), "has no end token"),
    "another end": ("llada", lambda f: edit(f / "tokenizer_config.json", eos_token="<|reserved|>"), "eos token"),
    "an end that is made up": ("Dream", lambda f: edit(f / "tokenizer_config.json", eos_token="<|x|>"), "129 tokens"),
    "no mask": ("llada", lambda f: edit(f / "config.json", mask_token_id=127), "no mask token"),
    "a word for a mask": ("Dream", lambda f: edit(f / "config.json", mask_token_id=7), "no mask token"),
    "another mask": ("Dream", lambda f: edit(f / "config.json", mask_token_id=121), "mask token"),
    "no words": ("llada", lambda f: (f / "tokenizer.json").unlink(), "incomplete, expected tokenizer.json"),
    "no merges": ("Dream", lambda f: (f / "merges.txt").unlink(), "vocab.json and merges.txt"),
    "broken words": ("llada", lambda f: truncate(f / "tokenizer.json"), "cannot be read"),
    "broken settings": ("Dream", lambda f: truncate(f / "tokenizer_config.json"), "not valid JSON"),
}


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_a_tokenizer_that_does_not_fit(fault: str, tmp_path: Path) -> None:
    family, break_it, message = TOKENIZER_FAULTS[fault]
    write_tokenizer(copy_of(family, tmp_path), family)
    break_it(tmp_path)
    assert message in refused(tmp_path)


# --- the cache ---


def cached(family: str) -> tuple[Tensor, Any]:
    tokens = ARRAYS[family]["cache.tokens_cached"]
    return tokens, MODELS[family].fill(tokens)[1]


@both
def test_filling_is_a_call(family: str) -> None:
    tokens, valid = case(family, "left_pad")
    logits, cache = MODELS[family].fill(tokens, valid)
    assert torch.equal(logits, MODELS[family].logits(tokens, valid))
    heads = {"llada": 4, "Dream": 2}[family]
    assert [tuple(part.shape) for layer in cache for part in layer] == [(3, heads, 20, 16)] * 4


@both
@pytest.mark.parametrize(("kind", "end"), [("prefix", 24), ("dual", 15)])
def test_the_official_cached_logits(family: str, kind: str, end: int) -> None:
    """Both steps on one cache, each of which overwrites its slots."""
    slots = torch.arange(9, end)[None]
    cache = cached(family)[1]
    for step in ("step1", "step2"):
        tokens = ARRAYS[family][f"cache.tokens_{step}"]
        close(MODELS[family].partial(tokens[:, 9:end], slots, cache), ARRAYS[family][f"cache.{kind}_logits_{step}"])


def scattered(rows: int, n: int, q: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(n, generator=generator)[:q] for _ in range(rows)])


@both
@pytest.mark.parametrize("name", ["full", "left_pad", "right_pad"])
def test_a_partial_call_of_what_is_cached_is_the_full_call(family: str, name: str) -> None:
    tokens, valid = case(family, name)
    logits, cache = MODELS[family].fill(tokens, valid)
    slots = scattered(*tokens.shape, q=7)
    part = MODELS[family].partial(tokens.gather(1, slots), slots, cache, valid)
    full = logits.gather(1, slots[..., None].expand(-1, -1, logits.shape[-1]))
    real = torch.ones_like(slots, dtype=torch.bool) if valid is None else valid.gather(1, slots)
    close(part[real], full[real])
    assert part.isfinite().all()


@both
@pytest.mark.parametrize("name", ["full", "left_pad", "right_pad"])
def test_slots_may_differ_between_rows(family: str, name: str) -> None:
    """Other tokens at other slots of each row: as row by row, unpadded."""
    tokens, valid = case(family, name)
    valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
    slots = torch.stack([real.nonzero().squeeze(1)[scattered(1, int(real.sum()), 5, row)[0]]
                         for row, real in enumerate(valid)])  # fmt: skip
    fresh = (tokens.gather(1, slots) + 17) % 128
    part = MODELS[family].partial(fresh, slots, MODELS[family].fill(tokens, valid)[1], valid)
    for row, real in enumerate(valid):
        alone = MODELS[family].fill(tokens[row, real][None])[1]
        places = real.cumsum(0)[slots[row]] - 1
        close(part[row], MODELS[family].partial(fresh[row][None], places[None], alone)[0])


@both
def test_a_partial_call_of_everything_is_a_full_call_and_overwrites(family: str) -> None:
    tokens, cache = cached(family)
    other = ARRAYS[family]["cache.tokens_step2"]
    slots = torch.arange(24)[None]
    close(MODELS[family].partial(other, slots, cache), MODELS[family].logits(other))
    for ours, fresh in zip(cache, MODELS[family].fill(other)[1], strict=True):
        for a, b in zip(ours, fresh, strict=True):
            close(a, b)
    assert not torch.equal(tokens, other)


@both
def test_rows_of_a_cache_can_be_dropped_joined_and_reordered(family: str) -> None:
    tokens, valid = case(family, "left_pad")
    assert valid is not None
    model, slots = MODELS[family], torch.arange(12, 17)[None].expand(3, -1)
    fresh = (tokens[:, 12:17] + 1) % 128
    whole = model.partial(fresh, slots, model.fill(tokens, valid)[1], valid)
    cache = model.fill(tokens, valid)[1]
    order = torch.tensor([2, 0])
    moved = join(take(cache, order), take(cache, torch.tensor([1])))
    order = torch.tensor([2, 0, 1])
    close(model.partial(fresh[order], slots, moved, valid[order]), whole[order])


@both
def test_the_cache_in_bfloat16(family: str) -> None:
    model = open_checkpoint(TINY[family], dtype="bf16")
    tokens = ARRAYS[family]["cache.tokens_cached"]
    logits, cache = model.fill(tokens)
    assert {part.dtype for layer in cache for part in layer} == {torch.bfloat16}
    part = model.partial(tokens[:, 9:15], torch.arange(9, 15)[None], cache)
    assert rms(part, logits[:, 9:15]) < 0.02


# --- as published ---


@both
def test_how_its_authors_sample_it(family: str) -> None:
    """LLaDA's generate.py, and Dream's README and evaluation; one position a call is as many steps as tokens."""
    llada, dream = Unmasking(LLaDA(), temperature=0.0), Unmasking(Dream(alg="entropy", top_p=0.95), temperature=0.2)
    model = MODELS[family]
    assert model.sampling == (dream if family == "Dream" else llada)
    assert model.new_tokens == {"llada": 128, "Dream": 512}[family]
    bare = ForeignModel(model.network, model.constants, length=model.length)
    assert bare.sampling == Unmasking(Dream() if family == "Dream" else LLaDA())
    assert bare.new_tokens is None


def test_a_setting_that_is_given_changes_itself_alone() -> None:
    base = MODELS["Dream"].sampling
    assert base.with_flat(temperature=0.0) == Unmasking(Dream(top_p=0.95))
    assert base.with_flat(steps=4) == Unmasking(Dream(4, top_p=0.95), temperature=0.2)
    assert base.with_flat(policy="Threshold(0.9)") == Unmasking(Threshold(0.9), temperature=0.2)


@both
def test_ends_that_a_generation_config_names(family: str, tmp_path: Path) -> None:
    copy_of(family, tmp_path)
    before = open_checkpoint(tmp_path)
    for ends, more in (([120, 7, 9, 7], (7, 9)), (7, (7,)), (120, ()), (None, ()), ([], ())):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends, "max_length": "any"}))
        model = open_checkpoint(tmp_path)
        assert model.end_ids == (*before.end_ids, *more)
        assert model.constants == replace(before.constants, stops=more)


@both
def test_a_generation_config_does_not_sample(family: str, tmp_path: Path) -> None:
    """What transformers writes of Dream's class by itself is not what its authors use."""
    saved = {"alg": "origin", "steps": 512, "eps": 0.001, "temperature": 0.0, "top_p": None, "do_sample": True}
    (copy_of(family, tmp_path) / "generation_config.json").write_text(json.dumps(saved))
    assert open_checkpoint(tmp_path).sampling == MODELS[family].sampling


@both
@pytest.mark.parametrize("ends", ["120", [128], -1, True, [120, None], [126], 126, [[120]], 1.0, {"a": 1}], ids=str)
def test_ends_that_are_no_tokens(family: str, ends: object, tmp_path: Path) -> None:
    (copy_of(family, tmp_path) / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    assert "eos_token_id is" in refused(tmp_path)


@both
def test_a_broken_generation_config(family: str, tmp_path: Path) -> None:
    (copy_of(family, tmp_path) / "generation_config.json").write_text("[120]")
    assert "not a JSON object" in refused(tmp_path)
