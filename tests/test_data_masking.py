"""Masking laws: never on padding, never empty, and exactly the distributions they state."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cdlm.core.errors import CdlmError
from cdlm.data.masking import Block, Completion, Masking, Mixture, Prefix, RandomSubset, Span, Unconditional
from cdlm.data.tokenizer import encode_batch, train_tokenizer

TOKENIZER = train_tokenizer(["one\n\ntwo three"], 261)  # bytes, and two merges
NEWLINE = encode_batch(TOKENIZER, ["\n"])[0][0]


def mixed() -> Mixture:
    """Prefix or random subset, half and half: the law CDCD found best (arXiv 2211.15089, section 6)."""
    return Mixture(((0.5, Prefix()), (0.5, RandomSubset())))


FREE = [Prefix(), RandomSubset(), Span(), Span(max_spans=2, unconditional=0.0), Unconditional(), mixed()]
FREE += [Block(3), Block(4, beginning=0.0), Block(1, beginning=1.0)]
LAWS = [*FREE, Completion().bind(TOKENIZER), Mixture(((1.0, Completion()), (1.0, Prefix()))).bind(TOKENIZER)]
P = 1e-4  # seeds are fixed, so a law that passes once passes always


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens_like(valid: torch.Tensor, seed: int = 3) -> torch.Tensor:
    """Random tokens, one in four a line break."""
    return NEWLINE + torch.randint(0, 4, valid.shape, generator=generator(seed))


def draw(law: Masking, length: int, rows: int = 20000, pad: int = 0, seed: int = 1) -> torch.Tensor:
    valid = torch.arange(length + pad).expand(rows, -1) < length
    return law(tokens_like(valid), valid, generator(seed))[:, :length]


def completion(row: list[int], valid: list[bool] | None = None) -> list[bool]:
    """The mask that Completion draws for one row."""
    tokens = torch.tensor([row])
    known = torch.tensor([valid or [True] * len(row)])
    return Completion().bind(TOKENIZER)(tokens, known, generator())[0].tolist()


def assert_law(observed: torch.Tensor, expected: dict[int, float]) -> None:
    """The observed values follow the expected probabilities, and no other value occurs."""
    values, counts = np.unique(observed.numpy(), return_counts=True)
    assert set(values) <= set(expected)
    found = dict(zip(values.tolist(), counts.tolist(), strict=True))
    frequencies = [found.get(value, 0) for value in expected]
    assert chisquare(frequencies, [len(observed) * p for p in expected.values()]).pvalue > P


def code(mask: torch.Tensor) -> torch.Tensor:
    """Each row of a mask as a binary number."""
    return (mask.long() << torch.arange(mask.shape[1])).sum(1)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=8), pad=st.integers(0, 3), seed=st.integers(0, 2**32))
def test_never_on_padding_never_empty_and_repeatable(law, lengths, pad, seed):
    valid = torch.arange(max(lengths) + pad) < torch.tensor(lengths)[:, None]
    tokens = tokens_like(valid, seed)
    mask = law(tokens, valid, generator(seed))
    assert not (mask & ~valid).any()
    assert mask.any(1).all()
    assert torch.equal(mask, law(tokens, valid, generator(seed)))


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_valid_positions_need_not_be_on_the_left(law):
    valid = torch.rand(500, 9, generator=generator()) < 0.6
    valid[:, 4] = True
    mask = law(tokens_like(valid), valid, generator())
    assert not (mask & ~valid).any()
    assert mask.any(1).all()


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_the_global_generator_is_left_alone(law):
    before = torch.get_rng_state()
    draw(law, 7, rows=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("pad", [0, 3])
def test_prefix_length_is_uniform(pad):
    mask = draw(Prefix(), 10, pad=pad)
    assert_law(10 - mask.sum(1), dict.fromkeys(range(10), 0.1))
    assert (mask[:, 1:] >= mask[:, :-1]).all()  # given positions come first


@pytest.mark.parametrize("pad", [0, 3])
def test_random_subset_is_uniform_given_its_uniform_size(pad):
    length = 5
    by_size = [list(combinations(range(length), clean)) for clean in range(length)]
    everything = (1 << length) - 1
    expected = {
        everything - sum(1 << i for i in clean): 1 / length / len(subsets) for subsets in by_size for clean in subsets
    }
    assert_law(code(draw(RandomSubset(), length, pad=pad)), expected)


def span_law(length: int, max_spans: int) -> dict[int, float]:
    """Every mask's probability, by listing all cut points."""
    expected: dict[int, float] = {}
    most = min(max_spans, (length + 1) // 2)
    for spans in range(1, most + 1):
        cuts = list(combinations(range(length + 1), 2 * spans))
        for cut in cuts:
            mask = sum(1 << i for a, b in list(pairwise(cut))[::2] for i in range(a, b))
            expected[mask] = expected.get(mask, 0.0) + 1 / most / len(cuts)
    return expected


@pytest.mark.parametrize(("length", "max_spans"), [(5, 2), (6, 5), (2, 5), (7, 1)])
def test_spans_follow_the_cut_points(length, max_spans):
    law = Span(max_spans=max_spans, unconditional=0.0)
    assert_law(code(draw(law, length, pad=2)), span_law(length, max_spans))


def test_spans_are_sometimes_everything():
    length, share = 6, 0.25
    everything = (1 << length) - 1
    expected = {mask: (1 - share) * p for mask, p in span_law(length, 5).items()}
    expected[everything] += share
    assert_law(code(draw(Span(unconditional=share), length)), expected)


def test_number_of_spans_on_long_rows_is_uniform():
    mask = draw(Span(max_spans=5, unconditional=0.0), 64).long()
    starts = (torch.diff(mask, dim=1, prepend=torch.zeros_like(mask[:, :1])) == 1).sum(1)
    assert_law(starts, dict.fromkeys(range(1, 6), 0.2))
    share = sum(k * 66 / ((2 * k + 1) * 64) for k in range(1, 6)) / 5
    assert abs(mask.float().mean() - share) < 0.005


def test_unconditional_is_every_valid_position():
    assert draw(Unconditional(), 4, rows=2, pad=1).all()


def test_a_law_says_which_blocks_it_teaches():
    assert {law: law.blocks for law in (Prefix(), Span(), Unconditional())} == dict.fromkeys(
        (Prefix(), Span(), Unconditional()), frozenset()
    )
    assert Block(3).blocks == {3}
    nested = Mixture(((1.0, Mixture(((1.0, Block(25)), (2.0, Prefix())))), (3.0, Block(4))))
    assert nested.blocks == nested.bind(TOKENIZER).blocks == {25, 4}


def test_mixture_chooses_a_law_for_each_row():
    class Last(Masking):
        def __call__(self, tokens, valid, generator):
            return torch.arange(valid.shape[1]).expand_as(valid) == valid.shape[1] - 1

    mask = draw(Mixture(((3.0, Last()), (1.0, Unconditional()))), 4)
    assert_law(mask.sum(1), {1: 0.75, 4: 0.25})


def test_mixed_is_half_prefix_half_subset():
    length = 3
    prefix = {code(torch.arange(length)[None] >= k).item(): 1 / length for k in range(length)}
    by_size = [[sum(1 << i for i in noisy) for noisy in combinations(range(length), n)] for n in range(1, length + 1)]
    subset = {mask: 1 / length / len(masks) for masks in by_size for mask in masks}
    assert_law(code(draw(mixed(), length)), {mask: 0.5 * p + 0.5 * prefix.get(mask, 0) for mask, p in subset.items()})


def context_of(mask: torch.Tensor) -> torch.Tensor:
    """Positions before the first one to generate."""
    return mask.long().argmax(1)


@pytest.mark.parametrize("pad", [0, 3])
@pytest.mark.parametrize(("length", "size"), [(9, 3), (9, 7), (6, 1)])
def test_a_block_follows_a_context_of_uniform_length(length, size, pad):
    mask = draw(Block(size, beginning=0.0), length, pad=pad)
    contexts = range(1, length - size + 1)
    assert_law(context_of(mask), dict.fromkeys(contexts, 1 / len(contexts)))
    place = torch.arange(length) - context_of(mask)[:, None]
    assert torch.equal(mask, (place >= 0) & (place < size))  # so many positions, next to each other


def test_a_share_of_the_blocks_has_no_context():
    mask = draw(Block(3, beginning=0.25), 8)
    assert_law(context_of(mask), {0: 0.25, **dict.fromkeys(range(1, 6), 0.15)})
    assert (mask.sum(1) == 3).all()
    assert not context_of(draw(Block(3, beginning=1.0), 8)).any()


@pytest.mark.parametrize("beginning", [0.0, 0.5])
def test_a_row_that_is_no_longer_than_the_block_is_generated_whole(beginning):
    for length in (1, 4, 5):
        assert draw(Block(5, beginning=beginning), length, rows=200, pad=2).all()
    assert draw(Block(5, beginning=0.0), 6, rows=50).tolist() == [[False] + [True] * 5] * 50


def test_a_block_is_counted_over_valid_positions():
    valid = torch.tensor([[True, False, True, True, False, True, True]]).expand(400, -1)
    mask = Block(2, beginning=0.0)(tokens_like(valid), valid, generator())
    assert {tuple(row.nonzero().flatten().tolist()) for row in mask} == {(2, 3), (3, 5), (5, 6)}


def test_completion_is_all_after_the_first_separator():
    a, b = NEWLINE + 1, NEWLINE + 2
    assert completion([a, b, NEWLINE, a, NEWLINE, b]) == [False, False, False, True, True, True]
    assert completion([NEWLINE, a, a]) == [False, True, True]
    assert completion([a, NEWLINE, b, a], [True, True, True, False]) == [False, False, True, False]


def test_completion_counts_separators_on_valid_positions_only():
    a = NEWLINE + 1
    assert completion([NEWLINE, a, NEWLINE, a], [False, True, True, True]) == [False, False, False, True]


def test_a_row_with_nothing_after_a_separator_is_generated_whole():
    a = NEWLINE + 1
    assert completion([a, a, a]) == [True, True, True]
    assert completion([a, a, NEWLINE]) == [True, True, True]
    assert completion([a, NEWLINE, a], [True, True, False]) == [True, True, False]
    assert completion([NEWLINE, a], [False, False]) == [False, False]


def test_completion_of_tokenised_text():
    text = "one two\nthree\none"
    ids = encode_batch(TOKENIZER, [text])[0]
    generated = [token for token, chosen in zip(ids, completion(ids), strict=True) if chosen]
    assert TOKENIZER.decode(generated) == "three\none"


def test_completion_is_bound_to_a_tokenizer_first():
    valid = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(CdlmError, match=r"\.bind\(tokenizer\)"):
        Completion()(tokens_like(valid), valid, generator())
    with pytest.raises(CdlmError, match=r"\.bind\(tokenizer\)"):
        Mixture(((1.0, Completion()),))(tokens_like(valid), valid, generator())


@pytest.mark.parametrize("separator", ["", "three"])
def test_a_separator_is_one_token(separator):
    for law in (Completion(separator), Mixture(((1.0, Completion(separator)),))):
        with pytest.raises(CdlmError, match="separator of one token"):
            law.bind(TOKENIZER)


def test_another_separator():
    ids = encode_batch(TOKENIZER, ["one=two"])[0]
    law = Completion("=").bind(TOKENIZER)
    mask = law(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.bool), generator())[0]
    assert TOKENIZER.decode(torch.tensor(ids)[mask]) == "two"


@pytest.mark.parametrize("law", FREE, ids=repr)
def test_a_law_that_looks_at_no_token_needs_no_tokenizer(law):
    assert law.bind(TOKENIZER) == law
    valid = torch.arange(9) < torch.tensor([3, 9])[:, None]
    assert torch.equal(*(law(tokens_like(valid, seed), valid, generator()) for seed in (1, 2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Span(max_spans=0),
        lambda: Span(unconditional=1.5),
        lambda: Block(0),
        lambda: Block(beginning=-0.1),
        lambda: Block(beginning=float("nan")),
        lambda: Mixture(()),
        lambda: Mixture(((0.0, Prefix()),)),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(CdlmError):
        make()
