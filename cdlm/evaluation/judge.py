"""The judge: an autoregressive language model that reads texts, of another library or small and our own.

A judge re-tokenises the text with its own tokenizer, so texts of any generator can be compared under one judge.
Numbers of different judges cannot be compared with each other.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import HfApi
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing

LONGEST_CONTEXT = 1024
"""Most tokens that a judge reads at once, whatever its own limit: the length of published AR-NLL."""

NAME_FILE = "judge.json"


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
    """A causal language model in evaluation mode, its fast tokenizer, a name for the tables, and its device."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    name: str
    device: str = "cpu"

    def __post_init__(self) -> None:
        if len(self.tokenizer) > self.model.config.vocab_size:
            raise CdlmError(
                f"expected a tokenizer of at most {self.model.config.vocab_size} tokens, as many as the judge "
                f"{self.name!r} knows, got {len(self.tokenizer)}; use the tokenizer the judge was trained with"
            )
        nn.Module.to(self.model, self.device).eval()

    @classmethod
    def load(cls, name_or_dir: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> "Judge":
        """Open a folder or a Hub model: safetensors only, no code of the model's author, weights in `dtype`.

        Raises CdlmError when the model cannot be found or its tokenizer gives no character offsets.
        """
        source = str(name_or_dir)
        try:
            tokenizer, model = _open(source, dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CdlmError(
                f"expected a causal language model with safetensors weights at {source!r}, got: {reason} Without "
                f"network, pass a folder downloaded elsewhere (`hf download {source} --local-dir FOLDER`) or train one "
                "(`cdlm train-judge`)"
            ) from error
        return cls(model, tokenizer, _stored_name(Path(source)) or source, device)

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer and name to `folder`, whole or not at all; only a judge or nothing may be there."""
        target = Path(folder)
        if target.exists() and not (target / NAME_FILE).exists() and (not target.is_dir() or any(target.iterdir())):
            raise CdlmError(f"expected a judge or no folder at {target}, got something else; choose another folder")

        with replacing(target) as new:
            new.mkdir()
            self.model.save_pretrained(new)
            self.tokenizer.save_pretrained(new)
            (new / NAME_FILE).write_text(json.dumps({"name": self.name}) + "\n", encoding="utf-8")

    @property
    def context(self) -> int:
        """Tokens read at once: the model's own limit, at most `LONGEST_CONTEXT`."""
        return min(getattr(self.model.config, "max_position_embeddings", None) or LONGEST_CONTEXT, LONGEST_CONTEXT)

    def describe(self) -> dict[str, str | int | None]:
        """What must stand beside every number of this judge."""
        config = self.model.config
        return {
            "name": self.name,
            "revision": getattr(config, "_commit_hash", None),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "vocabulary": int(config.vocab_size),
            "context": self.context,
            "dtype": str(self.model.dtype).removeprefix("torch."),
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


def _open(source: str, dtype: torch.dtype) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """From the folder or the local cache if it is there, and only otherwise from the Hub."""
    try:
        return _read(source, dtype, local=True)
    except OSError:
        if Path(source).is_dir():
            raise
    _reach_hub(source)
    return _read(source, dtype, local=False)


def _reach_hub(name: str) -> None:
    """Ask once whether the model is there: the loaders themselves retry for most of a minute without network."""
    try:
        HfApi().model_info(name, timeout=10)
    except Exception as error:  # a network, a name or an access problem: all mean that nothing can be loaded
        raise OSError(f"the Hub does not give {name!r} ({type(error).__name__}).") from error


def _read(source: str, dtype: torch.dtype, local: bool) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"a tokenizer without character offsets ({type(tokenizer).__name__}).")
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        local_files_only=local,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=dtype,
        output_loading_info=True,
    )
    model, info = loaded  # the pair comes with output_loading_info
    if info["missing_keys"]:  # transformers would fill them with random numbers and go on
        raise ValueError(f"weights without {sorted(info['missing_keys'])[0]}.")
    return tokenizer, model


def _stored_name(folder: Path) -> str | None:
    path = folder / NAME_FILE
    return json.loads(path.read_text(encoding="utf-8"))["name"] if path.is_file() else None


def padded(judge: Judge, rows: list[list[int]]) -> tuple[Int[Tensor, "b n"], Bool[Tensor, "b n"]]:
    """Rows of unequal length, filled up on the right: ids and the mask of real tokens, on the judge's device.

    A causal model reads nothing to the right, so the filling changes no result.
    """
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        real[row, : len(tokens)] = True
    return ids.to(judge.device), real.to(judge.device)


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


def features(judge: Judge, texts: list[str], batch_size: int = 32, max_tokens: int = 256) -> Float[np.ndarray, "m w"]:
    """The judge's last hidden state at the last token of each text (MAUVE, arXiv 2102.01454), float32.

    Only the first `max_tokens` tokens of a text are read. A text without tokens gets zeros: it stays in the count and
    lies apart from every other text. The result does not depend on `batch_size`.
    """
    length = min(max_tokens, judge.context)
    rows = [[i for i, text in zip(e.ids, e.is_text, strict=True) if text][:length] for e in judge.encode(texts)]
    filled = [index for index, row in enumerate(rows) if row]
    result = np.zeros((len(texts), int(judge.model.config.hidden_size)), dtype=np.float32)
    for batch in batches_by_length([len(rows[i]) for i in filled], batch_size, most_tokens=1 << 16):
        where = [filled[i] for i in batch]
        result[where] = _last_states(judge, [rows[i] for i in where]).cpu().numpy()
    return result


@torch.inference_mode()
def _last_states(judge: Judge, rows: list[list[int]]) -> Float[Tensor, "b w"]:
    ids, real = padded(judge, rows)
    states = judge.model.base_model(input_ids=ids, attention_mask=real.long()).last_hidden_state
    return states[torch.arange(len(rows), device=ids.device), real.sum(1) - 1].float()
