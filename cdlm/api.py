"""The public functions: load a model, generate texts with it, decode with any masked model."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, get_args

import torch

from cdlm.autoregressive.sampler import LeftToRight
from cdlm.continuous.sampler import Diffusion
from cdlm.continuous.systems import langflow
from cdlm.core.checks import check_choice, check_flag, check_object, shown
from cdlm.core.devices import Precision, resolve_device
from cdlm.core.errors import CdlmError
from cdlm.core.files import check_new_folder, read_json, write_text
from cdlm.core.likelihood import LikelihoodSettings, Ode
from cdlm.core.parallel import workers_on
from cdlm.core.parsing import nearest
from cdlm.core.ranks import Group
from cdlm.core.types import Constants
from cdlm.data.masking import MASKINGS
from cdlm.evaluation.answers import Answers, likelihood_of_answers
from cdlm.evaluation.bench import Bench, settings_of
from cdlm.evaluation.evaluate import Distances, evaluate_files
from cdlm.evaluation.small_judge import OWN, SmallJudge, open_judge
from cdlm.evaluation.table import Evaluation
from cdlm.evaluation.texts import Entry, RealText, entries_of
from cdlm.evaluation.workloads import WORKLOADS, Work, Workload
from cdlm.halting import Criterion, parse_criterion
from cdlm.halting.calibration import calibrated_rule
from cdlm.masked import checkpoints
from cdlm.masked.model import LogitsFn, MaskedModel, as_masked_model
from cdlm.masked.sampler import Unmasking
from cdlm.models import hub, lora, shipped
from cdlm.models.foreign import import_transformers
from cdlm.models.hub import Pretrained
from cdlm.runs import caches
from cdlm.runs import config as names
from cdlm.runs.train import RunText
from cdlm.sampling.loop import RunOptions
from cdlm.sampling.prompts import Message, Prompt
from cdlm.sampling.recordings import find_recording
from cdlm.sampling.requests import Request, canvases
from cdlm.sampling.samples import Samples
from cdlm.sampling.session import Model, Sampling, Session, check_family

FAMILIES: tuple[type[Sampling], ...] = (Diffusion, Unmasking, LeftToRight)
"""The families of models, by how they are sampled."""
FOREIGN = (langflow, checkpoints)
"""What opens the formats of others: each knows by config.json whether it `opens` a folder."""

S = TypeVar("S", bound=Sampling)


def load(
    name: str | Path, *, device: str = "auto", precision: Precision | None = None,
    device_map: str | Mapping[str, int | str] | None = None,
) -> Model:  # fmt: skip
    """A trained model from a run folder or a Hub id, ready to sample from. Strict, and runs no code of the model.

    Also LLaDA and Dream in their published format, such as "GSAI-ML/LLaDA-8B-Instruct", on transformers' own Llama and
    Qwen2; and LangFlow in its own, "Continuous-Rivals-Discrete/langflow-owt".

    Args:
        device: "auto" is a GPU if there is one.
        precision: of our own models, the arithmetic of the network ("fp32" by default); of foreign ones,
            what the weights are held in (as in their files).
        device_map: of foreign ones, how to divide them among devices, such as "auto".
    """
    device = resolve_device(device)
    if precision is not None:
        check_choice("a model", get_args(Precision), precision=precision)
    import_transformers()
    path = hub.locate(name)
    if lora.is_adapter(path):
        return _open_adapter(path, device=device, precision=precision, device_map=device_map)
    config = read_json(path / "config.json", "a finished training run")
    opens = next((foreign.open_folder for foreign in FOREIGN if foreign.opens(config)), _open_ours)
    model = opens(path, config, device=device, precision=precision, device_map=device_map)
    model.hub_id = None if os.path.isdir(name) or shipped.is_shipped(name) else str(name)
    return model


def _open_ours(
    path: Path, config: dict[str, Any], *, device: str, precision: Precision | None, device_map: object
) -> Model:
    if device_map is not None:
        raise CdlmError("device_map is for foreign masked models: give a device")
    folder = hub.read(path, config)
    system = names.outline(folder.config, path / "config.json")
    hub.load_weights(system, folder)
    return hub.ready(system, device, precision)


def _open_adapter(path: Path, **how: Any) -> Model:
    """The base of an adapter, with it in its network, so that rules can read what it adds."""
    adapter = lora.read_adapter(path)
    if lora.is_adapter(hub.locate(adapter.base)):
        raise CdlmError(f"{path} adapts {adapter.base}, which is an adapter itself: name a model in its {lora.CONFIG}")
    model = load(adapter.base, **how)
    network = getattr(model, "network", None)
    if not isinstance(network, torch.nn.Module):
        raise CdlmError(f"{path} adapts {adapter.base}, which has no network to adapt: name another model")
    model.fingerprint = lora.attach(network, adapter, model.stored_fingerprint(), adapter.base)
    model.folder = path
    return model


def merge(name: str | Path, out: str | Path) -> None:
    """Add an adapter to the weights of its base, and write both as one plain model folder, in the format of the base.

    Args:
        name: folder or Hub id of the adapter.
        out: a new folder.

    Raises:
        CdlmError: there is no such adapter, its base is not there or another, or `out` is there already.
    """
    path, folder = hub.locate(name), Path(out)
    if not lora.is_adapter(path):
        raise CdlmError(f"{path} holds no adapter, as cdlm train --lora writes it: there is nothing to merge")
    check_new_folder(folder)
    model, base = load(path, device="cpu", precision="fp32"), hub.locate(lora.read_settings(path)[1])
    network = getattr(model, "network", None)
    assert isinstance(network, torch.nn.Module)
    lora.merge(network)
    if isinstance(model, Pretrained):
        model.save_pretrained(folder)
        if (path / "config.yaml").exists():  # of the text that it was trained on
            write_text(folder / "config.yaml", (path / "config.yaml").read_text(encoding="utf-8"))
        return
    from cdlm.masked.checkpoints.tuned import write_checkpoint

    write_checkpoint(model, base, folder)


def open_session(
    model: Model | str | Path, *, sampling: Sampling | None = None, seed: int = 0, batch_size: int | None = None,
    device: str = "auto", devices: int | Group = 1, precision: Precision | None = None, progress: bool = False,
    device_map: str | Mapping[str, int | str] | None = None, **settings: Any,
) -> Session:  # fmt: skip
    """A model with how it is sampled and the machine it runs on, to serve any number of runs.

    Args:
        model: from `load`, or its folder or Hub id.
        sampling: in place of the model's own.
        batch_size: samples in flight; by default 64, of a foreign model 4.
        device, precision: of a model that is loaded here.
        devices: processes to divide the samples among; each loads the model once, from its folder.
        device_map: of a foreign model that is loaded here, how to divide it among devices, such as "auto".
        settings: flat settings of the model's family, and `steps`; see `generate`.

    Raises:
        CdlmError: a setting that there is not, or of another family; several devices for a model without a folder.
    """
    if type(devices) is not int and not isinstance(devices, Group):
        raise CdlmError(f"devices is a number of processes, got {shown(devices)}")
    if device_map is not None and (devices != 1 or isinstance(model, Model)):
        raise CdlmError("device_map divides one model that is loaded here among the devices of one process: use one")
    place = resolve_device(device)
    loaded = (
        model if isinstance(model, Model) else load(model, device=place, precision=precision, device_map=device_map)
    )
    chosen = sampling_of(loaded, sampling, settings)
    workers = None
    if devices != 1:
        if loaded.folder is None:
            raise CdlmError(f"several devices need a model that can be loaded again, and {loaded.name} has no folder")
        opened = partial(_load_on, str(loaded.folder), _precision_of(loaded, precision))
        workers = workers_on(devices, opened, loaded.device.type)
    return Session(loaded, chosen, RunOptions(seed=seed), batch_size, workers, progress)


def _precision_of(model: Model, wanted: Precision | None) -> Precision | None:
    """What further processes load the model in, so that they compute as it does."""
    if model.precision == "fp32":
        return "fp32"
    return "bf16" if model.precision == "bf16" else wanted


def _load_on(folder: str, precision: Precision | None, device: str) -> Model:
    return load(folder, device=device, precision=precision)


def sampling_of(
    model: Model, sampling: Sampling | None, settings: Mapping[str, Any], *, lenient: bool = False
) -> Sampling:
    """How a model is sampled: with some flat settings of `sampling` replaced, or of what the model is sampled by.

    Args:
        lenient: pass over settings of other families.

    Raises:
        CdlmError: as `configured`, or the sampling is of another family.
    """
    named = {name for name, value in settings.items() if value is not None}
    base = model.base_of(named) if sampling is None else sampling
    check_family(base, model)
    return configured(base, settings, lenient=lenient)


def configured(sampling: S, settings: Mapping[str, Any], *, lenient: bool = False) -> S:
    """The sampling with some flat settings replaced; None leaves a setting as it is.

    Args:
        lenient: pass over settings of the other families, for work on models of several.

    Raises:
        CdlmError: a setting that there is not, or of another family.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    known = sampling.flat_names()
    for name in sorted(given.keys() - known):
        others = [f"{family.family} models" for family in FAMILIES if name in family.flat_names()]
        if not others:
            raise CdlmError(f"there is no setting {name!r}{nearest(name, all_flat_names())}: {_list(sampling)}")
        if not lenient:
            raise CdlmError(
                f"{name} is a setting of {' and '.join(others)}, and this one is {sampling.family}: {_list(sampling)}"
            )
        next(family for family in FAMILIES if name in family.flat_names())().with_flat(**{name: given[name]})  # checks
    return sampling.with_flat(**{name: value for name, value in given.items() if name in known})


