"""The rivals of a halting rule: other ways to spend as many calls on the same model, for the same samples.

A rule that beats the full run's own grid with fewer steps may beat a bad grid. So the plain sampler is given the best
of the grids that there are, ancestral steps too, and a fixed step to stop at. A rule that only sharpens is shown by
giving its rivals the same entropy: a lower temperature buys that as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from cdlm.core.errors import CdlmError
from cdlm.core.stats import Scores
from cdlm.evaluation.bench import Bench, Outcome
from cdlm.evaluation.metrics.diversity import sample_entropy
from cdlm.halting import FixedSteps
from cdlm.models.foreign import tokenizer_hash
from cdlm.sampling.session import Model, Sampling, Session

FIXED = "fixed step"
STUDENT = "student of"
"""How the names of distilled students begin."""
SAME_ENTROPY = 0.01
"""Nats within which the entropies of two sets of samples count as equal."""
TRIAL_SAMPLES = 128
"""On which the ways of a rival are tried, at most: differences between grids are larger than their noise."""
FEWEST_SAMPLES = 20
"""Of fewer there is no verdict."""
MOST_TRIES = 5
"""Temperatures that are tried to reach an entropy."""
GRAIN = 0.005
"""Between temperatures, as factors: finer than `SAME_ENTROPY` can tell, so that rules share the samples of rivals."""


@dataclass(frozen=True)
class Duel:
    """A rule beside one rival, on the same samples."""

    rival: str
    setting: str
    """How the rival was sampled."""
    calls: float
    ar_nll: float
    entropy: float
    """Inside a sample, in nats."""
    difference: float
    """AR-NLL of the rule less that of the rival: below 0 the rule is better."""
    low: float
    high: float
    """95 % interval, paired."""
    matched: bool = False
    """Whether the rival's temperature was set so that its entropy is the rule's."""


@dataclass(frozen=True)
class Plain:
    """The plain sampler in one way, which can be given any number of calls."""

    name: str
    session: Session
    """In that way, without a rule."""
    calls_a_step: float
    further: float
    """Calls whatever the steps are, such as the one that decodes at the end."""

    def at(self, calls: float, bench: Bench) -> Session:
        """The session with about so many calls: within one per cent of those of the full run."""
        grain = max(1, round(bench.steps / 50))  # so that rules which take about as many calls share a rival
        wanted = max(1, grain * round((calls - self.further) / self.calls_a_step / grain))
        fitting = self.session.fewer_steps([wanted], bench.longest)
        return self.session.with_steps(fitting[0] if fitting else wanted)


@dataclass(frozen=True)
class Rivals:
    """All rivals of the rules on one model.

    Args:
        choosing: samples on which the best of each rival's ways is chosen.
        reporting: samples on which rules and rivals are compared.
        students: that the model was distilled to, by name; see `students_of`.
    """

    choosing: Bench
    reporting: Bench
    students: Mapping[str, Session] = field(default_factory=dict)
    known: dict[str, Outcome] = field(default_factory=dict, compare=False, repr=False)
    """Samples of rivals that were drawn."""

    @cached_property
    def plain(self) -> list[Plain]:
        """Each kind of plain sampler in its best way: the least AR-NLL with half of the full run's steps."""
        found = (self._best(name, ways) for name, ways in self.choosing.session.rivals().items())
        return [plain for plain in found if plain is not None]

    def duels(self, outcome: Outcome) -> list[Duel]:
        """The samples of a rule beside each rival with as many calls, as they are and at the rule's entropy."""
        return [duel for name, rival in self._at(outcome) for duel in self._against(name, rival, outcome)]

    def _best(self, name: str, ways: Sequence[Sampling]) -> Plain | None:
        """None if the model walks none of the ways in so few steps."""
        own = self.choosing.session
        sessions = [own.with_sampling(way) for way in ways if way.with_steps(self._half).walks(own.model)]
        if not sessions:
            return None
        best = sessions[0] if len(sessions) == 1 else min(sessions, key=self._quality)
        return Plain(name, best, *self._cost(best))

    @property
    def _half(self) -> int:
        """Half of the full run's steps."""
        bench = self.choosing
        return bench.session.fewer_steps([bench.steps // 2], bench.longest)[0]

    def _quality(self, session: Session) -> float:
        bench = self.choosing
        return _value(bench.score(bench.run(session.with_steps(self._half), TRIAL_SAMPLES).tokens))

    def _cost(self, session: Session) -> tuple[float, float]:
        """Calls of a step, and those beside the steps: calls are a straight line over steps."""
        steps = sorted({self._half, self.choosing.steps})
        calls = [float(self.choosing.run(session.with_steps(count), 1).nfe.mean()) for count in steps]
        if len(steps) == 1:
            return calls[0] / steps[0], 0.0
        a_step = (calls[1] - calls[0]) / (steps[1] - steps[0])
        return a_step, calls[0] - a_step * steps[0]

    def _at(self, outcome: Outcome) -> Iterator[tuple[str, Session]]:
        """The rivals with as many calls as the samples took, and the students with as many or fewer."""
        calls, bench = float(outcome.nfe.mean()), self.reporting
        step = bench.step_at(calls)
        if not bench.session.refuses(FixedSteps(step)):
            yield FIXED, bench.session.with_criterion(FixedSteps(step))
        for plain in self.plain:
            yield plain.name, plain.at(calls, bench)
        for name, student in self.students.items():
            if float(self.drawn(student, len(outcome.nfe)).nfe.mean()) <= calls:
                yield name, student

    def _against(self, name: str, rival: Session, outcome: Outcome) -> Iterator[Duel]:
        bench = self.reporting
        drawn = self.drawn(rival, len(outcome.tokens))
        yield self._duel(name, rival, drawn, outcome)
        target = sample_entropy(bench.generated(outcome))
        if abs(sample_entropy(bench.generated(drawn)) - target) > SAME_ENTROPY:
            matched = self._matched(rival, drawn, target)
            if matched is not None:
                yield replace(self._duel(name, *matched, outcome), matched=True)

    def drawn(self, rival: Session, m: int) -> Outcome:
        """The first m samples of the reporting half, sampled so; a fixed step of the full run is replayed."""
        bench, own = self.reporting, rival.model is self.reporting.session.model
        key = f"{'' if own else rival.model.need_fingerprint()} {rival.sampling!r} {rival.criterion!r} {m}"
        if key not in self.known:
            same = own and rival.sampling == bench.session.sampling and not bench.must_run(rival.criterion)
            drawn = bench.under(rival.criterion, m) if same else bench.run(rival, m)
            self.known[key] = Outcome(drawn.tokens[:m], drawn.nfe[:m])
        return self.known[key]

    def _matched(self, rival: Session, drawn: Outcome, target: float) -> tuple[Session, Outcome] | None:
        """The rival at the temperature where its entropy is `target`, by the secant method; None if it is not found."""
        bench, m = self.reporting, len(drawn.tokens)
        factors, entropies = [1.0], [sample_entropy(bench.generated(drawn))]
        factor = 0.97 if entropies[0] > target else 1.03
        for _ in range(MOST_TRIES):
            session = rival.with_sampling(rival.sampling.with_temperature_times(factor))
            found = self.drawn(session, m)
            factors, entropies = [*factors, factor], [*entropies, sample_entropy(bench.generated(found))]
            if abs(entropies[-1] - target) <= SAME_ENTROPY:
                return session, found
            slope = (entropies[-1] - entropies[-2]) / (factors[-1] - factors[-2])
            if slope <= 0:
                return None
            wanted = min(2.0, max(0.3, factors[-1] + (target - entropies[-1]) / slope))
            factor = round(wanted / GRAIN) * GRAIN
            if factor == factors[-1]:
                return None
        return None

    def _duel(self, name: str, rival: Session, drawn: Outcome, outcome: Outcome) -> Duel:
        bench = self.reporting
        scores = bench.score(drawn.tokens)
        difference = bench.score(outcome.tokens).bootstrap() - scores.bootstrap()
        low, high = difference.interval95
        return Duel(
            name, _setting(rival), float(drawn.nfe.mean()), _value(scores), sample_entropy(bench.generated(drawn)),
            difference.value, low, high,
        )  # fmt: skip


def check_students(sessions: Iterable[Session], teachers: Sequence[Model]) -> None:
    """Raise unless each session is of a student of one of the teachers, with its tokenizer.

    Raises:
        CdlmError: one is not.
    """
    for model in (session.model for session in sessions):
        place, student = model.folder or model.name, model.student
        if student is None:
            raise CdlmError(f"{place} is no student: give folders that cdlm distill has made of the model")
        own = [teacher for teacher in teachers if teacher.has_weights(student.teacher)]
        if not own:
            names = ", ".join(teacher.name for teacher in teachers)
            raise CdlmError(
                f"{place} is a student of {student.name}, whose weights are not those of {names}: compare it with that"
                " model"
            )
        if not any(_same_tokenizer(model, teacher) for teacher in own):
            raise CdlmError(f"{place} has another tokenizer than its teacher {student.name}: copy the folder again")


def _same_tokenizer(one: Model, other: Model) -> bool:
    return tokenizer_hash(one.need_tokenizer()) == tokenizer_hash(other.need_tokenizer())


def students_of(model: Model, sessions: Iterable[Session]) -> dict[str, Session]:
    """The sessions of the model's students by their names, of most steps first.

    Raises:
        CdlmError: two students of the model take as many steps.
    """
    found: dict[str, Session] = {}
    own = [(session.model.student, session) for session in sessions]
    theirs = [(student, s) for student, s in own if student is not None and model.has_weights(student.teacher)]
    for student, session in sorted(theirs, key=lambda pair: -pair[0].steps):
        name = f"{STUDENT} {student.steps} steps"
        if name in found:
            raise CdlmError(
                f"{found[name].model.folder} and {session.model.folder} are both students of {student.steps} steps of"
                f" {model.name}: give one of them"
            )
        found[name] = session
    return found


@dataclass(frozen=True)
class Verdict:
    """A rule beside all its rivals."""

    word: str
    """`better` than every rival, `worse` than one of them, or `unclear`."""
    duel: Duel
    """With the rival that decides: the one that is surely better, or else the hardest to rule out."""


def verdict(duels: Sequence[Duel], entropy: float, samples: int) -> Verdict | None:
    """What the duels of a rule say together; None without any.

    A rival that was run at the rule's entropy counts in that run alone. One that no temperature brings there leaves the
    rule unclear at best: what a temperature buys is no gain. So do few samples. Where the rival decides, its difference
    is the extreme of several noisy ones, and leans against the rule.

    Args:
        entropy: of the rule's samples.
        samples: that the duels are of.
    """
    if not duels:
        return None
    matched = {duel.rival for duel in duels if duel.matched}
    fair = [duel for duel in duels if duel.matched or duel.rival not in matched]
    strongest, hardest = max(fair, key=lambda duel: duel.low), max(fair, key=lambda duel: duel.high)
    if strongest.low > 0 and samples >= FEWEST_SAMPLES:
        return Verdict("worse", strongest)
    uneven = any(abs(duel.entropy - entropy) > SAME_ENTROPY for duel in fair)
    better = hardest.high < 0 and not uneven and samples >= FEWEST_SAMPLES
    return Verdict("better" if better else "unclear", hardest)


def _value(scores: Scores) -> float:
    return float(scores(np.ones((1, len(scores.total))))[0])


def _setting(session: Session) -> str:
    rule = "" if repr(session.criterion) == "Never()" else f", {session.criterion!r}"
    settings = session.settings
    named = ("steps", "grid", "solver", "policy", "score_temperature", "temperature")
    return ", ".join(str(settings[name]) for name in named if name in settings) + rule
