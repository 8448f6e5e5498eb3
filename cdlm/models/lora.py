"""LoRA (arXiv 2106.09685) by means of peft: adapters of a network, trained beside their frozen base, in peft's files.

Nothing of an adapter's folder is handed to peft as it is: its settings and tensors are read and checked here.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from cdlm.core.checks import MOST_FEATURES, Settings, check_number, check_whole, shown
from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, replacing, write_text
from cdlm.core.schema import Finite, Positive, checked
from cdlm.core.tensors import FLOATS, check_values, read_header, read_tensors, specs_of, write_tensors
from cdlm.halting.update_map import UpdateMap, write_map
from cdlm.models.hub import TENSORS, fingerprint_of

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MODULES = ("qkv", "q_proj", "k_proj", "v_proj")
"""What is adapted unless others are named: queries, keys and values, of our own transformer and of Llama and Qwen2."""
PREFIX = "base_model.model."
"""Before the names of tensors in peft's files."""
NAME = "default"
"""Of the one adapter of a network, as peft calls it."""
EPS = 1e-8
"""Of AdamW, in the update directions."""
_NAME = re.compile(r"[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "use_dora": (False,), "use_rslora": (False,), "lora_bias": (False,),
    "fan_in_fan_out": (False,), "modules_to_save": (None,), "layers_to_transform": (None,), "rank_pattern": ({},),
    "alpha_pattern": ({},), "layer_replication": (None,), "target_parameters": (None,), "use_qalora": (False,),
    "trainable_token_indices": (None,), "exclude_modules": (None,),
}  # fmt: skip
"""What plain LoRA has in its settings; a field may be absent."""


@dataclass(frozen=True)
class LoraSettings(Settings):
    """Weights W + alpha / rank * B A of some linear layers, of which A and B are trained and W is not.

    Args:
        rank: rows of A and columns of B.
        alpha: by default twice the rank.
        dropout: of what enters A, in training.
        modules: last names of the layers that are adapted; by default queries, keys and values.
    """

    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    modules: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_whole("LoRA", largest=MOST_FEATURES, rank=self.rank)
        check_number("LoRA", above=0.0, optional=True, alpha=self.alpha)
        check_number("LoRA", least=0.0, below=1.0, dropout=self.dropout)
        named = MODULES if self.modules is None else self.modules
        odd = [name for name in named if not _NAME.fullmatch(name)]
        if odd or not named:
            raise CdlmError(f"LoRA needs names of modules, such as qkv or q_proj, got {shown(odd or named)}")

    @property
    def scale(self) -> float:
        """alpha, or its default."""
        return 2.0 * self.rank if self.alpha is None else float(self.alpha)

    def settled(self, network: nn.Module) -> LoraSettings:
        """The same with all that has a default, for a network.

        Raises:
            CdlmError: the network has no linear layer of a name, or none in which so many ranks are of use.
        """
        layers = dict[str, int]()  # the most ranks that a matrix of this name has
        for name, part in network.named_modules():
            if isinstance(part, nn.Linear):
                last = name.rpartition(".")[2]
                layers[last] = max(layers.get(last, 0), min(part.in_features, part.out_features))
        known = [name for name in self.modules or MODULES if name.rpartition(".")[2] in layers]
        if not known or (self.modules is not None and len(known) < len(self.modules)):
            missing = sorted(set(self.modules or MODULES) - set(known))
            raise CdlmError(
                f"LoRA adapts {', '.join(missing)}, and the network has no linear layer of this name: it has"
                f" {', '.join(sorted(layers))}"
            )
        most = max(layers[name.rpartition(".")[2]] for name in known)
        if self.rank > most:
            raise CdlmError(f"LoRA has rank {self.rank}, and no matrix that it adapts has more than {most}: lower it")
        return replace(self, alpha=self.scale, modules=tuple(sorted(set(known))))


