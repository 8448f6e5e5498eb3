"""Texts of any origin: what a file knows is read, what it does not know stays blank, and what is wrong is one line."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from evaluation_toys import judge_on
from hypothesis import given
from hypothesis import strategies as st

from cdlm.core.errors import CdlmError
from cdlm.data.sources import Files, Stories
from cdlm.data.store import DocumentRows, PackedRows, TextRows, TokenStore, build_store
from cdlm.data.tokenizer import encode_batch
from cdlm.evaluation.evaluate import Distances, evaluate_files
from cdlm.evaluation.judge import Judge
from cdlm.evaluation.small_judge import SmallJudge
from cdlm.evaluation.texts import LONGEST, REAL, Entry, Part, RealText, _draw, read_texts
from cdlm.sampling.texts import text_ids

TEXTS = ["the cat sat.", "a dog, and a cat", "mice"]
SAMPLE: dict[str, Any] = {
    "text": "the cat sat.", "tokens": [5, 3, 3], "nfe": 7, "steps": 7, "budget": 10, "reason": "criterion",
    "seed": 1, "index": 0, "sampling": "Diffusion(steps=10)", "given": [[0, 3]],
    "generated": [[1, 3]], "length": 3, "halt": "Patience(2)", "answer": "3",
}  # fmt: skip


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as the kind of file that the name ends in; lists in a CSV are JSON."""
    if path.suffix == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: json.dumps(v) if isinstance(v, list) else v for k, v in row.items()} for row in rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".parquet"])
def test_texts_alone_are_read_from_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    found = read_texts(written(tmp_path / f"a{kind}", [{"text": text} for text in TEXTS]))
    assert found == [Entry(text) for text in TEXTS]


@pytest.mark.parametrize("kind", [".jsonl", ".csv", ".parquet"])
def test_all_that_a_sample_knows_is_read(kind: str, tmp_path: Path) -> None:
    (found,) = read_texts(written(tmp_path / f"a{kind}", [SAMPLE]))
    known = {name: value for name, value in SAMPLE.items() if name != "steps"}
    assert found == Entry(**{**known, "given": [(0, 3)], "generated": [(1, 3)]})


def test_fields_that_others_use_for_other_things_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "index": "a-7", "seed": 1.5, "sampling": {"top_p": 0.9}}\n')
    assert read_texts(tmp_path / "a.jsonl") == [Entry("one")]


