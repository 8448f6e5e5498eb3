"""Samples from any model: load one, and draw from it, as an object or as a plain function."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from cdlm import config as names
from cdlm.continuous.grids import GRIDS, Grid
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.projections import PROJECTIONS, Projection
from cdlm.continuous.sampler import Run, Sampler
from cdlm.continuous.solvers import SOLVERS, Solver
from cdlm.continuous.system import ContinuousConfig, EmbeddingDiffusion, Usual
from cdlm.core.errors import CdlmError
from cdlm.core.parallel import spread
from cdlm.core.types import LoopStep
from cdlm.halting import Criterion, parse_criterion
from cdlm.halting.calibration import calibrated_rule
from cdlm.masked.model import Constants, Function, LogitsFn, MaskedModel
from cdlm.masked.policies import parse_policy
from cdlm.masked.policies.dream import Dream
from cdlm.masked.policies.llada import LLaDA
from cdlm.masked.policies.policy import Policy
from cdlm.masked.published import Quirks
from cdlm.masked.sampler import Decoder, Decoding
from cdlm.masked.system import MaskedDiffusion
from cdlm.models import hub
from cdlm.models.hub import Folder
from cdlm.models.system import Precision, System, special_of
from cdlm.sampling.progress import with_progress
from cdlm.sampling.requests import Request, canvases, encode_prompt, requests
from cdlm.sampling.samples import NEEDED, NEEDED_MASKED, Samples, collect

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BATCH, FEW = 64, 4
"""Samples in flight, unless said otherwise: of our own models, and of foreign ones."""


def load(
    name: str | Path, device: str = "cpu", precision: Precision | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
) -> Any:  # fmt: skip
    """A trained system from a run folder or a Hub id, ready to sample from. Strict, and runs no code of the model.

    Also LLaDA and Dream in their published format, such as "GSAI-ML/LLaDA-8B-Instruct", on transformers' own Llama and
    Qwen2; and LangFlow in its own, "Continuous-Rivals-Discrete/langflow-owt".

    Args:
        precision: of our own systems, the arithmetic of the network ("fp32" unless said otherwise); of foreign ones,
            what the weights are held in (as in their files).
        device_map: of foreign ones, how to spread them over devices, such as "auto".
    """
    path = hub.locate(name)
    if is_langflow(path):
        from cdlm.continuous.systems.langflow import open_langflow

        return _ready(open_langflow(path), device, precision, device_map)
    if hub.is_foreign(path):
        from cdlm.masked.checkpoints.model import open_checkpoint

        return open_checkpoint(path, dtype=precision, device=device, device_map=device_map)
    folder = hub.read(path)
    system = names.build_system(folder.config)
    hub.load_weights(system, folder)
    return _ready(system, device, precision, device_map)


def _ready(system: System, device: str, precision: Precision | None, device_map: object) -> System:
    if device_map is not None:
        raise CdlmError("device_map is for foreign masked models: give a device")
    if precision not in (None, "fp32", "bf16"):
        raise CdlmError(f"precision is fp32 or bf16, got {precision!r}")
    system.precision = precision or "fp32"
    hub.to_device(system, device)
    return system.eval()


def is_langflow(path: Path) -> bool:
    """Whether the folder is LangFlow as released: of all foreign models the one that is continuous."""
    return hub.is_foreign(path) and hub.model_type(path) == "LangFlow"


def make_sampler(
    steps: int = 200,
    halt: str | Criterion | None = None,
    seed: int = 0,
    record: bool = False,
    *,
    solver: str | Solver | None = None,
    grid: str | Grid | None = None,
    projection: str | Projection | None = None,
    guidance: Guidance | None = None,
    init_scale: float = 1.0,
    usual: Usual | None = None,
    folder: Path | None = None,
    length: int | None = None,
) -> Sampler:
    """A sampler from objects or their texts; `record` adds the signals of a record. What is not given is as `usual`.

    `halt="auto"` is the rule that was calibrated for the model in `folder`, samples of this length and these settings.
    """
    usual = usual or Usual()
    chosen = usual.projection if projection is None else PROJECTIONS.parse(projection)
    plain = Sampler(
        steps=steps,
        grid=usual.grid if grid is None else GRIDS.parse(grid),
        solver=usual.solver if solver is None else SOLVERS.parse(solver),
        guidance=replace(guidance or Guidance(), projection=chosen),
        init_scale=init_scale,
        block=usual.block,
        seed=seed,
        record=NEEDED if record else frozenset(),
    )
    if halt == "auto":
        if folder is None:
            raise CdlmError('halt="auto" needs a model that was loaded from a folder: give a rule')
        halt = calibrated_rule(folder, hub.fingerprint(folder), {**plain.settings, "length": length})
    return replace(plain, criterion=parse_criterion(halt))


def make_decoder(
    policy: Policy,
    temperature: float,
    positions: int,
    halt: str | Criterion | None = None,
    seed: int = 0,
    record: bool = False,
    *,
    cfg_scale: float = 0.0,
    cache: Literal["prefix", "dual"] | None = None,
    quirks: Quirks | None = None,
    folder: Path | None = None,
) -> Decoder:
    """A decoder of samples that generate so many `positions`; `halt="auto"` is what was calibrated for them."""
    plain = Decoder(
        policy=policy,
        temperature=temperature,
        cfg_scale=cfg_scale,
        cache=cache,
        seed=seed,
        record=NEEDED_MASKED if record else frozenset(),
        quirks=quirks or Quirks(),
    )
    if halt == "auto":
        if folder is None:
            raise CdlmError('halt="auto" needs a model that was loaded from a folder: give a rule')
        halt = calibrated_rule(folder, hub.fingerprint(folder), {**plain.settings, "length": positions})
    return replace(plain, criterion=parse_criterion(halt))


@dataclass(frozen=True)
class About:
    """What there is to know of a model before anything is drawn from it.

    Args:
        kind: our own systems are continuous or masked, other people's masked models foreign.
        length: positions it was trained on.
        shift: see `cdlm.masked.model.Constants`.
        sampled: how a continuous model is sampled unless said otherwise.
    """

    kind: Literal["continuous", "masked", "foreign"]
    length: int
    tokenizer: PreTrainedTokenizerFast
    folder: Path | None
    shift: bool = False
    sampled: Usual = field(default_factory=Usual)

    @staticmethod
    def of(model: EmbeddingDiffusion | MaskedModel | Folder) -> About:
        """Of a model, or of its folder."""
        if isinstance(model, Folder):
            settings = names.system_config(model.config)
            if isinstance(settings, ContinuousConfig):
                return About("continuous", model.length, model.tokenizer, model.path, sampled=settings.usual)
            return About("masked", model.length, model.tokenizer, model.path)
        if isinstance(model, EmbeddingDiffusion):
            return About("continuous", model.length, tokenizer_of(model), model.folder, sampled=_usual_of(model))
        own = isinstance(model, MaskedDiffusion)
        length, folder = getattr(model, "length", 0), getattr(model, "folder", None)
        return About("masked" if own else "foreign", length, tokenizer_of(model), folder, model.constants.shift)

    def usual(self, steps: int | None) -> tuple[Policy, float]:
        """How a masked model is decoded unless said otherwise, and at what temperature: our own are sampled from, in
        random order; LLaDA and Dream follow their published samplers. Without steps, one position a step."""
        if self.kind == "masked":
            return LLaDA(steps, remasking="random"), 1.0
        return (Dream(steps) if self.shift else LLaDA(steps)), 0.0


def _usual_of(model: EmbeddingDiffusion) -> Usual:
    if "system" not in model.config:  # built from parts by hand
        return Usual(block=model.block)
    settings = names.system_config(model.config)
    assert isinstance(settings, ContinuousConfig)
    return settings.usual


def prepare(
    about: About,
    n: int,
    length: int | None = None,
    steps: int | None = None,
    halt: str | Criterion | None = None,
    seed: int = 0,
    prompts: list[str] | None = None,
    record: bool = False,
    *,
    solver: str | Solver | None = None,
    grid: str | Grid | None = None,
    projection: str | Projection | None = None,
    guidance: Guidance | None = None,
    init_scale: float | None = None,
    policy: str | Policy | None = None,
    temperature: float | None = None,
    cfg_scale: float | None = None,
    cache: Literal["prefix", "dual"] | None = None,
    new_tokens: int | None = None,
    chat: bool = False,
) -> tuple[list[Request], Sampler | Decoder]:
    """The requests, and what serves them; see `generate`."""
    if about.kind == "continuous":
        masked = {"policy": policy, "temperature": temperature, "cfg_scale": cfg_scale, "cache": cache}
        _not_given("masked", **masked, new_tokens=new_tokens, chat=chat or None)
        length = about.length if length is None else length
        sampler = make_sampler(
            200 if steps is None else steps, halt, seed, record, solver=solver, grid=grid, projection=projection,
            init_scale=1.0 if init_scale is None else init_scale, guidance=guidance, usual=about.sampled,
            folder=about.folder, length=length,
        )  # fmt: skip
        return requests(prompts, n, length, about.tokenizer), sampler
    _not_given("continuous", solver=solver, grid=grid, projection=projection, guidance=guidance, init_scale=init_scale)
    if policy is not None and steps is not None:
        raise CdlmError(f"a policy has its own steps: write them in {policy}, or leave out the policy")
    asked = masked_requests(about, prompts, n, length, new_tokens, chat)
    positions = max(int((~request.given).sum()) for request in asked)
    usual, warm = about.usual(steps)
    chosen, degree = (usual, warm) if policy is None else (parse_policy(policy), 0.0)
    decoder = make_decoder(
        chosen, degree if temperature is None else temperature, positions, halt, seed, record,
        cfg_scale=cfg_scale or 0.0, cache=cache, folder=about.folder,
    )  # fmt: skip
    return asked, decoder


def _not_given(kind: str, **settings: object) -> None:
    for name, value in settings.items():
        if value is not None:
            other = "masked" if kind == "continuous" else "continuous"
            called = "guidance, or a temperature of softmax or score," if name == "guidance" else name
            raise CdlmError(f"{called} is a setting of {kind} models, and this one is {other}: leave it out")


def masked_requests(
    about: About, prompts: list[str] | None, n: int, length: int | None, new_tokens: int | None, chat: bool
) -> list[Request]:
    """Requests of a masked model: rows of `length` positions, or prompts with `new_tokens` positions after each."""
    if about.kind == "masked" and new_tokens is None and not chat:
        return requests(prompts, n, about.length if length is None else length, about.tokenizer)
    if length is not None or new_tokens is None:
        raise CdlmError("new_tokens is the number of positions after each prompt: give it, and no length beside it")
    asked = [""] if prompts is None else prompts
    return canvases([encode_prompt(about.tokenizer, prompt, chat) for prompt in asked], new_tokens, n)


def generate(
    system: EmbeddingDiffusion | MaskedModel,
    n: int = 1,
    length: int | None = None,
    steps: int | None = None,
    halt: str | Criterion | None = None,
    seed: int = 0,
    prompts: list[str] | None = None,
    batch_size: int | None = None,
    record: bool = False,
    *,
    progress: bool = False,
    **settings: Any,
) -> Samples:
    """Draw samples.

    Args:
        system: from `load`, or freshly trained.
        n: samples of each prompt, or in all when there are none.
        length: positions of a sample; by default those of training.
        steps: grid points, one prediction each (by default 200; of a masked model one for each position).
        halt: a halting rule, as an object or as its text; "auto" is the one that cdlm calibrate has chosen.
        seed: with the number of a sample it fixes the sample, whatever the batch.
        prompts: prefixes, or templates such as "The [8] sat on the [2]." whose numbers are tokens to generate.
        batch_size: samples in flight; by default 64 (4 of a foreign model).
        record: keep per-step statistics of every sample, and of masked models every token that is committed.
        progress: show a bar on a terminal.
        settings: the further arguments of `prepare`. Of continuous models `solver`, `grid`, `projection`, `guidance`,
            `init_scale` (see `Sampler`), by default those of the system's paper. Of masked models `policy`,
            `temperature`, `cfg_scale`, `cache` (see `Decoder`; the policy as an object or as its text, such as
            "Threshold(0.9, block=32)"); `new_tokens`, positions after each prompt, in place of `length`; and
            `chat=True` for prompts that are a user's messages. Without a policy our own models are sampled from at
            temperature 1 in random order, foreign ones decoded as they are published; with one, the temperature is 0
            unless given.

    Raises:
        CdlmError: a setting is out of range or of the other kind of model, or a prompt leaves nothing to generate.
    """
    if isinstance(prompts, str):
        raise CdlmError(f"prompts is a list of texts, got the text {prompts[:40]!r}: put it into a list")
    known = list(inspect.signature(prepare).parameters)
    for name in settings:
        if name not in known:
            raise CdlmError(f"generate has no setting {name!r}: it has {', '.join(known[1:])}, batch_size and progress")
    asked, sampler = prepare(About.of(system), n, length, steps, halt, seed, prompts, record, **settings)
    return draw(system, sampler, asked, batch_size, progress)


def decode(
    logits_fn: LogitsFn | MaskedModel,
    prompts: Iterable[Any],
    length: int,
    mask_id: int | None = None,
    eos_id: int | None = None,
    shift: bool = False,
    *,
    policy: str | Policy,
    halt: str | Criterion | None = None,
    cfg_scale: float = 0.0,
    temperature: float = 0.0,
    seed: int = 0,
    record: bool = False,
    n: int = 1,
    eot_id: int | None = None,
    constraints: Mapping[int, int] | None = None,
    cache: Literal["prefix", "dual"] | None = None,
    batch_size: int | None = None,
    device: torch.device | str | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
    quirks: Quirks | None = None,
) -> Samples:
    """Decode with any masked model, given as a plain function.

    Args:
        logits_fn: (tokens [b n], attention mask [b n] or None) -> logits [b n v]; or a model from `load`, which knows
            its constants.
        prompts: lists of tokens, or a tensor or array of them; None stands for a position to generate. Different
            lengths are padded on the left.
        length: positions to generate after each prompt.
        mask_id, eos_id, eot_id: the mask, and the ends of a text and of a turn.
        shift: the logits at position i - 1 predict token i, as in Dream.
        policy, cfg_scale, temperature, cache, quirks: see `Decoder`.
        halt: a halting rule; without one all steps of the policy's schedule are taken.
        n: samples of each prompt.
        constraints: tokens that are given in the generated part, by their place in it.
        batch_size: samples in flight; by default 64.
        device: where tokens go; by default where the model is, or the CPU.
        tokenizer: makes the texts, cut at their end; without one there are none.

    Raises:
        CdlmError: a setting is out of range, the model's logits are not numbers or of another vocabulary, or a prompt
            holds the mask.
    """
    if isinstance(logits_fn, EmbeddingDiffusion) or not (isinstance(logits_fn, MaskedModel) or callable(logits_fn)):
        raise CdlmError(f"decode needs a masked model or a function of tokens, got a {type(logits_fn).__name__}")
    if isinstance(logits_fn, MaskedModel):
        model, given = logits_fn, {"mask_id": mask_id, "eos_id": eos_id, "eot_id": eot_id, "shift": shift or None}
        for name, value in given.items():
            if value is not None:
                raise CdlmError(f"the model knows its own {name}: leave it out")
    elif mask_id is None:
        raise CdlmError("a model that is a function needs mask_id, the token of the mask")
    else:
        model = Function(logits_fn, Constants(mask_id, eos_id, eot_id, shift))
    asked = canvases(prompts, length, n, constraints)
    positions = max(int((~request.given).sum()) for request in asked)
    decoder = make_decoder(
        parse_policy(policy), temperature, positions, halt, seed, record, cfg_scale=cfg_scale, cache=cache,
        quirks=quirks,
    )  # fmt: skip
    run = Decoding(model, decoder, BATCH if batch_size is None else batch_size, device or device_of(model))
    return collect_decoded(run, asked, tokenizer)


def collect_decoded(
    run: Decoding, asked: Sequence[Request], tokenizer: PreTrainedTokenizerFast | None, progress: bool = False
) -> Samples:
    """The samples of a decoding run."""
    steps: Iterable[LoopStep] = run.steps(asked)
    if progress:
        steps = with_progress(steps, len(asked))
    constants, decoder = run.model.constants, run.decoder
    return collect(
        steps, asked, tokenizer, budget=run.budget(asked), seed=decoder.seed, record=bool(decoder.record),
        mask_id=constants.mask_id, eos_id=constants.eos_id if run.ends else None,
    )  # fmt: skip


def device_of(model: MaskedModel) -> torch.device:
    """Where a model's tokens go."""
    if isinstance(model, MaskedDiffusion):
        return next(model.parameters()).device
    return torch.device(getattr(model, "device", "cpu"))


