import json
from dataclasses import replace

import numpy as np
import pytest
from evaluation_toys import byte_tokenizer, passages, random_judge, sentences, trained_judge

from cdlm.core.errors import CdlmError
from cdlm.evaluation.evaluate import Beside, Distances, evaluate
from cdlm.evaluation.judge import Judge, Readers
from cdlm.evaluation.metrics.ar_nll import ar_nll
from cdlm.evaluation.metrics.registry import METRICS, Metric
from cdlm.evaluation.table import Evaluation
from cdlm.evaluation.texts import Corpus

TOKENIZER = byte_tokenizer()


def decode(tokens: list[int]) -> str:
    return str(TOKENIZER.decode(tokens))


def corpus(name: str, texts: list[str], **more) -> Corpus:
    return Corpus(name, [TOKENIZER(text)["input_ids"] for text in texts], texts, **more)


def measured(samples: Corpus, real: Corpus, judge: Judge, **options) -> Evaluation:
    """Without distances."""
    return evaluate([samples], Beside([real], decode), [Readers(judge)], distances=Distances(splits=0), **options)


def poor_evaluation(**options) -> Evaluation:
    samples = corpus("samples", ["the cat sees"] * 39 + [""], nfe=[10, 30] * 20, extra={"grammar": 0.5, "steps": 200})
    return measured(samples, corpus("real", sentences(40, 5)), trained_judge(), **options)


def splits(count: int, name: str = "like training") -> list[tuple[Corpus, Corpus]]:
    return [(corpus(name, passages(count, 2 * k)), corpus(name, passages(count, 2 * k + 1))) for k in (10, 11, 12)]


@pytest.fixture(scope="module")
def full() -> Evaluation:
    pytest.importorskip("mauve", reason="mauve-text is optional")
    real = [corpus("held out", passages(40, 5)), corpus("like training", passages(30, 6))]
    beside = Beside(real, decode, splits(25))
    judges = [Readers(trained_judge()), Readers(replace(random_judge(), name="other"))]
    return evaluate([corpus("samples", passages(40, 4))], beside, judges, notes=["a word first."])


def test_the_rows_are_samples_real_text_and_floors(full):
    assert [row["name"] for row in full.rows] == [
        "samples", "held out", "like training", "tokens shuffled", "unigram salad"
    ]  # fmt: skip
    assert [row["n"] for row in full.rows] == [40, 40, 30, 40, 40]
    samples, real, like, shuffled, salad = full.rows
    assert shuffled["unigram_entropy"] == pytest.approx(real["unigram_entropy"])
    assert shuffled["sample_entropy"] == pytest.approx(real["sample_entropy"])
    assert shuffled["dist_3"] > real["dist_3"]
    assert shuffled["mean_tokens"] == salad["mean_tokens"] == real["mean_tokens"]
    for row in (shuffled, salad):
        assert row["ar_nll"] > real["ar_nll"] + 1
        assert row["mauve"] < 0.5 * min(real["mauve"], samples["mauve"], like["mauve"])
        assert row["frechet"] > 2 * max(real["frechet"], samples["frechet"], like["frechet"])
    assert all(row["frechet_sd"] > 0 for row in full.rows)


def test_the_settings_say_what_the_distances_are_of(full):
    found = full.settings["distances"]
    assert found["features"] == "NGrams(orders=(2, 3), most=128, over='tokens')"
    assert (found["reference"], found["splits"], found["texts"]) == ("like training", 3, 25)
    assert found["mauve"]["library"].startswith("mauve-text ")
    assert full.settings["compared_with"] == "like training"
    assert full.notes[0] == "a word first."
    assert any("of 25 of the 40 texts" in note for note in full.notes)
    assert any("25 texts a side and want 500" in note for note in full.notes)
    shown = full.markdown()
    assert "25 texts a side, ± sd over 3 random splits of the like training" in shown


def test_the_row_of_the_reference_is_one_side_against_the_other(full):
    beside = Beside([corpus("like training", passages(40, 5))], decode, splits(25))
    alone = evaluate([corpus("s", passages(40, 3))], beside, [Readers(trained_judge())])
    assert (alone.rows[1]["mauve"], alone.rows[1]["frechet"]) == (full.rows[2]["mauve"], full.rows[2]["frechet"])