class Adapter(nn.Module):
    """What a network with LoRA knows of it: settings, base, and where AdamW moved each B, summed over logged steps.

    Args:
        settings: how it was made.
        base: name or folder of the model that it adapts.
        weights: fingerprint of that model's weights.
        network: with the adapter in it.
    """

    def __init__(self, settings: LoraSettings, base: str, weights: str, network: nn.Module):
        super().__init__()
        self.settings, self.base, self.weights = settings, base, weights
        self.logged: Tensor
        self.register_buffer("logged", torch.zeros((), dtype=torch.int64))
        for name, parameter in _halves(network, "lora_B").items():
            self.register_buffer(_key(name), torch.zeros_like(parameter, requires_grad=False))

    @torch.no_grad()
    def observe(self, network: nn.Module, state: Mapping[Any, Mapping[str, Any]]) -> None:
        """Add the direction U = m / (sqrt(v) + eps) in which AdamW has just moved each B.

        Args:
            network: the one in training.
            state: of its optimiser.
        """
        for name, parameter in _halves(network, "lora_B").items():
            moments = state[parameter]
            direction = moments["exp_avg"] / (moments["exp_avg_sq"].sqrt() + EPS)
            self.get_buffer(_key(name)).add_(direction)
        self.logged += 1

    def update_map(self, network: nn.Module) -> UpdateMap | None:
        """The mean over what was observed; None before anything was.

        Args:
            network: with the weights that the map is to belong to.
        """
        steps = int(self.logged)
        if not steps:
            return None
        names = list(_halves(network, "lora_B"))
        directions = {name: (self.get_buffer(_key(name)) / steps).float().cpu() for name in names}
        return UpdateMap(directions, adapted_fingerprint(self.weights, lora_tensors(network)), steps)


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name has no dot


def _halves(network: nn.Module, half: str) -> dict[str, nn.Parameter]:
    """The A or the B of every adapted layer, by the name of the module that holds it."""
    found = {name: p for name, p in network.named_parameters() if f".{half}.{NAME}." in name}
    return {name.removesuffix(".weight"): parameter for name, parameter in found.items()}


def lora_parameters(network: nn.Module) -> list[nn.Parameter]:
    """All that is trained of a network with LoRA; none of one without."""
    return [p for name, p in network.named_parameters() if f".{NAME}.weight" in name and ".lora_" in name]


def lora_tensors(network: nn.Module) -> dict[str, Tensor]:
    """The adapter's tensors under the names of peft's files."""
    return {
        PREFIX + name.replace(f".{NAME}.", "."): value.detach()
        for name, value in network.named_parameters()
        if f".{NAME}.weight" in name and ".lora_" in name
    }


def adapted_fingerprint(base: str, tensors: Mapping[str, Tensor]) -> str:
    """The fingerprint of a base with an adapter, in whatever precision the base is held."""
    both = f"{base} {fingerprint_of({name: value.float() for name, value in tensors.items()})}"
    return TENSORS + hashlib.sha256(both.encode()).hexdigest()


def adapt(network: nn.Module, settings: LoraSettings, seed: int = 0) -> None:
    """Put an untrained adapter into a network, in place, and freeze all else. It changes no output until B is trained.

    Args:
        seed: of the first weights of A.

    Raises:
        CdlmError: peft is not installed, or the network has no layer of these names.
    """
    made = _config(settings.settled(network))
    network.requires_grad_(False)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft's, of transformers
        torch.manual_seed(seed)
        _peft().inject_adapter_in_model(made, network, adapter_name=NAME)


def _config(settings: LoraSettings, **more: Any) -> Any:
    """The settings in peft's words."""
    assert settings.modules is not None
    return _peft().LoraConfig(
        r=settings.rank, lora_alpha=settings.scale, lora_dropout=settings.dropout, bias="none",
        target_modules=list(settings.modules), **more,
    )  # fmt: skip


def _peft() -> Any:
    try:
        return import_module("peft")
    except ImportError as error:
        raise CdlmError("LoRA needs the package peft: pip install cdlm[lora]") from error


def write_adapter(folder: Path, network: nn.Module, adapter: Adapter) -> None:
    """Write adapter and map, each file whole or not at all, in the files that peft reads."""
    write_settings(folder, adapter.settings, adapter.base)
    tensors = lora_tensors(network)
    metadata = {"format": "pt", "base_weights": adapter.weights}
    with replacing(folder / WEIGHTS) as temporary:
        write_tensors(temporary, specs_of(tensors), {n: (lambda v=v: v) for n, v in tensors.items()}, metadata)
    if (made := adapter.update_map(network)) is not None:
        write_map(folder, made)


