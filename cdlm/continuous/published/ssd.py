"""SSD-LM as it was published: RoBERTa between two more linear layers, and its files (arXiv 2210.17432)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.continuous.inputs import NetworkInput
from cdlm.continuous.objectives import CrossEntropy, Seeded
from cdlm.continuous.published.layout import Layout, Official
from cdlm.continuous.published.tensors import read_state
from cdlm.continuous.schedules import alpha_of
from cdlm.continuous.systems.ssd import SSD, Cosine, rows_of
from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, write_text
from cdlm.core.tensors import Lazy, Spec, check_value, lazy_tensors, same_specs, specs_of, write_tensors
from cdlm.core.types import Condition
from cdlm.models.hub import locate

PAD = 1
"""RoBERTa's padding token; its positions are counted from the one after."""
LENGTH, BLOCK = 200, 25
"""Positions of a row and of a block in the published training."""
TIED: Mapping[str, str] = MappingProxyType(
    {"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}
)
"""Copies that a file may have, and what they are copies of."""
UNUSED = ("roberta.pooler.", "roberta.embeddings.position_ids")
"""Beginnings of names that a file may have and the network does not."""
EXTRA: Mapping[str, str] = MappingProxyType(
    {"network_input.noisy.": "embed_sum_layer.pt", "network_input.timestep.": "timestep_layer.pt"}
)
"""Files beside RoBERTa's, by the names that we give to their tensors."""
FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "type_vocab_size": 1,
        "pad_token_id": PAD,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }
)
"""What the config.json of every RoBERTa says."""
SIZES = ("width", "depth", "heads", "mlp_ratio", "positions")
"""Settings of ours that RoBERTa's config.json says."""
OWN = ("block", "k", "top_p")
"""Those that it has no word for."""


class Roberta(nn.Module):
    """transformers' own RoBERTa with its masked-language-model head, on features in place of tokens.

    The head's matrix is the table of word embeddings, which is there once. The level is not looked at: it is in the
    features already.
    """

    def __init__(self, settings: SSD, vocab: int):
        from transformers import RobertaConfig, RobertaForMaskedLM

        super().__init__()
        whole: Any = RobertaForMaskedLM(RobertaConfig(**roberta_config(settings, vocab)))
        self.roberta, self.lm_head, self.positions = whole.roberta, whole.lm_head, settings.positions
        del self.lm_head.decoder
        # They are not among the weights: made for real, whatever the rest is.
        places = torch.arange(settings.positions + PAD + 1, device="cpu")[None]
        self.roberta.embeddings.register_buffer("position_ids", places, persistent=False)
        self.roberta.embeddings.register_buffer("token_type_ids", torch.zeros_like(places), persistent=False)

    @property
    def blocks(self) -> nn.Module:
        """The hidden layers."""
        return self.roberta.encoder.layer

    def table(self) -> Float[Tensor, "v w"]:
        """Word embeddings."""
        return self.roberta.embeddings.word_embeddings.weight

    def forward(
        self, features: Float[Tensor, "b n w"], level: Float[Tensor, " b"], valid: Bool[Tensor, "b n"] | None = None
    ) -> Float[Tensor, "b n v"]:
        if features.shape[1] > self.positions:
            raise CdlmError(
                f"this RoBERTa has {self.positions} positions, the rows have {features.shape[1]}: lower the length"
            )
        hidden = self.roberta(inputs_embeds=features, attention_mask=valid).last_hidden_state
        head = self.lm_head
        return F.linear(head.layer_norm(F.gelu(head.dense(hidden))), self.table(), head.bias)


class RobertaInput(NetworkInput):
    """Given tokens by RoBERTa's word embeddings, noisy ones by the mean of another table under softmax(alpha z), to
    which a linear function of u is added (section 3.2)."""

    def __init__(self, network: Roberta, schedule: Cosine):
        super().__init__()
        self.k, self.u_of_t, self.table = schedule.k, schedule.u_of_t, network.table
        vocab, width = network.table().shape
        self.noisy, self.timestep = nn.Linear(vocab, width, bias=False), nn.Linear(1, width)
        self.noisy.weight.data.copy_(network.table().detach().T)  # both start from the word embeddings

    def forward(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Float[Tensor, "b n f"], Float[Tensor, " b"]]:
        u, shown = self.u_of_t(t).to(z.dtype), (z * alpha_of(t / self.k).to(z.dtype)[:, None, None]).softmax(-1)
        noisy = self.noisy(shown) + self.timestep(u[:, None])[:, None]
        return torch.where(condition.target[..., None], noisy, rows_of(self.table(), condition.clean)), u.float()


