"""Halting rules against each other and against their rivals: quality over calls, whole sweeps.

Settings are chosen on one half of the samples and reported on the other: the best of many settings on the samples that
chose it flatters itself.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import takewhile
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np

from cdlm.core.errors import CdlmError
from cdlm.core.files import write_json, write_rows
from cdlm.core.inert import table_line
from cdlm.core.progress import progress
from cdlm.core.stats import Bootstrap, Scores
from cdlm.evaluation.bench import OWN_ROWS, Bench, Outcome, RealSample, fewest, tried
from cdlm.evaluation.metrics.aup import accuracy_of, aup
from cdlm.evaluation.metrics.diversity import sample_entropy, unigram_entropy
from cdlm.evaluation.metrics.reference import DISTANCES, Spread
from cdlm.evaluation.oracles import ORACLES, oracles
from cdlm.evaluation.plots.figure import short_names
from cdlm.evaluation.plots.pareto import Curve, CurvePanel
from cdlm.evaluation.rivals import FEWEST_SAMPLES, STUDENT, Duel, Rivals, Verdict, verdict
from cdlm.evaluation.table import aligned_table, markdown_table
from cdlm.evaluation.texts import REAL, Part
from cdlm.halting import Criterion, FixedSteps, Never
from cdlm.halting.calibration import Goal
from cdlm.sampling.session import Session

SHARES = (0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05)
"""Budgets of the plain sampler, as shares of the full one, unless they are given."""
UNBOUNDED = "†"
"""Marks a row without a bound."""
PLAIN, FULL = "plain sampler, the same grid", "full run"
STUDENTS = "students"
GAMMA = 4
"""Weight of quality in QPS (SchED, arXiv 2512.02892)."""
REFERENCES = (FULL, *REAL.values(), OWN_ROWS)


@dataclass(frozen=True)
class Point:
    """One setting of one rule on one model: a row of the table. Intervals are 95 %, bootstrap over samples.

    All numbers are of the reporting half of the samples but `chosen`, which is of the other.
    """

    model: str
    """Its folder, as it was given."""
    steps: int
    """Of the full run."""
    family: str
    """What the setting belongs to: a rule's name, a plain sampler, an oracle, the full run, or real text."""
    setting: str
    samples: int
    ar_nll: float
    ar_nll_low: float
    ar_nll_high: float
    entropy_sample: float
    """Of what was generated."""
    entropy_corpus: float
    workload: str = ""
    """What the samples are asked for; empty of samples from nothing."""
    right: float | None = None
    """Share of right answers, where the workload asks for answers."""
    calls: float | None = None
    calls_low: float | None = None
    calls_high: float | None = None
    tpf: float | None = None
    """Tokens per forward: tokens that all samples made, up to their ends and with them, over all their calls."""
    saved: float | None = None
    """Share of the full run's calls."""
    step_speedup: float | None = None
    """Calls of the full run over calls: a ratio of means."""
    step_speedup_each: float | None = None
    """The mean over samples of that ratio."""
    change: float | None = None
    """AR-NLL less that of the full run, in nats per token, on the same samples."""
    change_low: float | None = None
    change_high: float | None = None
    gap_share: float | None = None
    """The change as a share of the gap between the full run and real text; None where the gap is within noise."""
    gap_share_low: float | None = None
    gap_share_high: float | None = None
    loss: float | None = None
    """AR-NLL over that of the full run, less 1."""
    loss_low: float | None = None
    loss_high: float | None = None
    upper: float | None = None
    """Bound of the goal's loss, at the goal's confidence."""
    agreement: float | None = None
    """Share of generated tokens that are those of the full run."""
    entropy_change: float | None = None
    """Of the entropy inside a sample."""
    frechet: float | None = None
    """Frechet distance to real text, mean over splits of the real text."""
    frechet_change: float | None = None
    """Less that of the full run, on the same splits."""
    frechet_change_sd: float | None = None
    """Standard deviation over the splits."""
    qps: float | None = None
    """Step speed-up times (AR-NLL of the full run over AR-NLL) ** 4: quality-penalised speed."""
    chosen: bool = False
    """The family's loosest setting within the goal, on the choosing half."""
    bounded: bool = True
    """Whether the samples are as many as the bound of the loss needs."""
    wall_speedup: float | None = None
    """Time of the full run over time, of live runs in one process."""
    duels: tuple[Duel, ...] = field(default=())
    """A chosen setting beside its rivals with as many calls."""

    @property
    def verdict(self) -> Verdict | None:
        """Beside all its rivals."""
        return verdict(self.duels, self.entropy_sample, self.samples)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        found = self.verdict
        return {**asdict(self), "verdict": None if found is None else asdict(found)}


