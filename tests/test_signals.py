"""Signals found the fast way: in chunks and pieces, without a copy of the logits, and equal to the plain formulas."""

from dataclasses import replace
from typing import Any, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cdlm.core.errors import CdlmError
from cdlm.core.types import Signals
from cdlm.halting.signals import (
    RECORDED,
    SIGNALS,
    SPATIAL,
    EmbeddingState,
    Past,
    StepStatistics,
    check_signals,
    chunk_maxima,
    first_past,
    most_likely,
    observe,
)

EVERYTHING = frozenset(SIGNALS)
VOCABULARIES = [1, 2, 7, 480, 2047, 2048, 2049, 5000]  # one chunk below 2048, and chunks of 64 from there on


def logits_of(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return 4 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def statistics(logits: Tensor, past: Past | None = None, needs: frozenset[str] = EVERYTHING) -> StepStatistics:
    """A look at these logits, all positions open, at a row's first step unless there is a past."""
    b, n = logits.shape[:2]
    z, open_ = torch.ones(b, n, 3, dtype=logits.dtype), torch.ones(b, n, dtype=torch.bool)
    step = torch.full((b,), int(past is not None))
    past = first_past(needs, z, None) if past is None else past
    space = EmbeddingState(z, torch.ones(b, dtype=torch.float64), 1.0, z + logits[..., :1])
    return StepStatistics(logits, open_, open_, step, past, needs, space)


def look(logits: Tensor, before: Tensor | None = None, needs: frozenset[str] = EVERYTHING) -> dict[str, Tensor]:
    past = None if before is None else observe(needs, statistics(before, None, needs))[1]
    return observe(needs, statistics(logits, past, needs))[0]


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_the_first_of_the_largest_is_found(vocabulary: int) -> None:
    levels = torch.randint(0, 3, (2, 40, vocabulary), generator=torch.Generator().manual_seed(0)).float()
    assert torch.equal(most_likely(levels), levels.argmax(-1))
    for place in {0, vocabulary // 2, vocabulary - 1}:
        single = torch.full((1, 3, vocabulary), -torch.inf)
        single[..., place] = -5.0
        assert (most_likely(single) == place).all()
    assert (most_likely(torch.zeros(2, 3, vocabulary)) == 0).all()


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_two_largest_are_found(vocabulary: int, dtype: torch.dtype) -> None:
    if vocabulary == 1:
        return
    rough = logits_of(2, 30, vocabulary, dtype=dtype).round()  # with equals, within chunks and across
    signals = look(rough)
    best = rough.topk(2, -1).values
    assert torch.equal(torch.stack([signals["top1"], signals["top2"]], -1), best)
    assert signals["top1"].dtype == dtype


def test_every_signal_has_the_type_that_steps_declare() -> None:
    declared = get_type_hints(Signals)
    assert set(declared) == set(SIGNALS)
    for name, value in look(logits_of(2, 5, 7), logits_of(2, 5, 7, seed=1)).items():
        assert isinstance(value, declared[name]), name


def test_what_recordings_hold_is_one_float32_a_row() -> None:
    signals = look(logits_of(2, 5, 7), logits_of(2, 5, 7, seed=1))
    assert RECORDED
    for name in RECORDED:
        assert signals[name].shape == (2,)
        assert signals[name].dtype == torch.float32


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_a_model_without_embeddings_has_all_but_the_spatial_signals(name: str) -> None:
    needs = frozenset({name})
    bare = replace(statistics(logits_of(2, 5, 7), needs=needs), embedding=None)
    if name in SPATIAL:
        with pytest.raises(AssertionError):
            observe(needs, bare)
        with pytest.raises(CdlmError, match=f"{name!r} describes a state in embedding space"):
            check_signals(needs, EVERYTHING - SPATIAL)
    else:
        assert set(observe(needs, bare)[0]) == check_signals(needs, EVERYTHING - SPATIAL) == needs


def test_a_nan_is_not_passed_over() -> None:
    for vocabulary in (480, 5000):
        logits = logits_of(1, 2, vocabulary)
        logits[0, 1, 300] = torch.nan
        assert most_likely(logits)[0, 1] == 300
        signals = look(logits)
        assert signals["entropy"][0].isnan().tolist() == [False, True]


@given(
    vocabulary=st.sampled_from(VOCABULARIES[1:]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([1e-3, 1.0, 10.0]),
    offset=st.sampled_from([-1e3, 0.0, 30.0]),
)
@settings(max_examples=25)
def test_sums_equal_the_plain_formulas(vocabulary: int, seed: int, scale: float, offset: float) -> None:
    now = scale * logits_of(2, 5, vocabulary, seed=seed) + offset
    before = now + 0.3 * logits_of(2, 5, vocabulary, seed=seed + 1)
    signals = look(now, before)
    p, q = now.double().log_softmax(-1), before.double().log_softmax(-1)
    expected = {
        "logsumexp": now.double().logsumexp(-1),
        "entropy": -(p.exp() * p).sum(-1),
        "mean_kl": (p.exp() * (p - q)).sum(-1).mean(1),
    }
    for name, value in expected.items():
        assert torch.allclose(signals[name].double(), value, rtol=2e-6, atol=2e-6), name


def test_a_certain_prediction_has_entropy_zero_to_six_digits() -> None:
    logits = logits_of(1, 4, 5000)
    logits[..., 77] = torch.tensor([20.0, 30.0, 60.0, 1e4])
    p = logits.double().log_softmax(-1)
    assert torch.allclose(look(logits)["entropy"].double(), -(p.exp() * p).sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocabulary", [480, 5000])
def test_tokens_that_are_ruled_out_change_nothing(vocabulary: int) -> None:
    now, before = logits_of(2, 6, vocabulary), logits_of(2, 6, vocabulary, seed=1)
    ruled_out = torch.full((2, 6, 70), -torch.inf)
    longer = look(torch.cat([now, ruled_out], -1), torch.cat([before, ruled_out], -1))
    short = look(now, before)
    for name in ("tokens", "top1", "top2", "logsumexp", "entropy", "mean_kl", "margin"):
        assert torch.allclose(longer[name].double(), short[name].double(), rtol=1e-5, atol=1e-6), name


def test_divergence_where_a_token_is_ruled_out_at_one_step() -> None:
    full = logits_of(1, 3, 50)
    less = full.index_fill(-1, torch.tensor([4]), -torch.inf)
    assert look(full, less)["mean_kl"].isposinf().all()
    left = -(1 - full.double().softmax(-1)[..., 4]).log()  # all other tokens gain the same factor
    assert torch.allclose(look(less, full)["mean_kl"].double(), left.mean(1), atol=1e-6)


def test_a_prediction_that_stays_has_no_divergence() -> None:
    logits = logits_of(2, 8, 3000)
    assert torch.equal(look(logits, logits.clone())["mean_kl"], torch.zeros(2))
    moved = look(logits + 2.0, logits)["mean_kl"]  # the same distribution
    assert (moved < 1e-6).all()
    assert (moved >= 0).all()
    assert look(logits)["mean_kl"].isposinf().all()


def test_what_else_is_asked_for_changes_no_signal() -> None:
    for vocabulary in (480, 2100):
        now, before = logits_of(2, 9, vocabulary), logits_of(2, 9, vocabulary, seed=1)
        together = look(now, before)
        for name in EVERYTHING:
            alone = look(now, before, frozenset({name}))[name]
            assert torch.equal(alone, together[name]), name


@pytest.mark.parametrize(("n", "vocabulary"), [(9, 5030), (64, 300), (7, 2049)])
def test_a_row_is_the_same_in_any_batch(n: int, vocabulary: int) -> None:
    now, before = logits_of(3, n, vocabulary), logits_of(3, n, vocabulary, seed=1)
    together = look(now, before)
    for row in range(3):
        alone = look(now[row : row + 1], before[row : row + 1])
        assert all(torch.equal(alone[name][0], together[name][row]) for name in EVERYTHING)


@given(
    vocabulary=st.sampled_from([480, 2048, 5000]), seed=st.integers(0, 99), scale=st.floats(0.1, 8.0),
    least=st.lists(st.floats(0.0, 1.1), min_size=3, max_size=3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_a_chance_is_exact_from_the_least_that_matters(
    vocabulary: int, seed: int, scale: float, least: list[float]
) -> None:
    logits, floor = scale * logits_of(3, 6, vocabulary, seed=seed), torch.tensor(least, dtype=torch.float64)
    over = torch.rand(3, 6, generator=torch.Generator().manual_seed(seed)) < 0.7
    plain, found = logits.softmax(-1).amax(-1), statistics(logits).chance_from(floor, over)
    sure = over & (plain > floor[:, None] + 1e-6)
    torch.testing.assert_close(found[sure], plain[sure], rtol=1e-5, atol=0)
    unsure = over & (plain < floor[:, None] - 1e-6)
    assert (found < floor[:, None])[unsure].all()
    assert (found[~over] == 0).all()
    alone = [statistics(logits[[i]]).chance_from(floor[[i]], over[[i]]) for i in range(3)]
    assert torch.equal(torch.cat(alone), found)


def test_a_nan_has_no_chance_and_what_is_ruled_out_none_of_its_own() -> None:
    logits = logits_of(1, 3, 4096)
    logits[0, 0, 5], logits[0, 1, 64:], logits[0, 2, :4000] = torch.nan, -torch.inf, -torch.inf
    found = statistics(logits).chance_from(torch.tensor([0.0]), torch.ones(1, 3, dtype=torch.bool))
    assert found[0, 0].isnan()
    torch.testing.assert_close(found[0, 1:], logits[0, 1:].softmax(-1).amax(-1))


def test_a_chance_that_cannot_be_large_costs_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise AssertionError("a sum over the vocabulary")

    monkeypatch.setattr("cdlm.halting.signals._sums", none)
    flat = statistics(logits_of(2, 5, 4096) / 10, needs=frozenset({"tokens"}))
    assert (flat.chance_from(torch.tensor([0.5, 0.9]), torch.ones(2, 5, dtype=torch.bool)) < 0.5).all()


def test_positions_of_a_view_are_read_where_they_lie() -> None:
    now, before = logits_of(2, 9, 2100)[:, 1:, 3:], logits_of(2, 9, 2100, seed=1)[:, 1:, 3:]
    there, copied = look(now, before), look(now.contiguous(), before.contiguous())
    assert all(torch.allclose(there[name], copied[name]) for name in EVERYTHING)


def test_peaks_are_maxima_of_consecutive_tokens() -> None:
    for vocabulary, width in ((480, 480), (2047, 2047), (2048, 64), (2049, 64), (5000, 64)):
        logits = logits_of(2, 3, vocabulary)
        parts = [part.amax(-1) for part in logits.split(width, -1)]
        assert torch.equal(chunk_maxima(logits), torch.stack(parts, -1))


class Largest(TorchDispatchMode):
    """Notes the bytes of the largest tensor made, views and what was there before left out."""

    def __init__(self, *there: Tensor):
        super().__init__()
        self.known, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in there}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("name", sorted(EVERYTHING))
def test_no_signal_copies_the_logits(name: str) -> None:
    needs = frozenset({name})
    now, before = torch.randn(8, 64, 9001), torch.randn(8, 64, 9001)
    first = statistics(before, None, needs)
    with Largest(now, before) as noted:
        _, past = observe(needs, first)
        observe(needs, statistics(now, past, needs))
    assert noted.bytes < now.nbytes / 16
    assert past.logits is None or past.logits is before
