"""A trained model as a folder: `config.json`, `model.safetensors`, tokenizer files and a model card.

Loading runs no code and unpickles nothing, and it is strict: a missing, unexpected or misshapen weight is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NotRequired, TypedDict, TypeVar

import torch
from msgspec import Meta
from torch import Tensor, nn

from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import check_path, read_json, replacing, write_text
from cdlm.core.inert import fenced
from cdlm.core.parsing import nearest
from cdlm.core.schema import Positive, checked
from cdlm.core.tensors import check_values, read_tensors, same_specs, specs_of, write_tensors
from cdlm.models import shipped
from cdlm.models.foreign import check_tokenizer
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.prompts import Prompt
from cdlm.sampling.session import Model, Student
from cdlm.sampling.texts import save_tokenizer, special_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MOST_STEPS = 100_000
"""Steps of a recommended sampler, at most: 100 times what anybody needs."""
FORMAT = 2
"""Version of the folder, in config.json. Version 1 had other names for two parts; it is read as well."""
RENAMED = {"own_position": "output_prior", "own_position_warmup": "output_prior_warmup", "reader": "network_input"}
"""Settings, and first words of the names of tensors, in version 1."""


class Pretrained(nn.Module, Model):
    """A module that can be saved as a folder and shared on the Hub.

    `config` holds the plain values that rebuild it, `length` the positions it was trained on, `tokenizer` its tokens.
    """

    config: dict[str, Any]
    kind: ClassVar[str] = "diffusion"
    """What sort of language model it is, for its card."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def end_ids(self) -> tuple[int, ...]:
        return special_of(self.tokenizer).end_ids if self.ends and self.tokenizer is not None else ()

    def tokenizer_for(self, prompts: Sequence[Prompt] | None) -> PreTrainedTokenizerFast:
        return self.need_tokenizer()  # it was trained on text

    def check_weights(self) -> None:
        for weight in self.parameters():
            if weight.dtype not in (torch.float32, torch.float64) or weight.is_meta:
                place = "nowhere (meta)" if weight.is_meta else str(weight.dtype).removeprefix("torch.")
                raise CdlmError(
                    f"the weights of {self.name} are {place}, expected float32: take model.float(); for faster"
                    ' arithmetic load the model with precision="bf16"'
                )

    def need_fingerprint(self) -> str:
        return self.fingerprint or fingerprint_of(self.state_dict())

    def has_weights(self, fingerprint: str) -> bool:
        if self.folder is not None and not fingerprint.startswith(TENSORS):  # written by an earlier version
            file = self.folder / "model.safetensors"
            return file.exists() and fingerprint == file_hash(file)
        return super().has_weights(fingerprint)

    def save_pretrained(self, folder: str | Path, card: str | None = None) -> None:
        """Write the folder, each file whole or not at all; other files in it stay.

        Args:
            card: text of the model card; by default the configuration alone.
        """
        folder = Path(folder)
        config = {"cdlm_format": FORMAT, "length": self.length, "ends": self.ends, "model": self.config}
        if self.preset:
            config["sampling"] = dict(self.preset)
        if self.student is not None:
            config["student"] = asdict(self.student)
        if self.tokenizer is not None:
            save_tokenizer(self.tokenizer, folder)
        write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
        write_text(folder / "README.md", model_card(config, kind=self.kind) if card is None else card)
        state = self.state_dict()
        with replacing(folder / "model.safetensors") as temporary:
            write_tensors(temporary, specs_of(state), {name: (lambda v=value: v) for name, value in state.items()})

    def push_to_hub(self, repo_id: str, *, private: bool = False, card: str | None = None) -> str:
        """Upload the folder to the Hugging Face Hub and return its address. Needs a token (`hf auth login`)."""
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, card)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder))


@dataclass(frozen=True)
class Folder:
    """What a model folder says, before anything is built from it. Each file is read once."""

    path: Path
    config: dict[str, Any]
    length: int
    ends: bool
    sampling: Any
    """Flat settings of the sampler that it recommends, not yet checked."""
    weights: Mapping[str, Tensor]
    fingerprint: str
    tokenizer: PreTrainedTokenizerFast
    student: Student | None = None