@dataclass(frozen=True)
class Comparison:
    """One model at one number of steps.

    Args:
        bench: the full run; one half of its samples chooses, the other reports.
        goal: of each rule the loosest setting within it is shown.
        measure: of the goal, see `cdlm.evaluation.bench.MEASURES`.
        label: what the model is called in the table.
        live: samples of what has to be run: rules that freeze, and wall time (0 leaves both out).
        fewer: steps of the plain sampler; by default `SHARES` of what a sample of the full run takes.
        with_rivals: whether chosen settings are compared with their rivals, which takes as long as all else.
        students: that the model was distilled to, by name: each a row, and a rival of rules that take as many calls.
    """

    bench: Bench
    goal: Goal
    measure: str
    label: str
    live: int = 32
    fewer: Sequence[int] = ()
    with_rivals: bool = True
    students: Mapping[str, Session] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.live < 0 or min(self.fewer, default=1) < 1:
            raise CdlmError(f"a comparison needs live >= 0 and fewer >= 1, got {self.live} and {list(self.fewer)}")

    @cached_property
    def rivals(self) -> Rivals:
        """The benches of both halves, and the rivals."""
        return Rivals(*self.bench.halves(), self.students)

    @property
    def choosing(self) -> Bench:
        """The samples that settings are chosen on."""
        return self.rivals.choosing

    @property
    def reporting(self) -> Bench:
        """The samples that all numbers are of."""
        return self.rivals.reporting

    def table(self, families: Mapping[str, Sequence[Criterion]]) -> list[Point]:
        """The full run, real text, oracles, the plain samplers, and every setting of every family, strict to loose.

        Raises:
            CdlmError: the goal is a share of the gap to real text, and the gap is within noise.
        """
        if self.measure == "gap":
            self.choosing.check_gap(self.goal.confidence)
        full = self.reporting.full_run
        points = [self.point(FULL, "Never()", Outcome(full.tokens, full.nfe)), *self.real()]
        points += [self.point(o.name, o.setting, o.outcome) for o in oracles(self.reporting, self.goal, self.measure)]
        points += [*self.plain(), *self.taught()]
        shown = self.bench.session.progress
        for family, rules in progress(families.items(), total=len(families), label="rules compared", shown=shown):
            points += self.family(family, rules)
        return points

    def family(self, name: str, rules: Sequence[Criterion]) -> list[Point]:
        """Every setting of a rule; the one that the choosing half chose is marked and meets its rivals."""
        bench = self.reporting
        possible = [r for r in rules if (self.live or not bench.must_run(r)) and not bench.session.refuses(r)]
        drawn = [bench.under(rule, self.live) for rule in possible]
        found = [self.point(name, repr(rule), outcome) for rule, outcome in zip(possible, drawn, strict=True)]
        best = self.choice(possible)
        if best is not None:
            wall = self.full_seconds / self.seconds(possible[best]) if self.live else None
            duels = tuple(self.rivals.duels(drawn[best])) if self.with_rivals else ()
            found[best] = replace(found[best], chosen=True, wall_speedup=wall, duels=duels)
        return found

    def choice(self, rules: Sequence[Criterion]) -> int | None:
        """On the choosing half, the last setting before the first that fails the goal; None if it saves no call."""
        bench, passed = self.choosing, list[float]()
        for saved in takewhile(lambda saved: saved is not None, (self._saved(bench, rule) for rule in rules)):
            passed.append(saved or 0.0)
        return len(passed) - 1 if passed and passed[-1] > 0 else None

    def _saved(self, bench: Bench, rule: Criterion) -> float | None:
        """The share of calls that a setting saves within the goal; None if it is not within it.

        What counts is the bound of the loss; of too few samples for a bound, its mean.
        """
        outcome = bench.under(rule, self.live)
        spent = tried(bench, outcome, self.goal, self.measure)
        if len(outcome.tokens) >= fewest(self.goal, self.measure):
            return spent.saved if spent.under(self.goal, rule).passed else None
        size = abs(spent.loss.value) if self.goal.two_sided else spent.loss.value
        differ = 0.0 if spent.differ is None else spent.differ.value
        return spent.saved if size <= self.goal.limit and differ <= 1 - self.goal.agreement else None

    @cached_property
    def full_seconds(self) -> float:
        """Wall time of the full run, after a few steps to warm up."""
        self.seconds(FixedSteps(2))
        return self.seconds(Never())

    def seconds(self, rule: Criterion) -> float:
        """Wall time of the first `live` samples under a rule, in one process."""
        session = self.bench.session.alone().with_criterion(rule)
        start = time.perf_counter()
        self.bench.run(session, self.live)
        return time.perf_counter() - start

    def plain(self) -> list[Point]:
        """The plain sampler with fewer steps: as the full run is sampled, and in each rival's best way. Where there are
        no grids to choose from, that may be the same."""
        own = self.reporting.session
        ways = {PLAIN: own}
        if self.with_rivals:
            others = [r for r in self.rivals.plain if "grid" in own.settings or r.session.settings != own.settings]
            ways |= {f"plain sampler, {rival.name}": rival.session for rival in others}
        return [self.point(family, _way(way, steps), drawn) for family, way in ways.items()
                for steps, drawn in self._fewer(way)]  # fmt: skip

    def taught(self) -> list[Point]:
        """The students, each in its own steps, on the same samples."""
        drawn = {name: self.rivals.drawn(one, len(self.reporting.full_run)) for name, one in self.students.items()}
        return [self.point(name, _way(self.students[name], self.students[name].settings["steps"]), outcome)
                for name, outcome in drawn.items()]  # fmt: skip

    def _fewer(self, way: Session) -> Iterator[tuple[int, Outcome]]:
        bench = self.reporting
        budgets = self.fewer or [max(1, round(share * bench.mean_steps)) for share in SHARES]
        for steps in way.fewer_steps([b for b in budgets if b < bench.steps], bench.longest):
            yield steps, self.rivals.drawn(way.with_steps(steps), len(bench.full_run))

    def point(self, family: str, setting: str, drawn: Outcome) -> Point:
        """All that one set of samples says."""
        bench, m = self.reporting, len(drawn.tokens)
        calls, before = drawn.nfe.astype(np.float64), bench.full_calls[:m]
        spent, relative = Scores(calls, np.ones(m)).bootstrap(), bench.relative(drawn)
        speedup = float(before.sum() / calls.sum())
        full = Outcome(bench.full_run.tokens[:m], bench.full_run.nfe[:m])
        rows = bench.generated(drawn)
        gap = {} if bench.gap_in_noise() else _interval("gap_share", bench.share_of_gap(drawn))
        values: dict[str, Any] = {
            **_interval("calls", spent), **_interval("change", bench.change(drawn)), **_interval("loss", relative),
            **gap,
            "tpf": bench.tpf(drawn),
            "saved": 1 - 1 / speedup,
            "step_speedup": speedup,
            "step_speedup_each": float((before / calls).mean()),
            "upper": bench.loss(drawn, self.measure, self.goal.two_sided).at_most(self.goal.confidence),
            "bounded": m >= fewest(self.goal, self.measure),
            "agreement": bench.agreement(drawn),
            "entropy_change": sample_entropy(rows) - sample_entropy(bench.generated(full)),
            "right": bench.right(drawn),
            "qps": speedup * (1 + relative.value) ** -GAMMA,
            **self._distance(drawn),
        }  # fmt: skip
        return Point(**self._text(family, setting, rows, bench.score(drawn.tokens)), **values)

    def _distance(self, drawn: Outcome) -> dict[str, float]:
        """The Fréchet distance to real text and its change, split by split; of too few samples nothing."""
        here, full = self.reporting.frechet(drawn), self._full_distance
        if here is None or full is None:
            return {}
        changes = np.array(here.values) - np.array(full.values)
        sd = float(changes.std(ddof=1)) if len(changes) > 1 else np.nan
        return {"frechet": here.mean, "frechet_change": float(changes.mean()), "frechet_change_sd": sd}

    @cached_property
    def _full_distance(self) -> Spread | None:
        run = self.reporting.full_run
        return self.reporting.frechet(Outcome(run.tokens, run.nfe))

    def real(self) -> list[Point]:
        """Real text under the same judge: held out, and like the training text where there is some; of a workload that
        of the same rows."""
        parts: tuple[Part, ...] = ("held out", "like training")
        bench = self.reporting
        if bench.work is not None:
            return [self._real(bench.reference)]
        there = parts if bench.text.unread is not None else parts[:1]
        return [
            self._real(bench.reference if part == bench.text.reference_part else bench.real(part)) for part in there
        ]

    def _real(self, sample: RealSample) -> Point:
        """A row of real text; that of the reference has the distance of real text to real text."""
        splits = self.reporting.splits
        row = Point(**self._text(sample.corpus.name, "", sample.corpus.tokens, sample.scores))
        if splits is None or splits.name != row.family:
            return row
        return replace(row, frechet=splits.ceiling({"frechet": DISTANCES["frechet"]})["frechet"].mean)

    def _text(self, family: str, setting: str, rows: Sequence[list[int]], scores: Scores) -> dict[str, Any]:
        return {
            "model": self.label,
            "steps": self.bench.steps,
            "family": family,
            "setting": setting,
            "samples": len(rows),
            **_interval("ar_nll", scores.bootstrap()),
            "entropy_sample": sample_entropy(rows),
            "entropy_corpus": unigram_entropy(rows),
            "workload": "" if self.bench.work is None else self.bench.work.name,
        }


