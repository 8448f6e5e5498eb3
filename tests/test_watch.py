"""Pages in which samples form: what they show is what was drawn and replayed, and texts of models stay texts."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import PROGRAM, tab
from toys import lively, masked_with_tokenizer, tokenizer, with_tokenizer

import cdlm
from cdlm.core.errors import CdlmError
from cdlm.core.inert import visible
from cdlm.core.types import HaltReason
from cdlm.halting import KL, Criterion, Entropy, FixedSteps, Never, NormConvergence, Patience
from cdlm.recording.record import Record, Switches
from cdlm.sampling.recordings import recording_of, replayed
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import Session
from cdlm.sampling.watch import frames
from cdlm.sampling.watch.frames import END, NOTHING, panel
from cdlm.sampling.watch.page import MOST_SAMPLES, as_json, notebook, page

STEPS, PROMPT = 14, "the cat"
KINDS = ("continuous", "committed", "masked")
RULES = (Patience(2), Entropy(5.0), KL(0.02), FixedSteps(5), FixedSteps(STEPS - 4) | Patience(4))


@cache
def session_of(kind: str) -> Session:
    """A session of a small model with a tokenizer, in whose runs something happens."""
    if kind == "masked":
        return cdlm.open_session(masked_with_tokenizer(), temperature=0.7, seed=1)
    model = lively(len(tokenizer()))
    model.tokenizer, model.length = tokenizer(), 12
    commit: dict[str, Any] = {} if kind == "continuous" else {"commit": "Threshold(0.9999999)"}
    return cdlm.open_session(model, steps=STEPS, seed=1, **commit)


@cache
def watched(kind: str) -> Samples:
    session = session_of(kind)
    return session.watched().run(session.requests([PROMPT], 3))


@cache
def shown(kind: str, rules: Sequence[Criterion] | None = RULES) -> dict[str, Any]:
    return panel(watched(kind), rules, MOST_SAMPLES)


def numbers(sample: dict[str, Any], until: int) -> list[int]:
    """The numbers of the texts at each position after a frame."""
    now = list(sample["start"])
    for changes in sample["changes"][: until + 1]:
        for place, number in zip(changes[::2], changes[1::2], strict=True):
            now[place] = number
    return now


def text(one: dict[str, Any], i: int, frame: int, of_text: bool = True) -> str:
    """What the page reads at a frame."""
    sample = one["samples"][i]
    kept = sample["text"] if of_text else [1] * len(sample["text"])
    pieces = [one["pieces"][number] for number, real in zip(numbers(sample, frame), kept, strict=True) if real]
    return "".join(pieces).replace(END, "\n")


# --- what is on the page ---


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_step_shows_the_sample(kind: str) -> None:
    one, samples = shown(kind), watched(kind)
    assert len(one["samples"]) == len(samples)
    for i, sample in enumerate(samples):
        assert text(one, i, len(one["steps"]) - 1) == visible(sample.text)
        assert one["samples"][i]["calls"] == sample.nfe == one["samples"][i]["nfe"][-1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_shows_what_the_loop_had_then(kind: str) -> None:
    session, one = session_of(kind).watched(), shown(kind)
    requests, seen, confident = session.requests([PROMPT], 3), 0, 0
    for step in session.sampling.loop(session.model, session.options, 64).steps(requests):
        for place, row in enumerate(step.counts.row):
            request, sample, frame = requests[row], one["samples"][row], int(step.state.step[place])
            tokens, open_ = step.state.tokens[place], step.state.open[place]
            if step.canvas is not None:
                done = step.canvas[place] != (-1 if session.model.mask_id is None else session.model.mask_id)
                tokens = torch.where(done, step.canvas[place], tokens)
                committed = [when <= frame for when in sample["commits"]]
                assert committed == (done | request.given).tolist()
            if not step.counts.done[place]:
                tokens = torch.where(request.given, request.tokens, tokens)
                expected = visible(str(tokenizer().decode(tokens))).replace(str(tokenizer().eos_token), "\n")
                assert text(one, row, frame, of_text=False) == expected
                seen += 1
            for name, top in one["maps"].items():
                cells = np.frombuffer(base64.b64decode(sample["maps"][name]), np.uint8).reshape(len(one["steps"]), -1)
                assert ((cells[frame] == NOTHING) == ~open_.numpy()).all()
                values = step.state.signals[name][place].numpy()
                assert np.allclose(cells[frame] / 254 * top, values, atol=0.006 * top) or not open_.all()
                assert np.allclose((cells[frame] / 254 * top)[open_], values[open_], atol=0.006 * top)
                confident += 1
    assert seen > STEPS
    assert confident > STEPS
    assert set(one["maps"]) == {"confidence", "entropy"}


@pytest.mark.parametrize("kind", KINDS)
def test_rules_halt_where_replay_and_a_live_run_halt(kind: str) -> None:
    session, samples, one = session_of(kind), watched(kind), shown(kind)
    recording = recording_of(samples, session)
    halted = 0
    for number, rule in enumerate(RULES):
        again = replayed(recording, rule, tokenizer())
        live = session.with_criterion(rule).run(session.requests([PROMPT], 3))
        for i, sample in enumerate(one["samples"]):
            halt = sample["halts"][number]
            assert halt["text"] == visible(again.texts[i]) == visible(live.texts[i])
            assert (halt["step"], halt["calls"]) == (again.steps[i], again.nfe[i]) == (live.steps[i], live.nfe[i])
            assert halt["halted"] == (live.reason[i] is HaltReason.CRITERION)
            assert halt["saved"] == pytest.approx(1 - live.nfe[i] / samples.nfe[i], abs=1e-4)
            if halt["halted"]:
                assert one["steps"][halt["frame"]] == halt["step"]
                halted += 1
                if kind == "continuous":
                    assert text(one, i, halt["frame"]) == halt["text"]
    assert halted > len(RULES)


def test_curves_are_the_signals_that_were_recorded() -> None:
    samples, one = watched("continuous"), shown("continuous")
    assert samples.record is not None
    assert {"switches", "mean_entropy", "x0_norm", "angle"} <= set(one["curves"])
    for i, sample in enumerate(one["samples"]):
        assert sample["curves"]["switches"] == samples.record.switch_counts()[:, i].tolist()
        assert np.allclose(sample["curves"]["mean_entropy"], samples.record.signals["mean_entropy"][:, i], rtol=1e-3)
        assert sample["curves"]["mean_kl"][0] is None  # infinite at the first step


def test_a_run_of_a_thousand_steps_more_shows_some_of_them_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "MOST_FRAMES", 6)
    one, whole = panel(watched("continuous"), RULES, MOST_SAMPLES), shown("continuous")
    steps = one["steps"]
    assert (steps[0], steps[-1]) == (1, STEPS)
    assert len(steps) < STEPS
    assert steps == sorted(set(steps))
    assert f"{STEPS} steps, and the page shows {len(steps)} of them" in one["notes"][0]
    for i, sample in enumerate(one["samples"]):
        assert [halt["step"] for halt in sample["halts"] if halt["halted"]] == [
            steps[halt["frame"]] for halt in sample["halts"] if halt["halted"]
        ]
        for frame, step in enumerate(steps):
            assert text(one, i, frame) == text(whole, i, step - 1)


def long_run(steps: int, positions: int) -> Samples:
    """Samples of a made-up run of many steps, at each of which a token changes."""
    samples, rng = watched("continuous")[:1], np.random.default_rng(0)
    first = np.zeros((positions,), np.uint32)
    step = np.concatenate([first, np.arange(1, steps)]).astype(np.uint32)
    position = np.concatenate([np.arange(positions), rng.integers(0, positions, steps - 1)]).astype(np.uint16)
    token = rng.integers(5, 260, len(step)).astype(np.uint32)
    switches = Switches(step, np.zeros_like(step), position, token)
    nfe, level = np.arange(1, steps + 1, dtype=np.int32)[:, None], np.linspace(9, 1, steps)[:, None]
    chance = {"confidence": rng.random((steps, 1, positions)).astype(np.float16)}
    record = Record(level, nfe, {}, switches, ended=np.ones(1, bool), positions=chance)
    tokens, yes = np.zeros((1, positions), np.int64), np.ones((1, positions), bool)
    tokens[0, position] = token  # of several the last stays
    return replace(
        samples, record=record, tokens=tokens, given=~yes, valid=yes, shown=yes, nfe=nfe[-1].astype(np.int64),
        steps=np.array([steps]), budget=steps,
    )  # fmt: skip


def test_ten_thousand_steps_are_a_page_of_a_few_hundred() -> None:
    samples = long_run(10_000, 64)
    one = panel(samples, [FixedSteps(1234)], MOST_SAMPLES)
    assert len(one["steps"]) == frames.MOST_FRAMES + 1
    assert 1234 in one["steps"]
    assert "10,000 steps" in one["notes"][0]
    assert len(page([samples])) < 1_000_000


def test_no_more_samples_are_shown_than_there_is_room_for_and_the_page_says_so() -> None:
    one = panel(watched("masked"), None, 2)
    assert len(one["samples"]) == 2
    assert one["notes"] == ["The run has 3 samples, and the page shows the first 2."]


def test_without_rules_those_are_tried_that_suit_the_model() -> None:
    of_continuous, of_masked = (shown(kind, None)["rules"] for kind in ("continuous", "masked"))
    assert any(rule.startswith("NormConvergence") for rule in of_continuous)
    assert any(rule.startswith("SchED") for rule in of_masked)
    assert not set(of_continuous) & {repr(Never())}


def test_samples_that_a_rule_has_halted_show_that_and_try_no_other() -> None:
    session = session_of("continuous").with_criterion(FixedSteps(4)).watched()
    one = panel(session.run(session.requests([PROMPT], 2)), None, MOST_SAMPLES)
    assert one["rules"] == []
    assert "no other can be tried" in one["notes"][0]
    assert [sample["last"] for sample in one["samples"]] == [3, 3]


def test_samples_of_which_one_was_taken_twice_show_it_twice() -> None:
    one = panel(watched("masked").select(np.array([1, 1, 0])), RULES, MOST_SAMPLES)
    first, second, other = one["samples"]
    assert first == second
    assert other["index"] != first["index"]
    assert first["maps"] == panel(watched("masked")[1:2], RULES, MOST_SAMPLES)["samples"][0]["maps"]


def test_a_record_without_positions_has_the_other_maps() -> None:
    session = session_of("masked").recorded()
    one = panel(session.run(session.requests([PROMPT], 1)), None, MOST_SAMPLES)
    assert one["maps"] == {}
    assert one["samples"][0]["maps"] == {}


def test_padding_is_no_position() -> None:
    session = session_of("masked").watched()
    samples = session.run(session.requests(["the [3] on the mat", "a [2]"]))
    assert not samples.valid.all()
    for sample, valid in zip(panel(samples, None, 2)["samples"], samples.valid, strict=True):
        assert len(sample["given"]) == len(sample["text"]) == valid.sum()


# --- the file ---


class Elements(HTMLParser):
    """The elements of a page, and the text in each script and style."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.held: dict[str, list[str]] = {"script": [], "style": []}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag in self.held:
            self.held[tag].append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem in self.held:
            self.held[self.cdata_elem][-1] += data


