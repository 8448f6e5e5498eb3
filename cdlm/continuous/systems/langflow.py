"""LangFlow: cross-entropy under noise levels spread evenly over information (arXiv 2604.11748)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cdlm.continuous.embedding import OutputPrior, TokenEmbedding
from cdlm.continuous.objectives import CrossEntropy, Seeded
from cdlm.continuous.published.langflow import MLP_RATIO, DiT, LangFlowLayout, PreconditionedInput
from cdlm.continuous.schedules import Schedule, gamma_of, t_of_gamma
from cdlm.continuous.system import ContinuousConfig, EmbeddingDiffusion
from cdlm.core.checks import check_choice, check_number, check_whole
from cdlm.core.devices import refined
from cdlm.core.errors import CdlmError
from cdlm.core.tensors import check_value, same_specs, specs_of, without_memory
from cdlm.models.hub import read_tokenizer, ready
from cdlm.models.transformer import Transformer
from cdlm.sampling.texts import Special


class Gumbel(Schedule):
    """gamma = mu - beta ln(-ln q): where the posterior entropy H exp(-exp(-(gamma - mu) / beta)) changes, levels are
    drawn. mu, beta and H are fitted to the loss as a function of gamma.

    Args:
        mu, beta, entropy: first values, in gamma = ln(sigma^2 / alpha^2) and nats.
        cutoff: q runs from `cutoff` to 1 - `cutoff`, since the ends lie at infinity.
        delay: optimiser steps before the fit starts: an untrained model is equally wrong at every level.
    """

    def __init__(self, mu: float, beta: float, entropy: float, cutoff: float = 1e-5, delay: int = 0):
        super().__init__()
        self.mu, self.beta = nn.Parameter(torch.tensor(mu)), nn.Parameter(torch.tensor(beta))
        self.entropy = nn.Parameter(torch.tensor(entropy))
        self.cutoff, self.delay = cutoff, delay
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def t_min(self) -> float:
        return self.t_of_u(torch.zeros(1)).item()

    @property
    def t_max(self) -> float:
        return self.t_of_u(torch.ones(1)).item()

    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        mu, beta = self._place()
        q = self.cutoff + (1 - 2 * self.cutoff) * u.to(mu)
        return t_of_gamma(mu - beta * (-q.log()).log())

    def u_of_t(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (self._quantile(t) - self.cutoff) / (1 - 2 * self.cutoff)

    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        _, beta = self._place()
        q = self._quantile(t)
        return -q * q.log() / beta * 2 / refined(t) / (1 - 2 * self.cutoff)

    def fit(self, t: Float[Tensor, " b"], nats: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        """Mean squared error of the modelled entropy, zero before the delay is over."""
        expected = refined(self.entropy) * self._quantile(t, learned=True)
        return (expected - refined(nats)).square().mean() * (self.steps >= self.delay)

    @torch.no_grad()
    def after_step(self) -> None:
        self.steps += 1
        self.beta.clamp_(min=0.05)  # a step function would never be left again

    def _place(self) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        return refined(self.mu.detach()), refined(self.beta.detach())

    def _quantile(self, t: Float[Tensor, " b"], learned: bool = False) -> Float[Tensor, " b"]:
        mu, beta = (refined(self.mu), refined(self.beta)) if learned else self._place()
        return (-(-(gamma_of(refined(t)) - mu) / beta).exp()).exp()


@dataclass(frozen=True)
class LangFlow(ContinuousConfig):
    """Cross-entropy under a learned Gumbel schedule, with the own-position term. `langflow_owt.yaml` has the published
    size.

    Args:
        dim: embedding dimension, in the paper the width; every embedding has norm sqrt(dim).
        gates: AdaLN-Zero gates on the branches.
        cond: width of the level embedding.
        output_prior: add what a position's own noisy state says about its token in closed form.
        output_prior_warmup: optimiser steps until that term counts in full.
        cutoff: share of levels that is cut off at each end of the schedule, in (0, 1/2).
        fit_delay: optimiser steps before the schedule is fitted.
        self_conditioning: share of training rows with a first pass.
        first_pass_steps: the fewest steps that sampling will take. Above 0 the first pass of a training row is made at
            a level up to one such step noisier than its own, as the estimate that it is shown in sampling was made
            (self-conditioning perturbation of FastDiSS, arXiv 2604.05551); 0 makes it at the row's own.
        guidance_dropout: share of training rows whose prompt is hidden; the released network does not see it anyway.
        wrong_given: share of the given positions that show a wrong token in training, so that the network learns to
            doubt what was committed; of the shared network only.
        network: "shared" is the toolkit's own. "released" is LangFlow's, which adds the condition to the state
            instead of reading it beside the state, takes given tokens for noisy ones, and asks for dim = width.
        dropout: share of each branch that training drops, in [0, 1); of the released network only (in the paper 0.1).
    """

    dim: int = 64
    gates: bool = True
    cond: int = 128
    output_prior: bool = True
    output_prior_warmup: int = 500
    cutoff: float = 1e-5
    fit_delay: int = 200
    self_conditioning: float = 0.25
    guidance_dropout: float = 0.1
    wrong_given: float = 0.0
    network: Literal["shared", "released"] = "shared"
    dropout: float = 0.0
    first_pass_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("LangFlow", dim=self.dim, cond=self.cond)
        check_whole("LangFlow", least=0, output_prior_warmup=self.output_prior_warmup, fit_delay=self.fit_delay)
        check_number("LangFlow", least=0, most=1, self_conditioning=self.self_conditioning)
        check_number("LangFlow", least=0, most=1, guidance_dropout=self.guidance_dropout)
        check_number("LangFlow", least=0, most=1, wrong_given=self.wrong_given)
        check_number("LangFlow", above=0, below=0.5, cutoff=self.cutoff)
        self.check_first_pass(self.first_pass_steps, self.self_conditioning)
        self._check_network()

    def _check_network(self) -> None:
        check_choice("LangFlow", ("shared", "released"), network=self.network)
        check_number("LangFlow", least=0, below=1, dropout=self.dropout)
        if self.network == "shared" and self.dropout:
            raise CdlmError(f"the shared network has no dropout, got {self.dropout}: set it to 0, or network=released")
        if self.network == "released" and self.wrong_given:
            raise CdlmError(
                f"the released network takes given tokens for noisy ones and learns nothing from wrong ones, got"
                f" wrong_given={self.wrong_given}: set it to 0, or network=shared"
            )
        if self.network == "released" and (self.dim, self.mlp_ratio, self.gates) != (self.width, MLP_RATIO, True):
            raise CdlmError(
                f"the released network has dim = width, mlp_ratio={MLP_RATIO} and gates, got dim={self.dim},"
                f" width={self.width}, mlp_ratio={self.mlp_ratio}, gates={self.gates}"
            )

    @property
    def committing(self) -> bool:
        return self.network == "shared"  # the released one takes what is given for noisy

    def build(self, vocab: int, special: Special | None = None) -> EmbeddingDiffusion:
        released = self.network == "released"
        embedding = TokenEmbedding(vocab, self.dim, init_std=(3 * self.dim) ** -0.5 if released else 1e-3)
        # At 0.4 embedding norms half the tokens of a large vocabulary can be read off their noisy state alone.
        mode = 2 * math.log(0.4 * embedding.rho)
        return EmbeddingDiffusion(
            embedding,
            Gumbel(mode, 1.0, math.log(vocab), self.cutoff, self.fit_delay),
            self._network(vocab),
            network_input=PreconditionedInput(self.dim, self.self_conditioning > 0) if released else None,
            objective=Seeded(CrossEntropy()) if self.dropout else CrossEntropy(self.wrong_given),
            output_prior=OutputPrior(self.output_prior_warmup) if self.output_prior else None,
            self_conditioning=self.self_conditioning,
            first_pass_steps=self.first_pass_steps,
            guidance_dropout=self.guidance_dropout,
            unit_prior=True,
            sampling=self.sampling,
            config={"system": "langflow", "vocab": vocab, **asdict(self)},
        )

    def _network(self, vocab: int) -> nn.Module:
        sizes: dict[str, Any] = {"width": self.width, "depth": self.depth, "heads": self.heads, "cond": self.cond}
        if self.network == "released":
            return DiT(vocab, **sizes, dropout=self.dropout)
        return Transformer(3 * self.dim + 1, vocab, **sizes, mlp_ratio=self.mlp_ratio, gates=self.gates)


def opens(config: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of a released LangFlow model."""
    return "cdlm_format" not in config and config.get("model_type") == "LangFlow"


