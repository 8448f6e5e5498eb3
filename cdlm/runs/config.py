"""The settings of a training run: from the command line, from YAML, and of a trained model."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints

from cdlm.autoregressive.system import SYSTEMS as AUTOREGRESSIVE
from cdlm.continuous.systems import SYSTEMS as CONTINUOUS
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core import plain_yaml
from cdlm.core.checks import MOST_DEVICES, MOST_ROWS, Settings, check_whole, shown
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.files import check_path
from cdlm.core.inert import shortened
from cdlm.core.parsing import Registry, nearest
from cdlm.core.progress import announce
from cdlm.core.schema import Positive, Whole, checked
from cdlm.core.tensors import without_memory
from cdlm.data.division import Division
from cdlm.data.masking import MASKINGS
from cdlm.data.sources import SOURCES, Source, Stories
from cdlm.masked.system import SYSTEMS as MASKED
from cdlm.models import hub, shipped
from cdlm.models.system import System, SystemConfig
from cdlm.runs import caches
from cdlm.sampling.texts import Special
from cdlm.training.options import TrainOptions

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SYSTEMS: Registry[SystemConfig] = Registry("system", SystemConfig, **CONTINUOUS, **MASKED, **AUTOREGRESSIVE)

SHARES = ("judge_share", "unread_share")
"""Settings of `RunConfig` that divide the training text."""
CLASSES = ("source", "system")
"""Settings of `RunConfig` that are a choice of classes."""
MODE = "cdlm"
"""How jsonargparse calls `plain_yaml`, by which it reads every value."""
LONGEST = 600
"""Characters of its messages that are shown."""
DEFAULT_MASKING = "Mixture(((0.4, Prefix()), (0.4, RandomSubset()), (0.2, Unconditional())))"


@dataclass(frozen=True)
class RunConfig(Settings):
    """A training run.

    Args:
        source: the text: Stories, Arithmetic, Stdlib, Files or Hub, with its settings.
        system: the model: CDCD, Plaid, SSD, LangFlow, Masked or Autoregressive, with its settings.
        tokenizer: name or folder of a Hugging Face tokenizer; by default a byte-level BPE is trained on the text.
        vocab_size: tokens of the BPE that is trained; by default 2,048, or as many as the text supports.
        length: positions of a row.
        rows: pack joins documents and cuts rows from them; document gives each its own row, filled too, with the
            end-of-text token as text up to the row's end, so that the model learns where to end.
        masking: which positions are to be generated, as a constructor text.
        judge_share: share of the training documents that the small judge of `cdlm evaluate` gets to itself, in [0, 1),
            so that copying its training text earns a model nothing; with 0 the judge reads the model's own.
        unread_share: share of the training documents that neither of them reads, in [0, 1): real text like the training
            text, to measure samples beside.
        batch_size: rows of a batch, per process.
        validation_rows: held-out rows that are scored at each validation.
        preview: samples that are written at each validation.
        workers: processes that read data; 0 reads in the training process.
        cache: folder of tokenised data and small judges. What a run folder says of it is followed only if a training on
            this machine has used it; else reading the folder writes to the default.
        training: how to train.
    """

    source: Source = field(default_factory=Stories)
    system: SystemConfig = field(default_factory=CDCD)
    tokenizer: str | None = None
    vocab_size: int | None = None
    length: int = 64
    rows: Literal["pack", "document", "filled"] = "pack"
    masking: str = DEFAULT_MASKING
    judge_share: float = 1 / 3
    unread_share: float = 0.1
    batch_size: int = 64
    validation_rows: int = 256
    preview: int = 4
    workers: int = 0
    cache: str = caches.DEFAULT
    training: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        check_whole("a run", length=self.length, batch_size=self.batch_size, validation_rows=self.validation_rows)
        if self.vocab_size is not None:
            check_whole("a run", vocab_size=self.vocab_size)
        check_whole("a run", least=0, largest=MOST_ROWS, preview=self.preview)
        check_whole("a run", least=0, largest=MOST_DEVICES, workers=self.workers)
        check_path(self.cache)
        if self.tokenizer is not None:
            check_path(self.tokenizer)
        _ = self.division  # checks the shares
        law, block = MASKINGS.parse(self.masking), getattr(self.system, "block", None)
        if block is None:
            return
        if block > self.length:
            raise CdlmError(f"a block of {block} does not fit into rows of {self.length}: lower block or raise length")
        if block not in law.blocks:
            raise CdlmError(
                f"a system that generates blocks of {block} learns it with that law, masking Block({block}), and got"
                f" {self.masking}"
            )

    @property
    def division(self) -> Division:
        """How the training documents are divided."""
        return Division(float(self.judge_share), float(self.unread_share))

    @property
    def preset(self) -> dict[str, int | float | str]:
        """Flat settings of the sampler that its model is to recommend; empty if none was measured to be better than the
        paper's."""
        return self.system.preset(MASKINGS.parse(self.masking).subsets)

    def to_yaml(self) -> str:
        """The settings as a YAML file, which `read_run` and `--config` read back."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: class_values(values[name]) for name in CLASSES}
        values["training"] = asdict(self.training)
        return as_yaml(values)


class Settled(TypedDict):
    """What every system's part `model` of a config.json has beside the settings of the system."""

    system: str
    vocab: Positive
    mask_id: NotRequired[Whole | None]
    eos_id: NotRequired[Whole | None]


