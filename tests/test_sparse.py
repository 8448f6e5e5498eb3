"""Attention to the blocks that mattered: SparseD on our own masked models, LLaDA and Dream."""

import json
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign import TINY
from hypothesis import given
from hypothesis import strategies as st
from masked_toys import PLAIN, Toy, decoded
from setups import unmasking
from test_device_reads import Reads
from torch import Tensor
from torch.nn import functional as F

import cdlm
from cdlm.cli.main import main
from cdlm.core.errors import CdlmError
from cdlm.halting import JoT, Patience
from cdlm.masked.checkpoints.model import open_checkpoint
from cdlm.masked.model import Function, MaskedModel
from cdlm.masked.sampler import Unmasking, UnmaskingLoop
from cdlm.masked.sparse import Blocks, Kept, SparseAttention, SparseD, flexed, gathered, importance, strongest
from cdlm.masked.system import Masked
from cdlm.policies.adjust import Adjust
from cdlm.policies.confidence import Threshold
from cdlm.policies.core import CORE
from cdlm.policies.dream import Dream
from cdlm.policies.llada import LLaDA
from cdlm.sampling.requests import canvases
from cdlm.sampling.texts import Special

PROMPTS = [list(range(5, 25)), [3, 4, 5], [2, 8], [7, None, 9, 10, 11, 12, 13]]
# No empty one: of a canvas of masks alone our own network says the same everywhere, and rounding breaks the ties.
MODELS = ("own", "llada", "Dream")


def model_of(name: str) -> MaskedModel:
    if name in TINY:
        return open_checkpoint(TINY[name])
    torch.manual_seed(0)
    own = Masked(width=32, depth=3, heads=2, dim=16).build(61, Special(60)).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in own.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return own


@pytest.fixture(params=MODELS)
def model(request: Any) -> MaskedModel:
    return model_of(request.param)


def logits_of(model: MaskedModel, sparse: SparseD | None, **more: Any) -> dict[int, Any]:
    """All that happens to rows of several lengths, of which three are in flight at a time."""
    return decoded(model, unmasking(LLaDA(12), record=["logits"], sparse=sparse, **more), canvases(PROMPTS, 24), 3)


def real_of(number: int) -> Tensor:
    """Positions of a row behind its first: what shifted logits say of that is read at padding."""
    valid = canvases(PROMPTS, 24)[number].valid
    assert valid is not None
    return valid & (valid.cumsum(0) > 1)


def assert_close(rows: dict[int, Any], others: dict[int, Any]) -> None:
    assert rows.keys() == others.keys()
    for number, row in rows.items():
        assert row.result == others[number].result
        for one, other in zip(row.logits, others[number].logits, strict=True):
            real = real_of(number)
            torch.testing.assert_close(one[real], other[real], rtol=1e-4, atol=1e-4)


def test_without_sparse_steps_it_is_the_plain_run(model: MaskedModel) -> None:
    rows, plain = logits_of(model, SparseD(1.0, 0.1, 4)), logits_of(model, None)
    assert all(torch.equal(a, b) for i in rows for a, b in zip(rows[i].logits, plain[i].logits, strict=True))


@pytest.mark.parametrize("block", [4, 7, 128])
def test_all_blocks_are_the_plain_run(model: MaskedModel, block: int) -> None:
    assert_close(logits_of(model, SparseD(0.0, 1.0, block)), logits_of(model, None))


def test_few_blocks_are_another_run_from_the_step_after_they_are_measured(model: MaskedModel) -> None:
    sparse = SparseD(0.25, 0.1, 4)
    rows, plain = logits_of(model, sparse), logits_of(model, None)
    for number, row in rows.items():
        real, pairs = real_of(number), zip(row.logits, plain[number].logits, strict=True)
        same = [torch.allclose(a[real], b[real], atol=1e-4) for a, b in pairs]
        assert same[: sparse.measured_at(12) + 1] == [True] * 5
        assert not same[5]


