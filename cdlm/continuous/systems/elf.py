"""ELF: a flow in the space of a frozen encoder (arXiv 2605.10938). Tokens are decoded once, at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from cdlm.continuous.encoder_space import EncoderSpace
from cdlm.continuous.grids import UpperEnds
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.learned_space import LearnedSpace
from cdlm.continuous.objectives import Objective
from cdlm.continuous.readouts import NoReadOut
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.schedules import LogitNormal
from cdlm.continuous.solvers import Churn
from cdlm.continuous.system import ContinuousConfig, ContinuousSystem
from cdlm.core.checks import check_flag, check_number, check_whole
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_path
from cdlm.core.likelihood import LikelihoodSettings, Nats, Progress, Text
from cdlm.core.trees import take
from cdlm.core.types import Batch, Condition, Prediction
from cdlm.models.in_context import InContextTransformer
from cdlm.models.system import Loss, levels_of, row_cross_entropy
from cdlm.sampling.texts import Special

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LEAST_GUIDANCE, MOST_GUIDANCE = 0.5, 5.0
"""Guidance scales that training draws."""
NEAREST = 0.05
"""Least 1 - tau that a velocity is divided by."""


@dataclass(frozen=True)
class ELF(ContinuousConfig):
    """A flow between noise and the vectors of a frozen encoder. The defaults are the paper's for open text.

    Its time tau runs from 0, noise, to 1, data: the state is `tau x + (1 - tau) noise_scale eps`.

    Args:
        encoder: folder of the encoder, such as `cdlm train-encoder` writes. The run has to use its tokenizer.
        encoder_dim, encoder_hash: of its vectors, and of its files; they are found out and saved with the model.
        learned: length of vectors that are learned with the flow, one a token, in place of an encoder's: the ablation
            of what a frozen encoder gives. 0 is off.
        bottleneck: features between the input and the transformer.
        noise_scale: standard deviation of the noise at tau = 0, in those of the data.
        time_mean, time_deviation: of the log-odds of tau in training.
        self_conditioning: share of training rows that see an estimate of a first pass.
        guidance_dropout: share of training rows whose prompt is hidden.
        decoder_share: share of training rows that learn to say the tokens of noisy vectors.
        decoder_noise: standard deviation of that noise: 5 for open text, 1 for translation and summaries.
        probe: learn a linear map that says the tokens of an estimate without a call, for halting rules alone.
        cache_latents: keep the vectors of each training row on disk as float16, in place of encoding it in each epoch.
    """

    encoder: str = ""
    encoder_dim: int = 0
    encoder_hash: str = ""
    learned: int = 0
    bottleneck: int = 128
    noise_scale: float = 2.0
    time_mean: float = -1.5
    time_deviation: float = 0.8
    self_conditioning: float = 0.5
    guidance_dropout: float = 0.1
    decoder_share: float = 0.2
    decoder_noise: float = 5.0
    probe: bool = True
    cache_latents: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder:
            check_path(self.encoder)
        check_whole("ELF", least=0, encoder_dim=self.encoder_dim, learned=self.learned)
        if self.learned and (self.encoder or self.cache_latents):
            raise CdlmError(
                f"ELF has the vectors of an encoder or learns its own, got encoder={self.encoder!r},"
                f" cache_latents={self.cache_latents} and learned={self.learned}: give encoder='' and no cache, or"
                " learned=0"
            )
        check_whole("ELF", bottleneck=self.bottleneck)
        check_number("ELF", above=0, noise_scale=self.noise_scale, time_deviation=self.time_deviation)
        check_number("ELF", time_mean=self.time_mean)
        for name in ("self_conditioning", "guidance_dropout", "decoder_share"):
            check_number("ELF", least=0, most=1, **{name: getattr(self, name)})
        check_number("ELF", least=0, decoder_noise=self.decoder_noise)
        check_flag("ELF", probe=self.probe, cache_latents=self.cache_latents)

    @property
    def sampling(self) -> Diffusion:
        churn = Churn(1.5, "elf", noise_scale=self.noise_scale)
        return Diffusion(32, solver=churn, grid=UpperEnds(), guidance=Guidance(scale=3.0), read_out=NoReadOut())

    def build(self, vocab: int, special: Special | None = None) -> Flow:
        if not self.encoder and not self.learned:
            raise CdlmError(
                "ELF needs the folder of an encoder: train one with cdlm train-encoder, and name it (--system.encoder)"
            )
        if self.encoder and not (self.encoder_dim and self.encoder_hash):
            found = EncoderSpace.open(self.encoder)
            return replace(self, encoder_dim=found.dim, encoder_hash=found.fingerprint).build(vocab, special)
        network = InContextTransformer(
            self.learned or self.encoder_dim, vocab, bottleneck=self.bottleneck, width=self.width, depth=self.depth,
            heads=self.heads, mlp_ratio=self.mlp_ratio,
        )  # fmt: skip
        if self.learned:
            return Flow(self, LearnedSpace(self.learned, vocab), network, vocab)
        return Flow(self, EncoderSpace(self.encoder, self.encoder_dim, self.encoder_hash), network, vocab)


class Flow(ContinuousSystem):
    """The system of `ELF`. An estimate is a vector of the encoder's space and no mixture of embeddings."""

    decodes = True
    guidance_range = (LEAST_GUIDANCE, MOST_GUIDANCE)

    def __init__(self, settings: ELF, space: EncoderSpace | LearnedSpace, network: InContextTransformer, vocab: int):
        super().__init__()
        self.settings, self.space, self.network = settings, space, network
        self.schedule = LogitNormal(settings.time_mean, settings.time_deviation, settings.noise_scale)
        self.objective = FlowMatching(settings)
        self.probe = _linear(space.dim, vocab) if settings.probe else None
        self.self_conditioning, self.guidance_dropout = settings.self_conditioning, settings.guidance_dropout
        self.dim, self.rho = space.dim, math.sqrt(space.dim)
        self.config = {"system": "elf", "vocab": vocab, **asdict(settings)}

    @property
    def defaults(self) -> Diffusion:
        return self.settings.sampling

    @property
    def prior_std(self) -> float:
        # The state at the first level is noise alone, tau = 0, and the level is the nearest one that z has.
        return self.schedule.t_max + self.settings.noise_scale

    def prepare(self, tokenizer: PreTrainedTokenizerFast, batches: Iterable[Batch], cache: Path, fresh: bool) -> None:
        if isinstance(self.space, LearnedSpace):
            return  # any tokenizer will do, and the rows have the size that they should have
        self.space.check_tokenizer(tokenizer)
        if self.settings.cache_latents:
            self.space.use_cache(cache / "vectors")
        if fresh:
            self.space.fit((batch.tokens, _valid(batch)) for batch in batches)

    def keep_space(self) -> None:
        super().keep_space()
        self.space.requires_grad_(False)

    def time(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """tau of a noise level, from 0 to 1."""
        return self.settings.noise_scale / (self.settings.noise_scale + t)

    def draw(
        self, batch: Batch, t: Float[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b n d"], Float[Tensor, "b n d"], Condition]:
        rows, generator, device = len(t), batch.generator, batch.tokens.device
        kept = torch.rand(rows, 1, generator=generator, device=device) >= self.guidance_dropout * self.training
        u = torch.rand(rows, generator=generator, device=device)
        scale = LEAST_GUIDANCE + 1, MOST_GUIDANCE + 1
        guidance = scale[0] * (u * math.log(scale[1] / scale[0])).exp() - 1 if self.training else torch.ones_like(u)
        shown = ~batch.target & kept & _valid(batch)
        given = self.given(batch.tokens, shown)
        clean = torch.where(shown[..., None], given, self.space(batch.tokens, (batch.target | kept) & _valid(batch)))
        eps = torch.randn(clean.shape, generator=generator, device=device)
        z = clean + t.to(clean.dtype)[:, None, None] * eps
        return clean, z, Condition(given, batch.target, torch.zeros_like(clean), batch.valid, None, guidance)

    def denoise(self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition) -> Prediction:
        tau = self.time(t)
        hidden = self._hidden(z * tau.to(z.dtype)[:, None, None], condition.x0, tau, condition, decode=False)
        with self._precisely(z.device):
            x0 = self._network.vectors(hidden)
        return Prediction(NoReadOut().logits(self, z, condition), x0.to(z.dtype))

    def decode(self, x0: Float[Tensor, "b n d"], condition: Condition) -> Float[Tensor, "b n v"]:
        hidden = self._hidden(x0, torch.zeros_like(x0), torch.ones_like(x0[:, 0, 0]), condition, decode=True)
        with self._precisely(x0.device):
            logits = self._network.tokens(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def probed(self, x0: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        return super().probed(x0) if self.probe is None else self.probe(x0)

    def given(self, tokens: Int[Tensor, "b n"], seen: Bool[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        if not bool(seen.any()):  # the encoder is not needed
            return torch.zeros((*tokens.shape, self.dim), device=tokens.device)
        return self.space(tokens, seen)

    def embed(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        return self.space(tokens, torch.ones_like(tokens, dtype=torch.bool))

    def committed(self, tokens: Int[Tensor, "b n"], x0: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if isinstance(self.space, LearnedSpace):
            return self.embed(tokens)
        return x0  # the vector of a token depends on tokens that are not decided yet

    def mix(self, weights: Float[Tensor, "b n v"]) -> Float[Tensor, "b n d"]:
        raise CdlmError("the vectors of ELF depend on their context: there is no mixture of them")

    def nats(self, text: Text, settings: LikelihoodSettings, progress: Progress | None = None) -> dict[str, Nats]:
        raise CdlmError(f"{self.name} is a flow between vectors, and no bound of its tokens' likelihood is known")

    @property
    def _network(self) -> InContextTransformer:
        assert isinstance(self.network, InContextTransformer)
        return self.network

    def _hidden(
        self, state: Float[Tensor, "b n d"], x0: Float[Tensor, "b n d"], tau: Float[Tensor, " b"],
        condition: Condition, decode: bool,
    ) -> Float[Tensor, "b n w"]:  # fmt: skip
        """One call of the network. Given positions show their clean vectors."""
        open_ = condition.target[..., None]
        guidance = torch.ones_like(tau) if condition.guidance is None else condition.guidance
        level = torch.stack([tau.float(), guidance.float(), torch.full_like(tau, float(decode)).float()], -1)
        features = torch.cat([torch.where(open_, state, condition.clean), x0 * open_], -1)
        with self._precisely(state.device):
            return self.network(features, level, condition.valid)


class FlowMatching(Objective):
    """Squared error of the velocity on most rows, cross-entropy of the decoder on the others (ELF, section 3).

    The target of the velocity already holds the guidance that the network is told: `v* = v + b (1 - 1/w) (v_c - v_u)`,
    where b says that the row sees an estimate, and v_c and v_u are what the network says with it and without. In
    evaluation every row makes both losses, sees an estimate and is told no guidance.
    """

    def __init__(self, settings: ELF):
        super().__init__()
        self.settings = settings

    def forward(self, system: Flow, batch: Batch) -> Loss:
        t = system.schedule.t_of_u(levels_of(batch)).detach()
        clean, z, condition = system.draw(batch, t)
        rows, device, share = len(batch), t.device, self.settings.decoder_share
        if not system.training:
            error, aside = self._velocity(system, clean, z, t, condition, batch)
            nats = self._decoder(system, clean, condition, batch)
            return self._loss((1 - share) * error + share * nats, aside, t, batch)
        decoded = torch.rand(rows, generator=batch.generator, device=device) < share
        lost, aside = torch.zeros(rows, device=device), torch.zeros((), device=device)
        flowing, told = (flags.nonzero().squeeze(1).cpu() for flags in (~decoded, decoded))
        if len(flowing):
            x, noisy, level, shown = take((clean, z, t, condition), flowing)
            error, aside = self._velocity(system, x, noisy, level, shown, _some(batch, flowing))
            lost = lost.index_copy(0, flowing.to(device), error)
        if len(told):
            x, shown = take((clean, condition), told)
            nats = self._decoder(system, x, shown, _some(batch, told))
            lost = lost.index_copy(0, told.to(device), nats)
        return self._loss(lost, aside if len(flowing) and len(told) else aside + _nothing(system), t, batch)

    def read_out(self, system: Flow, batch: Batch) -> tuple[Float[Tensor, " b"], Int[Tensor, " b"]]:
        clean, _, condition = system.draw(batch, system.schedule.t_of_u(levels_of(batch)).detach())
        return self._decoder(system, clean, condition, batch), batch.target.sum(1)

    def _loss(self, lost: Float[Tensor, " b"], aside: Tensor, t: Float[Tensor, " b"], batch: Batch) -> Loss:
        count = batch.target.sum(1)
        return Loss(lost.sum() / count.sum() + aside, (lost / count).detach(), t, count)

    def _velocity(
        self, system: Flow, clean: Float[Tensor, "b n d"], z: Float[Tensor, "b n d"], t: Float[Tensor, " b"],
        condition: Condition, batch: Batch,
    ) -> tuple[Float[Tensor, " b"], Float[Tensor, ""]]:  # fmt: skip
        """Squared error of each row's velocity, a mean over dimensions and a sum over positions; and the mean loss of
        the probe, which learns from the estimates and teaches nothing else."""
        rows, device, target = len(t), t.device, batch.target
        chance = self.settings.self_conditioning if system.training else float(self.settings.self_conditioning > 0)
        sees = torch.rand(rows, generator=batch.generator, device=device) < chance
        first = sees.nonzero().squeeze(1).cpu()
        blind = torch.zeros_like(clean)
        if len(first):
            with torch.no_grad():
                made = system.denoise(*take((z, t, condition), first)).x0
            blind = blind.index_copy(0, first.to(device), made)
        x0 = system.denoise(z, t, condition._replace(x0=blind)).x0
        assert condition.guidance is not None
        # With the estimate and without: v_c and v_u differ as the estimates do. There is no dropout, so the pass that
        # is trained is also the one of v_c.
        share = torch.where(sees, 1 - 1 / condition.guidance, 0)[:, None, None]
        wanted = clean + share * (x0.detach() - blind)
        away = (1 - system.time(t)).clamp(min=NEAREST).to(x0.dtype)[:, None]
        error = ((x0 - wanted).square().mean(-1) / away.square() * target).sum(1)
        if system.probe is None:
            return error, error.new_zeros(())
        nats, count = row_cross_entropy(system.probed(x0.detach()), batch.tokens, target)
        return error, nats.sum() / count.sum() if system.training else error.new_zeros(())

    def _decoder(
        self, system: Flow, clean: Float[Tensor, "b n d"], condition: Condition, batch: Batch
    ) -> Float[Tensor, " b"]:
        """Summed cross-entropy of each row in nats, from vectors under noise of each position's own."""
        generator, device = batch.generator, clean.device
        odds = 0.8 + 0.8 * torch.randn(clean.shape[:2], generator=generator, device=device)
        kept, eps = odds.sigmoid()[..., None], torch.randn(clean.shape, generator=generator, device=device)
        noisy = kept * clean + (1 - kept) * self.settings.decoder_noise * eps
        return row_cross_entropy(system.decode(noisy, condition), batch.tokens, batch.target)[0]


def _valid(batch: Batch) -> Bool[Tensor, "b n"]:
    return torch.ones_like(batch.target) if batch.valid is None else batch.valid


def _some(batch: Batch, rows: Int[Tensor, " k"]) -> Batch:
    """Some rows of a batch, with its generator."""
    tokens, valid, target = take((batch.tokens, batch.valid, batch.target), rows)
    return replace(batch, tokens=tokens, valid=valid, target=target, u=None)


def _nothing(system: Flow) -> Float[Tensor, ""]:
    """Zero, by all weights: a batch without rows of one branch leaves none without a gradient."""
    return torch.stack([0.0 * weight.sum() for weight in system.parameters()]).sum()


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map that begins at zero."""
    made = nn.Linear(inputs, outputs)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made
