"""CDCD and DDLM: continuous diffusion for categorical data (arXiv 2211.15089, 2305.10818)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Literal

from cdlm.continuous.embedding import OutputPrior, TokenEmbedding
from cdlm.continuous.objectives import CrossEntropy
from cdlm.continuous.schedules import TimeWarp, check_range
from cdlm.continuous.system import ContinuousConfig, EmbeddingDiffusion
from cdlm.core.checks import check_number, check_whole
from cdlm.models.transformer import Transformer
from cdlm.sampling.texts import Special


@dataclass(frozen=True)
class CDCD(ContinuousConfig):
    """Score interpolation with learned time warping. The defaults suit laptops; `ddlm.yaml` has the published size.

    Args:
        dim: embedding dimension; every embedding has norm sqrt(dim).
        t_min: least noise level in units of the embedding norm; the default is the paper's 1 at norm 16.
        t_max: largest noise level in these units; the default is the paper's 300 at norm 16.
        axis: noise axis of the warp's bins. "linear" (the paper's) starts with nearly pure noise, so that context is
            learned first; "log" spends less there, which suits small vocabularies and simple text.
        gates: AdaLN-Zero gates on the branches (CDCD has none).
        output_prior: add what a position's own noisy state says about its token in closed form.
        self_conditioning: share of training rows with a first pass.
        first_pass_steps: the fewest steps that sampling will take. Above 0 the first pass of a training row is made at
            a level up to one such step noisier than its own, as the estimate that it is shown in sampling was made
            (self-conditioning perturbation of FastDiSS, arXiv 2604.05551); 0 makes it at the row's own.
        guidance_dropout: share of training rows whose prompt is hidden.
        wrong_given: share of the given positions that show a wrong token in training, so that the network learns to
            doubt what was committed.
    """

    dim: int = 64
    t_min: float = 0.0625
    t_max: float = 18.75
    axis: Literal["log", "linear"] = "linear"
    gates: bool = False
    output_prior: bool = False
    self_conditioning: float = 0.5
    guidance_dropout: float = 0.1
    wrong_given: float = 0.0
    first_pass_steps: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("CDCD", dim=self.dim)
        check_range(self.t_min, self.t_max)
        check_number("CDCD", least=0, most=1, self_conditioning=self.self_conditioning)
        check_number("CDCD", least=0, most=1, guidance_dropout=self.guidance_dropout)
        check_number("CDCD", least=0, most=1, wrong_given=self.wrong_given)
        self.check_first_pass(self.first_pass_steps, self.self_conditioning)

    @property
    def committing(self) -> bool:
        return True

    def build(self, vocab: int, special: Special | None = None) -> EmbeddingDiffusion:
        embedding = TokenEmbedding(vocab, self.dim)
        return EmbeddingDiffusion(
            embedding,
            TimeWarp(self.t_min * embedding.rho, self.t_max * embedding.rho, self.axis),
            Transformer(
                3 * self.dim + 1, vocab, width=self.width, depth=self.depth, heads=self.heads,
                mlp_ratio=self.mlp_ratio, gates=self.gates,
            ),
            objective=CrossEntropy(self.wrong_given),
            output_prior=OutputPrior() if self.output_prior else None,
            self_conditioning=self.self_conditioning,
            first_pass_steps=self.first_pass_steps,
            guidance_dropout=self.guidance_dropout,
            sampling=self.sampling,
            config={"system": "cdcd", "vocab": vocab, **asdict(self)},
        )  # fmt: skip