def read(path: Path, config: dict[str, Any] | None = None) -> Folder:
    """Read a model folder.

    Args:
        config: the content of its config.json, where that was read before.

    Raises:
        CdlmError: there is no such model, it is not one of ours, or a file is broken.
    """
    config = read_config(path) if config is None else checked_config(path, config)
    weights_file = path / "model.safetensors"
    if not weights_file.exists():
        raise CdlmError(f"{path} has no model.safetensors: training has not finished, or the copy is incomplete")
    weights = read_tensors(weights_file)
    check_layers(path / "config.json", "depth", config["model"].get("depth"), len(weights))
    tokenizer, vocab = read_tokenizer(path), config["model"].get("vocab")
    if isinstance(vocab, int) and vocab != len(tokenizer):
        raise CdlmError(f"{path} has weights of {vocab} tokens and a tokenizer of {len(tokenizer)}: copy both again")
    ends, special = config.get("ends", False), special_of(tokenizer)
    for name, there in (("mask_id", special.mask_id), ("eos_id", special.eos_id)):
        if name in config["model"] and config["model"][name] != there:
            raise CdlmError(f"{path} has {name} {config['model'][name]} and a tokenizer with {there}: copy both again")
    if ends and special.eos_id is None:
        raise CdlmError(f"{path} has texts that end, and a tokenizer without an end-of-text token: copy it again")
    return Folder(
        path, config["model"], int(config["length"]), ends, config.get("sampling", {}), renamed(weights),
        fingerprint_of(weights), tokenizer, _student_of(path, config),
    )  # fmt: skip


def _student_of(path: Path, config: Mapping[str, Any]) -> Student | None:
    """What a folder says of the steps that its model was distilled to; None if it is no student.

    Raises:
        CdlmError: it recommends another number.
    """
    if "student" not in config:
        return None
    file = path / "config.json"
    student = checked(config["student"], Student, str(file), "copy it again")
    sampling = config.get("sampling")
    recommended = sampling.get("steps") if isinstance(sampling, dict) else None
    if recommended != student.steps:
        raise CdlmError(
            f"{file} is of a student of {student.steps} steps, and has sampling of {recommended} steps: copy it again"
        )
    return student


def load_weights(module: Pretrained, folder: Folder) -> None:
    """Give the module a copy of the weights. It must have exactly these tensors in these shapes, and needs no memory of
    its own for them: it may have been built on the device "meta"."""
    file, wanted = folder.path / "model.safetensors", specs_of(module.state_dict())
    same_specs(file, wanted, specs_of(folder.weights))
    check_values(file, folder.weights)
    state = {name: folder.weights[name].to(spec.dtype, copy=True) for name, spec in wanted.items()}
    module.load_state_dict(state, assign=True)
    module.tokenizer, module.length, module.folder = folder.tokenizer, folder.length, folder.path
    module.ends, module.fingerprint = folder.ends, folder.fingerprint
    module.preset, module.student = checked_preset(module, folder), folder.student


def checked_preset(module: Pretrained, folder: Folder) -> dict[str, int | float | str]:
    """The sampler that a folder recommends, as flat settings that its model has.

    Raises:
        CdlmError: it is none.
    """
    file, known = folder.path / "config.json", module.defaults.flat_names()
    if not isinstance(folder.sampling, dict) or not folder.sampling.keys() <= known:
        raise CdlmError(
            f"{file} has sampling {folder.sampling!r}, expected some of {', '.join(sorted(known))}: mend it, or leave"
            " it out"
        )
    try:
        if folder.sampling.get("steps", 1) > MOST_STEPS:
            raise CdlmError(f"more than {MOST_STEPS:,} steps")
        module.defaults.with_flat(**folder.sampling).loop(module, RunOptions(), 1)  # what it cannot run, it refuses
    except (CdlmError, TypeError, ValueError) as error:
        raise CdlmError(
            f"{file} has sampling that cannot be used ({first_line(error)}): mend it, or leave it out"
        ) from error
    return folder.sampling


def check_layers(file: Path, name: str, layers: object, tensors: int) -> None:
    """Raise if a config.json asks for more layers than there are tensors: to build them would take forever.

    Args:
        name: of the setting that says how many layers there are.
        tensors: their number in the files of the weights.
    """
    if isinstance(layers, int) and layers > tensors:
        raise CdlmError(f"{file} has {name} {layers}, and the weights are {tensors} tensors: copy both again")


def model_card(
    config: Mapping[str, Any], sections: Mapping[str, str] | None = None, kind: str = Pretrained.kind
) -> str:
    """A model card: front matter, how to use it, its configuration, then further sections by heading."""
    lines = [
        "---", "library_name: cdlm", "pipeline_tag: text-generation", f"tags: [language-model, {kind}]", "---", "",
        f"# Language model: {kind}", "",
        "```python", "import cdlm", "", 'system = cdlm.load("FOLDER_OR_HUB_ID")',
        "print(cdlm.generate(system, n=4).texts)", "```", "",
        "## Configuration", "", fenced(json.dumps(config, indent=2), "json"), "",
    ]  # fmt: skip
    for heading, text in (sections or {}).items():
        lines += [f"## {heading}", "", text, ""]
    return "\n".join(lines)