@pytest.mark.parametrize(
    "more",
    [{}, {"cfg_scale": 1.0}, {"temperature": 0.7}, {"policy": Threshold(0.3, block=8)}, {"policy": Dream(9)},
     {"criterion": Patience(2)}, {"criterion": JoT()}, {"policy": CORE(12, every=3)}, {"policy": LLaDA(20, block=6)}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("name", MODELS)
def test_a_batch_is_its_rows_alone(name: str, more: dict[str, Any]) -> None:
    """Rows enter and leave at different steps, with padding before them in the batch and none alone."""
    model = model_of(name)
    changed: dict[str, Any] = {"policy": LLaDA(12), **more}
    setup = unmasking(**changed, sparse=SparseD(0.1, 0.3, 4))
    together = decoded(model, setup, canvases(PROMPTS, 24), 3)
    for request, prompt in zip(canvases(PROMPTS, 24), PROMPTS, strict=True):
        one = replace(canvases([prompt], 24)[0], index=request.index)
        alone = decoded(model, setup, [one], 1)[request.index]
        padding = len(request.tokens) - len(one.tokens)
        assert [canvas[padding:] for canvas in together[request.index].canvases] == alone.canvases
        assert together[request.index].nfe == alone.nfe


def test_a_layer_on_top_reads_sparse_states(tmp_path: Path) -> None:
    from test_adjust import layer_of, written

    model = model_of("own")
    policy = Adjust(written(tmp_path / "layer", model, layer_of(model)), 3)
    run = [decoded(model, unmasking(policy, sparse=SparseD(0.1, s, 4)), canvases(PROMPTS, 24), 3) for s in (0.2, 1.0)]
    plain = decoded(model, unmasking(policy), canvases(PROMPTS, 24), 3)
    assert [row.tokens for row in run[1].values()] == [row.tokens for row in plain.values()]
    assert [row.tokens for row in run[0].values()] != [row.tokens for row in plain.values()]


def test_the_pattern_of_a_small_matrix() -> None:
    """Two blocks of the prompt and three of what is generated, two positions each; a fifth of each part and one."""
    means = torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.5], [0.3, 0.1, 0.2, 0.3, 0.1], [0.0, 0.6, 0.0, 0.4, 0.0]])
    means = torch.cat([means, means[:2]])[None, None]
    kept = strongest(means, torch.tensor([[2, 3]]), torch.tensor([[1, 1]]), 2)
    assert kept.tolist() == [[[[1, 4], [0, 3], [1, 3], [1, 4], [0, 3]]]]
    one = SparseD(0.2, 0.2)
    assert [one.keeps(blocks) for blocks in (0, 1, 2, 4, 5, 10)] == [0, 1, 1, 1, 2, 3]
    assert [one.measured_at(steps) for steps in (1, 4, 5, 128)] == [1, 1, 2, 26]


def test_the_importance_of_a_small_attention() -> None:
    """Keys of e_1 and e_2; queries of ln 3 times one of them see one of the two three times as well."""
    one = torch.eye(2)
    k = torch.stack([one[0], one[0], one[1], one[1]])[None, None]
    q = torch.log(torch.tensor(3.0)) * torch.stack([one[0], one[1], one[1], one[1]])[None, None]
    whole = torch.ones(1, 4, dtype=torch.bool)
    # Weights of a query: 3/8 3/8 1/8 1/8, or 1/8 1/8 3/8 3/8.
    expected = torch.tensor([[[[0.25, 0.25], [0.125, 0.375]]]])
    torch.testing.assert_close(importance(q, k, whole, 2, 1.0), expected)
    # Without the last slot: 3/7 3/7 1/7, or 1/5 1/5 3/5, over the pairs that there are.
    torch.testing.assert_close(
        importance(q, k, whole & torch.tensor([[True, True, True, False]]), 2, 1.0),
        torch.tensor([[[[(3 / 7 + 1 / 5) / 2, (1 / 7 + 3 / 5) / 2], [1 / 5, 3 / 5]]]]),
    )


def attended(sparse: SparseD, blocks: Blocks, step: int, x: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Blocks]:
    rows = len(blocks.slot)
    with SparseAttention(sparse, blocks, [step] * rows, padded=False) as attention:
        out = F.scaled_dot_product_attention(*x)
    return out, attention.after()


