"""Equal requests of a sampling that draws nothing: one is served, and the others are copies that say so."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toys
from foreign import TINY, copy_of, write_tokenizer
from masked_toys import PLAIN, Toy

import cdlm
from cdlm.autoregressive.sampler import LeftToRight
from cdlm.cli.main import main
from cdlm.continuous.sampler import Diffusion
from cdlm.masked.sampler import Unmasking
from cdlm.policies.confidence import Factor, Threshold
from cdlm.policies.dream import Dream, DreamThreshold
from cdlm.policies.entropy import EntropyBound
from cdlm.policies.klass import KLASS
from cdlm.policies.llada import LLaDA
from cdlm.policies.mutual import Mutual
from cdlm.policies.policy import Policy
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.samples import Samples

PROMPTS = [[3, 4, 5], [6], [3, 4, 5], [7, None, 8]]
STILL: list[Policy] = [
    LLaDA(), LLaDA(4, block=4), Dream(), Dream(4, top_p=0.9), Dream(4, alg="topk_margin", alg_temp=0.0),
    DreamThreshold(4, 0.2), Threshold(0.3), Factor(1.0), EntropyBound(0.5), KLASS(), Mutual(),
]  # fmt: skip
DRAWING: list[Policy] = [LLaDA(remasking="random"), Dream(8, alg="origin"), Dream(alg_temp=1.0)]


def asked(n: int = 2) -> list[Request]:
    return canvases(PROMPTS, 8, n)


def served(sampling: Unmasking, n: int = 2, seed: int = 0, **options: Any) -> tuple[Samples, int]:
    """Samples, and the rows that the model was called with."""
    model = Toy(PLAIN, seed=1)
    session = cdlm.open_session(model, sampling=sampling, seed=seed, **options)
    return session.run(asked(n)), model.rows


def same(one: Samples, other: Samples) -> bool:
    """Everything but the noise's names."""
    names = ("tokens", "nfe", "steps", "settled")
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)


@pytest.mark.parametrize("policy", STILL, ids=repr)
def test_a_copy_is_what_would_have_been_computed(policy: Policy) -> None:
    samples, rows = served(Unmasking(policy))
    assert samples.copy_of == [None, 0, None, 2, 0, 0, None, 6]
    assert samples.originals == [0, 2, 6]
    assert rows == samples.nfe[samples.originals].sum()  # what a copy cost was spent once
    assert samples.index.tolist() == list(range(8))
    model = Toy(PLAIN, seed=1)
    session = cdlm.open_session(model, sampling=Unmasking(policy))
    each = Samples.merge([session.run([request]) for request in asked()])
    assert same(samples, each)
    assert samples.reason == each.reason
    assert each.copy_of == []


@pytest.mark.parametrize("policy", STILL, ids=repr)
def test_what_draws_nothing_is_the_same_under_any_seed(policy: Policy) -> None:
    assert not Unmasking(policy).draws
    assert same(served(Unmasking(policy))[0], served(Unmasking(policy), seed=7)[0])


@pytest.mark.parametrize(
    "sampling", [*map(Unmasking, DRAWING), Unmasking(LLaDA(), temperature=0.7), Unmasking(KLASS(), temperature=2.0)],
    ids=repr,
)  # fmt: skip
def test_what_draws_is_drawn_for_each(sampling: Unmasking) -> None:
    assert sampling.draws
    samples, rows = served(sampling, n=3)
    assert samples.copy_of == []
    assert rows == samples.nfe.sum()
    assert not same(samples, served(sampling, n=3, seed=1)[0])


def test_rows_that_see_each_other_are_all_served() -> None:
    """Dream's published quota is the mean over the batch, so a row is no copy of an equal one."""
    samples, rows = served(Unmasking(Dream(4, pooled=True)))
    assert samples.copy_of == []
    assert rows == samples.nfe.sum()