EVIL = (
    "</script><script>document.title='evil'</script>", "<!--<script>", "]]></textarea><img src=x onerror=alert(1)>",
    "{{script}} &lt; & \u2028 \u2029 \u202e \x1b[2J \x00 \ud800 \ufeff",
)  # fmt: skip


def evil(samples: Samples) -> Samples:
    """The samples with names, prompts and tokens that would break out of a page."""
    assert samples.origin is not None
    odd = "".join(EVIL)

    class Tokenizer:
        eos_token_id, mask_token_id, eos_token = None, None, None

        def decode(self, ids: Any, **_: Any) -> str:
            return "".join(EVIL[int(token) % len(EVIL)] for token in ids)

    origin = replace(samples.origin, tokenizer=Tokenizer())  # pyright: ignore[reportArgumentType]
    made_by = {**samples.made_by, "model": odd, "sampling": odd}
    return replace(samples, origin=origin, made_by=made_by, prompts=[odd] * len(samples))


def test_what_models_say_cannot_leave_its_place() -> None:
    plain, odd = Elements(page([watched("masked")])), Elements(page([evil(watched("masked"))]))
    assert odd.tags == plain.tags
    assert [name for name, _ in odd.attributes] == [name for name, _ in plain.attributes]
    assert odd.held["style"] == plain.held["style"]
    assert odd.held["script"][1] == plain.held["script"][1]
    data = json.loads(odd.held["script"][0])
    assert data["panels"][0]["samples"][0]["prompt"] == visible("".join(EVIL))
    assert set(data["panels"][0]["pieces"]) <= {"", *map(visible, EVIL)}
    assert page([evil(watched("masked"))]).isascii() or "▶" in page([watched("masked")])


