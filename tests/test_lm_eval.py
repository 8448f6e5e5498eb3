"""Models in lm-evaluation-harness: answers, likelihoods, results of local tasks, and the arguments that people know."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lm_eval
import lm_eval.tasks
import lm_eval.utils
import pytest
import torch
from doc_pages import commands_of
from foreign import copy_of, write_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.tasks import TaskManager
from toys import autoregressive_with_tokenizer, masked_with_tokenizer, ssd, tokenizer, with_tokenizer

import cdlm
from cdlm import api
from cdlm.cli.main import main
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import BOUND, LikelihoodSettings, Text
from cdlm.data.arithmetic import problems
from cdlm.halting import FixedSteps
from cdlm.lm_eval import CdlmLM
from cdlm.lm_eval.adapter import _device_of
from cdlm.lm_eval.arguments import _OWN, ALIASES, read_arguments, read_pairs, sampling_of
from cdlm.lm_eval.command import understood
from cdlm.lm_eval.counts import Counts, tokens_per_forward
from cdlm.lm_eval.tasks import NEAREST, Wanted, encode_pair, name_of, numbered, runs_of, windows
from cdlm.masked.sampler import Unmasking
from cdlm.policies import parse_policy
from cdlm.sampling.prompts import encode_prompt
from cdlm.sampling.session import Model

LENGTH = 32
PROMPTS = ("the cat sat", "a bird sang on the roof, and", "the dog", "the cat sat", "")
GREEDY = {"until": [], "do_sample": False, "temperature": 0.0}


def one(*arguments: Any) -> Any:
    """A request as the harness makes it."""
    return SimpleNamespace(args=arguments)


def asks(settings: dict[str, Any], prompts: Sequence[str] = PROMPTS) -> list[Any]:
    return [one(prompt, settings) for prompt in prompts]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints of LLaDA and Dream with tokenizers."""
    found = {}
    for family in ("llada", "Dream"):
        found[family] = copy_of(family, tmp_path_factory.mktemp(family))
        write_tokenizer(found[family], family)
    return found


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Model]:
    """One of each family."""
    return {
        "masked": masked_with_tokenizer(length=LENGTH),
        "continuous": with_tokenizer(length=LENGTH),
        "autoregressive": autoregressive_with_tokenizer(length=24),
        **{family: cdlm.load(folder, device="cpu") for family, folder in folders.items()},
    }


SAMPLERS: dict[str, dict[str, Any]] = {
    "masked": {"temperature": 0.7, "steps": 6},
    "continuous": {"steps": 3},
    "autoregressive": {},
    "llada": {"new_tokens": 8, "steps": 4, "block": 4, "temperature": 0.5},
    "Dream": {"new_tokens": 8, "steps": 8, "alg": "entropy", "top_p": 0.9, "temperature": 0.5},
}
FAMILIES = tuple(SAMPLERS)


# --- arguments ---


def test_every_alias_is_of_an_argument_that_there_is() -> None:
    assert set(ALIASES.values()) <= _OWN | set(api.all_flat_names())
    assert not ALIASES.keys() & (_OWN | set(api.all_flat_names()))


def test_the_page_lists_every_argument_and_alias() -> None:
    page = (Path(__file__).parent.parent / "docs/lm-eval.md").read_text(encoding="utf-8")
    table = page.split("## Arguments")[1].split("\n## ")[0]
    for name in (*_OWN, *ALIASES, *api.all_flat_names(), "dual_cache"):
        assert f"`{name}`" in table, name