def write_settings(folder: Path, settings: LoraSettings, base: str) -> None:
    """Write adapter_config.json as peft does."""
    made = _config(settings, base_model_name_or_path=base, inference_mode=True)
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in made.to_dict().items()}
    write_text(folder / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


class AdapterConfig(TypedDict):
    """What is used of an adapter_config.json."""

    peft_type: Literal["LORA"]
    r: Positive
    lora_alpha: Finite
    lora_dropout: Finite
    target_modules: list[str]
    base_model_name_or_path: str


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter as a folder has it."""

    path: Path
    settings: LoraSettings
    base: str
    weights: str
    """Fingerprint of the base."""
    tensors: Mapping[str, Tensor]


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model."""
    return (folder / CONFIG).exists() and not (folder / "config.json").exists()


def read_settings(folder: Path) -> tuple[LoraSettings, str]:
    """How the adapter in a folder is made, and the name of its base.

    Raises:
        CdlmError: it is none, or of another kind than plain LoRA.
    """
    file = folder / CONFIG
    values = read_json(file, "an adapter")
    for name, allowed in _PLAIN.items():
        if name in values and values[name] not in allowed:
            raise CdlmError(f"{file} has {name} {shown(values[name])}, expected {allowed[0]!r}: take plain LoRA")
    checked(values, AdapterConfig, str(file), "copy it again")
    settings = LoraSettings(
        values["r"], float(values["lora_alpha"]), float(values["lora_dropout"]), tuple(values["target_modules"])
    )
    return settings, values["base_model_name_or_path"]


def read_adapter(folder: Path) -> AdapterFolder:
    """The adapter in a folder that `cdlm train --lora` wrote.

    Raises:
        CdlmError: it is none, of another kind than plain LoRA, or a file is damaged.
    """
    settings, base = read_settings(folder)
    file = folder / WEIGHTS
    header = read_header(file)
    weights = header.metadata.get("base_weights", "")
    if not weights.startswith(TENSORS):
        raise CdlmError(
            f"{file} does not say which weights it adapts, as cdlm train --lora does: train the adapter with it"
        )
    for name, (shape, dtype) in header.specs.items():
        if len(shape) != 2 or settings.rank not in shape or dtype not in FLOATS:
            raise CdlmError(f"tensor {name!r} of {file} is no half of LoRA of rank {settings.rank}: copy both again")
    tensors = read_tensors(file)
    check_values(file, tensors)
    return AdapterFolder(folder, settings, base, weights, tensors)


def attach(network: nn.Module, adapter: AdapterFolder, weights: str, name: str) -> str:
    """Put a trained adapter into the network of its base, in place; returns the fingerprint of both.

    Args:
        weights: fingerprint of the network's weights.
        name: of the model, for the error.

    Raises:
        CdlmError: the adapter is of another base, or its tensors are not those of its settings.
    """
    if weights != adapter.weights:
        raise CdlmError(
            f"the adapter in {adapter.path} was trained on other weights than those of {name}: name its base in"
            f" {CONFIG}, base_model_name_or_path"
        )
    like = next(network.parameters())
    adapt(network, adapter.settings)
    wanted, found = {n: v.shape for n, v in lora_tensors(network).items()}, adapter.tensors
    odd = sorted(n for n in wanted.keys() | found.keys() if n not in found or wanted.get(n) != found[n].shape)
    if odd:
        raise CdlmError(
            f"{adapter.path / WEIGHTS} does not fit {CONFIG} at tensor {odd[0]!r} ({len(odd)} in all): copy both again"
        )
    with torch.no_grad():
        for full, parameter in network.named_parameters():
            if (key := PREFIX + full.replace(f".{NAME}.", ".")) in found:
                parameter.copy_(found[key])
                parameter.data = parameter.data.to(like.dtype)
    network.requires_grad_(False).eval()  # its dropout is new, and would be on
    return adapted_fingerprint(weights, found)


def merge(network: nn.Module) -> None:
    """Add the adapter to the weights of its base, in place: the network has its plain layers again."""
    layers = [(name, m) for name, m in network.named_modules() if hasattr(m, "base_layer") and hasattr(m, "lora_A")]
    for name, layer in layers:
        layer.merge(safe_merge=True)  # type: ignore[operator]  # peft's
        parent, _, last = name.rpartition(".")
        setattr(network.get_submodule(parent), last, layer.base_layer)


def share_of(made: UpdateMap, network: nn.Module) -> str:
    """The size of a map beside the weights, for people."""
    weights = sum(p.numel() * p.element_size() for n, p in network.named_parameters() if ".lora_" not in n)
    return (
        f"{len(made.directions)} matrices of {made.size:,} bytes, {made.size / weights:.2%} of the weights; as one"
        f" vector a module {made.size_of_vectors:,} bytes, {made.size_of_vectors / weights:.3%}"
    )


def trained_size(network: nn.Module) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in lora_parameters(network))