def open_folder(
    folder: Path, config: Mapping[str, Any], *, device: str, precision: str | None, device_map: object
) -> EmbeddingDiffusion:
    """A released LangFlow model, on its device; see `open_langflow`."""
    if device_map is not None:
        raise CdlmError("device_map is for foreign masked models: give a device")
    return ready(open_langflow(folder), device, precision)


def open_langflow(folder: Path) -> EmbeddingDiffusion:
    """A released LangFlow model, in float32 and evaluation mode, on the CPU. No code of the folder is run.

    Args:
        folder: with config.json (model_type LangFlow), model.safetensors, and perhaps tokenizer.json. The weights on
            the Hub come without a tokenizer: langflow-owt was trained with that of GPT-2.

    Raises:
        CdlmError: a file or a tensor is missing, unknown or of another shape, a setting is not one of LangFlow's, or
            the tokenizer is of another size than the vocabulary of the weights.
    """
    official = LangFlowLayout().read(folder)
    settings = {name: value for name, value in official.config.items() if name not in ("system", "vocab")}
    try:
        with without_memory():  # the weights are read, not drawn
            system = LangFlow(**settings).build(official.config["vocab"])
    except TypeError as error:
        raise CdlmError(f"{folder / 'config.json'} has a setting that is not one of LangFlow's ({error})") from error
    wanted = specs_of(system.state_dict())
    same_specs(folder, wanted, {name: spec for name, (spec, _) in official.tensors.items()})
    state = {
        name: check_value(folder, name, content()).to(wanted[name].dtype)
        for name, (_, content) in official.tensors.items()
    }
    system.load_state_dict(state, assign=True)
    system.length, system.folder = official.length, folder
    if (folder / "tokenizer.json").exists():
        system.tokenizer = read_tokenizer(folder)
        if len(system.tokenizer) != official.config["vocab"]:
            raise CdlmError(
                f"the weights of {folder} are of {official.config['vocab']} tokens, its tokenizer has"
                f" {len(system.tokenizer)}: copy the tokenizer that the model was trained with"
            )
    return system.eval()