def all_flat_names() -> list[str]:
    """Flat settings of all families."""
    return sorted({name for family in FAMILIES for name in family.flat_names()})


def _list(sampling: Sampling) -> str:
    return f"{sampling.family} models have {', '.join(sorted(sampling.flat_names()))}"


def open_bench(
    session: Session, n: int, *, length: int | None = None, workload: str | Workload | None = None,
    judge: str | None = None, judge_steps: int | None = None, recordings: Path | None = None,
) -> Bench:  # fmt: skip
    """The full run of `n` samples of a session, and the judge of the text that its model was trained on.

    Args:
        session: of a model in a run folder, whose settings name the text.
        length: tokens of a sample; by default as in training.
        workload: what the samples are asked for, an object or its text; by default they are drawn from nothing.
        judge: folder or Hub id of a causal language model; by default a small one is trained on the text and cached.
        judge_steps: training steps of the small one; by default 500, or as many as read a small text 16 times.
        recordings: folder that holds the full run; by default it is drawn.

    Raises:
        CdlmError: the model's folder is not that of a run, the recordings are not of this session, or the workload
            does not suit the model.
    """
    text = run_text(session.model)
    requests, work = ask(session, n, length, workload)
    recording = None if recordings is None else find_recording(recordings, session, requests)
    small = small_judge(text, judge_steps)
    opens = partial(open_judge, judge, small, str(session.device), session.progress)
    # A wrong name is refused before any work; the small judge is trained when it is needed.
    real = real_text(text)
    return Bench.of(session, requests, opens() if judge else opens, real, recording, work)