def run_parser(prog: str) -> ArgumentParser:
    """A parser of the settings of a run, from the command line and from YAML texts."""
    import yaml
    from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of --training.* stands there
    set_loader(MODE, plain_yaml.load, exceptions=(yaml.YAMLError,))
    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False, allow_abbrev=False, parser_mode=MODE)
    parser.add_class_arguments(RunConfig)
    parser.add_argument("--config", action="config", help="YAML file of these settings")
    return parser


def parse_run(argv: list[str], prog: str = "cdlm train") -> RunConfig:
    """The configuration that the arguments of a command line describe. `--config` may also be the YAML itself.

    Only the sources and systems that cdlm lists can be named, and classes of the user's own that are defined already;
    nothing is imported because a text names it.

    Raises:
        CdlmError: an argument or a value is not known; the message names the file of settings where it stands.
    """
    words, files = _checked(argv)
    if "{}" in words:  # which jsonargparse takes for settings of any class, and forgets
        raise CdlmError("{} holds no settings: leave it out")
    try:
        return _parsed(words, prog)
    except CdlmError as error:
        for file, text in files.items():
            if str(error) == _failure(["--config", text], prog):
                raise CdlmError(f"{file}: {error}") from error
        raise


def print_help_of(argv: list[str], prog: str) -> None:
    """Print the help of a class of settings, as in `--system.help Plaid`, and exit."""
    words, _ = _checked(argv)
    with _known_classes_only():
        run_parser(prog).parse_args(words)


def _parsed(argv: list[str], prog: str) -> RunConfig:
    from jsonargparse import ArgumentError

    try:
        with _known_classes_only():
            parser = run_parser(prog)
            named = parser.parse_args(argv)
            # A class that is named would keep the default class's values of the settings that both have. So the classes
            # are found out first, and the settings read again, each from its own defaults.
            parser = run_parser(prog)
            parser.set_defaults({key: {"class_path": named[key].class_path} for key in CLASSES})
            settings = parser.parse_args(argv)
            values = {key: value for key, value in vars(parser.instantiate(settings)).items() if key != "config"}
        return RunConfig(**values)
    except (ArgumentError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
        message = " ".join(str(getattr(error, "message", None) or error).split())
        message = re.sub(r"Parser key \"([\w.]+)\": ", r"\1: ", re.sub(r"<class '(\w+)'>", r"\1", message))
        raise CdlmError(f"{shortened(message, LONGEST)} ({prog} --help lists the settings)") from error


def _failure(argv: list[str], prog: str) -> str | None:
    """Why arguments are refused; None if they are not."""
    try:
        _parsed(argv, prog)
    except CdlmError as error:
        return str(error)
    return None


@contextmanager
def _known_classes_only() -> Iterator[None]:
    """Let jsonargparse import nothing but cdlm and the user's own classes, which are there already.

    Its setting holds for the whole process, where others may use it too: it is put back.
    """
    from jsonargparse import _common, set_parsing_settings

    before = dict(_common.parsing_settings)
    own = [path_of(kind) for base in (Source, SystemConfig) for kind in _defined(base)]
    try:
        set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=["cdlm", *own])
        yield
    finally:
        _common.parsing_settings.update(before)