@given(
    prompt=st.integers(0, 19),
    new=st.integers(1, 17),
    select=st.sampled_from([0.0, 0.2, 0.5, 0.9]),
    seed=st.integers(0, 9),
)
def test_attention_is_that_under_the_mask_of_its_definition(prompt: int, new: int, select: float, seed: int) -> None:
    """Written out position by position, with the paper's rule for the blocks."""
    n, size, noise = prompt + new, 4, torch.Generator().manual_seed(seed)
    sparse = SparseD(0.0, select, size)
    x: Any = tuple(torch.randn(1, 2, n, 8, generator=noise) for _ in range(3))
    real = torch.ones(1, n, dtype=torch.bool)
    blocks = sparse.lay_out(real, torch.tensor([prompt]), torch.tensor([n]), [10])
    _, blocks = attended(sparse, blocks, 1, x)
    out, _ = attended(sparse, blocks, 2, x)

    parts = [
        [list(range(n))[i : min(i + size, end)] for i in range(start, end, size)]
        for start, end in ((0, prompt), (prompt, n))
    ]
    weights, mask = (x[0] @ x[1].mT / 8**0.5).softmax(-1)[0], torch.zeros(2, n, n, dtype=torch.bool)
    kept_blocks = set()
    for head, queries in product(range(2), [block for part in parts for block in part]):
        count = 0
        for part in parts:
            means = [float(weights[head][queries][:, keys].mean()) for keys in part]
            keep = min(len(part), max(1, int(len(part) * select) + 1))
            best = sorted(range(len(part)), key=lambda i: -means[i])[:keep]
            count += len(best)
            for i in best:
                mask[head, torch.tensor(queries)[:, None], torch.tensor(part[i])] = True
        kept_blocks.add(count)
    total = sum(map(len, parts))
    assert min(kept_blocks) >= min(total, int(total * select) + 1)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*x, attn_mask=mask[None]), rtol=1e-4, atol=1e-5)


def test_grouped_heads_share_keys_and_keep_blocks_of_their_own() -> None:
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 32, 8, generator=noise) for heads in (4, 2, 2))
    sparse, real = SparseD(0.0, 0.3, 4), torch.ones(2, 32, dtype=torch.bool)
    fresh = sparse.lay_out(real, torch.tensor([20, 9]), torch.tensor([32, 32]), [10, 10])
    _, blocks = attended(sparse, fresh, 1, (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    wide, _ = attended(sparse, blocks, 2, (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    with SparseAttention(sparse, fresh, [1, 1], padded=False) as attention:
        F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert all(map(torch.equal, attention.after().patterns, blocks.patterns))
    with SparseAttention(sparse, blocks, [2, 2], padded=False):
        torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, enable_gqa=True), wide)


def test_a_decode_leaves_the_model_as_it_was(model: MaskedModel) -> None:
    plain = logits_of(model, None)
    setup = unmasking(LLaDA(12), sparse=SparseD(0.0, 0.1, 4))
    steps = UnmaskingLoop(model, *setup, 3).steps(canvases(PROMPTS, 24))
    for _ in range(4):  # and abandoned
        next(steps)
    again = logits_of(model, None)
    for rows in (again, logits_of(model, None)):
        assert all(torch.equal(a, b) for i in rows for a, b in zip(rows[i].logits, plain[i].logits, strict=True))


def test_a_call_that_raises_leaves_nothing() -> None:
    own, calls = model_of("own"), []

    def breaks(tokens: Tensor, valid: Tensor | None) -> Tensor:
        calls.append(tokens)
        if len(calls) == 4:
            raise KeyError("broken")
        return own.logits(tokens, valid)

    model = Function(breaks, own.constants)
    with pytest.raises(KeyError):
        decoded(model, unmasking(LLaDA(8), sparse=SparseD(0.0, 0.1, 4)), canvases([[1, 2]], 12), 1)
    q = torch.randn(1, 1, 6, 4)
    sdpa = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(sdpa, (q @ q.mT / 2).softmax(-1) @ q)
    assert decoded(model, unmasking(LLaDA(8)), canvases([[1, 2]], 12), 1)


def test_a_step_reads_once() -> None:
    model, setup = model_of("own"), unmasking(LLaDA(12), sparse=SparseD(0.1, 0.3, 4))
    loop = UnmaskingLoop(model, *setup, 3)
    live, counts = loop.admit(canvases(PROMPTS[:3], 24), None), []
    for _ in range(8):
        with Reads() as reads:
            live = loop.advance(loop.step(live)[1])
        counts.append(reads.count)
    assert counts == [1] * 8


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # of torch's own compiler
def test_flex_attention_is_the_gathered_one() -> None:
    """Compiled by the machine's own compiler, which takes half a minute."""
    if shutil.which("g++") is None:
        pytest.skip("flex attention needs a C++ compiler on a CPU")
    noise = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 64, 16, generator=noise) for _ in range(3))
    filled = torch.ones(2, 64, dtype=torch.bool)
    filled[1, 41:] = False
    blocks = torch.rand(2, 2, 4, 4, generator=noise).argsort(-1)[..., :3].int()
    blocks[1] = blocks[1].sort(-1).values.clamp(max=2)
    blocks[1, ..., 0], blocks[1, ..., 1] = 0, 2
    kept = Kept(blocks, torch.tensor([3, 2]), filled, False, 16)
    torch.testing.assert_close(flexed(q, k, v, kept, 0.25), gathered(q, k, v, kept, 0.25), rtol=1e-4, atol=1e-5)