def draw(
    system: EmbeddingDiffusion | MaskedModel,
    sampler: Sampler | Decoder,
    asked: Sequence[Request],
    batch_size: int | None = None,
    progress: bool = False,
) -> Samples:
    """Serve the requests with a sampler, on the device and in the arithmetic of the system."""
    if isinstance(sampler, Decoder):
        if not isinstance(system, MaskedModel):
            raise CdlmError("a decoder needs a masked model, and this one is continuous")
        own = isinstance(system, MaskedDiffusion)
        usual = BATCH if own else FEW
        ends = not own or system.ends
        run = Decoding(system, sampler, usual if batch_size is None else batch_size, device_of(system), ends=ends)
        return collect_decoded(run, asked, tokenizer_of(system), progress)
    if not isinstance(system, EmbeddingDiffusion):
        raise CdlmError("a sampler needs a continuous model, and this one is masked")
    run = Run(system, sampler, BATCH if batch_size is None else batch_size, next(system.parameters()).device)
    steps: Iterable[LoopStep] = run.steps(asked)
    if progress:
        steps = with_progress(steps, len(asked))
    record = NEEDED <= sampler.record
    if record:
        check_one_block(sampler, asked, "recorded")
    tokenizer = tokenizer_of(system)
    eos = special_of(tokenizer).eos_id if system.ends else None
    budget = sampler.steps * blocks_of(sampler, asked)
    return collect(steps, asked, tokenizer, budget=budget, seed=sampler.seed, record=record, eos_id=eos)


