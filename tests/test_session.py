"""Laws of sessions: of what they run, of the settings that they take, and of the processes that share their work."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from masked_toys import Toy
from oracle import Oracle
from toys import autoregressive_with_tokenizer, langflow, masked_with_tokenizer, plaid, ssd, system, with_tokenizer

import cdlm
from cdlm import api
from cdlm.continuous.grids import LogT, UpperEnds, Warped
from cdlm.continuous.guidance import Guidance
from cdlm.continuous.projections import Greedy, MultiHot
from cdlm.continuous.sampler import Diffusion, DiffusionSettings
from cdlm.continuous.solvers import Ancestral, Heun, Renoise
from cdlm.core.devices import Precision
from cdlm.core.errors import CdlmError
from cdlm.core.parallel import LocalWorkers, Workers
from cdlm.halting import Criterion, FixedSteps, Full, Never, NormConvergence, Patience
from cdlm.masked.model import Constants, Function
from cdlm.masked.sampler import Unmasking, UnmaskingSettings
from cdlm.policies.confidence import Threshold
from cdlm.policies.llada import LLaDA
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import Model, Session

N = 6


class Exact(Oracle, Model):
    """A continuous model whose arithmetic is the same, bit for bit, in any batch."""

    length = N

    @property
    def defaults(self) -> Diffusion:
        return Diffusion(steps=10)


def make(kind: str) -> Model:
    return Exact() if kind == "continuous" else Toy()


def session_of(kind: str, criterion: Criterion | None = None, **changes: Any) -> Session:
    sampling = Diffusion(steps=10) if kind == "continuous" else Unmasking(LLaDA(8), temperature=0.7)
    return Session(make(kind), sampling, RunOptions(criterion or Never(), seed=3), **changes)


def requests_of(kind: str, count: int = 7) -> list[Request]:
    if kind == "masked":
        return canvases([[3 + i % 4] for i in range(count)], 8)
    return [Request(i, torch.arange(N), torch.arange(N) < i % 3) for i in range(count)]


def same(one: Samples, two: Samples) -> None:
    for name in ("tokens", "nfe", "steps", "index", "given", "valid", "shown", "settled"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    for name in ("texts", "reason", "seed", "budget", "spans", "prompts", "made_by"):
        assert getattr(one, name) == getattr(two, name), name
    assert (one.record is None) == (two.record is None)
    if one.record is not None and two.record is not None:
        assert np.array_equal(one.record.nfe, two.record.nfe)
        assert one.record.signals.keys() == two.record.signals.keys()
        for name, values in one.record.signals.items():
            assert np.array_equal(values, two.record.signals[name], equal_nan=True), name


both = pytest.mark.parametrize("kind", ["continuous", "masked"])


# --- runs ---


@both
@pytest.mark.parametrize("rule", [FixedSteps(4), Patience(1), FixedSteps(3) & Patience(1), FixedSteps(1)], ids=repr)
def test_a_run_under_a_rule_is_a_prefix_of_the_full_run(kind: str, rule: Criterion) -> None:
    session, requests = session_of(kind).recorded(), requests_of(kind)
    full, halted = session.run(requests), session.with_criterion(rule).run(requests)
    assert full.record is not None
    assert halted.record is not None
    assert bool((halted.steps <= full.steps).all())
    assert bool((halted.steps < full.steps).any())
    there = halted.record.nfe > 0
    assert np.array_equal(there.sum(0), halted.steps)
    assert np.array_equal(halted.record.nfe[there], full.record.nfe[there])
    for name, values in halted.record.signals.items():
        assert np.array_equal(values[there], full.record.signals[name][there], equal_nan=True), name
    assert np.array_equal(full.record.tokens_at(halted.steps - 1, full.tokens), halted.tokens)


@both
def test_a_session_serves_any_number_of_runs_and_changes_of_it_leave_it_as_it_is(kind: str) -> None:
    session, requests = session_of(kind), requests_of(kind)
    first = session.run(requests)
    for other in (session.with_criterion(FixedSteps(2)), session.recorded(), session.with_steps(4), session.alone()):
        other.run(requests)
    same(session.run(requests), first)
    same(replace(session, batch_size=2).run(requests), first)
    assert session.recorded().recorded(False).options == session.options
    assert session.with_steps(4).settings != session.settings


class Placed(Function):
    """A model that says that it is elsewhere."""

    def move(self, device: str) -> None:
        self._device = torch.device(device)


def moved(kind: str) -> tuple[Session, list[Request]]:
    """A session whose model was moved, and requests of it."""
    if kind == "continuous":
        model = with_tokenizer()
        session = api.open_session(model, steps=3)
        requests = session.requests()
        model.to("meta")
        return session, requests
    function = Placed(lambda tokens, _: torch.zeros(*tokens.shape, 9), Constants(8))
    session = api.open_session(function)
    function.move("meta")
    return session, canvases([[1]], 4)


@both
def test_a_session_whose_model_was_moved_is_refused_in_one_line(kind: str) -> None:
    session, requests = moved(kind)
    uses = (
        lambda: session.run(requests),
        lambda: session.with_criterion(FixedSteps(2)).run(requests),
        lambda: session.with_steps(2).run(requests),
        lambda: session.recorded().run(requests),
        lambda: session.alone().run(requests),
    )
    for use in uses:
        with pytest.raises(
            CdlmError, match="moved from cpu to meta since the session was opened: open another"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)


@both
def test_a_run_of_nothing_is_refused(kind: str) -> None:
    with pytest.raises(CdlmError, match="needs requests, got none"):
        session_of(kind).recorded().run([])


def test_rules_that_a_family_has_no_use_for_are_named() -> None:
    assert session_of("continuous").refuses(NormConvergence(0.1)) == ""
    reason = session_of("masked").refuses(NormConvergence(0.1))
    assert "a masked model has none" in reason
    with pytest.raises(CdlmError, match="a masked model has none"):
        session_of("masked", NormConvergence(0.1))


# --- several processes ---


def counted(log: str, kind: str, device: str) -> Model:
    """Opens a model and leaves a line."""
    with Path(log).open("a") as file:
        file.write(f"{os.getpid()} {device}\n")
    return make(kind)


def place_of(model: Model, share: int) -> tuple[int, int]:
    return os.getpid(), share


def ends_its_process(here: object, share: int) -> int:
    if share:
        os._exit(1)
    return share


def breaks(here: object, share: int) -> int:
    if share:
        raise CdlmError("of a worker")
    return share


class Pool:
    """Two processes with a model, and what they have opened."""

    def __init__(self, kind: str, log: Path):
        self.kind, self.log = kind, log
        self.workers: Workers[Model] = LocalWorkers(partial(counted, str(log), kind), 2)

    @property
    def opened(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture(scope="module", params=["continuous", "masked"])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(request.param, tmp_path_factory.mktemp("pool") / "opened")
    with made.workers:
        yield made


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("rule", [Never(), Patience(1)], ids=repr)
def test_two_processes_draw_what_one_does(pool: Pool, rule: Criterion, count: int) -> None:
    session = session_of(pool.kind, rule, workers=pool.workers, batch_size=3).recorded()
    requests = requests_of(pool.kind, count)
    same(session.run(requests), session.alone().run(requests))
    same(session.run(requests[::-1]), session.alone().run(requests[::-1]))
    assert len(pool.opened) <= 1


def test_each_further_process_opens_its_model_once(pool: Pool) -> None:
    session, requests = session_of(pool.kind, workers=pool.workers), requests_of(pool.kind)
    for other in (session, session.with_steps(4), session.with_criterion(FixedSteps(2))):
        other.run(requests)
    (line,) = pool.opened
    (here, first), (there, second) = pool.workers.map(place_of, session.model, [0, 1])
    assert (here, first, second) == (os.getpid(), 0, 1)
    assert line == f"{there} cpu"
    assert there != here


def test_an_error_of_a_worker_is_an_error_of_the_run_and_the_worker_goes_on(pool: Pool) -> None:
    session, requests = session_of(pool.kind, workers=pool.workers), requests_of(pool.kind, 4)
    full = replace(requests[1], given=torch.ones_like(requests[1].given))
    with pytest.raises(CdlmError, match="a prompt leaves nothing to generate"):
        session.run([requests[0], full, *requests[2:]])
    same(session.run(requests), session.alone().run(requests))


def test_what_a_worker_refuses_and_its_end_are_one_line() -> None:
    with LocalWorkers(str, 2) as workers:
        with pytest.raises(CdlmError, match="of a worker"):
            workers.map(breaks, "here", [0, 1])
        with pytest.raises(CdlmError, match="a process ended") as caught:
            workers.map(ends_its_process, "here", [0, 1])
        assert "\n" not in str(caught.value)


def test_several_devices_need_a_folder_and_a_number(tmp_path: Path) -> None:
    with pytest.raises(CdlmError, match="has no folder"):
        api.open_session(with_tokenizer(), devices=2)
    with_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(CdlmError, match="devices"):
        api.open_session(tmp_path / "model", devices=0)


def test_closed_processes_serve_no_more_and_rules_that_cannot_travel_are_named() -> None:
    class Local(Never):
        """Of no module, so that no other process can find it."""

    with LocalWorkers(str, 2) as workers:
        with pytest.raises(CdlmError, match="other processes cannot be given this work") as caught:
            workers.map(partial(place_of_rule, Local()), "here", [0, 1])
        assert "\n" not in str(caught.value)
    with pytest.raises(CdlmError, match="the session was closed"):
        workers.map(partial(place_of_rule, Never()), "here", [0, 1])


def place_of_rule(rule: Criterion, opened: object, share: int) -> str:
    return f"{rule} {opened} {share}"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_further_processes_load_the_model_in_its_own_precision(tmp_path: Path, precision: Precision) -> None:
    with_tokenizer().save_pretrained(tmp_path / "model")
    model = cdlm.load(tmp_path / "model", device="cpu", precision=precision)
    with api.open_session(model, steps=2, devices=2) as session:
        assert session.workers is not None
        loaded = session.workers.map(precision_of, model, [0, 1])
    assert loaded == [precision, precision]


def precision_of(model: Model, _: int) -> str:
    return model.precision


def test_a_run_is_of_requests_that_can_be_told_apart() -> None:
    session = session_of("continuous")
    one, two = requests_of("continuous", 2)
    shorter = Request(5, torch.arange(N - 1), torch.arange(N - 1) < 1)
    for requests, says in (([one, one], "the same index"), ([one, shorter], "one length, got 5 and 6")):
        with pytest.raises(CdlmError, match=says):
            session.run(requests)
    assert session.run((one, two)).index.tolist() == [0, 1]


def test_prompts_may_come_from_anything_that_lists_texts() -> None:
    for kind in ("continuous", "masked"):
        session, texts = api.open_session(speaking(kind)), ["the", "a cat"]
        for prompts in (texts, tuple(texts), (text for text in texts), np.array(texts)):
            assert [request.prompt for request in session.requests(prompts)] == texts


@pytest.mark.slow
def test_a_folder_is_sampled_by_two_processes(tmp_path: Path) -> None:
    with_tokenizer().save_pretrained(tmp_path / "model")
    with api.open_session(tmp_path / "model", steps=4, devices=2, device="cpu") as session:
        requests = session.requests(["the [4] sat", "a"], 3)
        shared, alone = session.run(requests), session.alone().run(requests)
    assert shared.index.tolist() == alone.index.tolist() == list(range(6))
    assert (shared.tokens == alone.tokens).mean() > 0.99  # float32: a tie may fall either way in another batch
    assert shared.prompts == alone.prompts


# --- flat settings ---

OTHER: dict[str, dict[str, Any]] = {
    "continuous": {
        "solver": "Heun()", "grid": "LogT()", "projection": "Greedy()", "softmax_temperature": 0.9,
        "score_temperature": 0.8, "guidance": 2.0, "init_scale": 0.7, "passes": 2, "commit": "Threshold(0.6)",
        "reopen": 0.3, "read_out": "Decoder()",
    },
    "masked": {"policy": "Threshold(0.6)", "temperature": 0.4, "cfg_scale": 1.5, "cache": "dual",
        "sparse": "SparseD(1.0)"},
}  # fmt: skip
"""A value of each flat setting that is not its default."""
BESIDE: dict[str, dict[str, Any]] = {"reopen": {"commit": "Threshold(0.6)"}}
"""What a setting needs beside it."""
REFUSED = {"cache": "keeps no keys and values", "read_out": "says its tokens"}
"""Settings of other models of the family, and what this one says to them."""
FLAT = {"continuous": DiffusionSettings, "masked": UnmaskingSettings}


def speaking(kind: str) -> Model:
    return with_tokenizer(wrong_given=0.1) if kind == "continuous" else masked_with_tokenizer()


@both
def test_every_flat_setting_is_one_of_generate(kind: str) -> None:
    assert OTHER[kind].keys() == {field.name for field in fields(FLAT[kind])}
    model = speaking(kind)
    for name, value in OTHER[kind].items():
        beside = BESIDE.get(name, {})
        session = api.open_session(model, **{name: value}, **beside)
        assert session.sampling != model.sampling, name
        assert session.settings != model.sampling.settings, name
        if name in REFUSED:
            with pytest.raises(CdlmError, match=REFUSED[name]):
                cdlm.generate(model, **{name: value})
            continue
        steps: dict[str, Any] = beside if name == "policy" else {"steps": 3, **beside}
        other, plain = ({name: chosen, **steps} for chosen in (value, None))  # None: as in the model's paper
        assert cdlm.generate(model, **other).made_by["sampling"] != cdlm.generate(model, **plain).made_by["sampling"]


def test_settings_may_be_texts_and_objects() -> None:
    model, masked = with_tokenizer(), masked_with_tokenizer()
    made = [api.open_session(model, solver=s, grid=g, projection=p, guidance=2.0).sampling for s, g, p in (
        ("Heun()", "LogT()", "Greedy()"), (Heun(), LogT(), Greedy()))]  # fmt: skip
    assert made[0] == made[1] == Diffusion(200, Heun(), LogT(), Guidance(projection=Greedy(), scale=2.0))
    policies = [api.open_session(masked, policy=policy).sampling for policy in ("Threshold(0.6)", Threshold(0.6))]
    assert policies[0] == policies[1] == Unmasking(Threshold(0.6), temperature=1.0)


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (
            "continuous",
            {"score_temprature": 0.9},
            r"no setting 'score_temprature' \(did you mean score_temperature\?\)",
        ),
        ("continuous", {"sovler": "Heun()"}, r"no setting 'sovler' \(did you mean solver\?\)"),
        ("masked", {"polcy": "LLaDA()"}, r"no setting 'polcy' \(did you mean policy\?\)"),
        ("masked", {"about": 1}, "no setting 'about'"),
        (
            "continuous",
            {"temperature": 0.5},
            "temperature is a setting of masked models and autoregressive models, and this one is continuous",
        ),
        ("continuous", {"policy": "LLaDA()"}, "policy is a setting of masked models, and this one is continuous"),
        ("masked", {"guidance": 2.0}, "guidance is a setting of continuous models, and this one is masked"),
        ("masked", {"solver": "Heun()"}, "solver is a setting of continuous models, and this one is masked"),
        ("continuous", {"new_tokens": 3}, "new_tokens is a setting of masked models"),
        ("continuous", {"chat": True, "prompts": ["a"]}, "chat is a setting of masked models"),
        ("continuous", {"solver": "Huen()"}, "did you mean Heun"),
        ("continuous", {"steps": 0}, "steps"),
        ("continuous", {"score_temperature": 0.0}, "score_temperature"),
        ("continuous", {"seed": -1}, "seed"),
        ("continuous", {"batch_size": 0}, "batch_size"),
        ("continuous", {"n": 0}, "n is the number of samples"),
        ("masked", {"temperature": -1.0}, "temperature"),
        ("masked", {"policy": "LLaDA(4)", "steps": 3}, "its own steps"),
        ("masked", {"policy": "Threshold(0.6)", "steps": 3}, "its own steps"),
        ("continuous", {"precision": "bf16"}, "no setting 'precision'"),
        ("continuous", {"devices": 2}, "no setting 'devices'"),
        ("masked", {"halt": "Patiense(3)"}, "did you mean Patience"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused_in_one_line(kind: str, settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(CdlmError, match=expected) as caught:
        cdlm.generate(speaking(kind), **settings)
    assert "\n" not in str(caught.value)


ILL_TYPED: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("nothing", {}, "a model is one from cdlm.load, or its folder or Hub id, got a NoneType"),
    ("continuous", {"steps": 2.5}, "steps to be a whole number, got 2.5"),
    ("continuous", {"steps": "many"}, "steps to be a whole number, got 'many'"),
    ("continuous", {"init_scale": "much"}, "init_scale to be a number, got 'much'"),
    ("continuous", {"guidance": "much"}, "scale to be a number, got 'much'"),
    ("continuous", {"score_temperature": "cold"}, "score_temperature to be a number, got 'cold'"),
    ("continuous", {"solver": 3}, "3 is no solver"),
    ("continuous", {"seed": 0.5}, "number seed >= 0, got 0.5"),
    ("continuous", {"batch_size": 2.5}, "batch_size must be >= 1 and at most 1,000,000, got 2.5"),
    ("continuous", {"n": 2.5}, "n is the number of samples and must be >= 1, got 2.5"),
    ("continuous", {"length": "long"}, "length is the number of tokens of a sample and must be >= 1, got 'long'"),
    ("continuous", {"prompts": "the cat"}, "prompts is a list of texts, got the text 'the cat'"),
    ("masked", {"temperature": "warm"}, "temperature to be a number, got 'warm'"),
    ("masked", {"cfg_scale": "much"}, "cfg_scale to be a number, got 'much'"),
    ("masked", {"cache": "some"}, "prefix, dual, free or None, got 'some'"),
    ("masked", {"halt": 3}, "3 is no halting rule"),
    ("continuous", {"prompts": 3}, "prompts is a list of texts, got 3"),
    ("masked", {"prompts": ["the", 3]}, "a prompt is a text, got 3"),
    ("continuous", {"prompts": [None]}, "a prompt is a text, got None"),
    ("masked", {"prompts": ["\udcff"]}, "is not valid Unicode"),
    ("continuous", {"sampling": "Diffusion()"}, "is a continuous model and is sampled by Diffusion, got 'Diffusion()'"),
    ("masked", {"sampling": 3, "steps": 2}, "is a masked model and is sampled by Unmasking, got 3"),
    ("continuous", {"guidance": 10**30}, "finite number scale, got 1000"),
    ("masked", {"temperature": 10**30}, "finite number temperature >= 0, got 1000"),
)
PROGRAM = """
import json, sys
from toys import masked_with_tokenizer, with_tokenizer
import cdlm
models = {"continuous": with_tokenizer(), "masked": masked_with_tokenizer(), "nothing": None}
for kind, settings, _ in json.load(sys.stdin):
    try:
        cdlm.generate(models[kind], **settings)
        message = ["nothing", ""]
    except BaseException as error:
        message = [type(error).__name__, str(error)]
    print(json.dumps(message))
