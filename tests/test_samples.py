"""Laws of what a run returns: a sequence of samples that can be shown, put into a table and written to a file."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from masked_toys import EOS, EOT, Toy
from pyarrow import parquet
from toys import with_tokenizer

import cdlm
from cdlm.core.errors import CdlmError
from cdlm.core.types import HaltReason
from cdlm.sampling.samples import Samples

FIELDS = ("tokens", "nfe", "steps", "index", "given", "valid", "shown", "settled")
LISTS = ("texts", "reason", "spans", "prompts")
PROMPTS = ["the [2] sat", 'a "cat", a dog;\nand a 猫', "the"]


@pytest.fixture(scope="module")
def samples() -> Samples:
    return cdlm.generate(with_tokenizer(length=24), PROMPTS, n=2, steps=4, seed=5, halt="Patience(2)", record=True)


@pytest.fixture(scope="module")
def wordless() -> Samples:
    """Of a model without a tokenizer."""
    return cdlm.decode(Toy(), [[3, 4], [5]], 6, n=2)


# --- what was made, and what it cost ---


def counted(samples: Samples, i: int, ends: tuple[int, ...]) -> int:
    """Output tokens of a sample, one by one."""
    made, last = 0, max(np.flatnonzero(samples.given[i] & samples.valid[i]), default=-1)
    for place in np.flatnonzero(samples.valid[i] & ~samples.given[i]).tolist():
        made += 1
        if samples.tokens[i, place] in ends and place > last:
            break
    return made


def test_output_tokens_are_those_up_to_the_first_end_and_with_it(samples: Samples, wordless: Samples) -> None:
    ending = cdlm.decode(Toy(), [[3, 4], [5], [6, None, EOS]], 9, n=3, temperature=1.0)
    assert {int(made) for made in ending.output_tokens} > {1}
    assert not ending.shown.all()
    for some, ends in ((samples, ()), (wordless, (EOS, EOT)), (ending, (EOS, EOT))):
        assert some.output_tokens.tolist() == [counted(some, i, ends) for i in range(len(some))]
        assert some.tpf == some.output_tokens.sum() / some.nfe.sum()


def test_tokens_per_forward_are_a_ratio_of_sums() -> None:
    ending = cdlm.decode(Toy(), [[3, 4], [5]], 9, n=3, temperature=1.0, policy="Threshold(0.5)")
    parts = ending[:1], ending[1:]
    made, calls = (sum(getattr(part, name).sum() for part in parts) for name in ("output_tokens", "nfe"))
    assert ending.tpf == made / calls
    assert ending.tpf != pytest.approx(np.mean(ending.output_tokens / ending.nfe))
    assert np.isnan(ending[:0].tpf)
    one = cdlm.decode(Toy(), [[3]], 6, policy="LLaDA(6)")
    guided = cdlm.decode(Toy(), [[3]], 6, policy="LLaDA(6)", cfg_scale=1.0)
    assert one.tpf == one.output_tokens[0] / 6
    assert guided.tpf == guided.output_tokens[0] / 12, "guidance takes two forwards a step"


# --- a sequence ---


def test_samples_are_a_sequence(samples: Samples) -> None:
    assert len(samples) == 6
    listed = list(samples)
    assert [sample.text for sample in listed] == samples.texts
    assert [sample.index for sample in listed] == list(range(6))
    assert [sample.prompt for sample in listed] == [prompt for prompt in PROMPTS for _ in range(2)]
    assert [sample.text for sample in reversed(samples)] == samples.texts[::-1]
    assert samples[-1].text == samples[5].text == samples.texts[5]
    assert samples[np.int64(2)].text == samples.texts[2]
    for index in (6, -7):
        with pytest.raises(IndexError):
            samples[index]


def test_a_sample_has_all_that_is_known_of_it(samples: Samples) -> None:
    for i, sample in enumerate(samples):
        assert sample.tokens.tolist() == samples.tokens[i][samples.shown[i]].tolist()
        assert (sample.nfe, sample.steps) == (int(samples.nfe[i]), int(samples.steps[i]))
        assert isinstance(sample.nfe, int)
        assert sample.reason is samples.reason[i]
        assert isinstance(sample.reason, HaltReason)
        assert sample.seed == samples.seed == 5
        assert sample.given == samples.spans[i]
    start, end = samples[4].given[0]
    assert samples[4].text[start:end] == "the"


@pytest.mark.parametrize(
    "part", [slice(2), slice(1, 5, 2), slice(None, None, -1), slice(-2, None), slice(3, 3)], ids=str
)
def test_a_slice_is_samples_too(samples: Samples, part: slice) -> None:
    some = samples[part]
    assert isinstance(some, Samples)
    assert len(some) == len(range(6)[part])
    for name in FIELDS:
        assert np.array_equal(getattr(some, name), getattr(samples, name)[part]), name
    for name in LISTS:
        assert getattr(some, name) == getattr(samples, name)[part], name
    assert (some.budget, some.seed, some.made_by) == (samples.budget, samples.seed, samples.made_by)
    assert some.record is not None
    assert samples.record is not None
    assert np.array_equal(some.record.nfe, samples.record.nfe[:, part])
    assert [a.text for a in some] == samples.texts[part]


def test_samples_without_a_tokenizer_have_tokens_alone(wordless: Samples) -> None:
    assert wordless.texts == []
    assert [sample.text for sample in wordless] == [""] * 4
    assert [sample.given for sample in wordless] == [[]] * 4
    assert wordless[1:3].texts == []
    assert wordless[2].tokens.tolist() == wordless.tokens[2][wordless.shown[2]].tolist()


# --- shown ---


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_at_most_three_texts_are_shown(samples: Samples, count: int) -> None:
    shown = repr(samples[:count]).splitlines()
    assert (
        shown[0]
        == f"{count} sample{'s' if count > 1 else ''}, {samples[:count].nfe.mean():.1f} calls a sample of 4 steps"
    )
    assert len(shown) == 1 + min(count, 3) + (count > 3)
    for line, text in zip(shown[1:4], samples.texts[:count], strict=False):
        assert " ".join(text.split())[:40] in line
    assert count <= 3 or shown[-1] == f"  ... and {count - 3} more"
    assert max(map(len, shown)) <= 110


def test_nothing_can_be_shown_too(samples: Samples) -> None:
    assert repr(samples[:0]) == "no samples"
    assert len(samples[:0].to_pandas()) == 0


def test_tokens_are_shown_where_there_is_no_text(wordless: Samples) -> None:
    assert " ".join(map(str, wordless[0].tokens.tolist())) in repr(wordless)


# --- tables and files ---


def test_the_rows_hold_what_was_drawn_and_what_made_it(samples: Samples) -> None:
    rows = samples.rows()
    assert [row["text"] for row in rows] == samples.texts
    assert [row["nfe"] for row in rows] == samples.nfe.tolist()
    assert [row["prompt"] for row in rows] == samples.prompts
    for row in rows:
        assert (row["seed"], row["budget"], row["halt"]) == (5, 4, "Patience(steps=2)")
        assert "steps=4" in row["sampling"]
        assert row["version"]
        assert row["model"] == "EmbeddingDiffusion"
        assert json.loads(json.dumps(row)) == row  # plain values


def test_a_loaded_model_is_named_with_its_fingerprint(tmp_path: Path) -> None:
    with_tokenizer().save_pretrained(tmp_path / "toy")
    model = cdlm.load(tmp_path / "toy", device="cpu")
    (row,) = cdlm.generate(model, steps=2).rows()
    assert row["model"] == "toy"
    assert row["weights"] == model.need_fingerprint()
    assert row["weights"].startswith("tensors:")


def test_a_table_of_pandas_has_a_row_for_each_sample(samples: Samples) -> None:
    table = samples.to_pandas()
    rows = samples.rows()
    assert list(table.columns) == list(rows[0])
    assert table["text"].tolist() == samples.texts
    assert table["nfe"].sum() == samples.nfe.sum()
    assert table["tokens"].tolist() == [row["tokens"] for row in rows]


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if path.suffix == ".parquet":
        return parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def as_csv(value: object) -> str:
    """Numbers are texts there, lists JSON, and None is empty."""
    return json.dumps(value) if isinstance(value, list) else "" if value is None else str(value)


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("kind", ["samples", "wordless"])
def test_a_file_holds_the_rows(kind: str, extension: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    made: Samples = request.getfixturevalue(kind)
    path = made.save(str(tmp_path / "new" / f"file.{extension}"))
    assert path == tmp_path / "new" / f"file.{extension}"
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    rows = made.rows()
    if extension == "csv":
        assert read(path) == [{name: as_csv(value) for name, value in row.items()} for row in rows]
        assert [json.loads(row["tokens"]) for row in read(path)] == [row["tokens"] for row in rows]
    else:
        assert read(path) == rows


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a", ".jsonl", "a.CSV", "a.jsonl.gz"])
def test_an_extension_that_no_writer_has_is_refused(samples: Samples, name: str, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match=r"written as \.jsonl, \.csv, \.parquet, got") as caught:
        samples.save(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("extension", ["jsonl", "csv", "parquet"])
def test_no_samples_and_no_place_are_refused(samples: Samples, extension: str, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match="no samples to write"):
        samples[:0].save(tmp_path / f"a.{extension}")
    (tmp_path / "file").write_text("")
    with pytest.raises(CdlmError) as caught:
        samples.save(tmp_path / "file" / f"a.{extension}")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