def blocks_of(sampler: Sampler | Decoder, asked: Sequence[Request]) -> int:
    """Runs in a row that a sample takes, each from fresh noise; a decoder's blocks are one run."""
    return max(sampler.blocks(request) for request in asked) if isinstance(sampler, Sampler) else 1


def check_one_block(sampler: Sampler | Decoder, asked: Sequence[Request], done: str) -> None:
    """Raise if what was asked for, `recorded` or `plotted`, cannot be done because the run is in blocks."""
    blocks = blocks_of(sampler, asked)
    if blocks > 1:
        raise CdlmError(
            f"a run of {blocks} blocks cannot be {done}: its steps are not kept, because to halt one block changes the"
            " next, and a rule has to be run"
        )


def draw_spread(
    run: str, sampler: Sampler | Decoder, asked: Sequence[Request], *, batch_size: int | None = None,
    precision: Precision | None = None, device: str = "cpu", devices: int = 1, progress: bool = True,
) -> Samples:  # fmt: skip
    """Serve the requests from a model folder, dealt out to one process a device."""
    work = partial(draw_share, run, precision, sampler, asked, batch_size, progress)
    return Samples.merge(spread(work, min(devices, len(asked)), device))


def draw_share(
    run: str, precision: Precision | None, sampler: Sampler | Decoder, asked: Sequence[Request],
    batch_size: int | None, progress: bool,
    rank: int, world: int, device: str,
) -> Samples:  # fmt: skip
    """One process's share of `asked`, drawn from a model folder; see `cdlm.core.parallel`."""
    system = load(run, device, precision)
    return draw(system, sampler, asked[rank::world], batch_size, progress and rank == 0)


def tokenizer_of(system: EmbeddingDiffusion | MaskedModel) -> PreTrainedTokenizerFast:
    tokenizer = getattr(system, "tokenizer", None)
    if tokenizer is None:
        folder = getattr(system, "folder", None)
        place = "set system.tokenizer" if folder is None else f"copy tokenizer.json into {folder}"
        raise CdlmError(f"the system has no tokenizer: {place}, or decode tokens with cdlm.decode")
    return tokenizer
