"""Rules against each other, and against the plain sampler with fewer steps: quality over calls, whole sweeps."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_rows
from cdlm.core.progress import progress
from cdlm.core.stats import Scores, bootstrap
from cdlm.evaluation.bench import Bench, Outcome
from cdlm.evaluation.judge import features
from cdlm.evaluation.metrics.diversity import sample_entropy, unigram_entropy
from cdlm.evaluation.metrics.mauve import mauve
from cdlm.evaluation.plots.pareto import Curve, CurvePanel
from cdlm.halting import Criterion, FixedSteps, Never
from cdlm.halting.calibration import Goal

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
"""Budgets of the plain sampler, as shares of the full one, unless they are given."""
UNBOUNDED = "†"
"""Marks a row without a bound."""
PLAIN, FULL, REAL = "plain sampler, fewer steps", "full run", "real text"
GAMMA = 4
"""Weight of quality in QPS (SchED, arXiv 2512.02892)."""


@dataclass(frozen=True)
class Point:
    """One setting of one rule on one model: a row of the table. Intervals are 95 %, bootstrap over samples."""

    model: str
    """Its folder, as it was given."""
    steps: int
    """Of the full run."""
    family: str
    """What the setting belongs to: a rule's name, or `PLAIN`, `FULL`, `REAL`."""
    setting: str
    samples: int
    ar_nll: float
    ar_nll_low: float
    ar_nll_high: float
    entropy_sample: float
    entropy_corpus: float
    calls: float | None = None
    calls_low: float | None = None
    calls_high: float | None = None
    saved: float | None = None
    """Share of the full run's calls."""
    step_speedup: float | None = None
    """Calls of the full run over calls: a ratio of means."""
    step_speedup_each: float | None = None
    """The mean over samples of that ratio."""
    loss: float | None = None
    """AR-NLL over that of the full run, less 1; on the same samples."""
    loss_low: float | None = None
    loss_high: float | None = None
    loss_upper: float | None = None
    """One-sided bound at the goal's confidence."""
    agreement: float | None = None
    """Share of generated tokens that are those of the full run."""
    qps: float | None = None
    """Step speed-up times (AR-NLL of the full run over AR-NLL) ** 4: quality-penalised speed."""
    against_plain: float | None = None
    """AR-NLL less that of the plain sampler with as many calls: below 0 the rule is the better way to spend them."""
    against_low: float | None = None
    against_high: float | None = None
    chosen: bool = False
    """The family's loosest setting within the goal."""
    bounded: bool = True
    """Whether the samples are as many as the bound of the loss needs."""
    wall_speedup: float | None = None
    """Time of the full run over time, of live runs in one process."""
    mauve: float | None = None
    mauve_sd: float | None = None

    @property
    def verdict(self) -> str:
        """Beside the plain sampler with as many calls."""
        if self.against_low is None or self.against_high is None:
            return ""
        return "better" if self.against_high < 0 else "worse" if self.against_low > 0 else "unclear"


@dataclass(frozen=True)
class Plain:
    """The plain sampler with ever more steps, the full run last: the rival of every rule."""

    steps: Sequence[int]
    drawn: Sequence[Outcome]
    scores: Sequence[Scores]

    @staticmethod
    def of(bench: Bench, budgets: Sequence[int]) -> Plain:
        """Draw it with these numbers of steps, from the same noise as the full run."""
        most, n, session = bench.steps, len(bench.full_run), bench.session
        budgets = session.sampling.fewer_steps(budgets, bench.requests[0])
        steps = sorted({budget for budget in budgets if budget < most})
        drawn = [bench.run(session.with_steps(budget), n) for budget in steps]
        drawn.append(Outcome(bench.full_run.tokens, bench.full_run.nfe))
        return Plain([*steps, most], drawn, [bench.score(d.tokens) for d in drawn])

    def at(self, calls: float, m: int) -> Callable[[Float[np.ndarray, "r m"]], Float[np.ndarray, " r"]] | None:
        """Its AR-NLL on the first m samples at so many mean calls, linear between its budgets; None outside them."""
        spent = [float(d.nfe.mean()) for d in self.drawn]
        cut = [Scores(s.total[:m], s.weight[:m]) for s in self.scores]
        for (low, before), (high, after) in pairwise(zip(spent, cut, strict=True)):
            if low <= calls <= high and low < high:
                share = (calls - low) / (high - low)
                return lambda times, a=before, b=after, w=share: (1 - w) * a(times) + w * b(times)
        return None


