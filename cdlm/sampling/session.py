"""What is sampled from, how, and on which machine, for every family of models alike."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from cdlm.core.checks import MOST_STEPS, Settings, check_flag, check_object, check_whole, shown
from cdlm.core.errors import CdlmError
from cdlm.core.likelihood import LikelihoodSettings, Nats, Progress, Text
from cdlm.core.parallel import Workers, deal
from cdlm.core.types import AttributeOrProperty, LoopStep
from cdlm.halting import Criterion
from cdlm.halting.signals import WATCHED, check_signals
from cdlm.sampling.loop import Loop, RunOptions, check_batch_size
from cdlm.sampling.progress import with_progress
from cdlm.sampling.prompts import Message, Prompt, checked_prompts
from cdlm.sampling.requests import Asked, Request, check_requests, check_run, firsts
from cdlm.sampling.requests import requests as row_requests
from cdlm.sampling.samples import Origin, Samples, collect
from cdlm.sampling.voting import AnswerReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

S = TypeVar("S", bound="Sampling")
Onlooker = Callable[[Iterable[LoopStep], Sequence[Request]], Iterable[LoopStep]]
"""Passes the steps of a run on, and shows someone what happens."""


@dataclass(frozen=True)
class Student(Settings):
    """What a model that was distilled to few steps was made for, and from.

    Args:
        steps: that it takes, no more and no fewer.
        teacher: fingerprint of the weights that it was distilled from.
        name: of that model.
    """

    steps: int
    teacher: str
    name: str

    def __post_init__(self) -> None:
        check_whole("a student", largest=MOST_STEPS, steps=self.steps)


class Model(ABC):
    """A model that text is sampled from, of any family."""

    length: int = 0
    """Positions that it was trained on; of a foreign model its context."""
    whole_rows: bool = True
    """Whether samples fill rows of `length` positions; if not, a prompt is continued by a given number of tokens."""
    ends: bool = False
    """Whether a text ends at its first end-of-text token, as in a model of whole documents."""
    tokenizer: PreTrainedTokenizerFast | None = None
    folder: Path | None = None
    """Where it was loaded from."""
    hub_id: str | None = None
    """Its name on the Hub, if it came from there."""
    fingerprint: str | None = None
    """Of its weights, where it is known without more work; see `need_fingerprint`."""
    batch_size: int = 64
    """Rows in flight unless a run asks for another number."""
    precision: str = "fp32"
    """Arithmetic of its network alone; everything around it is at least float32."""
    mask_id: int | None = None
    """The mask, of a masked model."""
    reads_names: bool = False
    """Whether the name of a special token in a template is that token, as whole prompts of a foreign model are written;
    our own are trained on text in which such a name is text."""
    new_tokens: int | None = None
    """Of a masked model, positions after each prompt unless a call asks for others; None: a call has to ask."""
    preset: Mapping[str, int | float | str] = {}
    """Flat settings of the sampler that its folder recommends; empty if it recommends none."""
    student: Student | None = None
    """Of a model that was distilled to few steps: it is sampled as its folder recommends, in so many."""
    _sampling: Sampling | None = None

    @property
    @abstractmethod
    def defaults(self) -> Sampling:
        """How its paper samples it."""

    @property
    def sampling(self) -> Sampling:
        """How it is sampled unless a call says otherwise: as its folder recommends, or else as in its paper, until
        another is assigned."""
        return self._sampling or self.defaults.with_flat(**self.preset)

    @sampling.setter
    def sampling(self, sampling: Sampling) -> None:
        check_family(sampling, self)
        self._sampling = sampling

    def recommends(self, settings: Collection[str]) -> bool:
        """Whether it is sampled as its folder recommends where flat settings of these names are given.

        A recommended sampler is one whole: where a setting of the walk is given, all else is as in the paper.
        """
        return bool(self.preset) and self._sampling is None and self.defaults.walk.isdisjoint(settings)

    def base_of(self, settings: Collection[str]) -> Sampling:
        """The sampling that flat settings of these names replace parts of."""
        return self.sampling if self.recommends(settings) else self._sampling or self.plain

    @property
    def plain(self) -> Sampling:
        """How it is sampled whatever its folder recommends: as in its paper; but a student as it was distilled."""
        return self.defaults if self.student is None else self.defaults.with_flat(**self.preset)

    def check_sampling(self, sampling: Sampling) -> None:
        """Raise if a student is asked for other levels than those that it was distilled for.

        Raises:
            CdlmError: it is; says what to ask for.
        """
        if self.student is None:
            return
        made, asked = self.plain.settings, sampling.settings
        for name in ("steps", "grid"):
            if made.get(name) != asked.get(name):
                raise CdlmError(
                    f"the model is a student of {self.student.steps} steps on {made.get('grid')}, and was asked for"
                    f" {name} {asked.get(name)}: leave out {name}, or give {made.get(name)}"
                )

    @property
    def device(self) -> torch.device:
        """Where its tokens go."""
        return torch.device("cpu")

    def modules_named(self, names: Iterable[str]) -> dict[str, torch.nn.Module]:
        """Parts of its network, whose outputs a rule reads.

        Raises:
            CdlmError: it has none of that name.
        """
        network = getattr(self, "network", None)
        known = dict(network.named_modules()) if isinstance(network, torch.nn.Module) else {}
        for name in sorted(set(names) - known.keys()):
            raise CdlmError(
                f"{self.name} has no module {shown(name)}, whose output the rule reads: load the adapter that the rule"
                " was made beside, not merged into its base"
            )
        return {name: known[name] for name in sorted(set(names))}

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Stop tokens: a text ends at the first of them, such as the end of text or of a turn. Without any, texts fill
        their rows."""
        return ()

    @property
    def name(self) -> str:
        """What it is called in tables and files."""
        return self.hub_id or (type(self).__name__ if self.folder is None else Path(os.path.abspath(self.folder)).name)

    def nats(self, text: Text, settings: LikelihoodSettings, progress: Progress | None = None) -> dict[str, Nats]:
        """Minus the log-likelihood of each row in nats, by measure: `BOUND`, and `ODE` if the settings have one.

        Args:
            text: on any device; its rows go to the model's.
            progress: called after each batch.

        Returns:
            Tensors on the CPU.

        Raises:
            CdlmError: the model has no likelihood, or not with these settings.
        """
        raise CdlmError(
            f"cannot compute the likelihood of a {type(self).__name__}, which has none here: it is known of models that"
            " this toolkit trains"
        )

    def check_weights(self) -> None:
        """Raise if its weights were cast to a kind that it cannot be sampled in."""
        return

    def need_fingerprint(self) -> str:
        """A hash of its weights, which names them in recordings and calibrations.

        Raises:
            CdlmError: the model is a plain function and has none.
        """
        if self.fingerprint is None:
            raise CdlmError(f"{self.name} has no weights that could be named in a file: load a model from a folder")
        return self.fingerprint

    def stored_fingerprint(self) -> str:
        """A hash of its weights as its files hold them, whatever precision they were loaded in."""
        return self.need_fingerprint()

    def has_weights(self, fingerprint: str) -> bool:
        """Whether its weights are those that a file names."""
        return fingerprint == self.need_fingerprint()

    def tokenizer_for(self, prompts: Sequence[Prompt] | None) -> PreTrainedTokenizerFast | None:
        """What reads the prompts and makes the texts; None of a model that has none and gets no prompts.

        Raises:
            CdlmError: there are prompts, or the model is one of texts, and it has no tokenizer.
        """
        return self.tokenizer if prompts is None else self.need_tokenizer()

    def need_tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer.

        Raises:
            CdlmError: there is none.
        """
        if self.tokenizer is None:
            place = "set model.tokenizer" if self.folder is None else f"copy tokenizer.json into {self.folder}"
            raise CdlmError(f"the model has no tokenizer: {place}, or decode tokens with cdlm.decode")
        return self.tokenizer


class Sampling(Settings, ABC):
    """How a family of models is sampled: frozen, and its own configuration."""

    family: ClassVar[str]
    """For messages, such as "continuous"."""
    flat: ClassVar[type[Any]]
    """Its settings as plain values, each None for what the model's paper does: those of the command line."""
    walk: ClassVar[frozenset[str]] = frozenset({"steps"})
    """Flat settings that say which steps are taken, and what they commit."""
    signals: AttributeOrProperty[frozenset[str]]
    """Signals that its steps have."""
    recorded: ClassVar[frozenset[str]]
    """Signals that a record of its runs needs."""
    watches: ClassVar[bool] = False
    """Whether its steps can keep what modules of the network give."""

    @classmethod
    def flat_names(cls) -> set[str]:
        """Its flat settings."""
        return {"steps", *(field.name for field in fields(cls.flat))}

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """What fixes a run besides seed and rule, as plain values: two runs with equal settings walk the same steps."""

    @abstractmethod
    def with_flat(self: S, **settings: Any) -> S:
        """The same with some of its flat settings (and `steps`) replaced; None leaves a setting as it is."""

    @abstractmethod
    def with_steps(self: S, steps: int) -> S:
        """The same with so many steps.

        Raises:
            CdlmError: it has no number of steps.
        """

    @abstractmethod
    def steps_of(self, request: Request) -> int:
        """Most steps of a request, or of each of its blocks where these are runs of their own."""

    @abstractmethod
    def fewer_steps(self, wanted: Sequence[int], request: Request) -> list[int]:
        """Numbers of steps near those wanted that the request can be sampled with; none if there is no such number."""

    def walks(self, model: Any) -> bool:
        """Whether a model can be sampled in just these steps."""
        return True

    def blocks_of(self, request: Request) -> int:
        """Runs in a row that a sample takes, each from fresh noise."""
        return 1

    @property
    def draws(self) -> bool:
        """Whether equal requests may have different samples; if not, one of them is served, and the others are copies
        of its sample."""
        return True

    @property
    def unrecorded(self) -> tuple[str, str] | None:
        """What a run does that a record does not hold, and how to change that; None if it can be recorded."""
        return None

    @abstractmethod
    def with_temperature_times(self: S, factor: float) -> S:
        """The same with its temperature multiplied: below 1 sharpens. A temperature of 0 stays."""

    def rivals(self: S) -> Mapping[str, Sequence[S]]:
        """Plain ways to spend fewer steps on the same model, by the name of the rival; of each the best is taken."""
        return {}

    @abstractmethod
    def length_of(self, requests: Sequence[Request]) -> int:
        """Positions of a sample, as a calibration counts them."""

    def requests(self, model: Model, asked: Asked) -> list[Request]:
        """The samples that are asked for: whole rows, unless a family has others too."""
        if asked.new_tokens is not None or asked.chat:
            name = "chat" if asked.new_tokens is None else "new_tokens"
            raise CdlmError(f"{name} is a setting of masked models, and this one is {self.family}: leave it out")
        length, tokenizer = model.length if asked.length is None else asked.length, model.tokenizer_for(asked.prompts)
        return row_requests(asked.prompts, asked.n, length, tokenizer, template=asked.template)

    @abstractmethod
    def loop(self, model: Any, options: RunOptions, batch_size: int) -> Loop[Any]:
        """A run of the model, where the model is."""