def _way(session: Session, steps: int) -> str:
    """How a plain sampler is sampled."""
    parts = [str(session.settings[name]) for name in ("grid", "solver", "commit") if name in session.settings]
    return ", ".join([f"{steps} steps", *parts])


def too_few(
    model: str, families: Mapping[str, Sequence[Criterion]], in_blocks: bool, live: int, n: int, goal: Goal, needed: int
) -> str:
    """Which families are measured on fewer samples than a bound of their loss needs, as a warning; empty if none is.

    Args:
        n: samples of each half.
        needed: samples that the goal needs.
    """
    must = [name for name, rules in families.items() if in_blocks or any(rule.live for rule in rules)]
    short = list(families) if n < needed else must if 0 < live < needed else []
    if not short:
        return ""
    samples = n if n < needed else live
    return (
        f"{', '.join(short)} on {model}: the change is a mean without a bound, as there are {samples} samples in each"
        f" half, and to be {goal.confidence:.0%} sure of {goal} needs {needed}: raise"
        f" {'--n' if n < needed else '--live'}, or ask for less"
    )


def _interval(name: str, found: Bootstrap) -> dict[str, float]:
    low, high = found.interval95
    return {name: found.value, f"{name}_low": low, f"{name}_high": high}


def write_csv(points: Sequence[Point], path: Path) -> None:
    """Every point, and of a chosen one the verdict."""
    rows = []
    for point in points:
        found = {name: value for name, value in asdict(point).items() if name != "duels"}
        decided = point.verdict
        duel = {name: None for name in RIVAL} if decided is None else asdict(decided.duel)
        word = None if decided is None else decided.word
        rows.append({**found, "verdict": word, **{f"rival_{name}": value for name, value in duel.items()}})
    write_rows(path, rows)


