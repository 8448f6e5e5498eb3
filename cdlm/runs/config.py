"""The settings of a training run: from the command line, from YAML, and of a trained model."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from cdlm.autoregressive.system import SYSTEMS as AUTOREGRESSIVE
from cdlm.continuous.systems import SYSTEMS as CONTINUOUS
from cdlm.continuous.systems.cdcd import CDCD
from cdlm.core.checks import check_whole
from cdlm.core.errors import CdlmError, first_line
from cdlm.core.parsing import Registry
from cdlm.core.schema import Positive, Whole, checked
from cdlm.data.division import Division
from cdlm.data.masking import MASKINGS
from cdlm.data.sources import SOURCES, Source, Stories
from cdlm.masked.system import SYSTEMS as MASKED
from cdlm.models import hub
from cdlm.models.system import System, SystemConfig
from cdlm.sampling.texts import Special
from cdlm.training.options import TrainOptions

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

SYSTEMS: Registry[SystemConfig] = Registry("system", SystemConfig, **CONTINUOUS, **MASKED, **AUTOREGRESSIVE)

SHARES = ("judge_share", "unread_share")
"""Settings of `RunConfig` that divide the training text."""
DEFAULT_MASKING = "Mixture(((0.4, Prefix()), (0.4, RandomSubset()), (0.2, Unconditional())))"


@dataclass(frozen=True)
class RunConfig:
    """A training run.

    Args:
        source: the text: Stories, Arithmetic, Stdlib, Files or Hub, with its settings.
        system: the model: CDCD, Plaid, SSD, LangFlow, Masked or Autoregressive, with its settings.
        tokenizer: name or folder of a Hugging Face tokenizer; by default a byte-level BPE is trained on the text.
        vocab_size: tokens of the BPE that is trained.
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
        cache: folder of tokenised data.
        training: how to train.
    """

    source: Source = field(default_factory=Stories)
    system: SystemConfig = field(default_factory=CDCD)
    tokenizer: str | None = None
    vocab_size: int = 480
    length: int = 64
    rows: Literal["pack", "document", "filled"] = "pack"
    masking: str = DEFAULT_MASKING
    judge_share: float = 1 / 3
    unread_share: float = 0.1
    batch_size: int = 64
    validation_rows: int = 256
    preview: int = 4
    workers: int = 0
    cache: str = "~/.cache/cdlm"
    training: TrainOptions = field(default_factory=TrainOptions)

    def __post_init__(self) -> None:
        check_whole("a run", length=self.length, batch_size=self.batch_size, validation_rows=self.validation_rows)
        check_whole("a run", least=0, preview=self.preview, workers=self.workers)
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
        import yaml

        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values |= {name: class_values(values[name]) for name in ("source", "system")}
        values["training"] = asdict(self.training)
        return yaml.dump(values, Dumper=_dumper(), sort_keys=False, allow_unicode=True, width=120)


class Settled(TypedDict):
    """What every system's part `model` of a config.json has beside the settings of the system."""

    system: str
    vocab: Positive
    mask_id: NotRequired[Whole | None]
    eos_id: NotRequired[Whole | None]


def run_parser(prog: str) -> ArgumentParser:
    """A parser of the settings of a run, from the command line and from YAML files."""
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)  # the help of --training.* stands there
    parser = ArgumentParser(prog=prog, exit_on_error=False, default_env=False)
    parser.add_class_arguments(RunConfig)
    parser.add_argument("--config", action="config", help="YAML file of these settings")
    return parser


def parse_run(argv: list[str], prog: str = "cdlm train") -> RunConfig:
    """The configuration that the arguments of a command line describe. `--config` may also be the YAML itself.

    Raises:
        CdlmError: an argument or a value is not known.
    """
    from jsonargparse import ArgumentError

    argv = [_today(word) if last == "--config" else word for last, word in zip(["", *argv], argv, strict=False)]
    try:
        parser = run_parser(prog)
        named = parser.parse_args(argv)
        # A class that is named would keep the default class's values of the settings that both have. So the classes are
        # found out first, and the settings read again, each from its own defaults.
        parser = run_parser(prog)
        parser.set_defaults({key: {"class_path": named[key].class_path} for key in ("source", "system")})
        settings = parser.parse_args(argv)
        values = {key: value for key, value in vars(parser.instantiate(settings)).items() if key != "config"}
        return RunConfig(**values)
    except ArgumentError as error:
        message = str(error.message or error)
        wrong = re.search(r'key "(source|system)":\s+Expected a dot import path string: (\w+)', message)
        if wrong:
            raise _classes(wrong[1]).unknown(wrong[2]) from error
        raise CdlmError(f"{message} ({prog} --help lists the settings)") from error


def _classes(setting: str) -> Registry[Any]:
    """What may stand in a setting of `RunConfig` that is a choice of classes, by the names of the classes."""
    if setting == "source":
        return SOURCES
    return Registry("system", SystemConfig, *SYSTEMS.values())


def class_values(value: Any) -> dict[str, Any]:
    """A source or a system as it stands in a file: its class, without a module if it is one of ours, and settings."""
    kind = type(value)
    name = kind.__name__ if kind in (*SOURCES.values(), *SYSTEMS.values()) else f"{kind.__module__}.{kind.__qualname__}"
    return {"class_path": name, "init_args": asdict(value)}


@cache
def _dumper() -> type[Any]:
    """A YAML dumper that quotes every text that the parser of settings would take for something else."""
    import yaml
    from jsonargparse import get_loader

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        try:
            plain = get_loader("yaml")(value) == value
        except yaml.YAMLError:
            plain = False
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, None if plain else '"')

    Dumper.add_representer(str, text)
    return Dumper


def _today(config: str) -> str:
    """The settings of a file of an earlier version under the names of today; other files as they are."""
    import yaml

    try:
        values = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return config  # the parser says what is wrong with it
    if not isinstance(values, dict):
        return config
    parts = {name: _renamed(values[name]) for name in ("source", "system") if isinstance(values.get(name), dict)}
    changed = any(part != values[name] for name, part in parts.items())
    return json.dumps(values | parts) if changed else config


def _renamed(part: dict[str, Any]) -> dict[str, Any]:
    """A class and its settings: the class without its module, which may have moved, and the settings' new names."""
    if "class_path" not in part:
        return {hub.RENAMED.get(name, name): value for name, value in part.items()}
    path, settings = str(part["class_path"]), part.get("init_args") or {}
    name = path.rpartition(".")[2] if path.startswith("cdlm.") else path
    return {**part, "class_path": name, "init_args": _renamed(settings)}


def read_run(folder: str | Path) -> RunConfig:
    """The configuration of a run folder, of this version or an earlier one.

    Raises:
        CdlmError: the folder is not that of a training run, or its settings are not known.
    """
    return parse_run(run_arguments(folder))


def run_arguments(folder: str | Path) -> list[str]:
    """The settings of a run folder as arguments of `parse_run`. Runs of earlier versions divided no text.

    Raises:
        CdlmError: the folder is not that of a training run.
    """
    import yaml

    file = Path(folder) / "config.yaml"
    if not file.exists():
        raise CdlmError(f"{folder} has no config.yaml: expected the folder of a training run")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        values = None  # the parser says what is wrong with it
    missing = [name for name in SHARES if isinstance(values, dict) and name not in values]
    return ["--config", str(file), *(f"--{name}=0" for name in missing)]


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
    import torch

    try:
        with torch.device("meta"):
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
