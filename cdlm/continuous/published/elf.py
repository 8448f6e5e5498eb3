"""ELF's weights as their authors released them for PyTorch (arXiv 2605.10938): files, names and settings."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import torch
from msgspec import Meta

from cdlm.continuous.encoder_space import EncoderSpace
from cdlm.continuous.published.layout import Layout, Official, given
from cdlm.continuous.published.tensors import read_state
from cdlm.continuous.systems.elf import ELF, LEAST_GUIDANCE, MOST_GUIDANCE, NEAREST
from cdlm.core.checks import shown
from cdlm.core.errors import CdlmError
from cdlm.core.plain_yaml import read_mapping
from cdlm.core.schema import Finite, Positive, checked
from cdlm.core.tensors import Lazy, Spec, lazy_tensors
from cdlm.models import hub
from cdlm.models.encoder import config_of
from cdlm.models.in_context import TOKENS

Found = Mapping[str, tuple[Spec, Lazy]]
"""What stands in the file, by its names."""

PLAIN = ("model.safetensors", "pytorch_model.bin", "ckpt.pt")
"""Names of files that hold the weights and nothing else. A checkpoint of a training is `checkpoint_STEP`."""
PARTS = ("ema_params1", "params")
"""State dicts of a checkpoint; the mean of the weights over training is what the authors sample with."""
MLP_RATIO = 4
SIZES = {"ELF-B": (12, 768, 12), "ELF-M": (24, 1056, 16), "ELF-L": (32, 1280, 16)}
"""Depth, width and heads of the models that have a name."""
ENCODERS = {"t5-small": {"model_type": "t5", "d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 6, "num_heads": 8}}
"""Settings of encoders that have a name; those of others are not known here."""


class Place(NamedTuple):
    """Where one of our tensors stands there."""

    name: str
    form: Literal["same", "turned", "batched", "first half", "second half"] = "same"
    """A matrix of inputs by outputs is turned; batched is one with an axis of one row; or it is half of the rows."""


def _layers(ours: str, theirs: str) -> dict[str, Place]:
    return {f"{ours}.{kind}": Place(f"{theirs}.{kind}") for kind in ("weight", "bias")}


OUTER = {
    **_layers("input.0", "self_cond_proj"),
    "input.1.weight": Place("text_proj.proj1.weight"),
    **_layers("input.2", "text_proj.proj2"),
    "asked.time.tokens": Place("t_emb_tokens", "batched"),
    **_layers("asked.time.layers.0", "t_embedder.mlp_0"),
    **_layers("asked.time.layers.2", "t_embedder.mlp_2"),
    "asked.guidance.tokens": Place("self_cond_cfg_tokens", "batched"),
    **_layers("asked.guidance.layers.0", "self_cond_cfg_embedder.mlp_0"),
    **_layers("asked.guidance.layers.2", "self_cond_cfg_embedder.mlp_2"),
    "asked.mode": Place("mode_tokens", "batched"),
    "norm.weight": Place("final_layer.norm_final.weight"),
    **_layers("output", "final_layer.linear"),
    "tokens.0.weight": Place("proj_kernel", "turned"),
    "tokens.0.bias": Place("proj_bias"),
    "tokens.2.weight": Place("unembed_kernel", "turned"),
    "tokens.2.bias": Place("unembed_bias"),
}
"""Of our network's tensors outside its blocks."""
IN_BLOCK = {
    "norm1.weight": Place("norm1.weight"),
    **_layers("attention.qkv", "attn.qkv"),
    "attention.query_norm.weight": Place("attn.q_norm.weight"),
    "attention.key_norm.weight": Place("attn.k_norm.weight"),
    **_layers("attention.out", "attn.proj"),
    "norm2.weight": Place("norm2.weight"),
    **{f"mlp.gate.{kind}": Place(f"mlp.w12.{kind}", "first half") for kind in ("weight", "bias")},
    **{f"mlp.up.{kind}": Place(f"mlp.w12.{kind}", "second half") for kind in ("weight", "bias")},
    **_layers("mlp.down", "mlp.w3"),
}
"""Of those in a block."""


class Settings(TypedDict):
    """Fields of the authors' YAML file that say what the weights are; there are others, of training and evaluation."""

    model: str
    max_length: Positive
    encoder_model_name: str
    latent_mean: Finite
    latent_std: Annotated[float, Meta(gt=0)]
    denoiser_p_mean: Finite
    denoiser_p_std: Annotated[float, Meta(gt=0)]
    denoiser_noise_scale: Annotated[float, Meta(gt=0)]
    decoder_prob: Annotated[float, Meta(ge=0, le=1)]
    decoder_noise_scale: Annotated[float, Meta(ge=0)]
    self_cond_prob: Annotated[float, Meta(gt=0, le=1)]