RIVAL = tuple(field.name for field in fields(Duel))
"""Columns of the rival that decides."""


def save_json(points: Sequence[Point], goal: Goal, measure: str, path: Path) -> None:
    """Every point with all its rivals and the verdict, and what the choice was made by."""
    rows = [point.to_dict() for point in points]
    found = [asdict(area) for area in areas(points)]
    write_json(path, {"goal": asdict(goal), "measure": measure, "rows": rows, "aup": found})


@dataclass(frozen=True)
class Area:
    """Accuracy under parallelism of one way of decoding: its settings, strict to loose, and the full run."""

    model: str
    steps: int
    family: str
    tpf: float
    """The most tokens per forward of its settings."""
    aup: float | None
    """By right answers; None where the workload asks for none."""
    y_max: float | None
    """Share of right answers of the best row of the table, in per cent: `aup` is relative to it."""
    aup_ar_nll: float | None
    """The same, of 100 exp(best AR-NLL - AR-NLL) in place of right answers; None where there is no text to judge."""
    best_ar_nll: float | None
    """The lowest of the model's rows."""


def areas(points: Sequence[Point]) -> list[Area]:
    """The area of every rule and plain sampler, and of the full run alone."""
    ran = [point for point in points if point.family not in (*REAL.values(), OWN_ROWS, *ORACLES)]
    y_max = max((100 * point.right for point in ran if point.right is not None), default=None)
    found = []
    for model, steps, family in dict.fromkeys((p.model, p.steps, p.family) for p in ran):
        own = [p for p in ran if (p.model, p.steps) == (model, steps) and p.family in (family, FULL)]
        best = min((p.ar_nll for p in ran if p.model == model and not isnan(p.ar_nll)), default=None)
        tpf = max(p.tpf or 0.0 for p in own)
        found.append(Area(model, steps, family, tpf, _right(own, y_max), y_max, _near(own, best), best))
    return found