@pytest.mark.parametrize(
    ("known", "own"),
    [
        ({"model_path": "x", "gen_length": 8}, {"pretrained": "x", "new_tokens": 8}),
        ({"pretrained": "x", "max_new_tokens": 8}, {"pretrained": "x", "new_tokens": 8}),
        ({"pretrained": "x", "block_length": 4, "mc_num": 3}, {"pretrained": "x", "block": 4, "mc": 3}),
        ({"pretrained": "x", "diffusion_steps": 4, "block_size": 2}, {"pretrained": "x", "steps": 4, "block": 2}),
        ({"pretrained": "x", "use_cache": True}, {"pretrained": "x", "cache": "prefix"}),
        ({"pretrained": "x", "use_cache": "dual"}, {"pretrained": "x", "cache": "dual"}),
        ({"pretrained": "x", "use_cache": False, "dual_cache": False}, {"pretrained": "x"}),
        ({"pretrained": "x", "use_cache": True, "dual_cache": True}, {"pretrained": "x", "cache": "dual"}),
        ({"pretrained": "x", "dtype": "bfloat16"}, {"pretrained": "x", "precision": "bf16"}),
        ({"pretrained": "x", "dtype": "auto", "halt": None}, {"pretrained": "x"}),
        ({"pretrained": "x", "batch_size": "auto:4", "trust_remote_code": False}, {"pretrained": "x"}),
        ({"pretrained": "x", "batch_size": "8"}, {"pretrained": "x", "batch_size": 8}),
        ({"pretrained": "x", "halt": "SchED(11.85; 3.95)"}, {"pretrained": "x", "halt": "SchED(11.85, 3.95)"}),
        ({"pretrained": "x", "halt": "none"}, {"pretrained": "x"}),
    ],
)
def test_arguments_have_the_names_that_people_know(known: dict[str, Any], own: dict[str, Any]) -> None:
    assert read_arguments(known) == read_arguments(own)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"pretraned": "x"}, "'pretraned' (did you mean pretrained?)"),
        ({"pretrained": "x", "gen_lenght": 8}, "did you mean gen_length?"),
        ({"pretrained": "x", "show_speed": True}, "has no 'show_speed'"),
        ({"pretrained": "x", "halt": "SchED(11.85", " 3.95)": ""}, "write ; for a comma"),
        ({"pretrained": "x", "gen_length": 8, "max_new_tokens": 8}, "new_tokens twice"),
        ({"pretrained": "x", "trust_remote_code": True}, "leave out trust_remote_code"),
        ({"pretrained": "x", "use_cache": False, "dual_cache": True}, "stands beside use_cache=true"),
        ({"pretrained": "x", "dual_cache": "yes"}, "dual_cache is true or false"),
        ({"pretrained": "x", "dtype": "float16"}, "precision"),
        ({"pretrained": "x", "batch_size": "many"}, "batch_size"),
        ({"pretrained": "x", "mc": 0}, "mc >= 1"),
        ({"pretrained": "x", "mc": 2.5}, "mc"),
        ({"pretrained": "x", "seed": -1}, "seed >= 0"),
        ({"pretrained": "x", "new_tokens": 0}, ">= 1, got 0"),
        ({"pretrained": 3}, "pretrained"),
        ({}, "needs pretrained"),
    ],
)
def test_other_arguments_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(CdlmError) as caught:
        read_arguments(given)
    assert said in str(caught.value)


def test_a_text_of_arguments_is_split_outside_of_brackets_and_quotes() -> None:
    text = "pretrained=a/b,halt=SchED(11.85, 3.95, variant='paper'),steps=16,use_cache=true,threshold=0.9,alg=entropy"
    assert read_pairs(text) == {
        "pretrained": "a/b", "halt": "SchED(11.85, 3.95, variant='paper')", "steps": 16, "use_cache": True,
        "threshold": 0.9, "alg": "entropy",
    }  # fmt: skip
    assert read_pairs("a='x,y',b=(1, 2),c=None") == {"a": "x,y", "b": (1, 2), "c": None}
    for wrong in ("pretrained", "a=1,a=2"):
        with pytest.raises(CdlmError):
            read_pairs(wrong)


@pytest.mark.parametrize(
    ("family", "given", "policy"),
    [
        ("llada", {}, "LLaDA()"),
        ("llada", {"steps": 16, "block": 8}, "LLaDA(16, block=8)"),
        ("llada", {"steps": 16, "logits_eos_inf": True}, "LLaDA(16, no_eos=True)"),
        ("llada", {"confidence_eos_eot_inf": True, "remasking": "random"}, "LLaDA(eos_last=True, remasking='random')"),
        ("llada", {"threshold": 0.9, "block_length": 32}, "Threshold(0.9, block=32)"),
        ("llada", {"factor": 1.5, "block_length": 32}, "Factor(1.5, block=32)"),
        ("llada", {"alg": "entropy", "top_p": 0.9}, "Dream(alg='entropy', top_p=0.9)"),
        ("llada", {"policy": "KLASS()"}, "KLASS()"),
        ("Dream", {"alg": "confidence_threshold", "threshold": 0.8}, "Threshold(0.8)"),
        ("Dream", {"alg": "low_confidence", "steps": 8}, "LLaDA(8)"),
        ("masked", {"steps": 8}, "LLaDA(8, remasking='random')"),
        ("masked", {"block": 8}, "LLaDA(block=8, remasking='random')"),
    ],
)
def test_parts_make_the_policy(models: dict[str, Model], family: str, given: dict[str, Any], policy: str) -> None:
    made, unused = sampling_of(models[family], read_arguments({"pretrained": models[family], **given}))
    assert made.policy == parse_policy(policy)  # type: ignore[attr-defined]
    assert unused == ""


def test_steps_beside_a_threshold_are_said_to_have_no_effect(models: dict[str, Model]) -> None:
    given = {"pretrained": models["llada"], "steps": 8, "block_length": 4, "threshold": 0.9}
    made, unused = sampling_of(models["llada"], read_arguments(given))
    assert made.policy == parse_policy("Threshold(0.9, block=4)")  # type: ignore[attr-defined]
    assert "steps=8 is not used" in unused