def test_a_record_has_the_steps_of_every_row() -> None:
    model = Toy(PLAIN, seed=1)
    samples = cdlm.decode(model, PROMPTS, 8, n=2, record=True)
    assert samples.copy_of == []
    assert samples.record is not None
    assert len(samples.record) == 8
    assert same(samples, cdlm.decode(model, PROMPTS, 8, n=2))


def test_places_count_and_texts_do_not() -> None:
    """The same tokens elsewhere, other padding or another start are other requests; another text or number is none."""
    model = Toy(PLAIN, seed=1)
    one, other, shorter = canvases([[3, 4], [3, None], [3]], 4)
    blocks = cdlm.open_session(model, sampling=Unmasking(LLaDA(block=2)))
    again = [replace(request, index=9 + i, prompt="text") for i, request in enumerate((one, shorter))]
    found = blocks.run([one, other, shorter, *again])
    assert found.copy_of == [None, None, None, 0, 2]
    assert found.prompts == [None, None, None, "text", "text"]
    assert found.index.tolist() == [0, 1, 2, 9, 10]


def test_selected_and_merged_samples_keep_their_origin() -> None:
    samples = served(Unmasking())[0]
    assert samples.select(np.array([1, 4])).copy_of == [0, 0]
    assert samples[1:3].copy_of == [0, None]


def test_other_families() -> None:
    assert Diffusion().draws
    assert LeftToRight().draws
    assert not LeftToRight(temperature=0.0).draws
    model = toys.autoregressive_with_tokenizer()
    samples = cdlm.generate(model, ["the cat"], n=3, temperature=0.0)
    assert samples.copy_of == [None, 0, 0]
    assert len(set(samples.texts)) == 1
    assert cdlm.generate(model, ["the cat"], n=3).copy_of == []
    assert cdlm.generate(toys.with_tokenizer(), ["the"], n=2, steps=2).copy_of == []


# --- the command ---


def test_the_command_says_what_was_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tokenizer(copy_of("llada", tmp_path / "llada"), "llada")
    (tmp_path / "prompts.txt").write_text("the cat\nthe dog\n")
    call = ["sample", str(tmp_path / "llada"), "--prompts", str(tmp_path / "prompts.txt"), "--n", "3", "--chat"]
    call += ["--new-tokens", "3", "--device", "cpu"]
    main(call)
    shown = capsys.readouterr()
    assert "2 of 6 samples were computed, the others are copies" in shown.err
    assert shown.out.count("--- sample") == 2
    for file in ("out.jsonl", "out.csv"):
        main([*call, "--out", str(tmp_path / file), "--quiet"])
    assert capsys.readouterr().err == ""
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["copy_of"] for row in rows] == [None, 0, 0, None, 3, 3]
    assert {row["nfe"] for row in rows} == {3}
    with (tmp_path / "out.csv").open() as file:
        assert [row["copy_of"] for row in csv.DictReader(file)] == ["", "0", "0", "", "3", "3"]
    main([*call, "--temperature", "1"])
    shown = capsys.readouterr()
    assert "copies" not in shown.err
    assert shown.out.count("--- sample") == 6


@pytest.mark.parametrize("family", TINY)
def test_what_is_used_is_said_once_and_stands_in_the_file(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tokenizer(copy_of(family, tmp_path / "model"), family)
    out = tmp_path / "out.jsonl"
    call = ["sample", str(tmp_path / "model"), "--prompt", "the cat", "--new-tokens", "3", "--device", "cpu"]
    main([*call, "--n", "1", "--out", str(out)])
    sampling = cdlm.load(tmp_path / "model", device="cpu").defaults
    policy = {"llada": "LLaDA(remasking='low_confidence')", "Dream": "Dream(alg='entropy', eps=0.001, top_p=0.95)"}[
        family
    ]
    line = f"cdlm: 3 tokens to generate; policy {policies[family]}"
    assert capsys.readouterr().err.count(line) == 1
    assert json.loads(out.read_text())["sampling"] == repr(sampling)
    main([*call, "--n", "1", "--quiet"])
    assert "cdlm:" not in capsys.readouterr().err
