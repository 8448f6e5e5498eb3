"""A small encoder of a run's own text: a masked language model (BERT, arXiv 1810.04805) as a folder of Hugging Face.

Its layers are those of ModernBERT (arXiv 2412.13663): normalised first, with rotary positions. After 100 steps on the
stories they have 2.9 nats a masked token, and BERT's own, normalised last, the 4.1 of the frequencies of tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from cdlm.core.checks import Settings, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.files import replacing
from cdlm.core.inert import fenced
from cdlm.core.rng import generator
from cdlm.core.types import Batch
from cdlm.data.order import RowLoader, fixed_batches
from cdlm.runs.train import RunText
from cdlm.sampling.texts import save_tokenizer
from cdlm.training.small import Progress, minimise

if TYPE_CHECKING:
    from transformers import ModernBertForMaskedLM, PreTrainedTokenizerFast

ABOUT = "training.json"
"""The file that tells a folder of such an encoder from others: its settings and its numbers on held-out text."""
FULL = ["full_attention"]
"""The kind of attention of a layer."""
ROTARY = {"rope_theta": 1e4, "rope_type": "default"}
TRAINING, HELD_OUT = 0x7472, 0x686F
"""Purposes of what is drawn."""
REPLACED, SWAPPED = 0.8, 0.1
"""Shares of the chosen tokens that become the mask, and a token drawn at random; the others stay (section 3.1)."""


@dataclass(frozen=True)
class EncoderOptions(Settings):
    """The encoder and its training."""

    width: int = 128
    """Length of its vectors."""
    depth: int = 3
    """Layers."""
    heads: int = 4
    """Heads of attention; the width is a multiple of 2 * heads, since rotary positions turn pairs."""
    steps: int = 300
    """Training steps, of as many rows as the run has in a batch."""
    mask_share: float = 0.2
    """Share of the tokens that are to be told, in (0, 1)."""
    lr: float = 3e-3
    """Peak rate of AdamW."""
    seed: int = 0
    """Of the first weights, the order of the text and the masks."""

    def __post_init__(self) -> None:
        check_whole("an encoder", width=self.width, depth=self.depth, heads=self.heads, steps=self.steps)
        check_whole("an encoder", least=0, seed=self.seed)
        check_number("an encoder", above=0.0, below=1.0, mask_share=self.mask_share)
        check_number("an encoder", above=0.0, lr=self.lr)
        pairs = 2 * self.heads
        if self.width % pairs:
            raise CdlmError(
                f"expected a width of an encoder that is a multiple of 2 * heads, got {self.heads} heads and width"
                f" {self.width}: try width={max(1, self.width // pairs) * pairs}"
            )


class Told(NamedTuple):
    """How well masked tokens of held-out text are told."""

    nats: float
    """Mean cross-entropy of a masked token."""
    accuracy: float
    """Share of them that the likeliest token is."""
    tokens: int
    """Their number."""


@dataclass(frozen=True)
class SmallEncoder:
    """A trained encoder with its language-model head, in evaluation mode."""

    model: ModernBertForMaskedLM
    tokenizer: PreTrainedTokenizerFast
    options: EncoderOptions
    told: Told

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all.

        Raises:
            CdlmError: something else is there.
        """
        check_place(folder)
        about: dict[str, Any] = {"settings": asdict(self.options), "held_out": self.told._asdict()}
        with replacing(folder) as new:
            new.mkdir()
            self.model.save_pretrained(new)
            save_tokenizer(self.tokenizer, new)
            (new / ABOUT).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
            (new / "README.md").write_text(_card(self, about), encoding="utf-8")


def check_place(folder: Path) -> None:
    """Raise unless a folder is such an encoder, empty, or not there."""
    taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    if taken and not (folder / ABOUT).is_file():
        raise CdlmError(f"expected an encoder of cdlm train-encoder or no folder at {folder}, got something else")


