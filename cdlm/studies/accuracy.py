"""Right answers over calls: halting rules and unmasking policies of masked models on a task with answers."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from cdlm import api, generation
from cdlm.core.stats import Scores, bootstrap
from cdlm.data.arithmetic import Problem, is_correct, problems
from cdlm.data.gsm8k import read_problems
from cdlm.evaluation.plots.panels import Line, Panel
from cdlm.halting import Full, Never, sweep
from cdlm.halting.replay import replay
from cdlm.masked.policies import sweep_policy
from cdlm.masked.policies.dream import Dream
from cdlm.masked.policies.llada import LLaDA
from cdlm.masked.policies.policy import Policy
from cdlm.masked.sampler import Decoder
from cdlm.models import hub
from cdlm.recording.file import Recording
from cdlm.sampling.requests import Request
from cdlm.sampling.samples import Samples, shown_of, texts_of
from cdlm.studies.study import Finding, Study, column, ends, interval, label

NOTE = (
    "Of each rule and policy the loosest setting that loses at most `max_drop` of the answers of the full run, over"
    " whole sweeps; where even the strictest loses more, that one. Intervals are 95 %, bootstrap over problems, paired."
    " Speed-up: calls of the full run over calls. Wall time: of one run of the first problems."
)
FULL = "full budget"


class SettingResult(NamedTuple):
    """One setting on all problems."""

    setting: str
    tokens: Int[np.ndarray, "m n"]
    nfe: Int[np.ndarray, " m"]
    decoder: Decoder
    """What runs it."""


@dataclass(frozen=True, kw_only=True)
class Accuracy(Study):
    """How many calls can be saved before answers go wrong?

    Args:
        rules: names to sweep, or whole rules, on the base policy with one step for each position.
        policies: names to sweep, or whole policies, with the rule Full.
        base: policy of the full run, LLaDA or Dream.
        new_tokens: positions after each prompt.
        block: positions of a block, of the base policy.
        problems: JSONL file in the format of GSM8K; without one, generated arithmetic that no training split holds.
        steps: difficulties of the generated problems.
        largest: of their numbers.
        seed: of the generated problems.
        max_drop: share of the answers that may be lost.
        live: problems that wall time is taken of.
        separator: what stands between prompt and answer.
    """

    rules: list[str]
    policies: list[str]
    base: Literal["LLaDA", "Dream"]
    new_tokens: int
    block: int | None
    problems: Path | None
    steps: list[int]
    largest: int
    seed: int
    max_drop: float
    live: int
    separator: str

    @cached_property
    def tasks(self) -> list[Problem]:
        """What is asked."""
        if self.problems is not None:
            return read_problems(self.problems)[: self.n]
        return list(problems(self.n, self.seed, "valid", tuple(self.steps), self.largest))

    def check(self) -> None:
        super().check()
        for rule in self.rules:
            sweep(rule, self.new_tokens)
        for policy in self.policies:
            sweep_policy(policy)

    def find(self) -> Finding:
        rows, table, panels = [], [], []
        for model in self.models:
            own = self.measure(model)
            rows += own
            table += shown(own)
            panels += [
                panel(f"{label(model)}: {kind}", [row for row in own if row["family"] in (FULL, *names)])
                for kind, names in (("rules", self.rules), ("policies", self.policies))
            ]
        return Finding(rows, table, NOTE.replace("`max_drop`", f"{self.max_drop:.1%}"), panels)

    def measure(self, model: str) -> list[dict[str, Any]]:
        """Every setting on one model."""
        bench = _Bench(self, model)
        full = bench.run(bench.decoder)
        right = bench.right(full.tokens)
        rows = [bench.row(FULL, bench.trial(full, bench.decoder), right, right, full.nfe, chosen=True)]
        most = self.max_drop * len(right) + 1e-9  # of whole answers: a share is no exact number
        for name, trials in bench.families(full):
            drawn = [(trial, bench.right(trial.tokens)) for trial in trials]
            kept = list(takewhile(lambda t: (right - t[1]).sum() <= most, drawn))
            for trial, own in drawn:
                chosen = bool(kept) and trial is kept[-1][0]
                rows.append(bench.row(name, trial, own, right, full.nfe, chosen))
        return rows


class _Bench:
    """One model and the problems put to it."""

    def __init__(self, study: Accuracy, model: str):
        self.study, self.model, self.folder = study, model, hub.read(model)
        about = generation.About.of(self.folder)
        positions, block = study.new_tokens, study.block
        policy: Policy = LLaDA(positions, block) if study.base == "LLaDA" else Dream(positions, block=block)
        prompts = [problem.prompt + study.separator for problem in study.tasks]
        self.asked: list[Request]
        self.asked, decoder = generation.prepare(
            about, 1, prompts=prompts, policy=policy, new_tokens=positions, record=True
        )
        assert isinstance(decoder, Decoder)
        self.decoder = decoder
        self.given = np.stack([request.given.numpy() for request in self.asked])

    def families(self, full: Samples) -> Iterable[tuple[str, list[SettingResult]]]:
        """Each rule and each policy with all its settings."""
        machine = self.study.machine
        recording = api.recording_of(full, self.decoder, self.folder, machine.precision)
        for text in self.study.rules:
            rules = sweep(text, full.budget)
            yield text, [self.under(rule, recording) for rule in rules]
        for text in self.study.policies:
            tried = [replace(self.decoder, policy=p, criterion=Full()) for p in sweep_policy(text)]
            yield text, [self.trial(self.run(decoder), decoder) for decoder in tried]

    def under(self, rule: Any, recording: Recording) -> SettingResult:
        """All problems under a rule, replayed where it can be."""
        decoder = replace(self.decoder, criterion=rule)
        if rule.freezes:
            return self.trial(self.run(decoder), decoder)
        run = replay(recording, rule)
        return SettingResult(repr(rule), run.tokens, run.nfe, decoder)

    def run(self, decoder: Decoder) -> Samples:
        """All problems, decoded; recorded only in the full run."""
        if not isinstance(decoder.criterion, Never):
            decoder = replace(decoder, record=frozenset())
        machine = self.study.machine
        return generation.draw_spread(
            self.model, decoder, self.asked, batch_size=machine.batch_size, precision=machine.precision,
            device=machine.device, devices=machine.devices, progress=machine.progress,
        )  # fmt: skip

    def trial(self, samples: Samples, decoder: Decoder) -> SettingResult:
        """A run as a trial."""
        of_rule = not isinstance(decoder.criterion, Full) or isinstance(decoder.criterion, Never)
        return SettingResult(
            repr(decoder.criterion if of_rule else decoder.policy), samples.tokens, samples.nfe, decoder
        )

    def right(self, tokens: Int[np.ndarray, "m n"]) -> Float[np.ndarray, " m"]:
        """1.0 where the answer is right."""
        shown = shown_of(tokens, self.given, ~self.given, self.decoder_end)
        texts = texts_of(self.folder.tokenizer, tokens, shown)
        return np.array([is_correct(t, p.answer) for t, p in zip(texts, self.study.tasks, strict=True)], np.float64)

    @property
    def decoder_end(self) -> int:
        """The end-of-text token."""
        return int(self.folder.config["eos_id"])

    def seconds(self, decoder: Decoder) -> float:
        """Wall time of the first `live` problems, without a record."""
        machine, plain = self.study.machine, replace(decoder, record=frozenset())
        system = generation.load(self.model, machine.device, machine.precision)
        start = time.perf_counter()
        generation.draw(system, plain, self.asked[: self.study.live], machine.batch_size)
        return time.perf_counter() - start

    def row(
        self, family: str, trial: SettingResult, own: Float[np.ndarray, " m"], right: Float[np.ndarray, " m"],
        full: Int[np.ndarray, " m"], chosen: bool,
    ) -> dict[str, Any]:  # fmt: skip
        """Everything about one setting."""
        m, ones = len(own), np.ones(len(own))
        calls = trial.nfe.astype(np.float64)
        drop = bootstrap(lambda times: (times @ (right - own)) / times.sum(1), m)
        return {
            "model": label(self.model),
            "family": family,
            "setting": trial.setting,
            "problems": m,
            **ends("accuracy", Scores(own, ones).bootstrap()),
            **ends("drop", drop),
            **ends("calls", Scores(calls, ones).bootstrap()),
            **ends("speedup", Scores(full.astype(np.float64), calls).bootstrap()),
            "seconds": self.seconds(trial.decoder) if chosen else None,
            "chosen": chosen,
        }


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
        "lost": interval(row, "drop", "+.1%"),
        "calls": interval(row, "calls", ".1f"),
        "speed-up": interval(row, "speedup", ".2f"),
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