def build_roberta(settings: SSD, vocab: int, schedule: Cosine) -> tuple[Roberta, RobertaInput, Seeded]:
    """The network, the reader and the objective of a system with the published network.

    Raises:
        CdlmError: `settings.start` is not there, or of another size or vocabulary.
    """
    network = Roberta(settings, vocab)
    if settings.start is not None:
        _load_start(network, settings, vocab)
    return network, RobertaInput(network, schedule), Seeded(CrossEntropy())


def roberta_config(settings: SSD, vocab: int) -> dict[str, Any]:
    """The network of these settings in the words of RoBERTa's config.json."""
    return {
        "vocab_size": vocab,
        "hidden_size": settings.width,
        "num_hidden_layers": settings.depth,
        "num_attention_heads": settings.heads,
        "intermediate_size": settings.mlp_ratio * settings.width,
        "max_position_embeddings": settings.positions + PAD + 1,
        "hidden_dropout_prob": settings.dropout,
        "attention_probs_dropout_prob": settings.dropout,
        **FIXED,
    }


def _load_start(network: Roberta, settings: SSD, vocab: int) -> None:
    """Copy a pretrained RoBERTa into the network, all of it and nothing else."""
    folder = locate(str(settings.start))
    config = read_config(folder)
    found, wanted = sizes(config, folder), {name: getattr(settings, name) for name in SIZES}
    if found != wanted:
        wanted = ", ".join(f"{name}={value}" for name, value in found.items())
        raise CdlmError(f"{settings.start} is a RoBERTa of another size than these settings: set {wanted}")
    if config["vocab_size"] != vocab:
        raise CdlmError(
            f"{settings.start} has {config['vocab_size']} tokens and the tokenizer {vocab}: train with its tokenizer"
        )
    found = read_weights(folder / "model.safetensors")
    same_specs(folder, specs_of(network.state_dict()), {name: spec for name, (spec, _) in found.items()})
    network.load_state_dict({name: check_value(folder, name, content()) for name, (_, content) in found.items()})


class SSDLayout(Layout):
    """SSD-LM as published: RoBERTa for masked language modelling, `embed_sum_layer.pt` and `timestep_layer.pt` (Han,
    Kumar and Tsvetkov, arXiv 2210.17432, github.com/xhan77/ssd-lm). The repository names no licence: ask the authors
    before you pass a copy on.

    Its files do not say K, the block or the length, which are then those of the publication: 5, 25 and 200. What we
    write says them in config.json, under "cdlm".
    """

    def read(self, folder: Path) -> Official:
        config = read_config(folder)
        settings, length = _settings(config, folder)
        pickled, file = folder / "pytorch_model.bin", folder / "model.safetensors"
        network = read_weights(pickled if pickled.exists() and not file.exists() else file)
        tensors = {f"network.{name}": content for name, content in network.items()}
        for prefix, extra in EXTRA.items():
            state = read_state(folder / extra)
            tensors |= {prefix + name.removeprefix("module."): content for name, content in state.items()}
        return Official({"system": "ssd", "vocab": config["vocab_size"], **asdict(settings)}, length, tensors)

    def write(self, official: Official, folder: Path) -> None:
        config = dict(official.config)
        if config.pop("system", None) != "ssd" or config.get("network") != "roberta":
            raise CdlmError("this system has no files of SSD-LM's published format: only one with network=roberta has")
        vocab, settings = config.pop("vocab"), SSD(**config)
        content = {
            "model_type": "roberta",
            "architectures": ["RobertaForMaskedLM"],
            "bos_token_id": 0,
            "eos_token_id": 2,
            **roberta_config(settings, vocab),
            "cdlm": {"length": official.length, **{name: getattr(settings, name) for name in OWN}},
        }
        write_text(folder / "config.json", json.dumps(content, indent=2) + "\n")
        network = _part(official, "network.")
        network |= {copy: network[name] for copy, name in TIED.items()}
        specs = {name: Spec(spec.shape, torch.float32) for name, (spec, _) in network.items()}
        write_tensors(folder / "model.safetensors", specs, {name: lazy for name, (_, lazy) in network.items()})
        for prefix, extra in EXTRA.items():
            torch.save({name: content() for name, (_, content) in _part(official, prefix).items()}, folder / extra)