def _classes(setting: str) -> Registry[Any]:
    """What may stand in a setting of `RunConfig` that is a choice of classes, by the names of the classes."""
    if setting == "source":
        return SOURCES
    return Registry("system", SystemConfig, *SYSTEMS.values())


def path_of(kind: type) -> str:
    """Module and name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def _defined(base: type) -> Iterator[type]:
    """The classes that were made of a base so far and can be found where they say they are."""
    for kind in base.__subclasses__():
        found: Any = sys.modules.get(kind.__module__)
        for name in kind.__qualname__.split("."):
            found = getattr(found, name, None)
        if found is kind:
            yield kind
        yield from _defined(kind)


def _class_path(setting: str, name: object) -> str:
    """Where the class of that name is: one of ours, of whatever module of cdlm, or one that is defined already.

    Raises:
        CdlmError: there is none; nothing was imported to find out.
    """
    known = _classes(setting)
    if not isinstance(name, str):
        raise CdlmError(f"class_path of a {setting} is the name of a class, got {shown(name)}")
    short = name.rpartition(".")[2] if name.startswith("cdlm.") else name
    if short in known:
        return path_of(known[short])
    if any(path_of(kind) == name for kind in _defined(known.kind)):
        return name
    own = "; a class of your own is known once you have imported its module in Python" if "." in name else ""
    raise CdlmError(f"{known.unknown(name[:100])}{own}")


def class_values(value: Any) -> dict[str, Any]:
    """A source or a system as it stands in a file: its class, without a module if it is one of ours, and settings."""
    kind = type(value)
    name = kind.__name__ if kind in (*SOURCES.values(), *SYSTEMS.values()) else path_of(kind)
    return {"class_path": name, "init_args": asdict(value)}


def as_yaml(values: Any) -> str:
    """Plain values as YAML text, which `plain_yaml` reads back."""
    import yaml

    return yaml.dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=120)


@cache
def _dumper() -> type[Any]:
    """A YAML dumper that quotes every text that `plain_yaml` would take for something else."""
    import yaml

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        if not _is_unicode(value):
            raise CdlmError(f"{value!r} in the settings is not UTF-8 text: rename what it names")
        try:
            plain = plain_yaml.load(value) == value
        except yaml.YAMLError:
            plain = False
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, None if plain else '"')

    Dumper.add_representer(str, text)
    return Dumper


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _checked(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments whose settings were all read by `plain_yaml` and whose classes are known.

    Returns:
        the arguments, with settings as YAML text and classes by their full path, and that text by the file it is from.
    """
    words, files, rest = list[str](), dict[str, str](), iter(argv)
    for word in rest:
        option, equals, value = word.partition("=")
        name = option[2:].rstrip("+").replace("init_args.", "") if option.startswith("--") else ""
        checked = name in _holders() or name in _numbers()
        if not checked or (not equals and (value := next(rest, None)) is None):
            words.append(word)
            continue
        text = _text_of(name, value)
        if name == "config" and not _is_text(value):
            files[value] = text
        words.append(f"{option}={text}")
    return words, files


def _holders() -> Collection[str]:
    """Options whose values name classes or hold further settings."""
    return ["config", "training", *CLASSES, *(f"{name}.{what}" for name in CLASSES for what in ("class_path", "help"))]


def _text_of(name: str, value: str) -> str:
    """A value of an option that names classes, holds further settings or is a number, checked."""
    of = "settings of a run"
    if name in _numbers():
        return as_yaml(_number(name, value)).removesuffix("\n...\n").strip()
    if name == "config" and _is_text(value):
        return as_yaml(_today(plain_yaml.mapping_of(value, "--config", of)))
    if name == "config":
        read = plain_yaml.read_mapping(Path(value), of)
        try:
            return as_yaml(_today(read))
        except CdlmError as error:
            raise CdlmError(f"{value}: {error}") from error
    if name == "training":
        return as_yaml(_named(name, plain_yaml.mapping_of(value, "--training", of)))
    if name in CLASSES and _is_text(value):
        return as_yaml(_part(name, plain_yaml.mapping_of(value, f"--{name}", of)))
    return _class_path(name.partition(".")[0], value)