def check_family(sampling: Sampling, model: Model) -> None:
    """Raise unless the sampling is of the model's family."""
    if type(sampling) is not type(model.defaults):
        raise CdlmError(
            f"{model.name} is a {model.defaults.family} model and is sampled by {type(model.defaults).__name__}, got"
            f" {shown(sampling)}"
        )


@dataclass(frozen=True, eq=False)
class Session:
    """A model, how it is sampled, and the machine it runs on. It is loaded once and serves any number of runs.

    Args:
        model: loaded, on its device.
        sampling: how it is sampled.
        options: rule, seed, and what is recorded.
        batch_size: samples in flight; by default the model's.
        workers: further processes with the same model; None serves all requests here.
        progress: show a bar.
        onlooker: the steps of runs in this process pass through it, see `with_onlooker`.
    """

    model: Model
    sampling: Sampling
    options: RunOptions = field(default_factory=RunOptions)
    batch_size: int | None = None
    workers: Workers[Model] | None = None
    progress: bool = False
    onlooker: Onlooker | None = None
    device: torch.device = field(init=False)
    """Where the model was when the session was opened."""

    def __post_init__(self) -> None:
        check_object("a session", Model, model=self.model)
        check_object("a session", RunOptions, options=self.options)
        if self.workers is not None:
            check_object("a session", Workers, workers=self.workers)
        check_flag("a session", progress=self.progress)
        check_family(self.sampling, self.model)
        self.model.check_sampling(self.sampling)
        if self.batch_size is not None:
            check_batch_size(self.batch_size)
        self.model.check_weights()
        self._check_signals(self.options.needs)
        self._check_modules(self.criterion)
        self.check_made_for([self.criterion])
        object.__setattr__(self, "device", self.model.device)

    @property
    def criterion(self) -> Criterion:
        """The halting rule."""
        return self.options.criterion

    @property
    def seed(self) -> int:
        """Of every run."""
        return self.options.seed

    @property
    def settings(self) -> dict[str, Any]:
        """What fixes a run besides seed and rule."""
        return self.sampling.settings

    @property
    def signals(self) -> frozenset[str]:
        """Signals that a rule can read here."""
        return self.sampling.signals

    def with_criterion(self, criterion: Criterion) -> Session:
        """The same under a rule."""
        return self._with(options=replace(self.options, criterion=criterion))

    def with_seed(self, seed: int) -> Session:
        """The same with other noise."""
        return self._with(options=replace(self.options, seed=seed))

    def with_sampling(self, sampling: Sampling) -> Session:
        """The same model, sampled in another way."""
        return self._with(sampling=sampling)

    def with_steps(self, steps: int) -> Session:
        """The same with so many steps."""
        return self._with(sampling=self.sampling.with_steps(steps))

    def recorded(self, record: bool = True) -> Session:
        """The same, keeping every step of its runs, or none."""
        check_flag("a session", record=record)
        return self._with(options=replace(self.options, record=self.sampling.recorded if record else frozenset()))

    def watched(self) -> Session:
        """The same, keeping every step and what its positions were like: for `Samples.watch`."""
        of_positions = self.signals.intersection(WATCHED)
        return self._with(options=replace(self.options, record=self.sampling.recorded | of_positions))

    def with_onlooker(self, onlooker: Onlooker) -> Session:
        """The same under someone's eyes: every step of a run in this process passes through the onlooker. It can read
        the tokens of a continuous model at each, and what a masked one has committed."""
        seen = frozenset() if self.model.mask_id is not None else frozenset({"tokens"})
        options = replace(self.options, record=self.options.record | seen)
        return self._with(options=options, onlooker=onlooker, progress=False)

    def alone(self) -> Session:
        """The same in this process alone, without a bar: for wall time."""
        return self._with(workers=None, progress=False)

    def requests(
        self, prompts: Iterable[Prompt | Message] | None = None, n: int = 1, length: int | None = None, *,
        new_tokens: int | None = None, chat: bool = False, system: str | None = None, template: bool = True,
    ) -> list[Request]:  # fmt: skip
        """`n` samples of each prompt, or in all where there are none; see `cdlm.generate`."""
        texts = checked_prompts(prompts, chat, system)
        asked = Asked(texts, n, length, new_tokens=new_tokens, chat=chat, template=template)
        return self.sampling.requests(self.model, asked)

    def steps_of(self, request: Request) -> int:
        """Most steps of a request, or of each of its blocks."""
        check_object("a session", Request, request=request)
        return self.sampling.steps_of(request)

    def fewer_steps(self, wanted: Sequence[int], request: Request) -> list[int]:
        """Numbers of steps near those wanted that the request can be sampled with; a student has none but its own."""
        if self.model.student is not None:
            return []
        fitting, own = self.sampling.fewer_steps(wanted, request), self.steps_of(request)
        near = (next(filter(self._walks, range(steps, max(steps, own) + 1)), None) for steps in fitting)
        return sorted({steps for steps in near if steps is not None})

    def _walks(self, steps: int) -> bool:
        return self.sampling.with_steps(steps).walks(self.model)

    def rivals(self) -> Mapping[str, Sequence[Sampling]]:
        """Plain ways to spend fewer steps on the model, by the name of the rival; on a student there are none."""
        return {} if self.model.student is not None else self.sampling.rivals()

    def blocks_of(self, requests: Sequence[Request]) -> int:
        """Runs in a row that a sample takes at most."""
        check_requests(requests)
        return max(self.sampling.blocks_of(request) for request in requests)

    def replayable(self, requests: Sequence[Request]) -> bool:
        """Whether rules can be tried on a record of these requests. They cannot where a sample is several runs in a
        row: to halt one block changes the next. Nor where a record does not hold what a step would return."""
        return self.blocks_of(requests) == 1 and not self.sampling.unrecorded

    def check_recordable(self, requests: Sequence[Request], what: str = "recorded") -> None:
        """Raise unless the steps of these requests can be kept.

        Args:
            what: is to be done with them, for the error.
        """
        if why := self.sampling.unrecorded:
            raise CdlmError(f"a run that {why[0]} cannot be {what}: {why[1]}")
        if not self.replayable(requests):
            raise CdlmError(
                f"a run of {self.blocks_of(requests)} blocks cannot be {what}: its steps are not kept, because to halt"
                " one block changes the next, and a rule has to be run"
            )

    def check_made_for(self, rules: Iterable[Criterion]) -> None:
        """Raise if a rule was made for another model or sampler."""
        try:
            listed = list(rules)
        except TypeError as error:
            raise CdlmError(f"a session needs a list of rules, got {shown(rules)}") from error
        for rule in listed:
            check_object("a session", Criterion, rule=rule)
            rule.check_made_for(self.model.has_weights, self.settings)

    def refuses(self, criterion: Criterion) -> str:
        """Why the model has no use for a rule; empty if it has."""
        check_object("a session", Criterion, criterion=criterion)
        try:
            self._check_signals(criterion.needs)
            self._check_modules(criterion)
        except CdlmError as error:
            return str(error)
        return ""

    def run(self, requests: Sequence[Request]) -> Samples:
        """Serve the requests.

        Raises:
            CdlmError: there are no requests, the model was moved since the session was opened, a prompt leaves nothing
                to generate, or the model's logits are not numbers.
        """
        self._check_place()
        check_run(requests)
        if self.options.record >= self.sampling.recorded:
            self.check_recordable(requests)
        if self.sampling.draws or self.options.record:  # a record has every row's own steps
            samples = self._served(requests)
        else:
            first = firsts(requests)
            samples = self._served([requests[i] for i in sorted(set(first))]).repeated(first, requests)
        origin = None if samples.record is None else self._origin
        return replace(samples, made_by=self.description, origin=origin)

    def _served(self, requests: Sequence[Request]) -> Samples:
        """The samples of requests, drawn here or by the further processes."""
        work = partial(serve, self.sampling, self.options, self.batch_size)
        if self.workers is None or len(self.workers) == 1:
            return work(self.model, requests, progress=self.progress, onlooker=self.onlooker)
        order = [request.index for request in requests]
        return Samples.merge(self.workers.map(work, self.model, deal(requests, len(self.workers))), order)

    @property
    def _origin(self) -> Origin:
        model, settings = self.model, {**self.settings, "ends": list(self.model.end_ids)}
        weights = model.fingerprint or ""
        return Origin(self.sampling.family, weights, settings, self.criterion.freezes, model.tokenizer)

    @property
    def description(self) -> dict[str, str]:
        """What makes the samples, for the record: model, sampling, rule and version."""
        from importlib.metadata import version

        return {
            "model": self.model.name, "weights": self.model.fingerprint or "", "sampling": repr(self.sampling),
            "halt": repr(self.criterion), "version": version("cdlm"),
        }  # fmt: skip

    def close(self) -> None:
        """End the further processes."""
        if self.workers is not None:
            self.workers.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_signals(self, names: Iterable[str]) -> None:
        check_signals(names, self.signals)

    def _check_modules(self, criterion: Criterion) -> None:
        if criterion.modules and not self.sampling.watches:
            raise CdlmError(
                f"{shown(criterion)} reads activations, which the steps of {self.sampling.family} models do not give:"
                " use a rule of the logits"
            )
        self.model.modules_named(criterion.modules)

    def _check_place(self) -> None:
        if self.model.device != self.device:
            raise CdlmError(
                f"the model was moved from {self.device} to {self.model.device} since the session was opened: open"
                " another session"
            )
        self.model.check_weights()

    def _with(self, **changes: Any) -> Session:
        self._check_place()
        kept = ("model", "sampling", "options", "batch_size", "workers", "progress", "onlooker")
        return Session(**{name: changes.get(name, getattr(self, name)) for name in kept})


