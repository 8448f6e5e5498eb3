"""Train a small encoder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cdlm.core.devices import DeviceOptions
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_places, real_path
from cdlm.core.progress import meter, to_stderr
from cdlm.models import shipped
from cdlm.runs import caches
from cdlm.runs.config import parse_run
from cdlm.runs.encoder import EncoderOptions, check_mask, check_place
from cdlm.runs.encoder import train_encoder as trained
from cdlm.runs.train import RunText

ENCODER, MACHINE = EncoderOptions(), DeviceOptions()


def train_encoder(run: str, out: Path, *, encoder: EncoderOptions = ENCODER, machine: DeviceOptions = MACHINE) -> None:
    """Train a small masked language model on a run's text, as the frozen encoder of an encoder's space.

    Args:
        run: run folder, or a file of settings of cdlm train, whose text and tokenizer are used.
        out: folder to write; a Hugging Face model like any other.
    """
    check_places(out)
    check_place(out)
    text = _text(run, out)
    check_mask(text.tokenizer)
    with meter(encoder.steps, "encoder, training steps", not machine.quiet) as shown:
        made = trained(
            text, encoder, machine.device, lambda step, nats: shown.advance(nats_per_masked_token=f"{nats:.3f}")
        )
    made.save(out)
    if not machine.quiet:
        told = made.told
        print(f"held-out text: {told.nats:.3f} nats a masked token, {told.accuracy:.1%} of {told.tokens:,} told right")
        to_stderr(f"{out}: vectors of {encoder.width}, for rows of at most {text.config.length} tokens")


def _text(run: str, out: Path) -> RunText:
    """The text of a run folder, or of a run that is still to come.

    Raises:
        CdlmError: it is neither a run folder nor a file of settings.
    """
    if Path(run).is_dir() or shipped.is_shipped(run):
        return RunText.of_run(run)
    if not Path(run).is_file():
        raise CdlmError(f"{run} is neither a run folder nor a file of settings: give one of them")
    config = parse_run(["--config", run])
    if config.tokenizer and real_path(config.tokenizer) == real_path(out):
        config = replace(config, tokenizer=None)  # the run is to have the encoder's, which is made here
    caches.mark(config.cache)
    return RunText.of(config)
