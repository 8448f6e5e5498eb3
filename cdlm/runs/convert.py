"""Checkpoints in published formats to model folders and back, one tensor at a time."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cdlm.continuous.published.layout import Layout, Official
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import check_new_folder, read_json, replacing
from cdlm.core.tensors import Lazy, Spec, check_value, lazy_tensors, same_specs, specs_of, write_tensors
from cdlm.data.tokenizer import load_tokenizer
from cdlm.models import hub
from cdlm.runs.config import outline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def convert(layout: Layout, source: Path, out: Path, tokenizer: str | None = None) -> None:
    """Convert a checkpoint in a published format to a model folder, or a model folder of ours to that format.

    Weights go from file to file one at a time, and `out` appears whole or not at all. What the layout's documentation
    says of origin and licence goes to the model card.

    Args:
        layout: the published format.
        source: its folder, or one of ours.
        out: the folder to write, which must not exist yet.
        tokenizer: file tokenizer.json, folder or Hub name; by default that of `source`.

    Raises:
        CdlmError: a tensor is missing, unexpected or of another shape; the tokenizer is of another size than the
            weights; our folder's system has no such format; or `out` is there already.
    """
    check_new_folder(out)
    if not source.is_dir():
        raise CdlmError(f"{source} is not a folder: expected one with a published checkpoint, or a model folder")
    (_to_official if _is_ours(source) else _to_ours)(layout, source, out, tokenizer)


def _is_ours(source: Path) -> bool:
    try:
        return "cdlm_format" in read_json(source / "config.json", "a model")
    except CdlmError:
        return False


def _to_ours(layout: Layout, source: Path, out: Path, tokenizer: str | None) -> None:
    official = _sound(layout.read(source), source)
    model, specs = _check(official, source)
    made = _tokenizer(tokenizer, source, model["vocab"])
    config = {"cdlm_format": hub.FORMAT, "length": official.length, "ends": False, "model": model}
    with replacing(out) as temporary:
        temporary.mkdir()
        hub.save_tokenizer(made, temporary)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        card = hub.model_card(config, {"Origin": inspect.getdoc(type(layout)) or type(layout).__name__})
        (temporary / "README.md").write_text(card, encoding="utf-8")
        lazy = {name: content for name, (_, content) in official.tensors.items()}
        write_tensors(temporary / "model.safetensors", specs, lazy)


def _to_official(layout: Layout, source: Path, out: Path, tokenizer: str | None) -> None:
    config = hub.read_config(source)
    tensors = lazy_tensors(source / "model.safetensors")
    hub.check_layers(source / "config.json", "depth", config["model"].get("depth"), len(tensors))
    official = _sound(Official(config["model"], config["length"], tensors), source)
    _check(official, source)
    made = _tokenizer(tokenizer, source, official.config["vocab"])
    with replacing(out) as temporary:
        temporary.mkdir()
        hub.save_tokenizer(made, temporary)
        layout.write(official, temporary)


def _check(official: Official, source: Path) -> tuple[dict[str, Any], dict[str, Spec]]:
    """The whole configuration of the system, and shape and type of every tensor; all of them must be there."""
    system = outline(official.config, source / "config.json")
    wanted = specs_of(system.state_dict())
    same_specs(source, wanted, {name: spec for name, (spec, _) in official.tensors.items()})
    return system.config, wanted


def _sound(official: Official, source: Path) -> Official:
    """The same, whose values are checked to be numbers when they are read."""

    def content(name: str, read: Lazy) -> Lazy:
        return lambda: check_value(source, name, read())

    checked = {name: (spec, content(name, read)) for name, (spec, read) in official.tensors.items()}
    return official._replace(tensors=checked)


def _tokenizer(name: str | None, source: Path, vocab: int) -> PreTrainedTokenizerFast:
    if name is None and not (source / "tokenizer.json").exists():
        raise CdlmError(f"{source} has no tokenizer.json: give the tokenizer that the model was trained with")
    made = _open_tokenizer(str(source) if name is None else name)
    if len(made) != vocab:
        raise CdlmError(
            f"the weights are of {vocab} tokens, the tokenizer {name or source} has {len(made)}: give the tokenizer"
            " that the model was trained with"
        )
    return made


def _open_tokenizer(name: str) -> PreTrainedTokenizerFast:
    if not Path(name).is_file():
        return load_tokenizer(name)
    from transformers import PreTrainedTokenizerFast

    try:
        return PreTrainedTokenizerFast(tokenizer_file=name, clean_up_tokenization_spaces=False)
    except Exception as error:  # the library raises its own kinds
        raise CdlmError(f"{name} is not a tokenizer.json ({first_line(error)}); copy it again") from error
