"""ELF's released weights: the function that the paper's formulas say, and one line for what is broken."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from toys import VOCAB, tokenizer

from cdlm import api
from cdlm.cli.main import main
from cdlm.continuous.encoder_space import EncoderSpace
from cdlm.continuous.published.elf import ELFLayout
from cdlm.continuous.systems.elf import Flow
from cdlm.core.errors import CdlmError
from cdlm.core.types import Condition
from cdlm.runs.convert import convert

DIM, WIDTH, HEADS, DEPTH, BOTTLENECK, TOKENS, LENGTH = 8, 16, 2, 2, 4, 4, 10
INNER = int(4 * WIDTH * 2 / 3)
SAID = {
    "model": "tiny", "max_length": LENGTH, "encoder_model_name": "tiny-t5", "latent_mean": 0.0, "latent_std": 0.2,
    "bottleneck_dim": BOTTLENECK, "num_time_tokens": 4, "denoiser_p_mean": -1.4, "denoiser_p_std": 0.7,
    "denoiser_noise_scale": 2.5, "t_eps": 0.05, "time_schedule": "logit_normal", "decoder_prob": 0.25,
    "decoder_noise_scale": 4.0, "self_cond_prob": 0.5, "epochs": 5, "optimizer": "muon",
}  # fmt: skip


# --- the released network, from the formulas of the paper alone -------------------------------------------------------


def shapes() -> dict[str, tuple[int, ...]]:
    layers = {
        "self_cond_proj": (DIM, 2 * DIM), "text_proj.proj2": (WIDTH, BOTTLENECK), "final_layer.linear": (DIM, WIDTH),
        **{f"{e}.mlp_0": (WIDTH, 256) for e in ("t_embedder", "self_cond_cfg_embedder")},
        **{f"{e}.mlp_2": (WIDTH, WIDTH) for e in ("t_embedder", "self_cond_cfg_embedder")},
    }  # fmt: skip
    plain: dict[str, tuple[int, ...]] = {
        "text_proj.proj1.weight": (BOTTLENECK, DIM), "final_layer.norm_final.weight": (WIDTH,),
        "proj_kernel": (WIDTH, DIM), "proj_bias": (DIM,), "unembed_kernel": (DIM, VOCAB), "unembed_bias": (VOCAB,),
        **{name: (1, TOKENS, WIDTH) for name in ("t_emb_tokens", "self_cond_cfg_tokens", "mode_tokens")},
    }  # fmt: skip
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        layers |= {
            f"{block}.attn.qkv": (3 * WIDTH, WIDTH), f"{block}.attn.proj": (WIDTH, WIDTH),
            f"{block}.mlp.w12": (2 * INNER, WIDTH), f"{block}.mlp.w3": (WIDTH, INNER),
        }  # fmt: skip
        plain |= {f"{block}.{norm}.weight": (WIDTH,) for norm in ("norm1", "norm2")}
        plain |= {f"{block}.attn.{norm}.weight": (WIDTH // HEADS,) for norm in ("q_norm", "k_norm")}
    for name, (outputs, inputs) in layers.items():
        plain |= {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
    return plain


def weights(seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {name: 0.4 * torch.randn(shape, generator=random) for name, shape in shapes().items()}


def formulas(w: dict[str, Tensor], x: Tensor, sc: Tensor, t: float, guidance: float, decode: bool) -> Tensor:
    """The estimate of one text of n positions, or its logits, in float64."""
    w = {name: value.double() for name, value in w.items()}

    def linear(name: str, value: Tensor) -> Tensor:
        return value @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def normed(name: str, value: Tensor) -> Tensor:
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"]

    def told(tokens: str, embedder: str, scalar: float) -> Tensor:
        phase = [scalar * 10_000 ** (-i / 128) for i in range(128)]
        waves = torch.tensor([math.cos(p) for p in phase] + [math.sin(p) for p in phase], dtype=torch.float64)
        hidden = linear(f"{embedder}.mlp_0", waves)
        return w[tokens][0] + linear(f"{embedder}.mlp_2", hidden * hidden.sigmoid())

    def turned(value: Tensor) -> Tensor:  # positions by the numbers of a head, as complex numbers
        half = value.shape[-1] // 2
        place = (torch.arange(len(value)) - 3 * TOKENS).clamp(min=0).double()
        angle = place[:, None] * 10_000 ** (-torch.arange(half).double() / half)
        pairs = torch.view_as_complex(value.reshape(len(value), half, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)

    h = linear(
        "text_proj.proj2", linear("self_cond_proj", torch.cat([x, sc], -1).double()) @ w["text_proj.proj1.weight"].T
    )
    time = told("t_emb_tokens", "t_embedder", t)
    scale = told("self_cond_cfg_tokens", "self_cond_cfg_embedder", guidance)
    h = torch.cat([time, scale, w["mode_tokens"][0] * decode, h])
    for block in (f"blocks.{i}" for i in range(DEPTH)):
        heads = []
        for part in linear(f"{block}.attn.qkv", normed(f"{block}.norm1", h)).reshape(len(h), 3, HEADS, -1).unbind(2):
            q, k, v = part.unbind(1)
            q, k = turned(normed(f"{block}.attn.q_norm", q)), turned(normed(f"{block}.attn.k_norm", k))
            heads.append((q @ k.T / q.shape[-1] ** 0.5).softmax(-1) @ v)
        h = h + linear(f"{block}.attn.proj", torch.cat(heads, -1))
        gate, up = linear(f"{block}.mlp.w12", normed(f"{block}.norm2", h)).split(INNER, -1)
        h = h + linear(f"{block}.mlp.w3", gate * gate.sigmoid() * up)
    h = h[3 * TOKENS :]
    if not decode:
        return linear("final_layer.linear", normed("final_layer.norm_final", h))
    return F.gelu(h @ w["proj_kernel"] + w["proj_bias"], approximate="tanh") @ w["unembed_kernel"] + w["unembed_bias"]


# --- the files --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny T5, whose encoder is used, with random weights and the tokenizer of the toys."""
    folder = tmp_path_factory.mktemp("t5")
    config = transformers.T5Config(vocab_size=VOCAB, d_model=DIM, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformers.T5EncoderModel(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A checkpoint of a training, in which the mean of the weights differs from the last weights."""
    folder = tmp_path / "released"
    folder.mkdir()
    content = {"params": weights(1), "ema_params1": weights(), "opt_state": {"state": {0: {"step": 7}}}, "step": 7,
               "epoch": 0, "lr_scheduler": None, "dropout_rng": torch.zeros(3, dtype=torch.uint8)}  # fmt: skip
    torch.save(content, folder / "checkpoint_7")
    (folder / "train_tiny.yml").write_text(yaml.dump(SAID))
    return folder


def converted(released: Path, encoder: str) -> Flow:
    convert(ELFLayout(encoder), released, released.parent / "ours", encoder)
    model = api.load(released.parent / "ours", device="cpu")
    assert isinstance(model, Flow)
    return model


def refused(released: Path, encoder: str, *named: str) -> None:
    """One line with these words, and nothing written."""
    before = set(released.parent.iterdir())
    with pytest.raises(CdlmError) as caught:
        convert(ELFLayout(encoder), released, released.parent / "ours", encoder or None)
    line = str(caught.value)
    assert "\n" not in line
    assert [word for word in named if word not in line] == [], line
    assert set(released.parent.iterdir()) == before


@pytest.mark.parametrize("file", ["checkpoint_7", "pytorch_model.bin", "ckpt.pt", "model.safetensors"])
def test_a_converted_model_is_the_function_of_the_formulas(released: Path, encoder: str, file: str) -> None:
    if file != "checkpoint_7":
        (released / "checkpoint_7").unlink()
        save_file(weights(), released / file) if file.endswith("tensors") else torch.save(weights(), released / file)
    model, random = converted(released, encoder), torch.Generator().manual_seed(5)
    x, sc = torch.randn(2, 1, LENGTH, DIM, generator=random).unbind()
    tau, scale, open_ = 0.3, 3.0, torch.ones(1, LENGTH, dtype=torch.bool)
    t = torch.tensor([2.5 * (1 - tau) / tau], dtype=torch.float64)
    condition = Condition(torch.zeros_like(x), open_, sc, None, None, torch.tensor([scale]))
    made = model.denoise(x / tau, t, condition).x0[0].double()
    torch.testing.assert_close(made, formulas(weights(), x[0], sc[0], tau, scale, False), rtol=1e-5, atol=1e-5)
    logits, wanted = model.decode(x, condition)[0].double(), formulas(weights(), x[0], 0 * sc[0], 1.0, scale, True)
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-5)


def test_a_converted_model_has_the_settings_of_its_training_and_the_encoder_s_space(
    released: Path, encoder: str
) -> None:
    model = converted(released, encoder)
    assert (model.length, model.settings.encoder) == (LENGTH, encoder)
    assert (model.schedule.mean, model.schedule.deviation, model.schedule.noise_scale) == (-1.4, 0.7, 2.5)
    assert (model.settings.decoder_share, model.settings.decoder_noise) == (0.25, 4.0)
    assert isinstance(model.space, EncoderSpace)
    model.space.check_tokenizer(model.need_tokenizer())
    ids = torch.tensor([[5, 9, 7]])
    with torch.no_grad():
        t5 = transformers.T5EncoderModel.from_pretrained(encoder)(ids).last_hidden_state
    torch.testing.assert_close(model.space(ids, torch.ones_like(ids, dtype=torch.bool)), t5 / 0.2)
    assert api.generate(model, n=2, steps=3).tokens.shape == (2, LENGTH)


# --- what is broken ---


def change(released: Path, how: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    content = torch.load(released / "checkpoint_7", weights_only=True)
    torch.save({**content, "ema_params1": how(content["ema_params1"])}, released / "checkpoint_7")


@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda w: {n: v for n, v in w.items() if n != "mode_tokens"}, ["misses", "mode_tokens"]),
        (lambda w: {n: v for n, v in w.items() if "blocks" not in n}, ["misses", "blocks.0"]),
        (lambda w: {**w, "decoder_head_norm.weight": torch.ones(WIDTH)}, ["unknown", "decoder_head_norm"]),
        (lambda w: {**w, "blocks.x.norm1.weight": torch.ones(WIDTH)}, ["misses", "blocks.2"]),
        (lambda w: {**w, "proj_kernel": torch.zeros(DIM, WIDTH)}, ["tokens.0.weight", "(16, 8)"]),
        (lambda w: {**w, "t_emb_tokens": torch.zeros(1, 3, WIDTH)}, ["asked.time.tokens", "(3, 16)"]),
        (lambda w: {**w, "t_emb_tokens": torch.zeros(2, 4, WIDTH)}, ["asked.time.tokens", "(2, 4, 16)"]),
        (lambda w: {**w, "blocks.1.mlp.w12.bias": torch.zeros(2 * INNER + 1)}, ["blocks.1.mlp", f"({2 * INNER + 1},)"]),
        (lambda w: {**w, "blocks.0.attn.q_norm.weight": torch.ones(3)}, ["width of 16", "heads of 3"]),
        (lambda w: {**w, "unembed_bias": torch.zeros(())}, ["unembed_bias", "()"]),
        (lambda w: {**w, "proj_bias": w["proj_bias"] * math.nan}, ["no numbers"]),
        (lambda w: {"w": "text"}, ["state dict"]),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit(released: Path, encoder: str, how: Any, named: list[str]) -> None:
    change(released, how)
    refused(released, encoder, *named)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"latent_std": 0}, ["latent_std"]),
        ({"latent_mean": "stats.pt"}, ["latent_mean"]),
        ({"num_time_tokens": 8}, ["num_time_tokens 8", "expected 4"]),
        ({"time_schedule": "uniform"}, ["time_schedule", "logit_normal"]),
        ({"label_drop_prob": 0.1}, ["after a prompt", "open text"]),
        ({"model": "ELF-B"}, ["ELF-B", "(12, 768, 12)", "(2, 16, 2)"]),
        ({"encoder_model_name": "t5-small"}, ["d_model", "512"]),
    ],
)
def test_settings_that_do_not_fit(released: Path, encoder: str, said: dict[str, Any], named: list[str]) -> None:
    (released / "train_tiny.yml").write_text(yaml.dump({**SAID, **said}))
    refused(released, encoder, *named)


def test_files_that_are_missing_or_too_many(released: Path, encoder: str) -> None:
    shutil.copy(released / "checkpoint_7", released / "checkpoint_8")
    refused(released, encoder, "2, such as checkpoint_7 and checkpoint_8")
    for step in (7, 8):
        (released / f"checkpoint_{step}").unlink()
    refused(released, encoder, "has none", "checkpoint_STEP")
    torch.save(weights(), released / "ckpt.pt")
    (released / "train_tiny.yml").unlink()
    refused(released, encoder, "YAML", "train_owt_ELF-B.yml")


def test_the_encoder_has_to_be_given_and_the_right_one(released: Path, encoder: str, tmp_path: Path) -> None:
    refused(released, "", "tiny-t5", "--encoder")
    shutil.copytree(encoder, tmp_path / "wide")
    config = transformers.T5Config(vocab_size=VOCAB, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5EncoderModel(config).save_pretrained(tmp_path / "wide")
    refused(released, str(tmp_path / "wide"), "vectors of 8", "has 12")


def test_the_command(released: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = ["convert", "elf", str(released), str(tmp_path / "ours")]
    back = ["convert", "elf", str(tmp_path / "ours"), str(tmp_path / "back")]
    main([*told, "--encoder", encoder])
    shutil.move(tmp_path / "ours", tmp_path / "first")
    plaid = ["convert", "plaid", *told[2:], "--encoder", encoder]
    for wrong, line in ((told, "as --encoder"), (plaid, "plaid has no encoder"), (back, "ours is not a folder")):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert line in said
        assert said.count("\n") == 1
    with pytest.raises(CdlmError, match="read and not written"):
        convert(ELFLayout(), tmp_path / "first", tmp_path / "back")
    assert not (tmp_path / "back").exists()