@pytest.mark.parametrize("odd", EVIL)
def test_json_in_a_page_has_no_character_of_a_tag_and_reads_back(odd: str) -> None:
    made = as_json({odd: [odd]})
    assert not set(made) & set("<>&\u2028\u2029")
    assert made.isascii()
    assert json.loads(made) == {odd: [odd]}


def test_the_page_allows_its_own_script_and_style_alone_and_asks_for_nothing() -> None:
    made = page([watched("continuous")])
    elements = Elements(made)
    policy = next(html.unescape(v or "") for name, v in elements.attributes if name == "content" and "src" in (v or ""))
    for kind, held in (("script", elements.held["script"][1]), ("style", elements.held["style"][0])):
        digest = base64.b64encode(hashlib.sha256(held.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';")
    assert not {name for name, _ in elements.attributes} & {"src", "href", "style", "onclick", "onload"}
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|Function\(", made)


def test_a_page_is_written_whole_with_models_side_by_side(tmp_path: Path) -> None:
    file = watched("continuous").watch(
        tmp_path / "new" / "page.html", rules=["Patience(2)", NormConvergence(0.5)], beside=[watched("masked")]
    )
    first, second = json.loads(Elements(file.read_text(encoding="utf-8")).held["script"][0])["panels"]
    assert (first["family"], second["family"]) == ("continuous", "masked")
    assert first["rules"] == ["Patience(steps=2)", "NormConvergence(delta=0.5)"]
    assert second["rules"] == ["Patience(steps=2)"]
    assert "NormConvergence" in second["notes"][0]
    assert second["notes"][0].startswith("Left out: ")


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    file, samples = tmp_path / "page.html", watched("masked")
    session = session_of("masked")
    with pytest.raises(CdlmError, match="draw them with watch=True"):
        session.run(session.requests(n=1)).watch(file)
    with pytest.raises(CdlmError, match=r"end its name in \.html"):
        samples.watch(tmp_path / "page.pdf")
    with pytest.raises(CdlmError, match=r"none of the rules can be tried.*x0_norm"):
        samples.watch(file, rules=["NormConvergence(0.1)"])
    with pytest.raises(CdlmError, match="rules are a list"):
        samples.watch(file, rules="Patience(2)")
    assert samples.origin is not None
    with pytest.raises(CdlmError, match="no tokenizer"):
        replace(samples, origin=replace(samples.origin, tokenizer=None)).watch(file)
    with pytest.raises(CdlmError, match="no samples to watch"):
        samples[:0].watch(file)
    assert not file.exists()


def test_generate_keeps_what_is_watched_and_draws_the_same() -> None:
    model = with_tokenizer()
    plain = cdlm.generate(model, [PROMPT], n=2, steps=4)
    kept = cdlm.generate(model, [PROMPT], n=2, steps=4, watch=True)
    assert plain.texts == kept.texts
    assert kept.record is not None
    assert set(kept.record.positions) == {"confidence", "entropy"}
    assert kept.record.positions["entropy"].shape == (4, 2, kept.tokens.shape[1])
    assert cdlm.generate(model, n=1, steps=4, record=True).record.positions == {}  # pyright: ignore
    both, second = panel(kept, None, 2), panel(kept[1:], None, 2)
    assert [text(both, 1, frame) for frame in range(4)] == [text(second, 0, frame) for frame in range(4)]
    assert both["samples"][1]["maps"]["confidence"] == second["samples"][0]["maps"]["confidence"]


def test_a_notebook_shows_the_page_in_a_frame_of_its_own_and_else_the_texts() -> None:
    made = notebook(watched("masked"))
    frame = Elements(made)
    assert frame.tags == ["iframe"]
    attributes = dict(frame.attributes)
    assert attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"] == page([watched("masked")], most_samples=2)
    session = session_of("masked")
    plain = replace(session.run(session.requests(n=1)), texts=[EVIL[0]])
    assert Elements(plain._repr_html_()).tags == ["pre"]


# --- in a browser ---


@pytest.mark.skipif(PROGRAM is None, reason="needs Chromium")
def test_a_browser_shows_the_page_without_an_error(tmp_path: Path) -> None:
    first, second = watched("continuous"), evil(watched("masked"))
    file = first.watch(tmp_path / "page.html", rules=[FixedSteps(5)], beside=[second])
    one = panel(first, [FixedSteps(5)], MOST_SAMPLES)
    read = "document.querySelector('.text').textContent"
    place = "document.getElementById('place').textContent.split(' ')[1]"
    with tab() as browser:
        browser.open(file, "step=5")
        assert browser.run(place) == "5"
        assert browser.run(read).replace(END, "\n") == text(one, 0, 4, of_text=False)
        for key, step in (("ArrowRight", "6"), ("ArrowLeft", "5"), ("Home", "1"), ("End", str(STEPS))):
            browser.press(key)
            assert browser.run(place) == step
        assert browser.run(read).replace(END, "\n") == text(one, 0, STEPS - 1, of_text=False)
        browser.run("document.querySelector('.rules button').click()")
        assert browser.run(place) == "5"
        browser.run("s = document.getElementById('slider'); s.value = 6; s.dispatchEvent(new Event('input'))")
        assert browser.run(place) == "7"
        browser.run("s = document.getElementById('sample'); s.value = 1; s.dispatchEvent(new Event('change'))")
        assert browser.run(read).replace(END, "\n") == text(one, 1, 6, of_text=False)
        for name in ("changes", "entropy", "commits"):
            browser.run(f"m = document.getElementById('map'); m.value = '{name}'; m.dispatchEvent(new Event('change'))")
        browser.press("Home")
        browser.press(" ")
        assert browser.run("document.getElementById('play').getAttribute('aria-label')") == "Pause"
        browser.run("new Promise((done) => new MutationObserver(done).observe(place, {childList: true}))")
        browser.press(" ")
        assert int(browser.run(place)) > 1
        for width, scheme in ((360, "light"), (360, "dark"), (1200, "dark")):
            browser.looks(width, 800, scheme)
            assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("document.title") != "evil"
        assert browser.run("document.querySelectorAll('img, main script').length") == 0
        assert browser.errors == []
