"""The token store and its rows: exact content, all or nothing on disk, refusal of anything else."""

import errno
import json
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.errors import CdlmError
from cdlm.data import store as store_module
from cdlm.data.sources import Source, Stories
from cdlm.data.store import DocumentRows, PackedRows, TokenStore, build_store
from cdlm.data.tokenizer import encode_batch, train_tokenizer

TOKENIZER = train_tokenizer(Stories(n=200).documents("train"), 300)


@dataclass(frozen=True)
class Texts(Source):
    """Documents given by a function, so that reading them can do things."""

    read: Callable[[], Iterator[str]]

    def documents(self, split):
        return self.read()

    def fingerprint(self):
        return "texts"


def made(documents: list[list[int]]) -> TokenStore:
    tokens = np.array([token for document in documents for token in document], dtype=np.uint16)
    offsets = np.cumsum([0, *map(len, documents)])
    return TokenStore(Path("nowhere"), tokens, offsets, eos_id=0, pad_id=1, key="key")


DOCUMENTS = st.lists(st.lists(st.integers(3, 9), max_size=6), min_size=1, max_size=12)


@given(DOCUMENTS, st.integers(1, 9))
def test_packed_rows_cut_the_joined_documents(documents, length):
    joined = [token for document in documents for token in [*document, 0]]
    if len(joined) < length:
        with pytest.raises(CdlmError, match=f"has {len(joined)} tokens .* fewer than one row of {length}"):
            PackedRows(made(documents), length)
        return
    rows = PackedRows(made(documents), length)
    assert len(rows) == len(joined) // length
    for i in range(len(rows)):
        assert rows[i].tokens.tolist() == joined[i * length : (i + 1) * length]
        assert rows[i].valid.all()
    assert rows[-1].tokens.tolist() == rows[len(rows) - 1].tokens.tolist()
    owners = [number for number, document in enumerate(documents) for _ in [*document, 0]]
    assert rows.documents().tolist() == owners[::length][: len(rows)]
    with pytest.raises(IndexError):
        rows[len(rows)]


@given(DOCUMENTS, st.integers(1, 9))
def test_document_rows_end_with_eos_and_padding(documents, length):
    rows = DocumentRows(made(documents), length)
    assert len(rows) == len(documents)
    assert rows.documents().tolist() == list(range(len(documents)))
    for row, document in zip((rows[i] for i in range(len(rows))), documents, strict=True):
        expected = [*document, 0][:length]
        assert row.tokens[row.valid].tolist() == expected
        assert row.valid.tolist() == [True] * len(expected) + [False] * (length - len(expected))
        assert (row.tokens[~row.valid] == 1).all()


@pytest.mark.parametrize("kind", [PackedRows, DocumentRows])
def test_rows_are_told_apart(kind):
    store = made([[3, 4, 5]])
    assert kind(store, 2).key != kind(store, 3).key
    assert PackedRows(store, 2).key != DocumentRows(store, 2).key
    with pytest.raises(CdlmError, match="length"):
        kind(store, 0)


def test_a_store_holds_every_document(tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK", 7)
    source = Stories(n=50)
    store = build_store(source, "train", TOKENIZER, tmp_path)
    documents = list(source.documents("train"))
    assert len(store) == 50
    assert store.tokens.dtype == np.uint16
    assert isinstance(store.tokens, np.memmap)
    for i, ids in enumerate(encode_batch(TOKENIZER, documents)):
        assert store.tokens[store.offsets[i] : store.offsets[i + 1]].tolist() == ids
    assert (store.eos_id, store.pad_id) == (0, 1)
    assert sorted(file.name for file in store.path.iterdir()) == ["meta.json", "offsets.npy", "tokens.npy"]


def test_a_store_is_built_once(tmp_path):
    read = []

    def documents():
        read.append(1)
        yield "Anna went."

    first = build_store(Texts(documents), "train", TOKENIZER, tmp_path)
    again = build_store(Texts(documents), "train", TOKENIZER, tmp_path)
    assert len(read) == 1
    assert first.key == again.key
    assert first.tokens.tolist() == again.tokens.tolist()


def test_everything_the_tokens_depend_on_is_in_the_key(tmp_path):
    other = train_tokenizer(Stories(n=200).documents("train"), 301)
    keys = {
        build_store(source, split, tokenizer, tmp_path).key
        for source in (Stories(n=20), Stories(n=20, seed=1))
        for split in ("train", "valid")
        for tokenizer in (TOKENIZER, other)
    }
    assert len(keys) == len(list(tmp_path.iterdir())) == 8


def test_large_vocabularies_take_four_bytes(tmp_path):
    large = train_tokenizer(Stories(n=200).documents("train"), 300)
    large.add_tokens([f"<{i}>" for i in range(2**16)])
    store = build_store(Texts(lambda: iter(["Anna <65535> went"])), "train", large, tmp_path)
    assert store.tokens.dtype == np.uint32
    assert max(store.tokens) == 300 + 65535
    assert large.decode(store.tokens.tolist()) == "Anna <65535> went"


def test_a_store_travels_as_a_path(tmp_path):
    store = build_store(Stories(n=500), "train", TOKENIZER, tmp_path)
    rows = PackedRows(store, 8)
    packed = pickle.dumps(rows)
    assert len(packed) < 2000
    assert pickle.loads(packed)[3].tokens.tolist() == rows[3].tokens.tolist()


def unfinished(tmp_path: Path) -> list[str]:
    return os.listdir(tmp_path)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_build_leaves_nothing(tmp_path, error):
    def documents():
        yield from ["one"] * 3000
        raise error

    with pytest.raises(error):
        build_store(Texts(documents), "train", TOKENIZER, tmp_path)
    assert unfinished(tmp_path) == []


def test_a_full_disk_names_the_folder_and_leaves_nothing(tmp_path, monkeypatch):
    def full(file, values):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store_module, "_append", full)
    with pytest.raises(CdlmError, match=r"no space left .* bytes are free") as error:
        build_store(Stories(n=20), "train", TOKENIZER, tmp_path)
    assert str(tmp_path) in str(error.value)
    assert unfinished(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CdlmError, match="cannot write"):
        build_store(Stories(n=20), "train", TOKENIZER, tmp_path / "file" / "cache")