def check_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise if a tokenizer has no mask token."""
    if tokenizer.mask_token_id is None:
        raise CdlmError(
            "the tokenizer has no mask token (mask_token), which a masked language model is trained with: set"
            " mask_token in its tokenizer_config.json, or leave tokenizer out to train one"
        )


def train_encoder(
    text: RunText, options: EncoderOptions, device: str = "cpu", progress: Progress | None = None
) -> SmallEncoder:
    """Train a small encoder on the text that the run's model reads; the same arguments give the same weights on a CPU.

    Rows have no tokens around a text, as those of the run, and are as long. The global random state is left as it was.

    Raises:
        CdlmError: the tokenizer has no mask token, or the training diverges.
    """
    masks = Masks(text.tokenizer, options.mask_share)
    config, network = text.config, _fresh(text, options).train()
    nn.Module.to(network, device)
    rows = RowLoader(text.train, config.batch_size, options.seed)

    def loss_of(item: tuple[int, Batch]) -> Float[Tensor, ""]:
        chosen, tokens = masks.corrupt(item[1], generator(options.seed, TRAINING, item[0]))
        return functional.cross_entropy(*_guesses(network, item[1], tokens, chosen))

    minimise(network, loss_of, enumerate(rows), steps=options.steps, lr=options.lr, progress=progress)
    network = network.eval()
    held_out = iter(fixed_batches(text.valid, config.batch_size, config.validation_rows))
    return SmallEncoder(network, text.tokenizer, options, _told(network, masks, held_out, options.seed))


@dataclass(frozen=True)
class Masks:
    """Which tokens are to be told, and what stands in their place.

    Args:
        tokenizer: has a mask token.
        share: of the tokens of a row, at least one.
    """

    tokenizer: PreTrainedTokenizerFast
    share: float

    def __post_init__(self) -> None:
        check_mask(self.tokenizer)

    def choose(self, batch: Batch, source: torch.Generator) -> Bool[Tensor, "b n"]:
        """Positions that are to be told, drawn uniformly from those that are text."""
        scores = torch.rand(batch.tokens.shape, generator=source).masked_fill(~batch.target, 2.0)
        count = (self.share * batch.target.sum(1, keepdim=True)).round().clamp(min=1)
        return (scores.argsort(1).argsort(1) < count) & batch.target

    def hidden(self, batch: Batch, chosen: Bool[Tensor, "b n"]) -> Int[Tensor, "b n"]:
        """The mask in place of all of them."""
        mask: Any = self.tokenizer.mask_token_id
        return batch.tokens.masked_fill(chosen, mask)

    def corrupt(self, batch: Batch, source: torch.Generator) -> tuple[Bool[Tensor, "b n"], Int[Tensor, "b n"]]:
        """Positions that are to be told, and rows with the mask, another token or the same one there."""
        chosen = self.choose(batch, source)
        how = torch.rand(batch.tokens.shape, generator=source)
        others = torch.randint(len(self.tokenizer), batch.tokens.shape, generator=source)
        tokens = self.hidden(batch, chosen & (how < REPLACED))
        return chosen, torch.where(chosen & (how >= 1 - SWAPPED), others, tokens)


def _fresh(text: RunText, options: EncoderOptions) -> ModernBertForMaskedLM:
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    special: Any = text.tokenizer
    config = ModernBertConfig(
        vocab_size=len(special), hidden_size=options.width, num_hidden_layers=options.depth,
        num_attention_heads=options.heads, intermediate_size=2 * options.width, layer_types=FULL * options.depth,
        rope_parameters={"full_attention": ROTARY, "sliding_attention": ROTARY},
        max_position_embeddings=text.config.length, pad_token_id=special.pad_token_id,
        eos_token_id=special.eos_token_id, sep_token_id=special.eos_token_id, bos_token_id=None, cls_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):  # transformers draws its weights from the global generator
        torch.default_generator.manual_seed(options.seed)  # torch.manual_seed would also reseed the GPUs
        return ModernBertForMaskedLM(config)


def _guesses(
    network: ModernBertForMaskedLM, batch: Batch, tokens: Int[Tensor, "b n"], chosen: Bool[Tensor, "b n"]
) -> tuple[Float[Tensor, "k v"], Int[Tensor, " k"]]:
    """Logits of the chosen positions, and the tokens that are right there."""
    device = network.device
    valid = None if batch.valid is None else batch.valid.to(device).long()
    states = network.model(input_ids=tokens.to(device), attention_mask=valid).last_hidden_state
    return network.decoder(network.head(states[chosen.to(device)])), batch.tokens[chosen].to(device)


@torch.no_grad()
def _told(network: ModernBertForMaskedLM, masks: Masks, batches: Iterator[Batch], seed: int) -> Told:
    nats, right, count = 0.0, 0, 0
    for number, batch in enumerate(batches):
        chosen = masks.choose(batch, generator(seed, HELD_OUT, number))
        logits, tokens = _guesses(network, batch, masks.hidden(batch, chosen), chosen)
        nats += functional.cross_entropy(logits.double(), tokens, reduction="sum").item()
        right += int((logits.argmax(-1) == tokens).sum())
        count += len(tokens)
    return Told(nats / count, right / count, count)


def _card(encoder: SmallEncoder, about: dict[str, Any]) -> str:
    """The model card."""
    size = sum(weight.numel() for weight in encoder.model.parameters()) / 1e6
    told = encoder.told
    lines = [
        "---", "library_name: transformers", "pipeline_tag: fill-mask", "tags: [encoder, cdlm]", "---", "",
        "# A small encoder", "",
        f"A masked language model of {size:.1f} M parameters, trained by `cdlm train-encoder` on the text of a run.",
        f"On held-out text: {told.nats:.3f} nats a masked token, {told.accuracy:.1%} of {told.tokens:,} told right.",
        "Rows have no tokens around a text.", "",
        "## Settings", "", fenced(json.dumps(about, indent=2), "json"), "",
    ]  # fmt: skip
    return "\n".join(lines)
