"""How state and prediction move: norms along the way, and angles to where they end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from cdlm import config as names
from cdlm import generation
from cdlm.continuous.sampler import Run, Sampler
from cdlm.continuous.schedules import alpha_of
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.sampling.requests import Request, requests
from cdlm.studies.measures import reached
from cdlm.studies.picture import Line, Panel
from cdlm.studies.study import Finding, Sampled, label

NEEDED = frozenset({"z", "score", "z_norm", "x0_norm", "switches"})
NEAR = 0.99
"""What counts as arrived, of a norm in embedding norms or of a cosine."""
NOTE = (
    "Medians over samples. Norm of x0 and state: share of the steps after which the norm of x0 stays above"
    f" {NEAR} embedding norms, and the cosine of the state to the last one above {NEAR}. Zero-switch: the share after"
    " which no token changes. Behind @ the noise level there, in embedding norms. Score, least: the smallest"
    " cosine to the last score. Scaled state, least: the smallest norm of alpha z, in embedding norms."
)
Course = dict[str, Float[np.ndarray, "steps m"]]


@dataclass(frozen=True, kw_only=True)
class Norms(Sampled):
    """How state and prediction move: their norms along the way, and the cosines to where they end.

    Args:
        steps: grid points.
        seed: of the samples.
        grids: spacings of the steps to compare: Warped(), LogT() and UniformT().
    """

    steps: int
    seed: int
    grids: list[str]

    def check(self) -> None:
        super().check()
        for grid in self.grids:
            names.grid(grid)

    def find(self) -> Finding:
        paths = {(model, grid): self._path(model, grid) for model, grid in product(self.models, self.grids)}
        rows = [row for (model, grid), path in paths.items() for row in _rows(label(model), grid, path)]
        table = [self._line(label(model), grid, path) for (model, grid), path in paths.items()]
        return Finding(rows, table, NOTE, [panel for key, path in paths.items() for panel in self._panels(key, path)])

    def _path(self, model: str, grid: str) -> Course:
        system = generation.load(model, self.machine.device, self.precision)
        sampler = replace(self.sampler(self.steps, self.seed, grid), record=NEEDED)
        assert system.tokenizer is not None
        asked = requests(None, self.n, system.length, system.tokenizer)
        parts = [trace(system, sampler, some) for some in batches(asked, self.batch_size)]
        return {name: np.concatenate([part[name] for part in parts], 1) for name in parts[0]}

    def _line(self, model: str, grid: str, path: Course) -> dict[str, str]:
        def at(steps: Int[np.ndarray, " m"]) -> str:
            step = round(float(np.median(np.minimum(steps, self.steps))))
            return f"{step / self.steps:.0%} @ {path['t'][step - 1, 0]:.2f}"

        return {
            "model": model,
            "grid": grid,
            "samples": str(self.n),
            "norm of x0": at(reached(path["x0_norm"], NEAR)),
            "zero-switch": at(self.steps - np.argmax(path["switches"][::-1] > 0, axis=0)),
            "state": at(reached(path["z_to_final"], NEAR)),
            "score, least": f"{np.median(path['score_to_final'].min(0)):.3f}",
            "scaled state, least": f"{np.median(path['z_scaled'].min(0)):.3f}",
        }

    def _panels(self, key: tuple[str, str], path: Course) -> list[Panel]:
        share = np.arange(1, self.steps + 1) / self.steps

        def line(name: str, title: str) -> Line:
            low, middle, high = np.percentile(path[name], [10, 50, 90], axis=1)
            return Line(title, share, middle, (low, high))

        title = f"{label(key[0])}, {key[1]}"
        switches = Line("mean over samples", share, path["switches"].mean(1))
        return [
            Panel(f"Norms: {title}", "share of the steps", "over the embedding norm",
                  [line("x0_norm", "prediction x0"), line("z_scaled", "state, alpha z")]),
            Panel(f"Directions: {title}", "share of the steps", "cosine to the last step",
                  [line("score_to_final", "score"), line("z_to_final", "state")]),
            Panel(f"Switches: {title}", "share of the steps", "tokens changed a step", [switches], "linear", "symlog",
                  linear_below=0.1),
        ]  # fmt: skip


def batches(asked: list[Request], size: int) -> Iterator[list[Request]]:
    """Requests in groups that start and end together."""
    return (asked[i : i + size] for i in range(0, len(asked), size))


def trace(system: EmbeddingDiffusion, sampler: Sampler, asked: list[Request]) -> Course:
    """Norms and cosines of one group of samples, by step.

    Every state and score of the group is kept until its last step is known: 2 * 4 * steps * n * d bytes a sample.
    """
    states = [step.state for step in Run(system, sampler, len(asked), next(system.parameters()).device).steps(asked)]
    t = torch.stack([state.t for state in states]).cpu()

    def stacked(name: str) -> Float[np.ndarray, "steps m"]:
        return torch.stack([state.signals[name] for state in states]).cpu().double().numpy()

    return {
        "t": (t / system.rho).numpy(),
        **{name: stacked(name) for name in ("z_norm", "x0_norm", "switches")},
        "z_scaled": stacked("z_norm") * alpha_of(t).numpy(),
        "z_to_final": _to_last([state.z for state in states]),
        "score_to_final": _to_last([state.score for state in states]),
    }


def _to_last(values: list[Tensor]) -> Float[np.ndarray, "steps m"]:
    """Cosine of each to the last, over all numbers of a sample."""
    end = values[-1].flatten(1)
    return torch.stack([torch.cosine_similarity(v.flatten(1), end, dim=1) for v in values]).cpu().double().numpy()


def _rows(model: str, grid: str, path: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    for step in range(len(path["t"])):
        row: dict[str, Any] = {"model": model, "grid": grid, "step": step + 1, "t": float(path["t"][step, 0])}
        row["switches"] = path["switches"][step].mean()
        for name in ("z_norm", "z_scaled", "x0_norm", "score_to_final", "z_to_final"):
            low, middle, high = np.percentile(path[name][step], [10, 50, 90])
            row |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        yield row


STUDY = Norms