def test_two_builders_of_the_same_store_both_end_with_it(tmp_path):
    def slow():
        yield "one"
        quick = build_store(Texts(lambda: iter(["one", "two"])), "train", TOKENIZER, tmp_path)  # overtakes
        assert len(quick) == 2
        yield "two"

    store = build_store(Texts(slow), "train", TOKENIZER, tmp_path)
    assert len(store) == 2
    assert unfinished(tmp_path) == [store.path.name]


def test_no_text_is_no_store(tmp_path):
    with pytest.raises(CdlmError, match="no text"):
        build_store(Texts(lambda: iter([])), "train", TOKENIZER, tmp_path)
    assert unfinished(tmp_path) == []


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    silent = train_tokenizer(Stories(n=200).documents("train"), 300)
    silent.eos_token = None
    with pytest.raises(CdlmError, match="end-of-text"):
        build_store(Stories(n=20), "train", silent, tmp_path)
    assert unfinished(tmp_path) == []


@pytest.mark.parametrize(("text", "share"), [("abc " * 300, 0), ("abc " * 49 + "xyz xyz", 4), ("xyz", 100)])
def test_text_that_the_tokenizer_does_not_know_is_warned_of_or_refused(text, share, tmp_path, monkeypatch):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    said = []
    monkeypatch.setattr(store_module, "announce", said.append)
    words = Tokenizer(models.WordLevel({"<eos>": 0, "<unk>": 1, "abc": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", unk_token="<unk>")
    if share == 100:
        with pytest.raises(CdlmError, match="100% of the train split's tokens are unknown"):
            build_store(Texts(lambda: iter([text])), "train", tokenizer, tmp_path)
        assert unfinished(tmp_path) == []
        return
    for _ in range(2):
        build_store(Texts(lambda: iter([text])), "train", tokenizer, tmp_path)
    assert [line.split(" of ")[0] for line in said] == ([] if share == 0 else 2 * [f"warning: {share}%"])


def altered(folder: Path, name: str, value: object) -> None:
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, name: value}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / "tokens.npy"),
        lambda folder: cut(folder / "offsets.npy"),
        lambda folder: cut(folder / "meta.json"),
        lambda folder: (folder / "meta.json").unlink(),
        lambda folder: (folder / "meta.json").write_text("[]"),
        lambda folder: (folder / "meta.json").write_text('{"format": 1}'),
        lambda folder: np.save(folder / "tokens.npy", np.arange(5, dtype=np.uint16)),
        lambda folder: np.save(folder / "offsets.npy", np.array([0, 1])),
        lambda folder: (folder / "tokens.npy").write_bytes(b""),
        lambda folder: np.save(folder / "offsets.npy", np.load(folder / "offsets.npy")[::-1]),
        lambda folder: np.save(folder / "offsets.npy", np.load(folder / "offsets.npy") * 2),
        lambda folder: np.save(folder / "offsets.npy", np.load(folder / "offsets.npy").astype(float)),
        lambda folder: np.save(folder / "tokens.npy", np.load(folder / "tokens.npy").astype(float)),
        lambda folder: np.save(folder / "tokens.npy", np.load(folder / "tokens.npy").astype(object), allow_pickle=True),
        *(
            lambda folder, name=name, value=value: altered(folder, name, value)
            for name, values in {
                "eos_id": [300, -1, 0.0, "0", None, True],
                "pad_id": [10**30, []],
                "key": ["0" * 64, 5],
                "documents": [0, 19, 2**70],
                "unknown": [-1, 10**9],
                "split": ["test"],
                "offsets": ["", None],
                "format": [1, "2"],
                "vocab": [0],
            }.items()
            for value in values
        ),
    ],
)
def test_damaged_and_foreign_folders_are_refused(tmp_path, damage):
    store = build_store(Stories(n=20), "train", TOKENIZER, tmp_path)
    damage(store.path)
    with pytest.raises(CdlmError, match="not a complete token store") as error:
        TokenStore.open(store.path)
    assert "\n" not in str(error.value)


def test_tokens_beyond_the_vocabulary_are_refused_where_they_are_read(tmp_path):
    store = build_store(Stories(n=20), "train", TOKENIZER, tmp_path)
    tokens = np.load(store.path / "tokens.npy")
    tokens[3] = 300
    np.save(store.path / "tokens.npy", tokens)
    for rows in (PackedRows, DocumentRows):
        with pytest.raises(CdlmError, match="beyond its vocabulary; delete the folder"):
            rows(TokenStore.open(store.path), 8)[0]


def test_old_formats_are_refused(tmp_path, monkeypatch):
    store = build_store(Stories(n=20), "train", TOKENIZER, tmp_path)
    monkeypatch.setattr(store_module, "_FORMAT", 99)
    with pytest.raises(CdlmError, match="not a complete token store"):
        TokenStore.open(store.path)
