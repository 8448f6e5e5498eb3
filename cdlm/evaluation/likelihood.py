"""The likelihood of held-out text under a model, on one process or several."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import LikelihoodSettings, Nats, Text
from cdlm.core.parallel import deal, interleaved
from cdlm.core.progress import Parts
from cdlm.core.trees import take
from cdlm.evaluation.metrics.likelihood import Likelihood
from cdlm.evaluation.texts import RealText
from cdlm.sampling.session import Model, Session
from cdlm.sampling.texts import text_ids

Arrays = dict[str, np.ndarray]
"""`Nats` for the way between processes: tensors do not outlive the process that made them, arrays do."""


def likelihood(
    session: Session, real: RealText, rows: int = 128, settings: LikelihoodSettings | None = None
) -> Likelihood:
    """The likelihood of a sample of `rows` rows of held-out text, each from nothing, padding apart.

    Where rows end at a text's end, that end is a token of the text and what fills the row after it is not; it is still
    part of what the model has to predict.

    Args:
        session: the model, and the processes that it runs on.
        rows: at most; all there are if they are fewer.

    Raises:
        CdlmError: the model has no likelihood, or not with these settings.
    """
    if rows < 1:
        raise CdlmError(f"a likelihood is of rows >= 1, got {rows}")
    settings = settings or LikelihoodSettings()
    held = [real.held_out[i] for i in real.sample(real.held_out, min(rows, len(real.held_out)))]
    valid = torch.from_numpy(np.stack([row.valid for row in held]))
    text = Text(
        torch.from_numpy(np.stack([row.tokens for row in held])),
        valid,
        None if bool(valid.all()) else valid,
        torch.arange(len(held))[:, None],
    )
    ids = [text_ids(row.tokens[row.valid].tolist(), real.eos_id, with_end=True) for row in held]
    tokens, chars = (np.array([len(part) for part in parts]) for parts in (ids, map(real.decode, ids)))
    return Likelihood.of(
        nats_of(session, text, settings), tokens, chars, shown_settings(settings, session.model.precision)
    )


def nats_of(session: Session, text: Text, settings: LikelihoodSettings) -> dict[str, Nats]:
    """`Model.nats` on the processes of the session; the first one reports."""
    if session.workers is None:
        with Parts(session.progress) as parts:
            return session.model.nats(text, settings, parts)
    shares = [take(text, torch.tensor(part)) for part in deal(range(len(text.tokens)), len(session.workers))]
    work = [(share, session.progress and number == 0) for number, share in enumerate(shares)]
    return _joined(session.workers.map(partial(_share, settings), session.model, work))


def shown_settings(settings: LikelihoodSettings, precision: str) -> dict[str, Any]:
    """The settings that the numbers depend on, under the names of the command line."""
    shown: dict[str, Any] = {"levels": settings.levels}
    if settings.read_out is not None:
        shown["read out at"] = settings.read_out
    shown |= {"seed": settings.seed, "precision": precision}
    if (ode := settings.ode) is not None:
        shown |= {
            "ode": ode.method, "ode_steps": ode.steps, "probes": ode.probes, "directions": ode.law,
            "state": str(ode.state).removeprefix("torch."),
        }  # fmt: skip
    return shown


def _share(settings: LikelihoodSettings, model: Model, work: tuple[Text, bool]) -> dict[str, Arrays]:
    """One process's share of the rows, and whether it reports."""
    text, reports = work
    with Parts(reports) as parts:
        found = model.nats(text, settings, parts)
    return {
        name: {**{f"term {term}": values.numpy() for term, values in nats.terms.items()},
               "error": nats.error.numpy(), "positions": nats.positions.numpy()}
        for name, nats in found.items()
    }  # fmt: skip


def _joined(shares: Sequence[dict[str, Arrays]]) -> dict[str, Nats]:
    """The rows of all shares in their order."""
    found: dict[str, Nats] = {}
    for name, first in shares[0].items():
        whole = {part: torch.from_numpy(interleaved([share[name][part] for share in shares])) for part in first}
        error, positions = whole.pop("error"), whole.pop("positions")
        found[name] = Nats({part.removeprefix("term "): values for part, values in whole.items()}, error, positions)
    return found