def _part(official: Official, prefix: str) -> dict[str, tuple[Spec, Lazy]]:
    named = official.tensors.items()
    return {name.removeprefix(prefix): content for name, content in named if name.startswith(prefix)}


def _settings(config: Mapping[str, Any], folder: Path) -> tuple[SSD, int]:
    """The settings of the system, and the length that it was trained on."""
    found, dropout = sizes(config, folder), config.get("hidden_dropout_prob")
    if dropout != config.get("attention_probs_dropout_prob") or not isinstance(dropout, int | float):
        raise CdlmError(f"{folder / 'config.json'} has two shares of dropout, or none: expected one for both")
    own = config.get("cdlm", {"length": min(LENGTH, found["positions"]), "block": min(BLOCK, found["positions"])})
    try:
        own = dict(own)
        length = int(own.pop("length"))
        return SSD(network="roberta", dropout=float(dropout), **found, **own), length
    except (KeyError, TypeError, ValueError) as error:
        raise CdlmError(f"{folder / 'config.json'} has settings 'cdlm' that cannot be read ({error})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """RoBERTa's config.json.

    Raises:
        CdlmError: there is none, or it is of another architecture.
    """
    file = folder / "config.json"
    config = read_json(file, "a RoBERTa checkpoint")
    if config.get("model_type") != "roberta":
        raise CdlmError(f"{file} is not of a RoBERTa: expected model_type roberta")
    for name, value in {**FIXED, "is_decoder": False}.items():
        # transformers leaves out what all of its architectures have in common
        found = config.get(name, value if name in ("tie_word_embeddings", "is_decoder") else None)
        if found != value:
            raise CdlmError(f"{file} has {name} {found!r}, expected {value!r}: this variant of RoBERTa is not known")
    return config


def sizes(config: Mapping[str, Any], folder: Path) -> dict[str, int]:
    """The settings of `SSD` that RoBERTa's config.json knows: those of `SIZES`."""

    def count(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int) or value < 1:
            raise CdlmError(f"{folder / 'config.json'} has {name} {value!r}, expected a whole number >= 1")
        return value

    width, inner, _ = count("hidden_size"), count("intermediate_size"), count("vocab_size")
    if inner % width:
        raise CdlmError(f"{folder / 'config.json'} has intermediate_size {inner}, expected a multiple of {width}")
    depth, heads = count("num_hidden_layers"), count("num_attention_heads")
    positions = count("max_position_embeddings") - PAD - 1
    return dict(zip(SIZES, (width, depth, heads, inner // width, positions), strict=True))


def read_weights(file: Path) -> dict[str, tuple[Spec, Lazy]]:
    """The network's tensors in a file, by their names there; each copy must equal what it is a copy of."""
    found = lazy_tensors(file) if file.suffix == ".safetensors" else read_state(file)
    kept = {name: content for name, content in found.items() if name not in TIED and not name.startswith(UNUSED)}
    for copy, name in TIED.items():
        if copy in found and name in kept:
            spec, lazy = kept[name]
            kept[name] = (spec, partial(_twice, file, (name, lazy), (copy, found[copy][1])))
    return kept


def _twice(file: Path, first: tuple[str, Lazy], second: tuple[str, Lazy]) -> Tensor:
    value = first[1]()
    if not torch.equal(value, second[1]()):
        raise CdlmError(f"{file} has {second[0]!r} that differs from {first[0]!r}: a RoBERTa has one for both")
    return value