def test_each_judge_has_a_column_and_its_numbers(full):
    assert [judge["name"] for judge in full.judges] == [trained_judge().name, "other"]
    alone = measured(corpus("samples", passages(40, 4)), corpus("r", passages(40, 5)), random_judge()).rows[0]
    assert "judged" not in alone
    assert full.rows[0]["judged"]["other"]["ar_nll"] == alone["ar_nll"]
    assert full.rows[0]["ar_nll"] < alone["ar_nll"]
    head, _, line = full.markdown().split("\n")[:3]
    assert [cell.strip() for cell in head.split("|")][3:5] == ["AR-NLL", "AR-NLL (other)"]
    assert f"{alone['ar_nll']:.2f} [" in line
    twice = [Readers(trained_judge())] * 2
    with pytest.raises(CdlmError, match="judges of different names"):
        evaluate([corpus("s", ["a b"])], Beside([corpus("r", ["a b"])], decode), twice, distances=Distances(splits=0))


def test_texts_of_other_origin_are_compared_by_words():
    pytest.importorskip("mauve", reason="mauve-text is optional")
    beside = Beside([corpus("like training", passages(40, 5))], decode, splits(25))
    samples = corpus("s", passages(40, 3), foreign=True)
    found = evaluate([samples], beside, [Readers(random_judge())])
    assert "over='words'" in found.settings["distances"]["features"]
    assert found.rows[3]["mauve"] < found.rows[0]["mauve"]


def test_without_mauve_there_is_still_a_distance():
    beside = Beside([corpus("like training", passages(40, 5))], decode, splits(25))
    found = evaluate(
        [corpus("s", passages(40, 3))], beside, [Readers(random_judge())], distances=Distances(mauve=False)
    )
    assert found.rows[0]["mauve"] is None
    assert found.rows[0]["frechet"] > 0
    assert found.settings["distances"]["mauve"] is None


def test_real_text_is_no_sample():
    beside = Beside([corpus("like training", passages(40, 5))], decode, splits(25))
    with pytest.raises(CdlmError, match="100% of the texts of 's' are also in the like training"):
        evaluate([replace(beside.splits[0][0], name="s")], beside, [Readers(random_judge())])


def test_json_holds_no_nan_and_survives_the_round_trip(full):
    for evaluation in (full, poor_evaluation()):
        text = json.dumps(evaluation.to_dict(), allow_nan=False)
        assert json.loads(text) == evaluation.to_dict()


def test_what_cannot_be_computed_is_null():
    judge = random_judge()
    result = measured(corpus("samples", ["", ""]), corpus("real", ["ab", "cd"]), judge)
    row = result.to_dict()["rows"][0]
    assert row["ar_nll"] is None
    assert row["ar_nll_ci"] == [None, None]
    assert row["dist_1"] is None
    assert row["empty_rate"] == 1
    assert any("2 of 2 samples gave the judge nothing to score" in note for note in result.notes)
    assert row["unscored"] == 2
    assert " - " in result.markdown()
    assert "nan" not in result.terminal().lower()


def test_poor_samples_are_called_poor_and_good_ones_not(full):
    easiest = min(sentences(40, 4), key=lambda text: ar_nll(trained_judge(), [text]).nats_per_token)
    poor = measured(corpus("s", [easiest] * 40), corpus("real", sentences(40, 5)), trained_judge())
    assert any("entropy over all samples" in note for note in poor.notes)
    assert any("AR-NLL is under that of real:" in note for note in poor.notes)
    assert not any("entropy" in note for note in full.notes)
    for shown in (poor.markdown(), poor.terminal()):
        assert all(note in shown for note in poor.notes)


def test_calls_extras_duplicates_and_empties_are_in_the_row():
    row = poor_evaluation().rows[0]
    assert (row["mean_nfe"], row["grammar"], row["steps"]) == (20, 0.5, 200)
    assert row["duplicate_rate"] == pytest.approx(38 / 40)
    assert row["empty_rate"] == pytest.approx(1 / 40)
    assert row["mauve"] is None


def test_few_samples_give_a_table_that_says_what_is_missing():
    real = corpus("real", sentences(5, 5))
    result = evaluate(
        [corpus("samples", sentences(5, 4))], Beside([real], decode, [(real, real)]), [Readers(random_judge())]
    )
    assert result.rows[0]["mauve"] is result.rows[0]["frechet"] is result.settings["distances"] is None
    assert any("they need 20 texts a side, here are 5" in note for note in result.notes)


