"""The order of rows and the loader: permutations, exact resuming, ranks that share, workers that change nothing."""

from collections import Counter
from dataclasses import replace
from itertools import islice, permutations

import lightning
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from cdlm.core.errors import CdlmError
from cdlm.data.order import Order, RowLoader, fixed_batches
from cdlm.data.store import Row, TextRows


class Numbered(TextRows):
    """Row i holds i in every position; its last position is padding."""

    def __init__(self, count: int) -> None:
        self.count, self.length, self.key = count, 3, "numbered"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Row:
        return Row(np.full(3, index, dtype=np.int64), np.array([True, True, False]))


def taken(loader: RowLoader, batches: int) -> list[list[int]]:
    return [batch.tokens[:, 0].tolist() for batch in islice(loader, batches)]


@given(n_rows=st.integers(1, 200), seed=st.integers(-(2**70), 2**70), epoch=st.integers(0, 2**30))
def test_each_epoch_is_a_permutation(n_rows, seed, epoch):
    order = Order(n_rows, seed)
    positions = np.arange(epoch * n_rows, (epoch + 1) * n_rows)
    assert sorted(order.rows(positions).tolist()) == list(range(n_rows))


@given(n_rows=st.integers(1, 2**40), seed=st.integers(0, 2**64), position=st.integers(0, 2**62))
def test_one_row_equals_many(n_rows, seed, position):
    order = Order(n_rows, seed)
    row = order.row(position)
    assert 0 <= row < n_rows
    assert order.rows(np.array([0, position, 1]))[1] == row


@pytest.mark.parametrize("n_rows", [2, 3, 4])
def test_permutations_of_a_few_rows_are_equally_likely(n_rows):
    found = Counter()
    for seed in range(6):
        rows = Order(n_rows, seed).rows(np.arange(1500 * n_rows)).reshape(1500, n_rows)
        found.update(map(tuple, rows.tolist()))
    assert chisquare([found[p] for p in permutations(range(n_rows))]).pvalue > 1e-4


