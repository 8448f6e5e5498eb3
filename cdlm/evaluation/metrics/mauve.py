"""MAUVE (arXiv 2102.01454): how close two sets of texts are, from features of the texts; 1 is the same set.

Computed by the package mauve-text, which is under the GPL and therefore optional. Its value moves with the features,
the number of texts, the number of clusters, the scaling and the k-means seed, so all of these are fixed or reported,
and the value of real text against real text says what can be reached.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from importlib.util import find_spec
from types import ModuleType

import numpy as np
from jaxtyping import Float

from cdlm.core.errors import CdlmError

FEWEST_TEXTS = 20
"""Per side. With fewer, the two-cluster histograms say nothing."""
ENOUGH_TEXTS = 500
"""Per side. With fewer, every set looks closer to real text than it is; for two stable digits take thousands."""

PINNED: dict[str, float | int] = {
    "pca_max_data": -1,
    "kmeans_explained_var": 0.9,
    "kmeans_num_redo": 5,
    "kmeans_max_iter": 500,
    "divergence_curve_discretization_size": 25,
    "mauve_scaling_factor": 5,
}
"""Settings of mauve-text, its defaults when this was written; `num_buckets` is always a tenth of the texts a side."""


def is_installed() -> bool:
    """Whether mauve-text is there; nothing is imported."""
    return find_spec("mauve") is not None


def library() -> ModuleType:
    """The module of mauve-text; CdlmError with the way to install it when it is missing."""
    try:
        import mauve
    except ImportError as error:
        raise CdlmError(
            f"expected the package mauve-text (GPL-3, optional) for MAUVE, got: {error}; "
            "install it with `pip install 'cdlm[mauve]'` or leave MAUVE out (--no-mauve)"
        ) from error
    return mauve


def check(texts: int) -> None:
    """Raise if MAUVE of so many texts could not be computed here."""
    library()
    if texts < FEWEST_TEXTS:
        raise CdlmError(f"expected at least {FEWEST_TEXTS} texts a side for MAUVE, got {texts}; generate more texts")


def mauve(p: Float[np.ndarray, "m w"], q: Float[np.ndarray, "k w"], seed: int = 1) -> float:
    """MAUVE in 0..1 between texts p and q, from one vector for each text.

    Args:
        seed: of k-means.

    Raises:
        CdlmError: the sides have unequally many texts, for few texts push the value up, or fewer than `FEWEST_TEXTS`.
    """
    texts = len(p)
    if texts != len(q):
        raise CdlmError(f"expected equally many texts on both sides of MAUVE, got {texts} and {len(q)}")
    check(texts)
    with _quiet_and_single_threaded():
        return float(library().compute_mauve(p_features=p, q_features=q, seed=seed, **PINNED).mauve)


def settings(texts: int) -> dict[str, object]:
    """All that decides the value besides texts, features and seed."""
    version = metadata.version("mauve-text")
    return {"library": f"mauve-text {version}", "clusters": max(2, round(texts / 10)), **PINNED}


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
