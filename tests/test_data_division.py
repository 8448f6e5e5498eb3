"""How a training text is divided among generator, judge and nobody."""

from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdlm.cli.main import main
from cdlm.core.errors import CdlmError
from cdlm.data.division import Division, Part, Share
from cdlm.data.sources import Source, Stories
from cdlm.runs.config import RunConfig, parse_run, read_run, run_arguments
from cdlm.runs.train import RunText

PARTS: tuple[Part, ...] = ("generator", "judge", "unread")


@dataclass(frozen=True)
class Listed(Source):
    """Documents that are given."""

    texts: tuple[str, ...]

    def documents(self, split):
        return iter(self.texts)

    def fingerprint(self):
        return str(hash(self.texts))


def parts(source: Source, division: Division) -> dict[Part, list[str]]:
    return {part: list(Share(source, division, part).documents("train")) for part in PARTS}


@given(st.lists(st.text(min_size=1), min_size=1), st.floats(0, 0.5), st.floats(0, 0.4))
def test_every_document_goes_to_one_part_and_equal_documents_together(texts, judge, unread):
    division = Division(judge, unread)
    chosen = {text: division.part_of(text) for text in texts}
    for part in PARTS:
        expected = [text for text in texts if chosen[text] == part]
        share = Share(Listed(tuple(texts)), division, part)
        if expected:
            assert list(share.documents("train")) == expected
        else:
            with pytest.raises(CdlmError, match="none of"):
                list(share.documents("train"))


def test_shares_are_those_that_were_asked_for():
    division = Division(1 / 3, 0.1)
    found = Counter(division.part_of(f"document {i}") for i in range(30000))
    assert abs(found["judge"] / 30000 - 1 / 3) < 0.01
    assert abs(found["unread"] / 30000 - 0.1) < 0.01


def test_a_larger_unread_share_takes_from_the_generator_alone():
    texts = [f"document {i}" for i in range(2000)]
    small, large = Division(0.3, 0.1), Division(0.3, 0.2)
    judged = [[text for text in texts if division.part_of(text) == "judge"] for division in (small, large)]
    assert judged[0] == judged[1]


def test_without_shares_all_text_is_the_generators():
    assert {Division().part_of(f"{i}") for i in range(1000)} == {"generator"}
    assert [Division().has(part) for part in PARTS] == [True, False, False]


def test_the_validation_split_is_not_divided():
    source = Stories(n=40)
    share = Share(source, Division(0.3, 0.3), "judge")
    assert list(share.documents("valid")) == list(source.documents("valid"))


def test_fingerprints_tell_the_parts_and_divisions_apart():
    found = {
        Share(Stories(n=40), Division(judge, 0.1), part).fingerprint() for judge in (0.2, 0.3) for part in PARTS
    } | {Stories(n=40).fingerprint()}
    assert len(found) == 7


@pytest.mark.parametrize(("judge", "unread"), [(-0.1, 0.0), (1.0, 0.0), (0.5, 0.5), (float("nan"), 0.0), (0.0, 1.5)])
def test_impossible_shares_are_refused(judge, unread):
    with pytest.raises(CdlmError):
        Division(judge, unread)
    with pytest.raises(CdlmError):
        RunConfig(judge_share=judge, unread_share=unread)


def test_the_parts_of_a_run_hold_different_documents(tmp_path):
    config = RunConfig(Stories(n=400), vocab_size=300, length=96, rows="document", cache=str(tmp_path))
    text = RunText.of(config)
    unread = text.unread
    assert unread is not None
    rows = [{tuple(row.tokens.tolist()) for row in part} for part in (text.train, text.judge, unread)]
    sources = parts(config.source, config.division)
    assert [len(text.train), len(text.judge), len(unread)] == [len(sources[part]) for part in PARTS]
    assert not (rows[0] & rows[1])
    assert not (rows[0] & rows[2])
    assert not (rows[1] & rows[2])


def test_an_undivided_run_reads_what_it_always_read(tmp_path):
    config = RunConfig(Stories(n=60), vocab_size=300, length=16, cache=str(tmp_path), judge_share=0.0, unread_share=0.0)
    text = RunText.of(config)
    assert text.judge is text.train
    assert text.unread is None
    assert "share" not in text.train.key
    assert text.train.store.path.name == RunText.of(config).train.store.path.name  # type: ignore[attr-defined]


def test_run_folders_of_earlier_versions_are_read_undivided(tmp_path):
    config = RunConfig(Stories(n=60))
    lines = config.to_yaml().splitlines()
    old = [line for line in lines if not line.startswith(("judge_share", "unread_share"))]
    (tmp_path / "config.yaml").write_text("\n".join(old))
    assert read_run(tmp_path) == replace(config, judge_share=0.0, unread_share=0.0)
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert read_run(tmp_path) == config
    assert parse_run([*run_arguments(tmp_path), "--judge_share=0.2"]).judge_share == 0.2


def test_a_text_too_small_to_be_divided_is_refused_before_any_training(tmp_path, capsys):
    (tmp_path / "text.txt").write_text("one line\n" * 40)  # equal documents go to one part
    with pytest.raises(SystemExit) as caught:
        main(["train", "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), "--cache", str(tmp_path),
              "--length", "4", "--vocab_size", "262", "--quiet"])  # fmt: skip
    shown = capsys.readouterr()
    assert caught.value.code == 2
    assert shown.err.count("\n") == 1
    assert "set judge_share and unread_share to 0" in shown.err
    assert not (tmp_path / "run").exists()