@dataclass(frozen=True)
class Comparison:
    """One model at one number of steps.

    Args:
        label: what the model is called in the table.
        live: samples of what has to be run: rules that freeze, and wall time (0 leaves both out).
        mauve_seeds: k-means seeds of MAUVE, for the full run and each family's choice; 0 leaves it out.
        fewer: steps of the plain sampler; by default `SHARES` of the full run's.
    """

    bench: Bench
    goal: Goal
    label: str
    live: int = 32
    mauve_seeds: int = 0
    fewer: Sequence[int] = ()

    def table(self, families: Mapping[str, Sequence[Criterion]]) -> list[Point]:
        """The full run, real text, the plain sampler, and every setting of every family, from strict to loose."""
        bench, plain = self.bench, self.plain
        points = [self._add_mauve(self.point(FULL, "Never()", plain.drawn[-1]), plain.drawn[-1]), self.real()]
        points += [self.point(PLAIN, f"{s} steps", d) for s, d in zip(plain.steps[:-1], plain.drawn, strict=False)]
        shown = bench.session.progress
        for family, rules in progress(families.items(), total=len(families), label="rules compared", shown=shown):
            tried = [r for r in rules if (self.live or not bench.must_run(r)) and not bench.session.refuses(r)]
            drawn = [bench.under(rule, self.live) for rule in tried]
            found = [self.point(family, repr(rule), d) for rule, d in zip(tried, drawn, strict=True)]
            best = self.choice(found)
            if best is not None:
                wall = self.full_seconds / self.seconds(tried[best]) if self.live else None
                found[best] = self._add_mauve(replace(found[best], chosen=True, wall_speedup=wall), drawn[best])
            points += found
        return points

    def __post_init__(self) -> None:
        if self.live < 0 or min(self.fewer, default=1) < 1:
            raise CdlmError(f"a comparison needs live >= 0 and fewer >= 1, got {self.live} and {list(self.fewer)}")

    @cached_property
    def full_seconds(self) -> float:
        """Wall time of the full run, after a few steps to warm up."""
        self.seconds(FixedSteps(2))
        return self.seconds(Never())

    @cached_property
    def plain(self) -> Plain:
        """The rival."""
        most = self.bench.steps
        return Plain.of(self.bench, self.fewer or [max(1, round(share * most)) for share in SHARES])

    def point(self, family: str, setting: str, drawn: Outcome) -> Point:
        """All that one set of samples says."""
        bench, m = self.bench, len(drawn.tokens)
        calls, before = drawn.nfe.astype(np.float64), bench.full_calls[:m]
        scores, loss = bench.score(drawn.tokens), bench.loss(drawn)
        spent = Scores(calls, np.ones(m)).bootstrap()
        speedup = float(before.sum() / calls.sum())
        values: dict[str, Any] = {
            **_interval("calls", spent.value, spent.interval95),
            "saved": 1 - 1 / speedup,
            "step_speedup": speedup,
            "step_speedup_each": float((before / calls).mean()),
            **_interval("loss", loss.value, loss.interval95),
            "loss_upper": loss.upper(self.goal.confidence),
            "bounded": m >= self.goal.fewest,
            "agreement": bench.agreement(drawn),
            "qps": speedup * (1 + loss.value) ** -GAMMA,
        }
        rival = self.plain.at(float(calls.mean()), m)
        if rival is not None:
            gap = bootstrap(lambda times: scores(times) - rival(times), m)
            low, high = gap.interval95
            values |= {"against_plain": gap.value, "against_low": low, "against_high": high}
        rows = [row[text].tolist() for row, text in zip(drawn.tokens, bench.shown(drawn), strict=True)]
        return Point(**self._text(family, setting, rows, scores), **values)

    def real(self) -> Point:
        """Held-out text under the same judge."""
        return Point(**self._text(REAL, "", self.bench.real_tokens, self.bench.real))

    def _text(self, family: str, setting: str, rows: Sequence[list[int]], scores: Scores) -> dict[str, Any]:
        nll = scores.bootstrap()
        return {
            "model": self.label,
            "steps": self.bench.steps,
            "family": family,
            "setting": setting,
            "samples": len(rows),
            **_interval("ar_nll", nll.value, nll.interval95),
            "entropy_sample": sample_entropy(rows),
            "entropy_corpus": unigram_entropy(rows),
        }

    def choice(self, points: Sequence[Point]) -> int | None:
        """The last setting before the first that fails the goal; None if it saves no call.

        The loss that counts is its upper bound; of too few samples for a bound, its mean.
        """
        passed = list(takewhile(lambda p: self.measured_loss(p) <= self.goal.max_loss, points))
        return len(passed) - 1 if passed and passed[-1].saved else None

    def measured_loss(self, point: Point) -> float:
        """The bound of the loss, or its mean where the samples are too few for a bound."""
        loss = point.loss_upper if point.samples >= self.goal.fewest else point.loss
        return math.inf if loss is None else loss

    def seconds(self, rule: Criterion) -> float:
        """Wall time of the first `live` samples under a rule, in one process."""
        session = self.bench.session.alone().with_criterion(rule)
        start = time.perf_counter()
        self.bench.run(session, self.live)
        return time.perf_counter() - start

    def _add_mauve(self, point: Point, drawn: Outcome) -> Point:
        if not self.mauve_seeds:
            return point
        real, seeds = self.bench.real_features, tuple(range(1, self.mauve_seeds + 1))
        texts = self.bench.texts(drawn)[: len(real)]
        result = mauve(features(self.bench.scorer.judge, texts), real[: len(texts)], seeds)
        return replace(point, mauve=result.mean, mauve_sd=result.sd)