FIXED = {
    "num_time_tokens": TOKENS, "num_self_cond_cfg_tokens": TOKENS, "num_model_mode_tokens": TOKENS, "t_eps": NEAREST,
    "time_schedule": "logit_normal", "decoder_p_mean": 0.8, "decoder_p_std": 0.8, "self_cond_cfg_min": LEAST_GUIDANCE,
    "self_cond_cfg_max": MOST_GUIDANCE,
}  # fmt: skip
"""Fields with one value that is known here, which is also the authors' default."""
PROMPTED = ("label_drop_prob", "max_input_length")
"""Fields of models of texts after a prompt."""


@dataclass(frozen=True)
class ELFLayout(Layout):
    """ELF as its authors released it for PyTorch (Hu et al., arXiv 2605.10938; github.com/lillian039/ELF, branches
    pytorch_elf and distillation; weights such as embedded-language-flows/ELF-B-owt-torch on the Hugging Face Hub, MIT
    licence): a file of weights, and beside it the YAML file of the settings that they were trained with, which lies in
    the repository under src/configs/training_configs.

    Of a checkpoint the mean over training (EMA) is taken. The encoder is not among the files. It has to be given, since
    its fingerprint is part of a model; samples need it only for a prompt.
    """

    encoder: str = ""
    """Folder of the encoder, or its Hub id."""

    def read(self, folder: Path) -> Official:
        file, (yaml, said) = _weights(folder), _settings(folder)
        found = lazy_tensors(file) if file.suffix == ".safetensors" else read_state(file, PARTS)
        sizes = _sizes(file, found)
        _check_sizes(yaml, said, sizes)
        if not self.encoder:
            raise CdlmError(
                f"{folder} is ELF in the space of {shown(said['encoder_model_name'])}: give that encoder's folder, or"
                " its Hub id, as --encoder"
            )
        space = EncoderSpace.open(self.encoder)
        _check_encoder(self.encoder, said["encoder_model_name"], space.dim, sizes["encoder_dim"])
        settings = ELF(
            width=sizes["width"], depth=sizes["depth"], heads=sizes["heads"], mlp_ratio=MLP_RATIO,
            bottleneck=sizes["bottleneck"], encoder=self.encoder, encoder_dim=space.dim, encoder_hash=space.fingerprint,
            noise_scale=said["denoiser_noise_scale"], time_mean=said["denoiser_p_mean"],
            time_deviation=said["denoiser_p_std"], self_conditioning=said["self_cond_prob"], guidance_dropout=0.0,
            decoder_share=said["decoder_prob"], decoder_noise=said["decoder_noise_scale"], probe=False,
        )  # fmt: skip
        tensors = {ours: _ours(found[place.name], place.form) for ours, place in _places(sizes["depth"]).items()}
        tensors["space.mean"] = given(torch.tensor(said["latent_mean"], dtype=torch.float32))
        tensors["space.std"] = given(torch.tensor(said["latent_std"], dtype=torch.float32))
        return Official({"system": "elf", "vocab": sizes["vocab"], **asdict(settings)}, said["max_length"], tensors)

    def write(self, official: Official, folder: Path) -> None:
        raise CdlmError("released files of ELF are read and not written: a model folder of cdlm has no such form here")


def _places(depth: int) -> dict[str, Place]:
    """Where each of our tensors stands there."""
    outer = {f"network.{ours}": place for ours, place in OUTER.items()}
    blocks = {
        f"network.blocks.{i}.{ours}": Place(f"blocks.{i}.{place.name}", place.form)
        for i in range(depth)
        for ours, place in IN_BLOCK.items()
    }
    return outer | blocks