def ask(
    session: Session, n: int, length: int | None = None, workload: str | Workload | None = None
) -> tuple[list[Request], Work | None]:
    """The requests of `n` samples from nothing, or of a workload with what they were made from.

    Args:
        session: for a workload, of a model in a run folder; its seed is that of the workload.

    Raises:
        CdlmError: there is no such workload, it does not suit the model, or a length stands beside it.
    """
    if workload is None:
        return session.requests(n=n, length=length), None
    chosen = WORKLOADS.parse(workload)
    if length is not None:
        raise CdlmError(
            f"a workload has lengths of its own, got length={length} beside {chosen!r}: leave one of them out"
        )
    work = chosen.draw(real_text(run_text(session.model)), n, session.seed)
    return list(work.requests), work


def run_text(model: Model) -> RunText:
    """The text of the run that a model is of."""
    if model.folder is None:
        raise CdlmError(f"{model.name} has no run folder, whose settings would name the text that it is judged beside")
    return RunText.of(names.read_run(model.folder), model.tokenizer)


def real_text(text: RunText) -> RealText:
    """The real text of a run, that samples are compared with."""
    return RealText(text.valid, text.unread, text.tokenizer, text.config.source, text.train.store)


def small_judge(text: RunText, steps: int | None = None) -> SmallJudge:
    """How the small judge of a run's text is trained; it is kept in the cache of the run.

    Args:
        steps: of its training; by default those of `SmallJudge`.
    """
    cache = caches.place_of(text.config.cache) / "judges"
    return SmallJudge(text.judge, text.tokenizer, text.config.batch_size, cache, steps)