def _right(own: Sequence[Point], y_max: float | None) -> float | None:
    curve = [(p.tpf or 0.0, 100 * p.right) for p in own if p.right is not None]
    return aup(curve, y_max) if curve and y_max is not None else None


def _near(own: Sequence[Point], best: float | None) -> float | None:
    curve = [(p.tpf or 0.0, accuracy_of(p.ar_nll, best)) for p in own if best is not None and not isnan(p.ar_nll)]
    return aup(curve, 100.0) if curve else None


COLUMNS = (
    "model", "steps", "rule", "n", "calls", "TPF", "saved", "AR-NLL", "change, nats", "share of the gap", "agreement",
    "H sample", "Fréchet", "its change", "QPS_4", "wall", "beside its hardest rival",
)  # fmt: skip
NOTHING = "saves no call within the goal"
SHOWN = (
    "rule", "calls", "TPF", "saved", "AR-NLL", "change, nats", "agreement", "right", "most TPF", "AUP",
    "beside its hardest rival",
)  # fmt: skip
"""Columns that a terminal shows."""


def markdown(points: Sequence[Point], goal: Goal, measure: str) -> str:
    """The table to read: the ends, the plain samplers, and of each rule the setting within the goal."""
    head, *body = _lines(points)
    ruler = ["--:" if i not in (0, 2) else ":--" for i in range(len(head))]
    lines = [table_line(cells) for cells in (head, ruler, *body)]
    under = markdown_table([line[2:3] + line[:2] + line[3:] for line in _area_lines(points)])
    return (
        "\n".join(lines) + "\n\n" + _note(goal, measure) + _marks(points, goal, measure) + f"\n{under}\n\n{AREA_NOTE}"
    )


