"""The Fréchet distance between two sets of texts, by the means and covariances of their features."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

from cdlm.core.errors import CdlmError

WIDEST = 128
"""Wider features are projected to so many dimensions: a covariance needs more texts than dimensions."""


def frechet(p: Float[np.ndarray, "m w"], q: Float[np.ndarray, "k w"]) -> float:
    """Squared Fréchet distance between the Gaussians with the means and covariances of two sets of vectors (Dowson and
    Landau, 1982): |m_p - m_q|^2 + tr(C_p + C_q - 2 (C_p C_q)^(1/2)).

    Few vectors push it up, so compare values of equally many only, beside that of real text against real text.

    Raises:
        CdlmError: a side has fewer than two vectors.
    """
    if min(len(p), len(q)) < 2:
        raise CdlmError(f"a Fréchet distance needs two texts a side or more, got {len(p)} and {len(q)}")
    p, q = (np.asarray(side, dtype=np.float64) for side in (p, q))
    cp, cq = (np.atleast_2d(np.cov(side, rowvar=False)) for side in (p, q))
    values, vectors = np.linalg.eigh(cp)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cq @ root).clip(min=0)).sum()  # C_p C_q has the same eigenvalues
    return max(0.0, float(((p.mean(0) - q.mean(0)) ** 2).sum() + np.trace(cp) + np.trace(cq) - 2 * cross))


def relative_frechet(p: Float[np.ndarray, "m w"], q: Float[np.ndarray, "k w"]) -> float:
    """`frechet` over the total variance of q, of features as wide as they are or projected to `WIDEST` dimensions.

    So its unit does not depend on that of the features: 1 is as far as q itself is spread. NaN if q has no spread.
    """
    width = p.shape[1]
    if width > WIDEST:
        project = np.random.default_rng(0).normal(size=(width, WIDEST)) / math.sqrt(WIDEST)
        p, q = p @ project, q @ project
    spread = float(np.var(np.asarray(q, dtype=np.float64), axis=0, ddof=1).sum())
    return frechet(p, q) / spread if spread > 0 else math.nan
