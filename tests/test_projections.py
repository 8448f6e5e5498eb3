"""Laws of the projections: what a nucleus holds, and what each makes of the logits."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle, draws
from scipy.stats import chisquare
from torch import Tensor
from toys import lively

from cdlm.continuous.projections import PROJECTIONS, Drawn, Expectation, Greedy, MultiHot, Projection, Uneven, nucleus
from cdlm.continuous.system import EmbeddingDiffusion
from cdlm.continuous.systems.ssd import SSD
from cdlm.core.errors import CdlmError
from cdlm.core.rng import StepNoise

V, K = 6, 5.0
WITH_TOP_P = (Drawn, MultiHot, Uneven)
ALL = (Expectation(), Greedy(), Drawn(0.7), Drawn(), MultiHot(0.7), Uneven(0.7))
shares = st.floats(0, 1)


def simplex() -> EmbeddingDiffusion:
    """On its simplex a state says which tokens it is made of."""
    with torch.random.fork_rng(devices=[]):
        return SSD(width=8, depth=1, heads=2, dim=4, k=K).build(V).double()


SYSTEM = simplex()


def some(rows: int = 2, places: int = 5, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Logits."""
    return scale * torch.randn(rows, places, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights(state: Tensor) -> Tensor:
    """0 to 1 for each token of a state on the simplex."""
    return (state / K + 1) / 2


# --- the nucleus ---


@settings(max_examples=60)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 9), top_p=shares, more=shares)
def test_a_nucleus_is_the_fewest_tokens_that_reach_its_mass(seed: int, scale: float, top_p: float, more: float) -> None:
    logits = some(scale=scale, seed=seed)
    p, kept = logits.softmax(-1), nucleus(logits, top_p)
    assert kept.any(-1).all()
    assert kept.gather(-1, logits.argmax(-1, keepdim=True)).all()
    inside, outside = torch.where(kept, p, torch.inf).amin(-1), torch.where(kept, 0, p).amax(-1)
    assert (inside >= outside).all()  # no token is left out for a less likely one
    last = torch.where(kept, p, torch.inf).amin(-1)
    mass = torch.where(kept, p, 0).sum(-1)
    assert ((mass - last < top_p + 1e-12) | (kept.sum(-1) == 1)).all()  # less before each of them
    assert ((mass >= top_p - 1e-12) | kept.all(-1)).all()  # and enough in all
    assert (nucleus(logits, max(top_p, more)) >= nucleus(logits, min(top_p, more))).all()


def test_nuclei_at_the_ends() -> None:
    logits = some()
    assert (nucleus(logits, 0.0).sum(-1) == 1).all()
    assert nucleus(logits, 1.0).all()
    even = torch.zeros(1, 1, V, dtype=torch.float64)
    assert int(nucleus(even, 0.0).sum()) == 1  # of equals, one
    assert int(nucleus(even, 0.5).sum()) == 3
    ruled_out = even.masked_fill(torch.arange(V) > 1, -torch.inf)
    assert nucleus(ruled_out, 0.9).tolist() == [[[True, True, False, False, False, False]]]


@pytest.mark.parametrize("kind", WITH_TOP_P)
@pytest.mark.parametrize("top_p", [-0.1, 1.1, math.nan, math.inf])
def test_a_mass_that_is_none_is_refused(kind: type, top_p: float) -> None:
    with pytest.raises(CdlmError, match=r"0 <= top_p <= 1"):
        kind(top_p)


# --- each projection ---


@pytest.mark.parametrize("seed", [0, 1])
def test_the_expectation_is_the_mean_embedding(seed: int) -> None:
    for system in (lively(vocab=V, seed=seed), SYSTEM):
        logits = some(seed=seed)
        wanted = logits.softmax(-1) @ system.embedding.table()
        torch.testing.assert_close(Expectation()(system, logits, draws(2)), wanted)


@pytest.mark.parametrize("kind", WITH_TOP_P)
def test_no_mass_is_greedy(kind: type) -> None:
    logits = some()
    greedy = Greedy()(SYSTEM, logits, draws(2))
    assert torch.equal(greedy, SYSTEM.embed(logits.argmax(-1)))
    torch.testing.assert_close(kind(0.0)(SYSTEM, logits, draws(2)), greedy)


@given(seed=st.integers(0, 1000), top_p=shares)
@settings(max_examples=25)
def test_what_each_makes_of_the_nucleus(seed: int, top_p: float) -> None:
    logits = some(seed=seed, scale=5.0)
    kept = nucleus(logits, top_p)
    multi, uneven, drawn = (weights(kind(top_p)(SYSTEM, logits, draws(2))) for kind in (MultiHot, Uneven, Drawn))
    torch.testing.assert_close(multi, kept.double())
    gap = logits.amax(-1, keepdim=True) - logits
    torch.testing.assert_close(uneven, (1 - gap / (2 * K)).clamp(min=0) * kept)
    assert (drawn > 0.5).sum(-1).eq(1).all()
    assert ((drawn < 0.5) | kept).all()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_tokens_are_drawn_as_often_as_they_are_likely(top_p: float) -> None:
    places = 20_000
    logits = torch.tensor([2.0, 1.5, 0.5, 0.0, -1.0, -6.0], dtype=torch.float64)
    state = Drawn(top_p)(SYSTEM, logits.expand(1, places, V).contiguous(), draws())
    seen = state.argmax(-1).flatten().bincount(minlength=V)
    p = torch.where(nucleus(logits[None, None], top_p)[0, 0], logits.softmax(-1), 0)
    allowed = p > 0
    assert not seen[~allowed].any()
    expected = (p / p.sum() * places)[allowed]
    assert chisquare(seen[allowed].numpy(), expected.numpy()).pvalue > 1e-4  # the seed is fixed


def test_places_steps_samples_and_seeds_draw_apart() -> None:
    logits = torch.zeros(2, 40, V, dtype=torch.float64)
    first = Drawn()(SYSTEM, logits, draws(2)).argmax(-1)
    assert not torch.equal(first[0], first[1])
    assert len(set(first[0].tolist())) > 1
    assert not torch.equal(first, Drawn()(SYSTEM, logits, draws(2, step=1)).argmax(-1))
    assert not torch.equal(first, Drawn()(SYSTEM, logits, StepNoise(1, range(2), [0, 0])).argmax(-1))


@pytest.mark.parametrize("projection", ALL, ids=repr)
def test_rows_do_not_depend_on_the_batch(projection: Projection) -> None:
    logits = some(rows=4)
    for denoiser in (SYSTEM, Oracle(vocab=V)):
        whole = projection(denoiser, logits, draws(4))
        for rows in ([2], [3, 0]):
            index = torch.tensor(rows)
            part = projection(denoiser, logits[index], StepNoise(0, index.tolist(), [0] * len(index)))
            assert torch.equal(part, whole[index])


@pytest.mark.parametrize("projection", ALL, ids=repr)
def test_a_certain_prediction_is_its_embedding(projection: Projection) -> None:
    tokens = torch.arange(V)[None]
    logits = 1e3 * torch.nn.functional.one_hot(tokens, V).double()
    for denoiser in (SYSTEM, Oracle(vocab=V)):
        torch.testing.assert_close(projection(denoiser, logits, draws()), denoiser.embed(tokens))


@pytest.mark.parametrize("projection", ALL, ids=repr)
def test_the_text_of_a_projection_is_its_constructor(projection: Projection) -> None:
    assert PROJECTIONS.parse(repr(projection)) == projection