def _numbers() -> dict[str, tuple[type, ...]]:
    """The settings that are numbers, true or false, or may be None, by their full name: what they can be.

    jsonargparse would read a text in their place by rules of its own, with aliases and without infinities.
    """
    kinds = {"": [RunConfig], "training.": [TrainOptions]}
    kinds |= {f"{name}.": [*_classes(name).values(), *_defined(_classes(name).kind)] for name in CLASSES}
    found: dict[str, set[tuple[type, ...]]] = {}
    for group, members in kinds.items():
        for name, hint in (item for kind in members for item in _hints(kind).items()):
            found.setdefault(group + name, set()).add(get_args(hint) or (hint,))
    return {name: hints[0] for name, (*hints,) in found.items() if len(hints) == 1 and {*hints[0]} <= _PLAIN}


@cache
def _hints(kind: type) -> Mapping[str, Any]:
    return {name: hint for name, hint in get_type_hints(kind).items() if get_origin(hint) in (None, UnionType, Union)}


_PLAIN = {int, float, bool, type(None)}
_SPELT = {f"{sign}{name}": f"{sign}.{name[:3]}" for sign in ("", "+", "-") for name in ("inf", "infinity", "nan")}
"""Infinities and NaN as Python and JSON write them, in YAML."""


def _number(name: str, value: Any) -> Any:
    """The value of a setting that is one of `_numbers`; what is not a text is left to its class."""
    import yaml

    if not isinstance(value, str):
        return value
    kinds = _numbers()[name]
    try:
        found = plain_yaml.load(_SPELT.get(value.strip().lower(), value))
    except yaml.YAMLError:
        found = value
    if type(found) in kinds or (type(found) is int and float in kinds):
        return found
    what = "true or false" if bool in kinds else "a whole number of at most 64 bits" if int in kinds else "a number"
    raise CdlmError(f"{name} is {what}, got {shown(value)}")


def _is_text(value: str) -> bool:
    """Whether a value holds settings, and not the name of a file or a class: those have no `: ` and no line break."""
    return not os.path.isfile(value) and (value.lstrip()[:1] in ("{", "[", "") or ": " in value or "\n" in value)