def evaluate(
    model: Model,
    texts: Samples | Sequence[str] | Mapping[str, Samples | Sequence[str]],
    *,
    judge: str | Sequence[str] = OWN,
    judge_steps: int | None = None,
    distances: Distances | None = None,
    device: str = "auto",
    progress: bool = False,
) -> Evaluation:
    """Measure texts beside real text of the kind that a model learned, and beside text without order.

    Args:
        model: from `load` or `train`; the settings of its folder name the text.
        texts: samples of any model, or other texts; several sets by name. Of sets of different sizes as many texts are
            measured as the smallest has.
        judge: causal language models for AR-NLL, by folder, GGUF file or Hub id; "own" is a small GPT-2 that is trained
            on the text once, and cached.
        judge_steps: training steps of the small one; by default 500, or as many as read a small text 16 times.
        distances: how the distribution is compared with real text. By default by n-grams and five splits, and with
            MAUVE if its package is installed.
        device: of the judges; "auto" is a GPU if there is one.
        progress: show the training of a small judge; by default it is silent.

    Returns:
        a table, which prints itself: `rows`, `notes`, `markdown()` and `save(folder)`.

    Raises:
        CdlmError: no texts, or too little real text; or the model has no folder of a run.
    """
    check_object("evaluate", Model, model=model)
    check_flag("evaluate", progress=progress)
    if distances is not None:
        check_object("evaluate", Distances, distances=distances)
    named = texts if isinstance(texts, Mapping) else {"samples": texts}
    if not named:
        raise CdlmError("expected at least one set of texts to measure, got none: draw some with generate")
    if wrong := [name for name in named if not isinstance(name, str) or not name.strip()]:
        raise CdlmError(f"expected a name for each set of texts, got {shown(wrong[0])}: write a text as its key")
    sets = {name: entries_of(some, name) for name, some in named.items()}
    return evaluate_entries(
        run_text(model), sets, [judge] if isinstance(judge, str) else judge, judge_steps,
        distances=distances, device=resolve_device(device), progress=progress,
    )  # fmt: skip


def evaluate_entries(
    text: RunText, sets: Mapping[str, Sequence[Entry]], judges: Sequence[str] = (OWN,), judge_steps: int | None = None,
    *, n: int | None = None, distances: Distances | None = None, device: str = "cpu", devices: int | Group = 1,
    progress: bool = False,
) -> Evaluation:  # fmt: skip
    """The table of `evaluate` for texts that were read from files. The model of the run is not loaded.

    Args:
        device, devices: where the judges run, and on how many processes.
        n: texts of each set to use; by default as many as the smallest has.
    """
    if not isinstance(judges, Sequence) or not judges or not all(isinstance(name, str) and name for name in judges):
        raise CdlmError(f"expected a judge or a list of them, got {shown(judges)}: name folders, GGUF files or Hub ids")
    count = min([len(entries) for entries in sets.values()] + ([] if n is None else [n]))
    small = small_judge(text, judge_steps)
    notes = list[str]()
    if OWN in judges and not text.config.judge_share:
        notes.append("the own judge read the generator's training text (judge_share 0): copying that text is rewarded.")
    return evaluate_files(
        {name: entries[:count] for name, entries in sets.items()}, real_text(text),
        [partial(open_judge, name, small, progress=progress) for name in judges],
        distances=distances, device=device, devices=devices, notes=notes,
    )  # fmt: skip