def terminal(points: Sequence[Point], goal: Goal, measure: str) -> str:
    """The columns of the same tables that decide, as aligned plain text."""
    lines = [["none" if cell == NOTHING else _narrow(cell) for cell in line] for line in _lines(points)]
    shown = aligned_table(_columns(lines, SHOWN)) + "\n" + _marks(points, goal, measure)
    if all(point.right is None for point in points):
        return shown
    return shown + "\n" + aligned_table(_columns(_area_lines(points), SHOWN)) + "\n"


def _narrow(cell: str) -> str:
    """A cell of the table without the interval behind a number, and what follows it: the file has both."""
    return cell if cell.startswith("oracle") else cell.partition(" [")[0]


def _columns(lines: Sequence[Sequence[str]], shown: Collection[str]) -> list[list[str]]:
    """Some of the columns, and of model and steps those that are not always the same; the rule first after these."""
    head, *body = lines
    several = {name for name in ("model", "steps") if len({line[head.index(name)] for line in body}) > 1}
    chosen = [i for i, name in enumerate(head) if name in shown or name in several]
    chosen.sort(key=lambda i: (head[i] not in several, head[i] != "rule", i))
    return [[line[i] for i in chosen] for line in lines]


def _area_lines(points: Sequence[Point]) -> list[list[str]]:
    """Heading and lines of the areas."""
    found = areas(points)
    answered = any(area.aup is not None for area in found)
    lines = [["model", "steps", "rule", "most TPF", *(["AUP"] if answered else []), "AUP by AR-NLL"]]
    for area in found:
        right = [_number(area.aup, ".1f")] if answered else []
        lines.append([area.model, str(area.steps), area.family, f"{area.tpf:.2f}", *right,
                      _number(area.aup_ar_nll, ".1f")])  # fmt: skip
    return lines


AREA_NOTE = (
    "AUP: the area under right answers (in per cent) over TPF, of all settings of a rule and the full run, where an"
    " answer counts less the further its setting is from the best of the table (d3LLM). AUP by AR-NLL is ours: 100"
    " exp(-(AR-NLL - the best of the model)) in place of right answers. compare.json has what they are relative to:"
    " compare no areas of different tables.\n"
)


def _marks(points: Sequence[Point], goal: Goal, measure: str) -> str:
    unbounded = any(p.chosen and not p.bounded for p in points)
    needed = fewest(goal, measure)
    mark = f"\n{UNBOUNDED} Fewer than {needed} samples: the change is a mean, without a bound.\n" if unbounded else ""
    return mark + _note_on_work(points)


def _lines(points: Sequence[Point]) -> list[list[str]]:
    """Heading and lines of all columns."""
    rules = dict.fromkeys(p.family for p in points if not _is_reference(p))
    answered = any(point.right is not None for point in points)
    columns = (*COLUMNS[:-1], "right", COLUMNS[-1]) if answered else COLUMNS
    lines: list[list[str]] = [list(columns)]
    lines += [_cells(point, answered) for point in points if point.chosen or _is_reference(point)]
    for model, steps in dict.fromkeys((p.model, p.steps) for p in points):
        there = [p for p in points if (p.model, p.steps) == (model, steps)]
        for family in rules:
            own = [p for p in there if p.family == family]
            if own and not any(p.chosen for p in own):
                said = [model, str(steps), family, str(own[0].samples), "-", "-", NOTHING]
                lines.append(said + [""] * (len(columns) - len(said)))
    return lines


def _note_on_work(points: Sequence[Point]) -> str:
    names = [name for name in dict.fromkeys(point.workload for point in points) if name]
    if not names:
        return ""
    return (
        f"\nThe samples are of {', '.join(names)}. AR-NLL and entropy are of what was generated. The real text is that"
        " of the same rows in the same places, and the gap to it is paired.\n"
    )


