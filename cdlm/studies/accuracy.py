"""Right answers over calls: halting rules and policies on a task with answers, by the final texts and by votes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import takewhile
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cdlm.core.checks import MOST_STEPS, check_whole
from cdlm.core.parsing import brief
from cdlm.core.stats import Scores, bootstrap
from cdlm.data.arithmetic import Problem
from cdlm.evaluation.metrics.aup import aup
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.halting import Criterion, Full, sweep
from cdlm.halting.losses import Binary
from cdlm.halting.replay import Replayed, replay
from cdlm.halting.voting import Vote
from cdlm.policies import sweep_policy
from cdlm.policies.policy import Policy
from cdlm.recording.file import Recording
from cdlm.sampling.recordings import recording_of
from cdlm.sampling.requests import Request
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import Session, reading
from cdlm.sampling.texts import outputs_of, shown_of, special_of
from cdlm.sampling.voting import AnswerReader, StepAnswers, Voted
from cdlm.studies.answering import Answering, marks
from cdlm.studies.study import Finding, column, ends, interval, label

NOTE = (
    "Of each rule and policy the loosest setting that loses at most `max_drop` of the answers of the full run, over"
    " whole sweeps, on the first half of the problems; where even the strictest loses more, that one. All numbers are"
    " of the second half. Intervals are 95 %, bootstrap over problems, paired. Lost: problems that the full run solves"
    " and the setting does not, with the exact binomial bound at 95 % confidence. Speed-up: calls of the full run over"
    " calls. TPF, tokens per forward: tokens of all answers, up to their ends and with them, over all calls. AUP: the"
    " area under accuracy (in per cent) over TPF, of all settings of a rule or policy and the full run, where an answer"
    " counts less the further its setting is from the best of the study (d3LLM). Voted: right answers by the vote of"
    " all steps taken, weighted as `vote` says (temporal self-consistency), at no call. Wall time: of one run of the"
    " first problems. Counted: what a policy counts beside the model's calls, such as those of a guide; calls"
    " and TPF are of the model alone."
)
FULL = "full budget"
NO_VOTES: dict[str, float | None] = dict.fromkeys(("voted", "voted_low", "voted_high"))
CONFIDENCE = 0.95


class SettingResult(NamedTuple):
    """One setting on all problems."""

    setting: str
    nfe: Int[np.ndarray, " m"]
    right: Float[np.ndarray, " m"]
    """1.0 where the answer is right."""
    voted: Float[np.ndarray, " m"] | None
    """1.0 where the answer that the steps have voted for is right; None of a policy that takes tokens back."""
    made: Int[np.ndarray, " m"]
    """Tokens of the answer, its end included."""
    session: Session
    """What runs it."""
    counted: Mapping[str, Int[np.ndarray, " m"]]
    """What the policy counted, such as calls of a guide."""


@dataclass(frozen=True, kw_only=True)
class Accuracy(Answering):
    """How many calls can be saved before answers go wrong?

    Args:
        rules: names to sweep, or whole rules, of masked models on the base policy with one step for each position.
        policies: names to sweep, or whole policies, with the rule Full.
        base: policy of the full run of a masked model, LLaDA or Dream.
        block: positions of a block, of the base policy.
        budget: steps of the full run of a continuous model.
        vote: weights of the steps' votes on the answer, which grow from step to step if linear or exponential.
        max_drop: share of the answers that may be lost.
        live: problems that wall time is taken of.
    """

    rules: list[str]
    policies: list[str]
    base: Literal["LLaDA", "Dream"]
    block: int | None
    budget: int
    vote: Literal["fixed", "linear", "exponential"]
    max_drop: float
    live: int

    @property
    def policy_names(self) -> list[str]:
        """What the policies are called in the table: some rules have the same names."""
        return [f"{text} (policy)" if text in self.rules else text for text in self.policies]

    def check(self) -> None:
        super().check()
        check_whole("a study that chooses on one half of the problems", least=2, n=self.n)
        check_whole("a full run", largest=MOST_STEPS, budget=self.budget)
        Vote(self.vote)
        for rule in self.rules:
            sweep(rule, self.new_tokens or self.budget)
        for policy in self.policies:
            sweep_policy(policy)

    def find(self) -> Finding:
        rows, table, panels, fronts = [], [], [], []
        exams = [self.exam(model) for model in self.models]  # all, before any work
        for exam, own in zip(exams, with_areas([self.measure(exam) for exam in exams]), strict=True):
            rows += own
            table += shown(own)
            fronts.append(f" No setting of {exam.model} is as good with fewer calls than: {'; '.join(front(own))}.")
            panels += [
                panel(f"{exam.model}: {kind}", [row for row in own if row["family"] in (FULL, *names)])
                for kind, names in (("rules", self.rules), ("policies", self.policy_names))
            ]
        note = NOTE.replace("`max_drop`", f"{self.max_drop:.1%}") + "".join(fronts)
        return Finding(rows, table, note, panels)

    def exam(self, model: str) -> Exam:
        """The problems put to a model; one that has policies of masks is decoded at temperature 0."""
        masked = name_of_policies(self.session(model)) == "policy"
        policy = f"{self.base}({self.new_tokens}, block={self.block})"
        how = {"policy": policy, "temperature": 0.0} if masked else {"steps": self.budget}
        session = self.session(model, **how)
        requests = session.requests(self.prompts, new_tokens=self.new_tokens if masked else None)
        return Exam(label(model), session, requests, self.tasks, Vote(self.vote), self.live)

    def measure(self, exam: Exam) -> list[dict[str, Any]]:
        """Every setting on one model."""
        full = exam.full
        half = len(full.right) // 2
        most = self.max_drop * full.right[:half].sum() + 1e-9  # of whole answers: a share is no exact number
        rows = [exam.row(FULL, full, chosen=True)]
        for family, results in self.families(exam):
            within = list(takewhile(lambda result: (full.right - result.right)[:half].sum() <= most, results))
            rows += [exam.row(family, result, bool(within) and result is within[-1]) for result in results]
        return rows

    def families(self, exam: Exam) -> Iterator[tuple[str, list[SettingResult]]]:
        """Each rule and each policy with all its settings, from strict to loose."""
        for text in self.rules:
            yield text, [exam.under(rule) for rule in sweep(text, exam.recording.record.steps)]
        for text, name in zip(self.policies, self.policy_names, strict=True):
            yield name, [exam.decoded(policy) for policy in sweep_policy(text)]


@dataclass(frozen=True)
class Exam:
    """One model and the problems put to it.

    Args:
        model: what it is called.
        session: the full run.
        vote: of the steps, on the answer.
        live: problems that wall time is taken of.
    """

    model: str
    session: Session
    requests: Sequence[Request]
    tasks: Sequence[Problem]
    vote: Vote
    live: int

    @cached_property
    def recording(self) -> Recording:
        """The full run, to replay rules on."""
        session = self.session.recorded()
        return recording_of(session.run(self.requests), session)

    @cached_property
    def read(self) -> AnswerReader:
        """Reads the answers of texts."""
        tokenizer = self.session.model.need_tokenizer()
        return AnswerReader(tokenizer, special_of(tokenizer).end_ids)

    @cached_property
    def said(self) -> StepAnswers:
        """The answers of the full run at each of its steps."""
        return StepAnswers.of(self.recording, self.read, self.vote.parser)

    @cached_property
    def full(self) -> SettingResult:
        """The full run."""
        return self.under(self.session.criterion)

    def under(self, rule: Criterion) -> SettingResult:
        """All problems under a rule, replayed where it can be."""
        session = self.session.with_criterion(rule)
        if rule.freezes:
            return self.run(brief(rule), session)
        run = replay(self.recording, reading(rule, session.model))
        voted = self.said.vote(self.vote, run.steps - 1, self.answers(run.tokens))
        return self.result(brief(rule), session, run, voted)

    def decoded(self, policy: Policy) -> SettingResult:
        """All problems with another policy, until nothing is open."""
        sampling = self.session.sampling.with_flat(**{name_of_policies(self.session): policy})
        return self.run(brief(policy), self.session.with_sampling(sampling).with_criterion(Full()))

    def run(self, setting: str, session: Session) -> SettingResult:
        """All problems, drawn from the model."""
        if session.sampling.unrecorded:  # no record holds what is taken back, so nothing can be voted on
            return self.result(setting, session, session.run(self.requests), None)
        samples = session.recorded().run(self.requests)
        voted = StepAnswers.of(samples, self.read, self.vote.parser).vote(self.vote)
        return self.result(setting, session, samples, voted)

    def result(self, setting: str, session: Session, run: Samples | Replayed, voted: Voted | None) -> SettingResult:
        """A finished run with its marks."""
        given, valid = self.recording.given, self.recording.valid
        text = shown_of(run.tokens, given, valid, self.read.end_ids)
        right = marks(self.answers(run.tokens), self.tasks)
        wins = None if voted is None else marks(voted.answers, self.tasks)
        counted = run.counted if isinstance(run, Samples) else []
        names = dict.fromkeys(name for one in counted for name in one)
        sums = {name: np.array([one.get(name, 0) for one in counted]) for name in names}
        return SettingResult(setting, run.nfe, right, wins, outputs_of(text, given, valid), session, sums)

    def answers(self, tokens: Int[np.ndarray, "m n"]) -> list[str | None]:
        """What the texts give as their answers."""
        return self.read(tokens, ~self.recording.given, self.recording.valid, self.vote.parser)

    def seconds(self, session: Session) -> float:
        """Wall time of the first `live` problems, in one process and without a record."""
        alone = session.alone()
        start = time.perf_counter()
        alone.run(self.requests[: self.live])
        return time.perf_counter() - start

    def row(self, family: str, result: SettingResult, chosen: bool) -> dict[str, Any]:
        """Everything about one setting, on the half of the problems that chose nothing."""
        second = slice(len(result.right) // 2, None)
        right, before = result.right[second], self.full.right[second]
        calls, full = result.nfe[second].astype(np.float64), self.full.nfe[second].astype(np.float64)
        m, ones, made = len(right), np.ones(len(right)), result.made[second].astype(np.float64)
        drop = bootstrap(lambda times: (times @ (before - right)) / times.sum(1), m)
        lost = Binary(((before == 1) & (right == 0)).astype(np.float64))
        return {
            "model": self.model,
            "family": family,
            "setting": result.setting,
            "problems": m,
            **ends("accuracy", Scores(right, ones).bootstrap()),
            **ends("drop", drop),
            **(NO_VOTES if result.voted is None else ends("voted", Scores(result.voted[second], ones).bootstrap())),
            "lost": lost.value,
            "lost_upper": lost.at_most(CONFIDENCE),
            **ends("calls", Scores(calls, ones).bootstrap()),
            **ends("tpf", Scores(made, calls).bootstrap()),
            **ends("speedup", Scores(full, calls).bootstrap()),
            "seconds": self.seconds(result.session) if chosen else None,
            "chosen": chosen,
            "counted": ", ".join(f"{name} {values[second].mean():.1f}" for name, values in result.counted.items()),
        }


def with_areas(exams: Sequence[Sequence[dict[str, Any]]]) -> list[list[dict[str, Any]]]:
    """The rows of each exam with the area under all settings of their family and the full run, and the best accuracy of
    any row in per cent, which the areas are relative to."""
    y_max = max(100 * row["accuracy"] for rows in exams for row in rows)

    def area(rows: Sequence[dict[str, Any]], family: str) -> float:
        own = [row for row in rows if row["family"] in (FULL, family)]
        return aup([(row["tpf"], 100 * row["accuracy"]) for row in own], y_max)

    found = [{family: area(rows, family) for family in {row["family"] for row in rows}} for rows in exams]
    return [
        [{**row, "aup": areas[row["family"]], "y_max": y_max} for row in rows]
        for rows, areas in zip(exams, found, strict=True)
    ]


def front(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings that no other beats in accuracy at as many calls or fewer (the Pareto front), from few calls to
    many, each with both."""
    found: list[str] = []
    best = -1.0
    for row in sorted(rows, key=lambda row: (row["calls"], -row["accuracy"])):
        if row["accuracy"] > best:
            best = row["accuracy"]
            found.append(f"`{row['setting']}` ({row['calls']:.1f} calls, {best:.1%})")
    return found