def serve(
    sampling: Sampling, options: RunOptions, batch_size: int | None, model: Model, requests: Sequence[Request],
    progress: bool = False, onlooker: Onlooker | None = None,
) -> Samples:  # fmt: skip
    """The samples of some requests, drawn in this process."""
    options = replace(options, criterion=reading(options.criterion, model))
    loop = sampling.loop(model, options, model.batch_size if batch_size is None else batch_size)
    return run_loop(loop, model, requests, progress, record=options.record >= sampling.recorded, onlooker=onlooker)


def reading(rule: Criterion, model: Model) -> Criterion:
    """The rule as it reads this model's answers, if it reads any."""
    return rule if model.tokenizer is None else rule.reading(AnswerReader(model.tokenizer, model.end_ids))


def run_loop(
    loop: Loop[Any], model: Model, requests: Sequence[Request], progress: bool = False, *, record: bool = False,
    onlooker: Onlooker | None = None,
) -> Samples:  # fmt: skip
    """Run a loop to its end.

    Args:
        record: keep every step.
        onlooker: what every step passes through.
    """
    steps: Iterable[LoopStep] = loop.steps(requests)
    if onlooker is not None:
        steps = onlooker(steps, requests)
    if progress:
        steps = with_progress(steps, len(requests))
    return collect(
        steps, requests, model.tokenizer, budget=loop.budget(requests), seed=loop.options.seed, record=record,
        watched=loop.options.record.intersection(WATCHED), mask_id=model.mask_id, end_ids=model.end_ids,
    )  # fmt: skip