def warning_of_commits(session: Session) -> str | None:
    """What is to be said of a session that commits with a model that was not trained for it; None if nothing is, or its
    training is not known."""
    folder = session.model.folder
    if getattr(session.sampling, "commit", None) is None or folder is None or not (folder / "config.yaml").exists():
        return None
    masking = names.read_run(folder).masking
    if MASKINGS.parse(masking).subsets:
        return None
    return (
        f"this model was trained with masking {masking}, under which it never saw single tokens given: commits may ruin"
        " its text; train with a Mixture that has RandomSubset()"
    )


def with_halt(
    session: Session, halt: str | Criterion | None, requests: list[Request], work: Work | None = None
) -> Session:
    """The session under a rule, given as an object or as its text; "auto" is the one that was calibrated for it.

    Args:
        work: that the requests are of.

    Raises:
        CdlmError: there is no such rule, or none was calibrated for this model, sampling and length, or workload.
    """
    if isinstance(halt, str) and halt == "auto":
        folder = session.model.folder
        if folder is None:
            raise CdlmError('halt="auto" needs a model that was loaded from a folder: give a rule')
        halt = calibrated_rule(folder, session.model.has_weights, settings_of(session, requests, work))
    return session.with_criterion(parse_criterion(halt))


def generate(
    model: Model,
    prompts: Iterable[Prompt | Message] | None = None,
    *,
    n: int = 1,
    length: int | None = None,
    sampling: Sampling | None = None,
    halt: str | Criterion | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    record: bool = False,
    watch: bool = False,
    progress: bool | None = None,
    new_tokens: int | None = None,
    chat: bool = False,
    system: str | None = None,
    template: bool = True,
    **settings: Any,
) -> Samples:
    """Draw samples.

    Args:
        model: from `load` or `train`.
        prompts: prefixes, or templates such as "The [8] sat on the [2]." whose numbers are tokens to generate; the text
            "[8]" is written as "\\[8]". With `chat` also conversations, `[{"role": "user", "content": "..."}, ...]`.
        n: samples of each prompt, or in all when there are none.
        length: positions of a sample; by default those of training.
        sampling: a `Diffusion`, an `Unmasking` or a `LeftToRight`. By default `model.sampling`: what the model's folder
            recommends, if anything, and else its paper's. A recommended sampler holds as a whole: where steps, solver,
            grid or commit is given, the rest is as in the paper. Of a sampling that is given, or was assigned to the
            model, settings replace one by one.
        halt: a halting rule, as an object or as its text; "auto" is the one that cdlm calibrate has chosen.
        seed: with the number of a sample it fixes the sample, whatever the batch.
        batch_size: samples in flight; by default 64 (4 of a foreign model).
        record: keep per-step statistics of every sample, and of masked models every token that is committed.
        watch: record, and keep the confidence and entropy of every position too, for `samples.watch`.
        progress: show a bar; by default none is shown.
        new_tokens: of a masked model, positions after each prompt, in place of `length`.
        chat: of a masked model, the prompts are a user's messages, or conversations, put into its chat template; what
            is said is text, without holes.
        system: with `chat`, a message of the system that each conversation begins with.
        template: if False, prompts are plain text, without holes.
        settings: what `sampling` is to have otherwise, under the names of the command line: `steps`; of continuous
            models `solver`, `grid`, `projection`, `softmax_temperature`, `score_temperature`, `guidance`,
            `init_scale`, `passes`, `commit`, `reopen`, `read_out`; of masked models `policy`, `temperature`,
            `cfg_scale`, `cache`, `sparse`; of autoregressive ones `temperature`. Objects or their texts; None is as if
            it were not given, and the text "none" commits nothing.

    Raises:
        CdlmError: a setting is out of range, unknown or of another family, or a prompt leaves nothing to generate.
    """
    session = open_session(model, seed=seed, batch_size=batch_size, progress=False if progress is None else progress)
    session = session.with_sampling(sampling_of(session.model, sampling, settings))
    if warning := warning_of_commits(session):
        warnings.warn(warning, stacklevel=2)
    requests = session.requests(prompts, n, length, new_tokens=new_tokens, chat=chat, system=system, template=template)
    return _kept(with_halt(session, halt, requests), record, watch).run(requests)