def _today(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of a file, with classes by their full path and all settings under the names of today."""
    known = [f.name for f in fields(RunConfig)]
    if unknown := next((name for name in values if name not in known), None):
        raise CdlmError(
            f"there is no setting {unknown[:100]!r}{nearest(unknown, known)}: use some of {', '.join(known)}"
        )
    values = {name: _number(name, value) if name in _numbers() else value for name, value in values.items()}
    parts = {name: _part(name, values[name]) for name in CLASSES if name in values}
    return values | parts | ({"training": _named("training", values["training"])} if "training" in values else {})


def _part(setting: str, part: Any) -> Any:
    """A class and its settings: the class by its full path, which may have moved, and the settings' new names."""
    if isinstance(part, str):
        return _class_path(setting, part)
    if not isinstance(part, dict):
        raise CdlmError(f"{setting} is a class_path and its init_args, got {shown(part)}")
    if "class_path" not in part and "init_args" not in part:
        return _named(setting, part)
    if odd := next((name for name in part if name not in ("class_path", "init_args")), None):
        raise CdlmError(f"{setting} is a class_path and its init_args, got {shown(odd)} beside them")
    named = {"class_path": _class_path(setting, part["class_path"])} if "class_path" in part else {}
    return {**named, "init_args": _named(setting, part.get("init_args") or {})}


def _named(owner: str, settings: Any) -> dict[str, Any]:
    """Settings by their names of today."""
    if not isinstance(settings, dict):
        raise CdlmError(f"{owner} has settings by their names, got {shown(settings)}")
    for name in settings:
        if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
            raise CdlmError(f"{owner} has settings by their names, and {shown(name)} is none")
    today = {hub.RENAMED.get(str(name), str(name)): value for name, value in settings.items()}
    numbers = _numbers()
    return {n: _number(f"{owner}.{n}", v) if f"{owner}.{n}" in numbers else v for n, v in today.items()}


def read_run(folder: str | Path) -> RunConfig:
    """The configuration of a run folder, of this version or an earlier one.

    Raises:
        CdlmError: the folder is not that of a training run, or its settings are not known.
    """
    try:
        return parse_run(run_arguments(folder))
    except CdlmError as error:
        named = str(error).startswith((str(folder), repr(str(folder))[:60]))
        raise error if named else CdlmError(f"{_file_of(folder)}: {error}") from error


def run_arguments(folder: str | Path) -> list[str]:
    """The settings of a run folder as arguments of `parse_run`. Runs of earlier versions divided no text.

    Its cache is that of the folder only if `caches.believed`.

    Raises:
        CdlmError: the folder is not that of a training run.
    """
    file = _file_of(folder)
    try:
        if not file.is_file():
            raise CdlmError(f"{folder} has no config.yaml: expected the folder of a training run")
    except (OSError, ValueError) as error:  # a name that is too long, a NUL
        raise CdlmError(f"{str(folder)[:100]!r} is no run folder ({error})") from error
    values = plain_yaml.read_mapping(file, "settings of a run")
    changed = {name: "0" for name in SHARES if name not in values}
    if isinstance(found := values.get("cache"), str) and found != caches.DEFAULT:
        changed["cache"] = caches.believed(found)
        if changed["cache"] == caches.DEFAULT and caches.place_of(found).is_dir():
            announce(f"{folder} names the cache {found}, which no training of yours has marked: --cache names it anew")
    return ["--config", str(file), *(f"--{name}={value}" for name, value in changed.items())]


def _file_of(folder: str | Path) -> Path:
    return shipped.place_of(folder) / "config.yaml"


def build_system(config: Mapping[str, Any], file: Path = Path("config.json")) -> System:
    """The system that the part `model` of a `config.json` describes, with fresh weights.

    Args:
        file: where it stands, for the error.
    """
    settings = system_config(config, file)
    return settings.build(config["vocab"], Special(config.get("mask_id"), config.get("eos_id")))


def outline(config: Mapping[str, Any], file: Path) -> System:
    """The same without memory for its weights, so that a size costs nothing before it was compared with a file.

    Raises:
        CdlmError: as `system_config`, or no tensor can be of such a size.
    """
    try:
        with without_memory():
            return build_system(config, file)
    except (RuntimeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise CdlmError(f"{file} has sizes that no model can have ({first_line(error)}); copy it again") from error


def system_config(config: Mapping[str, Any], file: Path = Path("config.json")) -> SystemConfig:
    """The settings of the system that the part `model` of a `config.json` describes.

    Raises:
        CdlmError: a setting is missing, unknown or of another kind, or out of range.
    """
    advice = "it does not fit this version; copy it again, or update cdlm"
    checked(config, Settled, str(file), advice)
    settings = {key: value for key, value in config.items() if key not in ("mask_id", "eos_id", "vocab", "system")}
    if config["system"] not in SYSTEMS:
        raise CdlmError(f"{file} asks for the system {config['system']!r}: this version knows {', '.join(SYSTEMS)}")
    kind = SYSTEMS[config["system"]]
    if unknown := settings.keys() - {f.name for f in fields(kind)}:
        raise CdlmError(f"{file}: the system {config['system']!r} has no setting {min(unknown)!r}; {advice}")
    for name in ("mask_id", "eos_id"):
        if (token := config.get(name)) is not None and token >= config["vocab"]:
            raise CdlmError(f"{file} has {name} {token}, expected one of the {config['vocab']} tokens; copy it again")
    if settings.get("start") is not None:  # weights are there already, and what to start from is another's name
        raise CdlmError(f"{file} has start {settings['start']!r}, expected null in a trained model; copy it again")
    return checked(settings, kind, str(file), advice)