def test_the_tables_show_every_row_and_align(full):
    for table in full.markdown().split("\n\n")[:2]:
        lines = table.splitlines()
        assert len(lines) == 7
        assert len({line.count("|") for line in lines}) == 1
    for table in full.terminal().split("\n\n")[:2]:
        assert [line.split("  ")[0] for line in table.splitlines()[2:]] == [str(row["name"]) for row in full.rows]
    assert max(map(len, poor_evaluation().terminal().split("\n\n")[0].splitlines())) <= 120


def test_prompts_are_left_out_of_the_score():
    texts = sentences(30, 4)
    halves = [[(0, len(text) // 2)] for text in texts]
    real = corpus("real", sentences(30, 5))
    with_prompt = measured(corpus("samples", texts, given=halves), real, trained_judge())
    without = measured(corpus("samples", texts), real, trained_judge())
    assert with_prompt.rows[0]["judge_tokens"] < 0.6 * without.rows[0]["judge_tokens"]
    assert with_prompt.rows[1] == without.rows[1]


def test_the_seed_decides_the_shuffling():
    first, same, other = (poor_evaluation(seed=seed).rows[2]["ar_nll"] for seed in (0, 0, 1))
    assert first == same != other


def test_saving_writes_both_files_whole(tmp_path, full):
    full.save(tmp_path / "new")
    full.save(tmp_path / "new")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["evaluation.json", "evaluation.md"]
    assert json.loads((tmp_path / "new" / "evaluation.json").read_text(encoding="utf-8")) == full.to_dict()
    assert (tmp_path / "new" / "evaluation.md").read_text(encoding="utf-8") == full.markdown()


def test_a_failed_write_keeps_the_old_file(tmp_path, full, monkeypatch):
    full.save(tmp_path)
    before = (tmp_path / "evaluation.json").read_text(encoding="utf-8")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(CdlmError, match="disk full"):
        poor_evaluation().save(tmp_path)
    assert (tmp_path / "evaluation.json").read_text(encoding="utf-8") == before
    assert len(list(tmp_path.iterdir())) == 2


def test_wrong_arguments_are_explained():
    samples, judge = corpus("samples", sentences(5, 1)), random_judge()
    with pytest.raises(CdlmError, match="at least one sample"):
        measured(corpus("samples", []), samples, judge)
    with pytest.raises(CdlmError, match="expected 5 texts in 'more' as in 'samples', got 4"):
        evaluate([samples, corpus("more", sentences(4, 2))], Beside([samples], decode), [Readers(judge)])
    with pytest.raises(CdlmError, match="nfe for each of the 2 texts"):
        Corpus("samples", [[1], [2]], ["a", "b"], nfe=[3])
    clash = corpus("others", sentences(5, 1), extra={"zipf": 1.0})
    with pytest.raises(CdlmError, match="zipf"):
        measured(clash, samples, judge)
    with pytest.raises(CdlmError, match="two rows of the table would be named 'samples'"):
        measured(samples, samples, judge)


def test_each_metric_has_a_key_and_a_column_of_its_own(full):
    keys, heads = ([getattr(metric, name) for metric in METRICS] for name in ("key", "heading"))
    assert len(set(keys)) == len(keys)
    shown = [head for head in heads if head]
    assert len(set(shown)) == len(shown)
    assert all(set(keys) <= row.keys() for row in full.rows)
    columns = [cell.strip() for table in full.markdown().split("\n\n")[:2] for cell in table.split("\n")[0].split("|")]
    assert set(shown) <= set(columns)


def test_a_metric_shows_what_stands_beside_it():
    metric = Metric("x", "x", lambda of: None, decimals=3)
    assert metric.show({}) == metric.show({"x": None}) == "-"
    assert metric.show({"x": 7}) == "7"
    assert metric.show({"x": 1.5, "x_ci": [1.0, 2.0]}) == "1.500 [1.000, 2.000]"
    assert metric.show({"x": 1.5, "x_ci": [None, None], "x_sd": 0.25}) == "1.500 ± 0.250"
    assert replace(metric, percent=True).show({"x": 0.125}) == "12.5 %"


def test_shuffling_keeps_the_tokens_of_each_text():
    plain = corpus("real", sentences(20, 1))
    shuffled = plain.shuffled(decode, seed=0)
    assert [sorted(line) for line in shuffled.tokens] == [sorted(line) for line in plain.tokens]
    assert np.mean([a == b for a, b in zip(plain.tokens, shuffled.tokens, strict=True)]) < 0.1
    assert shuffled.texts == [decode(line) for line in shuffled.tokens]