def too_few(
    model: str, families: Mapping[str, Sequence[Criterion]], in_blocks: bool, live: int, n: int, goal: Goal
) -> str:
    """Which families are measured on fewer samples than a bound of their loss needs, as a warning; empty if none is."""
    must = [name for name, rules in families.items() if in_blocks or any(rule.freezes for rule in rules)]
    short = list(families) if n < goal.fewest else must if 0 < live < goal.fewest else []
    if not short:
        return ""
    samples = n if n < goal.fewest else live
    return (
        f"{', '.join(short)} on {model}: {samples} samples, and a loss of at most {goal.max_loss:.2%} with"
        f" {goal.confidence:.0%} confidence needs {goal.fewest}, so these rows have no bound: raise"
        f" {'--n' if n < goal.fewest else '--live'}, or ask for less"
    )


def _interval(name: str, value: float, ends: tuple[float, float]) -> dict[str, float]:
    return {name: value, f"{name}_low": ends[0], f"{name}_high": ends[1]}


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Every point and every column."""
    write_rows(path, [{**asdict(point), "verdict": point.verdict} for point in points])


COLUMNS = (
    "model", "steps", "rule", "n", "calls", "saved", "AR-NLL", "loss", "agreement", "H sample", "QPS", "step speed-up",
    "wall speed-up", "MAUVE", "beside fewer steps",
)  # fmt: skip


def markdown(points: Sequence[Point], goal: Goal) -> str:
    """The table to read: the ends, the plain sampler, and of each rule the setting within the goal."""
    shown = [p for p in points if p.chosen or p.family in (FULL, REAL, PLAIN)]
    lines = [_line(COLUMNS), _line("--:" if i not in (0, 2) else ":--" for i in range(len(COLUMNS)))]
    lines += [_line(_cells(point)) for point in shown]
    families = dict.fromkeys(p.family for p in points if p.family not in (FULL, REAL, PLAIN))
    for model, steps in dict.fromkeys((p.model, p.steps) for p in points):
        there = [p for p in points if (p.model, p.steps) == (model, steps)]
        for family in families:
            own = [p for p in there if p.family == family]
            if own and not any(p.chosen for p in own):
                why = "saves no call within the goal"
                lines.append(_line([model, steps, family, own[0].samples, "-", why] + [""] * (len(COLUMNS) - 6)))
    note = (
        f"\n\nOf each rule the loosest setting whose loss of AR-NLL is at most {goal.max_loss:.2%} with"
        f" {goal.confidence:.0%} confidence. Intervals are 95 %, bootstrap over samples. QPS is the step speed-up times"
        f" (AR-NLL of the full run / AR-NLL) ** {GAMMA}. The last column is AR-NLL less that of the plain sampler with"
        " as many calls.\n"
    )
    unbounded = any(p.chosen and not p.bounded for p in points)
    mark = (
        f"\n{UNBOUNDED} Fewer than {goal.fewest} samples: the loss is a mean, without a bound.\n" if unbounded else ""
    )
    return "\n".join(lines) + note + mark


def _cells(p: Point) -> list[str]:
    name = p.family if p.family in (FULL, REAL) else p.setting
    name += "" if p.bounded or p.family in (FULL, REAL, PLAIN) else f" {UNBOUNDED}"
    loss = "-" if p.loss is None else f"{p.loss:+.2%} [{p.loss_low:+.2%}, {p.loss_high:+.2%}]"
    against = "-"
    if p.against_plain is not None and p.family not in (PLAIN, FULL):
        against = f"{p.verdict}: {p.against_plain:+.3f} [{p.against_low:+.3f}, {p.against_high:+.3f}]"
    return [
        p.model, str(p.steps), name, str(p.samples), _number(p.calls, ".1f"), _number(p.saved, ".1%"),
        f"{p.ar_nll:.3f} [{p.ar_nll_low:.3f}, {p.ar_nll_high:.3f}]", loss, _number(p.agreement, ".2%"),
        f"{p.entropy_sample:.2f}", _number(p.qps, ".2f"), _number(p.step_speedup, ".2f"),
        _number(p.wall_speedup, ".2f"),
        "-" if p.mauve is None else f"{p.mauve:.3f} ± {p.mauve_sd:.3f}", against,
    ]  # fmt: skip


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _line(cells: Iterable[object]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def panels(points: Sequence[Point]) -> list[CurvePanel]:
    """What `cdlm.evaluation.plots.pareto` draws: a panel for each model and number of steps."""
    out = []
    for model, steps in dict.fromkeys((p.model, p.steps) for p in points):
        there = [p for p in points if (p.model, p.steps) == (model, steps)]
        (full,), real = ([p for p in there if p.family == name] for name in (FULL, REAL))
        families = dict.fromkeys(p.family for p in there if p.family not in (FULL, REAL))
        curves = [_curve(name, [p for p in there if p.family == name], full) for name in families]
        levels = [("full run", full.ar_nll), *(("real text", p.ar_nll) for p in real)]
        out.append(CurvePanel(f"{model}, {steps} steps", curves, levels))
    return out


def _curve(name: str, own: Sequence[Point], full: Point) -> Curve:
    place = next((i for i, p in enumerate(own) if p.chosen), None)
    if name == PLAIN:
        own = [*own, full]
    return Curve(
        name,
        [p.calls or 0.0 for p in own],
        [p.ar_nll for p in own],
        [p.ar_nll_low for p in own],
        [p.ar_nll_high for p in own],
        rival=name == PLAIN,
        chosen=place,
    )