def test_other_fields_and_blank_lines_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one", "id": {"deep": [1]}}\n\n{"text": ""}\n{"text": null}\n')
    assert [entry.text for entry in read_texts(tmp_path / "a.jsonl")] == ["one", "", ""]
    (tmp_path / "b.txt").write_bytes("one\r\n\n  \ntwo und drölf".encode())
    assert [entry.text for entry in read_texts(tmp_path / "b.txt")] == ["one", "two und drölf"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "cannot read samples from"),
        ("a.json", "[]", "expected one of .jsonl, .txt, .csv, .parquet, got '.json'"),
        ("a", "x", "got 'no ending'"),
        ("a.txt", "", "holds no texts"),
        ("a.txt", "\n \n", "holds no texts"),
        ("a.jsonl", "", "holds no texts"),
        ("a.csv", "", "expected a column 'text', found []"),
        ("a.csv", "text\n", "holds no texts"),
        ("a.csv", "story\nthe cat\n", "expected a column 'text', found ['story']"),
        ("a.csv", "text,nfe\nx,many\n", "line 2: expected whole number or nothing, got text in 'nfe'"),
        ("a.csv", 'text,given\nx,"[(0, 1)]"\n', "line 2: expected list or nothing, got text in 'given'"),
        ("a.parquet", "PAR", "not a valid parquet file"),
        ("a.jsonl", "{", "line 1: expected one JSON object a line"),
        ("a.jsonl", "[1]", "line 1: expected an object"),
        ("a.jsonl", '{"text": "a"}\n{"story": "b"}', "line 2: expected a field 'text', found ['story']"),
        ("a.jsonl", '{"text": 7}', "line 1: expected text in the field 'text', got int"),
        ("a.jsonl", '{"text": "a", "tokens": ["a"]}', "line 1: expected whole number, got text in 'tokens[0]'"),
        ("a.jsonl", '{"text": "a", "tokens": [-1]}', "expected whole number >= 0 in 'tokens[0]'"),
        ("a.jsonl", '{"text": "a", "tokens": [[1]]}', "expected whole number, got list in 'tokens[0]'"),
        ("a.jsonl", '{"text": "a", "tokens": 5}', "in 'tokens'"),
        ("a.jsonl", '{"text": "a", "tokens": [2147483648]}', "in 'tokens[0]'"),
        ("a.jsonl", '{"text": "a", "nfe": NaN}', "in 'nfe'"),
        ("a.jsonl", '{"text": "a", "nfe": -1}', "expected whole number >= 0 in 'nfe'"),
        ("a.jsonl", '{"text": "a", "given": [[0, 999999]]}', "given: expected spans that rise to 1 at most"),
        ("a.jsonl", '{"text": "abcdefghijkl", "given": [[9, 1]]}', "given: expected spans that rise"),
        ("a.jsonl", '{"text": "abcdefghijkl", "given": [[0, 9], [2, 12]]}', "given: expected spans that rise"),
        ("a.jsonl", '{"text": "a", "tokens": [1], "generated": [[0, 2]]}', "generated: expected spans that rise to 1"),
        ("a.jsonl", '{"text": "a", "tokens": [1, 2], "length": 1}', "expected at least its 2 tokens, got 1"),
        ("a.jsonl", '{"text": "a", "given": [[0]]}', "expected list of length 2, got 1 in 'given[0]'"),
        ("a.jsonl", '{"text": "a", "nfe": true}', "expected whole number or nothing, got truth in 'nfe'"),
        ("a.jsonl", '{"text": "a", "budget": 1.5}', "expected whole number or nothing, got number in 'budget'"),
    ],
)
def test_what_is_no_text_is_refused_in_one_line(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(CdlmError) as caught:
        read_texts(tmp_path / name)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv"])
def test_text_that_is_not_utf8_is_refused(kind: str, tmp_path: Path) -> None:
    (tmp_path / f"a{kind}").write_bytes("café\n".encode("latin-1"))
    with pytest.raises(CdlmError, match="UTF-8"):
        read_texts(tmp_path / f"a{kind}")


# --- beside real text ---


def held_out(folder: Path, packed: bool = True, unread: bool = False) -> RealText:
    """Real text of a small file; its training text may be what nobody read."""
    (folder / "text.txt").write_text("\n".join(toys.TEXT) + "\n")
    source = Files((str(folder / "text.txt"),), valid_fraction=0.5)
    valid, train = (
        (PackedRows if packed else DocumentRows)(build_store(source, split, toys.tokenizer(), folder / "tokens"), 16)
        for split in ("valid", "train")
    )
    return RealText(valid, train if unread else None, toys.tokenizer(), source)


def rows_of(sizes: list[int], length: int = 4) -> PackedRows:
    """Packed rows of documents with so many tokens, EOS included."""
    offsets = np.cumsum([0, *(size - 1 for size in sizes)])
    tokens = np.full(offsets[-1], 3, dtype=np.uint16)
    return PackedRows(TokenStore(Path("nowhere"), tokens, offsets, eos_id=0, pad_id=1, key="key"), length)


def real_of(rows: PackedRows) -> RealText:
    return RealText(rows, None, toys.tokenizer(), Files(("nowhere",)))


def test_texts_without_tokens_get_those_of_the_tokenizer(tmp_path: Path) -> None:
    dog = [*map(ord, "a dog")]  # of no use to the model, and its tokens all the same: pieces are not joined
    own = [encode_batch(toys.tokenizer(), [letter])[0][0] for letter in map(chr, dog)]
    corpus = held_out(tmp_path).samples("mixed", [Entry("the cat"), Entry("a dog", own), Entry("the mat")])
    expected = encode_batch(toys.tokenizer(), ["the cat", "the mat"])
    assert corpus.tokens == [expected[0], own, expected[1]]
    assert corpus.texts == ["the cat", "a dog", "the mat"]
    assert corpus.foreign


@pytest.mark.parametrize("tokens", [[len(toys.tokenizer())], [3, 4], [], [2**31 - 1]], ids=str)
def test_tokens_that_say_another_text_are_of_another_tokenizer(tokens: list[int], tmp_path: Path) -> None:
    held = held_out(tmp_path)
    (expected,) = encode_batch(toys.tokenizer(), ["the cat"])
    corpus = held.samples("foreign", [Entry("the cat", tokens, generated=[(0, 1)], length=9, nfe=4)])
    assert (corpus.tokens, corpus.generated, corpus.foreign) == ([expected], None, True)
    assert (corpus.lengths, corpus.nfe) == ([9], [4])
    assert not held.samples("own", [Entry("the cat", expected)]).foreign


def test_the_share_of_right_answers_is_known_where_all_texts_have_a_problem(tmp_path: Path) -> None:
    held = held_out(tmp_path)
    solved, wrong = Entry("1 + 2 = 3. #### 3", answer="3"), Entry("1 + 2 = 4. #### 4", answer="3")
    assert held.samples("problems", [solved, wrong]).extra["right"] == 0.5
    assert "right" not in held.samples("texts", [solved, Entry("a")]).extra


def test_what_any_text_does_not_know_is_blank(tmp_path: Path) -> None:
    known = Entry("a", [1], [(0, 1)], nfe=4, budget=10, reason="criterion")
    held = held_out(tmp_path)
    full = held.samples("full", [known, Entry("b", [2], [], nfe=8, budget=12, reason="budget")])
    assert (full.nfe, dict(full.extra)) == ([4, 8], {"steps": 12, "halted": 0.5})
    partly = held.samples("partly", [known, Entry("b")])
    assert (partly.nfe, dict(partly.extra)) == (None, {"steps": None, "halted": None})
    assert partly.given == [[(0, 1)], []]


def test_a_corpus_is_the_text_of_its_rows(tmp_path: Path) -> None:
    real = held_out(tmp_path, unread=True)
    parts: dict[Part, TextRows] = {"held out": real.held_out, "like training": real.reference}
    for part, rows in parts.items():
        corpus = real.corpus(part, 3, seed=1)
        numbers = real.sample(rows, 3, seed=1)
        assert corpus.tokens == [rows[number].tokens.tolist() for number in numbers]
        assert corpus.texts == [real.decode(ids) for ids in corpus.tokens]
        assert corpus.serial
        assert not real.samples("s", [Entry("a")]).serial
        assert corpus.name == REAL[part]


def test_samples_are_compared_with_text_like_the_training_text_if_there_is_any(tmp_path: Path) -> None:
    both, one = held_out(tmp_path, unread=True), held_out(tmp_path)
    assert both.reference is both.unread
    assert one.reference is one.held_out
    assert (both.reference_part, one.reference_part) == ("like training", "held out")
    with pytest.raises(CdlmError, match="unread_share above 0"):
        one.corpus("like training", 1)


SIZES = st.lists(st.integers(1, 60), min_size=30, max_size=60)


@given(SIZES, st.integers(0, 3), st.data())
def test_a_sample_holds_documents_whole(sizes: list[int], seed: int, data: st.DataObject) -> None:
    rows = rows_of([*sizes, 4])
    count = data.draw(st.integers(1, len(rows)))
    taken = real_of(rows).sample(rows, count, seed)
    assert taken == sorted(set(taken))
    assert len(taken) == count
    assert 0 <= taken[0] <= taken[-1] < len(rows)
    assert taken == real_of(rows).sample(rows, count, seed)
    documents = rows.documents()
    cut = [d for d in set(documents[taken]) if not set(np.flatnonzero(documents == d)) <= set(taken)]
    assert sum((documents == d).sum() <= LONGEST for d in cut) <= 1
    assert set(real_of(rows).sample(rows, max(1, count // 2), seed)) <= set(taken)


@given(SIZES, st.integers(0, 3))
def test_the_sides_of_a_split_share_no_document(sizes: list[int], seed: int) -> None:
    rows = rows_of([*sizes, 4])
    real = real_of(rows)
    documents = rows.documents()
    for left, right in (_draw(rows, (real.most, real.most), (seed, number)) for number in (1, 2)):
        assert len(left) == len(right) == real.most
        assert not set(left) & set(right)
        shared = set(documents[left]) & set(documents[right])
        assert all((documents == document).sum() > LONGEST for document in shared)
    assert len(rows) // 2 - LONGEST <= real.most <= len(rows) // 2


def test_a_sorted_file_is_sampled_from_everywhere() -> None:
    """Rows 0..99 of 1,000 stand for the first tenth alone; a sample of 100 has about ten of each tenth."""
    rows = rows_of([4] * 1000)
    drawn = np.array([np.bincount(np.array(real_of(rows).sample(rows, 100, seed)) // 100) for seed in range(20)])
    assert np.abs(drawn.mean(0) - 10).max() < 3
    assert len({tuple(line) for line in drawn}) > 1


def test_a_long_document_counts_as_several() -> None:
    rows = rows_of([4000])
    real = real_of(rows)
    taken = np.array(real.sample(rows, 200, seed=0))
    assert len({number // LONGEST for number in taken}) == 200 // LONGEST
    assert np.diff(np.unique(taken // 100, return_counts=True)[0]).max() <= 2
    assert real.most == (1000 - LONGEST + 1) // 2


def test_splits_of_real_text_are_of_equal_sides(tmp_path: Path) -> None:
    real = held_out(tmp_path, packed=False, unread=True)
    splits = real.splits(real.most, times=3, seed=1)
    assert len({tuple(left.texts) for left, _ in splits}) == 3
    for left, right in splits:
        assert (left.name, right.name) == (REAL["like training"],) * 2
        assert len(left.texts) == len(right.texts) == real.most == len(real.reference) // 2
        assert left.serial
        assert right.serial
    again = real.splits(real.most, times=2, seed=1)
    assert [left.texts for left, _ in again] == [left.texts for left, _ in splits[:2]]


@pytest.mark.parametrize("count", [0, 1000])
def test_more_rows_than_there_are_are_refused(count: int, tmp_path: Path) -> None:
    real = held_out(tmp_path)
    with pytest.raises(CdlmError, match=f"expected 1 to {len(real.held_out)} rows of real text.*got {count}"):
        real.corpus("held out", count)
    with pytest.raises(CdlmError, match=f"two sides of {count} rows.*enough for {real.most} a side"):
        real.splits(count)


def test_rows_of_documents_end_before_their_end_of_text_token(tmp_path: Path) -> None:
    held = held_out(tmp_path, packed=False)
    assert held.eos_id == toys.tokenizer().eos_token_id
    real = held.corpus("held out", 2)
    assert all(held.eos_id not in ids for ids in real.tokens)
    assert all(text in toys.TEXT or len(ids) == 16 for text, ids in zip(real.texts, real.tokens, strict=True))


def test_text_ends_at_its_first_end_token() -> None:
    assert text_ids([4, 0, 5, 0], 0) == [4]
    assert text_ids([4, 0, 5, 0], 0, with_end=True) == [4, 0]
    assert text_ids([4, 0], None) == [4, 0]
    assert text_ids([4, 5], 0) == [4, 5]


def test_stories_have_a_measure_of_their_own() -> None:
    (story,) = Stories(1).documents("train")
    assert Stories().measures([f"x.\n{story}", f"x.\n{story} The cat flew to the moon."]) == {"grammar": 8 / 9}
    assert Files(("x",)).measures(["x"]) == {}


def test_a_judge_is_opened_only_when_the_sizes_fit(tmp_path: Path) -> None:
    opened = []

    def judge(device: str) -> Judge:
        opened.append(device)
        return judge_on(device)

    held = held_out(tmp_path)
    with pytest.raises(CdlmError, match="rows of real text"):
        evaluate_files({"many": [Entry("a")] * 999}, held, [judge], distances=Distances(splits=0))
    assert not opened
    table = evaluate_files({"plain": [Entry("the cat"), Entry("a dog")]}, held, [judge], distances=Distances(splits=0))
    assert opened == ["cpu"]
    row = table.rows[0]
    assert (row["mean_nfe"], row["steps"], row["halted"]) == (None, None, None)
    assert row["ar_nll"] is not None
    first, second = table.terminal().split("\n\n")[:2]
    assert first.splitlines()[2].split()[-1] == "-"  # calls
    assert second.splitlines()[2].split()[-2:] == ["-", "-"]  # steps and halted


def test_the_small_judge_reads_line_breaks_where_documents_end(tmp_path: Path) -> None:
    held = held_out(tmp_path)
    (newline,) = encode_batch(toys.tokenizer(), ["\n"])
    rows = SmallJudge(held.held_out, held.tokenizer, 3, tmp_path).batches()
    batches = [next(rows) for _ in range(20)]  # more than the text holds: it has no end
    assert all(batch.shape == (3, 16) for batch in batches)
    seen = {token for batch in batches for token in batch.flatten().tolist()}
    assert held.tokenizer.eos_token_id not in seen
    assert set(newline) <= seen


def test_the_small_judge_reads_a_small_text_no_more_often_than_16_times(tmp_path: Path) -> None:
    held = held_out(tmp_path)
    rows = len(held.held_out)
    small, large = (SmallJudge(held.held_out, held.tokenizer, size, tmp_path) for size in (3, 10**6))
    assert 16 * rows <= small.taken * 3 < 16 * rows + 3
    assert large.taken == 1
    assert SmallJudge(held.held_out, held.tokenizer, 3, tmp_path, small.taken).key == small.key
    assert SmallJudge(held.held_out, held.tokenizer, 3, tmp_path, 600).taken == 600


def test_a_large_text_gets_the_most_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = held_out(tmp_path)
    monkeypatch.setattr(type(held.held_out), "__len__", lambda _: 10**6)
    assert SmallJudge(held.held_out, held.tokenizer, 48, tmp_path).taken == 500


@pytest.mark.slow
def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    texts = {"plain": [Entry(text) for text in TEXTS]}
    held = held_out(tmp_path)
    one, two = (evaluate_files(texts, held, [judge_on], distances=Distances(splits=0), devices=n) for n in (1, 2))
    for row, other in zip(one.rows, two.rows, strict=True):
        assert row["judge_tokens"] == other["judge_tokens"]
        assert row["ar_nll"] == pytest.approx(other["ar_nll"], rel=1e-5)  # other batches, other rounding
        assert row["ar_nll_ci"] == pytest.approx(other["ar_nll_ci"], rel=1e-5)
