"""The judge: an autoregressive language model that reads texts, of another library or small and our own.

A judge re-tokenises the text with its own tokenizer, so texts of any generator can be compared under one judge.
Numbers of different judges cannot be compared with each other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor, nn

from cdlm.core.errors import CdlmError
from cdlm.core.files import read_json, replacing
from cdlm.core.parallel import Workers, deal, interleaved
from cdlm.core.schema import checked
from cdlm.models import shipped
from cdlm.models.causal import complete, in_one_line, opened, with_offsets
from cdlm.models.foreign import import_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

S = TypeVar("S")
T = TypeVar("T")

LONGEST_CONTEXT = 1024
"""Most tokens that a judge reads at once, whatever its own limit: the length of published AR-NLL."""

NAME_FILE = shipped.JUDGE


class Named(TypedDict):
    """What `NAME_FILE` holds."""

    name: str
    key: NotRequired[str]


@dataclass(frozen=True)
class Encoded:
    """One text as the judge sees it: token ids, the character where each token starts, and which tokens are text.

    Tokens that are not text (a leading BOS, say) are the ones the tokenizer added by itself.
    """

    ids: list[int]
    starts: list[int]
    is_text: list[bool]


@dataclass(frozen=True, eq=False)
class Judge:
    """A causal language model in evaluation mode, its fast tokenizer, a name for the tables, and its device.

    Args:
        origin: what else tells which model it is, such as the hash of its file.
        key: what a small judge was trained on and how, see `SmallJudge`; empty for others.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    device: str = "cpu"
    origin: Mapping[str, str] = field(default_factory=dict)
    key: str = ""

    def __post_init__(self) -> None:
        known = getattr(self.model.config, "vocab_size", 0)
        if len(self.tokenizer) > known:
            raise CdlmError(
                f"expected a tokenizer of at most {known} tokens, as many as the judge "
                f"{self.name!r} knows, got {len(self.tokenizer)}; use the tokenizer the judge was trained with"
            )
        nn.Module.to(self.model, self.device).eval()

    @classmethod
    def load(cls, name_or_dir: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Judge:
        """Open a folder or a Hub model of safetensors, or a GGUF file; no code of the model's author, weights in
        `dtype`.

        Raises:
            CdlmError: the model cannot be found or read, or its tokenizer gives no character offsets.
        """
        import_transformers()
        from transformers import AutoModelForCausalLM

        source = str(shipped.place_of(name_or_dir))
        if source.endswith(".gguf"):
            return cls(*_read_gguf(Path(source), dtype), name=Path(source).stem, device=device, origin=_file(source))
        tokenizer, model, origin = opened(source, "a causal language model", AutoModelForCausalLM, dtype)
        stored = read_name(Path(source)) or {"name": source}
        return cls(model, tokenizer, stored["name"], device, origin, stored.get("key", ""))

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer and name to `folder`, whole or not at all; only a judge or nothing may be there."""
        target = Path(folder)
        if target.exists() and not (target / NAME_FILE).exists() and (not target.is_dir() or any(target.iterdir())):
            raise CdlmError(f"expected a judge or no folder at {target}, got something else; choose another folder")

        with replacing(target) as new:
            new.mkdir()
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            named = {"name": self.name, **({"key": self.key} if self.key else {})}
            (new / NAME_FILE).write_text(json.dumps(named) + "\n", encoding="utf-8")

    @property
    def context(self) -> int:
        """Tokens read at once: the model's own limit, at most `LONGEST_CONTEXT`."""
        return min(getattr(self.model.config, "max_position_embeddings", None) or LONGEST_CONTEXT, LONGEST_CONTEXT)

    def describe(self) -> dict[str, str | int | None]:
        """What must stand beside every number of this judge."""
        config = self.model.config
        return {
            "name": self.name,
            "revision": None,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": int(config.vocab_size),
            "context": self.context,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            **self.origin,
        }

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Tokenise whole texts, nothing cut off; offsets are in characters of the text as given."""
        if not texts:
            return []
        batch = self.tokenizer(
            texts,
            padding=False,
            truncation=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            verbose=False,
        )
        columns = zip(batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True)
        return [
            Encoded(list(ids), [start for start, _ in offsets], [not added for added in special])
            for ids, offsets, special in columns
        ]


# --- where they come from ---------------------------------------------------------------------------------------------


def _read_gguf(path: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Model and tokenizer of one GGUF file; its weights are unpacked into `dtype`."""
    try:
        import accelerate
        import gguf
    except ImportError as error:
        raise CdlmError(
            f"a judge in a GGUF file needs {error.name}: install it with `pip install 'cdlm[gguf]'`"
        ) from error
    del accelerate, gguf  # transformers uses both
    if not path.is_file():
        raise CdlmError(f"there is no file {path}: name a GGUF file of a causal language model")
    place = {"pretrained_model_name_or_path": path.absolute().parent, "gguf_file": path.name, "local_files_only": True}
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        _check_gguf(path)
        with redirect_stderr(StringIO()):  # a progress bar that no setting switches off
            tokenizer = with_offsets(AutoTokenizer.from_pretrained(**place))
            loaded: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=dtype, output_loading_info=True)
        return complete(*loaded), tokenizer
    except Exception as error:  # parsers of broken files raise anything
        raise CdlmError(
            f"expected a GGUF file of a causal language model that transformers can read at {path}, got"
            f" {type(error).__name__}: {in_one_line(error)}"
        ) from error


def _check_gguf(path: Path) -> None:
    """Raise if a file asks for more layers than it has tensors: to build them would take forever."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for name, said in reader.fields.items():
        if name.endswith(".block_count") and int(said.contents()) > len(reader.tensors):
            raise ValueError(f"{name} of {said.contents()} in a file of {len(reader.tensors)} tensors")


def _file(path: str) -> dict[str, str]:
    """Which GGUF file it was: how its weights are packed, and its hash."""
    from gguf import GGUFReader, LlamaFileType

    kind = GGUFReader(path).get_field("general.file_type")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    packed = "unknown" if kind is None else LlamaFileType(kind.contents()).name.removeprefix("MOSTLY_")
    return {"quantisation": packed, "sha256": digest}


def read_name(folder: Path) -> Named | None:
    """What a folder says of the judge in it; None if it is none of ours."""
    path = folder / NAME_FILE
    if not path.is_file():
        return None
    return checked(read_json(path, "a judge"), Named, str(path), "copy it again, or train it anew")


# --- many texts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Readers:
    """A judge, here and on further processes: each reads every N-th text."""

    judge: Judge
    workers: Workers[Judge] | None = None

    def map(self, work: Callable[[Judge, Sequence[S]], T], items: Sequence[S]) -> list[T]:
        """`work` of the share of each process."""
        if self.workers is None:
            return [work(self.judge, items)]
        return self.workers.map(work, self.judge, deal(items, len(self.workers)))

    def states(
        self, work: Callable[[Judge, Sequence[S]], Shaped[np.ndarray, "_ w"]], items: Sequence[S]
    ) -> Shaped[np.ndarray, "_ w"]:
        """A vector for each item, in their order."""
        return interleaved(self.map(work, items))


def padded(rows: list[list[int]], device: str) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Rows of unequal length, filled up on the right: ids and the mask of real tokens, on a device.

    A causal model reads nothing to the right, so the filling changes no result.
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        real[row, : len(tokens)] = True
    return ids.to(device), real.to(device)


def batches_by_length(lengths: list[int], batch_size: int, most_tokens: int) -> Iterator[list[int]]:
    """Indices of rows, long ones first, in batches of at most `batch_size` rows and `most_tokens` padded tokens."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > most_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
