"""SSD-LM: diffusion over the vocabulary's simplex, one block of tokens after another (arXiv 2210.17432)."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from cdlm.continuous.embedding import Embedding
from cdlm.continuous.grids import UpperEnds
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.inputs import NetworkInput
from cdlm.continuous.objectives import CrossEntropy, Objective
from cdlm.continuous.projections import MultiHot
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.schedules import Schedule, alpha_of
from cdlm.continuous.solvers import Renoise
from cdlm.continuous.system import ContinuousConfig, EmbeddingDiffusion
from cdlm.core.checks import check_choice, check_number, check_whole
from cdlm.core.devices import fine, refined
from cdlm.core.errors import CdlmError
from cdlm.core.types import Condition
from cdlm.models.transformer import Transformer
from cdlm.sampling.texts import Special


class Simplex(Embedding):
    """A token as +K at its own place of the vocabulary and -K everywhere else (section 3.1)."""

    def __init__(self, vocab: int, k: float = 5.0):
        super().__init__()
        self.dim, self.k, self.rho = vocab, k, k * math.sqrt(vocab)
        self.like: Tensor
        # It says type and device of the vectors. It is not among the weights: made for real, whatever the rest is.
        self.register_buffer("like", torch.zeros((), device="cpu"), persistent=False)

    def forward(self, tokens: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        low = self.like.new_full((*tokens.shape, self.dim), -self.k)
        return low.scatter_(-1, tokens[..., None], self.k)

    def table(self) -> Float[Tensor, "v d"]:
        return self.mix(torch.eye(self.dim, dtype=self.like.dtype, device=self.like.device))

    def mix(self, weights: Float[Tensor, "*n v"]) -> Float[Tensor, "*n d"]:
        return 2 * self.k * weights - self.k

    def dot(self, z: Float[Tensor, "b n d"]) -> Float[Tensor, "b n v"]:
        return 2 * self.k * z - self.k * z.sum(-1, keepdim=True)


class Cosine(Schedule):
    """abar(u) = cos^2((u + s) / (1 + s) pi / 2), rescaled to 1 at u = 0; t = K sqrt((1 - abar) / abar) (section 3.1).

    The noise that the paper adds is K eps, so that t is in units of its simplex. At u = 1 the signal is gone: t is what
    float64 makes of K / cos(pi / 2), about 1.6e16 K. Near it, t grows like K / (1 - u), and neighbouring numbers u give
    levels that are far apart.

    Args:
        k: of the simplex.
        finest: the smallest u, of the least noise that training draws.
        s: the paper's offset.
    """

    def __init__(self, k: float = 5.0, finest: float = 1 / 5000, s: float = 1e-4):
        super().__init__()
        self.k, self.finest, self.s = k, finest, s
        self.invertible = (finest, 1 - 1e-8)  # the rounding of u moves t by 4e-16 / (1 - u) of itself
        ends = torch.tensor([finest, 1.0], dtype=torch.float64, device="cpu")  # also where systems are built on "meta"
        self._range: list[float] = self._t(ends).tolist()

    @property
    def t_min(self) -> float:
        return self._range[0]

    @property
    def t_max(self) -> float:
        return self._range[1]

    def t_of_u(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return self._t(refined(u).clamp(self.finest, 1))

    def u_of_t(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (self._angle(t) * 2 / math.pi * (1 + self.s) - self.s).clamp(0, 1)

    def density(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        x = refined(t) / self.k
        rate = math.cos(self._turn(0.0)) * x * (1 + x.square()) ** -1.5 / self._angle(t).sin()
        return rate / self.k * 2 * (1 + self.s) / math.pi

    def slope(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return torch.where(refined(u) >= self.finest, super().slope(u), 0)  # below, t stays what it is

    def fit(self, t: Float[Tensor, " b"], nats: Float[Tensor, " b"]) -> Float[Tensor, ""]:
        return torch.zeros((), dtype=fine(t.device), device=t.device)  # nothing to learn

    def after_step(self) -> None:
        return

    def _turn(self, u: float) -> float:
        return (u + self.s) / (1 + self.s) * math.pi / 2

    def _t(self, u: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        angle, first = (u + self.s) / (1 + self.s) * math.pi / 2, self._turn(0.0)
        # cos^2(first) - cos^2(angle), which 1 - abar would lose to rounding near u = 0
        signal = angle.cos().clamp(min=math.cos(math.pi / 2))  # never 0, however a device rounds pi / 2
        return self.k * ((angle - first).sin() * (angle + first).sin()).sqrt() / signal

    def _angle(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return (math.cos(self._turn(0.0)) * alpha_of(refined(t) / self.k)).acos()


class SimplexInput(NetworkInput):
    """Given tokens by a row of one table, noisy ones by the mean of another under softmax(alpha z) (section 3.2).

    Features of width `inputs`; the level is u, stretched to [-2, 2].
    """

    def __init__(self, vocab: int, inputs: int, schedule: Cosine):
        super().__init__()
        self.k, self.u_of_t = schedule.k, schedule.u_of_t
        self.given, self.noisy = nn.Embedding(vocab, inputs), nn.Linear(vocab, inputs, bias=False)
        self.noisy.weight.data.copy_(self.given.weight.T)

    def forward(
        self, z: Float[Tensor, "b n d"], t: Float[Tensor, " b"], condition: Condition
    ) -> tuple[Float[Tensor, "b n f"], Float[Tensor, " b"]]:
        shown = (z * alpha_of(t / self.k).to(z.dtype)[:, None, None]).softmax(-1)
        features = torch.where(
            condition.target[..., None], self.noisy(shown), rows_of(self.given.weight, condition.clean)
        )
        return features, (4 * self.u_of_t(t) - 2).float()


def rows_of(table: Float[Tensor, "v f"], clean: Float[Tensor, "b n v"]) -> Float[Tensor, "b n f"]:
    """The row of each simplex vertex in a table; zero where there is none, since nothing is given."""
    return F.embedding(clean.argmax(-1), table) * (clean.amax(-1, keepdim=True) > 0)


@dataclass(frozen=True)
class SSD(ContinuousConfig):
    """Cross-entropy on blocks of tokens after a context, in the simplex of the vocabulary. `ssd_lm.yaml` has the
    published size.

    Args:
        dim: width of the token tables that feed the shared network.
        block: tokens that are generated at a time; train it with the masking law Block(block).
        k: K, the size of the simplex.
        gates: AdaLN-Zero gates on the branches of the shared network.
        top_p: nucleus of the projection that sampling uses by default; 0 is greedy.
        network: "shared", the backbone of all systems, or "roberta", the published one.
        start: folder or Hub id of a RoBERTa checkpoint of this size to start from, such as "FacebookAI/roberta-large".
        positions: the most positions that RoBERTa can have in a row.
        dropout: share of RoBERTa's features and attention weights that training leaves out.
    """

    dim: int = 64
    block: int = 25
    k: float = 5.0
    gates: bool = True
    top_p: float = 0.2
    network: Literal["shared", "roberta"] = "shared"
    start: str | None = None
    positions: int = 512
    dropout: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("SSD", dim=self.dim, block=self.block, positions=self.positions)
        check_number("SSD", above=0, k=self.k, hint="the paper's is 5")
        check_number("SSD", least=0, below=1, dropout=self.dropout)
        MultiHot(self.top_p)
        self._check_network()

    def _check_network(self) -> None:
        own = {"shared": ("dim", "gates"), "roberta": ("start", "positions", "dropout")}
        check_choice("SSD", list(own), network=self.network)
        for network, fields in own.items():
            for name in fields:
                if network != self.network and getattr(self, name) != getattr(SSD, name):
                    raise CdlmError(
                        f"{name} is a setting of network={network}, and this is {self.network}: leave it out"
                    )
        if self.network == "roberta" and self.block > self.positions:
            raise CdlmError(f"a block of {self.block} does not fit into {self.positions} positions: lower block")

    @property
    def sampling(self) -> Diffusion:
        guidance = Guidance(projection=MultiHot(self.top_p))
        return Diffusion(solver=Renoise(), grid=UpperEnds(), guidance=guidance, block=self.block)

    def build(self, vocab: int, special: Special | None = None) -> EmbeddingDiffusion:
        """A system; `start` is read here and not again when the trained system is loaded.

        Raises:
            CdlmError: `start` is not there, or of another size or vocabulary.
        """
        schedule = Cosine(self.k)
        network, network_input, objective = self._parts(vocab, schedule)
        return EmbeddingDiffusion(
            Simplex(vocab, self.k),
            schedule,
            network,
            network_input=network_input,
            objective=objective,
            self_conditioning=0.0,
            guidance_dropout=0.0,
            block=self.block,
            sampling=self.sampling,
            config={"system": "ssd", "vocab": vocab, **asdict(self), "start": None},
        )

    def _parts(self, vocab: int, schedule: Cosine) -> tuple[nn.Module, NetworkInput, Objective]:
        if self.network == "roberta":
            from cdlm.continuous.published.ssd import build_roberta

            return build_roberta(self, vocab, schedule)
        network = Transformer(
            self.dim, vocab, width=self.width, depth=self.depth, heads=self.heads, mlp_ratio=self.mlp_ratio,
            gates=self.gates,
        )  # fmt: skip
        return network, SimplexInput(vocab, self.dim, schedule), CrossEntropy()