"""


@pytest.fixture(scope="module")
def answers() -> list[list[str]]:
    """What users see, in a process without the type checks of these tests."""
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here.parent), str(here)])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], input=json.dumps(ILL_TYPED), capture_output=True, text=True, check=True,
        env=environment,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", range(len(ILL_TYPED)), ids=lambda case: str(ILL_TYPED[case][1]))
def test_settings_of_a_wrong_kind_are_refused_in_one_line(answers: list[list[str]], case: int) -> None:
    kind, message = answers[case]
    assert kind == "CdlmError", message
    assert ILL_TYPED[case][2] in message
    assert "\n" not in message


# --- casts ---

OURS = (with_tokenizer, masked_with_tokenizer, autoregressive_with_tokenizer)


@pytest.mark.parametrize("make", OURS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, "meta"], ids=str)
def test_weights_that_were_cast_are_refused_before_they_are_used(make: Callable[[], Any], cast: Any) -> None:
    model = make()
    session = api.open_session(model)
    requests = session.requests()
    model.to(cast)
    calls = (lambda: cdlm.generate(model), lambda: session.run(requests), lambda: session.with_seed(1))
    for call in calls if cast != "meta" else calls[:1]:
        with pytest.raises(CdlmError, match=r'expected float32: take model.float\(\); .* with precision="bf16"'):
            call()


@pytest.mark.parametrize("make", OURS, ids=lambda make: make.__name__)
def test_float64_is_as_good_as_float32(make: Callable[[], Any]) -> None:
    assert len(cdlm.generate(make().double(), length=3)) == 1
    assert cdlm.generate(make().half().float(), length=3).tokens.shape == (1, 3)


# --- how a model is sampled ---


def test_a_model_is_sampled_as_in_its_paper() -> None:
    assert system().sampling == Diffusion(200, grid=Warped())
    assert plaid().defaults.solver == Ancestral()
    simplex = ssd(k=4.0, top_p=0.3).defaults
    assert (simplex.solver, simplex.grid, simplex.guidance.projection) == (Renoise(), UpperEnds(), MultiHot(0.3))
    assert simplex.block == 3
    assert isinstance(langflow().sampling, Diffusion)
    masked = masked_with_tokenizer().sampling
    assert isinstance(masked, Unmasking)
    assert masked.temperature == 1.0


@both
def test_the_sampling_of_a_model_can_be_seen_and_changed(kind: str) -> None:
    model = speaking(kind)
    paper = model.sampling
    assert paper == model.defaults
    shown = repr(paper)
    assert "\n" not in shown
    assert all(f"{field.name}={getattr(paper, field.name)!r}" in shown for field in fields(paper))  # pyright: ignore[reportArgumentType]
    model.sampling = paper.with_steps(3)
    assert cdlm.generate(model).budget == 3
    assert cdlm.generate(model, steps=2).budget == 2
    assert model.sampling == paper.with_steps(3)
    assert model.defaults == paper
    explicit = cdlm.generate(model, sampling=paper.with_steps(4), n=2)
    assert explicit.budget == 4
    assert explicit.made_by["sampling"] == repr(paper.with_steps(4))


RECOMMENDED = {"steps": 5, "solver": "Ancestral()", "commit": "Threshold(0.7)"}


def test_a_recommended_sampler_holds_as_a_whole() -> None:
    model = with_tokenizer()
    paper, bare = model.defaults, cdlm.generate(model, n=3, seed=1)
    model.preset = RECOMMENDED
    whole = Diffusion(5, solver=Ancestral(), commit=Threshold(0.7))
    assert model.sampling == whole
    assert model.defaults == paper
    assert cdlm.generate(model, n=3, seed=1).made_by["sampling"] == repr(whole)
    walk: list[dict[str, Any]] = [{"steps": 7}, {"solver": "Euler()"}, {"grid": "LogT()"}, {"commit": "Threshold(0.8)"}]
    for named in walk:
        assert api.open_session(model, **named).sampling == paper.with_flat(**named)
        assert cdlm.generate(model, **named).made_by["sampling"] == repr(paper.with_flat(**named))
    sharp = api.open_session(model, score_temperature=0.9, softmax_temperature=None, steps=None)
    assert sharp.sampling == whole.with_flat(score_temperature=0.9)
    plain = cdlm.generate(model, n=3, seed=1, commit="none")
    assert plain.made_by["sampling"] == repr(paper)
    assert (plain.tokens == bare.tokens).all()


def test_an_assigned_sampler_comes_before_the_recommended_one() -> None:
    model = with_tokenizer()
    model.preset = RECOMMENDED
    model.sampling = mine = Diffusion(4, commit=Threshold(0.6))
    assert api.open_session(model).sampling == mine
    assert api.open_session(model, steps=3).sampling == mine.with_steps(3)
    assert api.open_session(model, commit="none").sampling == Diffusion(4)
    assert api.open_session(model, sampling=Diffusion(9), solver="Ancestral()").sampling == Diffusion(9, Ancestral())


@both
def test_the_sampling_of_the_other_family_is_refused(kind: str) -> None:
    model, other = speaking(kind), Unmasking() if kind == "continuous" else Diffusion()
    before = model.sampling

    def assign() -> None:
        model.sampling = other

    for use in (assign, lambda: cdlm.generate(model, sampling=other), lambda: Session(model, other)):
        with pytest.raises(
            CdlmError, match=f"is a {kind} model and is sampled by {type(before).__name__}, got"
        ) as caught:
            use()
        assert "\n" not in str(caught.value)
    assert model.sampling == before


def test_a_policy_leaves_the_temperature_as_it_is() -> None:
    model = masked_with_tokenizer()
    assert api.open_session(model, policy="Threshold(0.6)").settings["temperature"] == 1.0
    assert api.open_session(model, policy="Threshold(0.6)", temperature=0.0).settings["temperature"] == 0.0


def test_a_function_is_decoded_as_the_model_that_it_is() -> None:
    toy = Toy()
    prompts = [[3, 4], [5, None, 6]]
    one = cdlm.decode(toy, prompts, 6, halt=Full(), n=2)
    two = cdlm.decode(
        lambda tokens, valid: Toy().logits(tokens, valid), prompts, 6, constants=toy.constants, halt="Full()", n=2
    )
    assert one.tokens.tolist() == two.tokens.tolist()
    assert one.nfe.tolist() == two.nfe.tolist()
    with pytest.raises(CdlmError, match="knows its own constants"):
        cdlm.decode(toy, prompts, 6, constants=toy.constants)
    with pytest.raises(CdlmError, match="needs its constants"):
        cdlm.decode(lambda tokens, valid: toy.logits(tokens, valid), prompts, 6)
    with pytest.raises(CdlmError, match="solver is a setting of continuous models"):
        cdlm.decode(toy, prompts, 6, solver="Heun()")


@pytest.mark.parametrize("length", [0, -4, True, None])
def test_a_folder_needs_a_length_of_one_position_or_more(tmp_path: Path, length: object) -> None:
    with_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "length": length}))
    with pytest.raises(CdlmError, match=r"whole number.* in 'length'"):
        cdlm.load(tmp_path)


@pytest.mark.parametrize("weights", [None, 3, [], {}])
def test_a_calibration_of_weights_without_a_name_is_refused(tmp_path: Path, weights: object) -> None:
    with_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "halting.json").write_text(json.dumps({"cdlm_halting": 1, "weights": weights, "calibrations": []}))
    with pytest.raises(CdlmError):
        cdlm.generate(cdlm.load(tmp_path, device="cpu"), halt="auto")


@pytest.fixture(scope="module")
def odd_calls() -> list[tuple[str, str, bool, str, str]]:
    """Each public call with each odd value, in a process without the type checks of these tests."""
    here = Path(__file__).parent
    paths = {"PYTHONPATH": os.pathsep.join([str(here.parent), str(here)]), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(here / "odd_calls.py")], capture_output=True, text=True, check=True,
        env={**os.environ, **paths},
    )  # fmt: skip
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_no_odd_argument_is_anything_but_refused_in_one_line(odd_calls: list[tuple[str, str, bool, str, str]]) -> None:
    assert len(odd_calls) > 2000
    wrong = []
    for call, value, right, kind, says in odd_calls:
        no_place = call == "samples item" and kind == "IndexError"  # as of every sequence
        if kind != ("" if right else "CdlmError") and not no_place:
            wrong.append((call, value, kind, says))
    assert not wrong, wrong[:40]
    assert not [says for *_, says in odd_calls if "\n" in says or len(says) > 700]