def hidden_from(model: MaskedModel, sparse: SparseD) -> str:
    with pytest.raises(CdlmError) as caught:
        decoded(model, unmasking(LLaDA(6), sparse=sparse), canvases([[1, 2], [3]], 6), 2)
    return str(caught.value)


def test_models_that_attend_otherwise_are_refused() -> None:
    sparse, q = SparseD(0.0, 0.3, 4), torch.randn(2, 1, 8, 4)
    assert "attends without it" in hidden_from(Toy(), sparse)

    def attends(*tensors: Any, **more: Any) -> Function:
        def logits(tokens: Tensor, valid: Tensor | None) -> Tensor:
            F.scaled_dot_product_attention(*tensors, **more)
            return torch.zeros(*tokens.shape, 12)

        return Function(logits, PLAIN)

    assert "leave out sparse" in hidden_from(attends(q[:1], q[:1], q[:1]), sparse)
    assert "leave out sparse" in hidden_from(attends(q, q[:, :, :3], q[:, :, :3]), sparse)
    assert "hides some" in hidden_from(attends(q, q, q, is_causal=True), sparse)
    assert "hides some" in hidden_from(attends(q, q, q, torch.ones(8, 8, dtype=torch.bool)), sparse)
    times = iter(range(99))

    def more_and_more(tokens: Tensor, valid: Tensor | None) -> Tensor:
        for _ in range(next(times) + 1):
            F.scaled_dot_product_attention(q, q, q)
        return torch.zeros(*tokens.shape, 12)

    assert "as often" in hidden_from(Function(more_and_more, PLAIN), sparse)
    eager = open_checkpoint(TINY["llada"])
    eager.network.set_attn_implementation("eager")
    assert "sdpa" in hidden_from(eager, sparse)


@pytest.mark.parametrize("cache", ["prefix", "dual", "free"])
def test_a_cache_is_refused(cache: Any) -> None:
    with pytest.raises(CdlmError, match="leave out one"):
        Unmasking(LLaDA(8, block=4), cache=cache, sparse=SparseD())


@pytest.mark.parametrize(
    ("text", "said"),
    [("SparseD(1.5)", "skip"), ("SparseD(select=-1)", "select"), ("SparseD(block=0)", "block"),
     ("SparseD(kernel='mask')", "kernel"), ("SparseD(block=24, kernel='flex')", "multiple of 16"),
     ("Sparse()", "did you mean SparseD"), ("SparseD", None), ("SparseD(0.2, 0.5, block=32)", None)],
)  # fmt: skip
def test_settings_are_read_from_texts(text: str, said: str | None) -> None:
    if said is None:
        changed = Unmasking().with_flat(sparse=text)
        assert isinstance(changed.sparse, SparseD)
        assert Unmasking().with_flat(sparse=repr(changed.sparse)) == changed
        assert changed.settings["sparse"] == repr(changed.sparse)
        return
    with pytest.raises(CdlmError, match=said):
        Unmasking().with_flat(sparse=text)


def test_a_setting_of_the_command_line_and_of_python(tmp_path: Path) -> None:
    from foreign import copy_of, write_tokenizer

    folder = copy_of("llada", tmp_path / "model")
    write_tokenizer(folder, "llada")
    words = ["sample", str(folder), "--prompt", "the cat", "--n", "1", "--new-tokens", "16", "--quiet"]
    main([*words, "--sparse", "SparseD(0.1, 0.2, block=4)", "--out", str(tmp_path / "out.jsonl")])
    samples = cdlm.generate(cdlm.load(folder, device="cpu"), ["the cat"], new_tokens=16, sparse=SparseD(0.1, 0.2, 4))
    (line,) = map(json.loads, (tmp_path / "out.jsonl").read_text("utf-8").splitlines())
    assert line["text"] == samples.texts[0]
    assert samples.made_by is not None
    assert "sparse=SparseD(skip=0.1" in samples.made_by["sampling"]