@pytest.mark.parametrize(
    ("family", "given", "said"),
    [
        ("llada", {"threshold": 0.9, "factor": 1.0}, "give one"),
        ("llada", {"threshold": 0.9, "alg": "entropy"}, "leave out alg=entropy"),
        ("llada", {"alg": "confidence_threshold"}, "needs a threshold"),
        ("llada", {"alg": "best"}, "alg to be one of origin"),
        ("llada", {"top_p": 0.9}, "LLaDA has no top_p"),
        ("llada", {"policy": "LLaDA(8)", "block": 4}, "has its own block"),
        ("llada", {"policy": "LLaDA(8)", "steps": 4}, "a policy has its own steps"),
        ("llada", {"solver": "Heun()"}, "solver is a setting of continuous models"),
        ("continuous", {"threshold": 0.9}, "threshold, of masked models"),
        ("continuous", {"temperature": 0.5}, "temperature is a setting of"),
        ("continuous", {"policy": "LLaDA()"}, "policy is a setting of masked"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    models: dict[str, Model], family: str, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(CdlmError) as caught:
        CdlmLM(models[family], **given)
    assert said in str(caught.value)


# --- what a task asks for ---


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({}, Wanted()),
        ({"until": None, "max_gen_toks": 7}, Wanted(most=7)),
        ({"until": "\n"}, Wanted(("\n",))),
        ({"until": ["", "Q:", "\n"], "max_new_tokens": 5}, Wanted(("Q:", "\n"), 5)),
        ({"do_sample": False, "temperature": 0.7}, Wanted()),
        ({"do_sample": True, "temperature": 0.0}, Wanted()),
        ({"do_sample": True, "temperature": 0.7}, Wanted(temperature=0.7)),
        ({"temperature": 1}, Wanted(temperature=1.0)),
        ({"top_p": 0.9, "num_beams": 2}, Wanted(unused=("num_beams", "top_p"))),
    ],
)
def test_generation_settings_are_read(asked: dict[str, Any], wanted: Wanted) -> None:
    assert Wanted.of(asked) == wanted


@pytest.mark.parametrize(
    "asked", [{"until": 3}, {"until": ["a", 3]}, {"max_gen_toks": 0}, {"max_gen_toks": "8"}, {"temperature": -1}]
)
def test_bad_generation_settings_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(CdlmError):
        Wanted.of(asked)


@given(st.text("ab\n", max_size=12), st.lists(st.text("ab\n", max_size=3), max_size=3))
def test_an_answer_ends_before_its_first_stop(text: str, stops: list[str]) -> None:
    cut = Wanted.of({"until": stops}).cut(text)
    ends = [text.find(stop) for stop in stops if stop and stop in text]
    assert cut == text[: min(ends, default=len(text))]


@given(st.lists(st.integers(1, 100), max_size=30), st.integers(1, 8))
def test_runs_hold_every_row_once_and_are_of_one_length_beyond_what_is_in_flight(sizes: list[int], rows: int) -> None:
    runs = runs_of(sizes, rows)
    assert sorted(place for run in runs for place in run) == list(range(len(sizes)))
    for run in runs[:-1]:
        assert len(run) >= rows
    for run in runs:
        assert all(sizes[place] >= NEAREST * sizes[run[0]] for place in run[rows:])


@given(st.integers(0, 40), st.integers(1, 12))
def test_a_long_text_is_scored_once_token_by_token(count: int, length: int) -> None:
    tokens = list(range(count))
    parts = list(windows(tokens, length, 5))
    assert [token for part in parts for token in part.target] == tokens
    assert len({part.key for part in parts}) == len(parts)
    for part in parts:
        assert part.size == min(length, count)  # the last one too has all the context that fits
        assert [*part.given, *part.target] == tokens[part.target[-1] + 1 - part.size : part.target[-1] + 1]


@pytest.mark.parametrize(("context", "answer"), [("the cat", " sat"), ("the cat ", "sat"), ("", "the cat"), (" ", "a")])
def test_a_pair_is_one_text_divided_where_its_context_ends(context: str, answer: str) -> None:
    given_, target = encode_pair(tokenizer(), context, answer, names=False)
    whole = tokenizer()(context + answer, add_special_tokens=False)["input_ids"]
    assert [*given_, *target] == whole
    assert given_ == tokenizer()(context.rstrip(), add_special_tokens=False)["input_ids"]
    assert target


def test_equal_prompts_have_numbers_of_their_own() -> None:
    found = numbered(["a", "b", "a", "a"])
    assert len(set(found)) == 4
    assert found[:2] == numbered(["a", "b"])
    assert found[0] == numbered(["c", "a"])[1]
    assert all(0 <= number < 2**62 for number in found)


# --- answers ---


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_the_same_alone_and_in_any_company(models: dict[str, Model], family: str) -> None:
    lm = CdlmLM(models[family], batch_size=2, **SAMPLERS[family])
    together = lm.generate_until(asks(GREEDY))
    assert len(together) == len(PROMPTS)
    backwards = CdlmLM(models[family], batch_size=5, **SAMPLERS[family]).generate_until(asks(GREEDY, PROMPTS[2::-1]))
    assert backwards == together[2::-1]
    assert [lm.generate_until(asks(GREEDY, [prompt]))[0] for prompt in PROMPTS[:3]] == together[:3]
    if family != "autoregressive":
        assert together[0] != together[3]  # equal prompts, two samples


@pytest.mark.parametrize("family", ["masked", "continuous", "llada", "Dream"])
def test_an_answer_is_what_generate_writes_behind_the_prompt(models: dict[str, Model], family: str) -> None:
    """At temperature 0, and of the continuous model from the same noise."""
    model, prompt = models[family], "the cat sat"
    greedy = {**SAMPLERS[family], **({} if family == "continuous" else {"temperature": 0.0})}
    lm = CdlmLM(model, **greedy, halt="FixedSteps(3)")
    (answer,) = lm.generate_until(asks(GREEDY, [prompt]))
    row = lm.session.requests([prompt], template=False, new_tokens=greedy.get("new_tokens"))[0]
    samples = lm.session.run([replace(row, index=numbered([prompt])[0])])
    assert samples.nfe.tolist() == [3]
    names = {token.content for token in lm.tokenizer.added_tokens_decoder.values() if token.special}
    text = samples.texts[0][len(prompt) :]
    for name in names:
        text = text.replace(name, "")
    assert answer == text
    assert answer


def test_an_answer_is_cut_at_the_first_stop_and_at_its_most_tokens(models: dict[str, Model]) -> None:
    for family in ("masked", "continuous"):
        lm = CdlmLM(models[family], **SAMPLERS[family])
        (whole,) = lm.generate_until(asks(GREEDY, ["the cat"]))
        stop = whole[len(whole) // 2]
        (cut,) = lm.generate_until(asks({"until": ["never there", stop]}, ["the cat"]))
        assert cut == whole[: whole.index(stop)]
        (short,) = lm.generate_until(asks({**GREEDY, "max_gen_toks": 3}, ["the cat"]))
        assert whole.startswith(short.rstrip("\ufffd"))  # half of a character
        assert len(short) < len(whole)
        kept = CdlmLM(models[family], **SAMPLERS[family], escape_until=True)
        assert kept.generate_until(asks({"until": [stop]}, ["the cat"])) == [whole]


def test_a_task_says_how_many_tokens_a_foreign_model_generates_unless_its_arguments_do(
    models: dict[str, Model],
) -> None:
    for new, asked, made in ((None, 5, 5), (6, 5, 6), (None, None, 256)):
        lm = CdlmLM(models["llada"], new_tokens=new, halt="FixedSteps(1)", max_length=300)
        lm.generate_until(asks({**GREEDY, "max_gen_toks": asked}, ["the cat"]))
        request = lm._fitting([lm._question("the cat", Wanted(most=asked), 0)])[0]
        assert request.room == made


def test_requests_of_several_sizes_are_served_at_once(models: dict[str, Model]) -> None:
    lm = CdlmLM(models["llada"])
    mixed = [one("the cat", {**GREEDY, "max_gen_toks": 3}), one("a bird sang on the", {**GREEDY, "max_gen_toks": 9})]
    answers = lm.generate_until(mixed)
    assert lm._counts.calls == 3 + 9  # one position a call
    assert answers == [lm.generate_until([request])[0] for request in mixed]


def test_a_task_that_samples_sets_the_temperature_unless_the_arguments_do(
    models: dict[str, Model], capsys: pytest.CaptureFixture[str]
) -> None:
    sampled = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 0.8}
    used = {}
    for name, given_ in (("free", {}), ("fixed", {"temperature": 0.3})):
        lm = CdlmLM(models["llada"], **given_)
        lm.generate_until([*asks(sampled, ["the cat"]), *asks({**sampled, "do_sample": False}, ["the cat"])])
        used[name] = sorted(way.partition("temperature=")[2][:3] for way in lm._ways)
    assert used == {"free": ["0.0", "0.8"], "fixed": ["0.3"]}
    assert "a task asks for temperature 0.8, and model_args has temperature=0.3" in capsys.readouterr().err
    CdlmLM(models["continuous"], steps=2).generate_until(asks({**sampled, "num_beams": 3}, ["the cat"]))
    said = capsys.readouterr().err
    assert "give softmax_temperature" in said
    assert "not used of what the tasks ask for: num_beams" in said


@pytest.mark.parametrize(
    ("family", "given", "asked", "said"),
    [
        ("llada", {"new_tokens": 65}, {}, "new_tokens=65 is more than the 64 positions"),
        ("llada", {"new_tokens": 62}, {}, "texts do not fit into the 64"),
        ("llada", {}, {"max_gen_toks": 300}, "5 of 5 texts do not fit"),
        ("masked", {"new_tokens": LENGTH}, {}, "4 of 5 texts do not fit"),
        ("masked", {"max_length": 4}, {}, "texts do not fit into the 4"),
        ("continuous", {"new_tokens": LENGTH}, {}, "4 of 5 texts do not fit"),
        ("continuous", {"max_length": 4}, {}, "texts do not fit into the 4"),
    ],
)
def test_what_is_longer_than_the_model_is_refused(
    models: dict[str, Model], family: str, given: dict[str, Any], asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(CdlmError) as caught:
        CdlmLM(models[family], **given).generate_until(asks(asked))
    assert said in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_cut_from_the_left_where_that_is_asked_for(models: dict[str, Model], family: str) -> None:
    new = 8
    lm = (
        CdlmLM(models[family], **{**SAMPLERS[family], "new_tokens": new}, max_length=12, truncate=True)
        if (family != "autoregressive")
        else CdlmLM(models[family], new_tokens=new, max_length=12, truncate=True)
    )
    long = "the cat sat on the mat, and the dog saw the cat"
    question = lm._fitting([lm._question(long, Wanted(), 0)])[0]
    tokens = lm._encoded(long)
    assert len(tokens) > 4
    assert question.prompt == tokens[-4:]
    assert question.size == 12
    assert lm.get_model_info()["cdlm"]["truncated"] == 1
    lm.generate_until(asks(GREEDY, [long]))


def test_the_token_that_begins_a_text_stands_before_each_prompt(models: dict[str, Model]) -> None:
    lm = CdlmLM(models["llada"], new_tokens=8, max_length=12, add_bos_token=True, truncate=True)
    bos = lm.tokenizer.bos_token_id
    plain = CdlmLM(models["llada"], new_tokens=8)
    assert lm._encoded("the cat") == [bos, *plain._encoded("the cat")]
    assert lm._fitting([lm._question("the cat sat on the mat", Wanted(), 0)])[0].prompt[0] == bos
    with pytest.raises(CdlmError, match="leave out add_bos_token"):
        CdlmLM(models["masked"], add_bos_token=True).generate_until(asks(GREEDY))


# --- likelihood ---


def test_the_likelihood_of_one_token_is_exact(models: dict[str, Model]) -> None:
    model: Any = models["masked"]
    (given_, (token,)) = encode_pair(tokenizer(), "the cat", " s", names=False)
    row = torch.tensor([[*given_, model.mask_id]])
    expected = model.logits(row).log_softmax(-1)[0, -1, token].item()
    lm = CdlmLM(model)
    assert lm.loglikelihood([one("the cat", " s")]) == [(pytest.approx(expected, rel=1e-5), False)]
    assert lm.get_model_info()["cdlm"]["mean_standard_error"] is None  # one draw, which has no error


@pytest.mark.parametrize("family", ["masked", "continuous"])
def test_a_likelihood_is_the_bound_of_what_follows_the_context(models: dict[str, Model], family: str) -> None:
    model = models[family]
    lm = CdlmLM(model, mc=4, seed=3)
    pairs = [("the cat", " sat on the mat"), ("a bird", " sang"), ("the cat", " ran on the roof"), ("", "the dog")]
    found = lm.loglikelihood([one(*pair) for pair in pairs])
    assert [greedy for _, greedy in found] == [False] * 4
    for pair, (value, _) in zip(pairs, found, strict=True):
        context, target = encode_pair(tokenizer(), *pair, names=False)
        key = torch.tensor([[name_of(pair[0])]])
        scored = torch.tensor([[False] * len(context) + [True] * len(target)])
        text = Text(torch.tensor([[*context, *target]]), scored, None, key)
        alone = model.nats(text, LikelihoodSettings(4, seed=3))[BOUND].total
        assert value == pytest.approx(-float(alone[0]), rel=1e-4)
    for batch in (1, 3):  # alone, and in any batch
        other = CdlmLM(model, mc=4, seed=3, batch_size=batch)
        values = [value for value, _ in other.loglikelihood([one(*pair) for pair in pairs[::-1]])]
        assert values == pytest.approx([value for value, _ in found[::-1]], rel=1e-4)
    error = lm.get_model_info()["cdlm"]["mean_standard_error"]
    assert error > 0


def test_options_behind_one_prompt_are_compared_on_equal_noise(models: dict[str, Model]) -> None:
    """Two options that are the same have the same likelihood."""
    lm = CdlmLM(models["masked"], mc=2)
    a, b = lm.loglikelihood([one("the cat", " sat on"), one("the cat", " sat on")])
    assert a == b


def test_a_rolling_likelihood_is_that_of_the_whole_text_where_it_fits(models: dict[str, Model]) -> None:
    lm = CdlmLM(models["masked"], mc=4)
    text = "the cat sat on the mat."
    (rolling,) = lm.loglikelihood_rolling([one(text)])
    tokens = lm._encoded(text)
    assert len(tokens) < LENGTH
    assert rolling < 0
    short = CdlmLM(models["masked"], mc=4, max_length=len(tokens))
    assert short.loglikelihood_rolling([one(text)]) == [pytest.approx(rolling, rel=1e-5)]
    parts = CdlmLM(models["masked"], mc=4, max_length=len(tokens) // 2)
    assert parts.loglikelihood_rolling([one(text), one("")]) == [pytest.approx(rolling, rel=0.5), 0.0]


def test_a_likelihood_under_guidance_is_refused(models: dict[str, Model]) -> None:
    with pytest.raises(CdlmError, match="leave out cfg_scale"):
        CdlmLM(models["masked"], cfg_scale=0.5).loglikelihood([one("the cat", " sat")])


def test_a_likelihood_that_does_not_fit_is_refused_or_cut(models: dict[str, Model]) -> None:
    request = [one("the cat sat on the mat, and", " the dog")]
    with pytest.raises(CdlmError, match="1 of 1 texts do not fit into the 6"):
        CdlmLM(models["masked"], max_length=6).loglikelihood(request)
    lm = CdlmLM(models["masked"], max_length=6, truncate=True, mc=2)
    lm.loglikelihood(request)
    assert lm.get_model_info()["cdlm"]["truncated"] == 1


def test_models_in_blocks_answer_and_score() -> None:
    model = ssd(vocab=270)
    model.tokenizer, model.length = tokenizer(), 24
    lm = CdlmLM(model, steps=2, mc=2)
    assert lm.generate_until(asks(GREEDY, ["the cat"]))[0]
    assert lm.loglikelihood([one("the cat", " sat on the mat")])[0][0] < 0


# --- chat ---


CHAT = [{"role": "user", "content": "the cat"}]


@pytest.mark.parametrize("family", ["llada", "Dream"])
def test_a_rendered_conversation_has_the_tokens_of_a_chat(models: dict[str, Model], family: str) -> None:
    lm = CdlmLM(models[family])
    rendered = lm.apply_chat_template(CHAT)
    assert rendered.startswith(str(lm.tokenizer.apply_chat_template(CHAT, tokenize=False)))
    assert lm._encoded(rendered) == encode_prompt(lm.tokenizer, CHAT, chat=True)
    assert lm.chat_template(True) == lm.tokenizer.chat_template
    assert lm.chat_template(False) is None
    assert "/" not in lm.tokenizer_name
    other = CdlmLM(models["Dream" if family == "llada" else "llada"])
    assert lm.tokenizer_name != other.tokenizer_name


def test_a_conversation_can_be_continued(models: dict[str, Model]) -> None:
    lm = CdlmLM(models["Dream"])
    begun = [*CHAT, {"role": "assistant", "content": "sat"}]
    assert lm.apply_chat_template(begun, add_generation_prompt=False).endswith("sat")


def test_a_model_without_a_chat_template_refuses_one(models: dict[str, Model]) -> None:
    lm = CdlmLM(models["masked"])
    for call in (lambda: lm.apply_chat_template(CHAT), lambda: lm.chat_template(True)):
        with pytest.raises(CdlmError, match="leave out --apply_chat_template"):
            call()


# --- results ---


def write_task(folder: Path, name: str, rows: list[dict[str, Any]], **fields: Any) -> None:
    """A local task: its rows as JSON lines, and its YAML, which may be JSON."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    (folder / f"{name}.yaml").write_text(json.dumps({**task, "test_split": "test", **fields}))


MATCH = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Word problems in the format of GSM8K, with and without stops; a choice of answers; and the text itself."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": p.prompt, "answer": f"{p.reasoning} #### {p.answer}", "options": [p.answer, "7"], "gold": 0}
        for p in problems(4, 0, "valid", (1, 2), 20)
    ]
    answer = {"doc_to_text": "{{question}}\n", "doc_to_target": "{{answer.split('#### ')[-1]}}", "metric_list": MATCH}
    kwargs = {"until": ["\n\n"], "max_gen_toks": 12}
    number = [{"function": "regex", "regex_pattern": "#### ([0-9]+)"}, {"function": "take_first"}]
    write_task(
        folder, "words", rows, output_type="generate_until", generation_kwargs=kwargs, **answer,
        filter_list=[{"name": "number", "filter": number}],
    )  # fmt: skip
    write_task(folder, "stopless", rows, output_type="generate_until", generation_kwargs={"until": []}, **answer)
    write_task(folder, "bare", rows, output_type="generate_until", **answer)
    write_task(
        folder, "options", rows, output_type="multiple_choice", doc_to_text="{{question}}\n",
        doc_to_choice="{{options}}", doc_to_target="gold",
        metric_list=[{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    )  # fmt: skip
    write_task(
        folder, "text", rows, output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}],
    )  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No network, and the harness's own seeds are of no consequence for other tests."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(lm_eval.utils, "_LOGGING_CONFIGURED", True)  # else its handler keeps a stream of one test
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)


def evaluated(lm: CdlmLM, folder: Path, *names: str, **more: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(model=lm, tasks=list(names), task_manager=manager, bootstrap_iters=0, **more)  # type: ignore[return-value]


WIDE = 200
"""Positions that hold the problems, which the toy tokenizer spells."""


def wide(family: str, models: dict[str, Model]) -> Model:
    made = {"masked": masked_with_tokenizer, "continuous": with_tokenizer}
    return made[family](length=WIDE) if family in made else models[family]


@pytest.mark.parametrize("family", ["masked", "continuous", "llada", "Dream"])
def test_results_hold_what_the_answers_cost(family: str, models: dict[str, Model], tasks: Path) -> None:
    given_ = {k: v for k, v in SAMPLERS[family].items() if k != "temperature"}
    lm = CdlmLM(wide(family, models), **given_, halt="FixedSteps(2)", max_length=WIDE)
    results = evaluated(lm, tasks, "words", "stopless", "bare")
    made = results["config"]["cdlm"]
    count = 12
    assert (made["answers"], made["calls"], made["mean_calls"]) == (count, 2 * count, 2.0)
    assert made["halt_reasons"] == {"criterion": count}
    assert made["tpf"] == made["output_tokens"] / made["calls"] > 1
    assert made["halt"] == [repr(FixedSteps(2))]
    assert made["weights"] == lm.model.need_fingerprint()
    assert made["version"] == cdlm.__version__
    assert made["sampling"] == [repr(lm.session.sampling)]
    json.dumps(made, allow_nan=False)
    for row in results["samples"]["words"]:
        assert row["resps"][0][0].find("\n\n") == -1
        assert 0 <= row["exact_match"] <= 1
    assert all("\n\n" not in row["resps"][0][0] for row in results["samples"]["bare"])  # stops at the harness's own


@pytest.mark.parametrize("family", ["masked", "continuous"])
def test_choices_are_those_of_the_larger_likelihood(family: str, models: dict[str, Model], tasks: Path) -> None:
    lm = CdlmLM(wide(family, models), mc=2)
    results = evaluated(lm, tasks, *("options", "text")[: 2 if family == "masked" else 1])
    for row in results["samples"]["options"]:
        (first, _), (second, _) = row["filtered_resps"]
        assert row["acc"] == float(first >= second)
    if family == "masked":  # of an untrained continuous one it has no floating-point number
        assert results["results"]["text"]["word_perplexity,none"] > 1
    assert results["config"]["cdlm"]["scored"] == 4 * 2 + 4 * (family == "masked")


def test_counts_add_up_to_a_ratio_of_sums(models: dict[str, Model]) -> None:
    lm = CdlmLM(models["llada"], new_tokens=8, steps=8)
    samples = [
        lm.session.with_steps(steps).run(lm.session.requests(["the cat", "a dog"], new_tokens=8)) for steps in (2, 8)
    ]
    sums = Counts.of(samples[0]) + Counts.of(samples[1])
    tokens, calls = (sum(int(f(s).sum()) for s in samples) for f in (lambda s: s.output_tokens, lambda s: s.nfe))
    assert (sums.answers, sums.tokens, sums.calls) == (4, tokens, calls)
    assert sums.summary()["tpf"] == tokens_per_forward(tokens, calls) == tokens / calls
    assert sum(sums.reasons.values()) == 4
    assert tokens_per_forward(0, 0) is None


def test_what_a_policy_counts_is_summed(models: dict[str, Model]) -> None:
    lm = CdlmLM(models["llada"], new_tokens=8, policy="Editing(0.0, edit=0.0)")
    samples = lm.session.run(lm.session.requests(["the cat", "a dog"], new_tokens=8))
    sums = Counts.of(samples) + Counts.of(samples) + Counts(truncated=1)
    revised = 2 * sum(counted["revised"] for counted in samples.counted)
    assert revised > 0
    assert (sums.summary()["revised"], sums.summary()["calls"]) == (revised, 2 * int(samples.nfe.sum()))
    assert Counts().summary() == {"truncated": 0}


def test_the_cache_of_answers_is_refused(models: dict[str, Model], tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match="leave out use_cache"):
        evaluated(CdlmLM(models["masked"]), tasks, "words", use_cache=str(tmp_path / "kept"))


def test_a_text_of_model_args_is_split_at_its_outer_commas(folders: dict[str, Path]) -> None:
    lm = CdlmLM.create_from_arg_string(
        f"pretrained={folders['llada']},halt=SchED(11.85, 3.95),new_tokens=8", {"device": "cpu", "batch_size": "auto"}
    )
    assert repr(lm.session.criterion) == repr(api.parse_criterion("SchED(11.85, 3.95)"))


def test_cuda_where_there_is_none_is_said(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    lm = CdlmLM(folders["llada"], device="cuda:0")
    assert str(lm.device) == str(lm.model.device)
    assert lm.device.type != "cuda"
    assert "in place of cuda:0 the model runs on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("asked", "local", "used"),
    [("cuda:0", None, "cuda:0"), ("cuda:1", None, "cuda:1"), ("cuda:0", "1", "cuda:1"), (None, "1", "cuda:1"),
     ("cpu", "1", "cpu")],
)  # fmt: skip
def test_each_process_has_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch, asked: str | None, local: str | None, used: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert _device_of(asked) == used


def test_processes_gather_answers_and_what_they_cost(models: dict[str, Model], tasks: Path, tmp_path: Path) -> None:
    """In a group of one process."""
    alone = evaluated(CdlmLM(models["llada"], new_tokens=4, max_length=WIDE), tasks, "words")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    try:
        lm = CdlmLM(models["llada"], new_tokens=4, max_length=WIDE)
        assert (lm.rank, lm.world_size) == (0, 1)
        assert lm.all_gather(torch.tensor(3)).tolist() == [3]
        assert lm.all_gather(torch.tensor([3, 4])).tolist() == [3, 4]
        lm.generate_until(asks(GREEDY, ["the cat"]))
        assert lm.gather_object("a") == ["a"]
        assert lm.get_model_info()["cdlm"]["answers"] == 1
        lm.barrier()
        assert evaluated(lm, tasks, "words")["results"] == alone["results"]
    finally:
        torch.distributed.destroy_process_group()


# --- the command ---


@pytest.fixture(autouse=True)
def few_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness reads thousands of files of tasks for each command: here, only those that it is given."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(TaskManager, include_defaults=False))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run the command with arguments that it refuses, with one line of its own and code 2."""

    def check(*argv: str) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main(["lm-eval", *argv])
        said = capsys.readouterr().err
        assert caught.value.code == 2
        assert "Traceback" not in said
        return [line for line in said.splitlines() if line.startswith("cdlm: ")][-1]

    return check


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["runs"], "did you mean run?"),
        (["run", "--tasks", "words"], "needs pretrained"),
        (["run", "--tasks", "words", "--model_args", "pretrained=x,gen_lenght=8"], "did you mean gen_length?"),
        (["run", "--tasks", "words", "--model_args", "pretrained"], "expected `key=value`"),
        (["run", "--tasks", "words", "--model", "hf", "--model_args", "pretrained=x"], "--model cdlm, got 'hf'"),
        (["run", "--tasks", "w", "--model_args", "pretrained=x", "--use_cache", "kept"], "leave out use_cache"),
        (["run", "--tasks", "w", "--model_args", "pretrained=x", "--no_such"], "unrecognized arguments: --no_such"),
        (["run", "--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_bad_input_of_the_command_is_one_line(refused: Callable[..., str], argv: list[str], said: str) -> None:
    assert said in refused(*argv)


def test_without_the_harness_the_command_says_what_to_install(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "cdlm.lm_eval.adapter")
    for argv in (["run", "--tasks", "words"], ["ls", "tasks"]):
        assert "pip install 'cdlm[lm-eval]'" in refused(*argv)


def test_the_command_writes_results_with_calls_and_tpf(
    folders: dict[str, Path],
    tasks: Path,
    tmp_path: Path,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    common = ["run", "--include_path", str(tasks), "--tasks"]
    arguments = (
        f"pretrained={folders['llada']},gen_length=8,steps=4,block_length=4,halt=SchED(7.5, 2.5),max_length={WIDE}"
    )
    main(["lm-eval", *common, "words", "--model_args", arguments, "--output_path", str(tmp_path), "--log_samples"])
    shown = capsys.readouterr()
    assert "exact_match" in shown.out
    (file,) = tmp_path.rglob("results_*.json")
    config = json.loads(file.read_text())["config"]
    assert config["model"] == "cdlm"
    assert config["batch_size"] == "auto"
    assert config["cdlm"]["tpf"] == config["cdlm"]["output_tokens"] / config["cdlm"]["calls"]
    assert 1 <= config["cdlm"]["mean_calls"] <= 4
    assert (len(list(tmp_path.rglob("samples_words_*.jsonl")))) == 1
    assert "Tasks not found: wrds" in refused(*common, "wrds", "--model_args", arguments)
    own = tmp_path / "own"
    masked_with_tokenizer(length=WIDE).save_pretrained(own)
    said = refused(*common, "words", "--model_args", f"pretrained={own}", "--apply_chat_template")
    assert "the tokenizer of own has no chat template" in said


SHOWN = [argv for name, *argv in commands_of("docs/lm-eval.md") if name == "lm-eval" and "model_args" in " ".join(argv)]


@pytest.mark.parametrize("argv", SHOWN, ids=range(len(SHOWN)))
def test_the_conventions_of_the_page_are_samplers_of_their_models(
    models: dict[str, Model], argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their policy suits the length, and their rule the model."""
    _, asked = understood(argv)
    arguments = read_arguments(asked.model_args)
    model = models["Dream" if "Dream" in str(arguments.pretrained) else "llada"]
    monkeypatch.setattr(model, "length", 4096)  # as long as the published ones
    own = {**asked.model_args}
    own.pop("model_path", None)
    lm = CdlmLM(**{**own, "pretrained": model, "max_length": 2048})
    if arguments.new_tokens is not None:
        assert isinstance(lm.session.sampling, Unmasking)
        lm.session.sampling.policy.check(arguments.new_tokens, model.constants)  # type: ignore[attr-defined]
        (request,) = lm.session.requests(["the cat"], new_tokens=arguments.new_tokens)
        assert lm.session.steps_of(request) == arguments.settings.get("steps", arguments.new_tokens)


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    main(["lm-eval"])
    assert "cdlm lm-eval run --model_args pretrained=RUN" in capsys.readouterr().out