def _kept(session: Session, record: bool, watch: bool) -> Session:
    """The session, keeping of its steps what is asked for."""
    check_flag("a run", watch=watch)
    recorded = session.recorded(record)
    return recorded.watched() if watch else recorded


def likelihood(
    model: Model,
    prompts: Iterable[Prompt | Message],
    answers: Iterable[str],
    *,
    chat: bool = False,
    system: str | None = None,
    template: bool = True,
    levels: int = 8,
    seed: int = 0,
    batch_size: int | None = None,
    ode: Ode | None = None,
    read_out: float | None = None,
    progress: bool | None = None,
) -> Answers:
    """How likely answers are, each given its prompt: the bound on minus their log-probability, in nats.

    The prompt is given and not scored. Diffusion models have a bound, see `docs/likelihood.md`; of autoregressive ones
    it is the negative log likelihood itself. No end of text is added to an answer.

    Args:
        model: from `load` or `train`.
        prompts: as of `generate`, without holes.
        answers: plain texts, one for each prompt. A blank between the two may end the prompt or begin the answer, which
            it is a part of.
        chat, system, template: as of `generate`.
        levels: draws of the bound of each answer.
        seed: with its number it fixes an answer's noise, whatever the batch.
        batch_size: answers at a time; by default 64 (4 of a foreign model).
        ode: of continuous models, also compute the likelihood of the ODE.
        read_out: of continuous models, the noise level at which tokens are read out.
        progress: show a bar; by default none is shown.

    Raises:
        CdlmError: the numbers of prompts and answers differ, an answer is longer than the model's length, or the model
            has no likelihood, or not with these settings.
    """
    session = open_session(model, batch_size=batch_size, progress=False if progress is None else progress)
    settings = LikelihoodSettings(levels, ode, seed, session.batch_size or model.batch_size, read_out)
    return likelihood_of_answers(
        session, prompts, answers, chat=chat, system=system, template=template, settings=settings
    )


def decode(
    logits_fn: LogitsFn | MaskedModel,
    prompts: Iterable[Any],
    length: int,
    *,
    constants: Constants | None = None,
    n: int = 1,
    sampling: Unmasking | None = None,
    halt: str | Criterion | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    record: bool = False,
    watch: bool = False,
    constraints: Mapping[int, int] | None = None,
    **settings: Any,
) -> Samples:
    """Decode with any masked model, given as a plain function.

    Args:
        logits_fn: (tokens [b n], attention mask [b n] or None) -> logits [b n v]; or a model, as from `load`, which
            knows its constants. `cdlm.masked.Function` adds a tokenizer and a device to a function.
        prompts: lists of tokens, or a tensor or array of them; None stands for a position to generate. Different
            lengths are padded on the left.
        length: positions to generate after each prompt.
        constants: mask and ends of the vocabulary, of a function.
        n: samples of each prompt.
        sampling, halt, seed, batch_size, record, watch, settings: as of `generate`.
        constraints: tokens that are given in the generated part, by their place in it.

    Raises:
        CdlmError: a setting is out of range, the model's logits are not numbers or of another vocabulary, or a prompt
            holds the mask.
    """
    model = as_masked_model(logits_fn, constants)
    session = open_session(model, seed=seed, batch_size=batch_size)
    session = session.with_sampling(sampling_of(session.model, sampling, settings))
    requests = canvases(prompts, length, n, constraints)
    return _kept(with_halt(session, halt, requests), record, watch).run(requests)