def _ours(there: tuple[Spec, Lazy], form: str) -> tuple[Spec, Lazy]:
    """One of our tensors. What has not the shape of its form stays as it is, and does not fit then."""
    (shape, dtype), content = there
    if form == "turned":
        return Spec(shape[::-1], dtype), lambda: content().mT
    if form == "batched" and shape[:1] == (1,):
        return Spec(shape[1:], dtype), lambda: content()[0]
    if form.endswith("half") and shape and shape[0] % 2 == 0:
        half = slice(0, shape[0] // 2) if form == "first half" else slice(shape[0] // 2, shape[0])
        return Spec((shape[0] // 2, *shape[1:]), dtype), lambda: content()[half]
    return there


# --- the weights ------------------------------------------------------------------------------------------------------


def _weights(folder: Path) -> Path:
    """The one file of weights."""
    named = [folder / name for name in PLAIN if (folder / name).exists()]
    steps = [file for file in folder.iterdir() if re.fullmatch(r"checkpoint_\d+", file.name)]
    found = sorted(named + steps)
    if len(found) != 1:
        many = f"{len(found)}, such as {found[0].name} and {found[1].name}" if found else "none"
        raise CdlmError(
            f"{folder} has to have one file of ELF's weights, checkpoint_STEP or {', '.join(PLAIN)}, and has {many}:"
            " leave one"
        )
    return found[0]


def _sizes(file: Path, found: Found) -> dict[str, int]:
    """The sizes that the tensors have, all of which must be there, and no others."""
    depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    known = {place.name for place in _places(max(1, depth)).values()}
    for what, odd in (("misses", known - found.keys()), ("has an unknown", found.keys() - known)):
        if odd:
            raise CdlmError(
                f"{file} {what} tensor {shown(min(odd))} ({len(odd)} in all): these are not ELF's released weights, or"
                " not all of them; copy them again"
            )
    told = ("text_proj.proj2.weight", "final_layer.linear.bias", "unembed_bias", "blocks.0.attn.q_norm.weight")
    shapes = {name: found[name][0].shape for name in told}
    if [len(shape) for shape in shapes.values()] != [2, 1, 1, 1] or 0 in sum(shapes.values(), ()):
        raise CdlmError(f"{file} holds no network: {', '.join(f'{n} has shape {s}' for n, s in shapes.items())}")
    (width, bottleneck), (dim,), (vocab,), (head,) = shapes.values()
    if width % head or head % 2:
        raise CdlmError(f"{file} has a width of {width} and heads of {head}: expected a multiple, and an even number")
    return {
        "depth": depth, "width": width, "heads": width // head, "bottleneck": bottleneck, "encoder_dim": dim,
        "vocab": vocab,
    }  # fmt: skip


# --- the settings -----------------------------------------------------------------------------------------------------


def _settings(folder: Path) -> tuple[Path, Settings]:
    """The one YAML file, and what it says of the weights."""
    found = sorted([*folder.glob("*.yml"), *folder.glob("*.yaml")])
    if len(found) != 1:
        raise CdlmError(
            f"{folder} has to have one YAML file of the settings of ELF's training, and has {len(found)}: copy it from"
            " src/configs/training_configs of the authors' repository, such as train_owt_ELF-B.yml"
        )
    values = read_mapping(found[0], "settings of ELF's training")
    said = checked(values, Settings, str(found[0]), "copy the settings that the weights were trained with")
    for name, known in FIXED.items():
        if values.get(name, known) != known:
            raise CdlmError(f"{found[0]} has {name} {shown(values[name])}, expected {known!r}: no other ELF is known")
    if odd := next((name for name in PROMPTED if values.get(name)), None):
        raise CdlmError(
            f"{found[0]} has {odd} {shown(values[odd])}, so these weights write after a prompt, which they are shown in"
            " another way than here: take weights that were trained on open text"
        )
    return found[0], said


def _check_sizes(yaml: Path, said: Settings, sizes: Mapping[str, int]) -> None:
    found = sizes["depth"], sizes["width"], sizes["heads"]
    if SIZES.get(said["model"], found) != found:
        raise CdlmError(
            f"{yaml} is of {said['model']}, of depth, width and heads {SIZES[said['model']]}, and the weights have"
            f" {found}: copy the settings that they were trained with"
        )


def _check_encoder(encoder: str, name: str, dim: int, wanted: int) -> None:
    if dim != wanted:
        raise CdlmError(f"the weights are for vectors of {wanted}, the encoder {encoder} has {dim}: give {shown(name)}")
    known: Mapping[str, Any] = ENCODERS.get(name.removeprefix("google-t5/"), {})
    config = config_of(hub.locate(encoder))
    for setting, value in known.items():
        if getattr(config, setting, None) != value:
            raise CdlmError(
                f"the encoder {encoder} has {setting} {getattr(config, setting, None)!r}, and {shown(name)} has"
                f" {value!r}: give that one"
            )
