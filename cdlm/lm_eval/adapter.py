"""`CdlmLM`: a model of this toolkit as the harness's `LM`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cdlm import api
from cdlm.core.checks import shown
from cdlm.core.devices import resolve_device
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.likelihood import BOUND, LikelihoodSettings
from cdlm.core.progress import Parts, to_stderr
from cdlm.lm_eval.arguments import ModelArguments, read_arguments, read_pairs, sampling_of
from cdlm.lm_eval.counts import Counts
from cdlm.lm_eval.tasks import (
    NEW_TOKENS,
    Question,
    Reader,
    Scored,
    Wanted,
    alike,
    encode,
    encode_pair,
    name_of,
    numbered,
    rows_of,
    runs_of,
    text_to_score,
    windows,
)
from cdlm.sampling.prompts import MOST_POSITIONS
from cdlm.sampling.session import Model, Session

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise CdlmError(
        f"lm-evaluation-harness is not installed ({first_line(error)}): pip install 'cdlm[lm-eval]'"
    ) from error


class CdlmLM(LM):
    """A continuous, masked or foreign masked model in the harness, under any halting rule.

    Args:
        arguments: see `ModelArguments`, under its names or those that other projects use.

    Raises:
        CdlmError: an argument is unknown or of a wrong kind, or has no meaning for this model.
    """

    def __init__(self, pretrained: str | Path | Model | None = None, **arguments: Any):
        super().__init__()
        named = {**arguments} if pretrained is None else {"pretrained": pretrained, **arguments}
        self.arguments = read_arguments(named)
        self.model = _opened(self.arguments)
        self.tokenizer = self.model.need_tokenizer()
        sampling, unused = sampling_of(self.model, self.arguments)
        self.session = api.open_session(
            self.model, sampling=sampling, seed=self.arguments.seed, batch_size=self.arguments.rows_of(self.model),
            progress=self.rank == 0,
        )  # fmt: skip
        if self.arguments.halt != "auto":  # a calibrated rule is of a length
            self.session = api.with_halt(self.session, self.arguments.halt, [])
        self.max_length = self.arguments.max_length or self.model.length or MOST_POSITIONS
        self._check_room()
        self._names = self.model.reads_names or bool(self.tokenizer.chat_template)
        self._counts, self._ways, self._said = Counts(), dict[str, str](), set[str]()
        self._gathered: Counts | None = None
        if unused:
            self._say(unused)

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict[str, Any] | None = None) -> CdlmLM:
        """From `name=value,name=value`; commas within brackets and quotes separate nothing."""
        return cls.create_from_arg_obj(read_pairs(arg_string), additional_config)

    # --- answers ------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answer to each prompt: all that are alike in length and temperature are in flight together.

        Raises:
            CdlmError: a prompt and its answer are longer than the model's length, before anything is generated.
        """
        asked = [_arguments(request, str, Mapping) for request in requests]
        wanted = [Wanted.of(settings) for _, settings in asked]
        self._say_unused(wanted)
        names = numbered(context for context, _ in asked)
        questions = self._fitting(
            [
                self._question(context, want, index)
                for (context, _), want, index in zip(asked, wanted, names, strict=True)
            ]
        )
        answers = [""] * len(questions)
        for temperature in sorted({q.wanted.temperature or 0.0 for q in questions}):
            places = [i for i, q in enumerate(questions) if (q.wanted.temperature or 0.0) == temperature]
            session = self._at(temperature)
            for run in runs_of([questions[i].size for i in places], session.batch_size or 1):
                self._answer(session, questions, [places[i] for i in run], answers)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _question(self, context: str, wanted: Wanted, index: int) -> Question:
        """What is generated behind a prompt: rows of a model of whole rows are filled, and cut afterwards."""
        prompt, new = self._encoded(context), self.arguments.new_tokens
        if not self.model.whole_rows or (new is not None and self._masked):
            return Question(prompt, new or wanted.most or NEW_TOKENS, None, wanted, index)
        # At least what was said, so that what does not fit is refused.
        room = max(new or 1, self.max_length - len(prompt))
        return Question(prompt, room, new or wanted.most, wanted, index)

    def _fitting(self, questions: list[Question]) -> list[Question]:
        """The questions, their prompts cut from the left where they may be.

        Raises:
            CdlmError: one does not fit.
        """
        made = [q._replace(prompt=self._shortened(q.prompt, q.size - self.max_length)) for q in questions]
        self._check_fits(made)
        return made

    def _shortened(self, tokens: list[int], excess: int) -> list[int]:
        """The tokens without so many at their beginning, if they may be cut; what begins a text stays."""
        begin = len(self._begin)
        if excess <= 0 or not self.arguments.truncate or excess > len(tokens) - begin:
            return tokens
        self._counts += Counts(truncated=1)
        return [*tokens[:begin], *tokens[begin + excess :]]

    def _check_fits(self, rows: Sequence[Question | Scored]) -> None:
        wrong = [row for row in rows if row.size > self.max_length]
        if not wrong:
            return
        worst = max(wrong, key=lambda row: row.size)
        raise CdlmError(
            f"{len(wrong)} of {len(rows)} texts do not fit into the {self.max_length} positions of {self.model.name}:"
            f" the longest has {_parts(worst)}; take fewer shots, a smaller new_tokens, or truncate=true, which cuts"
            " prompts from the left"
        )

    def _at(self, temperature: float) -> Session:
        """The session at the temperature that a task asks for, unless the model's arguments name one."""
        if not temperature:
            return self.session
        own = self.arguments.settings.get("temperature")
        if own is not None or "temperature" not in self.session.sampling.flat_names():
            used = "it has none: give softmax_temperature" if own is None else f"model_args has temperature={own}"
            self._say(f"a task asks for temperature {temperature:g}, and {used}")
            return self.session
        return self.session.with_sampling(self.session.sampling.with_flat(temperature=temperature))

    def _answer(self, session: Session, questions: list[Question], places: list[int], answers: list[str]) -> None:
        """Serve some questions as one run, and write their answers into their places."""
        asked = [questions[i] for i in places]
        rows = rows_of(asked)
        if self.arguments.halt == "auto":
            session = api.with_halt(session, "auto", rows)
        self._ways[repr(session.sampling)] = repr(session.criterion)
        self._say(f"sampled by {session.sampling!r}, halted by {session.criterion!r}")
        samples = session.run(rows)
        self._counts += Counts.of(samples)
        reader = Reader.of(self.tokenizer)
        for row, (place, question) in enumerate(zip(places, asked, strict=True)):
            answer = samples.tokens[row][~samples.given[row] & samples.shown[row]]
            if self.arguments.escape_until:
                question = question._replace(wanted=replace(question.wanted, until=()))
            answers[place] = reader.answer(question, answer)

    # --- likelihood ---------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The bound on the log-likelihood of each continuation, its context given, in nats.

        Whether a continuation is what the model would generate is not asked, as LLaDA advises: always False.
        """
        parts = []
        for context, continuation in (_arguments(request, str, str) for request in requests):
            given, target = encode_pair(self.tokenizer, context, continuation, names=self._names)
            parts.append([Scored([*self._begin, *given], target, name_of(context))])
        found = [(value, False) for value in self._scores(parts)]
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The bound on the log-likelihood of each text in nats, in parts of at most the model's length."""
        room = self.max_length - len(self._begin)
        if room < 1:
            raise CdlmError(f"max_length={self.max_length} leaves no room for text: raise it")
        parts = []
        for (text,) in (_arguments(request, str) for request in requests):
            tokens = encode(self.tokenizer, text, names=self._names)
            made = windows(tokens, room, name_of(text))
            parts.append([part._replace(given=[*self._begin, *part.given]) for part in made])
        found = self._scores(parts)
        for request, answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer)
        return found

    def _scores(self, texts: list[list[Scored]]) -> list[float]:
        """The log-likelihood of each text, summed over its parts; of a text without tokens 0."""
        place = [i for i, text in enumerate(texts) for part in text if part.target]
        parts = [
            part._replace(given=self._shortened(part.given, part.size - self.max_length))
            for text in texts
            for part in text
            if part.target
        ]
        self._check_fits(parts)
        if self.session.settings.get("cfg_scale"):
            raise CdlmError("a likelihood is that of the model without guidance: leave out cfg_scale")
        nats, done = [0.0] * len(texts), 0
        # Of a single token a masked model has but one draw, which is exact.
        draws = [1 if self._masked and len(part.target) == 1 else self.arguments.mc for part in parts]
        with Parts(self.rank == 0) as meter:
            for levels, places in alike(parts, draws):
                how = LikelihoodSettings(levels, seed=self.arguments.seed, batch_size=self.session.batch_size or 1)
                found = self.model.nats(text_to_score([parts[i] for i in places]), how)[BOUND]
                for i, value in zip(places, found.total.tolist(), strict=True):
                    nats[place[i]] += value
                errors = [error for error in found.error.tolist() if not math.isnan(error)]
                self._counts += Counts(error=math.fsum(errors), errors=len(errors))
                done += len(places)
                meter("texts", done, len(parts))
        self._counts += Counts(scored=len(texts))
        return [-value for value in nats]

    # --- what the harness asks about the model ------------------------------------------------------------------------

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation in the tokenizer's chat template.

        Raises:
            CdlmError: there is no template, or it cannot be used.
        """
        self.chat_template(True)
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
                    continue_final_message=not add_generation_prompt,
                )
            )  # fmt: skip
        except Exception as error:  # the template's language has its own kinds
            raise CdlmError(f"the chat template of {self.model.name} cannot be used ({first_line(error)})") from error

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's chat template; None if none is asked for.

        Raises:
            CdlmError: there is none, or none of that name.
        """
        if chat_template is False or chat_template is None:
            return None
        known = self.tokenizer.chat_template
        if not known:
            raise CdlmError(f"the tokenizer of {self.model.name} has no chat template: leave out --apply_chat_template")
        name = "default" if chat_template is True else chat_template
        if isinstance(known, dict):
            if name not in known:
                raise CdlmError(f"{self.model.name} has no chat template {shown(name)}: use one of {', '.join(known)}")
            return str(known[name])
        return str(known)

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and chat template where the harness keeps prompts."""
        return f"{self.model.name}-{name_of(str(self.tokenizer.chat_template)):x}".replace("/", "__")

    @property
    def eot_token_id(self) -> int | None:
        """The end of a text."""
        eos = self.tokenizer.eos_token_id
        return eos if isinstance(eos, int) else None

    def get_model_info(self) -> dict[str, Any]:
        """What makes the answers and what they cost, for `config` of the results. It is asked for after the run."""
        counts = self._counts if self._gathered is None else self._gathered
        try:
            weights = self.model.need_fingerprint()
        except CdlmError:  # a plain function has none
            weights = None
        ways = self._ways or {repr(self.session.sampling): repr(self.session.criterion)}
        return {
            "cdlm": {
                "version": version("cdlm"), "model": self.model.name, "weights": weights,
                "precision": self.model.precision, "sampling": list(ways), "halt": sorted(set(ways.values())),
                "seed": self.arguments.seed, "new_tokens": self.arguments.new_tokens, "max_length": self.max_length,
                "batch_size": self.session.batch_size, "mc": self.arguments.mc, **counts.summary(),
            }
        }  # fmt: skip

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Refused where it has a file: the harness names an answer by its question alone."""
        if getattr(cache_hook, "dbdict", None) is not None:
            raise CdlmError(NO_CACHE)
        super().set_cache_hook(cache_hook)

    # --- several processes --------------------------------------------------------------------------------------------

    @property
    def device(self) -> Any:  # a torch.device; the harness declares None
        """Where the model is."""
        return self.model.device

    @property
    def rank(self) -> int:
        return torch.distributed.get_rank() if _distributed() else 0

    @property
    def world_size(self) -> int:
        return torch.distributed.get_world_size() if _distributed() else 1

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all processes, one after the other."""
        if not _distributed():
            return tensor
        found = [torch.empty_like(tensor) for _ in range(self.world_size)]
        torch.distributed.all_gather(found, tensor)
        return torch.cat([part.reshape(-1) if part.ndim == 0 else part for part in found])

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any]:
        """The objects of all processes, on one of them, and nothing on the others; what the answers cost goes along."""
        if not _distributed():
            return [obj]
        found: list[Any] | None = [None] * self.world_size if self.rank == dst else None
        torch.distributed.gather_object((obj, self._counts), found, dst)
        if found is None:
            return []
        self._gathered = sum((counts for _, counts in found), Counts())
        return [part for part, _ in found]

    def barrier(self) -> None:
        if _distributed():
            torch.distributed.barrier()

    # --- the rest -----------------------------------------------------------------------------------------------------

    @property
    def _masked(self) -> bool:
        return self.model.mask_id is not None

    @property
    def _begin(self) -> list[int]:
        """What stands before every prompt."""
        if not self.arguments.add_bos_token:
            return []
        bos = self.tokenizer.bos_token_id
        if not isinstance(bos, int):
            raise CdlmError(
                f"the tokenizer of {self.model.name} has no token that begins a text: leave out add_bos_token"
            )
        return [bos]

    def _encoded(self, context: str) -> list[int]:
        return [*self._begin, *encode(self.tokenizer, context, names=self._names)]

    def _check_room(self) -> None:
        new = self.arguments.new_tokens
        if new is not None and new > self.max_length:
            raise CdlmError(
                f"new_tokens={new} is more than the {self.max_length} positions of {self.model.name}: take fewer"
            )

    def _say_unused(self, wanted: Iterable[Wanted]) -> None:
        if names := sorted({name for want in wanted for name in want.unused}):
            self._say(f"not used of what the tasks ask for: {', '.join(names)}")

    def _say(self, line: str) -> None:
        """Print a line once, on one process."""
        if line not in self._said and self.rank == 0:
            self._said.add(line)
            to_stderr(f"cdlm: {line}")


register_model("cdlm")(CdlmLM)  # no decorator: it would hide the class from type checkers

NO_CACHE = (
    "the harness names a kept answer by its question alone, so that another rule, sampler or model would get the old"
    " ones: leave out use_cache; --log_samples keeps the answers of a run"
)
"""Why its cache of answers is refused."""


def _opened(arguments: ModelArguments) -> Model:
    if isinstance(arguments.pretrained, Model):
        return arguments.pretrained
    assert arguments.pretrained is not None
    device = _device_of(arguments.device)
    return api.load(arguments.pretrained, device=device, precision=arguments.precision, device_map=arguments.device_map)


def _device_of(device: str | None) -> str:
    """The device to use. The harness asks for the first CUDA device, in each process and with none."""
    if device is None or device == "auto":
        return _own_device("auto")
    if device.partition(":")[0] != "cuda":
        return resolve_device(device)
    if torch.cuda.is_available():
        return _own_device(device)
    found = resolve_device("auto")
    if os.environ.get("RANK", "0") == "0":
        to_stderr(f"cdlm: there is no CUDA device here, in place of {device} the model runs on {found}")
    return found


def _own_device(device: str) -> str:
    """The device of this process among those of `torchrun`; the one that is asked for where there is no other."""
    local = os.environ.get("LOCAL_RANK")
    return resolve_device(f"cuda:{local}" if local and torch.cuda.is_available() else device)


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _arguments(request: Any, *kinds: Any) -> tuple[Any, ...]:
    """What a request asks for."""
    found = tuple(request.args)
    if len(found) != len(kinds) or not all(isinstance(v, kind) for v, kind in zip(found, kinds, strict=True)):
        raise CdlmError(f"a request of this kind has {len(kinds)} arguments of other kinds, got {shown(found)}")
    return found


def _parts(row: Question | Scored) -> str:
    """A row in words."""
    if isinstance(row, Question):
        return f"a prompt of {len(row.prompt)} tokens and {row.room} to generate"
    return f"a context of {len(row.given)} tokens and {len(row.target)} to score"