def _note(goal: Goal, measure: str) -> str:
    return (
        f"Of each rule the loosest setting within {goal} ({measure}, {goal.confidence:.0%} confidence), chosen on one"
        " half of the samples; all numbers are of the other half. Intervals are 95 %, bootstrap over samples. The gap"
        " is from the full run to real text. TPF, tokens per forward: tokens of all samples, up to their ends and with"
        " them, over all calls. QPS_4 is the step speed-up times (AR-NLL of the full run / AR-NLL) **"
        f" {GAMMA}. The last column is AR-NLL less that of the rival that decides, with as many calls on the"
        " same samples: better is better than every rival, worse is worse than one, and of fewer than"
        f" {FEWEST_SAMPLES} samples it is unclear. The oracles are no"
        " rules, they know the full run: one ends each sample at its last change of a token, the other spends what the"
        " goal allows where it saves most.\n"
    )


def _is_reference(point: Point) -> bool:
    return point.family in (*REFERENCES, *ORACLES) or _is_plain(point) or point.family.startswith(STUDENT)


def _is_plain(point: Point) -> bool:
    return point.family.startswith("plain sampler")


def _cells(p: Point, answered: bool) -> list[str]:
    name = p.family if p.family in REFERENCES else p.setting
    if p.family in ORACLES or p.family.startswith(STUDENT):
        name = f"{p.family}: {p.setting}" if p.setting else p.family
    name += "" if p.bounded or _is_reference(p) else f" {UNBOUNDED}"
    found, against = p.verdict, "-"
    if found is not None:
        duel = found.duel
        same = ", at its entropy" if duel.matched else ""
        numbers = f"{duel.difference:+.3f} [{duel.low:+.3f}, {duel.high:+.3f}]"
        against = f"{found.word}: {numbers}, {duel.rival} ({duel.setting}{same})"
    distance = "-" if p.frechet_change is None else f"{p.frechet_change:+.3f} ± {p.frechet_change_sd:.3f}"
    return [
        p.model, str(p.steps), name, str(p.samples), _number(p.calls, ".1f"), _number(p.tpf, ".2f"),
        _number(p.saved, ".1%"),
        _ends(p, "ar_nll", ".3f"), _ends(p, "change", "+.3f"), _ends(p, "gap_share", "+.1%"),
        _number(p.agreement, ".2%"), f"{p.entropy_sample:.3f}", _number(p.frechet, ".3f"), distance,
        _number(p.qps, ".2f"), _number(p.wall_speedup, ".2f"),
        *([_number(p.right, ".1%")] if answered else []), against,
    ]  # fmt: skip


def _ends(point: Point, name: str, form: str) -> str:
    value, low, high = (getattr(point, f"{name}{end}") for end in ("", "_low", "_high"))
    return "-" if value is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def panels(points: Sequence[Point]) -> list[CurvePanel]:
    """What `cdlm.evaluation.plots.pareto` draws: a panel for each model and number of steps."""
    out, names = [], short_names(p.model for p in points)
    for model, steps in dict.fromkeys((p.model, p.steps) for p in points):
        there = [p for p in points if (p.model, p.steps) == (model, steps)]
        (full,) = (p for p in there if p.family == FULL)
        families = dict.fromkeys(_line_of(p) for p in there if p.family not in REFERENCES)
        last = sorted(families, key=lambda name: name in ORACLES)  # oracles are single points, and drawn over the rest
        curves = [_curve(_short(name, last), [p for p in there if _line_of(p) == name], full) for name in last]
        levels = [(p.family, p.ar_nll) for p in there if p.family in REFERENCES]
        out.append(CurvePanel(f"{names[model]}, {steps} steps", curves, levels))
    return out


def _line_of(point: Point) -> str:
    """The line that a point is drawn on: its family's, and all students share one."""
    return STUDENTS if point.family.startswith(STUDENT) else point.family


def _short(name: str, names: Collection[str]) -> str:
    """A family without the arguments that all its settings share, if that says which it is."""
    short = name.partition("(")[0]
    return short if [other.partition("(")[0] for other in names].count(short) == 1 else name


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
        rival=_is_plain(own[0]) or name == STUDENTS,
        chosen=place,
    )