@pytest.mark.parametrize("n_rows", [32, 61])
def test_every_row_is_equally_likely_at_every_place_and_after_every_row(n_rows):
    epochs = 400 * n_rows
    rows = Order(n_rows, 3).rows(np.arange(epochs * n_rows)).reshape(epochs, n_rows)
    assert chisquare(np.bincount(rows[:, 0], minlength=n_rows)).pvalue > 1e-4
    assert chisquare(np.bincount(rows[:, n_rows // 2], minlength=n_rows)).pvalue > 1e-4
    step = (rows[:, 7] - rows[:, 6]) % n_rows
    assert chisquare(np.bincount(step, minlength=n_rows)[1:]).pvalue > 1e-4


def test_seeds_and_epochs_give_other_orders():
    first = Order(1000, 0).rows(np.arange(2000))
    other = Order(1000, 1).rows(np.arange(1000))
    assert (first[:1000] == first[1000:]).mean() < 0.01
    assert (first[:1000] == other).mean() < 0.01
    assert Order(1000, 0).rows(np.arange(2000)).tolist() == first.tolist()


def test_the_order_does_not_change_between_releases():
    assert Order(10, 0).rows(np.arange(20)).tolist() == [0, 4, 6, 8, 1, 5, 3, 9, 2, 7, 4, 2, 5, 3, 7, 9, 8, 0, 1, 6]


@settings(max_examples=50)
@given(
    count=st.integers(1, 40),
    size=st.integers(1, 7),
    world=st.integers(1, 3),
    before=st.integers(0, 12),
    after=st.integers(1, 12),
)
def test_resuming_continues_as_if_never_stopped(count, size, world, before, after):
    for rank in range(world):
        whole = taken(RowLoader(Numbered(count), size, 5, rank, world), before + after)
        stopped = RowLoader(Numbered(count), size, 5, rank, world)
        first = taken(stopped, before)
        state = stopped.state_dict()
        assert state == {"batches": before}
        resumed = RowLoader(Numbered(count), size, 5, rank, world)
        resumed.load_state_dict(state)
        assert first + taken(resumed, after) == whole
        assert taken(stopped, after) == whole[before:]  # a second look at the same loader continues too


@given(count=st.integers(1, 60), size=st.integers(1, 5), world=st.integers(1, 4))
def test_ranks_share_the_stream_of_one_process(count, size, world):
    alone = taken(RowLoader(Numbered(count), size * world, 9), 6)
    ranks = [taken(RowLoader(Numbered(count), size, 9, rank, world), 6) for rank in range(world)]
    together = [[rank[step][i] for i in range(size) for rank in ranks] for step in range(6)]
    assert together == alone


def test_an_epoch_over_all_ranks_sees_every_row_once():
    ranks = [taken(RowLoader(Numbered(24), 4, 0, rank, 2), 3) for rank in range(2)]
    rows = [row for rank in ranks for batch in rank for row in batch]
    assert sorted(rows) == list(range(24))


def test_workers_change_neither_order_nor_state_nor_the_global_generator():
    alone = taken(RowLoader(Numbered(17), 4, 2), 9)
    before = torch.get_rng_state()
    loader = RowLoader(Numbered(17), 4, 2, workers=2)
    first = taken(loader, 4)
    assert loader.state_dict() == {"batches": 4}  # although more were read ahead
    resumed = RowLoader(Numbered(17), 4, 2, workers=1)
    resumed.load_state_dict(loader.state_dict())
    assert first + taken(resumed, 5) == alone
    assert torch.equal(before, torch.get_rng_state())


def test_batches_hold_tokens_and_validity():
    batch = next(iter(RowLoader(Numbered(5), 2, 0)))
    assert batch.valid is not None
    assert batch.tokens.dtype == torch.int64
    assert batch.tokens.shape == batch.valid.shape == (2, 3)
    assert batch.valid.tolist() == batch.target.tolist() == [[True, True, False]] * 2
    assert len(batch) == 2


def test_a_masked_batch_has_the_target_of_the_law_and_everything_else_as_before():
    def law(tokens, valid, generator):
        return valid & (torch.rand(tokens.shape, generator=generator) < 0.5)

    batch, u = next(iter(RowLoader(Numbered(50), 20, 0))), torch.linspace(0, 1, 20)
    noise = torch.Generator().manual_seed(7)
    masked = batch.masked(law, noise, u)
    assert masked.tokens is batch.tokens
    assert masked.valid is batch.valid
    assert masked.generator is noise
    assert masked.u is u
    assert batch.valid is not None
    assert torch.equal(masked.target, law(batch.tokens, batch.valid, torch.Generator().manual_seed(7)))
    bare = replace(batch, valid=None).masked(lambda tokens, valid, generator: valid, noise)
    assert bare.valid is None
    assert bool(bare.target.all())
    there = masked.to("meta")
    assert {x.device.type for x in (there.tokens, there.valid, there.target, there.u) if x is not None} == {"meta"}


@given(count=st.integers(1, 30), size=st.integers(1, 8), limit=st.none() | st.integers(1, 40))
def test_fixed_batches_are_every_row_once_in_order_each_time(count, size, limit):
    batches = fixed_batches(Numbered(count), size, limit)
    expected = list(range(count if limit is None else min(limit, count)))
    for _ in range(2):
        read = [batch.tokens[:, 0].tolist() for batch in batches]
        assert [row for batch in read for row in batch] == expected
        assert all(len(batch) == size for batch in read[:-1])
        assert len(batches) == len(read)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Order(0, 0),
        lambda: RowLoader(Numbered(3), 0, 0),
        lambda: RowLoader(Numbered(3), 1, 0, rank=2, world=2),
        lambda: fixed_batches(Numbered(3), 0),
        lambda: fixed_batches(Numbered(3), 1, 0),
    ],
)
def test_impossible_settings_are_refused(make):
    with pytest.raises(CdlmError):
        make()


class Witness(lightning.LightningModule):
    """Learns nothing and remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def training_step(self, batch, index):
        self.seen.append(batch.tokens[:, 0].tolist())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(steps: int, folder, resume: bool) -> list[list[int]]:
    witness = Witness()
    trainer = lightning.Trainer(
        max_steps=steps,
        limit_train_batches=5,  # an epoch for Lightning; the loader's go on underneath
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    path = folder / "last.ckpt"
    trainer.fit(witness, RowLoader(Numbered(10), 3, 0), ckpt_path=path if resume else None, weights_only=True)
    trainer.save_checkpoint(path)
    return witness.seen


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # lightning's way of asking torch
@pytest.mark.parametrize("stop", [3, 5, 7])
def test_lightning_resumes_in_the_middle_of_an_epoch(tmp_path, stop):
    expected = taken(RowLoader(Numbered(10), 3, 0), 12)
    assert fit(stop, tmp_path, resume=False) == expected[:stop]
    assert fit(12, tmp_path, resume=True) == expected[stop:]
