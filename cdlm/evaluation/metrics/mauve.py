"""MAUVE (arXiv 2102.01454): how close two sets of texts are, from features of a language model; 1 is the same set.

Computed by the package mauve-text, which is under the GPL and therefore optional. Its value moves with the number of
texts, the number of clusters, the scaling and the k-means seed, so all of these are fixed or reported, and the value
for real against real text says what can be reached.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType

import numpy as np
from jaxtyping import Float

from cdlm.core.errors import CdlmError

FEWEST_TEXTS = 20
"""Per side. With fewer, the two-cluster histograms say nothing; for two stable digits take thousands."""

PINNED: dict[str, float | int] = {
    "pca_max_data": -1,
    "kmeans_explained_var": 0.9,
    "kmeans_num_redo": 5,
    "kmeans_max_iter": 500,
    "divergence_curve_discretization_size": 25,
    "mauve_scaling_factor": 5,
}
"""Settings of mauve-text, its defaults when this was written; `num_buckets` is always a tenth of the texts a side."""


@dataclass(frozen=True)
class Mauve:
    """MAUVE in 0..1: mean and standard deviation over k-means seeds, with every setting that decides the number."""

    mean: float
    sd: float
    settings: dict[str, object]


def library() -> ModuleType:
    """The module of mauve-text; CdlmError with the way to install it when it is missing."""
    try:
        import mauve
    except ImportError as error:
        raise CdlmError(
            f"expected the package mauve-text (GPL-3, optional) for MAUVE, got: {error}; "
            "install it with `pip install 'cdlm[mauve]'` or leave MAUVE out"
        ) from error
    return mauve


def check(texts: int) -> None:
    """Raise if MAUVE of so many texts could not be computed here."""
    library()
    if texts < FEWEST_TEXTS:
        raise CdlmError(f"expected at least {FEWEST_TEXTS} texts a side for MAUVE, got {texts}; generate more texts")


def mauve(
    p_features: Float[np.ndarray, "m w"], q_features: Float[np.ndarray, "k w"], seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
) -> Mauve:
    """MAUVE between texts p and q from one feature row for each text, once for each k-means seed.

    Raises CdlmError unless both sides have the same number of texts, at least `FEWEST_TEXTS`: few texts push the value
    up, so different numbers do not compare.
    """
    texts = len(p_features)
    if texts != len(q_features):
        raise CdlmError(f"expected equally many texts on both sides of MAUVE, got {texts} and {len(q_features)}")
    check(texts)
    if not seeds:
        raise CdlmError("expected at least one k-means seed for MAUVE, got none")
    compute = library().compute_mauve
    with _quiet_and_single_threaded():
        values = [
            float(compute(p_features=p_features, q_features=q_features, seed=seed, **PINNED).mauve) for seed in seeds
        ]
    settings = {
        "library": f"mauve-text {metadata.version('mauve-text')}",
        "texts": texts,
        "clusters": max(2, round(texts / 10)),
        "seeds": list(seeds),
        **PINNED,
    }
    return Mauve(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else math.nan, settings)


def ceiling(features: Float[np.ndarray, "m w"], seeds: tuple[int, ...] = (1, 2, 3, 4, 5)) -> Mauve:
    """MAUVE of real text against real text: every other row against the rest.

    Compare it only with values for the same number of texts a side, half of `features`.
    """
    half = len(features) // 2
    return mauve(features[0 : 2 * half : 2], features[1 : 2 * half : 2], seeds)


@contextmanager
def _quiet_and_single_threaded() -> Iterator[None]:
    """Run faiss on one thread, and drop its remark about few points a cluster.

    One thread because two OpenMP libraries in a process crash on macOS, and because the order of sums then is fixed.
    The remark goes: a tenth as many clusters as texts a side is MAUVE's definition, and always fewer points than faiss
    would like. It is written by C++ to file descriptor 2, so that is where it must be caught; all else is passed on.
    """
    import faiss

    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            faiss.omp_set_num_threads(threads)
            caught.seek(0)
            for line in caught:
                if b"please provide at least" not in line:
                    sys.stderr.write(line.decode(errors="replace"))