def shown(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The table: of each family the chosen setting, or that there is none."""
    families = dict.fromkeys(row["family"] for row in rows)
    chosen = {row["family"]: _line(row) for row in rows if row["chosen"]}
    first = {row["family"]: row for row in reversed(rows)}
    missing = {name: {**_line(first[name]), "setting": f"none; {first[name]['setting']}"} for name in families}
    return [chosen.get(name, missing[name]) for name in families]


def _line(row: Mapping[str, Any]) -> dict[str, str]:
    return {
        "model": row["model"],
        "rule or policy": row["family"],
        "setting": row["setting"],
        "n": str(row["problems"]),
        "accuracy": interval(row, "accuracy", ".1%"),
        "voted": interval(row, "voted", ".1%") if row["voted"] is not None else "-",
        "drop": interval(row, "drop", "+.1%"),
        "lost": f"{row['lost']:.1%}, at most {row['lost_upper']:.1%}",
        "calls": interval(row, "calls", ".1f"),
        "TPF": interval(row, "tpf", ".2f"),
        "AUP": f"{row['aup']:.1f}",
        "speed-up": interval(row, "speedup", ".2f"),
        "counted": row["counted"] or "-",
        "wall time": "-" if row["seconds"] is None else f"{row['seconds']:.1f} s",
    }


def panel(title: str, rows: Sequence[Mapping[str, Any]]) -> Panel:
    """Right answers over calls, a line for each family."""
    families = list(dict.fromkeys(row["family"] for row in rows))
    lines = []
    for family in families:
        own = [row for row in rows if row["family"] == family]
        band = column(own, "accuracy_low"), column(own, "accuracy_high")
        lines.append(Line(family, column(own, "calls"), column(own, "accuracy"), band, family == FULL, dots=True))
    return Panel(title, "mean calls a problem", "right answers", lines, x_scale="log")


STUDY = Accuracy


def name_of_policies(session: Session) -> str:
    """The setting that takes a policy: of masks, or of commits."""
    return "policy" if any(field.name == "policy" for field in fields(session.sampling.flat)) else "commit"