P = TypeVar("P", bound=Pretrained)


def is_foreign(path: Path) -> bool:
    """Whether the folder's config.json is that of another library's model: it names a `model_type`."""
    return model_type(path) is not None


def model_type(path: Path) -> str | None:
    """What another library's config.json calls its model; None of ours, and of what cannot be read."""
    try:
        config = read_json(path / "config.json", "a model")
    except CdlmError:
        return None  # reading it as ours says what is wrong
    if "cdlm_format" in config or "model_type" not in config:
        return None
    return str(config["model_type"])


def locate(name: str | Path) -> Path:
    """The folder of that path, of that model of the package, or of that Hub repository, whose files are fetched.

    Raises:
        CdlmError: there is neither, or the Hub cannot be reached.
    """
    if not isinstance(name, str | Path):
        raise CdlmError(
            f"a model is one from cdlm.load, or its folder or Hub id, got a {type(name).__name__}; a function is"
            " sampled by cdlm.decode"
        )
    check_path(name)
    path = shipped.place_of(name)
    if os.path.isdir(path):  # false of a name that is too long
        return path
    if os.path.exists(path) or str(name).count("/") != 1 or str(name).startswith((".", "/", "~", "runs/")):
        raise CdlmError(
            f"{name} is not a model folder{nearest(str(name), shipped.models())}: expected a folder with config.json,"
            f" one of the models that come with cdlm ({', '.join(shipped.models())}), or a Hub id such as user/model"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), allow_patterns=["*.json", "*.safetensors", "merges.txt", "*.jinja"]))
    except Exception as error:  # the client raises its HTTP library's errors as well as its own
        raise CdlmError(
            f"{name} is no folder here and could not be fetched from the Hub ({first_line(error)});"
            " offline, copy the model's folder and give its path, or set HF_HUB_OFFLINE=1 to use the local cache"
        ) from error


class Content(TypedDict):
    """What a config.json of ours holds."""

    cdlm_format: Positive
    length: Annotated[int, Meta(ge=1, lt=2**31)]
    ends: NotRequired[bool]
    student: NotRequired[dict[str, Any]]
    model: dict[str, Any]


def read_config(path: Path) -> dict[str, Any]:
    """The config.json of a folder of ours: `model` rebuilds the system.

    Raises:
        CdlmError: there is none, it is not one of ours, or it lacks a setting.
    """
    return checked_config(path, read_json(path / "config.json", "a finished training run"))


def checked_config(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json of ours, in the form of today."""
    file = path / "config.json"
    written = config.get("cdlm_format")
    if isinstance(written, int) and written > FORMAT:
        raise CdlmError(f"{file} has cdlm_format {written}, this version reads up to cdlm_format {FORMAT}: update cdlm")
    if written not in (1, FORMAT):
        raise CdlmError(f"{file} is not a model of this toolkit (cdlm_format {FORMAT}): train or convert one")
    checked(config, Content, str(file), "copy it again")
    if config["cdlm_format"] == 1:
        config["model"] = {RENAMED.get(name, name): value for name, value in config["model"].items()}
    return config


def renamed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a folder of version 1 under the names of today; others stay."""
    parts = [(name.partition("."), value) for name, value in weights.items()]
    return {RENAMED.get(first, first) + dot + rest: value for (first, dot, rest), value in parts}


TENSORS = "tensors:"
"""How a fingerprint begins; those of earlier versions are the bare hash of the file."""


def fingerprint_of(tensors: Mapping[str, Tensor]) -> str:
    """A hash of tensors: their names, types, shapes and values (SHA-256)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return TENSORS + digest.hexdigest()


def file_hash(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model folder."""
    from transformers import PreTrainedTokenizerFast

    if not (path / "tokenizer.json").exists():
        raise CdlmError(f"{path} has no tokenizer.json: copy the whole folder")
    check_tokenizer(path)
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, clean_up_tokenization_spaces=False)
    except Exception as error:  # transformers and tokenizers each raise their own kinds
        raise CdlmError(f"the tokenizer of {path} cannot be read ({first_line(error)}); copy it again") from error


def ready(system: P, device: str, precision: str | None) -> P:
    """A system to sample from: on its device, in its precision, in evaluation mode."""
    if precision not in (None, "fp32", "bf16"):
        raise CdlmError(f"precision is fp32 or bf16, got {precision!r}")
    system.precision = precision or "fp32"
    to_device(system, device)
    return system.eval()


def to_device(module: nn.Module, device: str) -> torch.device:
    """Move the module, with a readable error for a device that is not there."""
    try:
        module.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CdlmError(f"device {device!r} cannot be used ({first_line(error)}); use cpu") from error
    return torch.device(device)
